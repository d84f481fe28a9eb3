"""FLOPs of a program, counted in its jaxpr: every matrix product, loops times their trips.

XLA's own `cost_analysis` counts the body of a loop once. The count is that of the whole program
over all devices, with what the backward pass recomputes; element-wise work is left out.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

JAXPR = (ClosedJaxpr, Jaxpr)


def matmul_flops(jaxpr: Any) -> float:
    """2 m n k of every product that `jaxpr` runs.

    Of a branch the dearest side is counted. A loop that may end early counts as often as it can
    run, if its condition compares a counter with a constant, else once.
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
    if name == "while":
        return inside * _most(params["cond_jaxpr"].jaxpr)
    return inside * params["length"] if name == "scan" else inside


def _most(condition: Jaxpr) -> int:
    """How often a loop with this condition can run; 1 where it does not say."""
    bounds = [
        eqn.invars[1].val
        for eqn in condition.eqns
        if eqn.primitive.name == "lt"
        and isinstance(eqn.invars[1], Literal)
        and getattr(eqn.invars[0].aval, "shape", None) == ()
    ]
    return int(min(bounds, default=1))
