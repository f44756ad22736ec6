"""A scripted mix of all that a player does: walks, turns, looks back, strafes, jumps, pauses."""

from collections.abc import Callable

import numpy as np

from dataset.actions import DEGREES_PER_UNIT, encode, from_keys

LOOK_BACK_FRAMES = 18  # to turn by 180 degrees
STEP_FRAMES = 4  # a jump key is held this long


def _held(frames: int, keys: tuple[str, ...] = (), yaw: float = 0.0, pitch: float = 0.0) -> list[tuple]:
    """`frames` equal inputs (yaw, pitch, keys); yaw and pitch in degrees per frame."""
    return [(yaw, pitch, keys)] * frames


def _walk(rng: np.random.Generator) -> list[tuple]:
    return _held(int(rng.integers(16, 49)), ("forward",))


def _walk_turning(rng: np.random.Generator) -> list[tuple]:
    return _held(int(rng.integers(8, 25)), ("forward",), yaw=_sign(rng) * rng.uniform(1, 5))


def _turn(rng: np.random.Generator) -> list[tuple]:
    return _held(int(rng.integers(6, 21)), yaw=_sign(rng) * rng.uniform(3, 8))


def _look_back(rng: np.random.Generator) -> list[tuple]:
    """Turns by 180 degrees, pauses, and turns back."""
    speed = _sign(rng) * 180 / LOOK_BACK_FRAMES
    pause = int(rng.integers(2, 9))
    return [*_held(LOOK_BACK_FRAMES, yaw=speed), *_held(pause), *_held(LOOK_BACK_FRAMES, yaw=-speed)]


def _look(rng: np.random.Generator) -> list[tuple]:
    """Looks up or down and back to where it was."""
    frames, speed = int(rng.integers(6, 11)), _sign(rng) * rng.uniform(1, 3)
    pause = int(rng.integers(0, 7))
    return [*_held(frames, pitch=speed), *_held(pause), *_held(frames, pitch=-speed)]


def _strafe(rng: np.random.Generator) -> list[tuple]:
    return _held(int(rng.integers(8, 17)), ("left" if rng.random() < 0.5 else "right",))


def _back(rng: np.random.Generator) -> list[tuple]:
    return _held(int(rng.integers(6, 13)), ("back",))


def _jump(rng: np.random.Generator) -> list[tuple]:
    return [*_held(STEP_FRAMES, ("forward", "jump")), *_held(int(rng.integers(8, 13)), ("forward",))]


def _pause(rng: np.random.Generator) -> list[tuple]:
    return _held(int(rng.integers(8, 25)))


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


# Shuffled, and again when all are done: each kind of input comes in every 20 seconds or so.
BEHAVIOURS: tuple[Callable[[np.random.Generator], list[tuple]], ...] = (
    _walk, _walk, _walk, _walk_turning, _walk_turning, _turn, _look_back, _look, _strafe, _strafe, _back,
    _jump, _pause,
)  # fmt: skip


def mixed_walk(frames: int, seed: int, degrees_per_unit: float = DEGREES_PER_UNIT) -> np.ndarray:
    """Action vectors [frames, 5] of a mixed walk at 16 frames a second; another seed is another walk.

    It begins by walking forward. `degrees_per_unit` is the camera's turn at an action of 1. Whatever looks up
    or down looks back, so the pitch does not drift.
    """
    rng = np.random.default_rng(seed)
    inputs: list[tuple] = _walk(rng)
    while len(inputs) < frames:
        for number in rng.permutation(len(BEHAVIOURS)):
            inputs += BEHAVIOURS[number](rng)
    return np.stack(
        [encode(yaw, pitch, *from_keys(keys), degrees_per_unit) for yaw, pitch, keys in inputs[:frames]]
    )
