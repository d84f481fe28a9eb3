"""Rescue by inpainting: whom, with what, and never with the answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import tasks, tokenizer
from dmrl.algorithms import igpo
from dmrl.data import tokenize
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.rescue import Rescue, Traces, encode_traces
from dmrl.tasks import countdown
from dmrl.types import HINT, Models

MASK = -7


def plain(rows, length, hintable=None):
    """Traces whose tokens say row and position, hintable everywhere unless said."""
    tokens = (100 * np.arange(rows)[:, None] + np.arange(length)).astype(np.int32)
    hintable = np.ones(tokens.shape, bool) if hintable is None else np.array([hintable] * rows)
    return Traces(tokens, hintable)


def hints(rescue, traces, seed=0, step=0, wrong=None, row=None):
    rows = len(traces.tokens)
    wrong = np.ones(rows, bool) if wrong is None else np.array(wrong)
    row = np.arange(rows) if row is None else np.array(row)
    return rescue.hints(traces, wrong, row, seed, step, MASK)


def test_a_group_is_all_wrong_when_its_rewards_tie_below_success():
    group = np.array([4, 4, 7, 7, 9, 9, 2, 2])
    reward = np.array([0.1, 0.1, 0.0, 0.1, 1.0, 1.0, 0.0, 0.0], np.float32)
    wrong = [True, True, False, False, False, False, True, True]
    assert Rescue().all_wrong(reward, group).tolist() == wrong
    assert not Rescue(success=0.05).all_wrong(reward, group)[:2].any()
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    assert Rescue().all_wrong(reward[order], group[order]).tolist() == list(np.array(wrong)[order])


def test_only_rows_of_wrong_groups_get_hints_and_only_of_their_own_trace():
    traces = plain(6, 60)
    found = hints(Rescue(), traces, wrong=[True, False, True, False, True, True])
    assert (found[[1, 3]] == MASK).all()
    given = found != MASK
    assert given[[0, 2, 4, 5]].any(axis=1).all()
    np.testing.assert_array_equal(found[given], traces.tokens[given])


def test_hints_are_a_function_of_seed_step_and_row():
    traces = plain(6, 60)
    found = hints(Rescue(), traces)
    part = hints(Rescue(), traces.of(np.array([5, 2])), row=[5, 2])
    np.testing.assert_array_equal(part, found[[5, 2]])
    placed = found != MASK
    for other in ({"seed": 1}, {"step": 1}, {"row": np.arange(6) + 6}):
        assert ((hints(Rescue(), traces, **other) != MASK) != placed).any(axis=1).all(), other
    assert (placed[0] != placed[1]).any()


def test_chunks_are_whole_and_their_share_is_floor_of_eta():
    rescue = Rescue(eta_min=0.35, eta_max=0.35, chunk_min=6, chunk_max=6)
    given = hints(rescue, plain(200, 60)) != MASK
    chunks = given.reshape(200, 10, 6)
    np.testing.assert_array_equal(chunks.any(axis=2), chunks.all(axis=2))
    np.testing.assert_array_equal(chunks.all(axis=2).sum(axis=1), 3)
    assert tiny.chi_square(
        np.nonzero(chunks.all(axis=2))[1].tolist(), dict.fromkeys(range(10), 0.1)
    )


def test_eta_is_uniform_in_its_range():
    counts = (hints(Rescue(chunk_min=1, chunk_max=1), plain(4000, 10)) != MASK).sum(axis=1)
    assert tiny.chi_square(counts.tolist(), dict.fromkeys((2, 3, 4, 5), 0.25)) > 1e-3


def test_chunk_lengths_are_uniform_in_their_range():
    """Of two chunks one is given; where it is the first, its length shows."""
    rescue = Rescue(eta_min=0.5, eta_max=0.5, chunk_min=3, chunk_max=5)
    given = hints(rescue, plain(6000, 6)) != MASK
    assert (given.sum(axis=1) > 0).all()
    first = given[given[:, 0]].sum(axis=1)
    assert tiny.chi_square(first.tolist(), dict.fromkeys((3, 4, 5), 1 / 3)) > 1e-3


def test_positions_that_may_not_be_hinted_never_are_and_one_chunk_always_stays_hidden():
    hintable = [False, True, True, False, True, False, False, True]
    rescue = Rescue(eta_min=0.0, eta_max=0.99, chunk_min=1, chunk_max=2)
    given = hints(rescue, plain(3000, 8, hintable)) != MASK
    assert not given[:, ~np.array(hintable)].any()
    assert given[:, hintable].any(axis=0).all()
    assert set(given.sum(axis=1)) == {0, 1, 2, 3}
    assert (hints(rescue, plain(5, 8, [False] * 8)) == MASK).all()


def trace_of(task, examples, length):
    tok = tokenizer.characters(task.alphabet)
    encode = functools.partial(tokenizer.encode, tok)
    return tok, encode_traces(task, examples, encode, length)


def given_away(tok, task_traces, rescue, seeds):
    """(example number, what an example's rows show as text, '_' where nothing is given)."""
    count = len(task_traces.tokens)
    for seed in range(seeds):
        found = hints(rescue, task_traces, seed)
        yield from zip(range(count), tokenizer.decode(tok, found, MASK, -1), strict=True)


GREEDY = Rescue(eta_min=0.5, eta_max=0.99, chunk_min=1, chunk_max=4)


def test_countdown_hints_never_show_the_answer():
    task = tasks.load("countdown", style="published", numbers=(2, 5), held_out_size=60)
    examples = task.examples("validation")
    tok, traces = trace_of(task, examples, 256)
    shown = 0
    for i, text in given_away(tok, traces, GREEDY, 12):
        full = "".join(piece for piece, _ in task.trace(examples[i]))
        start = full.index("<answer>")
        assert set(text[start:]) == {"_"}
        assert examples[i].solution not in text
        assert all(a in ("_", b) for a, b in zip(text, full, strict=False))
        shown += text.count("_") < len(text)
    assert shown > 400


@pytest.mark.parametrize("numbers", [(2, 2), (3, 6)])
def test_countdown_traces_work_the_solution_out(numbers):
    task = tasks.load("countdown", style="published", numbers=numbers, held_out_size=40)
    for example in task.examples("validation"):
        pieces = task.trace(example)
        text = "".join(piece for piece, _ in pieces)
        assert task.score(example, text)["solved"] == 1.0
        lines = text[: text.index("</reasoning>")].splitlines()[1:]
        assert len(lines) == len(example.numbers) - 1
        for line in lines:
            expression, value = line.rsplit("=", 1)
            assert countdown.evaluate(expression) == countdown.evaluate(value)
        assert lines[-1].endswith(f"={example.target}")
        assert pieces[-1] == (task.answer(example), False)


def test_a_worked_line_puts_signs_and_fractions_in_brackets():
    task = tasks.load("countdown", style="published")
    trace = task.trace(countdown.Example((3, 8, 8, 3), 24, "8/(3-8/3)"))
    assert trace[0] == ("<reasoning>\n8/3=8/3\n3-(8/3)=1/3\n8/(1/3)=24\n</reasoning>\n", True)
    trace = task.trace(countdown.Example((1, 5, 9), 5, "9+(1-5)"))
    assert "\n1-5=-4\n9+(-4)=5\n" in trace[0][0]
    assert task.trace(countdown.Example((1, 1), 5)) is None


@pytest.mark.parametrize("style", ["compact", "grid", "published"])
def test_sudoku_hints_are_cells_of_the_solution_and_never_all_of_them(style):
    task = tasks.load("sudoku", style=style, held_out_size=50)
    examples = task.examples("validation")
    length = len(task.answer(examples[0]))
    tok, traces = trace_of(task, examples, length)
    shown = 0
    for i, text in given_away(tok, traces, GREEDY, 20):
        full = task.answer(examples[i])
        cells = sum(allowed for _, allowed in task.trace(examples[i]))
        given = [j for j, c in enumerate(text) if c != "_"]
        assert all(text[j] == full[j] and traces.hintable[i, j] for j in given)
        assert len(given) < cells == examples[i].puzzle.count("0")
        shown += len(given)
    assert shown > 1000


def test_a_board_s_trace_lies_where_its_template_is_masked():
    for style in ("compact", "grid"):
        task = tasks.load("sudoku", style=style, held_out_size=20)
        tok = tokenizer.characters(task.alphabet)
        length = len(task.answer(task.examples("validation")[0]))
        prompts = tokenize(task, tok, "validation", 1, length, tok.mask_token_id)
        _, traces = trace_of(task, prompts.examples, length)
        np.testing.assert_array_equal(traces.hintable, prompts.template == tok.mask_token_id)
        same = np.where(traces.hintable, prompts.template, traces.tokens)
        np.testing.assert_array_equal(same, prompts.template)


class Pieces:
    """A task whose examples are their own traces."""

    def trace(self, example):
        return example


def pairs(text):
    """A tokenizer with a token for every two characters."""
    return [ord(text[i]) * 256 + ord(text[i + 1 :][:1] or " ") for i in range(0, len(text), 2)]


def test_no_token_spans_a_border_and_long_traces_are_cut():
    examples = [[("abc", True), ("de", False), ("f", True)], None, [("0123456789abc", False)]]
    traces = encode_traces(Pieces(), examples, pairs, 4)
    assert traces.tokens[0].tolist() == [*pairs("abc"), *pairs("de"), *pairs("f")]
    assert traces.hintable.tolist() == [[True, True, False, True], [False] * 4, [False] * 4]
    assert traces.tokens[2].tolist() == pairs("01234567")


def test_tasks_that_can_give_nothing_away_are_refused():
    task = tasks.load("countdown", held_out_size=4)
    examples = task.examples("validation")
    with pytest.raises(ValueError, match=r"countdown has no trace with a piece .*fraction=0"):
        encode_traces(task, examples, pairs, 8)
    with pytest.raises(ValueError, match=r"has no reference traces: a rescue needs Task\.trace"):
        encode_traces(object(), [1], pairs, 8)


def test_right_hinted_completions_take_their_own_place_up_to_the_fraction():
    group = np.repeat(np.arange(4), 5)
    reward = np.array([0.1] * 5 + [0, 0, 1, 0, 0] + [0.0] * 10, np.float32)
    hinted = np.array([0, 1, 1, 0, 1] + [1] * 5 + [1, 0, 0, 0, 0] + [0.9] * 5, np.float32)
    for fraction, limit in ((0.5, 2), (0.4, 2), (0.6, 3), (1.0, 5), (0.0, 0)):
        out = Rescue(fraction=fraction).replaced(reward, hinted, group)
        assert np.flatnonzero(out).tolist() == [1, 2, 4][:limit] + [10][:limit], fraction


def test_a_product_just_below_an_integer_counts_as_it():
    assert 0.29 * 100 < 29
    group = np.zeros(100, int)
    out = Rescue(fraction=0.29).replaced(np.zeros(100), np.ones(100), group)
    assert out.sum() == 29


def test_the_restored_gradient_is_rho_one_minus_rho_of_right_against_wrong():
    """For every number K of right ones: rho (1 - rho) (mean score of right - of wrong)."""
    size, length = 6, 4
    params, _, bind = tiny.perceptron(length, prompt=3)
    keys = jax.random.split(jax.random.key(5), 3)
    original, inpainted = jax.random.randint(keys[0], (2, size, length), 0, tiny.MASK)
    prompt = jax.random.randint(keys[1], (size, 3), 0, tiny.MASK)
    hp = igpo.Hyper(beta=0.0)
    group, reward = np.zeros(size, int), np.zeros(size, np.float32)
    hinted_step = jnp.where(jnp.arange(length) < 2, HINT, 1)[None]

    @jax.jit
    def restored(take):
        tokens = jnp.where(take[:, None], inpainted, original)
        steps = jnp.where(take[:, None], hinted_step, 0)
        rollout = tiny.rollout(tokens, steps, prompt, take.astype(jnp.float32))
        policy = Models(bind(params), None, None)
        batch = igpo.prepare(policy, rollout, None, keys[2], tiny.INNER, hp)

        def score(p):
            log_prob = state_log_prob(bind(p), *batch[:4])[:, 0]
            return jnp.sum(jnp.where(batch.weight[:, 0] > 0, log_prob, 0.0), axis=1)

        loss = jax.grad(lambda p: igpo.loss(Models(bind(p), None, None), batch, hp)[0])(params)
        return loss, jax.jacobian(score)(params)

    coefficients = []
    for right in range(size + 1):
        hinted = (np.arange(size) < right).astype(np.float32)
        take = Rescue(fraction=1.0).replaced(reward, hinted, group)
        assert take.sum() == right
        gradient, scores = restored(jnp.asarray(take))
        rho = right / size
        coefficients.append(rho * (1 - rho))
        if right in (0, size):
            assert (tiny.flat(gradient) == 0).all()
            continue
        want = jax.tree.map(
            lambda g, take=take, c=coefficients[-1]: (
                -c * (np.mean(np.asarray(g)[take], 0) - np.mean(np.asarray(g)[~take], 0))
            ),
            scores,
        )
        tiny.assert_close(gradient, want)
    assert np.argmax(coefficients) == size // 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fraction": 1.5}, r"fraction=1.5 of a group: choose one in \[0, 1\]"),
        ({"eta_max": 1.0}, "eta_max=1.0: need 0 <= eta_min <= eta_max < 1"),
        ({"eta_min": 0.7}, "eta_min=0.7, eta_max=0.6"),
        ({"chunk_min": 0}, "chunk_min=0, chunk_max=10: need 1 <="),
        ({"chunk_max": 3}, "chunk_min=5, chunk_max=3"),
    ],
)
def test_impossible_settings_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        Rescue(**values)
