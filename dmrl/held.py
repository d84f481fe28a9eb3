"""Held-out splits: tokenized once, decoded with a few samplings, compiled once a size of split."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dmrl import data, evaluate, optim, parallel, trajectories
from dmrl.diffusion.sampler import Sampling
from dmrl.programs import Programs
from dmrl.recipe import Recipe


class Evaluated(NamedTuple):
    """Measurements of one moment, example trajectories, and whether the stage is finished."""

    values: dict[str, float]
    trajectories: list[Mapping[str, Any]]
    done: bool = False


class Held:
    """All splits of a run, and the programs that decode them.

    `frozen` is the tree that never changes (see `Programs`), set once the weights are there.
    """

    def __init__(self, recipe: Recipe, mesh: Any) -> None:
        """Raises ValueError for a split or a setting of the evaluation that cannot work."""
        if recipe.tokenizer is None:
            raise ValueError(
                "no tokenizer: set --config.tokenizer to a folder with tokenizer.json (or to "
                "'characters'), or --config.model.init_from to weights that come with one"
            )
        self.recipe, self.mesh, self.frozen = recipe, mesh, None
        own = recipe.sampling
        self.greedy = own.greedy
        self.unlearned = own.greedy
        """By a heuristic where `own` is learned: before there is an order, and to learn from."""
        if own.learned:
            self.unlearned = dataclasses.replace(own.greedy, order="low_confidence")
        more = [
            _asked(self.greedy, n, order)
            for order in (self.greedy.order, *recipe.evaluation.orders)
            for n in recipe.evaluation.steps
        ]
        exact = dataclasses.replace(own, cache="none")  # what the approximation costs in reward
        self.settings = list(dict.fromkeys([own, exact, *more]))
        """The run's own way of decoding, the same without a cache, and those the recipe adds."""
        shards = parallel.batch_shards(mesh)
        self.batch = -(-recipe.evaluation.batch // shards) * shards
        self.key = jax.random.fold_in(jax.random.key(recipe.seed), 10)
        splits = dict.fromkeys(("train", "validation", *recipe.evaluation.splits))
        self.prompts = {split: self._tokenize(split) for split in splits}
        self._programs: dict[Sampling, Programs] = {}

    def _tokenize(self, split: str) -> data.Prompts:
        r = self.recipe
        return data.tokenize(
            r.task,
            r.tokenizer,
            split,
            r.max_prompt_length,
            r.sampling.length,
            r.model.mask_token_id,
            buckets=r.prompt_buckets,
            long_prompts=r.long_prompts,
        )

    def programs(self, sampling: Sampling) -> Programs:
        """The sampler of a setting, kept: it compiles once."""
        if sampling not in self._programs:
            unused = optim.make(self.recipe.optimizer, 1)
            made = Programs(self.recipe.model, (), sampling, unused, self.mesh)
            self._programs[sampling] = made.with_slots(self.batch)
        return self._programs[sampling]

    def measure(
        self,
        trainable: Any,
        split: str,
        settings: Sequence[Sampling],
        size: int | None = None,
        when: str = "",
    ) -> Evaluated:
        """Scores of a split's first `size` examples under each setting.

        With `when` ("before", "after"), also the trajectories that the report shows.
        """
        r, prompts = self.recipe, self.prompts[split]
        if size is not None:
            prompts = prompts.first(size)
        values: dict[str, float] = {}
        rows: list[Mapping[str, Any]] = []
        read = trajectories.reader(r)
        for setting in settings:
            decoded = evaluate.decode(
                self.programs(setting),
                trainable,
                self.frozen,
                prompts,
                r.task,
                r.tokenizer,
                self.batch,
                self.key,
            )
            prefix = f"eval/{split}/{evaluate.setting_name(setting)}"
            values |= {f"{prefix}/{k}": v for k, v in evaluate.metrics(decoded)}
            if when:
                count = r.evaluation.trajectories
                rows += trajectories.of_split(
                    decoded, prompts, r.task, read, setting, split, when, count
                )
        return Evaluated(values, rows)


def _asked(greedy: Sampling, steps: int, order: str) -> Sampling:
    """Raises ValueError where the run's other rules do not go with them, or no order is learned."""
    try:
        found = dataclasses.replace(greedy, steps=steps, order=order)
    except ValueError as error:
        raise ValueError(f"decoding in evaluation.steps={steps} by {order!r}: {error}") from None
    if found.learned and not greedy.learned:
        raise ValueError(f"evaluation.orders: {order!r}, but the run trains no order")
    return found
