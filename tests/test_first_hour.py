"""The first hour of a new user: the repository's samples, one's own clips, and clips without poses, from
recordings to a world that one walks in."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import GEOMETRY, logged, settings, tiny_depth, tiny_vqvae

import live_inference
import preprocess
import train
from dataset.token_files import SAMPLES, Manifest
from depth.predictor import DEPTH_KIND
from rollout.context import load_recording, load_world, prime
from rollout.rollout import Rollout
from runtime import checkpoint
from runtime.video import read_frames, read_image, write_video
from vq_vae.tokenizer import tokenizer_content

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- make train


@pytest.fixture
def clone(tmp_path) -> Path:
    """The repository's files by links, and a virtual environment whose setup is done."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git", "runs", "tokens", "outputs", "data"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / ".ready-run").touch()
    return folder


def cut_sample(name: str, frames: int, target: Path) -> None:
    """The first frames of a sample clip as a clip of its own."""
    pictures = list(islice(read_frames(SAMPLES / "video" / f"{name}.mp4"), frames))
    write_video(target / "video" / f"{name}.mp4", pictures, 16)
    content = json.loads((SAMPLES / "metadata" / f"{name}.json").read_text())
    content["actions"] = {str(k): content["actions"][str(k)] for k in range(frames)}
    (target / "metadata").mkdir(exist_ok=True)
    (target / "metadata" / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("clips, held_out", [(1, "end"), (2, "clips")])
def test_make_train_ends_with_a_world_that_plays(clone, tmp_path, clips, held_out):
    for name in ("clip_07_00001", "clip_07_00003")[:clips]:
        cut_sample(name, 100 if clips == 1 else 70, tmp_path / "mine")
    smaller = (
        "STEPS=3 BATCH_SIZE=2 PAIR_BATCH=4 PAIR_POOL=24 LOG_STEPS=1 VAL_STEPS=2 VAL_WINDOWS=1 VAL_ROLLOUTS=0 "
        "WANDB=disabled"
    )
    words = ["make", "train", f"FROM={tmp_path / 'mine'}", f"ARGS={smaller}", "VENV=.venv"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Manifest.load(clone / "tokens" / "mine").held_out == held_out
    run = clone / "runs" / "mine"
    assert any("val_bits_per_token" in row for row in logged(run))
    assert read_image(run / "curves.png").ndim == 3 and (run / "best.pt").is_file()
    assert read_image(clone / "outputs" / "mine_sheet.png").std() > 10
    assert "make play ARGS='--checkpoint runs/mine/best.pt'" in done.stdout


# ---------------------------------------------------------------- data without poses


def minerl_folder(parent: Path, name: str, actions: int, rng: np.random.Generator) -> None:
    """A MineRL trajectory (20 actions a second, no poses): stripes that move with the camera."""
    folder = parent / name
    folder.mkdir(parents=True)
    turns = rng.integers(-1, 2, actions)
    stripes = rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)
    frames = [np.roll(stripes, -4 * shift, 1) for shift in np.cumsum(np.r_[0, turns])]
    write_video(folder / "recording.mp4", frames, 20)
    metadata = {
        "success": True,
        "duration_ms": 50 * actions,
        "duration_steps": actions,
        "true_video_frame_count": actions + 1,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    keys = {
        f"action${key}": rng.integers(0, 2, actions) for key in ("forward", "back", "left", "right", "jump")
    }
    camera = np.column_stack([np.zeros(actions), 5.0 * turns]).astype(np.float32)
    np.savez(folder / "rendered.npz", **{"reward": np.zeros(actions), "action$camera": camera}, **keys)


@pytest.fixture(scope="module")
def without_poses(tmp_path_factory) -> Path:
    """A world trained on MineRL trajectories: clips/, tokens/, run/, vqvae.pt, depth.pt."""
    folder = tmp_path_factory.mktemp("without_poses")
    rng = np.random.default_rng(0)
    for name in "abc":
        minerl_folder(folder / "clips", name, 120, rng)
    checkpoint.save(folder / "vqvae.pt", tokenizer_content(tiny_vqvae()))
    checkpoint.save(folder / "depth.pt", checkpoint.content_of(DEPTH_KIND, tiny_depth().network))
    words = ["--parent_dir", "clips", "--out_dir", "tokens", "--vqvae_ckpt", "vqvae.pt", "--fps_target", "10"]
    words = [str(folder / word) if (folder / word).exists() or word == "tokens" else word for word in words]
    assert preprocess.main([*words, "--device", "cpu"]) == 0
    files = {"vqvae_ckpt": str(folder / "vqvae.pt"), "depth_ckpt": str(folder / "depth.pt")}
    config = settings(folder, folder / "run", GEOMETRY | {"batch_size": 2, "steps": 4, "val_steps": 4})
    config = train.TrainConfig(**vars(config) | files | {"data_dir": str(folder / "tokens")})
    train.train(config, torch.device("cpu"), torch.float32)
    return folder


def played(folder: Path, actions: list[list[float]]) -> np.ndarray:
    """The poses [N+1, 5] of a player in the trained world under some actions."""
    files = [folder / name for name in ("run/best.pt", "vqvae.pt", "depth.pt")]
    world = load_world(files[0], files[1], "cpu", "fp32", files[2])
    recording = load_recording(folder / "tokens" / "a.npz", world)
    rollout = Rollout(world.model)
    prime(rollout, [recording.first(4)])
    poses = []
    for action in [[0.0] * 5, *actions]:
        rollout.step(torch.tensor([action]))
        poses.append(world.model.pose_of(rollout.state)[0].numpy().copy())
    return np.stack(poses).astype(np.float64)


FORWARD, RIGHT, JUMP, TURN = [0, 0, 0, 1.0, 0], [0, 0, 1.0, 0, 0], [0, 0, 0, 0, 1.0], [1.0, 0, 0, 0, 0]
NOTHING = [0.0] * 5
A_FRAME = 3.91 / 10  # metres at walking speed and 10 frames a second


def test_in_a_world_without_poses_the_keys_move_the_player_at_walking_speed(without_poses):
    # The context's keys move the player too: it comes to rest first.
    poses = played(without_poses, [NOTHING] * 10 + [FORWARD] * 10)
    steps = np.diff(poses, axis=0)
    still, walking = steps[5:9], steps[12:]
    assert np.abs(still[:, :3]).max() < 1e-6
    np.testing.assert_allclose(np.hypot(walking[:, 0], walking[:, 2]), A_FRAME, rtol=0.01)
    assert np.abs(walking[:, 1]).max() < 1e-6, "on flat ground"
    yaw = np.deg2rad(poses[-1, 3])
    np.testing.assert_allclose(
        walking[-1, [0, 2]], A_FRAME * np.array([-np.sin(yaw), np.cos(yaw)]), atol=0.01
    )


def test_in_a_world_without_poses_one_turns_strafes_and_jumps(without_poses):
    poses = played(
        without_poses, [NOTHING] * 10 + [TURN] * 3 + [RIGHT] * 6 + [NOTHING] * 6 + [JUMP] + [NOTHING] * 12
    )
    assert poses[13, 3] - poses[10, 3] == pytest.approx(3 * 30), "30 degrees a unit at half the rate"
    yaw = np.deg2rad(poses[19, 3])
    right = poses[19, [0, 2]] - poses[18, [0, 2]]
    np.testing.assert_allclose(right, A_FRAME * np.array([-np.cos(yaw), -np.sin(yaw)]), atol=0.01)
    height = poses[25:, 1] - poses[25, 1]
    assert 0.8 < height.max() < 1.4 and abs(height[-1]) < 1e-6, "up and down again"


def test_a_world_without_poses_plays_in_the_program(without_poses, tmp_path):
    files = {"--checkpoint": "run/best.pt", "--vqvae_ckpt": "vqvae.pt", "--depth_ckpt": "depth.pt"}
    words = [str(word) for flag, name in files.items() for word in (flag, without_poses / name)]
    words += ["--start", str(without_poses / "tokens" / "a.npz"), "--device", "cpu"]
    out = tmp_path / "play.mp4"
    assert live_inference.main([*words, "--script", "w*6,yaw+0.5*2,jump", "--out", str(out)]) == 0
    assert len(list(read_frames(out))) == 9


def test_no_figure_of_a_run_without_poses_is_nan(without_poses):
    text = (without_poses / "run" / "log.jsonl").read_text()
    assert "NaN" not in text and any("val_bits_per_token" in row for row in logged(without_poses / "run"))
