"""A small language for the player's actions, e.g. "w*32,(yaw+0.5*8,yaw-0.5*8)*2,idle*8".

    script  := part ("," part)*
    part    := segment | "(" script ")" ["*" TIMES]       TIMES and FRAMES are whole numbers, 1 by default
    segment := (action ("+" action)* | vector) ["*" FRAMES]
    action  := "w" | "s" | "a" | "d"                      walk forward, back, left, right
             | "jump" | "idle"
             | ("yaw" | "pitch") ("+" | "-") NUMBER       fraction 0..1 of the fastest turn
    vector  := "[" yaw "," pitch "," move_x "," move_z "," jump "]"        numbers in -1..1, as in actions.py

A segment applies all its actions in each of its frames. Opposite keys cancel, as in play. yaw+1 turns 15
degrees to the right in each frame of the data, pitch+1 looks 15 degrees further down. Spaces are ignored.
In a file, or from another program, each line is a script and # begins a comment.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from dataset.actions import ACTION_DIM, ACTION_NAMES, JUMP, MOVE_X, MOVE_Z, PITCH, YAW, from_keys
from runtime.errors import UserError

KEYS = {"w": "forward", "s": "back", "a": "left", "d": "right", "jump": "jump", "idle": None}
TURNS = {"yaw": YAW, "pitch": PITCH}
MAX_FRAMES = 1_000_000  # 20 MB of actions, 17 hours of play; more is taken for a typing error
MAX_DEPTH = 16  # nested groups

# Walks, strafes, jumps, turns both ways, looks down and up, and stands: 9 s at 16 frames/s.
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
    """A script that does not follow the grammar. The message names the position of the error."""


class _Reader:
    """A script and the position up to which it has been parsed."""

    def __init__(self, text: str):
        self.text, self.position = text, 0
        self.alternatives = ""  # what else could follow the part that was parsed last, for error messages
        self.depth = 0  # open groups
        self.skip_spaces()

    def skip_spaces(self) -> None:
        self.position = _SPACE.match(self.text, self.position).end()

    def match(self, pattern: re.Pattern, expected: str) -> re.Match:
        """Consumes `pattern` and the spaces after it. Raises ScriptError if it does not match here."""
        match = pattern.match(self.text, self.position)
        if match is None:
            raise self.error(f"expected {expected}")
        self.position = match.end()
        self.skip_spaces()
        return match

    def accept(self, sign: str) -> bool:
        """Consumes `sign` if it comes next, and returns whether it did."""
        if not self.text.startswith(sign, self.position):
            return False
        self.position += len(sign)
        self.skip_spaces()
        return True

    def error(self, problem: str, position: int | None = None) -> ScriptError:
        """A ScriptError for `problem` at `position` (default: the current one)."""
        position = self.position if position is None else position
        rest = self.text[position : position + 16]
        found = f'found "{rest}"' if rest else "found the end"
        text = self.text if len(self.text) <= 200 else f"{self.text[:200]}..."
        return ScriptError(f'action script "{text}", character {position + 1}: {problem}, {found}')


def parse(text: str) -> np.ndarray:
    """Script -> action vectors [N, 5] float32, one per frame.

    Raises ScriptError, which names the character where parsing stopped and what was expected there.
    """
    reader = _Reader(text)
    actions = _script(reader)
    if reader.position < len(text):
        raise reader.error(f"expected {reader.alternatives}")
    return actions


def parse_lines(lines: Iterable[str], source: str) -> Iterator[np.ndarray]:
    """Yields the action vectors [5] float32 of lines of script, each line parsed as soon as it arrives.

    Raises ScriptError, which also names `source` and the line.
    """
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].rstrip()
        if not text:
            continue
        try:
            yield from parse(text)
        except ScriptError as error:
            raise ScriptError(f"{source}, line {number}: {error}") from None


def read_script(script: str) -> np.ndarray:
    """A script, or "@FILE" for the lines of a file -> action vectors [N, 5] float32, N >= 1.

    Raises ScriptError, or OSError if the file cannot be opened.
    """
    if not script.startswith("@"):
        return parse(script)
    path = script[1:]
    with open(path, encoding="utf-8", errors="replace") as file:
        actions = list(parse_lines(file, path))
    if not actions:
        raise ScriptError(f"{path}: expected a script on each line, found no action; write at least one")
    return np.stack(actions)


def _script(reader: _Reader) -> np.ndarray:
    """part ("," part)* -> action vectors [N, 5]."""
    parts, total = [], 0
    while True:
        start = reader.position
        if reader.accept("("):
            reader.depth += 1
            if reader.depth > MAX_DEPTH:
                raise reader.error(f"more than {MAX_DEPTH} nested groups", start)
            part, unit = _script(reader), "times"
            if not reader.accept(")"):
                raise reader.error(f"expected {reader.alternatives}".replace("the end", '")"'))
            reader.depth -= 1
        else:
            part, unit = _segment(reader)[None], "frames"
        times, position = 1, reader.position
        counted = reader.accept("*")
        if counted:
            position = reader.position
            times = int(reader.match(_COUNT, f"a whole number of {unit}").group())
        total += times * len(part)
        if not 0 < times <= total <= MAX_FRAMES:
            raise reader.error(f"expected 1 to {MAX_FRAMES} frames in all", position)
        parts.append(np.tile(part, (times, 1)))
        reader.alternatives = '"," or the end' if counted or unit == "times" else '"+", "*", "," or the end'
        if not reader.accept(","):
            return np.concatenate(parts)


def _vector(reader: _Reader) -> np.ndarray:
    """The rest of a vector after "[" -> one action vector [5]."""
    numbers = []
    for axis in ACTION_NAMES:
        if numbers and not reader.accept(","):
            raise reader.error(f'expected "," and a number for {axis}')
        position = reader.position
        number = float(reader.match(_NUMBER, f"a number for {axis}").group())
        if not -1 <= number <= 1:
            raise reader.error(f"expected a number in -1..1 for {axis}", position)
        numbers.append(number)
    if not reader.accept("]"):
        raise reader.error('expected "]"')
    return np.array(numbers, np.float32)


def _segment(reader: _Reader) -> np.ndarray:
    """action ("+" action)* | vector -> one action vector [5]."""
    if reader.accept("["):
        return _vector(reader)
    vector = np.zeros(ACTION_DIM, np.float32)
    pressed, names = set(), set()
    while True:
        position = reader.position
        name = reader.match(_NAME, "w, a, s, d, jump, idle, yaw or pitch").group()
        if name not in KEYS and name not in TURNS:
            raise reader.error("expected w, a, s, d, jump, idle, yaw or pitch", position)
        if name in names:
            raise reader.error(f"{name} is given twice in one segment", position)
        names.add(name)
        if name in TURNS:
            position = reader.position
            sign, number = reader.match(_TURN, f"+ or - and a number after {name}").groups()
            if float(number) > 1:
                raise reader.error("expected a turn of 0 to 1", position)
            vector[TURNS[name]] = float(sign + number)
        elif KEYS[name]:
            pressed.add(KEYS[name])
        if not reader.accept("+"):
            break
    vector[[MOVE_X, MOVE_Z, JUMP]] = from_keys(pressed)
    return vector


def describe(action: np.ndarray) -> str:
    """One action vector [5] as a segment, e.g. "w+yaw+0.50"; `parse` gives it back, rounded to 0.01."""
    keys = {
        "w": action[MOVE_Z] > 0.5,
        "s": action[MOVE_Z] < -0.5,
        "a": action[MOVE_X] < -0.5,
        "d": action[MOVE_X] > 0.5,
        "jump": action[JUMP] > 0.5,
    }
    words = [key for key, pressed in keys.items() if pressed]
    words += [f"{name}{action[axis]:+.2f}" for name, axis in TURNS.items() if abs(action[axis]) >= 0.005]
    return "+".join(words) or "idle"


def write_script(actions: np.ndarray) -> str:
    """Action vectors [N, 5] float32 as lines of script, one segment per line.

    `parse_lines` gives back the same numbers bit for bit: an action that words cannot express exactly is
    written as a vector.
    """
    lines = []
    # Compared as bytes, because -0 equals 0.
    for _, equal in groupby(actions.astype(np.float32), np.ndarray.tobytes):
        action, *repeats = equal
        words = describe(action)
        if parse(words).tobytes() != action.tobytes():
            words = "[" + ", ".join(str(value) for value in action) + "]"
        lines.append(f"{words}*{1 + len(repeats)}\n")
    return "".join(lines)


def fit(actions: np.ndarray, frames: int) -> np.ndarray:
    """Actions [N, 5], cut or repeated from the start -> [frames, 5]."""
    return np.resize(actions, (frames, actions.shape[1]))


def captions(actions: np.ndarray, fps: float) -> list[str]:
    """A caption for the frame that each action [N, 5] leads to: its time and the action, e.g.
    "1.5 s  w+yaw+0.50"."""
    return [f"{(t + 1) / fps:.1f} s  {describe(action)}" for t, action in enumerate(actions)]
