"""A tiny recorded world for the tests of training, and settings of a run on it that takes a second."""

import json
from pathlib import Path

import numpy as np
import torch

from dataset.token_files import ClipEntry, Manifest, write_token_file
from depth.depth_net import DepthConfig, DepthNet
from depth.predictor import DEPTH_KIND, DepthPredictor
from model_convGru import ConvGRUWorldModel, WorldModelConfig
from runtime import checkpoint
from training.train_config import TrainConfig
from vq_vae.tokenizer import Tokenizer, tokenizer_content
from vq_vae.vq_vae import VQVAE, VQVAEConfig

CODES, ROWS, COLUMNS = 16, 3, 4
CLIPS, FRAMES = 5, 31

COMMON = {
    "batch_size": 4, "seq_len": 5, "seq_len_max": 5, "steps": 12, "warmup_steps": 2, "balance": 0.0,
    "log_steps": 2, "val_steps": 6, "picture_steps": 6, "sensitivity_steps": 4, "save_steps": 1,
    "precision": "fp32", "device": "cpu", "wandb": "disabled",
}  # fmt: skip
CONVGRU = COMMON | {
    "model": "convgru", "embed_dim": 8, "hidden_dim": 16, "layers": 1,
    "ar_growth": "ramp", "ar_ramp_steps": 4, "ar_len_max": 3, "ss_midpoint_step": 0,
}  # fmt: skip
GEOMETRY = COMMON | {
    "channels": 8, "coarse_channels": 8, "keyframes": 3, "motion_steps": 2, "balance": 0.5,
    "pair_share": 0.5, "pair_batch": 4, "pair_pool": 24, "pair_passes": 2,
}  # fmt: skip


def tiny_vqvae(seed: int = 0) -> VQVAE:
    """A tokenizer network for pictures of 16x12 pixels."""
    torch.manual_seed(seed)
    return VQVAE(VQVAEConfig(ROWS * 4, COLUMNS * 4, CODES, embedding_dim=4, hidden_dim=8))


def tiny_depth(seed: int = 0) -> DepthPredictor:
    """An untrained depth network for the pictures of this world."""
    torch.manual_seed(seed)
    return DepthPredictor(DepthNet(DepthConfig(ROWS * 4, COLUMNS * 4, (4, 8), (0, 1), heads=2)))


def small_convgru(seed: int = 1) -> ConvGRUWorldModel:
    """An untrained baseline model for the grid of this world."""
    torch.manual_seed(seed)
    return ConvGRUWorldModel(WorldModelConfig(CODES, ROWS, COLUMNS, embed_dim=8, hidden_dim=16, layers=1))


def write_world(folder: Path) -> Path:
    """Writes a tokenizer, a depth network, and token files of a world whose grid rolls with the yaw.

    Every second clip has recorded depth. Returns `folder`.
    """
    vqvae = tiny_vqvae()
    checkpoint.save(folder / "vqvae.pt", tokenizer_content(vqvae))
    checkpoint.save(folder / "depth.pt", checkpoint.content_of(DEPTH_KIND, tiny_depth().network))
    fingerprint = Tokenizer(vqvae).fingerprint
    manifest = Manifest(16.0, [ROWS * 4, COLUMNS * 4], [ROWS, COLUMNS], CODES, fingerprint, 70.0)
    rng = np.random.default_rng(0)
    scene = rng.integers(0, CODES, (ROWS, COLUMNS))
    for i in range(CLIPS):
        shift = rng.integers(-1, 2, FRAMES - 1)
        tokens = np.stack([np.roll(scene, s, 1) for s in np.cumsum(np.r_[0, shift])])
        actions = np.zeros((FRAMES - 1, 5), np.float32)
        actions[:, 0] = shift
        depth = rng.integers(0, 256, (FRAMES, 2 * ROWS, 2 * COLUMNS)).astype(np.uint8)
        extras = {"depth": depth} if i % 2 else {}
        write_token_file(folder / f"clip{i}.npz", tokens, actions, np.zeros((FRAMES, 5)), **extras)
        split = "val" if i == CLIPS - 1 else "train"
        frames = [0, FRAMES - 1, 1]
        manifest.clips.append(ClipEntry(f"clip{i}", f"clip{i}.npz", FRAMES, split, f"clip{i}.mp4", frames))
    manifest.save(folder)
    return folder


def settings(world: Path, out: Path, values: dict) -> TrainConfig:
    """A run on the world in the folder `world`."""
    files = {"data_dir": str(world), "vqvae_ckpt": str(world / "vqvae.pt"), "out_dir": str(out)}
    if values.get("model") != "convgru":
        files["depth_ckpt"] = str(world / "depth.pt")
    return TrainConfig(**files, **values)


def logged(out: str | Path) -> list[dict]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
