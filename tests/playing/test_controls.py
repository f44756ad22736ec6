"""playing/controls.py and playing/bindings.py: mouse motion becomes turns, the clock, the key map."""

import numpy as np
import pygame
import pytest
from play_session import FPS, FakeTime

from dataset.actions import YAW
from playing.bindings import COMMANDS, CONTROLS, VIEW_COMMANDS
from playing.controls import Controls, StepClock


def test_every_binding_is_a_key_once():
    bindings = (*CONTROLS, *COMMANDS, *VIEW_COMMANDS)
    for names in ([b.key for b in bindings], [b.code for b in bindings], [b.name for b in bindings]):
        assert len(set(names)) == len(names)
    assert all(hasattr(pygame, f"K_{b.key}") for b in bindings)


def test_the_view_stops_soon_after_a_large_mouse_motion():
    controls = Controls(FPS)
    controls.look(-1e6, 0)
    turns = [controls.take_action()[YAW] for _ in range(10)]
    steps = controls.MAX_PENDING_STEPS
    assert turns == [-1] * steps + [0] * (10 - steps)


def test_mouse_motion_follows_the_units_of_the_data():
    controls = Controls(8.0, degrees_per_unit=30.0, degrees_per_pixel=0.3)
    controls.look(10, 20)
    assert np.allclose(controls.take_action()[:2], [0.1, 0.2])


@pytest.mark.parametrize("work", [0.0, 0.01, 0.05, 0.0624, 0.07, 0.3])
def test_the_clock_is_never_faster_than_the_data(work):
    time = FakeTime()
    clock = StepClock(FPS, time.now, time.sleep)
    rng = np.random.default_rng(0)
    last = start = time.now()
    for step in range(1, 200):
        clock.wait()
        assert step <= (time.now() - start) * FPS + 1e-6
        assert time.now() - last >= 0.5 / FPS - 1e-9
        last = time.now()
        time.time += work * rng.uniform(0.5, 1.0) + (1.0 if step == 100 else 0.0)  # one long delay
    assert clock.rate <= FPS + 1e-6
    assert clock.too_slow == (work * 0.75 > 1.05 / FPS)
    if not clock.too_slow:
        assert clock.rate == pytest.approx(FPS, rel=0.01)
