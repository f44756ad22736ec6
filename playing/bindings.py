"""The key map of the window and the page.

A control acts while its key is pressed, a command once per press.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Binding:
    """The key of a control or command `name`: pygame's name (without K_) and the browser's code."""

    name: str
    key: str
    code: str
    help: str = ""  # "keys: what they do"; empty if the help of another binding covers it


CONTROLS = (
    Binding("forward", "w", "KeyW", "W A S D: walk"),
    Binding("left", "a", "KeyA"),
    Binding("back", "s", "KeyS"),
    Binding("right", "d", "KeyD"),
    Binding("jump", "SPACE", "Space", "Space: jump"),
    Binding("look_left", "LEFT", "ArrowLeft", "mouse or arrows: look"),
    Binding("look_right", "RIGHT", "ArrowRight"),
    Binding("look_up", "UP", "ArrowUp"),
    Binding("look_down", "DOWN", "ArrowDown"),
)
# Commands of the session (`Session.command`).
COMMANDS = (
    Binding("restart", "r", "KeyR", "R: restart, first seed"),
    Binding("new seed", "RETURN", "Enter", "Enter: restart, new seed"),
    Binding("next", "n", "KeyN", "N: next start place"),
    Binding("start place 1", "1", "Digit1", "1-9: start place by number"),
    *(Binding(f"start place {n}", str(n), f"Digit{n}") for n in range(2, 10)),
    Binding("pause", "p", "KeyP", "P: pause"),
    Binding("single step", "PERIOD", "Period", ".: single step"),
    Binding("greedy", "g", "KeyG", "G: greedy or sampled tokens"),
    Binding("hotter", "RIGHTBRACKET", "BracketRight", "[ ]: lower, higher temperature"),
    Binding("colder", "LEFTBRACKET", "BracketLeft"),
    Binding("more passes", "EQUALS", "Equal", "- =: fewer, more decoding passes"),
    Binding("fewer passes", "MINUS", "Minus"),
    Binding("go back", "b", "KeyB", "B: back to the last good picture"),
    Binding("compare", "c", "KeyC", "C: truth | generated, with the recorded actions"),
    Binding("inset", "i", "KeyI", "I: inset of the recording at the same time"),
    Binding("record", "v", "KeyV", "V: record video and actions"),
)
# Commands of the window and the page themselves.
VIEW_COMMANDS = (
    Binding("places", "m", "KeyM", "M: choose another start place"),
    Binding("help", "h", "KeyH", "H: this help"),
    Binding("stats", "F3", "F3", "F3: statistics"),
    Binding("overlay", "F4", "F4", "F4: map, distances and memory"),
    Binding("smooth", "F5", "F5", "F5: sharp or smooth pixels"),
    Binding("fullscreen", "F11", "F11", "F11: full screen"),
    Binding("screenshot", "F12", "F12", "F12: screenshot"),
)


def help_lines(escape: str) -> list[str]:
    """The help, one line per key or group of keys; `escape` says what Esc does."""
    return [b.help for b in (*CONTROLS, *COMMANDS, *VIEW_COMMANDS) if b.help] + [f"Esc: {escape}"]
