"""What is said about a program that fits a slice, or does not."""

import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import sudoku_dispo
from dmrl import fit, fit_page, hlo, parallel, recipe
from dmrl.slices import CHIPS

MESH = AbstractMesh((1, 16, 1), parallel.AXES, axis_types=(AxisType.Auto,) * 3)
FULL = {"lora_rank": 0, "param_dtype": "float32"}


def made(chunks=2, pieces=3, **model):
    config = sudoku_dispo.llada_8b().to_dict()
    config |= {"rollout_chunks": chunks, "microbatches": pieces, "model": config["model"] | model}
    return recipe.build(config)


def result(program="update", peak=10e9, held=2e9, **more):
    given = {"hbm": CHIPS["v5e"].hbm, "arguments": held, "peak": peak, "fits": peak <= 14.4e9}
    return fit.Fit(program, "v5e-16", 16, dict(MESH.shape), 1, 60.0, **(given | more))


def advice(found, loop):
    return " | ".join(fit._changes(found, loop, MESH))


def test_too_much_memory_asks_for_more_pieces_of_the_right_number():
    assert "--config.microbatches=6" in advice(result(peak=20e9), made())
    assert "--config.rollout_chunks=2" in advice(result("rollout", 20e9), made(1))
    one_row = advice(result(peak=20e9), made(pieces=6))
    assert "larger slice" in one_row
    assert "larger slice" in advice(result("rollout", 20e9), made())  # 4 chunks of 24 are uneven
    assert "remat=full" in advice(result(peak=20e9), made(pieces=6, remat="none"))


def test_weights_that_do_not_fit_ask_for_chips_or_an_adapter():
    found = advice(result(peak=40e9, held=28.8e9), made(**FULL))
    assert "at least 32 such chips" in found
    assert "lora_rank=128" in found
    assert "beta=0 in every term" in found  # both terms keep a reference


def test_room_to_spare_asks_for_fewer_pieces_and_uneven_ones_are_named():
    assert advice(result(peak=10e9), made()) == ""
    assert "--config.microbatches=2: there is room" in advice(result(peak=3e9), made())
    assert "4 leaves 24 completions for 16 devices" in advice(result(), made(pieces=4))


def test_a_compiler_out_of_memory_is_a_result_and_anything_else_an_error():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.00G of 15.75G hbm."
    found = fit._refused(result(beside=1e9), text)
    assert found.peak == 40 * 2**30 + 1e9
    assert "Ran out of memory" in found.error
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    found = fit._refused(result(held=3e9), f"{text}temporaries (25.00G) exceeds available HBM.")
    assert found.peak == 25 * 2**30 + 3e9
    assert found.temporaries == 25 * 2**30
    with pytest.raises(RuntimeError, match="update does not compile for v5e-16: INTERNAL"):
        fit._refused(result(), "INTERNAL: no such thing")


def test_the_page_names_what_is_unknown(tmp_path):
    known = {"all-gather": hlo.Sent(3, 2e9)}
    fit_page.save(
        tmp_path / "s.json", "a:b", "abc1234", [result(collectives=known, unknown_loops=2)]
    )
    again = result(peak=20e9, change=("a larger slice",))
    fit_page.save(tmp_path / "s.json", "a:b", "abc1234", [again, result("rollout")])
    page = (tmp_path / "s.md").read_text()
    overview, details = page.split("\n## ", 1)
    assert details.count("| v5e-16 |") == 2  # the first result was replaced
    assert "collectives unknown" in details
    assert "| NO |" in details
    assert "| a:b | v5e-16 | 20.0 | 16 | NO |" in overview
    assert "  - a larger slice" in page
