"""launch/compile.py: real programs for devices that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = [
    "--config=configs/sudoku_dispo.py",
    "--config.model.n_layers=1",
    "--config.prompts_per_step=16",
]
LLADA = "--config=configs/sudoku_dispo.py:llada_8b"


def compile_for(topology, out, *options):
    command = [sys.executable, "launch/compile.py", f"--topology={topology}", f"--out={out}"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if "cpu" in topology else os.environ
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny recipe on eight simulated devices: what was printed, and the folder."""
    folder = tmp_path_factory.mktemp("slices")
    done = compile_for("cpu:8", folder / "s.json", *TINY)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_both_programs_compile_and_account_for_themselves(tiny):
    printed, folder = tiny
    rollout, update = json.loads((folder / "s.json").read_text())
    assert [rollout["program"], update["program"]] == ["rollout", "update"]
    for fit in (rollout, update):
        assert fit["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
        parts = [fit[k] for k in ("arguments", "outputs", "temporaries", "code", "beside")]
        assert fit["peak"] == pytest.approx(sum(parts) - fit["aliased"])
        assert fit["arguments"] > 0
        assert fit["flops"] > 0
        assert fit["collectives"]["all-gather"]["times"] > 0
        assert fit["fits"] is None  # simulated devices have no memory to compare with
        assert fit["seconds"] is None
    assert update["aliased"] > 0  # the state is donated
    assert rollout["beside"] > 1.9 * rollout["arguments"] / 2  # Adam's two moments wait meanwhile
    assert rollout["runs"] == 2
    assert "not run on it" in printed


def test_the_page_says_what_was_asked_and_that_nothing_ran(tiny):
    page = (tiny[1] / "s.md").read_text()
    assert "## sudoku_dispo model.n_layers=1 prompts_per_step=16" in page
    assert "Compiled for the slice, not run on it" in page
    overview, details = page.split("\n## ", 1)
    assert details.count("| cpu:8 |") == 2
    assert overview.count("| cpu:8 |") == 1


def test_a_batch_that_does_not_divide_is_one_line(tmp_path):
    done = compile_for("cpu:5", tmp_path / "s.json", *TINY)
    assert done.returncode == 1
    assert "error: completions of a chunk: 32 cannot be shared evenly by the 5" in done.stderr


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="libtpu is installed")
def test_without_libtpu_it_says_how_to_get_it(tmp_path):
    done = compile_for("v5p-8", tmp_path / "s.json", *TINY)
    assert done.returncode == 1
    assert "pip install '.[tpu]'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="the TPU compiler is not installed: pip install '.[tpu]' in an environment of its own",
)
@pytest.mark.parametrize("topology", ["v4-16", "v5e-16", "v5p-8"])
def test_llada_8b_with_an_adapter_fits(tmp_path, topology):
    done = compile_for(
        topology, tmp_path / "s.json", LLADA, "--config.rollout_chunks=2", "--config.microbatches=3"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for fit in json.loads((tmp_path / "s.json").read_text()):
        assert fit["fits"] is True
        assert fit["peak"] <= 0.9 * fit["hbm"]
        assert fit["collectives"] is None or fit["unknown_loops"] == 0
        assert fit["compute_seconds"] > 0
