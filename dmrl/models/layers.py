"""What a LLaDA is made of: norms, linear maps with adapters, rotary attention, a block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from dmrl.models import products, target
from dmrl.models.attention import BATCH_AXES, attend
from dmrl.models.config import Config
from dmrl.models.int8 import Int8


def dot(
    x: Float[Array, "*lead i"], kernel: Num[Array, "i o"], out_dtype: Any = None
) -> Float[Array, "*lead o"]:
    """x @ kernel in x's precision, all leading axes as one.

    Flat, because XLA's CPU backend takes 4 times as long for a weight gradient that contracts
    over two axes (measured: SwiGLU of 7,424 tokens, 98 against 27 ms).
    """
    rows, matrix = x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype)
    if target.platform() == "cpu" and out_dtype in (None, x.dtype):
        y = _dot_on_cpu(rows, matrix)
    else:
        y = products.times(rows, matrix, out_dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


@jax.custom_vjp
def _dot_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, whose gradient for the kernel is a product that a CPU is fast at.

    There is no forward-mode derivative.
    """
    return products.times(x, kernel)


def _dot_fwd(x, kernel):
    return products.times(x, kernel), (x, kernel)


def _dot_bwd(kept, cotangent):
    x, kernel = kept
    return products.times(cotangent, kernel.T), products.over_rows(x, cotangent)


_dot_on_cpu.defvjp(_dot_fwd, _dot_bwd)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Pins the layout of an activation when a mesh is active; no-op on a bare device."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


class RMSNorm(nn.Module):
    """x / rms(x) * scale, normalised in float32."""

    cfg: Config

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.cfg.param_dtype)
        )
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.cfg.rms_norm_eps)
        return jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1)) * y.astype(x.dtype)


class Linear(nn.Module):
    """x W, plus (alpha/r) x A B when a `lora` collection is given."""

    cfg: Config
    features: int
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        cfg, fan_in = self.cfg, x.shape[-1]
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal")
        kernel = self.param("kernel", init, (fan_in, self.features), jnp.dtype(cfg.param_dtype))
        if isinstance(kernel, Int8):
            scaled = dot(x, kernel.values).astype(jnp.float32) * jnp.expand_dims(kernel.scale, 0)
            y = scaled.astype(x.dtype)  # the cotangent comes back in x's type, too
        else:
            y = dot(x, kernel)
        adapted = self.is_initializing() or self.has_variable("lora", "a")
        if cfg.lora_rank and adapted:
            a = self.variable("lora", "a", self._init_a, (fan_in, cfg.lora_rank)).value
            b = self.variable("lora", "b", jnp.zeros, (cfg.lora_rank, self.features)).value
            y = y + (cfg.lora_alpha / cfg.lora_rank) * dot(dot(x, a), b)
        return y

    def _init_a(self, shape: tuple[int, int]) -> jax.Array:
        """Kaiming-uniform with a = sqrt(5), PEFT's default: U(-1, 1) / sqrt(fan_in)."""
        bound = shape[0] ** -0.5
        return jax.random.uniform(self.make_rng("params"), shape, minval=-bound, maxval=bound)


Rotation = tuple[Float[Array, "b s 1 half"], Float[Array, "b s 1 half"]]


def rotation(positions: Int[Array, "b s"], head_dim: int, theta: float) -> Rotation:
    """(cos, sin) of every position's angles, float32; the same for all heads and layers.

    Read from a table of the sequence's places: what is computed of the positions themselves XLA
    fuses into every use, and cosines of each head and layer took a tenth of a small model's step.
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    place = jnp.arange(positions.shape[1], dtype=jnp.float32)
    angle = place[:, None, None] * frequency[None, None]
    return jnp.cos(angle)[positions], jnp.sin(angle)[positions]


def rope(x: Float[Array, "b s h d"], rotation: Rotation) -> Float[Array, "b s h d"]:
    """Rotary embedding, rotate-half convention, computed in float32."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


Window = tuple[Int[Array, "*b"], int]
"""(start, width): the positions start .. start + width of a sequence, of all rows the same or of
each row its own; width is static."""


KeyValue = tuple[Float[Array, "*l b s kv half2"], Float[Array, "*l b s kv half2"]]
"""Keys (turned by their positions) and values of a layer, or of all L stacked."""


def cut(x: Shaped[Array, "b s *rest"], window: Window | None) -> Shaped[Array, "b w *rest"]:
    """The positions of the window; all without one."""
    if window is None:
        return x
    if window[0].ndim:
        return jax.vmap(jax.lax.dynamic_slice_in_dim, (0, 0, None))(x, *window)
    return jax.lax.dynamic_slice_in_dim(x, *window, axis=1)


class Attention(nn.Module):
    """Full bidirectional attention with optional grouped key/value heads.

    Every position is a key; with a window its positions alone are queries. With a `store` `x` is
    those of the window only, and keys and values of all others come from the store.
    """

    cfg: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n d"],
        valid: Bool[Array, "b s"],
        rotation: Rotation,
        window: Window | None = None,
        store: KeyValue | None = None,
    ) -> tuple[Float[Array, "m d"], KeyValue]:
        cfg, batch = self.cfg, valid.shape[0]
        asking = x.reshape(batch, -1, cfg.d_model)
        asking = asking if store else cut(asking, window)
        width = asking.shape[1]

        def heads(x: jax.Array, name: str, n: int) -> jax.Array:
            y = Linear(cfg, n * cfg.head_dim, name=name)(x)
            return y.reshape(batch, -1, n, cfg.head_dim)

        q = heads(asking.reshape(batch * width, -1), "q_proj", cfg.n_heads)
        k, v = (heads(x, name, cfg.n_kv_heads) for name in ("k_proj", "v_proj"))
        cos, sin = rotation
        here = (cut(cos, window), cut(sin, window))
        q, k = rope(q, here), rope(k, here if store else rotation)
        q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))
        if store:
            assert window is not None
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), window[0], axis=1)
                for old, new in zip(store, (k, v), strict=True)
            )
        y = attend(q, k, v, valid, cfg.attention)
        out = Linear(cfg, cfg.d_model, init_scale=0.5 / cfg.n_layers, name="attn_out")
        return out(y.reshape(batch * width, cfg.d_model)), (k, v)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream.

    With a window only its positions come out, and nothing but keys and values is computed of
    the others; with a `store` only its positions go in, and not even that. `keep` gives keys and
    values out beside.
    """

    cfg: Config
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n d"],
        valid: Bool[Array, "b s"],
        rotation: Rotation,
        window: Window | None = None,
        store: KeyValue | None = None,
    ) -> tuple[Float[Array, "m d"], KeyValue | None]:
        cfg = self.cfg
        normed = RMSNorm(cfg, name="attn_norm")(x)
        if not store:
            x = cut(x.reshape(*valid.shape, -1), window).reshape(-1, cfg.d_model)
        attended, kept = Attention(cfg, name="attn")(normed, valid, rotation, window, store)
        x = x + attended
        h = RMSNorm(cfg, name="ff_norm")(x)
        gate = Linear(cfg, cfg.mlp_hidden_size, name="ff_proj")(h)
        up = Linear(cfg, cfg.mlp_hidden_size, name="up_proj")(h)
        gate, up = (checkpoint_name(y, "mlp") for y in (gate, up))
        down = Linear(cfg, cfg.d_model, init_scale=0.5 / cfg.n_layers, name="ff_out")
        x = x + down(jax.nn.silu(gate) * up)
        return constrain(x, BATCH_AXES, None), kept if self.keep else None


def turns(cfg: Config, valid: Bool[Array, "b s"]) -> Rotation:
    """The rotations of all positions, which count from a row's first valid one."""
    if valid.shape[1] > cfg.max_sequence_length:
        raise ValueError(f"sequence of {valid.shape[1]} tokens exceeds {cfg.max_sequence_length=}")
    positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    return rotation(positions, cfg.head_dim, cfg.rope_theta)
