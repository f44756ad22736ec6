"""The curriculum: window length, self-fed steps, and how both grow."""

import math

import pytest

from runtime.config import SettingError
from training.curriculum import Curriculum
from training.train_config import TrainConfig

RAMP = TrainConfig(
    ar_growth="ramp", seq_len=4, seq_len_max=6, seq_len_grow_steps=100, ar_start_step=50, ar_ramp_steps=100,
    ar_len_max=8, ss_midpoint_step=1000, ss_steepness=100.0, ss_max_teacher_prob=0.95,
    ss_min_teacher_prob=0.15,
)  # fmt: skip


def test_the_window_grows():
    curriculum = Curriculum(RAMP)
    assert [curriculum.sequence_length(s) for s in (0, 99, 100, 250, 10_000)] == [4, 4, 5, 6, 6]


def test_ramp():
    curriculum = Curriculum(RAMP)
    assert [curriculum.self_fed_length(s, 20) for s in (0, 50, 100, 150, 999)] == [0, 0, 4, 8, 8]
    assert curriculum.self_fed_length(999, 5) == 4, "the first step of a window is given recorded tokens"
    teacher = [curriculum.teacher_probability(s) for s in (0, 900, 1000, 1100, 9999)]
    assert teacher == pytest.approx([0.95, 1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.e), 0.15])


def test_the_default_curriculum_feeds_the_model_its_own_samples_from_the_first_step():
    curriculum = Curriculum(TrainConfig())
    inputs = curriculum.inputs(0, 12)
    assert inputs.ar_len == 2 and inputs.teacher_prob == 0.15


def test_ar_len_grows_with_the_validation_rollouts():
    curriculum = Curriculum(TrainConfig(ar_step=2, ar_len_max=7))
    lengths = []
    for psnr in (10.0, 9.0, math.nan, 11.0, 10.5, 12.0, 13.0):
        curriculum.validated(psnr)
        lengths.append(curriculum.self_fed_length(5, 20))
    assert lengths == [4, 4, 4, 6, 6, 7, 7], "only an improvement extends it, up to AR_LEN_MAX"
    assert curriculum.self_fed_length(5, 5) == 4, "the first step of a window is given recorded tokens"


@pytest.mark.parametrize("growth", ["rollout", "ramp"])
def test_no_step_is_self_fed_before_ar_start_step(growth):
    curriculum = Curriculum(TrainConfig(ar_growth=growth, ar_start_step=50, ar_ramp_steps=10))
    curriculum.validated(20.0)
    assert [curriculum.self_fed_length(s, 12) for s in (0, 49)] == [0, 0]
    assert curriculum.self_fed_length(60, 12) > 0


def test_ar_len_max_bounds_the_start():
    assert Curriculum(TrainConfig(ar_len_max=0)).self_fed_length(0, 12) == 0


def test_a_restored_curriculum_continues():
    curriculum = Curriculum(TrainConfig())
    curriculum.validated(20.0)
    other = Curriculum(TrainConfig())
    other.restore(curriculum.content())
    for c in (curriculum, other):
        c.validated(19.0)
        assert c.self_fed_length(0, 12) == 4


def test_an_unknown_growth_is_refused():
    with pytest.raises(SettingError, match="AR_GROWTH=sigmoid: must be rollout or ramp"):
        Curriculum(TrainConfig(ar_growth="sigmoid"))
