"""A little language for what the player does, e.g. "w*32,w+yaw+0.5*16,idle*8".

    script  := segment ("," segment)*
    segment := action ("+" action)* ["*" FRAMES]          FRAMES is a whole number, 1 if left out
    action  := "w" | "s" | "a" | "d"                      walk forward, back, left, right
             | "jump" | "idle"
             | ("yaw" | "pitch") ("+" | "-") NUMBER       a share in 0..1 of the fastest turn

The actions of a segment are held together for its frames; opposite keys cancel as they do in play. yaw+1
turns 15 degrees to the right in each frame of the source, pitch+1 looks 15 degrees further down. Spaces
mean nothing.
"""

import re

import numpy as np

from actions import ACTION_DIM, JUMP, MOVE_X, MOVE_Z, PITCH, YAW, from_keys

KEYS = {"w": "forward", "s": "back", "a": "left", "d": "right", "jump": "jump", "idle": None}
TURNS = {"yaw": YAW, "pitch": PITCH}
MAX_FRAMES = 1_000_000  # 20 MB of actions, 17 hours of play: more is a slip of the finger

# Walks, strafes, jumps, turns both ways, looks down and up, and stands still: 9 s at 16 frames/s.
WALK = (
    "w*24,w+yaw+0.3*16,w+jump*4,w*12,idle*8,yaw-0.4*16,w*16,"
    "a*8,d*8,pitch+0.2*6,pitch-0.2*6,s*8,w+yaw-0.15*8,idle*4"
)

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d_]+")  # letters
_TURN = re.compile(r"([+-])\s*(\d+\.?\d*|\.\d+)")
_FRAMES = re.compile(r"\d+(?![.\w])")


class ScriptError(ValueError):
    """A script that does not follow the grammar; the message names the offending place."""


class _Reader:
    """A script and how far it has been read."""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.skip_spaces()

    def skip_spaces(self) -> None:
        self.place = _SPACE.match(self.text, self.place).end()

    def take(self, pattern: re.Pattern, expected: str) -> re.Match:
        """The match of `pattern` here, which it passes over, and the spaces after it; or a ScriptError."""
        match = pattern.match(self.text, self.place)
        if match is None:
            raise self.error(f"expected {expected}")
        self.place = match.end()
        self.skip_spaces()
        return match

    def passes(self, sign: str) -> bool:
        """True, and the sign is passed over, if it stands here."""
        if not self.text.startswith(sign, self.place):
            return False
        self.place += len(sign)
        self.skip_spaces()
        return True

    def error(self, problem: str, place: int | None = None) -> ScriptError:
        place = self.place if place is None else place
        rest = self.text[place : place + 16]
        found = f'found "{rest}"' if rest else "found the end"
        return ScriptError(f'action script "{self.text}", character {place + 1}: {problem}, {found}')


def parse(text: str) -> np.ndarray:
    """Script -> action vectors [N, 5] float32, one a frame.

    Raises ScriptError, naming the character where reading stopped and what was expected there.
    """
    reader = _Reader(text)
    segments, total = [], 0
    while True:
        action = _segment(reader)
        frames, place = 1, reader.place
        counted = reader.passes("*")
        if counted:
            place = reader.place
            frames = int(reader.take(_FRAMES, "a whole number of frames").group())
        total += frames
        if not 0 < frames <= total <= MAX_FRAMES:
            raise reader.error(f"expected 1 to {MAX_FRAMES} frames in all", place)
        segments.append(np.tile(action, (frames, 1)))
        if reader.place == len(text):
            return np.concatenate(segments)
        if not reader.passes(","):
            raise reader.error('expected "," or the end' if counted else 'expected "+", "*", "," or the end')


def _segment(reader: _Reader) -> np.ndarray:
    """action ("+" action)* -> one action vector [5]."""
    vector = np.zeros(ACTION_DIM, np.float32)
    held, given = set(), set()
    while True:
        place = reader.place
        name = reader.take(_NAME, "w, a, s, d, jump, idle, yaw or pitch").group()
        if name not in KEYS and name not in TURNS:
            raise reader.error("expected w, a, s, d, jump, idle, yaw or pitch", place)
        if name in given:
            raise reader.error(f"{name} is given twice in one segment", place)
        given.add(name)
        if name in TURNS:
            place = reader.place
            sign, number = reader.take(_TURN, f"+ or - and a number after {name}").groups()
            if float(number) > 1:
                raise reader.error("expected a turn of 0 to 1", place)
            vector[TURNS[name]] = float(sign + number)
        elif KEYS[name]:
            held.add(KEYS[name])
        if not reader.passes("+"):
            break
    vector[[MOVE_X, MOVE_Z, JUMP]] = from_keys(held)
    return vector


def describe(action: np.ndarray) -> str:
    """One action vector [5] in the script's words, e.g. "w+yaw+0.50"; `parse` reads it back (to 0.01)."""
    keys = {
        "w": action[MOVE_Z] > 0.5,
        "s": action[MOVE_Z] < -0.5,
        "a": action[MOVE_X] < -0.5,
        "d": action[MOVE_X] > 0.5,
        "jump": action[JUMP] > 0.5,
    }
    words = [key for key, held in keys.items() if held]
    words += [f"{name}{action[axis]:+.2f}" for name, axis in TURNS.items() if abs(action[axis]) >= 0.005]
    return "+".join(words) or "idle"


def fit(actions: np.ndarray, frames: int) -> np.ndarray:
    """Actions [N, 5] cut, or repeated from the start, to [frames, 5]."""
    return np.resize(actions, (frames, actions.shape[1]))


def captions(actions: np.ndarray, fps: float) -> list[str]:
    """For the frame that each action [N, 5] leads to: when it is, and what was done, e.g. "1.5 s
    w+yaw+0.50"."""
    return [f"{(t + 1) / fps:.1f} s  {describe(action)}" for t, action in enumerate(actions)]
