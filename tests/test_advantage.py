"""Rewards -> advantages."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmrl.algorithms.advantage import (
    BASELINES,
    STD_EPSILON,
    group_relative,
    has_signal,
    within,
)

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


def test_group_relative_leave_one_out_subtracts_the_mean_of_the_others():
    got = group_relative(REWARD, GROUP, baseline="leave_one_out")
    np.testing.assert_allclose(got, [0, 0, -1.5, 0, 1.5, 0], atol=1e-6)
    others = [1 - (0 + 2) / 2, 0, 0 - (1 + 2) / 2, 0, 2 - (1 + 0) / 2, 0]
    np.testing.assert_allclose(got, others, atol=1e-6)


def test_a_completion_alone_in_its_group_has_no_advantage_under_any_baseline():
    for baseline in BASELINES:
        assert group_relative(REWARD, GROUP, baseline=baseline)[3] == 0


def test_leave_one_out_does_not_depend_on_the_completion_s_own_reward_but_for_itself():
    raised = group_relative(REWARD.at[2].add(1.0), GROUP, baseline="leave_one_out")
    gain = raised - group_relative(REWARD, GROUP, baseline="leave_one_out")
    np.testing.assert_allclose(gain, [-0.5, 0, 1, 0, -0.5, 0], atol=1e-6)


def test_z_scores_of_a_group_have_mean_zero_and_population_std_one():
    reward = jnp.array([3.0, 10.0, -1.0, 30.0, 4.0, 20.0, 2.0])
    group = jnp.array([0, 1, 0, 1, 0, 1, 0])
    z = np.asarray(group_relative(reward, group, divide_by_std=True))
    for members in (z[::2], z[1::2]):
        assert members.mean() == pytest.approx(0, abs=1e-5)
        assert members.std() == pytest.approx(1, abs=1e-3)


def test_has_signal_is_true_of_whole_groups_whose_rewards_differ():
    assert has_signal(REWARD, GROUP).tolist() == [True, False, True, False, True, False]
    tied = has_signal(jnp.array([0.1, 0.1, 0.1, 0.2]), jnp.array([0, 0, 0, 0]))
    assert tied.all()
