"""Fixtures that several tests share: tiny networks with random weights, tokens, clips with depth."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.token_files import ClipEntry, Manifest, split_of, write_token_file
from model_convGru import ConvGRUWorldModel, WorldModelConfig
from rollout.world_model import world_content
from runtime import checkpoint
from runtime.video import write_video
from vq_vae.tokenizer import Tokenizer, load_tokenizer, tokenizer_content
from vq_vae.vq_vae import VQVAE, VQVAEConfig

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_TOKENIZER = VQVAEConfig(
    height=16, width=32, codebook_size=64, embedding_dim=8, hidden_dim=8, residual_blocks=1
)
TINY_WORLD = WorldModelConfig(
    codebook_size=64, latent_height=4, latent_width=8, embed_dim=8, hidden_dim=8, layers=2
)


@dataclass(frozen=True)
class TinyFiles:
    """Where the files of the `tiny` fixture lie. Shared by all tests: never write to them."""

    tokenizer: Path
    world: Path
    tokens: Path  # the token file, 40 frames of 4x8 codes, with a manifest beside it

    @property
    def flags(self) -> list[str]:
        """The command line flags that name them."""
        files = {"--checkpoint": self.world, "--vqvae_ckpt": self.tokenizer, "--device": "cpu"}
        return [str(word) for pair in files.items() for word in pair]


class PixelDistance(torch.nn.Module):
    """Stands in for perceptual.EffNetDistance, for pictures of any size."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3))

    def embedding(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pictures, 8).flatten(1)


def tiny_vqvae(seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    return VQVAE(TINY_TOKENIZER)


def tiny_tokenizer(seed: int = 0) -> Tokenizer:
    return Tokenizer(tiny_vqvae(seed))


@pytest.fixture
def one_thread():
    """Several threads add gradients up in any order, so only runs of one thread are equal bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyFiles:
    """A tokenizer for 32x16 pictures, a world model for it (16 frames/s, 15 degrees a unit), a token file."""
    folder = tmp_path_factory.mktemp("tiny")
    files = TinyFiles(folder / "vqvae.pt", folder / "world.pt", folder / "tokens" / "clip.npz")
    checkpoint.save(files.tokenizer, tokenizer_content(tiny_vqvae()))
    tokenizer = load_tokenizer(files.tokenizer)
    learned = {"fps": 16.0, "camera_degrees_per_unit": 15.0, "vertical_fov_degrees": 70.0}
    world = world_content(ConvGRUWorldModel(TINY_WORLD, tokenizer), data=learned)
    checkpoint.save(files.world, world)
    files.tokens.parent.mkdir()
    rng = np.random.default_rng(0)
    actions = np.concatenate(
        [rng.uniform(-1, 1, (39, 2)), rng.integers(-1, 2, (39, 2)), np.zeros((39, 1))], 1
    )
    write_token_file(files.tokens, rng.integers(0, 64, (40, 4, 8)), actions, np.zeros((40, 5)))
    write_manifest(files.tokens, tokenizer.fingerprint)
    return files


def write_manifest(tokens: Path, fingerprint: str, fps: float = 16.0) -> None:
    """A manifest for one token file of 40 frames, beside it."""
    clip = ClipEntry(tokens.stem, tokens.name, 40, "train", "clip.mp4", [0, 39, 1])
    Manifest(fps, [16, 32], [4, 8], 64, fingerprint, 70.0, clips=[clip]).save(tokens.parent)


# ---------------------------------------------------------------- clips with depth


def world_seeds(split: str, count: int) -> list[str]:
    """World seeds that fall into a split with half of the worlds held out."""
    return [str(n) for n in range(100) if split_of(f"world_{n}", 0.5) == split][:count]


def write_depth_clip(folder: Path, name: str, world: str, rng: np.random.Generator) -> None:
    """A clip of frames with a near red wall and a far blue one, to both sides of a random column."""
    frames, height, width = 12, TINY_TOKENIZER.height, TINY_TOKENIZER.width
    pictures = np.zeros((frames, height, width, 3), np.uint8)
    codes = np.zeros((frames, height // 2, width // 2), np.uint8)
    for k in range(frames):
        edge, red_left = 4 * int(rng.integers(1, 8)), rng.random() < 0.5
        left, right = (200, 90) if red_left else (90, 200)  # codes of 0.6 and 15 m
        codes[k, :, : edge // 2], codes[k, :, edge // 2 :] = left, right
        pictures[k, :, :edge, 0 if red_left else 2] = 200
        pictures[k, :, edge:, 2 if red_left else 0] = 200
    entry = {"ws": 0, "ad": 0, "scs": 0, "pitch_delta": 1 / 15, "yaw_delta": 0}
    actions = {
        str(k): {**entry, "yaw": 0.0, "pitch": float(k), "pos": [0.0, 10.0, 0.1 * k]} for k in range(frames)
    }
    for part in ("metadata", "depth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_video(folder / "video" / f"{name}.mp4", pictures, 16)
    np.savez_compressed(folder / "depth" / f"{name}.npz", log_inverse=codes)
    content = {"world_seed": world, "actions": actions}
    (folder / "metadata" / f"{name}.json").write_text(json.dumps(content))


@dataclass(frozen=True)
class DepthData:
    """Where the clips lie, which worlds they show, and a folder for prepared frames. Never write to them."""

    folder: Path
    worlds: dict[str, str]  # of each clip, by its name
    cache: Path


@pytest.fixture(scope="session")
def depth_data(tmp_path_factory) -> DepthData:
    folder = tmp_path_factory.mktemp("depth_data")
    rng = np.random.default_rng(0)
    worlds = {
        f"clip_{w}_{n}": w for w in (*world_seeds("train", 2), *world_seeds("val", 1)) for n in range(2)
    }
    for name, world in worlds.items():
        write_depth_clip(folder, name, world, rng)
    return DepthData(folder, worlds, tmp_path_factory.mktemp("depth_cache"))
