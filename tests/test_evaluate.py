"""The evaluation: scores, names of settings, the interval, the rows that the report draws."""

import jax
import numpy as np
import pytest

from dmrl import data, evaluate, models, protocol, tasks, tokenizer, trace, trajectories
from dmrl.diffusion.sampler import Sampling
from dmrl.types import TEMPLATE, Rollout

TASK = tasks.load("sudoku", train_size=4, held_out_size=11)
TOK = tokenizer.characters(TASK.alphabet)
PROMPTS = data.tokenize(TASK, TOK, "test", 0, 16, TOK.mask_token_id)
SOLUTIONS = data.answers(TASK, TOK, PROMPTS, TOK.eos_token_id)
STEPS = 4


class Oracle:
    """Programs whose sampler solves even rows and fills odd ones with 1, in two steps."""

    slots = 0
    group_size = 1
    model = models.Config(
        vocab_size=len(TOK), mask_token_id=TOK.mask_token_id, eos_token_id=TOK.eos_token_id
    )

    def __init__(self):
        self.shapes = []

    def rollout(self, trainable, frozen, rows, first_row, key):
        del trainable, frozen, key
        template = np.asarray(rows[2])
        self.shapes.append(template.shape)
        row = first_row + np.arange(len(template))
        free = template == TOK.mask_token_id
        right = SOLUTIONS[np.minimum(row, len(SOLUTIONS) - 1)]
        wrong = np.where(free, TOK.convert_tokens_to_ids("1"), template)
        late = np.cumsum(free, axis=1) % 2
        tokens = np.where((row % 2 == 0)[:, None], right, wrong)
        log_prob = np.where(free, -row[:, None] / 3, 0.0)
        return (
            jax.tree.map(
                jax.numpy.asarray,
                Rollout(
                    prompt=rows[0].astype(np.int32),
                    prompt_valid=rows[1],
                    tokens=tokens.astype(np.int32),
                    reveal_step=np.where(free, late, TEMPLATE).astype(np.int32),
                    log_prob=log_prob.astype(np.float32),
                    entropy=-log_prob.astype(np.float32),
                    row=row.astype(np.int32),
                    group=row.astype(np.int32),
                    length=np.full(len(row), 16, np.int32),
                ),
            ),
            (),
        )


def decode(batch):
    programs = Oracle()
    key = jax.random.key(0)
    return evaluate.decode(programs, None, None, PROMPTS, TASK, TOK, batch, key), programs


def test_scores_are_means_over_exactly_the_split():
    decoded, _ = decode(4)
    found = dict(evaluate.metrics(decoded))
    assert len(decoded.texts) == len(PROMPTS.examples) == 11
    assert found["solved"] == found["reward"] == pytest.approx(6 / 11)
    assert found["mean_length"] == 16
    by_hand = [TASK.score(e, t)["cells"] for e, t in zip(PROMPTS.examples, decoded.texts)]  # noqa: B905
    assert found["cells"] == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize("batch", [1, 3, 11, 16])
def test_the_batch_size_changes_nothing(batch):
    wanted, _ = decode(4)
    decoded, programs = decode(batch)
    assert set(programs.shapes) == {(batch, 16)}
    assert decoded.texts == wanted.texts
    kept = [jax.tree.leaves((d.rollout, d.scores)) for d in (decoded, wanted)]
    for a, b in zip(*kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(16, 4, 16), "greedy_4"),
        (Sampling(16, 16, 8, temperature=0.9), "sampled_16"),
        (Sampling(16, 4, 16, order="random"), "greedy_4_random"),
        (Sampling(16, 8, 8, order="entropy", remask="rcr"), "greedy_8_entropy_rcr"),
    ],
)
def test_names_of_settings(sampling, name):
    assert evaluate.setting_name(sampling) == name


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [  # by hand: (s + z^2/2 -+ z sqrt(s f / n + z^2/4)) / (n + z^2)
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval(successes, count, low, high):
    assert protocol.interval(float(successes), count) == pytest.approx((low, high), abs=1e-4)


def test_trajectory_rows_show_cells_in_the_order_of_the_board():
    task = tasks.load("sudoku", style="grid", train_size=1, held_out_size=3)
    tok = tokenizer.characters(task.alphabet)
    prompts = data.tokenize(task, tok, "test", 0, 29, tok.mask_token_id)
    answers = data.answers(task, tok, prompts, tok.eos_token_id)
    free = prompts.template == tok.mask_token_id
    guess = np.where(free, tok.convert_tokens_to_ids("3"), answers).astype(np.int32)
    zeros = np.zeros(guess.shape, np.float32)
    decoded = evaluate.Decoded(
        Rollout(
            *prompts[1:3],
            tokens=guess,
            reveal_step=np.where(free, np.cumsum(free, 1) % STEPS, TEMPLATE).astype(np.int32),
            log_prob=zeros,
            entropy=zeros,
            row=np.arange(3),
            group=np.arange(3),
            length=np.full(3, 29),
        ),
        tokenizer.decode(tok, guess, tok.mask_token_id, tok.eos_token_id),
        {name: np.zeros(3) for name in task.score(prompts.examples[0], "")},
    )
    setting = Sampling(29, STEPS, 29)
    read = trace.Reader(tok, tok.mask_token_id, tok.eos_token_id)
    rows = list(trajectories.of_split(decoded, prompts, task, read, setting, "test", "before", 2))
    assert [r["id"] for r in rows] == [0, 1]
    for row, example in zip(rows, prompts.examples, strict=False):
        assert (row["when"], row["setting"], row["steps"]) == ("before", "test greedy_4", STEPS)
        assert row["grid"] == [4, 4]
        assert len(row["tokens"]) == len(row["reveal_step"]) == len(row["answer"]) == 16
        assert "".join(row["answer"]) == example.solution
        for cell, given in enumerate(example.puzzle):
            if given != "0":
                assert row["tokens"][cell] == given
                assert row["reveal_step"][cell] == TEMPLATE
            else:
                assert row["tokens"][cell] == "3"
                assert 0 <= row["reveal_step"][cell] < STEPS
        assert row["template"] == example.puzzle.replace("0", "_")
