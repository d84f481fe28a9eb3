"""LLaDA-8B compiled for TPU slices that are not attached: python benchmarks/slices.py

Every cell is one call of launch/compile.py, with the number of chunks and microbatches that gives
all chips of the slice the same rows. Results go to docs/slices.json and docs/slices.md; programs
that are already there are not compiled again. A cell takes minutes on two cores, all of them hours.
Needs the TPU compiler: pip install '.[tpu]' in an environment of its own.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dmrl.slices import SHAPES  # noqa: E402

RECIPES = ("sudoku_dispo:llada_8b", "spg:sudoku", "diffu_grpo:sudoku")
FULL = ("model.lora_rank=0", "model.param_dtype=float32")
PIECES = {4: (2, 4), 8: (2, 3), 16: (2, 3), 32: (1, 3), 64: (1, 3)}
"""Chips -> (rollout_chunks, microbatches) with which 96 completions come out even."""
TIGHT = {
    ("spg:sudoku", "v4-8"): "microbatches=6",  # prompts of 1,500 tokens
    ("spg:sudoku", "v5e-4"): "microbatches=24",
}
"""What a slice takes instead, so that a recipe fits."""


def options(recipe: str, name: str) -> list[str]:
    """The overrides of a slice; full fine-tuning takes smaller microbatches."""
    chips, full = math.prod(map(int, SHAPES[name].split("x"))), recipe == "full"
    chunks, pieces = PIECES[chips]
    usual = f"microbatches={pieces * 2 if full and chips <= 16 else pieces}"
    given = [f"rollout_chunks={chunks}", TIGHT.get((recipe, name), usual)]
    if chips > 32:  # more than a third of the rows
        given += ["mesh.fsdp=32", f"mesh.tensor={chips // 32}"]
    return given + (list(FULL) if full else [])


def main() -> None:
    """Runs the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/slices.json"))
    parser.add_argument("--slices", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES, "full"], help="or `full`")
    args = parser.parse_args()
    for recipe in args.recipes:
        name = RECIPES[0] if recipe == "full" else recipe
        for where in args.slices:
            given = options(recipe, where)
            known = json.loads(args.out.read_text()) if args.out.exists() else []
            label = " ".join([name, *given])
            have = {f["program"] for f in known if (f["label"], f["topology"]) == (label, where)}
            if have < {"rollout", "update"}:
                file, _, preset = name.partition(":")
                subprocess.run(
                    [
                        sys.executable,
                        str(ROOT / "launch" / "compile.py"),
                        f"--config={ROOT / 'configs' / file}.py:{preset}",
                        f"--topology={where}",
                        f"--out={args.out}",
                        *(f"--config.{o}" for o in given),
                    ],
                    check=False,  # a program that does not fit is a result too
                )


if __name__ == "__main__":
    main()
