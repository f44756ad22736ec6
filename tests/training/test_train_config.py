"""The settings of train.py: defaults, the recipe v4.5.2, and which constant is for which model."""

import runpy
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import train
from runtime.config import SettingError, constants_of, load, read_recipe
from training.models import loss_weights
from training.train_config import RECIPES, TrainConfig, recipe_config

# The last ConvGRU recipe of the baseline, as documented. Its values are fixed: results are compared with it.
V4_5_2 = {
    "MODEL": "convgru", "EMBED_DIM": 256, "HIDDEN_DIM": 384, "LAYERS": 6, "CODEBOOK_INIT": False,
    "BATCH_SIZE": 16, "LR": 3e-5, "MIN_LR": 1e-6, "WARMUP_STEPS": 500, "GRAD_CLIP": 0.5,
    "AVERAGE_DECAY": 0.0,
    "SEQ_LEN": 20, "SEQ_LEN_MAX": 20, "BALANCE": 0.0,
    "AR_GROWTH": "ramp", "AR_START_STEP": 0, "AR_RAMP_STEPS": 10_000, "AR_LEN_MAX": 18,
    "SS_MIDPOINT_STEP": 10_000, "SS_STEEPNESS": 4000.0, "SS_MAX_TEACHER_PROB": 0.95,
    "SS_MIN_TEACHER_PROB": 0.15, "SELF_FED_GREEDY": True, "SELF_FED_TEMPERATURE": 1.0,
    "TOKEN_NOISE": 0.0, "LATENT_NOISE": 0.0,
    "CE_WEIGHT": 0.0, "LABEL_SMOOTHING": 0.0, "NEIGHBOR_WEIGHT": 2.0, "NEIGHBOR_KERNEL": 3,
    "NEIGHBOR_EXACT_MIX": 0.3, "SEMANTIC_WEIGHT": 3.0, "ENTROPY_WEIGHT": 0.05, "ENTROPY_FLOOR": 4.5,
    "SHARPNESS_WEIGHT": 0.05, "TEMPORAL_WEIGHT": 0.05, "PERCEPTUAL_WEIGHT": 0.0,
}  # fmt: skip


def load_train(words=(), path: Path | None = None) -> TrainConfig:
    """The settings that `python train.py WORDS` has, or those of an edited copy of it."""
    namespace = vars(train) if path is None else runpy.run_path(str(path))
    return load(namespace, list(words), TrainConfig, RECIPES)


def edited(folder: Path, before: str, after: str) -> Path:
    """A copy of train.py with one line edited."""
    text = Path(train.__file__).read_text()
    assert text.count(before) == 1
    (folder / "train.py").write_text(text.replace(before, after))
    return folder / "train.py"


def test_the_constants_of_train_py_are_the_defaults(capsys):
    assert load_train() == TrainConfig(), (
        "train.py and training/train_config.py differ; a default is changed in both"
    )
    assert capsys.readouterr().out == ""


def test_every_constant_is_a_setting_and_nothing_else_is():
    config = load_train()
    assert set(constants_of(config)) == {name for name in vars(train) if name.isupper()} - {
        "WORLD_KIND",
        "RECIPES",
    }


def test_the_recipe_has_the_documented_values():
    assert read_recipe(RECIPES, "v4.5.2") == V4_5_2
    config = recipe_config("v4.5.2")
    assert constants_of(config) == constants_of(TrainConfig()) | V4_5_2
    assert load_train(["RECIPE=v4.5.2"]) == TrainConfig(**asdict(config) | {"recipe": "v4.5.2"})


def test_the_recipes_weights_reach_the_loss():
    weights = loss_weights(recipe_config("v4.5.2"))
    assert (weights.ce, weights.label_smoothing, weights.perceptual) == (0.0, 0.0, 0.0)
    assert (weights.neighbor, weights.neighbor_kernel, weights.neighbor_exact_mix) == (2.0, 3, 0.3)
    assert (weights.semantic, weights.entropy, weights.entropy_floor) == (3.0, 0.05, 4.5)
    assert (weights.sharpness, weights.temporal) == (0.05, 0.05)


def test_the_recipes_constants_all_have_an_effect(capsys):
    load_train(["RECIPE=v4.5.2"])
    assert "no effect" not in capsys.readouterr().out


def test_constants_of_the_other_model_are_announced(tmp_path, capsys):
    load_train(["EMBED_DIM=64"])
    assert "EMBED_DIM = 64 has no effect with MODEL = 'geometry'" in capsys.readouterr().out
    load_train(["RECIPE=v4.5.2", "PAIR_SHARE=0.5"])
    assert "PAIR_SHARE = 0.5 has no effect with MODEL = 'convgru'" in capsys.readouterr().out
    load_train(path=edited(tmp_path, "SEMANTIC_WEIGHT = 0.0", "SEMANTIC_WEIGHT = 1.0"))
    assert "SEMANTIC_WEIGHT = 1.0 has no effect with MODEL = 'geometry'" in capsys.readouterr().out


CURRICULA = {
    "rollout": ["AR_RAMP_STEPS=100", "SS_MIDPOINT_STEP=1", "SS_STEEPNESS=2.0", "SS_MAX_TEACHER_PROB=0.5"],
    "ramp": ["AR_STEP=3"],
}


@pytest.mark.parametrize("growth, word", [(g, word) for g, words in CURRICULA.items() for word in words])
def test_curriculum_constants_of_the_other_growth_are_refused(growth, word):
    with pytest.raises(SettingError, match=f"{word.partition('=')[0]} = .* has no effect with AR_GROWTH"):
        load_train([f"AR_GROWTH={growth}", word])
    load_train([f"AR_GROWTH={'ramp' if growth == 'rollout' else 'rollout'}", word])


def test_an_edited_value_wins_over_the_recipe_and_that_is_printed(tmp_path, capsys):
    path = edited(tmp_path, "LR = 1e-3  #", "LR = 5e-4  #")
    config = load_train(["RECIPE=v4.5.2"], path)
    assert (config.lr, config.semantic_weight) == (5e-4, 3.0)
    assert "LR = 0.0005  (train.py, instead of 3e-05 of recipe v4.5.2)" in capsys.readouterr().out


def test_conditions_name_settings_that_exist():
    names = {f.name for f in fields(TrainConfig)}
    for setting in fields(TrainConfig):
        assert set(setting.metadata.get("used_if", {})) <= names, setting.name


@pytest.mark.parametrize(
    "words, message",
    [
        (["TRAINED_PARTS=head"], "TRAINED_PARTS=head: .*give INIT_FROM"),
        (["PAIR_INVENTED=0.5"], "PAIR_INVENTED=0.5: .*ADVERSARIAL_WEIGHT above 0"),
    ],
)
def test_settings_that_would_leave_something_untrained_are_refused(words, message):
    with pytest.raises(SettingError, match=message):
        load_train(words)
