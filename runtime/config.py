"""What scripts take from the command line: NAME=value constants, types of flags, the end on an error.

A script that trains keeps every sampling as a constant that a reader can edit in place. `apply` lets the same
constants be given on the command line, checked against the type of the value that stands in the file.
"""

import argparse
import ast
import difflib
import math
import sys

from runtime.errors import UserError


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: a whole number, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more")
    return value


def positive_int(text: str) -> int:
    """argparse type: a whole number, 1 or more."""
    value = non_negative_int(text)
    if not value:
        raise argparse.ArgumentTypeError("0: must be 1 or more")
    return value


class SettingError(UserError):
    """A constant or a flag that does not exist, or whose value is not allowed."""


def constants(namespace: dict) -> dict[str, object]:
    """The settings of a script: its module-level UPPERCASE names that hold plain values."""
    plain = (bool, int, float, str, tuple)
    return {k: v for k, v in namespace.items() if k.isupper() and isinstance(v, plain)}


def parse_value(name: str, text: str, current: object) -> object:
    """Reads `text` as a value of the type of `current`.

    Raises SettingError if it does not fit: True/False for bool, whole numbers for int, any number for float,
    a Python tuple for tuple; strings are taken as they stand.
    """
    wanted = type(current).__name__
    try:
        if isinstance(current, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        if isinstance(current, int):
            return int(text.replace("_", ""))
        if isinstance(current, float):
            return float(text)
        if isinstance(current, tuple):
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return text
    except (KeyError, ValueError, SyntaxError):
        raise SettingError(
            f"{name}={text}: {name} is of type {wanted} (now {current!r}); give a {wanted}"
        ) from None


def parse_overrides(settings: dict[str, object], arguments: list[str]) -> dict[str, object]:
    """Turns ["LR=1e-4", ...] into {"LR": 0.0001}, type-checked against `settings`.

    Raises SettingError for a word without "=", an unknown name (with the nearest match) or one given twice.
    """
    found: dict[str, object] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SettingError(f"{argument!r} is not of the form NAME=value")
        if name not in settings:
            near = difflib.get_close_matches(name.upper(), settings, n=1, cutoff=0.0)
            raise SettingError(f"there is no constant {name}; did you mean {near[0]}?")
        if name in found:
            raise SettingError(f"{name} is given twice; give it once")
        found[name] = parse_value(name, text, settings[name])
    return found


def apply(
    namespace: dict, arguments: list[str] | None = None, recipes: dict[str, dict] | None = None
) -> dict:
    """Overrides the UPPERCASE constants of a script's `globals()` from its command line and returns them all.

    With `recipes`, the constant RECIPE names a set of values that is put over the constants of the file; the
    command line has the last word. `--help` prints the script's docstring and every constant, and exits.
    Raises SettingError for a bad override.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = constants(namespace)
    if "-h" in arguments or "--help" in arguments:
        print((namespace.get("__doc__") or "").strip())
        print("\nConstants (edit them in the file, or give NAME=value):")
        for name, value in settings.items():
            print(f"  {name}={value!r}")
        raise SystemExit(0)
    overrides = parse_overrides(settings, arguments)
    name = overrides.get("RECIPE", settings.get("RECIPE"))
    if recipes is not None and name:
        if name not in recipes:
            near = difflib.get_close_matches(str(name), recipes, n=1, cutoff=0.0)
            raise SettingError(f"RECIPE={name}: there is no such recipe; did you mean {near[0]}?")
        overrides = {**recipes[name], **overrides}
    namespace.update(overrides)
    for name, value in overrides.items():
        print(f"{name} = {value!r}")
    return {**settings, **overrides}
