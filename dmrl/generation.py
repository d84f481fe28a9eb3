"""Completions of free prompts, without a task."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmrl import data, evaluate, optim, parallel, recipe, tokenizer, trainer
from dmrl import policy as policy_files
from dmrl.diffusion.sampler import Sampling
from dmrl.policy import Policy
from dmrl.programs import Programs
from dmrl.types import Rollout


class Ready(NamedTuple):
    """A policy with what is needed to use it."""

    policy: Policy
    mesh: Any
    tokenizer: Any
    sampling: Sampling | None
    """How its run decodes; None if it belongs to none."""


def opened(checkpoint: str, tokenizer_folder: str = "", base: str = "") -> Ready:
    """A run, its weights, or converted weights.

    Args:
      tokenizer_folder, base: instead of the run's: a folder with tokenizer.json, and of an
        adapter the weights it was trained on.

    Raises:
      ValueError: there is no tokenizer, or an adapter without its base.
      FileNotFoundError: there are no weights.
    """
    config = policy_files.config(checkpoint)
    made = recipe.build(config) if config else None
    mesh = parallel.make_mesh(**(made.mesh if made else {}))
    below: Any = base or (made.init_from if made else "")
    if made and made.model.lora_rank and not below:
        below = trainer.initial_weights(made, mesh)[1]
    loaded = policy_files.load(checkpoint, below, mesh)
    tok = tokenizer.load(tokenizer_folder) if tokenizer_folder else made and made.tokenizer
    if tok is None:
        raise ValueError("no tokenizer: give --tokenizer=DIR, a folder with tokenizer.json")
    return Ready(loaded, mesh, tok, made.sampling if made else None)


def sampling(
    own: Sampling | None,
    length: int | None,
    steps: int | None,
    block: int | None,
    temperature: float,
) -> Sampling:
    """How to decode: what is asked for, else as the run does, else 256 tokens in blocks of 32
    and half as many steps.

    Raises:
      ValueError: they do not fit together.
    """
    if own is None or length not in (None, own.length):
        size = length or 256
        own = Sampling(length=size, steps=max(size // 2, 1), block_length=min(32, size))
    return dataclasses.replace(
        own,
        steps=steps or own.steps,
        block_length=block or own.block_length,
        temperature=temperature,
    )


class Completed(NamedTuple):
    """Each row with `completion`, its `tokens` and its `sample` number, and how they came about."""

    rows: list[dict[str, Any]]
    rollout: Rollout


def complete(
    policy: Policy,
    mesh: Any,
    tok: Any,
    rows: Sequence[Mapping[str, Any]],
    decoder: Sampling,
    samples: int,
    batch: int,
    seed: int,
) -> Completed:
    """Completes each row `samples` times.

    Args:
      rows: `prompt`, a text, the user's turn; perhaps `template`, as a task gives it.

    Raises:
      ValueError: a template of another length, or more tokens than the model can see.
    """
    model = policy.model
    prompts = [tokenizer.encode_prompt(tok, row["prompt"]) for row in rows]
    templates = [
        tokenizer.encode_template(tok, r.get("template"), decoder.length, model.mask_token_id)
        for r in rows
    ]
    pad = tok.pad_token_id
    rollout = decode(policy, mesh, prompts, templates, decoder, pad, samples, batch, seed)
    texts = tokenizer.decode(tok, rollout.tokens, model.mask_token_id, model.eos_token_id)
    found = [
        {
            **rows[i // samples],
            "sample": i % samples,
            "completion": text,
            "tokens": int(rollout.length[i]),
        }
        for i, text in enumerate(texts)
    ]
    return Completed(found, rollout)


def decode(
    policy: Policy,
    mesh: Any,
    prompts: Sequence[Sequence[int]],
    templates: Sequence[Sequence[int]],
    decoder: Sampling,
    pad_id: int,
    samples: int,
    batch: int,
    seed: int,
    buckets: tuple[int, ...] = (),
) -> Any:
    """The finished Rollout of token ids, `samples` rows a prompt, in numpy; `buckets` as of
    `dmrl.data.Prompts`.

    Raises:
      ValueError: more tokens than the model can see.
    """
    longest, most = max(map(len, prompts)), policy.model.max_sequence_length
    if longest + decoder.length > most:
        raise ValueError(
            f"a prompt of {longest} tokens and a completion of {decoder.length} are more than the "
            f"model's {most}"
        )
    padded = tokenizer.pad_left(prompts, longest, pad_id)
    given = data.Prompts(prompts, *padded, np.array(templates, np.int32), buckets)
    unused = optim.make(optim.Optimizer(), 1)
    programs = Programs(policy.model, (), decoder, unused, mesh, group_size=samples)
    shards = parallel.batch_shards(mesh)
    parts = []
    for index, real in data.in_order(len(prompts), -(-min(batch, len(prompts)) // shards) * shards):
        key, first = jax.random.key(seed), int(index[0]) * samples
        rollout, _ = programs.rollout(
            policy.trainable, policy.frozen, given.rows(index), first, key
        )
        host: Any = parallel.gather(rollout)
        gap = longest - host.prompt.shape[1]
        host = host._replace(
            prompt=np.pad(host.prompt, ((0, 0), (gap, 0)), constant_values=pad_id),
            prompt_valid=np.pad(host.prompt_valid, ((0, 0), (gap, 0))),
        )
        parts.append(jax.tree.map(lambda x, n=real * samples: x[:n], host))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def trajectories(done: Completed, tok: Any, decoder: Sampling) -> Iterator[dict[str, Any]]:
    """Rows of the report's page, one a completion: when each token came, and how sure it was."""
    rollout = done.rollout
    for i, row in enumerate(done.rows):
        yield {
            "when": "after",
            "setting": evaluate.setting_name(decoder),
            "id": i,
            "prompt": row["prompt"],
            "tokens": [
                str(tok.decode([t], skip_special_tokens=True)) for t in rollout.tokens[i].tolist()
            ],
            "reveal_step": rollout.reveal_step[i].tolist(),
            "log_prob": np.round(rollout.log_prob[i], 4).tolist(),
            "entropy": np.round(rollout.entropy[i], 4).tolist(),
            "steps": decoder.steps,
            "correct": [None] * decoder.length,
            "grid": None,
        }
