"""SPG and diffu-GRPO, loss and gradient, against the standard ones; the chunked log-probability.

    python benchmarks/losses.py [--shapes=T0,T1] [--timed_rows=3072] [--clock=cpu]
    JAX_NUM_CPU_DEVICES=2 python benchmarks/losses.py     # two devices, half the rows each

First asserts that losses agree within 1e-5 (of the mean advantage: those of a group cancel) and
gradients within 1e-4 of their norm. Items 3, 4 and 12, the last on one device.
"""

import dataclasses
import functools
import json
import os
import subprocess
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
from benchmarks.shapes import SHAPES, T1, Shape  # noqa: E402
from dmrl import cost, heap, models  # noqa: E402
from dmrl.algorithms import diffu_grpo, spg  # noqa: E402
from dmrl.models import logprob  # noqa: E402
from dmrl.types import Inner, Models, Rollout  # noqa: E402

_MEMORY = flags.DEFINE_list("memory", None, "Only print the memory of this LOSS,SHAPE")
_ROWS = flags.DEFINE_integer("timed_rows", 3072, "Rows at which the log-probability is timed")

ALGORITHMS = {"spg": spg, "diffu_grpo": diffu_grpo}
ITEMS = {"T0": 6, "T1": 2}
"""Completions of a batch: at T1 the peer needs gigabytes for two."""
GOALS = {
    ("spg", "T0"): 1.5,
    ("spg", "T1"): 2.5,
    ("diffu_grpo", "T0"): 1.5,
    ("diffu_grpo", "T1"): 1.3,
}
HEAD_ROWS = 3072
MEMORY_GOAL = 8.0
"""How many times less than the peer, beside the parameters' gradients, which both hold whole."""
REMAT = {"T1": "full"}
"""What our backward pass recomputes, where memory counts; as for LLaDA-8B."""


class Case(NamedTuple):
    """A loss on one batch, both ways."""

    ours: Callable[[], tuple[jax.Array, Any]]
    """(loss, gradient)"""
    theirs: Callable[[], torch.Tensor]
    network: peer.Transformer
    compiled: Any
    scale: float
    """Mean size of an advantage."""


def _rollout(shape: Shape) -> Rollout:
    """Random completions of one prompt, rewarded at random."""
    rows, length = shape.rows, shape.sampling.length
    keys = jax.random.split(jax.random.key(1), 3)
    top = shape.model.eos_token_id
    prompt = jax.random.randint(keys[0], (1, shape.prompt), 0, top)
    zeros = jnp.zeros((rows, length))
    return Rollout(
        prompt=jnp.repeat(prompt, rows, axis=0),
        prompt_valid=jnp.ones((rows, shape.prompt), bool),
        tokens=jax.random.randint(keys[1], (rows, length), 0, top),
        reveal_step=zeros.astype(jnp.int32),
        log_prob=zeros,
        entropy=zeros,
        row=jnp.arange(rows, dtype=jnp.int32),
        group=jnp.zeros(rows, jnp.int32),
        length=jnp.full(rows, length, jnp.int32),
        reward=jax.random.uniform(keys[2], (rows,)),
    )


def _hyper(algorithm: Any, shape: Shape) -> Any:
    if algorithm is spg:
        return spg.Hyper(block_length=shape.sampling.block_length)
    return diffu_grpo.Hyper()


def case(algorithm: Any, shape: Shape) -> Case:
    """One batch for both, prepared by us. Old and reference policy are the policy, moved a bit."""
    cfg, hp = shape.model, _hyper(algorithm, shape)
    params = spread.whole(models.init(cfg, jax.random.key(0))["params"])
    moved = jax.tree.map(lambda x: x * 1.003, params)
    bind = functools.partial(models.bind, cfg, keep_mask=True)
    inner = Inner(jnp.int32(0), 1, jax.random.key(4))

    @spread.in_mesh
    @jax.jit
    def prepare(params, moved, rollout):
        old = bind({"params": moved})
        key, policy = jax.random.key(3), bind({"params": params})
        return algorithm.prepare(Models(policy, old, old), rollout, None, key, inner, hp)

    def loss(params, batch):
        return algorithm.loss(Models(bind({"params": params}), None, None), batch, hp)[0]

    batch = prepare(params, moved, spread.rows(_rollout(shape)))
    lower = spread.in_mesh(jax.jit(jax.value_and_grad(loss)).lower)
    compiled = lower(params, batch).compile()
    network = peer.model(cfg, params)
    tensors = {name: peer.tensor(x) for name, x in batch._asdict().items()}
    standard = peer.spg_loss if algorithm is spg else peer.diffu_grpo_loss

    def theirs() -> torch.Tensor:
        network.zero_grad(set_to_none=True)
        value = standard(network, tensors, hp)
        value.backward()
        return value.detach()

    scale = float(jnp.mean(jnp.abs(batch.advantage)))
    return Case(lambda: compiled(params, batch), theirs, network, compiled, scale)


def check(made: Case) -> None:
    """Raises AssertionError if losses or gradients differ."""
    value, gradient = made.ours()
    wanted, tolerance = float(made.theirs()), 1e-5 * made.scale
    np.testing.assert_allclose(float(value), wanted, rtol=0, atol=tolerance)
    difference = total = 0.0
    for name, leaf in made.network.named_parameters():
        assert leaf.grad is not None
        difference += float((leaf.grad - peer.ours(gradient, name)).square().sum())
        total += float(leaf.grad.square().sum())
    assert total > 0, "nothing to compare: the gradient vanishes"
    assert difference <= 1e-8 * total, f"gradients differ by {(difference / total) ** 0.5:.1e}"


def sized(name: str) -> Shape:
    """A shape as losses take it."""
    shape = SHAPES[name]._replace(rows=ITEMS.get(name, SHAPES[name].rows))
    model = dataclasses.replace(shape.model, remat=REMAT.get(name, shape.model.remat))
    return shape._replace(model=model)


def print_memory(label: str, name: str) -> None:
    """As JSON, bytes that either side grows by, and those of the gradients, which both give."""
    made = case(ALGORITHMS[label], sized(name))
    held = sum(x.nbytes for x in jax.tree.leaves(made.ours()))
    made.theirs()
    made.network.zero_grad(set_to_none=True)
    found = {"dmrl": timing.peak_memory(made.ours), "peer": timing.peak_memory(made.theirs)}
    print(json.dumps(found | {"gradients": held}))


def peak_memory(label: str, name: str) -> dict[str, int]:
    """`print_memory` of a process with one device, whose malloc gives everything large back."""
    command = [sys.executable, __file__, f"--memory={label},{name}"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "JAX_NUM_CPU_DEVICES": "1"}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def against_peer(label: str, name: str) -> tuple[timing.Row, dict[str, Any]]:
    """Items 3 and 4 of one shape: time and peak memory of loss and gradient."""
    algorithm, shape = ALGORITHMS[label], sized(name)
    made = case(algorithm, shape)
    check(made)
    memory = peak_memory(label, name)
    held = memory["gradients"]
    there = timing.Apart(f"--serve={label},{name}")
    times = timing.alternate({"dmrl": made.ours, "peer": there, "peer, our malloc": made.theirs})
    there.process.terminate()
    there.process.wait()
    faster, beside = timing.ratio(times, "peer", "dmrl"), memory["dmrl"] - held
    smaller = (memory["peer"] - held) / max(beside, 1)
    length, span = shape.sampling.length, shape.prompt + shape.sampling.length
    sizes, forwards = cost.shape_of(shape.model), shape.rows * (2 if algorithm is spg else 1)
    whole = 3 * forwards * cost.forward_flops(sizes, span, span, span)
    recomputed = shape.model.vocab_size > logprob.CHUNK  # each chunk's logits once more
    head = forwards * 2.0 * length * shape.model.d_model * shape.model.vocab_size
    least = 3 * forwards * cost.scoring_flops(sizes, shape.prompt, length)
    again = recomputed * head
    if shape.model.remat != "none":
        again += forwards * cost.forward_flops(sizes, span, span, 0)
    goal = GOALS.get((label, name), 1.0)
    space = (
        f"; peak {memory['dmrl'] / 1e6:.0f} MB, the peer's {memory['peer'] / 1e6:.0f} MB; beside "
        f"the gradients' {held / 1e6:.0f} MB {smaller:.1f}x less"
    )
    fits = name != "T1" or smaller >= MEMORY_GOAL
    row = timing.Row(
        "3" if algorithm is spg else "4",
        f"{label} loss and gradient, {shape.rows} completions",
        name,
        f"{faster:.2f}x the peer ({timing.ratio(times, 'peer, our malloc', 'dmrl'):.2f}x with "
        f"our malloc){space if name in REMAT else ''}",
        f">= {goal:g}x"
        + (f", <= 1/{MEMORY_GOAL:g} of the memory beside gradients" if name == "T1" else ""),
        f"{whole / (least + again):.2f}x in FLOPs",
        faster,
        roofline=least / timing.peak_flops() / times["dmrl"].median,
        met=faster >= goal and fits,
    )
    details = {key: value._asdict() for key, value in times.items()}
    return row, {"seconds": details, "memory": memory, "temp": timing.workspace(made.compiled)}


def _head(chunked: bool, frozen: bool) -> Any:
    """(hidden, kernel, labels, cotangent) -> gradients of the log-probabilities, jitted."""

    def value(hidden, kernel, labels, weight):
        if chunked:
            return jnp.sum(weight * logprob.log_prob(hidden, kernel, labels, None))
        rows = jax.nn.log_softmax(logprob.logits(hidden, kernel, None))
        return jnp.sum(weight * jnp.take_along_axis(rows, labels, axis=-1))

    return jax.jit(jax.value_and_grad(value, argnums=0 if frozen else (0, 1)))


def head_arguments(rows: int) -> tuple[jax.Array, ...]:
    """Hidden states, T1's head, a label a row, a cotangent."""
    keys = jax.random.split(jax.random.key(5), 3)
    width, vocab = T1.model.d_model, T1.model.vocab_size
    hidden = jax.random.normal(keys[0], (rows, width))
    kernel = jax.random.normal(keys[1], (width, vocab)) * 2 / width**0.5
    labels = jax.random.randint(keys[2], (rows, 1), 0, vocab)
    return hidden, kernel, labels, jnp.full((rows, 1), 1.0 / rows)


def head_error() -> float:
    """Largest distance of the chunked log-probability from float64."""
    hidden, kernel, labels, _ = head_arguments(64)
    found = np.asarray(jax.jit(lambda *a: logprob.log_prob(*a, None))(hidden, kernel, labels))
    rows = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    high = rows.max(axis=1, keepdims=True)
    log_z = high + np.log(np.exp(rows - high).sum(axis=1, keepdims=True))
    wanted = np.take_along_axis(rows, np.asarray(labels), axis=1) - log_z
    return float(np.abs(found - wanted).max())


def against_materialised() -> tuple[list[timing.Row], dict[str, Any]]:
    """Item 12: error, workspace at 3,072 rows, time over the form that holds all logits."""
    error, rows, details = head_error(), [], {}
    timed, full = head_arguments(_ROWS.value), head_arguments(HEAD_ROWS)
    for frozen, goal, bound in ((False, 1.4, 4 / 3), (True, 1.6, 3 / 2)):
        chunked, whole = _head(True, frozen), _head(False, frozen)
        size = timing.workspace(chunked.lower(*full).compile())
        other = timing.workspace(whole.lower(*full).compile())
        times = timing.alternate(
            {
                "chunked": functools.partial(chunked, *timed),
                "materialised": functools.partial(whole, *timed),
            }
        )
        slower = timing.ratio(times, "chunked", "materialised")
        kind = "frozen" if frozen else "trained"
        details[kind] = {key: value._asdict() for key, value in times.items()}
        rows.append(
            timing.Row(
                "12",
                f"chunked log-probability, {kind} head, {_ROWS.value} rows timed",
                f"N={HEAD_ROWS} V={T1.model.vocab_size} D={T1.model.d_model}",
                f"error {error:.1e}; workspace {size / 1e6:.0f} MB (materialised "
                f"{other / 1e6:.0f} MB); {slower:.2f}x its time",
                f"<= 1e-5; <= 100 MB; <= {goal}x",
                f"{bound:.2f}x in FLOPs",
                met=error <= 1e-5 and size <= 100e6 and slower <= goal,
            )
        )
    return rows, details


def main(argv: list[str]) -> None:
    """Checks, times, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    torch.set_num_threads(timing.cores())
    if _MEMORY.value:
        return print_memory(*_MEMORY.value)
    if timing.SERVE.value:
        label, name = timing.SERVE.value
        return timing.serve(case(ALGORITHMS[label], sized(name)).theirs)
    heap.keep_pages()  # as launch/train.py does
    rows, details = [], {}
    for name in timing.SHAPES.value:
        for label in ALGORITHMS:
            row, details[f"{label} {name}"] = against_peer(label, name)
            rows.append(row)
    if "T1" in timing.SHAPES.value:
        found, details["log_prob"] = against_materialised()
        rows += found
    timing.save("losses", rows, details)


if __name__ == "__main__":
    app.run(main)
