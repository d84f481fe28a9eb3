"""docs/your_task.md and examples/, as they stand: the task trains, is evaluated and used."""

import importlib
import json
import math
import re
import subprocess
import sys

import pytest
from running import ROOT, rows

from dmrl import recipe, tasks, trainer
from dmrl.tasks import own

SMALL = {
    "steps": 2,
    "prompts_per_step": 4,
    "rollout_chunks": 1,
    "warm_start.steps": 2,
    "warm_start.batch": 8,
    "warm_start.evaluate_every": 2,
    "model.d_model": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.mlp_hidden_size": 32,
    "evaluation.steps": (),
    "evaluation.splits": (),
    "evaluation.size": 8,
    "evaluation.batch": 8,
}


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("examples.backwards")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def workdir(example, tmp_path_factory):
    made = example.get_config()
    made.update_from_flattened_dict(SMALL)
    values = made.to_dict()
    folder = tmp_path_factory.mktemp("run")
    trainer.train(recipe.build(values), folder, values)
    return folder


def launch(script, *args, given="", code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / script), *map(str, args)],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_example_is_short_and_its_rows_are_what_it_says(example):
    assert len((ROOT / "examples" / "backwards.py").read_text().splitlines()) < 40
    task = tasks.load("examples.backwards")
    found = {split: task.examples(split) for split in ("train", "validation", "test")}
    assert [len(rows) for rows in found.values()] == [512, 64, 64]
    for row in found["train"]:
        assert row["prompt"] == row["answer"][::-1] + ":"
        assert task.score(row, task.answer(row)) == {"reward": 1.0, "solved": 1.0}
    row = {"prompt": "abc:", "answer": "cba"}
    assert task.score(row, "cbx") == {"reward": pytest.approx(2 / 3), "solved": 0.0}
    assert task.score(row, "cbaa")["solved"] == 0.0
    assert task.score(row, "")["reward"] == 0.0
    assert isinstance(task, tasks.Task)


def test_the_task_on_the_page_is_one(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/your_task.md").read_text(), re.S)
    imports = "from dataclasses import dataclass\nfrom dmrl.tasks.own import RowTask\n"
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_task.py").write_text(imports + code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"{i}", "answer": f"{i}"}) for i in range(9)]
    (tmp_path / "my_rows.jsonl").write_text("\n".join(lines))
    task = tasks.load("my_package.my_task", held_out_size=2)
    row = task.examples("test")[0]
    assert task.score(row, f" {row['answer']}\n")["solved"] == 1.0
    assert task.score(row, "no")["reward"] == 0.0


def test_mistakes_in_a_task_of_ones_own_are_told():
    class Task(own.RowTask):
        def reward(self, row, completion):
            return math.nan

    with pytest.raises(ValueError, match="source='' is not one of 'jsonl:PATH'"):
        Task()
    with pytest.raises(ValueError, match="reward nan of 'x' is not a finite number"):
        Task("jsonl:a.jsonl").score({}, "x")
    with pytest.raises(NotImplementedError, match="defines no method `reward`"):
        own.RowTask("jsonl:a.jsonl").score({}, "x")


@pytest.mark.slow
def test_the_example_trains_is_evaluated_and_completes_prompts(workdir, tmp_path):
    lines = rows(workdir / "metrics.jsonl")
    assert len([r for r in lines if r["stage"] == "rl" and "grad_norm" in r]) == 2
    launch("evaluate.py", f"--checkpoint={workdir}", f"--out={tmp_path / 'a'}", "--size=4")
    found = json.loads((tmp_path / "a" / "results.json").read_text())["results"]
    assert [(r["protocol"]["length"], r["n"]) for r in found] == [(8, 4)]
    given = 'cab:\n\n{"prompt": "abc:", "template": "c__aaaaa", "mine": 1}\n'
    said = launch("generate.py", f"--checkpoint={workdir}", given=given)
    plain, fixed = map(json.loads, said.splitlines())
    assert plain["prompt"] == "cab:"
    assert fixed["mine"] == 1
    assert (fixed["completion"][0], fixed["completion"][3:]) == ("c", "aaaaa")
    assert 0 <= plain["tokens"] <= 8
    file = tmp_path / "p.txt"
    file.write_text("cab:\n" * 3)
    more = [
        f"--prompts={file}",
        "--samples=2",
        "--temperature=1",
        f"--out={tmp_path / 'out.jsonl'}",
    ]
    launch("generate.py", f"--checkpoint={workdir}/weights", *more, "--batch=2")
    sampled = rows(tmp_path / "out.jsonl")
    page = tmp_path / "page.html"
    launch(
        "generate.py",
        f"--checkpoint={workdir}",
        f"--compare={workdir}/weights",
        f"--trace={page}",
        *more,
    )
    shown = embedded(page)
    prompts = [str(i + 1) for i in range(3)]
    assert [t["id"] for t in shown] == [f"{p} sample {s}" for p in prompts for s in (1, 2)] * 2
    assert [t["when"] for t in shown] == [str(workdir)] * 6 + [f"{workdir}/weights"] * 6
    told = [["".join(t["tokens"][: t["length"]]), t["reveal_step"]] for t in shown]
    assert told[:6] == told[6:]  # one policy under two names, one seed
    launch(
        "generate.py",
        f"--checkpoint={workdir}",
        "--versus=remask=remdm:0.9",
        f"--trace={page}",
        *more,
    )
    one, other = embedded(page)[:6], embedded(page)[6:]
    assert {t["changes"] is None for t in one} == {True}
    assert any(text is None for t in other for _, _, text in t["changes"])
    assert other[0]["setting"] == f"{one[0]['setting']}_remdm:0.9"
    assert {t["when"] for t in other} == {f"{workdir} remask=remdm:0.9"}
    assert [text for text, _ in told[:6]] == [r["completion"] for r in rows(tmp_path / "out.jsonl")]
    assert [r["sample"] for r in sampled] == [0, 1] * 3
    assert len({r["completion"] for r in sampled}) > 1


def embedded(page):
    text = page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    return json.loads(text)["traces"]


def test_generate_says_what_is_wrong(tmp_path):
    here = f"--checkpoint={tmp_path}"
    said = launch("generate.py", here, f"--compare={tmp_path}/a", "--prompt=a", code=1)
    assert "give --trace=FILE.html too" in said
    said = launch("generate.py", here, f"--compare={tmp_path}", "--trace=t", "--prompt=a", code=1)
    assert f"--compare={tmp_path} is the policy of --checkpoint itself" in said
    said = launch("generate.py", here, f"--trace={tmp_path}/no/t.html", "--prompt=a", code=1)
    assert f"there is no folder {tmp_path}/no" in said
    said = launch("generate.py", f"--checkpoint={tmp_path}", given="", code=1)
    assert "no prompt: give --prompt=TEXT" in said
    said = launch("generate.py", f"--checkpoint={tmp_path}", given='{"x": 1}\n', code=1)
    assert "line 1: no text in a field 'prompt'" in said
    said = launch("generate.py", f"--checkpoint={tmp_path}", "--prompt=a", code=1)
    assert "no model.json there or in its folder weights" in said
