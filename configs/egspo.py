"""EGSPO-SA: entropy-guided stepwise policy optimisation (arXiv 2603.12554).

    python launch/train.py --config=configs/egspo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/egspo.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

sudoku, countdown, gsm8k, math, code: LLaDA-8B-Instruct, 8 A100. Published (Figure 1, best over
lengths): Sudoku 94.3 % of empty cells (EGSPO 93.6), Countdown 78.5 % (75.8), GSM8K 85.0 % (85.7),
MATH-500 39.6 % (39.0), HumanEval 44.5 % (40.2), MBPP 51.1 % (50.6). Not run here. The authors'
script: K 8, lambda 0.5, clip 0.2 / 0.5, KL 0.04, groups of 8, learning rate 3e-5, temperature 0.9.
Ours: a bf16 base without dropout, all K steps in one update where the authors take them one after
the other.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    others = common.per_task(_llada, "sudoku", "countdown", "gsm8k", "math", "code")
    return common.preset(arg, {"tiny": tiny} | others)


def tiny():
    return common.tiny_sudoku({"egspo": term("egspo", 1.0, states=2, beta=0.0)})


def _llada(task):
    return common.llada_8b(
        common.published(task),
        {"egspo": term("egspo", 1.0)},
        optimizer={"learning_rate": 3e-5},
        steps=2000,
        prompts_per_step=12,
        num_generations=8,
        microbatches=32,
    )
