"""LLaDA: a LLaMA-style transformer with bidirectional attention (arXiv 2502.09992).

`LLaDA.__call__` stops at the final norm. The vocabulary head is a parameter of the module
but is applied by `dmrl.models.bind`, row by row where a loss needs it: one float32 row of
the LLaDA vocabulary is 506 kB.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dmrl.models.config import REMAT_POLICIES, Config
from dmrl.models.layers import BATCH_AXES, Block, KeyValue, RMSNorm, Window, constrain, cut, turns


class LLaDA(nn.Module):
    """tokens [B,S], valid [B,S] -> hidden [B,S,D] after the final norm.

    Padding is masked as keys and positions count from the first valid token, so a row's
    result depends neither on its padding nor on the rest of the batch.
    """

    cfg: Config

    def setup(self) -> None:
        cfg, param_dtype = self.cfg, jnp.dtype(self.cfg.param_dtype)
        size, width = cfg.vocab_size, cfg.d_model
        self.embedding = self.param(
            "embedding", nn.initializers.normal(width**-0.5), (size, width), param_dtype
        )
        drawn = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.head = self.param("head", drawn, (width, size), param_dtype)
        block: Any = Block
        if cfg.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        # One loop body compiles fast and keeps only carries; a model small enough to keep all its
        # activations runs a fifth faster without the loop (measured on CPU, 3 layers).
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.n_layers,
            unroll=1 if cfg.remat != "none" else cfg.n_layers,
        )
        self.blocks = layers(cfg)
        self.ln_f = RMSNorm(cfg)

    def __call__(
        self, tokens: Int[Array, "b s"], valid: Bool[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        x, _ = self.blocks(self._embedded(tokens), valid, turns(self.cfg, valid))
        return self._normed(x, tokens.shape[0])

    def tail(
        self, tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], last: int
    ) -> Float[Array, "b w d"]:
        """Hidden states of the `last` positions alone; for differentiation, too.

        The last layer computes only keys and values of the others, unless layers are recomputed
        (the loop over these reads them stacked, and to cut the stack in two would copy it) or
        attention is splash, which answers all positions.
        """
        if self.cfg.remat != "none" or self.cfg.attention == "splash":
            return self(tokens, valid)[:, -last:]
        block, rotated = Block(self.cfg, parent=None), turns(self.cfg, valid)
        early, final = self._split()
        x, _ = jax.lax.scan(
            lambda x, weights: block.apply(weights, x, valid, rotated),
            self._embedded(tokens),
            early,
            unroll=True,
        )
        window = (jnp.int32(tokens.shape[1] - last), last)
        return self._normed(block.apply(final, x, valid, rotated, window)[0], tokens.shape[0])

    def window(
        self, tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], window: Window
    ) -> Float[Array, "b w d"]:
        """Hidden states of the window's positions alone.

        The last layer computes only keys and values elsewhere. Exact, and not for
        differentiation: no layer is recomputed.
        """
        return self._to_window(tokens, valid, window, keep=False)[0]

    def prefill(
        self, tokens: Int[Array, "b s"], valid: Bool[Array, "b s"], window: Window
    ) -> tuple[Float[Array, "b w d"], KeyValue]:
        """`window`, and the keys and values of all layers [L,B,S,KV,D]."""
        return self._to_window(tokens, valid, window, keep=True)

    def extend(
        self,
        tokens: Int[Array, "b s"],
        valid: Bool[Array, "b s"],
        store: KeyValue,
        window: Window,
    ) -> Float[Array, "b w d"]:
        """`window`, with the keys and values of all other positions from `store`."""
        rotated, apply = turns(self.cfg, valid), self._layer(keep=False)

        def layer(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            own = jax.tree.map(lambda leaf: leaf[number], store)
            return apply(x, number, valid, rotated, window, own)[0], None

        x, _ = jax.lax.scan(layer, self._embedded(cut(tokens, window)), self._numbers())
        return self._normed(x, tokens.shape[0])

    def trunk(self, tokens: Int[Array, "b s"], valid: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        """The residual stream that enters the last layer; not for differentiation."""
        return self._to_last(tokens, valid, keep=False)[0].reshape(*tokens.shape, -1)

    def finish(
        self, stream: Float[Array, "b s d"], valid: Bool[Array, "b s"], window: Window
    ) -> Float[Array, "b w d"]:
        """`trunk` -> `window`: the last layer and the norm."""
        x, last = stream.reshape(-1, self.cfg.d_model), self.cfg.n_layers - 1
        x, _ = self._layer(keep=False)(x, last, valid, turns(self.cfg, valid), window)
        return self._normed(x, valid.shape[0])

    def _to_last(self, tokens: jax.Array, valid: jax.Array, keep: bool) -> tuple[jax.Array, Any]:
        rotated, apply = turns(self.cfg, valid), self._layer(keep)
        return jax.lax.scan(
            lambda x, number: apply(x, number, valid, rotated),
            self._embedded(tokens),
            self._numbers()[:-1],
            unroll=1 if self.cfg.remat != "none" else max(self.cfg.n_layers - 1, 1),
        )

    def _to_window(
        self, tokens: jax.Array, valid: jax.Array, window: Window, keep: bool
    ) -> tuple[jax.Array, Any]:
        x, early = self._to_last(tokens, valid, keep)
        before = self.cfg.n_layers - 1
        x, last = self._layer(keep)(x, before, valid, turns(self.cfg, valid), window)
        stored = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), early, last)
        return self._normed(x, tokens.shape[0]), stored

    def _layer(self, keep: bool) -> Any:
        """(x, layer number, ...) -> one layer.

        By number, because cutting the stacked weights in two would copy them.
        """
        block = Block(self.cfg, keep, parent=None)
        stacked = self._stacked()

        def apply(x: jax.Array, number: int | jax.Array, *args: Any) -> Any:
            weights = jax.tree.map(lambda leaf: leaf[number], stacked)
            return block.apply(weights, x, *args)

        return apply

    def _stacked(self) -> dict[str, Any]:
        """The weights of the layers by collection, stacked."""
        return {name: tree["blocks"] for name, tree in self.variables.items() if "blocks" in tree}

    def _split(self) -> tuple[Any, Any]:
        """The weights of all layers but the last, stacked, and of the last.

        By `split`, whose gradient is one concatenation.
        """
        leaves, tree = jax.tree.flatten(self._stacked())
        cuts = [jax.lax.split(x, (self.cfg.n_layers - 1, 1)) for x in leaves]
        early, final = zip(*cuts, strict=True)
        return jax.tree.unflatten(tree, early), jax.tree.unflatten(tree, [x[0] for x in final])

    def _numbers(self) -> jax.Array:
        return jnp.arange(self.cfg.n_layers)

    def _embedded(self, tokens: Int[Array, "b s"]) -> jax.Array:
        x = self.embedding[tokens.reshape(-1)].astype(self.cfg.dtype)
        return constrain(x, BATCH_AXES, None)

    def _normed(self, x: jax.Array, rows: int) -> jax.Array:
        return self.ln_f(x).reshape(rows, -1, self.cfg.d_model)


def init(cfg: Config, key: jax.Array) -> dict[str, Any]:
    """Fresh variables: {'params': ...} and, with an adapter, {'lora': ...} (a no-op at first)."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dict(LLaDA(cfg).init(key, tokens, jnp.ones((1, 1), bool)))


def in_compute_type(cfg: Config, trainable: dict[str, Any]) -> dict[str, Any]:
    """`trainable` with the layers' matrices in `cfg.dtype`, in which every product reads them.

    A gradient in these takes half the memory of one in float32 and, of one forward, is the same:
    what a product gives back for its matrix has the product's type. Of several forwards in one
    microbatch the sum is rounded to it, too. The embedding, the norms and the head stay: theirs is
    summed in float32.
    """

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        names = [getattr(key, "key", None) for key in path]
        matrix = names[:2] == ["params", "blocks"] and names[-1] == "kernel"
        return x.astype(cfg.dtype) if matrix else x

    made: dict[str, Any] = jax.tree_util.tree_map_with_path(cast, trainable)
    return made
