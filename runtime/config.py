"""Settings of scripts: constants in the file, recipes and NAME=value words; types of argparse flags.

A training script keeps its settings as UPPERCASE constants at its top, where a person edits them. `load`
makes a frozen dataclass of them, a recipe (a file of values) and the command line.
"""

import argparse
import ast
import difflib
import sys
from dataclasses import asdict, field, fields, make_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from runtime.errors import UserError, one_line
from runtime.ranges import (
    NonNegative,
    NonNegativeNumber,
    Number,
    Positive,
    PositiveNumber,
    Share,
    describe_type,
    flag,
    problem,
)


class SettingError(UserError):
    """A constant or a flag that does not exist, or whose value is not allowed."""


# ---------------------------------------------------------------- types of argparse flags


positive_float = flag(PositiveNumber)
non_negative_float = flag(NonNegativeNumber)
number = flag(Number)
share = flag(Share)
positive_int = flag(Positive)
non_negative_int = flag(NonNegative)


class ScriptParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors end with a command that works and how long that takes, instead of the
    usage. `example` holds both."""

    def __init__(self, *args: Any, example: str, **options: Any):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.example = example

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\nfor example: {self.example}\nall flags: --help\n")


# ---------------------------------------------------------------- constants of a script


def used_if(default: Any, *, refuse: bool = False, **condition: Any) -> Any:
    """A dataclass field that has an effect only where another field has a certain value.

    `channels: int = used_if(64, model="geometry")`. If a person sets it elsewhere, `load` prints that it has
    no effect, or raises SettingError with `refuse`.
    """
    return field(default=default, metadata={"used_if": condition, "refuse": refuse})


def constants_of(config: Any) -> dict[str, Any]:
    """A config dataclass as the constants of its script: {"LR": 0.001, ...}."""
    return {name.upper(): value for name, value in asdict(config).items()}


def assigned_constants(path: str | Path) -> dict[str, ast.expr]:
    """The UPPERCASE names that a Python file assigns at its top level, in their order, and their expressions.

    Imported names are not among them. Raises SettingError if the file is missing or not Python.
    """
    try:
        tree = ast.parse(Path(path).read_text())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise SettingError(f"{path}: cannot be read as a file of constants: {error}") from None
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.value for t in targets if isinstance(t, ast.Name) and t.id.isupper()}
    return found


def read_recipe(folder: str | Path, name: str) -> dict[str, Any]:
    """The values of the recipe `folder`/`name`.py, a file of lines NAME = value: {"LR": 3e-05, ...}.

    Raises SettingError if there is no such recipe (with the nearest match) or if a value is not a literal.
    """
    path = Path(folder) / f"{name}.py"
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("*.py"))
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingError(f"RECIPE={name}: {path.parent} has no such recipe{hint}")
    values = {}
    for constant, expression in assigned_constants(path).items():
        try:
            values[constant] = ast.literal_eval(expression)
        except ValueError:
            raise SettingError(f"{path}: {constant} is not a plain value; write a literal") from None
    return values


def load(
    namespace: dict[str, Any],
    arguments: list[str] | None = None,
    config_class: type | None = None,
    recipes: str | Path | None = None,
) -> Any:
    """The settings of a script as a frozen dataclass, one lowercase field for each constant.

    `namespace` is the script's `globals()`, `arguments` its NAME=value words (default: the command line),
    `recipes` the folder of files that the constant RECIPE names.

    `config_class` holds the default of each constant, so that a value edited in the file can be told from one
    that was not; without it the file's values are the defaults. A recipe goes over the defaults, an edited
    value over the recipe (which is printed), and the command line over all. Each value that is not the
    default is printed with its source. A constant that is set but has no effect (`used_if`) is announced or
    refused.

    `--help` prints the script's docstring and constants and exits. Raises SettingError.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    script = Path(namespace["__file__"]).name
    in_file = {name: namespace[name] for name in assigned_constants(namespace["__file__"])}
    if config_class is None:
        module = sys.modules.get(namespace.get("__name__"))
        types = {**namespace.get("__annotations__", {}), **getattr(module, "__annotations__", {})}
        columns = [(name.lower(), types.get(name, type(value)), value) for name, value in in_file.items()]
        config_class = make_dataclass("Config", columns, frozen=True)
    kinds = {name.upper(): kind for name, kind in get_type_hints(config_class, include_extras=True).items()}
    defaults = {f.name.upper(): f.default for f in fields(config_class)}
    for name in in_file:
        _check_name(name, defaults, script)
    in_file = {name: in_file.get(name, default) for name, default in defaults.items()}
    if "-h" in arguments or "--help" in arguments:
        print((namespace.get("__doc__") or "").strip())
        print("\nConstants (edit them in the file, or give NAME=value):")
        for name, value in in_file.items():
            allowed = describe_type(kinds[name])
            print(f"  {name}={value!r}" + (f"  ({allowed})" if allowed else ""))
        raise SystemExit(0)

    given = parse_overrides(defaults, arguments)
    edited = {name: value for name, value in in_file.items() if value != defaults[name]}
    recipe_name = given.get("RECIPE", in_file.get("RECIPE"))
    recipe = read_recipe(recipes, recipe_name) if recipes and recipe_name else {}
    for name in recipe:
        _check_name(name, defaults, f"recipe {recipe_name}")

    sources = dict.fromkeys(recipe, f"recipe {recipe_name}")
    sources |= dict.fromkeys(edited, script) | dict.fromkeys(given, "command line")
    values = defaults | recipe | edited | given
    for name, value in values.items():
        if expected := problem(value, kinds[name]):
            where = sources.get(name, script)
            raise SettingError(f"{name}={_short(value)} ({where}): expected {expected}; give such a value")
    for name, source in sources.items():
        kept = name in recipe and values[name] != recipe[name]
        instead = f", instead of {recipe[name]!r} of recipe {recipe_name}" if kept else ""
        print(f"{name} = {values[name]!r}  ({source}{instead})")
    config = config_class(**{name.lower(): value for name, value in values.items()})
    _report_unused(config, sources)
    return config


def _short(value: Any) -> str:
    """A value as text, cut if it is long."""
    text = one_line(Exception(value)) if isinstance(value, str) else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _check_name(name: str, known: dict[str, Any], where: str) -> None:
    """Raises SettingError, with the nearest match, unless `name` is a known constant."""
    if name not in known:
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
        raise SettingError(f"{where}: there is no constant {name[:60]}; did you mean {near[0]}?")


def _report_unused(config: Any, sources: dict[str, str]) -> None:
    """Announces or refuses each constant that was set (in `sources`) but has no effect in this config."""
    for setting in fields(config):
        name = setting.name.upper()
        for other, wanted in setting.metadata.get("used_if", {}).items():
            found = getattr(config, other)
            if name not in sources or found == wanted:
                continue
            message = (
                f"{name} = {getattr(config, setting.name)!r} has no effect with {other.upper()} = {found!r}; "
                f"it is for {other.upper()} = {wanted!r}"
            )
            if setting.metadata["refuse"] and not sources[name].startswith("recipe"):
                raise SettingError(f"{message}: set {other.upper()} to that, or do not set {name}")
            print(f"note: {message}")


# ---------------------------------------------------------------- NAME=value words


def parse_overrides(defaults: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Turns ["LR=1e-4", ...] into {"LR": 0.0001, ...}, each value of the type of its default.

    Raises SettingError for a word without "=", an unknown name (with the nearest match), a name that is given
    twice, or a value of another type.
    """
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise SettingError(f"{argument!r} is not of the form NAME=value")
        _check_name(name, defaults, "command line")
        if name in found:
            raise SettingError(f"{name} is given twice; give it once")
        if "\0" in text:
            raise SettingError(f"{name}: has a character that no file name or number has; give another value")
        found[name] = parse_value(name, text, defaults[name])
    return found


def parse_value(name: str, text: str, default: Any) -> Any:
    """Reads `text` as a value of the type of `default`.

    True/False for bool, whole numbers for int, any number for float, a Python tuple for tuple; strings are
    taken as they stand. Raises SettingError if the text does not fit.
    """
    wanted = type(default).__name__
    try:
        if isinstance(default, bool):
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return words[text.lower()]
        if isinstance(default, int):
            return int(text.replace("_", ""))
        if isinstance(default, float):
            return float(text)
        if isinstance(default, tuple):
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return text
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise SettingError(
            f"{name}={_short(text)}: {name} is of type {wanted} (default {default!r}); give a {wanted}"
        ) from None
