"""UPO."""

from configs import common
from configs.common import section, term
from dmrl import optim


def get_config(arg=None):
    return common.preset(arg, {"tiny": tiny})


ORDERS = ("random", "low_confidence", "margin", "entropy")


def tiny():
    steps, block = 12, 29
    options = {"steps": steps, "block_length": block, "keep_inputs": True}
    made = common.tiny_sudoku(
        {"upo": term("upo", 1.0, **options)},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 5},
        sampling={"steps": steps, "temperature": 0.0, "order": "learned:1"},
        steps=50,
        prompts_per_step=16,
        num_generations=8,
        num_iterations=2,
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
