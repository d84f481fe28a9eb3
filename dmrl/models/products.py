"""Products in the precision of their operands; x^T y, a gradient's, in a form fast on a CPU.

XLA's CPU backend has fast kernels for products over the last axis of the left operand; one over
rows it hands to Eigen, which packs the operand first. Transposing the narrower operand instead
takes a tenth off a small model's loss and gradient (measured, docs/performance.md). Other platforms
read either form.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmrl.models import target


def precision(dtype: Any) -> jax.lax.Precision:
    """Float32 means float32: accelerators would otherwise use their fast, short formats."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def times(x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """x y in x's precision, of type `dtype` or that of its operands."""
    return jnp.matmul(x, y, precision=precision(x.dtype), preferred_element_type=dtype)


def over_rows(
    x: Float[Array, "*lead n i"],
    y: Float[Array, "*lead n o"],
    dtype: Any = None,
) -> Float[Array, "*lead i o"]:
    """x^T y in x's precision, of type `dtype` or that of its operands."""
    if target.platform() != "cpu":
        return times(x.mT, y, dtype)
    laid_out = jax.lax.optimization_barrier  # keeps a transpose out of the product beside it
    if x.shape[-1] <= y.shape[-1]:
        return times(laid_out(x.mT), y, dtype)
    return laid_out(times(laid_out(y.mT), x, dtype)).mT
