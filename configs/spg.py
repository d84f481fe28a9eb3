"""SPG: sandwiched policy gradient (arXiv 2510.09541).

    python launch/train.py --config=configs/spg.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/spg.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

tiny_countdown, tiny_gsm8k, tiny_math: three numbers up to 20, and generated problems of one
operation in the form of GSM8K and of MATH (dmrl/tasks/problems.py), by a model from scratch: our
own, without a download; they say nothing about the published benchmarks.

sudoku, countdown, gsm8k, math, code: LLaDA-8B-Instruct with the mixture, 8 GPUs. Published (Table
1, best mean checkpoint on test, 128 / 256 / 512 tokens): Sudoku, 3-shot, 82.9 / 94.0 / 93.1 % of
empty cells; Countdown 68.8 / 70.7 / 70.3 %; GSM8K 78.5 / 86.1 / 84.5 %; MATH-500 33.4 / 40.0 / 41.8
%; HumanEval 31.1 / 39.0 / 39.6 %, MBPP 46.3 / 50.6 / 49.0 %. Not run here. The paper's: omega 0.5,
beta 1.0 (Sudoku) and 1.5, two masks, mu 4 without importance weights, 2,500 (Sudoku), 4,000 (MATH)
and 6,000 (the others) updates; for Sudoku its three worked examples and temperature 0.3. Ours: the
wording of the prompts and examples, a bf16 base without dropout, generated puzzles, whose grids are
divided as in the paper's own split.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "sudoku": sudoku, "countdown": countdown, "gsm8k": gsm8k}
    presets |= {"math": math, "code": code} | common.tiny_texts(_tiny_terms)
    return common.preset(arg, presets)


def tiny():
    return common.tiny_sudoku(_tiny_terms(29))


def _tiny_terms(length):
    # The completion is one block; blocks before and after a chosen one do not exist.
    return {"spg": term("spg", 1.0, p_mask_prompt=0.0, block_length=length, eubo_beta=1.0)}


def sudoku():
    terms = {"spg": term("spg", 1.0, eubo_beta=1.0)}
    return common.llada_8b(
        common.published("sudoku", shots=3),
        terms,
        sampling={"temperature": 0.3},
        steps=625,
        num_iterations=4,
    )


def countdown():
    return _llada("countdown", updates=6000)


def gsm8k():
    return _llada("gsm8k", updates=6000)


def math():
    return _llada("math", updates=4000)


def code():
    return _llada("code", updates=6000)


def _llada(task, updates):
    terms = {"spg": term("spg", 1.0, eubo_beta=1.5)}
    return common.llada_8b(common.published(task), terms, steps=updates // 4, num_iterations=4)
