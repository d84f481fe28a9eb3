"""The two compiled programs: compiled once, and the same whatever the pieces."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import monitoring  # listeners can be removed there only
from tiny import assert_close

from dmrl import models, parallel
from dmrl.diffusion.sampler import Sampling
from dmrl.objective import make_term, needs
from dmrl.programs import Programs
from dmrl.types import HINT, TEMPLATE

MODEL = models.Config(
    vocab_size=9,
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    mlp_hidden_size=24,
    max_sequence_length=32,
    mask_token_id=0,
    eos_token_id=1,
    dtype="float32",
    param_dtype="float32",
    remat="none",
)
SAMPLING = Sampling(length=8, steps=4, block_length=4, temperature=1.0)
PROMPTS, GROUP, PROMPT_LENGTH = 4, 2, 3
ROWS = PROMPTS * GROUP
TERMS = (
    make_term("diffu_grpo", 1.0, {"beta": 0.0, "divide_by_std": True}),
    make_term("dispo", 0.5, {"beta": 0.0, "states": 2, "fillings": 3}),
)
KEY = jax.random.key(11)


@functools.cache
def programs(terms=TERMS, inner=1, pieces=1, optimizer=None):
    mesh = parallel.make_mesh()
    chain = optimizer or optax.adam(1e-2)
    return Programs(MODEL, terms, SAMPLING, chain, mesh, GROUP, inner, pieces)


@functools.cache
def variables():
    return jax.tree.map(np.asarray, models.init(MODEL, jax.random.key(0)))


def behaviour():
    """The weights as the programs take them."""
    return {"params": variables()["params"]}


def fresh(tree):
    """A copy: `update` consumes the state it is given."""
    return jax.tree.map(jnp.array, tree)


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 9, (PROMPTS, PROMPT_LENGTH)).astype(np.int32)
    valid = np.arange(PROMPT_LENGTH) >= rng.integers(0, 3, (PROMPTS, 1))
    template = rng.integers(2, 9, (PROMPTS, SAMPLING.length)).astype(np.int32)
    masked = rng.random(template.shape) < 0.7
    return tokens, valid, np.where(masked, 0, template).astype(np.int32)


def reward(tokens):
    """A reward that the host could give: the share of even tokens."""
    return np.mean(np.asarray(tokens) % 2 == 0, axis=-1, dtype=np.float32)


def scored(rollout, probes):
    return rollout._replace(reward=reward(rollout.tokens)), tuple(
        None if p is None else p._replace(reward=reward(p.fills)) for p in probes
    )


def sampled(p, chunks=1):
    """Scored rollout chunks, as a step makes them."""
    cut = [np.split(x, chunks) for x in prompts()]
    size = ROWS // chunks
    done = [
        p.rollout(behaviour(), None, tuple(x[i] for x in cut), i * size, KEY) for i in range(chunks)
    ]
    return tuple(zip(*(scored(*chunk) for chunk in done), strict=True))


def updated(p, chunks):
    state, metrics = p.update(p.init_state(fresh(behaviour())), None, *chunks, KEY)
    return jax.tree.map(np.asarray, state), {k: float(v) for k, v in metrics.items()}


def joined(chunks):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


def test_a_rollout_in_chunks_is_the_whole_rollout():
    whole, pieces = sampled(programs()), sampled(programs(), 2)
    for a, b in zip(whole, pieces, strict=True):
        a, b = joined(a), joined(b)
        for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
            if np.issubdtype(x.dtype, np.integer):
                np.testing.assert_array_equal(x, y, err_msg=str(path))
            else:
                np.testing.assert_allclose(x, y, atol=1e-5, err_msg=str(path))
    state, metrics = updated(programs(), whole)
    cut_state, cut_metrics = updated(programs(), pieces)
    assert_close(cut_state.trainable, state.trainable, rtol=1e-5)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_rows_of_a_group_differ_and_follow_the_key():
    (rollout,), _ = sampled(programs())
    tokens = np.asarray(rollout.tokens)
    assert np.asarray(rollout.row).tolist() == list(range(ROWS))
    assert np.asarray(rollout.group).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert any((tokens[i] != tokens[i + 1]).any() for i in range(0, ROWS, GROUP))
    other, _ = programs().rollout(behaviour(), None, prompts(), 0, jax.random.key(12))
    assert (np.asarray(other.tokens) != tokens).any()
    again, _ = programs().rollout(behaviour(), None, prompts(), 0, KEY)
    assert (np.asarray(again.tokens) == tokens).all()


@functools.cache
def gradients(pieces, inner, terms=TERMS):
    """Parameters after plain gradient steps of size 1: minus the gradient, if there is one step."""
    p = programs(terms, inner, pieces, _plain())
    rollouts, probes = sampled(programs())
    places = [[t.name for t in TERMS].index(term.name) for term in terms]
    own = tuple(tuple(chunk[i] for i in places) for chunk in probes)
    before = variables()["params"]
    state, metrics = updated(p, (rollouts, own))
    return jax.tree.map(np.subtract, before, state.trainable["params"]), metrics


@functools.cache
def _plain():
    return optax.sgd(1.0)


@pytest.mark.parametrize(
    ("pieces", "inner"),
    [(8, 1), (4, 3), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((2, 1), (2, 3)))],
)
def test_the_accumulated_gradient_is_the_full_one(pieces, inner):
    full, metrics = gradients(1, inner)
    cut, cut_metrics = gradients(pieces, inner)
    assert_close(cut, full, rtol=2e-5)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert metrics["grad_norm"] > 1e-3


def test_pieces_hold_unequal_numbers_of_tokens():
    """Else the test above could not tell a sum from a mean of means."""
    (rollout,), _ = sampled(programs())
    counted = np.sum(np.asarray(rollout.reveal_step) >= 0, axis=1)
    assert len({counted[i::4].sum() for i in range(4)}) > 1


def test_inner_updates_go_further_than_one():
    distance = [float(optax.tree.norm(gradients(1, inner)[0])) for inner in (1, 3)]
    assert distance[1] > 1.05 * distance[0]


def test_pieces_that_do_not_divide_the_items_are_refused():
    with pytest.raises(ValueError, match="microbatches=3 does not divide the 8 items of a term"):
        updated(programs(TERMS, 1, 3), sampled(programs()))


def test_nothing_compiles_after_the_first_step():
    p = programs(TERMS, 2, 2)
    compiled = []

    def listen(name, seconds, **kwargs):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    state = p.init_state(fresh(behaviour()))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for number in range(4):
            if number == 1:
                assert compiled, "the first step compiles: the listener must have heard it"
                compiled.clear()
            chunks = []
            for i in range(2):
                halves = tuple(x[2 * i : 2 * i + 2] for x in prompts(seed=number))
                key = jax.random.fold_in(KEY, number)
                chunk = p.rollout(state.trainable, None, halves, i * ROWS // 2, key)
                chunks.append(_put(p, *chunk))
            state, metrics = p.update(state, None, *zip(*chunks, strict=True), key)
            assert np.isfinite(jax.device_get(metrics["loss"]))
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert p._rollout._cache_size() == p._update._cache_size() == 1
    assert int(state.step) == 4


def _put(p, rollout, probes):
    rollout, probes = scored(rollout, probes)
    layout = parallel.batch_sharding(p.mesh)
    return rollout._replace(reward=jax.device_put(rollout.reward, layout)), tuple(
        None if x is None else x._replace(reward=jax.device_put(x.reward, layout)) for x in probes
    )


KL = (make_term("diffu_grpo", 1.0, {"beta": 0.5}), make_term("dispo", 1.0, {"beta": 0.25}))


def test_the_reference_is_the_policy_at_first_and_never_moves():
    """Of full fine-tuning; that of an adapter is tested in test_trainer.py."""
    assert "reference" in needs(KL)
    p, before = programs(KL), variables()["params"]
    frozen, state = fresh(before), p.init_state(fresh({"params": before}))
    kl = []
    for number in range(4):
        key = jax.random.fold_in(KEY, number)
        rollout, probes = scored(*p.rollout(state.trainable, frozen, prompts(), 0, key))
        state, metrics = p.update(state, frozen, [rollout], [probes], key)
        kl.append((float(metrics["kl"]), float(metrics["dispo/kl"])))
    assert kl[0] == (0.0, 0.0)
    assert all(a > 0 and b > 0 for a, b in kl[1:])
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(now, was)
    assert np.any(np.asarray(state.trainable["params"]["head"]) != before["head"])


def test_without_a_penalty_there_is_no_reference():
    assert "reference" not in needs(TERMS)
    _, metrics = updated(programs(), sampled(programs()))
    assert not [name for name in metrics if "kl" in name]


def test_terms_are_weighted_and_their_metrics_told_apart():
    both, metrics = gradients(1, 1)
    grpo, _ = gradients(1, 1, TERMS[:1])
    dispo, alone = gradients(1, 1, (TERMS[1]._replace(weight=1.0),))
    assert_close(both, jax.tree.map(lambda a, b: a + 0.5 * b, grpo, dispo))
    assert metrics["dispo/clip_ratio/region_mean"] == alone["clip_ratio/region_mean"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("diffugrpo", {}, r"no algorithm 'diffugrpo'; did you mean 'diffu_grpo'\?"),
        ("surrogate", {}, "no algorithm 'surrogate'"),
        ("dispo", {"filling": 2}, r"dispo has no option 'filling'; did you mean 'fillings'\?"),
        ("dispo", {"state_law": "last"}, "state_law='last': choose one of"),
        ("diffu_grpo", {"beta": -1.0}, "beta=-1.0 must be >= 0"),
    ],
)
def test_terms_that_cannot_be_made(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_term(name, 1.0, options)


def phased(ema=0.0):
    mesh = parallel.make_mesh()
    return Programs(MODEL, TERMS[:1], SAMPLING, optax.adam(1e-2), mesh, GROUP, phases=True, ema=ema)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_phase_ends_by_making_its_average_the_teacher_and_restarting_adam(ema):
    p = phased(ema)
    state = p.init_state(fresh(behaviour()))
    start = fresh(state.teacher)
    for number in range(2):
        key = jax.random.fold_in(KEY, number)
        done, _ = p.rollout(state.teacher, None, prompts(), 0, key)
        done = done._replace(reward=reward(done.tokens))
        state, _ = p.update(state, None, [done], [(None,)], key)
    for was, now in zip(jax.tree.leaves(start), jax.tree.leaves(state.teacher), strict=True):
        np.testing.assert_array_equal(now, was)
    student, average = fresh(state.trainable), fresh(state.ema) if ema else None
    moved = np.abs(np.asarray(student["params"]["head"] - start["params"]["head"])).max()
    assert moved > 1e-3
    state = p.next_phase(state)
    best = average if ema else student
    for tree in (state.trainable, state.teacher):
        for want, got in zip(jax.tree.leaves(best), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(got, want)
    if average is not None:
        behind = np.abs(np.asarray(student["params"]["head"] - average["params"]["head"])).max()
        assert 0 < behind < moved
    assert int(state.opt_state[0].count) == 0
    assert int(state.step) == 2


def test_in_a_phase_the_ratio_is_to_the_teacher():
    p = phased()
    state = p.init_state(fresh(behaviour()))
    done, _ = p.rollout(state.teacher, None, prompts(), 0, KEY)
    done = done._replace(reward=reward(done.tokens))
    losses = []
    for _ in range(2):
        state, metrics = p.update(state, None, [done], [(None,)], KEY)
        losses.append(float(metrics["loss"]))
    assert losses[1] < losses[0] - 1e-4, "the same data and masks: the ratio has moved from 1"


def test_inpainting_keeps_the_hints_and_samples_the_rest():
    p = programs()
    done, _ = p.rollout(behaviour(), None, prompts(), 0, KEY)
    tokens, reveal = np.asarray(done.tokens), np.asarray(done.reveal_step)
    rng = np.random.default_rng(3)
    wanted = rng.random(tokens.shape) < 0.4
    hints = np.where(wanted, rng.integers(2, 9, tokens.shape), 0).astype(np.int32)
    again = p.inpaint(behaviour(), None, done, hints, jax.random.key(77))
    hinted = wanted & (reveal >= 0)
    assert hinted.any()
    assert (wanted & (reveal == TEMPLATE)).any(), "some hints fall on the template: ignored"
    np.testing.assert_array_equal(np.asarray(again.reveal_step) == HINT, hinted)
    np.testing.assert_array_equal(np.asarray(again.tokens)[hinted], hints[hinted])
    np.testing.assert_array_equal(np.asarray(again.reveal_step) == TEMPLATE, reveal == TEMPLATE)
    fixed = reveal == TEMPLATE
    np.testing.assert_array_equal(np.asarray(again.tokens)[fixed], tokens[fixed])
    assert np.all(np.asarray(again.tokens) != MODEL.mask_token_id)
    np.testing.assert_array_equal(again.row, done.row)


def test_matrices_in_the_compute_type_have_the_gradient_of_the_stored_ones():
    half = dataclasses.replace(MODEL, dtype="bfloat16", n_layers=2)
    stored = {"params": models.init(half, KEY)["params"]}
    read = models.in_compute_type(half, stored)
    is_half = jax.tree.map(lambda x: x.dtype == jnp.bfloat16, read["params"])
    assert all(is_half["blocks"]["attn"][n]["kernel"] for n in ("q_proj", "attn_out"))
    assert not any((is_half["head"], is_half["embedding"], is_half["blocks"]["ff_norm"]["scale"]))
    tokens = jax.random.randint(KEY, (ROWS, 9), 2, 9)

    @jax.jit
    def gradient(variables):
        def value(variables):
            denoiser = models.bind(half, variables)
            hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))
            return jnp.mean(denoiser.log_prob(hidden, tokens[..., None]))

        return jax.grad(value)(variables)

    got, want = gradient(read), gradient(stored)
    assert got["params"]["blocks"]["attn"]["q_proj"]["kernel"].dtype == jnp.bfloat16
    # The compiler may leave out the rounding of a product that is widened at once.
    assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), got), want, rtol=2**-8)


def test_an_update_of_whole_weights_holds_one_sum_and_one_gradient():
    """Beside the state, whose place the new one takes; a branch around a microbatch took a third,
    two terms at once a fourth."""
    model = dataclasses.replace(
        MODEL, d_model=128, n_layers=8, n_heads=4, n_kv_heads=4, mlp_hidden_size=512, remat="full"
    )
    mesh = parallel.make_mesh()
    p = Programs(model, TERMS, SAMPLING, optax.adamw(1e-3), mesh, GROUP, 1, microbatches=4)
    state = p.init_state({"params": models.init(model, KEY)["params"]})
    rollouts, probes = sampled(programs())
    program = p.trace_update(state, None, rollouts, probes, KEY).lower().compile()
    weights = sum(x.nbytes for x in jax.tree.leaves(state.trainable))
    assert program.memory_analysis().temp_size_in_bytes < 2.5 * weights
