"""The short form of `make soak`."""

import asyncio
import json

import pytest
import soak

from live_inference import load_session, parse_config


@pytest.fixture
def session(tiny, tmp_path):
    words = [*tiny.flags, "--context_npz", str(tiny.tokens), str(tiny.tokens)]
    session = load_session(parse_config(words), only_first=False)
    session.out = tmp_path / "play"
    return session


def test_play_is_flat(session, tmp_path):
    rows = soak.play(session, steps=2_000, next_steps=300)
    assert len(rows) == soak.SAMPLES and rows[-1]["step"] == 2_000 and session.restarts == 7
    assert soak.growth(rows) < soak.LIMIT
    assert soak.report(tmp_path / "soak", rows, "step", {"what": "2000 steps"}) == 0
    assert (tmp_path / "soak.png").is_file()
    assert json.loads((tmp_path / "soak.json").read_text())["rows"] == rows


def test_growth_is_seen():
    rows = [{"memory_mb": 100 + max(0, n - 100) / 20} for n in range(400)]
    assert soak.growth(rows) == pytest.approx(0.1495)
    assert soak.growth([{"memory_mb": 50}] * 5 + [{"memory_mb": 100}] * 395) == 0  # of the start


def test_the_page_outlives_a_player_that_never_reads(session, monkeypatch):
    monkeypatch.setattr(soak, "HALF_SENT", 20)
    rows, found = asyncio.run(soak.page(session, 16, seconds=6))
    assert found["steps for it"] > 3 and found["frames of the player that reads"] > 3
    assert soak.growth(rows) < soak.LIMIT
