"""Completions of free prompts, without a task."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dmrl import decoding, evaluate, tokenizer, trace
from dmrl.decoding import Ready
from dmrl.diffusion.sampling import Sampling
from dmrl.types import Rollout


def sampling(
    own: Sampling | None,
    length: int | None,
    steps: int | None,
    block: int | None,
    temperature: float,
) -> Sampling:
    """How to decode: what is asked for, else as the run does, else 256 tokens.

    At another length than the run's in blocks of 32 and half as many steps, by the run's rules.

    Raises:
      ValueError: they do not fit together.
    """
    if own is None or length not in (None, own.length):
        size = length or 256
        steps, block = steps or max(size // 2, 1), block or min(32, size)
    rules = own or Sampling(1, 1, 1)
    return dataclasses.replace(
        rules,
        length=length or (own.length if own else 256),
        steps=steps or rules.steps,
        block_length=block or rules.block_length,
        temperature=temperature,
        order=(rules if temperature else rules.greedy).order,
    )


def with_options(decoder: Sampling, options: Sequence[str]) -> Sampling:
    """`decoder` with further options, each a text `key=value`: `order=random`, `remask=rcr`.

    Raises:
      ValueError: no such option, a value of another kind, or options that exclude each other.
    """
    types = {
        field.name: type(getattr(decoder, field.name)) for field in dataclasses.fields(decoder)
    }
    values = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in types or not text:
            raise ValueError(f"{option!r} is no KEY=VALUE with a key of {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError:
            raise ValueError(f"{name}={text!r} is no {types[name].__name__}") from None
    return dataclasses.replace(decoder, **values)


def complete(
    ready: Ready,
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
    model, tok = ready.policy.model, ready.tokenizer
    prompts = [tokenizer.encode_prompt(tok, row["prompt"]) for row in rows]
    templates = [
        tokenizer.encode_template(tok, r.get("template"), decoder.length, model.mask_token_id)
        for r in rows
    ]
    batches = decoding.rollouts(ready, prompts, templates, decoder, samples, batch, seed)
    for index, host in batches:
        tokens = np.asarray(host.tokens)
        texts = tokenizer.decode(tok, tokens, model.mask_token_id, model.eos_token_id)
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
