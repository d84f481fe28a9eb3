"""Numbers recorded from the authors' code, and how a gradient of ours is held against them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from safetensors.numpy import load_file

from dmrl.models.convert import TABLE


def load(folder, name):
    """(tensors, cases, Config, parameters) of `name`.json and `name`.safetensors."""
    tensors = {k: jnp.asarray(v) for k, v in load_file(folder / f"{name}.safetensors").items()}
    cases = json.loads((folder / f"{name}.json").read_text())
    return tensors, cases, *tiny.llada(folder / "tiny_llada")


def assert_gradient(grad, case, tensors, name):
    """Global norm, norm of every parameter, and the recorded pieces of `name`, to 1e-4."""
    norm = np.linalg.norm(tiny.flat(grad))
    assert norm == pytest.approx(case["grad_global_norm"], rel=1e-4), name
    flat = traverse_util.flatten_dict(grad, sep="/")
    seen = set()
    for leaf in TABLE:
        stacked = leaf.path.startswith("blocks/")
        for layer in range(flat[leaf.path].shape[0]) if stacked else [None]:
            key = f"model.transformer.{leaf.hf.format(layer)}.weight"
            ours = flat[leaf.path] if layer is None else flat[leaf.path][layer]
            want = pytest.approx(case["grad_norms"][key], rel=1e-4)
            assert float(jnp.linalg.norm(ours)) == want, (name, key)
            seen.add(key)
    assert seen == case["grad_norms"].keys()
    tiny.assert_close(flat["ln_f/scale"], tensors[f"{name}/grad_ln_f"])
    row = flat["blocks/attn/q_proj/kernel"][1, :, 0]
    tiny.assert_close(row, tensors[f"{name}/grad_block1_q_proj_row0"])
