"""Log-likelihoods of texts under a policy, as LLaDA's evaluation estimates them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dmrl import data, models, parallel, tokenizer
from dmrl.decoding import Ready
from dmrl.diffusion import likelihood
from dmrl.diffusion.noise import row_keys


class Pair(NamedTuple):
    """Token ids that are given, and those that are scored; at least one of the latter."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def length(self) -> int:
        """Of both."""
        return len(self.context) + len(self.continuation)


def estimate(
    ready: Ready,
    pairs: Sequence[Pair],
    samples: int = 128,
    batch: int = 16,
    seed: int = 0,
) -> NDArray[np.floating[Any]]:
    """A lower bound, in expectation, of log p(continuation | context) of every pair, in nats.

    `samples` forwards a pair (LLaDA's mc_num; 1 is exact for continuations of one token), `batch`
    pairs at a time. Noise follows a pair's place in `pairs`, so that neither the batch nor the
    padding changes a result but for the rounding of float sums. Compiles once for every length
    that occurs, rounded up to a power of two.

    Raises:
      ValueError: a pair is longer than the model can see, or scores nothing.
    """
    if not pairs:
        return np.zeros(0)
    policy, mesh, tok, _ = ready
    most = policy.model.max_sequence_length
    if not all(pair.continuation and pair.length <= most for pair in pairs):
        raise ValueError(f"a text is empty, or with its context longer than the model's {most}")
    program = _program(policy.model, samples)
    shards = parallel.batch_shards(mesh)
    batch = -(-min(batch, len(pairs)) // shards) * shards
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].continuation), pairs[i].length))
    found = np.zeros(len(pairs))
    for index, real in data.in_order(len(pairs), batch):
        places = [order[i] for i in index]
        arrays = _arrays([pairs[i] for i in places], most, tok.pad_token_id)
        rows = (*arrays, np.array(places, np.int32))
        inputs = parallel.put(rows, parallel.batch_sharding(mesh))
        with jax.set_mesh(mesh):
            values = program(policy.trainable, policy.frozen, inputs, jax.random.key(seed))
        found[places[:real]] = parallel.gather(values)[:real]
    return found


def _arrays(pairs: Sequence[Pair], most: int, pad_id: int) -> tuple[Any, Any, Any]:
    """(tokens [N,S], valid [N,S], scored [N,W]), all padded on the left."""
    longest = rounded(max(pair.length for pair in pairs), most)
    width = rounded(max(len(pair.continuation) for pair in pairs), longest)
    rows = [[*pair.context, *pair.continuation] for pair in pairs]
    tokens, valid = tokenizer.pad_left(rows, longest, pad_id)
    lengths = np.array([[len(pair.continuation)] for pair in pairs])
    return tokens, valid, np.arange(width) >= width - lengths


def rounded(length: int, most: int) -> int:
    """The least power of two from 16 on that holds `length`; `most` where that is less."""
    return min(1 << max(length - 1, 15).bit_length(), most)


@functools.lru_cache(maxsize=4)
def _program(model: models.Config, samples: int) -> Callable[..., jax.Array]:
    def run(trainable: Any, frozen: Any, inputs: Any, key: jax.Array) -> jax.Array:
        tokens, valid, scored, row = inputs
        denoiser = models.bind(model, {"params": frozen, **trainable})
        keys = row_keys(key, row)
        return likelihood.stratified_elbo(denoiser, tokens, valid, scored, keys, samples)

    return jax.jit(run)
