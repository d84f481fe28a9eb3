"""docs/add_a_method.md, followed literally: its file, its config, its test, and a run."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import configs
from dmrl import algorithms, recipe, trainer

PAGE = Path(__file__).parent.parent / "docs" / "add_a_method.md"


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's three blocks of code as the files that it names."""
    method, config, test, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    for package, text in ((algorithms, method), (configs, config)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "reinforce.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    (tmp_path / "page_test.py").write_text(test)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("dmrl.algorithms.reinforce", "configs.reinforce", "page_test"):
        sys.modules.pop(name, None)
    vars(algorithms).pop("reinforce", None)


@pytest.mark.usefixtures("page")
def test_the_test_on_the_page_passes():
    module = importlib.import_module("page_test")
    module.test_the_expected_gradient_is_that_of_the_expected_reward()


@pytest.mark.usefixtures("page")
@pytest.mark.slow
def test_the_method_on_the_page_trains(tmp_path):
    config = importlib.import_module("configs.reinforce").get_config()
    config.steps, config.prompts_per_step, config.warm_start.steps = 2, 4, 0
    config.task.train_size = config.task.held_out_size = 16
    config.model.update({"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2})
    config.evaluation.update({"steps": (), "splits": (), "size": 8})
    values = config.to_dict()
    final = trainer.train(recipe.build(values), tmp_path / "run", values)
    assert set(final) >= {"eval/validation/sampled_4/solved"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count('"grad_norm"') == 2
