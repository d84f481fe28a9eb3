"""A compiled program against a slice: memory, traffic, analytic cost, and what to change.

Nothing here has run. Memory and traffic are `compiled`: the compiler's own account. Seconds are
`predicted`: bounds from published peak rates, which no program reaches.
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from dmrl import flops, hlo, parallel
from dmrl.ahead import Traced
from dmrl.cost import GB
from dmrl.objective import needs
from dmrl.recipe import Recipe
from dmrl.slices import Chip, Slice

_KEY = jax.dtypes.prng_key
SPARE = 0.1
"""Share of a device's memory to leave free: fragmentation, the runtime, other programs."""


class Fit(NamedTuple):
    """One program on one slice. Bytes are those of one device."""

    program: str
    topology: str
    devices: int
    mesh: dict[str, int]
    runs: int
    """How often a step runs the program: a rollout once a chunk."""
    compile_seconds: float
    arguments: float = 0.0
    outputs: float = 0.0
    aliased: float = 0.0
    """Part of the outputs that takes the place of donated arguments."""
    temporaries: float = 0.0
    code: float = 0.0
    beside: float = 0.0
    """Kept on the device meanwhile: what is not among the arguments, e.g. Adam's moments."""
    peak: float = 0.0
    """Everything at once."""
    hbm: float | None = None
    """The device's memory; None for simulated devices."""
    fits: bool | None = None
    """Whether `peak` leaves SPARE of `hbm` free."""
    collectives: dict[str, hlo.Sent] | None = None
    """By kind, of one run; None where the compiler gives no text."""
    unknown_loops: int = 0
    flops: float = 0.0
    """Matrix products of one run on all devices."""
    compute_seconds: float | None = None
    """A step's products at peak rate (predicted)."""
    interconnect_seconds: float | None = None
    """A step's collectives at the rate of all links (predicted)."""
    change: tuple[str, ...] = ()
    """What would make it fit, or less wasteful."""
    error: str = ""
    """What the compiler said where it gave up."""

    @property
    def seconds(self) -> float | None:
        """Roofline of a step (predicted): the slower of the two, as if they overlapped fully."""
        known = [s for s in (self.compute_seconds, self.interconnect_seconds) if s is not None]
        return max(known) if known else None


def compiled(program: Traced, recipe: Recipe, mesh: Mesh, where: Slice) -> Fit:
    """Compiles `program` and says how it fits."""
    work = flops.matmul_flops(program.traced.jaxpr)
    beside, given = _share(program.beside), _share(program.arguments)
    runs = program.runs
    count, chip = mesh.devices.size, where.chip
    fit = Fit(
        program.name,
        where.name,
        count,
        dict(mesh.shape),
        runs,
        0.0,
        beside=beside,
        hbm=chip and chip.hbm,
        flops=work,
        compute_seconds=chip and runs * work / count / chip.flops,
    )
    start = time.perf_counter()
    try:
        done = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        fit = _refused(fit._replace(arguments=given), str(error))
    else:
        fit = _account(fit, done, chip)
    fit = fit._replace(compile_seconds=time.perf_counter() - start)
    if fit.hbm is not None:
        fit = fit._replace(fits=not fit.error and fit.peak <= (1 - SPARE) * fit.hbm)
    return fit._replace(change=tuple(_changes(fit, recipe, mesh)))


def _account(fit: Fit, done: Any, chip: Chip | None) -> Fit:
    m = done.memory_analysis()
    parts = [
        float(getattr(m, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp", "generated_code")
    ]
    given, out, alias, temp, code = parts
    fit = fit._replace(arguments=given, outputs=out, aliased=alias, temporaries=temp, code=code)
    fit = fit._replace(peak=given + out - alias + temp + code + fit.beside)
    try:
        sent = hlo.traffic(done.as_text())
    except jax.errors.JaxRuntimeError:  # some pairs of jaxlib and libtpu cannot print v5p's
        return fit
    seconds = chip and fit.runs * sent.bytes / chip.interconnect
    return fit._replace(
        collectives=sent.kinds, unknown_loops=sent.unknown_loops, interconnect_seconds=seconds
    )


_USED = re.compile(r"Used ([\d.]+)([KMGT]) of")
_WANTED = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _refused(fit: Fit, message: str) -> Fit:
    """The compiler ran out of the device's memory, and says how much it wanted."""
    if "RESOURCE_EXHAUSTED" not in message and "memory" not in message:
        raise RuntimeError(f"{fit.program} does not compile for {fit.topology}: {message[:2000]}")
    used, wanted = _USED.search(message), _WANTED.search(message)
    found = used or wanted
    total = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if found and not used:  # without the arguments
        total += fit.arguments
    return fit._replace(
        temporaries=max(total - fit.arguments, 0.0),
        peak=total + fit.beside,
        error=message.splitlines()[0][:300],
    )


def _share(tree: Any) -> float:
    """Bytes on one device of a tree of laid-out shapes."""
    arrays = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, _KEY)]
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays))


def _changes(fit: Fit, recipe: Recipe, mesh: Mesh | AbstractMesh) -> list[str]:
    """Options that lower the peak, the cheapest in speed first; and what wastes devices."""
    loop, model, shards = recipe.loop, recipe.model, parallel.batch_shards(mesh)
    rows = loop.prompts_per_step * loop.num_generations
    if fit.program == "rollout":
        option, pieces, whole = "rollout_chunks", loop.rollout_chunks, loop.prompts_per_step
    else:
        option, pieces, whole = "microbatches", loop.microbatches, rows
    even = [n for n in range(1, whole + 1) if whole % n == 0 and rows // n % shards == 0]
    found = []
    if rows // pieces % shards:
        near = sorted(sorted(even, key=lambda n: abs(n - pieces))[:2])
        choice = " or ".join(map(str, near)) or f"a number of completions that {shards} divides"
        found.append(
            f"--config.{option}: {pieces} leaves {rows // pieces} completions for {shards} "
            f"devices, which is uneven; choose {choice}"
        )
    if fit.hbm is None:
        return found
    room, held = (1 - SPARE) * fit.hbm, fit.arguments + fit.beside
    if fit.fits:
        fewer = [n for n in even if n < pieces]
        if fewer and fit.peak < room / 2:
            text = f"--config.{option}={fewer[-1]}: there is room, and weights are gathered less"
            found.append(text)
        return found
    more = [n for n in even if n > pieces]
    if held > room:
        count = math.ceil(held * fit.devices / room)
        instead = "" if model.lora_rank else ", or --config.model.lora_rank=128"
        found.append(
            f"weights and state alone take {held / GB:.1f} of {room / GB:.1f} GB: a slice of at "
            f"least {count} such chips{instead}"
        )
    elif more:
        found.append(f"--config.{option}={more[0]}")
    elif model.remat != "full" and fit.program == "update":
        found.append("--config.model.remat=full")
    else:
        found.append(
            "a device has as few rows as can be: --config.mesh.tensor=2, or a larger slice"
        )
    if model.lora_rank and model.param_dtype == "float32":
        found.append("--config.model.param_dtype=bfloat16 for the frozen base")
    if model.lora_rank and not model.int8:
        found.append("--config.model.int8=True: a byte for a frozen weight of the layers")
    if not model.lora_rank and "reference" in needs(recipe.terms):
        found.append("beta=0 in every term: no reference copy of the weights")
    return found
