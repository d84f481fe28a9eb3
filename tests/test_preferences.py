"""Preference pairs from a file: reading, refusing, and a run that learns to prefer."""

import json

import numpy as np
import pytest
from running import config, rows

from configs import vrpo
from dmrl import preferences, recipe, tasks, tokenizer, trainer

TASK = tasks.load("sudoku", train_size=24, held_out_size=8)
TOK = tokenizer.characters(TASK.alphabet)
IDS = (TOK.mask_token_id, TOK.eos_token_id)


def lines():
    """The solution of a board against the same board with a 1 in every blank."""
    out = []
    for example in TASK.examples("train"):
        template = TASK.template(example)
        row = {
            "prompt": "",
            "chosen": TASK.answer(example),
            "rejected": template.replace("_", "1"),
            "template": template,
        }
        out.append(json.dumps(row))
    return out


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines()) + "\n")
    return path


def test_pairs_are_read_as_they_stand(file):
    found = preferences.read(str(file), TOK, 3, 16, *IDS)
    assert found.tokens.shape == found.free.shape == (24, 2, 16)
    assert found.prompt.shape == (24, 3)
    assert not found.prompt_valid.any()
    first = json.loads(lines()[0])
    for side, name in enumerate(("chosen", "rejected")):
        assert tokenizer.decode(TOK, found.tokens[:1, side], *IDS) == [first[name]]
    blanks = [c == "_" for c in first["template"]]
    np.testing.assert_array_equal(found.free[0], [blanks, blanks])
    assert (found.tokens[:, 0] != found.tokens[:, 1]).sum() >= 24


def test_short_texts_end_with_eos_and_count_whole(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "12", "chosen": "1234", "rejected": "4"}))
    found = preferences.read(str(path), TOK, 3, 6, *IDS)
    assert found.prompt_valid.tolist() == [[False, True, True]]
    assert (found.tokens[0, :, 4:] == TOK.eos_token_id).all()
    assert found.free.all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON object"),
        ("[1]", r"line 2: needs the texts prompt, chosen, rejected; it has \[1\]"),
        ('{"prompt": "1", "chosen": "2"}', "line 2: needs the texts"),
        ('{"prompt": "1", "chosen": "2", "rejected": 3}', "line 2: needs the texts"),
        (
            '{"prompt": "", "chosen": "11111111111111111", "rejected": "1"}',
            "line 2: '11111111111111111'... is 17 tokens, sampling.length is 16",
        ),
        ('{"prompt": "", "chosen": "x", "rejected": "1"}', "line 2: cannot tokenize 'x'"),
        (
            '{"prompt": "", "chosen": "1", "rejected": "1", "template": "_________________"}',
            "line 2: template '_________________' is 17 tokens, the completion 16",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines()[0] + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        preferences.read(str(path), TOK, 3, 16, *IDS)


def test_no_file_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl' is no file"):
        preferences.read(str(tmp_path / "no.jsonl"), TOK, 3, 16, *IDS)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        preferences.read(str(tmp_path / "empty.jsonl"), TOK, 3, 16, *IDS)


def options(file, **overrides):
    """The tiny recipe with VRPO on the file."""
    made = config(
        preferences=str(file),
        steps=20,
        warm_start__steps=0,
        prompts_per_step=8,
        checkpoint_every=0,
        optimizer__learning_rate=1e-2,
        optimizer__warmup_steps=1,
        evaluation__every=0,
        **overrides,
    )
    return made | {"terms": vrpo.get_config("tiny").terms.to_dict()}


@pytest.mark.slow
def test_a_run_learns_to_prefer_the_chosen(file, tmp_path):
    made = options(file)
    made["terms"]["vrpo"]["group_size"] = 2
    trainer.train(recipe.build(made), tmp_path / "run", made)
    steps = [r for r in rows(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert abs(steps[0]["rewards/margins"]) < 1e-6  # policy and reference are one
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    late = steps[-8:]
    assert np.mean([r["rewards/accuracies"] for r in late]) > 0.8
    assert np.mean([r["rewards/margins"] for r in late]) > 0.1
    assert (tmp_path / "run" / "weights" / "model.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 4}, "num_generations=4, but preferences come in pairs"),
        ({"rescue__fraction": 0.5}, "preferences are not sampled, but rescue needs rollouts"),
        ({"phase_steps": 2}, "preferences are not sampled, but phase_steps needs rollouts"),
    ],
)
def test_what_needs_rollouts_is_refused(file, overrides, message):
    made = options(file, **overrides)
    made["terms"]["vrpo"]["group_size"] = made["num_generations"]
    with pytest.raises(ValueError, match=message):
        recipe.build(made)


def test_probes_need_rollouts(file):
    with pytest.raises(ValueError, match="not sampled, but dispo needs rollouts"):
        recipe.build(config(preferences=str(file)))
