"""Score saved generations: python launch/evaluate.py --task=gsm8k --generations=FILE.jsonl

Prints one JSON line. --protocol=d1 or spg reads answers exactly as these families' scripts do;
without it by the papers' rules, see docs/protocol.md.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This file must not shadow the library `evaluate`; the clone itself may run.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

TASK = flags.DEFINE_string("task", None, "Task of the generations, e.g. gsm8k")
GENERATIONS = flags.DEFINE_string("generations", None, "JSONL file of saved generations")
PROTOCOL = flags.DEFINE_enum("protocol", "paper", ["paper", "d1", "spg"], "How to read answers")
EQUALITY = flags.DEFINE_enum(
    "equality", "verify", ["verify", "string"], "Of formulas: math-verify or the string rule"
)
flags.mark_flags_as_required(["task", "generations"])


def main(argv: list[str]) -> None:
    """Scores the file and prints its line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        print(json.dumps(evaluated(TASK.value, GENERATIONS.value, PROTOCOL.value)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def evaluated(name: str, path: str, protocol: str) -> dict[str, object]:
    """The line of a file of generations."""
    from dmrl import protocol as room

    options = {"equality": EQUALITY.value} if name in ("gsm8k", "math500") else {}
    task = room.load(name, protocol, **options)
    found = list(room.generations(path))
    about = {"task": name, "generations": Path(path).name, **room.described(task)}
    return about | room.summary(task, found)


if __name__ == "__main__":
    app.run(main)
