"""Conversion: bit-exact both ways, and wrong input named."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from stored import TINY, assert_same_bits, every_tensor, files, random_read

from dmrl.models import convert, shards, weights


@pytest.fixture
def hf(tmp_path):
    convert.write_hf(tmp_path / "hf", TINY, random_read(TINY), shard_bytes=20_000)
    return tmp_path / "hf"


@pytest.mark.parametrize("folder", ["tiny_llada", "tiny_llada_gqa"])
def test_golden_round_trip(golden_dir, tmp_path, folder):
    source = golden_dir / folder
    weights.write_weights(tmp_path / "ours", *convert.read_hf(source))
    convert.write_hf(tmp_path / "back", *weights.open_weights(tmp_path / "ours"))
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].tobytes() == after[name].tobytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.pop("auto_map")["AutoModel"] == "modeling_llada.LLaDAModelLM"
    assert config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_round_trip_keeps_every_bit(tmp_path, dtype, shard_bytes):
    cfg = dataclasses.replace(TINY, param_dtype=dtype, dtype=dtype)
    want = random_read(cfg)
    convert.write_hf(tmp_path / "hf", cfg, want, shard_bytes)
    got_cfg, read = convert.read_hf(tmp_path / "hf")
    assert (got_cfg.param_dtype, got_cfg.dtype) == (dtype, dtype)
    assert_same_bits(cfg, read, want)
    written = weights.write_weights(tmp_path / "ours", got_cfg, read)
    assert written.tensors == len(every_tensor(cfg))
    assert written.bytes == sum(want(*place).nbytes for place in every_tensor(cfg))
    ours_cfg, ours = weights.open_weights(tmp_path / "ours")
    assert ours_cfg == got_cfg
    assert_same_bits(cfg, ours, want)
    convert.write_hf(tmp_path / "back", ours_cfg, ours, shard_bytes)
    assert files(tmp_path / "back") == files(tmp_path / "hf")


def test_special_values_survive(tmp_path):
    cfg = dataclasses.replace(TINY, param_dtype="bfloat16")
    bits = np.resize(np.arange(2**16, dtype=np.uint16), 64 * 32).reshape(64, 32)
    bits[0] = 0x7FC1  # a NaN with a payload
    base = random_read(cfg)

    def read(path, layer):
        return bits.view(jnp.bfloat16) if path == "embedding" else base(path, layer)

    convert.write_hf(tmp_path / "hf", cfg, read)
    weights.write_weights(tmp_path / "ours", *convert.read_hf(tmp_path / "hf"))
    _, got = weights.open_weights(tmp_path / "ours")
    np.testing.assert_array_equal(got("embedding", None).view(np.uint16), bits)


def test_shards_are_what_other_readers_expect(hf):
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    seen = {}
    for file in sorted(hf.glob("model-*.safetensors")):
        with safe_open(file, "np") as reader:
            assert reader.metadata() == {"format": "pt"}
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == file.name for name in tensors)
        seen |= tensors
    assert seen.keys() == index["weight_map"].keys()
    assert sum(x.nbytes for x in seen.values()) == index["metadata"]["total_size"]
    kernel = seen["model.transformer.blocks.1.k_proj.weight"]
    np.testing.assert_array_equal(kernel.T, random_read(TINY)("blocks/attn/k_proj/kernel", 1))


def test_the_table_is_the_tree():
    assert sorted(leaf.path for leaf in convert.TABLE) == sorted(weights.leaves(TINY))


def edit(folder, change):
    """Rewrites a folder's weights as one file after `change` of {name: array}."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    specs = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    shards.write(folder / "model.safetensors", specs, tensors.__getitem__)


NAME = "model.transformer.blocks.1.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"missing {NAME}"),
        (lambda t: t.update(extra=t[NAME]), "unexpected extra"),
        (lambda t: t.update({NAME: t[NAME].T}), rf"{NAME} is \[32, 48\], not \[48, 32\]"),
        (lambda t: t.update({NAME: t[NAME].astype(np.float16)}), f"differ in dtype.*{NAME}"),
    ],
)
def test_wrong_tensors_are_named(hf, change, message):
    edit(hf, change)
    with pytest.raises(ValueError, match=message):
        convert.read_hf(hf)


def test_an_unknown_dtype_is_named(hf):
    file = sorted(hf.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F8A"'))
    with pytest.raises(ValueError, match=r"is F8A: choose one of F32, BF16, F16"):
        convert.read_hf(hf)


def test_broken_shards_are_named(hf):
    first, second = sorted(hf.glob("model-*.safetensors"))[:2]
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{second.name} is cut short"):
        convert.read_hf(hf)
    second.write_bytes(b"no tensors here, only a sentence")
    with pytest.raises(ValueError, match=f"{second.name} is not a safetensors file"):
        convert.read_hf(hf)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"is in {first.name} and in {second.name}"):
        convert.read_hf(hf)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {second.name}, not found"):
        convert.read_hf(hf)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_type", "sequential", 'block_type="sequential" is not supported, only "llama"'),
        ("layer_norm_type", "default", 'layer_norm_type="default" is not supported, only "rms"'),
        ("activation_type", "gelu", 'activation_type="gelu"'),
        ("rope", False, "rope=false is not supported, only true"),
        ("weight_tying", True, "weight_tying=true is not supported, only false"),
        ("include_bias", True, "include_bias=true"),
        ("model_type", "llama", 'model_type="llama"'),
        ("embedding_size", 128, "embedding_size=128 is not supported, only vocab_size=64"),
        ("torch_dtype", "int8", "torch_dtype='int8': choose one of float32, bfloat16, float16"),
        ("d_model", None, "config.json lacks d_model"),
        ("n_heads", 3, "n_heads=3 does not divide d_model=32"),
    ],
)
def test_unsupported_configs_are_named(field, value, message):
    fields = convert.config_to_hf(TINY) | {field: value}
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        convert.config_from_hf(fields)


def test_config_round_trip_and_the_authors_defaults():
    fields = convert.config_to_hf(TINY)
    assert dataclasses.replace(convert.config_from_hf(fields), remat=TINY.remat) == TINY
    implied = {"n_kv_heads": None, "mlp_hidden_size": None, "mlp_ratio": 3}
    cfg = convert.config_from_hf(fields | implied)
    assert (cfg.n_kv_heads, cfg.mlp_hidden_size) == (TINY.n_heads, 96)
    assert (
        convert.config_from_hf(fields | implied | {"multi_query_attention": True}).n_kv_heads == 1
    )
