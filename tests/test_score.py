"""Scores under shared masks: which tokens are hidden how often, and what is averaged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scoring
import tiny

from dmrl.diffusion import score


@functools.partial(jax.jit, static_argnames=("masks", "law", "unit", "eos"))
def draw(rollout, masks, law, unit="token", eos=tiny.NO_EOS):
    denoiser = scoring.product(jnp.zeros((1, tiny.VOCAB)))._replace(eos_id=eos)
    return score.draw(denoiser, rollout, jax.random.key(3), masks, law, unit)


def masks_of(masked):
    return np.asarray(masked.weight > 0)


def test_complementary_masks_hide_every_counted_token_once_a_pair():
    _, _, rollout = scoring.case(rows=8)
    masked = draw(rollout, 4, "complementary")
    hidden = masks_of(masked)
    counted = np.asarray(rollout.reveal_step >= 0)
    for pair in (hidden[:, :2], hidden[:, 2:]):
        np.testing.assert_array_equal(pair.sum(axis=1), counted)
    assert (hidden[:, 0] != hidden[:, 2]).any(), "the pairs are drawn apart"
    assert hidden.any(axis=-1).all()
    want = np.where(hidden, tiny.MASK, np.asarray(rollout.tokens)[:, None])
    np.testing.assert_array_equal(masked.state, want)


def test_independent_masks_are_uniform_subsets_of_a_uniform_size():
    rollout = tiny.rollout(jnp.zeros((1500, 2), jnp.int32))
    hidden = masks_of(draw(rollout, 2, "independent"))
    law = {(True, False): 1 / 4, (False, True): 1 / 4, (True, True): 1 / 2}
    joint = {(a, b): p * q for a, p in law.items() for b, q in law.items()}
    outcomes = [tuple(tuple(mask) for mask in row) for row in hidden.tolist()]
    assert tiny.chi_square(outcomes, joint) > 1e-3


@pytest.mark.parametrize("law", score.LAWS)
def test_a_row_has_its_masks_whatever_it_is_drawn_beside(law):
    _, _, rollout = scoring.case(rows=8)
    whole = draw(rollout, 4, law)
    alone = draw(jax.tree.map(lambda x: x[1::2], rollout), 4, law)
    np.testing.assert_array_equal(alone.state, whole.state[1::2])


@pytest.mark.parametrize("law", score.LAWS)
def test_one_counted_token_is_scored_in_full_and_none_scores_zero(law):
    params, bind, rollout = scoring.case(rows=2)
    tokens = jnp.array([[scoring.EOS, 1, 0, 0], [0, 1, 0, 0]])
    reveal = rollout.reveal_step.at[1].set(-1)
    rollout = rollout._replace(tokens=tokens, reveal_step=reveal)
    masked = draw(rollout, 4, law, "sequence", scoring.EOS)
    np.testing.assert_array_equal(masked.weight[0], np.eye(4)[[0]].repeat(4, axis=0))
    got = scoring.scores(bind, params, masked)
    np.testing.assert_allclose(got[0], np.asarray(got)[0, 0].repeat(4), rtol=1e-5)
    assert float(got[0, 0]) < 0
    assert not got[1].any()


def test_a_sequence_score_is_its_length_times_the_mean_log_probability():
    params, bind, rollout = scoring.case(rows=8)
    drawn = {u: draw(rollout, 4, "independent", u) for u in score.UNITS}
    token, sequence = (scoring.scores(bind, params, drawn[u]) for u in score.UNITS)
    np.testing.assert_allclose(sequence, 3 * token, rtol=1e-5)
    np.testing.assert_allclose(drawn["token"].weight.sum(axis=-1), 1, rtol=1e-6)


def test_scoring_mask_by_mask_gives_the_same():
    params, bind, rollout = scoring.case(rows=8)
    masked = draw(rollout, 4, "complementary")
    together = scoring.scores(bind, params, masked)
    alone = jax.jit(lambda p: score.frozen_score(bind(p), masked))(params)
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    want = scoring.sums(bind, params, masked)
    np.testing.assert_allclose(together.mean(axis=1), want, rtol=1e-5)


def test_groups_are_contiguous_rows_and_a_mixed_one_is_marked():
    cut = score.by_group({"x": jnp.arange(6)}, 3)
    np.testing.assert_array_equal(cut["x"], [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match="group_size=4 does not divide the 6 completions"):
        score.by_group(jnp.arange(6), 4)
    np.testing.assert_array_equal(score.one_prompt(jnp.array([[0, 0], [1, 2]])), [1, np.nan])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3, "complementary", "token"), "masks=3: complementary masks come in pairs"),
        ((0, "independent", "token"), "masks=0"),
        ((2, "pairs", "token"), "mask_law='pairs': choose one of .*'complementary'"),
        ((2, "independent", "word"), "score_unit='word': choose one of .*'token', 'sequence'"),
    ],
)
def test_impossible_scores_say_what_is_possible(args, message):
    with pytest.raises(ValueError, match=message):
        score.check(*args)
