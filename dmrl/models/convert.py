"""LLaDA's Hugging Face folders <-> our tree: one table, read both ways.

The authors' PyTorch code (github.com/ML-GSAI/LLaDA) names tensors
`model.transformer.blocks.N.q_proj.weight` and stores a linear map as [out, in]; we stack the
layers and store [in, out]. Tensors stream one at a time: nothing holds a model, or a stacked
leaf, in memory.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmrl.models import shards
from dmrl.models.config import Config
from dmrl.models.weights import Read, Written, layers, leaves, new_directory


class Leaf(NamedTuple):
    """One line of the table; `{}` in `hf` is the layer of a stacked leaf."""

    hf: str
    path: str
    transposed: bool


_PREFIX = "model.transformer."
_LINEAR = {
    "q_proj": "attn/q_proj",
    "k_proj": "attn/k_proj",
    "v_proj": "attn/v_proj",
    "attn_out": "attn/attn_out",
    "ff_proj": "ff_proj",
    "up_proj": "up_proj",
    "ff_out": "ff_out",
}
TABLE = (
    Leaf("wte", "embedding", False),
    *(Leaf(f"blocks.{{}}.{hf}", f"blocks/{path}/kernel", True) for hf, path in _LINEAR.items()),
    Leaf("blocks.{}.attn_norm", "blocks/attn_norm/scale", False),
    Leaf("blocks.{}.ff_norm", "blocks/ff_norm/scale", False),
    Leaf("ln_f", "ln_f/scale", False),
    Leaf("ff_out", "head", True),
)
_LORA_TABLE = tuple(
    Leaf(f"blocks.{{}}.{hf}.lora_{side.upper()}", f"blocks/{path}/{side}", True)
    for hf, path in _LINEAR.items()
    for side in ("a", "b")
)

_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llada",),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False,),
    "activation_type": ("silu",),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "rope": (True,),
    "rope_full_precision": (True,),
    "alibi": (False,),
    "clip_qkv": (None,),
    "weight_tying": (False,),
    "scale_logits": (False,),
    "attention_dropout": (0.0,),
    "embedding_dropout": (0.0,),
    "residual_dropout": (0.0,),
}
"""The values, field by field, that `dmrl.models.llada` implements; None also means absent."""

_SAME = (
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "max_sequence_length",
    "rope_theta",
    "rms_norm_eps",
    "mask_token_id",
    "eos_token_id",
)
"""Fields that both configurations call by one name."""


def config_from_hf(fields: Mapping[str, Any]) -> Config:
    """A LLaDA `config.json` as a Config; computes and stores in the file's dtype.

    Raises ValueError naming a field that is missing or whose value is not implemented.
    """
    for name, accepted in _FIXED.items():
        if fields.get(name) not in accepted:
            right = " or ".join(json.dumps(value) for value in accepted)
            raise ValueError(
                f"config.json: {name}={json.dumps(fields.get(name))} is not supported, only {right}"
            )
    if missing := [name for name in _SAME if fields.get(name) is None]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if fields.get("embedding_size") not in (None, fields["vocab_size"]):
        raise ValueError(
            f"config.json: embedding_size={fields['embedding_size']} is not supported, "
            f"only vocab_size={fields['vocab_size']}"
        )
    kv_heads = fields.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if fields.get("multi_query_attention") else fields["n_heads"]
    mlp = fields.get("mlp_hidden_size")
    if mlp is None:
        if fields.get("mlp_ratio") is None:
            raise ValueError("config.json lacks mlp_hidden_size")
        mlp = fields["mlp_ratio"] * fields["d_model"]
    dtype = fields.get("torch_dtype") or fields.get("dtype") or "float32"
    known = [str(known) for known in shards.DTYPES.values()]
    if dtype not in known:
        raise ValueError(f"config.json: torch_dtype={dtype!r}: choose one of {', '.join(known)}")
    return Config(
        **{name: fields[name] for name in _SAME},
        n_kv_heads=kv_heads,
        mlp_hidden_size=mlp,
        dtype=dtype,
        param_dtype=dtype,
    )


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """A `config.json` that the authors' `LLaDAConfig` reads, with every field it asks for."""
    values: dict[str, Any] = {name: accepted[0] for name, accepted in _FIXED.items()}
    values |= {name: getattr(cfg, name) for name in (*_SAME, "n_kv_heads", "mlp_hidden_size")}
    values |= {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "alibi_bias_max": 8.0,
        "attention_layer_norm_with_affine": True,
        "embedding_size": cfg.vocab_size,
        "flash_attention": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "pad_token_id": cfg.eos_token_id,
        "precision": "amp_bf16",
        "torch_dtype": cfg.param_dtype,
        "transformers_version": "4.46.3",
        "use_cache": False,
    }
    del values["clip_qkv"]
    return dict(sorted(values.items()))


class _Place(NamedTuple):
    """A tensor of theirs and where it lives in ours."""

    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _places(cfg: Config, table: tuple[Leaf, ...], collection: str) -> dict[str, _Place]:
    """The table spelled out for one model: unstacked tensors first, then layer by layer."""
    ours = leaves(cfg, collection)
    places = {}
    for leaf in table:
        for layer in layers(cfg, leaf.path):
            shape = ours[leaf.path].shape if layer is None else ours[leaf.path].shape[1:]
            shape = shape[::-1] if leaf.transposed else shape
            name = f"{_PREFIX}{leaf.hf.format(layer)}.weight"
            dtype = np.dtype(ours[leaf.path].dtype)
            places[name] = _Place(leaf.path, layer, leaf.transposed, shape, dtype)
    by_layer = sorted(
        places.items(), key=lambda item: -1 if item[1].layer is None else item[1].layer
    )
    return dict(by_layer)


def read_hf(source: str | os.PathLike[str]) -> tuple[Config, Read]:
    """The Config of a Hugging Face folder and a lazy reader of its tensors in our layout.

    The Config takes the dtype of the tensors. Raises FileNotFoundError for a folder without
    config.json or weights, and ValueError for pickle weights, for an unsupported Config field
    and for missing, unexpected, misshapen or oddly typed tensors, all named.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no Hugging Face model: no config.json in it")
    cfg = config_from_hf(_parse(folder / "config.json"))
    entries = shards.scan(_weight_files(folder))
    cfg = _with_dtype(cfg, entries)
    places = _places(cfg, TABLE, "params")
    _compare(folder, entries, places)
    names = {(place.path, place.layer): name for name, place in places.items()}

    def read(path: str, layer: int | None) -> np.ndarray:
        name = names[path, layer]
        tensor = shards.load(entries[name])
        return tensor.T if places[name].transposed else tensor

    return cfg, read


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_parse(index).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if lost := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder}: {index.name} names {', '.join(lost)}, not found")
    if files:
        return files
    pickles = [p.name for end in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{end}")]
    if pickles:
        raise ValueError(
            f"{folder} holds pickle weights ({', '.join(sorted(pickles))}): unpickling a file runs "
            "whatever code is in it, so only safetensors are read"
        )
    raise FileNotFoundError(f"{folder} holds no .safetensors file")


def _with_dtype(cfg: Config, entries: Mapping[str, shards.Entry]) -> Config:
    kinds = {entry.dtype: name for name, entry in entries.items()}
    if unknown := kinds.keys() - shards.DTYPES.keys():
        kind = min(unknown)
        raise ValueError(f"{kinds[kind]} is {kind}: choose one of {', '.join(shards.DTYPES)}")
    if len(kinds) != 1:
        mixed = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
        raise ValueError(f"tensors differ in dtype: {mixed}")
    dtype = str(shards.DTYPES[kinds.popitem()[0]])
    return dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)


def _compare(
    folder: Path, entries: Mapping[str, shards.Entry], places: Mapping[str, _Place]
) -> None:
    faults = [f"missing {name}" for name in places if name not in entries]
    faults += [f"unexpected {name}" for name in entries if name not in places]
    faults += [
        f"{name} is {list(entries[name].shape)}, not {list(place.shape)}"
        for name, place in places.items()
        if name in entries and entries[name].shape != place.shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"{folder}: {'; '.join(faults[:8])}{more}")


def write_hf(
    target: str | os.PathLike[str],
    cfg: Config,
    read: Read,
    shard_bytes: int = 5_000_000_000,
    force: bool = False,
) -> Written:
    """Writes config.json and safetensors files of up to `shard_bytes`, streaming from `read`.

    Raises FileExistsError for a non-empty `target` without `force`.
    """
    places = _places(cfg, TABLE, "params")
    specs = {name: (place.dtype, place.shape) for name, place in places.items()}
    files = shards.plan(specs, shard_bytes)
    total = sum(map(shards.size, specs.values()))
    with new_directory(target, force) as folder:
        for file, part in files.items():
            shards.write(folder / file, part, _theirs(places, read))
        if len(files) > 1:
            where = {name: file for file, part in files.items() for name in part}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            _dump(folder / "model.safetensors.index.json", index)
        _dump(folder / "config.json", config_to_hf(cfg))
    return Written(len(specs), total)


def export_peft(
    target: str | os.PathLike[str], cfg: Config, read: Read, force: bool = False
) -> Written:
    """Writes the adapter that `read` yields as a PEFT folder; `target` as in `write_hf`.

    PEFT stores A as [r, in] and B as [out, r] and scales by alpha / r, as we do.
    """
    ours = _places(cfg, _LORA_TABLE, "lora")
    places = {f"base_model.model.{name}": place for name, place in ours.items()}
    specs = {name: (place.dtype, place.shape) for name, place in places.items()}
    adapter = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": cfg.lora_rank,
        # A pattern, because the plain name ff_out would also match the vocabulary head.
        "target_modules": rf".*\.blocks\.\d+\.({'|'.join(_LINEAR)})",
        "task_type": "CAUSAL_LM",
    }
    with new_directory(target, force) as folder:
        shards.write(folder / "adapter_model.safetensors", specs, _theirs(places, read))
        _dump(folder / "adapter_config.json", adapter)
    return Written(len(specs), sum(map(shards.size, specs.values())))


def _theirs(places: Mapping[str, _Place], read: Read) -> Callable[[str], np.ndarray]:
    def tensor(name: str) -> np.ndarray:
        place = places[name]
        values = read(place.path, place.layer)
        return values.T if place.transposed else values

    return tensor


def _parse(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error


def _dump(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
