"""TraFL: trajectory flow balancing (arXiv 2605.13935).

    python launch/train.py --config=configs/trafl.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/trafl.py:countdown \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

The published runs are mathematics and code, their tables and hyper-parameters could not be read.
gsm8k, math, countdown, code: our values on LLaDA-8B-Instruct (groups of 8, K 4 as a public port,
beta 0.1 nats a token, temperature 0.6); no number to expect. Not run here.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    others = common.per_task(_llada, "countdown", "gsm8k", "math", "code")
    return common.preset(arg, {"tiny": tiny} | others)


def tiny():
    # Nats of the whole board: rewards of 0 and 1 are told apart by a factor e^4.
    options = {"group_size": 4, "beta": 4.0, "score_unit": "sequence", "log_z": "vargrad"}
    return common.tiny_sudoku({"trafl": term("trafl", 1.0, **options)})


def _llada(task):
    return common.llada_8b(
        common.published(task),
        {"trafl": term("trafl", 1.0, group_size=8)},
        sampling={"temperature": 0.6},
        steps=1000,
        num_generations=8,
        microbatches=16,
    )
