"""Settings: constants of a script, recipes, NAME=value words, and constants that have no effect."""

import runpy
from dataclasses import FrozenInstanceError, asdict, dataclass
from pathlib import Path

import pytest

from runtime import config as settings
from runtime.config import SettingError, used_if

SCRIPT = '''"""Trains a thing."""
from math import pi as PI
from runtime.run_log import MODES
STEPS = 100
LR = 1e-3
RESUME = True
OUT_DIR = "runs/a"
BETAS = (0.9, 0.99)
RECIPE = ""
MODEL = "small"
WIDTH = 8
DECAY = 0.5
helper, lower = print, 1
'''


@dataclass(frozen=True)
class ThingConfig:
    steps: int = 100
    lr: float = 1e-3
    resume: bool = True
    out_dir: str = "runs/a"
    betas: tuple = (0.9, 0.99)
    recipe: str = ""
    model: str = "small"
    width: int = used_if(8, model="large")
    decay: float = used_if(0.5, refuse=True, model="large")


@pytest.fixture
def load(tmp_path):
    """Writes the script, with edited lines, and loads its settings as a training script does."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "fast.py").write_text('"""Fast."""\nSTEPS = 10\nLR = 0.1\n')

    def loaded(words=(), config_class=ThingConfig, **edits):
        text = SCRIPT
        for name, value in edits.items():
            before = next(line for line in text.splitlines() if line.startswith(f"{name} ="))
            text = text.replace(before, f"{name} = {value!r}")
        path = tmp_path / "thing.py"
        path.write_text(text)
        namespace = runpy.run_path(str(path))
        return settings.load(namespace, list(words), config_class, tmp_path / "recipes")

    return loaded


@pytest.mark.parametrize("config_class", [ThingConfig, None], ids=["declared", "from the file"])
def test_values_take_the_type_of_the_constant(load, config_class):
    words = ["STEPS=2_000", "LR=3e-4", "RESUME=false", "OUT_DIR=runs/b=c", "BETAS=(0.5, 0.6)"]
    config = load(words, config_class)
    assert config.steps == 2000 and isinstance(config.steps, int)
    assert config.lr == 3e-4
    assert config.resume is False
    assert config.out_dir == "runs/b=c", "only the first = separates name and value"
    assert config.betas == (0.5, 0.6)
    with pytest.raises(FrozenInstanceError):
        config.steps = 1


def test_only_constants_that_the_script_assigns_are_settings(load):
    config = load([], None)
    names = {"steps", "lr", "resume", "out_dir", "betas", "recipe", "model", "width", "decay"}
    assert set(asdict(config)) == names, "neither imported names in capitals nor lowercase ones"
    assert settings.constants_of(config)["OUT_DIR"] == "runs/a"
    with pytest.raises(SettingError, match="there is no constant MODES"):
        load(["MODES=1"], None)


def test_a_constant_without_a_field_is_refused(load, tmp_path):
    @dataclass(frozen=True)
    class Smaller:
        steps: int = 100

    with pytest.raises(SettingError, match="thing.py: there is no constant LR"):
        load([], Smaller)


def test_a_whole_number_is_read_as_a_float(load):
    config = load(["LR=1"])
    assert config.lr == 1.0 and isinstance(config.lr, float)


@pytest.mark.parametrize("word", ["STEPS=1.5", "STEPS=many", "LR=fast", "RESUME=maybe", "BETAS=(0.9,"])
def test_a_value_of_another_type_is_refused(load, word):
    name, value = word.split("=")
    wanted = type(getattr(ThingConfig(), name.lower())).__name__
    with pytest.raises(SettingError) as refused:
        load([word])
    assert (
        name in str(refused.value)
        and value in str(refused.value)
        and f"give a {wanted}" in str(refused.value)
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["STEP=5"], "did you mean STEPS"),
        (["lr=5"], "did you mean LR"),
        (["OUTDIR=x"], "did you mean OUT_DIR"),
        (["LR=1", "LR=2"], "LR is given twice"),
        (["--steps"], "NAME=value"),
        (["lower=2"], "there is no constant lower"),
        (["RECIPE=fats"], "did you mean fast"),
    ],
)
def test_refusals_name_the_nearest_match(load, words, message):
    with pytest.raises(SettingError, match=message):
        load(words)


# ---------------------------------------------------------------- recipes


def test_the_recipe_goes_over_the_defaults_and_the_command_line_over_the_recipe(load, capsys):
    config = load(["LR=0.5", "RECIPE=fast"])
    assert (config.steps, config.lr) == (10, 0.5)
    printed = capsys.readouterr().out.splitlines()
    assert {"STEPS = 10  (recipe fast)", "LR = 0.5  (command line, instead of 0.1 of recipe fast)"} <= set(
        printed
    )


def test_a_recipe_named_in_the_file_is_used(load):
    config = load(RECIPE="fast")
    assert (config.steps, config.lr) == (10, 0.1)


@pytest.mark.parametrize(
    "words, edits", [(["RECIPE=fast"], {}), ([], {"RECIPE": "fast"})], ids=["word", "file"]
)
def test_an_edited_value_wins_over_the_recipe_and_that_is_printed(load, capsys, words, edits):
    config = load(words, LR=0.7, **edits)
    assert (config.steps, config.lr) == (10, 0.7)
    assert "LR = 0.7  (thing.py, instead of 0.1 of recipe fast)" in capsys.readouterr().out.splitlines()
    assert load([*words, "LR=0.2"], LR=0.7, **edits).lr == 0.2


def test_a_recipe_holds_plain_values_of_known_constants(load, tmp_path):
    (tmp_path / "recipes" / "sum.py").write_text("STEPS = len([1])\n")
    with pytest.raises(SettingError, match="sum.py: STEPS is not a plain value"):
        load(["RECIPE=sum"])
    (tmp_path / "recipes" / "odd.py").write_text("STEP = 3\n")
    with pytest.raises(SettingError, match="recipe odd: there is no constant STEP; did you mean STEPS"):
        load(["RECIPE=odd"])


# ---------------------------------------------------------------- constants without an effect


@pytest.mark.parametrize("words, edits", [(["WIDTH=9"], {}), ([], {"WIDTH": 9})], ids=["word", "file"])
def test_a_constant_without_an_effect_is_announced(load, capsys, words, edits):
    message = "note: WIDTH = 9 has no effect with MODEL = 'small'; it is for MODEL = 'large'"
    load(words, **edits)
    assert message in capsys.readouterr().out.splitlines()
    load([*words, "MODEL=large"], **edits)
    assert "no effect" not in capsys.readouterr().out


def test_constants_that_nobody_set_are_not_announced(load, capsys):
    load()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words, edits", [(["DECAY=0.5"], {}), ([], {"DECAY": 0.6})], ids=["word", "file"])
def test_a_constant_without_an_effect_may_be_refused(load, words, edits):
    with pytest.raises(
        SettingError, match="DECAY = 0.. has no effect with MODEL = 'small'.*do not set DECAY"
    ):
        load(words, **edits)
    load([*words, "MODEL=large"], **edits)


def test_a_recipes_constant_without_an_effect_is_announced_only(load, tmp_path, capsys):
    (tmp_path / "recipes" / "slow.py").write_text("MODEL = 'large'\nDECAY = 0.9\n")
    load(["RECIPE=slow", "MODEL=small"])
    assert "DECAY = 0.9 has no effect with MODEL = 'small'" in capsys.readouterr().out


# ---------------------------------------------------------------- help and files


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["STEPS=5", "--help"]])
def test_help_prints_every_constant_and_stops(load, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(words)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "Trains a thing." in shown
    for name in ("STEPS=100", "LR=0.001", "RESUME=True", "OUT_DIR='runs/a'", "BETAS=(0.9, 0.99)"):
        assert name in shown
    assert "helper" not in shown and "lower" not in shown and "MODES" not in shown


def test_a_file_of_constants_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "broken.py").write_text("LR = = 3\n")
    for name in ("broken.py", "missing.py"):
        with pytest.raises(SettingError, match=name):
            settings.assigned_constants(Path(tmp_path / name))
