"""The sampler: the authors' decoder at temperature 0, its exact law above, its book-keeping."""

import dataclasses
import functools
import itertools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import softmax

from dmrl import models
from dmrl.diffusion import exact
from dmrl.diffusion.guidance import guided, tempered
from dmrl.diffusion.order import entropy_of, select_top
from dmrl.diffusion.probe import state_at, steps_taken
from dmrl.diffusion.sampler import Sampling, sample
from dmrl.diffusion.schedule import Uniform
from dmrl.types import TEMPLATE, Denoiser


def draw(
    denoiser,
    prompt,
    template,
    config,
    rows=1,
    key=0,
    valid=None,
    row=None,
    drafts=False,
    group_size=1,
    stop_at_eos=False,
):
    """Completions of one prompt [P] and template [L], `rows` times, or of a batch [B,...]."""
    if prompt.ndim == 1:
        prompt = jnp.broadcast_to(prompt, (rows, *prompt.shape))
    if template.ndim == 1:
        template = jnp.broadcast_to(template, (prompt.shape[0], *template.shape))
    row = jnp.arange(prompt.shape[0]) if row is None else row
    valid = jnp.ones(prompt.shape, bool) if valid is None else valid
    args = (prompt, valid, template, row, jnp.zeros_like(row), jax.random.key(key))
    hashable = denoiser._replace(heads=None)  # a mapping has no hash
    options = (config, drafts, group_size, stop_at_eos)
    return compiled(hashable, *args, options=options)


@functools.partial(jax.jit, static_argnames=("denoiser", "options"))
def compiled(denoiser, *args, options):
    return sample(denoiser, *args, *options)


def test_in_a_large_block_the_order_s_noise_is_not_that_of_the_tokens():
    """64 positions are read 32 at a time: the bits of u_p would be those of token p % 4 at
    32 + p // 4, if the order's key were that of the second chunk."""

    def logits(hidden):
        row = jnp.array([0.0, 0.0, 0.0, -jnp.inf])
        return jnp.broadcast_to(row, (*hidden.shape[:-1], 4))

    coin = Denoiser(lambda tokens, *_: jnp.zeros((*tokens.shape, 1)), logits, None, 3, -1)
    config = Sampling(64, 2, 64, 1.0, "random")
    out = draw(coin, jnp.zeros((1,), jnp.int32), jnp.full((64,), 3), config, rows=1000)
    p = np.array([p for p in range(64) if p % 4 < 3])
    early = np.asarray(out.reveal_step)[:, p] == 0
    same = np.asarray(out.tokens)[:, 32 + p // 4] == p % 4
    assert abs(same[early].mean() - 1 / 3) < 0.02


def outcomes(rollout):
    tokens, steps = rollout.tokens.tolist(), rollout.reveal_step.tolist()
    return [(tuple(t), tuple(s)) for t, s in zip(tokens, steps, strict=True)]


def of_tokens(law):
    marginal = {}
    for (tokens, _), p in law.items():
        marginal[tokens] = marginal.get(tokens, 0.0) + p
    return marginal


@pytest.mark.parametrize(
    "folder", ["tiny_llada", pytest.param("tiny_llada_gqa", marks=pytest.mark.slow)]
)
def test_golden_tokens_and_reveal_steps(golden_dir, folder):
    cfg, params = tiny.llada(golden_dir / folder)
    recorded = np.load(golden_dir / "sampler.npz")
    cases = json.loads((golden_dir / "sampler.json").read_text())
    cases = [case for case in cases if case["model"] == folder]
    assert len(cases) >= 12
    for case in cases:
        name, length = case["name"], case["gen_length"]
        config = Sampling(length, case["steps"], case["block_length"], cfg_scale=case["cfg_scale"])
        denoiser = models.bind(cfg, {"params": params}, keep_mask=True)
        prompt = jnp.asarray(recorded[f"{name}_prompt"])
        out = draw(denoiser, prompt, jnp.full((length,), cfg.mask_token_id), config)
        completion = recorded[f"{name}_tokens"][:, prompt.shape[1] :]
        np.testing.assert_array_equal(out.tokens, completion, err_msg=name)
        np.testing.assert_array_equal(
            out.reveal_step, recorded[f"{name}_reveal_step"], err_msg=name
        )


LAWS = {
    "one-by-one": Sampling(4, 4, 4, 1.0),
    "two-by-two-cooled": Sampling(4, 2, 4, 0.7),
    "uneven": Sampling(4, 3, 4, 0.7),
    "blocks": Sampling(4, 4, 2, 1.0),
    "guided-blocks-cooled": Sampling(4, 4, 2, 0.7, cfg_scale=0.8),
    "random": Sampling(4, 4, 4, 1.0, "random"),
    "random-blocks-cooled": Sampling(4, 2, 2, 0.7, "random"),
    "random-uneven-guided": Sampling(4, 3, 4, 1.0, "random", cfg_scale=0.8),
}
ALL_MASKED = jnp.full((4,), tiny.MASK)
HALF = jnp.array([tiny.MASK, 1, tiny.MASK, tiny.MASK])


@pytest.mark.parametrize("config", LAWS.values(), ids=LAWS.keys())
def test_samples_follow_the_enumerated_law(config):
    params, prompt, bind = tiny.perceptron(4)
    denoiser = bind(params)
    for template in ALL_MASKED, HALF:
        law = exact.sampler_law(denoiser, prompt, template, tiny.VOCAB, config)
        assert sum(law.values()) == pytest.approx(1, abs=1e-5)
        drawn = outcomes(draw(denoiser, prompt, template, config, rows=20_000))
        assert tiny.chi_square(drawn, law) > 1e-3
        assert tiny.chi_square([tokens for tokens, _ in drawn], of_tokens(law)) > 1e-3


def test_the_law_test_rejects_a_wrong_law():
    params, prompt, bind = tiny.perceptron(4)
    right = LAWS["one-by-one"]
    drawn = outcomes(draw(bind(params), prompt, ALL_MASKED, right, rows=20_000))
    drawn = [tokens for tokens, _ in drawn]
    for change in ({"temperature": 0.9}, {"order": "random"}, {"steps": 2}, {"cfg_scale": 0.1}):
        wrong = dataclasses.replace(right, **change)
        law = of_tokens(exact.sampler_law(bind(params), prompt, ALL_MASKED, tiny.VOCAB, wrong))
        assert tiny.chi_square(drawn, law) < 1e-3, change


def test_the_law_of_one_position_is_the_softmax():
    params, prompt, bind = tiny.perceptron(1)
    denoiser, template = bind(params), jnp.array([tiny.MASK])
    tokens = jnp.concatenate([prompt, template])[None]
    logits = denoiser.logits(denoiser.encode(tokens, jnp.ones(tokens.shape, bool)))[0, -1]
    law = exact.sampler_law(denoiser, prompt, template, tiny.VOCAB, Sampling(1, 1, 1, 0.7))
    for token, p in enumerate(softmax(np.asarray(logits[: tiny.MASK]) / 0.7)):
        assert law[(token,), (0,)] == pytest.approx(p, rel=1e-5)


def test_the_law_of_a_greedy_sampler_is_refused():
    params, prompt, bind = tiny.perceptron(4)
    with pytest.raises(ValueError, match="temperature=0"):
        exact.sampler_law(bind(params), prompt, ALL_MASKED, tiny.VOCAB, Sampling(4, 4, 4))


@pytest.mark.parametrize("order", ["low_confidence", "random"])
def test_noise_is_keyed_by_row_alone(order):
    params, prompt, bind = tiny.perceptron(8)
    config = Sampling(8, 4, 4, 1.0, order)
    template = jnp.full((8,), tiny.MASK)
    denoiser = bind(params)
    batch = draw(denoiser, prompt, template, config, rows=16)
    assert len({tuple(row) for row in batch.tokens.tolist()}) > 8
    for rows in ([5], [15, 3, 5, 9, 1]):
        part = draw(denoiser, prompt, template, config, len(rows), row=jnp.array(rows))
        index = jnp.array(rows)
        np.testing.assert_array_equal(part.tokens, batch.tokens[index])
        np.testing.assert_array_equal(part.reveal_step, batch.reveal_step[index])


def test_another_key_draws_other_tokens():
    params, prompt, bind = tiny.perceptron(8)
    config, template = Sampling(8, 4, 4, 1.0), jnp.full((8,), tiny.MASK)
    denoiser = bind(params)
    one, two = (draw(denoiser, prompt, template, config, 16, key) for key in (0, 1))
    assert np.mean(np.asarray(one.tokens) == np.asarray(two.tokens)) < 0.9


def test_padding_of_the_prompt_changes_nothing(golden_dir):
    cfg, params = tiny.llada(golden_dir / "tiny_llada")
    denoiser = models.bind(cfg, {"params": params})
    prompt = jnp.arange(12)
    config, template = Sampling(8, 4, 8, 1.0), jnp.full((8,), cfg.mask_token_id)
    bare = draw(denoiser, prompt, template, config)
    padded = jnp.concatenate([jnp.full((5,), 7), prompt])
    valid = jnp.arange(17)[None] >= 5
    np.testing.assert_array_equal(
        draw(denoiser, padded, template, config, valid=valid).tokens, bare.tokens
    )


def test_template_positions_stay_and_are_never_trained():
    params, prompt, bind = tiny.perceptron(6)
    template = jnp.array([2, tiny.MASK, 0, tiny.MASK, tiny.MASK, 1])
    out = draw(bind(params), prompt, template, Sampling(6, 4, 3, 1.0), rows=64)
    fixed = np.asarray(template) != tiny.MASK
    assert (np.asarray(out.tokens)[:, fixed] == np.asarray(template)[fixed]).all()
    assert (np.asarray(out.reveal_step)[:, fixed] == TEMPLATE).all()
    assert (np.asarray(out.reveal_step)[:, ~fixed] >= 0).all()
    assert not (np.asarray(out.tokens) == tiny.MASK).any()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Sampling(10, 4, 5), [3, 2, 3, 2]),
        (Sampling(8, 3, 8), [3, 3, 2]),
        (Sampling(6, 6, 3), [1] * 6),
    ],
)
def test_the_first_steps_of_a_block_take_the_remainder(config, expected):
    params, prompt, bind = tiny.perceptron(config.length)
    out = draw(bind(params), prompt, jnp.full((config.length,), tiny.MASK), config, rows=4)
    for steps in np.asarray(out.reveal_step):
        assert np.bincount(steps).tolist() == expected
        assert (np.diff(steps.reshape(config.blocks, -1).max(axis=1)) > 0).all()


def test_a_partly_given_block_spreads_its_masks_over_its_steps():
    config = Sampling(10, 4, 5)
    reveals = [Uniform().counts(masked, 2) for masked in (5, 3, 1, 0)]
    assert reveals == [[3, 2], [2, 1], [1, 0], [0, 0]]
    params, prompt, bind = tiny.perceptron(10)
    M = tiny.MASK
    template = jnp.array([[M, 0, M, 1, M, 2, 2, M, 0, 0], [0, 0, 1, M, M, M, M, M, M, M]])
    prompts = jnp.broadcast_to(prompt, (2, *prompt.shape))
    out = draw(bind(params), prompts, template, config)
    counts = [[row.count(step) for step in range(4)] for row in out.reveal_step.tolist()]
    assert counts == [[2, 1, 1, 0], [1, 1, 3, 2]]


def watched(denoiser, seen):
    """The denoiser, appending to `seen` the tokens of every forward pass that really runs."""

    def encode(tokens, valid, *_):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), tokens, ordered=True)
        return denoiser.encode(tokens, valid)

    return denoiser._replace(encode=encode)


@pytest.mark.parametrize("order", ["low_confidence", "random"])
def test_every_state_is_rebuilt_bit_for_bit(order):
    params, prompt, bind = tiny.perceptron(6)
    template = jnp.array([tiny.MASK, 1, *[tiny.MASK] * 4])
    config, seen = Sampling(6, 4, 3, 1.0, order), []
    out = draw(watched(bind(params), seen), prompt, template, config, rows=16)
    jax.effects_barrier()
    steps = jnp.broadcast_to(jnp.arange(config.steps), (16, config.steps))
    rebuilt = np.asarray(state_at(out, steps, tiny.MASK))
    assert len(seen) == config.steps
    for step, tokens in enumerate(seen):
        np.testing.assert_array_equal(rebuilt[:, step], tokens[:, prompt.shape[0] :])
    np.testing.assert_array_equal(steps_taken(out), 4)
    last = state_at(out, jnp.full((16, 1), config.steps), tiny.MASK)
    np.testing.assert_array_equal(last[:, 0], out.tokens)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_log_prob_and_entropy_are_those_of_the_moment_of_reveal(cfg_scale):
    params, prompt, bind = tiny.perceptron(6)
    config = Sampling(6, 4, 3, 0.7, cfg_scale=cfg_scale)
    out = draw(bind(params), prompt, jnp.full((6,), tiny.MASK), config, rows=32)
    denoiser = guided(bind(params), cfg_scale, prompt.shape[0]) if cfg_scale else bind(params)
    log_prob, entropy = np.full((32, 6), np.nan), np.full((32, 6), np.nan)
    for step in range(config.steps):
        state = state_at(out, jnp.full((32, 1), step), tiny.MASK)[:, 0]
        tokens = jnp.concatenate([out.prompt, state], axis=1)
        hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[:, prompt.shape[0] :]
        p = softmax(np.asarray(denoiser.logits(hidden), np.float64)[..., : tiny.MASK], axis=-1)
        now = np.asarray(out.reveal_step) == step
        picked = np.take_along_axis(p, np.asarray(out.tokens)[..., None], axis=-1)[..., 0]
        log_prob[now], entropy[now] = np.log(picked)[now], -(p * np.log(p)).sum(-1)[now]
    np.testing.assert_allclose(out.log_prob, log_prob, atol=1e-5)
    np.testing.assert_allclose(out.entropy, entropy, atol=1e-5)


def test_impossible_tokens_add_no_entropy():
    log_p = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    assert float(entropy_of(log_p)) == pytest.approx(np.log(2))


def test_a_batch_with_nothing_left_costs_no_forward():
    params, prompt, bind = tiny.perceptron(4)
    seen, template = [], jnp.array([0, 1, 2, 0])
    out = draw(watched(bind(params), seen), prompt, template, Sampling(4, 4, 2, 1.0), rows=3)
    jax.effects_barrier()
    assert seen == []
    np.testing.assert_array_equal(out.tokens, jnp.broadcast_to(template, (3, 4)))
    np.testing.assert_array_equal(out.reveal_step, TEMPLATE)


def test_steps_after_the_last_reveal_cost_no_forward():
    params, prompt, bind = tiny.perceptron(4)
    seen, template = [], jnp.array([tiny.MASK, 1, 2, 0])
    draw(watched(bind(params), seen), prompt, template, Sampling(4, 4, 2, 1.0), rows=3)
    jax.effects_barrier()
    assert len(seen) == 1


@pytest.mark.parametrize("drafts", [False, True])
def test_the_first_step_of_a_group_is_one_forward(drafts):
    params, prompt, bind = tiny.perceptron(6)
    prompts = jnp.stack([prompt, prompt[::-1]]).repeat(3, axis=0)
    template = jnp.array([[tiny.MASK] * 6, [tiny.MASK, 1, *[tiny.MASK] * 4]]).repeat(3, axis=0)
    config, seen = Sampling(6, 4, 3, 1.0), []
    alone = draw(bind(params), prompts, template, config, drafts=drafts)
    out = draw(watched(bind(params), seen), prompts, template, config, drafts=drafts, group_size=3)
    jax.effects_barrier()
    assert [tokens.shape[0] for tokens in seen] == [2, 6, 6, 6]
    for name, value in alone._asdict().items():
        if value is not None:
            np.testing.assert_array_equal(getattr(out, name), value, err_msg=name)


def test_a_group_that_does_not_divide_the_rows_is_refused():
    params, prompt, bind = tiny.perceptron(4)
    with pytest.raises(ValueError, match="group_size=2 does not divide the 3 rows"):
        draw(bind(params), prompt, jnp.full((4,), tiny.MASK), Sampling(4, 4, 2), 3, group_size=2)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_blocks_leave_the_last_layer_of_the_others_out(golden_dir, cfg_scale):
    cfg, params = tiny.llada(golden_dir / "tiny_llada")
    denoiser, seen = models.bind(cfg, {"params": params}), []

    def window(tokens, valid, start, width):
        jax.debug.callback(lambda s: seen.append((int(s), width)), start, ordered=True)
        return denoiser.window(tokens, valid, start, width)

    config = Sampling(8, 4, 4, 1.0, cfg_scale=cfg_scale)
    args = (jnp.array([5, 6, 7]), jnp.full((8,), cfg.mask_token_id), config, 3)
    out = draw(denoiser._replace(window=window), *args)
    jax.effects_barrier()
    assert seen == [(3, 4), (3, 4), (7, 4), (7, 4)]
    whole = draw(denoiser._replace(window=None), *args)
    np.testing.assert_array_equal(out.tokens, whole.tokens)
    np.testing.assert_array_equal(out.reveal_step, whole.reveal_step)
    np.testing.assert_allclose(out.log_prob, whole.log_prob, atol=1e-5)


DRAFTED = {
    "greedy-blocks": Sampling(6, 4, 3),
    "blocks": Sampling(6, 6, 2, 1.0),
    "two-by-two": Sampling(6, 3, 6, 1.3),
    "guided-random": Sampling(6, 4, 3, 0.7, "random", cfg_scale=0.8),
}


@pytest.mark.parametrize("config", DRAFTED.values(), ids=DRAFTED.keys())
def test_drafts_change_nothing_else_and_hold_what_was_revealed(config):
    params, prompt, bind = tiny.perceptron(6)
    denoiser, template = bind(params), jnp.array([tiny.MASK, 1, *[tiny.MASK] * 4])
    without = draw(denoiser, prompt, template, config, rows=32)
    out = draw(denoiser, prompt, template, config, rows=32, drafts=True)
    assert without.drafts is None
    for name, value in without._asdict().items():
        if value is not None:
            np.testing.assert_array_equal(getattr(out, name), value, err_msg=name)
    assert out.drafts.shape == (32, config.steps, 6)
    steps = jnp.broadcast_to(jnp.arange(config.steps), (32, config.steps))
    states, drafts = np.asarray(state_at(out, steps, tiny.MASK)), np.asarray(out.drafts)
    visible = states != tiny.MASK
    np.testing.assert_array_equal(drafts[visible], states[visible])
    assert not (drafts == tiny.MASK).any()
    for position in range(6):
        when = np.asarray(out.reveal_step)[:, position]
        held = drafts[np.arange(32), np.maximum(when, 0), position]
        np.testing.assert_array_equal(held, np.asarray(out.tokens)[:, position])


def probabilities(denoiser, config, prompt, state):
    """[L,V] law of the proposals at every position of one state."""
    denoiser = guided(denoiser, config.cfg_scale, prompt.shape[0])
    tokens = jnp.concatenate([prompt, jnp.array(state)])[None]
    hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[0, prompt.shape[0] :]
    logits = np.asarray(denoiser.logits(hidden), np.float64)[:, : tiny.MASK]
    return softmax(logits / config.temperature, axis=-1)


def product_law(rows):
    """{tokens: probability} of independent draws, one from each of `rows` [V]."""
    outcomes = itertools.product(range(tiny.MASK), repeat=len(rows))
    return {t: float(np.prod([p[x] for p, x in zip(rows, t, strict=True)])) for t in outcomes}


@pytest.mark.parametrize("order", ["low_confidence", "random"])
def test_drafts_follow_the_model_in_the_block_and_outside(order):
    params, prompt, bind = tiny.perceptron(4)
    config, denoiser = Sampling(4, 4, 2, 0.7, order, cfg_scale=0.8), bind(params)
    out = draw(denoiser, prompt, ALL_MASKED, config, rows=20_000, drafts=True)
    first, second = (list(map(tuple, out.drafts[:, t].tolist())) for t in (0, 1))
    before = probabilities(denoiser, config, prompt, [tiny.MASK] * 4)
    assert tiny.chi_square(first, product_law(before)) > 1e-3
    states = state_at(out, jnp.ones((20_000, 1), jnp.int32), tiny.MASK)[:, 0].tolist()
    state, count = Counter(map(tuple, states)).most_common(1)[0]
    assert count > 2_000
    after = probabilities(denoiser, config, prompt, state)
    masked = [i for i in range(4) if state[i] == tiny.MASK]
    rows = [i for i, s in enumerate(states) if tuple(s) == state]
    new = [tuple(second[i][j] for j in masked) for i in rows]
    assert tiny.chi_square(new, product_law([after[j] for j in masked])) > 1e-3
    # Outside the block no draft has any influence on what follows: two steps are independent.
    pairs = [(first[i][3], second[i][3]) for i in rows]
    assert tiny.chi_square(pairs, product_law([before[3], after[3]])) > 1e-3


def test_greedy_drafts_are_the_most_probable_tokens():
    params, prompt, bind = tiny.perceptron(6)
    config, denoiser = Sampling(6, 4, 3), bind(params)
    out = draw(denoiser, prompt, jnp.full((6,), tiny.MASK), config, drafts=True)
    for step in range(config.steps):
        state = state_at(out, jnp.full((1, 1), step), tiny.MASK)[0, 0]
        tokens = jnp.concatenate([prompt, state])[None]
        logits = denoiser.logits(denoiser.encode(tokens, jnp.ones(tokens.shape, bool)))[0, 2:]
        expected = jnp.where(state == tiny.MASK, jnp.argmax(logits, axis=-1), state)
        np.testing.assert_array_equal(out.drafts[0, step], expected)


def test_drafts_of_steps_without_a_reveal_are_full_predictions_too():
    params, prompt, bind = tiny.perceptron(6)
    M, config = tiny.MASK, Sampling(6, 6, 3, 1.0)
    template = jnp.array([[0, 1, 2, M, M, 0], [M, 2, 0, 1, M, M]])
    prompts = jnp.broadcast_to(prompt, (2, *prompt.shape))
    for rows in (slice(0, 1), slice(1, 2), slice(None)):
        out = draw(bind(params), prompts[rows], template[rows], config, drafts=True)
        assert not (np.asarray(out.drafts) == M).any()
        np.testing.assert_array_equal(out.drafts[:, -1], out.tokens)


def test_drafts_of_finished_rows_cost_no_forward_and_are_keyed_by_row_alone():
    params, prompt, bind = tiny.perceptron(4)
    seen, config = [], Sampling(4, 4, 2, 1.0)
    denoiser = watched(bind(params), seen)
    out = draw(denoiser, prompt, jnp.array([0, tiny.MASK, 2, 0]), config, rows=3, drafts=True)
    jax.effects_barrier()
    assert len(seen) == 1
    np.testing.assert_array_equal(out.drafts[:, 1:], jnp.stack([out.tokens] * 3, axis=1))
    whole = draw(bind(params), prompt, ALL_MASKED, config, rows=8, drafts=True)
    part = draw(
        bind(params), prompt, ALL_MASKED, config, rows=2, row=jnp.array([5, 1]), drafts=True
    )
    np.testing.assert_array_equal(part.drafts, whole.drafts[jnp.array([5, 1])])


def test_distant_positions_of_a_draft_have_noise_of_their_own():
    params, prompt, bind = tiny.perceptron(64)
    denoiser = bind(params | {"head": jnp.zeros_like(params["head"])})
    config = Sampling(64, 8, 8, 1.0)
    out = draw(denoiser, prompt, jnp.full((64,), tiny.MASK), config, rows=40, drafts=True)
    draft = np.asarray(out.drafts[:, 0])
    assert 0.25 < np.mean(draft[:, 8:32] == draft[:, 40:]) < 0.42, "one in three by chance"


def test_a_tempered_model_has_the_law_of_the_noise():
    params, prompt, bind = tiny.perceptron(4)
    config, state = Sampling(4, 4, 4, 0.4), [tiny.MASK] * 4
    tokens = jnp.concatenate([prompt, ALL_MASKED])[None]
    cooled = tempered(bind(params), config.temperature)
    hidden = cooled.encode(tokens, jnp.ones(tokens.shape, bool))[:, 2:]
    expected = probabilities(bind(params), config, prompt, state)
    labels = jnp.broadcast_to(jnp.arange(tiny.MASK), (1, 4, tiny.MASK))
    np.testing.assert_allclose(cooled.log_prob(hidden, labels)[0], np.log(expected), atol=1e-5)
    got = jax.nn.softmax(cooled.logits(hidden))[0, :, : tiny.MASK]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert tempered(cooled, 1.0) is cooled


@pytest.mark.parametrize(("temperature", "cfg_scale"), [(0.0, 0.0), (1.0, 2.0), (5.0, 0.0)])
def test_mask_is_never_sampled(temperature, cfg_scale):
    params, prompt, bind = tiny.perceptron(4)
    shout = params["head"].at[:, tiny.MASK].set(0).at[:, : tiny.MASK].multiply(1e-3)
    config = Sampling(4, 2, 4, temperature, cfg_scale=cfg_scale)
    out = draw(bind(params | {"head": shout}), prompt, ALL_MASKED, config, rows=2000)
    assert not (np.asarray(out.tokens) == tiny.MASK).any()
    assert np.isfinite(np.asarray(out.log_prob)).all()
    assert np.isfinite(np.asarray(out.entropy)).all()


def test_length_counts_up_to_and_including_the_first_eos():
    params, prompt, bind = tiny.perceptron(6, eos=2)
    config = Sampling(6, 6, 6, 2.0, "random")
    out = draw(bind(params), prompt, jnp.full((6,), tiny.MASK), config, rows=200)
    expected = [row.index(2) + 1 if 2 in row else 6 for row in out.tokens.tolist()]
    assert len(set(expected)) > 3
    assert out.length.tolist() == expected


def test_top_scores_prefer_the_leftmost_and_never_leave_the_candidates():
    score = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 1.0, 1.0]])
    candidates = jnp.array([[True] * 4, [True] * 4, [False, True, True, False]])
    chosen = select_top(score, candidates, jnp.array([2, 1, 2]))
    expected = [[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]]
    assert chosen.astype(int).tolist() == expected
    assert int(jnp.sum(select_top(score, candidates, jnp.array([9, 9, 9])))) == 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_length": 5}, r"block_length=5 does not divide length=12.*\[1, 2, 3, 4, 6, 12\]"),
        ({"block_length": 0}, "block_length=0"),
        ({"steps": 5}, r"steps=5 must be a multiple of the 3 block.*3, 6, 9, 12"),
        ({"steps": 15}, "steps=15"),
        ({"steps": 0}, "steps=0"),
        ({"order": "left"}, "order='left': choose one of low_confidence, random, margin"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"cfg_scale": -0.5}, "cfg_scale=-0.5"),
    ],
)
def test_an_impossible_schedule_names_the_possible_ones(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**({"length": 12, "steps": 6, "block_length": 4} | values))


def test_a_long_list_of_choices_is_shortened():
    with pytest.raises(ValueError, match=r"choose one of 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. 256"):
        Sampling(256, 300, 256)


def test_a_template_of_another_length_is_refused():
    params, prompt, bind = tiny.perceptron(4)
    with pytest.raises(ValueError, match=r"template is 4 long, config\.length=8"):
        draw(bind(params), prompt, ALL_MASKED, Sampling(8, 8, 8))
