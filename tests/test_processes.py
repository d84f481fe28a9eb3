"""Several processes of one run: what one computes, what happens when one is lost."""

import signal
import time

import numpy as np
import pytest
from running import arguments, finish, rows, start_together, timeless

from dmrl import processes

OPTIONS = {
    "steps": 3,
    "warm_start__steps": 0,
    "checkpoint_every": 1,
    "completions_every": 1,
    "num_iterations": 2,
    "optimizer__learning_rate": 1e-2,
    "optimizer__warmup_steps": 1,
}
NOTICED = processes.SILENT_SECONDS + 60
"""Seconds in which the others must have stopped."""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (processes.ADDRESS, processes.COUNT, processes.NUMBER):
        monkeypatch.delenv(name, raising=False)


def test_alone_there_is_nothing_to_share():
    calls = []

    def work(index):
        calls.append(index.tolist())
        return index[:, None] / 3

    np.testing.assert_array_equal(processes.shared_rows(5, work), np.arange(5)[:, None] / 3)
    assert calls == [[0, 1, 2, 3, 4]]
    assert processes.any_of(True)
    assert not processes.any_of(False)
    assert processes.is_writer()
    processes.check_same("config", "anything")
    with pytest.raises(SystemExit, match="error: enough"):
        processes.stop("error: enough")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rows_taken_by_turns_come_back_in_order(monkeypatch, count):
    table = np.random.default_rng(0).standard_normal((7, 2))

    def together(own):
        """What all processes would have sent, this one checked against its own part."""
        each = -(-7 // count)
        parts = [table[np.minimum(np.arange(each) * count + p, 6)] for p in range(count)]
        np.testing.assert_array_equal(own, parts[1].view(np.uint32))
        return np.stack([part.view(np.uint32) for part in parts])

    monkeypatch.setattr(processes.jax, "process_count", lambda: count)
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", together)
    np.testing.assert_array_equal(processes.shared_rows(7, table.__getitem__), table)


@pytest.mark.parametrize(
    "named",
    [
        {processes.COUNT: "2", processes.NUMBER: "0"},
        {processes.ADDRESS: "host:1", processes.COUNT: "2"},
        {processes.ADDRESS: "host:1", processes.COUNT: "two", processes.NUMBER: "0"},
    ],
)
def test_half_an_introduction_is_refused(monkeypatch, named):
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES='\w+'.*give host:port of process 0"):
        processes.join()


def run(count, workdir, cache, **options):
    """The processes of a (further) launch on a workdir."""
    args = arguments(**(OPTIONS | options))
    return start_together(count, f"--workdir={workdir}", *args, cache=cache)


def after_step(started, workdir, step, saved=False):
    """Waits until metrics.jsonl shows the step, and until it is saved if asked."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and all(p.poll() is None for p in started):
        seen = any(r["step"] == step for r in rows(workdir / "metrics.jsonl") if "loss" in r)
        if seen and (not saved or (workdir / "checkpoints" / "rl" / str(step)).exists()):
            return
        time.sleep(0.05)
    for process in started:
        process.kill()
    pytest.fail(f"no step {step}: {[p.communicate() for p in started]}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compilation cache, so that a restart costs seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The workdirs of undisturbed runs by their number of processes."""
    out = {}
    for count in (1, 2, 4):
        out[count] = tmp_path_factory.mktemp(f"of{count}") / "run"
        for process in run(count, out[count], cache):
            finish(process)
    return out


def steps(workdir):
    """The metrics of the training steps, without clock readings."""
    return [r for r in timeless(rows(workdir / "metrics.jsonl")) if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_compute_what_one_does(whole, count):
    one, many = steps(whole[1]), steps(whole[count])
    assert [r["step"] for r in many] == [1, 2, 3]
    for name in ("reward", "reward_std", "num_tokens", "reward_calls", "dispo/step_reward"):
        assert many[0][name] == one[0][name]
    assert one[0]["reward"] > 0
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-5)
    assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
    first = [
        [r for r in rows(whole[n] / "completions.jsonl") if r["step"] == 1] for n in (1, count)
    ]
    assert first[0] == first[1]
    assert len({r["completion"] for r in first[0]}) > 4
    pictures = [rows(whole[n] / "trajectories.jsonl")[:2] for n in (1, count)]
    assert [p["tokens"] for p in pictures[0]] == [p["tokens"] for p in pictures[1]]
    assert (whole[count] / "weights" / "model.json").exists()


@pytest.mark.slow
def test_when_one_is_killed_the_other_stops_and_a_restart_resumes(tmp_path, cache, whole):
    started = run(2, tmp_path / "run", cache)
    after_step(started, tmp_path / "run", 1, saved=True)
    started[1].kill()
    clock = time.monotonic()
    out, err = started[0].communicate(timeout=NOTICED)
    assert time.monotonic() - clock < NOTICED
    assert started[0].returncode == 1, (out, err)
    assert "process 0 of 2: error:" in err
    assert "Start all processes again with the same command" in err
    started[1].communicate()
    outputs = [finish(process)[0] for process in run(2, tmp_path / "run", cache)]
    assert "rl: resumed after step" in outputs[0]
    assert steps(tmp_path / "run") == steps(whole[2])


@pytest.mark.slow
def test_sigterm_to_one_stops_all_with_a_checkpoint(tmp_path, cache):
    started = run(2, tmp_path / "run", cache, steps=200, checkpoint_every=0)
    after_step(started, tmp_path / "run", 1)
    started[1].send_signal(signal.SIGTERM)
    outputs = [finish(process)[0] for process in started]
    assert "rl: stopped by SIGTERM after step" in outputs[0]
    saved = list((tmp_path / "run" / "checkpoints" / "rl").iterdir())
    assert [path.name for path in saved] == [str(steps(tmp_path / "run")[-1]["step"])]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(4, 1), (1, 4)])
def test_another_number_of_processes_resumes(tmp_path, cache, whole, first, then):
    workdir = tmp_path / "run"
    started = run(first, workdir, cache, steps=20, checkpoint_every=0)
    after_step(started, workdir, 1)
    started[0].send_signal(signal.SIGTERM)
    for process in started:
        finish(process)
    done = len(steps(workdir))
    assert done < 20
    outputs = [
        finish(process)[0] for process in run(then, workdir, cache, steps=20, checkpoint_every=0)
    ]
    assert f"rl: resumed after step {done}" in outputs[0]
    assert [r["step"] for r in steps(workdir)] == list(range(1, 21))
    assert steps(workdir)[0]["reward"] == steps(whole[1])[0]["reward"]


@pytest.mark.slow
def test_processes_with_different_configs_refuse_each_other(tmp_path):
    args = [f"--workdir={tmp_path}/run", *arguments(**OPTIONS)]
    started = start_together(2, *args, own=("--config.seed=7",))
    for number, process in enumerate(started):
        _, err = finish(process, code=1)
        assert f"process {number} of 2: error: process 1 has another config" in err
    assert not (tmp_path / "run" / "config.json").exists()
