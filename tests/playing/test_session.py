"""playing/session.py: statistics, commands without effect."""

import errno
import json

import numpy as np
import pytest
import torch
from play_session import make_session

from playing.bindings import COMMANDS
from playing.session import FADE_STEPS, MAX_PASSES


@pytest.fixture
def session(tiny, tmp_path):
    return make_session(tiny, tmp_path / "play")


def test_stats_are_those_of_the_steps(session):
    action = np.array([0.4, -0.2, 0, 1, 0], np.float32)
    for _ in range(3):
        session.step(action)
    stats = session.stats()
    assert stats["step"] == 3 and stats["start_place"] == "clip"
    assert stats["yaw"] == pytest.approx(18) and stats["pitch"] == pytest.approx(-9)
    assert stats["unique_codes"] == len(session.rollout.tokens.unique())
    assert stats["position"] == []  # the baseline has no pose
    assert json.loads(json.dumps(stats)) == stats
    assert len(session.seconds) == 3 and min(session.seconds[0]) > 0
    session.seconds = [(0.001, 0.002, 0.003), (0.002, 0.003, 0.004), (0.003, 0.004, 0.005)]
    shown = {name: value for name, value in session.stats().items() if name.endswith("_ms")}
    assert shown == {"step_ms": 9, "model_ms": 2, "sampling_ms": 3, "decode_ms": 4}


def test_compare_is_refused_without_recorded_actions(session):
    session.context_frames = 0
    session.restart()
    assert "nothing to compare" in session.command("compare") and not session.compare


def test_every_command_of_the_key_map_has_a_message(session):
    for binding in COMMANDS:
        assert session.command(binding.name), binding.name
    with pytest.raises(ValueError, match="no command 'quit'"):
        session.command("quit")


def test_sampling_stays_within_its_limits(session):
    for _ in range(2 * MAX_PASSES):
        session.command("more passes")
    assert session.rollout.sampling.passes == MAX_PASSES
    assert session.sampling_label == f"temperature 1, passes {MAX_PASSES}"


def test_a_recording_that_cannot_be_written_is_reported_and_play_goes_on(session, tmp_path):
    session.out = tmp_path / "file"
    session.out.write_text("not a folder")
    for command in ("record", "record"):
        message = session.command(command)
        assert message.startswith("not recording: ") and "a part of the path is a file" in message
    assert "cannot be written" in session.screenshot() and session.recorder is None

    session.out = tmp_path / "play"
    assert session.command("record").startswith("recording ")

    session.recorder.writer.writer.sink.error = OSError(errno.ENOSPC, "No space left on device")
    session.step(np.zeros(5, np.float32))
    notice = session.take_notices()
    assert notice.startswith("recording dropped: ") and "No space left on device; free some space" in notice
    assert session.recorder is None and session.steps == 1 and session.take_notices() == ""
    session.step(np.zeros(5, np.float32))
    assert session.steps == 2 and not any(tmp_path.glob("play/*/.*"))

    session.command("record")
    session.command("restart")  # ends the recording
    assert session.take_notices().startswith("wrote ")
    session.command("record")
    (tmp_path / "play" / "metadata").rename(tmp_path / "moved")
    (tmp_path / "play" / "metadata").write_text("a file in the way")
    assert session.command("record").startswith("recording dropped: ")
    assert len(list(tmp_path.glob("play/video/*"))) == 1  # that of the recording before


WALK, IDLE = np.array([0, 0, 0, 1, 0], np.float32), np.zeros(5, np.float32)


def lose_detail(session, after: int) -> None:
    """From so many steps on each picture is one code; before, it has the detail of the recording."""
    sample, detailed, first = session.rollout.sample, session.rollout.tokens.clone(), session.steps

    def spoil(prediction):
        sample(prediction)
        lost = session.recovery.step >= after and session.steps - first < 3 * after
        session.rollout.tokens = torch.zeros_like(detailed) if lost else detailed.clone()

    session.rollout.sample = spoil


def test_a_picture_without_detail_fades_back_to_the_last_good_one(session):
    lose_detail(session, after=60)
    start = session.picture.copy()  # as the good ones
    while not session.fade:
        session.step(WALK)
    assert 60 < session.steps <= 60 + 16 and len(session.fade) == FADE_STEPS
    assert not np.array_equal(session.picture, start)
    turned = session.turned.copy()
    distances = [np.abs(session.step(WALK).astype(int) - start).mean() for _ in range(FADE_STEPS)]
    assert distances == sorted(distances, reverse=True) and distances[-1] == 0
    assert session.recovery.step < 60 and np.array_equal(session.turned, turned)
    session.step(WALK)
    assert session.recovery.step > 0 and not session.fade


def test_the_player_is_told_and_a_recording_of_play_ends(session):
    session.command("record")
    lose_detail(session, after=60)
    for _ in range(60 + 16):
        session.step(WALK)
    notice = session.take_notices()
    assert "wrote " in notice and "had lost its detail: back to where it was " in notice
    assert session.recorder is None


@pytest.mark.parametrize("reason", ["the player stands still", "it is turned off", "compare"])
def test_nothing_is_interrupted(session, reason):
    session.recover = reason != "it is turned off"
    if reason == "compare":
        session.command("compare")
    lose_detail(session, after=2)
    for _ in range(23):
        session.step(IDLE if "still" in reason else WALK)
    assert not session.fade and session.take_notices() == "" and session.steps == 23


def test_going_back_takes_the_turned_angle_back(session):
    lose_detail(session, after=1000)
    for _ in range(50):
        session.step(np.array([0.4, 0, 0, 0, 0], np.float32))
    session.command("go back")
    assert session.turned[0] == pytest.approx(session.recovery.step * 6) and session.recovery.step < 30


def test_while_paused_the_good_picture_comes_at_once(session):
    lose_detail(session, after=5)
    start = session.picture.copy()
    for _ in range(10):
        session.step(WALK)
    session.command("pause")
    assert session.command("go back").startswith("back to where it was")
    assert np.array_equal(session.picture, start) and not session.fade


def test_no_inset_without_recorded_frames(session):
    session.context_frames = 0
    session.restart()
    assert "nothing to show" in session.command("inset") and not session.inset
