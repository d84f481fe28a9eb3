"""safetensors files, one tensor at a time: read what the header lists, write a stream.

The format is 8 bytes of header length, a JSON header {name: dtype, shape, data_offsets}, then
the raw little-endian tensors (https://github.com/huggingface/safetensors). Reading goes through
plain file offsets: a memory map of a shard would count as resident memory, page after page.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """Where a tensor lies: `offset` in bytes from the start of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def scan(files: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of `files` by name, from the headers alone.

    Raises ValueError for a file that is not safetensors, is cut short, or repeats a tensor.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _header(file).items():
            if name in entries:
                raise ValueError(f"{name} is in {entries[name].file.name} and in {file.name}")
            entries[name] = entry
    return entries


def _header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{file} is not a safetensors file, or is cut short")
        text = stream.read(length)
    entries = {}
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, item in header.items():
            start, end = item["data_offsets"]
            entries[name] = Entry(file, item["dtype"], tuple(item["shape"]), 8 + length + start)
            if 8 + length + end > size:
                raise ValueError(f"{file} is cut short: {name} ends past its {size} bytes")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a malformed safetensors header: {error!r}") from error
    return entries


def load(entry: Entry) -> np.ndarray:
    """One tensor, in memory of its own."""
    dtype = DTYPES[entry.dtype]
    count = int(np.prod(entry.shape)) * dtype.itemsize
    data = np.fromfile(entry.file, np.uint8, count, offset=entry.offset)
    return data.view(dtype).reshape(entry.shape)


Spec = tuple[np.dtype[Any], tuple[int, ...]]
"""dtype and shape of a tensor to be written."""


def size(spec: Spec) -> int:
    """Bytes of a tensor."""
    dtype, shape = spec
    return int(np.prod(shape)) * dtype.itemsize


def write(file: Path, specs: Mapping[str, Spec], read: Callable[[str], np.ndarray]) -> None:
    """Writes the tensors named in `specs`, holding one at a time; `read(name)` supplies it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    start = 0
    for name, (dtype, shape) in specs.items():
        end = start + size((dtype, shape))
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligned tensors can be memory-mapped by other readers
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in specs.items():
            tensor = read(name)
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype}{tensor.shape}; announced {dtype}{shape}"
                )
            np.ascontiguousarray(tensor).tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())


def plan(specs: Mapping[str, Spec], shard_bytes: int) -> dict[str, dict[str, Spec]]:
    """Cuts tensors, in order, into named files of at most `shard_bytes` (or one tensor)."""
    shards: list[dict[str, Spec]] = [{}]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + size(spec) > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = spec
        held += size(spec)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)
    }
