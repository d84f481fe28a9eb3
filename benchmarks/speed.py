"""All benchmarks of speed that a CPU can run, and one table: `make bench`.

    python benchmarks/speed.py [--out=runs/bench] [--clock=cpu] [--repeats=7]

Each script is a process of its own; their JSON files stay in --out, beside the table.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from absl import app  # noqa: E402

from benchmarks import timing  # noqa: E402

SCRIPTS = ("rollout", "losses", "steps")


def main(argv: list[str]) -> None:
    """Runs the scripts, then writes OUT/speed.md from what they wrote."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    out = Path(timing.OUT.value)
    rows, failed = [], []
    for script in SCRIPTS:
        command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *sys.argv[1:]]
        if subprocess.run(command).returncode:
            failed.append(script)
            continue
        content = json.loads((out / f"{script}.json").read_text())
        rows += [timing.Row(**row) for row in content["rows"]]
    (out / "speed.md").write_text(timing.table(rows) + "\n")
    print(timing.table(rows))
    if failed:
        sys.exit(f"no figures from: {', '.join(failed)}")


if __name__ == "__main__":
    app.run(main)
