"""Small models and small helpers that several tests share."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from scipy import stats

from dmrl.diffusion import exact
from dmrl.models import convert
from dmrl.models.weights import layers, leaves
from dmrl.types import Inner, Rollout

VOCAB, MASK, NO_EOS = 4, 3, -1
"""Three tokens and MASK; the id of an EOS that is no token, so nothing ever ends early."""
INNER = Inner(jnp.array(0), 1, jax.random.key(9))
"""The only inner update of a rollout."""


def llada(folder):
    """(Config, parameters) of a Hugging Face folder."""
    cfg, read = convert.read_hf(folder)
    flat = {
        path: jnp.asarray(
            read(path, None)
            if layers(cfg, path) == [None]
            else np.stack([read(path, layer) for layer in layers(cfg, path)])
        )
        for path in leaves(cfg)
    }
    return cfg, traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def perceptron(length, prompt=2, seed=0, vocab=VOCAB, mask=MASK, eos=NO_EOS):
    """(parameters, prompt [P], params -> Denoiser) of an enumerable model."""
    params = exact.init(jax.random.key(seed), vocab, prompt + length)
    tokens = jax.random.randint(jax.random.key(seed + 1), (prompt,), 0, mask)
    return params, tokens, lambda p: exact.bind(p, mask, eos)


def rollout(tokens, reveal_step=None, prompt=None, reward=None, group=None, eos=NO_EOS):
    """A Rollout of given completions [B,L]; by default all revealed at step 0, one group."""
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = tokens.shape[0]
    if reveal_step is None:
        reveal_step = jnp.zeros(tokens.shape, jnp.int32)
    if prompt is None:
        prompt = jnp.zeros((rows, 2), jnp.int32)
    ended = jnp.cumsum(tokens == eos, axis=1) - (tokens == eos) > 0
    return Rollout(
        prompt=prompt,
        prompt_valid=jnp.ones(prompt.shape, bool),
        tokens=tokens,
        reveal_step=jnp.asarray(reveal_step, jnp.int32),
        log_prob=jnp.zeros(tokens.shape),
        entropy=jnp.zeros(tokens.shape),
        row=jnp.arange(rows),
        group=jnp.zeros(rows, jnp.int32) if group is None else jnp.asarray(group, jnp.int32),
        length=jnp.sum(~ended, axis=1),
        reward=None if reward is None else jnp.asarray(reward, jnp.float32),
    )


def reward_of(fills):
    """A fixed random reward in [0, 1] of every completion."""
    table = jax.random.uniform(jax.random.key(11), (MASK,) * fills.shape[-1])
    return table[tuple(jnp.moveaxis(fills, -1, 0))]


def chi_square(outcomes, law):
    """p-value of the hypothesis that `outcomes` were drawn from `law` {outcome: probability}.

    An outcome that the law calls impossible gives 0. Rare ones are pooled, as the test asks.
    """
    counts = Counter(outcomes)
    if counts.keys() - law.keys():
        return 0.0
    total = len(outcomes)
    rare = [o for o, p in law.items() if p * total < 5]
    cells = [(counts[o], p * total) for o, p in law.items() if p * total >= 5]
    pooled = sum(law[o] for o in rare) * total
    if pooled >= 5:
        cells.append((sum(counts[o] for o in rare), pooled))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return float(stats.chi2.sf(statistic, len(cells) - 1))


def flat(tree):
    """A pytree of arrays as one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_close(got, want, rtol=1e-4):
    """Equal up to `rtol` of the largest entry: gradients cancel, so entries alone may not be."""
    got, want = flat(got), flat(want)
    assert np.abs(want).max() > 1e-3, "nothing to compare: the expected values vanish"
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())
