"""DiSPO on diffu-GRPO, 4x4 Sudoku (arXiv 2602.06462).

    python launch/train.py --config=configs/sudoku_dispo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/sudoku_dispo.py:llada_8b \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR    # the published run

tiny: a LLaDA-architecture model from scratch, warm-started by supervised training, then trained
from reward alone. Our own recipe; measured results are in the README.

llada_8b: LLaDA-8B-Instruct, in the paper on 4 H100-94G: 34.7 / 30.2 / 29.4 % of empty cells
correct at 128 / 256 / 512 tokens, diffu-GRPO alone 18.4 / 12.9 / 11.0 (published, Table 1, on
d1's test file; alpha_step 0.5). Not run here. Where this page differs from the paper: a bf16 base
without dropout instead of 4-bit nf4 with 0.05; our generated, solution-disjoint puzzles and our
wording of d1's prompt, up to 256 tokens instead of 200; evaluated at one length. Of the
hyper-parameters, Z, the number of states, the late polynomial, AdamW, LoRA, lengths and
alpha_step are the paper's; clip range, KL weight, prompt mask and temperature are d1's, on which
the paper builds; mu 12 is that of the paper's replay (App. J; d1's script has 8). The state law's
formula and the branch temperature are our choice.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny, "llada_8b": llada_8b})


def tiny():
    unbiased = {"p_mask_prompt": 0.0, "beta": 0.0}  # there is no prompt, and no reference is kept
    return common.tiny_sudoku(
        {
            "diffu_grpo": term("diffu_grpo", 1.0, divide_by_std=True, **unbiased),
            "dispo": term("dispo", 2.0, fillings=8, state_law="uniform", **unbiased),
        }
    )


def llada_8b():
    return common.llada_8b(
        common.published("sudoku"),
        {
            "diffu_grpo": term("diffu_grpo", 1.0),
            "dispo": term("dispo", 0.5, branch_temperature=0.9),
        },
        steps=317,  # 3,800 optimiser steps
        num_iterations=12,
    )
