"""The shapes at which speed is measured.

T0 spends its time in the layers, T1 in the vocabulary, F is LLaDA-8B, Fn what F does on a model a
sixteenth as wide and an eighth as deep: head and adapter have the same shares beside the layers'
products, attention's scores 27% of these, at F 1.7%. tiny tries a script out.
"""

from typing import Any, NamedTuple

from dmrl.diffusion.sampler import Sampling
from dmrl.models import Config


class Shape(NamedTuple):
    """A model and what it samples."""

    name: str
    model: Config
    prompt: int
    """Tokens of a prompt."""
    sampling: Sampling
    rows: int
    """Completions at a time."""


def _model(**values: int | float | str) -> Config:
    """Float32, all heads alike, nothing recomputed; the last two ids are MASK and EOS."""
    vocab = int(values["vocab_size"])
    fields: dict[str, Any] = {
        "n_kv_heads": values["n_heads"],
        "mask_token_id": vocab - 1,
        "eos_token_id": vocab - 2,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": "none",
    }
    return Config(**(fields | values))


TINY = Shape(
    "tiny",
    _model(vocab_size=160, d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64),
    8,
    Sampling(length=16, steps=8, block_length=8, temperature=0.9),
    4,
)
T0 = Shape(
    "T0",
    _model(vocab_size=1024, d_model=128, n_layers=4, n_heads=4, mlp_hidden_size=384),
    32,
    Sampling(length=64, steps=32, block_length=16, temperature=0.9),
    6,
)
T1 = Shape(
    "T1",
    _model(vocab_size=126_464, d_model=256, n_layers=4, n_heads=8, mlp_hidden_size=768),
    200,
    Sampling(length=256, steps=128, block_length=32, temperature=0.9),
    6,
)
F = Shape("F", Config(lora_rank=128), 200, Sampling(256, 128, 32, 0.9), 12)
FN = Shape(
    "Fn",
    _model(
        vocab_size=1024,
        d_model=256,
        n_layers=4,
        n_heads=2,
        mlp_hidden_size=768,
        lora_rank=8,
        remat="full",
    ),
    *F[2:4],
    6,
)
SHAPES = {shape.name: shape for shape in (TINY, T0, T1, F, FN)}
