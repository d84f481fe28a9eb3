"""What a policy scores on a split, decoded by a published protocol, one result a length."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmrl import data, evaluate, optim, parallel, protocol, results, tasks
from dmrl.diffusion.sampler import Sampling
from dmrl.policy import Policy
from dmrl.programs import Programs
from dmrl.recipe import Recipe

BLOCK = 32
LENGTHS = (128, 256, 512)
PREFILL = "<reasoning>"
"""With which d1's evaluation begins the assistant's turn; its steps are half the length."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an evaluation may choose; the defaults are d1's protocol (arXiv 2504.12216)."""

    split: str = "test"
    lengths: tuple[int, ...] = ()
    """Completion lengths; (): 128, 256 and 512, or that of the recipe where it is shorter or
    completions have templates."""
    steps: int = 0
    """Denoising steps; 0: half the length."""
    block: int = 0
    """Block length; 0: 32, or the recipe's where its length is taken."""
    temperature: float = 0.0
    orders: tuple[str, ...] = ()
    """Each gives a result of every length; (): the recipe's, without its noise if `temperature`
    is 0."""
    samples: int = 1
    """Completions of each question."""
    size: int = 0
    """Questions, the first of the split; 0: all."""
    batch: int = 0
    """Completions at a time, which changes no result; 0: the recipe's."""
    prefill: str | None = None
    """How the assistant's turn begins; None: `<reasoning>` for the evaluation prompts, else
    nothing."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("size", 0), ("batch", 0), ("steps", 0), ("block", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"--{name}={getattr(self, name)}: give at least {low}")
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"--samples={self.samples} with --temperature=0 would be {self.samples} times the "
                "same completion: give a temperature, e.g. 0.9"
            )


class Measured(NamedTuple):
    """A result, JSON-able, and the completions behind it, in the fields of saved generations."""

    result: dict[str, Any]
    generations: list[dict[str, Any]]


def samplings(recipe: Recipe, asked: Asked) -> list[Sampling]:
    """How to decode at each length, in each order.

    Raises:
      ValueError: lengths, steps and blocks that do not fit together, or a length that is not
        that of the task's templates.
    """
    own = recipe.sampling
    kept = own.length < min(LENGTHS) or recipe.task.template(_first(recipe, asked)) is not None
    lengths = asked.lengths or ((own.length,) if kept else LENGTHS)
    block = asked.block or (own.block_length if kept else BLOCK)
    orders = asked.orders or ((own if asked.temperature else own.greedy).order,)
    return [
        dataclasses.replace(
            own,
            length=length,
            steps=asked.steps or max(length // 2, 1),
            block_length=block,
            temperature=asked.temperature,
            order=order,
        )
        for length in lengths
        for order in orders
    ]


def in_published_style(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task (with its `name`), in the wording of d1's evaluation if it was
    trained in that of d1's training and has another one for evaluation."""
    if options.get("style") != "published":
        return dict(options)
    changed = {**options, "style": "evaluation"}
    try:
        tasks.load(**changed)
    except ValueError as error:
        if "style='evaluation'" not in str(error):
            raise
        return dict(options)
    return changed


def agrees(recipe: Recipe, policy: Policy) -> None:
    """Raises ValueError where a recipe's tokens are not those of the policy."""
    for name in ("vocab_size", "mask_token_id", "eos_token_id"):
        mine, theirs = getattr(recipe.model, name), getattr(policy.model, name)
        if mine != theirs:
            raise ValueError(
                f"the checkpoint has model.{name}={theirs}, the recipe {mine}: it belongs to "
                "another --config"
            )


def _first(recipe: Recipe, asked: Asked) -> Any:
    found = recipe.task.examples(asked.split)
    if not found:
        raise ValueError(f"split {asked.split!r} has no examples")
    return found[0]


def measure(
    recipe: Recipe, policy: Policy, mesh: Any, asked: Asked, decoders: Sequence[Sampling]
) -> Iterator[Measured]:
    """One result for each of `decoders`.

    Raises:
      ValueError: no tokenizer, an empty split, or prompt and completion longer than the model
        can see.
    """
    if recipe.tokenizer is None:
        raise ValueError("no tokenizer: set --config.tokenizer to a folder with tokenizer.json")
    for sampling in decoders:
        prompts = _tokenized(recipe, policy, asked, sampling)
        shards = parallel.batch_shards(mesh)
        wanted = asked.batch or recipe.evaluation.batch
        batch = -(-max(wanted // asked.samples, 1) // shards) * shards
        unused = optim.make(recipe.optimizer, 1)
        programs = Programs(policy.model, (), sampling, unused, mesh, group_size=asked.samples)
        programs = programs.with_slots(batch * asked.samples)
        decoded = evaluate.decode(
            programs,
            policy.trainable,
            policy.frozen,
            prompts,
            recipe.task,
            recipe.tokenizer,
            batch,
            jax.random.key(asked.seed),
        )
        told = _protocol(recipe, asked, sampling, prompts)
        found = _measured(recipe, asked, decoded, prompts, told)
        speed = _speed(decoded)
        yield found._replace(result=found.result | {"tokens_per_s": speed})


def _prefill(recipe: Recipe, asked: Asked) -> str:
    if asked.prefill is not None:
        return asked.prefill
    return PREFILL if getattr(recipe.task, "style", "") == "evaluation" else ""


def _tokenized(recipe: Recipe, policy: Policy, asked: Asked, sampling: Sampling) -> data.Prompts:
    prompts = data.tokenize(
        recipe.task,
        recipe.tokenizer,
        asked.split,
        None,
        sampling.length,
        policy.model.mask_token_id,
        _prefill(recipe, asked),
        asked.size or None,
    )
    longest, most = prompts.prompt.shape[1], policy.model.max_sequence_length
    if longest + sampling.length > most:
        raise ValueError(
            f"a prompt of {longest} tokens and a completion of {sampling.length} are more than "
            f"the model's {most}: give smaller --lengths, or fewer shots"
        )
    return prompts


def _protocol(
    recipe: Recipe, asked: Asked, sampling: Sampling, prompts: data.Prompts
) -> dict[str, Any]:
    """All that the result depends on besides the model."""
    task = recipe.task
    questions = [[task.prompt(e), task.template(e)] for e in prompts.examples]
    return {
        "task": type(task).__module__.rpartition(".")[2],
        **protocol.described(task),
        "shots": getattr(task, "shots", 0),
        "split": asked.split,
        "questions": len(questions),
        "prompts": results.digest(questions),
        "prefill": _prefill(recipe, asked),
        **dataclasses.asdict(sampling),
        "samples": asked.samples,
    }


def _measured(
    recipe: Recipe,
    asked: Asked,
    decoded: evaluate.Decoded,
    prompts: data.Prompts,
    told: dict[str, Any],
) -> Measured:
    task, k = recipe.task, asked.samples
    examples = [e for e in prompts.examples for _ in range(k)]
    each = [
        {name: float(values[i]) for name, values in decoded.scores.items()}
        for i in range(len(examples))
    ]
    count = len(prompts.examples)
    found = protocol.summarized(task, examples, each, count, count)
    lengths = np.asarray(decoded.rollout.length)
    result = {"hash": results.digest(told), "protocol": told, **found}
    if k > 1:
        rights = decoded.scores["solved"].reshape(-1, k).sum(axis=1).astype(int).tolist()
        powers = sorted({1, k} | {2**i for i in range(k.bit_length()) if 2**i < k})
        result["pass_at"] = {
            str(j): protocol.rounded(results.pass_at(rights, k, j)) for j in powers
        }
    result |= {
        "mean_length": round(float(np.mean(lengths)), 3),
        "seed": asked.seed,
    }
    truth = getattr(task, "truth", task.answer)
    rows = [
        {
            "id": i // k,
            "sample": i % k,
            "question": task.prompt(example),
            "generations": decoded.texts[i],
            "ground_truth": truth(example),
            "tokens": int(lengths[i]),
            **each[i],
        }
        for i, example in enumerate(examples)
    ]
    return Measured(result, rows)


def _speed(decoded: evaluate.Decoded) -> float | None:
    """Tokens of completions a second, without the first call, which compiled; None if there are
    no others."""
    rest, lengths = decoded.seconds[1:], np.asarray(decoded.rollout.length)
    return round(float(np.sum(lengths[decoded.rows :])) / sum(rest), 1) if rest else None
