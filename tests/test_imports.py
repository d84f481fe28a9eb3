"""Who may import whom: the rooms of the house and the doors between them."""

import ast
import graphlib
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dmrl", "configs", "launch", "benchmarks", "examples", "tests")
NUMERIC = {"jax", "jaxtyping", "numpy"}


class Doors(NamedTuple):
    """What a room may import besides the standard library and itself."""

    libraries: set[str]
    rooms: set[str]


ANY = {"*"}
RULES = {
    "dmrl.types": Doors({"jax", "jaxtyping"}, set()),
    "dmrl.diffusion": Doors(NUMERIC, {"dmrl.types"}),
    "dmrl.algorithms": Doors({"jax", "jaxtyping"}, {"dmrl.types", "dmrl.diffusion"}),
    "dmrl.models": Doors(NUMERIC | {"flax", "tensorstore"}, {"dmrl.types"}),
    "dmrl.tasks": Doors({"numpy", "math_verify"}, {"dmrl.sandbox", "dmrl.sources"}),
    "dmrl.sources": Doors(set(), set()),
    "dmrl.builder": Doors({"numpy", "tensorflow_datasets"}, set()),
    "dmrl.sandbox": Doors(set(), set()),
    "dmrl.confined": Doors(set(), set()),
    "dmrl.tokenizer": Doors({"numpy", "tokenizers", "transformers"}, {"dmrl.tasks"}),
    "dmrl.data": Doors({"numpy", "grain"}, {"dmrl.tasks", "dmrl.tokenizer"}),
    "dmrl.protocol": Doors({"numpy"}, {"dmrl.tasks"}),
    "dmrl.results": Doors(set(), set()),
    "dmrl.policy": Doors({"jax"}, {"dmrl.models", "dmrl.parallel"}),
    "dmrl.accuracy": Doors(NUMERIC, ANY),
    "dmrl.generation": Doors(NUMERIC, ANY),
    "dmrl.decoding": Doors(NUMERIC, ANY),
    "dmrl.loglikelihood": Doors(NUMERIC, ANY),
    "dmrl.harness": Doors({"lm_eval", "numpy"}, ANY),
    "dmrl.trace": Doors({"numpy"}, {"dmrl.types"}),
    "dmrl.trajectories": Doors(set(), ANY),
    "dmrl.page": Doors(set(), set()),
    "dmrl.viewer": Doors(set(), {"dmrl.page"}),
    "dmrl.report": Doors(set(), {"dmrl.page", "dmrl.viewer"}),
    "dmrl.cost": Doors({"numpy"}, set()),
    "dmrl.parallel": Doors(NUMERIC, set()),
    "dmrl.pieces": Doors(NUMERIC, {"dmrl.diffusion", "dmrl.types"}),
    "dmrl.processes": Doors(NUMERIC, set()),
    "dmrl.heap": Doors(set(), set()),
    "dmrl.rescue": Doors({"numpy"}, set()),
    "dmrl.checkpoint": Doors(NUMERIC | {"orbax"}, set()),
    "dmrl.optim": Doors(NUMERIC | {"optax"}, set()),
    "dmrl.metrics": Doors({"jax", "numpy", "tensorboardX", "wandb"}, set()),
    "dmrl.console": Doors({"rich"}, set()),
    "dmrl.evaluate": Doors(
        NUMERIC,
        {
            f"dmrl.{room}"
            for room in ("types", "diffusion", "tasks", "tokenizer", "data", "parallel", "scoring")
        },
    ),
    "dmrl.slices": Doors({"jax", "libtpu"}, set()),
    "dmrl.flops": Doors({"jax"}, set()),
    "dmrl.hlo": Doors(set(), set()),
    "dmrl.fit_page": Doors({"rich"}, {"dmrl.fit"}),
    # The trainer stands on every room; these are its parts.
    "dmrl.objective": Doors(NUMERIC, {"dmrl.algorithms", "dmrl.pieces", "dmrl.types"}),
    "dmrl.checks": Doors(set(), ANY),
    "dmrl.programs": Doors(NUMERIC | {"optax"}, ANY),
    "dmrl.recipe": Doors(set(), ANY),
    "dmrl.held": Doors(NUMERIC, ANY),
    "dmrl.scoring": Doors(NUMERIC, ANY),
    "dmrl.stages": Doors(NUMERIC, ANY),
    "dmrl.orders": Doors(NUMERIC, ANY),
    "dmrl.preferences": Doors(NUMERIC, ANY),
    "dmrl.trainer": Doors(NUMERIC, ANY),
    "dmrl.ahead": Doors(NUMERIC, ANY),
    "dmrl.fit": Doors(NUMERIC, ANY),
    "dmrl": Doors(set(), set()),
}
SHARED_BY_ALGORITHMS = {"dmrl.algorithms.advantage", "dmrl.algorithms.surrogate"}


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(file): ast.parse(file.read_text(), str(file))
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
}
HOUSE = [name for name in SOURCES if name.split(".")[0] == "dmrl"]


def imports(module):
    """Full names of what a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: write imports in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in SOURCES else node.module)
    return names


def room_of(module):
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", HOUSE)
def test_a_room_imports_only_through_its_doors(module):
    room = room_of(module)
    assert room in RULES, f"{room} is a new room: say in RULES what it may import"
    for name in imports(module):
        library = name.split(".")[0]
        if library == "dmrl":
            target = room_of(name)
            allowed = RULES[room].rooms | {room}
            assert allowed >= ANY or target in allowed, f"{module} may not import {name}"
        else:
            allowed = RULES[room].libraries | sys.stdlib_module_names
            assert library in allowed, f"{module} may not import {name}"


def test_algorithms_share_advantage_and_surrogate_only():
    files = [m for m in HOUSE if m.startswith("dmrl.algorithms.")]
    assert len(files) >= 4
    for module in files:
        siblings = {n for n in imports(module) if n.startswith("dmrl.algorithms")}
        assert siblings <= SHARED_BY_ALGORITHMS, f"{module} imports another algorithm: {siblings}"


def test_the_house_has_no_circular_imports():
    graph = {module: imports(module) & set(HOUSE) for module in HOUSE}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("dmrl.types") < order.index("dmrl.diffusion.sampler")


def test_only_configs_and_launch_know_ml_collections():
    for module in SOURCES:
        if module.split(".")[0] not in (
            "configs",
            "launch",
            "benchmarks",
            "examples",
            "tests",
        ):
            libraries = {name.split(".")[0] for name in imports(module)}
            assert not libraries & {"ml_collections", "configs", "launch"}, module


def test_nothing_uses_the_deprecated_pjit():
    for module, tree in SOURCES.items():
        for node in ast.walk(tree):
            names = [getattr(node, field, None) for field in ("id", "attr", "module")]
            if isinstance(node, ast.Import | ast.ImportFrom):
                names += [alias.name for alias in node.names]
            used = [n for n in names if isinstance(n, str) and "pjit" in n.split(".")]
            assert not used, f"{module}: today's name is jax.jit with NamedSharding"
