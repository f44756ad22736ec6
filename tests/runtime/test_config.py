"""The NAME=value command line of the training scripts."""

import pytest

from runtime import config as settings


@pytest.fixture
def script() -> dict:
    """What `globals()` of a training script looks like."""
    return {
        "__doc__": "Trains a thing.",
        "STEPS": 100,
        "LR": 1e-3,
        "RESUME": True,
        "OUT_DIR": "runs/a",
        "BETAS": (0.9, 0.99),
        "RECIPE": "",
        "RECIPES": {"fast": {"STEPS": 10, "LR": 0.1}},
        "helper": print,
        "lower": 1,
    }


def test_values_take_the_type_of_the_constant(script):
    words = ["STEPS=2_000", "LR=3e-4", "RESUME=false", "OUT_DIR=runs/b=c", "BETAS=(0.5, 0.6)"]
    found = settings.apply(script, words)
    assert script["STEPS"] == 2000 and isinstance(script["STEPS"], int)
    assert script["LR"] == 3e-4
    assert script["RESUME"] is False
    assert script["OUT_DIR"] == "runs/b=c", "only the first = separates name and value"
    assert script["BETAS"] == (0.5, 0.6)
    assert found == settings.constants(script)


def test_a_whole_number_is_a_fine_float(script):
    settings.apply(script, ["LR=1"])
    assert script["LR"] == 1.0 and isinstance(script["LR"], float)


@pytest.mark.parametrize("word", ["STEPS=1.5", "STEPS=many", "LR=fast", "RESUME=maybe", "BETAS=(0.9,"])
def test_a_value_of_another_type_is_refused(script, word, capsys):
    before = dict(script)
    with pytest.raises(SystemExit) as stopped:
        settings.apply(script, [word])
    assert stopped.value.code == 2
    name, value = word.split("=")
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and name in message and value in message
    assert type(before[name]).__name__ in message, "it says what it wants"
    assert script == before, "a refused command line changes nothing"


@pytest.mark.parametrize(
    "words, told",
    [
        (["STEP=5"], "STEPS"),
        (["lr=5"], "LR"),
        (["OUTDIR=x"], "OUT_DIR"),
        (["LR=1", "LR=2"], "LR is given twice"),
        (["--steps"], "NAME=value"),
        (["lower=2"], "there is no constant lower"),
        (["RECIPE=fats"], "did you mean fast"),
    ],
)
def test_refusals_name_what_is_meant(script, words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        settings.apply(script, words, script["RECIPES"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and told in message


def test_recipe_goes_over_the_file_and_the_command_line_over_the_recipe(script):
    settings.apply(script, ["LR=0.5", "RECIPE=fast"], script["RECIPES"])
    assert (script["STEPS"], script["LR"]) == (10, 0.5)


def test_recipe_named_in_the_file_is_taken_too(script):
    script["RECIPE"] = "fast"
    settings.apply(script, [], script["RECIPES"])
    assert (script["STEPS"], script["LR"]) == (10, 0.1)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["STEPS=5", "--help"]])
def test_help_prints_every_constant_and_stops(script, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        settings.apply(script, words)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "Trains a thing." in shown
    for name in ("STEPS=100", "LR=0.001", "RESUME=True", "OUT_DIR='runs/a'", "BETAS=(0.9, 0.99)"):
        assert name in shown
    assert "helper" not in shown and "lower" not in shown
