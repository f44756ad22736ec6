#!/usr/bin/env python3
"""Ranks places of recorded clips at which play could start, and shows them in one picture to choose from.

python tools/rank_start_places.py tokens/default                      # val clips, into outputs/places.jpg
python tools/rank_start_places.py tokens/default --checkpoint runs/world/best.pt --most 40

A candidate is a frame at which the player stands still and level: no key, turn or movement in the frames
before. From each the world is rolled out with W held, and with a turn. A place holds as long as the different
codes in the picture stay near those of the recorded frames; the place that holds longest comes first, and
where W is blocked last. tools/cut_start_places.py cuts the places that a person likes; its words are printed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import metrics
from dataset.actions import CAMERA_MOVES, MOVE_Z, YAW, horizontal_metres
from dataset.windows import TokenClips
from depth.predictor import SHIPPED_DEPTH
from rollout.arguments import CONTEXT_FRAMES, add_sampling_arguments, sampling_config_of
from rollout.context import World, load_world
from rollout.rollout import Rollout
from rollout.sampling import SamplingConfig
from rollout.world_model import SHIPPED_WORLD
from runtime.config import ScriptParser, non_negative_int, positive_float, positive_int
from runtime.errors import UserError, run_script
from runtime.outputs import check_outputs, replacing
from runtime.video import grid, label
from tools.cut_start_places import START_PLACE_FRAMES
from vq_vae.tokenizer import SHIPPED_TOKENIZER

EXAMPLE = "python tools/rank_start_places.py samples/tokens --split all --most 4  (half a minute)"
OUT = Path("outputs/places.jpg")
POSE_PITCH = 4  # column of a pose
LEVEL = 10.0  # degrees of pitch, at most
STILL_METRES = 0.01  # between two frames, at most
APART_SECONDS = 4.0  # between two candidates of a clip
HOLDS = 0.67  # different codes over those of the context, at least, averaged over half a second
TURN_DEGREES = 2.0  # a frame
FREE_METRES = 1.0  # that W moves the player, at least
BATCH = 8  # candidates that are rolled out together
WIDTH = 160  # pixels of a picture in the sheet
QUALITY = 85  # of the jpg


@dataclass(frozen=True)
class Options:
    """The command line."""

    source: Path
    split: str
    checkpoint: Path
    vqvae_ckpt: Path
    depth_ckpt: Path
    sampling: SamplingConfig
    seed: int
    device: str
    precision: str
    still: int
    seconds: float
    most: int
    out: Path


@dataclass(frozen=True)
class Place:
    """A candidate, and how it holds."""

    clip: str
    first: int  # frame of the context
    walked: float  # seconds that it holds under W
    turned: float  # ... under a turn
    metres: float  # that W moves the player, NaN for a model without a pose
    detail: float  # mean of the different codes over those of the context
    pictures: list[np.ndarray]  # [Hp, Wp, 3]: the start, under W, under a turn

    @property
    def rank(self) -> tuple[bool, float, float]:
        """To sort by, the best one first."""
        return self.metres < FREE_METRES, -min(self.walked, self.turned), -self.detail


def still_frames(actions: np.ndarray, pose: np.ndarray, still: int) -> np.ndarray:
    """Frames of a clip before which the player stands still and level for `still` frames: increasing indices.

    actions [K-1, 5], pose [K, 5], NaN where unknown: no such frame. The context before and the rest of a
    start place after must be in the clip.
    """
    moved = np.linalg.norm(np.diff(pose[:, :3], axis=0), axis=1)
    quiet = (np.abs(actions) < CAMERA_MOVES).all(1) & (moved < STILL_METRES)  # NaN is not quiet
    frames = np.arange(CONTEXT_FRAMES - 1, len(pose) - START_PLACE_FRAMES + CONTEXT_FRAMES)
    frames = frames[frames >= still]
    return np.array(
        [t for t in frames if quiet[t - still : t].all() and abs(pose[t, POSE_PITCH]) < LEVEL], int
    )


def candidates(clips: TokenClips, still: int, most: int) -> np.ndarray:
    """Windows [N, 2] of (clip, first frame of the context), N <= `most`, evenly over all that there are."""
    found, apart = [], round(APART_SECONDS * clips.manifest.fps)
    for clip, (actions, pose) in enumerate(zip(clips.actions, clips.pose, strict=True)):
        last = -apart
        for frame in still_frames(actions, pose, still):
            if frame - last >= apart:
                found.append((clip, frame - CONTEXT_FRAMES + 1))
                last = frame
    chosen = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return np.array(found, int).reshape(-1, 2)[chosen]


def held_frames(codes: np.ndarray, half_second: int) -> int:
    """Different codes [T] over those of the context -> the number of frames until the mean of half a second
    falls below HOLDS; T if it never does."""
    means = np.convolve(codes, np.ones(half_second) / half_second, "valid")
    low = np.flatnonzero(means < HOLDS)
    return int(low[0]) if len(low) else len(codes)


@torch.inference_mode()
def roll_out(
    world: World, context: tuple[Tensor, Tensor, Tensor], action: np.ndarray, frames: int, options: Options
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """One action, held, from B contexts -> different codes [B, frames] over the context's, metres walked [B],
    and the pictures [B, Hp, Wp, 3] of the start and of each third of the rollout."""
    rollout = Rollout(world.model, options.sampling, options.seed, world.dtype)
    rollout.prime(*context)
    reference = metrics.unique_codes(context[0]).float().mean(1).numpy()
    codes, pictures = [], [rollout.pictures().numpy()]
    began = world.model.pose_of(rollout.state)
    actions = torch.from_numpy(np.repeat(action[None], len(reference), 0))
    for t in range(frames):
        tokens = rollout.step(actions)
        codes.append(metrics.unique_codes(tokens).cpu().numpy() / reference)
        if (t + 1) % (frames // 3) == 0 and len(pictures) < 4:
            pictures.append(rollout.pictures().numpy())
    if began is None:
        metres = np.full(len(reference), np.nan)
    else:
        both = torch.stack([began, world.model.pose_of(rollout.state)], 1).cpu().numpy()
        metres = horizontal_metres(both)[:, 0]
    return np.stack(codes, 1), metres, pictures


def rank(clips: TokenClips, world: World, options: Options) -> list[Place]:
    """The candidates, the best one first. Raises UserError if there is none."""
    windows = candidates(clips, options.still, options.most)
    if not len(windows):
        raise UserError(
            f"{options.source}: in no clip of split {options.split} the player stands still and level for "
            f"{options.still} frames with {START_PLACE_FRAMES} frames for a start place; lower --still or "
            "give --split all"
        )
    frames = max(3, round(options.seconds * world.fps))
    walk, turn = np.zeros((2, 5), np.float32)
    walk[MOVE_Z], turn[YAW] = 1, TURN_DEGREES / world.degrees_per_unit
    places = []
    for first in tqdm(range(0, len(windows), BATCH), desc="roll out", unit="batch"):
        some = windows[first : first + BATCH]
        context = clips.batch(some, CONTEXT_FRAMES)
        codes, metres, pictures = roll_out(world, context, walk, frames, options)
        turned_codes, _, turned = roll_out(world, context, turn, frames, options)
        for n, (clip, start) in enumerate(some):
            held = [held_frames(c[n], round(world.fps / 2)) / world.fps for c in (codes, turned_codes)]
            shown = [p[n] for p in (*pictures, *turned[1:])]
            detail = float(np.mean([codes[n], turned_codes[n]]))
            name = clips.entries[clip].name
            places.append(Place(name, int(start), *held, float(metres[n]), detail, shown))
    return sorted(places, key=lambda place: place.rank)


def sheet(places: list[Place]) -> np.ndarray:
    """A row for each place under its figures: the start, three times under W, three times under a turn."""
    rows = []
    for n, place in enumerate(places):
        height = round(WIDTH * place.pictures[0].shape[0] / place.pictures[0].shape[1])
        small = [cv2.resize(p, (WIDTH, height), interpolation=cv2.INTER_AREA) for p in place.pictures]
        rows.append(label(grid(small, len(small)), f"{n + 1}  {place.clip}:{place.first}   {figures(place)}"))
    return np.concatenate(rows)


def figures(place: Place) -> str:
    """How a place holds, in words."""
    blocked = ", blocked" if place.metres < FREE_METRES else ""
    return (
        f"W {place.walked:.1f} s, {place.metres:.1f} m{blocked}; turn {place.turned:.1f} s; "
        f"detail {place.detail:.2f}"
    )


def run(options: Options) -> None:
    """Writes the sheet and prints the ranking. Raises a UserError or an OSError for what can be mended."""
    if options.out.suffix not in (".jpg", ".png"):
        raise UserError(f"--out {options.out}: expected a name that ends in .jpg or .png; give one")
    check_outputs([options.out], [options.source, options.checkpoint, options.vqvae_ckpt, options.depth_ckpt])
    world = load_world(
        options.checkpoint, options.vqvae_ckpt, options.device, options.precision, options.depth_ckpt
    )
    clips = TokenClips(options.source, options.split, world.tokenizer.fingerprint)
    places = rank(clips, world, options)
    with replacing(options.out) as part:
        Image.fromarray(sheet(places)).save(part, quality=QUALITY)
    for n, place in enumerate(places):
        print(f"{n + 1:3}  NAME={place.clip}:{place.first}  {figures(place)}")
    print(f"{options.out}\ncut: python tools/cut_start_places.py {options.source} FOLDER NAME=CLIP:FRAME ...")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE)
    add = parser.add_argument
    add("source", type=Path, help="folder of token files with a manifest")
    add("--split", choices=("val", "train", "all"), default="val", help="clips (default: %(default)s)")
    add("--checkpoint", type=Path, default=SHIPPED_WORLD, help="world model")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="its tokenizer")
    add("--depth_ckpt", type=Path, default=SHIPPED_DEPTH, help="its depth network")
    add_sampling_arguments(parser)
    add("--seed", type=non_negative_int, default=0, help="of sampling (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of autocast")
    add("--still", type=positive_int, default=6, help="frames without key or turn (default: %(default)s)")
    add("--seconds", type=positive_float, default=3.0, help="of each rollout (default: %(default)s)")
    add("--most", type=positive_int, default=32, help="candidates, at most (default: %(default)s)")
    add("--out", type=Path, default=OUT, help="sheet to write, .jpg or .png (default: %(default)s)")
    args = parser.parse_args(arguments)
    given = {name: getattr(args, name) for name in Options.__dataclass_fields__ if name != "sampling"}
    return run_script(lambda: run(Options(**given, sampling=sampling_config_of(args))))


if __name__ == "__main__":
    raise SystemExit(main())
