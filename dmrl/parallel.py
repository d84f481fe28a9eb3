"""The device mesh and who holds which slice of what.

One table maps parameter paths to layouts; it serves weights, adapters and optimiser state
alike. Programs are ordinary `jax.jit` over `NamedSharding`s, on one device as on a pod.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

RULES: tuple[tuple[str, P], ...] = (
    # The leading axis of everything under `blocks` is the layer.
    (
        r"blocks/.*(q_proj|k_proj|v_proj|ff_proj|up_proj)/kernel(/values)?$",
        P(None, "fsdp", "tensor"),
    ),
    (r"blocks/.*(attn_out|ff_out)/kernel(/values)?$", P(None, "tensor", "fsdp")),
    (r"blocks/.*(q_proj|k_proj|v_proj|ff_proj|up_proj)/a$", P(None, "fsdp", None)),
    (r"blocks/.*(q_proj|k_proj|v_proj|ff_proj|up_proj)/b$", P(None, "fsdp", "tensor")),
    (r"blocks/.*(attn_out|ff_out)/a$", P(None, "tensor", "fsdp")),
    (r"blocks/.*(attn_out|ff_out)/b$", P(None, None, "fsdp")),
    # The unmasking policy: a layer of the model's shape, and a perceptron.
    (r"block/.*(q_proj|k_proj|v_proj|ff_proj|up_proj)/kernel$", P("fsdp", "tensor")),
    (r"block/.*(attn_out|ff_out)/kernel$", P("tensor", "fsdp")),
    (r"hidden_\d/kernel$", P("fsdp", "tensor")),
    (r"embedding$", P("tensor", "fsdp")),
    # Only columns are cut, so that no device ever gathers the head (dmrl/models/logprob.py).
    (r"head$", P(None, ("fsdp", "tensor"))),
    (r".*", P()),
)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A ('data', 'fsdp', 'tensor') mesh over all devices; one size may be -1, "the rest".

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    return mesh_over(jax.devices(), data, fsdp, tensor)


def mesh_over(devices: Sequence[Any], data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """`make_mesh` over given devices, e.g. those of a slice that is not attached."""
    sizes, count = [data, fsdp, tensor], len(devices)
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes) or count % known:
        raise ValueError(_mesh_error(sizes, count))
    sizes = [count // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != count:
        raise ValueError(_mesh_error(sizes, count))
    types = (AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)


def _mesh_error(sizes: list[int], count: int) -> str:
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    return f"mesh {named} does not cover the {count} devices: the product must be {count}"


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks/attn/q_proj/kernel` from a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A NamedSharding for every leaf of `tree` (weights, adapter, or a state that holds them).

    A named axis is dropped where the dimension does not divide by it, on scalars, and where it
    cuts nothing: layouts that are the same are then equal, and find the same compiled program.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    if len(spec) > len(shape):
        return P()

    def kept(axes: Any, size: int) -> Any:
        cutting = tuple(a for a in _names(axes) if mesh.shape[a] > 1)
        if not cutting or size % int(np.prod([mesh.shape[a] for a in cutting])):
            return None
        return cutting if len(cutting) > 1 else cutting[0]

    fitted = [kept(axes, size) for axes, size in zip(spec, shape, strict=False)]
    while fitted and fitted[-1] is None:
        fitted.pop()
    return P(*fitted)


def _names(axes: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, P())


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, the same in every process, as arrays of the mesh: each device gets its part."""

    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def gather(tree: Any) -> Any:
    """Whole arrays on the host of every process, whatever device of whatever process held them."""
    apart = [x for x in jax.tree.leaves(tree) if not _is_here(x)]
    if apart:
        together = iter(_replicate(apart[0].sharding.mesh)(apart))
        tree = jax.tree.map(lambda x: x if _is_here(x) else next(together), tree)
    return jax.tree.map(np.asarray, tree)


def _is_here(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


@functools.cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """In how many pieces the batch axis is cut."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])
