"""Prompts and supervised examples as seeded, resumable grain pipelines.

A batch is padded to one of a few lengths ("buckets"), the one that its longest prompt needs.
Which examples meet in a batch does not depend on the buckets: sorting them by length would train
on short and on long prompts in turns, and a resumed iterator would have to remember what it holds
back.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from dmrl import tokenizer as tokenization
from dmrl.tasks import Task

LONG_PROMPTS = ("refuse", "cut")
"""'refuse': the run does not start, and says how many there are. 'cut': as d1 and SPG do, only the
last tokens remain, chat template included, so that such a prompt begins in its middle."""


class Prompts(NamedTuple):
    """A split, tokenized once: arrays over its N examples."""

    examples: Sequence[Any]
    prompt: np.ndarray  # [N, P] int32, padded on the left
    prompt_valid: np.ndarray  # [N, P] bool
    template: np.ndarray  # [N, L] int32, the mask token where the model fills
    buckets: tuple[int, ...] = ()
    """Lengths below P to which a batch of short prompts is padded instead."""
    cut: int = 0
    """Prompts that lost their beginning."""

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt, prompt_valid, template) of a batch of examples, in its bucket."""
        prompt, valid = bucketed(self.prompt[index], self.prompt_valid[index], self.buckets)
        return prompt, valid, self.template[index]

    def first(self, size: int) -> "Prompts":
        """The first `size` examples."""
        return self._replace(
            examples=self.examples[:size],
            prompt=self.prompt[:size],
            prompt_valid=self.prompt_valid[:size],
            template=self.template[:size],
        )


def bucketed(
    prompt: np.ndarray, valid: np.ndarray, buckets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts [B,P] and their mask, cut to the least of `buckets` that holds the
    longest of them; as they are where none does.

    Only padding goes, which no result depends on but for the rounding of float sums: positions
    count from the first real token, padding is no key, and noise counts prompts from their end.
    A program compiles once for every length that occurs, at most len(buckets) + 1.
    """
    width = prompt.shape[1]
    longest = int(valid.sum(axis=1).max(initial=0))
    width -= min((b for b in buckets if longest <= b < width), default=width)
    return prompt[:, width:], valid[:, width:]


def tokenize(
    task: Task,
    tokenizer: Any,
    split: str,
    prompt_length: int | None,
    length: int,
    mask_id: int,
    prefill: str = "",
    size: int | None = None,
    buckets: tuple[int, ...] = (),
    long_prompts: str = "refuse",
) -> Prompts:
    """All prompts and templates of a split, or those of its first `size` examples.

    `prompt_length` None: that of the longest prompt. `prefill` begins the assistant's turn.
    `long_prompts`: what becomes of a prompt that is longer than `prompt_length`, see LONG_PROMPTS.

    Raises:
      ValueError: the split is empty, a prompt is longer than `prompt_length`, or a template is
        not `length` tokens.
    """
    examples = task.examples(split)[:size]
    if not examples:
        raise ValueError(f"split {split!r} has no examples")
    begun = tokenization.encode(tokenizer, prefill) if prefill else []
    rows = [tokenization.encode_prompt(tokenizer, task.prompt(e)) + begun for e in examples]
    if prompt_length is None:
        prompt_length = max(map(len, rows))
    cut = 0
    if long_prompts == "cut":
        cut = sum(len(row) > prompt_length for row in rows)
        rows = [row[max(len(row) - prompt_length, 0) :] for row in rows]
    prompt, valid = tokenization.pad_left(rows, prompt_length, tokenizer.pad_token_id)
    template = np.array(
        [
            tokenization.encode_template(tokenizer, task.template(e), length, mask_id)
            for e in examples
        ],
        np.int32,
    )
    return Prompts(examples, prompt, valid, template, buckets, cut)


def answers(task: Task, tokenizer: Any, prompts: Prompts, eos_id: int) -> np.ndarray:
    """Supervised targets [N, L]: the task's reference completions, padded with EOS.

    EOS padding is part of the target, as in LLaDA's supervised stage.

    Raises:
      ValueError: the task has no reference completion, or one does not fit.
    """
    length = prompts.template.shape[1]
    out = np.full(prompts.template.shape, eos_id, np.int32)
    for i, example in enumerate(prompts.examples):
        text = task.answer(example)
        if text is None:
            raise ValueError(f"{type(task).__module__} has no reference completion to imitate")
        ids = tokenization.encode(tokenizer, text)
        if len(ids) > length:
            raise ValueError(f"answer {text!r} is {len(ids)} tokens, the completion {length}")
        out[i, : len(ids)] = ids
    return out


def stream_seed(seed: int, stage: str) -> int:
    """A seed of its own for every (run seed, stage).

    Grain shuffles epoch e with seed + e, so neighbouring run seeds would share their orders.
    """
    words = np.random.SeedSequence([seed, *stage.encode()]).generate_state(1)
    return int(words[0])


def batches(size: int, batch: int, seed: int) -> grain.DatasetIterator:
    """Endless batches of example indices [batch] in a seeded order, reshuffled every epoch.

    The iterator's `get_state`/`set_state` resume it exactly.

    Raises:
      ValueError: `batch` exceeds `size`.
    """
    if batch > size:
        raise ValueError(f"{batch} prompts a step, but the split has only {size} examples")
    source = grain.MapDataset.source(np.arange(size, dtype=np.int32))
    return iter(source.shuffle(seed=seed).repeat().batch(batch).to_iter_dataset())


QUEUE = 8
"""Batches whose examples stand in one queue: fewer results are lost when a job is stopped than
with one queue for all, and only its last slots stay empty."""


def queue(size: int, batch: int) -> int:
    """Examples of a queue, for `size` of them in batches of `batch`: the same for every queue.

    Two at least where a batch is not enough, so that one can be timed without compiling.
    """
    count = -(-size // (QUEUE * batch))
    return max(-(-size // max(count, 2)), batch)


def in_order(size: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Index batches [batch] that cover 0..size-1 once, and how many of each are real.

    The last batch is padded by repetition, so that every batch has one shape.
    """
    for start in range(0, size, batch):
        index = np.arange(start, start + batch)
        yield np.minimum(index, size - 1), min(batch, size - start)
