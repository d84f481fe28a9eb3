"""SPG: sandwiched policy gradient (arXiv 2510.09541).

    python launch/train.py --config=configs/spg.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/spg.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

tiny_countdown: three numbers up to 20, likewise our own.

sudoku, countdown, gsm8k, math: LLaDA-8B-Instruct with the mixture, 8 GPUs. Published (Table 1,
best mean checkpoint on test, 128 / 256 / 512 tokens): Sudoku, 3-shot, 82.9 / 94.0 / 93.1 % of empty
cells; Countdown 68.8 / 70.7 / 70.3 %; GSM8K 78.5 / 86.1 / 84.5 %; MATH-500 33.4 / 40.0 / 41.8 %.
Not run here. The paper's: omega 0.5, beta 1.0 (Sudoku) and 1.5, two masks, mu 4 without importance
weights, 2,500 (Sudoku), 4,000 (MATH) and 6,000 updates, temperature 0.3 for Sudoku.
Ours: zero-shot prompts, a bf16 base without dropout, generated puzzles, the paper's grids kept
apart as in its own split.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "sudoku": sudoku, "countdown": countdown, "gsm8k": gsm8k}
    return common.preset(arg, presets | {"math": math, "tiny_countdown": tiny_countdown})


def tiny():
    # The board is one block; blocks before and after a chosen one do not exist.
    return common.tiny_sudoku(
        {"spg": term("spg", 1.0, p_mask_prompt=0.0, block_length=29, eubo_beta=1.0)}
    )


def sudoku():
    terms = {"spg": term("spg", 1.0, eubo_beta=1.0)}
    return common.llada_8b(
        common.published("sudoku"),
        terms,
        sampling={"temperature": 0.3},
        steps=625,
        num_iterations=4,
    )


def tiny_countdown():
    return common.tiny_countdown(
        {"spg": term("spg", 1.0, p_mask_prompt=0.0, block_length=12, eubo_beta=1.0)}
    )


def countdown():
    return _llada("countdown", updates=6000)


def gsm8k():
    return _llada("gsm8k", updates=6000)


def math():
    return _llada("math", updates=4000)


def _llada(task, updates):
    terms = {"spg": term("spg", 1.0, eubo_beta=1.5)}
    return common.llada_8b(common.published(task), terms, steps=updates // 4, num_iterations=4)
