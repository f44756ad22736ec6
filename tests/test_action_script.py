"""The script grammar: what it means, and that a slip is pointed at."""

import numpy as np
import pytest

from action_script import WALK, ScriptError, describe, fit, parse
from actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW


def test_segments_follow_each_other():
    actions = parse("w*32,yaw+0.5*16,idle*8")
    assert actions.shape == (56, 5) and actions.dtype == np.float32
    assert (actions[:32] == [0, 0, 0, 1, 0]).all()
    assert (actions[32:48] == [0.5, 0, 0, 0, 0]).all()
    assert (actions[48:] == 0).all()


@pytest.mark.parametrize(
    "text, action",
    [
        ("w", [0, 0, 0, 1, 0]),
        ("s", [0, 0, 0, -1, 0]),
        ("a", [0, 0, -1, 0, 0]),
        ("d", [0, 0, 1, 0, 0]),
        ("jump", [0, 0, 0, 0, 1]),
        ("idle", [0, 0, 0, 0, 0]),
        ("w+s", [0, 0, 0, 0, 0]),
        ("pitch-0.25", [0, -0.25, 0, 0, 0]),
        ("yaw-1", [-1, 0, 0, 0, 0]),
        ("yaw+.5", [0.5, 0, 0, 0, 0]),
        ("w+yaw+0.5+jump+pitch+0.25+d", [0.5, 0.25, 1, 1, 1]),
        (" w + yaw + 0.5 * 1 ", [0.5, 0, 0, 1, 0]),
    ],
)
def test_actions(text, action):
    assert parse(text).tolist() == [action]


@pytest.mark.parametrize(
    "text, place, problem",
    [
        ("", 1, "expected w, a, s, d"),
        ("w*8,yax+0.5*16", 5, 'found "yax+0.5*16"'),
        ("w,", 3, "found the end"),
        ("w+", 3, "found the end"),
        ("w*", 3, "whole number of frames"),
        ("w*0", 3, "frames in all"),
        ("w*2.5", 3, "whole number of frames"),
        ("w*-2", 3, "whole number of frames"),
        ("w*999999,idle*999999", 15, "frames in all"),
        ("yaw*3", 4, "+ or - and a number after yaw"),
        ("idle,pitch+1.5", 11, "turn of 0 to 1"),
        ("w+w", 3, "given twice"),
        ("w*3 d", 5, 'expected "," or the end'),
        ("w d", 3, 'expected "+", "*", "," or the end'),
    ],
)
def test_errors_name_the_place(text, place, problem):
    with pytest.raises(ScriptError) as caught:
        parse(text)
    message = str(caught.value)
    assert f"character {place}:" in message and problem in message and "\n" not in message


def test_describe_is_read_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = np.concatenate(
            [rng.uniform(-1, 1, 2).round(2), rng.integers(-1, 2, 2), rng.integers(0, 2, 1)]
        )
        assert np.allclose(parse(describe(action)), action[None], atol=1e-6)


def test_the_walk_shows_everything_in_eight_to_ten_seconds():
    actions = parse(WALK)
    assert 8 * 16 <= len(actions) <= 10 * 16
    for axis in (YAW, PITCH, MOVE_X, MOVE_Z):
        assert actions[:, axis].min() < 0 < actions[:, axis].max()
    assert actions[:, JUMP].any() and (actions == 0).all(1).any()
    assert abs(actions[:, PITCH].sum()) < 1e-5  # ends looking straight ahead


def test_fit_cuts_and_repeats():
    actions = parse("w*2,s")
    assert fit(actions, 2).tolist() == actions[:2].tolist()
    assert fit(actions, 5).tolist() == [*actions.tolist(), *actions[:2].tolist()]
