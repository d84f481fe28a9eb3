"""The benchmarks of speed: turns, memory, the table; the PyTorch peer where torch is installed."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from benchmarks import shapes, steps, timing


@pytest.fixture(autouse=True)
def parsed_flags():
    flags.FLAGS.mark_as_parsed()


def test_contestants_take_turns():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.alternate(runs)
    assert order == ["a", "b"] * (1 + timing.REPEATS.value)
    assert all(0 <= t.minimum <= t.median for t in times.values())
    assert timing.ratio(times, "a", "a") == 1


def test_the_cpu_clock_is_refused_on_several_cores(monkeypatch):
    monkeypatch.setattr(flags.FLAGS, "clock", "cpu")
    monkeypatch.setattr(timing, "cores", lambda: 2)
    with pytest.raises(ValueError, match="needs one core, not 2"):
        timing.alternate({"a": lambda: None})


def test_peak_memory_sees_what_is_gone_again():
    size = 100_000_000
    assert timing.peak_memory(lambda: int(np.ones(size, np.uint8)[-1])) >= 0.9 * size
    assert timing.peak_memory(lambda: 0) < 0.1 * size


def test_the_table_and_the_file_hold_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flags.FLAGS, "out", str(tmp_path))
    monkeypatch.setattr(timing, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(timing, "CLOCK", types.SimpleNamespace(value="wall"))
    row = timing.Row("1", "rollout", "T0", "3x", ">= 2x", "4x", 3.0, 1.5, 0.25, True)
    timing.save("x", [row], {"dmrl": 1.0})
    line = "| 1 | rollout | T0 | 3x | >= 2x | 4x | 3.00 | 1.50 | 0.25 | yes |"
    assert capsys.readouterr().out.splitlines()[-1] == line
    content = json.loads((tmp_path / "x.json").read_text())
    assert timing.Row(**content["rows"][0]) == row


def test_bounds_of_the_overhead_at_llada_8b():
    bound = {}
    for base, updates, kl in (
        ("diffu_grpo", 8, False),
        ("diffu_grpo", 12, True),
        ("spg", 4, False),
    ):
        work = [steps.flops(shapes.F, base, updates, kl, dispo) for dispo in (True, False)]
        bound[base, updates] = work[0] / work[1]
    assert bound["diffu_grpo", 8] == pytest.approx(
        1.22, abs=0.05
    )  # published bounds leave recomputation out
    assert bound["diffu_grpo", 12] == pytest.approx(
        1.29, abs=0.05
    )  # published bounds leave recomputation out
    assert bound["spg", 4] == pytest.approx(
        1.10, abs=0.05
    )  # published bounds leave recomputation out


def test_the_peer_decodes_the_same_tokens():
    pytest.importorskip("torch")
    from benchmarks import rollout

    rollout.check(rollout.make(shapes.TINY, shapes.TINY.sampling.steps))


@pytest.mark.parametrize("name", ["spg", "diffu_grpo"])
def test_the_peer_has_the_same_losses_and_gradients(name):
    pytest.importorskip("torch")
    from benchmarks import losses

    made = losses.case(getattr(losses, name), shapes.TINY)
    losses.check(made)
    value, gradient = made.ours()
    with pytest.raises(AssertionError):
        losses.check(made._replace(ours=lambda: (value + 1e-3 * made.scale, gradient)))
    twice = jax.tree.map(lambda x: x * jnp.float32(1.001), gradient)
    with pytest.raises(AssertionError, match="gradients differ"):
        losses.check(made._replace(ours=lambda: (value, twice)))
