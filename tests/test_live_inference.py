"""live_inference.py as a program: without a display, in a window (SDL's dummy driver), and its refusals."""

import re
from types import SimpleNamespace

import cv2
import numpy as np
import pygame
import pytest

import live_inference as live
from dataset.actions import MOVE_Z
from rollout.action_script import WALK, parse
from runtime.video import read_frames, video_fps


@pytest.fixture
def play(tiny, tmp_path, monkeypatch, capsys):
    """Runs live_inference.py in an empty folder without a display; gives (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")

    def play(*flags) -> tuple[int, str, str]:
        start = [] if "--start" in flags else ["--context_npz", tiny.tokens]
        status = live.main([*tiny.flags, *map(str, start), *map(str, flags)])
        return status, *capsys.readouterr()

    return play


def test_without_a_display_a_walk_is_written_to_a_video(play, tmp_path):
    status, out, _ = play()
    assert status == 0
    assert "no display (neither DISPLAY nor WAYLAND_DISPLAY is set)" in out
    assert "frames/s" in out and "p50" in out and "p95" in out
    assert len(re.findall(r"^first frame after \d+\.\d s$", out, re.M)) == 1
    frames = list(read_frames(tmp_path / "outputs" / "play.mp4"))
    assert len(frames) == len(parse(WALK)) and frames[0].shape == (64, 128, 3)
    assert video_fps(tmp_path / "outputs" / "play.mp4") == 16
    assert min(cv2.imread(str(tmp_path / "outputs" / "play_sheet.png")).shape[:2]) > 200


def test_headless_script(play, tmp_path):
    video = tmp_path / "walk.webm"
    status, out, _ = play("--headless", "--script", "w*3,jump", "--frames", 9, "--scale", 2, "--out", video)
    assert status == 0 and "no display" not in out
    frames = list(read_frames(video))
    assert len(frames) == 9 and frames[0].shape == (32, 64, 3)
    assert (tmp_path / "walk_sheet.png").is_file()


def test_a_rate_above_that_of_the_data_is_limited(play):
    _, out, _ = play("--script", "w*2", "--fps", 60)
    assert "more than the 16 frames/s of the data; using 16" in out


def test_refusals(play, tmp_path):
    for flags, part in (
        (["--script", "w*"], "character 3"),
        (["--out", "a.avi"], ".mp4, .webm or .gif"),
        (["--start", "gone.png"], "gone.png"),
        (["--checkpoint", "gone.pt"], "gone.pt"),
    ):
        status, _, err = play(*flags)
        assert status == 2 and part in err and err.count("error: ") == 1 and "Traceback" not in err


def test_no_start_is_overwritten(play, tmp_path):
    """--start photo.png --out photo.mp4 once wrote the contact sheet over the photo."""
    photo, sheet = tmp_path / "photo.png", tmp_path / "photo_sheet.png"
    for path in (photo, sheet):
        cv2.imwrite(str(path), np.zeros((16, 32, 3), np.uint8))
    before = photo.read_bytes()
    assert play("--start", photo, "--script", "w*2", "--out", tmp_path / "photo.mp4")[0] == 0
    assert photo.read_bytes() == before
    for start, out in ((sheet, "photo.mp4"), (tmp_path / "photo.mp4", "photo.mp4")):
        content = start.read_bytes()
        status, _, err = play("--start", start, "--script", "w*2", "--out", tmp_path / out)
        assert status == 2 and f"{start}: is read by this run" in err and start.read_bytes() == content


def test_the_whole_program_in_a_window(play, monkeypatch, tmp_path):
    """main() opens the window, plays by posted events and closes everything."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    clock = SimpleNamespace(time=100.0, sleeps=0)
    events = {
        3: (pygame.KEYDOWN, pygame.K_w),
        6: (pygame.KEYUP, pygame.K_w),
        8: (pygame.KEYDOWN, pygame.K_ESCAPE),
    }

    def sleep(seconds: float) -> None:
        clock.time += seconds
        clock.sleeps += 1
        if clock.sleeps in events:
            kind, key = events[clock.sleeps]
            pygame.event.post(pygame.event.Event(kind, key=key, mod=0, unicode="", scancode=0))

    step_clock, moves = live.StepClock, []
    monkeypatch.setattr(live, "StepClock", lambda fps: step_clock(fps, lambda: clock.time, sleep))
    step = live.Session.step
    monkeypatch.setattr(live.Session, "step", lambda self, a: (moves.append(a[MOVE_Z]), step(self, a))[1])
    status, out, _ = play("--warmup", 1)
    assert status == 0 and "no display" not in out and out.count("first frame after") == 1
    assert moves == [0, 1, 1, 1, 0, 0]  # the first wait shows the start picture; the eighth quits
    assert not pygame.display.get_init() and not pygame.font.get_init()
    assert not pygame.mixer.get_init()  # no sound system was started
    assert not (tmp_path / "outputs").exists()


def test_a_display_that_cannot_be_opened_is_named(play, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "no_such_driver")
    status, out, _ = play("--scale", 1)
    assert status == 0 and "no display (pygame: " in out
