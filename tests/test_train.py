"""train.py for real at a tiny size: resume, second pass, self-feeding, schedules, what it watches and
refuses."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import train
from dataset.token_files import ClipEntry, DataError, Manifest, write_token_file
from dataset.windows import TokenClips, class_shares, sample_by_class
from model_convGru import ConvGRUWorldModel, WorldModelConfig
from runtime import checkpoint
from training import distributed
from training import loss_terms as losses
from training.convgru_window import add_noise, convgru_window_loss
from training.window import InputConfig, LossWeights, StepLoss
from vq_vae.tokenizer import fingerprint, load_tokenizer, tokenizer_content
from vq_vae.vq_vae import VQVAE, VQVAEConfig

ROOT = Path(__file__).resolve().parents[1]
CODES, ROWS, COLUMNS = 16, 3, 4
TINY = {
    "MODEL": "convgru",
    "AR_GROWTH": "ramp",
    "BALANCE": 0.0,
    "EMBED_DIM": 8,
    "HIDDEN_DIM": 16,
    "LAYERS": 1,
    "STEPS": 12,
    "BATCH_SIZE": 4,
    "SEQ_LEN": 5,
    "SEQ_LEN_MAX": 5,
    "WARMUP_STEPS": 2,
    "AR_START_STEP": 0,
    "AR_RAMP_STEPS": 4,
    "AR_LEN_MAX": 3,
    "SS_MIDPOINT_STEP": 0,
    "LOG_STEPS": 2,
    "VAL_STEPS": 6,
    "PICTURE_STEPS": 6,
    "SENSITIVITY_STEPS": 4,
    "SAVE_STEPS": 1,
    "PRECISION": "fp32",
    "DEVICE": "cpu",
    "WANDB": "disabled",
}
GEOMETRY = {"MODEL": "geometry", "AR_GROWTH": "rollout", "BALANCE": 0.5}
GEOMETRY |= {"CHANNELS": 8, "COARSE_CHANNELS": 8, "KEYFRAMES": 3, "MOTION_STEPS": 2}


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    """A folder with a tiny tokenizer and token files of a world in which the grid rolls with the yaw."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tokenizer = VQVAE(VQVAEConfig(ROWS * 4, COLUMNS * 4, CODES, embedding_dim=4, hidden_dim=8))
    checkpoint.save(folder / "vqvae.pt", tokenizer_content(tokenizer))
    manifest = Manifest(16.0, [ROWS * 4, COLUMNS * 4], [ROWS, COLUMNS], CODES, fingerprint(tokenizer), 70.0)
    rng = np.random.default_rng(0)
    scene = rng.integers(0, CODES, (ROWS, COLUMNS))
    for i in range(5):
        shift = rng.integers(-1, 2, 30)
        tokens = np.stack([np.roll(scene, s, 1) for s in np.cumsum(np.r_[0, shift])])
        actions = np.zeros((30, 5), np.float32)
        actions[:, 0] = shift
        write_token_file(folder / f"clip{i}.npz", tokens, actions, np.zeros((31, 5)))
        split = "val" if i == 4 else "train"
        manifest.clips.append(ClipEntry(f"clip{i}", f"clip{i}.npz", 31, split, f"clip{i}.mp4", [0, 30, 1]))
    manifest.save(folder)
    return folder


@pytest.fixture
def tiny(world_dir, tmp_path, monkeypatch) -> dict:
    """train.py's constants set to a tiny run; returns them."""
    constants = {
        **TINY,
        "DATA_DIR": str(world_dir),
        "VQVAE_CKPT": str(world_dir / "vqvae.pt"),
        "OUT_DIR": str(tmp_path / "run"),
    }
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)
    return constants


def run_here(constants: dict, monkeypatch, **changes) -> dict:
    """Trains in this process with some constants changed; returns last.pt."""
    constants = {**constants, **changes}
    for name, value in changes.items():
        monkeypatch.setattr(train, name, value)
    train.train(constants, torch.device("cpu"), torch.float32)
    return checkpoint.load(Path(constants["OUT_DIR"]) / "last.pt")


def command(constants: dict) -> list[str]:
    """The command line of a tiny run."""
    return [sys.executable, str(ROOT / "train.py"), *[f"{name}={value}" for name, value in constants.items()]]


def rows_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_same_run(a: dict, b: dict) -> None:
    """Weights, optimizer moments, RNG and data position agree bit for bit."""
    assert a["step"] == b["step"] and a["position"] == b["position"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for key, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in moments.items())
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


@pytest.mark.parametrize("model", [{}, GEOMETRY], ids=["convgru", "geometry"])
def test_a_run_killed_and_resumed_ends_as_an_unbroken_one(tiny, tmp_path, monkeypatch, one_thread, model):
    tiny = {**tiny, "STEPS": 60, "TOKEN_NOISE": 0.2, **model}
    broken = {**tiny, "OUT_DIR": str(tmp_path / "broken")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(broken), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # Killed while it writes, trains or validates: wherever it happens to be after its 5th step.
    while not list(Path(broken["OUT_DIR"]).glob("step_*5.pt")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = checkpoint.load(Path(broken["OUT_DIR"]) / "last.pt")["step"]
    assert 0 < reached < 60
    resumed = subprocess.run(command(broken), env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0 and f"at step {reached}" in resumed.stdout, resumed.stderr
    monkeypatch.setattr(train, "TOKEN_NOISE", 0.2)
    unbroken = run_here(tiny, monkeypatch, STEPS=60, **model)
    assert_same_run(unbroken, checkpoint.load(Path(broken["OUT_DIR"]) / "last.pt"))


def test_sigterm_saves_and_ends_cleanly(tiny, tmp_path):
    process = subprocess.Popen(
        command({**tiny, "STEPS": 100_000, "SAVE_STEPS": 100_000}),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while not (Path(tiny["OUT_DIR"]) / "log.jsonl").is_file() or not rows_of(tiny["OUT_DIR"]):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step" in output
    assert checkpoint.load(Path(tiny["OUT_DIR"]) / "last.pt")["step"] >= 2


def test_validating_and_logging_more_often_changes_nothing(tiny, tmp_path, monkeypatch, one_thread):
    often = run_here(
        tiny, monkeypatch, OUT_DIR=str(tmp_path / "often"), VAL_STEPS=2, LOG_STEPS=1, PICTURE_STEPS=1
    )
    seldom = run_here(tiny, monkeypatch, OUT_DIR=str(tmp_path / "seldom"), VAL_STEPS=99, LOG_STEPS=9)
    assert_same_run(often, seldom)


def test_the_geometry_model_learns_its_world_and_logs_what_is_promised(tiny, monkeypatch):
    last = run_here(tiny, monkeypatch, **GEOMETRY, STEPS=60, LR=1e-2, VAL_STEPS=20, VAL_ROLLOUTS=2)
    rows = rows_of(tiny["OUT_DIR"])
    charged = [row["loss_ce"] for row in rows if "loss_ce" in row]
    assert sum(charged[-5:]) < 0.8 * sum(charged[:5])
    promised = {
        "loss_ce",
        "loss_reprojection",
        "loss_smoothness",
        "loss_motion",
        "val_rollout_psnr",
        "ar_len",
    }
    assert promised <= set().union(*rows)
    found = [row["val_rollout_psnr"] for row in rows if "val_rollout_psnr" in row]
    improved = sum(psnr > max(found[:i], default=-1) for i, psnr in enumerate(found))
    assert last["grown"] == min(train.AR_LEN_MAX, train.AR_STEP * (1 + improved)), (
        "grows with the held-out rollouts"
    )


def test_balance_draws_windows_of_rare_actions_more_often():
    kinds = [np.zeros(90, int), np.full(10, 1)]
    windows = np.array([(0, i) for i in range(0, 90, 5)] + [(1, 0), (1, 5)])
    assert sample_by_class(windows, kinds, 6, 0.0, 1, 0) is windows
    even = sample_by_class(np.repeat(windows, 50, 0), kinds, 6, 1.0, 1, 0)
    assert np.array_equal(even, sample_by_class(np.repeat(windows, 50, 0), kinds, 6, 1.0, 1, 0))
    assert not np.array_equal(even, sample_by_class(np.repeat(windows, 50, 0), kinds, 6, 1.0, 1, 1))
    before, after = (class_shares(w, kinds, 6, 2) for w in (windows, even))
    assert before == pytest.approx([0.9, 0.1]) and after == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_second_pass_trains_as_the_first_and_the_world_is_learnt(tiny, monkeypatch):
    last = run_here(
        tiny, monkeypatch, STEPS=150, LR=1e-2, AR_LEN_MAX=0, TOKEN_NOISE=0.0, VAL_STEPS=75, SAVE_STEPS=50
    )
    rows = rows_of(tiny["OUT_DIR"])
    losses_of = {row["epoch"]: row["loss"] for row in rows if "loss" in row}
    assert last["position"]["epoch"] >= 10, "several passes were meant"
    assert losses_of[2] < losses_of[0] and losses_of[10] < 0.8 * losses_of[2]
    bits = [row["val_bits_per_token"] for row in rows if "val_bits_per_token" in row]
    assert bits[-1] < 0.8 * math.log2(CODES)
    files = {p.name for p in Path(tiny["OUT_DIR"]).glob("*.pt")}
    assert files == {"last.pt", "best.pt", "step_000050.pt", "step_000100.pt", "step_000150.pt"}


def small_model() -> ConvGRUWorldModel:
    torch.manual_seed(1)
    return ConvGRUWorldModel(WorldModelConfig(CODES, ROWS, COLUMNS, embed_dim=8, hidden_dim=16, layers=1))


def test_self_fed_steps_see_the_models_own_tokens(world_dir):
    model = small_model()
    weights = LossWeights(label_smoothing=0.05)
    terms = StepLoss(load_tokenizer(world_dir / "vqvae.pt"), None, weights)
    tokens, actions = torch.randint(CODES, (3, 7, ROWS, COLUMNS)), torch.zeros(3, 6, 5)
    forced = convgru_window_loss(model, terms, tokens, actions, InputConfig(0, 0.0))
    fed = convgru_window_loss(model, terms, tokens, actions, InputConfig(2, 0.0))
    mixed = convgru_window_loss(model, terms, tokens, actions, InputConfig(2, 1.0))
    assert not forced.self_fed.any() and not mixed.self_fed.any()
    assert fed.self_fed[:4].any() == False and fed.self_fed[4:].all()  # noqa: E712
    torch.testing.assert_close(fed.step_loss[:4], forced.step_loss[:4])
    assert (fed.step_loss[4:] != forced.step_loss[4:]).all()
    torch.testing.assert_close(mixed.step_loss, forced.step_loss)
    # With no self-fed step, the streaming loss is the cross-entropy of model.forward.
    logits, _ = model(tokens[:, :-1], actions)
    by_forward = [
        losses.cross_entropy(
            losses.log_probabilities(logits[:, t]), tokens[:, t + 1], weights.label_smoothing
        )
        for t in range(6)
    ]
    torch.testing.assert_close(forced.step_loss, torch.stack(by_forward))


def test_every_term_of_the_old_recipe_is_in_its_loss(tiny, world_dir, monkeypatch):
    for name, value in train.RECIPES["v4.5.2"].items():
        monkeypatch.setattr(train, name, value)
    terms = StepLoss(load_tokenizer(world_dir / "vqvae.pt"), None, train.loss_weights())
    tokens, actions = torch.randint(CODES, (2, 4, ROWS, COLUMNS)), torch.zeros(2, 3, 5)
    result = convgru_window_loss(small_model(), terms, tokens, actions, InputConfig(1, 0.5))
    assert set(result.terms) == {"neighbor", "semantic", "entropy_floor", "sharpness", "temporal"}
    assert sum(result.terms.values()).item() == pytest.approx(result.loss.item(), rel=1e-5)


def test_noise_replaces_no_more_than_its_share():
    torch.manual_seed(0)
    tokens = torch.full((200, 4, 9, 9), 3)
    changed = (add_noise(tokens, 1000, 0.5) != tokens).float().mean((1, 2, 3))
    assert changed.max() < 0.6 and changed.min() < 0.05 and abs(changed.mean() - 0.25) < 0.03


def test_schedules(monkeypatch):
    for name, value in {
        "LR": 1.0,
        "MIN_LR": 0.1,
        "WARMUP_STEPS": 10,
        "STEPS": 110,
        "SEQ_LEN": 4,
        "SEQ_LEN_MAX": 6,
        "SEQ_LEN_GROW_STEPS": 100,
        "AR_START_STEP": 50,
        "AR_RAMP_STEPS": 100,
        "AR_LEN_MAX": 8,
        "SS_MIDPOINT_STEP": 1000,
        "SS_STEEPNESS": 100.0,
        "SS_MAX_TEACHER_PROB": 0.95,
        "SS_MIN_TEACHER_PROB": 0.15,
    }.items():
        monkeypatch.setattr(train, name, value)
    assert [train.learning_rate(s) for s in (0, 9, 60, 110)] == pytest.approx([0.1, 1.0, 0.55, 0.1])
    assert [train.sequence_length(s) for s in (0, 99, 100, 250, 10_000)] == [4, 4, 5, 6, 6]
    assert [train.self_fed_length(s, 20) for s in (0, 50, 100, 150, 999)] == [0, 0, 4, 8, 8]
    assert train.self_fed_length(999, 5) == 4, "the first step of a window always sees the truth"
    teacher = [train.teacher_probability(s) for s in (0, 900, 1000, 1100, 9999)]
    assert teacher == pytest.approx([0.95, 1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.e), 0.15])


def test_batches_go_on_from_a_saved_position(world_dir):
    clips = TokenClips(world_dir, "train")
    stream = train.Batches(clips, 4, seed=3)
    for _ in range(9):
        stream.next(5)
    other = train.Batches(clips, 4, seed=3)
    other.restore(stream.position)
    for _ in range(12):  # across the end of a pass
        a, b = stream.next(5), other.next(5)
        assert np.array_equal(a[0], b[0]) and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
    assert stream.position["epoch"] >= 3
    epoch = stream.position["epoch"]
    assert stream.next(6)[1].shape == (4, 7, ROWS, COLUMNS) and stream.position["epoch"] == epoch + 1
    with pytest.raises(DataError, match="lower BATCH_SIZE or SEQ_LEN"):
        train.Batches(clips, 500, seed=3).next(5)


def test_action_sensitivity_is_zero_for_a_model_that_ignores_actions():
    model = small_model()
    tokens, actions = torch.randint(CODES, (4, 6, ROWS, COLUMNS)), torch.rand(4, 5, 5) * 2 - 1
    pose = torch.zeros(4, 6, 5)
    assert train.action_sensitivity(model, tokens, actions, pose) > 1e-4
    torch.nn.init.zeros_(model.film[0].weight)
    assert train.action_sensitivity(model, tokens, actions, pose) == 0


def test_the_log_holds_what_is_promised(tiny, monkeypatch):
    run_here(tiny, monkeypatch)
    rows = rows_of(tiny["OUT_DIR"])
    found = set().union(*rows)
    promised = {
        "loss",
        "loss_ce",
        "loss_teacher",
        "loss_self_fed",
        "loss_gap",
        "teacher_prob",
        "seq_len",
        "ar_len",
        "lr",
        "grad_norm",
        "entropy",
        "confidence_mean",
        "confidence_std",
        "confidence_min",
        "unique_codes",
        "unique_codes_target",
        "spatial_gradient",
        "film_gamma",
        "film_beta",
        "action_sensitivity",
        "epoch_completion",
        "frames_per_s",
        "val_bits_per_token",
        "val_accuracy",
    }
    assert promised <= found
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    pictures = {p.name for p in Path(tiny["OUT_DIR"]).glob("*.png")}
    assert pictures == {"train_000006.png", "train_000012.png", "val_000006.png", "val_000012.png"}


def test_spikes_are_reported_with_their_clips(world_dir, tmp_path):
    watch = train.SpikeWatch(tmp_path / "spikes.jsonl", TokenClips(world_dir, "train"))
    windows = np.array([[1, 7]])
    for step in range(30):
        watch.look(step, 1.0, 0.5, windows, {})
    assert not (tmp_path / "spikes.jsonl").exists()
    watch.look(30, 9.0, 0.5, windows, {"ce": torch.tensor(9.0)})
    watch.look(31, math.nan, 0.5, windows, {})
    rows = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [(r["step"], r["what"], r["windows"]) for r in rows] == [
        (30, "loss", ["clip1:7"]),
        (31, "loss", ["clip1:7"]),
    ]


def test_tokens_of_another_tokenizer_are_refused(tiny, world_dir, tmp_path, monkeypatch):
    torch.manual_seed(9)
    other = VQVAE(VQVAEConfig(ROWS * 4, COLUMNS * 4, CODES, embedding_dim=4, hidden_dim=8))
    checkpoint.save(tmp_path / "other.pt", tokenizer_content(other))
    with pytest.raises(DataError, match=f"in use is {fingerprint(other)}; encode"):
        run_here(tiny, monkeypatch, VQVAE_CKPT=str(tmp_path / "other.pt"))


def test_weights_to_start_from_must_be_of_the_same_model(tiny, tmp_path, monkeypatch):
    first = Path(tiny["OUT_DIR"]) / "last.pt"
    before = run_here(tiny, monkeypatch)
    after = run_here(tiny, monkeypatch, OUT_DIR=str(tmp_path / "more"), INIT_FROM=str(first), STEPS=1, LR=0.0)
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    with pytest.raises(checkpoint.CheckpointError, match="last.pt: was trained with .*no INIT_FROM"):
        run_here(tiny, monkeypatch, OUT_DIR=str(tmp_path / "wider"), HIDDEN_DIM=24)


def test_the_command_line_refuses_unknown_names_and_wrong_types():
    for argument, message in (
        ("BATCHSIZE=3", "did you mean BATCH_SIZE?"),
        ("LR=fast", "LR is of type float"),
        ("RECIPE=v4.5", "did you mean v4.5.2?"),
    ):
        found = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), argument], capture_output=True, text=True
        )
        assert found.returncode == 2 and message in found.stderr, found.stderr
    shown = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "BATCH_SIZE=" in shown.stdout


# ---------------------------------------------------------------- several processes


def start_two(constants: dict) -> subprocess.Popen:
    """The run under torchrun, in two processes of one thread each; its output is in `stdout`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*torchrun, *command(constants)[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_train_as_one(tiny, tmp_path, monkeypatch):
    changes = {"STEPS": 6, "AR_LEN_MAX": 0, "TOKEN_NOISE": 0.0, "LR": 1e-2}
    two = {**tiny, **changes, "OUT_DIR": str(tmp_path / "two")}
    output, _ = (process := start_two(two)).communicate(timeout=120)
    assert process.returncode == 0, output
    assert "processes: 2, 2 windows each" in output and output.count("finished at step 6") == 1
    a = checkpoint.load(Path(two["OUT_DIR"]) / "last.pt")
    b = run_here(tiny, monkeypatch, **changes)
    assert a["position"] == b["position"]
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=1e-3, atol=1e-4)
    rows = {name: rows_of(run["OUT_DIR"]) for name, run in (("two", two), ("one", tiny))}
    logged = {name: [(r["step"], set(r)) for r in found] for name, found in rows.items()}
    assert logged["two"] == logged["one"], "only the first process writes the log"


def test_two_processes_stop_together_and_go_on_as_if_they_had_not(tiny, tmp_path):
    # A constant learning rate: it would depend on STEPS, which is chosen only after the stop.
    two = {**tiny, "LR": 1e-3, "MIN_LR": 1e-3, "TOKEN_NOISE": 0.2, "STEPS": 100_000, "LOG_STEPS": 1}
    two |= {"VAL_STEPS": 100_000, "PICTURE_STEPS": 100_000, "SAVE_STEPS": 100_000}
    process = start_two(two)
    while not (Path(two["OUT_DIR"]) / "log.jsonl").is_file() or not rows_of(two["OUT_DIR"]):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children()
    second = next(w for w in workers if w.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("stopped at step") == 1, output
    reached = checkpoint.load(Path(two["OUT_DIR"]) / "last.pt")["step"]

    runs = []
    for place in (two["OUT_DIR"], str(tmp_path / "unbroken")):
        run = {**two, "OUT_DIR": place, "STEPS": reached + 3}
        output, _ = (process := start_two(run)).communicate(timeout=120)
        assert process.returncode == 0, output
        assert (f"at step {reached}\n" in output) == (place == two["OUT_DIR"])
        runs.append(checkpoint.load(Path(place) / "last.pt"))
    assert_same_run(*runs)


def test_a_batch_that_cannot_be_split_is_refused(tiny):
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "3"}
    found = subprocess.run(command(tiny), env=environment, capture_output=True, text=True)
    assert found.returncode == 2 and "BATCH_SIZE=4 is the whole batch" in found.stderr, found.stderr


def test_each_process_draws_for_itself(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    drawn = []
    for rank, step in ((1, 0), (2, 0), (1, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        distributed.reseed(7, step)
        drawn.append(torch.rand(()).item())
    assert len(set(drawn[:3])) == 3 and drawn[3] == drawn[0]
    monkeypatch.setenv("RANK", "0")
    before = torch.get_rng_state()
    distributed.reseed(7, 0)
    assert torch.equal(torch.get_rng_state(), before), "the first goes on with its own generator"
