"""Rules of decoding: what each promises, on models small enough to check by hand."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import softmax
from test_sampler import draw, watched

from dmrl import models
from dmrl.diffusion import order, schedule
from dmrl.diffusion.probe import state_at
from dmrl.diffusion.rules import rule
from dmrl.diffusion.sampler import Sampling
from dmrl.types import TEMPLATE

M = tiny.MASK
EIGHT = jnp.full((8,), M)


def laws(bind, params, prompt, states):
    """[N,L,V] probabilities of every state, in float64."""
    denoiser = bind(params)
    tokens = jnp.concatenate([jnp.broadcast_to(prompt, (len(states), 2)), states], axis=1)
    hidden = denoiser.encode(tokens, jnp.ones(tokens.shape, bool))[:, 2:]
    return softmax(np.asarray(denoiser.logits(hidden), np.float64)[..., :M], axis=-1)


SURENESS = {
    "low_confidence": lambda p: p.max(-1),
    "margin": lambda p: np.sort(p, -1)[..., -1] - np.sort(p, -1)[..., -2],
    "entropy": lambda p: (p * np.log(p)).sum(-1),
}


@pytest.mark.parametrize("name", SURENESS)
def test_the_surest_position_by_each_measure_goes_first(name):
    params, prompt, bind = tiny.perceptron(8)
    out = draw(bind(params), prompt, EIGHT, Sampling(8, 8, 8, order=name))
    state, orders = np.full((1, 8), M), set()
    for step in range(8):
        p = laws(bind, params, prompt, jnp.asarray(state))[0]
        for measure in SURENESS:
            sure = np.where(state[0] == M, SURENESS[measure](p), -np.inf)
            orders.add((measure, step, int(sure.argmax())))
            if measure == name:
                best = int(sure.argmax())
        assert int(out.reveal_step[0, best]) == step
        state[0, best] = p[best].argmax()
    np.testing.assert_array_equal(out.tokens, state)
    assert len({o[1:] for o in orders}) > 8, "the measures never disagree: the test is blind"


def first_positions(spec, rows=20_000):
    params, prompt, bind = tiny.perceptron(8)
    out = draw(bind(params), prompt, EIGHT, Sampling(8, 8, 8, order=spec), rows=rows)
    confidence = laws(bind, params, prompt, EIGHT[None])[0].max(-1)
    return np.argmin(np.asarray(out.reveal_step), axis=1), confidence


def test_softmax_confidence_draws_its_law():
    chosen, confidence = first_positions("softmax_confidence:0.1")
    law = dict(enumerate(softmax(confidence / 0.1)))
    assert tiny.chi_square(chosen.tolist(), law) > 1e-3
    flat, _ = first_positions("softmax_confidence:0.1,vocabulary")
    params, prompt, bind = tiny.perceptron(8)
    p = laws(bind, params, prompt, EIGHT[None])[0]
    weight = np.exp(np.concatenate([p, np.zeros((8, 1))], axis=1) / 0.1).sum(-1)  # MASK has p 0
    assert tiny.chi_square(flat.tolist(), dict(enumerate(weight / weight.sum()))) > 1e-3


def test_top_k_is_uniform_among_the_k_most_confident_and_never_leaves_them():
    chosen, confidence = first_positions("top_k:3")
    inside = np.argsort(-confidence)[:3]
    assert tiny.chi_square(chosen.tolist(), dict.fromkeys(inside.tolist(), 1 / 3)) > 1e-3
    params, prompt, bind = tiny.perceptron(8)
    out = draw(bind(params), prompt, EIGHT, Sampling(8, 2, 8, order="top_k:3"), rows=500)
    early = Counter(np.nonzero(np.asarray(out.reveal_step) == 0)[1].tolist())
    assert set(early) == set(np.argsort(-confidence)[:4].tolist()), "the fourth goes by confidence"


def test_eoser_weighs_an_eos_alone_and_less_from_step_to_step():
    rows, shape = 2, (2, 3)
    look = order.Look(
        measured=jnp.log(jnp.full(shape, 0.5)),
        proposal=jnp.array([[9, 1, 9], [1, 1, 9]]),
        masked=jnp.ones(shape, bool),
        progress=jnp.array([0.0, 0.5]),
        keys=jax.random.split(jax.random.key(0), rows),
        eos_id=9,
    )
    got = np.exp(order.Eoser(0.2, 1.0).score(look))
    np.testing.assert_allclose(got, [[0.1, 0.5, 0.1], [0.5, 0.5, 0.3]], rtol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "linear", "cosine", "doubling"])
def test_a_fixed_schedule_reveals_every_mask_once(name):
    made = schedule.SCHEDULES[name]()
    for masked in range(20):
        for steps in range(1, 12):
            counts = made.counts(masked, steps)
            assert len(counts) == steps
            assert sum(counts) == masked
            assert min(counts) >= 0
    if name == "cosine":
        assert made.counts(64, 8) == sorted(made.counts(64, 8))
        assert made.counts(64, 8)[0] < 8 < made.counts(64, 8)[-1]


def test_doubling_has_the_published_blocks():
    blocks = schedule.Doubling(4).layout(128)
    assert [(b.size, b.steps) for b in blocks] == [(15, 4), (16, 1), (32, 1), (65, 1)]
    assert [b.start for b in blocks] == [0, 15, 31, 63]
    assert schedule.Doubling().counts(256, 8) == [1, 2, 4, 8, 16, 32, 64, 129]


def test_a_threshold_reveals_what_is_sure_and_at_least_the_surest():
    params, prompt, bind = tiny.perceptron(8)
    template = jnp.array([M, M, 1, M, M, M, M, M])
    config = Sampling(8, 8, 4, schedule="threshold:0.6")
    out = draw(bind(params), prompt, template, config)
    state, step = np.array(template)[None].copy(), 0
    for start in (0, 4):
        while (state[0, start : start + 4] == M).any():
            p = laws(bind, params, prompt, jnp.asarray(state))[0]
            open_ = (np.arange(8) // 4 == start // 4) & (state[0] == M)
            sure = np.where(open_, p.max(-1), -1)
            chosen = open_ & ((sure >= 0.6) | (np.arange(8) == sure.argmax()))
            np.testing.assert_array_equal(np.asarray(out.reveal_step[0]) == step, chosen)
            state[0, chosen] = p.argmax(-1)[chosen]
            step += 1
    np.testing.assert_array_equal(out.tokens, state)
    assert 2 < step < 7
    assert int(out.reveal_step[0, 2]) == TEMPLATE


ADAPTIVE = ("threshold:0.6", "entropy_bound:0.4")


@pytest.mark.parametrize("spec", ADAPTIVE)
def test_rows_of_an_adaptive_schedule_do_not_see_each_other(spec):
    params, prompt, bind = tiny.perceptron(8)
    config = Sampling(8, 8, 4, 1.0, schedule=spec)
    template = jnp.where(jnp.arange(16)[:, None] % 3 == 0, 1, jnp.full((16, 8), M))
    template = template.at[:, 5:].set(M)
    prompts = jnp.broadcast_to(prompt, (16, 2))
    whole = draw(bind(params), prompts, template, config)
    assert len(set(np.asarray(whole.reveal_step).max(axis=1).tolist())) > 2
    some = jnp.array([11, 3, 6])
    part = draw(bind(params), prompts[some], template[some], config, row=some)
    for name in ("tokens", "reveal_step"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[some])


def test_states_of_an_adaptive_schedule_are_rebuilt_by_each_row_s_own_clock():
    params, prompt, bind = tiny.perceptron(8)
    config, seen = Sampling(8, 8, 4, 1.0, schedule="threshold:0.6"), []
    out = draw(watched(bind(params), seen), prompt, EIGHT, config, rows=1, key=3)
    jax.effects_barrier()
    steps = jnp.arange(len(seen))[None]
    assert int(out.reveal_step.max()) + 1 == len(seen) < 8
    rebuilt = np.asarray(state_at(out, steps, M))[0]
    for step, tokens in enumerate(seen):
        np.testing.assert_array_equal(rebuilt[step], tokens[0, 2:])


def test_an_entropy_bound_takes_the_surest_while_the_rest_of_the_sum_allows():
    params, prompt, bind = tiny.perceptron(8)
    p = laws(bind, params, prompt, EIGHT[None])[0]
    entropy = -(p * np.log(p)).sum(-1)
    for nats in (0.0, 0.3, 1.0, 2.0, 100.0):
        config = Sampling(8, 8, 8, order="entropy", schedule=f"entropy_bound:{nats}")
        out = draw(bind(params), prompt, EIGHT, config)
        ordered = np.sort(entropy)
        spent = np.cumsum(ordered) - ordered  # the largest so far left out
        expected = np.argsort(entropy)[: int((spent <= nats).sum())]
        first = np.nonzero(np.asarray(out.reveal_step[0]) == 0)[0]
        assert set(first.tolist()) == set(expected.tolist())
    assert len(first) == 8


def test_steps_bound_an_adaptive_schedule():
    params, prompt, bind = tiny.perceptron(8)
    config = Sampling(8, 4, 4, 1.0, schedule="threshold:1.0")
    out = draw(bind(params), prompt, EIGHT, config, rows=50)
    assert (np.asarray(out.reveal_step) < 4).all()
    assert not (np.asarray(out.tokens) == M).any()


def remasked(spec, rows=200, steps=8, block=8, **options):
    params, prompt, bind = tiny.perceptron(8)
    template = jnp.array([M, 1, *[M] * 6])
    config = Sampling(8, steps, block, options.pop("temperature", 1.0), remask=spec)
    return draw(bind(params), prompt, template, config, rows=rows, **options), template


@pytest.mark.parametrize(("spec", "block"), [("rcr", 8), ("rcr", 4), ("remdm:0.5", 8)])
def test_remasking_follows_the_schedule_and_keeps_every_state(spec, block):
    out, template = remasked(spec, block=block)
    states = np.asarray(out.states)
    assert states.shape == (200, 9, 8)
    left = (states == M).sum(-1)
    whole = {8: [7, 6, 5, 4, 3, 2, 1, 0, 0], 4: [7, 6, 5, 4, 4, 3, 2, 1, 0]}
    np.testing.assert_array_equal(left, np.broadcast_to(whole[block], left.shape))
    np.testing.assert_array_equal(states[:, 0], np.broadcast_to(template, (200, 8)))
    np.testing.assert_array_equal(states[:, -1], out.tokens)
    assert (states[:, :, 1] == 1).all(), "the template is never masked"
    again = (states[:, 1:] == M) & (states[:, :-1] != M)
    assert again.any()
    last = 8 - np.argmax((states == M)[:, ::-1], axis=1)  # the step that saw the last mask
    free = np.asarray(template) == M
    np.testing.assert_array_equal(np.asarray(out.reveal_step)[:, free], last[:, free])
    if spec == "rcr" and block == 4:
        assert again[:, 4:, :4].any(), "tokens of an earlier block are masked again"
    if spec.startswith("remdm"):
        early = again[:, 1:3].sum() / (states[:, 1:3] != M)[..., free].sum()
        assert 0.4 < early < 0.6, "each revealed token with probability eta"


def test_rcr_keeps_the_larger_confidence_of_a_position():
    kept, _ = remasked("rcr:max", steps=4)
    last, _ = remasked("rcr:last", steps=4)
    assert not np.array_equal(kept.states, last.states)
    greedy = {"rows": 1, "steps": 4, "temperature": 0.0}
    for spec in ("rcr:max", "rcr:last"):
        out, _ = remasked(spec, **greedy)
        assert not (np.asarray(out.tokens) == M).any()


def test_drafts_of_a_sampler_that_remasks_hold_what_was_revealed():
    out, _ = remasked("rcr", drafts=True)
    plain, _ = remasked("rcr")
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    states, drafts = np.asarray(out.states), np.asarray(out.drafts)
    shown = states[:, 1:] != M
    np.testing.assert_array_equal(states[:, 1:][shown], drafts[shown])


@pytest.mark.parametrize("spec", ["rcr", "remdm:0.5"])
def test_rows_of_a_sampler_that_remasks_do_not_see_each_other(spec):
    """Where a row's schedule reveals nothing, others may; alone, it would skip the step."""
    params, prompt, bind = tiny.perceptron(8)
    config = Sampling(8, 8, 8, 1.0, schedule="linear", remask=spec)
    few, many = jnp.full((8,), 1).at[jnp.array([0, 5])].set(M), EIGHT
    template = jnp.where(jnp.arange(40)[:, None] % 2 == 0, few[None], many[None])
    whole = draw(bind(params), prompt, template, config, rows=40)
    some = jnp.arange(0, 40, 2)
    alone = draw(bind(params), prompt, few, config, rows=20, row=some)
    for name in ("tokens", "reveal_step", "states", "log_prob"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(whole, name)[some])
    drafted = draw(bind(params), prompt, few, config, rows=20, row=some, drafts=True)
    np.testing.assert_array_equal(drafted.states, alone.states)


def test_a_group_that_starts_alike_shares_the_first_step_also_when_it_remasks():
    alone, _ = remasked("rcr", rows=6)
    shared, _ = remasked("rcr", rows=6, group_size=3)
    for name in ("tokens", "states", "reveal_step"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(alone, name))


@pytest.fixture(scope="module")
def llada(golden_dir):
    cfg, params = tiny.llada(golden_dir / "tiny_llada_gqa")
    return dataclasses.replace(cfg, remat="none"), params


def padded(cfg, rows):
    """Prompts of several lengths, a template that gives some tokens."""
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(0, 500, (rows, 6)), jnp.int32)
    valid = jnp.arange(6)[None] >= jnp.arange(rows)[:, None] % 4
    template = jnp.full((rows, 16), cfg.mask_token_id).at[:, 3].set(7)
    return prompt, valid, template


@pytest.mark.parametrize("kind", [pytest.param("prefix", marks=pytest.mark.slow), "dual"])
def test_a_cache_that_is_always_fresh_is_exact(llada, kind):
    cfg, params = llada
    denoiser = models.bind(cfg, {"params": params})
    prompt, valid, template = padded(cfg, 5)
    for schedule_ in ("uniform", "threshold:0.3"):
        plain = Sampling(16, 8, 8, 0.7, schedule=schedule_)
        fresh, stale = (dataclasses.replace(plain, cache=f"{kind}:{n}") for n in (1, 4))
        exact = draw(denoiser, prompt, template, plain, valid=valid)
        out = draw(denoiser, prompt, template, fresh, valid=valid)
        for name in ("tokens", "reveal_step", "log_prob", "entropy"):
            np.testing.assert_array_equal(getattr(out, name), getattr(exact, name), name)
        drifted = draw(denoiser, prompt, template, stale, valid=valid)
        assert not np.allclose(drifted.log_prob, exact.log_prob, atol=1e-4)
        same = (np.asarray(drifted.reveal_step) == 0) & (np.asarray(exact.reveal_step) == 0)
        np.testing.assert_allclose(drifted.log_prob[same], exact.log_prob[same], atol=1e-5)
        assert same.any(), "the first step reads everything"


@pytest.mark.parametrize("kind", ["prefix:2", "dual:2", "dual"])
def test_rows_of_a_cached_batch_do_not_see_each_other(llada, kind):
    cfg, params = llada
    denoiser = models.bind(cfg, {"params": params})
    prompt, valid, template = padded(cfg, 6)
    config = Sampling(16, 8, 8, 0.7, schedule="threshold:0.3", cache=kind)
    whole = draw(denoiser, prompt, template, config, valid=valid)
    some = jnp.array([4, 1])
    part = draw(denoiser, prompt[some], template[some], config, valid=valid[some], row=some)
    np.testing.assert_array_equal(part.tokens, whole.tokens[some])
    np.testing.assert_array_equal(part.reveal_step, whole.reveal_step[some])


@pytest.mark.parametrize("window", [(4, 8), (9, 3)])
def test_an_extended_window_with_its_own_tokens_is_the_window(llada, window):
    """With nothing changed since, the stored keys and values are the fresh ones."""
    cfg, params = llada
    denoiser = models.bind(cfg, {"params": params})
    prompt, valid, template = padded(cfg, 3)
    tokens = jnp.concatenate([prompt, template], axis=1)
    seen = jnp.concatenate([valid, jnp.ones(template.shape, bool)], axis=1)
    start, width = jnp.int32(window[0]), window[1]
    hidden, store = denoiser.cached.prefill(tokens, seen, start, width)
    np.testing.assert_allclose(hidden, denoiser.window(tokens, seen, start, width), atol=1e-6)
    again = denoiser.cached.extend(tokens, seen, store, start, width)
    shown = np.asarray(seen[:, window[0] : window[0] + width])
    np.testing.assert_allclose(again[shown], hidden[shown], atol=2e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": "top_k:0"}, "order='top_k:0': k=0 must be at least 1"),
        ({"order": "margins"}, "did you mean 'margin'"),
        ({"order": "margin:1"}, "margin has these options: none"),
        ({"order": "top_k:x"}, "k='x' is no int; the default is 5"),
        ({"order": "softmax_confidence:0"}, "tau=0.0 must be > 0"),
        ({"order": "eoser:0"}, r"must be in \(0, 1\]"),
        ({"schedule": "threshold:1.5"}, "at=1.5 must be a probability"),
        ({"schedule": "entropy_bound:-1"}, "nats=-1.0"),
        ({"schedule": "doubling"}, "set block_length=12 and steps=3, not 4 and 6"),
        ({"schedule": "doubling:9", "block_length": 12, "steps": 3}, "make 1 to 3 blocks"),
        ({"remask": "rcr:least"}, "choose max or last"),
        ({"remask": "remdm:2"}, "eta=2.0 must be a probability"),
        ({"remask": "rcr", "order": "random"}, "scores at random"),
        ({"remask": "rcr", "schedule": "threshold"}, "how many masks are left"),
        ({"cache": "full"}, "cache='full': choose one of none, prefix, dual"),
        ({"cache": "dual:3"}, r"every n of the 2 steps of a block; choose n from \[1, 2\]"),
        ({"cache": "dual:x"}, "must be refreshed every n"),
        ({"cache": "none:2"}, "cache='none:2': there is nothing to refresh"),
        ({"cache": "dual", "remask": "rcr"}, "does not go with remask='rcr'"),
        ({"cache": "dual", "cfg_scale": 1.0}, "does not go with cfg_scale=1.0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_said(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**({"length": 12, "steps": 6, "block_length": 4} | values))


def test_what_the_model_or_the_call_excludes_is_refused():
    params, prompt, bind = tiny.perceptron(8)
    with pytest.raises(ValueError, match="this model has no cache"):
        draw(bind(params), prompt, EIGHT, Sampling(8, 8, 4, cache="dual"))
    with pytest.raises(ValueError, match="may take an EOS back"):
        draw(bind(params), prompt, EIGHT, Sampling(8, 8, 4, remask="rcr"), stop_at_eos=True)
    config = Sampling(8, 8, 4, schedule="threshold")
    with pytest.raises(ValueError, match="choose a fixed schedule"):
        draw(bind(params), prompt, EIGHT, config, drafts=True)


@pytest.mark.parametrize("spec", ADAPTIVE)
def test_an_adaptive_schedule_that_stops_at_eos_is_the_same_up_to_it(spec):
    params, prompt, bind = tiny.perceptron(8, eos=2)
    config = Sampling(8, 8, 2, 1.0, schedule=spec)
    whole = draw(bind(params), prompt, EIGHT, config, rows=100)
    out = draw(bind(params), prompt, EIGHT, config, rows=100, stop_at_eos=True)
    np.testing.assert_array_equal(out.length, whole.length)
    upto = np.arange(8)[None] < np.asarray(whole.length)[:, None]
    np.testing.assert_array_equal(np.asarray(out.tokens)[upto], np.asarray(whole.tokens)[upto])
    assert (np.asarray(out.reveal_step) == 8).any(), "something was left out"


def test_a_nucleus_keeps_the_fewest_tokens_that_hold_the_mass():
    params, prompt, bind = tiny.perceptron(8)
    p = laws(bind, params, prompt, EIGHT[None])[0]
    out = draw(bind(params), prompt, EIGHT, Sampling(8, 1, 8, 1.0, "random", top_p=0.7), rows=9_000)
    for position in range(8):
        ordered = np.argsort(-p[position])
        kept = ordered[: int((np.cumsum(p[position][ordered]) < 0.7).sum()) + 1]
        drawn = np.asarray(out.tokens)[:, position].tolist()
        assert set(drawn) == set(kept.tolist())
        law = {int(v): p[position][v] / p[position][kept].sum() for v in kept}
        if len(law) > 1:
            assert tiny.chi_square(drawn, law) > 1e-4


def test_a_rule_is_named_with_its_values():
    assert rule("order", "top_k:7", order.ORDERS) == order.TopK(7)
    assert rule("order", "eoser:0.1", order.ORDERS) == order.Eoser(0.1, 1.0)
    assert rule("order", "margin", order.ORDERS) == order.Margin()
