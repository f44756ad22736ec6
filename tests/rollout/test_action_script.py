"""rollout/action_script.py: the grammar, and errors that name their position."""

import numpy as np
import pytest

from dataset.actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from rollout.action_script import WALK, ScriptError, describe, fit, parse, parse_lines, write_script


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
    "text, position, problem",
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
        ("(w", 3, 'expected "+", "*", "," or ")"'),
        ("(w,)", 4, "expected w, a, s, d"),
        ("w)", 2, 'expected "+", "*", "," or the end'),
        ("(w*2 d)", 6, 'expected "," or ")"'),
        ("((w*1000)*1000,d)", 17, "frames in all"),
        ("(w,d)*0", 7, "frames in all"),
        ("(w)*x", 5, "whole number of times"),
        ("(w)+d", 4, 'expected "," or the end'),
        ("[1,0,0,0]", 9, 'expected "," and a number for jump'),
        ("[1,0,x,0,0]", 6, "a number for move_x"),
        ("w,[0,1.5,0,0,0]", 6, "in -1..1 for pitch"),
        ("[0,0,0,0,0", 11, 'expected "]"'),
        ("[-\t1,0,0,0,0]", 2, "a number for yaw"),
        ("[nan,0,0,0,0]", 2, "a number for yaw"),
        ("w*" + "9" * 5000, 3, "whole number of frames"),
        ("(" * 5000, 17, "more than 16 nested groups"),
    ],
)
def test_errors_name_the_position(text, position, problem):
    with pytest.raises(ScriptError) as caught:
        parse(text)
    message = str(caught.value)
    assert f"character {position}:" in message and problem in message and "\n" not in message


def test_parse_inverts_describe():
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = np.concatenate(
            [rng.uniform(-1, 1, 2).round(2), rng.integers(-1, 2, 2), rng.integers(0, 2, 1)]
        )
        assert np.allclose(parse(describe(action)), action[None], atol=1e-6)


def test_the_walk_uses_every_axis_in_eight_to_ten_seconds():
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


def test_groups_repeat():
    assert np.array_equal(parse("(w*2,d)*3,(idle)"), parse("w*2,d,w*2,d,w*2,d,idle"))
    assert np.array_equal(parse("((a,d)*2,w) * 2"), parse("a,d,a,d,w,a,d,a,d,w"))


def test_vectors_are_action_vectors():
    assert parse("[0.5, -.25, 1, -1, 0]*2, w").tolist() == [[0.5, -0.25, 1, -1, 0]] * 2 + [[0, 0, 0, 1, 0]]
    assert parse("[1e-3,0,0,0,1]")[0, 0] == np.float32(1e-3)


def test_lines_are_read_as_they_arrive():
    given = []

    def lines():
        for line in ("# a walk", "", "w*2  # two steps", "[0,0,0,0,1]", "(a,d)"):
            given.append(line)
            yield line

    read = parse_lines(lines(), "here")
    assert next(read)[MOVE_Z] == 1 and len(given) == 3
    assert next(read)[MOVE_Z] == 1 and len(given) == 3
    assert [action.tolist() for action in read] == [[0, 0, 0, 0, 1], [0, 0, -1, 0, 0], [0, 0, 1, 0, 0]]
    with pytest.raises(ScriptError, match='here, line 3: action script "w,fly", character 3'):
        list(parse_lines(["w", "", "w,fly"], "here"))
    with pytest.raises(ScriptError, match="here, line 1: .* character 5"):
        list(parse_lines(["  w,fly"], "here"))  # counted from the start of the line


def test_written_scripts_are_read_back_bit_for_bit():
    rng = np.random.default_rng(0)
    wild = np.concatenate([rng.uniform(-1, 1, (20, 2)), rng.integers(-1, 2, (20, 3))], 1).astype(np.float32)
    wild[:, JUMP] = np.abs(wild[:, JUMP])
    wild[3, YAW] = 1e-7
    wild[4], wild[5] = [-0.0, 0, 0, 0, 0], 0
    actions = np.concatenate([parse(WALK), wild, wild[-1:], wild[-1:]])
    written = write_script(actions)
    assert np.stack(list(parse_lines(written.splitlines(), "here"))).tobytes() == actions.tobytes()
    lines = written.splitlines()
    assert lines[0] == "w*24" and lines[-1].endswith("]*3") and len(lines) < len(actions) - 80
