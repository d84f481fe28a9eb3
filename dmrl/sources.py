"""Rows of a data set, wherever it lies, from one line of a config.

    jsonl:FILE or FOLDER      JSON objects, one a line, perhaps .gz; a folder of SPLIT.jsonl.
                              An address such as gs://bucket/folder reads like a folder.
    hf:NAME[/CONFIG][:SPLIT]  a Hugging Face dataset (extra `hf`): its name on the hub, or a local
                              folder or file in one of the formats of `datasets`.
    tfds:NAME                 a TensorFlow dataset (extra `tfds`): its name, or the folder of a
                              prepared one (ArrayRecord). Read by `as_data_source`, without
                              importing TensorFlow.

Nothing but the standard library is imported until a source asks for it.
"""

import functools
import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "validation", "test")


class Row(NamedTuple):
    """A row and where it stands, for messages: 'FILE, line 3'."""

    where: str
    values: dict[str, Any]


Source = Mapping[str, Callable[[], Iterator[Row]]]
"""The splits of a data set by name; each call reads one from its beginning."""


def read(source: str) -> Source:
    """The splits of `source`. One file, or one split that was named, is 'train' unless it is
    called validation or test.

    Raises:
      ValueError: no such kind of source, or nothing can be read there, with what would be right.
        While reading: an empty, malformed or truncated line, by file and number.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the extra that reads it is not installed.
    """
    kind, colon, place = source.partition(":")
    if kind not in KINDS or not colon or not place:
        raise ValueError(
            f"source={source!r}: give jsonl:PATH, hf:NAME[/CONFIG][:SPLIT] or tfds:NAME"
        )
    return KINDS[kind](place)


def lines(file: str | Path) -> Iterator[Row]:
    """The objects of a JSONL file (perhaps .gz), or of one at an address such as gs://...

    Raises:
      ValueError: naming file and line, for a line that is empty or no JSON object, a file that
        ends too soon, and one without lines.
      FileNotFoundError: there is no such file.
    """
    number = 0
    with _opened(str(file)) as stream:
        while line := _next(stream, file, number + 1):
            number += 1
            where = f"{file}, line {number}"
            if not line.strip():
                raise ValueError(f"{where}: empty")
            try:
                values = json.loads(line.decode("utf-8"))
            except ValueError as error:
                cut = "" if line.endswith(b"\n") else "; the file may have been cut off"
                raise ValueError(f"{where}: no JSON ({error}){cut}") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: {line[:40].decode()!r} is no JSON object")
            yield Row(where, values)
    if not number:
        raise ValueError(f"{file} has no lines")


def _next(stream: Any, file: str | Path, number: int) -> bytes:
    try:
        return bytes(stream.readline())
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}, line {number}: cut off or no gzip ({error})") from None


def _opened(file: str) -> Any:
    opener: Any = gzip.open if file.endswith(".gz") else open
    if "://" not in file:
        return opener(file, "rb")
    folder, _, name = file.rpartition("/")
    found = _bucket(folder).read(name).result()
    if found.state != "value":
        raise FileNotFoundError(f"no file {file}")
    raw = io.BytesIO(found.value)
    return gzip.open(raw) if file.endswith(".gz") else raw


def _bucket(folder: str) -> Any:
    """A tensorstore view of a folder at an address."""
    store = importlib.import_module("tensorstore")
    return store.KvStore.open(f"{folder.rstrip('/')}/").result()


def _split_of(name: str) -> str:
    return name if name in SPLITS else "train"


def _jsonl(place: str) -> Source:
    endings = (".jsonl", ".jsonl.gz")
    if place.endswith(endings):
        name = place.rpartition("/")[2].partition(".")[0]
        return {_split_of(name): lambda: lines(place)}
    if "://" in place:
        names = [key.decode() for key in _bucket(place).list().result()]
    elif Path(place).is_dir():
        names = [file.name for file in Path(place).iterdir()]
    else:
        raise FileNotFoundError(f"source jsonl:{place}: no such folder, and no name in .jsonl")
    files = {n.partition(".")[0]: f"{place.rstrip('/')}/{n}" for n in names if n.endswith(endings)}
    if not files:
        raise ValueError(f"source jsonl:{place}: the folder holds no SPLIT.jsonl")
    return {split: functools.partial(lines, file) for split, file in sorted(files.items())}


def _numbered(source: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield Row(f"{source}, row {number}", {k: _plain(v) for k, v in row.items()})


def _plain(value: Any) -> Any:
    """A value as JSON has it: text for bytes, lists and numbers for numpy's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _package(name: str, extra: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"source={source!r} needs {error.name}: pip install 'dmrl[{extra}]'", name=error.name
        ) from None


def _hf(place: str) -> Source:
    source = f"hf:{place}"
    name, colon, split = place.rpartition(":")
    if not colon or "/" in split:
        name, split = place, ""
    datasets = _package("datasets", "hf", source)
    found = _hf_local(datasets, name) if Path(name).exists() else _hf_hub(datasets, name)
    if not isinstance(found, dict):
        found = {split or str(found.split or "train"): found}
    if split and split not in found:
        raise ValueError(f"source={source!r}: no split {split!r} among {', '.join(found)}")
    kept = {_split_of(split): found[split]} if split else found
    return {
        part: functools.partial(_numbered, f"{source} {part}", rows) for part, rows in kept.items()
    }


def _hf_local(datasets: Any, name: str) -> Any:
    """What `save_to_disk` wrote, one file, or a folder of files."""
    path, kinds = Path(name), {".parquet": "parquet", ".arrow": "arrow"}
    kinds |= {".json": "json", ".jsonl": "json", ".csv": "csv"}
    try:
        if path.is_file():
            kind = kinds.get(path.suffix)
            if kind is None:
                raise ValueError(f"{path.suffix!r} is not one of {', '.join(kinds)}")
            return datasets.load_dataset(kind, data_files=name)["train"]
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, _hf_config(datasets, name))
    except Exception as error:  # of datasets, pyarrow or fsspec: which, depends on the format
        raise ValueError(f"source hf:{name} cannot be read ({_told(error)})") from error


def _hf_hub(datasets: Any, name: str) -> Any:
    owner, _, rest = name.partition("/")
    title, _, config = rest.partition("/")
    title = f"{owner}/{title}" if title else owner
    try:
        return datasets.load_dataset(title, config or _hf_config(datasets, title))
    except Exception as error:  # of datasets, the hub's client or its HTTP library
        raise ValueError(
            f"source hf:{name}: neither a local path nor within reach on the hub "
            f"({_told(error)}). Without the hub, save it where there is one, "
            f"datasets.load_dataset({title!r}, ...).save_to_disk(DIR), copy DIR here and give "
            "hf:DIR; or give jsonl:DIR with train.jsonl and test.jsonl"
        ) from error


def _hf_config(datasets: Any, name: str) -> str | None:
    """Of several configurations the one called default or main; None where there is one."""
    names = datasets.get_dataset_config_names(name)
    chosen = [n for n in ("default", "main") if n in names] or names[:1]
    if len(names) > 1 and chosen[0] == names[0] and chosen[0] not in ("default", "main"):
        raise ValueError(f"choose one of its configurations, hf:{name}/{{{', '.join(names)}}}")
    return chosen[0] if chosen else None


def _told(error: Exception) -> str:
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first[:200]}"


def _tfds(place: str) -> Source:
    source = f"tfds:{place}"
    tfds = _package("tensorflow_datasets", "tfds", source)
    if "://" in place:
        raise ValueError(
            f"source={source!r}: ArrayRecord files are read from a file system: mount the bucket "
            "(gcsfuse; docs/pods.md) and give the folder"
        )
    try:
        folder = Path(place).is_dir()
        builder = tfds.builder_from_directory(place) if folder else tfds.builder(place)
    except Exception as error:  # DatasetNotFoundError, or what its file system raises
        raise ValueError(
            f"source={source!r}: no prepared dataset ({_told(error)}); give the folder that "
            "holds its dataset_info.json, as launch/data.py prints it"
        ) from error
    if not builder.info.splits:
        raise ValueError(
            f"source={source!r} is not prepared in {builder.data_path}: let one host write it "
            "(launch/data.py, or tfds build --file_format=array_record)"
        )
    return {part: functools.partial(_items, builder, source, part) for part in builder.info.splits}


def _items(builder: Any, source: str, part: str) -> Iterator[Row]:
    rows = builder.as_data_source(part)
    return _numbered(f"{source} {part}", (rows[i] for i in range(len(rows))))


KINDS: dict[str, Callable[[str], Source]] = {"jsonl": _jsonl, "hf": _hf, "tfds": _tfds}
