"""Prompts, answers and the seeded order in which examples come."""

import numpy as np
import pytest

from dmrl import data, tasks, tokenizer
from dmrl.tasks import sudoku

TASK = tasks.load("sudoku", train_size=20, held_out_size=7)
TOK = tokenizer.characters(TASK.alphabet)


def tokenize(split="train", task=TASK, tok=TOK, prompt_length=0, length=16):
    return data.tokenize(task, tok, split, prompt_length, length, tok.mask_token_id)


def test_templates_hold_the_givens_and_masks_elsewhere():
    prompts = tokenize()
    assert (prompts.prompt.shape, prompts.template.shape) == ((20, 0), (20, 16))
    for example, row in zip(prompts.examples, prompts.template, strict=True):
        text = "".join("0" if t == TOK.mask_token_id else TOK.decode([t]) for t in row)
        assert text == example.puzzle


def test_prompts_are_padded_on_the_left_and_free_completions_all_masked():
    task = tasks.load("sudoku", style="published", train_size=3)
    tok = tokenizer.characters(task.alphabet)
    prompts = tokenize(task=task, tok=tok, prompt_length=900, length=32)
    for example, row, valid in zip(
        prompts.examples, prompts.prompt, prompts.prompt_valid, strict=True
    ):
        text = task.prompt(example)
        assert tok.decode(row[valid]) == text
        assert valid.tolist() == [False] * (900 - len(text)) + [True] * len(text)
    assert (prompts.template == tok.mask_token_id).all()


def test_answers_are_padded_with_eos():
    task = tasks.load("sudoku", style="published", train_size=3)
    tok = tokenizer.characters(task.alphabet)
    prompts = tokenize(task=task, tok=tok, prompt_length=900, length=48)
    for example, row in zip(
        prompts.examples, data.answers(task, tok, prompts, tok.eos_token_id), strict=True
    ):
        text = task.answer(example)
        assert tok.decode(row[: len(text)]) == text
        assert (row[len(text) :] == tok.eos_token_id).all()
        assert len(text) < 48


def test_what_does_not_fit_is_refused():
    task = tasks.load("sudoku", style="published", train_size=3)
    tok = tokenizer.characters(task.alphabet)
    with pytest.raises(ValueError, match="3 of 3 prompts are longer than max_prompt_length=100"):
        tokenize(task=task, tok=tok, prompt_length=100)
    short = tokenize(task=task, tok=tok, prompt_length=900, length=20)
    with pytest.raises(ValueError, match=r"answer .* is 35 tokens, the completion 20"):
        data.answers(task, tok, short, tok.eos_token_id)
    with pytest.raises(ValueError, match="is 16 tokens, the completion 12"):
        tokenize(length=12)


def test_tasks_without_answers_or_examples_are_refused():
    class Silent(sudoku.Task):
        def examples(self, split):
            return []

        def answer(self, example):
            return None

    with pytest.raises(ValueError, match="split 'test' has no examples"):
        tokenize("test", Silent())
    with pytest.raises(ValueError, match="no reference completion to imitate"):
        data.answers(Silent(), TOK, tokenize(), TOK.eos_token_id)


def test_every_epoch_sees_every_example_once_in_another_order():
    iterator = data.batches(20, 5, seed=3)
    epochs = [np.concatenate([next(iterator) for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert (np.stack(epochs) != np.arange(20)).any(axis=1).all()


def test_the_order_follows_the_seed():
    def first(seed):
        return np.stack([next(iterator) for iterator in [data.batches(50, 10, seed)]]).tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


@pytest.mark.parametrize("consumed", [0, 1, 4, 9])
def test_an_iterator_resumes_exactly(consumed):
    whole = data.batches(22, 5, seed=7)
    for _ in range(consumed):
        next(whole)
    state = whole.get_state()
    rest = [next(whole).tolist() for _ in range(12)]
    resumed = data.batches(22, 5, seed=7)
    resumed.set_state(state)
    assert [next(resumed).tolist() for _ in range(12)] == rest


def test_a_batch_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="8 prompts a step, but the split has only 7 examples"):
        data.batches(7, 8, seed=0)


@pytest.mark.parametrize("batch", [1, 3, 7, 10])
def test_in_order_covers_once_with_one_shape(batch):
    pieces = list(data.in_order(7, batch))
    assert {len(index) for index, _ in pieces} == {batch}
    covered = np.concatenate([index[:real] for index, real in pieces])
    assert covered.tolist() == list(range(7))
