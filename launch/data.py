"""Write a data set once, as ArrayRecord shards that every host reads (TFDS; extra `tfds`).

    python launch/data.py --task=countdown --to=DIR train_size=100000 numbers=3,4
    python launch/data.py --source=jsonl:FOLDER --name=gsm8k --to=DIR

The first generates all splits of a task; the second copies any source (dmrl/sources.py). Prints
the line for a config: --config.task.source=tfds:DIR/NAME/1.0.0. For a pod, DIR lies on a file
system that all hosts see, e.g. a mounted bucket (docs/pods.md).
"""

import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This folder's evaluate.py must not shadow the library of that name; the clone itself may run.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

TASK = flags.DEFINE_string("task", None, "Task whose examples are generated, e.g. countdown")
SOURCE = flags.DEFINE_string("source", None, "Instead: rows to copy, e.g. jsonl:FOLDER")
NAME = flags.DEFINE_string("name", None, "Name of the data set; default the task's")
TO = flags.DEFINE_string("to", None, "Folder; the data set is written below it", required=True)


def main(argv: list[str]) -> None:
    """Writes, and prints the source."""
    try:
        if "://" in TO.value:
            raise ValueError(f"--to={TO.value}: give a folder (mount the bucket; docs/pods.md)")
        name, splits = rows_of(dict(map(option, argv[1:])))
        try:
            from dmrl import builder
        except ModuleNotFoundError as error:
            raise ValueError(f"needs {error.name}: pip install 'dmrl[tfds]'") from None
        folder = builder.write(name, splits, Path(TO.value))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"--config.task.source=tfds:{folder}")


def option(text: str) -> tuple[str, Any]:
    """`train_size=100` as ('train_size', 100); a value that is no Python literal is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"unexpected argument {text!r}: options of the task are NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def rows_of(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The data set's name, and for each split a function that gives its rows."""
    from dmrl import sources, tasks

    if bool(TASK.value) == bool(SOURCE.value):
        raise ValueError("give --task=NAME, or --source=SOURCE with --name=NAME")
    if TASK.value:
        task = tasks.load(TASK.value, **options)
        if getattr(task, "source", "") != "generated":
            raise ValueError(f"task {TASK.value!r} is not generated: copy its rows by --source")
        made = {split: task.examples(split) for split in sources.SPLITS}
        return NAME.value or TASK.value.rpartition(".")[2], {
            split: lambda found=found: (e._asdict() for e in found) for split, found in made.items()
        }
    if options or not NAME.value:
        raise ValueError("--source needs --name=NAME, and takes no options of a task")
    return NAME.value, {
        split: lambda part=part: (row.values for row in part())
        for split, part in sources.read(SOURCE.value).items()
    }


if __name__ == "__main__":
    app.run(main)
