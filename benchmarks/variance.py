"""Variance of DiSPO's step gradient at a policy: which tokens enter it, how many fillings.

The training programs draw states and N one-shot fillings of each. The step gradient (eq. 6) of any
of the fillings is a weighted sum of the gradients of log pi(a_z | s) over all parameters, so their
inner products tell its total variance for every Z and every baseline, without another draw.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from dmrl import data, models, optim, scoring, stages
from dmrl.algorithms import dispo, surrogate
from dmrl.diffusion.likelihood import state_log_prob
from dmrl.held import Held
from dmrl.objective import make_term
from dmrl.programs import Programs
from dmrl.recipe import Recipe
from dmrl.types import Denoiser, Inner, Models, Probe, Rollout

EXACT = {"ratio_level": "sequence", "epsilon": 0.5, "beta": 0.0, "p_mask_prompt": 0.0}
"""Equation 6 with the ratio of equation 5, clipped, without a penalty."""
FILLINGS = 24
INNER = 4
"""Inner updates after which the policy is no longer the one that drew."""
FEWEST = 10
"""States that an interval is told of."""
Floats = NDArray[np.float64]


class Branches(NamedTuple):
    """N fillings of each of S states."""

    reward: Floats
    """[S,N]"""
    log_ratio: dict[str, Floats]
    """log pi / pi_old of a filling [S,N] over the tokens that `dispo.GRADIENTS` names."""
    gram: dict[str, Floats]
    """[S,N,N] inner products of its gradients."""
    share: Floats
    """[S] m / L: masked among the sampled positions."""
    step: NDArray[np.int64]
    """[S] denoising steps before the state."""


class Drawn(NamedTuple):
    """Scored fillings of one state of every prompt."""

    rollout: Rollout
    probe: Probe


def draw(
    recipe: Recipe, mesh: Any, trainable: Any, frozen: Any, prompts: data.Prompts, key: jax.Array
) -> Drawn:
    """FILLINGS fillings of one state of a rollout of every prompt, as training draws them.

    States all of whose fillings earn the same are left out: their gradient is 0.

    Raises:
      ValueError: the recipe has no DiSPO term.
    """
    own = [t.hyper for t in recipe.terms if t.name == "dispo"]
    if not own:
        raise ValueError(f"no dispo among the terms {[t.name for t in recipe.terms]}")
    hyper = dataclasses.replace(own[0], fillings=FILLINGS, states=1)
    term = make_term("dispo", 1.0, dataclasses.asdict(hyper))
    unused = optim.make(recipe.optimizer, 1)
    programs = Programs(recipe.model, (term,), recipe.sampling, unused, mesh)
    rows = prompts.rows(np.arange(len(prompts.examples)))
    rollout, probes = programs.rollout(trainable, frozen, rows, 0, key)
    scored = scoring.score(recipe, prompts.examples, rollout, probes)
    rollout, (probe,) = scoring.rewarded(scored, jnp.asarray)
    assert probe is not None
    assert probe.reward is not None
    kept = np.flatnonzero(np.ptp(np.asarray(probe.reward)[:, 0], axis=1) > 0)
    return Drawn(*jax.tree.map(lambda x: x[kept], (rollout, probe)))


def moved(
    recipe: Recipe, mesh: Any, held: Held, trainable: Any, key: jax.Array, updates: int = INNER
) -> Any:
    """The weights after so many inner updates on one rollout, at the learning rate that the run
    ended with."""
    loop = dataclasses.replace(recipe.loop, num_iterations=updates)
    own = recipe.optimizer
    last = own.learning_rate * (own.final_fraction if own.schedule == "cosine" else 1)
    steady = dataclasses.replace(own, learning_rate=last, warmup_steps=1, schedule="constant")
    stage = stages.Reinforce(recipe._replace(loop=loop, optimizer=steady), mesh, held)
    state = stage.init(jax.tree.map(jnp.copy, trainable))
    return stage.step(state, 0, np.asarray(next(stage.batches)), key).state.trainable


def branches(bind: Callable[[Any], Denoiser], params: Any, old: Any, drawn: Drawn) -> Branches:
    """Gradients of `bind(params)` where `bind(old)` drew."""
    ratios, grams, shares = {}, {}, {}
    for gradient in dispo.GRADIENTS:
        hyper = dispo.Hyper(gradient=gradient, fillings=drawn.probe.fills.shape[2], **EXACT)
        inner = Inner(jnp.int32(0), 1, jax.random.key(0))
        trio = Models(bind(old), None, None)
        batch = dispo.prepare(trio, drawn.rollout, drawn.probe, inner.key, inner, hyper)
        found = jax.device_get(products(bind, params, old, batch))
        ratios[gradient], grams[gradient] = (np.asarray(x, np.float64) for x in found)
        shares[gradient] = np.sum(np.asarray(batch.weight[:, 0]) > 0, axis=-1)
    assert drawn.probe.reward is not None
    return Branches(
        np.asarray(drawn.probe.reward, np.float64)[:, 0],
        ratios,
        grams,
        shares["action"] / np.maximum(shares["all"], 1),
        np.asarray(drawn.probe.step)[:, 0],
    )


@functools.partial(jax.jit, static_argnames="bind")
def products(
    bind: Callable[[Any], Denoiser], params: Any, old: Any, batch: surrogate.Batch
) -> tuple[jax.Array, jax.Array]:
    """log pi - log pi_old [S,N] of the counted tokens of every filling, and the inner products
    [S,N,N] of their gradients; one state after the other."""

    def one(item: surrogate.Batch) -> tuple[jax.Array, jax.Array]:
        where = jax.tree.map(lambda x: x[None], item)

        def log_prob(params: Any) -> jax.Array:
            args = (where.prompt, where.prompt_valid, where.state, where.labels)
            found = state_log_prob(bind(params), *args)
            return jnp.sum(jnp.where(where.weight > 0, found, 0.0), axis=-1)[0]

        leaves = jax.tree.leaves(jax.jacrev(log_prob)(params))
        rows = [x.reshape(x.shape[0], -1) for x in leaves]
        gram = sum(jnp.matmul(x, x.T, precision="highest") for x in rows)
        return log_prob(params) - log_prob(old), jnp.asarray(gram)

    return jax.lax.map(one, batch)


def siblings(reward: Floats, log_ratio: Floats, z: int) -> Floats:
    """[S,R,N] what each filling's gradient weighs in the step gradients of R = N // z trials.

    A trial is the gradient of -mean_z min(rho_z A_z, clip(rho_z) A_z), A_z = R_z - mean R, over
    fillings of its own: 0 where the clip is active, else -rho_z A_z / z.
    """
    states, count = reward.shape
    trials = count // z
    cut = (slice(None), slice(0, trials * z))
    rewards = reward[cut].reshape(states, trials, z)
    rho = np.exp(log_ratio[cut]).reshape(states, trials, z)
    advantage = rewards - rewards.mean(-1, keepdims=True)
    epsilon = EXACT["epsilon"]
    active = np.where(advantage > 0, rho > 1 + epsilon, rho < 1 - epsilon)
    weight = np.where(active, 0.0, -rho * advantage / z)
    apart = np.einsum("srz,rq->srqz", weight, np.eye(trials)).reshape(states, trials, -1)
    return np.pad(apart, ((0, 0), (0, 0), (0, count - trials * z)))


def single(reward: Floats) -> Floats:
    """The same of N trials of one filling, whose baseline is the mean reward of the others."""
    count = reward.shape[1]
    centred = (reward - reward.mean(-1, keepdims=True)) * count / (count - 1)
    return -np.einsum("sn,nm->snm", centred, np.eye(count))


def total_variance(weight: Floats, gram: Floats) -> Floats:
    """[S] sum over parameters of the variance between the trials of `weight` [S,R,N]."""
    off = weight - weight.mean(1, keepdims=True)
    return np.asarray(np.sum((off @ gram) * off, axis=(1, 2)) / (weight.shape[1] - 1))


def predicted(reward: Floats, gram: Floats, z: int) -> Floats:
    """[S] total variance with z fillings at theta_old, without bias from the pairs among all N.

    With a leave-one-out baseline the gradient is the mean over pairs of siblings of
    h_ab = (R_a - R_b)(s_a - s_b) / 2, s the scores, so Hoeffding's variance of a U-statistic holds:
    2 (2 (z-2) zeta_1 + zeta_2) / (z (z-1)), zeta_k the covariance of pairs that share k fillings.
    Training's mean baseline multiplies it by ((z-1)/z)^2.
    """
    count = reward.shape[1]
    gap = reward[:, :, None] - reward[:, None]
    length = np.einsum("snn->sn", gram)
    apart = length[:, :, None] + length[:, None] - 2 * gram
    both = np.sum(gap**2 * apart, (1, 2)) / 4
    mine = (gap.sum(2)[:, :, None] * np.eye(count) - gap) / 2  # [S,N,N] sum over b of h_ab
    one = np.sum((mine @ gram) * mine, (1, 2)) - both
    whole = mine.sum(1)
    none = np.einsum("sn,snm,sm->s", whole, gram, whole) - 2 * both - 4 * one
    pairs = count * (count - 1)
    both, one = both / pairs, one / (pairs * (count - 2))
    none = none / (pairs * (count - 2) * (count - 3))
    return np.asarray(2 * (2 * (z - 2) * (one - none) + both - none) / (z * (z - 1)))


def ratio(
    one: Floats, other: Floats, rng: np.random.Generator, draws: int = 2000
) -> dict[str, float]:
    """sum(one) / sum(other) over states [S], with a 95% interval of the paired bootstrap."""
    index = rng.integers(len(one), size=(draws, len(one)))
    drawn = one[index].sum(1) / other[index].sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"ratio": float(one.sum() / other.sum()), "low": float(low), "high": float(high)}


def kinds(here: Branches, later: Branches) -> dict[str, dict[str, Floats]]:
    """[S] variance of three estimators, from masked tokens alone and from all sampled ones.

    one filling: with a baseline free of its own reward, the setting of Proposition 4.3.
    two siblings: as trained, at the policy that drew; after inner updates: at one that has moved.
    """
    found = {}
    for name, at, weigh in (
        ("one filling", here, lambda b, g: single(b.reward)),
        ("two siblings", here, lambda b, g: siblings(b.reward, b.log_ratio[g], 2)),
        ("after inner updates", later, lambda b, g: siblings(b.reward, b.log_ratio[g], 2)),
    ):
        found[name] = {g: total_variance(weigh(at, g), at.gram[g]) for g in dispo.GRADIENTS}
    return found


def study(here: Branches, later: Branches, counts: tuple[int, ...]) -> dict[str, Any]:
    """The numbers of the figure, JSON-able: by the number of fillings, and by which tokens."""
    rng = np.random.default_rng(0)
    log_ratio, gram = here.log_ratio["action"], here.gram["action"]
    trained = {z: total_variance(siblings(here.reward, log_ratio, z), gram) for z in counts}
    theory = {z: float(predicted(here.reward, gram, z).sum()) for z in counts}
    free = {z: (z / (z - 1)) ** 2 * values for z, values in trained.items()}
    by_fillings = [
        {
            "fillings": z,
            "trained": ratio(trained[z], trained[2], rng),
            "leave_one_out": ratio(free[z], free[2], rng),
            "predicted_leave_one_out": theory[z] / theory[2],
        }
        for z in counts
    ]
    by_tokens: dict[str, Any] = {}
    for name, variance in kinds(here, later).items():
        action, every = variance["action"], variance["all"]
        steps = [here.step == step for step in np.unique(here.step)]
        by_tokens[name] = {
            **ratio(action, every, rng),
            "predicted": float(np.sum(here.share * every) / every.sum()),
            "by_step": [
                {"share": float(here.share[at].mean()), "states": int(at.sum())}
                | ratio(action[at], every[at], rng)
                for at in steps
                if at.sum() >= FEWEST
            ],
        }
    moved_by = float(np.median(np.abs(later.log_ratio["action"])))
    drawn = {
        "states": len(here.reward),
        "drawn": here.reward.shape[1],
        "median_log_ratio": moved_by,
    }
    return drawn | {"by_fillings": by_fillings, "by_tokens": by_tokens}


def measure(
    recipe: Recipe, mesh: Any, held: Held, trainable: Any, boards: int
) -> tuple[Branches, Branches]:
    """The same fillings of states of validation boards, seen by the policy that drew them and by
    what INNER updates make of it."""
    bind = functools.partial(models.bind, recipe.model)
    prompts = held.prompts["validation"].first(boards)
    drawn = draw(recipe, mesh, trainable, held.frozen, prompts, jax.random.key(7))
    later = moved(recipe, mesh, held, trainable, jax.random.key(8))
    return branches(bind, trainable, trainable, drawn), branches(bind, later, trainable, drawn)
