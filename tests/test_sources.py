"""Where rows come from: the same batches from JSONL, a Hugging Face dataset and a TFDS."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmrl import data, sources, tasks, tokenizer

ROOT = Path(__file__).parent.parent
ROWS = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(24)]


def need(package, extra):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'dmrl[{extra}]'")


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_datasets(files, to):
    """`datasets` in a process of its own: it starts threads and warns."""
    need("datasets", "hf")
    code = (
        "import datasets, json, sys\n"
        "read = lambda p: datasets.Dataset.from_list([json.loads(x) for x in open(p)])\n"
        "datasets.DatasetDict({s: read(f'{sys.argv[1]}/{s}.jsonl') for s in ('train', 'test')})"
        ".save_to_disk(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(files), str(to)], check=True)
    return f"hf:{to}"


def launch_data(*args, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "data.py"), *args], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()[-1] if code == 0 else done.stderr


def as_tfds(*args):
    need("tensorflow_datasets", "tfds")
    need("array_record", "tfds")
    return launch_data(*args).removeprefix("--config.task.source=")


def batches(task, count, skip=0):
    """`count` batches of token ids after `skip`, from an iterator that was saved and restored."""
    examples = task.examples("train")
    letters = tokenizer.characters("".join(map(task.prompt, examples)))
    prompts = data.tokenize(task, letters, "train", 1000, 8, letters.mask_token_id)
    iterator = data.batches(len(examples), 100, data.stream_seed(3, "rl"))
    for _ in range(skip):
        next(iterator)
    resumed = data.batches(len(examples), 100, data.stream_seed(3, "rl"))
    resumed.set_state(iterator.get_state())
    return np.stack([prompts.prompt[next(resumed)] for _ in range(count)])


@pytest.mark.parametrize("kind", ["jsonl", "hf", "tfds"])
def test_gsm8k_gives_the_same_batches_from_every_source(kind, data_dir, tmp_path):
    files = data_dir / "gsm8k"
    source = f"jsonl:{files}"
    if kind == "hf":
        source = as_datasets(files, tmp_path / "saved")
    elif kind == "tfds":
        source = as_tfds(f"--source={source}", "--name=gsm8k", f"--to={tmp_path}")
    options = {"style": "compact", "held_out_size": 6973}  # 500 to train on
    task = tasks.load("gsm8k", source=source, **options)
    published = tasks.load("gsm8k", data_dir=str(data_dir), **options)
    for split in sources.SPLITS:
        assert task.examples(split) == published.examples(split)
    whole = batches(published, 10)  # two epochs
    assert (whole[:5] != whole[5:]).any()
    np.testing.assert_array_equal(batches(task, 10), whole)
    np.testing.assert_array_equal(batches(task, 7, skip=3), whole[3:])  # within an epoch


def test_reading_a_tfds_imports_no_tensorflow(tmp_path):
    write_lines(tmp_path / "rows" / "train.jsonl", ROWS)
    source = as_tfds(f"--source=jsonl:{tmp_path / 'rows'}", "--name=few", f"--to={tmp_path}")
    code = (
        "import sys\nfrom dmrl import tasks\n"
        f"task = tasks.load('gsm8k', source={source!r}, held_out_size=4)\n"
        "print(len(task.examples('train')), 'tensorflow' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.split() == ["16", "False"], said.stderr


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("countdown", {"train_size": 30, "held_out_size": 6}),
        ("sudoku", {"train_size": 30, "held_out_size": 6}),
        ("zebra", {"train_size": 3, "held_out_size": 2, "houses": (3, 3)}),
    ],
)
def test_generated_tasks_come_back_from_the_shards_that_one_host_wrote(name, options, tmp_path):
    generated = tasks.load(name, **options)
    given = [f"{key}={value}" for key, value in options.items()]
    stored = tasks.load(
        name, **options, source=as_tfds(f"--task={name}", f"--to={tmp_path}", *given)
    )
    for split in sources.SPLITS:
        assert stored.examples(split) == generated.examples(split)
    said = launch_data(f"--task={name}", f"--to={tmp_path}", *given, code=1)
    assert "exists: remove it, or give another --to" in said


def gsm8k(source, **options):
    return tasks.load("gsm8k", source=source, **{"held_out_size": 4} | options)


def test_a_single_file_is_cut_into_three_disjoint_splits(tmp_path):
    file = tmp_path / "mine.jsonl"
    write_lines(file, ROWS)
    found = {s: gsm8k(f"jsonl:{file}").examples(s) for s in sources.SPLITS}
    assert {s: len(rows) for s, rows in found.items()} == {"train": 16, "validation": 4, "test": 4}
    assert len({e.question for rows in found.values() for e in rows}) == 24
    with pytest.raises(ValueError, match="leaves none of 24 rows to train on: test and validation"):
        gsm8k(f"jsonl:{file}", held_out_size=12).examples("test")


def test_splits_that_a_data_set_has_are_taken_as_they_are(tmp_path):
    for split, rows in zip(sources.SPLITS, (ROWS[:9], ROWS[9:12], ROWS[12:]), strict=True):
        write_lines(tmp_path / f"{split}.jsonl", rows)
    for place in (f"jsonl:{tmp_path}", f"jsonl:file://{tmp_path}"):
        found = {s: gsm8k(place, held_out_size=100).examples(s) for s in sources.SPLITS}
        assert [len(found[s]) for s in sources.SPLITS] == [9, 3, 12]
        assert found["validation"][0].question == "9 + 1?"
    only = gsm8k(f"jsonl:{tmp_path / 'test.jsonl'}")
    assert len(only.examples("test")) == 12
    with pytest.raises(ValueError, match="has no split 'train' among test"):
        only.examples("train")


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n\n{GOOD}\n", r"test\.jsonl, line 2: empty"),
        (f"{GOOD}\n{{bad}}\n", r"test\.jsonl, line 2: no JSON .*property name"),
        (f"{GOOD}\n{GOOD[:-5]}", r"test\.jsonl, line 2: no JSON .*may have been cut off"),
        (f"{GOOD}\n[1]\n", r"test\.jsonl, line 2: .* is no JSON object"),
        (
            f'{GOOD}\n{{"question": "?"}}\n',
            r"test\.jsonl, line 2: no field 'answer' among question",
        ),
        (
            f'{GOOD}\n{{"question": "?", "answer": "4"}}\n',
            r"test\.jsonl, line 2: answer '4' does not end in ####",
        ),
        ("", r"test\.jsonl has no lines"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(text, message, tmp_path):
    (tmp_path / "test.jsonl").write_text(text)
    for place in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(ValueError, match=message):
            gsm8k(f"jsonl:{place}").examples("test")


def test_bytes_that_are_no_text_and_a_truncated_gzip_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no JSON .*utf-8"):
        gsm8k(f"jsonl:{file}").examples("train")
    short = tmp_path / "b.jsonl.gz"
    short.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())[:-20])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz, line \d+: cut off or no gzip"):
        gsm8k(f"jsonl:{short}").examples("train")


@pytest.mark.parametrize("source", ["", "jsonl", "huggingface:x", "generated"])
def test_what_is_no_source_is_refused_when_the_task_is_made(source):
    with pytest.raises(ValueError, match=r"source='.*' is not one of 'published', 'easy', 'json"):
        gsm8k(source)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        gsm8k(f"jsonl:{tmp_path / 'none'}").examples("train")
    with pytest.raises(FileNotFoundError, match="no file file://"):
        gsm8k(f"jsonl:file://{tmp_path}/none.jsonl").examples("train")
    with pytest.raises(ValueError, match=r"the folder holds no SPLIT\.jsonl"):
        gsm8k(f"jsonl:{tmp_path}").examples("train")
    need("tensorflow_datasets", "tfds")
    with pytest.raises(ValueError, match="mount the bucket"):
        gsm8k("tfds:gs://bucket/few").examples("train")


def test_missing_extras_say_what_to_install(monkeypatch):
    for package, extra in (("datasets", "hf"), ("tensorflow_datasets", "tfds")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'dmrl\[{extra}\]'"):
            sources.read(f"{extra}:some/where")


def hf(code):
    """What a script with `datasets` prints, in a process of its own, without the hub."""
    need("datasets", "hf")
    done = subprocess.run(
        [sys.executable, "-c", f"from dmrl import sources\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return done.stdout + done.stderr


def test_without_the_hub_a_message_says_how_to_use_a_local_copy():
    said = hf("sources.read('hf:openai/gsm8k')").splitlines()[-1]
    assert "hf:openai/gsm8k: neither a local path nor within reach on the hub" in said
    assert "load_dataset('openai/gsm8k', ...).save_to_disk(DIR)" in said
    assert "hf:DIR" in said


def test_local_files_and_configurations_of_datasets(tmp_path):
    write_lines(tmp_path / "one.jsonl", ROWS)
    write_lines(tmp_path / "hub" / "main.jsonl", ROWS[:3])
    write_lines(tmp_path / "hub" / "other.jsonl", ROWS[:5])
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: other\n  data_files: other.jsonl\n"
        "- config_name: main\n  data_files: main.jsonl\n---\n"
    )
    code = (
        "def count(source):\n"
        "    return {k: sum(1 for _ in f()) for k, f in sources.read(source).items()}\n"
        f"print(count('hf:{tmp_path}/one.jsonl'), count('hf:{tmp_path}/hub'))\n"
        f"sources.read('hf:{tmp_path}/hub:none')"
    )
    said = hf(code)
    assert "{'train': 24} {'train': 3}" in said
    assert "no split 'none' among train" in said
