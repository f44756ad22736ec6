"""A little language for what the player does, e.g. "w*32,(yaw+0.5*8,yaw-0.5*8)*2,idle*8".

    script  := part ("," part)*
    part    := segment | "(" script ")" ["*" TIMES]       TIMES and FRAMES are whole numbers, 1 if left out
    segment := (action ("+" action)* | vector) ["*" FRAMES]
    action  := "w" | "s" | "a" | "d"                      walk forward, back, left, right
             | "jump" | "idle"
             | ("yaw" | "pitch") ("+" | "-") NUMBER       a share in 0..1 of the fastest turn
    vector  := "[" yaw "," pitch "," move_x "," move_z "," jump "]"        numbers in -1..1, as in actions.py

The actions of a segment are held together for its frames; opposite keys cancel as they do in play. yaw+1
turns 15 degrees to the right in each frame of the source, pitch+1 looks 15 degrees further down. Spaces
mean nothing. In a file, or from another program, each line is a script; what follows a # is a comment.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from dataset.actions import ACTION_DIM, ACTION_NAMES, JUMP, MOVE_X, MOVE_Z, PITCH, YAW, from_keys
from runtime.errors import UserError

KEYS = {"w": "forward", "s": "back", "a": "left", "d": "right", "jump": "jump", "idle": None}
TURNS = {"yaw": YAW, "pitch": PITCH}
MAX_FRAMES = 1_000_000  # 20 MB of actions, 17 hours of play: more is a slip of the finger
MAX_DEPTH = 16  # groups in groups

# Walks, strafes, jumps, turns both ways, looks down and up, and stands still: 9 s at 16 frames/s.
WALK = (
    "w*24,w+yaw+0.3*16,w+jump*4,w*12,idle*8,yaw-0.4*16,w*16,"
    "a*8,d*8,pitch+0.2*6,pitch-0.2*6,s*8,w+yaw-0.15*8,idle*4"
)

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d_]+")  # letters
_TURN = re.compile(r"([+-])\s*(\d+\.?\d*|\.\d+)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_COUNT = re.compile(r"\d{1,18}(?![.\w])")


class ScriptError(UserError):
    """A script that does not follow the grammar; the message names the offending place."""


class _Reader:
    """A script and how far it has been read."""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.might_follow = ""  # what could have stood here, after what was read last
        self.depth = 0  # groups that are open
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
    actions = _script(reader)
    if reader.place < len(text):
        raise reader.error(f"expected {reader.might_follow}")
    return actions


def parse_lines(lines: Iterable[str], source: str) -> Iterator[np.ndarray]:
    """Lines of script -> one action vector [5] float32 after the other, as soon as its line is there.

    Raises ScriptError, naming `source` and the line too.
    """
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].rstrip()
        if not text:
            continue
        try:
            yield from parse(text)
        except ScriptError as error:
            raise ScriptError(f"{source}, line {number}: {error}") from None


def _script(reader: _Reader) -> np.ndarray:
    """part ("," part)* -> action vectors [N, 5]."""
    parts, total = [], 0
    while True:
        opened = reader.place
        if reader.passes("("):
            reader.depth += 1
            if reader.depth > MAX_DEPTH:
                raise reader.error(f"more than {MAX_DEPTH} groups in groups", opened)
            part, what = _script(reader), "times"
            if not reader.passes(")"):
                raise reader.error(f"expected {reader.might_follow}".replace("the end", '")"'))
            reader.depth -= 1
        else:
            part, what = _segment(reader)[None], "frames"
        times, place = 1, reader.place
        counted = reader.passes("*")
        if counted:
            place = reader.place
            times = int(reader.take(_COUNT, f"a whole number of {what}").group())
        total += times * len(part)
        if not 0 < times <= total <= MAX_FRAMES:
            raise reader.error(f"expected 1 to {MAX_FRAMES} frames in all", place)
        parts.append(np.tile(part, (times, 1)))
        reader.might_follow = '"," or the end' if counted or what == "times" else '"+", "*", "," or the end'
        if not reader.passes(","):
            return np.concatenate(parts)


def _vector(reader: _Reader) -> np.ndarray:
    """What follows a "[" -> one action vector [5]."""
    numbers = []
    for axis in ACTION_NAMES:
        if numbers and not reader.passes(","):
            raise reader.error(f'expected "," and a number for {axis}')
        place = reader.place
        number = float(reader.take(_NUMBER, f"a number for {axis}").group())
        if not -1 <= number <= 1:
            raise reader.error(f"expected a number in -1..1 for {axis}", place)
        numbers.append(number)
    if not reader.passes("]"):
        raise reader.error('expected "]"')
    return np.array(numbers, np.float32)


def _segment(reader: _Reader) -> np.ndarray:
    """action ("+" action)* | vector -> one action vector [5]."""
    if reader.passes("["):
        return _vector(reader)
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


def write_script(actions: np.ndarray) -> str:
    """Action vectors [N, 5] float32 as lines of script, a segment each; `parse_lines` reads the very same
    numbers, bit for bit: in words where they can say it, else as a vector."""
    lines = []
    # Bytes, since -0 equals 0.
    for _, same in groupby(actions.astype(np.float32), np.ndarray.tobytes):
        action, *more = same
        words = describe(action)
        if parse(words).tobytes() != action.tobytes():
            words = "[" + ", ".join(str(value) for value in action) + "]"
        lines.append(f"{words}*{1 + len(more)}\n")
    return "".join(lines)


def fit(actions: np.ndarray, frames: int) -> np.ndarray:
    """Actions [N, 5] cut, or repeated from the start, to [frames, 5]."""
    return np.resize(actions, (frames, actions.shape[1]))


def captions(actions: np.ndarray, fps: float) -> list[str]:
    """For the frame that each action [N, 5] leads to: when it is, and what was done, e.g. "1.5 s
    w+yaw+0.50"."""
    return [f"{(t + 1) / fps:.1f} s  {describe(action)}" for t, action in enumerate(actions)]
