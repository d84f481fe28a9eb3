"""Cloud TPU slices by Google's names: chips, layout, memory and speed, in one table.

`v4-N` and `v5p-N` count TensorCores, two a chip; `v5e-N` counts chips. All figures are published
(Google Cloud TPU documentation), none is measured here.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """What one device can hold and do."""

    hbm: float
    """Bytes."""
    flops: float
    """bfloat16 FLOP/s."""
    bandwidth: float
    """HBM, byte/s."""
    interconnect: float
    """ICI, byte/s over all links of a chip."""


CHIPS = {
    "v4": Chip(32e9, 275e12, 1228e9, 300e9),
    "v5e": Chip(16e9, 197e12, 819e9, 200e9),
    "v5p": Chip(95e9, 459e12, 2765e9, 600e9),
}
SHAPES = {
    "v4-8": "2x2x1",
    "v4-16": "2x2x2",
    "v4-32": "2x2x4",
    "v4-64": "2x4x4",
    "v5e-4": "2x2",
    "v5e-8": "2x4",
    "v5e-16": "4x4",
    "v5e-32": "4x8",
    "v5e-64": "8x8",
    "v5p-8": "2x2x1",
    "v5p-16": "2x2x2",
    "v5p-32": "2x2x4",
    "v5p-64": "2x4x4",
}
MISSING = (
    "libtpu, the TPU compiler, is not installed: pip install '.[tpu]' in an environment of its "
    "own (it compiles on any Linux x86-64 machine, no TPU needed), or try --topology=cpu:8"
)


class Slice(NamedTuple):
    """Devices to compile for, none of which has to be attached."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    """None for simulated devices, which have no memory or speed to compare with."""


def find(name: str) -> Slice:
    """The slice `name`: one of SHAPES, or `cpu:N`, N simulated devices of this host.

    Raises:
      ValueError: no such slice, or fewer simulated devices than asked for (see `simulate`).
      ModuleNotFoundError: libtpu is not installed.
    """
    if name.startswith("cpu:"):
        count, have = simulated(name), jax.devices("cpu")
        if len(have) < count:
            raise ValueError(f"{name}: this process has {len(have)} CPU devices")
        return Slice(name, have[:count], None)
    if name not in SHAPES:
        raise ValueError(f"no slice {name!r}: choose one of {', '.join(SHAPES)}, or cpu:N")
    kind = name.partition("-")[0]
    # One core a chip on v5e; the two of v4 and v5p work as one device, as they do by default.
    options = {} if kind == "v5e" else {"chip_config_name": "megacore"}
    # libtpu takes a lock against a second process on the same TPU: a compiler has none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(MISSING) from None
    found = topologies.get_topology_desc(f"{kind}:{SHAPES[name]}", platform="tpu", **options)
    return Slice(name, found.devices, CHIPS[kind])


def simulated(name: str) -> int:
    """N of `cpu:N`, 0 for the name of a real slice."""
    kind, _, count = name.partition(":")
    if kind != "cpu":
        return 0
    if not count.isdigit() or not int(count):
        raise ValueError(f"--topology={name}: give a number of simulated devices, e.g. cpu:8")
    return int(count)
