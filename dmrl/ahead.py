"""The programs of a recipe, compiled for devices that are not attached.

Arguments are `jax.ShapeDtypeStruct`s laid out as the trainer lays out its arrays; nothing runs and
no weight exists. Compiling shows that a program builds, what it holds in memory and what it sends
between devices. It does not show that it computes the right thing, nor how fast.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dmrl import models, orders, parallel, stages
from dmrl.models import int8
from dmrl.objective import needs
from dmrl.programs import Programs, frozen_copy, part_of
from dmrl.recipe import Recipe


class Traced(NamedTuple):
    """A program before it is compiled, and what lies on the devices beside its arguments."""

    name: str
    traced: Any
    """`jax.stages.Traced`."""
    arguments: Any
    beside: Any
    """Tree of arrays that are kept while it runs and that it does not take."""
    runs: int = 1
    """How often an outer step runs it."""


def programs(recipe: Recipe, mesh: Mesh) -> Iterator[Traced]:
    """The rollout (sampler and probes), then the update, for a step of stage 2.

    Raises:
      ValueError: the batch cannot be shared evenly by the devices.
    """
    stages.check_rows(recipe.loop, mesh)
    made = stages.reinforcement(recipe, mesh)
    trainable, frozen = _weights(recipe, mesh)
    state = laid_out(mesh, jax.eval_shape(made.beside, trainable))._replace(trainable=trainable)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=parallel.replicated(mesh))
    behaviour = state.trainable if state.teacher is None else state.teacher
    chunks = 1 if made.slots else recipe.loop.rollout_chunks
    rollout = made.trace_rollout(behaviour, frozen, _prompts(recipe, mesh, chunks), key)
    used = part_of(behaviour, frozen)
    mine, arguments = (frozen if used is None else ()), (behaviour, used)
    yield Traced("rollout", rollout, arguments, (_others(state), mine), chunks)
    done, probes = _scored(made, rollout.out_info)
    update = made.trace_update(state, frozen, [done] * chunks, [probes] * chunks, key)
    yield Traced("update", update, (state, frozen), ())


def _others(state: Any) -> Any:
    """What a rollout does not read."""
    if state.teacher is None:
        return state._replace(trainable=None)
    return state._replace(teacher=None)


def laid_out(mesh: Mesh, tree: Any) -> Any:
    """Shapes -> shapes with the layouts of `parallel.RULES`."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        parallel.shardings(mesh, tree),
    )


def _weights(recipe: Recipe, mesh: Mesh) -> tuple[Any, Any]:
    """(trainable with heads, frozen) as stage 2 finds them."""
    variables = jax.eval_shape(lambda: models.init(recipe.model, jax.random.key(0)))
    if recipe.model.int8:
        variables["params"] = jax.eval_shape(int8.quantized, variables["params"])
    trainable, frozen = {"params": variables["params"]}, None
    if recipe.model.lora_rank:
        trainable, frozen = {"lora": variables["lora"]}, variables["params"]
    elif "reference" in needs(recipe.terms):
        frozen = jax.eval_shape(lambda p: frozen_copy(recipe.model, p), variables["params"])
    elif orders.is_trained(recipe):
        frozen = variables["params"]
        trainable = jax.eval_shape(lambda: orders.fresh(recipe))
    trainable = jax.eval_shape(lambda t: stages.with_heads(recipe, t), trainable)
    return laid_out(mesh, trainable), laid_out(mesh, frozen)


def _prompts(recipe: Recipe, mesh: Mesh, chunks: int) -> tuple[Any, ...]:
    count = recipe.loop.prompts_per_step // chunks
    lengths = (recipe.max_prompt_length, recipe.max_prompt_length, recipe.sampling.length)
    dtypes = (jnp.int32, jnp.bool_, jnp.int32)
    return tuple(
        jax.ShapeDtypeStruct((count, n), dtype, sharding=parallel.replicated(mesh))
        for n, dtype in zip(lengths, dtypes, strict=True)
    )


def _scored(made: Programs, out: Any) -> tuple[Any, Any]:
    """A rollout's result with rewards, laid out as the host hands it on."""
    rows = parallel.batch_sharding(made.mesh)

    def array(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)

    def reward(tokens: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tokens.shape[:-1], jnp.float32, sharding=rows)

    done, probes = jax.tree.map(array, out)
    done = done._replace(reward=reward(done.tokens))
    return done, tuple(p and p._replace(reward=reward(p.fills)) for p in probes)
