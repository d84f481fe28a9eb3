"""What all recipes share: sections made from the dataclasses that own their defaults."""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict

from dmrl import models, optim, recipe, tasks
from dmrl.diffusion.sampler import Sampling
from dmrl.programs import make_term


def section(cls: Any, **values: Any) -> ConfigDict:
    """All fields of a dataclass, its defaults unless given here, so each can be overridden."""
    fields = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            fields[field.name] = values.pop(field.name)
        elif field.default is not dataclasses.MISSING:
            fields[field.name] = field.default
        else:
            raise TypeError(f"{cls.__name__}.{field.name} has no default: the recipe must set it")
    if values:
        raise TypeError(f"{cls.__name__} has no {', '.join(values)}")
    return ConfigDict(fields)


def term(name: str, weight: float, **values: Any) -> ConfigDict:
    """One term of the objective: its weight and all its hyper-parameters."""
    hyper = make_term(name, weight, values).hyper
    return ConfigDict({"weight": weight, **dataclasses.asdict(hyper)})


def base(
    *,
    task: ConfigDict,
    tokenizer: str,
    model: ConfigDict,
    max_prompt_length: int,
    sampling: ConfigDict,
    terms: dict[str, ConfigDict],
    optimizer: ConfigDict,
    loop: ConfigDict,
    warm_start: ConfigDict,
    evaluation: ConfigDict,
) -> ConfigDict:
    """A whole recipe; a later key overrides nothing, every option stands once."""
    return ConfigDict(
        {
            "seed": 0,
            "dry_run": False,
            "task": task,
            "tokenizer": tokenizer,
            "model": model,
            "max_prompt_length": max_prompt_length,
            "sampling": sampling,
            "terms": ConfigDict(terms, sort_keys=False),
            "optimizer": optimizer,
            **loop,
            "warm_start": warm_start,
            "evaluation": evaluation,
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "metrics": (),
        }
    )


def make_task(name: str, **options: Any) -> ConfigDict:
    """A task by module name with all its options."""
    return ConfigDict(
        {"name": name, **dataclasses.asdict(typing.cast(Any, tasks.load(name, **options)))}
    )


def make_model(init_from: str = "", **values: Any) -> ConfigDict:
    """Model shape and where its weights come from ("" trains from scratch)."""
    return ConfigDict({"init_from": init_from, **section(models.Config, **values)})


def make_warm_start(optimizer: ConfigDict | None = None, **values: Any) -> ConfigDict:
    """Stage 1 with its own optimiser."""
    made = section(recipe.WarmStart, **values)
    made.optimizer = optimizer or section(optim.Optimizer)
    return made


def preset(arg: str | None, presets: dict[str, Any]) -> ConfigDict:
    """The preset that `--config=FILE:arg` names; the first one without an argument."""
    name = arg or next(iter(presets))
    if name not in presets:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(presets)}")
    return presets[name]()


__all__ = [
    "Sampling",
    "base",
    "make_model",
    "make_task",
    "make_warm_start",
    "preset",
    "section",
    "term",
]
