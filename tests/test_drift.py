"""What an approximate sampler is off by: where it is measured, and how much it says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from running import config
from scipy.special import log_softmax
from test_sampler import draw

from dmrl import recipe, trainer
from dmrl.diffusion import drift
from dmrl.diffusion.probe import state_at
from dmrl.diffusion.sampler import Sampling
from dmrl.types import Cached

M = tiny.MASK


def stale(denoiser):
    """A model whose store is the tokens of that time: it answers to nothing newer."""

    def prefill(tokens, valid, start, width):
        hidden = denoiser.encode(tokens, valid)
        return jax.lax.dynamic_slice_in_dim(hidden, start, width, axis=1), tokens

    def extend(tokens, valid, store, start, width):
        del tokens
        hidden = denoiser.encode(store, valid)
        return jax.lax.dynamic_slice_in_dim(hidden, start, width, axis=1)

    return denoiser._replace(cached=Cached(prefill, extend))


def fresh(denoiser):
    """One whose cache is exact."""

    def extend(tokens, valid, store, start, width):
        del store
        hidden = denoiser.encode(tokens, valid)
        return jax.lax.dynamic_slice_in_dim(hidden, start, width, axis=1)

    made = stale(denoiser)
    return made._replace(cached=made.cached._replace(extend=extend))


CONFIGS = {
    "fixed": Sampling(8, 8, 4, 1.0, cache="dual"),
    "refreshed": Sampling(8, 8, 4, 1.0, cache="prefix:2"),
    "adaptive": Sampling(8, 8, 4, 1.0, schedule="threshold:0.45", cache="dual:2"),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def case(request):
    params, prompt, bind = tiny.perceptron(8)
    template = jnp.array([M, M, M, 1, M, M, M, M])
    denoiser = stale(bind(params))
    return denoiser, request.param, draw(denoiser, prompt, template, request.param, rows=64)


def test_drift_is_measured_where_stored_keys_were_read(case):
    _, config_, out = case
    every, steps = config_.cache_rule.every, np.asarray(out.reveal_step)
    seen = set()
    for number in range(5):
        at = drift.places(out, config_, jax.random.key(number))
        for row in np.nonzero(np.asarray(at.weight))[0]:
            step, filled, start = (int(x[row]) for x in (at.step, at.filled, at.start))
            assert 0 < step - filled < every
            open_ = steps[row, start : start + 4]
            assert step in open_, "a step that revealed something, in its block"
            if config_.adaptive:
                assert (filled - open_[open_ >= 0].min()) % every == 0
            else:
                assert filled % every == 0
                assert filled // 4 == step // 4 == start // 4
            seen.add((step, start))
    assert len(seen) > 2
    if config_.adaptive:
        assert not np.asarray(at.weight).all(), "some rows never read a store"


def test_drift_is_the_divergence_from_the_exact_model(case):
    denoiser, config_, out = case
    key = jax.random.key(0)
    found = drift.measure(denoiser, out, config_, key)
    at = drift.places(out, config_, key)
    rows = np.nonzero(np.asarray(at.weight))[0]
    kl, same = [], []
    for row in rows:
        logs = []
        for step in (int(at.step[row]), int(at.filled[row])):
            state = state_at(out, jnp.full((64, 1), step), M)[row, 0]
            tokens = jnp.concatenate([out.prompt[row], state])[None]
            hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[0, 2:]
            logs.append(log_softmax(np.asarray(denoiser.logits(hidden), np.float64)[:, :M], -1))
        state = np.asarray(state_at(out, jnp.full((64, 1), int(at.step[row])), M)[row, 0])
        inside = np.arange(8) // 4 == int(at.start[row]) // 4
        exact, cached = (log[inside & (state == M)] for log in logs)
        kl.append((np.exp(exact) * (exact - cached)).sum(-1).mean())
        same.append((exact.argmax(-1) == cached.argmax(-1)).mean())
    assert np.mean(kl) > 0.01
    np.testing.assert_allclose(found["drift/kl"], np.mean(kl), rtol=1e-4)
    np.testing.assert_allclose(found["drift/agreement"], np.mean(same), rtol=1e-5)
    assert float(found["drift/states"]) == len(rows)


def test_an_exact_cache_has_no_drift(case):
    denoiser, config_, out = case
    found = drift.measure(fresh(denoiser), out, config_, jax.random.key(0))
    assert abs(float(found["drift/kl"])) < 1e-6
    assert float(found["drift/agreement"]) == 1


@pytest.mark.slow
def test_a_run_with_a_cache_logs_its_drift_and_what_it_costs(tmp_path):
    options = {"sampling__cache": "dual", "sampling__block_length": 8, "warm_start__steps": 0}
    options["model__n_layers"] = 2  # one layer's keys do not depend on what others hold
    made = config(steps=1, terms__dispo__weight=0.0, **options)
    trainer.train(recipe.build(made), tmp_path, made)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (step,) = [row for row in rows if "drift/kl" in row]
    assert step["drift/kl"] > 0
    assert 0 <= step["drift/agreement"] <= 1
    assert step["drift/states"] > 0
    names = set().union(*rows)
    assert {"eval/validation/sampled_4_dual/reward", "eval/validation/sampled_4/reward"} <= names
