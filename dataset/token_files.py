"""Token files and the manifest that lists them.

A token file is an .npz with `tokens` [K, H, W] uint16, `actions` [K-1, 5] float32 and `pose` [K, 5] float32
([x, y, z, yaw, pitch], metres and degrees; NaN where the source has none). `actions[t]` leads from frame t
to frame t+1. Optional arrays, described in surroundings.py: `depth` [K, 2H, 2W] uint8, inverse ray
distances in a code whose scale is in the manifest (`depth_scale`), and the nodes around the player, `nodes`
[K, 7, 7, 7] uint8 and `origin` [K, 3] int32. Where the depth was predicted from the pictures,
`depth_network` is the fingerprint of the network; without it depth is recorded. `manifest.json`, in the same
folder, records the settings that the files were made with, so that readers can refuse files that do not
fit.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path

import numpy as np

from dataset.actions import ACTION_DIM, ACTION_NAMES, DEGREES_PER_UNIT, PITCH, YAW
from dataset.surroundings import BOX
from runtime.arrays import ArraysError, read_arrays
from runtime.errors import UserError, one_line
from runtime.outputs import replacing, write_text

MANIFEST = "manifest.json"
SAMPLES = Path(__file__).resolve().parents[1] / "samples"  # clips in the repository
SAMPLE_TOKENS = SAMPLES / "tokens"  # the same clips, encoded by the shipped tokenizer
FORMAT = 1
EXTRAS = ("depth", "nodes", "origin")  # optional arrays of a token file
DEPTH_NETWORK = "depth_network"  # name of the array that marks predicted depth
# Limits of an array in a token file whose number of frames is known: 128x72 codes of 8 bytes in a frame.
HEADER_BYTES, FRAME_BYTES = 4096, 128 * 72 * 8
MOST_METRES = 1e8  # of a pose
RECORDED, PREDICTED = "recorded", "predicted"  # where the depth of a token file comes from


class DataError(UserError):
    """A manifest, token file or folder of clips is missing, broken, or does not fit the others."""


def _sizes(size: list[int]) -> bool:
    """Whether a value is [rows, columns]."""
    return len(size) == 2 and all(type(n) is int and 0 < n <= 4096 for n in size)


def _count(kept: list[int]) -> int:
    """The number of frames of a packed range [first, last, step]."""
    return len(range(kept[0], kept[1] + 1, kept[2]))


@dataclass
class ClipEntry:
    """One token file in the manifest."""

    name: str
    file: str  # relative to the manifest
    frames: int
    split: str  # "train" or "val"
    video: str  # relative to the manifest; evaluation reads the recorded pictures from it
    kept: list[
        int
    ]  # kept video frames: [first, last, step], or all indices if the step varies (pack_indices)
    depth: str = ""  # where its depth comes from: RECORDED, PREDICTED, or "" without depth
    group: str = ""  # decides the split, see splits.py; "" in older manifests, whose splits stay
    cut: list[int] = field(default_factory=list)  # of the only clip, see splits.cut_of; split is then "train"

    def part(self, split: str) -> tuple["ClipEntry", slice] | None:
        """This clip's part in `split` ("train", "val" or "all") and its frames; None if it has none."""
        frames = slice(0, self.frames)
        if self.cut and split != "all":
            frames = slice(0, self.cut[0]) if split == "train" else slice(self.cut[1], self.frames)
        elif split not in ("all", self.split):
            return None
        if frames == slice(0, self.frames):
            return self, frames
        kept = pack_indices(unpack_indices(self.kept, self.frames)[frames])
        count = frames.stop - frames.start
        return replace(self, split=split, frames=count, kept=kept, cut=[]), frames

    def problem(self) -> str:
        """What cannot be right in an entry that was read from a file; "" if nothing. May raise TypeError."""
        path, kept = Path(self.file), self.kept
        right = (
            all(isinstance(text, str) and "\0" not in text for text in (self.name, self.file, self.video))
            and not path.is_absolute()
            and ".." not in path.parts
            and type(self.frames) is int
            and 0 < self.frames < 10**8
            and self.split in ("train", "val")
            and all(type(number) is int and 0 <= number < 10**9 for number in kept)
            and (len(kept) == self.frames or (len(kept) == 3 and kept[2] > 0 and _count(kept) == self.frames))
            and self.depth in ("", RECORDED, PREDICTED)
            and isinstance(self.group, str)
            and (self.cut == [] or self._right_cut())
        )
        return "" if right else f"the entry of clip {str(self.name)[:60]} cannot be right"

    def _right_cut(self) -> bool:
        """Whether `cut` leaves frames for both splits."""
        first, second = self.cut
        return type(first) is type(second) is int and 0 < first <= second < self.frames


class HeldOut(str, Enum):
    """What is held out. The value stands in the manifest."""

    WORLDS = "worlds"
    CLIPS = "clips"  # of worlds that are trained on, or that nothing names
    END = "end"  # of the only clip
    NOTHING = ""


@dataclass
class Manifest:
    """The content of `manifest.json`. Sizes are [rows, columns]."""

    fps: float
    picture_size: list[int]
    latent_size: list[int]
    codebook_size: int
    tokenizer: str
    vertical_fov_degrees: float
    camera_degrees_per_unit: float = DEGREES_PER_UNIT  # turn between two kept frames for an action of 1
    resize: str = "area"
    source: str = "gamefactory"
    pool_keys: str = "mean"  # keys between two kept frames: "mean" or "max"
    trim_seconds: float = 0.0  # skipped at the start of each clip
    precision: str = "fp32"  # of the tokenizer during encoding
    val_fraction: float = 0.1
    held_out: str = HeldOut.WORLDS.value
    depth_scale: dict | None = None  # surroundings.SCALE if some token files have depth
    depth_network: str = ""  # fingerprint of the depth network if some token files have predicted depth
    action_names: list[str] = field(default_factory=lambda: list(ACTION_NAMES))
    format: int = FORMAT
    clips: list[ClipEntry] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)  # [{"name": ..., "reason": ...}]

    def save(self, directory: str | Path, name: str = MANIFEST) -> None:
        """Writes the manifest atomically, clips sorted by name."""
        self.clips.sort(key=lambda clip: clip.name)
        write_text(Path(directory) / name, json.dumps(asdict(self), indent=1) + "\n")

    def problem(self) -> str:
        """What cannot be right in a manifest that was read from a file; "" if nothing.

        May raise TypeError or ValueError for values of other types.
        """
        checks = {
            "action_names": self.action_names == list(ACTION_NAMES),
            "fps": 0 < float(self.fps) < 1000,
            "picture_size": _sizes(self.picture_size),
            "latent_size": _sizes(self.latent_size),
            "codebook_size": type(self.codebook_size) is int and 2 <= self.codebook_size <= 2**16,
            "tokenizer": isinstance(self.tokenizer, str),
            "vertical_fov_degrees": 0 < float(self.vertical_fov_degrees) < 180,
            "camera_degrees_per_unit": 0 < float(self.camera_degrees_per_unit) < 1e4,
            "val_fraction": 0 <= float(self.val_fraction) <= 1,
            "held_out": self.held_out in {what.value for what in HeldOut},
            "depth_scale": self.depth_scale is None or isinstance(self.depth_scale, dict),
            "depth_network": isinstance(self.depth_network, str),
            "skipped": all(isinstance(skipped["name"], str) for skipped in self.skipped),
        }
        wrong = [f"{name} is {str(getattr(self, name))[:60]}" for name, right in checks.items() if not right]
        wrong += filter(None, (clip.problem() for clip in self.clips))
        repeated = len({clip.name for clip in self.clips}) < len(self.clips)
        return wrong[0] if wrong else "two clips have one name" if repeated else ""

    @classmethod
    def load(cls, directory: str | Path, name: str = MANIFEST) -> "Manifest":
        """Reads the manifest in `directory`. Raises DataError if it is missing, broken or outdated."""
        path = Path(directory) / name
        if not path.is_file():
            raise DataError(
                f"{path}: no manifest; run python preprocess.py --parent_dir CLIPS --out_dir {directory} (a "
                "minute with CLIPS = samples; make train does that and trains, in ten minutes)"
            )
        try:
            content = json.loads(path.read_text())
            if content.get("format") != FORMAT:
                raise DataError(
                    f"{path}: format {content.get('format')}, expected {FORMAT}; preprocess again"
                )
            content["clips"] = [ClipEntry(**clip) for clip in content["clips"]]
            manifest = cls(**content)
            problem = manifest.problem()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise DataError(f"{path}: not a manifest ({one_line(error)[:200]}); preprocess again") from None
        if problem:
            raise DataError(f"{path}: {problem}; preprocess again")
        return manifest


def split_position(name: str) -> float:
    """A hash of a name in 0..1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split_of(name: str, val_fraction: float) -> str:
    """The split, "train" or "val", of the clips of a group (splits.py), by a hash of its name."""
    return "val" if split_position(name) < val_fraction else "train"


def pack_indices(indices: list[int]) -> list[int]:
    """Frame indices -> [first, last, step] if there are more than 3 and their step is constant, else
    unchanged.
    """
    steps = set(np.diff(indices).tolist())
    if len(indices) > 3 and len(steps) == 1:
        return [int(indices[0]), int(indices[-1]), int(steps.pop())]
    return [int(i) for i in indices]


def unpack_indices(kept: list[int], frames: int) -> list[int]:
    """The inverse of `pack_indices`; `frames` is the number of frame indices."""
    if len(kept) == 3 and frames != 3:
        return list(range(kept[0], kept[1] + 1, kept[2]))
    return list(kept)


def read_token_file(
    path: str | Path, extras: Collection[str] = (), codes: int = 2**16, frames: int | None = None
) -> dict[str, np.ndarray]:
    """Reads one token file, with the optional arrays (EXTRAS) that are both in `extras` and in the file.

    `codes` is the size of the codebook, `frames` the number of frames, where they are known. Raises DataError
    if the file is missing or broken, if lengths, shapes or types do not agree, or if a code, an action or a
    pose cannot be right.
    """
    path = Path(path)
    limit = {} if frames is None else {"most_bytes": HEADER_BYTES + max(0, frames) * FRAME_BYTES}
    try:
        content = read_arrays(path, ("tokens", "actions", "pose"), extras, **limit)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such token file; run preprocess.py again, it encodes missing clips"
        ) from None
    except ArraysError as error:
        raise DataError(
            f"{path}: not a token file ({error.reason}); delete it and run preprocess.py again"
        ) from None
    frames = content["tokens"].shape[0] if content["tokens"].ndim else 0
    shapes = {name: array.shape for name, array in content.items()}
    if (
        content["tokens"].ndim != 3
        or shapes["actions"] != (frames - 1, ACTION_DIM)
        or shapes["pose"] != (frames, 5)
    ):
        raise DataError(
            f"{path}: expected tokens [K, H, W], actions [K-1, {ACTION_DIM}], pose [K, 5], found {shapes}; "
            "delete it and run preprocess.py again"
        )
    if problem := _wrong_values(content, codes):
        raise DataError(f"{path}: {problem}; delete it and run preprocess.py again")
    _, height, width = shapes["tokens"]
    expected = {
        "depth": ("uint8", (frames, 2 * height, 2 * width)),
        "nodes": ("uint8", (frames, *BOX)),
        "origin": ("int32", (frames, 3)),
    }
    for name in EXTRAS:
        if name in content and (found := (content[name].dtype.name, shapes[name])) != expected[name]:
            dtype, shape = expected[name]
            raise DataError(
                f"{path}: expected {name} {dtype} {list(shape)}, found {found[0]} {list(found[1])}; delete "
                "it and run preprocess.py again"
            )
    return content


def _wrong_values(content: dict[str, np.ndarray], codes: int) -> str:
    """What cannot be right in the values of a token file; "" if nothing."""
    tokens, actions, pose = content["tokens"], content["actions"], content["pose"]
    kinds = [array.dtype.kind for array in (tokens, actions, pose)]
    if kinds[0] not in "ui" or kinds[1:] != ["f", "f"]:
        return f"expected whole numbers as tokens and floats as actions and pose, found {kinds}"
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < codes):
        return f"tokens from {tokens.min()} to {tokens.max()}, expected 0 to {codes - 1}"
    if actions.size and not np.abs(actions).max() <= 1 + 1e-3:  # false for NaN
        return "an action is not a number in -1..1"
    if pose.size and np.fmax.reduce(np.abs(pose), axis=None, initial=0) > MOST_METRES:
        return f"a pose is beyond {MOST_METRES:g}"
    return ""


def depth_source(path: str | Path) -> str:
    """Where the depth of a readable token file comes from: RECORDED, PREDICTED, or "" without depth."""
    with np.load(path) as arrays:
        if "depth" not in arrays:
            return ""
        return PREDICTED if DEPTH_NETWORK in arrays else RECORDED


def with_first_pose(pose: np.ndarray, actions: np.ndarray, degrees_per_unit: float) -> np.ndarray:
    """Fills in the first of the poses [K, 5] if only that one is unknown (GF-Minecraft's begin at frame 1).

    Yaw and pitch are those of the second frame minus the action between the two; the position is copied.
    """
    if len(pose) < 2 or np.isfinite(pose[0]).all() or not np.isfinite(pose[1]).all():
        return pose
    first = pose[1].copy()
    first[3:] -= actions[0, [YAW, PITCH]] * degrees_per_unit
    return np.concatenate([first[None], pose[1:]])


def write_token_file(
    path: str | Path, tokens: np.ndarray, actions: np.ndarray, pose: np.ndarray, **extras: np.ndarray
) -> None:
    """Writes one token file, complete or not at all. `extras`: see EXTRAS and DEPTH_NETWORK."""
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            tokens=tokens.astype(np.uint16),
            actions=actions.astype(np.float32),
            pose=pose.astype(np.float32),
            **extras,
        )
