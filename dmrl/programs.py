"""The two compiled programs of training: rollout (sampler and probes) and update.

    rollout: behaviour parameters, prompts, key        -> Rollout, one Probe (or None) a term
    update:  TrainState, scored rollouts, key          -> TrainState, metrics

Rewards are computed by the host in between. Both programs have static shapes and compile once.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmrl import models, objective, parallel, pieces
from dmrl.diffusion import drift, probe, refill, sampler
from dmrl.objective import Term, needs
from dmrl.types import HINT, Denoiser, Inner, Metrics, Models, PRNGKey, Probe, Rollout


class TrainState(NamedTuple):
    """All that training changes on the device."""

    step: jax.Array
    """Outer steps done, int32."""
    trainable: Any
    """What the optimiser changes, by collection: {'lora': ...} or, without an adapter,
    {'params': ...}; beside it 'heads' where a term has some. {'order': ...} alone where a term
    trains the order of a denoiser that stays as it is."""
    opt_state: optax.OptState
    teacher: Any = None
    """The behaviour policy of the present phase, laid out like `trainable`; None without phases."""
    ema: Any = None
    """Exponential moving average of `trainable`; None unless the optimiser asks for one."""


DRIFT_ROWS = 16
"""Completions of a step on which an approximate sampler is compared with its model."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one stage. All fields are static; parameters are arguments.

    `frozen` in the methods is the tree that never changes: the base weights under an adapter, the
    denoiser beside a learned order, or the reference policy of full fine-tuning (None when nothing
    asks for a reference).
    `behaviour` draws rollouts: `state.trainable`, or the teacher's in a method with phases.
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
    phases: bool = False
    """Whether rollouts come from a teacher that `next_phase` alone refreshes."""
    ema: float = 0.0
    """Decay of the average of the weights; 0 keeps none."""
    slots: int = 0
    """Rows at work at a time in a rollout of more rows than these: the next one takes the place
    of one that has ended (see `with_slots`). 0: all of them."""
    whole_text: bool = False
    """Whether rewards read what follows EOS."""

    def with_slots(self, rows: int) -> "Programs":
        """The same with `slots`, if sampling can refill and nothing after EOS matters."""
        able = self.stops_at_eos and self.sampling is not None and refill.able(self.sampling)
        return dataclasses.replace(self, slots=rows) if able else self

    def policy(self, trainable: Any, frozen: Any) -> Denoiser:
        """The policy that `trainable` describes."""
        return models.bind(self.model, {"params": frozen, **trainable})

    def init_state(self, trainable: Any) -> TrainState:
        """Step 0, laid out over the mesh."""
        trainable = jax.device_put(trainable, parallel.shardings(self.mesh, trainable))
        layout = parallel.shardings(self.mesh, jax.eval_shape(self.beside, trainable))
        with jax.set_mesh(self.mesh):
            state = jax.jit(self.beside, out_shardings=layout)(trainable)
        return state._replace(trainable=trainable)

    def beside(self, trainable: Any) -> TrainState:
        """Step 0 without `trainable` itself; a pure function."""
        return TrainState(
            jnp.zeros((), jnp.int32),
            None,
            self.optimizer.init(trainable),
            _copy(trainable) if self.phases else None,
            _copy(trainable) if self.ema else None,
        )

    def next_phase(self, state: TrainState) -> TrainState:
        """The policy's average (or the policy) becomes both policy and teacher; Adam restarts."""
        with jax.set_mesh(self.mesh):
            return self._next_phase(state)

    def rollout(
        self, behaviour: Any, frozen: Any, prompts: Any, first_row: int, key: PRNGKey
    ) -> tuple[Rollout, tuple[Probe | None, ...]]:
        """Samples `group_size` completions of each prompt, and each term's probes.

        `prompts` is (prompt [n,P], prompt_valid [n,P], template [n,L]). Rows are numbered from
        `first_row`: noise follows the number, so chunks of a batch equal the whole.
        """
        prompts = parallel.put(prompts, parallel.replicated(self.mesh))
        frozen = part_of(behaviour, frozen)
        with jax.set_mesh(self.mesh):
            return self._rollout(behaviour, frozen, prompts, jnp.int32(first_row), key)

    def inpaint(
        self, behaviour: Any, frozen: Any, rollout: Rollout, hints: Any, key: PRNGKey
    ) -> Rollout:
        """Samples the rows of `rollout` again around tokens given from outside.

        `hints` [B,L] holds a token where one is injected and MASK elsewhere. Only masked
        positions of the template can be hinted; they come back with `reveal_step` HINT.
        """
        hints = parallel.put(hints, parallel.batch_sharding(self.mesh))
        frozen = part_of(behaviour, frozen)
        with jax.set_mesh(self.mesh):
            return self._inpaint(behaviour, frozen, rollout, hints, key)

    def drift(self, behaviour: Any, frozen: Any, rollout: Rollout, key: PRNGKey) -> Metrics:
        """How far an approximate sampler was from its model, on some of the rows."""
        frozen = frozen if self.model.lora_rank else None
        with jax.set_mesh(self.mesh):
            return self._drift(behaviour, frozen, rollout, key)

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

    def measure(self, trainable: Any, frozen: Any, rollout: Rollout, key: PRNGKey) -> Metrics:
        """What the losses tell of a scored rollout, without an update; for terms without probes."""
        with jax.set_mesh(self.mesh):
            return self._measure(trainable, frozen, rollout, key)

    def trace_rollout(self, behaviour: Any, frozen: Any, prompts: Any, key: Any) -> Any:
        """`rollout` traced for arguments that may be `jax.ShapeDtypeStruct`s with layouts.

        For what only looks at the program (`.jaxpr`, `.lower().compile()`) and never runs it.
        """
        frozen = part_of(behaviour, frozen)
        first_row = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            return self._rollout.trace(behaviour, frozen, prompts, first_row, key)

    def trace_update(self, state: Any, frozen: Any, rollouts: Any, probes: Any, key: Any) -> Any:
        """`update`, traced like `trace_rollout`."""
        with jax.set_mesh(self.mesh):
            return self._update.trace(state, frozen, tuple(rollouts), tuple(probes), key)

    @property
    def stops_at_eos(self) -> bool:
        """Whether nothing after a completion's EOS matters, to any term or to rewards."""
        assert self.sampling is not None
        blind = [getattr(t.algorithm, "BLIND_AFTER_EOS", False) for t in self.terms]
        several = self.sampling.blocks > 1 and not self.sampling.remasks
        return several and all(blind) and not self.whole_text

    @functools.cached_property
    def _rollout(self) -> Any:
        assert self.sampling is not None
        sampling, size = self.sampling, self.group_size
        drafts = "drafts" in needs(self.terms)

        def laid(rows):
            return jax.lax.with_sharding_constraint(rows, parallel.batch_sharding(self.mesh))

        def rollout(behaviour, frozen, prompts, first_row, key):
            denoiser = self.policy(behaviour, frozen)
            prompt, valid, template = (jnp.repeat(x, size, axis=0) for x in prompts)
            row = first_row + jnp.arange(len(prompt), dtype=jnp.int32)
            draw_key, probe_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
            if 0 < self.slots < len(row):
                queue = (prompt, valid, template, row, row // size)
                done = refill.sample(denoiser, *queue, draw_key, sampling, self.slots, laid)
                return done, tuple(None for _ in self.terms)
            prompt, valid, template = laid((prompt, valid, template))
            context = (prompt, valid, template, row, row // size)
            # Whole groups on every device, or the first of each would have to travel.
            alike = size if len(prompts[0]) % parallel.batch_shards(self.mesh) == 0 else 1
            stop = self.stops_at_eos
            done = sampler.sample(denoiser, *context, draw_key, sampling, drafts, alike, stop)
            probes = [self._probe(denoiser, done, term, probe_key) for term in self.terms]
            return done, tuple(probes)

        return jax.jit(rollout)

    @functools.cached_property
    def _drift(self) -> Any:
        assert self.sampling is not None
        sampling = self.sampling

        def measure(behaviour, frozen, rollout, key):
            some = jax.tree.map(lambda x: x[:DRIFT_ROWS], rollout._replace(reward=None))
            return drift.measure(self.policy(behaviour, frozen), some, sampling, key)

        return jax.jit(measure)

    @functools.cached_property
    def _inpaint(self) -> Any:
        assert self.sampling is not None
        sampling, drafts = self.sampling, "drafts" in needs(self.terms)

        def inpaint(behaviour, frozen, rollout, hints, key):
            denoiser = self.policy(behaviour, frozen)
            sampled = (rollout.reveal_step >= 0) | (rollout.reveal_step == HINT)
            hinted = sampled & (hints != denoiser.mask_id)
            blank = jnp.where(sampled, denoiser.mask_id, rollout.tokens)
            template = jnp.where(hinted, hints, blank)
            context = (rollout.prompt, rollout.prompt_valid, template, rollout.row, rollout.group)
            done = sampler.sample(denoiser, *context, key, sampling, drafts)
            return done._replace(reveal_step=jnp.where(hinted, HINT, done.reveal_step))

        return jax.jit(inpaint)

    @functools.cached_property
    def _next_phase(self) -> Any:
        def next_phase(state):
            best = state.trainable if state.ema is None else state.ema
            state = state._replace(
                trainable=_copy(best),
                opt_state=self.optimizer.init(best),
                teacher=_copy(best),
                ema=None if state.ema is None else _copy(best),
            )
            # Fresh moments depend on nothing: without a layout every device would hold them whole.
            layout = parallel.shardings(self.mesh, state)
            return jax.lax.with_sharding_constraint(state, layout)

        return jax.jit(next_phase, donate_argnums=0)

    def _probe(self, denoiser: Denoiser, done: Rollout, term: Term, key: PRNGKey) -> Probe | None:
        if not hasattr(term.algorithm, "probes"):
            return None
        plan = term.algorithm.probes(done, jax.random.fold_in(key, 0), term.hyper)
        return probe.fill(denoiser, done, plan, jax.random.fold_in(key, 1))

    @functools.cached_property
    def _update(self) -> Any:
        return jax.jit(self._update_fn, donate_argnums=0)

    def _update_fn(self, state, frozen, rollouts, probes, key):
        rollout = _join(rollouts)
        term_probes = [_join(chunks) for chunks in zip(*probes, strict=True)]
        current = self.policy(state.trainable, frozen)
        reference = None
        if "reference" in needs(self.terms):
            reference = models.bind(self.model, {"params": frozen})
        behaviour = current if self.inner_updates > 1 else None
        if self.phases:
            behaviour = self.policy(state.teacher, frozen)
        shards = parallel.batch_shards(self.mesh)
        in_pieces = functools.partial(pieces.in_pieces, count=self.microbatches, shards=shards)
        frozen_models = Models(
            in_pieces(current),
            behaviour and in_pieces(behaviour),
            reference and in_pieces(reference),
        )
        # A loss sees the teacher of a method with phases, for targets too large to prepare (whole
        # vocabulary rows); theta_old of other methods enters through `prepare` alone.
        teacher = behaviour if self.phases else None

        def bound(trainable):
            return Models(self.policy(trainable, frozen), teacher, reference)

        def prepare(index):
            inner_key = jax.random.fold_in(jax.random.fold_in(key, 2), index)
            inner = Inner(index, self.inner_updates, jax.random.fold_in(key, 3))
            return tuple(
                t.algorithm.prepare(frozen_models, rollout, p, inner_key, inner, t.hyper)
                for t, p in zip(self.terms, term_probes, strict=True)
            )

        def inner_update(state, batches):
            read = models.in_compute_type(self.model, state.trainable)
            args = (read, batches, self.microbatches, shards)
            grads, metrics = objective.gradient(self.terms, bound, *args)
            grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, state.trainable)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.trainable)
            policy = {name: tree for name, tree in grads.items() if name != "heads"}
            metrics["grad_norm"] = optax.tree.norm(policy)  # what clip_norm clips
            trainable = optax.apply_updates(state.trainable, updates)
            ema = state.ema
            if ema is not None:
                ema = optax.incremental_update(trainable, ema, 1 - self.ema)
            return state._replace(trainable=trainable, opt_state=opt_state, ema=ema), metrics

        if self.inner_updates == 1:
            state, metrics = inner_update(state, prepare(jnp.int32(0)))
        else:
            batches = jax.lax.map(prepare, jnp.arange(self.inner_updates))
            state, stacked = jax.lax.scan(inner_update, state, batches)
            metrics = {name: jnp.mean(values) for name, values in stacked.items()}
        state = state._replace(step=state.step + 1)
        # The layout it came with, so that the next step finds the program that this one compiled.
        layout = parallel.shardings(self.mesh, state)
        return jax.lax.with_sharding_constraint(state, layout), metrics

    @functools.cached_property
    def _measure(self) -> Any:
        def measure(trainable, frozen, rollout, key):
            bound = Models(self.policy(trainable, frozen), None, None)
            inner = Inner(jnp.int32(0), 1, key)
            batches = tuple(
                t.algorithm.prepare(bound, rollout, None, key, inner, t.hyper) for t in self.terms
            )
            return objective.value(self.terms, bound, batches)[1]

        return jax.jit(measure)


def part_of(trainable: Any, frozen: Any) -> Any:
    """`frozen` if a policy is made of it; None if it is but a reference beside whole weights."""
    return None if "params" in trainable else frozen


def frozen_copy(model: models.Config, params: Any) -> Any:
    """A reference policy beside trained weights, in the compute type: all that it is read in."""
    return jax.tree.map(lambda x: jnp.array(x, model.dtype, copy=True), params)


def _copy(tree: Any) -> Any:
    """New buffers: a donated state must not hold one array twice."""
    return jax.tree.map(jnp.copy, tree)


def _join(chunks: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *chunks)
