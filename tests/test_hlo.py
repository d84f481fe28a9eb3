"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
import simulated

from dmrl import hlo, pieces

SCRIPT = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from dmrl import hlo, parallel

mesh = parallel.make_mesh(1, 8, 1)

def layers(x, kernels):
    body = lambda x, k: (jax.lax.with_sharding_constraint(x @ k, P("fsdp")), None)
    return jax.lax.scan(body, x, kernels)[0].sum()

with jax.set_mesh(mesh):
    shape = lambda s, spec: jax.ShapeDtypeStruct(
        s, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
    args = shape((16, 64), P("fsdp")), shape((5, 64, 64), P(None, "fsdp"))
    text = jax.jit(layers).lower(*args).compile().as_text()
found = hlo.traffic(text)
print(json.dumps([found.kinds, found.unknown_loops]))
"""
RING = """
HloModule ring

%cond (c: (u32[], f32[4,2])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %c = (u32[]{:T(128)}, f32[4,2]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (b: (u32[], f32[4,2])) -> (u32[], f32[4,2]) {
  %b = (u32[]{:T(128)}, f32[4,2]{1,0}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%b), index=0
  %held = u32[]{:T(128)} copy(%j)
  %next = u32[]{:T(128)} add(%held, %two)
  %x = f32[4,2]{1,0} get-tuple-element(%b), index=1
  %send = (f32[4,2]{1,0}, f32[4,2]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  %got = f32[4,2]{1,0} collective-permute-done(%send)
  ROOT %out = (u32[]{:T(128)}, f32[4,2]{1,0}) tuple(%next, %got)
}

%all-reduce-scatter.1 (p: f32[8,2]) -> f32[4,2] {
  %p = f32[8,2]{1,0} parameter(0)
  %sum = f32[8,2]{1,0} all-reduce(%p), channel_id=2, to_apply=%add
  ROOT %cut = f32[4,2]{1,0} slice(%sum), slice={[0:4], [0:2]}
}

ENTRY %main (a: (u32[], f32[4,2]), w: f32[8,2]) -> f32[4,2] {
  %a = (u32[], f32[4,2]{1,0}) parameter(0)
  %w = f32[8,2]{1,0} parameter(1)
  %loop = (u32[], f32[4,2]{1,0}) while(%a), condition=%cond, body=%body
  ROOT %rs = f32[4,2]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_gathered_kernel_counts_once_a_layer():
    kinds, unknown = simulated.run(SCRIPT)
    assert kinds["all-gather"] == [5, 5 * 64 * 64 * 4]
    assert unknown == 0


def test_rings_and_fused_reduce_scatters_as_the_tpu_backend_writes_them():
    text = RING.replace("to_apply=%add", "")
    found = hlo.traffic(text)
    assert found.kinds == {
        "collective-permute": hlo.Sent(4, 4 * 32.0),
        "reduce-scatter": hlo.Sent(1, 64.0),
    }
    assert (found.bytes, found.unknown_loops) == (192.0, 0)
    unknown = hlo.traffic(text.replace("constant(8)", "parameter(3)"))
    assert unknown.kinds["collective-permute"] == hlo.Sent(1, 32.0)
    assert unknown.unknown_loops == 1


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.traffic("HloModule empty")


def test_products_are_counted_with_their_loops_and_branches():
    def program(x, y):
        def body(carry, _):
            return jnp.tanh(carry @ y), None

        x, _ = jax.lax.scan(body, x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ y @ y, lambda: x)

    x, y = jnp.ones((4, 8)), jnp.ones((8, 8))
    text = jax.jit(program).lower(x, y).compile().as_text()
    assert hlo.products(text) == (5 + 2) * 2 * 4 * 8 * 8
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.products("nothing")


def test_a_loop_that_may_end_early_counts_as_often_as_it_can_run():
    """Its condition, of two comparisons, comes as a fusion from the CPU's compiler."""

    def program(x, live):
        def add(total, number):
            return total + x[number] @ x[number]

        return pieces.over_live(add, jnp.zeros(x.shape[1:]), live)

    x = jnp.ones((4, 8, 8))
    text = jax.jit(program).lower(x, jnp.ones(4, bool)).compile().as_text()
    assert hlo.products(text) == 4 * 2 * 8**3
