"""Rows cut over all devices, weights whole on each: what `mesh.data=-1 mesh.fsdp=1` makes of a run.

A CPU is one device unless JAX_NUM_CPU_DEVICES says how many.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from dmrl import parallel


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Of all devices, made once."""
    return parallel.make_mesh(data=-1, fsdp=1)


def rows(tree: Any) -> Any:
    """Each device its share of the first axis, which must divide."""
    return jax.device_put(tree, parallel.batch_sharding(mesh()))


def cut(tree: Any) -> Any:
    """`rows` inside a program."""
    return jax.lax.with_sharding_constraint(tree, parallel.batch_sharding(mesh()))


def whole(tree: Any) -> Any:
    """A copy on each device."""
    return jax.device_put(tree, parallel.replicated(mesh()))


def in_mesh(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program`, called with the mesh in use."""

    @functools.wraps(program)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(mesh()):
            return program(*args, **kwargs)

    return call
