"""Killed at any moment and run again, a run ends exactly where an undisturbed one does."""

import random
import signal
import time

import jax
import numpy as np
import pytest
from running import arguments, config, finish, rows, start, timeless

from dmrl import parallel, recipe, stages, trainer
from dmrl.checkpoint import Checkpoints
from dmrl.held import Held

OPTIONS = {
    "steps": 7,
    "num_iterations": 2,
    "microbatches": 2,
    "rollout_chunks": 2,
    "warm_start__steps": 5,
    "warm_start__evaluate_every": 2,
    "checkpoint_every": 2,
    "optimizer__learning_rate": 1e-2,
    "optimizer__warmup_steps": 1,
    "terms__diffu_grpo__beta": 0.5,  # so that the reference must survive as well
}


def final_state(workdir):
    """All arrays of the last checkpoint, as bytes."""
    made = recipe.build(config(**OPTIONS))
    mesh = parallel.make_mesh(**made.mesh)
    weights, _ = trainer.initial_weights(made, mesh)
    state = stages.Reinforce(made, mesh, Held(made, mesh)).init(weights)
    checkpoints = Checkpoints(workdir / "checkpoints" / "rl")
    assert checkpoints.steps()[-1] == OPTIONS["steps"]
    restored, host = checkpoints.restore_step(OPTIONS["steps"], state)
    del host["files"]  # clock readings have more digits or fewer
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)], host


def wait_for(process, workdir, stage, step, delay=0.0):
    """Returns as soon as metrics.jsonl shows a step of a stage (and `delay` seconds later)."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if any(f'"step": {step}, "stage": "{stage}"' in line for line in lines):
            time.sleep(delay)
            return
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no step {step} of {stage}: {process.communicate()}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compilation cache, so that a restart costs seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The workdir and output of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = start(f"--workdir={workdir}", *arguments(**OPTIONS), cache=cache)
    return workdir, finish(process)


def killed(workdir, cache, stage, step, delay=0.0, sign=signal.SIGKILL):
    """A (further) launch on a workdir, ended by a signal once it has written a step."""
    process = start(f"--workdir={workdir}", *arguments(**OPTIONS), cache=cache)
    wait_for(process, workdir, stage, step, delay)
    process.send_signal(sign)
    return process, process.communicate(timeout=60)


@pytest.fixture(scope="module")
def torn(tmp_path_factory, cache):
    """A workdir that lived through a kill, a SIGTERM and a torn checkpoint."""
    workdir = tmp_path_factory.mktemp("torn") / "run"
    events = {}
    process, _ = killed(workdir, cache, "warm_start", 3, delay=0.03)
    events["kill in warm start"] = process.returncode
    process, out = killed(workdir, cache, "rl", 3, sign=signal.SIGTERM)
    events["SIGTERM"] = process.returncode
    events["SIGTERM output"] = out[0]
    events["after SIGTERM"] = Checkpoints(workdir / "checkpoints" / "rl").steps()
    _truncate(workdir / "checkpoints" / "rl" / str(events["after SIGTERM"][-1]))
    process = start(f"--workdir={workdir}", *arguments(**OPTIONS), cache=cache)
    events["last launch"] = finish(process)
    return workdir, events


def _truncate(checkpoint):
    largest = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_kills_and_resumes_leave_no_trace(whole, torn):
    undisturbed, disturbed = whole[0], torn[0]
    assert torn[1]["kill in warm start"] == -signal.SIGKILL
    for a, b in zip(final_state(disturbed), final_state(undisturbed), strict=True):
        assert a == b
    wanted = timeless(rows(undisturbed / "metrics.jsonl"))
    assert len([r for r in wanted if "loss" in r]) == OPTIONS["steps"] + 5
    assert all(r["grad_norm"] > 0 for r in wanted if "loss" in r)
    kl = [r["kl"] for r in wanted if r["stage"] == "rl" and "loss" in r]
    assert kl[-1] > kl[0] == 0
    assert timeless(rows(disturbed / "metrics.jsonl")) == wanted
    for name in ("completions.jsonl", "trajectories.jsonl"):
        assert (disturbed / name).read_bytes() == (undisturbed / name).read_bytes(), name
        assert rows(undisturbed / name), name
    trained = [p.relative_to(undisturbed) for p in (undisturbed / "weights").rglob("*")]
    assert len(trained) > 10
    for path in trained:
        if (undisturbed / path).is_file():
            assert (disturbed / path).read_bytes() == (undisturbed / path).read_bytes(), path


def test_sigterm_saves_and_exits_with_0(torn):
    _, events = torn
    assert events["SIGTERM"] == 0
    assert "stopped by SIGTERM after step" in events["SIGTERM output"]
    stopped = int(events["SIGTERM output"].rpartition("after step ")[2])
    assert events["after SIGTERM"][-1] == stopped


def test_a_torn_checkpoint_is_named_and_the_one_before_used(torn):
    _, events = torn
    out, err = events["last launch"]
    newest, before = events["after SIGTERM"][-1], events["after SIGTERM"][-2]
    warning = [line for line in err.splitlines() if "is damaged" in line]
    assert len(warning) == 1
    assert f"rl/{newest} is damaged" in warning[0]
    # Beside our warning, orbax may print the remains of its own unfinished reads.
    assert f"rl: resumed after step {before}" in out


def test_a_finished_run_does_nothing_but_print_its_table(whole, cache):
    workdir, (first, _) = whole
    files = {p: p.read_bytes() for p in workdir.glob("*.jsonl")}
    began = time.monotonic()
    out, _ = finish(start(f"--workdir={workdir}", *arguments(**OPTIONS), cache=cache))
    assert time.monotonic() - began < 60
    assert files == {p: p.read_bytes() for p in workdir.glob("*.jsonl")}
    assert "┏" in out
    assert out[out.index("┏") :] == first[first.index("┏") :]


def test_a_workdir_of_another_config_is_refused(whole, cache):
    workdir, _ = whole
    before = (workdir / "config.json").read_bytes()
    other = arguments(**OPTIONS | {"optimizer__learning_rate": 0.125})
    _, err = finish(start(f"--workdir={workdir}", *other, cache=cache), code=1)
    (line,) = err.strip().splitlines()
    for word in ("optimizer.learning_rate=", "0.125", str(workdir), "choose another --workdir"):
        assert word in line
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.slow
def test_kills_at_random_moments(whole, cache, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, workdir = random.Random(seed), tmp_path / "run"
    began = time.monotonic()
    finish(start(f"--workdir={tmp_path / 'timed'}", *arguments(**OPTIONS), cache=cache))
    whole_time = time.monotonic() - began
    for _ in range(8):
        process = start(f"--workdir={workdir}", *arguments(**OPTIONS), cache=cache)
        time.sleep(rng.uniform(0.2, 1.0) * whole_time)
        process.kill()
        process.communicate()
    finish(start(f"--workdir={workdir}", *arguments(**OPTIONS), cache=cache))
    assert final_state(workdir) == final_state(whole[0])
    wanted = timeless(rows(whole[0] / "metrics.jsonl"))
    assert timeless(rows(workdir / "metrics.jsonl")) == wanted
