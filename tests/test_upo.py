"""UPO: exact gradients by enumeration of every trajectory, and the authors' numbers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models
from dmrl.algorithms import imitation, upo
from dmrl.diffusion import decisions, order
from dmrl.models import unmasking
from dmrl.types import TEMPLATE, Models

LENGTH, STEPS = 4, 3
CFG = models.Config(
    vocab_size=tiny.VOCAB,
    d_model=8,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    mlp_hidden_size=12,
    mask_token_id=tiny.MASK,
    eos_token_id=0,
    dtype="float32",
    param_dtype="float32",
    remat="none",
)
PROMPT = jnp.array([1, 0])
BLANK = jnp.array([tiny.MASK, 1, tiny.MASK, tiny.MASK])
HOLES = (0, 2, 3)
KL = upo.Hyper(
    reference="softmax_confidence",
    tau=0.5,
    beta=1.0,
    epsilon=0.1,
    steps=STEPS,
    block_length=LENGTH,
)
UNIFORM = dataclasses.replace(KL, reference="top_k", top_k=2)
CROSS = dataclasses.replace(KL, reference="max_confidence")
REWARD = tiny.reward_of


@functools.cache
def variables(seed=0):
    """A denoiser and an order, both far from uniform."""
    params = jax.jit(lambda key: models.init(CFG, key)["params"])(jax.random.key(seed))
    params["head"] = 3 * params["head"]
    order = jax.jit(lambda key: unmasking.init(CFG, key))(jax.random.key(seed + 1))
    order["score"]["kernel"] = 4 * order["score"]["kernel"]
    return {"params": params, "order": order}


def bound(order):
    return models.bind(CFG, {"params": variables()["params"], "order": order})


@functools.cache
def states():
    """Every partly filled board [N, L] and its number."""
    free = [range(tiny.VOCAB) if i in HOLES else [1] for i in range(LENGTH)]
    every = list(itertools.product(*free))
    return np.array(every), {state: i for i, state in enumerate(every)}


@functools.cache
def predictions():
    """log p of the frozen denoiser at every state."""
    order, every = variables()["order"], states()[0]

    @jax.jit
    def read():
        tokens = jnp.concatenate([jnp.tile(PROMPT, (len(every), 1)), every], axis=1)
        denoiser = bound(order)
        hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[:, len(PROMPT) :]
        return jax.nn.log_softmax(denoiser.logits(hidden))

    return np.asarray(read())


@functools.cache
def allowances(top_k=0):
    """(features, candidates, confidence) of every state, written out: an oracle of this file."""
    p = np.exp(predictions())
    best = -np.sort(-p[..., : tiny.MASK], axis=-1)
    masked = np.asarray(states()[0]) == tiny.MASK
    features = np.concatenate([np.ones((*masked.shape, 1)), masked[..., None], best], axis=-1)
    allowed = masked.copy()
    for row, ok in enumerate(masked):
        ranked = sorted(np.flatnonzero(ok), key=lambda i, row=row: -best[row, i, 0])
        allowed[row, ranked[top_k or LENGTH :]] = False
    return features.astype(np.float32), allowed, best[..., 0]


def laws(order, top_k=0):
    """log g(i | x) [N, L] of every state; 0 where g is."""
    features, allowed, _ = allowances(top_k)
    every = states()[0]
    tokens = jnp.concatenate([jnp.tile(PROMPT, (len(every), 1)), every], axis=1)
    valid = jnp.ones(tokens.shape, bool)
    _, score = bound(order).order(tokens, valid, jnp.int32(len(PROMPT)), LENGTH)
    weight = jnp.exp(score(jnp.asarray(features))) * allowed
    share = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
    return jnp.log(jnp.where(allowed, share, 1.0))


@functools.cache
def trajectories(top_k=0):
    """Every (order of the holes, tokens): completions, reveal steps, (state, choice) of each step
    and log of the probability of the tokens."""
    allowed = allowances(top_k)[1]
    number, log_p = states()[1], predictions()
    found = []
    for way in itertools.permutations(HOLES):
        for tokens in itertools.product(range(tiny.MASK), repeat=len(HOLES)):
            state, when, steps, chance = list(BLANK.tolist()), [TEMPLATE] * LENGTH, [], 0.0
            for n, (i, token) in enumerate(zip(way, tokens, strict=True)):
                at = number[tuple(state)]
                steps.append((at, i))
                chance += log_p[at, i, token]
                state[i], when[i] = token, n
            if all(allowed[step] for step in steps):
                found.append((state, when, steps, chance))
    return tuple(np.array(x) for x in zip(*found, strict=True))


def log_g(order, top_k=0):
    """log g(a_n | x_n) [trajectories, steps]."""
    steps = trajectories(top_k)[2]
    return laws(order, top_k)[steps[..., 0], steps[..., 1]]


def log_reference(hp):
    """log g_ref(a_n | x_n) [trajectories, steps]."""
    _, allowed, confidence = allowances(hp.top_k)
    steps = trajectories(hp.top_k)[2]
    weight = np.exp(confidence / hp.tau) if hp.reference == "softmax_confidence" else 1.0
    share = weight * allowed / np.maximum((weight * allowed).sum(-1, keepdims=True), 1e-30)
    return np.log(np.where(allowed, share, 1))[steps[..., 0], steps[..., 1]]


@functools.cache
def chances(top_k=0):
    """Probability of every trajectory under the order of `variables`."""
    tokens = trajectories(top_k)[3]
    return np.exp(
        tokens + np.asarray(jax.jit(lambda o: log_g(o, top_k))(variables()["order"])).sum(1)
    )


def batch(hp, advantage, old=None):
    """All trajectories, weighted by their probabilities: the loss is an expectation."""
    completions, when, _, _ = trajectories(hp.top_k)
    n = len(completions)
    trace = decisions.Trace(
        jnp.tile(PROMPT, (n, 1)), jnp.ones((n, 2), bool), jnp.array(completions), jnp.array(when)
    )
    return upo.Batch(
        trace, jnp.asarray(advantage, jnp.float32), old, jnp.asarray(chances(hp.top_k))
    )


@functools.partial(jax.jit, static_argnames="hp")
def found(order, batch, hp):
    """((loss, metrics), gradient)."""

    def objective(o):
        return upo.loss(Models(bound(o), None, None), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(order)


def gradient(order, batch, hp):
    return found(order, batch, hp)[1]


def value(order, batch, hp):
    return found(order, batch, hp)[0]


def centred():
    """Rewards of all trajectories minus their mean."""
    reward = np.asarray(REWARD(jnp.array(trajectories()[0])))
    return reward - (chances() * reward).sum()


def test_the_enumeration_is_a_law():
    for k in (0, 2):
        assert chances(k).sum() == pytest.approx(1, abs=1e-5)
    assert len(trajectories()[0]) == 6 * 27
    assert len(trajectories(2)[0]) < 6 * 27


@pytest.mark.parametrize(
    "hp", [KL, pytest.param(UNIFORM, marks=pytest.mark.slow)], ids=lambda hp: hp.reference
)
def test_the_regularisers_gradient_is_that_of_the_exact_trajectory_kl(hp):
    order, reference = variables()["order"], log_reference(hp).sum(1)
    tokens = trajectories(hp.top_k)[3]

    @jax.jit
    def exact(order):
        def kl(o):
            log_p = log_g(o, hp.top_k).sum(1)
            return jnp.sum(jnp.exp(tokens + log_p) * (log_p - reference))

        return jax.value_and_grad(kl)(order)

    want, want_gradient = exact(order)
    mine = batch(hp, jnp.zeros(len(reference)))
    assert float(value(order, mine, hp)[1]["kl"]) == pytest.approx(float(want), rel=1e-4)
    assert float(want) > 0.01
    tiny.assert_close(gradient(order, mine, hp), want_gradient, rtol=1e-3)


def test_token_level_and_output_level_gradients_agree_at_g_old():
    """Proposition 1: E[rho(x_0) A] over completions x_0, whatever order revealed them."""
    order, advantage = variables()["order"], centred()
    completions, _, _, tokens = trajectories()
    _, which = np.unique(completions, axis=0, return_inverse=True)
    credit = np.zeros(which.max() + 1)
    credit[which.ravel()] = advantage

    @jax.jit
    def output_level(order):
        def gain(o):
            p = jnp.exp(tokens + log_g(o).sum(1))
            completion = jax.ops.segment_sum(p, jnp.asarray(which.ravel()), len(credit))
            return -jnp.sum(completion * credit)

        return jax.grad(gain)(order)

    # The regulariser does not see the advantage.
    with_it, without = (
        gradient(order, batch(KL, a), KL) for a in (advantage, np.zeros_like(advantage))
    )
    got = jax.tree.map(jnp.subtract, with_it, without)
    tiny.assert_close(got, output_level(order), rtol=1e-3)


def test_the_clip_and_the_ratio_of_a_moved_order():
    order = variables()["order"]
    moved = jax.tree.map(lambda x: 1.3 * x, order)
    old, new = (np.asarray(jax.jit(log_g)(o)) for o in (order, moved))
    advantage, hp = centred(), KL
    rho = np.exp(new - old)
    a = advantage[:, None]
    gain = np.minimum(rho * a, np.clip(rho, 0.9, 1.1) * a).sum(1)
    log_p, log_ref = new.sum(1), log_reference(hp).sum(1)
    c = np.clip(np.exp(log_p - old.sum(1)), 0.5, 2) * (1 + log_p - log_ref)
    want = (chances() * (-gain + c * log_p)).sum()
    got, metrics = value(moved, batch(hp, advantage, jnp.asarray(old)), hp)
    assert float(got) == pytest.approx(want, rel=1e-4)
    outside = (chances()[:, None] * (np.abs(rho - 1) > 0.1)).sum() / STEPS
    assert 0.05 < outside < 0.95
    assert float(metrics["clip_ratio/region_mean"]) == pytest.approx(outside, rel=1e-4)


def test_cross_entropy_is_that_to_the_most_confident_mask():
    order, hp = variables()["order"], CROSS
    law = np.asarray(jax.jit(laws)(order))
    _, allowed, confidence = allowances()
    steps = trajectories()[2]
    best = np.argmax(np.where(allowed, confidence, -1), axis=-1)
    want = -law[steps[..., 0], best[steps[..., 0]]]
    got, metrics = value(order, batch(hp, np.zeros(len(want))), hp)
    assert float(got) == pytest.approx((chances() * want.sum(1)).sum(), rel=1e-4)
    agree = (
        np.argmax(np.where(allowed, law, -np.inf), axis=-1)[steps[..., 0]] == best[steps[..., 0]]
    )
    agreement = float((chances()[:, None] * agree).sum() / STEPS)
    assert 0.05 < agreement < 0.95
    assert float(metrics["order/agreement"]) == pytest.approx(agreement, rel=1e-4)
    entropy = -np.where(allowed, np.exp(law) * law, 0).sum(-1)[steps[..., 0]]
    assert float(metrics["order/entropy"]) == pytest.approx(
        (chances()[:, None] * entropy).sum() / STEPS, rel=1e-4
    )


def test_ties_of_confidence_share_the_target():
    law = jnp.log(jnp.array([[0.5, 0.2, 0.3, 0.0]]))
    allowed = jnp.array([[True, True, True, False]])
    confidence = jnp.array([[0.7, 0.7, 0.1, 0.9]])
    chosen = jnp.array([[False, False, True, False]])
    got = decisions.summary(decisions.Decision(law, confidence, allowed, chosen), None)
    assert float(got.cross_entropy[0]) == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2)
    assert (float(got.agrees[0]), float(got.due[0])) == (1, 1)
    none = decisions.Decision(law, confidence, allowed, jnp.zeros_like(chosen))
    assert [float(x[0]) for x in decisions.summary(none, None)] == [0] * 6


def test_the_law_is_normalised_over_candidates_alone():
    score = jax.random.normal(jax.random.key(3), (4, 6))
    allowed = jnp.array([[1, 0, 1, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 0, 1], [1] * 6], bool)
    law = np.asarray(order.log_law(score, allowed))
    assert (law[~np.asarray(allowed)] == -np.inf).all()
    np.testing.assert_allclose(np.exp(law).sum(-1), [1, 0, 1, 1], atol=1e-6)
    moved = order.log_law(jnp.where(allowed, score, 99.0), allowed)
    np.testing.assert_array_equal(law, moved)


def test_top_k_allows_the_most_confident_masks_and_no_other():
    confidence = jnp.array([[0.9, 0.2, 0.8, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5]])
    masked = jnp.array([[False, True, True, True, True], [False, False, False, True, False]])
    got = order.most_confident(confidence, masked, 2)
    np.testing.assert_array_equal(got, [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(order.most_confident(confidence, masked, 0), masked)
    chosen = jnp.array([[False, False, True, False, False], [False, False, False, True, False]])
    seen = decisions.summary(decisions.Decision(confidence, confidence, got, chosen), None)
    np.testing.assert_allclose(seen.reference, [-np.log(2), 0], atol=1e-6)


@pytest.mark.slow
def test_kept_inputs_change_no_gradient():
    items, kept = batch(KL, centred()), dataclasses.replace(KL, keep_inputs=True)
    got = gradient(variables()["order"], items, kept)
    tiny.assert_close(got, gradient(variables()["order"], items, KL), rtol=1e-5)


@pytest.mark.slow
def test_gradients_of_strided_microbatches_add_up():
    order, whole = variables()["order"], batch(KL, centred())
    parts = [jax.tree.map(lambda x, i=i: x[i::2], whole) for i in range(2)]
    pieces = [gradient(order, part, KL) for part in parts]
    tiny.assert_close(jax.tree.map(jnp.add, *pieces), gradient(order, whole, KL), rtol=1e-4)


def rollout(reveal):
    """As many rows as the enumeration has, so that both compile once; groups of two."""
    rows = jnp.arange(len(trajectories()[0]))
    tokens = jnp.tile(jnp.array(trajectories()[0][0]), (len(rows), 1))
    when = jnp.tile(jnp.array(reveal), (len(rows), 1))
    made = tiny.rollout(tokens, when, reward=rows % 4 == 0, group=rows // 2)
    at = jnp.arange(LENGTH, dtype=jnp.float32) / 10
    return made._replace(order_log_prob=jnp.tile(-at, (len(rows), 1)))


def prepared(made, hp=KL, behaviour=None):
    trio = Models(bound(variables()["order"]), behaviour, None)
    return upo.prepare(trio, made, None, jax.random.key(0), tiny.INNER, hp)


def test_an_item_is_a_trajectory_with_its_groups_advantage():
    made = rollout([2, TEMPLATE, 0, 1])
    got = prepared(made)
    np.testing.assert_allclose(got.advantage[:6], [0.5, -0.5, 0, 0, 0.5, -0.5])
    np.testing.assert_allclose(got.weight, 1 / 162)
    assert got.old is None
    old = prepared(made, behaviour=bound(variables()["order"])).old
    np.testing.assert_allclose(old, np.tile([-0.2, -0.3, 0.0], (162, 1)), atol=1e-6)


def test_two_positions_in_one_step_end_in_nan():
    got = prepared(rollout([1, TEMPLATE, 0, 1]))
    assert np.isnan(value(variables()["order"], got, KL)[0])
    alone = prepared(rollout([2, TEMPLATE, 0, 1]))
    assert np.isfinite(value(variables()["order"], alone, KL)[0])


@pytest.mark.slow
def test_imitation_is_the_mean_cross_entropy_of_all_states():
    made = rollout([2, TEMPLATE, 0, 1])
    hp = imitation.Hyper(steps=STEPS, block_length=LENGTH)
    trio = Models(bound(variables()["order"]), None, None)
    items = imitation.prepare(trio, made, None, jax.random.key(0), tiny.INNER, hp)
    got, metrics = jax.jit(lambda b: imitation.loss(trio, b, hp))(items)
    plain = prepared(made, CROSS)._replace(advantage=jnp.zeros(len(made.row)))
    want, seen = value(variables()["order"], plain, CROSS)
    assert float(got) == pytest.approx(float(want) / STEPS, rel=1e-5)
    assert float(metrics["order/agreement"]) == pytest.approx(float(seen["order/agreement"]))


CASES = {
    "0_extra_head_KL_beta0.01": ("softmax_confidence", 0),
    "1_extra_head_CE_beta0.05": ("max_confidence", 0),
    "2_extra_bim_CE_beta0.05": ("max_confidence", 3),
    "3_extra_head_KL_beta0.0": ("softmax_confidence", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_authors_numbers(recorded_more, name):
    """Loss and gradient by the scores of the authors' code on recorded trajectories."""
    tensors, cases = recorded_more[:2]
    case, prefix = cases[f"upo/{name}"], f"upo/{name}/"
    recorded = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    reference, _ = CASES[name]
    hp = dataclasses.replace(KL, reference=reference, beta=case["beta"], epsilon=case["epsilon"])
    rows, steps = recorded["old_logps"].shape
    chosen = jax.nn.one_hot(recorded["trajectory"].reshape(-1), case["seq_len"]) > 0
    allowed = recorded["candidates"] > 0
    confidence = recorded["topk_and_mask"].reshape(*allowed.shape, 3)[..., 2]
    by_step = recorded["log_ref_probs"][:, None] / steps

    def loss(scores):
        law = order.log_law(scores, allowed)
        read = decisions.summary(decisions.Decision(law, confidence, allowed, chosen), None)
        found = jax.tree.map(lambda x: x.reshape(rows, steps), read)
        found = found._replace(reference=jnp.zeros((rows, steps)) + by_step)
        return jnp.mean(upo.objective(found, recorded["advantages"], recorded["old_logps"], hp))

    got, grad = jax.jit(jax.value_and_grad(loss))(recorded["scores"])
    assert float(got) == pytest.approx(case["loss"], abs=1e-6)
    np.testing.assert_allclose(grad, recorded["grad_scores"], rtol=1e-4, atol=1e-6)


def test_it_asks_for_an_order():
    assert upo.needs(upo.Hyper()) == imitation.needs(imitation.Hyper()) == {"order"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reference": "random"}, "reference='random': choose one of .*'top_k'"),
        ({"reference": "top_k"}, "reference='top_k' with top_k=0"),
        ({"top_k": 5}, "reference='max_confidence' with top_k=5"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        upo.Hyper(**values)
