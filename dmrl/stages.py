"""What one outer step does: stage 1 (supervised warm start) and stage 2 (reinforcement)."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dmrl import data, evaluate, optim, parallel, tokenizer
from dmrl.held import Evaluated, Held
from dmrl.programs import Programs, TrainState, make_term
from dmrl.recipe import Recipe
from dmrl.types import TEMPLATE, Probe, Rollout


class StepResult(NamedTuple):
    """What a step leaves for the loop to write down."""

    state: TrainState
    values: dict[str, float]
    completions: list[dict[str, Any]]


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
            (make_term("sft", 1.0, {}),),
            None,
            optim.make(recipe.warm_optimizer, self.steps),
            mesh,
        )
        _check_shared("warm_start.batch", recipe.warm_start.batch, mesh)

    def init(self, trainable: Any) -> TrainState:
        """From the fresh weights."""
        return self.programs.init_state(trainable)

    def step(self, state: TrainState, number: int, index: np.ndarray, key: jax.Array) -> StepResult:
        """One supervised update."""
        del number
        start = time.perf_counter()
        example = jax.device_put(self._example(index), parallel.batch_sharding(self.programs.mesh))
        state, metrics = self.programs.update(state, self.held.frozen, [example], [(None,)], key)
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - start
        return StepResult(state, values | {"time/update": seconds, "step_time": seconds}, [])

    def _example(self, index: np.ndarray) -> Rollout:
        """Targets as a finished rollout, so that the loss sees what it always sees."""
        template = self.train.template[index]
        free = template == self.recipe.model.mask_token_id
        zeros, rows = jnp.zeros(template.shape), jnp.arange(len(index), dtype=jnp.int32)
        return Rollout(
            prompt=jnp.asarray(self.train.prompt[index]),
            prompt_valid=jnp.asarray(self.train.prompt_valid[index]),
            tokens=jnp.asarray(self.targets[index]),
            reveal_step=jnp.where(free, 0, TEMPLATE).astype(jnp.int32),
            log_prob=zeros,
            entropy=zeros,
            row=rows,
            group=rows,
            length=jnp.full(len(index), template.shape[1], jnp.int32),
        )

    def evaluate(self, state: TrainState, number: int) -> Evaluated | None:
        """Validation every so often; done when the solve rate reaches the target."""
        settings = self.recipe.warm_start
        if not number or (number % settings.evaluate_every and number < self.steps):
            return None
        size = self.recipe.evaluation.size
        greedy = self.held.greedy
        found = self.held.measure(state.trainable, "validation", [greedy], size)
        rate = found.values[f"eval/validation/{evaluate.setting_name(greedy)}/solved"]
        return found._replace(done=rate >= settings.target)


class Reinforce:
    """Stage 2: rollouts, rewards on the host, mu inner updates."""

    name = "rl"

    def __init__(self, recipe: Recipe, mesh: Any, held: Held) -> None:
        """Raises ValueError for data or sizes that the stage cannot work with."""
        self.recipe, self.held = recipe, held
        loop = recipe.loop
        self.steps = loop.steps
        rows = loop.prompts_per_step * loop.num_generations // loop.rollout_chunks
        _check_shared("completions of a chunk", rows, mesh)
        self.train = held.prompts["train"]
        seed = data.stream_seed(recipe.seed, self.name)
        self.batches = data.batches(len(self.train.examples), loop.prompts_per_step, seed)
        updates = (loop.phase_steps or loop.steps) * loop.num_iterations
        self.optimizer = optim.make(recipe.optimizer, updates)
        self.programs = Programs(
            recipe.model,
            recipe.terms,
            recipe.sampling,
            self.optimizer,
            mesh,
            loop.num_generations,
            loop.num_iterations,
            loop.microbatches,
            loop.phase_steps > 0,
            loop.ema,
        )
        self.schedule = optim.learning_rate(recipe.optimizer, updates)

    def init(self, trainable: Any) -> TrainState:
        """From the warm-started (or converted) weights."""
        return self.programs.init_state(trainable)

    def step(self, state: TrainState, number: int, index: np.ndarray, key: jax.Array) -> StepResult:
        """Sample in chunks, score each while the next is sampled, update."""
        start, loop = time.perf_counter(), self.recipe.loop
        size, in_phase = loop.num_generations, number % (loop.phase_steps or loop.steps)
        behaviour = state.trainable if state.teacher is None else state.teacher
        chunks = np.split(index, loop.rollout_chunks)
        launched, first_row = [], 0
        for chunk in chunks:
            prompts = tuple(x[chunk] for x in self.train[1:])
            launched.append(
                self.programs.rollout(behaviour, self.held.frozen, prompts, first_row, key)
            )
            first_row += len(chunk) * size
        scored, waited, rewarding = [], 0.0, 0.0
        for chunk, (rollout, probes) in zip(chunks, launched, strict=True):
            clock = time.perf_counter()
            jax.block_until_ready((rollout, probes))
            waited += time.perf_counter() - clock
            clock = time.perf_counter()
            examples = [self.train.examples[i] for i in np.repeat(chunk, size)]
            scored.append(self._score(examples, rollout, probes))
            rewarding += time.perf_counter() - clock
        before_update = time.perf_counter()
        state, metrics = self.programs.update(
            state, self.held.frozen, [s.rollout for s in scored], [s.probes for s in scored], key
        )
        values = self._values(scored)  # on the host, while the device updates
        values |= {k: float(v) for k, v in jax.device_get(metrics).items()}
        end = time.perf_counter()
        values |= {
            "learning_rate": float(self.schedule(in_phase * loop.num_iterations)),
            "time/rollout": waited,
            "time/reward": rewarding,
            "time/update": end - before_update,
            "step_time": end - start,
            "tokens_per_s": values["num_tokens"] / (end - start),
        }
        if in_phase + 1 == loop.phase_steps and number + 1 < self.steps:
            state = self.programs.next_phase(state)
        return StepResult(state, values, self._completions(number, scored))

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
    ) -> "Scored":
        """Terminal rewards of the completions and of every probe filling, in one trip."""
        parts, texts = self._rewards(examples, np.asarray(rollout.tokens))
        reward = np.array([p["reward"] for p in parts], np.float32)
        filled = []
        for probe in probes:
            if probe is not None:
                fills = np.asarray(probe.fills)
                copies = fills.shape[1] * fills.shape[2]
                repeated = [e for e in examples for _ in range(copies)]
                fill_parts, _ = self._rewards(repeated, fills.reshape(-1, fills.shape[-1]))
                rewards = np.array([p["reward"] for p in fill_parts], np.float32)
                probe = probe._replace(reward=self._put(rewards.reshape(fills.shape[:3])))
            filled.append(probe)
        return Scored(
            rollout._replace(reward=self._put(reward)), tuple(filled), parts, texts, examples
        )

    def _rewards(
        self, examples: Sequence[Any], tokens: np.ndarray
    ) -> tuple[list[dict[str, float]], list[str]]:
        model = self.recipe.model
        texts = tokenizer.decode(
            self.recipe.tokenizer, tokens, model.mask_token_id, model.eos_token_id
        )
        score = self.recipe.task.score
        return [score(e, t) for e, t in zip(examples, texts, strict=True)], texts

    def _put(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(x, parallel.batch_sharding(self.programs.mesh))

    def _values(self, scored: Sequence["Scored"]) -> dict[str, float]:
        """TRL's names for what the rollout showed."""
        rollout = jax.tree.map(
            lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *(s.rollout for s in scored)
        )
        parts = [p for s in scored for p in s.parts]
        sampled = rollout.reveal_step >= 0
        values = {
            f"rewards/{name}/mean": float(np.mean([p[name] for p in parts]))
            for name in parts[0]
            if name != "reward"
        }
        groups = rollout.reward.reshape(-1, self.recipe.loop.num_generations)
        values |= _spread("", groups) | {
            "entropy": float(np.mean(rollout.entropy[sampled])) if sampled.any() else 0.0,
            "completions/mean_length": float(np.mean(rollout.length)),
            "num_tokens": float(np.sum(sampled)),
            "reward_calls": float(len(parts) + _fillings(scored)),
        }
        for i, term in enumerate(self.recipe.terms):
            found = [s.probes[i] for s in scored]
            rewards = [np.asarray(p.reward) for p in found if p is not None]
            if rewards:
                siblings = np.concatenate(rewards).reshape(-1, rewards[0].shape[-1])
                values |= _spread(f"{term.name}/step_", siblings)
        return values

    def _completions(self, number: int, scored: Sequence["Scored"]) -> list[dict[str, Any]]:
        every = self.recipe.loop.completions_every
        if not every or (number + 1) % every:
            return []
        return [
            {
                "step": number + 1,
                "prompt": self.recipe.task.prompt(example),
                "template": self.recipe.task.template(example),
                "completion": text,
                **parts,
            }
            for s in scored
            for example, text, parts in zip(s.examples, s.texts, s.parts, strict=True)
        ]


class Scored(NamedTuple):
    """A chunk of a rollout with its rewards, and what the host read in it."""

    rollout: Rollout
    probes: tuple[Probe | None, ...]
    parts: list[dict[str, float]]
    texts: list[str]
    examples: Sequence[Any]


def _fillings(scored: Sequence[Scored]) -> int:
    return sum(np.size(p.reward) for s in scored for p in s.probes if p is not None)


def _check_shared(what: str, count: int, mesh: Any) -> None:
    shards = parallel.batch_shards(mesh)
    if count % shards:
        raise ValueError(
            f"{what}: {count} cannot be shared evenly by the {shards} devices of the mesh's data "
            f"and fsdp axes; make it a multiple of {shards}, or these axes smaller"
        )


def _spread(prefix: str, groups: np.ndarray) -> dict[str, float]:
    """Mean reward, mean within-group std, and the share of groups without a signal."""
    std = groups.std(axis=1)
    zero = f"{prefix.removesuffix('step_')}frac_reward_zero_std"
    return {
        f"{prefix}reward": float(groups.mean()),
        f"{prefix}reward_std": float(std.mean()),
        zero: float(np.mean(std == 0)),
    }
