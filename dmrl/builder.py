"""Rows as a TensorFlow dataset: ArrayRecord shards that one host writes and every host reads.

Needs the extra `tfds`, but no TensorFlow.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Rows = Callable[[], Iterable[Mapping[str, Any]]]
"""The rows of a split, from the beginning with every call."""


def write(name: str, splits: Mapping[str, Rows], to: Path, version: str = "1.0.0") -> Path:
    """Prepares the dataset `name` below `to` and returns its folder, a source `tfds:FOLDER`.

    The order of rows is kept. Text, numbers and lists of one of them keep their types; anything
    else is JSON in text. Fields are those of the first row. The folder appears when it is
    complete.

    Raises:
      ValueError: there is no row, or a row has other fields than the first.
      FileExistsError: the folder exists.
    """
    first = next((dict(row) for rows in splits.values() for row in rows()), None)
    if first is None:
        raise ValueError(f"no rows to write as {name!r}")
    types = {field: _type(value) for field, value in first.items()}

    def _info(self: Any) -> Any:
        typed = {f: tfds.features.Text() if t is None else t for f, t in types.items()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(typed), disable_shuffling=True
        )

    def _generate_examples(self: Any, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(splits[split]()):
            if row.keys() != types.keys():
                raise ValueError(
                    f"{split} row {number} has the fields {', '.join(row)}, the first row "
                    f"{', '.join(types)}"
                )
            yield (
                number,
                {f: json.dumps(v) if types[f] is None else v for f, v in row.items()},
            )

    def _split_generators(self: Any, downloads: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in splits}

    methods = {
        "VERSION": tfds.core.Version(version),
        "_info": _info,
        "_split_generators": _split_generators,
        "_generate_examples": _generate_examples,
        "name": name,
    }
    builder = type(name, (tfds.core.GeneratorBasedBuilder,), methods)(
        data_dir=str(to), file_format="array_record"
    )
    folder = Path(builder.data_path)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it, or give another --to")
    builder.download_and_prepare()
    return folder


def _type(value: Any) -> Any:
    """The TFDS feature of a value; None for what becomes JSON."""
    if isinstance(value, str):
        return tfds.features.Text()
    if isinstance(value, bool | int | float):
        return tfds.features.Scalar(np.float64 if isinstance(value, float) else np.int64)
    if isinstance(value, list | tuple) and len({type(v) for v in value}) == 1:
        inner = _type(value[0])
        flat = isinstance(value[0], str | int | float)
        return tfds.features.Sequence(inner) if flat else None
    return None
