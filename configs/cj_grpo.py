"""CJ-GRPO: consistency with the sampled trajectory (arXiv 2509.23924).

    python launch/train.py --config=configs/cj_grpo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/cj_grpo.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

sudoku, countdown, gsm8k, math: LLaDA-8B-Instruct with a bf16 base, 128 tokens, blocks of 64, 32
steps, temperature 1, mu 8, for GSM8K and MATH 12 (the authors' scripts). Its tables could not be
read, so there is no number to expect. Not run here. Every update differentiates all 32 states of a
completion: the microbatches hold a state of few completions each.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "sudoku": sudoku, "countdown": countdown}
    return common.preset(arg, presets | {"gsm8k": gsm8k, "math": math})


def tiny():
    return common.tiny_sudoku({"cj_grpo": term("cj_grpo", 1.0, states=4, beta=0.0)})


def sudoku():
    return _llada("sudoku")


def countdown():
    return _llada("countdown")


def gsm8k():
    return _llada("gsm8k", 12)


def math():
    return _llada("math", 12)


def _llada(task, mu=8):
    return common.llada_8b(
        common.published(task),
        {"cj_grpo": term("cj_grpo", 1.0)},
        sampling={"length": 128, "steps": 32, "block_length": 64, "temperature": 1.0},
        steps=600,
        num_iterations=mu,
        microbatches=96,
    )
