"""DiSPO on diffu-GRPO, 4x4 Sudoku (arXiv 2602.06462).

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
"""

from configs import common
from configs.common import Sampling, make_model, make_task, make_warm_start, section, term
from dmrl.optim import Optimizer
from dmrl.recipe import Evaluation, Loop


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny, "llada_8b": llada_8b})


def tiny():
    unbiased = {"p_mask_prompt": 0.0, "beta": 0.0}  # there is no prompt, and no reference is kept
    return common.base(
        task=make_task("sudoku", style="grid", reward="board"),
        tokenizer="characters",
        model=make_model(
            vocab_size=16,  # set from the tokenizer, as are the special ids
            mask_token_id=0,
            eos_token_id=1,
            d_model=64,
            n_layers=3,
            n_heads=4,
            n_kv_heads=4,
            mlp_hidden_size=176,
            max_sequence_length=64,
            rope_theta=100.0,  # a drawn board is 29 tokens long
            dtype="float32",
            param_dtype="float32",
            remat="none",
        ),
        max_prompt_length=0,
        sampling=section(Sampling, length=29, steps=4, block_length=29, temperature=1.0),
        terms={
            "diffu_grpo": term("diffu_grpo", 1.0, divide_by_std=True, **unbiased),
            "dispo": term("dispo", 2.0, fillings=8, state_law="uniform", **unbiased),
        },
        optimizer=section(
            Optimizer,
            learning_rate=4e-4,
            schedule="cosine",
            warmup_steps=10,
            final_fraction=0.02,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        loop=section(Loop, steps=420, prompts_per_step=64, num_generations=4, rollout_chunks=2),
        warm_start=make_warm_start(
            steps=400,
            target=0.35,
            optimizer=section(
                Optimizer, learning_rate=2e-3, warmup_steps=5, weight_decay=0.0, clip_norm=1.0
            ),
        ),
        evaluation=section(Evaluation, steps=(16, 8, 4), splits=("test", "test_multi")),
    )


def llada_8b():
    return common.base(
        task=make_task("sudoku", style="published", reward="cells"),
        tokenizer="",  # the folder of model.init_from, unless named
        model=make_model(lora_rank=128, lora_alpha=64.0),
        max_prompt_length=256,
        sampling=section(Sampling, length=256, steps=128, block_length=32, temperature=0.9),
        terms={
            "diffu_grpo": term("diffu_grpo", 1.0),
            "dispo": term("dispo", 0.5, branch_temperature=0.9),
        },
        optimizer=section(Optimizer),
        loop=section(
            Loop,
            steps=317,  # 3,800 optimiser steps
            prompts_per_step=16,
            num_generations=6,
            num_iterations=12,
            microbatches=4,
            rollout_chunks=4,
            checkpoint_every=10,
        ),
        warm_start=make_warm_start(),
        evaluation=section(Evaluation, every=0, steps=(128,), splits=("test",), batch=32),
    )
