"""train.py for real at a tiny size: resuming, several passes, self-fed steps, logs, several processes."""

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tiny_world import (
    CODES,
    CONVGRU,
    FRAMES,
    GEOMETRY,
    logged,
    settings,
    tiny_depth,
    tiny_vqvae,
    write_world,
)  # fmt: skip

import train
from dataset.token_files import DataError, Manifest
from depth.predictor import DEPTH_KIND
from runtime import checkpoint
from runtime.config import constants_of
from runtime.folder_lock import lock_folder
from runtime.training_state import NonFiniteError
from training.diagnostics import SpikeWatch
from training.train_config import TrainConfig
from training.validation import validate
from vq_vae.tokenizer import checksum, tokenizer_content

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def convgru(world, tmp_path) -> TrainConfig:
    """A tiny run of the baseline."""
    return settings(world, tmp_path / "run", CONVGRU)


@pytest.fixture
def geometry(world, tmp_path) -> TrainConfig:
    """A tiny run of the geometry model with the default curriculum."""
    return settings(world, tmp_path / "run", GEOMETRY)


def run(config: TrainConfig) -> dict:
    """Trains in this process; returns last.pt."""
    train.train(config, torch.device("cpu"), torch.float32)
    return checkpoint.load(Path(config.out_dir) / "last.pt")


def words(config: TrainConfig) -> list[str]:
    """The NAME=value words of a run: what differs from the defaults."""
    default = constants_of(TrainConfig())
    return [f"{name}={value}" for name, value in constants_of(config).items() if value != default[name]]


def command(config: TrainConfig) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *words(config)]


def assert_same_run(a: dict, b: dict) -> None:
    """Weights, optimizer moments, RNG and data position agree bit for bit."""
    assert a["step"] == b["step"] and a["position"] == b["position"] and a.get("pairs") == b.get("pairs")
    for part in ("model", "trained"):  # the moving average, and what training continues from
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    for key, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in moments.items())
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


# ---------------------------------------------------------------- stopping and resuming


def test_a_killed_run_that_is_resumed_ends_like_an_unbroken_one(convgru, tmp_path, one_thread):
    unbroken = replace(convgru, steps=40, token_noise=0.2)
    broken = replace(unbroken, out_dir=str(tmp_path / "broken"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(broken), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # Killed while it writes, trains or validates, wherever it is after its 5th step.
    while not list(Path(broken.out_dir).glob("step_*5.pt")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = checkpoint.load(Path(broken.out_dir) / "last.pt")["step"]
    assert 0 < reached < 40
    resumed = subprocess.run(command(broken), env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0 and f"at step {reached}" in resumed.stdout, resumed.stderr
    assert_same_run(run(unbroken), checkpoint.load(Path(broken.out_dir) / "last.pt"))


def test_a_resumed_run_of_the_geometry_model_ends_like_an_unbroken_one(
    geometry, tmp_path, monkeypatch, one_thread
):
    unbroken = replace(
        geometry, steps=12, val_steps=4, val_windows=2, val_rollouts=1, log_steps=1, picture_steps=100
    )
    broken = replace(unbroken, out_dir=str(tmp_path / "broken"))
    check = SpikeWatch.check

    def fail_at_7(self, step, *rest):
        if step == 7:
            raise RuntimeError("power failure")
        check(self, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power failure"):
        patch.setattr(SpikeWatch, "check", fail_at_7)
        run(broken)
    assert checkpoint.load(Path(broken.out_dir) / "last.pt")["step"] == 6
    a, b = run(unbroken), run(broken)
    assert_same_run(a, b)
    assert a["pairs"] == {"round": 0, "index": 6 * unbroken.pair_batch}, "stopped within a round of pairs"
    assert a["pair_maker"].keys() == b["pair_maker"].keys()
    assert all(torch.equal(a["pair_maker"][name], b["pair_maker"][name]) for name in a["pair_maker"])
    assert (a["grown"], a["best_rollout"], a["best"]) == (b["grown"], b["best_rollout"], b["best"])


def test_a_run_without_pairs_may_go_on_with_them(geometry):
    short = {"val_windows": 1, "val_rollouts": 0, "log_steps": 1, "picture_steps": 100, "val_steps": 100}
    before = run(replace(geometry, steps=2, pair_share=0.0, **short))
    assert "pairs" not in before
    after = run(replace(geometry, steps=6, pair_share=0.5, **short))
    assert after["pairs"] == {"round": 0, "index": 2 * geometry.pair_batch}
    rows = [row for row in logged(geometry.out_dir) if "grad_norm" in row]
    on_pairs = [row["step"] for row in rows if "loss_pairs" in row]
    assert on_pairs == [4, 6] and [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 5]


def test_sigterm_saves_and_ends_cleanly(convgru):
    process = subprocess.Popen(
        command(replace(convgru, steps=100_000, save_steps=100_000)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while not (Path(convgru.out_dir) / "log.jsonl").is_file() or not logged(convgru.out_dir):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in output
    assert checkpoint.load(Path(convgru.out_dir) / "last.pt")["step"] >= 2


def test_a_resumed_run_continues_its_wandb_run(convgru, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "RunLog", lambda *args: seen.append(args) or train_log(*args))
    train_log = sys.modules["runtime.run_log"].RunLog
    run(replace(convgru, steps=1))
    run(replace(convgru, steps=2))
    run(replace(convgru, steps=2, resume=False))
    assert [args[-1] for args in seen] == [None, 1, None]
    assert seen[0][3]["STEPS"] == 1, "the constants are the config of the wandb run"


def test_validating_and_logging_more_often_changes_nothing(convgru, tmp_path, one_thread):
    often = replace(convgru, out_dir=str(tmp_path / "often"), val_steps=2, log_steps=1, picture_steps=1)
    seldom = replace(convgru, out_dir=str(tmp_path / "seldom"), val_steps=99, log_steps=9)
    assert_same_run(run(often), run(seldom))


# ---------------------------------------------------------------- learning


def test_self_fed_steps_grow_with_the_validation_rollouts_by_default(geometry, monkeypatch):
    """The default curriculum, in the real loop: its `ar_len` starts at 2 and follows the rollouts."""
    psnr = iter([10.0, 9.0, 11.0, 12.0])

    def validate_with_known_psnr(*args):
        metrics, picture = validate(*args)
        return metrics | {"val_rollout_psnr": next(psnr)}, picture

    monkeypatch.setattr(train, "validate", validate_with_known_psnr)
    config = replace(
        geometry, seq_len=8, seq_len_max=8, steps=8, val_steps=2, log_steps=1,
        val_rollouts=0, val_windows=1, picture_steps=100, save_steps=100, sensitivity_steps=100,
        pair_share=0.0,
    )  # fmt: skip
    default = TrainConfig()
    for name in ("ar_growth", "ar_step", "ar_len_max", "ar_start_step", "ss_min_teacher_prob"):
        assert getattr(config, name) == getattr(default, name)
    run(config)
    rows = [row for row in logged(config.out_dir) if "loss" in row]
    assert [row["ar_len"] for row in rows] == [2] * 2 + [4] * 4 + [6] * 2
    self_fed = [row for row in rows if "loss_self_fed" in row]
    assert len(self_fed) >= 6, "most batches have self-fed steps"
    assert all(row["loss_self_fed"] > 0 and row["loss_gap"] != 0 for row in self_fed)


def test_the_geometry_model_learns_its_world_and_logs_its_terms(geometry):
    config = replace(
        geometry, steps=40, lr=1e-2, val_steps=20, val_rollouts=2, save_steps=100, picture_steps=100
    )
    last = run(config)
    rows = logged(config.out_dir)
    cross_entropy = [row["loss_ce"] for row in rows if "loss_ce" in row]
    assert sum(cross_entropy[-5:]) < 0.8 * sum(cross_entropy[:5])
    names = {"loss", "loss_ce", "loss_pairs", "val_rollout_psnr", "ar_len", "action_sensitivity"}
    assert names <= set().union(*rows)
    psnr = [row["val_rollout_psnr"] for row in rows if "val_rollout_psnr" in row]
    improved = sum(value > max(psnr[:i], default=-1) for i, value in enumerate(psnr))
    assert last["grown"] == min(config.ar_len_max, config.ar_step * (1 + improved)), "grows with the rollouts"


def test_later_passes_train_as_the_first_does_and_the_world_is_learnt(convgru):
    config = replace(
        convgru, steps=150, lr=1e-2, ar_len_max=0, token_noise=0.0, val_steps=75, save_steps=50, keep=2
    )
    last = run(config)
    rows = logged(config.out_dir)
    losses = {row["epoch"]: row["loss"] for row in rows if "loss" in row}
    assert last["position"]["epoch"] >= 10, "several passes were meant"
    assert losses[2] < losses[0] and losses[10] < 0.8 * losses[2]
    bits = [row["val_bits_per_token"] for row in rows if "val_bits_per_token" in row]
    assert bits[-1] < 0.8 * math.log2(CODES)
    files = {p.name for p in Path(config.out_dir).glob("*.pt")}
    assert files == {"last.pt", "best.pt", "step_000100.pt", "step_000150.pt"}, "the last KEEP"


def test_the_log_has_every_documented_value(convgru):
    run(convgru)
    rows = logged(convgru.out_dir)
    names = {
        "loss", "loss_ce", "loss_teacher", "loss_self_fed", "loss_gap", "teacher_prob", "seq_len", "ar_len",
        "lr", "grad_norm", "entropy", "confidence_mean", "confidence_std", "confidence_min", "unique_codes",
        "unique_codes_target", "spatial_gradient", "film_gamma", "film_beta", "action_sensitivity", "epoch",
        "epoch_completion", "frames_per_s", "val_bits_per_token", "val_accuracy",
    }  # fmt: skip
    assert names <= set().union(*rows)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    pictures = {p.name for p in Path(convgru.out_dir).glob("*.png")}
    assert pictures == {
        "curves.png",
        "train_000006.png",
        "train_000012.png",
        "val_000006.png",
        "val_000012.png",
    }


# ---------------------------------------------------------------- losses that are not finite


def spoil(monkeypatch, steps: set[int]) -> None:
    """Makes the loss of some training steps NaN."""
    count, real = itertools.count(1), train.window_loss

    def window_loss(*args):
        result = real(*args)
        return replace(result, loss=result.loss * math.nan) if next(count) in steps else result

    monkeypatch.setattr(train, "window_loss", window_loss)


def test_a_bad_step_is_left_out_counted_and_logged(convgru, monkeypatch, capsys):
    spoil(monkeypatch, {3, 5})
    last = run(convgru)
    assert last["step"] == 12 and last["skipped"] == 2 and not checkpoint.not_finite(last)
    rows = [row for row in logged(convgru.out_dir) if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert capsys.readouterr().out.count("the step is left out") == 2


def test_a_run_whose_loss_stays_bad_ends_and_keeps_its_last_checkpoint(convgru, monkeypatch):
    spoil(monkeypatch, set(range(8, 100)))
    config = replace(convgru, steps=100, save_steps=5)
    with pytest.raises(NonFiniteError, match="up to step 37, was not finite"):
        run(config)
    last = checkpoint.load(Path(config.out_dir) / "last.pt")
    assert not checkpoint.not_finite(last)
    monkeypatch.undo()
    assert run(replace(config, steps=last["step"] + 1))["step"] == last["step"] + 1


def test_a_run_continues_from_the_newest_good_checkpoint(convgru, capsys, one_thread):
    unbroken = run(convgru)
    out = Path(convgru.out_dir)
    for path in (out / "last.pt", out / "step_000012.pt", out / "best.pt"):
        content = checkpoint.load(path)
        next(iter(content["model"].values())).fill_(math.nan)
        torch.save(content, path)
    assert_same_run(unbroken, run(convgru))
    printed = capsys.readouterr()
    assert "step_000011.pt at step 11" in printed.out and "last.pt: its weights" in printed.err
    steps = [row["step"] for row in logged(out) if "loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12], "no row twice"


def test_an_earlier_run_in_the_folder_is_moved_aside(convgru):
    first = run(convgru)
    run(replace(convgru, resume=False, steps=2))
    out = Path(convgru.out_dir)
    assert_same_run(first, checkpoint.load(out / "earlier-1" / "last.pt"))
    assert [row["step"] for row in logged(out)] == [2, 2]


def test_a_second_run_in_a_folder_is_refused(convgru, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *words(convgru)])
    with lock_folder(convgru.out_dir, "train.py", "OUT_DIR"):
        assert train.main() == 2
    assert f"{convgru.out_dir}: another train.py (process" in capsys.readouterr().err
    assert not Path(convgru.out_dir).exists()


# ---------------------------------------------------------------- refusals


def test_tokens_of_another_tokenizer_are_refused(convgru, tmp_path):
    other = tiny_vqvae(seed=9)
    checkpoint.save(tmp_path / "other.pt", tokenizer_content(other))
    with pytest.raises(DataError, match=f"in use is {checksum(other)}; encode"):
        run(replace(convgru, vqvae_ckpt=str(tmp_path / "other.pt")))


def test_another_depth_network_is_refused_by_a_resumed_run_but_not_by_a_new_one(geometry, tmp_path, capsys):
    short = replace(
        geometry, steps=1, val_windows=1, val_rollouts=0, val_steps=100, motion_steps=0, picture_steps=100
    )
    run(short)
    other = tiny_depth(seed=5)
    checkpoint.save(tmp_path / "other.pt", checkpoint.content_of(DEPTH_KIND, other.network))
    changed = replace(short, steps=2, depth_ckpt=str(tmp_path / "other.pt"))
    with pytest.raises(checkpoint.CheckpointError, match=r"other\.pt: depth network .*\(DEPTH_CKPT\)"):
        run(changed)
    started = replace(changed, out_dir=str(tmp_path / "new"), init_from=str(Path(short.out_dir) / "last.pt"))
    assert run(started)["depth"] == other.fingerprint
    assert "they were trained with depth network" in capsys.readouterr().out


def test_without_poses_there_are_no_pairs_and_the_player_walks_on_flat_ground(geometry, monkeypatch, capsys):
    clips = train.TokenClips

    def without_poses(*args, **kw):
        loaded = clips(*args, **kw)
        loaded.pose = [np.full_like(pose, np.nan) for pose in loaded.pose]
        return loaded

    monkeypatch.setattr(train, "TokenClips", without_poses)
    last = run(replace(geometry, steps=1, val_windows=1, val_rollouts=0, picture_steps=100))
    assert last["step"] == 1 and "pairs" not in last
    printed = capsys.readouterr().out
    assert "no clip has poses" in printed and "walks at 3.91 m/s on flat ground" in printed


@pytest.mark.parametrize(
    "cut, message", [([], "no clip is held out"), ([20, FRAMES - 4], "shorter than the 6 frames")]
)
def test_a_run_without_validation_trains_and_keeps_the_newest_weights(
    convgru, tmp_path, capsys, cut, message
):
    (tmp_path / "data").mkdir()
    folder = write_world(tmp_path / "data")
    manifest = Manifest.load(folder)
    manifest.clips = [replace(manifest.clips[0], cut=cut)]
    manifest.save(folder)
    run(replace(convgru, data_dir=str(folder), batch_size=2, steps=4, val_steps=2))
    printed = capsys.readouterr()
    assert message in printed.err and "best.pt is the newest weights" in printed.err
    out = Path(convgru.out_dir)
    assert [checkpoint.load(out / name)["step"] for name in ("best.pt", "last.pt")] == [4, 4]
    assert not any("val_bits_per_token" in row for row in logged(out))


def test_weights_to_start_from_must_be_of_the_same_model(convgru, tmp_path):
    first = Path(convgru.out_dir) / "last.pt"
    before = run(convgru)
    after = run(replace(convgru, out_dir=str(tmp_path / "more"), init_from=str(first), steps=1, lr=0.0))
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    wider = replace(convgru, out_dir=str(tmp_path / "wider"), init_from=str(first), hidden_dim=24)
    with pytest.raises(checkpoint.CheckpointError, match="last.pt: was trained with .*no INIT_FROM"):
        run(wider)


@pytest.mark.parametrize(
    "word, message",
    [("RECIPE=v4.5", "did you mean v4.5.2?"), ("SS_STEEPNESS=9", "has no effect with AR_GROWTH = 'rollout'")],
)
def test_a_refused_command_line_ends_with_one_line(word, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", word])
    assert train.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_script_prints_its_constants():
    shown = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "BATCH_SIZE=8" in shown.stdout and "WORLD_KIND" not in shown.stdout


# ---------------------------------------------------------------- several processes


def start_two(config: TrainConfig) -> subprocess.Popen:
    """The run under torchrun, in two processes of one thread each; its output is in `stdout`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*torchrun, *command(config)[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_train_as_one(convgru, tmp_path):
    one = replace(convgru, steps=6, ar_len_max=0, token_noise=0.0, lr=1e-2)
    two = replace(one, out_dir=str(tmp_path / "two"))
    output, _ = (process := start_two(two)).communicate(timeout=120)
    assert process.returncode == 0, output
    assert "processes: 2, 2 windows each" in output and output.count("finished at step 6") == 1
    a, b = checkpoint.load(Path(two.out_dir) / "last.pt"), run(one)
    assert a["position"] == b["position"]
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=1e-3, atol=1e-4)
    keys = [[(row["step"], set(row)) for row in logged(c.out_dir)] for c in (one, two)]
    assert keys[0] == keys[1], "only the first process writes the log"


def test_two_processes_stop_together_and_continue_as_if_they_had_not(convgru, tmp_path):
    # A constant learning rate: it would depend on STEPS, which is set only after the stop.
    two = replace(
        convgru, lr=1e-3, min_lr=1e-3, token_noise=0.2, steps=100_000, log_steps=1, val_steps=100_000,
        picture_steps=100_000, save_steps=100_000,
    )  # fmt: skip
    process = start_two(two)
    while not (Path(two.out_dir) / "log.jsonl").is_file() or not logged(two.out_dir):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children()
    second = next(w for w in workers if w.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("stopped at step") == 1, output
    reached = checkpoint.load(Path(two.out_dir) / "last.pt")["step"]

    runs = []
    for folder in (two.out_dir, str(tmp_path / "unbroken")):
        config = replace(two, out_dir=folder, steps=reached + 3)
        output, _ = (process := start_two(config)).communicate(timeout=120)
        assert process.returncode == 0, output
        assert (f"at step {reached}\n" in output) == (folder == two.out_dir)
        runs.append(checkpoint.load(Path(folder) / "last.pt"))
    assert_same_run(*runs)


def test_a_batch_that_cannot_be_split_is_refused(convgru, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train.py", *words(convgru)])
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert train.main() == 2
    assert "BATCH_SIZE=4 is the whole batch" in capfd.readouterr().err
