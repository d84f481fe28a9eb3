"""What one outer step does: stage 1 (supervised warm start) and stage 2 (reinforcement)."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dmrl import data, evaluate, models, optim, parallel, rescue, scoring, tokenizer, trajectories
from dmrl.held import Evaluated, Held
from dmrl.objective import make_term, needs
from dmrl.programs import Programs, TrainState
from dmrl.recipe import Loop, Recipe
from dmrl.scoring import Scored
from dmrl.types import TEMPLATE, Probe, Rollout


class StepResult(NamedTuple):
    """What a step leaves for the loop to write down."""

    state: TrainState
    values: dict[str, float]
    completions: Sequence[Mapping[str, Any]] = ()
    trajectories: Sequence[Mapping[str, Any]] = ()


@runtime_checkable
class Stage(Protocol):
    """A stage as the loop sees it."""

    name: str
    steps: int
    batches: Any
    """A resumable grain iterator over example indices."""

    def init(self, trainable: Any) -> TrainState:
        """The state before the first step."""

    def step(self, state: TrainState, number: int, index: np.ndarray, key: jax.Array) -> StepResult:
        """One outer step. `state` is donated."""

    def evaluate(self, state: TrainState, number: int) -> Evaluated | None:
        """Held-out measurements due after `number` steps; None if none is due."""


def given(
    prompt: np.ndarray, valid: np.ndarray, tokens: np.ndarray, free: np.ndarray, group_size: int
) -> Any:
    """Completions [B,L] from outside as a finished Rollout in numpy, so that losses see what they
    always see. `free` [B,L]: the positions that a sampler would have filled."""
    zeros, rows = np.zeros(tokens.shape, np.float32), np.arange(len(tokens), dtype=np.int32)
    fields: dict[str, Any] = {
        "prompt": prompt,
        "prompt_valid": valid,
        "tokens": tokens,
        "reveal_step": np.where(free, 0, TEMPLATE).astype(np.int32),
        "log_prob": zeros,
        "entropy": zeros,
        "row": rows,
        "group": rows // group_size,
        "length": np.full(len(tokens), tokens.shape[1], np.int32),
    }
    return Rollout(**fields)


class WarmStart:
    """Stage 1: masked-diffusion SFT on the task's own reference completions."""

    name = "warm_start"

    def __init__(self, recipe: Recipe, mesh: Any, held: Held) -> None:
        """Raises ValueError for data or sizes that the stage cannot work with."""
        self.recipe, self.held = recipe, held
        self.steps = recipe.warm_start.steps
        self.train = held.prompts["train"]
        self.targets = data.answers(
            recipe.task, recipe.tokenizer, self.train, recipe.model.eos_token_id
        )
        seed = data.stream_seed(recipe.seed, self.name)
        self.batches = data.batches(len(self.targets), recipe.warm_start.batch, seed)
        self.programs = Programs(
            recipe.model,
            (make_term("sft", 1.0, {"complementary": recipe.warm_start.complementary}),),
            None,
            optim.make(recipe.warm_optimizer, self.steps),
            mesh,
        )
        check_shared("warm_start.batch", recipe.warm_start.batch, mesh)

    def init(self, trainable: Any) -> TrainState:
        """From the fresh weights."""
        return self.programs.init_state(trainable)

    def step(self, state: TrainState, number: int, index: np.ndarray, key: jax.Array) -> StepResult:
        """One supervised update."""
        del number
        start = time.perf_counter()
        prompt, valid, template = self.train.rows(index)
        free = template == self.recipe.model.mask_token_id
        example = given(prompt, valid, self.targets[index], free, group_size=1)
        example = parallel.put(example, parallel.batch_sharding(self.programs.mesh))
        state, metrics = self.programs.update(state, self.held.frozen, [example], [(None,)], key)
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - start
        return StepResult(state, values | {"time/update": seconds, "step_time": seconds})

    def evaluate(self, state: TrainState, number: int) -> Evaluated | None:
        """Validation every so often; done when the solve rate reaches the target."""
        settings = self.recipe.warm_start
        if not number or (number % settings.evaluate_every and number < self.steps):
            return None
        size = self.recipe.evaluation.size
        greedy = self.held.unlearned
        found = self.held.measure(state.trainable, "validation", [greedy], size)
        rate = found.values[f"eval/validation/{evaluate.setting_name(greedy)}/solved"]
        return found._replace(done=rate >= settings.target)


def reinforcement(recipe: Recipe, mesh: Any) -> Programs:
    """The programs of stage 2."""
    loop = recipe.loop
    made = Programs(
        recipe.model,
        recipe.terms,
        recipe.sampling,
        optim.make(recipe.optimizer, _updates(loop)),
        mesh,
        loop.num_generations,
        loop.num_iterations,
        loop.microbatches,
        loop.phase_steps > 0,
        loop.ema,
        whole_text=loop.whole_text,
    )
    if not loop.refill or loop.rollout_chunks == 1 or recipe.rescue.fraction:
        return made
    return made.with_slots(loop.prompts_per_step * loop.num_generations // loop.rollout_chunks)


def check_rows(loop: Loop, mesh: Any) -> None:
    """Raises ValueError where the rows of a rollout chunk do not divide among the devices."""
    rows = loop.prompts_per_step * loop.num_generations // loop.rollout_chunks
    check_shared("completions of a chunk", rows, mesh)


def _updates(loop: Loop) -> int:
    """Optimiser steps over which the learning rate is scheduled."""
    return (loop.phase_steps or loop.steps) * loop.num_iterations


def with_heads(recipe: Recipe, trainable: Any) -> Any:
    """`trainable`, with fresh heads beside it if a term has any."""
    names = needs(recipe.terms) & models.heads.HEADS.keys()
    if not names:
        return trainable
    key = jax.random.fold_in(jax.random.key(recipe.seed), 20)
    return {**trainable, "heads": models.heads.init(recipe.model, names, key)}


class Reinforce:
    """Stage 2: rollouts, rewards on the host, mu inner updates."""

    name = "rl"

    def __init__(self, recipe: Recipe, mesh: Any, held: Held) -> None:
        """Raises ValueError for data or sizes that the stage cannot work with."""
        self.recipe, self.held = recipe, held
        loop = recipe.loop
        self.steps = loop.steps
        check_rows(loop, mesh)
        self.train = held.prompts["train"]
        if "order" in needs(recipe.terms):
            check_single(recipe, self.train.template)
        seed = data.stream_seed(recipe.seed, self.name)
        self.batches = data.batches(len(self.train.examples), loop.prompts_per_step, seed)
        self.programs = reinforcement(recipe, mesh)
        self.schedule = optim.learning_rate(recipe.optimizer, _updates(loop))
        self.traces: rescue.Traces | None = None
        if recipe.rescue.fraction:
            self.traces = rescue.encode_traces(
                recipe.task,
                self.train.examples,
                lambda text: recipe.tokenizer.encode(text, add_special_tokens=False),
                recipe.sampling.length,
            )

    def init(self, trainable: Any) -> TrainState:
        """From the warm-started (or converted) weights, with fresh heads if a term has any."""
        return self.programs.init_state(with_heads(self.recipe, trainable))

    def step(self, state: TrainState, number: int, index: np.ndarray, key: jax.Array) -> StepResult:
        """Sample in chunks, score each while the next is sampled, update.

        With slots that refill there is one chunk.
        """
        start, loop = time.perf_counter(), self.recipe.loop
        size, in_phase = loop.num_generations, number % (loop.phase_steps or loop.steps)
        behaviour = state.trainable if state.teacher is None else state.teacher
        count = 1 if self.programs.slots else loop.rollout_chunks
        chunks = np.split(index, count)
        inputs = (np.split(x, count) for x in self.train.rows(index))
        launched, first_row, busy = [], 0, 0.0
        for prompts in zip(*inputs, strict=True):
            launched.append(
                self.programs.rollout(behaviour, self.held.frozen, prompts, first_row, key)
            )
            first_row += len(prompts[0]) * size
            busy = busy or time.perf_counter()  # the devices are, while the others are launched
        scored, waited, rewarding = [], time.perf_counter() - busy, 0.0
        for chunk, (rollout, probes) in zip(chunks, launched, strict=True):
            clock = time.perf_counter()
            jax.block_until_ready((rollout, probes))
            waited += time.perf_counter() - clock
            clock = time.perf_counter()
            rows = np.repeat(chunk, size)
            found = self._score([self.train.examples[i] for i in rows], rollout, probes)
            if self.traces is not None:
                found = self._rescue(found, self.traces.of(rows), behaviour, number, key)
            scored.append(found)
            rewarding += time.perf_counter() - clock
        drift = {}
        if self.recipe.sampling.approximate:
            drift = self.programs.drift(behaviour, self.held.frozen, launched[0][0], key)
        before_update = time.perf_counter()
        ready = [scoring.rewarded(s, self._put) for s in scored]
        state, metrics = self.programs.update(
            state, self.held.frozen, [r for r, _ in ready], [p for _, p in ready], key
        )
        values = scoring.statistics(self.recipe, scored)  # on the host, while the device updates
        values |= {k: float(v) for k, v in jax.device_get(metrics | drift).items()}
        end = time.perf_counter()
        values |= {
            "learning_rate": float(self.schedule(in_phase * loop.num_iterations)),
            "time/rollout": waited,
            "time/reward": rewarding,
            "time/update": end - before_update,
            "step_time": end - start,
            "tokens_per_s": values["num_tokens"] / (end - start),
        }
        if in_phase + 1 == loop.phase_steps:  # the last one too: it ends with its average
            state = self.programs.next_phase(state)
        if not loop.completions_every or (number + 1) % loop.completions_every:
            return StepResult(state, values)
        told = trajectories.of_step(self.recipe, number + 1, scored[0])
        return StepResult(state, values, self._completions(number, scored), told)

    def evaluate(self, state: TrainState, number: int) -> Evaluated | None:
        """Validation every so often; all splits and settings before and after training."""
        setting, last = self.recipe.evaluation, number == self.steps
        settings = self.held.settings
        if number and not last:
            if not setting.every or number % setting.every:
                return None
            return self.held.measure(state.trainable, "validation", settings, setting.size)
        values: dict[str, float] = {}
        rows: list[Mapping[str, Any]] = []
        for split in ("validation", *setting.splits):
            when = "after" if last else "before"
            size = setting.size if split == "validation" else None
            found = self.held.measure(state.trainable, split, settings, size, when)
            values |= found.values
            rows += found.trajectories
        return Evaluated(values, rows, done=last)

    def _score(
        self, examples: Sequence[Any], rollout: Rollout, probes: Sequence[Probe | None]
    ) -> Scored:
        return scoring.score(self.recipe, examples, rollout, probes)

    def _rescue(
        self,
        scored: Scored,
        traces: rescue.Traces,
        behaviour: Any,
        number: int,
        key: jax.Array,
    ) -> Scored:
        """Samples all-wrong groups again around hints; right ones take the place of wrong ones."""
        rule, reward, host = self.recipe.rescue, scored.parts["reward"], scored.host
        wrong = rule.all_wrong(reward, host.group)
        if not wrong.any():
            return scored
        mask_id = self.recipe.model.mask_token_id
        hints = rule.hints(traces, wrong, host.row, self.recipe.seed, number, mask_id)
        again = self.programs.inpaint(
            behaviour, self.held.frozen, scored.rollout, hints, jax.random.fold_in(key, 4)
        )
        hinted = self._score(scored.examples, again, scored.probes)
        taken = rule.replaced(reward, hinted.parts["reward"], host.group)
        on_devices = self._put(taken)

        def choose(new: Any, old: Any) -> Any:
            on_host = isinstance(new, np.ndarray)
            rows = (taken if on_host else on_devices).reshape(-1, *[1] * (new.ndim - 1))
            return (np if on_host else jnp).where(rows, new, old)

        return scored._replace(
            rollout=jax.tree.map(choose, hinted.rollout, scored.rollout),
            host=jax.tree.map(choose, hinted.host, host),
            parts=jax.tree.map(choose, hinted.parts, scored.parts),
            calls=scored.calls + hinted.calls,
        )

    def _put(self, x: np.ndarray) -> jax.Array:
        return parallel.put(x, parallel.batch_sharding(self.programs.mesh))

    def _completions(self, number: int, scored: Sequence[Scored]) -> list[dict[str, Any]]:
        r = self.recipe
        how = r.model.mask_token_id, r.model.eos_token_id, r.loop.whole_text
        return [
            {
                "step": number + 1,
                "prompt": r.task.prompt(example),
                "template": r.task.template(example),
                "completion": text,
                **{name: float(values[i]) for name, values in s.parts.items()},
            }
            for s in scored
            for i, (example, text) in enumerate(
                zip(s.examples, tokenizer.decode(r.tokenizer, s.host.tokens, *how), strict=True)
            )
        ]


def check_shared(what: str, count: int, mesh: Any) -> None:
    """Raises ValueError where `count` rows do not divide among the devices."""
    shards = parallel.batch_shards(mesh)
    if count % shards:
        raise ValueError(
            f"{what}: {count} cannot be shared evenly by the {shards} devices of the mesh's data "
            f"and fsdp axes; make it a multiple of {shards}, or these axes smaller"
        )


def check_single(recipe: Recipe, template: np.ndarray) -> None:
    """Raises ValueError where a step has to reveal several positions at once: an order is trained
    on decisions for one."""
    sampling = recipe.sampling
    masked = template.reshape(len(template), sampling.blocks, -1) == recipe.model.mask_token_id
    most, steps = int(masked.sum(axis=2).max()), sampling.steps // sampling.blocks
    if most > steps:
        raise ValueError(
            f"sampling.steps={sampling.steps}: a block has up to {most} masks and {steps} steps, "
            "but an order is trained a position a step: take more steps (a term's too), or smaller "
            "blocks"
        )
