"""What a user can get wrong is said before anything is compiled, with what would be right."""

import dataclasses
import json

import jax
import pytest
from running import TINY, config

from configs import common, sudoku_dispo
from dmrl import models, parallel, recipe, tokenizer, trainer
from dmrl.held import Held
from dmrl.models import weights
from dmrl.optim import Optimizer
from dmrl.stages import Reinforce, WarmStart


def test_the_recipe_builds_with_the_vocabulary_of_its_tokenizer():
    made = recipe.build(config())
    assert made.model.vocab_size == len(made.tokenizer) == 6
    assert (made.model.mask_token_id, made.model.eos_token_id) == (0, 1)
    assert [t.name for t in made.terms] == ["diffu_grpo", "dispo"]
    assert made.loop.steps == TINY["steps"]


def test_a_config_that_was_json_builds_the_same():
    made, again = config(), json.loads(json.dumps(config()))
    assert recipe.build(again)._replace(tokenizer=None) == recipe.build(made)._replace(
        tokenizer=None
    )


def test_a_config_of_an_earlier_version_is_named_as_such():
    made = config()
    del made["imitation"]
    with pytest.raises(ValueError, match="no imitation: it was written by another version"):
        recipe.build(made)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampling__block_length": 5}, r"block_length=5 does not divide length=16; choose one of"),
        (
            {"sampling__steps": 3, "sampling__block_length": 8},
            "steps=3 must be a multiple of the 2",
        ),
        ({"sampling__steps": 17}, "choose one of 1, 2, 3"),
        ({"sampling__order": "left"}, "order='left': choose one of"),
        ({"sampling__schedule": "doubling:9"}, "make 1 to 4 blocks"),
        ({"rollout_chunks": 3}, "rollout_chunks=3 does not divide prompts_per_step=4"),
        ({"microbatches": 3}, "microbatches=3 does not divide 8 completions"),
        ({"num_generations": 1}, "num_generations=1: a group needs at least 2"),
        ({"reward_text": "all"}, "reward_text='all': choose one of upto_eos, full"),
        ({"reward_text": "full"}, "what follows their EOS, which dispo leaves out: set it to"),
        ({"optimizer__schedule": "linear"}, "schedule='linear': choose one of"),
        ({"optimizer__learning_rate": 0.0}, "learning_rate=0.0"),
        ({"warm_start__optimizer__clip_norm": 0.0}, "clip_norm=0.0"),
        ({"task__style": "board"}, "style='board' is not one of 'compact', 'grid', 'template'"),
        ({"task__blanks": (4, 40)}, r"blanks=\(4, 40\) is not a range"),
        ({"model__n_heads": 3}, "n_heads=3 does not divide d_model=16"),
        ({"model__remat": "all"}, "remat='all': choose one of"),
        ({"model__param_dtype": "bfloat16"}, "param_dtype='float32', not 'bfloat16'"),
        ({"model__init_from": "no/such"}, "model.init_from='no/such' does not exist"),
        ({"metrics": ("wandbb",)}, "metrics: no writer 'wandbb'"),
        ({"terms__dispo__gradient": "none"}, "gradient='none': choose one of"),
        ({"terms__dispo__weight": 0.0, "terms__diffu_grpo__weight": 0.0}, "no term with a weight"),
    ],
)
def test_what_cannot_work_is_refused_when_built(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        recipe.build(config(**overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("task", "blank", "task 'sudoku' has no option 'blank'; did you mean 'blanks'"),
        ("sampling", "stepz", r"no option sampling.stepz; did you mean 'steps'\?"),
        ("model", "depth", "no option model.depth; there are vocab_size, "),
        ("evaluation", "sizes", r"no option evaluation.sizes; did you mean 'size'\?"),
    ],
)
def test_unknown_options_are_named_with_the_nearest(section, key, message):
    made = config()
    made[section][key] = 1
    with pytest.raises(ValueError, match=message):
        recipe.build(made)


def test_unknown_tasks_and_algorithms_are_named_with_the_nearest():
    made = config()
    made["task"]["name"] = "sudoky"
    with pytest.raises(ValueError, match=r"no task 'sudoky'; did you mean 'sudoku'\?"):
        recipe.build(made)
    made = config()
    made["terms"]["dispoo"] = made["terms"].pop("dispo")
    with pytest.raises(ValueError, match=r"no algorithm 'dispoo'; did you mean 'dispo'\?"):
        recipe.build(made)


def start(**overrides):
    """All that happens before the workdir is touched."""
    made = recipe.build(config(**overrides))
    mesh = parallel.make_mesh(**made.mesh)
    held = Held(made, mesh)
    return WarmStart(made, mesh, held), Reinforce(made, mesh, held)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh__data": 3}, "mesh data=3, fsdp=-1, tensor=1 does not cover the 1 devices"),
        ({"prompts_per_step": 32}, "32 prompts a step, but the split has only 16 examples"),
        ({"warm_start__batch": 17}, "17 prompts a step, but the split has only 16 examples"),
        ({"evaluation__splits": ("tests",)}, "split='tests' is not one of"),
        ({"evaluation__steps": (40,)}, "evaluation.steps=40 .* steps=40 must be a multiple"),
        (
            {"sampling__schedule": "doubling", "evaluation__steps": (8,)},
            "evaluation.steps=8 by 'low_confidence': schedule='doubling' has blocks and steps",
        ),
        (
            {"evaluation__steps": (4,), "evaluation__orders": ("learned",)},
            "evaluation.orders: 'learned', but the run trains no order",
        ),
        ({"sampling__length": 8, "sampling__block_length": 8}, "is 16 tokens, the completion 8"),
        (
            {"task__style": "published", "sampling__length": 64, "max_prompt_length": 100},
            "16 of 16 prompts are longer than max_prompt_length=100 ",
        ),
        ({"tokenizer": ""}, "no tokenizer: set --config.tokenizer"),
    ],
)
def test_what_the_data_cannot_serve_is_refused_before_anything_is_compiled(
    overrides, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        start(**overrides)
    made = config(**overrides)
    with pytest.raises(ValueError, match=message):
        trainer.train(recipe.build(made), tmp_path / "run", made)
    assert not (tmp_path / "run").exists(), "a refused run must not claim its workdir"


def test_evaluation_settings_are_the_own_one_and_the_greedy_ones_asked_for():
    warm, _ = start(evaluation__steps=(16, 4, 16))
    held = warm.held
    assert [(s.steps, s.temperature) for s in held.settings] == [(4, 1.0), (16, 0.0), (4, 0.0)]
    assert held.greedy == held.settings[2]
    assert held.programs(held.greedy) is held.programs(held.settings[2])
    assert list(held.prompts) == ["train", "validation"]


@pytest.fixture
def stored(tmp_path):
    """Weights of the tiny model on disk, with their tokenizer."""
    made = recipe.build(config())
    params = models.init(made.model, jax.random.key(3))["params"]
    weights.save_weights(tmp_path / "weights", made.model, params)
    made.tokenizer.save_pretrained(tmp_path / "weights")
    return str(tmp_path / "weights")


def test_weights_of_another_architecture_are_refused(stored):
    recipe.build(config(model__init_from=stored))
    with pytest.raises(ValueError, match=r"model.n_layers=2, but the weights in .* have 1"):
        recipe.build(config(model__init_from=stored, model__n_layers=2))
    with pytest.raises(ValueError, match=r"model.rope_theta=9.0, but the weights"):
        recipe.build(config(model__init_from=stored, model__rope_theta=9.0))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint: no model.json"):
        recipe.build(config(model__init_from=str(tmp_path)))


def test_the_tokenizer_comes_with_the_weights(stored):
    ids = {"model__vocab_size": 6, "model__mask_token_id": 0, "model__eos_token_id": 1}
    made = recipe.build(config(model__init_from=stored, tokenizer="", **ids))
    assert made.tokenizer.get_vocab() == tokenizer.characters("1234").get_vocab()


def test_every_option_of_a_section_can_be_overridden():
    made = common.section(Optimizer, learning_rate=0.5)
    assert set(made.keys()) == {f.name for f in dataclasses.fields(Optimizer)}
    assert made.learning_rate == 0.5
    with pytest.raises(TypeError, match="Optimizer has no learning"):
        common.section(Optimizer, learning=1)


def test_presets():
    assert sudoku_dispo.get_config("llada_8b").model.d_model == 4096
    with pytest.raises(ValueError, match="no preset 'big': choose one of tiny, llada_8b"):
        sudoku_dispo.get_config("big")
