"""live_inference.py: what reaches the model from keys and mouse, the clock, the window (SDL dummy driver),
and play without a display."""

import json
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pygame
import pytest
import torch

import live_inference as live
from dataset.actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from dataset.recordings import find_clips, plan_gamefactory
from dataset.token_files import Manifest
from playing import overlay
from playing.bindings import COMMANDS, CONTROLS, VIEW_COMMANDS
from playing.overlay import beliefs
from rollout.action_script import WALK, parse
from rollout.context import decode, load_recording, load_world, read_track, rollout_of, starts
from runtime.video import read_frames, read_image, video_fps

FPS = 16.0
SENS = 0.15


class FakeTime:
    """A clock that moves only when somebody sleeps or works."""

    def __init__(self):
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def session(tiny, tmp_path):
    """A session on the tiny world, whose model notes the actions that reach it in `session.seen`."""
    return make_session(tiny.flags, [tiny.tokens, tiny.tokens], tmp_path)


def make_session(flags: list[str], tokens: list, out) -> live.Session:
    """A session as live_inference.py makes it; `session.seen` notes the actions that reach the model."""
    args = live.build_parser().parse_args([*flags, "--context_npz", *map(str, tokens)])
    world = load_world(args)
    places = [load_recording(path, world) for path in starts(args)]
    session = live.Session(world, rollout_of(world, args), places, args.context_frames, out / "play")
    session.seen = []
    predict = session.rollout.predict

    def spy(actions):
        session.seen.append(actions[0].tolist())
        return predict(actions)

    session.rollout.predict = spy
    return session


@pytest.fixture
def window(session, monkeypatch):
    """The real window on SDL's dummy driver, past its first picture, with a fake clock."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    time = FakeTime()
    clock = live.StepClock(FPS, time.now, time.sleep)
    window = live.Window(session, live.Controls(FPS, 15.0, SENS), clock, scale=8)
    assert window.tick()
    window.note_until = 0.0  # the message of the start
    yield window
    window.close()


def post(kind: int, **values) -> None:
    pygame.event.post(pygame.event.Event(kind, **values))


def key(kind: int, code: int) -> None:
    post(kind, key=code, mod=0, unicode="", scancode=0)


def click() -> None:
    post(pygame.MOUSEBUTTONDOWN, button=1, pos=(10, 10), touch=False)


def move(right: int, down: int) -> None:
    post(pygame.MOUSEMOTION, rel=(right, down), pos=(10, 10), buttons=(0, 0, 0), touch=False)


def test_held_keys_reach_the_model_until_let_go(window, session):
    key(pygame.KEYDOWN, pygame.K_w)
    for _ in range(3):
        assert window.tick()
    key(pygame.KEYDOWN, pygame.K_d)
    key(pygame.KEYDOWN, pygame.K_SPACE)
    window.tick()
    key(pygame.KEYUP, pygame.K_w)
    key(pygame.KEYUP, pygame.K_SPACE)
    window.tick()
    key(pygame.KEYUP, pygame.K_d)
    window.tick()
    assert [[a[MOVE_X], a[MOVE_Z], a[JUMP]] for a in session.seen] == [
        [0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0],
    ]  # fmt: skip


def test_all_keys(window, session):
    for code, axis, value in (
        (pygame.K_w, MOVE_Z, 1),
        (pygame.K_s, MOVE_Z, -1),
        (pygame.K_a, MOVE_X, -1),
        (pygame.K_d, MOVE_X, 1),
        (pygame.K_SPACE, JUMP, 1),
        (pygame.K_LEFT, YAW, -90 / FPS / 15),
        (pygame.K_RIGHT, YAW, 90 / FPS / 15),
        (pygame.K_UP, PITCH, -90 / FPS / 15),
        (pygame.K_DOWN, PITCH, 90 / FPS / 15),
    ):
        key(pygame.KEYDOWN, code)
        window.tick()
        key(pygame.KEYUP, code)
        expected = np.zeros(5)
        expected[axis] = value
        assert np.allclose(session.seen[-1], expected), pygame.key.name(code)


def test_a_tap_shorter_than_a_step_counts_once(window, session):
    key(pygame.KEYDOWN, pygame.K_SPACE)
    key(pygame.KEYUP, pygame.K_SPACE)
    window.tick()
    window.tick()
    assert [a[JUMP] for a in session.seen] == [1, 0]


def test_mouse_pixels_become_degrees(window, session):
    move(50, 0)  # not captured: does nothing
    window.tick()
    click()
    move(20, -8)
    move(10, 0)
    window.tick()
    window.tick()
    assert window.captured
    assert session.seen[0] == [0] * 5
    assert np.allclose(session.seen[1], [30 * SENS / 15, -8 * SENS / 15, 0, 0, 0])
    assert session.seen[2] == [0] * 5


def test_a_fast_hand_turns_as_far_over_more_steps(window, session):
    click()
    move(250, 0)  # 37.5 degrees, 2.5 units
    for _ in range(4):
        window.tick()
    assert np.allclose([a[YAW] for a in session.seen], [1, 1, 0.5, 0])


def test_the_view_stops_soon_after_a_wild_hand():
    controls = live.Controls(FPS)
    controls.look(-1e6, 0)
    turned = [controls.take_action()[YAW] for _ in range(10)]
    assert turned == [-1] * controls.CARRY_STEPS + [0] * (10 - controls.CARRY_STEPS)


def test_other_units_of_the_data():
    controls = live.Controls(8.0, degrees_per_unit=30.0, degrees_per_pixel=0.3)
    controls.look(10, 20)
    assert np.allclose(controls.take_action()[:2], [0.1, 0.2])


def test_escape_frees_the_mouse_then_quits(window, session):
    click()
    move(500, 0)
    assert window.tick() and window.captured
    key(pygame.KEYDOWN, pygame.K_ESCAPE)
    assert window.tick() and not window.captured
    assert session.seen[-1][YAW] == 0  # what the hand still asked for is dropped
    key(pygame.KEYDOWN, pygame.K_ESCAPE)
    steps = len(session.seen)
    assert not window.tick()
    assert len(session.seen) == steps


def test_closing_the_window_quits(window):
    post(pygame.QUIT)
    assert not window.tick()


def test_no_mouse(window, session):
    window.use_mouse = False
    click()
    move(50, 50)
    window.tick()
    assert not window.captured and session.seen == [[0] * 5]


def test_losing_the_focus_lets_go_of_everything(window, session):
    click()
    key(pygame.KEYDOWN, pygame.K_w)
    window.tick()
    post(pygame.WINDOWFOCUSLOST)
    window.tick()
    assert not window.captured
    assert [a[MOVE_Z] for a in session.seen] == [1, 0]


def test_reset_brings_back_the_primed_state(window, session):
    rollout = session.rollout
    primed = rollout.state.clone(), rollout.tokens.clone(), session.picture.copy()

    def five_steps() -> list:
        return [(window.tick(), rollout.tokens.clone())[1] for _ in range(5)]

    first = five_steps()
    assert not torch.equal(rollout.state, primed[0])
    key(pygame.KEYDOWN, pygame.K_r)
    window.tick()
    assert torch.equal(rollout.state, primed[0]) and torch.equal(rollout.tokens, primed[1])
    assert np.array_equal(session.picture, primed[2])
    assert all(torch.equal(a, b) for a, b in zip(first, five_steps(), strict=True))  # the seed too


def test_the_state_persists_from_step_to_step(window, session):
    states = []
    for _ in range(3):
        window.tick()
        states.append(session.rollout.state.clone())
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_the_picture_has_sharp_pixels(window, session):
    """Away from what is written over it, each pixel of the world is a square of 8x8 equal pixels."""
    window.tick()
    screen = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    assert screen.shape == (16 * 8, 32 * 8, 3)
    large = session.picture.repeat(8, 0).repeat(8, 1)
    assert np.array_equal(screen[:64, 64:160], large[:64, 64:160])


def test_keys_light_up(window):
    def lit() -> int:
        screen = pygame.surfarray.array3d(pygame.display.get_surface())
        return int((screen == np.array(window.LIT)).all(-1).sum())

    assert lit() == 0
    key(pygame.KEYDOWN, pygame.K_w)
    window.tick()
    one = lit()
    key(pygame.KEYDOWN, pygame.K_SPACE)
    window.tick()
    assert 0 < one < lit()


def test_a_resized_window_keeps_whole_pixels(window, session):
    pygame.display.set_mode((32 * 6 + 5, 16 * 9), pygame.RESIZABLE)
    window.tick()
    screen = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    top, left = (16 * 9 - 16 * 6) // 2, 5 // 2
    large = session.picture.repeat(6, 0).repeat(6, 1)
    assert np.array_equal(screen[top : top + 20, left : left + 60], large[:20, :60])
    assert not screen[:top].any()


def tap(code: int) -> None:
    key(pygame.KEYDOWN, code)
    key(pygame.KEYUP, code)


def press(window, code: int) -> None:
    """A tap, and the step after it."""
    tap(code)
    assert window.tick()


def test_every_binding_is_a_key_once():
    bindings = (*CONTROLS, *COMMANDS, *VIEW_COMMANDS)
    for names in ([b.key for b in bindings], [b.code for b in bindings], [b.does for b in bindings]):
        assert len(set(names)) == len(names)
    assert all(hasattr(pygame, f"K_{b.key}") for b in bindings)


def test_places(window, session, tiny):
    second = load_recording(tiny.tokens, session.world)
    session.places[1] = second.first(20)  # its context ends elsewhere
    session.places[1] = type(second)("other.npz", second.tokens[5:], second.actions[5:])
    start = session.picture.copy()
    session.reset()
    assert np.array_equal(session.picture, start)
    window.tick()
    press(window, pygame.K_n)
    assert session.place == 1 and session.steps == 0 and not np.array_equal(session.picture, start)
    assert "place 2 of 2: other" in window.note
    press(window, pygame.K_1)
    assert session.place == 0 and np.array_equal(session.picture, start)
    press(window, pygame.K_n)
    press(window, pygame.K_n)
    assert session.place == 0
    press(window, pygame.K_7)
    assert session.place == 0 and window.note == "there are 2 places"


def test_pause_and_single_steps(window, session):
    window.tick()
    press(window, pygame.K_p)
    window.tick()
    assert len(session.seen) == 1 and session.paused
    press(window, pygame.K_PERIOD)
    assert len(session.seen) == 2
    window.tick()
    assert len(session.seen) == 2
    press(window, pygame.K_p)
    assert len(session.seen) == 3
    press(window, pygame.K_PERIOD)  # pauses, and makes one step
    window.tick()
    assert len(session.seen) == 4 and session.paused


def test_enter_dreams_another_dream_and_r_the_first_again(window, session):
    def rollout() -> torch.Tensor:
        return torch.cat([(window.tick(), session.rollout.tokens)[1] for _ in range(3)])

    first = rollout()
    press(window, pygame.K_RETURN)
    other = rollout()
    press(window, pygame.K_r)
    again = rollout()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_choice_changes_while_playing(window, session):
    def chosen():
        return session.rollout.sampling

    temperature, passes = chosen().temperature, chosen().passes
    press(window, pygame.K_RIGHTBRACKET)
    assert chosen().temperature == pytest.approx(temperature + 0.1)
    for _ in range(30):
        press(window, pygame.K_LEFTBRACKET)
    assert chosen().temperature == pytest.approx(0.1)  # never 0
    press(window, pygame.K_EQUALS)
    assert chosen().passes == passes + 1
    for _ in range(5):
        press(window, pygame.K_MINUS)
    assert chosen().passes == 1
    press(window, pygame.K_g)
    assert chosen().greedy and window.note == "greedy"
    press(window, pygame.K_g)
    assert not chosen().greedy and "1 passes" in window.note


def test_compare_plays_the_recorded_actions_beside_the_truth(window, session):
    press(window, pygame.K_c)
    assert session.compare and session.steps == 0
    recording = session.recording
    session.seen.clear()
    key(pygame.KEYDOWN, pygame.K_w)  # does not count
    for step in range(24):  # all that was recorded after 16 frames
        window.tick()
        assert np.allclose(session.seen[-1], recording.actions[15 + step])
        truth = decode(recording.tokens[16 + step : 17 + step], session.world)[0].numpy()
        assert np.array_equal(session.truth, truth)
    screen = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    both = np.concatenate([session.truth, session.picture], 1).repeat(4, 0).repeat(4, 1)
    assert np.array_equal(screen[40:60, 60:200], both[8:28, 60:200])  # 32 rows of black above
    window.tick()
    assert session.steps == 0 and len(session.seen) == 24  # over: from the start
    press(window, pygame.K_c)
    window.tick()
    assert session.truth is None and session.seen[-1][MOVE_Z] == 1


def test_nothing_to_compare_with(session):
    session.context_frames = 0
    session.reset()
    assert "nothing to compare" in session.command("compare") and not session.compare


def test_facts_are_those_of_the_steps(session):
    right = np.array([0.4, -0.2, 0, 1, 0], np.float32)
    for _ in range(3):
        session.step(right)
    facts = session.facts()
    assert facts["step"] == 3 and facts["place"] == "clip"
    assert facts["yaw"] == pytest.approx(18) and facts["pitch"] == pytest.approx(-9)
    assert facts["unique_codes"] == len(session.rollout.tokens.unique())
    assert facts["position"] == []  # this world keeps none
    parts = sum(facts[f"{part}_ms"] for part in ("model", "sampling", "decode"))
    assert 0 < parts and facts["step_ms"] == pytest.approx(parts, rel=0.5)
    assert json.loads(json.dumps(facts)) == facts


def test_what_is_written_over_the_picture(window, session):
    def changed(code: int) -> int:
        """Pixels that a key changes; nothing moves."""
        before = pygame.surfarray.array3d(pygame.display.get_surface())
        press(window, code)
        window.note_until = 0.0
        window.draw()
        return int((pygame.surfarray.array3d(pygame.display.get_surface()) != before).any(-1).sum())

    press(window, pygame.K_p)
    window.note_until = 0.0
    window.draw()
    for code in (pygame.K_h, pygame.K_F3, pygame.K_F4):
        assert changed(code) > 500 and changed(code) > 500, pygame.key.name(code)

    def blocks() -> bool:
        """Whether the middle of the screen is made of squares of 8x8 equal pixels."""
        middle = pygame.surfarray.array3d(pygame.display.get_surface())[64:160, 16:48]
        return np.array_equal(middle, middle[::8, ::8].repeat(8, 0).repeat(8, 1))

    assert blocks()
    assert changed(pygame.K_F5) > 1000 and not blocks()


def test_full_screen_and_back(window):
    size = pygame.display.get_surface().get_size()
    press(window, pygame.K_F11)
    assert pygame.display.get_surface().get_flags() & pygame.FULLSCREEN
    press(window, pygame.K_F11)
    assert not pygame.display.get_surface().get_flags() & pygame.FULLSCREEN
    assert pygame.display.get_surface().get_size() == size


def test_screenshot(window, session):
    window.tick()
    shown = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    tap(pygame.K_F12)
    window.tick()
    (path,) = session.out.glob("*.png")
    assert np.array_equal(read_image(path), shown) and str(path) in window.note


def test_a_recording_of_play_is_a_clip_that_plays_again(window, session, tiny):
    press(window, pygame.K_v)
    key(pygame.KEYDOWN, pygame.K_w)
    click()
    for right in (20, -7, 3):
        move(right, 2)
        window.tick()
    press(window, pygame.K_v)
    (video,) = (session.out / "video").glob("*.mp4")
    assert str(video) in window.note and video_fps(video) == 16
    actions, pose = read_track(video)
    # The step that was begun with V is the first; the one that ended it is in no clip.
    assert np.allclose(actions, session.seen[:4]) and len(list(read_frames(video))) == 5
    assert np.allclose(pose[-1, 3:], session.turned - np.array(session.seen[4][:2]) * 15, atol=1e-4)
    again = load_recording(video, session.world)
    assert np.allclose(again.actions.numpy(), actions) and len(again) == 5
    (clip,) = find_clips(session.out, "auto", session.out)[1]
    assert len(plan_gamefactory(clip, Manifest.load(tiny.tokens.parent)).frames) == 5


def test_starting_over_ends_a_recording_of_play(window, session):
    press(window, pygame.K_v)
    window.tick()
    press(window, pygame.K_r)
    assert session.take is None and len(list((session.out / "video").glob("*.mp4"))) == 1
    assert not list((session.out / "video").glob(".*"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A session on the world and the places that ship."""
    args = live.build_parser().parse_args(["--device", "cpu"])
    world = load_world(args)
    places = [load_recording(path, world) for path in starts(args)]
    return live.Session(world, rollout_of(world, args), places, 16, tmp_path_factory.mktemp("play"))


def test_what_a_world_with_a_memory_believes(shipped):
    shipped.command("place 1")
    assert beliefs(shipped) is None  # no step yet
    for _ in range(6):
        shipped.step(np.array([0.8, 0, 0, 1, 0], np.float32))
    picture = beliefs(shipped)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    rows = slice(-18 * 4, None)  # the panel that says where cells come from
    red = picture[rows, -32 * 4 :, 0] > picture[rows, -32 * 4 :, 1:].max(-1)
    invented = shipped.prediction.trusted[0].any(0).logical_not().numpy().repeat(4, 0).repeat(4, 1)
    assert np.array_equal(red, invented) and 0 < invented.sum() < invented.size
    observed = (picture == np.array(overlay.OBSERVED)).all(-1).sum()
    assert observed > 0
    facts = shipped.facts()
    assert len(facts["position"]) == 3 and facts["yaw"] != 0


@pytest.mark.parametrize("work", [0.0, 0.01, 0.05, 0.0624, 0.07, 0.3])
def test_the_clock_is_never_faster_than_the_data(work):
    time = FakeTime()
    clock = live.StepClock(FPS, time.now, time.sleep)
    rng = np.random.default_rng(0)
    last = begin = time.now()
    for step in range(1, 200):
        clock.wait()
        assert step <= (time.now() - begin) * FPS + 1e-6
        assert time.now() - last >= 0.5 / FPS - 1e-9
        last = time.now()
        time.time += work * rng.uniform(0.5, 1.0) + (1.0 if step == 100 else 0.0)  # once, a long hiccup
    assert clock.rate <= FPS + 1e-6
    assert clock.too_slow == (work * 0.75 > 1.05 / FPS)
    if not clock.too_slow:
        assert clock.rate == pytest.approx(FPS, rel=0.01)


def test_too_slow_is_said_once(window, capsys):
    slow = window.session.step

    def step(action):
        window.clock.sleep(0.1)
        return slow(action)

    window.session.step = step
    for _ in range(60):
        window.tick()
    out = capsys.readouterr().out
    assert out.count("too slow for 16 steps/s") == 1 and "this machine makes 10." in out


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


def test_without_a_display_a_walk_is_played_into_a_video(play, tmp_path):
    status, out, _ = play()
    assert status == 0
    assert "no display (neither DISPLAY nor WAYLAND_DISPLAY is set)" in out
    assert "frames/s" in out and "p50" in out and "p95" in out
    assert len(re.findall(r"^first frame after \d+\.\d s$", out, re.M)) == 1
    frames = list(read_frames(tmp_path / "outputs" / "play.mp4"))
    assert len(frames) == len(parse(WALK)) and frames[0].shape == (64, 128, 3)
    assert video_fps(tmp_path / "outputs" / "play.mp4") == 16
    assert min(cv2.imread(str(tmp_path / "outputs" / "play.png")).shape[:2]) > 200


def test_headless_script(play, tmp_path):
    out = tmp_path / "walk.webm"
    status, said, _ = play("--headless", "--script", "w*3,jump", "--frames", 9, "--scale", 2, "--out", out)
    assert status == 0 and "no display" not in said
    frames = list(read_frames(out))
    assert len(frames) == 9 and frames[0].shape == (32, 64, 3)
    assert (tmp_path / "walk.png").is_file()


def test_a_rate_above_the_data_is_not_taken(play):
    _, out, _ = play("--script", "w*2", "--fps", 60)
    assert "goes no faster" in out


def test_refusals(play, tmp_path):
    for flags, part in (
        (["--script", "w*"], "character 3"),
        (["--out", "a.avi"], ".mp4, .webm or .gif"),
        (["--start", "gone.png"], "gone.png"),
        (["--checkpoint", "gone.pt"], "gone.pt"),
    ):
        status, _, err = play(*flags)
        assert status == 2 and part in err and err.count("error: ") == 1 and "Traceback" not in err


def test_the_whole_program_in_a_window(play, monkeypatch, tmp_path):
    """main() opens the window, plays by posted events and leaves nothing behind."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    time = FakeTime()
    script = {
        3: lambda: key(pygame.KEYDOWN, pygame.K_w),
        6: lambda: key(pygame.KEYUP, pygame.K_w),
        8: lambda: key(pygame.KEYDOWN, pygame.K_ESCAPE),
    }
    sleeps = SimpleNamespace(n=0)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        sleeps.n += 1
        script.get(sleeps.n, lambda: None)()

    real, seen = live.StepClock, []
    monkeypatch.setattr(live, "StepClock", lambda fps: real(fps, time.now, sleep))
    step = live.Session.step
    monkeypatch.setattr(live.Session, "step", lambda self, a: (seen.append(a[MOVE_Z]), step(self, a))[1])
    status, out, _ = play("--warmup", 1)
    assert status == 0 and "no display" not in out and out.count("first frame after") == 1
    assert seen == [0, 1, 1, 1, 0, 0]  # the first wait shows the start; the eighth quits
    assert not pygame.display.get_init() and not pygame.font.get_init()
    assert not pygame.mixer.get_init()  # no sound system was started
    assert not (tmp_path / "outputs").exists()


def test_a_display_that_cannot_be_opened(play, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "no_such_driver")
    status, out, _ = play("--scale", 1)
    assert status == 0 and "no display (pygame: " in out
