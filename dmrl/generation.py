"""Completions of free prompts, without a task."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dmrl import data, evaluate, optim, parallel, tokenizer, trace
from dmrl.diffusion.sampler import Sampling
from dmrl.policy import Policy
from dmrl.programs import Programs
from dmrl.types import Rollout


def sampling(
    own: Sampling | None,
    length: int | None,
    steps: int | None,
    block: int | None,
    temperature: float,
    order: str | None = None,
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
        order=order or (own if temperature else own.greedy).order,
    )


def complete(
    policy: Policy,
    mesh: Any,
    tok: Any,
    rows: Sequence[Mapping[str, Any]],
    decoder: Sampling,
    samples: int,
    batch: int,
    seed: int,
) -> Iterator[tuple[list[dict[str, Any]], Rollout]]:
    """Each row with `completion`, its `tokens` and its `sample` number, `samples` times.

    Comes in batches, each with its rollout in numpy arrays.

    Args:
      rows: `prompt`, a text, the user's turn; perhaps `template`, as a task gives it.

    Raises:
      ValueError: a template of another length, or more tokens than the model can see.
    """
    model = policy.model
    encoded = [tokenizer.encode_prompt(tok, row["prompt"]) for row in rows]
    longest = max(map(len, encoded))
    if longest + decoder.length > model.max_sequence_length:
        raise ValueError(
            f"a prompt of {longest} tokens and a completion of {decoder.length} are more than the "
            f"model's {model.max_sequence_length}"
        )
    prompt, valid = tokenizer.pad_left(encoded, longest, tok.pad_token_id)
    template = np.array(
        [
            tokenizer.encode_template(tok, r.get("template"), decoder.length, model.mask_token_id)
            for r in rows
        ],
        np.int32,
    )
    unused = optim.make(optim.Optimizer(), 1)
    programs = Programs(model, (), decoder, unused, mesh, group_size=samples)
    shards = parallel.batch_shards(mesh)
    for index, real in data.in_order(len(rows), -(-min(batch, len(rows)) // shards) * shards):
        inputs = (prompt[index], valid[index], template[index])
        rollout, _ = programs.rollout(
            policy.trainable, policy.frozen, inputs, int(index[0]) * samples, jax.random.key(seed)
        )
        whole = parallel.gather(rollout)
        host: Any = jax.tree.map(lambda x, n=real * samples: x[:n], whole)
        texts = tokenizer.decode(tok, host.tokens, model.mask_token_id, model.eos_token_id)
        lines = [
            {
                **rows[index[i // samples]],
                "sample": i % samples,
                "completion": text,
                "tokens": int(host.length[i]),
            }
            for i, text in enumerate(texts)
        ]
        yield lines, host


def traces(
    batches: Iterable[tuple[Sequence[Mapping[str, Any]], Rollout]],
    read: trace.Reader,
    decoder: Sampling,
    samples: int,
    name: str,
) -> list[dict[str, Any]]:
    """What the viewer shows of completions in their order: prompts are numbered from 1.

    Args:
      name: whose completions they are.
    """
    shown = trace.Layout(list(range(decoder.length)))
    found: list[dict[str, Any]] = []
    for lines, rollout in batches:
        for i, line in enumerate(lines):
            number = str(len(found) // samples + 1)
            found.append(
                {
                    "when": name,
                    "setting": evaluate.setting_name(decoder),
                    "id": f"{number} sample {line['sample'] + 1}" if samples > 1 else number,
                    "prompt": line["prompt"],
                    **trace.make(rollout, i, decoder.steps, read, shown),
                }
            )
    return found
