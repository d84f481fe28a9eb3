"""SPG: the authors' numbers, its gradient written out, and what its maskings may show."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models, objective
from dmrl.algorithms import dispo, spg
from dmrl.diffusion import likelihood
from dmrl.diffusion.masking import mask_prompt, upto_eos
from dmrl.objective import make_term
from dmrl.types import TEMPLATE, Denoiser, Models, Probe

LENGTH, BLOCK, EOS = 6, 2, 2


def table(log_prob):
    """A Denoiser whose log-probabilities [N,M,L] are the parameters themselves."""
    n, m, length = log_prob.shape

    def encode(tokens, valid, *_):
        before = jnp.zeros((n * m, tokens.shape[1] - length))
        return jnp.concatenate([before, log_prob.reshape(n * m, length)], axis=1)[:, :, None]

    def score(hidden, labels, needed=None):
        return jnp.broadcast_to(hidden, labels.shape)

    return Denoiser(encode, lambda hidden: hidden, score, tiny.MASK, EOS)


@functools.partial(jax.jit, static_argnames="hp")
def of_table(log_prob, batch, hp):
    """(loss, metrics), its gradient with respect to the log-probabilities of `batch`."""
    objective = functools.partial(spg.loss, batch=batch, hp=hp)
    return jax.value_and_grad(
        lambda log_prob: objective(Models(table(log_prob), None, None)), has_aux=True
    )(log_prob)


@functools.cache
def pull_back(cfg):
    """(log-probabilities, params -> gradient of sum(cotangent * log-probabilities))."""

    def network(params, batch):
        policy = models.bind(cfg, {"params": params}, keep_mask=True)
        return likelihood.masks_log_prob(policy, *batch[:4])

    def gradient(params, batch, cotangent):
        return jax.vjp(lambda p: network(p, batch), params)[1](cotangent)[0]

    return jax.jit(network), jax.jit(gradient)


sandwich = jax.jit(likelihood.sandwich, static_argnames="beta")


def recorded_batch(tensors, name):
    states, prompt = tensors[f"{name}/perturbed_ids"], tensors["prompt_ids"].shape[1]
    counted = tensors["completion_mask"][:, None] > 0
    length = jnp.sum(counted[:, 0], axis=1)
    hidden = counted & (states[:, :, prompt:] != tensors["completion_ids"][:, None])
    t = jnp.sum(hidden, axis=2) / length[:, None]
    return spg.Batch(
        prompt=states[:, :, :prompt],
        prompt_valid=jnp.ones((states.shape[0], prompt), bool),
        state=states[:, :, prompt:],
        labels=tensors["completion_ids"],
        inverse_t=hidden / t[:, :, None],
        length=length,
        advantage=tensors["advantages"],
        share=length / jnp.sum(length),
        logged=length / jnp.sum(length),
    )


def test_golden_bounds_losses_and_gradients(recorded):
    tensors, cases, cfg, params = recorded
    names = [name for name in cases if name.startswith("spg/") and name.count("/") == 1]
    assert len(names) == 4
    network, gradient = pull_back(cfg)
    for name in names:
        batch = recorded_batch(tensors, name)
        log_prob = network(params, batch)
        for beta in cases[name]["eubo_beta"]:
            lower, upper = sandwich(log_prob, batch.inverse_t, batch.length, beta=beta)
            mix = likelihood.mixture(lower, upper, cases[name]["mix_weight"])
            for got, want in (
                (lower, "elbo"),
                (upper, f"eubo_beta{beta}"),
                (mix, f"mix_beta{beta}"),
            ):
                np.testing.assert_allclose(got, tensors[f"{name}/{want}"], rtol=1e-4)
        losses = [full for full in cases if full.startswith(f"{name}/loss_")]
        assert len(losses) == 8
        for full in losses:
            case = cases[full]
            omega = cases[name]["mix_weight"]
            hp = spg.Hyper(
                negative=case["logp_estimation"], eubo_beta=case["eubo_beta"], omega=omega
            )
            (loss, _), cotangent = of_table(log_prob, batch, hp)
            assert float(loss) == pytest.approx(case["loss"], rel=1e-4), full
            grad = jax.tree.map(np.asarray, gradient(params, batch, cotangent))
            goldens.assert_gradient(grad, case, tensors, full)


def case(rows=6, seed=0, reward=None, eos=EOS, length=LENGTH):
    """(parameters, params -> Denoiser, rollout): groups of two, one template position."""
    params, _, bind = tiny.perceptron(length, prompt=3, seed=seed, eos=eos)
    keys = jax.random.split(jax.random.key(seed + 7), 3)
    tokens = jax.random.randint(keys[0], (rows, length), 0, tiny.MASK)
    reveal = jnp.broadcast_to(jnp.arange(length) - 1, tokens.shape)
    assert reveal[0, 0] == TEMPLATE
    prompt = jax.random.randint(keys[1], (rows, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,)) if reward is None else reward
    return params, bind, tiny.rollout(tokens, reveal, prompt, reward, jnp.arange(rows) // 2, eos)


def hyper(**values):
    return spg.Hyper(**{"block_length": BLOCK, **values})


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def prepared(bind, params, rollout, hp, key=0):
    trio = Models(bind(params), None, None)
    return spg.prepare(trio, rollout, None, jax.random.key(key), tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def gradient(bind, params, batch, hp):
    return jax.grad(lambda p: spg.loss(Models(bind(p), None, None), batch, hp)[0])(params)


def test_it_needs_no_reference_and_no_probe():
    assert not hasattr(spg, "needs")
    assert not hasattr(spg, "probes")


@pytest.mark.parametrize("negative", ["mix", "eubo", "elbo", "zero"])
def test_the_gradient_is_the_one_of_the_papers_appendix(negative):
    """Eqs. 26 to 28: the score of token i under masking tau has the weight written out here."""
    params, bind, rollout = case(eos=tiny.NO_EOS)
    hp = hyper(negative=negative, eubo_beta=1.3, omega=0.3, samples=3)
    batch = prepared(bind, params, rollout, hp)
    log_prob = -jax.random.exponential(jax.random.key(3), batch.inverse_t.shape)
    (loss, metrics), got = of_table(log_prob, batch, hp)
    hidden, p = np.asarray(batch.state == tiny.MASK), np.exp(np.asarray(log_prob))
    expected, total, lengths = np.zeros(hidden.shape), 0.0, []
    reward = np.asarray(rollout.reward)
    advantage = reward - np.repeat(reward.reshape(-1, 2).mean(axis=1), 2)
    for n, (masks, a) in enumerate(zip(hidden, advantage, strict=True)):
        m, t = len(masks), masks.sum(axis=1) / (LENGTH - 1)
        elbo = masks / masks.sum(axis=1, keepdims=True) / m
        power = masks * p[n] ** 1.3 / t[:, None]
        seen = power.sum(axis=0) > 0
        eubo = power / np.where(seen, power.sum(axis=0), 1) / seen.sum()
        upper = np.sum(np.log(np.where(seen, power.sum(axis=0), m) / m)) / 1.3 / seen.sum()
        lower = np.sum(elbo * np.asarray(log_prob[n]))
        omega = {"mix": 0.3, "eubo": 1.0, "elbo": 0.0, "zero": 0.0}[negative] if a < 0 else 0.0
        scale = -a * (a > 0 or negative != "zero")
        expected[n] = scale * ((1 - omega) * elbo + omega * eubo)
        total += scale * ((1 - omega) * lower + omega * upper)
        if scale != 0:
            lengths.append((lower, upper))
    np.testing.assert_allclose(got, expected / 6, atol=1e-6)
    assert float(loss) == pytest.approx(total / 6, rel=1e-5)
    assert float(metrics["elbo"]) == pytest.approx(np.mean(lengths, axis=0)[0], rel=1e-5)
    assert float(metrics["eubo"]) == pytest.approx(np.mean(lengths, axis=0)[1], rel=1e-5)


@pytest.mark.parametrize("masking", ["block_random", "random", "all"])
def test_states_hide_what_they_say_and_weigh_it_by_its_share(masking):
    params, bind, rollout = case(rows=60)
    hp = hyper(masking=masking, samples=3)
    batch = prepared(bind, params, rollout, hp)
    counted = np.asarray(upto_eos(rollout.tokens, EOS) & (rollout.reveal_step >= 0))
    np.testing.assert_allclose(batch.share, counted.sum(axis=1) / counted.sum(), rtol=1e-6)
    masked = np.asarray(batch.state == tiny.MASK)
    assert not masked[:, :, 0].any(), "the template stays visible"
    assert (np.asarray(batch.state) == np.asarray(rollout.tokens)[:, None])[~masked].all()
    after = ~np.asarray(upto_eos(rollout.tokens, EOS))
    after[:, 0] = False
    assert masked[np.broadcast_to(after[:, None], masked.shape)].all(), "after EOS all is hidden"
    weight = np.asarray(batch.inverse_t)
    here = masked & counted[:, None]
    np.testing.assert_array_equal(weight > 0, here)
    rows = counted.any(axis=1)
    total = np.broadcast_to(counted.sum(axis=1)[:, None], weight.shape[:2])
    np.testing.assert_allclose(weight.sum(axis=2)[rows], total[rows], rtol=1e-5)
    if masking == "all":
        assert (here == counted[:, None]).all()
    else:
        assert (masked[:, 0] != masked[:, 1]).any()


def test_noise_falls_on_the_prompt_and_on_blocks_before_the_chosen_one_only():
    params, bind, rollout = case(rows=60, eos=tiny.NO_EOS)
    clean, noisy = (
        prepared(bind, params, rollout, hyper(p_mask_prompt=p, positions="block"))
        for p in (0.0, 1.0)
    )
    np.testing.assert_array_equal(noisy.prompt, tiny.MASK)
    np.testing.assert_array_equal(clean.prompt, jnp.repeat(rollout.prompt[:, None], 2, axis=1))
    inside = np.asarray(clean.inverse_t) > 0
    np.testing.assert_array_equal(inside, np.asarray(noisy.inverse_t) > 0)
    first = inside.argmax(axis=2) // BLOCK * BLOCK
    before = np.arange(LENGTH) < first[:, :, None]
    sampled = np.arange(LENGTH) > 0
    assert before.any()
    assert not (np.asarray(clean.state) == tiny.MASK)[before].any()
    assert (np.asarray(noisy.state) == tiny.MASK)[before & sampled].all()
    np.testing.assert_array_equal(clean.state[~before], noisy.state[~before])
    half = prepared(bind, params, rollout, hyper(p_mask_prompt=0.5))
    other_term = mask_prompt(jax.random.key(0), rollout.row, rollout.prompt, 0.5, tiny.MASK)
    np.testing.assert_array_equal(half.prompt[:, 0], other_term)
    assert (half.prompt[:, 1] != other_term).any()


def test_masks_are_fresh_for_every_inner_key_and_follow_the_row():
    params, bind, rollout = case()
    whole = prepared(bind, params, rollout, hyper())
    assert (prepared(bind, params, rollout, hyper(), key=1).state != whole.state).any()
    part = prepared(bind, params, jax.tree.map(lambda x: x[2:4], rollout), hyper())
    np.testing.assert_array_equal(part.state, whole.state[2:4])
    np.testing.assert_array_equal(part.prompt, whole.prompt[2:4])


def test_visible_tokens_and_tokens_after_eos_have_no_gradient():
    params, bind, rollout = case()
    rollout = rollout._replace(tokens=rollout.tokens.at[:, 4].set(EOS))
    batch = prepared(bind, params, rollout, hyper())
    seen = (batch.inverse_t > 0).any(axis=1)
    assert not seen[:, 0].any()
    assert not seen[:, 5].any()
    other = jnp.where(seen, batch.labels, (batch.labels + 1) % tiny.MASK)
    changed = gradient(bind, params, batch._replace(labels=other), hyper())
    tiny.assert_close(changed, gradient(bind, params, batch, hyper()), rtol=1e-6)


def test_a_batch_of_templates_gives_a_finite_zero():
    params, bind, rollout = case()
    rollout = rollout._replace(reveal_step=jnp.full_like(rollout.reveal_step, TEMPLATE))
    for masking in spg.CHOICES["masking"]:
        hp = hyper(masking=masking)
        batch = prepared(bind, params, rollout, hp)
        assert (tiny.flat(gradient(bind, params, batch, hp)) == 0).all(), masking


def test_tied_groups_give_no_gradient():
    params, bind, rollout = case(reward=jnp.array([0.5, 0.5, 1.0, 1.0, 0.0, 0.0]))
    batch = prepared(bind, params, rollout, hyper())
    assert (tiny.flat(gradient(bind, params, batch, hyper())) == 0).all()


def test_gradients_of_strided_microbatches_add_up():
    params, bind, rollout = case()
    batch = prepared(bind, params, rollout, hyper())
    whole = gradient(bind, params, batch, hyper())
    for cuts in (2, 3):
        parts = [jax.tree.map(lambda x, i=i, n=cuts: x[i::n], batch) for i in range(cuts)]
        pieces = [gradient(bind, params, part, hyper()) for part in parts]
        tiny.assert_close(jax.tree.map(lambda *g: sum(g), *pieces), whole, rtol=1e-5)


@pytest.mark.slow
def test_dispo_on_spg_has_the_weighted_sum_of_their_gradients():
    config = models.Config(
        vocab_size=6,
        d_model=8,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        mlp_hidden_size=8,
        max_sequence_length=16,
        mask_token_id=tiny.MASK,
        eos_token_id=5,
        dtype="float32",
        param_dtype="float32",
        remat="none",
    )
    terms = (
        make_term("spg", 1.0, {"block_length": BLOCK}),
        make_term("dispo", 0.5, {"beta": 0.0}),
    )
    params = jax.jit(lambda key: models.init(config, key)["params"])(jax.random.key(0))
    _, _, rollout = case(eos=5)
    step = jnp.full((6, 1), 2)
    state = jnp.where(rollout.reveal_step < 2, rollout.tokens, tiny.MASK)
    fills = jnp.where(state == tiny.MASK, 0, state)[:, None, None].repeat(2, axis=2)
    fills = fills.at[:, 0, 1, 5].set(1)
    probe = Probe(step, state[:, None], fills, jnp.arange(12.0).reshape(6, 1, 2) ** 2)
    trio = Models(models.bind(config, {"params": params}), None, None)

    @jax.jit
    def prepare(rollout, probe):
        return tuple(
            t.algorithm.prepare(trio, rollout, p, jax.random.key(0), tiny.INNER, t.hyper)
            for t, p in zip(terms, (None, probe), strict=True)
        )

    batches = prepare(rollout, probe)
    np.testing.assert_array_equal(batches[0].prompt[:, 0], batches[1].prompt)

    def bound(trainable):
        return Models(models.bind(config, trainable), None, None)

    summed = jax.jit(lambda p: objective.gradient(terms, bound, p, batches, 2, 1))
    got, metrics = summed({"params": params})

    def of(algorithm, batch, hp):
        policy = lambda p: Models(models.bind(config, {"params": p}), None, None)  # noqa: E731
        return jax.jit(jax.grad(lambda p: algorithm.loss(policy(p), batch, hp)[0]))(params)

    parts = (of(t.algorithm, b, t.hyper) for t, b in zip(terms, batches, strict=True))
    expected = jax.tree.map(lambda base, step: base + 0.5 * step, *parts)
    tiny.assert_close(got["params"], expected, rtol=1e-5)
    assert {"elbo", "eubo"} <= metrics.keys()
    assert terms[1].algorithm is dispo


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"masking": "blocks"}, "masking='blocks': choose one of .*block_random"),
        ({"negative": "none"}, "negative='none': choose one of .*'zero'"),
        ({"positions": "all"}, "positions='all': choose one of .*'block'"),
        ({"positions": "block", "masking": "random"}, "needs masking='block_random'"),
        ({"samples": 0}, r"samples=0 must be in \[1, inf\]"),
        ({"block_length": 0}, r"block_length=0 must be in \[1, inf\]"),
        ({"p_mask_prompt": -0.1}, r"p_mask_prompt=-0.1 must be in \[0, 1\]"),
        ({"omega": 1.5}, r"omega=1.5 must be in \[0, 1\]"),
        ({"eubo_beta": 0.5}, r"eubo_beta=0.5 must be in \[1, inf\]"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        spg.Hyper(**values)


def test_blocks_must_tile_the_completion():
    params, bind, rollout = case()
    with pytest.raises(ValueError, match="block_length=4 does not divide the completion length 6"):
        prepared(bind, params, rollout, hyper(block_length=4))
    prepared(bind, params, rollout, hyper(block_length=4, masking="random"))
