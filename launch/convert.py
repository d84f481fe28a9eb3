"""Converts weights between Hugging Face folders and ours.

    python launch/convert.py --from=HF_DIR --to=CKPT_DIR
    python launch/convert.py --from=CKPT_DIR --to=HF_DIR --to-hf
    python launch/convert.py --from=CKPT_DIR --lora=LORA_DIR --to=HF_DIR --to-hf
    python launch/convert.py --from=CKPT_DIR --lora=LORA_DIR --to=PEFT_DIR --to-hf \
        --lora-format=peft

Tensors are copied one by one and bit for bit. The target appears only when it is complete.
An exported folder holds the weights and config.json; the authors' modeling_llada.py,
configuration_llada.py and the tokenizer files come from the original model's folder.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a conversion must not take the accelerator

from absl import app, flags  # noqa: E402

from dmrl.models import convert, lora  # noqa: E402
from dmrl.models.weights import Written, leaves, open_weights, write_weights  # noqa: E402

_FROM = flags.DEFINE_string("from", None, "Folder to read.", required=True)
_TO = flags.DEFINE_string("to", None, "Folder to write.", required=True)
_TO_HF = flags.DEFINE_boolean("to-hf", False, "From our checkpoint to a Hugging Face folder.")
_LORA = flags.DEFINE_string("lora", None, "With --to-hf: weights folder of a LoRA adapter.")
_LORA_FORMAT = flags.DEFINE_enum(
    "lora-format",
    "merged",
    ["merged", "peft"],
    "Add the adapter to the weights, or write it alone.",
)
_SHARD_GB = flags.DEFINE_float("shard-gb", 5.0, "Largest safetensors file, in GB.", lower_bound=0)
_FORCE = flags.DEFINE_boolean("force", False, "Replace the checkpoint that --to holds.")

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


def _return_freed_memory() -> None:
    """Makes glibc give buffers of 1 MiB and more back instead of keeping them in its arenas.

    Measured on a model of 839 MB in shards of 67 MB: the peak of --to-hf above the
    interpreter's own memory falls from 228 MB to 44 MB. No-op with another C library.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)


def run() -> Written:
    """Does what the flags say; raises ValueError or OSError for what the user can mend."""
    source, target = Path(_FROM.value).resolve(), Path(_TO.value).resolve()
    for kept in filter(None, (_FROM.value, _LORA.value)):
        if Path(kept).resolve().is_relative_to(target):
            raise ValueError(f"--to={target} would replace what is read: {kept}")
    if not _TO_HF.value:
        if _LORA.value:
            raise ValueError("--lora needs --to-hf")
        cfg, read = convert.read_hf(source)
        return write_weights(target, cfg, read, force=_FORCE.value)
    cfg, read = open_weights(source)
    if not _LORA.value:
        return _write(target, cfg, read)
    lora_cfg, read_lora = open_weights(_LORA.value, "lora")
    if leaves(cfg) != leaves(lora_cfg):
        raise ValueError(f"--lora={_LORA.value} was made for a model of other shapes or dtype")
    if _LORA_FORMAT.value == "peft":
        return convert.export_peft(target, lora_cfg, read_lora, _FORCE.value)
    return _write(target, cfg, lora.read_merged(read, read_lora, lora_cfg))


def _write(target: Path, cfg: convert.Config, read: convert.Read) -> Written:
    return convert.write_hf(target, cfg, read, int(_SHARD_GB.value * 1e9), _FORCE.value)


def main(argv: list[str]) -> None:
    """Converts, and says in one line what was done or what is wrong."""
    start = time.monotonic()
    _return_freed_memory()
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        written = run()
    except (ValueError, OSError) as error:
        sys.exit(f"convert: {error}")
    seconds = time.monotonic() - start
    print(f"{written.tensors} tensors, {written.bytes} bytes, {seconds:.1f} s -> {_TO.value}")


if __name__ == "__main__":
    app.run(main)
