"""Types of settings with the values that are allowed: for fields of a config, constants and flags.

log_steps: Positive = 20            a field of a config dataclass
LOG_STEPS: Positive = 20            a constant of a script that has no such class
add("--port", type=flag(Port))      a flag
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin


def _text(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included unless `above` (then not `low`); NaN never is.

    `multiple_of` is for whole numbers. Of a tuple each element must be in the range.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    multiple_of: int = 1
    odd: bool = False

    def allows(self, value: float) -> bool:
        """Whether a number is in the range."""
        inside = self.low < value <= self.high if self.above else self.low <= value <= self.high
        if not (inside and math.isfinite(value)):
            return False
        return (self.multiple_of == 1 or value % self.multiple_of == 0) and not (self.odd and value % 2 == 0)

    def __str__(self) -> str:
        low = f"above {_text(self.low)}" if self.above else f"{_text(self.low)} or more"
        if math.isinf(self.high):
            text = "" if math.isinf(self.low) else low
        else:
            low = f"above {_text(self.low)} and at most" if self.above else f"from {_text(self.low)} to"
            text = f"{low} {_text(self.high)}"
        more = "odd" if self.odd else f"a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return ", ".join(filter(None, (text, more)))


@dataclass(frozen=True)
class OneOf:
    """A text that is one of some names."""

    names: tuple[str, ...]

    def allows(self, value: str) -> bool:
        """Whether a text is one of the names."""
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


Positive = Annotated[int, Range(1, 10**9)]
NonNegative = Annotated[int, Range(0, 10**9)]
Width = Annotated[int, Range(1, 8192)]  # channels of a network
Layers = Annotated[int, Range(1, 100)]
Number = Annotated[float, Range()]
PositiveNumber = Annotated[float, Range(0, above=True)]
NonNegativeNumber = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 0.999999)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Odd = Annotated[int, Range(1, 99, odd=True)]
PictureSide = Annotated[int, Range(8, 4096, multiple_of=4)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Port = Annotated[int, Range(1, 65535)]
FieldOfView = Annotated[float, Range(1, 170)]  # degrees
FramesPerSecond = Annotated[float, Range(0.1, 1000)]
Precision = Annotated[str, OneOf(("auto", "fp32", "bf16", "fp16"))]

NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", tuple: "a tuple"}


def problem(value: Any, kind: Any) -> str:
    """What a value of this type must be, if it is not; "" if it is, or if nothing is known of the type."""
    limits = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    kind = get_args(kind)[0] if limits else kind
    kind = get_origin(kind) or kind
    values = value if kind is tuple and isinstance(value, tuple) else (value,)
    right = kind not in NOUNS or _is(value, kind)
    if kind is tuple and limits:
        right = right and len(values) > 0 and all(_is(v, int) or _is(v, float) for v in values)
    if right and all(limit.allows(v) for limit in limits for v in values):
        return ""
    return describe(kind, limits)


def describe(kind: type, limits: tuple = ()) -> str:
    """The allowed values in words, such as "a whole number, 1 or more"."""
    noun = NOUNS.get(kind, kind.__name__)
    if kind is tuple and limits:
        noun += " of numbers"
    words = [str(limit) for limit in limits]
    return words[0] if words and isinstance(limits[0], OneOf) else ", ".join(filter(None, [noun, *words]))


def describe_type(kind: Any) -> str:
    """`describe` of a type with its limits; "" for one without."""
    return describe(get_args(kind)[0], get_args(kind)[1:]) if get_origin(kind) is Annotated else ""


def _is(value: Any, kind: type) -> bool:
    """isinstance, but a bool is no number, and a whole number is a float too."""
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def flag(kind: Any) -> Callable[[str], Any]:
    """The argparse type for flags of an annotated number type: reads the text and refuses other values."""
    number = get_args(kind)[0]

    def read(text: str) -> Any:
        try:
            value = number(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or (expected := problem(value, kind)):
            expected = describe(number, get_args(kind)[1:])
            raise argparse.ArgumentTypeError(f"{text[:100]}: expected {expected}")
        return value

    return read
