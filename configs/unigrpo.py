"""UniGRPO (MMaDA, arXiv 2505.15809).

    python launch/train.py --config=configs/unigrpo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/unigrpo.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

sudoku, countdown, gsm8k, math, code: LLaDA-8B-Instruct. Published (as SPG re-implements it, arXiv
2510.09541, Table 1, 128 / 256 / 512 tokens): Sudoku, 3-shot, 59.0 / 67.0 / 62.9 % of empty cells;
Countdown 44.5 / 43.0 / 57.0 %; GSM8K 74.9 / 82.5 / 82.7 %; MATH-500 32.4 / 37.4 / 39.4 %; HumanEval
28.1 / 39.6 / 38.4 %, MBPP 39.3 / 45.5 / 45.9 %. Not run here. MMaDA's own code of this stage is not
public: mu 12 and everything that its Algorithm 1 does not state are d1's.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    others = common.per_task(_llada, "sudoku", "countdown", "gsm8k", "math", "code")
    return common.preset(arg, {"tiny": tiny} | others)


def tiny():
    return common.tiny_sudoku({"unigrpo": term("unigrpo", 1.0, beta=0.0)})


def _llada(task):
    terms = {"unigrpo": term("unigrpo", 1.0)}
    return common.llada_8b(common.published(task), terms, steps=400, num_iterations=12)
