"""The two compiled programs of training: rollout (sampler and probes) and update.

    rollout: behaviour parameters, prompts, key        -> Rollout, one Probe (or None) a term
    update:  TrainState, scored rollouts, key          -> TrainState, metrics

Rewards are computed by the host in between. Both programs have static shapes and compile once.
"""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmrl import algorithms, models, parallel
from dmrl.diffusion import probe, sampler
from dmrl.types import Denoiser, Metrics, Models, PRNGKey, Probe, Rollout


class TrainState(NamedTuple):
    """All that training changes on the device."""

    step: jax.Array
    """Outer steps done, int32."""
    trainable: Any
    """The `lora` collection, or all parameters when there is no adapter."""
    opt_state: optax.OptState


class Term(NamedTuple):
    """One weighted summand of the objective."""

    name: str
    weight: float
    algorithm: ModuleType
    hyper: Any


def make_term(name: str, weight: float, options: dict[str, Any]) -> Term:
    """The algorithm module `name` of `dmrl.algorithms`, with its `Hyper` filled from `options`.

    Raises:
      ValueError: unknown algorithm or option, with the nearest right name.
    """
    shared = ("advantage", "surrogate")
    known = [m.name for m in pkgutil.iter_modules(algorithms.__path__) if m.name not in shared]
    if name not in known:
        raise ValueError(f"no algorithm {name!r}{_nearest(name, known)}")
    module: Any = importlib.import_module(f"dmrl.algorithms.{name}")
    fields = [f.name for f in dataclasses.fields(module.Hyper)]
    for option in options:
        if option not in fields:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, fields)}")
    return Term(name, weight, module, module.Hyper(**options))


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} there are {', '.join(sorted(known)) or 'none'}"


def needs_reference(terms: Sequence[Term]) -> bool:
    """Whether a term has a KL penalty (a `beta` above 0) to the reference."""
    return any(getattr(term.hyper, "beta", 0.0) > 0 for term in terms)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one stage. All fields are static; parameters are arguments.

    `frozen` in the methods is the tree that never changes: the base weights under an adapter,
    or the reference policy of full fine-tuning (None when nothing asks for a reference).
    """

    model: models.Config
    terms: tuple[Term, ...]
    sampling: sampler.Sampling | None
    optimizer: optax.GradientTransformation
    mesh: Mesh
    group_size: int = 1
    inner_updates: int = 1
    """mu: optimiser steps on one rollout."""
    microbatches: int = 1

    def policy(self, trainable: Any, frozen: Any) -> Denoiser:
        """The policy that `trainable` describes."""
        if self.model.lora_rank:
            return models.bind(self.model, {"params": frozen, "lora": trainable})
        return models.bind(self.model, {"params": trainable})

    def init_state(self, trainable: Any) -> TrainState:
        """Step 0, laid out over the mesh."""
        state = TrainState(jnp.zeros((), jnp.int32), trainable, self.optimizer.init(trainable))
        return jax.device_put(state, parallel.shardings(self.mesh, state))

    def rollout(
        self, trainable: Any, frozen: Any, prompts: Any, first_row: int, key: PRNGKey
    ) -> tuple[Rollout, tuple[Probe | None, ...]]:
        """Samples `group_size` completions of each prompt, and each term's probes.

        `prompts` is (prompt [n,P], prompt_valid [n,P], template [n,L]). Rows are numbered from
        `first_row`: noise follows the number, so chunks of a batch equal the whole.
        """
        prompts = jax.device_put(prompts, parallel.replicated(self.mesh))
        frozen = frozen if self.model.lora_rank else None  # no part of this policy
        with jax.set_mesh(self.mesh):
            return self._rollout(trainable, frozen, prompts, jnp.int32(first_row), key)

    def update(
        self,
        state: TrainState,
        frozen: Any,
        rollouts: Sequence[Rollout],
        probes: Sequence[tuple[Probe | None, ...]],
        key: PRNGKey,
    ) -> tuple[TrainState, Metrics]:
        """mu inner updates on scored rollouts, given as chunks. Donates `state`."""
        with jax.set_mesh(self.mesh):
            return self._update(state, frozen, tuple(rollouts), tuple(probes), key)

    @functools.cached_property
    def _rollout(self) -> Any:
        assert self.sampling is not None
        sampling, size = self.sampling, self.group_size

        def rollout(trainable, frozen, prompts, first_row, key):
            denoiser = self.policy(trainable, frozen)
            rows = (jnp.repeat(x, size, axis=0) for x in prompts)  # few prompts, many rows
            prompt, valid, template = jax.lax.with_sharding_constraint(
                tuple(rows), parallel.batch_sharding(self.mesh)
            )
            row = first_row + jnp.arange(prompt.shape[0], dtype=jnp.int32)
            draw_key, probe_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
            done = sampler.sample(
                denoiser, prompt, valid, template, row, row // size, draw_key, sampling
            )
            probes = [self._probe(denoiser, done, term, probe_key) for term in self.terms]
            return done, tuple(probes)

        return jax.jit(rollout)

    def _probe(self, denoiser: Denoiser, done: Rollout, term: Term, key: PRNGKey) -> Probe | None:
        plan = term.algorithm.probes(done, jax.random.fold_in(key, 0), term.hyper)
        if plan is None:
            return None
        return probe.fill(denoiser, done, plan, jax.random.fold_in(key, 1))

    @functools.cached_property
    def _update(self) -> Any:
        return jax.jit(self._update_fn, donate_argnums=0)

    def _update_fn(self, state, frozen, rollouts, probes, key):
        rollout = _join(rollouts)
        term_probes = [_join(chunks) for chunks in zip(*probes, strict=True)]
        current = self.policy(state.trainable, frozen)
        reference = None
        if needs_reference(self.terms):
            reference = models.bind(self.model, {"params": frozen})
        behaviour = current if self.inner_updates > 1 else None
        frozen_models = Models(current, behaviour, reference)

        def prepare(inner):
            inner_key = jax.random.fold_in(jax.random.fold_in(key, 2), inner)
            return tuple(
                t.algorithm.prepare(frozen_models, rollout, p, inner_key, inner, t.hyper)
                for t, p in zip(self.terms, term_probes, strict=True)
            )

        def inner_update(carry, batches):
            trainable, opt_state = carry
            grads, metrics = self._gradient(trainable, frozen, reference, batches)
            updates, opt_state = self.optimizer.update(grads, opt_state, trainable)
            metrics["grad_norm"] = optax.tree.norm(grads)
            return (optax.apply_updates(trainable, updates), opt_state), metrics

        carry = (state.trainable, state.opt_state)
        if self.inner_updates == 1:
            (trainable, opt_state), metrics = inner_update(carry, prepare(jnp.int32(0)))
        else:
            batches = jax.lax.map(prepare, jnp.arange(self.inner_updates))
            (trainable, opt_state), stacked = jax.lax.scan(inner_update, carry, batches)
            metrics = {name: jnp.mean(values) for name, values in stacked.items()}
        state = TrainState(state.step + 1, trainable, opt_state)
        # The layout it came with, so that the next step finds the program that this one compiled.
        layout = parallel.shardings(self.mesh, state)
        return jax.lax.with_sharding_constraint(state, layout), metrics

    def _gradient(self, trainable, frozen, reference, batches):
        """Gradient and metric sums of the weighted objective, over strided microbatches."""

        def objective(trainable, batches):
            bound = Models(self.policy(trainable, frozen), None, reference)
            total, metrics = jnp.zeros(()), dict[str, jax.Array]()
            for i, (term, batch) in enumerate(zip(self.terms, batches, strict=True)):
                value, sums = term.algorithm.loss(bound, batch, term.hyper)
                total += term.weight * value
                prefix = f"{term.name}/" if i else ""
                metrics |= {prefix + name: v for name, v in sums.items()}
            return total, metrics | {"loss": total}

        gradient = jax.grad(objective, has_aux=True)
        if self.microbatches == 1:
            return gradient(trainable, batches)
        cut = jax.tree.map(functools.partial(_strided, pieces=self.microbatches), batches)

        def accumulate(total, piece):
            return jax.tree.map(jnp.add, total, gradient(trainable, piece)), None

        first = jax.tree.map(lambda x: x[0], cut)
        shapes = jax.eval_shape(gradient, trainable, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(accumulate, zeros, cut)[0]


def _join(chunks: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *chunks)


def _strided(x: jax.Array, pieces: int) -> jax.Array:
    """[N, ...] -> [pieces, N / pieces, ...], every pieces-th row together.

    Strided, because contiguous pieces of a sharded axis would each live on one device.
    """
    if x.shape[0] % pieces:
        raise ValueError(f"microbatches={pieces} does not divide the {x.shape[0]} items of a term")
    return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0)
