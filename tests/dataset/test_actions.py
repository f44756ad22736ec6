"""The action vector: conversion from and to each recording format."""

import itertools

import numpy as np
import pytest

from dataset import actions
from dataset.actions import (
    ActionError,
    camera_degrees,
    encode,
    from_gamefactory,
    from_keys,
    from_minerl,
    pool,
)


def entry(ws=0, ad=0, scs=0, yaw_delta=0.0, pitch_delta=0.0) -> dict:
    return {"ws": ws, "ad": ad, "scs": scs, "yaw_delta": yaw_delta, "pitch_delta": pitch_delta}


def test_gamefactory_codes_are_decoded():
    forward_left_jump = from_gamefactory(entry(ws=1, ad=1, scs=1, yaw_delta=0.5, pitch_delta=-0.25))
    assert forward_left_jump.dtype == np.float32
    np.testing.assert_allclose(forward_left_jump, [0.5, -0.25, -1, 1, 1])
    np.testing.assert_allclose(from_gamefactory(entry(ws=2, ad=2)), [0, 0, 1, -1, 0])


@pytest.mark.parametrize("ws, ad, scs", [*itertools.product(range(3), range(3), range(2))])
def test_gamefactory_round_trip(ws, ad, scs):
    recorded = entry(ws, ad, scs, yaw_delta=0.375, pitch_delta=-0.125)
    assert actions.to_gamefactory(from_gamefactory(recorded)) == recorded


@pytest.mark.parametrize("scs", [2, 3])
def test_sneak_and_sprint_do_not_count_as_jump(scs):
    assert from_gamefactory(entry(scs=scs))[actions.JUMP] == 0


def test_keyboard_only_recordings_have_no_camera_turn():
    np.testing.assert_array_equal(from_gamefactory({"ws": 1, "ad": 0, "scs": 0}), [0, 0, 0, 1, 0])


def test_turns_beyond_the_range_are_clipped():
    np.testing.assert_array_equal(from_gamefactory(entry(yaw_delta=3, pitch_delta=-7))[:2], [1, -1])


@pytest.mark.parametrize(
    "broken, message",
    [
        (entry(yaw_delta=float("nan")), "yaw_delta nan"),
        (entry(pitch_delta=float("inf")), "pitch_delta inf"),
        (entry(yaw_delta="left"), "numbers"),
        (entry(ws=3), "ws and ad in 0..2"),
        (entry(ad=-1), "ws and ad in 0..2"),
        (entry(scs=9), "scs in 0..3"),
        (entry(ws=0.5), "ws and ad in 0..2"),
        ({"ws": 1, "ad": 0}, "scs"),
    ],
)
def test_a_broken_gamefactory_entry_is_refused(broken, message):
    with pytest.raises(ActionError, match=message):
        from_gamefactory(broken)


def test_encode_and_camera_degrees_are_inverse():
    vector = encode(yaw_degrees=7.5, pitch_degrees=-3.0, move_x=1, move_z=-1, jump=1)
    np.testing.assert_allclose(vector, [0.5, -0.2, 1, -1, 1])
    np.testing.assert_allclose(camera_degrees(vector), [7.5, -3.0])
    np.testing.assert_allclose(camera_degrees(np.stack([vector, -vector]), 30.0), [[15, -6], [-15, 6]])
    np.testing.assert_allclose(encode(12.0, 0, 0, 0, 0, degrees_per_unit=30.0)[0], 0.4)


def test_minerl_camera_is_pitch_first_and_in_degrees():
    columns = {
        "action$camera": np.array([[3.0, -7.5], [-90.0, 30.0]]),
        "action$forward": np.array([1, 0]),
        "action$back": np.array([0, 1]),
        "action$left": np.array([1, 1]),
        "action$right": np.array([0, 1]),
        "action$jump": np.array([0, 1]),
        "reward": np.zeros(2),
    }
    expected = [[-0.5, 0.2, -1, 1, 0], [1, -1, 0, -1, 1]]
    np.testing.assert_allclose(from_minerl(columns), expected, atol=1e-6)


def test_missing_minerl_keys_count_as_not_pressed():
    np.testing.assert_array_equal(from_minerl({"action$camera": np.zeros((3, 2))}), np.zeros((3, 5)))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"action$forward": np.zeros(2)}, "found none"),
        ({"action$camera": np.zeros(4)}, r"expected \[N, 2\]"),
        ({"action$camera": np.array([[0.0, np.nan]])}, "not finite"),
        ({"action$camera": np.zeros((3, 2)), "action$jump": np.zeros(4)}, r"action\$jump: expected 3"),
        ({"action$camera": np.zeros((1, 2)), "action$left": np.array([np.nan])}, r"action\$left"),
    ],
)
def test_broken_minerl_arrays_are_refused(columns, message):
    with pytest.raises(ActionError, match=message):
        from_minerl(columns)


def test_pool_averages():
    window = np.array([[0.2, 0.4, 1, 0, 1], [0.6, -0.4, 0, -1, 0]], np.float32)
    np.testing.assert_allclose(pool(window), [0.4, 0, 0.5, -0.5, 0.5], atol=1e-6)


def test_max_pooling_of_keys_averages_the_camera():
    window = np.array([[0.2, 0.4, 0, 0, 0], [0.6, -0.4, 1, -1, 1], [0.1, 0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(pool(window, max_keys=True), [0.3, 0, 1, -1, 1], atol=1e-6)


def test_pool_keeps_degrees_for_an_uneven_number_of_steps():
    """Kept frames 1.5 steps apart: windows of one and two steps, one unit of 22.5 degrees for both."""
    steps = np.zeros((3, 5), np.float32)
    steps[:, actions.YAW] = [0.3, 0.3, 0.6]  # 4.5, 4.5, 9 degrees
    one, two = pool(steps[:1], steps=1.5), pool(steps[1:], steps=1.5)
    np.testing.assert_allclose(camera_degrees(np.stack([one, two]), 22.5)[:, 0], [4.5, 13.5], atol=1e-5)


def test_pressed_keys_give_the_same_action_as_recorded_codes():
    forward_right_jump = from_gamefactory(entry(ws=1, ad=2, scs=1))
    np.testing.assert_array_equal(from_keys({"forward", "right", "jump"}), forward_right_jump[2:])
    np.testing.assert_array_equal(from_keys(["back", "left"]), from_gamefactory(entry(ws=2, ad=1))[2:])
    assert from_keys(["left", "right"]) == (0, 0, 0)
