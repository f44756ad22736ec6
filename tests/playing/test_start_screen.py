"""playing/start_screen.py: turning pictures, and choosing in the window by posted events."""

import cv2
import numpy as np
import pygame
import pytest
from play_session import FPS, SENS, FakeTime, make_session

from playing.controls import Controls, StepClock
from playing.start_screen import MAX_PLACES, TURN_PICTURES, StartScreen, back_and_forth
from playing.window import Window, cells_in


@pytest.fixture
def session(tiny, tmp_path):
    session = make_session(tiny, tmp_path / "play", ("one.npz", "two.npz", "three.npz"))
    second = session.start_places[1]  # begins elsewhere
    session.start_places[1] = type(second)("two.npz", second.tokens[5:], second.actions[5:], second.pose[5:])
    return session


@pytest.fixture
def window(session, monkeypatch):
    """A window with the start screen, before its first tick."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    time = FakeTime()
    clock = StepClock(FPS, time.now, time.sleep)
    window = Window(session, Controls(FPS, 15.0, SENS), clock, scale=20, choose=True, dropped_frames=30)
    yield window
    window.close()


def post(kind: int, **values) -> None:
    pygame.event.post(pygame.event.Event(kind, **values))


def key(code: int) -> None:
    for kind in (pygame.KEYDOWN, pygame.KEYUP):
        post(kind, key=code, mod=0, unicode="", scancode=0)


def shown() -> np.ndarray:
    return pygame.surfarray.array3d(pygame.display.get_surface())


def test_back_and_forth():
    assert [back_and_forth(n, 4) for n in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert [back_and_forth(n, 1) for n in range(3)] == [0, 0, 0]


def test_all_places_turn_at_the_cost_of_a_step_a_tick(session, monkeypatch):
    """One picture a call, the places in turn, then nothing; the game's own rollout is untouched."""
    before = session.rollout.state.clone()
    screen = StartScreen(session, is_open=True)
    turned = [screen.advance() for _ in range(3 * TURN_PICTURES)]
    assert turned == [0, 1, 2] * TURN_PICTURES
    assert screen.advance() is None
    assert not session.actions_given and session.rollout.state.equal(before)
    assert np.array_equal(screen.turns[0].pictures[0], session.picture), "it begins where play begins"
    for turn in screen.turns:
        assert len(turn.pictures) == TURN_PICTURES
        assert not np.array_equal(turn.pictures[0], turn.pictures[-1])
    assert np.array_equal(screen.turns[0].picture(100.0), screen.turns[0].pictures[-1])
    assert np.array_equal(screen.turns[0].picture(101.0), screen.turns[0].pictures[-9])


def test_the_world_waits_until_a_key_starts_the_selected_place(window, session):
    for _ in range(5):
        assert window.tick()
    assert not session.actions_given and window.start_screen.is_open
    assert [len(turn.pictures) for turn in window.start_screen.turns] == [2, 2, 1]
    key(pygame.K_RIGHT)
    key(pygame.K_LSHIFT)  # not a key that starts
    window.tick()
    assert window.start_screen.selected == 1 and window.start_screen.is_open
    key(pygame.K_t)
    window.tick()
    assert session.name == "two" and not window.start_screen.is_open and not session.actions_given
    window.tick()
    assert len(session.actions_given) == 1


def test_number_keys_and_the_mouse_choose(window, session):
    window.tick()
    key(pygame.K_9)
    window.tick()
    assert window.start_screen.is_open and window.message == "there are 3 start places"
    key(pygame.K_3)
    window.tick()
    assert session.name == "three" and not window.start_screen.is_open
    key(pygame.K_m)
    window.tick()
    assert window.start_screen.is_open and window.start_screen.selected == 2
    place = window.places[1].center
    post(pygame.MOUSEMOTION, pos=place, rel=(1, 1), buttons=(0, 0, 0), touch=False)
    window.tick()
    assert window.start_screen.selected == 1
    post(pygame.MOUSEBUTTONDOWN, pos=(2, 2), button=1, touch=False)  # beside the places
    window.tick()
    assert window.start_screen.is_open
    post(pygame.MOUSEBUTTONDOWN, pos=place, button=1, touch=False)
    window.tick()
    assert session.name == "two" and not window.start_screen.is_open and not window.captured


def test_escape_quits_at_first_and_later_goes_on(window, session):
    key(pygame.K_1)
    assert window.tick()
    window.tick()
    steps = session.steps
    key(pygame.K_m)
    for _ in range(3):
        assert window.tick()
    assert session.steps == steps and window.start_screen.is_open
    key(pygame.K_ESCAPE)
    assert window.tick() and not window.start_screen.is_open
    assert session.steps == steps + 1 and session.restarts == 2, "the same world goes on"
    key(pygame.K_m)
    window.tick()


def test_escape_on_the_first_screen_quits(window):
    window.tick()
    key(pygame.K_ESCAPE)
    assert not window.tick()


def test_the_selected_place_is_marked_and_the_pictures_are_shown(window, session):
    for _ in range(6):
        window.tick()
    lit = (shown() == np.array(window.LIT)).all(-1)
    first, second = window.places[:2]
    assert lit[first.left : first.right, first.top].mean() > 0.9
    assert not lit[second.left : second.right, second.top].any()
    key(pygame.K_n)
    window.tick()
    lit = (shown() == np.array(window.LIT)).all(-1)
    assert lit[second.left : second.right, second.top].mean() > 0.9
    middle = shown()[first.left + 30 : first.right - 30, first.top + 20 : first.centery].astype(int)
    picture = cv2.resize(window.start_screen.turns[0].pictures[-1], first.size).swapaxes(0, 1).astype(int)
    expected = picture[30 : first.width - 30, 20 : first.height // 2]
    assert np.abs(middle - expected[: middle.shape[0], : middle.shape[1]]).mean() < 3


@pytest.mark.parametrize("while_choosing", [True, False])
def test_a_dropped_photo_is_played(window, session, tmp_path, while_choosing):
    photo = tmp_path / "my photo.png"
    cv2.imwrite(str(photo), np.full((90, 160, 3), (40, 160, 220), np.uint8))
    if not while_choosing:
        key(pygame.K_1)
    window.tick()
    post(pygame.DROPFILE, file=str(photo))
    window.tick()
    assert session.name == "my photo" and session.start_index == 3 and not window.start_screen.is_open
    assert len(session.context) == 1
    window.tick()
    assert session.steps == 1
    key(pygame.K_m)
    for _ in range(8):
        window.tick()
    assert len(window.places) == 4, "the photo is a place of the start screen"


def test_a_dropped_clip_is_played_and_other_files_are_refused(window, session, tmp_path):
    window.tick()
    notes = tmp_path / "notes.txt"
    notes.write_text("walk")
    post(pygame.DROPFILE, file=str(notes))
    window.tick()
    assert window.start_screen.is_open and "notes.txt" in window.message and session.name == "one"
    post(pygame.DROPFILE, file=str(tmp_path))  # a folder
    window.tick()
    assert window.start_screen.is_open and str(tmp_path) in window.message
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 16, (32, 16))
    for shade in range(0, 200, 20):
        writer.write(np.full((16, 32, 3), shade, np.uint8))
    writer.release()
    post(pygame.DROPFILE, file=str(tmp_path / "clip.mp4"))
    window.tick()
    assert session.name == "clip" and not window.start_screen.is_open


def test_the_number_of_places_is_limited(session, tmp_path):
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((16, 32, 3), np.uint8))
    session.start_places *= MAX_PLACES
    del session.start_places[MAX_PLACES:]
    message = StartScreen(session, is_open=True).add(tmp_path / "photo.png")
    assert f"there are {MAX_PLACES}" in message and len(session.start_places) == MAX_PLACES


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13, 40])
@pytest.mark.parametrize("room", [(10, 20, 900, 400), (0, 0, 300, 700)])
def test_cells_fill_the_room_and_do_not_overlap(count, room):
    cells, columns = cells_in(room, count, 16 / 9, 8)
    rectangles = [pygame.Rect(cell) for cell in cells]
    assert len(cells) == count and len({r.left for r in rectangles}) == min(columns, count)
    assert all(pygame.Rect(room).inflate(2, 2).contains(r) for r in rectangles)
    assert all(r.collidelist(rectangles[n + 1 :]) == -1 for n, r in enumerate(rectangles))
