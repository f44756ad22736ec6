"""playing/session.py: statistics, commands without effect."""

import json

import numpy as np
import pytest
from play_session import make_session

from playing.bindings import COMMANDS
from playing.session import MAX_PASSES


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
    parts = sum(stats[f"{part}_ms"] for part in ("model", "sampling", "decode"))
    assert 0 < parts and stats["step_ms"] == pytest.approx(parts, rel=0.5)
    assert json.loads(json.dumps(stats)) == stats


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
