"""The table of slices and what a program's fit says about one."""

import math

import pytest

from dmrl import slices


@pytest.mark.parametrize("name", slices.SHAPES)
def test_shapes_have_as_many_chips_as_google_counts(name):
    kind, _, count = name.partition("-")
    cores = 1 if kind == "v5e" else 2
    assert math.prod(map(int, slices.SHAPES[name].split("x"))) * cores == int(count)
    assert kind in slices.CHIPS


def test_unknown_slices_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"no slice 'v5p-7': choose one of v4-8, .*cpu:N"):
        slices.find("v5p-7")
    with pytest.raises(ValueError, match="cpu:64: this process has"):
        slices.find("cpu:64")
    with pytest.raises(ValueError, match="number of simulated devices"):
        slices.find("cpu:many")
