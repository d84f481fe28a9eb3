"""Batches in length buckets: less padding, the same rows, one compilation a length."""

import json

import jax
import numpy as np
import pytest
from running import TINY

from configs import diffu_grpo
from dmrl import data, parallel, recipe, stages, tasks, tokenizer, trainer
from dmrl.diffusion import masking
from dmrl.held import Held
from dmrl.tasks import countdown

TASK = tasks.load("countdown", numbers=(2, 3), train_size=64, held_out_size=8)
TOK = tokenizer.characters(TASK.alphabet)


def tokenize(**options):
    wanted = {"prompt_length": 14, "length": 12, "mask_id": TOK.mask_token_id} | options
    return data.tokenize(TASK, TOK, "train", **wanted)


def test_a_batch_gets_the_least_bucket_that_holds_its_longest_prompt():
    whole, cut = tokenize(), tokenize(buckets=(8, 10))
    widths = set()
    for i in range(0, 64, 2):
        index = np.arange(i, i + 2)
        full, rows = whole.rows(index), cut.rows(index)
        longest = int(full[1].sum(axis=1).max())
        width = rows[0].shape[1]
        assert width == min(b for b in (8, 10, 14) if b >= longest)
        for a, b in zip(full[:2], rows[:2], strict=True):
            np.testing.assert_array_equal(a[:, 14 - width :], b)
        assert not full[1][:, : 14 - width].any()
        np.testing.assert_array_equal(full[2], rows[2])
        widths.add(width)
    assert widths == {8, 10, 14}
    assert cut.first(3).rows(np.arange(2))[0].shape == cut.rows(np.arange(2))[0].shape


def test_what_hides_prompts_does_not_see_the_padding():
    key, row = jax.random.key(1), jax.numpy.arange(5)
    prompt = jax.random.randint(jax.random.key(2), (5, 9), 0, 50)
    padded = jax.numpy.pad(prompt, ((0, 0), (7, 0)))
    short = masking.mask_prompts(key, row, prompt, 0.4, 99, 3)
    assert 0 < (short == 99).mean() < 1
    np.testing.assert_array_equal(
        masking.mask_prompts(key, row, padded, 0.4, 99, 3)[:, :, 7:], short
    )


def test_long_prompts_are_cut_to_their_last_tokens_and_counted():
    whole, cut = tokenize(), tokenize(prompt_length=7, long_prompts="cut")
    lengths = whole.prompt_valid.sum(axis=1)
    assert cut.cut == int((lengths > 7).sum()) > 0
    np.testing.assert_array_equal(cut.prompt, whole.prompt[:, -7:])
    with pytest.raises(ValueError, match=rf"{cut.cut} of 64 prompts are .* set long_prompts=cut"):
        tokenize(prompt_length=7)


def config(**overrides):
    made = diffu_grpo.get_config("tiny_countdown")
    small = {k: v for k, v in TINY.items() if not k.startswith(("task.", "sampling."))}
    small |= {"task.numbers": (2, 3), "task.train_size": 16, "task.held_out_size": 8}
    small |= {"max_prompt_length": 12, "prompts_per_step": 2}
    small |= {"sampling.steps": 2, "completions_every": 1, "warm_start.steps": 0}
    made.update_from_flattened_dict(small | {"terms.diffu_grpo.p_mask_prompt": 0.3} | overrides)
    return made.to_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prompt_buckets": (8, 12)}, r"prompt_buckets=\(8, 12\): give rising lengths below max"),
        ({"prompt_buckets": (8, 6)}, r"prompt_buckets=\(8, 6\): give rising"),
        ({"long_prompts": "drop"}, "long_prompts='drop': choose one of refuse, cut"),
    ],
)
def test_options_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        recipe.build(config(**overrides))


class Ones(countdown.Task):
    """Rewards what a policy that knows nothing earns now and then."""

    def score(self, example, completion):
        return {"reward": completion.count("1") / 12, "solved": 0.0}


def run(steps=8, **overrides):
    """(completions, metrics, compilations of the rollout) of the first steps of stage 2."""
    made = recipe.build(json.loads(json.dumps(config(**overrides))))
    made = made._replace(task=Ones(numbers=(2, 3), train_size=16, held_out_size=8))
    mesh = parallel.make_mesh(**made.mesh)
    stage = stages.Reinforce(made, mesh, Held(made, mesh))
    state = stage.init(trainer.initial_weights(made, mesh)[0])
    done, values = [], []
    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(7), number)
        result = stage.step(state, number, next(stage.batches), key)
        state = result.state
        done += result.completions
        values.append([result.values[name] for name in ("loss", "grad_norm", "reward")])
    return done, np.array(values), stage.programs._rollout._cache_size()


@pytest.mark.slow
def test_a_run_in_buckets_is_the_same_run():
    done, values, compiled = run()
    bucketed, same, lengths = run(prompt_buckets=(10,))
    assert bucketed == done
    np.testing.assert_allclose(same, values, rtol=1e-3, atol=1e-6)
    assert values[:, 1].max() > 1e-4, "no gradient, nothing compared"
    used = {min(b for b in (10, 12) if b >= n) for n in batch_lengths(done)}
    assert (compiled, lengths) == (1, len(used))
    assert len(used) > 1


def batch_lengths(done):
    """The longest prompt of each step."""
    by_step = {}
    for row in done:
        by_step.setdefault(row["step"], []).append(len(row["prompt"]))
    return [max(lengths) for lengths in by_step.values()]
