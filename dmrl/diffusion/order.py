"""Which positions the sampler reveals next.

An order gives every position of the block a score; the best-scored masks are revealed. Scores
are compared within a row only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmrl.diffusion.noise import favourite
from dmrl.types import TOP, RowKeys

Score = Float[Array, "b l"]


class Look(NamedTuple):
    """What an order sees of one step: the open positions."""

    measured: Any
    """What `Order.measure` found, with leading axes [B,L]."""
    proposal: Int[Array, "b l"]
    """The token that would be revealed."""
    masked: Bool[Array, "b l"]
    """The candidates."""
    progress: Float[Array, ""] | Float[Array, " b"]
    """From 0 at a block's first step to 1 at its last."""
    keys: RowKeys
    eos_id: int
    law: Score | None = None
    """`Learned.law`, where that is the order."""


@dataclasses.dataclass(frozen=True)
class LowConfidence:
    """Log-probability of the proposed token.

    LLaDA's `low_confidence` remasking (arXiv 2502.09992): the least confident stay masked.
    """

    def measure(self, log_p: Float[Array, "*b v"], chosen: Float[Array, "*b"]) -> Any:
        """What is read of whole vocabulary rows, which exist for a few positions at a time.

        `log_p` at temperature 1, -inf outside the nucleus where there is one; `chosen` its
        entries of the proposed tokens.
        """
        del log_p
        return chosen

    def score(self, look: Look) -> Score:
        """The larger, the earlier."""
        return look.measured


@dataclasses.dataclass(frozen=True)
class Random(LowConfidence):
    """Uniform noise: every order alike."""

    def score(self, look: Look) -> Score:
        """Noise keyed by row."""
        return _uniform(look)


@dataclasses.dataclass(frozen=True)
class Margin(LowConfidence):
    """Probability of the best token less that of the second."""

    def measure(self, log_p: Float[Array, "*b v"], chosen: Float[Array, "*b"]) -> Any:
        """The margin."""
        del chosen
        best = favourite(log_p)[..., None]
        column = jnp.expand_dims(jnp.arange(log_p.shape[-1]), range(log_p.ndim - 1))
        others = jnp.where(column == best, -jnp.inf, log_p)
        return jnp.exp(jnp.max(log_p, axis=-1)) - jnp.exp(jnp.max(others, axis=-1))


@dataclasses.dataclass(frozen=True)
class Entropy(LowConfidence):
    """Minus the entropy: the surest distribution first."""

    def measure(self, log_p: Float[Array, "*b v"], chosen: Float[Array, "*b"]) -> Any:
        """Minus the entropy in nats."""
        del chosen
        return -entropy_of(log_p)


@dataclasses.dataclass(frozen=True)
class SoftmaxConfidence(LowConfidence):
    """Drawn with g(i) proportional to exp(c_i / tau), c_i the best token's probability.

    UPO's stochastic reference; several at a step are drawn without replacement. With `over` =
    vocabulary exp(p / tau) is summed over all tokens, as the authors' code does: flatter, the
    larger the vocabulary.
    """

    tau: float = 0.05
    over: str = "top"

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.over not in ("top", "vocabulary"):
            raise ValueError(f"tau={self.tau} must be > 0, over={self.over!r} top or vocabulary")

    def measure(self, log_p: Float[Array, "*b v"], chosen: Float[Array, "*b"]) -> Any:
        """log g without its normaliser."""
        del chosen
        if self.over == "top":
            return jnp.exp(jnp.max(log_p, axis=-1)) / self.tau
        return jax.nn.logsumexp(jnp.exp(log_p) / self.tau, axis=-1)

    def score(self, look: Look) -> Score:
        """Gumbel noise added: the largest is a draw, the next ones draws from the rest."""
        shape = look.masked.shape[1:]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, shape))(look.keys)
        return look.measured + noise


@dataclasses.dataclass(frozen=True)
class TopK(LowConfidence):
    """Uniformly random among the K candidates with the most confident best token (UPO).

    Where a step reveals more than K, the rest go by confidence.
    """

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")

    def measure(self, log_p: Float[Array, "*b v"], chosen: Float[Array, "*b"]) -> Any:
        """Log-probability of the best token."""
        del chosen
        return jnp.max(log_p, axis=-1)

    def score(self, look: Look) -> Score:
        """Noise above 1 inside; a log-probability, at most 0, outside."""
        inside = select_top(look.measured, look.masked, jnp.full(look.masked.shape[:1], self.k))
        return jnp.where(inside, 1 + _uniform(look), look.measured)


@dataclasses.dataclass(frozen=True)
class Eoser(LowConfidence):
    """Confidence, that of an EOS times a factor that rises linearly from `start` to `end`.

    EOSER (arXiv 2509.23924): early steps do not end the answer. The authors' code divides the
    step within a block by the steps of all blocks, so that with B blocks of S steps `end` is
    start + (end - start) (S - 1) / (B S - 1) there.
    """

    start: float = 0.4
    end: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.start <= 1 and 0 < self.end <= 1):
            raise ValueError(f"start={self.start} and end={self.end} must be in (0, 1]")

    def score(self, look: Look) -> Score:
        """Log of the weighted confidence."""
        factor = jnp.log(self.start + (self.end - self.start) * look.progress)
        factor = jnp.broadcast_to(factor, look.masked.shape[:1])[:, None]
        return look.measured + jnp.where(look.proposal == look.eos_id, factor, 0.0)


@dataclasses.dataclass(frozen=True)
class Learned(LowConfidence):
    """Drawn from softmax(s / temperature), s a trained policy's scores (UPO, arXiv 2510.05725).

    With `top_k` the policy may choose none but the K candidates of the most confident best token;
    where a step reveals more, the rest go by that confidence.
    """

    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature={self.temperature} and k={self.top_k} must be >= 0")

    def measure(self, log_p: Float[Array, "*b v"], chosen: Float[Array, "*b"]) -> Any:
        """The TOP highest probabilities in descending order."""
        del chosen
        return top_probabilities(log_p)

    def law(
        self,
        policy: Callable[[Float[Array, "b l f"]], Score],
        top: Float[Array, "b l k"],
        masked: Bool[Array, "b l"],
    ) -> Score:
        """log g of every candidate at temperature 1, -inf elsewhere."""
        return log_law(
            policy(features(top, masked)), most_confident(top[..., 0], masked, self.top_k)
        )

    def score(self, look: Look) -> Score:
        """The law with Gumbel noise; far below, a probability where the law has none."""
        assert look.law is not None
        shape = look.masked.shape[1:]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, shape))(look.keys)
        outside = look.measured[..., 0] - OUTSIDE
        return jnp.where(look.law == -jnp.inf, outside, look.law + self.temperature * noise)


OUTSIDE = 1e3
"""Nats below which no law falls that float32 softmax gives a sample of."""


def top_probabilities(log_p: Float[Array, "*n v"]) -> Float[Array, "*n k"]:
    """The TOP highest probabilities in descending order; MASK, which has none, is left out."""
    return jnp.exp(jax.lax.top_k(log_p, min(TOP, log_p.shape[-1] - 1))[0])


def features(top: Float[Array, "n w k"], masked: Bool[Array, "n w"]) -> Float[Array, "n w f"]:
    """What a policy reads beside hidden states: in the block (all of these), masked, `top`."""
    flags = jnp.stack([jnp.ones_like(masked), masked], axis=-1)
    return jnp.concatenate([flags.astype(top.dtype), top], axis=-1)


def most_confident(
    confidence: Float[Array, "n w"], masked: Bool[Array, "n w"], k: int
) -> Bool[Array, "n w"]:
    """The `k` most confident masked positions (0: all)."""
    return select_top(confidence, masked, jnp.full(masked.shape[:1], k)) if k else masked


def log_law(score: Float[Array, "n w"], allowed: Bool[Array, "n w"]) -> Float[Array, "n w"]:
    """log softmax of the scores over `allowed`, -inf elsewhere; a row may have none."""
    some = jnp.any(allowed, axis=-1, keepdims=True)
    score = jnp.where(allowed | ~some, score, -jnp.inf)  # no row of -inf alone: NaN
    return jnp.where(allowed, jax.nn.log_softmax(score, axis=-1), -jnp.inf)


ORDERS: dict[str, Any] = {
    "low_confidence": LowConfidence,
    "random": Random,
    "margin": Margin,
    "entropy": Entropy,
    "softmax_confidence": SoftmaxConfidence,
    "top_k": TopK,
    "eoser": Eoser,
    "learned": Learned,
}
STOCHASTIC = (Random, SoftmaxConfidence, TopK, Learned)
"""Orders whose score is a draw or says nothing of how sure a position is."""


def select_top(
    score: Score, candidates: Bool[Array, "b l"], count: Int[Array, " b"]
) -> Bool[Array, "b l"]:
    """The `count` best-scored candidates of each row (all of them if there are fewer).

    Ties go to the leftmost.
    """
    return candidates & (rank(score, candidates) < count[:, None])


def rank(score: Score, candidates: Bool[Array, "b l"]) -> Int[Array, "b l"]:
    """How many positions of the row come before one: better candidates, or equal ones left of it.

    Counts pairs: no sort runs.
    """
    score = jnp.where(candidates, score, -jnp.inf)
    index = jnp.arange(score.shape[1])
    ahead = score[:, None, :] > score[:, :, None]
    tied = score[:, None, :] == score[:, :, None]
    ahead |= tied & (index[None, None, :] < index[None, :, None])
    return jnp.sum(ahead, axis=-1)


def entropy_of(log_p: jax.Array) -> jax.Array:
    """Entropy in nats over the last axis; impossible tokens (-inf) add nothing."""
    return -jnp.sum(jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * log_p), axis=-1)


def _uniform(look: Look) -> Score:
    shape = look.masked.shape[1:]
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(look.keys)
