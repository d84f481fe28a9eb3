"""Rollouts that stop at EOS: the same up to there, and no method that uses them can tell."""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_sampler import draw

from dmrl import algorithms, models, parallel
from dmrl.diffusion.sampler import Sampling
from dmrl.objective import make_term
from dmrl.programs import Programs
from dmrl.types import Models

EOS = 2
LENGTH, STEPS = 6, 6
CONFIG = Sampling(length=LENGTH, steps=STEPS, block_length=2, temperature=1.0)
PARAMS, PROMPT, BIND = tiny.perceptron(LENGTH, eos=EOS)
BLIND = [
    m.name
    for m in pkgutil.iter_modules(algorithms.__path__)
    if getattr(importlib.import_module(f"dmrl.algorithms.{m.name}"), "BLIND_AFTER_EOS", False)
]


@pytest.fixture(scope="module")
def both():
    """The same rows in full and stopped."""
    blank = jnp.full(LENGTH, tiny.MASK)
    return [
        draw(BIND(PARAMS), PROMPT, blank, CONFIG, rows=32, stop_at_eos=stop)
        for stop in (False, True)
    ]


def test_everything_up_to_eos_is_the_same(both):
    full, stopped = (jax.tree.map(np.asarray, r) for r in both)
    until = np.arange(LENGTH)[None] < full.length[:, None]
    np.testing.assert_array_equal(full.length, stopped.length)
    for name in ("tokens", "reveal_step", "log_prob", "entropy"):
        ours, theirs = getattr(stopped, name), getattr(full, name)
        np.testing.assert_array_equal(ours[until], theirs[until])
    assert 4 < np.sum(full.length < LENGTH) < 32


def test_later_blocks_are_eos_that_no_step_revealed(both):
    full, stopped = (jax.tree.map(np.asarray, r) for r in both)
    first_block = np.arange(LENGTH)[None] // 2 <= (full.length[:, None] - 1) // 2
    np.testing.assert_array_equal(stopped.tokens[first_block], full.tokens[first_block])
    assert (stopped.tokens[~first_block] == EOS).all()
    assert (stopped.reveal_step[~first_block] == STEPS).all()
    assert (full.tokens[~first_block] != EOS).any()


def test_no_forward_once_all_have_ended():
    calls = []
    denoiser = BIND(PARAMS)

    def encode(tokens, valid, *_):
        jax.debug.callback(lambda: calls.append(1))
        return denoiser.encode(tokens, valid)

    def logits(hidden):
        only_eos = jnp.expand_dims(jnp.arange(tiny.VOCAB) == EOS, range(hidden.ndim - 1))
        return jnp.where(only_eos, 0.0, jnp.full_like(denoiser.logits(hidden), -jnp.inf))

    blank = jnp.full(LENGTH, tiny.MASK)
    silent = denoiser._replace(encode=encode, logits=logits)
    done = draw(silent, PROMPT, blank, CONFIG, rows=3, stop_at_eos=True)
    jax.effects_barrier()
    assert len(calls) == 2  # the two steps of the first block
    assert (np.asarray(done.tokens) == EOS).all()


def test_there_are_methods_that_may_stop():
    assert {"diffu_grpo", "wd1", "spg", "igpo"} == set(BLIND)


@pytest.mark.parametrize("name", BLIND)
def test_a_method_that_may_stop_cannot_tell(name, both):
    options = {"spg": {"block_length": 2, "samples": 2}}.get(name, {})
    term = make_term(name, 1.0, options)
    reward = (jnp.arange(32) * 7 % 5).astype(jnp.float32)
    results = []
    for rollout in both:
        rollout = rollout._replace(reward=reward, group=jnp.arange(32) // 4)
        frozen = BIND(jax.tree.map(lambda x: 0.9 * x, PARAMS))

        def value(params, rollout=rollout, frozen=frozen):
            used = Models(BIND(params), None, frozen)
            key = jax.random.key(3)
            batch = term.algorithm.prepare(used, rollout, None, key, tiny.INNER, term.hyper)
            batch = jax.lax.stop_gradient(batch)
            return term.algorithm.loss(used, batch, term.hyper)[0]

        results.append(jax.jit(jax.value_and_grad(value))(PARAMS))
    (full, full_grad), (stopped, stopped_grad) = results
    assert float(stopped) == pytest.approx(float(full), rel=1e-6, abs=1e-7)
    tiny.assert_close(stopped_grad, full_grad, rtol=1e-6)


@pytest.mark.parametrize(
    ("terms", "blocks", "stops"),
    [
        (("diffu_grpo",), 3, True),
        (("diffu_grpo",), 1, False),  # nothing comes after the only block
        (("diffu_grpo", "spg"), 3, True),
        (("diffu_grpo", "dispo"), 3, False),  # dispo visits states of every step
        (("dtm",), 3, False),
        ((), 3, True),  # an evaluation
    ],
)
def test_a_run_stops_only_if_all_its_terms_may(terms, blocks, stops):
    sampling = Sampling(length=6, steps=6, block_length=6 // blocks)
    cfg = models.Config(vocab_size=8, mask_token_id=0, eos_token_id=1)
    made = tuple(make_term(name, 1.0, {}) for name in terms)
    programs = Programs(cfg, made, sampling, optax.identity(), parallel.make_mesh())
    assert programs.stops_at_eos is stops
    assert not dataclasses.replace(programs, whole_text=True).stops_at_eos
