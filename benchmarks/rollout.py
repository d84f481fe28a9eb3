"""Sampling against the standard PyTorch sampler, against our own full logits, against the roof.

    python benchmarks/rollout.py [--shapes=T0,T1] [--timed_steps=8] [--clock=cpu]
    JAX_NUM_CPU_DEVICES=2 python benchmarks/rollout.py     # two devices, half the rows each

First asserts that at temperature 0 all of them decode the same tokens. Items 1, 2, 8, 9 and 11.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import peer, spread, timing  # noqa: E402
from benchmarks.shapes import SHAPES, T0, Shape  # noqa: E402
from dmrl import cost, heap, models  # noqa: E402
from dmrl.diffusion import refill  # noqa: E402
from dmrl.diffusion.sampler import Sampling, sample  # noqa: E402
from dmrl.types import Denoiser  # noqa: E402

_STEPS = flags.DEFINE_integer("timed_steps", 8, "Denoising steps of T1 that are timed")
_ROWS = flags.DEFINE_integer("rows", 0, "Completions at a time; 0: the shape's own")

GOALS = {"T0": 2.0, "T1": 8.0}
GROUP = 6
LENGTHS = (64, 128, 256, 512, 1024)
SIZES = (6, 8, 12, 16)
REFILLED = 16
"""Completions a slot, of item 11."""


class Timed(NamedTuple):
    """A shape whose sampler takes as many steps as are timed, with weights and prompts."""

    shape: Shape
    params: Any
    prompt: jax.Array


def make(shape: Shape, steps: int) -> Timed:
    """Random weights and prompts. A step costs the same however many tokens it reveals."""
    blocks = shape.sampling.blocks
    steps = min(shape.sampling.steps, -(-steps // blocks) * blocks)
    sampling = dataclasses.replace(shape.sampling, steps=steps)
    params = models.init(shape.model, jax.random.key(0))["params"]
    # Random heads are nearly flat; sharper ones leave no tie for rounding to decide.
    params["head"] = params["head"] * 4
    # One prompt, as in a group.
    prompt = jax.random.randint(jax.random.key(1), (1, shape.prompt), 0, shape.model.eos_token_id)
    prompt = jnp.repeat(prompt, shape.rows, axis=0)
    return Timed(shape._replace(sampling=sampling), spread.whole(params), spread.rows(prompt))


@spread.in_mesh
@functools.partial(jax.jit, static_argnames=("cfg", "config"))
def _sample(params, prompt, template, key, *, cfg, config):
    denoiser = models.bind(cfg, {"params": params}, keep_mask=True)
    rows = jnp.arange(prompt.shape[0], dtype=jnp.int32)
    valid = jnp.ones(prompt.shape, bool)
    return sample(denoiser, prompt, valid, template, rows, jnp.zeros_like(rows), key, config).tokens


def _masks(timed: Timed) -> jax.Array:
    shape = timed.shape
    size = (shape.rows, shape.sampling.length)
    return spread.rows(np.full(size, shape.model.mask_token_id, np.int32))


def ours(timed: Timed, config: Sampling) -> Callable[[], jax.Array]:
    """Our sampler: the vocabulary head reads the current block."""
    cfg, template, key = timed.shape.model, _masks(timed), spread.whole(jax.random.key(2))
    return lambda: _sample(timed.params, timed.prompt, template, key, cfg=cfg, config=config)


def full_logits(timed: Timed, config: Sampling) -> Callable[[], jax.Array]:
    """Our sampler doing what the peer does: prompt and completion are one block of a template.

    Every position then passes through head, noise and softmax at every step.
    """
    span = timed.shape.prompt + config.length
    whole = dataclasses.replace(config, length=span, block_length=span)
    template = jnp.concatenate([timed.prompt, _masks(timed)], axis=1)
    cfg, nothing, key = timed.shape.model, timed.prompt[:, :0], spread.whole(jax.random.key(2))
    run = functools.partial(_sample, cfg=cfg, config=whole)
    return lambda: run(timed.params, nothing, template, key)[:, timed.shape.prompt :]


def standard(
    timed: Timed, config: Sampling, dtype: torch.dtype = torch.float32
) -> Callable[[], np.ndarray]:
    """The peer."""
    network = peer.model(timed.shape.model, timed.params)
    prompt = peer.tensor(timed.prompt)
    return lambda: peer.generate(network, prompt, config, dtype).numpy()


def check(timed: Timed) -> None:
    """All decode the same tokens without noise. Raises AssertionError."""
    greedy = dataclasses.replace(timed.shape.sampling, temperature=0.0)
    one_block = dataclasses.replace(greedy, block_length=greedy.length)
    for mode, config in ((ours, greedy), (full_logits, one_block)):
        found, wanted = np.asarray(mode(timed, config)()), standard(timed, config)()
        assert len(np.unique(wanted)) > 4, "nothing to compare: the peer repeats itself"
        np.testing.assert_array_equal(found, wanted, err_msg=f"{mode.__name__}")


def flops(shape: Shape, logit_rows: int) -> float:
    """Of all forwards of one batch, `logit_rows` through the head."""
    span = shape.prompt + shape.sampling.length
    one = cost.forward_flops(cost.shape_of(shape.model), span, span, logit_rows)
    return shape.rows * shape.sampling.steps * one


def exact_flops(shape: Shape) -> float:
    """What our sampler spends: head, last queries and last MLP on the block alone."""
    sampling = shape.sampling
    context = (cost.shape_of(shape.model), shape.rows, shape.prompt, sampling.length)
    return cost.rollout_flops(*context, sampling.block_length, sampling.steps)


def sized(name: str) -> Timed:
    """A shape as it is timed."""
    shape = SHAPES[name]._replace(rows=_ROWS.value or SHAPES[name].rows)
    return make(shape, _STEPS.value if name == "T1" else shape.sampling.steps)


def against_peer(name: str) -> tuple[list[timing.Row], dict[str, Any]]:
    """Items 1 and 2 of one shape."""
    usual = SHAPES[name].sampling
    timed = sized(name)
    check(timed)
    shape, config = timed.shape, timed.shape.sampling
    contestants = {
        "dmrl": ours(timed, config),
        "dmrl full logits": full_logits(timed, config),
        "peer": timing.Apart(f"--serve={name},float32"),
    }
    if name != "T1":  # the published sampler's noise; at T1 it would be most of the benchmark
        contestants["peer, float64 noise"] = timing.Apart(f"--serve={name},float64")
    times = timing.alternate(contestants)
    span = shape.prompt + config.length
    least, whole = exact_flops(shape), flops(shape, span)
    faster = timing.ratio(times, "peer", "dmrl")
    tax = timing.ratio(times, "peer", "dmrl full logits")
    double = "its noise and softmax in float32"
    if "peer, float64 noise" in times:
        double = f"{timing.ratio(times, 'peer, float64 noise', 'dmrl'):.2f}x with its float64 noise"
    tokens = shape.rows * config.steps * usual.length / usual.steps
    goal = GOALS.get(name, 1.0)
    rows = [
        timing.Row(
            "1",
            f"rollout of {shape.rows}, {config.steps} steps, "
            f"{tokens / times['dmrl'].median:.0f} tokens/s",
            name,
            f"{faster:.2f}x the peer ({double})",
            f">= {goal:g}x",
            f"{whole / least:.2f}x in FLOPs",
            faster,
            timing.ratio(times, "dmrl full logits", "dmrl"),
            least / timing.peak_flops() / times["dmrl"].median,
            faster >= goal,
        ),
        timing.Row(
            "2",
            "rollout, full_logits mode",
            name,
            f"{tax:.2f}x the peer",
            ">= 1x",
            "1x in FLOPs",
            tax,
            1.0,
            whole / timing.peak_flops() / times["dmrl full logits"].median,
            tax >= 1,
        ),
    ]
    return rows, {key: value._asdict() for key, value in times.items()}


def against_group_size() -> tuple[timing.Row, dict[str, Any]]:
    """Item 8: seconds a completion must not depend on how many are sampled together."""
    runs = {}
    for size in SIZES:
        timed = make(T0._replace(rows=size), T0.sampling.steps)
        runs[str(size)] = ours(timed, timed.shape.sampling)
    times = timing.alternate(runs)
    each = {size: times[str(size)].median / size for size in SIZES}
    worst = max(abs(each[size] / each[SIZES[-1]] - 1) for size in SIZES)
    shown = ", ".join(f"{size}: {1 / each[size]:.2f}" for size in SIZES)
    row = timing.Row(
        "8",
        f"completions/s by group size ({shown})",
        "T0",
        f"{worst:.1%} off linear",
        "<= 5%",
        "0%",
        met=worst <= 0.05,
    )
    return row, {key: value._asdict() for key, value in times.items()}


def against_length() -> tuple[timing.Row, dict[str, Any]]:
    """Item 9: seconds against the analytic FLOPs times one rate for all, a step a block."""
    runs, work = {}, {}
    for length in LENGTHS:
        config = dataclasses.replace(
            T0.sampling, length=length, steps=length // T0.sampling.block_length
        )
        timed = make(T0._replace(sampling=config), config.steps)
        runs[str(length)] = ours(timed, config)
        work[length] = exact_flops(timed.shape)
    times = timing.alternate(runs)
    rate = {n: work[n] / times[str(n)].median for n in LENGTHS}
    mean = statistics.geometric_mean(rate.values())  # least squares in logarithms
    worst = max(abs(rate[n] / mean - 1) for n in LENGTHS)
    shown = ", ".join(f"{n}: {rate[n] / 1e9:.1f}" for n in LENGTHS)
    row = timing.Row(
        "9",
        f"GFLOP/s by completion length ({shown})",
        "T0",
        f"{worst:.1%} off the FLOP curve",
        "<= 5%",
        "0%",
        roofline=mean / timing.peak_flops(),
        met=worst <= 0.05,
    )
    return row, {key: value._asdict() for key, value in times.items()}


def against_full_length() -> tuple[timing.Row, dict[str, Any]]:
    """Item 11: completions that end after 1, 2, 3 or 4 of 4 blocks, against four that do not end.

    Their EOS stands in the template and no other can be drawn.
    """
    config, cfg = T0.sampling, T0.model
    rows, width = REFILLED * T0.rows, T0.sampling.block_length
    timed = make(T0._replace(rows=rows), config.steps)
    last = (np.arange(rows) % config.blocks + 1) * width - 1
    place = jnp.arange(config.length)[None] == last[:, None]
    prompt, masks = spread.whole((timed.prompt, _masks(timed)))  # a queue, as `Programs` has it
    short = jnp.where(place, cfg.eos_token_id, masks)
    valid, row = jnp.ones(prompt.shape, bool), jnp.arange(rows, dtype=jnp.int32)

    @spread.in_mesh
    @jax.jit
    def queued(params, template):
        denoiser = _endless(params, cfg)
        args = (prompt, valid, template, row, row, jax.random.key(2), config)
        return refill.sample(denoiser, *args, T0.rows, spread.cut).length

    @spread.in_mesh
    @jax.jit
    def batches(params, template):
        denoiser = _endless(params, cfg)
        cuts = [x.reshape(REFILLED, T0.rows, -1) for x in (prompt, valid, template)]

        def one(args):
            *context, row = args
            context = (*spread.cut(context), row, row, jax.random.key(2), config)
            return sample(denoiser, *context, stop_at_eos=True).length

        return jax.lax.map(one, (*cuts, row.reshape(REFILLED, T0.rows))).reshape(-1)

    lengths = np.asarray(queued(timed.params, short))
    np.testing.assert_array_equal(lengths, last + 1)
    np.testing.assert_array_equal(batches(timed.params, short), lengths)
    times = timing.alternate(
        {
            "refill": lambda: queued(timed.params, short),
            "batches that stop": lambda: batches(timed.params, short),
            "nothing ends": lambda: batches(timed.params, masks),
        }
    )
    share = float(lengths.mean()) / config.length
    found = timing.ratio(times, "refill", "nothing ends")
    row = timing.Row(
        "11",
        f"{rows} completions of mean length {share:.1%} in {T0.rows} slots",
        "T0",
        f"{found:.3f} of the time of full length, {found / share:.2f}x the mean length's share; "
        f"batches that stop {timing.ratio(times, 'batches that stop', 'nothing ends'):.3f}",
        "<= 1.1x",
        f"{_turns(lengths // width, T0.rows) / REFILLED / config.blocks / share:.2f}x: slots that "
        "find the queue empty wait",
        met=found <= 1.1 * share,
    )
    return row, {key: value._asdict() for key, value in times.items()}


def _turns(blocks: np.ndarray, slots: int) -> int:
    """Blocks that one slot after the other takes from the queue, until the last has ended."""
    free = [0] * slots
    for count in blocks:
        free[free.index(min(free))] += int(count)
    return max(free)


def _endless(params: Any, cfg: models.Config) -> Denoiser:
    """A model that never proposes EOS."""
    denoiser = models.bind(cfg, {"params": params}, keep_mask=True)

    def logits(hidden: jax.Array) -> jax.Array:
        found = denoiser.logits(hidden)
        return found.at[..., cfg.eos_token_id].set(-jnp.inf)

    return denoiser._replace(logits=logits)


def main(argv: list[str]) -> None:
    """Checks, times, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    torch.set_num_threads(timing.cores())
    if timing.SERVE.value:
        name, dtype = timing.SERVE.value
        timed = sized(name)
        return timing.serve(standard(timed, timed.shape.sampling, getattr(torch, dtype)))
    heap.keep_pages()  # as launch/train.py does
    rows, details = [], {}
    for name in timing.SHAPES.value:
        found, details[name] = against_peer(name)
        rows += found
    if "T0" in timing.SHAPES.value:
        for item, measure in (
            ("8", against_group_size),
            ("9", against_length),
            ("11", against_full_length),
        ):
            row, details[item] = measure()
            rows.append(row)
    timing.save("rollout", rows, details)


if __name__ == "__main__":
    app.run(main)
