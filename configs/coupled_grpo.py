"""coupled-GRPO (DiffuCoder, arXiv 2506.20639).

    python launch/train.py --config=configs/coupled_grpo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/coupled_grpo.py:code \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

code, countdown: the published run trains a Dream-style 7B model, whose logits are shifted, on
21,000 hard problems of AceCode. Its hyper-parameters on LLaDA-8B-Instruct (groups of 10, mu 2, clip
0.5, KL 0.01, learning rate 1e-6 cosine to a tenth, one token a step, temperature 1); no published
number. Not run here. Ours: LoRA instead of full fine-tuning with a reference synced every 64 steps,
KodCode's problems and reward (1 for the tests and 0.5 for the form, theirs 2 and 0.5).
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny, "code": code, "countdown": countdown})


def tiny():
    return common.tiny_sudoku({"coupled_grpo": term("coupled_grpo", 1.0, beta=0.0)})


def code():
    return _llada("code")


def countdown():
    return _llada("countdown")


def _llada(task):
    return common.llada_8b(
        common.published(task),
        {"coupled_grpo": term("coupled_grpo", 1.0)},
        optimizer={"learning_rate": 1e-6, "schedule": "cosine", "final_fraction": 0.1},
        sampling={"steps": 256, "temperature": 1.0},
        steps=1000,
        prompts_per_step=8,
        num_generations=10,
        num_iterations=2,
    )
