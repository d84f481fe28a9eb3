"""Our folders of weights: whole or absent, read slice by slice, damage noticed."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from stored import TINY, assert_same_bits, random_read

from dmrl.models import llada, weights

ROOT = Path(__file__).parent.parent


def test_force_deletes_nothing_but_checkpoints(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        weights.write_weights(tmp_path / "thesis", TINY, random_read(TINY), force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_failed_conversion_leaves_the_old_checkpoint(tmp_path):
    want = random_read(TINY)
    weights.write_weights(tmp_path / "ours", TINY, want)

    def broken(path, layer):
        if path == "head":
            raise OSError("disk on fire")
        return want(path, layer)

    with pytest.raises(OSError, match="disk on fire"):
        weights.write_weights(tmp_path / "ours", TINY, broken, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]
    assert_same_bits(TINY, weights.open_weights(tmp_path / "ours")[1], want)


def test_save_and_load_a_tree(tmp_path):
    tree = llada.init(TINY, jax.random.key(0))["params"]
    weights.save_weights(tmp_path / "ours", TINY, tree)
    for address in (tmp_path / "ours", f"file://{tmp_path}/ours/"):
        cfg, got = weights.load_weights(address)
        assert cfg == TINY
        jax.tree.map(np.testing.assert_array_equal, got, tree)
    del tree["ln_f"]
    with pytest.raises(ValueError, match="ln_f/scale"):
        weights.save_weights(tmp_path / "other", TINY, tree)
    with pytest.raises(ValueError, match="holds 'params', not 'lora'"):
        weights.load_weights(tmp_path / "ours", collection="lora")
    with pytest.raises(FileNotFoundError, match=r"no model\.json"):
        weights.load_weights(tmp_path)
    with pytest.raises(ValueError, match="not a tree like the parameters: ln_f/scale"):
        weights.load_weights(tmp_path / "ours", jax.tree.map(lambda x: x.sharding, tree))


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dmrl.models import weights
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
cfg, read = weights.open_weights(sys.argv[1])
shapes = weights.build_tree(cfg, read)
last = lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp"))
shardings = jax.tree.map(last, shapes)
asked = []
whole = weights._read_slice
def counting(store, index):
    asked.append(whole(store, index).size)
    return whole(store, index)
weights._read_slice = counting
_, tree = weights.load_weights(sys.argv[1], shardings)
for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(shapes), strict=True):
    np.testing.assert_array_equal(got, want)
largest = max(x.size for x in jax.tree.leaves(shapes))
assert max(asked) == largest // 4, (max(asked), largest)
print("sharded")
"""


def test_every_device_reads_only_its_slice(tmp_path):
    weights.write_weights(tmp_path / "ours", TINY, random_read(TINY))
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, tmp_path / "ours"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
    )
    assert result.stdout == "sharded\n", result.stderr


def test_lost_or_damaged_chunks_are_errors(tmp_path):
    weights.write_weights(tmp_path / "ours", TINY, random_read(TINY))
    chunk = tmp_path / "ours" / "embedding" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[10] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="Digest mismatch"):
        weights.load_weights(tmp_path / "ours")
    chunk.unlink()
    with pytest.raises(ValueError, match="is missing"):
        weights.load_weights(tmp_path / "ours")
