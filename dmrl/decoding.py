"""A checkpoint ready to use, and completions of token ids by it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dmrl import data, optim, parallel, policy, recipe, tokenizer, trainer
from dmrl.diffusion.sampling import Sampling
from dmrl.programs import Programs
from dmrl.types import Rollout


class Ready(NamedTuple):
    """A policy with what is needed to use it."""

    policy: policy.Policy
    mesh: Any
    tokenizer: Any
    sampling: Sampling | None
    """How its run decodes; None if it belongs to none."""


def opened(checkpoint: str, folder: str = "", base: str = "") -> Ready:
    """A run, its weights, or converted weights.

    Args:
      folder, base: instead of the run's own: a folder with tokenizer.json, and of an adapter the
        weights it was trained on.

    Raises:
      ValueError: there is no tokenizer, or an adapter without its base.
      FileNotFoundError: there are no weights.
    """
    config = policy.config(checkpoint)
    made = recipe.build(config) if config else None
    mesh = parallel.make_mesh(**(made.mesh if made else {}))
    below: Any = base or (made.init_from if made else "")
    if made and made.model.lora_rank and not below:
        below = trainer.initial_weights(made, mesh)[1]
    loaded = policy.load(checkpoint, below, mesh)
    tok = tokenizer.load(folder) if folder else made and made.tokenizer
    if tok is None:
        raise ValueError("no tokenizer: give --tokenizer=DIR, a folder with tokenizer.json")
    return Ready(loaded, mesh, tok, made.sampling if made else None)


def rollouts(
    ready: Ready,
    prompts: Sequence[Sequence[int]],
    templates: Sequence[Sequence[int]] | None,
    sampling: Sampling,
    samples: int,
    batch: int,
    seed: int,
    buckets: tuple[int, ...] = (),
) -> Iterator[tuple[NDArray[np.int64], Rollout]]:
    """(numbers of the prompts, their completions in numpy), `batch` prompts at a time, or queues of
    up to 8 times as many where slots refill.

    Args:
      templates: a completion with the mask where the model fills, for every prompt; None: the
        model fills everything.
      samples: completions of each prompt, one after the other.
      buckets: as of `dmrl.data.Prompts`.

    Noise follows a prompt's place, so `batch` changes nothing.

    Raises:
      ValueError: more tokens than the model can see.
    """
    model = ready.policy.model
    longest, most = max(map(len, prompts)), model.max_sequence_length
    if longest + sampling.length > most:
        raise ValueError(
            f"a prompt of {longest} tokens and a completion of {sampling.length} are more than "
            f"the model's {most}"
        )
    padded = tokenizer.pad_left(prompts, longest, ready.tokenizer.pad_token_id)
    blank = np.full((len(prompts), sampling.length), model.mask_token_id, np.int32)
    template = blank if templates is None else np.array(templates, np.int32)
    given = data.Prompts(prompts, *padded, template, buckets)
    unused = optim.make(optim.Optimizer(), 1)
    shards = parallel.batch_shards(ready.mesh)
    batch = -(-min(batch, len(prompts)) // shards) * shards
    programs = Programs(model, (), sampling, unused, ready.mesh, group_size=samples)
    if not buckets:
        programs = programs.with_slots(batch * samples)
    many = data.queue(len(prompts), batch) if programs.slots else batch
    for index, real in data.in_order(len(prompts), many):
        weights = (ready.policy.trainable, ready.policy.frozen)
        first, key = int(index[0]) * samples, jax.random.key(seed)
        rollout, _ = programs.rollout(*weights, given.rows(index), first, key)
        whole: Any = parallel.gather(rollout)
        yield index[:real], jax.tree.map(lambda x, n=real * samples: x[:n], whole)
