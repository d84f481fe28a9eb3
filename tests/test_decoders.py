"""Decoding rules against the authors' decoders at temperature 0, token for token."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmrl import models
from dmrl.diffusion.sampler import Sampling, sample

CONFIDENCE = {"llada": "low_confidence", "entropy": "entropy", "topk_margin": "margin"}


@functools.cache
def model(folder):
    cfg, params = tiny.llada(folder)
    return cfg, models.bind(cfg, {"params": params}, keep_mask=True)


def cases(golden_dir, name):
    return json.loads((golden_dir / f"{name}.json").read_text())


def decoded(golden_dir, case, prompt, config):
    cfg, denoiser = model(golden_dir / case.get("model", "tiny_llada"))
    prompt = jnp.asarray(prompt)
    rows = jnp.arange(prompt.shape[0])
    template = jnp.full((prompt.shape[0], config.length), cfg.mask_token_id)
    args = (prompt, jnp.ones(prompt.shape, bool), template, rows, rows, jax.random.key(0))
    return jax.jit(functools.partial(sample, denoiser, config=config))(*args)


def eoser(case, blocks):
    """The order that equals the authors' factor, which never reaches its end in several blocks."""
    low, high, steps = case["eos_min_gamma"], case["eos_max_gamma"], case["steps"]
    if blocks > 1:
        high = low + (high - low) * (steps // blocks - 1) / (steps - 1)
    return f"eoser:{low},{high}"


def setting(case):
    """The authors' case in our words."""
    kind, length = case["kind"], case["gen_length"]
    if kind == "eoser":
        blocks = length // case["block_length"]
        order = eoser(case, blocks)
        return Sampling(length, case["steps"], case["block_length"], order=order)
    if kind in ("ass", "eoser_ass"):
        order = eoser(case, 1) if kind == "eoser_ass" else "low_confidence"
        schedule = f"doubling:{case['block_num']}"
        return Sampling(length, case["steps"], length, order=order, schedule=schedule)
    return Sampling(
        length,
        case["steps"],
        case["block_length"],
        order=CONFIDENCE[case["conf_alg"]],
        schedule="linear",
        top_p=case["top_p"] or 1.0,
        remask="rcr:last" if kind == "rcr" else "none",
    )


@pytest.mark.parametrize("kind", ["eoser", "ass", "eoser_ass", "rcr", "mdpo_norcr"])
def test_golden_decoders(golden_dir, kind):
    recorded = np.load(golden_dir / "decoders.npz")
    chosen = [case for case in cases(golden_dir, "decoders") if case["kind"] == kind]
    assert len(chosen) >= 3
    for case in chosen:
        name, length = case["name"], case["gen_length"]
        config = setting(case)
        out = decoded(golden_dir, case, recorded[f"{name}_prompt"], config)
        np.testing.assert_array_equal(out.tokens, recorded[f"{name}_tokens"][:, -length:], name)
        np.testing.assert_array_equal(out.reveal_step, recorded[f"{name}_reveal_step"], name)
        assert int(out.reveal_step.max()) + 1 == case["n_forward_calls"]
        if kind == "rcr":
            states = np.moveaxis(recorded[f"{name}_states"], 0, 1)
            np.testing.assert_array_equal(out.states, states, name)
            changed = (states[:, :-1] != model_mask(golden_dir)) & (states[:, 1:] != states[:, :-1])
            assert changed.any(), f"{name} masked nothing again"


def model_mask(golden_dir):
    return model(golden_dir / "tiny_llada")[0].mask_token_id


@pytest.mark.parametrize(
    "cache", ["none", *(pytest.param(c, marks=pytest.mark.slow) for c in ("prefix", "dual"))]
)
def test_golden_fast_dllm(golden_dir, cache):
    recorded = np.load(golden_dir / "fast_dllm.npz")
    chosen = [case for case in cases(golden_dir, "fast_dllm") if case["cache"] == cache]
    assert len(chosen) == 12
    for case in chosen:
        name, length, width = case["name"], case["gen_length"], case["block_length"]
        fixed = case["threshold"] is None
        config = Sampling(
            length,
            case["steps"] if fixed else length,
            width,
            schedule="uniform" if fixed else f"threshold:{case['threshold']}",
            cache=cache,
        )
        out = decoded(golden_dir, case, recorded[f"{name}_prompt"], config)
        np.testing.assert_array_equal(out.tokens, recorded[f"{name}_tokens"][:, -length:], name)
        steps = np.asarray(out.reveal_step[0]).reshape(-1, width)
        # With a cache and a threshold theirs spends a second forward on a block that is full.
        idle = 0 if cache == "none" or fixed else sum(len(set(block)) == 1 for block in steps)
        assert steps.max() + 1 + idle == case["nfe"], name
