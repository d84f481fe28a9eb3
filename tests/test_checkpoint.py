"""Checkpoints: bit-exact, atomic, re-shardable, and clear about what went wrong."""

import gc
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmrl.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).parent.parent


class State(NamedTuple):
    params: dict
    optimizer: optax.OptState
    step: jax.Array
    key: jax.Array


def make_state(seed: int) -> State:
    key = jax.random.key(seed)
    params = {
        "a/b": {"it's": jax.random.normal(key, (7, 5), jnp.bfloat16)},
        "mask": jax.random.bernoulli(key, 0.5, (11,)),
        "bits": jax.random.bits(key, (9,), jnp.uint32),
        "adapter": jnp.zeros((0, 3)),
        "kernel": jax.random.normal(key, (40, 30)).at[0, 0].set(jnp.nan).at[0, 1].set(-0.0),
    }
    moments = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init({"w": params["kernel"]})
    return State(params, moments, jnp.int32(seed), jax.random.split(key, 2))


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def raw(leaf: jax.Array) -> bytes:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b)), path


def write(directory, steps, keep=2):
    checkpoints = Checkpoints(directory, keep=keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.close()


@pytest.fixture
def unreadable():
    """Orbax drops its other tasks where one read fails; Python then warns at their collection."""
    yield
    gc.collect()


ignore_dropped_tasks = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)


def test_restores_every_dtype_and_tree_type_bit_for_bit(tmp_path):
    write(tmp_path, [3])
    host = {"data": {"next": 12, "epoch": [1, 2]}, "name": "é", "rate": 0.1}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, make_state(4), host)
    step, state, got = checkpoints.restore(ABSTRACT)
    checkpoints.close()
    assert step == 4
    assert got == host
    assert_same(state, make_state(4))
    assert isinstance(state, State)
    assert isinstance(state.optimizer[1][0], optax.ScaleByAdamState)
    state, got = checkpoints.restore_step(3, make_state(0))
    assert_same(state, make_state(3))
    assert got == {"step": 3}


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    assert checkpoints.restore(ABSTRACT) is None
    assert checkpoints.steps() == []
    seen = []
    for step in [1, 5, 9, 10]:
        checkpoints.save(step, {"w": jnp.full(4, step)}, {})
        checkpoints.wait()
        seen.append(checkpoints.steps())
    checkpoints.close()
    assert seen == [[1], [1, 5], [5, 9], [9, 10]]


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    for step in range(4):
        state = {f"w{i}": jnp.full((300, 200), step * 10 + i, jnp.float32) for i in range(8)}
        checkpoints.save(step, state, {})
        state = jax.block_until_ready(jax.tree.map(overwrite, state))
        got, _ = checkpoints.restore_step(step, state)
        for i in range(8):
            np.testing.assert_array_equal(got[f"w{i}"], step * 10 + i)
    checkpoints.close()


def test_a_small_state_is_saved_quickly(tmp_path):
    state = {f"layer{i}": jnp.full((128, 100), i, jnp.float32) for i in range(20)}
    assert sum(leaf.nbytes for leaf in state.values()) > 1e6
    checkpoints = Checkpoints(tmp_path)
    seconds = []
    for step in range(5):
        start = time.perf_counter()
        checkpoints.save(step, state, {})
        checkpoints.wait()
        seconds.append(time.perf_counter() - start)
    checkpoints.close()
    assert min(seconds) < 0.3


def test_orbax_stays_quiet(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    write(tmp_path, [1, 2, 3])
    Checkpoints(tmp_path).restore(ABSTRACT)
    assert [record.getMessage() for record in caplog.records if "orbax" in record.pathname] == []


DAMAGE = {
    "empty metadata": ("_CHECKPOINT_METADATA", 0.0),
    "no metadata": ("_CHECKPOINT_METADATA", None),
    "half the tree": ("state/_METADATA", 0.5),
    "no tree": ("state/_METADATA", None),
    "half the index": ("state/manifest.ocdbt", 0.5),
    "no index": ("state/manifest.ocdbt", None),
    "a cut array": ("state/ocdbt.process_0/d/*", 0.7),
    "no arrays": ("state/ocdbt.process_0/d/*", None),
    "no key types": ("state/array_metadatas/process_0", None),
}


def damage(step: Path, what: str):
    pattern, part = DAMAGE[what]
    (file,) = step.glob(pattern)
    if part is None:
        file.unlink()
    else:
        os.truncate(file, int(part * file.stat().st_size))


@ignore_dropped_tasks
@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("what", DAMAGE)
def test_goes_back_past_a_damaged_checkpoint(tmp_path, caplog, what):
    write(tmp_path, [10, 20])
    damage(tmp_path / "20", what)
    checkpoints = Checkpoints(tmp_path)
    step, state, host = checkpoints.restore(ABSTRACT)
    assert (step, host) == (10, {"step": 10})
    assert_same(state, make_state(10))
    (warning,) = [r for r in caplog.records if r.name == "dmrl.checkpoint"]
    assert warning.levelname == "WARNING"
    assert f"checkpoint {tmp_path}/20 is damaged: " in warning.getMessage()
    checkpoints.save(20, make_state(21), {"again": True})
    step, state, host = checkpoints.restore(ABSTRACT)
    checkpoints.close()
    assert (step, host, checkpoints.steps()) == (20, {"again": True}, [10, 20])
    assert_same(state, make_state(21))


@ignore_dropped_tasks
@pytest.mark.usefixtures("unreadable")
def test_random_truncation_never_loads_something_else(tmp_path):
    rng = random.Random(0)
    write(tmp_path / "run", [1, 2])
    shutil.copytree(tmp_path / "run/2", tmp_path / "good")
    went_back = 0
    for _ in range(12):
        file = rng.choice([p for p in sorted((tmp_path / "run/2").rglob("*")) if p.is_file()])
        os.truncate(file, rng.randrange(file.stat().st_size + 1))
        step, state, host = Checkpoints(tmp_path / "run").restore(ABSTRACT)
        assert host == {"step": step}
        assert_same(state, make_state(step))
        went_back += step == 1
        shutil.rmtree(tmp_path / "run/2")
        shutil.copytree(tmp_path / "good", tmp_path / "run/2")
    assert went_back >= 2


@ignore_dropped_tasks
@pytest.mark.usefixtures("unreadable")
def test_names_every_checkpoint_where_all_are_damaged(tmp_path):
    write(tmp_path, [10, 20])
    damage(tmp_path / "10", "a cut array")
    damage(tmp_path / "20", "half the tree")
    with pytest.raises(CheckpointError, match=r"/20 is damaged: .*; .*/10 is damaged: "):
        Checkpoints(tmp_path).restore(ABSTRACT)
    with pytest.raises(CheckpointError, match="/10 is damaged: "):
        Checkpoints(tmp_path).restore_step(10, ABSTRACT)


def test_a_different_configuration_is_named_and_is_no_reason_to_go_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"net": {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)}}, {})
    checkpoints.save(2, {"net": {"w": jnp.zeros((3, 4)), "b": jnp.zeros(3)}}, {})
    for b, w, complaint in [
        (jnp.zeros(3), jnp.zeros((3, 2)), r"'w'\] is float32\[3,4\] in .* and float32\[3,2\] here"),
        (jnp.zeros(3), jnp.zeros((3, 4), jnp.bfloat16), r"float32\[3,4\] in .* bfloat16\[3,4\]"),
        (None, jnp.zeros((3, 4)), r"'b'\] is float32\[3\] in the checkpoint and absent here"),
        ([jnp.zeros(3)], jnp.zeros((3, 4)), r"'b'\]\[0\] is absent in the .* and float32\[3\]"),
    ]:
        with pytest.raises(CheckpointError, match=complaint):
            checkpoints.restore({"net": {"w": w, "b": b}})
    checkpoints.close()


def test_refuses_what_it_cannot_keep(tmp_path):
    write(tmp_path, [5])
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot save step 5 .* step 5 is already there"):
        checkpoints.save(5, make_state(5), {})
    with pytest.raises(CheckpointError, match=r"a state holds jax arrays, but \['rate'\] is 0.5"):
        checkpoints.save(6, {"rate": 0.5}, {})
    with pytest.raises(CheckpointError, match=r"could not save step 6 .*JSON serializable; the"):
        checkpoints.save(6, make_state(6), {"where": {1, 2}})
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 6 .*there are \[5\]"):
        checkpoints.restore_step(6, ABSTRACT)
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    assert checkpoints.steps() == [5]


def test_object_stores_keep_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpoints("gs://bucket/run").directory == "gs://bucket/run"
    assert Checkpoints("run").directory == str(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@ignore_dropped_tasks
@pytest.mark.usefixtures("unreadable")
def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(small_disk):
    def noise(step, size):
        return {"w": jax.random.normal(jax.random.key(step), (size,))}

    checkpoints = Checkpoints(small_disk)
    checkpoints.save(10, noise(10, 1000), {"step": 10})
    checkpoints.wait()
    message = (
        f"could not save step 20 under {small_disk}: .*No space left on device.*; "
        "the last good one is step 10"
    )

    def save_and_wait():
        checkpoints.save(20, noise(20, 500_000), {})
        checkpoints.wait()

    with pytest.raises(CheckpointError, match=message):
        save_and_wait()
    step, state, host = checkpoints.restore(noise(0, 1000))
    assert (step, host, checkpoints.steps()) == (10, {"step": 10}, [10])
    np.testing.assert_array_equal(state["w"], noise(10, 1000)["w"])
    checkpoints.save(40, noise(40, 1000), {"step": 40})
    checkpoints.close()
    assert sorted(path.name for path in small_disk.iterdir()) == ["10", "40"]


def start(script: str, *arguments, **environment) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


SAVE_FOREVER = """
import sys
import jax, jax.numpy as jnp
from dmrl.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
last = checkpoints.restore({f"w{i}": jnp.zeros(100_000, jnp.int32) for i in range(5)})
step = last[0] if last else 0
while True:
    step += 1
    checkpoints.save(step, {f"w{i}": jnp.full(100_000, step) for i in range(5)}, {"step": step})
    checkpoints.wait()
    print(step, flush=True)
"""


def test_a_kill_during_a_save_costs_that_save_only(tmp_path):
    rng = random.Random(0)
    abstract = {f"w{i}": jnp.zeros(100_000, jnp.int32) for i in range(5)}
    torn = 0
    for _ in range(3):
        with start(SAVE_FOREVER, tmp_path) as process:
            committed = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            committed = max([committed, *map(int, process.stdout.read().split())])
        step, state, host = Checkpoints(tmp_path).restore(abstract)
        assert committed <= step <= committed + 1
        assert host == {"step": step}
        for leaf in state.values():
            np.testing.assert_array_equal(leaf, step)
        torn += any(not path.name.isdigit() for path in tmp_path.iterdir())
    assert torn > 0, "no kill fell into a save: the test shows nothing"
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10**6, abstract, {})
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {str(step), str(10**6)}


RESHARD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dmrl.checkpoint import Checkpoints

assert jax.device_count() == 8
values = {"w": np.arange(64 * 16, dtype=np.float32).reshape(64, 16), "empty": np.zeros((0, 8))}
line = jax.make_mesh((8,), ("data",))
grid = jax.make_mesh((2, 4), ("fsdp", "tensor"))
one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
checkpoints = Checkpoints(sys.argv[1])

def place(sharding):
    return jax.tree.map(lambda v: jax.device_put(jnp.asarray(v, jnp.float32), sharding), values)

for sharding in [one, NamedSharding(line, P("data")), NamedSharding(grid, P("tensor", "fsdp"))]:
    abstract = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, jnp.float32, sharding=sharding), values)
    step, state, _ = checkpoints.restore(abstract)
    for name, leaf in state.items():
        assert leaf.sharding == sharding, (leaf.sharding, sharding)
        np.testing.assert_array_equal(leaf, values[name])
    checkpoints.save(step + 1, place(sharding), {})
checkpoints.close()
"""


def test_restores_onto_another_mesh(tmp_path):
    values = {"w": jnp.arange(64.0 * 16).reshape(64, 16), "empty": jnp.zeros((0, 8))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, values, {})
    checkpoints.close()
    flags = "--xla_force_host_platform_device_count=8"
    with start(RESHARD, tmp_path, XLA_FLAGS=flags) as process:
        assert process.wait(60) == 0
    step, state, _ = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: values))
    assert step == 4
    assert_same(state, values)


TWO_PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

address, rank, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, rank)
from dmrl import checkpoint

mesh = jax.make_mesh((2,), ("data",))
split = NamedSharding(mesh, P("data"))

def make(step):
    return jax.make_array_from_callback((6,), split, lambda at: np.arange(6.0)[at] + step)

checkpoints = checkpoint.Checkpoints(directory)
for step in [1, 2, 3]:
    checkpoints.save(step, {"w": make(step)}, {"step": step})
checkpoints.wait()
assert checkpoints.steps() == [2, 3]
abstract = {"w": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=split)}

def restores(expected):
    step, state, host = checkpoints.restore(abstract)
    assert (step, host) == (expected, {"step": expected})
    shard = state["w"].addressable_data(0)
    np.testing.assert_array_equal(shard, np.arange(6.0)[3 * rank :][:3] + expected)

restores(3)
if rank == 1:  # one process cannot read its part of the newest: both must go back
    load = checkpoint.ocp.load_checkpointables
    def stale(path, wanted):
        if path.name == "3":
            wanted = {"elsewhere": wanted["state"]}
        return load(path, wanted)
    checkpoint.ocp.load_checkpointables = stale
restores(2)
checkpoints.save(4, {"w": make(4)}, {"step": 4})
restores(4)
assert checkpoints.steps() == [2, 4]
checkpoints.close()
"""


def test_several_processes_write_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    first, second = (start(TWO_PROCESSES, address, rank, tmp_path) for rank in range(2))
    with first, second:
        try:
            assert [first.wait(60), second.wait(60)] == [0, 0]
        finally:
            first.kill()
            second.kill()
    step, state, _ = Checkpoints(tmp_path).restore({"w": jnp.zeros(6)})
    assert step == 4
    np.testing.assert_array_equal(state["w"], np.arange(6.0) + 4)
