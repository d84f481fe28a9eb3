"""DiSPO on SPG (arXiv 2602.06462, Appendix D.3).

    python launch/train.py --config=configs/dispo_spg.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/dispo_spg.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

tiny_countdown, tiny_gsm8k, tiny_math: three numbers up to 20, and generated problems of one
operation in the form of GSM8K and of MATH (dmrl/tasks/problems.py), by a model from scratch: our
own, without a download; they say nothing about the published benchmarks.

sudoku, countdown, gsm8k, math: LLaDA-8B-Instruct, zero-shot, 4 H100-94G. Published (Table 1,
128 / 256 / 512 tokens): Sudoku 43.2 / 44.0 / 43.4 % of empty cells (SPG alone 26.6 / 26.0 / 26.1),
Countdown 68.0 / 68.8 / 68.8 % (67.6 / 66.8 / 67.2), GSM8K 79.0 / 81.7 / 81.8 % (77.3 / 80.9 /
81.5), MATH-500 35.2 / 39.4 / 41.0 % (33.6 / 38.4 / 40.2). Not run here. The paper's: 4,000, 4,600,
4,600 and 2,600 updates, Z 2, one late state. Not published: its omega and beta (here SPG's),
alpha_step of these rows (0.5 of the swept 0.1, 0.5, 0.9), clip and KL of the step term (d1's clip,
no KL).
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "sudoku": sudoku, "countdown": countdown, "gsm8k": gsm8k}
    return common.preset(arg, presets | {"math": math} | common.tiny_texts(_tiny_terms))


def tiny():
    return common.tiny_sudoku(_tiny_terms(29))


def _tiny_terms(length):
    return {
        "spg": term("spg", 1.0, p_mask_prompt=0.0, block_length=length, eubo_beta=1.0),
        "dispo": term("dispo", 2.0, fillings=8, state_law="uniform", p_mask_prompt=0.0, beta=0.0),
    }


def sudoku():
    return _llada("sudoku", eubo_beta=1.0, steps=1000)


def countdown():
    return _llada("countdown", eubo_beta=1.5, steps=1150)


def gsm8k():
    return _llada("gsm8k", eubo_beta=1.5, steps=1150)


def math():
    return _llada("math", eubo_beta=1.5, steps=650)


def _llada(task, eubo_beta, steps):
    terms = {
        "spg": term("spg", 1.0, eubo_beta=eubo_beta),
        "dispo": term("dispo", 0.5, beta=0.0, branch_temperature=0.9),
    }
    return common.llada_8b(common.published(task), terms, steps=steps, num_iterations=4)
