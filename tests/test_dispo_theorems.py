"""DiSPO: its theorems by exact enumeration, through the real `prepare` and `loss`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl.algorithms import diffu_grpo, dispo
from dmrl.diffusion import exact
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.sampler import Sampling
from dmrl.types import Denoiser, Models, Probe

M = tiny.MASK
THEORY = {"ratio_level": "sequence", "epsilon": None, "beta": 0.0, "p_mask_prompt": 0.0}
STATES = {2: jnp.array([1, M, M, 0]), 3: jnp.array([M, 2, M, M])}
KEY = jax.random.key(5)


def tuples(state, z):
    """All z-tuples of fillings of `state`: [N,Z,L]."""
    fills = np.asarray(exact.fillings(state, tiny.VOCAB, M))
    index = np.array(list(itertools.product(range(len(fills)), repeat=z)))
    return jnp.asarray(fills[index])


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def prepared(bind, params, old, prompt, states, fills, hp):
    """`dispo.prepare` of one state a rollout, [N,L] with fillings [N,Z,L], scored."""
    rows = states.shape[0]
    prompts = jnp.broadcast_to(prompt, (rows, prompt.shape[-1]))
    # The trajectory of the first filling: what is visible was revealed at step 0.
    rollout = tiny.rollout(fills[:, 0], jnp.where(states == M, 1, 0), prompts)
    step = jnp.ones((rows, 1), jnp.int32)
    probe = Probe(step, states[:, None], fills[:, None], tiny.reward_of(fills)[:, None])
    trio = Models(bind(params), None if old is None else bind(old), None)
    return dispo.prepare(trio, rollout, probe, KEY, tiny.INNER, hp)


def objective(bind, batch, hp):
    return lambda params: dispo.loss(Models(bind(params), None, None), batch, hp)[0]


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def gradient(bind, params, batch, hp):
    return jax.grad(objective(bind, batch, hp))(params)


def in_expectation(batch, probability):
    """The batch whose loss is the expectation over items, not their mean."""
    scale = probability * probability.shape[0] / jnp.sum(probability)
    return batch._replace(weight=batch.weight * scale[:, None, None])


@functools.partial(jax.jit, static_argnames="bind")
def tuple_probability(bind, params, prompt, state, fills):
    flat = fills.reshape(-1, fills.shape[-1])
    log_p = exact.filling_log_prob(bind(params), prompt, state, flat)
    return jnp.exp(jnp.sum(log_p.reshape(fills.shape[:2]), axis=1))


@functools.partial(jax.jit, static_argnames="bind")
def exact_gradient(bind, params, prompt, state, every):
    """Gradient of J_step over `every` filling of `state`."""
    return jax.grad(
        lambda p: exact.step_objective(bind(p), prompt, state, every, tiny.reward_of(every))
    )(params)


@pytest.mark.parametrize(
    ("masks", "z", "baseline", "moved"),
    [
        (2, 2, "mean", False),
        (2, 3, "mean", False),
        (3, 2, "mean", True),
        (3, 3, "mean", False),
        (2, 2, "leave_one_out", True),
        (2, 3, "leave_one_out", False),
    ],
)
def test_theorem_4_1_the_step_gradient_is_unbiased_up_to_the_baseline_s_factor(
    masks, z, baseline, moved
):
    params, prompt, bind = tiny.perceptron(4)
    old = jax.tree.map(lambda x: 0.8 * x, params) if moved else None
    state, hp = STATES[masks], dispo.Hyper(fillings=z, baseline=baseline, **THEORY)
    fills = tuples(state, z)
    assert fills.shape[0] == 3 ** (masks * z)
    probability = tuple_probability(bind, old or params, prompt, state, fills)
    assert float(jnp.sum(probability)) == pytest.approx(1, abs=1e-5)
    states = jnp.broadcast_to(state, (fills.shape[0], 4))
    batch = in_expectation(prepared(bind, params, old, prompt, states, fills, hp), probability)
    every = exact.fillings(state, tiny.VOCAB, M)
    want = exact_gradient(bind, params, prompt, state, every)
    factor = {"mean": (z - 1) / z, "leave_one_out": 1.0}[baseline]
    got = gradient(bind, params, batch, hp)
    tiny.assert_close(got, jax.tree.map(lambda g: -factor * g, want))


def visited_states(law, omega):
    """{state: probability} of a step drawn from omega on a trajectory drawn from the law."""
    visited = {}
    for (tokens, reveal), p in law.items():
        for step, weight in enumerate(omega.tolist()):
            pairs = zip(tokens, reveal, strict=True)
            state = tuple(token if when < step else M for token, when in pairs)
            visited[state] = visited.get(state, 0.0) + p * weight
    return visited


@pytest.mark.slow
def test_theorem_4_2_with_a_terminal_term_the_gradient_is_that_of_the_mixture():
    length, alpha_base, alpha_step = 3, 0.7, 0.4
    params, prompt, bind = tiny.perceptron(length)
    blank = jnp.full((length,), M)
    config = Sampling(length, 3, 3, 1.0)
    law = exact.sampler_law(bind(params), prompt, blank, tiny.VOCAB, config)
    hp = dispo.Hyper(fillings=2, **THEORY)
    log_omega = dispo.state_log_weights(jnp.array([3]), 3, hp.state_law, hp.exponent)
    visited = visited_states(law, jax.nn.softmax(log_omega[0]))
    assert sum(visited.values()) == pytest.approx(1, abs=1e-5)

    branches = [tuples(jnp.array(state), 2) for state in visited]
    counts = jnp.array([len(branch) for branch in branches])
    states = jnp.repeat(jnp.array(list(visited)), counts, axis=0)
    fills = jnp.concatenate(branches)
    step_batch = prepared(bind, params, None, prompt, states, fills, hp)
    masked = (states == M)[:, None]
    log_p = state_log_prob(bind(params), step_batch.prompt, step_batch.prompt_valid, states, fills)
    branch_p = jnp.exp(jnp.sum(jnp.where(masked, log_p, 0), axis=(1, 2)))
    state_p = jnp.repeat(jnp.array(list(visited.values())), counts)
    step_batch = in_expectation(step_batch, state_p * branch_p)

    # Groups of two one-shot completions: the policy whose likelihood diffu-GRPO uses.
    pairs = tuples(blank, 2)
    completions = pairs.reshape(-1, length)
    rollout = tiny.rollout(
        completions,
        prompt=jnp.broadcast_to(prompt, (len(completions), prompt.shape[0])),
        reward=tiny.reward_of(completions),
        group=jnp.arange(len(completions)) // 2,
    )
    trio, terminal_hp = Models(bind(params), None, None), diffu_grpo.Hyper(**THEORY)
    terminal_batch = diffu_grpo.prepare(trio, rollout, None, KEY, tiny.INNER, terminal_hp)
    pair_p = tuple_probability(bind, params, prompt, blank, pairs)
    terminal_batch = in_expectation(terminal_batch, jnp.repeat(pair_p, 2))

    @jax.jit
    @jax.grad
    def mixed_gradient(p):
        trio = Models(bind(p), None, None)
        base = diffu_grpo.loss(trio, terminal_batch, terminal_hp)[0]
        return alpha_base * base + alpha_step * dispo.loss(trio, step_batch, hp)[0]

    want = jax.tree.map(jnp.zeros_like, params)
    weights = {state: alpha_step * p for state, p in visited.items()}
    weights[tuple(blank.tolist())] += alpha_base
    for state, weight in weights.items():
        every = exact.fillings(jnp.array(state), tiny.VOCAB, M)
        slope = exact_gradient(bind, params, prompt, jnp.array(state), every)
        # Both terms use the mean of two as their baseline: both factors are 1/2.
        want = jax.tree.map(lambda x, g, w=weight: x - 0.5 * w * g, want, slope)
    tiny.assert_close(mixed_gradient(params), want)


def free_positions(theta, mask_id=M):
    """A denoiser of independent positions: logits theta [L,V], whatever is visible."""

    def encode(tokens, valid, *_):
        here = jnp.eye(theta.shape[0])[None]
        completion = jnp.broadcast_to(here, (tokens.shape[0], *here.shape[1:]))
        return jnp.pad(completion, ((0, 0), (tokens.shape[1] - theta.shape[0], 0), (0, 0)))

    def logits(hidden):
        out = hidden @ theta
        masked = jnp.expand_dims(jnp.arange(theta.shape[1]) == mask_id, range(out.ndim - 1))
        return jnp.where(masked, -jnp.inf, out)

    def log_prob(hidden, labels, needed=None):
        return jnp.take_along_axis(jax.nn.log_softmax(logits(hidden)), labels, axis=-1)

    return Denoiser(encode, logits, log_prob, mask_id, tiny.NO_EOS)


def item_gradients(bind, params, batch, hp):
    """Gradient of every item's own loss, [N, parameters]."""
    batch = batch._replace(weight=batch.weight * batch.weight.shape[0])

    def one(item):
        item = jax.tree.map(lambda x: x[None], item)
        grad = jax.grad(objective(bind, item, hp))(params)
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(grad)])

    return np.asarray(jax.jit(jax.vmap(one))(batch), np.float64)


def total_variance(gradients, probability):
    probability = np.asarray(probability, np.float64)
    mean = probability @ gradients
    return probability @ np.square(gradients - mean).sum(axis=1)


@pytest.mark.parametrize("masks", [1, 2, 3])
def test_proposition_4_3_action_tokens_alone_have_the_share_m_of_l_of_the_variance(masks):
    length, theta = 4, jnp.zeros((4, tiny.VOCAB))
    tokens = exact.fillings(jnp.full((length,), M), tiny.VOCAB, M)
    state = jnp.where(jnp.arange(length)[None] < masks, M, tokens)
    reward = jnp.array([1.0, -1.0])  # independent of the tokens, as the proposition assumes
    variance = {}
    for gradient in dispo.GRADIENTS:
        hp = dispo.Hyper(gradient=gradient, **THEORY)
        fills = jnp.repeat(tokens[:, None], 2, axis=1)
        batch = prepared(free_positions, theta, None, jnp.array([0, 1]), state, fills, hp)
        both = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
        advantage = jnp.repeat(reward, len(tokens))[:, None] * jnp.array([[1.0, 0.0]])
        both = both._replace(advantage=advantage, weight=both.weight / 2)
        rows = 2 * len(tokens)
        gradients = item_gradients(free_positions, theta, both, hp)
        variance[gradient] = total_variance(gradients, np.full(rows, 1 / rows))
    assert variance["all"] > 1e-3
    assert variance["action"] / variance["all"] == pytest.approx(masks / length, rel=1e-4)


def test_at_theta_old_the_visible_tokens_cancel_between_siblings():
    """The Z fillings of a state share its revealed tokens and their advantages sum to 0."""
    params, prompt, bind = tiny.perceptron(4)
    state, fills = STATES[2], tuples(STATES[2], 2)
    states = jnp.broadcast_to(state, (len(fills), 4))
    probability = tuple_probability(bind, params, prompt, state, fills)
    moved = jax.tree.map(lambda x: 1.2 * x, params)
    at_old, at_moved = {}, {}
    for kind in dispo.GRADIENTS:
        hp = dispo.Hyper(gradient=kind, **THEORY)
        batch = prepared(bind, params, params, prompt, states, fills, hp)
        batch = in_expectation(batch, probability)
        at_old[kind] = gradient(bind, params, batch, hp)
        at_moved[kind] = gradient(bind, moved, batch, hp)
    tiny.assert_close(at_old["all"], at_old["action"])
    gap = np.abs(tiny.flat(at_moved["all"]) - tiny.flat(at_moved["action"]))
    assert gap.max() > 1e-3


def test_proposition_4_4_the_variance_falls_as_one_over_z():
    params, prompt, bind = tiny.perceptron(4)
    state, variance = STATES[2], {}
    for z in (1, 2, 3):
        hp, fills = dispo.Hyper(**THEORY), tuples(state, z)
        states = jnp.broadcast_to(state, (len(fills), 4))
        batch = prepared(bind, params, None, prompt, states, fills, hp)
        batch = batch._replace(
            advantage=tiny.reward_of(fills) - 0.4
        )  # a baseline free of the action
        gradients = item_gradients(bind, params, batch, hp)
        probability = tuple_probability(bind, params, prompt, state, fills)
        variance[z] = total_variance(gradients, probability)
    assert variance[1] > 1e-3
    assert variance[1] / variance[2] == pytest.approx(2, rel=1e-3)
    assert variance[1] / variance[3] == pytest.approx(3, rel=1e-3)
