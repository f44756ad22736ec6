#!/usr/bin/env python3
"""Shows how well the tokenizer reconstructs pictures: originals above their reconstructions, with PSNR.

python vq_vae/vq_vae_inference.py                        # frames of the clips in samples/
python vq_vae/vq_vae_inference.py --clip video/walk.mp4
python vq_vae/vq_vae_inference.py --pictures runs/pictures.npz --count 16 --measure

`--measure` prints the measures of train_vqvae.py's validation over all held-out pictures of the file.
"""

import argparse
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.token_files import SAMPLES
from metrics import code_usage, psnr
from metrics.perceptual import perceptual_distance
from runtime.config import SettingError, positive_int
from runtime.device import pick_device
from runtime.errors import UserError, run_script
from runtime.outputs import check_outputs
from runtime.video import (
    RESIZE,
    VideoError,
    enlarge,
    grid,
    label,
    read_frames,
    resize,
    save_image,
    to_float,
    to_uint8,
)
from vq_vae.tokenizer import BATCH, SHIPPED_TOKENIZER, load_tokenizer
from vq_vae.training_pictures import validate

COLUMNS = 4  # pictures side by side
SCALE = 2
GAP = 4  # pixels between them


class PictureError(UserError):
    """A picture file that is missing, broken, or of another size than the tokenizer's."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    vqvae_ckpt: Path
    pictures: Path | None
    clip: Path | None
    count: int
    measure: bool
    resize: str
    out: Path
    device: str


def evenly(total: int, count: int) -> np.ndarray:
    """`count` (at most `total`) different indices in 0..total-1, evenly spaced and away from the ends."""
    count = min(count, total)
    return ((np.arange(count) + 0.5) * total / count).astype(int)


def from_clips(
    paths: list[Path], count: int, height: int, width: int, method: str
) -> tuple[np.ndarray, list[str]]:
    """`count` frames spread over the clips -> [N, height, width, 3] uint8, and a name for each.

    Raises VideoError.
    """
    shares = [len(part) for part in np.array_split(np.arange(count), len(paths))]
    pictures, names = [], []
    for path, share in tqdm(list(zip(paths, shares, strict=True)), desc="decode", unit="clip"):
        if not share:
            continue
        frames = [resize(frame, height, width, method) for frame in read_frames(path)]
        for i in evenly(len(frames), share):
            pictures.append(frames[i])
            names.append(f"{path.stem} frame {i}")
    return np.stack(pictures), names


def from_file(path: Path, height: int, width: int) -> tuple[np.ndarray, str]:
    """The pictures of a file from preprocess_vqvae.py: of `val`, or of `train` if `val` is empty.

    -> [N, height, width, 3] uint8, and the name of the split. Raises PictureError.
    """
    try:
        with np.load(path) as arrays:
            split = "val" if len(arrays["val"]) else "train"
            pictures = arrays[split]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise PictureError(f"{path}: {error}; make it with vq_vae/preprocess_vqvae.py") from None
    if pictures.shape[1:] != (height, width, 3) or not len(pictures):
        raise PictureError(
            f"{path}: {split} is {pictures.shape}, this tokenizer takes [N > 0, {height}, {width}, 3]; "
            f"sample again with --height {height} --width {width}"
        )
    return pictures, split


def sheet(
    originals: np.ndarray, reconstructions: np.ndarray, names: list[str], decibels: list[float]
) -> np.ndarray:
    """[N, H, W, 3] uint8 both -> one picture: rows of COLUMNS originals, each above its reconstruction."""
    columns = min(COLUMNS, len(originals))
    blank = label(np.zeros_like(enlarge(originals[0], SCALE)), "")
    gap = ((0, GAP), (0, GAP), (0, 0))
    tiles: list[np.ndarray] = []
    for first in range(0, len(originals), columns):
        part = range(first, min(first + columns, len(originals)))
        fill = [blank] * (columns - len(part))
        tiles += [label(enlarge(originals[i], SCALE), names[i]) for i in part] + fill
        captions = [f"reconstructed: {decibels[i]:.1f} dB" for i in part]
        pairs = zip(part, captions, strict=True)
        tiles += [label(enlarge(reconstructions[i], SCALE), caption) for i, caption in pairs] + fill
    return grid([np.pad(tile, gap) for tile in tiles], columns)


def run(options: Options) -> None:
    """Writes the sheet and prints the PSNR. Raises UserError."""
    inputs = (options.vqvae_ckpt, options.pictures, options.clip)
    check_outputs([options.out], [path for path in inputs if path])
    device = pick_device(options.device)
    tokenizer = load_tokenizer(options.vqvae_ckpt, device)
    height, width = tokenizer.config.height, tokenizer.config.width
    if options.measure and not options.pictures:
        raise SettingError("--measure: needs --pictures, a file from vq_vae/preprocess_vqvae.py")
    if options.pictures:
        pictures, split = from_file(options.pictures, height, width)
        indices = evenly(len(pictures), options.count)
        originals, names = pictures[indices], [f"{split} {i}" for i in indices]
    else:
        clips = [options.clip] if options.clip else sorted((SAMPLES / "video").glob("*.mp4"))
        if not clips:
            raise VideoError(f"{SAMPLES / 'video'}: holds no .mp4; give --clip or --pictures")
        originals, names = from_clips(clips, options.count, height, width, options.resize)
    tokens = tokenizer.encode_frames(originals)
    decoded = torch.cat(list(tokenizer.decode_frames(tokens)))
    decibels = psnr(decoded, to_float(torch.from_numpy(originals))).tolist()
    used, perplexity = code_usage(tokens.flatten().bincount(minlength=tokenizer.config.codebook_size))
    save_image(options.out, sheet(originals, to_uint8(decoded).numpy(), names, decibels))
    print(
        f"{len(originals)} pictures: mean PSNR {np.mean(decibels):.2f} dB "
        f"(from {min(decibels):.2f} to {max(decibels):.2f}), {used} of {tokenizer.config.codebook_size} "
        f"codes used, perplexity {perplexity:.0f}"
    )
    print(options.out)
    if options.measure:
        distance = perceptual_distance().to(device)
        metrics, _ = validate(tokenizer.vqvae, distance, pictures, BATCH, torch.float32)
        print(
            f"{len(pictures)} pictures of {split}: "
            + json.dumps({k: round(v, 4) for k, v in metrics.items()})
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="tokenizer checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pictures", type=Path, help=".npz from preprocess_vqvae.py; its held-out pictures")
    source.add_argument("--clip", type=Path, help="a video (default: the clips in samples/)")
    parser.add_argument("--count", type=positive_int, default=8, help="pictures to show (default 8)")
    parser.add_argument("--measure", action="store_true", help="measure all held-out pictures of --pictures")
    parser.add_argument("--resize", choices=sorted(RESIZE), default="area", help="for --clip")
    parser.add_argument("--out", type=Path, default=Path("outputs/reconstructions.png"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    options = Options(**vars(parser.parse_args(arguments)))
    return run_script(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
