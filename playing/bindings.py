"""Which key does what, for the window and the page: the one key map.

A control is held, a command is given once. Keys have pygame's names (behind K_) and the browser's codes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Binding:
    """One key: `does` names the control or command, `key` is pygame's name, `code` the browser's."""

    does: str
    key: str
    code: str
    says: str = ""  # in the help; empty: it is said with another one


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
# Those that a session understands (`Session.command`).
COMMANDS = (
    Binding("reset", "r", "KeyR", "R: start over, the same rollout"),
    Binding("again", "RETURN", "Enter", "Enter: start over, another rollout"),
    Binding("next", "n", "KeyN", "N, 1-9: next place, that place"),
    *(Binding(f"place {n}", str(n), f"Digit{n}") for n in range(1, 10)),
    Binding("pause", "p", "KeyP", "P: pause"),
    Binding("single", "PERIOD", "Period", ".: one step"),
    Binding("greedy", "g", "KeyG", "G: likeliest tokens or drawn ones"),
    Binding("hotter", "RIGHTBRACKET", "BracketRight", "[ ]: temperature"),
    Binding("colder", "LEFTBRACKET", "BracketLeft"),
    Binding("more passes", "EQUALS", "Equal", "- =: passes of decoding"),
    Binding("fewer passes", "MINUS", "Minus"),
    Binding("compare", "c", "KeyC", "C: truth | rollout, by the recorded actions"),
    Binding("record", "v", "KeyV", "V: record video and actions"),
)
# Those that what shows the session does by itself.
VIEW_COMMANDS = (
    Binding("help", "h", "KeyH", "H: these keys"),
    Binding("facts", "F3", "F3", "F3: figures"),
    Binding("beliefs", "F4", "F4", "F4: what the world remembers and believes"),
    Binding("smooth", "F5", "F5", "F5: sharp or smooth pixels"),
    Binding("fullscreen", "F11", "F11", "F11: full screen"),
    Binding("screenshot", "F12", "F12", "F12: screenshot"),
)


def help_lines() -> list[str]:
    """What the keys do, a line each."""
    return [b.says for b in (*CONTROLS, *COMMANDS, *VIEW_COMMANDS) if b.says] + ["Esc: free the mouse, quit"]
