"""Traces: what is told of a completion, against the sampler's states and hand-made ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import tasks, tokenizer, trace
from dmrl.algorithms import advantage
from dmrl.diffusion.probe import fill, state_at
from dmrl.diffusion.sampler import Sampling, sample
from dmrl.types import HINT, TEMPLATE, Probe, ProbePlan

STEPS, M = 3, tiny.MASK


class Letters:
    """Token 0 is a, 1 is b, 2 the first byte of something; MASK is special."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join({0: "a", 1: "b", 2: "\ufffd", M: ""}[i] for i in ids)

    def convert_ids_to_tokens(self, token):
        return "<0xE2>"


READ = trace.Reader(Letters(), M, tiny.NO_EOS)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.fixture(scope="module")
def sampled():
    """Six rows of six positions, the second given, in three steps of a tiny model."""
    params, prompt, bind = tiny.perceptron(6)
    template = jnp.array([M, 1, M, M, M, M])
    rows = 6
    args = (jnp.broadcast_to(x, (rows, *x.shape)) for x in (prompt, jnp.ones(2, bool), template))
    row = jnp.arange(rows)
    config = Sampling(6, STEPS, 6, temperature=1.0)
    return sample(bind(params), *args, row, row, jax.random.key(3), config), bind(params)


def states(rollout):
    """[B,T+1,L] as the sampler saw them."""
    every = jnp.broadcast_to(jnp.arange(STEPS + 1), (len(rollout.tokens), STEPS + 1))
    return state_at(rollout, every, M)


def replay(told, begun, t):
    """What a trace says a completion held after t steps."""
    cells = list(begun)
    for step, position, text in told["changes"]:
        if step < t:
            cells[position] = text
    return cells


def words(tokens):
    return [None if x == M else trace.texts(Letters(), [x])[0] for x in tokens]


def test_a_sampled_completion_is_told_as_it_was_revealed(sampled):
    rollout = on_host(sampled[0])
    shown = trace.Layout(list(range(6)))
    for i in range(len(rollout.tokens)):
        told = trace.make(rollout, i, STEPS, READ, shown)
        assert told["tokens"] == words(rollout.tokens[i])
        assert told["reveal_step"] == rollout.reveal_step[i].tolist()
        assert told["reveal_step"][1] == TEMPLATE
        assert told["changes"] is told["grid"] is told["violation"] is None
        assert told["length"] == 6
        np.testing.assert_allclose(told["log_prob"], rollout.log_prob[i], atol=1e-4)
        np.testing.assert_allclose(told["entropy"], rollout.entropy[i], atol=1e-4)


def test_stored_states_tell_the_same_where_nothing_is_taken_back(sampled):
    stored = states(sampled[0])
    rollout = on_host(sampled[0]._replace(states=stored))
    for i in range(len(rollout.tokens)):
        told = trace.make(rollout, i, STEPS, READ, trace.Layout(list(range(6))))
        assert len(told["changes"]) == 5
        for t in range(STEPS + 1):
            assert replay(told, words(stored[i, 0].tolist()), t) == words(stored[i, t].tolist())
        for step, position, text in told["changes"]:
            assert rollout.reveal_step[i, position] == step
            assert told["tokens"][position] == text


@pytest.mark.parametrize("remask", ["remdm:0.9", "rcr"])
def test_a_sampler_that_takes_tokens_back_is_told_step_by_step(remask):
    params, prompt, bind = tiny.perceptron(6)
    rows, steps = 4, 6
    template = jnp.array([M, 1, M, M, M, M])
    args = (jnp.broadcast_to(x, (rows, *x.shape)) for x in (prompt, jnp.ones(2, bool), template))
    row = jnp.arange(rows)
    config = Sampling(6, steps, 6, temperature=1.0, remask=remask)
    rollout = on_host(sample(bind(params), *args, row, row, jax.random.key(4), config))
    taken_back = 0
    for i in range(rows):
        told = trace.make(rollout, i, steps, READ, trace.Layout(list(range(6))))
        stored = rollout.states[i].tolist()
        for t in range(steps + 1):
            assert replay(told, words(stored[0]), t) == words(stored[t])
        taken_back += sum(text is None for _, _, text in told["changes"])
        last = {position: step for step, position, _ in told["changes"]}
        assert all(told["reveal_step"][position] == step for position, step in last.items())
    assert taken_back > 0


def test_remasked_and_edited_tokens_are_told():
    history = [[M, 1, M], [0, 1, M], [M, 1, 0], [2, 1, 1]]
    rollout = on_host(
        tiny.rollout([history[-1]], [[2, TEMPLATE, 2]])._replace(states=jnp.array([history]))
    )
    told = trace.make(rollout, 0, STEPS, READ, trace.Layout([0, 1, 2]))
    assert told["changes"] == [
        (0, 0, "a"),
        (1, 0, None),
        (1, 2, "a"),
        (2, 0, "<0xE2>"),
        (2, 2, "b"),
    ]
    for t, state in enumerate(history):
        assert replay(told, words(history[0]), t) == words(state)


def test_states_that_do_not_end_with_the_completion_are_refused():
    rollout = tiny.rollout([[0, 1]], [[0, 3]])._replace(states=jnp.array([[[M, M], [0, M]]]))
    shown = trace.Layout([0, 1])
    trace.make(on_host(rollout), 0, 3, READ, shown)  # the second was never filled: EOS, say
    wrong = on_host(rollout._replace(states=jnp.array([[[M, M], [1, M]]])))
    with pytest.raises(ValueError, match="last of 2 states holds token 1 at shown position 0"):
        trace.make(wrong, 0, 3, READ, shown)


def board(text, answer="1234341221434321"):
    """(begun, changes) of a 4x4 board: '.' filled by the answer at its own step, in order."""
    begun = [None if c == "." else c for c in text]
    free = [i for i, c in enumerate(text) if c == "."]
    return begun, [(step, i, answer[i]) for step, i in enumerate(free)]


UNITS = tasks.load("sudoku").units


def test_a_right_board_violates_nothing():
    begun, changes = board("1...3.1...4..3..")
    assert len(changes) == 11
    assert trace.first_violation(begun, changes, UNITS) is None


@pytest.mark.parametrize(
    ("cell", "digit", "against"),
    [
        (1, "1", [0]),  # given in its row and box
        (9, "3", [13]),  # given in its column
        (11, "4", [3, 10]),  # filled in its column, given in its row and box
    ],
)
def test_the_first_violation_is_the_first_token_that_its_unit_holds(cell, digit, against):
    begun, changes = board("1...3.1...4..3..")
    changes = [(s, i, digit if i == cell else t) for s, i, t in changes]
    [step] = [s for s, i, _ in changes if i == cell]
    found = trace.first_violation(begun, changes, UNITS)
    assert found == {"step": step, "position": cell, "against": against}


def test_tokens_of_one_step_are_judged_together():
    begun: list[str | None] = [None] * 16
    changes = [(0, 0, "1"), (4, 2, "2"), (4, 3, "2")]
    found = trace.first_violation(begun, changes, UNITS)
    assert found == {"step": 4, "position": 2, "against": [3]}


def test_a_token_that_was_masked_again_is_in_no_ones_way():
    changes = [(0, 0, "1"), (1, 0, None), (2, 1, "1"), (3, 0, "2")]
    assert trace.first_violation([None] * 16, changes, UNITS) is None
    found = trace.first_violation([None] * 16, [*changes, (4, 0, "1")], UNITS)
    assert found == {"step": 4, "position": 0, "against": [1]}


def test_boards_of_tasks_are_laid_out():
    sudoku = trace.layout(tasks.load("sudoku", style="grid"), 29)
    assert (sudoku.grid, len(sudoku.positions), len(sudoku.units)) == ((4, 4), 16, 12)
    zebra = trace.layout(tasks.load("zebra"), 100)
    assert zebra.grid is not None
    assert [len(unit) for unit in zebra.units] == [zebra.grid[1]] * zebra.grid[0]
    assert trace.layout(tasks.load("sudoku", style="published"), 5) == (list(range(5)), None, ())


@pytest.mark.parametrize(
    ("task", "box"),
    [("sudoku", [2, 2]), ("zebra", None)],
)
def test_a_board_shows_its_cells_alone(task, box):
    loaded = tasks.load(task, train_size=1, held_out_size=1)
    example = loaded.examples("test")[0]
    tok = tokenizer.characters(loaded.alphabet)
    ids = tokenizer.encode(tok, loaded.answer(example))
    shown = trace.layout(loaded, len(ids))
    rollout = on_host(tiny.rollout([ids], [[HINT] * len(ids)]))
    read = trace.Reader(tok, tok.mask_token_id, tok.eos_token_id)
    told = trace.make(rollout, 0, 4, read, shown, ["1"] * len(shown.positions))
    assert told["tokens"] == [loaded.answer(example)[c] for c in shown.positions]
    assert told["grid"] == [len(loaded.grid), len(loaded.grid[0])]
    assert (told["box"], told["length"]) == (box, None)
    assert told["answer"] == ["1"] * len(told["tokens"])


@pytest.mark.parametrize("baseline", advantage.BASELINES)
def test_branches_tell_states_fillings_and_advantages(sampled, baseline):
    rollout, denoiser = sampled
    plan = ProbePlan(jnp.array([[1, 2]] * 6, jnp.int32), 3, 1.0)
    reward = np.random.default_rng(0).random((6, 2, 3), np.float32)
    probe = fill(denoiser, rollout, plan, jax.random.key(5))._replace(reward=reward)
    wanted = np.asarray(advantage.within(jnp.asarray(reward), baseline))
    shown = trace.Layout([5, 4, 3, 2, 1, 0])
    for i in range(6):
        found = trace.branches(on_host(probe), i, READ, shown, baseline)
        assert [b["step"] for b in found] == [1, 2]
        for k, branch in enumerate(found):
            state = probe.state[i, k].tolist()[::-1]
            assert branch["state"] == words(state)
            for z in range(3):
                whole = words(probe.fills[i, k, z].tolist()[::-1])
                drawn = [w for x, w in zip(state, whole, strict=True) if x == M]
                assert branch["fills"][z] == drawn
            assert branch["lengths"] == [6] * 3
            np.testing.assert_allclose(branch["reward"], reward[i, k], atol=1e-4)
            np.testing.assert_allclose(branch["advantage"], wanted[i, k], atol=2e-4)


def test_a_filling_ends_with_its_first_eos():
    rollout = on_host(tiny.rollout([[M, M, M]], [[0, 0, 0]]))
    fills = np.array([[[[0, 1, 0], [1, 1, 1], [0, 0, 0]]]])
    probe = Probe(np.array([[0]]), rollout.tokens[:, None], fills, np.zeros((1, 1, 3)))
    read = trace.Reader(Letters(), M, 1)
    [branch] = trace.branches(probe, 0, read, trace.Layout([0, 1, 2]), "mean")
    assert branch["lengths"] == [2, 1, 3]
