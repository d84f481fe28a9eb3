"""A checkpoint ready to use, and completions of token ids by it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from dmrl import data, optim, parallel, policy, recipe, tokenizer, trainer
from dmrl.diffusion.sampler import Sampling
from dmrl.programs import Programs


class Ready(NamedTuple):
    """A policy with what is needed to use it."""

    policy: policy.Policy
    mesh: Any
    tokenizer: Any


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
        raise ValueError("no tokenizer: name a folder with tokenizer.json")
    return Ready(loaded, mesh, tok)


def decode(
    ready: Ready,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch: int,
    seed: int,
    buckets: tuple[int, ...] = (),
) -> NDArray[np.int32]:
    """The completions [N, length] of N prompts, with `buckets` as of `dmrl.data.Prompts`.

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
    given = data.Prompts(prompts, *padded, blank, buckets)
    programs = Programs(model, (), sampling, optim.make(optim.Optimizer(), 1), ready.mesh)
    shards = parallel.batch_shards(ready.mesh)
    done = []
    for index, real in data.in_order(len(prompts), -(-min(batch, len(prompts)) // shards) * shards):
        weights = (ready.policy.trainable, ready.policy.frozen)
        first, key = int(index[0]), jax.random.key(seed)
        rollout, _ = programs.rollout(*weights, given.rows(index), first, key)
        done.append(parallel.gather(rollout.tokens)[:real])
    return np.concatenate(done)
