"""EGSPO: the authors' numbers, the exact policy gradient of a tiny process, its baseline."""

import dataclasses
import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models
from dmrl.algorithms import egspo
from dmrl.diffusion import divergence, exact
from dmrl.diffusion.guidance import tempered
from dmrl.diffusion.likelihood import POSITIONS, completion_hidden, state_log_prob
from dmrl.diffusion.order import entropy_of
from dmrl.diffusion.probe import fill, state_at
from dmrl.diffusion.sampler import Sampling
from dmrl.types import TEMPLATE, Denoiser, Models, Probe

M, KEY = tiny.MASK, jax.random.key(5)


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def batch_of(bind, params, rollout, probe, hp, old=None, reference=None):
    trio = Models(bind(params), *(None if p is None else bind(p) for p in (old, reference)))
    return egspo.prepare(trio, rollout, probe, KEY, tiny.INNER, hp)


def binder(cfg):
    return lambda params: models.bind(cfg, {"params": params}, keep_mask=True)


def recorded_rollout(tensors, case, name, cfg):
    """(rollout, its probe with all K states) of one recorded batch."""
    path, length = tensors[f"{name}/trajectory_ids"], case["gen_len"]
    prompt, states = path[0, :, :-length], path[:, :, -length:]
    reveal = jnp.sum(states == cfg.mask_token_id, axis=0) - 1
    reward = tensors[f"{name}/rewards_per_step"]
    rollout = tiny.rollout(states[-1], reveal, prompt, reward[:, -1], eos=cfg.eos_token_id)
    step = tensors[f"{name}/eval_time_steps"]
    state = state_at(rollout, step, cfg.mask_token_id)
    for k in range(step.shape[1]):
        np.testing.assert_array_equal(state[:, k], states[step[:, k], jnp.arange(len(step))])
    return rollout, Probe(step, state, state[:, :, None], reward[:, :-1, None])


def recorded_hyper(case, **changes):
    values = {
        "states": case["logps_eval_num_steps"],
        "selection": {"high_entropy": "entropy", "uniform": "uniform"}[case["mode"]],
        "lam": case["lambda1"],
        "normalize": case["normalize_returns"],
        "baseline": "reward" if case["standard_grpo_returns"] else "return",
        "aggregate": case["agg"],
        "epsilon": case["epsilon"],
        "epsilon_high": case["epsilon_high"],
        "beta": case["beta"],
        "kl": "exact" if case["exact"] else "k3",
    }
    return egspo.Hyper(**(values | changes))


def egspo_cases(cases):
    return {n: c for n, c in cases.items() if n.startswith("egspo/") and "loss" not in n}


def test_golden_advantages_and_evenly_spaced_steps(recorded_more):
    tensors, cases, cfg, params = recorded_more
    bind = binder(cfg)
    assert len(egspo_cases(cases)) == 3
    for name, case in egspo_cases(cases).items():
        rollout, probe = recorded_rollout(tensors, case, name, cfg)
        hp = recorded_hyper(case, beta=0.0)
        batch = batch_of(bind, params, rollout, probe, hp)
        want = tensors[f"{name}/advantages_per_step"]
        np.testing.assert_allclose(batch.advantage.reshape(want.shape), want, atol=1e-6)
        if hp.selection == "uniform":
            plan = egspo.probes(rollout, KEY, hp)
            np.testing.assert_array_equal(plan.step, probe.step)


def test_golden_steps_of_high_entropy(recorded_more):
    tensors, cases, cfg, params = recorded_more
    policy = models.bind(cfg, {"params": params}, keep_mask=True)

    @jax.jit
    def entropy(rollout):
        """Of every token when revealed. The model that drew them is not recorded: this is near."""
        steps = jnp.broadcast_to(jnp.arange(16), (4, 16))
        states = state_at(rollout, steps, cfg.mask_token_id).reshape(64, -1)
        prompt = jnp.repeat(rollout.prompt, 16, axis=0)
        hidden = completion_hidden(policy, prompt, jnp.ones(prompt.shape, bool), states)
        found = entropy_of(jax.nn.log_softmax(policy.logits(hidden))).reshape(4, 16, -1)
        return jnp.take_along_axis(found, rollout.reveal_step[:, None], axis=1)[:, 0]

    shared = []
    for name, case in egspo_cases(cases).items():
        if case["mode"] == "high_entropy":
            rollout, probe = recorded_rollout(tensors, case, name, cfg)
            rollout = rollout._replace(entropy=entropy(rollout))
            steps = egspo.probes(rollout, KEY, recorded_hyper(case)).step.tolist()
            pairs = zip(steps, probe.step.tolist(), strict=True)
            shared += [len(set(ours) & set(theirs)) for ours, theirs in pairs]
    assert len(shared) == 8
    assert sum(shared) >= 29, "of 32; by chance 8"


def recorded_rows(tensors, name, k, rollout):
    """[B,P+L,V]: the recorded log-probabilities at the positions that step k revealed."""
    log_p = np.asarray(tensors[f"{name}/ref_all_tokens_logps"][k])
    rows = np.zeros((*np.concatenate([rollout.prompt, rollout.tokens], 1).shape, log_p.shape[-1]))
    step = np.asarray(tensors[f"{name}/eval_time_steps"])[:, k]
    for b, t in enumerate(step):
        revealed = np.flatnonzero(np.asarray(rollout.reveal_step)[b] == t)
        rows[b, rollout.prompt.shape[1] + revealed] = log_p[b]
    return jnp.asarray(rows, jnp.float32)


def test_golden_loss_gradient_and_metrics(recorded_more):
    tensors, cases, cfg, params = recorded_more
    bind = binder(cfg)
    score = jax.jit(lambda params, batch: state_log_prob(bind(params), *batch[:4]))
    for name, case in egspo_cases(cases).items():
        rollout, probe = recorded_rollout(tensors, case, name, cfg)
        per_step = case["gen_len"] // case["diffusion_steps"]
        tokens = per_step if case["agg"] == "sum" else 1
        hp, states = recorded_hyper(case), case["logps_eval_num_steps"]
        every = batch_of(bind, params, rollout, probe, dataclasses.replace(hp, beta=0.0))
        every = every._replace(weight=states * every.weight)  # theirs sees one step at a time

        @jax.jit
        def gradient(params, batch, rows, hp=hp):
            def objective(params):
                policy = bind(params)
                frozen = Denoiser(lambda *_: rows, lambda h: h, None, cfg.mask_token_id, -1)
                return egspo.loss(Models(policy, None, frozen), batch, hp)

            return jax.value_and_grad(objective, has_aux=True)(params)

        for k in range(states):
            batch = jax.tree.map(lambda x, k=k, n=states: x[k::n], every)
            counted = batch.weight > 0
            log_prob = score(params, batch)
            got = jnp.sum(jnp.where(counted, log_prob, 0), axis=(1, 2)) / (per_step / tokens)
            np.testing.assert_allclose(got, tensors[f"{name}/cur_logps"][k], atol=1e-4)

            def spread(recorded, counted=counted, tokens=tokens):
                return jnp.where(counted, recorded[:, None, None] / tokens, 0.0)

            exact_kl = hp.kl == "exact"
            batch = batch._replace(old=spread(tensors[f"{name}/old_logps"][k]))
            if hp.beta and not exact_kl:
                batch = batch._replace(reference=spread(tensors[f"{name}/ref_logps"][k]))
            rows = recorded_rows(tensors, name, k, rollout) if exact_kl else None
            (loss, metrics), grad = gradient(params, batch, rows)
            want = cases[f"{name}/loss_k{k}"]
            assert float(loss) == pytest.approx(want["loss"], rel=1e-4), (name, k)
            if want["kl"] is not None:
                scale = 1 if exact_kl else tokens  # they divide by n the exact one alone
                assert float(metrics["kl"]) * scale == pytest.approx(want["kl"], rel=1e-4)
            rho = jnp.exp(tensors[f"{name}/cur_logps"][k] - tensors[f"{name}/old_logps"][k])
            outside = np.mean((rho > 1 + hp.epsilon_high) | (rho < 1 - hp.epsilon))
            # Theirs compares loss1 < loss2, which is where the clip is NOT active.
            both = float(metrics["clip_ratio/region_mean"]) + want["clip_ratio"]
            assert both == pytest.approx(float(outside), abs=1e-6), (name, k)
            goldens.assert_gradient(grad, want, tensors, f"{name}/loss_k{k}")


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def evaluated(bind, params, batch, hp, reference=None):
    """((loss, metrics), gradient)."""
    frozen = None if reference is None else bind(reference)

    def objective(params):
        return egspo.loss(Models(bind(params), None, frozen), batch, hp)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient(bind, params, batch, hp, reference=None):
    return evaluated(bind, params, batch, hp, reference)[1]


@functools.partial(jax.jit, static_argnames=("bind", "hp"))
def probed(bind, params, rollout, hp):
    probe = fill(bind(params), rollout, egspo.probes(rollout, KEY, hp), KEY)
    return probe._replace(reward=tiny.reward_of(probe.fills))


@functools.cache
def process():
    """All outcomes of a random-order sampler on two tokens of three, and their probabilities."""
    params, prompt, bind = tiny.perceptron(2)
    sampling = Sampling(2, 2, 2, 1.0, "random")
    law = exact.sampler_law(bind(params), prompt, jnp.full((2,), M), tiny.VOCAB, sampling)
    tokens, reveal = (jnp.array(part) for part in zip(*law, strict=True))
    prompts = jnp.broadcast_to(prompt, (len(law), *prompt.shape))
    reward = tiny.reward_of(tokens)
    assert len(law) == 18
    return params, bind, tiny.rollout(tokens, reveal, prompts, reward), jnp.array([*law.values()])


def expected_reward_gradient(params, bind, rollout):
    """d/dtheta of the sum of P_theta(outcome) R(outcome), each order having probability 1/2."""

    def value(params):
        steps = jnp.broadcast_to(jnp.arange(2), (18, 2))
        total = 0.0
        for t, state in enumerate(jnp.moveaxis(state_at(rollout, steps, M), 1, 0)):
            scored = (rollout.prompt, rollout.prompt_valid, state, rollout.tokens[:, None])
            log_prob = state_log_prob(bind(params), *scored)[:, 0]
            total += jnp.sum(jnp.where(rollout.reveal_step == t, log_prob, 0.0), axis=1)
        return jnp.sum(0.5 * jnp.exp(total) * rollout.reward)

    return jax.jit(jax.grad(value))(params)


def of_outcomes(params, bind, rollout, probe, hp):
    """[18,D]: minus the gradient of each outcome's items, as if it were the whole batch."""
    batch = batch_of(bind, params, rollout, probe, hp)
    items = jax.tree.map(lambda x: x.reshape(18, 2, *x.shape[1:]), batch)
    every = jax.jit(jax.vmap(lambda item: gradient(bind, params, item, hp)))(items)
    leaves = [np.asarray(x).reshape(18, -1) for x in jax.tree.leaves(every)]
    return -36.0 * np.concatenate(leaves, axis=1)  # the weights are those of 36 items of one token


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"lam": 0.0}, 1.0),
        ({"lam": 0.5}, 1.0),
        ({"lam": 2.0, "baseline": "reward"}, 1.0),
        ({"lam": 0.5, "normalize": False}, 1.5),
    ],
    ids=["plain", "stepwise", "reward-baseline", "unnormalised"],
)
def test_the_expected_gradient_is_that_of_the_expected_reward(changes, factor):
    params, bind, rollout, p = process()
    hp = egspo.Hyper(states=2, selection="uniform", beta=0.0, **changes)
    probe = probed(bind, params, rollout, hp)
    expected = np.asarray(p) @ of_outcomes(params, bind, rollout, probe, hp)
    want = tiny.flat(expected_reward_gradient(params, bind, rollout))
    tiny.assert_close(expected, factor * want)


@pytest.mark.parametrize(("sign", "falls"), [(1, True), (-1, False)])
def test_the_stepwise_baseline_lowers_the_variance_if_it_correlates(sign, falls):
    params, bind, rollout, p = process()
    p, reward = np.asarray(p), jnp.sum(rollout.tokens, axis=1).astype(jnp.float32)
    rollout = rollout._replace(reward=reward)
    variance = []
    for lam in (0.0, 0.5):
        hp = egspo.Hyper(states=2, selection="uniform", beta=0.0, lam=lam)
        probe = probed(bind, params, rollout, hp)
        greedy = jnp.sum(probe.fills, axis=-1).astype(jnp.float32)
        correlation = np.corrcoef(greedy[:, 1, 0], reward)[0, 1]
        assert correlation > 0.3
        probe = probe._replace(reward=sign * greedy)
        each = of_outcomes(params, bind, rollout, probe, hp)
        variance.append((p @ each**2 - (p @ each) ** 2).sum())
    assert (variance[1] < 0.95 * variance[0]) == falls
    assert (variance[1] > 1.05 * variance[0]) != falls


def case(rows=6, length=5, eos=tiny.NO_EOS, seed=3, vocab=tiny.VOCAB):
    """(parameters, params -> Denoiser, rollout): groups of three, one template position."""
    params, _, bind = tiny.perceptron(length, prompt=3, eos=eos, vocab=vocab)
    keys = jax.random.split(jax.random.key(seed), 5)
    tokens = jax.random.randint(keys[0], (rows, length), 0, M)
    reveal = jax.random.randint(keys[1], (rows, length), 0, 4).at[:, 2].set(TEMPLATE)
    prompt = jax.random.randint(keys[2], (rows, 3), 0, M)
    reward = jax.random.uniform(keys[3], (rows,))
    rollout = tiny.rollout(tokens, reveal, prompt, reward, jnp.arange(rows) // 3, eos)
    return params, bind, rollout._replace(entropy=jax.random.uniform(keys[4], tokens.shape))


def brute_force(rollout, hp):
    """[(step, entropy)] of every row, the highest entropy first."""
    ranked = []
    for b in range(len(rollout.tokens)):
        reveal, entropy = np.asarray(rollout.reveal_step[b]), np.asarray(rollout.entropy[b])
        steps = sorted({t for t in reveal.tolist() if t >= 0})
        if hp.stop_at_eos:
            steps = [t for t in steps if t <= reveal[: int(rollout.length[b])].max()]
        found = [(t, entropy[reveal == t].mean()) for t in steps]
        ranked.append(sorted(found, key=lambda pair: -pair[1]))
    return ranked


@pytest.mark.parametrize("stop", [False, True], ids=["all", "stop"])
def test_the_steps_of_highest_entropy_match_a_loop(stop):
    params, bind, rollout = case(rows=60, eos=2)
    hp = egspo.Hyper(states=3, stop_at_eos=stop, beta=0.0)
    probe = probed(bind, params, rollout, hp)
    weight = batch_of(bind, params, rollout, probe, hp).weight.reshape(60, 3, 5)
    ranked = brute_force(rollout, hp)
    assert any(len(found) < 3 for found in ranked)
    for b, found in enumerate(ranked):
        chosen = [t for t, _ in found[:3]]
        assert probe.step[b, : len(chosen)].tolist() == chosen
        for k in range(3):
            tokens = np.asarray(rollout.reveal_step[b]) == (chosen[k] if k < len(chosen) else 99)
            np.testing.assert_array_equal(np.asarray(weight[b, k]) > 0, tokens)
    assert float(jnp.sum(weight)) == pytest.approx(1, rel=1e-5)
    assert len(np.unique(np.asarray(weight))) == 2, "every token weighs the same"


def test_coverage_keeps_the_fewest_steps_that_hold_the_share():
    params, bind, rollout = case(rows=60)
    hp = egspo.Hyper(states=4, coverage=0.7, beta=0.0)
    probe = probed(bind, params, rollout, hp)
    weight = batch_of(bind, params, rollout, probe, hp).weight.reshape(60, 4, 5)
    kept = np.asarray(jnp.any(weight > 0, axis=-1))
    numbers = set()
    for b, found in enumerate(brute_force(rollout, hp)):
        entropy = np.array([e for _, e in found])
        number = 1 + int(np.argmax(np.cumsum(entropy) >= 0.7 * entropy.sum()))
        assert kept[b].tolist() == [k < number for k in range(4)]
        numbers.add(number)
    assert len(numbers) > 1


def test_evenly_spaced_steps_end_with_the_last_one():
    _, _, rollout = case(rows=2)
    reveal = jnp.array([[0, 1, TEMPLATE, 3, 4], [0, 0, TEMPLATE, 2, 2]])
    hp = egspo.Hyper(states=3, selection="uniform")
    plan = egspo.probes(rollout._replace(reveal_step=reveal), KEY, hp)
    assert plan.step.tolist() == [[0, 3, 4], [0, 0, 2]]
    assert (plan.fillings, plan.temperature, plan.own) == (1, 0.0, False)
    with pytest.raises(ValueError, match="states=6: a completion has 5 steps at most"):
        egspo.probes(rollout, KEY, egspo.Hyper(states=6))


def scaled(params, by):
    return jax.tree.map(lambda x: by * x, params)


@pytest.mark.parametrize(("aggregate", "temperature"), [("sum", 1.0), ("mean", 0.5)])
def test_at_theta_old_the_gradient_is_reinforce(aggregate, temperature):
    params, bind, rollout = case()
    hp = egspo.Hyper(states=2, beta=0.0, aggregate=aggregate, temperature=temperature)
    probe = probed(bind, params, rollout, hp)
    batch = batch_of(bind, params, rollout, probe, hp, params)

    def reinforce(params):
        total, tokens, states = 0.0, 0, 0
        for k in range(2):
            greedy = probe.reward[:, k, 0]
            ret = (rollout.reward + 0.5 * (rollout.reward - greedy)) / 1.5
            centred = ret - jnp.repeat(ret.reshape(2, 3).mean(axis=1), 3)
            both = jnp.concatenate([rollout.prompt, probe.state[:, k]], axis=1)
            hidden = bind(params).encode(both, jnp.ones(both.shape, bool))[:, 3:]
            log_p = jax.nn.log_softmax(bind(params).logits(hidden) / temperature)
            log_p = jnp.take_along_axis(log_p, rollout.tokens[..., None], axis=-1)[..., 0]
            now = rollout.reveal_step == probe.step[:, k : k + 1]
            step = jnp.sum(jnp.where(now, log_p, 0.0), axis=1)
            step = step / jnp.sum(now, axis=1) if aggregate == "mean" else step
            total += jnp.sum(centred * step)
            tokens, states = tokens + jnp.sum(now), states + 6
        return -total / (tokens if aggregate == "sum" else states)

    want = jax.jit(jax.grad(reinforce))(params)
    tiny.assert_close(gradient(bind, params, batch, hp), want)
    tiny.assert_close(gradient(bind, params, batch._replace(old=None), hp), want)


def test_the_ratio_of_a_step_is_one_at_theta_old():
    params, bind, rollout = case()
    hp = egspo.Hyper(states=2, temperature=0.9)
    probe = probed(bind, params, rollout, hp)
    batch = batch_of(bind, params, rollout, probe, hp, params, params)
    batch = batch._replace(advantage=jnp.linspace(0.1, 1, 12)[:, None])  # else it sums to 0
    log_prob = state_log_prob(tempered(bind(params), 0.9), *batch[:4])
    np.testing.assert_allclose(batch.old, jnp.where(batch.weight > 0, log_prob, 0), rtol=1e-5)
    (loss, metrics), _ = evaluated(bind, params, batch, hp)
    tokens = jnp.sum(batch.weight > 0, axis=(1, 2))
    expected = -float(jnp.sum(batch.advantage[:, 0] * (tokens > 0)) / jnp.sum(tokens))
    assert abs(expected) > 1e-3
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["clip_ratio/region_mean"]) == 0


@pytest.mark.parametrize(("aggregate", "kl"), [("sum", "k3"), ("mean", "exact")])
def test_gradients_of_strided_microbatches_add_up(aggregate, kl):
    params, bind, rollout = case()
    hp = egspo.Hyper(states=2, aggregate=aggregate, kl=kl, coverage=0.9)
    probe = probed(bind, params, rollout, hp)
    other = scaled(params, 1.2)
    batch = batch_of(bind, params, rollout, probe, hp, scaled(params, 0.9), other)
    assert (batch.reference is None) == (kl == "exact")
    whole = gradient(bind, params, batch, hp, other)
    assert np.isfinite(tiny.flat(whole)).all()
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    every = [gradient(bind, params, part, hp, other) for part in parts]
    tiny.assert_close(jax.tree.map(lambda *g: sum(g), *every), whole, rtol=1e-5)


def test_the_exact_divergence_and_its_gradient():
    length, widths = 2 * POSITIONS, (POSITIONS, 2 * POSITIONS)
    params, _, bind = tiny.perceptron(length)
    state = jnp.full((2, length), M)
    prompt = jnp.zeros((2, 2), jnp.int32)
    args = (prompt, jnp.ones((2, 2), bool), state)

    def mapped(params):
        hidden = completion_hidden(bind(params), *args)
        reference = bind(scaled(params, 0.8))
        theirs = jax.lax.stop_gradient(completion_hidden(reference, *args))
        frozen = bind(scaled(jax.lax.stop_gradient(params), 0.8))
        return divergence.kl(bind(params), frozen, hidden, theirs)

    def direct(params):
        def log_p(params):
            hidden = completion_hidden(bind(params), *args)
            return jax.nn.log_softmax(hidden @ params["head"][:, :M])

        p, q = log_p(params), jax.lax.stop_gradient(log_p(scaled(params, 0.8)))
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    np.testing.assert_allclose(jax.jit(mapped)(params), jax.jit(direct)(params), atol=1e-5)
    ours, theirs = (jax.jit(jax.grad(lambda p, f=f: f(p).sum()))(params) for f in (mapped, direct))
    tiny.assert_close(ours, theirs)
    program = jax.make_jaxpr(jax.grad(lambda p: mapped(p).sum()))(params)
    rows = [s for s in shapes(program.jaxpr) if s[-2:] in [(w, tiny.VOCAB) for w in widths]]
    assert max(np.prod(shape[:-1]) for shape in rows) == 2 * POSITIONS, "one chunk of both rows"


def shapes(jaxpr):
    """Of every float array that a program makes."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)
        yield from (v.aval.shape for v in eqn.outvars if v.aval.dtype == jnp.float32)


def test_ties_give_no_gradient_and_the_template_is_never_trained():
    params, bind, rollout = case()
    hp = egspo.Hyper(states=4, beta=0.0)
    probe = probed(bind, params, rollout, hp)
    batch = batch_of(bind, params, rollout, probe, hp)
    assert (np.asarray(batch.weight)[:, 0, 2] == 0).all()
    assert (tiny.flat(gradient(bind, params, batch, hp)) != 0).any()
    tied = rollout._replace(reward=jnp.full(6, 0.5))
    tied = batch_of(bind, params, tied, probe._replace(reward=jnp.full((6, 4, 1), 0.2)), hp)
    assert (np.abs(tiny.flat(gradient(bind, params, tied, hp))) < 1e-7).all()
    fixed = rollout._replace(reveal_step=jnp.full((6, 5), TEMPLATE))
    empty = batch_of(bind, params, fixed, probe, hp)
    assert (tiny.flat(gradient(bind, params, empty, hp)) == 0).all()


def test_tokens_after_an_eos_are_part_of_the_action():
    params, bind, rollout = case(eos=2)
    tokens = jnp.array([[2, 1, 0, 0, 1]] * 6)
    rollout = rollout._replace(tokens=tokens, reveal_step=jnp.zeros_like(tokens))
    hp = egspo.Hyper(states=1, beta=0.0)
    batch = batch_of(bind, params, rollout, probed(bind, params, rollout, hp), hp)
    assert (np.asarray(batch.weight) > 0).all()


def test_the_clip_is_asymmetric_and_of_the_whole_step():
    params, bind, rollout = case(rows=3)
    rollout = rollout._replace(reveal_step=jnp.zeros_like(rollout.reveal_step))
    hp = egspo.Hyper(states=1, beta=0.0)
    batch = batch_of(bind, params, rollout, probed(bind, params, rollout, hp), hp)
    log_prob = state_log_prob(bind(params), *batch[:4])
    for rho, credit, stopped in (
        (1.4, 1, 0),
        (1.6, 1, 1),
        (0.7, -1, 1),
        (0.9, -1, 0),
        (1.6, -1, 0),
    ):
        shift = jnp.log(rho) / 5  # of each of the step's five tokens
        moved = batch._replace(
            old=log_prob - shift, advantage=jnp.full((3, 1), credit, jnp.float32)
        )
        (_, metrics), grad = evaluated(bind, params, moved, hp)
        assert (np.abs(tiny.flat(grad)).max() < 1e-7) == bool(stopped), (rho, credit)
        assert float(metrics["clip_ratio/region_mean"]) == pytest.approx(stopped)


def test_it_asks_for_a_reference_only_to_penalise_the_distance_from_it():
    assert egspo.needs(egspo.Hyper()) == {"reference"}
    assert egspo.needs(egspo.Hyper(beta=0.0)) == frozenset()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"states": 0}, "need states >= 1.*self.states=0"),
        ({"lam": -0.5}, "self.lam=-0.5"),
        ({"temperature": 0.0}, "self.temperature=0.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon_high": 0.0}, "self.epsilon_high=0.0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"selection": "late"}, "selection='late': choose one of .*'entropy', 'uniform'"),
        ({"baseline": "none"}, "baseline='none': choose one of .*'return', 'reward'"),
        ({"aggregate": "max"}, "aggregate='max': choose one of .*'sum', 'mean'"),
        ({"kl": "k2"}, "kl='k2': choose one of .*'k3', 'exact'"),
        ({"coverage": 1.5}, r"coverage=1.5 .*\(0, 1\]"),
        ({"coverage": 0.5, "selection": "uniform"}, "selection='uniform'"),
    ],
)
def test_impossible_hyper_parameters_say_what_is_possible(values, message):
    with pytest.raises(ValueError, match=message):
        egspo.Hyper(**values)
