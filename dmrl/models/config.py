"""Shape and numerics of a LLaDA model."""

import dataclasses
from typing import Any

import jax

from dmrl.models.attention import KINDS, TILE

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "projections": jax.checkpoint_policies.save_only_these_names("qkv", "mlp"),
}
"""What the backward pass keeps of a layer; `full` keeps only the residual stream."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and numerics of a LLaDA model; the defaults are LLaDA-8B.

    `lora_rank` 0 means no adapter. `dtype` is the compute type, `param_dtype` the storage
    type; log-probabilities are float32 whatever these are.
    """

    vocab_size: int = 126_464
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    mlp_hidden_size: int = 12_288
    max_sequence_length: int = 4096
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    mask_token_id: int = 126_336
    eos_token_id: int = 126_081
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    remat: str = "full"
    lora_rank: int = 0
    lora_alpha: float = 64.0
    attention: str = "xla"
    """`xla`, or `splash`, JAX's kernel for TPUs, for sequences of thousands of tokens."""
    int8: bool = False
    """The layers' weights in a byte each (`dmrl.models.int8`), beside an adapter; on disk they are
    as ever."""

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide {self.n_heads=}")
        if self.d_model // self.n_heads % 2:
            raise ValueError(f"head width {self.d_model // self.n_heads} is odd: RoPE needs pairs")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r}: choose one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in KINDS:
            raise ValueError(f"attention={self.attention!r}: choose one of {', '.join(KINDS)}")
        if self.attention == "splash" and self.head_dim % TILE:
            raise ValueError(
                f"attention='splash' takes heads of a multiple of {TILE}, not {self.head_dim} wide"
            )
        if self.int8 and not self.lora_rank:
            raise ValueError(
                "int8=True rounds weights that stay as they are, but without an adapter all are "
                "trained: set lora_rank, e.g. 128"
            )
        for name in ("mask_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} is outside 0..{self.vocab_size - 1}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads
