"""UPO, a learned unmasking order (arXiv 2510.05725): 4x4 Sudoku, the denoiser frozen.

    python launch/train.py --config=configs/sudoku_upo.py             # tiny: a laptop, minutes
    python launch/train.py --config=configs/sudoku_upo.py:llada_8b \\
        --config.model.init_from=CKPT_DIR --config.tokenizer=HF_DIR   # the published setting
    python launch/evaluate.py --checkpoint=OTHER_RUN --order=learned \\
        --order_from=runs/sudoku_upo --order=low_confidence --order=margin

The order of a run lies in its folder `order`; the last line decodes another denoiser with it.

tiny: the drawn boards and the model of configs/common.py, trained by SFT and then left alone; one
cell a step. Our own recipe; measured in docs/methods.md, where RL adds nothing to the warm start.

llada_8b: LLaDA-8B-Instruct, in the paper .817 of empty cells right, max-confidence .705, random
.616 (published, Table of results, as a reader's notes have it). Not run here. The authors' released
values: 24 prompts of 6 trajectories, mu 16, AdamW 3e-6, clip 0.5, beta 1e-4 on the sum over steps,
order drawn at temperature 0.8, tokens greedy. Where this page differs: a bf16 base instead of 4-bit
nf4; our generated, solution-disjoint puzzles and wording; the warm start's values, which are not
published, are ours.

llada_8b_softmax, llada_8b_top_k: the same with the other two references of the paper's Table 1, KL
to softmax(confidence / 0.05) and to a uniform choice among the 5 most confident positions; the last
begins without a warm start, as published. Not run here.

tiny_zebra: Zebra puzzles of three houses by the model of tiny, clues in letters and the grid as a
template; our own recipe. The model learns too little to tell orders apart (docs/methods.md). In the
paper .362 of cells, max-confidence .337 (published; base model and prompt are not).
"""

from configs import common
from configs.common import section, term
from dmrl import optim

ORDERS = ("random", "low_confidence", "margin", "entropy")


def get_config(arg=None):
    presets = {"tiny": tiny, "llada_8b": llada_8b, "llada_8b_softmax": llada_8b_softmax}
    presets |= {"llada_8b_top_k": llada_8b_top_k, "tiny_zebra": tiny_zebra}
    return common.preset(arg, presets)


def tiny():
    return _tiny(steps=12, length=29)


def tiny_zebra():
    made = _tiny(steps=9, length=11)
    made.task = common.make_task("zebra", houses=(3, 3), attributes=(3, 3), train_size=4000)
    made.max_prompt_length = 64
    made.model.max_sequence_length = 96
    made.warm_start.steps = 2000  # at most
    return made


def _tiny(steps, length):
    options = {"steps": steps, "block_length": length, "keep_inputs": True}
    decoding = {"length": length, "block_length": length, "steps": steps, "temperature": 0.0}
    made = common.tiny_sudoku(
        {"upo": term("upo", 1.0, **options)},
        optimizer={"learning_rate": 5e-4, "warmup_steps": 5},
        sampling=decoding | {"order": "learned:1"},
        steps=40,
        prompts_per_step=32,
        num_generations=8,
        rollout_chunks=1,
    )
    made.task.reward = "cells"
    tuned = {"learning_rate": 1e-3, "warmup_steps": 5, "weight_decay": 0.0, "clip_norm": 1.0}
    made.imitation = common.make_imitation(
        steps=100, batch=32, evaluate_every=20, optimizer=section(optim.Optimizer, **tuned)
    )
    made.warm_start.update({"target": 0.45, "evaluate_every": 50})
    made.evaluation.update({"steps": (steps,), "orders": ORDERS, "splits": ("test",)})
    return made


def llada_8b():
    return _llada()


def llada_8b_softmax():
    return _llada(reference="softmax_confidence")


def llada_8b_top_k():
    made = _llada(reference="top_k", top_k=5)
    made.sampling.order = "learned:0.8,5"
    made.imitation.steps = 0
    return made


def _llada(**reference):
    steps, length = 12, 32  # at most 12 of 16 cells are empty
    made = common.llada_8b(
        common.make_task("sudoku", style="template", reward="cells"),
        {"upo": term("upo", 1.0, steps=steps, block_length=length, **reference)},
        optimizer={"warmup_steps": 196},
        sampling={"length": length, "steps": steps, "temperature": 0.0, "order": "learned:0.8"},
        steps=-(-3500 // 16),
        prompts_per_step=24,
        num_iterations=16,
        rollout_chunks=2,
    )
    made.model.lora_rank = 0
    made.imitation = common.make_imitation(
        steps=1000, batch=16, optimizer=section(optim.Optimizer, learning_rate=1e-4)
    )
    made.evaluation.update({"steps": (steps,), "orders": ORDERS})
    return made
