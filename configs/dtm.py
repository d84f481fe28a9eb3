"""DTM: discrete tilt matching (arXiv 2604.18739).

    python launch/train.py --config=configs/dtm.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/dtm.py:sudoku \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

sudoku, countdown, gsm8k: LLaDA-8B-Instruct, 8 H100. Published (README of the authors' code, 256 /
512 tokens): Sudoku, 3-shot, 99.2 / 99.4 % of empty cells; Countdown 81.3 / 78.9 %; GSM8K 83.2 % (an
aggregator's figure). Not run here. The authors': h 6 (Countdown) and 5 on rewards up to 2 (Sudoku;
here 10 on rewards up to 1), phases of 1,200 and 256 updates up to a total tilt of 100, EMA 0.95
(Countdown), learning rates 4e-6 and 3e-6. For Sudoku they draw greedily, one completion a prompt;
here at temperature 1, a draw of the teacher as the derivation has it. Here the replay buffer is one
rollout, renewed as a whole every `num_iterations` updates; the authors renew a quarter of theirs
every 25 or 32. gsm8k: Countdown's values, h 1.5 for rewards up to 4 (ours: its values could not be
read).
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "sudoku": sudoku, "countdown": countdown, "gsm8k": gsm8k}
    return common.preset(arg, presets)


def tiny():
    terms = {"dtm": term("dtm", 1.0, h=4.0, block_length=29)}
    return common.tiny_sudoku(terms, phase_steps=105)


def sudoku():
    return common.llada_8b(
        common.published("sudoku"),
        {"dtm": term("dtm", 1.0, h=10.0)},
        optimizer={"clip_norm": 1.0, "warmup_steps": 13},
        sampling={"temperature": 1.0},
        steps=160,
        phase_steps=8,
        num_iterations=32,
    )


def countdown():
    return _llada("countdown", 6.0)


def gsm8k():
    return _llada("gsm8k", 1.5)


def _llada(task, h):
    return common.llada_8b(
        common.published(task),
        {"dtm": term("dtm", 1.0, h=h)},
        optimizer={"learning_rate": 4e-6, "clip_norm": 2.0, "warmup_steps": 60},
        sampling={"temperature": 1.0},
        steps=816,
        phase_steps=48,
        ema=0.95,
        num_iterations=25,
    )
