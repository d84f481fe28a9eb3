"""Complete prompts with a checkpoint, one JSON line each.

    python launch/generate.py --checkpoint=runs/mine --prompt="30,100,93=23:"
    python launch/generate.py --checkpoint=CKPT_DIR --tokenizer=HF_DIR --length=256 < prompts.txt
    python launch/generate.py --checkpoint=runs/mine/weights --prompts=FILE.jsonl --samples=4 \\
        --temperature=0.9 --out=completions.jsonl
    python launch/generate.py --checkpoint=runs/mine --decode=order=learned --order_from=runs/upo
    python launch/generate.py --checkpoint=runs/mine --compare=runs/other --prompts=FILE.jsonl \\
        --trace=trace.html

Prompts come from --prompt, from a file, or from standard input: a line each, or JSON objects
with a field `prompt` (a text with line breaks) and perhaps `template` (the completion with _
where the model fills). Length, steps and blocks are those of the run, if it is one.

--decode sets any other option of `dmrl.diffusion.sampling.Sampling`: --decode=remask=rcr.

--trace shows how each completion was decoded, step by step, on a page of its own (docs/viewer.md).
--compare puts another policy beside the first, --versus another way of decoding, for the same
prompts: --decode=order=entropy --versus=order=random.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This folder's evaluate.py must not shadow the library of that name; the clone itself may run.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "launch"]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run, its weights, or converted weights")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder; default the run's")
BASE = flags.DEFINE_string("base", None, "Of an adapter: weights it was trained on")
PROMPT = flags.DEFINE_multi_string("prompt", None, "A prompt; may be repeated")
PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts, - for standard input")
LENGTH = flags.DEFINE_integer("length", None, "Tokens of a completion; default the run's, or 256")
STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; default the run's, or length/2")
BLOCK = flags.DEFINE_integer("block", None, "Block length; default the run's, or 32")
ORDER_FROM = flags.DEFINE_string("order_from", None, "Of order=learned: the run that trained it")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 decodes greedily")
SAMPLES = flags.DEFINE_integer("samples", 1, "Completions of each prompt", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 16, "Prompts at a time; changes no result", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of sampled completions")
OUT = flags.DEFINE_string("out", None, "JSONL file; default standard output")
DECODE = flags.DEFINE_multi_string("decode", [], "KEY=VALUE of the sampler; may be repeated")
TRACE = flags.DEFINE_string("trace", None, "HTML page that shows the decoding, step by step")
COMPARE = flags.DEFINE_string("compare", None, "Another checkpoint, beside the first on the page")
VERSUS = flags.DEFINE_multi_string("versus", [], "Like --decode, after it: beside the first")
flags.mark_flag_as_required("checkpoint")


def main(argv: list[str]) -> None:
    """Completes, and writes the lines."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        check_trace()
        rows = completed(prompts())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if OUT.value:
        Path(OUT.value).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


def check_trace() -> None:
    """Raises ValueError before anything is loaded: the page comes last."""
    if (COMPARE.value or VERSUS.value) and not TRACE.value:
        raise ValueError(
            "--compare and --versus show completions on a page: give --trace=FILE.html too"
        )
    if (
        COMPARE.value
        and not VERSUS.value
        and Path(COMPARE.value).resolve() == Path(CHECKPOINT.value).resolve()
    ):
        raise ValueError(f"--compare={COMPARE.value} is the policy of --checkpoint itself")
    if TRACE.value and not Path(TRACE.value).resolve().parent.is_dir():
        raise ValueError(f"--trace={TRACE.value}: there is no folder {Path(TRACE.value).parent}")


def prompts() -> list[dict[str, Any]]:
    """The prompts as objects with `prompt` and perhaps `template`.

    Raises ValueError, with the line's number, for an object without a prompt, and for none at all.
    """
    if PROMPT.value:
        return [{"prompt": text} for text in PROMPT.value]
    name = PROMPTS.value or "-"
    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        row: Any = {"prompt": line}
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: no JSON ({error})") from None
            if not isinstance(row.get("prompt"), str):
                raise ValueError(f"{name}, line {number}: no text in a field 'prompt'")
        if line.strip():
            found.append(row)
    if not found:
        raise ValueError(
            "no prompt: give --prompt=TEXT, --prompts=FILE, or lines on standard input"
        )
    return found


def completed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the completions of --checkpoint; the page of --trace is written."""
    from dmrl import generation, heap, policy, recipe, viewer

    heap.keep_pages()
    for place in filter(None, (CHECKPOINT.value, COMPARE.value)):
        policy.folder(place)  # both before the work of the first
    logging.getLogger("jax").setLevel(logging.WARNING)
    config = policy.config(CHECKPOINT.value)
    own = recipe.build(config).sampling if config else None
    size = (LENGTH.value, STEPS.value, BLOCK.value, TEMPERATURE.value)
    decoder = generation.with_options(generation.sampling(own, *size), DECODE.value)
    other = generation.with_options(decoder, VERSUS.value)
    lines, traces = decoded(CHECKPOINT.value, rows, decoder, CHECKPOINT.value)
    if COMPARE.value or VERSUS.value:
        place = COMPARE.value or CHECKPOINT.value
        traces += decoded(place, rows, other, " ".join([place, *VERSUS.value]))[1]
    if TRACE.value:
        viewer.write(Path(TRACE.value), Path(TRACE.value).stem, traces)
    return lines


def decoded(
    checkpoint: str, rows: list[dict[str, Any]], decoder: Any, name: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows with the completions of a policy, and their traces, by that name, if there is to be
    a page."""
    from dmrl import decoding, generation, orders, trace

    ready = decoding.opened(checkpoint, TOKENIZER.value or "", BASE.value or "")
    trained = list(filter(None, (ORDER_FROM.value, checkpoint)))
    policy = orders.beside(ready.policy, trained, [decoder], ready.mesh)
    ready = ready._replace(policy=policy)
    size = (SAMPLES.value, BATCH.value, SEED.value)
    batches = list(generation.complete(ready, rows, decoder, *size))
    lines = [line for found, _ in batches for line in found]
    if not TRACE.value:
        return lines, []
    model = ready.policy.model
    read = trace.Reader(ready.tokenizer, model.mask_token_id, model.eos_token_id)
    return lines, generation.traces(batches, read, decoder, SAMPLES.value, name)


if __name__ == "__main__":
    app.run(main)
