"""A task of one's own: write a word backwards. Rewarded: the share of letters in their place.

python launch/train.py --config=examples/backwards.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import common
from dmrl.tasks.own import RowTask


@dataclass(frozen=True)
class Task(RowTask):
    """Rows {"prompt": "stone:", "answer": "enots"}."""

    source: str = f"jsonl:{Path(__file__).with_name('backwards.jsonl')}"

    def reward(self, row: Mapping[str, Any], completion: str) -> float:
        """1.0 for the word backwards and nothing else."""
        pairs = list(zip(row["answer"], completion, strict=False))
        return sum(a == b for a, b in pairs) / max(len(row["answer"]), len(completion), 1)


def get_config():
    """Warm start to a third, then diffu-GRPO."""
    terms = {"diffu_grpo": common.term("diffu_grpo", 1.0, p_mask_prompt=0.0, beta=0.0)}
    return common.tiny_text(common.make_task("examples.backwards"), terms, 8, 8, steps=100)
