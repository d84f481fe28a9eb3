"""The analytic cost against LLaDA-8B's published shape and hand counts."""

import pytest

from configs import sudoku_upo
from dmrl import cost, models, recipe
from dmrl.types import FLAGS, TOP

LLADA = cost.shape_of(models.Config(lora_rank=128))
TINY = cost.Shape(4, 1, 2, 1, 8, 10, 2, 4, 4, False, 4)


def test_llada_8b_has_eight_billion_weights():
    assert cost.total_params(LLADA) == 8_015_581_184
    assert cost.body_params(LLADA) == 32 * (4 * 4096**2 + 3 * 4096 * 12_288 + 2 * 4096) + 4096


def test_adapter_on_seven_projections():
    assert cost.lora_params(LLADA) == 335_544_320


def test_counts_equal_those_of_the_real_tree():
    import jax

    cfg = models.Config(
        vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=24,
        mask_token_id=0, eos_token_id=1, dtype="float32", param_dtype="float32", lora_rank=3,
    )  # fmt: skip
    tree = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in tree.items()}
    shape = cost.shape_of(cfg)
    assert sizes == {"params": cost.total_params(shape), "lora": cost.lora_params(shape)}


def test_grouped_heads_shrink_keys_and_values():
    assert cost.linears(TINY)[:4] == [(4, 4), (4, 2), (4, 2), (4, 4)]


def test_forward_flops_of_one_token_by_hand():
    weights = 16 + 8 + 8 + 16 + 3 * 32
    assert cost.forward_flops(TINY, 1, 1, 1) == 2 * weights + 4 * 4 + 2 * 4 * 10


@pytest.mark.parametrize(("rows", "tera"), [(456, 6.947), (256, 6.739), (32, 6.507)])
def test_forward_flops_of_the_reference_shape(rows, tera):
    assert cost.forward_flops(LLADA, 456, 456, rows) / 1e12 == pytest.approx(tera, abs=2e-3)


def test_rollout_is_steps_times_a_forward():
    one = cost.forward_flops(LLADA, 456, 456, 32, 32)
    # Of 424 positions the last layer spares queries, attention's output, SwiGLU and scores.
    spared = 424 * (2 * (2 * 4096**2 + 3 * 4096 * 12288) + 4 * 4096 * 456)
    assert one == cost.forward_flops(LLADA, 456, 456, 32) - spared
    assert cost.rollout_flops(LLADA, 6, 200, 256, 32, 128) == pytest.approx(6 * 128 * one)


def test_adapter_saves_the_weight_gradients():
    full = LLADA._replace(lora_rank=0)
    passes = {"forward": 0, "gradient": 1}
    ratio = cost.update_flops(LLADA, 1, 200, 256, passes) / cost.update_flops(
        full, 1, 200, 256, passes
    )
    assert ratio == pytest.approx(3 / 4)  # both recompute their layers once


def test_memory_falls_with_shards_and_holds_the_weights_once():
    alone = cost.memory(LLADA, 6, 456, 32, 1, False)
    eight = cost.memory(LLADA, 6, 456, 32, 8, False)
    assert alone.weights == 2 * cost.total_params(LLADA)
    assert alone.trained_state == 20 * cost.lora_params(LLADA)
    assert eight.weights == alone.weights / 8
    assert eight.total < alone.total


def test_an_order_is_trained_beside_a_denoiser_that_is_not():
    import jax

    made = sudoku_upo.llada_8b()
    made.tokenizer = "characters"
    made = recipe.build(made.to_dict())
    tree = jax.eval_shape(lambda: models.unmasking.init(made.model, jax.random.key(0)))
    size, shape = sum(x.size for x in jax.tree.leaves(tree)), cost.shape_of(made.model)
    assert size == cost.order_params(shape)
    assert FLAGS + TOP == cost.ORDER_FEATURES
    held = cost.memory(shape, 6, 288, 32, 1, False, 1)
    assert held.trained_state == 20 * size
    assert held.weights == 2 * cost.total_params(shape)
    told = cost.dry_run(made)
    assert f"base, frozen; {size:,} trained (an order)" in told
    # 144 trajectories of 12 decisions, 16 times; the denoiser twice, at the least.
    least = 16 * 144 * 12 * 2 * cost.forward_flops(shape, 288, 288, 32, 32)
    found = 16 * cost.order_update_flops(shape, 144, 256, 32, 32, 12, kept=False)
    assert least < found < 1.1 * least
    assert f"update {found / 1e12:,.3g} TFLOP" in told


def test_a_decision_by_hand():
    wide = 4 + cost.ORDER_FEATURES
    layer = 16 + 16 + 3 * 32 + 3 * wide**2 + wide
    assert cost.order_flops(TINY, 5, 1) == 2 * 5 * 16 + 2 * layer + 4 * 4 * 5
