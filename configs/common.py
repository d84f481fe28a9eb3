"""What all recipes share: sections made from the dataclasses that own their defaults.

`tiny_sudoku` and `llada_8b` are the two settings in which the methods are compared; a recipe
says which terms it trains there, and what its paper does differently.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dmrl import models, optim, recipe, tasks
from dmrl.diffusion.sampler import Sampling
from dmrl.objective import make_term
from dmrl.rescue import Rescue


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
    prompt_buckets: tuple[int, ...] = (),
    sampling: ConfigDict,
    terms: dict[str, ConfigDict],
    optimizer: ConfigDict,
    loop: ConfigDict,
    warm_start: ConfigDict,
    evaluation: ConfigDict,
    imitation: ConfigDict | None = None,
    rescue: ConfigDict | None = None,
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
            "prompt_buckets": prompt_buckets,
            "long_prompts": "refuse",
            "sampling": sampling,
            "terms": ConfigDict(terms, sort_keys=False),
            "optimizer": optimizer,
            **loop,
            "warm_start": warm_start,
            "imitation": imitation or make_imitation(),
            "evaluation": evaluation,
            "rescue": rescue or section(Rescue),
            "preferences": "",
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


def make_imitation(optimizer: ConfigDict | None = None, **values: Any) -> ConfigDict:
    """The warm start of an order with its own optimiser."""
    made = section(recipe.Imitation, **values)
    made.optimizer = optimizer or section(optim.Optimizer)
    return made


def tiny_sudoku(
    terms: dict[str, ConfigDict],
    optimizer: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    **loop: Any,
) -> ConfigDict:
    """4x4 Sudoku on drawn boards by a model of 166,000 parameters: minutes on a laptop.

    The boards are templates without a prompt. Our own recipe; `optimizer`, `sampling` and `loop`
    override its values.
    """
    tuned = {"learning_rate": 4e-4, "schedule": "cosine", "warmup_steps": 10}
    tuned |= {"final_fraction": 0.02, "weight_decay": 0.0, "clip_norm": 1.0}
    decoding = {"length": 29, "steps": 4, "block_length": 29, "temperature": 1.0}
    stage = {"steps": 420, "prompts_per_step": 64, "num_generations": 4, "rollout_chunks": 2}
    return base(
        task=make_task("sudoku", style="grid", reward="board"),
        tokenizer="characters",
        model=_tiny_model(),
        max_prompt_length=0,
        sampling=section(Sampling, **(decoding | (sampling or {}))),
        terms=terms,
        optimizer=section(optim.Optimizer, **(tuned | (optimizer or {}))),
        loop=section(recipe.Loop, **(stage | loop)),
        warm_start=make_warm_start(
            steps=400,
            target=0.35,
            optimizer=section(
                optim.Optimizer, learning_rate=2e-3, warmup_steps=5, weight_decay=0.0, clip_norm=1.0
            ),
        ),
        evaluation=section(recipe.Evaluation, steps=(16, 8, 4), splits=("test", "test_multi")),
    )


def _tiny_model() -> ConfigDict:
    """166,000 parameters."""
    return make_model(
        vocab_size=16,  # set from the tokenizer, as are the special ids
        mask_token_id=0,
        eos_token_id=1,
        d_model=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=176,
        max_sequence_length=64,
        rope_theta=100.0,  # a drawn board is 29 tokens long
        dtype="float32",
        param_dtype="float32",
        remat="none",
    )


def tiny_text(
    task: ConfigDict,
    terms: dict[str, ConfigDict],
    prompt_length: int,
    length: int,
    steps: int = 300,
    target: float = 0.3,
) -> ConfigDict:
    """Short answers to short prompts, a token a character, by the model of `tiny_sudoku`.

    `prompt_length` and `length` in characters; the answer ends before `length` with EOS. Our own
    recipe: a supervised warm start until `target` of the validation examples are solved, then
    `steps` of reinforcement.
    """
    made = tiny_sudoku(terms, steps=steps)
    made.task, made.max_prompt_length = task, prompt_length
    made.model.max_sequence_length = prompt_length + length
    made.sampling.update({"length": length, "block_length": length, "steps": length // 2})
    made.warm_start.target = target
    made.warm_start.steps = 2000  # at most
    made.evaluation.update({"steps": (length,), "splits": ("test",)})
    return made


def tiny_countdown(terms: dict[str, ConfigDict]) -> ConfigDict:
    """Countdown of three numbers up to 20 by a small model: minutes on a laptop."""
    task = make_task("countdown", numbers=(3, 3), values=(1, 20), targets=(1, 40))
    return tiny_text(task, terms, prompt_length=12, length=12)  # "20,20,20=40:", "(20+20)/20"


def tiny_gsm8k(terms: dict[str, ConfigDict]) -> ConfigDict:
    """One operation in words, GSM8K's form and reader, no problem of its own."""
    task = make_task("gsm8k", style="compact", source="easy", equality="string", held_out_size=256)
    return tiny_text(task, terms, prompt_length=31, length=17, steps=100, target=0.1)


def tiny_math(terms: dict[str, ConfigDict]) -> ConfigDict:
    """Fractions, linear equations and binomials, MATH's form and reader, no problem of its own."""
    task = make_task(
        "math500", style="compact", source="easy", equality="string", held_out_size=256
    )
    return tiny_text(task, terms, prompt_length=24, length=21, steps=100, target=0.1)


def tiny_texts(
    terms: Callable[[int], dict[str, ConfigDict]],
) -> dict[str, Callable[[], ConfigDict]]:
    """The presets `tiny_countdown`, `tiny_gsm8k` and `tiny_math`: the three above, whose
    completions are one block; `terms` gives the objective for blocks of that length."""
    return {
        "tiny_countdown": lambda: tiny_countdown(terms(12)),
        "tiny_gsm8k": lambda: tiny_gsm8k(terms(17)),
        "tiny_math": lambda: tiny_math(terms(21)),
    }


def llada_8b(
    task: ConfigDict,
    terms: dict[str, ConfigDict],
    optimizer: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    **loop: Any,
) -> ConfigDict:
    """LLaDA-8B-Instruct as d1 trains it (arXiv 2504.12216), which most of the field builds on.

    LoRA of rank 128, 256 tokens in 128 steps and blocks of 32, 16 prompts of 6 completions,
    AdamW 3e-6 (the dataclass's defaults). `optimizer`, `sampling` and `loop` override values.
    Up to 256 tokens of a prompt, of MATH and programs 1,024: some problems are long, while most
    batches fit the buckets of 256 and 512; d1 cuts prompts to their last 200 tokens
    (max_prompt_length=200, long_prompts=cut). With worked examples up to SPG's 1,500.
    """
    longest = 1024 if task.name in ("math500", "mbpp") else 256
    decoding = {"length": 256, "steps": 128, "block_length": 32, "temperature": 0.9}
    stage = {"prompts_per_step": 16, "num_generations": 6, "microbatches": 4, "rollout_chunks": 4}
    stage |= {"checkpoint_every": 10, "refill": task.name != "mbpp"}  # programs take long to run
    return base(
        task=task,
        tokenizer="",  # the folder of model.init_from, unless named
        model=make_model(lora_rank=128, lora_alpha=64.0),
        max_prompt_length=1500 if task.get("shots") else longest,
        prompt_buckets=(256, 512) if longest > 256 else (),
        sampling=section(Sampling, **(decoding | (sampling or {}))),
        terms=terms,
        optimizer=section(optim.Optimizer, **(optimizer or {})),
        loop=section(recipe.Loop, **(stage | loop)),
        warm_start=make_warm_start(),
        evaluation=section(recipe.Evaluation, every=0, steps=(128,), splits=("test",), batch=32),
    )


def published(task: str, shots: int = 0, reward: str = "published") -> ConfigDict:
    """A task in d1's wording: `sudoku`, `countdown` (3 numbers), `gsm8k`, `math` or `code`.

    Mathematics needs its published files (`data_dir`) or a `source`; code is KodCode's 10,000
    problems from the hub, and naming it allows programs to run, in the sandbox. `shots`: of
    Sudoku, SPG's worked examples. `reward`: of mathematics, `solved` for right answers alone.
    """
    if task == "sudoku":
        return make_task("sudoku", style="published", reward="cells", shots=shots)
    if task == "countdown":
        return make_task("countdown", style="published", numbers=(3, 3))
    if task == "code":
        problems = {"source": "hf:KodCode/KodCode-Light-RL-10K", "shown": 0}
        return make_task("mbpp", style="published", allow_code=True, **problems)
    name = {"gsm8k": "gsm8k", "math": "math500"}[task]
    return make_task(name, style="published", reward=reward)


def per_task(make: Callable[[str], ConfigDict], *names: str) -> dict[str, Any]:
    """Presets that differ in the task alone: `make(name)` under each name."""
    return {name: functools.partial(make, name) for name in names}


def preset(arg: str | None, presets: dict[str, Any]) -> ConfigDict:
    """The preset that `--config=FILE:arg` names; the first one without an argument."""
    name = arg or next(iter(presets))
    if name not in presets:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(presets)}")
    return presets[name]()


__all__ = [
    "Sampling",
    "base",
    "llada_8b",
    "make_imitation",
    "make_model",
    "make_task",
    "make_warm_start",
    "per_task",
    "preset",
    "published",
    "section",
    "term",
    "tiny_sudoku",
    "tiny_text",
    "tiny_texts",
]
