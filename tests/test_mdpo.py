"""MDPO: its advantages, its steps, and why the drafts must be the sampler's own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl.algorithms import mdpo, surrogate
from dmrl.diffusion.guidance import tempered
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.diffusion.probe import fill, state_at
from dmrl.diffusion.sampler import Sampling, sample
from dmrl.types import TEMPLATE, Models

M, KEY = tiny.MASK, jax.random.key(5)
LENGTH, STEPS = 5, 4


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def evaluated(bind, params, batch, hp):
    """((loss, metrics), gradient)."""

    def objective(params):
        return mdpo.loss(Models(bind(params), None, None), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient(bind, params, batch, hp):
    return evaluated(bind, params, batch, hp)[1]


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def batch_of(bind, params, rollout, probe, hp, old=None, reference=None):
    trio = Models(bind(params), *(None if p is None else bind(p) for p in (old, reference)))
    return mdpo.prepare(trio, rollout, probe, KEY, tiny.INNER, hp)


@functools.cache
def case():
    """(parameters, params -> Denoiser, rollout, probe) of the sampler itself; groups of three."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3)
    prompt = jax.random.randint(jax.random.key(1), (6, 3), 0, M)
    template = jnp.broadcast_to(jnp.array([M, M, 1, M, M]), (6, LENGTH))

    @jax.jit
    def run(params):
        row, valid = jnp.arange(6), jnp.ones(prompt.shape, bool)
        sampling = Sampling(LENGTH, STEPS, LENGTH, 1.0)
        args = (bind(params), prompt, valid, template, row, row // 3, KEY, sampling)
        rollout = sample(*args, drafts=True)
        return rollout, fill(bind(params), rollout, mdpo.probes(rollout, KEY, mdpo.Hyper(4)), KEY)

    rollout, probe = run(params)
    return params, bind, rollout, probe._replace(reward=tiny.reward_of(probe.fills))


def brute_force(reward, group):
    """A_t of every row from the rewards [B,T] of its drafts."""
    value = np.zeros_like(reward)
    rows, steps = reward.shape
    for b, t in itertools.product(range(rows), range(steps)):
        before = reward[b, t - 1] if t else 0.0
        after = reward[b, t + 1 :].mean() if t + 1 < steps else reward[b, t]
        value[b, t] = (reward[b, t] - before) + 1 + after
    result = np.zeros_like(value)
    for b in range(rows):
        siblings = value[group == group[b]]
        result[b] = (value[b] - siblings.mean(axis=0)) / (siblings.std(axis=0) + 1e-4)
    return value, result


def test_the_plan_is_every_draft_of_the_sampler():
    _, _, rollout, probe = case()
    assert probe.step.tolist() == [list(range(STEPS))] * 6
    np.testing.assert_array_equal(probe.fills[:, :, 0], rollout.drafts)
    np.testing.assert_array_equal(probe.fills[:, -1, 0], rollout.tokens)
    with pytest.raises(ValueError, match="states=5 must be at most the sampler's 4 steps"):
        mdpo.probes(rollout, KEY, mdpo.Hyper(states=5))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_values_match_a_loop(steps):
    reward = np.random.default_rng(steps).random((4, steps), np.float32)
    want, _ = brute_force(reward, np.zeros(4))
    np.testing.assert_allclose(mdpo.values(jnp.asarray(reward)), want, rtol=1e-5)


def test_advantages_and_selected_steps_match_a_loop():
    params, bind, rollout, probe = case()
    hp = mdpo.Hyper(states=2, beta=0.0)
    _, want = brute_force(np.asarray(probe.reward[..., 0]), np.asarray(rollout.group))
    total = np.abs(want).sum(axis=0)
    chosen = np.argsort(-total)[:2]
    batch = batch_of(bind, params, rollout, probe, hp)
    np.testing.assert_allclose(batch.advantage.reshape(6, 2), want[:, chosen], atol=1e-3)
    np.testing.assert_array_equal(batch.state.reshape(6, 2, LENGTH), probe.state[:, chosen])
    np.testing.assert_array_equal(batch.labels.reshape(6, 2, LENGTH), rollout.drafts[:, chosen])
    masked = np.asarray(probe.state[:, chosen]) == M
    weight = masked / masked.sum(axis=-1, keepdims=True) / 12
    np.testing.assert_allclose(batch.weight.reshape(weight.shape), weight, rtol=1e-5)


def test_steps_at_which_nothing_is_masked_are_not_selected():
    params, bind, rollout, probe = case()
    shown = probe._replace(state=probe.state.at[:, 1:3].set(probe.fills[:, 1:3, 0]))
    batch = batch_of(bind, params, rollout, shown, mdpo.Hyper(states=2, beta=0.0))
    kept = {tuple(s) for s in batch.state.reshape(6, 2, LENGTH)[0].tolist()}
    assert kept == {tuple(s) for s in probe.state[0, jnp.array([0, 3])].tolist()}


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_at_theta_old_the_gradient_is_reinforce(temperature):
    params, bind, rollout, probe = case()
    hp = mdpo.Hyper(states=3, temperature=temperature, beta=0.0)
    batch = batch_of(bind, params, rollout, probe, hp, params)
    _, credit = brute_force(np.asarray(probe.reward[..., 0]), np.asarray(rollout.group))
    chosen = np.argsort(-np.abs(credit).sum(axis=0))[:3]

    def reinforce(params):
        total = 0.0
        for t in chosen.tolist():
            tokens = jnp.concatenate([rollout.prompt, probe.state[:, t]], axis=1)
            hidden = bind(params).encode(tokens, jnp.ones(tokens.shape, bool))[:, 3:]
            log_p = jax.nn.log_softmax(bind(params).logits(hidden) / temperature)
            log_p = jnp.take_along_axis(log_p, rollout.drafts[:, t, :, None], axis=-1)[..., 0]
            masked = probe.state[:, t] == M
            number = jnp.sum(masked, axis=1)
            confidence = jax.lax.stop_gradient(jnp.exp(log_p))
            score = jnp.sum(jnp.where(masked, confidence * log_p, 0.0), axis=1) / number
            total += jnp.sum(score * credit[:, t] * LENGTH / number)
        return -total / 18

    want = jax.jit(jax.grad(reinforce))(params)
    tiny.assert_close(gradient(bind, params, batch, hp), want, rtol=1e-3)
    tiny.assert_close(gradient(bind, params, batch._replace(old=None), hp), want, rtol=1e-3)


def credited(labels, p, credit, prompt):
    """Items at the state of two masks whose draft is `labels` [N,2], each with probability p."""
    n = len(p)
    return surrogate.Batch(
        prompt=jnp.broadcast_to(prompt, (n, *prompt.shape)),
        prompt_valid=jnp.ones((n, *prompt.shape), bool),
        state=jnp.full((n, 2), M),
        labels=jnp.array(labels)[:, None],
        advantage=jnp.array(p * credit, jnp.float32)[:, None],
        weight=jnp.full((n, 1, 2), 0.5),
        old=None,
        reference=None,
    )


def test_only_the_sampler_s_own_draft_can_be_credited_with_what_follows():
    params, prompt, bind = tiny.perceptron(2)
    hp = mdpo.Hyper(states=1, temperature=1.0, beta=0.0)

    def law(state):
        tokens = jnp.concatenate([prompt, jnp.array(state)])[None]
        hidden = bind(params).encode(tokens, jnp.ones(tokens.shape, bool))[0, 2:]
        return np.asarray(jax.nn.softmax(bind(params).logits(hidden)), np.float64)

    first = law([M, M])
    drafts = list(itertools.product(range(M), repeat=2))
    p_draft = np.array([first[0, a] * first[1, b] for a, b in drafts])
    reward = np.asarray(tiny.reward_of(jnp.array(drafts))).reshape(M, M)
    # E(final reward | draft): one of its two tokens is revealed, the other position drawn anew.
    after = np.array(
        [
            0.5 * law([a, M])[1, :M] @ reward[a] + 0.5 * law([M, b])[0, :M] @ reward[:, b]
            for a, b in drafts
        ]
    )
    centred = after - p_draft @ after
    batch = credited(drafts, p_draft, centred, prompt)
    own = gradient(bind, params, batch, hp)

    def reinforce(params):
        log_p = state_log_prob(bind(params), *batch[:4])[:, 0]
        confidence = jax.lax.stop_gradient(jnp.exp(log_p))
        return -jnp.sum(confidence * log_p * (p_draft * centred)[:, None]) / 2

    tiny.assert_close(own, jax.jit(jax.grad(reinforce))(params))  # which is not zero
    pairs = list(itertools.product(range(9), repeat=2))  # (fresh draft, what the sampler went by)
    labels = [drafts[fresh] for fresh, _ in pairs]
    p = np.array([p_draft[fresh] * p_draft[gone] for fresh, gone in pairs])
    credit = np.array([centred[gone] for _, gone in pairs])
    fresh = gradient(bind, params, credited(labels, p, credit, prompt), hp)
    assert np.abs(tiny.flat(fresh)).max() < 1e-6


def test_the_kl_is_k2_with_confidence_and_without_lambda():
    params, bind, rollout, probe = case()
    other, old = (jax.tree.map(lambda x, s=s: s * x, params) for s in (1.3, 0.9))
    hp = mdpo.Hyper(states=3, beta=0.7)
    batch = batch_of(bind, params, rollout, probe, hp, old, other)
    tied = batch._replace(advantage=jnp.zeros_like(batch.advantage))
    (loss, metrics), _ = evaluated(bind, params, tied, hp)
    score = [state_log_prob(tempered(bind(p), 0.4), *batch[:4]) for p in (params, other, old)]
    kl = jnp.where(batch.weight > 0, 0.5 * (score[1] - score[0]) ** 2, 0.0)
    assert float(metrics["kl"]) == pytest.approx(float(jnp.sum(batch.weight * kl)), rel=1e-4)
    want = jnp.sum(batch.weight * 0.7 * jnp.exp(score[2]) * kl)
    assert float(loss) == pytest.approx(float(want), rel=1e-4)


def test_the_clip_acts_on_every_token():
    params, bind, rollout, probe = case()
    hp = mdpo.Hyper(states=1, beta=0.0, temperature=1.0)
    batch = batch_of(bind, params, rollout, probe, hp, params)
    for shift, credit, stopped in ((0.3, 1, 1), (0.1, 1, 0), (-0.3, -1, 1), (0.3, -1, 0)):
        advantage = jnp.full(batch.advantage.shape, credit, jnp.float32)
        moved = batch._replace(old=batch.old - shift, advantage=advantage)
        (_, metrics), grad = evaluated(bind, params, moved, hp)
        assert (np.abs(tiny.flat(grad)).max() < 1e-7) == bool(stopped), (shift, credit)
        assert float(metrics["clip_ratio/region_mean"]) == pytest.approx(stopped, abs=1e-6)


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout, probe = case()
    hp = mdpo.Hyper(states=2)
    other, old = (jax.tree.map(lambda x, s=s: s * x, params) for s in (1.3, 0.9))
    batch = batch_of(bind, params, rollout, probe, hp, old, other)
    whole = gradient(bind, params, batch, hp)
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    every = [gradient(bind, params, part, hp) for part in parts]
    tiny.assert_close(jax.tree.map(lambda *g: sum(g), *every), whole, rtol=1e-5)


def test_ties_give_no_gradient_and_only_masked_positions_any():
    params, bind, rollout, probe = case()
    hp = mdpo.Hyper(states=3, beta=0.0)
    batch = batch_of(bind, params, rollout, probe, hp)
    assert (np.asarray(rollout.reveal_step)[:, 2] == TEMPLATE).all()
    np.testing.assert_array_equal(np.asarray(batch.weight)[:, 0] > 0, batch.state == M)
    assert (np.asarray(batch.weight)[:, 0, 2] == 0).all()
    other = jnp.where(batch.state[:, None] == M, batch.labels, (batch.labels + 1) % M)
    changed = gradient(bind, params, batch._replace(labels=other), hp)
    tiny.assert_close(changed, gradient(bind, params, batch, hp), rtol=1e-6)
    tied = probe._replace(reward=jnp.full(probe.reward.shape, 0.5))
    tied = batch_of(bind, params, rollout, tied, hp)
    assert (tiny.flat(gradient(bind, params, tied, hp)) == 0).all()
    done = probe._replace(state=state_at(rollout, jnp.full((6, STEPS), STEPS), M))
    empty = batch_of(bind, params, rollout, done, hp)
    assert (tiny.flat(gradient(bind, params, empty, hp)) == 0).all()


def test_it_needs_drafts_and_a_reference_only_for_the_kl():
    assert mdpo.needs(mdpo.Hyper()) == {"drafts", "reference"}
    assert mdpo.needs(mdpo.Hyper(beta=0.0)) == {"drafts"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"states": 0}, "need states >= 1.*self.states=0"),
        ({"temperature": 0.0}, "self.temperature=0.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"beta": -1.0}, "beta=-1.0"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        mdpo.Hyper(**values)
