"""A tiny model whose weights are known leaf by leaf, for the tests of conversion."""

import dataclasses

import numpy as np

from dmrl.models import Config, weights

TINY = Config(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    mlp_hidden_size=48,
    max_sequence_length=64,
    mask_token_id=63,
    eos_token_id=62,
    dtype="float32",
    param_dtype="float32",
)
LORA = dataclasses.replace(TINY, lora_rank=4, lora_alpha=8.0)


def random_read(cfg, collection="params"):
    """A reader of values fixed by leaf and layer, none of them zero."""
    shapes = weights.leaves(cfg, collection)
    order = {path: i for i, path in enumerate(shapes)}

    def read(path, layer):
        shape = shapes[path].shape if layer is None else shapes[path].shape[1:]
        generator = np.random.default_rng([order[path], 0 if layer is None else layer])
        return generator.normal(size=shape).astype(shapes[path].dtype)

    return read


def every_tensor(cfg, collection="params"):
    return [(p, i) for p in weights.leaves(cfg, collection) for i in weights.layers(cfg, p)]


def assert_same_bits(cfg, got, want, collection="params"):
    for place in every_tensor(cfg, collection):
        a, b = got(*place), want(*place)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes(), place


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*")) if f.is_file()}
