"""LLaDA-8B on an accelerator: tokens per second, utilisation, an outer step, the PyTorch sampler.

    python benchmarks/gpu.py                       # shape F, random bfloat16 weights
    python benchmarks/gpu.py --shape=tiny          # tries the script out on a CPU
    python benchmarks/gpu.py --sides=dmrl          # without the peer

Each side runs in a process of its own, one after the other, so each has the whole device. Timing
needs no checkpoint. The table says "not yet measured" for devices that have not run. Item 17.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import timing  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402
from dmrl import cost, models, optim, parallel  # noqa: E402
from dmrl.objective import make_term  # noqa: E402
from dmrl.programs import Programs, TrainState  # noqa: E402

_SHAPE = flags.DEFINE_enum("shape", "F", list(SHAPES), "Which shape")
_SIDES = flags.DEFINE_list("sides", ["dmrl", "dual", "peer"], "Who runs")
_SIDE = flags.DEFINE_enum("side", None, ["dmrl", "dual", "peer"], "Run this one and print JSON")

PROMPTS, GROUP, UPDATES = 2, 6, 12
"""The outer step that a public trainer takes 95 s for on one H100 (30 s sampling, 65 s update)."""
PUBLIC_SECONDS = 95.0
DUAL_GROUP, GOAL_DUAL = 8, 900
"""Completions a prompt with keys and values kept: 16 in all, where weights no longer wait."""
GOAL_TOKENS, GOAL_MFU_ROLLOUT, GOAL_MFU_UPDATE, GOAL_SECONDS, GOAL_PEER = 140, 0.45, 0.4, 45.0, 1.3
PUBLISHED = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s; another device's utilisation is of a large matrix product on it."""
DEVICES = ("NVIDIA H100", "NVIDIA H200", "NVIDIA A100", "TPU v4", "TPU v5e", "TPU v5p")


def programs(shape: Shape, group: int = GROUP) -> tuple[Programs, TrainState, Any]:
    """diffu-GRPO without KL on an adapter over random weights: (programs, state, base)."""
    mesh = parallel.make_mesh()
    made = Programs(
        shape.model,
        (make_term("diffu_grpo", 1.0, {"beta": 0.0}),),
        shape.sampling,
        optim.make(optim.Optimizer(), 1000),
        mesh,
        group,
        UPDATES,
    )

    def fresh() -> Any:
        return models.init(shape.model, jax.random.key(0))

    layout = parallel.shardings(mesh, jax.eval_shape(fresh))
    with jax.set_mesh(mesh):
        variables = jax.jit(fresh, out_shardings=layout)()
    return made, made.init_state({"lora": variables["lora"]}), variables["params"]


def adapted(shape: Shape) -> Shape:
    """The shape with an adapter, for 12 completions."""
    rank = shape.model.lora_rank or 4
    return shape._replace(
        model=dataclasses.replace(shape.model, lora_rank=rank), rows=PROMPTS * GROUP
    )


def prompts(shape: Shape, count: int) -> np.ndarray:
    """Random prompts [count,P]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, shape.model.eos_token_id - 1, (count, shape.prompt), np.int32)


def dmrl_side(shape: Shape) -> dict[str, Any]:
    """Seconds of a rollout and of an update of 12 completions, and what they amount to."""
    shape = adapted(shape)
    made, state, base = programs(shape)
    length, batch = shape.sampling.length, blank_batch(shape)

    def rollout() -> Any:
        return made.rollout(state.trainable, base, batch, 0, jax.random.key(1))[0]

    drawn = rollout()
    assert not bool(jnp.any(drawn.tokens == shape.model.mask_token_id)), "the sampler left masks"
    drawn = drawn._replace(reward=jnp.arange(shape.rows, dtype=jnp.float32) % GROUP)
    times = timing.alternate({"rollout": rollout})
    holder = [state]

    def update() -> Any:
        holder[0], metrics = made.update(holder[0], base, [drawn], [(None,)], jax.random.key(2))
        return metrics

    times |= timing.alternate({"update": update})
    assert np.isfinite(float(update()["loss"])), "the update is not finite"
    peak = peak_flops(shape.model.dtype) * jax.device_count()
    work = flops(shape)
    sizes = {name: found._asdict() for name, found in times.items()}
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "device": timing.machine()["device"],
        "machine": timing.machine(),
        "peak TFLOP/s": peak / 1e12,
        "tokens/s": shape.rows * length / times["rollout"].median,
        "MFU rollout": work["rollout"] / peak / times["rollout"].median,
        "MFU update": work["update"] / peak / times["update"].median,
        "seconds": times["rollout"].median + times["update"].median,
        "peak memory": stats.get("peak_bytes_in_use"),
        "times": sizes,
    }


def dual_side(shape: Shape) -> dict[str, Any]:
    """Tokens/s of a rollout that keeps keys and values outside the block, approximate."""
    shape = adapted(shape)
    shape = shape._replace(sampling=dataclasses.replace(shape.sampling, cache="dual"))
    (made, state, base), batch = programs(shape, DUAL_GROUP), blank_batch(shape)

    def rollout() -> Any:
        return made.rollout(state.trainable, base, batch, 0, jax.random.key(1))[0]

    assert not bool(jnp.any(rollout().tokens == shape.model.mask_token_id)), "masks are left"
    times = timing.alternate({"rollout": rollout})["rollout"]
    tokens = PROMPTS * DUAL_GROUP * shape.sampling.length
    found = {"tokens/s": tokens / times.median, "times": times._asdict()}
    return found | {"device": timing.machine()["device"]}


def blank_batch(shape: Shape) -> tuple[jax.Array, ...]:
    """What `Programs.rollout` takes of the prompts."""
    prompt = jnp.asarray(prompts(shape, PROMPTS))
    size = (PROMPTS, shape.sampling.length)
    return (
        prompt,
        jnp.ones(prompt.shape, bool),
        jnp.full(size, shape.model.mask_token_id, jnp.int32),
    )


def peak_flops(dtype: str) -> float:
    """Of one device: published for a known one in bfloat16, else measured."""
    kind = jax.devices()[0].device_kind
    known = [peak for name, peak in PUBLISHED.items() if name in kind and dtype == "bfloat16"]
    return known[0] if known else timing.peak_flops(dtype)


def flops(shape: Shape) -> dict[str, float]:
    """Of a rollout and of mu updates: an old reading and a gradient each.

    Recomputed layers do not count, nor what the last one need not do of the prompt: utilisation is
    of the least FLOPs.
    """
    sizes = cost.shape_of(shape.model)._replace(remat=False)
    sampling, length = shape.sampling, shape.sampling.length
    context = (sizes, shape.rows, shape.prompt, length)
    return {
        "rollout": cost.rollout_flops(*context, sampling.block_length, sampling.steps),
        "update": UPDATES * cost.update_flops(*context, {"forward": 1, "gradient": 1}),
    }


def peer_side(shape: Shape) -> dict[str, Any]:
    """The standard PyTorch sampler on the same number of completions, weights random too."""
    import torch

    from benchmarks import peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, shape.model.dtype))
    torch.set_num_threads(timing.cores())
    with torch.device(device), torch.no_grad():
        network = peer.Transformer(shape.model)
    torch.set_default_dtype(torch.float32)
    prompt = torch.from_numpy(prompts(shape, PROMPTS)).long().repeat_interleave(GROUP, 0).to(device)
    dtype = getattr(torch, shape.model.dtype)  # as trainers draw: in the model's

    def generate() -> None:
        tokens = peer.generate(network, prompt, shape.sampling, dtype)
        assert not bool((tokens == shape.model.mask_token_id).all()), "the peer sampled nothing"
        if device == "cuda":
            torch.cuda.synchronize()

    times = timing.alternate({"peer": generate})["peer"]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    tokens = prompt.shape[0] * shape.sampling.length
    return {"device": name, "tokens/s": tokens / times.median, "times": times._asdict()}


def child(side: str) -> dict[str, Any] | None:
    """What a side measured in a process of its own; None, and why, if it could not run."""
    command = [sys.executable, __file__, f"--side={side}", *sys.argv[1:]]
    environment = dict(os.environ)
    if side == "peer":
        environment["JAX_PLATFORMS"] = "cpu"  # the accelerator's memory is PyTorch's
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{side} did not run: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def rows(name: str, sides: dict[str, Any]) -> list[timing.Row]:
    """The table of this device."""
    ran = {side: found for side, found in sides.items() if found is not None}
    if not ran:
        return []
    judged = name == "F"  # the goals are those of LLaDA-8B on one H100
    where = f"{name}, {next(iter(ran.values()))['device']}"

    def row(what: str, figure: str, goal: str, met: bool, **ratios: float | None) -> timing.Row:
        return timing.Row("17", what, where, figure, goal, met=met if judged else None, **ratios)

    made, rate = [], {side: found["tokens/s"] for side, found in ran.items()}
    if "dmrl" in ran:
        found = ran["dmrl"]
        mfu, update = found["MFU rollout"], found["MFU update"]
        made += [
            row(
                "exact rollout of 12",
                f"{rate['dmrl']:.1f} tokens/s, MFU {mfu:.0%}",
                f">= {GOAL_TOKENS} tokens/s, {GOAL_MFU_ROLLOUT:.0%}",
                rate["dmrl"] >= GOAL_TOKENS,
                roofline=mfu,
            ),
            row(
                "LoRA update of 12",
                f"MFU {update:.0%}",
                f">= {GOAL_MFU_UPDATE:.0%}",
                update >= GOAL_MFU_UPDATE,
                roofline=update,
            ),
            row(
                f"outer step, {PROMPTS} x {GROUP} completions, {UPDATES} updates",
                f"{found['seconds']:.2f} s",
                f"<= {GOAL_SECONDS:g} s (public: {PUBLIC_SECONDS:g} s)",
                found["seconds"] <= GOAL_SECONDS,
            ),
        ]
    if "dual" in ran:
        what = f"rollout of {PROMPTS * DUAL_GROUP} with a dual cache (approximate)"
        figure, goal = f"{rate['dual']:.1f} tokens/s", f">= {GOAL_DUAL} tokens/s"
        made.append(row(what, figure, goal, rate["dual"] >= GOAL_DUAL))
    if "peer" in ran:
        faster = rate["dmrl"] / rate["peer"] if "dmrl" in ran else None
        figure, goal = f"{rate['peer']:.1f} tokens/s", f"dmrl >= {GOAL_PEER}x"
        met = faster is not None and faster >= GOAL_PEER
        made.append(row("PyTorch sampler on the same device", figure, goal, met, peer=faster))
    return made


def main(argv: list[str]) -> None:
    """Runs the sides, prints the table of this device and names the devices without one."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    shape = SHAPES[_SHAPE.value]
    if _SIDE.value:
        measure = {"dmrl": dmrl_side, "dual": dual_side, "peer": peer_side}[_SIDE.value]
        print(json.dumps(measure(shape)))
        return
    sides = {side: child(side) for side in _SIDES.value}
    made = rows(shape.name, sides)
    measured = made[0].shape if made else ""
    made += [
        timing.Row("17", "all of the above", f"F, {device}", "not yet measured")
        for device in DEVICES
        if shape.name != "F" or device not in measured
    ]
    timing.save("gpu", made, sides)


if __name__ == "__main__":
    app.run(main)
