"""benchmark.py: it times train.py's step, counts frames and FLOPs, and writes all its metrics."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY_WORLD, tiny_tokenizer

import benchmark
import train
from benchmarking import data_loading, play_step, training_step
from benchmarking.measure import format_number, time_alternately
from benchmarking.training_step import INPUTS, KINDS, TrainingStep
from dataset.token_files import DataError
from dataset.windows import TokenClips
from depth.predictor import load_depth
from model_convGru import ConvGRUWorldModel
from rollout.context import World
from rollout.sampling import PLAY
from training.geometry_window import geometry_window_loss, pair_loss
from training.window_parts import LossWeights, StepLoss

TINY = {
    training_step: {"MATMUL_SIZES": {"cpu": (16, 32)}},
    data_loading: {"WINDOWS": 4, "FRAMES": 6, "CLIPS": 1},
    play_step: {"STEPS": 9, "WARMUP_STEPS": 1, "CONTEXT_FRAMES": 2},
}


@pytest.fixture
def clips(tiny) -> TokenClips:
    return TokenClips(tiny.tokens.parent, "all")


@pytest.fixture
def shrink(monkeypatch) -> None:
    """Makes every section as small as it gets."""
    for module, values in TINY.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(training_step, "peak_megabytes", lambda *_: 1.0)  # has a test of its own
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def timed_step(kind: str, clips: TokenClips, windows: int = 2) -> TrainingStep:
    """A training step whose model has the same weights at every call."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    return TrainingStep(kind, windows, tokenizer, load_depth(), clips, torch.float32)


def test_train_settings_are_the_defaults_of_train():
    assert training_step.WEIGHTS == LossWeights(
        ce=train.CE_WEIGHT,
        label_smoothing=train.LABEL_SMOOTHING,
        perceptual=train.PERCEPTUAL_WEIGHT,
        disoccluded=train.DISOCCLUDED_WEIGHT,
        magnified=train.MAGNIFIED_WEIGHT,
        cells=train.LOSS_CELLS,
    )
    assert train.MODEL == "geometry" and train.PRECISION == "auto"
    assert (training_step.WINDOWS, training_step.TRANSITIONS) == (train.BATCH_SIZE, train.SEQ_LEN)
    assert (training_step.LR, training_step.GRAD_CLIP) == (train.LR, train.GRAD_CLIP)
    assert training_step.WEIGHT_DECAY == train.WEIGHT_DECAY
    assert (training_step.PAIRS, training_step.PAIR_PASSES) == (train.PAIR_BATCH, train.PAIR_PASSES)
    assert training_step.RECORDED_DEPTH == train.RECORDED_DEPTH
    assert {kind: inputs.ar_len for kind, inputs in INPUTS.items()} == {
        "teacher_forced": 0,
        "self_fed": train.AR_LEN_MAX,
    }
    for inputs in INPUTS.values():
        assert inputs.teacher_prob == train.SS_MIN_TEACHER_PROB
        assert inputs.sampling.greedy == train.SELF_FED_GREEDY
        assert inputs.sampling.temperature == train.SELF_FED_TEMPERATURE
        assert inputs.token_noise == train.TOKEN_NOISE
        assert inputs.similar_share == train.SIMILAR_CODES
        assert inputs.masked_decoding == train.MASKED_DECODING


def test_timed_model_has_the_default_size_of_train(clips):
    config, size = timed_step("teacher_forced", clips).model.config, tiny_tokenizer().config
    assert (config.channels, config.coarse_channels) == (train.CHANNELS, train.COARSE_CHANNELS)
    assert (config.keyframes, config.sources, config.prior) == (train.KEYFRAMES, train.SOURCES, train.PRIOR)
    assert (config.latent_height, config.latent_width) == size.latent_size
    assert config.vertical_fov_degrees == clips.manifest.vertical_fov_degrees


@pytest.mark.parametrize("kind", KINDS)
def test_timed_step_is_loss_backward_clip_and_adamw(kind, clips, one_thread):
    """The weights after two timed steps are those after the same steps written out, bit for bit."""
    timed, plain = timed_step(kind, clips), timed_step(kind, clips)
    before = [p.detach().clone() for p in plain.model.parameters()]
    model, step_loss = plain.model, StepLoss(plain.model.tokenizer, None, training_step.WEIGHTS)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.LR, betas=(0.9, 0.95), weight_decay=train.WEIGHT_DECAY
    )
    torch.manual_seed(7)
    timed()
    timed()
    torch.manual_seed(7)
    self_fed = []
    for _ in range(2):
        if kind == "pairs":
            result = pair_loss(model, step_loss, *plain.batch, train.MASKED_DECODING)
        else:
            result = geometry_window_loss(model, step_loss, *plain.batch, INPUTS[kind])
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.GRAD_CLIP)
        optimizer.step()
        self_fed.append(result.self_fed)
    assert torch.stack(self_fed).any() == (kind == "self_fed")
    changed = 0  # the motion model's zero weights stay: nothing moves in these clips
    for old, a, b in zip(before, timed.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        changed += not torch.equal(old, a)
    assert changed >= 50


def test_training_batch_is_of_recorded_windows(clips):
    """A small data set repeats its windows; the frames are those that the loss predicts."""
    step = timed_step("teacher_forced", clips, windows=5)
    tokens, actions, pose = step.batch
    T = training_step.TRANSITIONS
    assert tokens.shape == (5, T + 1, 4, 8) and actions.shape == (5, T, 5) and pose.shape == (5, T + 1, 5)
    assert step.frames == 5 * T
    recorded = torch.from_numpy(clips.tokens[0].astype(np.int64)).unfold(0, T + 1, 1).movedim(-1, 1)
    assert all((window == recorded).flatten(1).all(1).any() for window in tokens)


def test_pairs_of_a_step_are_those_of_the_pool(clips):
    step = timed_step("pairs", clips, windows=3)
    view, target = step.batch
    assert step.frames == 12 and target.shape == (12, 4, 8), "as many as train.py takes for 3 windows"
    config = step.pool.config
    assert (config.batch, config.passes) == (12, train.PAIR_PASSES)
    assert (config.token_noise, config.similar_share) == (train.TOKEN_NOISE, train.SIMILAR_CODES)
    assert torch.equal(step.pool._target[torch.from_numpy(step.pool._order[:12])].long(), target)
    step.make_scene()  # timed apart; it leaves the batch and the stream alone
    assert step.batch[0] is view and step.pool.position == {"round": 0, "index": 12}


def test_clips_shorter_than_a_window_are_refused(clips, monkeypatch):
    monkeypatch.setattr(training_step, "TRANSITIONS", 40)
    with pytest.raises(DataError, match="no clip has 41 frames.*--data_dir"):
        timed_step("teacher_forced", clips)


def test_flops_are_counted_forward_and_backward(clips):
    a, b = torch.rand(3, 5, requires_grad=True), torch.rand(5, 7, requires_grad=True)
    assert training_step.count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert training_step.count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    step = timed_step("teacher_forced", clips)
    # At least the gates of the finest recurrent cell (3x3, 2C -> 3C) on 4x8 cells, times 3 with backward.
    channels = step.model.config.channels
    assert training_step.count_flops(step) > 3 * step.frames * 32 * 2 * 9 * 2 * channels * 3 * channels


def test_peak_memory_holds_model_gradients_and_optimizer(tiny, clips):
    flags = [*tiny.flags, "--windows", "2", "--data_dir", str(tiny.tokens.parent)]
    step = timed_step("self_fed", clips)
    peak = training_step.peak_megabytes(benchmark.parse_config(flags), "self_fed", step)
    assert peak > 4 * 4 * sum(p.numel() for p in step.model.parameters()) / 1e6


def test_play_walks_and_turns_in_a_recorded_place(clips):
    world = World(ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()), torch.device("cpu"), torch.float32, 16, 15)
    rollout = play_step.primed_rollout(world, clips, torch.float32)
    assert rollout.sampling == PLAY
    np.testing.assert_array_equal(rollout.tokens[0], clips.tokens[0][play_step.CONTEXT_FRAMES - 1])
    action = play_step.walk_action()
    assert action.shape == (1, 5) and action[0, 3] == 1 and action[0, 0] > 0


def test_parts_of_a_step_make_the_same_picture(clips):
    world = World(ConvGRUWorldModel(TINY_WORLD, tiny_tokenizer()), torch.device("cpu"), torch.float32, 16, 15)
    drawn: list[np.ndarray] = []
    for step in (play_step.whole_step, play_step.step_parts):
        rollout = play_step.primed_rollout(world, clips, torch.float32)
        result = step(rollout, play_step.walk_action(), drawn.append)
    assert list(result) == list(play_step.PARTS) and all(seconds > 0 for seconds in result.values())
    assert drawn[0].shape == (16, 32, 3)
    np.testing.assert_array_equal(*drawn)


def test_calls_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = time_alternately(calls, 3, torch.device("cpu"), "test")
    assert "".join(order) == "ABABABAB" and [len(s) for s in seconds.values()] == [3, 3]


def test_numbers_are_short():
    numbers = [format_number(x) for x in (0.012345, 9.876, 123.4, 23456.7)]
    assert numbers == ["0.0123", "9.88", "123", "23,457"]


METRICS = {
    "train": [
        "train.flops_per_step",
        "train.matmul_flops_per_s",
        "train.teacher_forced.mfu",
        "train.pairs.made_per_s",
        *(f"train.{kind}.{key}" for kind in KINDS for key in ("frames_per_s", "steps_per_hour", "peak_mb")),
    ],
    "data": [
        "data.loader.frames_per_s",
        "data.file_per_window.frames_per_s",
        "data.speedup",
        *(
            f"data.preprocess.{s}.frames_per_s"
            for s in ("decode", "resize", "encode_float32", "write", "all")
        ),
    ],
    "play": [
        *(
            f"play.float32.threads1.{key}"
            for key in ("frames_per_s", "p50_ms", "p95_ms", "p99_ms", *(f"{p}_ms" for p in play_step.PARTS))
        ),
        "play.first_frame_s",
        "play.resident_mb",
    ],
}


@pytest.mark.parametrize("section", METRICS)
def test_script_writes_its_metrics(section, shrink, tiny, tmp_path, capsys):
    out = tmp_path / "new" / "benchmark.json"
    flags = ["--quick", "--out", str(out), "--windows", "2", "--data_dir", str(tiny.tokens.parent)]
    assert benchmark.main([section, *flags, *tiny.flags]) == 0
    content = json.loads(out.read_text())
    assert set(METRICS[section]) <= set(content["metrics"])
    for name, value in content["metrics"].items():
        assert name.startswith(f"{section}.") and math.isfinite(value) and value > 0, name
    meta = content["meta"]
    assert meta["command"].startswith(f"python benchmark.py {section} --quick --out benchmark.json")
    assert str(tmp_path) not in out.read_text()
    assert {"commit", "machine", "versions", "device", "threads", "precision", "notes"} <= set(meta)
    assert {"python", "torch", "numpy", "opencv"} <= set(meta["versions"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"measures {section}: about 1 min on two CPU cores")
    assert "\n|---|" in printed and "wrote benchmark.json" in printed


def test_rates_are_frames_over_seconds(shrink, tiny, tmp_path, monkeypatch):
    """With every call taking two seconds, rates and MFU follow from the sizes alone."""
    monkeypatch.setattr(
        training_step, "time_alternately", lambda calls, rounds, *_: {name: np.full(3, 2.0) for name in calls}
    )
    out = tmp_path / "benchmark.json"
    flags = ["--out", str(out), "--windows", "2", "--data_dir", str(tiny.tokens.parent)]
    assert benchmark.main(["train", *flags, *tiny.flags]) == 0
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["train.teacher_forced.frames_per_s"] == 2 * training_step.TRANSITIONS / 2
    assert metrics["train.self_fed.steps_per_hour"] == 1800
    # 8 pairs for two windows, each used 4 times; 24 of them are made in two seconds.
    assert metrics["train.pairs.made_per_s"] == 12
    seconds = 2 + 8 / 4 / 12
    assert metrics["train.pairs.frames_per_s"] == pytest.approx(8 / seconds)
    assert metrics["train.pairs.steps_per_hour"] == pytest.approx(3600 / seconds)
    assert metrics["train.matmul_flops_per_s"] == 2 * 32**3 / 2
    expected = metrics["train.flops_per_step"] / 2 / metrics["train.matmul_flops_per_s"]
    assert metrics["train.teacher_forced.mfu"] == pytest.approx(expected)


def test_start_without_arguments_announces_all_sections_and_the_time(capsys):
    benchmark.announce(benchmark.parse_config([]))
    full = round(sum(minutes for minutes, _ in benchmark.MINUTES.values()))
    quick = round(sum(minutes for _, minutes in benchmark.MINUTES.values()))
    printed = capsys.readouterr().out
    assert printed.startswith(f"measures train, data, play: about {full} min")
    assert f"--quick takes about {quick}" in printed


def test_quick_means_fewer_repeats_and_windows():
    full, quick = (benchmark.parse_config(flags) for flags in ([], ["--quick"]))
    assert (full.repeats, full.windows) == (benchmark.REPEATS, train.BATCH_SIZE)
    assert (quick.repeats, quick.windows) == (benchmark.QUICK_REPEATS, training_step.QUICK_WINDOWS)
    assert full.sections == ("train", "data", "play") and quick.precision == "auto"


def test_bad_input_is_one_line(tiny, tmp_path, capsys):
    for flags, part in (
        (["--checkpoint", "gone.pt"], "gone.pt: no such checkpoint"),
        (["data", "--data_dir", str(tmp_path)], "manifest.json: no manifest"),
        (["--out", str(tiny.world / "b.json")], "world.pt"),
    ):
        assert benchmark.main([*tiny.flags, *flags]) == 2
        err = capsys.readouterr().err
        assert err.count("error: ") == 1 and part in err, err


def test_failed_script_is_reported_with_its_error(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys; print('error: no such thing', file=sys.stderr); sys.exit(2)")
    with pytest.raises(benchmark.UserError, match="fails.py ended with status 2: error: no such thing"):
        play_step.run_python([script])
