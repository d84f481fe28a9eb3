"""A resolved config (plain nested dict) -> the objects of a run.

Every section of the config is a dataclass of its room; this file only knows which is which.
"""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dmrl import data, metrics, models, optim, tasks, tokenizer
from dmrl.diffusion.sampler import Sampling
from dmrl.models import weights
from dmrl.programs import Term, make_term, needs
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
    _check_order(terms, sampling, model)
    probing = [t.name for t in terms if hasattr(t.algorithm, "probes")]
    for name, plain in (("cfg_scale", 0), ("top_p", 1)):
        value = getattr(sampling, name)
        if probing and value != plain:
            raise ValueError(
                f"sampling.{name}={value} changes what the sampler draws but not the probes of "
                f"{', '.join(probing)}: set it to {plain}, or drop the term"
            )
    _check_agree(terms, config)
    _check_sampling(terms, sampling)
    rescue = section(Rescue, config["rescue"], "rescue")
    if rescue.fraction and probing:
        raise ValueError(
            f"rescue.fraction={rescue.fraction} replaces completions whose states "
            f"{', '.join(probing)} has probed: set it to 0, or drop the term"
        )
    if config["preferences"]:
        _check_preferences(config, terms, rescue)
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
        loop=section(Loop, config, "", partial=True),
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


def _check_sampling(terms: Sequence[Term], sampling: Sampling) -> None:
    """Raises ValueError where a term reads from a rollout what this sampler does not tell."""
    per_step = [t.name for t in terms if getattr(t.algorithm, "READS_REVEAL_STEP", False)]
    if sampling.remasks and per_step:
        raise ValueError(
            f"sampling.remask={sampling.remask!r} changes revealed tokens, but "
            f"{', '.join(per_step)} scores what each step revealed: set it to 'none'"
        )
    drafting = [t.name for t in terms if "drafts" in needs([t])]
    for name in ("schedule", "cache"):
        unfit = sampling.adaptive if name == "schedule" else sampling.approximate
        if drafting and unfit:
            raise ValueError(
                f"sampling.{name}={getattr(sampling, name)!r} gives no drafts of whole completions "
                f"step by step, which {', '.join(drafting)} needs: take the default"
            )


def _check_order(terms: Sequence[Term], sampling: Sampling, model: models.Config) -> None:
    """Raises ValueError where an order and a denoiser would both be trained, or neither."""
    orders = [t for t in terms if "order" in needs([t])]
    others = ", ".join(t.name for t in terms if t not in orders)
    names = ", ".join(t.name for t in orders)
    if not orders:
        if sampling.learned:
            raise ValueError(f"sampling.order={sampling.order!r}, but no term trains an order")
        if not model.lora_rank and model.param_dtype != "float32":
            raise ValueError(
                "without an adapter all weights are trained and need "
                f"model.param_dtype='float32', not {model.param_dtype!r} (compute may stay "
                "model.dtype='bfloat16')"
            )
        return
    if others:
        raise ValueError(
            f"{names} trains an order and keeps the denoiser, {others} trains the denoiser: make "
            "it two runs, after which either decodes with the other"
        )
    if model.lora_rank:
        raise ValueError(
            f"model.lora_rank={model.lora_rank}, but {names} trains no adapter: set it to 0 "
            "(launch/convert.py adds a trained one to its base)"
        )
    seen = (sampling.schedule, sampling.remask, sampling.top_p)
    if not sampling.learned or seen != ("uniform", "none", 1.0):
        raise ValueError(
            f"{names} trains the order of a sampler with order='learned:T', schedule='uniform', "
            f"remask='none' and top_p=1, not {sampling.order!r}, {sampling.schedule!r}, "
            f"{sampling.remask!r} and {sampling.top_p}"
        )
    for term in orders:
        wanted = getattr(term.hyper, "top_k", 0)
        if wanted != sampling.order_rule.top_k:
            raise ValueError(
                f"terms.{term.name}.top_k={wanted}, but sampling.order={sampling.order!r}: give "
                f"it the same K, 'learned:{sampling.order_rule.temperature},{wanted}'"
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


def _check_preferences(config: Mapping[str, Any], terms: Sequence[Term], rescue: Rescue) -> None:
    """Raises ValueError where something needs rollouts, which pairs of a file do not have."""
    if config["num_generations"] != 2:
        raise ValueError(
            f"num_generations={config['num_generations']}, but preferences come in pairs: set it "
            "to 2 (and group_size of the term)"
        )
    sampled = [t.name for t in terms if hasattr(t.algorithm, "probes") or "drafts" in needs([t])]
    if sampled or rescue.fraction or config["phase_steps"]:
        who = ", ".join([*sampled, *["rescue"][: bool(rescue.fraction)]]) or "phase_steps"
        raise ValueError(f"preferences are not sampled, but {who} needs rollouts: drop one of them")


SAME = {
    "group_size": ("num_generations",),
    "block_length": ("sampling", "block_length"),
    "steps": ("sampling", "steps"),
}
"""Options of terms that repeat a value which the loop or the sampler owns."""


def _check_agree(terms: Sequence[Term], config: Mapping[str, Any]) -> None:
    for term in terms:
        for name, path in SAME.items():
            owned = functools.reduce(lambda tree, key: tree[key], path, config)
            value = getattr(term.hyper, name, owned)
            used = name != "block_length" or getattr(term.hyper, "masking", "") in (
                "",
                "block_random",
            )
            if used and value != owned:
                raise ValueError(
                    f"terms.{term.name}.{name}={value}, but {'.'.join(path)}={owned}: "
                    "they must be the same"
                )


OWN_FIELDS = ("dtype", "param_dtype", "remat", "lora_rank", "lora_alpha")
"""Fields of the model's Config that a run may choose whatever its initial weights say."""


def _check_fits(init_from: str, model: models.Config) -> None:
    """Raises ValueError where stored weights belong to another architecture."""
    if "://" not in init_from and not Path(init_from).exists():
        raise ValueError(f"model.init_from={init_from!r} does not exist")
    stored = dataclasses.asdict(weights.open_weights(init_from)[0])
    for name, value in dataclasses.asdict(model).items():
        if name not in OWN_FIELDS and value != stored[name]:
            raise ValueError(
                f"model.{name}={value}, but the weights in {init_from} have {stored[name]}"
            )


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
        _check_fits(init_from, model)
    return tok, model
