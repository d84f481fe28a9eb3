"""Items without a gradient: each method names its own truly, and they cost no forward."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_programs import GROUP, KEY, MODEL, SAMPLING, behaviour, fresh, prompts, scored
from tiny import assert_close

from dmrl import models, parallel, pieces
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.models import logprob
from dmrl.objective import make_term, needs
from dmrl.programs import Programs
from dmrl.types import Inner, Models

METHODS = {
    "diffu_grpo": {"beta": 0.0},
    "dispo": {"beta": 0.0, "states": 2},
    "spg": {"block_length": 4},
    "wd1": {},
    "unigrpo": {"beta": 0.0},
    "coupled_grpo": {"beta": 0.0},
    "cj_grpo": {"beta": 0.0, "states": 4},
    "trace_rl": {"beta": 0.0, "shrink": 1, "states": 4},
    "egspo": {"beta": 0.0, "states": 2},
    "igpo": {"beta": 0.0},
}


def programs(terms, microbatches=1):
    return Programs(
        MODEL, terms, SAMPLING, optax.sgd(1.0), parallel.make_mesh(), GROUP, 1, microbatches
    )


def tied(rollout, probes):
    """The same with all rewards of the first half of the groups, and some branches, equal."""
    half = jnp.arange(len(rollout.reward)) < len(rollout.reward) // 2
    probes = tuple(
        None if p is None else p._replace(reward=jnp.where(half[:, None, None], 0.3, p.reward))
        for p in probes
    )
    return rollout._replace(reward=jnp.where(half, 0.7, rollout.reward)), probes


def prepared(name, options):
    """(term, batch, idle, loss of one item as a function of the parameters)."""
    term = make_term(name, 1.0, options)
    p = programs((term,))
    rollout, probes = tied(*scored(*p.rollout(behaviour(), None, prompts(), 0, KEY)))
    policy = models.bind(MODEL, fresh(behaviour()))
    reference = policy if "reference" in needs((term,)) else None
    trio = Models(policy, policy, reference)
    inner = Inner(jnp.int32(0), 1, KEY)
    batch = term.algorithm.prepare(trio, rollout, probes[0], KEY, inner, term.hyper)
    idle = getattr(term.algorithm, "idle", None)
    return term, trio, batch, idle and np.asarray(idle(batch, term.hyper))


def some_quick(names, quick):
    """All of them, those that are not `quick` among the slow tests."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


# The others share `surrogate.idle` with diffu_grpo.
@pytest.mark.parametrize("name", some_quick(METHODS, {"diffu_grpo", "dispo", "spg", "wd1"}))
def test_idle_items_have_no_gradient_and_only_they(name):
    term, trio, batch, idle = prepared(name, METHODS[name])
    assert 0 < idle.sum() < len(idle)

    @jax.jit
    def norm(item):
        def value(params):
            bound = trio._replace(policy=models.bind(MODEL, params))
            return term.algorithm.loss(bound, item, term.hyper)[0]

        return optax.tree.norm(jax.grad(value)(fresh(behaviour())))

    found = [norm(jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(len(idle))]
    assert np.max(np.asarray(found)[idle]) < 1e-7
    assert np.min(np.asarray(found)[~idle]) > 1e-7


READERS = METHODS | {
    "sft": {},
    "mdpo": {"beta": 0.1, "states": 2},
    "trafl": {"group_size": GROUP, "log_z": "vargrad"},
    "rspo": {},
}


@pytest.mark.parametrize("name", some_quick(READERS, {"spg", "dispo"}))
def test_positions_that_are_not_needed_are_never_read(name, monkeypatch):
    """Neither by the loss nor by its gradient nor by what is scored before it."""
    asked = []

    def poisoned(hidden, kernel, labels, dropped, needed=None):
        asked.append(needed)
        true = real(hidden, kernel, labels, dropped)
        return true if needed is None else jnp.where(needed[..., None], true, jnp.nan)

    def gradient():
        term, trio, batch, _ = prepared(name, READERS[name])

        def value(params):
            bound = trio._replace(policy=models.bind(MODEL, params))
            return term.algorithm.loss(bound, batch, term.hyper)[0]

        return jax.jit(jax.value_and_grad(value))(fresh(behaviour()))

    real, want = logprob.log_prob, gradient()
    monkeypatch.setattr(logprob, "log_prob", poisoned)
    got = gradient()
    assert asked
    assert all(needed is not None for needed in asked)
    assert_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["diffu_grpo", "unigrpo", "cj_grpo", "igpo"])
def test_with_a_penalty_a_tie_is_not_idle(name):
    options = METHODS[name] | {"beta": 0.1}
    *_, batch, idle = prepared(name, options)
    np.testing.assert_array_equal(idle, ~np.any(np.asarray(batch.weight) > 0, axis=(1, 2)))


def test_idle_microbatches_run_no_forward_and_change_nothing():
    terms = tuple(make_term(n, 1.0, METHODS[n]) for n in ("diffu_grpo", "dispo"))
    chunk = tied(*scored(*programs(terms).rollout(behaviour(), None, prompts(), 0, KEY)))
    runs = []

    def counting(term):
        def loss(bound, batch, hp):
            jax.debug.callback(lambda: runs.append(term.name))
            return term.algorithm.loss(bound, batch, hp)

        module = types.SimpleNamespace(**vars(term.algorithm) | {"loss": loss})
        return term._replace(algorithm=module)

    found = {}
    for count in (1, 4):
        p = programs(tuple(counting(t) for t in terms), count)
        state = p.init_state(fresh(behaviour()))
        state, metrics = p.update(state, None, [chunk[0]], [chunk[1]], KEY)
        jax.effects_barrier()
        found[count] = (jax.tree.map(np.asarray, state.trainable), metrics, sorted(runs))
        runs.clear()
    assert_close(found[4][0], found[1][0], rtol=1e-5)
    whole, cut = ({k: float(v) for k, v in found[n][1].items()} for n in (1, 4))
    assert cut == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert found[1][2] == [t.name for t in terms]
    live = {t.name: ~prepared(t.name, METHODS[t.name])[-1] for t in terms}
    pieces_with_one = {name: -(-int(x.sum()) // (len(x) // 4)) for name, x in live.items()}
    assert pieces_with_one == {"diffu_grpo": 2, "dispo": 1}
    assert found[4][2] == [n for n, times in pieces_with_one.items() for _ in range(times)]


@pytest.mark.parametrize(("shards", "count"), [(1, 4), (2, 3), (4, 2), (2, 4)])
def test_idle_items_fill_the_last_pieces_of_every_shard(shards, count):
    rng = np.random.default_rng(0)
    idle = rng.random(24) < 0.5
    items = {"number": jnp.arange(24), "row": jnp.arange(48).reshape(24, 2)}
    out = pieces.idle_last(items, jnp.asarray(idle), count, shards)
    number = np.asarray(out["number"])
    np.testing.assert_array_equal(np.asarray(out["row"])[:, 0], 2 * number)
    own = 24 // shards
    for shard in range(shards):
        mine = number[shard * own : (shard + 1) * own]
        assert sorted(mine) == list(range(shard * own, (shard + 1) * own)), "none leaves its shard"
        cut = np.asarray(pieces.strided(jnp.asarray(mine), count))
        ordered = idle[cut].reshape(-1)
        assert (np.diff(ordered.astype(int)) >= 0).all(), "live first, piece by piece"


@pytest.mark.parametrize(("shards", "count"), [(1, 4), (2, 3), (4, 2), (1, 5)])
def test_items_without_a_needed_position_are_not_scored(shards, count):
    """What `prepare` reads of old and reference policies; with 5 pieces of 24 items all are."""
    rng, runs = np.random.default_rng(shards), []
    denoiser = models.bind(MODEL, fresh(behaviour()))

    def encode(tokens, valid, *_):
        jax.debug.callback(lambda: runs.append(len(tokens)))
        return denoiser.encode(tokens, valid)

    counting = denoiser._replace(encode=encode)
    in_pieces = pieces.in_pieces(counting, count, shards)
    args = [jnp.asarray(rng.integers(2, 9, (24, n))) for n in (3, 5)]
    args = [args[0], jnp.ones((24, 3), bool), args[1], jnp.asarray(rng.integers(2, 9, (24, 2, 5)))]
    needed = (rng.random((24, 5)) < 0.5) & (rng.random((24, 1)) < 0.4)
    got = jax.jit(lambda: state_log_prob(in_pieces, *args, jnp.asarray(needed)))()
    jax.effects_barrier()
    want = np.asarray(state_log_prob(denoiser, *args))
    read = np.broadcast_to(needed[:, None], want.shape)
    np.testing.assert_allclose(np.asarray(got)[read], want[read], atol=1e-6)
    live = needed.any(axis=1).reshape(shards, -1).sum(axis=1)
    most = count if 24 % count == 0 else 1
    size = 24 // shards // most
    assert len(runs) == min(most, max(-(-int(n) // size) for n in live))


def test_old_scores_of_ties_are_not_read():
    """Two inner updates: of 4 microbatches 2 have an advantage, and only they run, scores too."""
    runs = []

    class Counting(Programs):
        def policy(self, trainable, frozen):
            denoiser = super().policy(trainable, frozen)

            def encode(tokens, valid, *_):
                jax.debug.callback(lambda: runs.append(len(tokens)))
                return denoiser.encode(tokens, valid)

            return denoiser._replace(encode=encode)

    term = make_term("diffu_grpo", 1.0, METHODS["diffu_grpo"])
    chunk = tied(*scored(*programs((term,)).rollout(behaviour(), None, prompts(), 0, KEY)))
    found = {}
    for count in (1, 4):
        chain, mesh = optax.sgd(1.0), parallel.make_mesh()
        p = Counting(MODEL, (term,), SAMPLING, chain, mesh, GROUP, 2, count)
        state = p.update(p.init_state(fresh(behaviour())), None, [chunk[0]], [chunk[1]], KEY)[0]
        jax.effects_barrier()
        found[count] = (jax.tree.map(np.asarray, state.trainable), len(runs))
        runs.clear()
    assert found[1][1] == 2 * (1 + 1), "old and gradient, of each inner update"
    assert found[4][1] == 2 * (2 + 2)
    assert_close(found[4][0], found[1][0], rtol=1e-5)


def test_items_that_do_not_divide_stay_where_they_are():
    items = jnp.arange(6)
    out = pieces.idle_last(items, items % 2 == 0, 4, 1)
    np.testing.assert_array_equal(out, items)
