"""Completions of free prompts, without a task."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dmrl import data, optim, parallel, tokenizer
from dmrl.diffusion.sampler import Sampling
from dmrl.policy import Policy
from dmrl.programs import Programs


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


def complete(
    policy: Policy,
    mesh: Any,
    tok: Any,
    rows: Sequence[Mapping[str, Any]],
    decoder: Sampling,
    samples: int,
    batch: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Each row with `completion`, its `tokens` and its `sample` number, `samples` times.

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
    found: list[dict[str, Any]] = []
    for index, real in data.in_order(len(rows), -(-min(batch, len(rows)) // shards) * shards):
        inputs = (prompt[index], valid[index], template[index])
        rollout, _ = programs.rollout(
            policy.trainable, policy.frozen, inputs, int(index[0]) * samples, jax.random.key(seed)
        )
        host: Any = parallel.gather(rollout)
        texts = tokenizer.decode(tok, host.tokens, model.mask_token_id, model.eos_token_id)
        found += [
            {
                **rows[index[i // samples]],
                "sample": i % samples,
                "completion": texts[i],
                "tokens": int(host.length[i]),
            }
            for i in range(real * samples)
        ]
    return found
