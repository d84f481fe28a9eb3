"""Matrix products counted in jaxprs, against hand counts and the closed formulas of `cost`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dmrl import cost, flops, models
from dmrl.diffusion import sampler
from dmrl.models import headwise, logprob, target, tiles

CFG = models.Config(
    vocab_size=32,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    mlp_hidden_size=24,
    mask_token_id=0,
    eos_token_id=1,
    dtype="float32",
    param_dtype="float32",
    remat="full",
)


def count(f, *args):
    return flops.matmul_flops(jax.make_jaxpr(f)(*args))


def test_a_product_a_loop_and_a_branch_by_hand():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 4))
    assert count(lambda x: x @ b, a) == 2 * 3 * 4 * 4
    loop = lambda x: jax.lax.scan(lambda c, _: (c @ b, None), x, None, length=7)[0]  # noqa: E731
    assert count(jax.jit(loop), a) == 7 * 96
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda y: y, x), a) == 7 * 96
    assert count(lambda x: jnp.einsum("bij,bjk->bik", x, x), jnp.zeros((5, 2, 2))) == 5 * 16


def test_a_rollout_costs_what_the_formula_says():
    params = jax.eval_shape(lambda: models.init(CFG, jax.random.key(0)))
    setting = sampler.Sampling(length=8, steps=4, block_length=4, temperature=1.0)

    def rollout(params, prompt, valid, template, row):
        denoiser = models.bind(CFG, params)
        args = (prompt, valid, template, row, row, jax.random.key(0), setting)
        return sampler.sample(denoiser, *args)

    whole = jnp.zeros((3, 5), jnp.int32), jnp.ones((3, 5), bool), jnp.zeros((3, 8), jnp.int32)
    found = count(rollout, params, *whole, jnp.arange(3))
    assert found == cost.rollout_flops(cost.shape_of(CFG), 3, 5, 8, 4, 4)


@pytest.mark.parametrize("platform", ["accelerator", "cpu"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_gradient_pass_of_the_body_costs_what_the_formula_says(monkeypatch, remat, platform):
    monkeypatch.setattr(target, "platform", lambda: platform)
    monkeypatch.setattr(headwise, "SHORTEST", 1)
    # Of different lengths, or what was traced for one platform would serve the other.
    longest = CFG.max_sequence_length + len(platform)
    cfg = dataclasses.replace(CFG, remat=remat, max_sequence_length=longest)
    params = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
    tokens, valid = jnp.zeros((2, 6), jnp.int32), jnp.ones((2, 6), bool)

    def value(params, *last):
        return jnp.sum(models.bind(cfg, params).encode(tokens, valid, *last))

    one = cost.forward_flops(cost.shape_of(cfg), 6, 6, 0)
    # A layer's last product need not be done again: nothing but its result depends on it.
    again = one - 2 * cfg.n_layers * 6 * cfg.mlp_hidden_size * cfg.d_model if remat == "full" else 0
    scores = 2 * cfg.n_layers * cfg.d_model * 6 * 6 if platform == "cpu" else 0  # made again
    assert count(jax.grad(value), params) == 2 * (3 * one + again + scores)
    if remat == "none":
        read = cost.forward_flops(cost.shape_of(cfg), 6, 6, 0, 2)
        scores -= 2 * cfg.d_model * 4 * 6 if scores else 0
        assert count(jax.grad(lambda p: value(p, 2)), params) == 2 * (3 * read + scores)


def test_a_loop_that_may_end_early_counts_as_often_as_it_can_run():
    def program(x, stop):
        def left(state):
            return (state[0] < stop) & (state[0] < 7)

        return jax.lax.while_loop(left, lambda s: (s[0] + 1, s[1] @ x), (0, x))[1]

    x = jnp.ones((4, 4))
    assert flops.matmul_flops(jax.make_jaxpr(program)(x, 3)) == 7 * 2 * 4**3


def test_rows_that_may_be_left_out_of_the_head_are_counted(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 8)
    monkeypatch.setattr(logprob, "CHUNK", 64)
    hidden, kernel, labels = jnp.ones((32, 4)), jnp.ones((4, 256)), jnp.zeros((32, 1), jnp.int32)

    def value(hidden, needed):
        return jnp.sum(logprob.log_prob(hidden, kernel, labels, None, needed))

    every = jnp.ones(32, bool)
    some = flops.matmul_flops(jax.make_jaxpr(jax.grad(value))(hidden, every))
    assert some == flops.matmul_flops(jax.make_jaxpr(jax.grad(lambda h: value(h, None)))(hidden))
