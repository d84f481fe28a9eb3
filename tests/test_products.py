"""x^T y, and the products whose gradients are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmrl.models import headwise, layers, products, target


def drawn(*shape, dtype="float32"):
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("i", "o"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_it_is_the_transpose_times_the_other(monkeypatch, lead, i, o, dtype, platform):
    monkeypatch.setattr(target, "platform", lambda: platform)
    x, y = drawn(*lead, 7, i, dtype="bfloat16"), drawn(*lead, 7, o, dtype="bfloat16")
    got = products.over_rows(x, y, dtype=dtype)
    want = np.einsum("...ni,...no->...io", x.astype(jnp.float32), y.astype(jnp.float32))
    assert got.dtype == (dtype or x.dtype)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2 if dtype is None else 1e-5)


@pytest.mark.parametrize(("i", "o"), [(3, 5), (5, 3)])
def test_on_a_cpu_no_product_contracts_rows_of_its_left_operand(i, o):
    x, y = drawn(7, i), drawn(7, o)
    assert "lhs_contracting_dims={0}" in compiled(lambda x, y: x.mT @ y, x, y), "what Eigen gets"
    assert "lhs_contracting_dims={0}" not in compiled(products.over_rows, x, y)


def projected(kernel):
    return layers.dot(jnp.sin(drawn(70, 12)), kernel)


def attended(q):
    return headwise.attention(q, q, q, jnp.ones(q.shape[:2], bool))


@pytest.mark.parametrize(
    ("f", "shape", "slow"),
    [
        (projected, (12, 20), "lhs_contracting_dims={0}"),
        (projected, (12, 5), "lhs_contracting_dims={0}"),
        (attended, (2, 70, 3, 8), "lhs_batch_dims={0}, lhs_contracting_dims={1}"),
    ],
    ids=["wider", "narrower", "attention"],
)
def test_nor_does_one_of_the_gradients_made_of_it(monkeypatch, f, shape, slow):
    gradient = jax.grad(lambda x: jnp.sum(f(x)) ** 2)
    assert slow not in compiled(gradient, drawn(*shape))
    monkeypatch.setattr(target, "platform", lambda: "gpu")
    jax.clear_caches()
    assert slow in compiled(gradient, drawn(*shape)), "as without"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out", [None, "float32"])
def test_a_product_and_its_gradients_are_those_of_matmul(dtype, out):
    x, kernel = drawn(2, 9, 6, dtype=dtype), drawn(6, 10)

    def value(f, x, kernel):
        return jnp.sum(jnp.sin(f(x, kernel).astype(jnp.float32)))

    def plain(x, kernel):
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out)

    grads = jax.grad(value, (1, 2))
    got = grads(lambda x, kernel: layers.dot(x, kernel, out), x, kernel)
    for a, b in zip(got, grads(plain, x, kernel), strict=True):
        assert a.dtype == b.dtype
        close = 1e-5 if dtype == "float32" else 0.05
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), close, close)
