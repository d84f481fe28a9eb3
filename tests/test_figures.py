"""The papers' pictures: variances from inner products, first violations, what is drawn."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import figures, variance
from configs import common
from dmrl import recipe
from dmrl.algorithms import dispo
from dmrl.diffusion import exact
from dmrl.types import Models, Probe

M, LENGTH, FILLS = tiny.MASK, 4, 6
STATES = jnp.array([[1, M, M, 0], [M, 2, M, M], [0, 1, 2, M]])


@functools.cache
def drawn():
    """FILLS fillings of every one of STATES, and the parameters that drew them."""
    params, prompt, _ = tiny.perceptron(LENGTH)
    draws = jax.random.randint(jax.random.key(3), (len(STATES), FILLS, LENGTH), 0, M)
    fills = jnp.where(STATES[:, None] == M, draws, STATES[:, None])
    rollout = tiny.rollout(
        fills[:, 0],
        jnp.where(STATES == M, 1, 0).at[0, 0].set(-1),  # a position that the template gave
        jnp.broadcast_to(prompt, (len(STATES), len(prompt))),
    )
    step = jnp.ones((len(STATES), 1), jnp.int32)
    probe = Probe(step, STATES[:, None], fills[:, None], tiny.reward_of(fills)[:, None])
    return variance.Drawn(rollout, probe), params


def bound(params):
    return exact.bind(params, M, tiny.NO_EOS)


@functools.cache
def branches(scale):
    at, params = drawn()
    moved = jax.tree.map(lambda x: scale * x, params)
    return variance.branches(bound, moved, params, at), moved


@pytest.mark.parametrize("kind", dispo.GRADIENTS)
@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_a_trial_s_gradient_is_the_loss_s(kind, scale):
    at, old = drawn()
    found, moved = branches(scale)
    weight = variance.siblings(found.reward, found.log_ratio[kind], 3)
    products = weight @ found.gram[kind] @ weight.swapaxes(1, 2)
    hyper = dispo.Hyper(gradient=kind, fillings=3, **variance.EXACT)
    for state in range(len(STATES)):
        one = jax.tree.map(lambda x, s=state: x[s : s + 1], at)
        rows = []
        for trial in range(FILLS // 3):
            mine = slice(3 * trial, 3 * trial + 3)
            probe = one.probe._replace(
                fills=one.probe.fills[:, :, mine], reward=one.probe.reward[:, :, mine]
            )
            trio = Models(bound(old), bound(old), None)
            key = jax.random.key(0)
            batch = dispo.prepare(trio, one.rollout, probe, key, tiny.INNER, hyper)
            slope = jax.grad(
                lambda p, b=batch: dispo.loss(Models(bound(p), None, None), b, hyper)[0]
            )
            rows.append(tiny.flat(slope(moved)))
        want = np.stack(rows) @ np.stack(rows).T
        np.testing.assert_allclose(products[state], want, rtol=1e-3, atol=1e-4 * want.max())


def test_where_the_policy_drew_revealed_tokens_change_nothing():
    found, _ = branches(1.0)
    told = variance.kinds(found, branches(1.6)[0])
    np.testing.assert_allclose(*told["two siblings"].values(), rtol=1e-4)
    assert np.ptp(np.divide(*told["one filling"].values())) > 0.1
    assert np.ptp(np.divide(*told["after inner updates"].values())) > 1e-3
    np.testing.assert_allclose(found.share, [2 / 3, 3 / 4, 1 / 4])


@functools.cache
def synthetic():
    """Rewards that depend on three-dimensional scores, many states of 24 fillings."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=(4000, 24, 3))
    reward = (score[..., 0] + rng.normal(size=(4000, 24)) > 0.5).astype(float)
    return reward, score


@pytest.mark.parametrize("z", [2, 3, 6])
def test_the_variance_of_z_fillings_is_the_predicted_one(z):
    reward, score = synthetic()
    gram = score @ score.swapaxes(1, 2)
    weight = variance.siblings(reward, np.zeros_like(reward), z) * z / (z - 1)
    seen = variance.total_variance(weight, gram).mean()
    assert variance.predicted(reward, gram, z).mean() == pytest.approx(seen, rel=0.02)


def test_total_variance_is_that_of_the_vectors():
    reward, score = (x[:5] for x in synthetic())
    weight = variance.single(reward)
    others = (reward.sum(1, keepdims=True) - reward) / (reward.shape[1] - 1)
    vectors = -(reward - others)[..., None] * score
    want = np.var(vectors, axis=1, ddof=1).sum(-1)
    gram = score @ score.swapaxes(1, 2)
    np.testing.assert_allclose(variance.total_variance(weight, gram), want)


def test_the_bootstrap_is_paired():
    rng = np.random.default_rng(1)
    large = rng.lognormal(size=400)
    same = variance.ratio(0.5 * large, large, rng)
    assert same["low"] == pytest.approx(0.5) == pytest.approx(same["high"])
    noisy = variance.ratio(0.5 * large * rng.lognormal(0, 0.5, 400), large, rng)
    assert noisy["low"] < noisy["ratio"] < noisy["high"]


def test_study_tells_what_the_figure_draws(tmp_path):
    at = branches(1.0)[0], branches(1.6)[0]
    many = [jax.tree.map(lambda x: np.repeat(x, 5, axis=0), b) for b in at]
    told = variance.study(*many, (2, 3))
    assert [x["fillings"] for x in told["by_fillings"]] == [2, 3]
    assert told["by_fillings"][0]["trained"]["ratio"] == 1
    figures.save("variance", told, tmp_path)
    assert json.loads((tmp_path / "variance.json").read_text()) == told


@functools.cache
def board():
    config = common.tiny_sudoku({"dispo": common.term("dispo", 1.0)})
    config.task.style = "compact"
    config.sampling.update({"length": 16, "block_length": 16})
    return recipe.build(config.to_dict())


SOLVED = "1234341221434321"


def filled(changes, order):
    """SOLVED with `changes` {cell: digit}; the cells of `order` are filled one a step."""
    text = list(SOLVED)
    for cell, digit in changes.items():
        text[cell] = digit
    reveal = np.full((1, 16), -1)
    reveal[0, list(order)] = np.arange(len(order))
    tokens = board().tokenizer.encode("".join(text), add_special_tokens=False)
    return jax.tree.map(np.asarray, tiny.rollout([tokens], reveal))


@pytest.mark.parametrize(
    ("changes", "want"), [({}, np.inf), ({5: "1"}, 0.5), ({2: "4", 3: "3"}, 0.75)]
)
def test_a_violation_is_timed_by_cells_filled(changes, want):
    made = board()
    how = dataclasses.replace(made.sampling, steps=16)
    assert figures.violated(filled(changes, (0, 5, 2, 3)), made, how) == [want]


def test_several_cells_at_once_are_refused():
    made = board()
    rollout = filled({}, (0, 5, 2, 3))
    rollout = rollout._replace(reveal_step=np.minimum(rollout.reveal_step, 1))
    with pytest.raises(ValueError, match="several cells"):
        figures.violated(rollout, made, made.sampling)


def test_reward_curves_are_those_of_the_seeds(tmp_path):
    found = []
    for seed, more in ((0, 0.0), (1, 0.2)):
        path = tmp_path / str(seed)
        path.mkdir()
        lines = [
            {"stage": "rl", "step": i, "step_time": 1.0, "reward": i / 20 + more}
            | {"dispo/step_reward": 0.5}
            for i in range(1, 13)
        ]
        (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found.append(figures.Run(path, "diffu_grpo + dispo", board()))
    told = figures.reward(found)
    curve = told["completions"]["diffu_grpo + dispo"]
    assert curve["seeds"] == 2
    np.testing.assert_allclose(curve["mean"], [3 / 20 + 0.1, 8 / 20 + 0.1])
    np.testing.assert_allclose(np.subtract(curve["high"], curve["low"]), 0.2)
    figures.save("reward", told, tmp_path)
    figures.save("reward", told, tmp_path / "again")
    first = (tmp_path / "reward.svg").read_bytes()
    assert first == (tmp_path / "again" / "reward.svg").read_bytes()
    assert b"outer step" in first
    assert len(first) < 60_000


def test_the_other_pictures_draw_what_they_are_told(tmp_path):
    curve = figures.band([[0.1, 0.2], [0.3, 0.2]])
    assert curve == {"seeds": 2, "mean": [0.2, 0.2], "low": [0.1, 0.2], "high": [0.3, 0.2]}
    pair = {"before": curve, "after": curve}
    orders = dict.fromkeys(figures.ORDERS, pair)
    figures.save("violation", {"filled": [0.5, 1.0], "orders": orders}, tmp_path)
    panel = dict.fromkeys((*figures.ORDERS, "greedy"), curve)
    figures.save("pass_at", {"n": [1, 2], "before": panel, "after": panel}, tmp_path)
    for name in ("violation", "pass_at"):
        assert all(order in (tmp_path / f"{name}.svg").read_text() for order in figures.ORDERS)


def test_pictures_of_dispo_need_a_run_of_it(tmp_path):
    runs = [figures.Run(tmp_path, name, board()) for name in ("diffu_grpo", "spg + dispo")]
    assert figures.with_dispo(runs) == runs[1:]
    with pytest.raises(ValueError, match="dispo term"):
        figures.with_dispo(runs[:1])
