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
from dmrl.diffusion.masking import mask_prompt
from dmrl.diffusion.probe import fill
from dmrl.diffusion.sampler import Sampling
from dmrl.types import TEMPLATE, Denoiser, Models, Probe

pytestmark = pytest.mark.usefixtures("quick_compile")

M = tiny.MASK
THEORY = {"ratio_level": "sequence", "epsilon": None, "beta": 0.0, "p_mask_prompt": 0.0}
STATES = {2: jnp.array([1, M, M, 0]), 3: jnp.array([M, 2, M, M])}
KEY, FIRST = jax.random.key(5), jnp.array(0)


def reward_of(fills):
    """A fixed random reward in [0, 1] of every completion."""
    table = jax.random.uniform(jax.random.key(11), (tiny.MASK,) * fills.shape[-1])
    return table[tuple(jnp.moveaxis(fills, -1, 0))]


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
    probe = Probe(step, states[:, None], fills[:, None], reward_of(fills)[:, None])
    trio = Models(bind(params), None if old is None else bind(old), None)
    return dispo.prepare(trio, rollout, probe, KEY, FIRST, hp)


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
        lambda p: exact.step_objective(bind(p), prompt, state, every, reward_of(every))
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
        reward=reward_of(completions),
        group=jnp.arange(len(completions)) // 2,
    )
    trio, terminal_hp = Models(bind(params), None, None), diffu_grpo.Hyper(**THEORY)
    terminal_batch = diffu_grpo.prepare(trio, rollout, None, KEY, FIRST, terminal_hp)
    pair_p = tuple_probability(bind, params, prompt, blank, pairs)
    terminal_batch = in_expectation(terminal_batch, jnp.repeat(pair_p, 2))

    def mixed_loss(p):
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
    tiny.assert_close(jax.grad(mixed_loss)(params), want)


def free_positions(theta, mask_id=M):
    """A denoiser of independent positions: logits theta [L,V], whatever is visible."""

    def encode(tokens, valid):
        here = jnp.eye(theta.shape[0])[None]
        completion = jnp.broadcast_to(here, (tokens.shape[0], *here.shape[1:]))
        return jnp.pad(completion, ((0, 0), (tokens.shape[1] - theta.shape[0], 0), (0, 0)))

    def logits(hidden):
        out = hidden @ theta
        masked = jnp.expand_dims(jnp.arange(theta.shape[1]) == mask_id, range(out.ndim - 1))
        return jnp.where(masked, -jnp.inf, out)

    def log_prob(hidden, labels):
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
        batch = batch._replace(advantage=reward_of(fills) - 0.4)  # a baseline free of the action
        gradients = item_gradients(bind, params, batch, hp)
        probability = tuple_probability(bind, params, prompt, state, fills)
        variance[z] = total_variance(gradients, probability)
    assert variance[1] > 1e-3
    assert variance[1] / variance[2] == pytest.approx(2, rel=1e-3)
    assert variance[1] / variance[3] == pytest.approx(3, rel=1e-3)


def trajectory(rows=6, eos=tiny.NO_EOS):
    """(parameters, params -> Denoiser, rollout) of length 5; groups of three."""
    params, _, bind = tiny.perceptron(5, prompt=3, eos=eos)
    keys = jax.random.split(jax.random.key(3), 2)
    tokens = jax.random.randint(keys[0], (rows, 5), 0, M)
    reveal = jnp.broadcast_to(jnp.array([2, 0, TEMPLATE, 1, 3]), tokens.shape)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, M)
    return params, bind, tiny.rollout(tokens, reveal, prompt, group=jnp.arange(rows) // 3, eos=eos)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def probed(bind, params, rollout, hp):
    key = jax.random.key(0)
    plan = dispo.probes(rollout, key, hp)
    probe = fill(bind(params), rollout, plan, jax.random.fold_in(key, 1))
    return probe._replace(reward=reward_of(probe.fills))


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def batch_of(bind, params, rollout, probe, hp, old=None, reference=None):
    trio = Models(bind(params), *(None if p is None else bind(p) for p in (old, reference)))
    return dispo.prepare(trio, rollout, probe, KEY, FIRST, hp)


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_tied_rewards_give_no_gradient(ratio_level):
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(beta=0.0, ratio_level=ratio_level)
    probe = probed(bind, params, rollout, hp)
    probe = probe._replace(reward=jnp.full(probe.reward.shape, 0.5))
    batch = batch_of(bind, params, rollout, probe, hp, scaled(params, 0.9))
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


def test_no_gradient_reaches_logits_off_the_mask():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2, p_mask_prompt=0.0)
    other = scaled(params, 0.9)
    probe = probed(bind, params, rollout, hp)
    batch = batch_of(bind, params, rollout, probe, hp, other, other)
    denoiser = bind(params)

    def nudged(by):
        policy = denoiser._replace(encode=lambda tokens, valid: denoiser.encode(tokens, valid) + by)
        return dispo.loss(Models(policy, None, None), batch, hp)[0]

    slope = jax.grad(nudged)(jnp.zeros((12, 8, 8)))
    touched = np.abs(np.asarray(slope)).sum(axis=-1) > 0
    np.testing.assert_array_equal(touched[:, 3:], batch.state == M)
    assert not touched[:, :3].any()


def test_the_ratio_is_one_at_theta_old():
    params, bind, rollout = trajectory()
    probe = probed(bind, params, rollout, dispo.Hyper(states=2))
    for level in ("token", "sequence"):
        hp = dispo.Hyper(states=2, ratio_level=level)
        # Not compiled: then the same operations run, and equality is exact.
        trio = Models(bind(params), bind(params), bind(params))
        batch = dispo.prepare(trio, rollout, probe, KEY, FIRST, hp)
        log_prob = state_log_prob(bind(params), *batch[:4])
        np.testing.assert_array_equal(batch.old, jnp.where(batch.weight > 0, log_prob, 0))
        assert (batch.prompt != jnp.repeat(rollout.prompt, 2, axis=0)).any()
        loss, metrics = dispo.loss(Models(bind(params), None, None), batch, hp)
        expected = -float(jnp.sum(batch.weight * batch.advantage[..., None]))
        assert float(loss) == pytest.approx(expected, abs=1e-6)
        assert float(metrics["kl"]) == pytest.approx(0, abs=1e-7)


def test_terms_that_share_a_key_share_the_prompt_mask():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2)
    rollout = rollout._replace(reward=jnp.arange(6.0))
    step = batch_of(bind, params, rollout, probed(bind, params, rollout, hp), hp)
    terminal = diffu_grpo.prepare(
        Models(bind(params), None, None), rollout, None, KEY, FIRST, diffu_grpo.Hyper()
    )
    np.testing.assert_array_equal(step.prompt, jnp.repeat(terminal.prompt, 2, axis=0))
    expected = mask_prompt(KEY, rollout.row, rollout.prompt, 0.15, M)
    np.testing.assert_array_equal(terminal.prompt, expected)


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("late", [1, 2**4, 3**4, 4**4]),
        ("early", [4**4, 3**4, 2**4, 1]),
        ("uniform", [1, 1, 1, 1]),
    ],
)
def test_the_laws_of_the_state_step(law, expected):
    weights = jnp.exp(dispo.state_log_weights(jnp.array([4, 2]), 6, law, 4.0))
    weights = np.asarray(weights / weights.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(weights[0], np.array([*expected, 0, 0]) / sum(expected), rtol=1e-5)
    assert (weights[1, :2] > 0).all()
    assert (weights[1, 2:] == 0).all()


def test_the_late_law_draws_most_states_near_the_end():
    log_weights = dispo.state_log_weights(jnp.array([128]), 128, "late", 4.0)
    late = jnp.arange(128) / 128 >= 0.7
    assert float(jnp.sum(jax.nn.softmax(log_weights[0]) * late)) == pytest.approx(0.83, abs=0.01)


def test_a_row_that_revealed_nothing_has_one_state():
    log_weights = dispo.state_log_weights(jnp.array([0]), 3, "late", 4.0)
    assert log_weights[0].tolist() == [0, -jnp.inf, -jnp.inf]


def test_drawn_steps_follow_the_law_and_a_group_shares_them():
    _, _, rollout = trajectory(rows=9_000)
    hp = dispo.Hyper(states=2, exponent=2.0)
    step = np.asarray(dispo.probes(rollout, jax.random.key(0), hp).step)
    groups = step.reshape(-1, 3, 2)
    assert (groups == groups[:, :1]).all()
    law = {t: (t + 1) ** 2 / 30 for t in range(4)}
    for state in range(2):
        assert tiny.chi_square(groups[:, 0, state].tolist(), law) > 1e-3
    pairs = [tuple(pair) for pair in groups[:, 0].tolist()]
    product = {(a, b): law[a] * law[b] for a in law for b in law}
    assert tiny.chi_square(pairs, product) > 1e-3


def test_every_drawn_state_has_a_mask():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=20, state_law="uniform", p_mask_prompt=0.0)
    probe = probed(bind, params, rollout, hp)
    assert (probe.state == M).any(axis=-1).all()
    assert len(np.unique(np.asarray(probe.step))) == 4


def test_a_plan_carries_fillings_and_branch_temperature():
    params, bind, rollout = trajectory()
    plan = dispo.probes(rollout, KEY, dispo.Hyper(fillings=3, branch_temperature=0.3))
    assert (plan.fillings, plan.temperature) == (3, 0.3)
    greedy = dispo.Hyper(fillings=3, branch_temperature=0.0)
    fills = probed(bind, params, rollout, greedy).fills
    np.testing.assert_array_equal(fills, jnp.broadcast_to(fills[:, :, :1], fills.shape))


def test_several_states_are_averaged():
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2, **THEORY)
    probe = probed(bind, params, rollout, hp)

    def value(probe):
        batch = batch_of(bind, params, rollout, probe, hp, scaled(params, 0.9))
        return batch, float(objective(bind, batch, hp)(params))

    batch, together = value(probe)
    assert batch.state.shape == (12, 5)
    np.testing.assert_array_equal(batch.state.reshape(6, 2, 5), probe.state)
    apart = [value(Probe(*(x[:, k : k + 1] for x in probe)))[1] for k in range(2)]
    assert together == pytest.approx(np.mean(apart), rel=1e-5)
    assert abs(together) > 1e-4


def test_weights_stop_at_the_filling_s_own_eos():
    params, bind, rollout = trajectory(rows=1, eos=2)
    state = jnp.array([[[M, 1, 0, M, M]]])
    fills = jnp.array([[[[0, 1, 0, 2, 1], [2, 1, 0, 0, 0], [0, 1, 0, 1, 2]]]])
    probe = Probe(jnp.array([[1]]), state, fills, jnp.array([[[1.0, 0.0, 0.5]]]))
    hp = dispo.Hyper(beta=0.0)
    batch = batch_of(bind, params, rollout, probe, hp)
    expected = [[1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]
    np.testing.assert_allclose(batch.weight[0], np.array(expected) / 6, rtol=1e-6)
    ended = probe._replace(state=jnp.array([[[0, 2, 0, M, M]]]), fills=fills.at[..., 1].set(2))
    empty = batch_of(bind, params, rollout, ended, hp)
    assert (np.asarray(empty.weight) == 0).all()
    assert (tiny.flat(gradient(bind, params, empty, hp)) == 0).all()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_gradients_of_strided_microbatches_add_up(ratio_level):
    params, bind, rollout = trajectory()
    hp = dispo.Hyper(states=2, ratio_level=ratio_level)
    probe = probed(bind, params, rollout, hp)
    batch = batch_of(bind, params, rollout, probe, hp, scaled(params, 0.9), scaled(params, 1.1))
    whole = gradient(bind, params, batch, hp)
    for cuts in (2, 3, 12):
        parts = [jax.tree.map(lambda x, i=i, n=cuts: x[i::n], batch) for i in range(cuts)]
        total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, hp) for p in parts])
        tiny.assert_close(total, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fillings": 1}, "need fillings >= 2"),
        ({"states": 0}, "states >= 1"),
        ({"state_law": "middle"}, "state_law='middle': choose one of .*'late', 'uniform', 'early'"),
        ({"gradient": "none"}, "gradient='none': choose one of .*'action', 'all'"),
        ({"baseline": "median"}, "baseline='median': choose one of .*'mean', 'leave_one_out'"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"p_mask_prompt": -0.1}, "p_mask_prompt=-0.1"),
        ({"ratio_level": "word"}, "ratio_level='word'"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        dispo.Hyper(**values)
