"""Options of decoding as a command line gives them."""

import pytest

from dmrl import generation
from dmrl.diffusion.sampler import Sampling

OWN = Sampling(length=16, steps=8, block_length=8, temperature=0.5)


def test_what_is_not_asked_for_is_the_runs():
    assert generation.sampling(OWN, None, None, None, 0.0).steps == 8
    assert generation.sampling(OWN, 64, None, None, 0.0) == Sampling(64, 32, 32)
    assert generation.sampling(None, None, None, None, 1.0) == Sampling(256, 128, 32, 1.0)


def test_another_length_keeps_the_runs_rules():
    own = Sampling(16, 16, 8, 0.5, "margin", 0.0, "cosine", 0.9, "rcr")
    made = generation.sampling(own, 64, None, None, 0.0)
    assert made == Sampling(64, 32, 32, 0.0, "margin", 0.0, "cosine", 0.9, "rcr")
    assert generation.sampling(OWN, 100, 25, 20, 0.0) == Sampling(100, 25, 20)
    doubling = Sampling(16, 4, 16, schedule="doubling")
    with pytest.raises(ValueError, match="for length=64 set block_length=64 and steps=6"):
        generation.sampling(doubling, 64, None, None, 0.0)


def test_options_keep_the_kind_of_what_they_replace():
    made = generation.with_options(
        OWN, ["order=random", "steps=4", "top_p=0.9", "remask=remdm:0.2"]
    )
    assert (made.order, made.steps, made.top_p, made.remask) == ("random", 4, 0.9, "remdm:0.2")
    assert (made.length, made.temperature) == (OWN.length, OWN.temperature)
    assert generation.with_options(OWN, []) == OWN


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("ordre=random", "'ordre=random' is no KEY=VALUE with a key of length, steps"),
        ("order", "'order' is no KEY=VALUE"),
        ("steps=few", "steps='few' is no int"),
        ("steps=3", "steps=3 must be a multiple of the 2 block"),
        ("order=randon", "did you mean 'random'"),
    ],
)
def test_mistakes_in_options_are_told(option, message):
    with pytest.raises(ValueError, match=message):
        generation.with_options(OWN, [option])
