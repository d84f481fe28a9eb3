"""The notebooks run as they stand, in order, and carry no outputs."""

import json
import os
from pathlib import Path

import compiling
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 3
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all(isinstance(cell["source"], list) for cell in cells)  # a line a line: diffs


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path):
    nbformat = pytest.importorskip("nbformat", reason="pip install 'dmrl[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'dmrl[dev]'")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    env = {key: value for key, value in os.environ.items() if key not in compiling.QUICKLY}
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute(env=env)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert kinds & {"text/html", "text/markdown"}
