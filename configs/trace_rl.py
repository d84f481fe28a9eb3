"""TraceRL (arXiv 2509.06949).

    python launch/train.py --config=configs/trace_rl.py            # tiny: a laptop, minutes
    python launch/train.py --config=configs/trace_rl.py:countdown \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR

tiny: the drawn 4x4 Sudoku of configs/common.py, our own setting; measured in docs/methods.md.

gsm8k, math, countdown, code: the published runs train on mathematics and code with verifiable
answers; LLaDA-8B, static / dynamic sampling: GSM8K 82.5 / 82.5 %, MATH-500 37.3 / 38.3 %. Their
hyper-parameters for LLaDA-8B-Instruct (s 8, clip 0.2, KL to the old policy 0.01, 32 prompts of 8
completions, 512 tokens in 512 steps, temperature 0.8, one update a rollout, 50 rounds, AdamW 1e-6
without decay, clip 1); no published number on Countdown. Not run here. Ours: LoRA instead of full
fine-tuning, all prompts instead of those solved 20 to 80 % of the time.
"""

from configs import common
from configs.common import term


def get_config(arg=None):
    presets = {"tiny": tiny, "countdown": countdown, "gsm8k": gsm8k, "math": math}
    return common.preset(arg, presets | {"code": code})


def tiny():
    # Two steps a row of the trace: as many forwards as the authors' ratio of 8 steps allows here.
    return common.tiny_sudoku({"trace_rl": term("trace_rl", 1.0, shrink=2, states=2)})


def countdown():
    return _llada(common.published("countdown"))


def gsm8k():
    return _llada(common.published("gsm8k", reward="solved"))


def math():
    return _llada(common.published("math", reward="solved"))


def code():
    return _llada(common.published("code"))


def _llada(task):
    return common.llada_8b(
        task,
        {"trace_rl": term("trace_rl", 1.0)},
        optimizer={"learning_rate": 1e-6, "b2": 0.999, "weight_decay": 0.0, "clip_norm": 1.0},
        sampling={"length": 512, "steps": 512, "temperature": 0.8},
        steps=50,
        prompts_per_step=32,
        num_generations=8,
        microbatches=256,
        rollout_chunks=8,
    )
