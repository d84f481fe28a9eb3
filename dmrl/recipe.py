"""A resolved config (plain nested dict) -> the objects of a run.

Every section of the config is a dataclass of its room; this file only knows which is which.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from dmrl import checks, data, metrics, models, optim, tasks, tokenizer
from dmrl.diffusion.sampler import Sampling
from dmrl.objective import Term, make_term
from dmrl.rescue import Rescue

Section = TypeVar("Section")


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Stage 1: supervised training until the held-out solve rate reaches `target`."""

    steps: int = 0
    """At most this many; 0 skips the stage."""
    target: float = 1.0
    """Stop as soon as the share of validation examples `solved`, decoded greedily in
    `sampling.steps` steps, is at least this."""
    batch: int = 128
    evaluate_every: int = 10
    complementary: bool = False
    """Each example twice a batch, with a mask and its inverse (LLaDA2.0)."""


@dataclasses.dataclass(frozen=True)
class Imitation:
    """Before stage 2 of a run that trains an order: supervised by max-confidence."""

    steps: int = 0
    """At most this many; 0 leaves the order as it was drawn."""
    target: float = 0.95
    """Stop as soon as the order's favourite is a most confident position in at least this share
    of validation states."""
    batch: int = 16
    """Trajectories of an update, each with as many states as masks; as many validate."""
    evaluate_every: int = 10


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When and how held-out splits are decoded."""

    every: int = 50
    """Outer steps between validations; 0: only before and after."""
    size: int = 256
    """Examples per validation."""
    steps: tuple[int, ...] = ()
    """Numbers of denoising steps to decode with greedily, beside the run's own settings."""
    orders: tuple[str, ...] = ()
    """Further orders to decode with, each in all of `steps`."""
    splits: tuple[str, ...] = ("test",)
    """Decoded whole, once before and once after training."""
    batch: int = 256
    trajectories: int = 12
    """Completions of each split that the report shows step by step."""


REWARD_TEXTS = ("upto_eos", "full")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The outer loop of stage 2."""

    steps: int
    """Outer steps: one rollout and `num_iterations` updates each."""
    prompts_per_step: int
    num_generations: int
    """Completions per prompt (the group)."""
    num_iterations: int = 1
    """mu: inner updates on one rollout."""
    microbatches: int = 1
    """Pieces over which a gradient is accumulated."""
    phase_steps: int = 0
    """Outer steps of a phase, whose rollouts all come from the policy as it was at its start (a
    frozen teacher, for DTM); the optimiser restarts with each. 0: no phases."""
    ema: float = 0.0
    """Decay of the average of the weights with which the next phase begins; 0: the weights."""
    rollout_chunks: int = 1
    """Pieces in which a rollout runs, so that rewards of one overlap sampling of the next."""
    refill: bool = True
    """Where completions end early and nothing after EOS matters to terms and rewards: all prompts
    of a step in a queue instead, and as many rows at work as a piece has; rewards then wait for
    the last completion. False for rewards that take long."""
    reward_text: str = "upto_eos"
    """What rewards in training read of a completion, one of REWARD_TEXTS: the text before its
    first EOS, or all of it, as in the code of d1 and SPG, so that sampling cannot stop at EOS.
    Evaluations read the former, and losses count tokens up to EOS either way, as theirs do."""
    checkpoint_every: int = 50
    checkpoints_kept: int = 2
    completions_every: int = 50
    """Outer steps between samples of completions written to completions.jsonl, and those of one
    prompt, with what they were branched into, to trajectories.jsonl."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_step",
            "num_iterations",
            "microbatches",
            "rollout_chunks",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.reward_text not in REWARD_TEXTS:
            raise ValueError(
                f"reward_text={self.reward_text!r}: choose one of {', '.join(REWARD_TEXTS)}"
            )
        if self.prompts_per_step % self.rollout_chunks:
            raise ValueError(
                f"rollout_chunks={self.rollout_chunks} does not divide "
                f"prompts_per_step={self.prompts_per_step}"
            )
        if self.phase_steps < 0 or not 0 <= self.ema < 1 or (self.ema and not self.phase_steps):
            raise ValueError(
                f"ema={self.ema} with phase_steps={self.phase_steps}: an average needs phases to "
                "begin with it and a decay in [0, 1)"
            )
        if self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations}: a group needs at least 2")
        rows = self.prompts_per_step * self.num_generations
        if rows % self.microbatches:
            raise ValueError(f"microbatches={self.microbatches} does not divide {rows} completions")

    @property
    def whole_text(self) -> bool:
        """Whether rewards read what follows a completion's EOS."""
        return self.reward_text == "full"


class Recipe(typing.NamedTuple):
    """All that a run needs, validated."""

    seed: int
    task: tasks.Task
    tokenizer: Any
    model: models.Config
    init_from: str
    max_prompt_length: int
    prompt_buckets: tuple[int, ...]
    """Lengths below it to which batches of short prompts are padded (see `dmrl.data`)."""
    long_prompts: str
    """What becomes of longer ones: one of `data.LONG_PROMPTS`."""
    sampling: Sampling
    terms: tuple[Term, ...]
    optimizer: optim.Optimizer
    loop: Loop
    warm_start: WarmStart
    warm_optimizer: optim.Optimizer
    imitation: Imitation
    imitation_optimizer: optim.Optimizer
    evaluation: Evaluation
    rescue: Rescue
    preferences: str
    """JSONL file of preference pairs that stage 2 trains on instead of rollouts; "": rollouts."""
    mesh: Mapping[str, int]
    metrics: tuple[str, ...]


SECTIONS = ("sampling", "evaluation", "warm_start", "imitation", "rescue", "preferences")
"""Of a config, those that earlier versions may lack."""


def build(config: Mapping[str, Any]) -> Recipe:
    """Builds and checks everything before anything is computed.

    Raises:
      ValueError: naming the offending key or value and what would be right.
    """
    missing = [name for name in SECTIONS if name not in config]
    if missing:
        raise ValueError(
            f"the config has no {', '.join(missing)}: it was written by another version of dmrl; "
            "give the recipe by --config"
        )
    task_options = dict(config["task"])
    task = tasks.load(task_options.pop("name"), **_tuples(task_options))
    tok, model = _tokenizer_and_model(config, task)
    terms = []
    for name, options in config["terms"].items():
        options = dict(options)
        terms.append(make_term(name, float(options.pop("weight")), options))
    terms = [t for t in terms if t.weight]
    sampling = section(Sampling, config["sampling"], "sampling")
    checks.order(terms, sampling, model)
    checks.agree(terms, config)
    checks.sampler(terms, sampling)
    rescue = section(Rescue, config["rescue"], "rescue")
    loop = section(Loop, config, "", partial=True)
    checks.probes(terms, rescue, loop.reward_text)
    if config["preferences"]:
        checks.preferences(config, terms, rescue)
    if not terms:
        raise ValueError("the objective has no term with a weight other than 0")
    return Recipe(
        seed=config["seed"],
        task=task,
        tokenizer=tok,
        model=model,
        init_from=config["model"]["init_from"],
        max_prompt_length=config["max_prompt_length"],
        prompt_buckets=_buckets(config),
        long_prompts=_long_prompts(config),
        sampling=sampling,
        terms=tuple(terms),
        optimizer=section(optim.Optimizer, config["optimizer"], "optimizer"),
        loop=loop,
        warm_start=section(WarmStart, config["warm_start"], "warm_start", partial=True),
        warm_optimizer=section(
            optim.Optimizer, config["warm_start"]["optimizer"], "warm_start.optimizer"
        ),
        imitation=section(Imitation, config["imitation"], "imitation", partial=True),
        imitation_optimizer=section(
            optim.Optimizer, config["imitation"]["optimizer"], "imitation.optimizer"
        ),
        evaluation=section(Evaluation, config["evaluation"], "evaluation"),
        rescue=rescue,
        preferences=config["preferences"],
        mesh=dict(config["mesh"]),
        metrics=metrics.known(config["metrics"]),
    )


def _buckets(config: Mapping[str, Any]) -> tuple[int, ...]:
    buckets, most = tuple(config.get("prompt_buckets", ())), config["max_prompt_length"]
    if list(buckets) != sorted({b for b in buckets if 0 < b < most}):
        raise ValueError(
            f"prompt_buckets={buckets}: give rising lengths below max_prompt_length={most}"
        )
    return buckets


def _long_prompts(config: Mapping[str, Any]) -> str:
    rule: str = config.get("long_prompts", data.LONG_PROMPTS[0])
    if rule not in data.LONG_PROMPTS:
        raise ValueError(f"long_prompts={rule!r}: choose one of {', '.join(data.LONG_PROMPTS)}")
    if rule == "cut" and config["preferences"]:
        raise ValueError("long_prompts='cut' is for rollouts; shorten the prompts of preferences")
    return rule


def section(
    cls: type[Section], values: Mapping[str, Any], where: str, partial: bool = False
) -> Section:
    """`cls(**values)`; `partial` ignores keys that belong to others.

    Raises:
      ValueError: a key that `cls` does not have, with the nearest one.
    """
    names = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    for key in values:
        if key not in names and not partial:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
            raise ValueError(f"no option {where}.{key}{hint}")
    return cls(**_tuples({k: v for k, v in values.items() if k in names}))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _tokenizer_and_model(config: Mapping[str, Any], task: tasks.Task) -> tuple[Any, models.Config]:
    """The tokenizer, and the model's shape; a character model takes its vocabulary from it."""
    values = dict(config["model"])
    init_from = values.pop("init_from")
    if config["tokenizer"] == "characters":
        tok = tokenizer.characters(task.alphabet)
        values |= {
            "vocab_size": len(tok),
            "mask_token_id": tok.mask_token_id,
            "eos_token_id": tok.eos_token_id,
        }
    elif config["tokenizer"]:
        tok = tokenizer.load(config["tokenizer"])
    else:
        tok = tokenizer.load(init_from) if init_from else None
    model = section(models.Config, values, "model")
    if init_from:
        checks.fits(init_from, model)
    return tok, model
