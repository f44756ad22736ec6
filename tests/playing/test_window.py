"""playing/window.py on SDL's dummy driver: input, commands and drawing."""

import numpy as np
import pygame
import pytest
import torch
from play_session import FPS, SENS, FakeTime, make_session

from dataset.actions import JUMP, MOVE_X, MOVE_Z, PITCH, YAW
from dataset.recordings import find_clips, plan_gamefactory
from dataset.token_files import Manifest
from playing.controls import Controls, StepClock
from playing.session import FADE_STEPS
from playing.window import Window
from rollout.context import decode, find_metadata, load_recording, read_metadata
from runtime.video import read_frames, read_image, video_fps


@pytest.fixture
def session(tiny, tmp_path):
    return make_session(tiny, tmp_path / "play")


@pytest.fixture
def window(session, monkeypatch):
    """A window that has shown its start picture, with a fake clock."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    time = FakeTime()
    clock = StepClock(FPS, time.now, time.sleep)
    window = Window(session, Controls(FPS, 15.0, SENS), clock, scale=8)
    assert window.tick()
    window.message_until = window.name_until = 0.0  # hides the message and the name of the start
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


def test_pressed_keys_reach_the_model_until_released(window, session):
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
    assert [[a[MOVE_X], a[MOVE_Z], a[JUMP]] for a in session.actions_given] == [
        [0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0],
    ]  # fmt: skip


def test_every_control_key_reaches_the_model(window, session):
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
        assert np.allclose(session.actions_given[-1], expected), pygame.key.name(code)


def test_a_tap_shorter_than_a_step_counts_once(window, session):
    key(pygame.KEYDOWN, pygame.K_SPACE)
    key(pygame.KEYUP, pygame.K_SPACE)
    window.tick()
    window.tick()
    assert [a[JUMP] for a in session.actions_given] == [1, 0]


def test_mouse_pixels_become_degrees(window, session):
    move(50, 0)  # not captured: does nothing
    window.tick()
    click()
    move(20, -8)
    move(10, 0)
    window.tick()
    window.tick()
    assert window.captured
    assert session.actions_given[0] == [0] * 5
    assert np.allclose(session.actions_given[1], [30 * SENS / 15, -8 * SENS / 15, 0, 0, 0])
    assert session.actions_given[2] == [0] * 5


def test_a_fast_mouse_turn_is_spread_over_steps(window, session):
    click()
    move(250, 0)  # 37.5 degrees, 2.5 units
    for _ in range(4):
        window.tick()
    assert np.allclose([a[YAW] for a in session.actions_given], [1, 1, 0.5, 0])


def test_escape_frees_the_mouse_then_quits(window, session):
    click()
    move(500, 0)
    assert window.tick() and window.captured
    key(pygame.KEYDOWN, pygame.K_ESCAPE)
    assert window.tick() and not window.captured
    assert session.actions_given[-1][YAW] == 0  # the pending turn is dropped
    key(pygame.KEYDOWN, pygame.K_ESCAPE)
    steps = len(session.actions_given)
    assert not window.tick()
    assert len(session.actions_given) == steps


def test_closing_the_window_quits(window):
    post(pygame.QUIT)
    assert not window.tick()


def test_without_the_mouse_nothing_is_captured(window, session):
    window.use_mouse = False
    click()
    move(50, 50)
    window.tick()
    assert not window.captured and session.actions_given == [[0] * 5]


def test_losing_the_focus_releases_everything(window, session):
    click()
    key(pygame.KEYDOWN, pygame.K_w)
    window.tick()
    post(pygame.WINDOWFOCUSLOST)
    window.tick()
    assert not window.captured
    assert [a[MOVE_Z] for a in session.actions_given] == [1, 0]


def test_restart_brings_back_the_primed_state(window, session):
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
    assert all(torch.equal(a, b) for a, b in zip(first, five_steps(), strict=True))  # with the same seed


def test_the_state_persists_from_step_to_step(window, session):
    states = []
    for _ in range(3):
        window.tick()
        states.append(session.rollout.state.clone())
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_the_picture_has_sharp_pixels(window, session):
    """Outside the texts each pixel of the world is a square of 8x8 equal pixels."""
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


def test_keys_change_the_start_place(window, session):
    first, second = session.start_places
    # A context that ends elsewhere.
    session.start_places[1] = type(second)(
        "other.npz", second.tokens[5:], second.actions[5:], second.pose[5:]
    )
    start = session.picture.copy()
    session.restart()
    assert np.array_equal(session.picture, start)
    window.tick()
    press(window, pygame.K_n)
    assert session.start_index == 1 and session.steps == 0 and not np.array_equal(session.picture, start)
    assert "start place 2 of 2: other" in window.message
    press(window, pygame.K_1)
    assert session.start_index == 0 and np.array_equal(session.picture, start)
    press(window, pygame.K_n)
    press(window, pygame.K_n)
    assert session.start_index == 0
    press(window, pygame.K_7)
    assert session.start_index == 0 and window.message == "there are 2 start places"


def test_pause_and_single_steps(window, session):
    window.tick()
    press(window, pygame.K_p)
    window.tick()
    assert len(session.actions_given) == 1 and session.paused
    press(window, pygame.K_PERIOD)
    assert len(session.actions_given) == 2
    window.tick()
    assert len(session.actions_given) == 2
    press(window, pygame.K_p)
    assert len(session.actions_given) == 3
    press(window, pygame.K_PERIOD)  # pauses, and makes one step
    window.tick()
    assert len(session.actions_given) == 4 and session.paused


def test_enter_restarts_with_a_new_seed_and_r_with_the_first(window, session):
    def rollout() -> torch.Tensor:
        return torch.cat([(window.tick(), session.rollout.tokens)[1] for _ in range(3)])

    first = rollout()
    press(window, pygame.K_RETURN)
    other = rollout()
    press(window, pygame.K_r)
    again = rollout()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_keys_change_the_sampling(window, session):
    def sampling():
        return session.rollout.sampling

    temperature, passes = sampling().temperature, sampling().passes
    press(window, pygame.K_RIGHTBRACKET)
    assert sampling().temperature == pytest.approx(temperature + 0.1)
    for _ in range(30):
        press(window, pygame.K_LEFTBRACKET)
    assert sampling().temperature == pytest.approx(0.1)  # never 0
    press(window, pygame.K_EQUALS)
    assert sampling().passes == passes + 1
    for _ in range(5):
        press(window, pygame.K_MINUS)
    assert sampling().passes == 1
    press(window, pygame.K_g)
    assert sampling().greedy and window.message == "greedy"
    press(window, pygame.K_g)
    assert not sampling().greedy and "passes 1" in window.message


def test_compare_plays_the_recorded_actions_beside_the_truth(window, session):
    press(window, pygame.K_c)
    assert session.compare and session.steps == 0
    recording = session.recording
    session.actions_given.clear()
    key(pygame.KEYDOWN, pygame.K_w)  # has no effect
    for step in range(24):  # all recorded actions after 16 frames of context
        window.tick()
        assert np.allclose(session.actions_given[-1], recording.actions[15 + step])
        truth = decode(recording.tokens[16 + step : 17 + step], session.world)[0].numpy()
        assert np.array_equal(session.truth, truth)
    window.message_until = window.name_until = 0.0
    window.draw()
    screen = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    both = np.concatenate([session.truth, session.picture], 1).repeat(4, 0).repeat(4, 1)
    assert np.array_equal(screen[40:60, 60:200], both[8:28, 60:200])  # 32 rows of black above
    window.tick()
    assert session.steps == 0 and len(session.actions_given) == 24  # after the last one: restarted
    press(window, pygame.K_c)
    window.tick()
    assert session.truth is None and session.actions_given[-1][MOVE_Z] == 1


def test_help_stats_overlay_and_smooth_pixels(window, session):
    def changed(code: int) -> int:
        """The number of pixels that a key changes; the world is paused."""
        before = pygame.surfarray.array3d(pygame.display.get_surface())
        press(window, code)
        window.message_until = 0.0
        window.draw()
        return int((pygame.surfarray.array3d(pygame.display.get_surface()) != before).any(-1).sum())

    press(window, pygame.K_p)
    window.message_until = 0.0
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
    assert np.array_equal(read_image(path), shown) and str(path) in window.message


def test_a_recording_of_play_is_a_clip_that_plays_again(window, session, tiny):
    press(window, pygame.K_v)
    key(pygame.KEYDOWN, pygame.K_w)
    click()
    for right in (20, -7, 3):
        move(right, 2)
        window.tick()
    press(window, pygame.K_v)
    (video,) = (session.out / "video").glob("*.mp4")
    assert str(video) in window.message and video_fps(video) == 16
    actions, pose = read_metadata(find_metadata(video))
    # The step after the first V is the first of the clip; the step after the second V is not in it.
    assert np.allclose(actions, session.actions_given[:4]) and len(list(read_frames(video))) == 5
    assert np.allclose(pose[-1, 3:], session.turned - np.array(session.actions_given[4][:2]) * 15, atol=1e-4)
    again = load_recording(video, session.world)
    assert np.allclose(again.actions.numpy(), actions) and len(again) == 5
    (clip,) = find_clips(session.out, "auto", session.out)[1]
    assert len(plan_gamefactory(clip, Manifest.load(tiny.tokens.parent)).frames) == 5


def test_a_restart_ends_a_recording_of_play(window, session):
    press(window, pygame.K_v)
    window.tick()
    press(window, pygame.K_r)
    assert session.recorder is None and len(list((session.out / "video").glob("*.mp4"))) == 1
    assert not list((session.out / "video").glob(".*"))


def test_a_slow_machine_is_reported_once(window, capsys):
    slow = window.session.step

    def step(action):
        window.clock.sleep(0.1)
        return slow(action)

    window.session.step = step
    for _ in range(60):
        window.tick()
    out = capsys.readouterr().out
    assert out.count("too slow for 16 steps/s") == 1 and "this machine makes 10." in out


def texts_of(window) -> list[tuple[str, pygame.Rect]]:
    """Draws -> each text on a veil, and where it is."""
    found, veiled = [], window.veiled

    def note(screen, lines, *args, **corner):
        found.append((" / ".join(lines), veiled(screen, lines, *args, **corner)))
        return found[-1][1]

    window.veiled = note
    window.draw()
    window.veiled = veiled
    return found


def place_of(texts: list[tuple[str, pygame.Rect]], part: str) -> pygame.Rect:
    (place,) = [place for text, place in texts if part in text]
    return place


@pytest.fixture
def large(session, monkeypatch):
    """A window as large as those on a screen: 1024x512, with the name of the start gone."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    time = FakeTime()
    window = Window(session, Controls(FPS, 15.0, SENS), StepClock(FPS, time.now, time.sleep), scale=32)
    assert window.tick()
    yield window
    window.close()


def test_a_paused_world_has_no_rate_and_is_never_too_slow(window, session, capsys):
    for _ in range(3):
        window.tick()
    assert any("fps" in text for text, _ in texts_of(window))
    press(window, pygame.K_p)
    for _ in range(60):  # a slow display during the pause
        window.clock.sleep(0.2)
        window.tick()
    assert window.clock.too_slow
    texts = [text for text, _ in texts_of(window)]
    assert "PAUSED" in texts and not any("fps" in text for text in texts)
    screen = pygame.surfarray.array3d(pygame.display.get_surface())
    assert not (screen == np.array(window.WARNING)).all(-1).any()
    press(window, pygame.K_p)
    window.tick()
    assert not window.clock.too_slow and "too slow" not in capsys.readouterr().out


def test_the_name_of_the_place_is_shown_at_its_start(large, session):
    assert place_of(texts_of(large), "clip").centerx == 512
    large.name_until = 0.0
    assert not any(text == "clip" for text, _ in texts_of(large))
    press(large, pygame.K_2)
    assert place_of([t for t in texts_of(large) if t[0] == "other"], "other")


def test_statistics_and_help_leave_the_labels_of_compare_visible(large):
    press(large, pygame.K_c)
    press(large, pygame.K_F3)
    texts = dict(texts_of(large))
    (panel,) = [place for text, place in texts.items() if "steps/s" in text]
    assert not any(panel.colliderect(texts[label]) for label in ("truth", "generated"))
    press(large, pygame.K_h)  # with it the panel is higher than the window
    drawn = [text for text, _ in texts_of(large)]
    (panel,) = [text for text in drawn if "steps/s" in text]
    assert drawn.index(panel) < min(drawn.index(label) for label in ("truth", "generated")), "labels on top"


def test_the_message_does_not_cover_the_overlay_and_the_picture_keeps_its_size(large, monkeypatch):
    panel = np.full((392, 533, 3), (220, 20, 220), np.uint8)
    monkeypatch.setattr("playing.window.overlay", lambda session: panel)
    press(large, pygame.K_p)
    large.name_until = large.message_until = 0.0
    large.draw()
    before = pygame.surfarray.array3d(pygame.display.get_surface())
    press(large, pygame.K_F4)
    large.show_message("a long message " * 8)
    message = place_of(texts_of(large), "a long message")
    screen = pygame.surfarray.array3d(pygame.display.get_surface())
    shown = (np.abs(screen.astype(int) - (220, 20, 220)) <= 20).all(-1)
    columns, rows = np.nonzero(shown)
    overlay = pygame.Rect(columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
    assert overlay.width > 300 and shown[overlay.left : overlay.right, overlay.top : overlay.bottom].all()
    assert not overlay.colliderect(message)
    changed = (screen != before).any(-1)
    changed[overlay.left : overlay.right, overlay.top : overlay.bottom] = False
    changed[message.left : message.right, message.top : message.bottom] = False
    assert not changed.any(), "the rest of the picture is as it was"


def test_the_inset_shows_the_recording_at_the_same_time(large, session):
    press(large, pygame.K_i)
    assert large.message.startswith("inset")
    for _ in range(5):
        large.tick()
    truth = decode(session.recording.tokens[15 + session.steps :][:1], session.world)[0].numpy()
    assert np.array_equal(session.truth, truth) and session.actions_given[-1] == [0] * 5
    large.name_until = large.message_until = 0.0
    label = place_of(texts_of(large), "recording")
    screen = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    inset = screen[label.top : label.top + 154, label.left : label.left + 307].astype(float)
    small = inset[4:148, 4:300].reshape(-1, 3).mean(0)
    assert np.abs(small - truth.reshape(-1, 3).mean(0)).max() < 12
    assert session.stats()["inset"] is True
    for _ in range(30):  # beyond the end of the recording
        large.tick()
    assert session.truth is None and not any(text == "recording" for text, _ in texts_of(large))
    press(large, pygame.K_r)
    assert session.truth is not None
    press(large, pygame.K_i)
    assert session.truth is None


def test_b_goes_back_by_a_fade(window, session):
    key(pygame.KEYDOWN, pygame.K_w)
    for _ in range(20):
        window.tick()
    lost, given = session.picture.copy(), len(session.actions_given)
    press(window, pygame.K_b)
    assert window.message.startswith("back to where it was ") and len(session.fade) == FADE_STEPS - 1
    good = session.fade[-1].copy()
    assert not np.array_equal(session.picture, lost)
    for _ in range(FADE_STEPS - 1):
        window.tick()
    assert np.array_equal(session.picture, good) and len(session.actions_given) == given
    window.tick()
    assert len(session.actions_given) == given + 1 and session.restarts == 1
