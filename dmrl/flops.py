"""FLOPs of a program, counted in its jaxpr: every matrix product, loops times their trips.

XLA's own `cost_analysis` counts the body of a loop once. The count is that of the whole program
over all devices, with what the backward pass recomputes; element-wise work is left out.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

JAXPR = (ClosedJaxpr, Jaxpr)


def matmul_flops(jaxpr: Any) -> float:
    """2 m n k of every product that `jaxpr` runs.

    Of a branch the dearest side is counted; the body of a loop whose trips are not known counts
    once.
    """
    return sum((_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns), 0.0)


def _equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        contracted = math.prod(eqn.invars[0].aval.shape[i] for i in left)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * contracted
    if name == "cond":
        return max(matmul_flops(branch) for branch in params["branches"])
    inside = sum((matmul_flops(x) for x in params.values() if isinstance(x, JAXPR)), 0.0)
    if name == "shard_map":  # written for one device
        return inside * float(params["mesh"].size)
    return inside * params["length"] if name == "scan" else inside
