"""DiSPO on diffu-GRPO (arXiv 2602.06462): 4x4 Sudoku, Countdown, GSM8K, MATH.

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

countdown, gsm8k, math: the same, in the paper 49.6 / 49.6 / 62.5 %, 74.8 / 81.9 / 82.9 % and
34.0 / 39.2 / 40.2 % after 5,000, 7,700 and 6,600 optimiser steps (diffu-GRPO alone 33.2 / 31.3 /
37.1, 72.6 / 79.8 / 81.9, 33.2 / 37.2 / 39.2). Not run here. mu is d1's. alpha_step is published for
none of them: 0.5 of the swept 0.1, 0.5 and 0.9; for math 0.1, whose row equals that of the paper's
first version, which used 0.1.

tiny_countdown, tiny_gsm8k, tiny_math: three numbers up to 20, and generated problems of one
operation in the form of GSM8K and of MATH (dmrl/tasks/problems.py), by a model from scratch: our
own, without a download; they say nothing about the published benchmarks.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "llada_8b": llada_8b, "countdown": countdown, "gsm8k": gsm8k}
    return common.preset(arg, presets | {"math": math} | common.tiny_texts(lambda _: _tiny_terms()))


def tiny():
    return common.tiny_sudoku(_tiny_terms())


def _tiny_terms():
    # Prompts are short or none, and no reference is kept.
    unbiased = {"p_mask_prompt": 0.0, "beta": 0.0}
    return {
        "diffu_grpo": term("diffu_grpo", 1.0, divide_by_std=True, **unbiased),
        "dispo": term("dispo", 2.0, fillings=8, state_law="uniform", **unbiased),
    }


def llada_8b():
    return _llada("sudoku", updates=3800, mu=12)


def countdown():
    return _llada("countdown", updates=5000, mu=8)


def gsm8k():
    return _llada("gsm8k", updates=7700, mu=12)


def math():
    return _llada("math", updates=6600, mu=12, alpha_step=0.1)


def _llada(task, updates, mu, alpha_step=0.5):
    return common.llada_8b(
        common.published(task),
        {
            "diffu_grpo": term("diffu_grpo", 1.0),
            "dispo": term("dispo", alpha_step, branch_temperature=0.9),
        },
        steps=-(-updates // mu),
        num_iterations=mu,
    )
