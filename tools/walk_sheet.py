#!/usr/bin/env python3
"""Shows a minute's mixed walk from each start place in one picture, a frame for each second.

python tools/walk_sheet.py                                   # all start places, into outputs/walk.jpg
python tools/walk_sheet.py --checkpoint runs/world/best.pt --start desert snow --seconds 20

The walk is that of evaluate.py's section walk (rollout/mixed_walk.py). Each place is a block under its name;
time runs from left to right, line by line, and begins with the last frame of the context.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rollout.arguments import RolloutConfig, add_arguments, config_of, input_files
from rollout.context import World, load_recording, load_world, prime
from rollout.mixed_walk import mixed_walk
from rollout.rollout import Rollout
from runtime.config import positive_int
from runtime.errors import UserError, run_script
from runtime.outputs import check_outputs, replacing
from runtime.video import grid, label

OUT = Path("outputs/walk.jpg")
PER_LINE = 20  # pictures
WIDTH = 96  # pixels of a picture in the sheet
QUALITY = 80  # of the jpg


@dataclass(frozen=True)
class Options:
    """The command line."""

    rollout: RolloutConfig
    seconds: int
    out: Path


def generate(world: World, config: RolloutConfig, paths: list[Path], seconds: int) -> Iterator[np.ndarray]:
    """Yields the pictures [B, Hp, Wp, 3] uint8 of the B starts: the context's last one, then one a second,
    `seconds` in all. Start n walks by the seed config.seed + n."""
    recordings = [load_recording(path, world, config.context_frames or None) for path in paths]
    context = min(len(recording.first(config.context_frames)) for recording in recordings)
    rollout = Rollout(world.model, config.sampling, config.seed, world.dtype)
    prime(rollout, [recording.first(context) for recording in recordings])
    yield rollout.pictures().numpy()
    rate = round(world.fps)
    frames = (seconds - 1) * rate
    walks = [mixed_walk(frames, config.seed + n, world.degrees_per_unit) for n in range(len(paths))]
    actions = torch.from_numpy(np.stack(walks)) if frames else torch.zeros(len(paths), 0, 5)
    for t in tqdm(range(frames), desc="generate", unit="frame"):
        rollout.step(actions[:, t])
        pictures = rollout.pictures().numpy()
        if (t + 1) % rate == 0:
            yield pictures


def sheet(names: list[str], pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures [B, Hp, Wp, 3] of each second -> one picture, a block of lines for each of the B names."""
    blocks = []
    for n, name in enumerate(names):
        height = round(WIDTH * pictures[0].shape[1] / pictures[0].shape[2])
        small = [cv2.resize(p[n], (WIDTH, height), interpolation=cv2.INTER_AREA) for p in pictures]
        columns = min(PER_LINE, len(small))
        last = len(small) - 1
        blocks.append(label(grid(small, columns), f"{name}, seconds 0 to {last}, {columns} a line"))
    return np.concatenate(blocks)


def run(options: Options) -> None:
    """Writes the sheet. Raises a UserError or an OSError for what the user can mend."""
    config, out = options.rollout, options.out
    if out.suffix not in (".jpg", ".png"):
        raise UserError(f"--out {out}: expected a name that ends in .jpg or .png; give one")
    paths = list(config.starts or config.places)
    check_outputs([out], input_files(config))
    world = load_world(
        config.checkpoint, config.vqvae_ckpt, config.device, config.precision, config.depth_ckpt
    )
    print(f"{options.seconds} s from {len(paths)} start places at once; less: --seconds 10, --start forest")
    pictures = list(generate(world, config, paths, options.seconds))
    with replacing(out) as part:
        Image.fromarray(sheet([path.stem for path in paths], pictures)).save(part, quality=QUALITY)
    print(out)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--seconds", type=positive_int, default=60, help="length (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="picture to write, .jpg or .png")
    args = parser.parse_args(arguments)
    return run_script(lambda: run(Options(config_of(args), args.seconds, args.out)))


if __name__ == "__main__":
    raise SystemExit(main())
