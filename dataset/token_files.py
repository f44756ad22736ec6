"""Token files, the manifest that names them, and batches of windows drawn from them.

A token file is an .npz with `tokens` [K, H, W] uint16, `actions` [K-1, 5] float32 and `pose` [K, 5] float32
([x, y, z, yaw, pitch], metres and degrees; NaN where the source has none). `actions[t]` leads from frame t to
frame t+1. Optional: `depth` [K, 2H, 2W] uint8, inverse ray distances in the code whose scale the manifest
states (`depth_scale`), and the nodes around the player, `nodes` [K, 7, 7, 7] uint8 and `origin` [K, 3] int32;
surroundings.py describes them. `manifest.json` lies beside the token files and says what a reader needs to
refuse a mismatch.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dataset.actions import ACTION_DIM, ACTION_NAMES, DEGREES_PER_UNIT, PITCH, YAW
from dataset.surroundings import BOX
from runtime.errors import UserError

MANIFEST = "manifest.json"
SAMPLES = Path(__file__).resolve().parents[1] / "samples"  # clips that come with the repo
SAMPLE_TOKENS = SAMPLES / "tokens"  # the same, encoded by the tokenizer that ships
FORMAT = 1
EXTRAS = ("depth", "nodes", "origin")  # arrays that a token file may have


class DataError(UserError):
    """A manifest or token file that is missing, broken, or does not fit the others."""


@dataclass
class ClipEntry:
    """One token file in the manifest."""

    name: str
    file: str  # relative to the manifest
    frames: int
    split: str  # "train" or "val"
    video: str  # relative to the manifest, so that evaluation can open the true pictures
    kept: list[int]  # [first, last, step] of the kept video frames, or every index where they are not regular


@dataclass
class Manifest:
    """What `manifest.json` holds. Sizes are [rows, columns]."""

    fps: float
    picture_size: list[int]
    latent_size: list[int]
    codebook_size: int
    tokenizer: str
    vertical_fov_degrees: float
    camera_degrees_per_unit: float = DEGREES_PER_UNIT  # turn between two kept frames when the action is 1
    resize: str = "area"
    source: str = "gamefactory"
    pool_keys: str = "mean"  # keys between two kept frames: "mean" or "max"
    trim_seconds: float = 0.0  # left out at the start of each clip
    precision: str = "fp32"  # of the tokenizer while it encoded
    val_fraction: float = 0.1
    depth_scale: dict | None = None  # surroundings.SCALE where some token files have depth
    action_names: list[str] = field(default_factory=lambda: list(ACTION_NAMES))
    format: int = FORMAT
    clips: list[ClipEntry] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)  # [{"name": ..., "reason": ...}]

    def save(self, directory: str | Path, name: str = MANIFEST) -> None:
        """Writes `manifest.json` atomically, clips in the order of their names."""
        self.clips.sort(key=lambda clip: clip.name)
        path = Path(directory) / name
        # Several shards may join their manifests at once, on several machines: each needs its own temporary.
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, directory: str | Path, name: str = MANIFEST) -> "Manifest":
        """Reads the manifest in `directory`. Raises DataError if it is missing, broken or outdated."""
        path = Path(directory) / name
        if not path.is_file():
            raise DataError(
                f"{path}: no manifest; run python preprocess.py --parent_dir CLIPS --out_dir {directory}"
            )
        try:
            content = json.loads(path.read_text())
            if content.get("format") != FORMAT:
                raise DataError(
                    f"{path}: format {content.get('format')}, expected {FORMAT}; preprocess again"
                )
            content["clips"] = [ClipEntry(**clip) for clip in content["clips"]]
            manifest = cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest ({error}); preprocess again") from None
        if manifest.action_names != list(ACTION_NAMES):
            raise DataError(
                f"{path}: actions are {manifest.action_names}, not {list(ACTION_NAMES)}; preprocess again"
            )
        return manifest


def split_of(name: str, val_fraction: float) -> str:
    """The split of a whole clip, "train" or "val", by a hash of its name: the same on every machine."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if position < val_fraction else "train"


def pack_indices(indices: list[int]) -> list[int]:
    """Frame numbers -> [first, last, step] where they are regular (at least 3 of them), else as they are."""
    steps = set(np.diff(indices).tolist())
    if len(indices) > 3 and len(steps) == 1:
        return [int(indices[0]), int(indices[-1]), int(steps.pop())]
    return [int(i) for i in indices]


def unpack_indices(kept: list[int], frames: int) -> list[int]:
    """The inverse of `pack_indices`; `frames` is the number of kept frames."""
    if len(kept) == 3 and frames != 3:
        return list(range(kept[0], kept[1] + 1, kept[2]))
    return list(kept)


def read_token_file(path: str | Path, extras: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Reads one token file, and those of its optional arrays (EXTRAS) that are in `extras` and in the file.

    Raises DataError if it is missing, broken, or its lengths, shapes or types do not agree.
    """
    path = Path(path)
    try:
        with np.load(path) as arrays:
            names = ["tokens", "actions", "pose", *(name for name in extras if name in arrays)]
            content = {name: arrays[name] for name in names}
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such token file; run preprocess.py again, it makes what is missing"
        ) from None
    except Exception as error:  # a damaged zip can fail in any way
        raise DataError(
            f"{path}: not a token file ({error}); delete it and run preprocess.py again"
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
    _, height, width = shapes["tokens"]
    expected = {
        "depth": ("uint8", (frames, 2 * height, 2 * width)),
        "nodes": ("uint8", (frames, *BOX)),
        "origin": ("int32", (frames, 3)),
    }
    for name in EXTRAS:
        if name in content and (found := (content[name].dtype.name, shapes[name])) != expected[name]:
            kind, shape = expected[name]
            raise DataError(
                f"{path}: expected {name} {kind} {list(shape)}, found {found[0]} {list(found[1])}; delete it "
                "and run preprocess.py again"
            )
    return content


def with_first_pose(pose: np.ndarray, actions: np.ndarray, degrees_per_unit: float) -> np.ndarray:
    """pose [K, 5] with the first frame's, where only that one is unknown (GF-Minecraft counts from frame 1):
    turned back from the second's by the action between them, and in its place."""
    if len(pose) < 2 or np.isfinite(pose[0]).all() or not np.isfinite(pose[1]).all():
        return pose
    first = pose[1].copy()
    first[3:] -= actions[0, [YAW, PITCH]] * degrees_per_unit
    return np.concatenate([first[None], pose[1:]])


def write_token_file(
    path: str | Path, tokens: np.ndarray, actions: np.ndarray, pose: np.ndarray, **extras: np.ndarray
) -> None:
    """Writes one token file atomically, so that a half-written file never counts. `extras`: see EXTRAS."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            tokens=tokens.astype(np.uint16),
            actions=actions.astype(np.float32),
            pose=pose.astype(np.float32),
            **extras,
        )
    os.replace(temporary, path)
