"""VRPO on ranked rollouts (LLaDA 1.5, arXiv 2505.19223).

    python launch/train.py --config=configs/vrpo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/vrpo.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

The published run is DPO on 350,000 preference pairs. sudoku, countdown: its online form on
LLaDA-8B-Instruct, pairs of the best and the worst of 8 completions. Published for such a form (BGPO
paper, best over lengths): Sudoku 26.1 % of empty cells, Countdown 84.8 %. Not run here. n 8 and the
shared masks are the paper's; beta 0.1 is DPO's usual value, the learning rate 5e-7 BGPO's.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny, "sudoku": sudoku, "countdown": countdown})


def tiny():
    return common.tiny_sudoku({"vrpo": term("vrpo", 1.0, group_size=4, masks=4, beta=0.5)})


def sudoku():
    return _llada("sudoku")


def countdown():
    return _llada("countdown")


def _llada(task):
    return common.llada_8b(
        common.published(task),
        {"vrpo": term("vrpo", 1.0, group_size=8)},
        optimizer={"learning_rate": 5e-7},
        steps=1000,
        prompts_per_step=16,
        num_generations=8,
        microbatches=16,
    )
