"""RSPO: relative score policy optimisation (arXiv 2605.10218).

    python launch/train.py --config=configs/rspo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/rspo.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

sudoku, countdown: LLaDA-8B-Instruct. Published: Sudoku 92.1 % (as public notes report; nothing
else could be read). Not run here. lambda 0.01 is the paper's; groups of 8, K 4 and the learning
rate 3e-5 are ours.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny, "sudoku": sudoku, "countdown": countdown})


def tiny():
    return common.tiny_sudoku({"rspo": term("rspo", 1.0, score_unit="sequence")})


def sudoku():
    return _llada("sudoku")


def countdown():
    return _llada("countdown")


def _llada(task):
    return common.llada_8b(
        common.published(task),
        {"rspo": term("rspo", 1.0)},
        optimizer={"learning_rate": 3e-5, "clip_norm": 1.0},
        steps=2000,
        prompts_per_step=12,
        num_generations=8,
        microbatches=16,
    )
