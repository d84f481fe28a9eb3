"""Rewards -> advantages. A group is the set of completions that share a baseline."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

STD_EPSILON = 1e-4


BASELINES = ("mean", "leave_one_out")


def group_relative(
    reward: Float[Array, " b"],
    group: Int[Array, " b"],
    divide_by_std: bool = False,
    baseline: str = "mean",
) -> Float[Array, " b"]:
    """A_i = r_i - baseline of its group, and divided by the group's std + 1e-4 if asked.

    `mean`: of the whole group (GRPO). `leave_one_out`: of the others, which makes the advantage
    independent of the completion's own reward and the gradient unbiased (RLOO; coupled-GRPO).
    Population std, as GRPO (arXiv 2402.03300) uses; diffu-GRPO does not divide. A group whose
    rewards all tie has advantage 0 in any case.
    """
    same = (group[:, None] == group[None, :]).astype(jnp.float32)
    size = jnp.sum(same, axis=1)

    def mean(x: Float[Array, " b"]) -> Float[Array, " b"]:
        return jnp.matmul(same, x, precision="highest") / size

    # Exactly 0 without a signal: a rounding error over a std of 0 would pass for one.
    centred = jnp.where(has_signal(reward, group), reward - mean(reward), 0.0)
    scale = jnp.ones_like(size)
    if baseline == "leave_one_out":
        scale = size / jnp.maximum(size - 1, 1)
    if not divide_by_std:
        return scale * centred
    std = jnp.sqrt(mean(jnp.square(centred)))
    return scale * centred / (std + STD_EPSILON)


def has_signal(reward: Float[Array, " b"], group: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Whether the rewards of a completion's group differ: ties give no gradient.

    Methods that drop zero-variance groups (DAPO, arXiv 2503.14476) normalise over these alone.
    """
    same = group[:, None] == group[None, :]
    return jnp.any(same & (reward[:, None] != reward[None, :]), axis=1)


def within(reward: Float[Array, "*b z"], baseline: str = "mean") -> Float[Array, "*b z"]:
    """Advantage of each of Z siblings on the last axis.

    `mean`: r - mean (DiSPO eq. 3). `leave_one_out`: r - mean of the others, which removes the
    factor (Z-1)/Z of DiSPO's Theorem 4.1. Exactly 0 where all tie.
    """
    tied = jnp.all(reward == reward[..., :1], axis=-1, keepdims=True)
    centred = jnp.where(tied, 0.0, reward - jnp.mean(reward, axis=-1, keepdims=True))
    z = reward.shape[-1]
    return centred * (z / (z - 1)) if baseline == "leave_one_out" else centred
