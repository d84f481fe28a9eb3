"""Seconds to score 10,000 completions of every task: python benchmarks/scoring.py

Completions are the published ones in $DMRL_DATA/baselines, repeated. Where math-verify is asked,
a pair that was judged before costs nothing, so its new pairs are counted apart.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

from dmrl import protocol
from dmrl.tasks import equality

TASKS = ("gsm8k", "countdown", "math500", "sudoku")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--protocol", default="paper", choices=("paper", "d1", "spg"))
    options = parser.parse_args()
    if "DMRL_DATA" not in os.environ:
        parser.error("set DMRL_DATA to the folder of public data sets")
    folder = Path(os.environ["DMRL_DATA"]) / "baselines"
    print(f"{'task':12}{'completions':>12}{'different':>11}{'seconds':>9}{'new pairs':>11}")
    for name in TASKS:
        task = protocol.load(name, options.protocol)
        found = list(protocol.generations(folder / f"{name}_256.jsonl"))
        many = list(itertools.islice(itertools.cycle(found), options.count))
        before = equality.equal.cache_info().misses
        start = time.perf_counter()
        protocol.scores(task, many)
        seconds = time.perf_counter() - start
        pairs = equality.equal.cache_info().misses - before
        print(f"{name:12}{len(many):12,}{len(found):11,}{seconds:9.2f}{pairs:11}")


if __name__ == "__main__":
    main()
