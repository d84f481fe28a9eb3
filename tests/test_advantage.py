"""Rewards -> advantages."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmrl.algorithms.advantage import STD_EPSILON, group_relative, within

REWARD = jnp.array([1.0, 5.0, 0.0, 3.0, 2.0, 5.0])
GROUP = jnp.array([0, 1, 0, 2, 0, 1])


def test_group_relative_subtracts_the_mean_of_the_group():
    np.testing.assert_allclose(group_relative(REWARD, GROUP), [0, 0, -1, 0, 1, 0], atol=1e-6)


def test_groups_need_not_be_contiguous_nor_of_one_size():
    order = np.array([3, 0, 5, 2, 4, 1])
    got = group_relative(REWARD[order], GROUP[order])
    np.testing.assert_allclose(got, np.array([0, 0, -1, 0, 1, 0])[order], atol=1e-6)


def test_division_by_the_population_std():
    got = group_relative(REWARD, GROUP, divide_by_std=True)
    std = np.sqrt(2 / 3)
    np.testing.assert_allclose(
        got[jnp.array([2, 4])],
        [-1 / (std + STD_EPSILON)] * 1 + [1 / (std + STD_EPSILON)],
        rtol=1e-5,
    )


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_tied_groups_have_no_advantage(divide_by_std):
    reward = jnp.full((4,), 0.5)
    got = group_relative(reward, jnp.array([0, 0, 1, 1]), divide_by_std)
    assert got.tolist() == [0.0] * 4


def test_within_the_mean_of_the_siblings():
    reward = jnp.array([[1.0, 0.0], [4.0, 1.0]])
    np.testing.assert_allclose(within(reward), [[0.5, -0.5], [1.5, -1.5]])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    reward = jnp.array([[1.0, 2.0, 6.0]])
    np.testing.assert_allclose(
        within(reward, "leave_one_out"), [[1 - 4, 2 - 3.5, 6 - 1.5]], rtol=1e-6
    )
