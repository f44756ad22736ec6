#!/usr/bin/env python3
"""Shows the depth that the network predicts for frames of clips or for photos, beside the recorded depth.

python depth/depth_inference.py                                  # frames of the clips in samples/
python depth/depth_inference.py --clips data/luanti/video/walk.mp4
python depth/depth_inference.py --photos house.jpg               # any size; the camera's pitch is unknown
python depth/depth_inference.py --warp data/luanti --held_out    # PSNR of warped frames, see warp_quality.py
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.recordings import Clip, ClipError, gamefactory_track, read_depth_file, read_gamefactory_entries
from dataset.surroundings import decode_inverse_ray_distance
from dataset.token_files import SAMPLES
from depth.depth_clips import (
    find_depth_clips,
    read_clip,
    split_clips,
)
from depth.depth_loss import depth_error
from depth.depth_pictures import depth_sheet
from depth.predictor import SHIPPED_DEPTH, DepthPredictor, load_depth
from depth.warp_quality import warp_quality
from runtime.config import positive_int, share
from runtime.device import pick_device
from runtime.errors import run_script
from runtime.outputs import check_outputs
from runtime.video import VideoError, read_frames, read_image, resize, save_image, spread, to_float
from vq_vae.tokenizer import SHIPPED_TOKENIZER, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Options:
    """The command line."""

    depth_ckpt: Path
    vqvae_ckpt: Path
    clips: list[Path]
    photos: list[Path]
    warp: str
    held_out: bool
    val_fraction: float
    count: int
    decoded: bool
    out: Path
    device: str


@dataclass(frozen=True)
class Frame:
    """A picture to predict the depth of."""

    name: str
    picture: np.ndarray  # [Hp, Wp, 3] uint8
    pitch: float  # degrees, NaN where unknown
    recorded: np.ndarray | None  # [H, W] inverse ray distance in 1/m


def frames_of_clip(video: Path, count: int, size: tuple[int, int]) -> list[Frame]:
    """`count` frames of a clip, resized to `size` (height, width), with pitch and depth where they are there.

    Raises VideoError, ClipError or DataError for broken files.
    """
    pictures = [resize(frame, *size) for frame in read_frames(video)]
    nested = video.parent.parent / "metadata" if video.parent.name == "video" else video.parent
    metadata = nested / f"{video.stem}.json"
    pitch = np.full(len(pictures), np.nan)
    if metadata.is_file():
        _, pose = gamefactory_track(read_gamefactory_entries(metadata), metadata)
        pitch[: len(pose)] = pose[: len(pitch), 4]
    recorded = read_depth_file(video, len(pictures))
    return [
        Frame(
            f"{video.stem} frame {i}",
            pictures[i],
            float(pitch[i]),
            None if recorded is None else decode_inverse_ray_distance(recorded.log_inverse[i]),
        )
        for i in spread(len(pictures), count)
    ]


def find_frames(options: Options, size: tuple[int, int]) -> list[Frame]:
    """The frames to show. Raises VideoError, ClipError or DataError."""
    if options.photos:
        return [Frame(p.name, resize(read_image(p), *size), np.nan, None) for p in options.photos]
    clips = options.clips or sorted((SAMPLES / "video").glob("*.mp4"))
    if not clips:
        raise VideoError(f"{SAMPLES / 'video'}: holds no .mp4; give --clips or --photos")
    shares = [len(part) for part in np.array_split(np.arange(options.count), len(clips))]
    frames = []
    for clip, wanted in tqdm(list(zip(clips, shares, strict=True)), desc="decode", unit="clip"):
        if wanted:
            frames += frames_of_clip(clip, wanted, size)
    return frames


def show(frames: list[Frame], predictor: DepthPredictor, tokenizer: Tokenizer | None, out: Path) -> None:
    """Writes the sheet and prints the errors. With `tokenizer` the pictures are encoded and decoded first."""
    pictures = to_float(torch.from_numpy(np.stack([frame.picture for frame in frames])))
    if tokenizer:
        pictures = torch.cat(list(tokenizer.decode_frames(tokenizer.encode_frames(pictures))))
    predicted = predictor.predict(pictures, torch.tensor([frame.pitch for frame in frames])).cpu()
    unknown = np.full(tuple(predicted.shape[1:]), np.nan, np.float32)
    recorded = torch.from_numpy(
        np.stack([unknown if frame.recorded is None else frame.recorded for frame in frames])
    )
    captions, errors = [], []
    for i, frame in enumerate(frames):
        captions.append(frame.name[-40:])
        if frame.recorded is not None:
            truth = recorded[i : i + 1].clamp(min=1 / predictor.config.farthest_m).log()
            errors.append(float(depth_error(predicted[i : i + 1].log(), truth)))
            captions[-1] = f"{frame.name[-28:]}: {errors[-1]:.3f}"
    with_truth = recorded if errors else None
    save_image(out, depth_sheet(pictures, predicted, with_truth, captions))
    if errors:
        print(
            f"{len(errors)} pictures with recorded depth: log ray distance off by {np.mean(errors):.3f} "
            f"(from {min(errors):.3f} to {max(errors):.3f}), near surfaces weighing more"
        )
    print(out)


def print_warp_quality(options: Options, predictor: DepthPredictor, tokenizer: Tokenizer) -> None:
    """Prints the table of warp_quality.py for --warp. Raises DataError, ClipError or VideoError."""
    found = find_depth_clips(options.warp, need_depth=False)
    clips: list[Clip] = split_clips(found, options.val_fraction)["val"] if options.held_out else found
    if not clips:
        raise ClipError(
            "no clip held out",
            f"--warp {options.warp}: none with --val_fraction {options.val_fraction}; leave out --held_out",
        )
    config = predictor.config
    size = config.height, config.width
    whole = (read_clip(clip, 1, size) for clip in tqdm(clips, desc="clips", unit="clip"))
    print(warp_quality(whole, config.vertical_fov_degrees, predictor, tokenizer).table())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth_ckpt", type=Path, default=SHIPPED_DEPTH, help="depth network")
    parser.add_argument("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="tokenizer checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--clips", type=Path, nargs="+", default=[], help="videos (default: those in samples/)"
    )
    source.add_argument("--photos", type=Path, nargs="+", default=[], help="pictures")
    source.add_argument(
        "--warp", default="", help="FOLDER,FOLDER of clips with poses: print the PSNR of warps"
    )
    parser.add_argument("--held_out", action="store_true", help="--warp: only held-out worlds")
    parser.add_argument("--val_fraction", type=share, default=0.1, help="--held_out: share of the worlds")
    parser.add_argument("--count", type=positive_int, default=8, help="frames to show (default 8)")
    parser.add_argument("--decoded", action="store_true", help="encode and decode the pictures first")
    parser.add_argument("--out", type=Path, default=Path("outputs/depth.png"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    options = Options(**vars(parser.parse_args(arguments)))
    return run_script(lambda: run(options))


def run(options: Options) -> None:
    """Writes the sheet, or prints the table. Raises UserError."""
    device = pick_device(options.device)
    if not options.warp:
        inputs = [options.depth_ckpt, options.vqvae_ckpt, *options.clips, *options.photos]
        check_outputs([options.out], inputs)
    predictor = load_depth(options.depth_ckpt, device)
    if options.warp:
        print_warp_quality(options, predictor, load_tokenizer(options.vqvae_ckpt, device))
        return
    frames = find_frames(options, (predictor.config.height, predictor.config.width))
    show(
        frames,
        predictor,
        load_tokenizer(options.vqvae_ckpt, device) if options.decoded else None,
        options.out,
    )


if __name__ == "__main__":
    raise SystemExit(main())
