#!/usr/bin/env python3
"""Shows what the tokenizer keeps of a picture: originals above their reconstructions, with PSNR.

python vq_vae/vq_vae_inference.py                        # frames of the clips in samples/
python vq_vae/vq_vae_inference.py --clip video/walk.mp4
python vq_vae/vq_vae_inference.py --pictures runs/pictures.npz --count 16
"""

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.token_files import SAMPLES
from metrics import code_usage, psnr
from runtime.device import pick_device
from runtime.errors import UserError, run_script
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
from vq_vae.tokenizer import SHIPPED_TOKENIZER, load_tokenizer

COLUMNS = 4  # pictures side by side
SCALE = 2
GAP = 4  # pixels between them


class PictureError(UserError):
    """A picture file that is missing, broken, or of another size than the tokenizer's."""


def evenly(total: int, count: int) -> np.ndarray:
    """`count` (at most `total`) different positions in 0..total-1, evenly spread and away from the ends."""
    count = min(count, total)
    return ((np.arange(count) + 0.5) * total / count).astype(int)


def from_clips(
    paths: list[Path], count: int, height: int, width: int, method: str
) -> tuple[np.ndarray, list[str]]:
    """`count` frames spread over the clips, [N, height, width, 3] uint8, and a name for each."""
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


def from_file(path: Path, count: int, height: int, width: int) -> tuple[np.ndarray, list[str]]:
    """`count` pictures of a file from preprocess_vqvae.py: of `val`, or of `train` where `val` is empty."""
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
    chosen = evenly(len(pictures), count)
    return pictures[chosen], [f"{split} {i}" for i in chosen]


def sheet(originals: np.ndarray, made: np.ndarray, names: list[str], decibels: list[float]) -> np.ndarray:
    """Two [N, H, W, 3] uint8 -> one picture: rows of COLUMNS originals, each above its reconstructions."""
    columns = min(COLUMNS, len(originals))
    blank = label(np.zeros_like(enlarge(originals[0], SCALE)), "")
    gap = ((0, GAP), (0, GAP), (0, 0))
    cells: list[np.ndarray] = []
    for first in range(0, len(originals), columns):
        part = range(first, min(first + columns, len(originals)))
        fill = [blank] * (columns - len(part))
        cells += [label(enlarge(originals[i], SCALE), names[i]) for i in part] + fill
        cells += [label(enlarge(made[i], SCALE), f"reconstructed: {decibels[i]:.1f} dB") for i in part] + fill
    return grid([np.pad(cell, gap) for cell in cells], columns)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="tokenizer checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pictures", type=Path, help=".npz from preprocess_vqvae.py; its held-out pictures")
    source.add_argument("--clip", type=Path, help="a video (default: the clips in samples/)")
    parser.add_argument("--count", type=int, default=8, help="pictures to show (default 8)")
    parser.add_argument("--resize", choices=sorted(RESIZE), default="area", help="for --clip")
    parser.add_argument("--out", type=Path, default=Path("outputs/reconstructions.png"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args(arguments)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Writes the sheet and prints the PSNR. Raises UserError."""
    if args.count < 1:
        raise PictureError(f"--count {args.count}: must be at least 1")
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.vqvae_ckpt, device)
    height, width = tokenizer.config.height, tokenizer.config.width
    if args.pictures:
        originals, names = from_file(args.pictures, args.count, height, width)
    else:
        clips = [args.clip] if args.clip else sorted((SAMPLES / "video").glob("*.mp4"))
        if not clips:
            raise VideoError(f"{SAMPLES / 'video'}: holds no .mp4; give --clip or --pictures")
        originals, names = from_clips(clips, args.count, height, width, args.resize)
    made, decibels, counts = [], [], torch.zeros(tokenizer.config.codebook_size, dtype=torch.long)
    with torch.inference_mode():
        for picture in originals:
            truth = to_float(torch.from_numpy(picture[None]).to(device))
            tokens = tokenizer.encode(truth)
            decoded = tokenizer.vqvae.decode_code(tokens)
            decibels.append(psnr(decoded, truth).item())
            made.append(to_uint8(decoded)[0].numpy())
            counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
    save_image(args.out, sheet(originals, np.stack(made), names, decibels))
    used, perplexity = code_usage(counts)
    print(
        f"{len(originals)} pictures: mean PSNR {np.mean(decibels):.2f} dB "
        f"(from {min(decibels):.2f} to {max(decibels):.2f}), {used} of {len(counts)} codes used, "
        f"perplexity {perplexity:.0f}"
    )
    print(args.out)


if __name__ == "__main__":
    raise SystemExit(main())
