"""Training of the depth network: the real script at a tiny size."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dataset.token_files import DataError
from depth import train_depth
from depth.depth_net import DepthConfig
from depth.predictor import load_depth
from depth.train_depth import load_frames, train
from runtime.config import load
from runtime.video import read_image

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


def test_one_split_alone_is_refused(config):
    with pytest.raises(DataError, match="no clip for val with VAL_FRACTION=0.0.*record more worlds"):
        load_frames(replace(config, val_fraction=0.0), DepthConfig(16, 32), torch.device("cpu"))


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


def test_a_resumed_run_is_the_same_bit_for_bit(config, tmp_path, one_thread):
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
    assert "no such folder" in done.stderr
