"""x^T y, the product of a gradient, in the form that a CPU computes fast.

XLA's CPU backend has fast kernels for products over the last axis of the left operand; one over
rows it hands to Eigen, which packs the operand first. Transposing the narrower operand instead
takes a tenth off a small model's loss and gradient (measured, docs/performance.md). Other platforms
read either form.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def platform() -> str:
    """What programs are compiled for: of the mesh in use, which need not be attached."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def over_rows(
    x: Float[Array, "*lead n i"],
    y: Float[Array, "*lead n o"],
    precision: jax.lax.Precision | None = None,
    dtype: Any = None,
) -> Float[Array, "*lead i o"]:
    """x^T y, of type `dtype` or that of its operands."""
    matmul = functools.partial(jnp.matmul, precision=precision, preferred_element_type=dtype)
    if platform() != "cpu":
        return matmul(x.mT, y)
    laid_out = jax.lax.optimization_barrier  # keeps a transpose out of the product beside it
    if x.shape[-1] <= y.shape[-1]:
        return matmul(laid_out(x.mT), y)
    return laid_out(matmul(laid_out(y.mT), x)).mT
