"""Cases that the tests of TraFL, RSPO and VRPO share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from dmrl.diffusion import score
from dmrl.diffusion.likelihood import elbo, masks_log_prob
from dmrl.types import TEMPLATE, Denoiser, Models

LENGTH, EOS = 4, 2


def case(rows=6, size=2, reward=None, eos=EOS):
    """(parameters, params -> Denoiser, rollout): groups of `size`, one template position."""
    params, _, bind = tiny.perceptron(LENGTH, prompt=3, eos=eos)
    keys = jax.random.split(jax.random.key(7), 3)
    tokens = jax.random.randint(keys[0], (rows, LENGTH), 0, tiny.MASK)
    reveal = jnp.broadcast_to(jnp.array([0, TEMPLATE, 1, 2]), tokens.shape)
    prompt = jax.random.randint(keys[1], (rows // size, 3), 0, tiny.MASK)
    reward = jax.random.uniform(keys[2], (rows,)) if reward is None else jnp.asarray(reward)
    group = jnp.arange(rows) // size
    rollout = tiny.rollout(tokens, reveal, jnp.repeat(prompt, size, axis=0), reward, group, eos)
    return params, bind, rollout


@functools.cache
def with_log_z(bind):
    """{'policy': ..., 'z': scalar} -> Denoiser whose head says `z` for every prompt."""

    def bound(params):
        def log_z(prompt, valid, template):
            del valid, template
            return jnp.broadcast_to(params["z"], prompt.shape[:1])

        return bind(params["policy"])._replace(heads={"log_z": log_z})

    return bound


def product(table):
    """A denoiser whose predictions [L,V] do not depend on what it sees: scores are exact."""

    def encode(tokens, valid, *_):
        del valid
        padded = jnp.pad(table, ((tokens.shape[1] - table.shape[0], 0), (0, 0)))
        return jnp.broadcast_to(padded[None], (tokens.shape[0], *padded.shape))

    def logits(hidden):
        masked = jnp.expand_dims(jnp.arange(table.shape[1]) == tiny.MASK, range(hidden.ndim - 1))
        return jnp.where(masked, -jnp.inf, hidden)

    def log_prob(hidden, labels, needed=None):
        return jnp.take_along_axis(jax.nn.log_softmax(logits(hidden)), labels, axis=-1)

    return Denoiser(encode, logits, log_prob, tiny.MASK, tiny.NO_EOS)


@functools.partial(jax.jit, static_argnames=("method", "bind", "hp"))
def prepared(method, bind, params, reference, rollout, hp):
    """The batch of an algorithm's module; `reference` are parameters too."""
    trio = Models(bind(params), None, bind(reference))
    return method.prepare(trio, rollout, None, jax.random.key(0), tiny.INNER, hp)


@functools.partial(jax.jit, static_argnames=("method", "bind", "hp"))
def value_and_gradient(method, bind, params, batch, hp):
    """((loss, metrics), gradient) at `params`."""

    def objective(p):
        return method.loss(Models(bind(p), None, None), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient(*args):
    return value_and_gradient(*args)[1]


@functools.partial(jax.jit, static_argnames="bind")
def scores(bind, params, masked):
    """[N, M] of flat completions."""
    return score.score(bind(params), masked)


@functools.partial(jax.jit, static_argnames="bind")
def sums(bind, params, masked):
    """The score [N] of completions that may lie in groups, through the ELBO other methods use."""
    lead = masked.labels.ndim - 1
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), masked)
    prompt = jnp.repeat(rows.prompt[:, None], rows.state.shape[1], axis=1)
    args = (prompt, rows.prompt_valid, rows.state, rows.labels)
    return elbo(masks_log_prob(bind(params), *args), rows.weight)


def assert_adds_up(method, bind, params, batch, hp, cuts):
    """Gradients of strided pieces of the items sum to that of the whole."""
    whole = gradient(method, bind, params, batch, hp)
    for n in cuts:
        parts = [jax.tree.map(lambda x, i=i, n=n: x[i::n], batch) for i in range(n)]
        pieces = [gradient(method, bind, params, part, hp) for part in parts]
        tiny.assert_close(jax.tree.map(lambda *g: sum(g), *pieces), whole, rtol=1e-5)


def assert_only_sampled_tokens_count(method, bind, params, rollout, reference, hp):
    """No weight on the template and after EOS, and labels there change no gradient."""
    tokens = jnp.array([[EOS, 1, 0, 0], [0, EOS, 1, 1], [0, 1, 1, EOS], [1, 0, EOS, 0]])
    rollout = rollout._replace(tokens=jnp.tile(tokens, (rollout.tokens.shape[0] // 4, 1)))
    batch = prepared(method, bind, params, reference, rollout, hp)
    scored = np.asarray((batch.masked.weight > 0).any(axis=-2))
    table = {
        tuple(t): s
        for t, s in zip(
            np.asarray(batch.masked.labels).reshape(-1, LENGTH).tolist(),
            scored.reshape(-1, LENGTH).tolist(),
            strict=True,
        )
    }
    expected = {
        (EOS, 1, 0, 0): [True, False, False, False],
        (0, EOS, 1, 1): [True, False, False, False],
        (0, 1, 1, EOS): [True, False, True, True],
        (1, 0, EOS, 0): [True, False, True, False],
    }
    assert table == {t: expected[t] for t in table}
    assert len(table) >= 2
    other = jnp.where(scored, batch.masked.labels, 1 - jnp.minimum(batch.masked.labels, 1))
    assert (other != batch.masked.labels).any()
    changed = batch._replace(masked=batch.masked._replace(labels=other))
    want = gradient(method, bind, params, batch, hp)
    tiny.assert_close(gradient(method, bind, params, changed, hp), want, rtol=1e-6)
