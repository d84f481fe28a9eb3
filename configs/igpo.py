"""IGPO: policy optimisation guided by inpainting (arXiv 2509.10396).

    python launch/train.py --config=configs/igpo.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/igpo.py:countdown \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

The published runs are mathematics (GSM8K 81.5 -> 86.8, MATH500 39.0 -> 47.4 with length-aligned
SFT). countdown: their recipe on LLaDA-8B-Instruct with traces of worked expressions; no published
number on this task. Not run here. The paper's: eta 0.2 to 0.6, tau 0.2, no prompt mask. Ours, not
published: groups of 8, chunks of 5 to 10 tokens, half of a group replaced at most, clip 0.2, KL
0.04.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny, "countdown": countdown})


def tiny():
    config = common.tiny_sudoku({"igpo": term("igpo", 1.0, beta=0.0)})
    config.rescue.update(fraction=0.5, chunk_min=1, chunk_max=1)  # a chunk is a cell
    return config


def countdown():
    config = common.llada_8b(
        common.published("countdown"),
        {"igpo": term("igpo", 1.0)},
        steps=1000,
        prompts_per_step=12,
        num_generations=8,
        num_iterations=8,
    )
    config.rescue.fraction = 0.5
    return config
