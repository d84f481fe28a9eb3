"""diffu-GRPO (d1, arXiv 2504.12216).

    python launch/train.py --config=configs/diffu_grpo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/diffu_grpo.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.
tiny_countdown, tiny_gsm8k, tiny_math: three numbers up to 20, and generated problems of one
operation in the form of GSM8K and of MATH (dmrl/tasks/problems.py), by a model from scratch: our
own, without a download; they say nothing about the published benchmarks.

sudoku, countdown, gsm8k, math, code: LLaDA-8B-Instruct as d1 trains it, 256 tokens, 8 A100-80G.
Published (best checkpoint on test, 128 / 256 / 512 tokens): Sudoku 18.4 / 12.9 / 11.0 % of empty
cells, Countdown 33.2 / 31.3 / 37.1 %, GSM8K 72.6 / 79.8 / 81.9 %, MATH-500 33.2 / 37.2 / 39.2 %; as
SPG reproduces it HumanEval 29.3 / 37.8 / 37.2 %, MBPP 42.0 / 45.5 / 43.2 %. Not run here. d1's:
LoRA, AdamW, clip range, KL weight, prompt mask, mu (Sudoku and Countdown 8, the others 12),
temperature, batch. Ours: a bf16 base without dropout instead of 4-bit nf4 with 0.05, generated
puzzles, up to 256 prompt tokens instead of 200; the number of steps (d1 trains to 10,000 updates
and chooses a checkpoint on the test set).
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "sudoku": sudoku, "countdown": countdown, "gsm8k": gsm8k}
    presets |= {"math": math, "code": code} | common.tiny_texts(lambda _: _tiny_terms())
    return common.preset(arg, presets)


def tiny():
    return common.tiny_sudoku(_tiny_terms())


def _tiny_terms():
    unbiased = {"p_mask_prompt": 0.0, "beta": 0.0}
    return {"diffu_grpo": term("diffu_grpo", 1.0, divide_by_std=True, **unbiased)}


def sudoku():
    return _llada("sudoku", mu=8)


def countdown():
    return _llada("countdown", mu=8)


def gsm8k():
    return _llada("gsm8k", mu=12)


def math():
    return _llada("math", mu=12)


def code():
    return _llada("code", mu=12)


def _llada(task, mu):
    terms = {"diffu_grpo": term("diffu_grpo", 1.0)}
    return common.llada_8b(common.published(task), terms, steps=-(-10_000 // mu), num_iterations=mu)
