"""How good is a checkpoint, or a file of generations, by a published protocol?

    python launch/evaluate.py --checkpoint=runs/mine                      # a run of launch/train.py
    python launch/evaluate.py --config=configs/spg.py:gsm8k --checkpoint=CKPT_DIR --lengths=128,256
    python launch/evaluate.py --checkpoint=runs/mine --samples=4 --temperature=0.9     # pass@k
    python launch/evaluate.py --checkpoint=runs/mine --order=learned --order_from=runs/upo \
        --order=margin --order=entropy
    python launch/evaluate.py --compare DIR_A DIR_B
    python launch/evaluate.py --task=gsm8k --generations=FILE.jsonl [--protocol=d1]

A checkpoint is decoded greedily in blocks of 32 and length/2 steps, at 128, 256 and 512 tokens;
results.json and the generations lie in --out. --compare refuses to put results of different
protocols side by side. The last form needs no model and prints one JSON line; --protocol=d1 or
spg reads answers exactly as these families' scripts do. See docs/protocol.md.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This file must not shadow the library `evaluate`; the clone itself may run.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from configs import command_line  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe; default that of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's folder, its weights, or converted")
OUT = flags.DEFINE_string("out", None, "Folder for results; default WEIGHTS-SPLIT")
SPLIT = flags.DEFINE_string("split", "test", "Split of the task")
LENGTHS = flags.DEFINE_list("lengths", None, "Completion lengths; default 128,256,512")
STEPS = flags.DEFINE_integer("steps", 0, "Denoising steps; default half the length")
BLOCK = flags.DEFINE_integer("block", 0, "Block length; default 32")
ORDER = flags.DEFINE_multi_string("order", [], "Which positions next; may be repeated")
ORDER_FROM = flags.DEFINE_string("order_from", None, "Of --order=learned: the run that trained it")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 decodes greedily")
SAMPLES = flags.DEFINE_integer("samples", 1, "Completions of each question, for pass@k")
SIZE = flags.DEFINE_integer("size", 0, "Questions, the first of the split; default all")
BATCH = flags.DEFINE_integer("batch", 0, "Completions at a time; changes no result")
STYLE = flags.DEFINE_string("style", None, "Of prompts; default the published evaluation's")
PREFILL = flags.DEFINE_string("prefill", None, "How the assistant's turn begins")
SEED = flags.DEFINE_integer("seed", 0, "Of sampled completions")
COMPARE = flags.DEFINE_boolean("compare", False, "Compare two results: --compare A B")
TASK = flags.DEFINE_string("task", None, "Task of saved generations, e.g. gsm8k")
GENERATIONS = flags.DEFINE_string("generations", None, "JSONL file of saved generations")
PROTOCOL = flags.DEFINE_enum("protocol", "paper", ["paper", "d1", "spg"], "How to read answers")
EQUALITY = flags.DEFINE_enum(
    "equality", "verify", ["verify", "string"], "Of formulas: math-verify or the string rule"
)


def main(argv: list[str]) -> None:
    """Does what the flags say; what the user can mend costs one line."""
    try:
        if COMPARE.value:
            compare(argv[1:])
        elif len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        elif CHECKPOINT.value:
            decode()
        elif TASK.value and GENERATIONS.value:
            print(json.dumps(evaluated(TASK.value, GENERATIONS.value, PROTOCOL.value)))
        else:
            raise ValueError(
                "give --checkpoint=DIR, --task=NAME with --generations=FILE, or --compare A B"
            )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def evaluated(name: str, path: str, protocol: str) -> dict[str, object]:
    """The line of a file of generations."""
    from dmrl import protocol as room

    options = {"equality": EQUALITY.value} if name in ("gsm8k", "math500") else {}
    task = room.load(name, protocol, **options)
    found = list(room.generations(path))
    about = {"task": name, "generations": Path(path).name, **room.described(task)}
    return about | room.summary(task, found)


def compare(places: list[str]) -> None:
    """Prints both accuracies at each length, if they are of the same protocol."""
    from dmrl import results

    if len(places) != 2:
        raise ValueError(f"--compare needs two results, --compare A B, not {len(places)}")
    table = [("length", "protocol", *places), *results.compare(*places)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def decode() -> None:
    """Decodes the split at every length and writes results."""
    import jax

    from dmrl import accuracy, heap, orders, parallel, policy, processes, recipe, trainer

    logging.getLogger("jax").setLevel(logging.WARNING)
    heap.keep_pages()
    processes.join()
    made = recipe.build(chosen_config())
    asked = accuracy.Asked(
        split=SPLIT.value,
        lengths=tuple(map(int, LENGTHS.value or ())),
        steps=STEPS.value,
        block=BLOCK.value,
        temperature=TEMPERATURE.value,
        orders=tuple(ORDER.value),
        samples=SAMPLES.value,
        size=SIZE.value,
        batch=BATCH.value,
        prefill=PREFILL.value,
        seed=SEED.value,
    )
    decoders = accuracy.samplings(made, asked)
    mesh = parallel.make_mesh(**made.mesh)
    fresh = made.model.lora_rank and not made.init_from
    base = trainer.initial_weights(made, mesh)[1] if fresh else made.init_from
    loaded = policy.load(CHECKPOINT.value, base, mesh)
    accuracy.agrees(made, loaded)
    trained = list(filter(None, (ORDER_FROM.value, CHECKPOINT.value)))
    loaded = orders.beside(loaded, trained, decoders, mesh)
    out = Path(OUT.value or f"{policy.folder(CHECKPOINT.value).rstrip('/')}-{SPLIT.value}")
    about = {
        "checkpoint": CHECKPOINT.value,
        "order_from": ORDER_FROM.value,
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}",
    }
    found: list[dict[str, Any]] = []
    for result, rows in accuracy.measure(made, loaded, mesh, asked, decoders):
        found.append(result)
        if processes.is_writer():
            save(out, about, found, rows)
            print(line(result), flush=True)
    if processes.is_writer():
        print(f"results {out / 'results.json'}")


def chosen_config() -> dict[str, Any]:
    """The recipe of --config, or of the run, with the task as it is to be evaluated."""
    from dmrl import accuracy, policy

    found = CONFIG.value.to_dict() if CONFIG.value else policy.config(CHECKPOINT.value)
    if found is None:
        raise ValueError(f"--checkpoint={CHECKPOINT.value} is no run's: name a recipe by --config")
    task = dict(found["task"])
    if STYLE.value:
        task["style"] = STYLE.value
    else:
        task = accuracy.in_published_style(task)
    for flag in ("protocol", "equality"):
        if flags.FLAGS[flag].present:
            task[flag] = flags.FLAGS[flag].value
    return {**found, "task": task}


def save(
    out: Path, about: dict[str, Any], found: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> None:
    """The generations of the last result, and all results so far."""
    out.mkdir(parents=True, exist_ok=True)
    last = found[-1]
    name = f"generations_{named(last['protocol'], '_')}.jsonl"
    last["generations"] = name
    text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
    (out / name).write_text(text, encoding="utf-8")
    partial = out / ".results.json"
    partial.write_text(json.dumps({**about, "results": found}, indent=1), encoding="utf-8")
    partial.replace(out / "results.json")


def named(protocol: dict[str, Any], between: str) -> str:
    """What tells the results of one command apart: length, and order where asked for."""
    order = f"{between}{protocol['order'].replace(':', '-')}" if ORDER.value else ""
    return f"{protocol['length']}{order}"


def line(result: dict[str, Any]) -> str:
    """A result as it is printed."""
    from dmrl import results

    told = [f"length {named(result['protocol'], ', ')}: {results.shown(result)} %"]
    told += [f"pass@{k} {100 * v:.1f} %" for k, v in result.get("pass_at", {}).items()]
    told.append(f"mean length {result['mean_length']:.1f}")
    speed = result["tokens_per_s"]
    told.append(f"{speed:.0f} tokens/s" if speed else "speed unknown: one call, which compiled")
    return ", ".join([*told, f"n {result['n']}", f"protocol {result['hash']}"])


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
