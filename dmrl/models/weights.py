"""Weights on disk: a folder with one zarr array per leaf of our tree, and `model.json`.

    DIR/model.json                       Config and which collection the tree is
    DIR/blocks/attn/q_proj/kernel/...    [n_layers, in, out], in chunks of up to 1 x 1024 x 1024

The arrays are plain zarr v3 with a checksum per chunk, written and read by tensorstore (which
orbax itself stands on). The reasons: a stacked leaf of an 8B model is 1-3 GB and must be
filled layer by layer; a device must read only its own slice, whichever axis is cut; a lost or
damaged chunk must be an error; and an address such as `gs://bucket/dir` reads like a folder.
Training state is another matter: see `dmrl.checkpoint`.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import traverse_util

from dmrl.models import int8, unmasking
from dmrl.models.config import Config
from dmrl.models.llada import init

CHUNK = 1024
MODEL_FILE = "model.json"
MARKERS = (MODEL_FILE, "config.json", "adapter_config.json")
"""Written last into a checkpoint of ours, of Hugging Face, of PEFT: without it, none loads."""

Read = Callable[[str, int | None], np.ndarray]
"""(leaf path 'blocks/attn/q_proj/kernel', layer, or None for an unstacked leaf) -> values."""


class Written(NamedTuple):
    """What a conversion wrote."""

    tensors: int
    bytes: int


def leaves(cfg: Config, collection: str = "params") -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of a collection, by its path joined with '/'.

    Raises ValueError where the model has no such collection (`lora` with lora_rank=0).
    """

    def all_of_them() -> dict[str, Any]:
        key = jax.random.key(0)
        return {**init(cfg, key), "order": unmasking.init(cfg, key)}

    shapes = jax.eval_shape(all_of_them)
    if collection not in shapes:
        raise ValueError(f"a model with lora_rank={cfg.lora_rank} has no {collection!r} collection")
    return traverse_util.flatten_dict(shapes[collection], sep="/")


def layers(cfg: Config, path: str) -> list[int] | list[None]:
    """The layers a leaf is stacked over; [None] for a leaf that is not."""
    return list(range(cfg.n_layers)) if path.startswith("blocks/") else [None]


def read_tree(tree: Mapping[str, Any], fetch: Callable[[Any], np.ndarray] = np.asarray) -> Read:
    """A reader over a tree of arrays in memory; `fetch` brings a tensor to the host."""
    flat = traverse_util.flatten_dict(tree, sep="/")

    def read(path: str, layer: int | None) -> np.ndarray:
        return fetch(flat[path] if layer is None else flat[path][layer])

    return read


def build_tree(cfg: Config, read: Read, collection: str = "params") -> dict[str, Any]:
    """The whole tree that `read` describes, on the default device: for models that fit."""
    tree = {
        path: jnp.asarray(np.stack([read(path, i) for i in layers(cfg, path)]).reshape(leaf.shape))
        for path, leaf in leaves(cfg, collection).items()
    }
    return traverse_util.unflatten_dict(tree, sep="/")


def save_weights(
    directory: str | os.PathLike[str],
    cfg: Config,
    tree: Mapping[str, Any],
    collection: str = "params",
    force: bool = False,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
) -> Written:
    """Writes a tree, one tensor after the other; `write_weights` says what is raised.

    `fetch` brings one to the host. Where processes must take part in that together, those that
    write nothing call `fetch_all`.
    """
    have, want = traverse_util.flatten_dict(tree, sep="/"), leaves(cfg, collection)
    if have.keys() != want.keys():
        wrong = ", ".join(sorted(have.keys() ^ want.keys()))
        raise ValueError(f"the tree is not the {collection!r} tree of this model: {wrong}")
    for path, leaf in have.items():
        _check(path, leaf.shape, leaf.dtype, want[path])
    return write_weights(directory, cfg, read_tree(tree, fetch), collection, force)


def fetch_all(
    cfg: Config, tree: Mapping[str, Any], collection: str, fetch: Callable[[Any], np.ndarray]
) -> None:
    """Calls `fetch` for the same tensors in the same order as `save_weights`."""
    read = read_tree(tree, fetch)
    for path in leaves(cfg, collection):
        for layer in layers(cfg, path):
            read(path, layer)


def write_weights(
    directory: str | os.PathLike[str],
    cfg: Config,
    read: Read,
    collection: str = "params",
    force: bool = False,
) -> Written:
    """Writes a model layer by layer, holding one tensor at a time.

    Raises FileExistsError for a non-empty `directory` without `force`.
    """
    written = Written(0, 0)
    with new_directory(directory, force) as target:
        for path, leaf in leaves(cfg, collection).items():
            store = _create(target / path, leaf)
            for layer in layers(cfg, path):
                values = read(path, layer)
                slot = store if layer is None else store[layer]
                for start in range(0, len(values), CHUNK):  # bounds tensorstore's own copies
                    rows = slice(start, min(start + CHUNK, len(values)))
                    slot[rows].write(values[rows]).result()
                written = Written(written.tensors + 1, written.bytes + values.nbytes)
        model = {"collection": collection, "config": dataclasses.asdict(cfg)}
        (target / MODEL_FILE).write_text(json.dumps(model, indent=2) + "\n")
    return written


def open_weights(
    directory: str | os.PathLike[str], collection: str = "params"
) -> tuple[Config, Read]:
    """The Config and a lazy reader of a folder that `save_weights` wrote.

    Raises FileNotFoundError where there is no checkpoint and ValueError where it holds
    another collection, an unknown Config field or an array of the wrong shape.
    """
    cfg, stores = _open(directory, collection)

    def read(path: str, layer: int | None) -> np.ndarray:
        store = stores[path]
        return np.asarray((store if layer is None else store[layer]).read().result())

    return cfg, read


def load_weights(
    directory: str | os.PathLike[str],
    shardings: Any = None,
    collection: str = "params",
    each: Callable[[str, jax.Array], Any] = lambda path, leaf: leaf,
) -> tuple[Config, dict[str, Any]]:
    """Loads a whole tree of jax arrays; raises as `open_weights` does.

    Args:
      shardings: a tree of `jax.sharding.Sharding` like the parameters; every device reads
        only its own slices. None puts everything on the default device.
      each: what takes the place of a leaf, before the next one is read.
    """
    cfg, stores = _open(directory, collection)
    if shardings is None:
        shardings = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jnp.zeros(()).device),
            traverse_util.unflatten_dict(leaves(cfg, collection), sep="/"),
        )
    flat = traverse_util.flatten_dict(shardings, sep="/")
    if flat.keys() != stores.keys():
        wrong = ", ".join(sorted(flat.keys() ^ stores.keys()))
        raise ValueError(f"the shardings are not a tree like the parameters: {wrong}")
    tree = {
        path: each(
            path,
            jax.make_array_from_callback(
                store.shape, flat[path], functools.partial(_read_slice, store)
            ),
        )
        for path, store in stores.items()
    }
    return cfg, traverse_util.unflatten_dict(tree, sep="/")


def load_base(directory: str | os.PathLike[str], shardings: Any, cfg: Config) -> dict[str, Any]:
    """The parameters as a model of this Config stores them: in its `param_dtype`, or rounded."""

    def each(path: str, leaf: jax.Array) -> Any:
        if cfg.int8 and int8.is_kernel(path):
            return _rounded(leaf)
        return leaf.astype(cfg.param_dtype)

    return load_weights(directory, shardings, each=each)[1]


_rounded = jax.jit(int8.rounded)


def _read_slice(store: ts.TensorStore, index: tuple[slice, ...]) -> np.ndarray:
    return np.asarray(store[index].read().result())


def collection_in(directory: str | os.PathLike[str]) -> str:
    """What a checkpoint holds: 'params', 'lora' or 'order'.

    Raises FileNotFoundError where there is none.
    """
    return str(_model(directory)["collection"])


def _model(directory: str | os.PathLike[str]) -> dict[str, Any]:
    found = ts.KvStore.open(_kvstore(directory)).result().read(MODEL_FILE).result()
    if found.state != "value":
        raise FileNotFoundError(f"{os.fspath(directory)} is no checkpoint: no {MODEL_FILE} in it")
    return dict(json.loads(found.value))


def _open(
    directory: str | os.PathLike[str], collection: str
) -> tuple[Config, dict[str, ts.TensorStore]]:
    model = _model(directory)
    if model["collection"] != collection:
        raise ValueError(
            f"{os.fspath(directory)} holds {model['collection']!r}, not {collection!r}"
        )
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(model["config"].keys() - known):
        raise ValueError(f"{os.fspath(directory)}: unknown Config fields {', '.join(unknown)}")
    cfg = Config(**model["config"])
    stores = {}
    for path, leaf in leaves(cfg, collection).items():
        store = ts.open(_spec(_kvstore(directory, path)), read=True).result()
        _check(path, store.shape, store.dtype.numpy_dtype, leaf)
        stores[path] = store
    return cfg, stores


def _check(path: str, shape: tuple[int, ...], dtype: Any, want: jax.ShapeDtypeStruct) -> None:
    if tuple(shape) != want.shape or dtype != want.dtype:
        raise ValueError(
            f"{path} is {dtype}{list(shape)}; the Config asks for {want.dtype}{list(want.shape)}"
        )


def _kvstore(directory: str | os.PathLike[str], path: str = "") -> Any:
    name = os.fspath(directory)
    tail = path + "/" if path else ""
    if "://" in name:
        return f"{name.rstrip('/')}/{tail}"
    return {"driver": "file", "path": f"{os.path.abspath(name)}/{tail}"}


def _spec(kvstore: Any) -> dict[str, Any]:
    # Zeros are stored and a missing chunk is an error: never silently a block of zeros.
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _create(path: Path, leaf: jax.ShapeDtypeStruct) -> ts.TensorStore:
    chunk = [1] * (leaf.ndim - 2) + [max(1, min(n, CHUNK)) for n in leaf.shape[-2:]]
    metadata = {
        "shape": leaf.shape,
        "data_type": str(leaf.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    return ts.open(_spec(_kvstore(path)) | {"metadata": metadata, "create": True}).result()


@contextlib.contextmanager
def new_directory(target: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """A hidden sibling folder that takes the target's name only when the body has succeeded.

    Raises FileExistsError for a target that is a file, that is not empty (without `force`), or
    that is not empty and is no checkpoint (even with `force`, which deletes what it replaces).
    """
    final = Path(target).absolute()
    partial, old = (final.with_name(f".{final.name}.{what}") for what in ("partial", "old"))
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        if not any((final / marker).is_file() for marker in MARKERS):
            raise FileExistsError(f"{final} exists and is no checkpoint: choose another folder")
        if not force:
            raise FileExistsError(f"{final} is not empty: pass --force to replace it")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
