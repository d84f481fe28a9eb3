"""wd1: weighted policy optimisation without ratios (arXiv 2507.08838).

    python launch/train.py --config=configs/wd1.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/wd1.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

sudoku, countdown, gsm8k, math, code: LLaDA-8B-Instruct, 4 GPUs. Published (as SPG reproduces it,
arXiv 2510.09541, Table 1, 128 / 256 / 512 tokens): Sudoku, 3-shot, 33.1 / 32.1 / 22.5 % of empty
cells; Countdown 48.8 / 52.3 / 50.8 %; GSM8K 74.6 / 81.5 / 83.0 %; MATH-500 31.0 / 37.4 / 39.0 %;
HumanEval 25.6 / 39.0 / 38.4 %, MBPP 38.9 / 45.9 / 44.8 %. Not run here. The paper's: mu 8 (Sudoku)
and 12, prompt mask, learning rate. Ours: zero-shot, a bf16 base without dropout, generated puzzles,
5,000 updates (the paper evaluates between 1,000 and 7,500).
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "sudoku": sudoku, "countdown": countdown}
    return common.preset(arg, presets | {"gsm8k": gsm8k, "math": math, "code": code})


def tiny():
    return common.tiny_sudoku({"wd1": term("wd1", 1.0, p_mask_prompt=0.0)})


def sudoku():
    return _llada("sudoku", 8)


def countdown():
    return _llada("countdown", 12)


def gsm8k():
    return _llada("gsm8k", 12)


def math():
    return _llada("math", 12)


def code():
    return _llada("code", 12)


def _llada(task, mu):
    terms = {"wd1": term("wd1", 1.0)}
    return common.llada_8b(common.published(task), terms, steps=5000 // mu, num_iterations=mu)
