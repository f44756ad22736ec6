"""Types of settings: what they allow, and how they say it."""

import argparse
import math
from typing import Annotated, get_type_hints

import pytest

from runtime import ranges
from runtime.ranges import OneOf, Range, describe_type, flag, problem
from training.train_config import TrainConfig


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        (ranges.Positive, [1, 10**9], [0, -1, 1.0, True, "1", None, 10**10]),
        (ranges.Share, [0, 0.0, 1.0, 1], [-0.1, 1.1, math.nan, math.inf, "x", True]),
        (ranges.PositiveNumber, [1e-9, 5], [0, -1.0, math.nan, math.inf]),
        (ranges.Odd, [1, 3, 99], [2, 0, 101, 1.0]),
        (ranges.PictureSide, [8, 72], [7, 10, 5000]),
        (Annotated[str, OneOf(("a", "b"))], ["a"], ["c", "", 1]),
        (Annotated[tuple, Range(4, multiple_of=4)], [(4,), (8, 12)], [(), (3,), ("x",), 4, (4, math.nan)]),
        (bool, [True, False], [1, "True"]),
        (str, ["", "x"], [1, None]),
    ],
)
def test_values_in_and_out_of_range(kind, right, wrong):
    assert [value for value in right if problem(value, kind)] == []
    assert [value for value in wrong if not problem(value, kind)] == []


def test_the_words_for_a_range():
    assert problem(0, ranges.Positive) == "a whole number, from 1 to 1,000,000,000"
    assert describe_type(ranges.Share) == "a number, from 0 to 1"
    assert describe_type(ranges.PositiveShare) == "a number, above 0 and at most 1"
    assert describe_type(ranges.Precision) == "one of auto, fp32, bf16, fp16"
    assert describe_type(int) == ""


def test_flags_refuse_what_is_out_of_range():
    assert flag(ranges.Port)("80") == 80 and flag(ranges.Share)("0.5") == 0.5
    for text in ("0", "99999", "x", "1.5", "9" * 6000):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number, from 1 to 65,535"):
            flag(ranges.Port)(text)


def test_every_number_of_a_training_run_has_a_range():
    kinds = get_type_hints(TrainConfig, include_extras=True)
    bare = [name for name, kind in kinds.items() if kind in (int, float)]
    assert not bare
    values = vars(TrainConfig())
    assert [name for name, kind in kinds.items() if problem(values[name], kind)] == []
