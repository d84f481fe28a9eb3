"""SPG: sandwiched policy gradient (arXiv 2510.09541).

    python launch/train.py --config=configs/spg.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/spg.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

sudoku, countdown: LLaDA-8B-Instruct with the mixture, 8 GPUs. Published (Table 1, best mean
checkpoint on test, 128 / 256 / 512 tokens): Sudoku, 3-shot, 82.9 / 94.0 / 93.1 % of empty cells;
Countdown 68.8 / 70.7 / 70.3 %. Not run here. The paper's: omega 0.5, beta 1.0 (Sudoku) and 1.5,
two masks, mu 4 without importance weights, 2,500 and 6,000 updates, temperature 0.3 for Sudoku.
Ours: zero-shot prompts, a bf16 base without dropout, generated puzzles, the paper's grids kept
apart as in its own split.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny, "sudoku": sudoku, "countdown": countdown})


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


def countdown():
    terms = {"spg": term("spg", 1.0, eubo_beta=1.5)}
    return common.llada_8b(common.published("countdown"), terms, steps=1500, num_iterations=4)
