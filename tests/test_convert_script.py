"""launch/convert.py: what a user sees, what a kill leaves, how much memory it takes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from stored import LORA, TINY, assert_same_bits, every_tensor, files, random_read

from dmrl.models import convert, lora, weights

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "convert.py"


@pytest.fixture
def hf(tmp_path):
    convert.write_hf(tmp_path / "hf", TINY, random_read(TINY), shard_bytes=20_000)
    return tmp_path / "hf"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def assert_refused(result, *words):
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_command_line_round_trip_and_force(hf, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    first = run(f"--from={hf}", f"--to={ours}")
    assert first.returncode == 0, first.stderr
    tensors = len(every_tensor(TINY))
    assert first.stdout.startswith(f"{tensors} tensors, ")
    before = files(ours)
    assert_refused(run(f"--from={hf}", f"--to={ours}"), "not empty", "--force")
    assert files(ours) == before
    (ours / "stale").touch()
    assert run(f"--from={hf}", f"--to={ours}", "--force").returncode == 0
    assert files(ours) == before
    result = run(f"--from={ours}", f"--to={back}", "--to-hf", "--shard-gb=2e-5")
    assert result.returncode == 0, result.stderr
    assert files(back) == files(hf)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "ours"]


def test_command_line_refuses_pickles_in_one_line(hf, tmp_path):
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    (hf / "pytorch_model.bin").write_bytes(b"\x80\x02")
    result = run(f"--from={hf}", f"--to={tmp_path / 'ours'}")
    assert_refused(result, "pytorch_model.bin", "pickle", "runs whatever code")
    assert not (tmp_path / "ours").exists()


def test_command_line_never_replaces_its_source(hf):
    before = files(hf)
    assert_refused(run(f"--from={hf}", f"--to={hf}", "--force"), "would replace what is read")
    assert files(hf) == before


STALLED = """
import sys, time
from dmrl.models import convert, weights
source, target, to_hf = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
cfg, read = weights.open_weights(source) if to_hf else convert.read_hf(source)
count = 0
def stalling(path, layer):
    global count
    count += 1
    if count > 12:
        print("half way", flush=True)
        time.sleep(600)
    return read(path, layer)
(convert.write_hf if to_hf else weights.write_weights)(target, cfg, stalling)
"""


@pytest.mark.parametrize("to_hf", [False, True])
def test_a_killed_conversion_leaves_nothing_that_loads(hf, tmp_path, to_hf):
    weights.write_weights(tmp_path / "ours", *convert.read_hf(hf))
    source, target = tmp_path / ("ours" if to_hf else "hf"), tmp_path / "target"
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, source, target, str(to_hf)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    with process:
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    open_either = convert.read_hf if to_hf else weights.open_weights
    partial = tmp_path / ".target.partial"
    assert any(partial.iterdir())
    for left in (target, partial):
        with pytest.raises(FileNotFoundError):
            open_either(left)
    cfg, read = weights.open_weights(source) if to_hf else convert.read_hf(source)
    (convert.write_hf if to_hf else weights.write_weights)(target, cfg, read)
    assert not partial.exists()
    assert_same_bits(TINY, open_either(target)[1], random_read(TINY))


def peak(*arguments):
    """Peak resident bytes of the launch script."""
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_peak_memory_is_bounded_by_a_shard(hf, tmp_path):
    cfg = dataclasses.replace(
        TINY, vocab_size=2048, d_model=512, n_layers=16, n_kv_heads=4, mlp_hidden_size=2048
    )
    big, ours, back = tmp_path / "big", tmp_path / "ours", tmp_path / "back"
    convert.write_hf(big, cfg, random_read(cfg), shard_bytes=32_000_000)
    sizes = [f.stat().st_size for f in big.glob("*.safetensors")]
    tensor = cfg.d_model * cfg.mlp_hidden_size * 4
    bound = 1.3 * max(sizes) + tensor
    assert sum(sizes) > 5 * bound
    baseline = peak(f"--from={hf}", f"--to={tmp_path / 'small'}")
    assert peak(f"--from={big}", f"--to={ours}") - baseline < bound
    back_peak = peak(f"--from={ours}", f"--to={back}", "--to-hf", "--shard-gb=0.032")
    assert back_peak - baseline < bound


@pytest.fixture
def adapter(tmp_path):
    weights.write_weights(tmp_path / "base", TINY, random_read(TINY))
    weights.write_weights(tmp_path / "lora", LORA, random_read(LORA, "lora"), "lora")
    return tmp_path


def test_merged_export_is_merge(adapter):
    out = adapter / "merged"
    result = run(
        f"--from={adapter / 'base'}", f"--lora={adapter / 'lora'}", f"--to={out}", "--to-hf"
    )
    assert result.returncode == 0, result.stderr
    trees = {
        "params": weights.build_tree(TINY, random_read(TINY)),
        "lora": weights.build_tree(LORA, random_read(LORA, "lora"), "lora"),
    }
    want = weights.read_tree(lora.merge(trees, LORA))
    cfg, got = convert.read_hf(out)
    for place in every_tensor(cfg):
        np.testing.assert_allclose(got(*place), want(*place), rtol=0, atol=1e-5)
    kernel, a, b = (
        np.float64(random_read(LORA, kind)(f"blocks/ff_out/{name}", 1))
        for kind, name in (("params", "kernel"), ("lora", "a"), ("lora", "b"))
    )
    np.testing.assert_allclose(got("blocks/ff_out/kernel", 1), kernel + 2 * a @ b, atol=1e-5)
    np.testing.assert_array_equal(got("embedding", None), random_read(TINY)("embedding", None))


def test_peft_export(adapter):
    out = adapter / "peft"
    result = run(
        f"--from={adapter / 'base'}",
        f"--lora={adapter / 'lora'}",
        f"--to={out}",
        "--to-hf",
        "--lora-format=peft",
    )
    assert result.returncode == 0, result.stderr
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 8)
    tensors = load_file(out / "adapter_model.safetensors")
    sizes = {
        "q_proj": (32, 32),
        "k_proj": (32, 16),
        "v_proj": (32, 16),
        "attn_out": (32, 32),
        "ff_proj": (32, 48),
        "up_proj": (32, 48),
        "ff_out": (48, 32),
    }
    want = {}
    for layer in range(2):
        for name, (inner, outer) in sizes.items():
            prefix = f"base_model.model.model.transformer.blocks.{layer}.{name}"
            want[f"{prefix}.lora_A.weight"] = (4, inner)
            want[f"{prefix}.lora_B.weight"] = (outer, 4)
    assert {name: x.shape for name, x in tensors.items()} == want
    a = tensors["base_model.model.model.transformer.blocks.1.k_proj.lora_A.weight"]
    np.testing.assert_array_equal(a.T, random_read(LORA, "lora")("blocks/attn/k_proj/a", 1))


def test_peft_adapts_the_blocks_and_not_the_head(adapter):
    cfg, read = weights.open_weights(adapter / "lora", "lora")
    convert.export_peft(adapter / "peft", cfg, read)
    pattern = json.loads((adapter / "peft" / "adapter_config.json").read_text())["target_modules"]
    assert re.fullmatch(pattern, "model.transformer.blocks.31.ff_out")
    assert re.fullmatch(pattern, "model.transformer.blocks.0.q_proj")
    assert not re.fullmatch(pattern, "model.transformer.ff_out")
    assert not re.fullmatch(pattern, "model.transformer.blocks.0.attn_norm")


def test_an_adapter_of_another_model_is_refused(adapter):
    other = dataclasses.replace(LORA, d_model=64)
    weights.write_weights(adapter / "other", other, random_read(other, "lora"), "lora")
    result = run(
        f"--from={adapter / 'base'}",
        f"--lora={adapter / 'other'}",
        f"--to={adapter / 'out'}",
        "--to-hf",
    )
    assert_refused(result, "model of other shapes")
    assert not (adapter / "out").exists()
