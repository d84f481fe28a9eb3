"""diffu-GRPO: the authors' numbers, and the properties its derivation promises."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from dmrl import models
from dmrl.algorithms import diffu_grpo, surrogate
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.types import TEMPLATE, Models

LENGTH, EOS = 4, 2


def recorded_batch(tensors, iteration, on_policy):
    states = tensors["diffu_grpo/perturbed_ids"][iteration]
    prompt = tensors["prompt_ids"].shape[1]
    return surrogate.Batch(
        prompt=states[:, :prompt],
        prompt_valid=jnp.ones((states.shape[0], prompt), bool),
        state=states[:, prompt:],
        labels=tensors["completion_ids"][:, None],
        advantage=tensors["advantages"][:, None],
        weight=surrogate.weight(tensors["completion_mask"][:, None] > 0, "token"),
        old=None if on_policy else tensors["diffu_grpo/old_per_token_logps"][iteration][:, None],
        reference=tensors["diffu_grpo/ref_per_token_logps"][iteration][:, None],
    )


def test_golden_per_token_log_probabilities(recorded):
    tensors, _, cfg, params = recorded
    denoiser = models.bind(cfg, {"params": params}, keep_mask=True)
    score = jax.jit(lambda batch: state_log_prob(denoiser, *batch[:4]))
    for iteration in range(3):
        got = score(recorded_batch(tensors, iteration, on_policy=True))[:, 0]
        want = tensors["diffu_grpo/per_token_logps"][iteration]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_golden_loss_gradient_and_metrics(recorded):
    tensors, cases, cfg, params = recorded
    names = [name for name in cases if name.startswith("diffu_grpo/")]
    assert len(names) == 7
    for name in names:
        case = cases[name]
        hp = diffu_grpo.Hyper(epsilon=case["epsilon"], beta=case["beta"])
        batch = recorded_batch(tensors, case["iteration"], name.endswith("mu1_onpolicy"))

        def objective(params, batch, hp=hp):
            policy = models.bind(cfg, {"params": params}, keep_mask=True)
            return diffu_grpo.loss(Models(policy, None, None), batch, hp)

        (loss, metrics), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch)
        assert float(loss) == pytest.approx(case["loss"], rel=1e-4), name
        if case.get("kl") is not None:
            assert float(metrics["kl"]) == pytest.approx(case["kl"], rel=1e-4), name
        if "clip_ratio" in case:
            # The authors compare coef_1 * A < coef_2 * A, which is where the clip is NOT active:
            # theirs and ours together are all tokens outside the range.
            ratio = jnp.exp(tensors["diffu_grpo/per_token_logps"][case["iteration"]][:, None])
            ratio = ratio / jnp.exp(batch.old)
            outside = jnp.sum(batch.weight * (jnp.abs(ratio - 1) > case["epsilon"]))
            both = float(metrics["clip_ratio/region_mean"]) + case["clip_ratio"]
            assert both == pytest.approx(float(outside), abs=1e-6), name
        goldens.assert_gradient(grad, case, tensors, name)


def test_golden_advantages_and_eos_mask_come_out_of_prepare(recorded):
    tensors, _, cfg, params = recorded
    rollout = tiny.rollout(
        tensors["completion_ids"],
        prompt=tensors["prompt_ids"],
        reward=tensors["rewards"],
        eos=cfg.eos_token_id,
    )
    policy = models.bind(cfg, {"params": params})
    args = (rollout, None, jax.random.key(0), tiny.INNER, diffu_grpo.Hyper())
    batch = diffu_grpo.prepare(Models(policy, None, None), *args)
    np.testing.assert_allclose(batch.advantage[:, 0], tensors["advantages"], atol=1e-6)
    mask = np.asarray(tensors["completion_mask"])
    np.testing.assert_allclose(batch.weight[:, 0], mask / mask.sum(), rtol=1e-6)
    np.testing.assert_array_equal(rollout.length, mask.sum(axis=1))


def case(rows=6, seed=0, reward=None, eos=EOS):
    """(parameters, params -> Denoiser, rollout): groups of two, one template position."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, seed=seed, eos=eos)
    keys = jax.random.split(jax.random.key(seed + 7), 3)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    reveal = jnp.broadcast_to(jnp.array([0, TEMPLATE, 1, 2]), tokens.shape)
    prompt = jax.random.randint(keys[1], (rows, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,)) if reward is None else reward
    group = jnp.arange(rows) // 2
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, group, eos)


def prepared(policy, rollout, hp, behaviour=None, reference=None, key=0):
    trio = Models(policy, behaviour, reference)
    return diffu_grpo.prepare(trio, rollout, None, jax.random.key(key), tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def gradient(bind, params, batch, hp):
    return jax.grad(lambda p: diffu_grpo.loss(Models(bind(p), None, None), batch, hp)[0])(params)


def test_it_asks_for_a_reference_only_to_penalise_the_distance_from_it():
    assert diffu_grpo.needs(diffu_grpo.Hyper()) == {"reference"}
    assert diffu_grpo.needs(diffu_grpo.Hyper(beta=0.0)) == frozenset()


def test_the_state_is_the_template():
    params, bind, rollout = case()
    batch = prepared(bind(params), rollout, diffu_grpo.Hyper())
    template = jnp.where(rollout.reveal_step == TEMPLATE, rollout.tokens, tiny.MASK)
    np.testing.assert_array_equal(batch.state, template)
    np.testing.assert_array_equal(batch.labels[:, 0], rollout.tokens)


@pytest.mark.parametrize("behaviour", [False, True], ids=["detached", "forwarded"])
def test_at_theta_old_the_gradient_is_reinforce(behaviour):
    params, bind, rollout = case()
    hp = diffu_grpo.Hyper(beta=0.0)
    batch = prepared(bind(params), rollout, hp, bind(params) if behaviour else None)

    def reinforce(params):
        log_prob = state_log_prob(bind(params), *batch[:4])[:, 0]
        ended = jnp.cumsum(rollout.tokens == EOS, 1) - (rollout.tokens == EOS) > 0
        counted = ~ended & (rollout.reveal_step >= 0)
        mean = jnp.repeat(rollout.reward.reshape(-1, 2).mean(axis=1), 2)
        score = jnp.where(counted, log_prob * (rollout.reward - mean)[:, None], 0.0)
        return -jnp.sum(score) / jnp.sum(counted)

    tiny.assert_close(gradient(bind, params, batch, hp), jax.grad(reinforce)(params))


def test_behaviour_and_reference_see_the_policy_s_prompt_mask():
    params, bind, rollout = case(rows=40)
    hp = diffu_grpo.Hyper(p_mask_prompt=0.5)
    batch = prepared(bind(params), rollout, hp, bind(params), bind(params))
    assert (batch.prompt != rollout.prompt).any()
    log_prob = state_log_prob(bind(params), *batch[:4])
    counted = batch.weight > 0
    np.testing.assert_array_equal(jnp.where(counted, log_prob, 0), batch.old)
    np.testing.assert_array_equal(batch.old, batch.reference)
    loss, metrics = diffu_grpo.loss(Models(bind(params), None, None), batch, hp)
    expected = -jnp.sum(batch.weight * batch.advantage[..., None])
    assert float(loss) == pytest.approx(float(expected), abs=1e-6), "the ratio is 1"
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-7)


def test_the_prompt_mask_is_fresh_for_every_inner_key_at_the_published_rate():
    params, bind, rollout = case(rows=2000)
    one, two = (prepared(bind(params), rollout, diffu_grpo.Hyper(), key=k) for k in (0, 1))
    assert (one.prompt != two.prompt).any()
    hits = np.asarray(one.prompt != rollout.prompt)
    assert stats.binomtest(int(hits.sum()), hits.size, 0.15).pvalue > 1e-3


def test_tokens_after_eos_and_template_positions_get_no_weight_and_no_gradient():
    params, bind, rollout = case()
    tokens = jnp.array([[EOS, 1, 0, 0], [0, EOS, 1, 1], [0, 1, 1, EOS]] * 2)
    rollout = rollout._replace(tokens=tokens)
    batch = prepared(bind(params), rollout, diffu_grpo.Hyper())
    counted = np.asarray(batch.weight[:, 0]) > 0
    assert counted[:3].tolist() == [[True, False, False, False]] * 2 + [[True, False, True, True]]
    assert float(jnp.sum(batch.weight)) == pytest.approx(1)
    other = jnp.where(counted[:, None], batch.labels, 1 - jnp.minimum(batch.labels, 1))
    assert (other != batch.labels).any()
    hp = diffu_grpo.Hyper(beta=0.0)
    changed = gradient(bind, params, batch._replace(labels=other), hp)
    tiny.assert_close(changed, gradient(bind, params, batch, hp), rtol=1e-6)


def test_a_template_completion_without_a_counted_token_gives_a_finite_zero():
    params, bind, rollout = case()
    rollout = rollout._replace(reveal_step=jnp.full_like(rollout.reveal_step, TEMPLATE))
    batch = prepared(bind(params), rollout, diffu_grpo.Hyper(), None, bind(params))
    assert (tiny.flat(gradient(bind, params, batch, diffu_grpo.Hyper())) == 0).all()


def test_tied_groups_give_no_policy_gradient():
    reward = jnp.array([0.5, 0.5, 1.0, 1.0, 0.0, 0.0])
    params, bind, rollout = case(reward=reward)
    hp = diffu_grpo.Hyper(beta=0.0)
    batch = prepared(bind(params), rollout, hp)
    assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_gradients_of_strided_microbatches_add_up(ratio_level):
    params, bind, rollout = case()
    old, reference = (jax.tree.map(lambda x, s=s: x * s, params) for s in (0.9, 1.1))
    hp = diffu_grpo.Hyper(ratio_level=ratio_level)
    batch = prepared(bind(params), rollout, hp, bind(old), bind(reference))
    whole = gradient(bind, params, batch, hp)
    for cuts in (2, 3, 6):
        parts = [jax.tree.map(lambda x, i=i, n=cuts: x[i::n], batch) for i in range(cuts)]
        total = jax.tree.map(lambda *g: sum(g), *[gradient(bind, params, p, hp) for p in parts])
        tiny.assert_close(total, whole, rtol=1e-5)


def test_the_clip_stops_the_gradient_only_on_the_paying_side():
    log_ratio, advantage = jnp.log(jnp.array([1.7, 1.7, 0.3, 0.3])), jnp.array([1.0, -1, 1, -1])
    slope = jax.vmap(jax.grad(surrogate.clipped), in_axes=(0, 0, None))(log_ratio, advantage, 0.5)
    np.testing.assert_allclose(slope, [0, 1.7, -0.3, 0], atol=1e-6)
    free = jax.vmap(jax.grad(surrogate.clipped), in_axes=(0, 0, None))(log_ratio, advantage, None)
    np.testing.assert_allclose(free, [-1.7, 1.7, -0.3, 0.3], atol=1e-6)


def test_k3_is_an_unbiased_estimate_of_the_kl():
    p, q = (jax.nn.softmax(jax.random.normal(jax.random.key(s), (5,))) for s in (0, 1))
    expected = jnp.sum(p * (jnp.log(p) - jnp.log(q)))
    got = jnp.sum(p * surrogate.k3(jnp.log(p), jnp.log(q)))
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_weights_of_a_level_sum_to_one_and_split_as_they_say():
    counted = jnp.array([[[1, 1, 1, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]], bool)
    token = surrogate.weight(counted, "token")[:, 0]
    np.testing.assert_allclose(token, np.asarray(counted[:, 0]) / 4)
    sequence = surrogate.weight(counted, "sequence")[:, 0]
    expected = [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(sequence, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p_mask_prompt": 1.5}, r"p_mask_prompt=1.5 .*\[0, 1\]"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive, or None"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"ratio_level": "word"}, "ratio_level='word': choose one of .*'token', 'sequence'"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        diffu_grpo.Hyper(**values)
