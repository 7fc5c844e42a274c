"""Every number of a config has a range, and what is outside is refused by its name."""

import copy
import math
from pathlib import Path

import pytest

from basis_jax import command_line
from basis_jax.config import Config
from basis_jax.opening.ranges import RANGES, Range, check_ranges, numbers

CONFIG = Config(run_dir="runs/x")
FIELDS = {name: kind for name, kind, _ in numbers(CONFIG)}


def changed(name, value):
    """The config with this value, as a user's file may give it: no types are checked there."""
    config, (*sections, field) = copy.deepcopy(CONFIG), name.split(".")
    part = getattr(config, sections[0]) if sections else config
    object.__setattr__(part, field, value)
    return config


def test_the_table_has_every_number_and_nothing_else():
    assert RANGES.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -2, True, "1", None])
def test_what_is_no_number_in_its_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*; give "):
        check_ranges(changed(name, value))


@pytest.mark.parametrize("name", [name for name, kind in FIELDS.items() if kind is int])
def test_whole_numbers_are_whole(name):
    with pytest.raises(ValueError, match=f"{name} is 1.5; give a whole number"):
        check_ranges(changed(name, 1.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32),  # 4294967297 was the same as 1
        ("sampling.temperature", 1e-30),
        ("eval.temperature", 1e-30),
        ("optim.b1", 1.0),
        ("optim.b2", 1.0),
        ("optim.eps", 0.0),
        ("sampling.top_p", 0.0),
        ("sampling.top_p", 1.5),
        ("loss.dual_clip", 1.0),
        ("loss.clip_low", 1.1),
        ("mesh.data", 0),
        ("watch.zero_share", 1.1),
        ("train.steps", 0),
    ],
)
def test_ends_that_do_not_belong(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        check_ranges(changed(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32 - 1),
        ("sampling.temperature", 0.01),
        ("eval.temperature", 0.0),
        ("optim.lr", 0.0),
        ("optim.b1", 0.0),
        ("loss.dual_clip", 0.0),
        ("loss.dual_clip", 1.01),
        ("mesh.data", -1),
        ("optim.lr", 1),  # a whole number is a number
    ],
)
def test_ends_that_belong(name, value):
    check_ranges(changed(name, value))


def test_every_config_is_in_range():
    for path in (Path(__file__).parent.parent / "configs").glob("*.py"):
        check_ranges(command_line.load_config(path))


def test_a_range_says_what_it_holds():
    assert str(Range(0, 1)) == "0 to 1"
    assert str(Range(0, 1, without=("low",))) == "more than 0 and at most 1"
    assert str(Range(0, 2**32 - 1)) == "0 to 4294967295"
    assert str(Range(0, 1, without=("high",))) == "0 or more and less than 1"
    assert str(Range(1)) == "1 or more"
    assert str(Range(0.01, 100, or_else=0)) == "0, or 0.01 to 100"
