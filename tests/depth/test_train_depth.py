"""Training of the depth network: the real script at a tiny size."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import world_seeds
from test_reprojection import view

from dataset.token_files import DataError
from depth import train_depth
from depth.depth_clips import split_only_clip
from depth.depth_net import DepthConfig, DepthNet
from depth.predictor import DEPTH_KIND, load_depth
from depth.train_depth import load_frames, loss_of, train, validate
from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from runtime.config import SettingError, load
from runtime.video import read_image, to_uint8, write_video

SCRIPT = Path(train_depth.__file__)


@pytest.fixture
def config(depth_data, tiny, tmp_path) -> Any:
    """A network that trains in seconds, with one world held out."""
    return replace(
        load(vars(train_depth), []),
        data_dirs=str(depth_data.folder),
        vqvae_ckpt=str(tiny.tokenizer),
        cache_dir=str(depth_data.cache),
        out_dir=str(tmp_path / "run"),
        frame_step=1,
        val_fraction=0.5,
        decoded_share=0.25,
        height=16,
        width=32,
        channels=(8, 8, 8, 8),
        steps=6,
        batch_size=4,
        warmup_steps=2,
        val_steps=100,
        save_steps=100,
        precision="fp32",
        device="cpu",
        wandb="disabled",
    )


def test_held_out_worlds_are_never_trained_on(config, depth_data):
    frames = load_frames(config, DepthConfig(16, 32), torch.device("cpu"))
    worlds = {split: {depth_data.worlds[c.name] for c in part.clips} for split, part in frames.items()}
    assert worlds["train"] and worlds["val"] and not worlds["train"] & worlds["val"]
    assert frames["train"].decoded.mean() == 0.25


def test_nothing_to_train_on_is_refused(config):
    with pytest.raises(DataError, match="no clip to train on with VAL_FRACTION=1.0.*record more worlds"):
        load_frames(replace(config, val_fraction=1.0), DepthConfig(16, 32), torch.device("cpu"))


def test_a_run_without_held_out_clips_trains_and_keeps_the_newest_weights(config, capsys):
    train(replace(config, val_fraction=0.0, steps=4, val_steps=2))
    assert "training without validation" in capsys.readouterr().err
    out = Path(config.out_dir)
    assert [checkpoint.load(out / name)["step"] for name in ("best.pt", "last.pt")] == [4, 4]
    assert not list(out.glob("val_*.png"))


def test_the_end_of_a_single_clip_is_held_out(config, depth_data):
    whole = load_frames(config, DepthConfig(16, 32), torch.device("cpu"))["train"].clips[0]
    long = replace(whole, pictures=np.resize(whole.pictures, (100, 16, 32, 3)), pose=np.zeros((100, 5)))
    long = replace(long, codes=np.resize(whole.codes, (100, 8, 16)), decoded=np.arange(100) % 2 == 1)
    parts = split_only_clip(long, step=4, val_fraction=0.1)
    (first,), (last,) = parts["train"], parts["val"]
    # 400 frames: 286 to train on, 50 between, 64 held out
    assert (len(first.pictures), len(last.pictures)) == (72, 16)
    assert np.array_equal(last.codes, long.codes[84:]) and np.array_equal(first.pictures, long.pictures[:72])
    assert last.decoded.tolist() == long.decoded[84:].tolist()
    assert split_only_clip(whole, 1, 0.1)["val"] == [], "12 frames are too few"


def test_depth_of_another_size_is_refused(config):
    with pytest.raises(DataError, match=r"depth of \[8, 16\], the network gives \[16, 16\]"):
        load_frames(replace(config, decoded_share=0.0), DepthConfig(32, 32), torch.device("cpu"))


def test_a_run_learns_and_leaves_its_files(config):
    out = Path(config.out_dir)
    train(replace(config, steps=150, batch_size=8, lr=5e-3, val_steps=50, log_steps=10, flip=True))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    errors = [row["val_error"] for row in rows if "val_error" in row]
    assert errors[-1] < 0.5 * errors[0] or errors[-1] < 0.25 * rows[-1]["val_error_ground"]
    assert rows[-1]["val_error"] < 0.5 * rows[-1]["val_error_ground"]
    for name in ("val_error_no_pitch", "val_error_decoded", "val_expected_over_made"):
        assert rows[-1][name] > 0
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == list(range(10, 151, 10))
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert read_image(out / "val_000150.png").ndim == 3
    for name in ("best.pt", "last.pt"):
        assert load_depth(out / name).config.channels == (8, 8, 8, 8)


class StopAfter:
    """Stands in for StopRequest: stops the loop before its step `steps`."""

    def __init__(self, steps: int):
        self.left = steps

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("labels", ["all", "none", "some"])
def test_a_resumed_run_is_the_same_bit_for_bit(labels, config, pose_data, tmp_path, one_thread):
    if labels != "all":
        folders = f"{pose_data},{config.data_dirs}" if labels == "some" else str(pose_data)
        config = replace(config, data_dirs=folders, reprojection_weight=1.0, reprojection_frames=2)
    whole, parts = (replace(config, out_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole)
    train(parts, StopAfter(3))
    assert torch.load(Path(parts.out_dir) / "last.pt")["step"] == 3
    train(parts)
    a, b = (torch.load(Path(c.out_dir) / "last.pt") for c in (whole, parts))
    assert a["step"] == b["step"] == 6
    for part in ("model", "trained"):
        assert all(torch.equal(tensor, b[part][name]) for name, tensor in a[part].items())
    assert any(not torch.equal(tensor, a["model"][name]) for name, tensor in a["trained"].items())


def test_a_bad_folder_is_one_line_on_stderr(tmp_path):
    words = [f"DATA_DIRS={tmp_path / 'none'}", f"OUT_DIR={tmp_path}", "DEVICE=cpu", "WANDB=disabled"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "no such folder of clips; give another one (DATA_DIRS" in done.stderr


# ---------------------------------------------------------------- clips without depth


@pytest.fixture(scope="session")
def pose_data(tmp_path_factory) -> Path:
    """Clips with poses but no depth: steps to the side before a wall, one clip in each of two worlds."""
    folder = tmp_path_factory.mktemp("pose_data")
    (folder / "metadata").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        poses = np.zeros((30, 5))
        poses[:, :3] = np.cumsum(rng.uniform(-0.2, 0.2, (30, 3)), 0)
        poses[:, 3] = np.cumsum(rng.uniform(-2, 2, 30))
        pictures = [to_uint8(view(list(map(float, pose)), (16, 32))[0][None])[0].numpy() for pose in poses]
        write_video(folder / "video" / f"bare_{split}.mp4", pictures, 16)
        entry = {"ws": 0, "ad": 1, "scs": 0, "pitch_delta": 0}
        turns = np.diff(poses[:, 3], prepend=0.0) / 15
        actions = {
            str(k): {**entry, "yaw_delta": turns[k], "yaw": pose[3], "pitch": pose[4], "pos": list(pose[:3])}
            for k, pose in enumerate(poses)
        }
        content = {"world_seed": world_seeds(split, 3)[-1], "actions": actions}
        (folder / "metadata" / f"bare_{split}.json").write_text(json.dumps(content))
    return folder


def test_a_run_without_depth_files_learns_from_poses(config, pose_data):
    out = Path(config.out_dir)
    bare = replace(
        config, data_dirs=str(pose_data), reprojection_weight=1.0, reprojection_frames=2, batch_size=8
    )
    train(replace(bare, steps=100, lr=5e-3, val_steps=20, log_steps=20, val_frames=30))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    gains = [row["val_warp_gain"] for row in rows if "val_warp_gain" in row]
    assert len(gains) == 5 and gains[-1] > gains[0] and gains[-1] > 0
    assert not any("error" in row or "val_error" in row for row in rows)
    logged = [row for row in rows if "reprojection" in row]
    assert logged[-1]["reprojection"] < logged[0]["reprojection"]
    assert 0 < logged[-1]["compared_share"] <= 1 and logged[-1]["smoothness"] > 0
    assert read_image(out / "val_000100.png").ndim == 3
    best = checkpoint.load(out / "best.pt", DEPTH_KIND)
    assert best["best"] == -max(gains) and best["metrics"]["val_warp_gain"] == max(gains)


def test_labelled_and_unlabelled_clips_share_a_batch(config, pose_data, depth_data):
    both = replace(
        config,
        data_dirs=f"{pose_data},{depth_data.folder}",
        reprojection_weight=1.0,
        reprojection_frames=2,
        val_frames=30,
    )
    frames = load_frames(both, DepthConfig(16, 32), torch.device("cpu"))
    train_frames = frames["train"]
    bare, labelled = (np.flatnonzero(mask)[5:8] for mask in (~train_frames.labelled, train_frames.labelled))
    torch.manual_seed(0)
    network = DepthNet(DepthConfig(16, 32, (8, 8, 8, 8))).eval()
    batch = train_frames.batch(np.sort(np.concatenate([bare, labelled])))
    assert batch.labelled.sum() == 3 and len(batch.views.pose) == 3
    assert torch.equal(batch.target.isfinite().all(2).all(1), batch.labelled)
    mixed, terms = loss_of(network, batch, both, torch.float32)
    alone = [loss_of(network, train_frames.batch(part), both, torch.float32) for part in (labelled, bare)]
    assert terms.keys() == alone[0][1].keys() | alone[1][1].keys()
    assert mixed.item() == pytest.approx((alone[0][0] + alone[1][0]).item() / 2, rel=1e-4)
    mixed.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())

    metrics, _ = validate(network, frames["val"], both, torch.float32)
    assert {"val_error", "val_error_ground", "val_warp_gain", "val_warp_psnr"} <= metrics.keys()
    # Without REPROJECTION_WEIGHT clips without depth do not take part.
    only = load_frames(replace(both, reprojection_weight=0.0), DepthConfig(16, 32), torch.device("cpu"))
    assert only["train"].labelled.all() and len(only["train"]) == train_frames.labelled.sum()


def test_decoded_pictures_are_compared_as_recorded(config, pose_data):
    bare = replace(config, data_dirs=str(pose_data), reprojection_weight=1.0, reprojection_frames=2)
    network = DepthConfig(16, 32)
    mixed = load_frames(bare, network, torch.device("cpu"))["train"]
    plain = load_frames(replace(bare, decoded_share=0.0), network, torch.device("cpu"))["train"]
    assert 0.2 < mixed.decoded.mean() < 0.3 and not plain.decoded.any()
    numbers = np.arange(len(plain))
    a, b = mixed.batch(numbers), plain.batch(numbers)
    changed = (a.pictures != b.pictures).flatten(1).any(1)
    np.testing.assert_array_equal(changed.numpy(), mixed.decoded)
    for part in ("picture", "pose", "others", "other_poses"):
        torch.testing.assert_close(getattr(a.views, part), getattr(b.views, part), equal_nan=True)
    assert torch.equal(b.views.others[5, 0], b.pictures[3]) and torch.equal(
        b.views.others[5, 1], b.pictures[7]
    )
    first, last = b.views.other_poses[0], b.views.other_poses[-1]
    assert first[0].isnan().all() and last[1].isnan().all() and last[0].isfinite().all()
    clip = mixed.clips[0].as_recorded()
    np.testing.assert_array_equal(clip.pictures, plain.clips[0].pictures)


def test_weights_to_start_from(config, tmp_path):
    start = tmp_path / "start.pt"
    torch.manual_seed(7)
    network = DepthNet(DepthConfig(16, 32, (8, 8, 8, 8), dropout=config.dropout))
    checkpoint.save(start, checkpoint.content_of(DEPTH_KIND, network))
    train(replace(config, init_from=str(start), steps=1, lr=0.0, min_lr=0.0, weight_decay=0.0))
    made = torch.load(Path(config.out_dir) / "last.pt")
    for part in ("model", "trained"):
        assert all(torch.equal(made[part][name], value) for name, value in network.state_dict().items())
    with pytest.raises(CheckpointError, match="or no INIT_FROM"):
        train(replace(config, init_from=str(start), channels=(8, 8, 8, 16), out_dir=str(tmp_path / "other")))


def test_frozen_levels_keep_their_weights(config, tmp_path):
    train(replace(config, steps=1))
    start = Path(config.out_dir) / "last.pt"
    config = replace(config, init_from=str(start), out_dir=str(tmp_path / "fine"), frozen_levels=2)
    train(config)
    before, after = (checkpoint.load(path)["model"] for path in (start, tmp_path / "fine" / "last.pt"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = ("encoder.2.", "encoder.3.", "coarsest.", "up.1.", "up.2.", "decoder.2.")
    assert same == {name for name in before if name.startswith(frozen)}
    for bad in (replace(config, frozen_levels=4), replace(config, init_from="")):
        with pytest.raises(SettingError, match="FROZEN_LEVELS=.*change one of them"):
            train(replace(bad, out_dir=str(tmp_path / "bad")))


def test_what_cannot_be_compared_is_refused(config, pose_data, tmp_path):
    bare = replace(config, data_dirs=str(pose_data), reprojection_weight=1.0)
    with pytest.raises(SettingError, match="REPROJECTION_FRAMES=4.*every 3th.*multiple of FRAME_STEP"):
        load_frames(replace(bare, frame_step=3), DepthConfig(16, 32), torch.device("cpu"))
    blind = tmp_path / "blind"
    (blind / "metadata").mkdir(parents=True)
    (blind / "video").symlink_to(pose_data / "video")
    for file in (pose_data / "metadata").iterdir():
        content = json.loads(file.read_text())
        for entry in content["actions"].values():
            del entry["pos"]
        (blind / "metadata" / file.name).write_text(json.dumps(content))
    with pytest.raises(DataError, match="no clip to train on"):
        load_frames(replace(bare, data_dirs=str(blind)), DepthConfig(16, 32), torch.device("cpu"))
