"""The action vector [yaw, pitch, move_x, move_z, jump]: names, units, and conversion from and to recordings.

yaw +1 = 15 degrees to the right in one source frame, pitch +1 = 15 degrees down, both clipped to [-1, 1];
move_x +1 right, -1 left; move_z +1 forward, -1 back; jump 0 or 1.
"""

from collections.abc import Iterable, Mapping
from textwrap import shorten

import numpy as np

from runtime.errors import UserError

ACTION_NAMES = ("yaw", "pitch", "move_x", "move_z", "jump")
ACTION_DIM = len(ACTION_NAMES)
YAW, PITCH, MOVE_X, MOVE_Z, JUMP = range(ACTION_DIM)
DEGREES_PER_UNIT = 15.0
CLASS_NAMES = ("still", "turn", "look", "walk", "strafe", "jump", "walk+turn")
CAMERA_MOVES = 0.01  # units (0.15 degrees per frame): a smaller turn counts as none
BLOCKED_METRES = 0.05  # in a frame with a key held: a player that moves less is blocked
KEY_PRESSED = 0.1  # a larger absolute value counts as pressed; pooled keys are means over several frames

_GAMEFACTORY_MOVE_Z = {0: 0.0, 1: 1.0, 2: -1.0}  # ws: 1 forward, 2 back
_GAMEFACTORY_MOVE_X = {0: 0.0, 1: -1.0, 2: 1.0}  # ad: 1 left, 2 right
_GAMEFACTORY_JUMP = {0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0}  # scs: 1 jump, 2 sneak, 3 sprint


class ActionError(UserError):
    """A recorded action that cannot be read: a field is missing, a code unknown, or a number not finite."""


def encode(
    yaw_degrees: float,
    pitch_degrees: float,
    move_x: float,
    move_z: float,
    jump: float,
    degrees_per_unit: float = DEGREES_PER_UNIT,
) -> np.ndarray:
    """One action vector, float32 [5]; camera in degrees (+right, +down), the rest in [-1, 1]."""
    vector = np.array(
        [yaw_degrees / degrees_per_unit, pitch_degrees / degrees_per_unit, move_x, move_z, jump], np.float32
    )
    return np.clip(vector, -1.0, 1.0)


def camera_degrees(action: np.ndarray, degrees_per_unit: float = DEGREES_PER_UNIT) -> np.ndarray:
    """[..., 5] -> [..., 2] degrees of yaw (+right) and pitch (+down): the inverse of `encode` within its
    range."""
    return np.asarray(action)[..., [YAW, PITCH]] * degrees_per_unit


def horizontal_metres(pose: np.ndarray) -> np.ndarray:
    """Metres moved over the ground between neighbouring poses: [..., T+1, 5] -> [..., T], NaN where
    unknown."""
    moved = np.diff(pose[..., :3].astype(np.float64), axis=-2)
    return np.hypot(moved[..., 0], moved[..., 2])


def from_gamefactory(entry: Mapping) -> np.ndarray:
    """One entry of a GF-Minecraft `actions` dict -> action vector, float32 [5].

    Keyboard-only recordings (data_269) have no deltas: the camera then does not turn.
    Raises ActionError for unknown codes and for deltas that are not finite.
    """
    yaw, pitch = entry.get("yaw_delta", 0.0), entry.get("pitch_delta", 0.0)
    try:
        yaw, pitch = float(yaw), float(pitch)
        move_x, move_z = _GAMEFACTORY_MOVE_X[entry["ad"]], _GAMEFACTORY_MOVE_Z[entry["ws"]]
        jump = _GAMEFACTORY_JUMP[entry["scs"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        found = shorten(str(dict(entry)), 200)
        raise ActionError(
            f"expected ws and ad in 0..2, scs in 0..3 and numbers; found {found} ({type(error).__name__})"
        ) from None
    if not (np.isfinite(yaw) and np.isfinite(pitch)):
        raise ActionError(f"yaw_delta {yaw}, pitch_delta {pitch}: not finite numbers")
    return encode(yaw * DEGREES_PER_UNIT, pitch * DEGREES_PER_UNIT, move_x, move_z, jump)


def to_gamefactory(action: np.ndarray) -> dict:
    """Action vector -> {ws, ad, scs, yaw_delta, pitch_delta}, the inverse of `from_gamefactory`."""
    yaw, pitch, move_x, move_z, jump = (float(v) for v in action)
    return {
        "ws": 1 if move_z > 0.5 else 2 if move_z < -0.5 else 0,
        "ad": 1 if move_x < -0.5 else 2 if move_x > 0.5 else 0,
        "scs": 1 if jump > 0.5 else 0,
        "yaw_delta": yaw,
        "pitch_delta": pitch,
    }


def from_minerl(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The arrays of a MineRL `rendered.npz` -> action vectors, float32 [N, 5].

    `action$camera` [N, 2] is [pitch, yaw] in degrees, positive down and right; keys are 0/1, a missing key is
    0. Raises ActionError if the camera is missing, misshapen or not finite.
    """
    if "action$camera" not in columns:
        raise ActionError("expected an array action$camera, found none")
    if any(array.dtype.kind not in "fiub" for array in columns.values()):
        raise ActionError("expected arrays of numbers")
    camera = np.asarray(columns["action$camera"], np.float32)
    if camera.ndim != 2 or camera.shape[1] != 2:
        raise ActionError(f"action$camera: expected [N, 2], found {list(camera.shape)}")
    if not np.isfinite(camera).all():
        raise ActionError("action$camera has numbers that are not finite")

    def key(name: str) -> np.ndarray:
        pressed = np.asarray(columns.get(f"action${name}", np.zeros(len(camera))), np.float32)
        if pressed.shape != (len(camera),) or not np.isfinite(pressed).all():
            raise ActionError(
                f"action${name}: expected {len(camera)} numbers, found {list(pressed.shape)} or not finite"
            )
        return pressed

    turn = np.clip(camera[:, ::-1] / DEGREES_PER_UNIT, -1.0, 1.0)
    keys = [key("right") - key("left"), key("forward") - key("back"), key("jump")]
    return np.column_stack([turn, *keys]).astype(np.float32)


def wrap(degrees: float | np.ndarray) -> float | np.ndarray:
    """Angles, a float or an array, wrapped to [-180, 180)."""
    return (degrees + 180.0) % 360.0 - 180.0


def action_class(vectors: np.ndarray) -> np.ndarray:
    """Action vectors [N, 5] -> their classes [N] int64, indices into CLASS_NAMES.

    The first class that applies counts: walk+turn (any key and a camera turn), turn (yaw, with or without
    pitch), look (pitch alone), jump, strafe (left or right, with or without forward or back), walk (forward
    or back alone), still. The thresholds are CAMERA_MOVES and KEY_PRESSED.
    """
    camera = np.abs(vectors[:, [YAW, PITCH]]) > CAMERA_MOVES
    keys = np.abs(vectors[:, [MOVE_X, MOVE_Z, JUMP]]) > KEY_PRESSED
    cases = {
        "walk+turn": camera.any(1) & keys.any(1),
        "turn": camera[:, 0],
        "look": camera[:, 1],
        "jump": keys[:, 2],
        "strafe": keys[:, 0],
        "walk": keys[:, 1],
    }
    codes = [CLASS_NAMES.index(name) for name in cases]
    return np.select(list(cases.values()), codes, CLASS_NAMES.index("still")).astype(np.int64)


def pool(actions: np.ndarray, max_keys: bool = False, steps: float | None = None) -> np.ndarray:
    """Pools the n actions between two kept frames [n, 5] into one [5].

    The camera is averaged (so +1 means 15 degrees in each source step). Keys are averaged; with `max_keys`
    the value of largest magnitude is used. `steps` is the mean number of source steps between kept frames.
    Where it is not an integer, n differs between pairs of frames; with it, +1 means the same turn, 15 *
    steps degrees, for all of them.
    """
    pooled = actions.mean(0)
    if steps is not None:
        pooled[: PITCH + 1] = np.clip(pooled[: PITCH + 1] * (len(actions) / steps), -1.0, 1.0)
    if max_keys:
        keys = actions[:, MOVE_X:]
        pooled[MOVE_X:] = np.take_along_axis(keys, np.abs(keys).argmax(0)[None], 0)[0]
    return pooled.astype(np.float32)


def from_keys(pressed: Iterable[str]) -> tuple[float, float, float]:
    """Names of pressed keys (forward, back, left, right, jump) -> (move_x, move_z, jump)."""
    pressed = set(pressed)
    return (
        float("right" in pressed) - float("left" in pressed),
        float("forward" in pressed) - float("back" in pressed),
        float("jump" in pressed),
    )
