"""Recorded clips: finding them, reading their actions and poses, choosing frames at a target rate, writing
clips.

A GF-Minecraft clip is metadata/NAME.json + video/NAME.mp4, or NAME.json beside NAME.mp4; a MineRL trajectory
is a folder with recording.mp4, metadata.json and rendered.npz. Of clips with a higher frame rate than wanted
only some frames are kept, and the actions between two kept frames are pooled into one.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from dataset import actions
from dataset.splits import WORLD
from dataset.surroundings import Surroundings, SurroundingsError, read_surroundings, write_surroundings
from dataset.token_files import DataError, Manifest
from runtime.arrays import ArraysError, read_arrays
from runtime.errors import UserError, one_line
from runtime.outputs import PART, make_folder, replacing, write_text
from runtime.video import VideoError, VideoWriter, count_frames, video_fps

GAMEFACTORY_FPS = 16.0  # used where a video's header has no frame rate
RATE_TOLERANCE = 0.02  # relative difference below which two frame rates count as equal
MISSING_FRAMES = 2  # a MineRL video that lacks more of its declared frames counts as truncated
MINERL_ARRAYS = tuple(f"action${name}" for name in ("camera", "forward", "back", "left", "right", "jump"))
MINERL_FILES = ("recording.mp4", "metadata.json", "rendered.npz")


class ClipError(UserError):
    """A clip cannot be used. `kind` is the reason in a few words, for counting; `detail` names the file."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Clip:
    """A recording on disk. `name` is unique in the data set. `key`, the name of its file or folder,
    determines the split, unless the metadata names the world (Plan.world).
    """

    name: str
    key: str
    video: Path
    metadata: Path


@dataclass(frozen=True)
class Plan:
    """The frames of a clip that become tokens, and the actions between them."""

    frames: list[int]  # indices of the K kept video frames, increasing
    actions: np.ndarray  # [K-1, 5] float32, actions[t] leads from kept frame t to t+1
    pose: np.ndarray  # [K, 5] float32: x, y, z, yaw, pitch; NaN where the source has none
    needed: int  # least number of frames that the video must have
    world: str = ""  # "world_SEED" where the metadata names it: determines the split instead of Clip.key


# ------------------------------------------------------------ finding clips


def find_clips(parent: Path, source: str, out_dir: Path) -> tuple[str, list[Clip]]:
    """All clips below `parent`, sorted by name, and their source ("gamefactory" or "minerl").

    `source` is one of these or "auto". A clip is named after its path below `parent`, without `metadata` and
    `video`, joined by "__". Incomplete clips are listed too, so that they can be reported. `out_dir` is not
    searched. Raises DataError if there is no clip, or if "auto" finds clips of both sources.
    """
    if not parent.is_dir():
        raise DataError(f"{parent}: no such folder; give the folder of the clips as --parent_dir")
    pairs: dict[str, set[tuple[Path, Path]]] = {"gamefactory": set(), "minerl": set()}  # (metadata, video)
    for path, folders, files in os.walk(parent, followlinks=True):
        folder = Path(path)
        folders[:] = [
            f for f in folders if not f.startswith(".") and (folder / f).resolve() != out_dir.resolve()
        ]
        if folder.name not in ("metadata", "video") and not set(MINERL_FILES).isdisjoint(files):
            pairs["minerl"].add((folder / "metadata.json", folder / "recording.mp4"))
            continue
        for file in map(Path, files):
            if file.name.startswith(".") or file.match("manifest*.json"):
                continue
            if file.suffix in (".json", ".mp4"):
                nested = folder.name == ("metadata" if file.suffix == ".json" else "video")
                base = (folder.parent / "metadata", folder.parent / "video") if nested else (folder, folder)
                pairs["gamefactory"].add((base[0] / f"{file.stem}.json", base[1] / f"{file.stem}.mp4"))
    if source == "auto":
        complete = [s for s, files in pairs.items() if any(m.is_file() and v.is_file() for m, v in files)]
        if len(complete) > 1:
            raise DataError(f"{parent}: has clips of both {' and '.join(complete)}; choose one with --source")
        source = complete[0] if complete else "minerl" if pairs["minerl"] else "gamefactory"
    if not pairs[source]:
        raise DataError(
            f"{parent}: has no {source} clip; expected metadata/NAME.json with video/NAME.mp4, NAME.json "
            f"beside NAME.mp4, or MineRL folders with {', '.join(MINERL_FILES)}"
        )
    clips = [_clip(parent, source, metadata, video) for metadata, video in sorted(pairs[source])]
    for name, count in Counter(clip.name for clip in clips).items():
        if count > 1:  # NAME.json and metadata/NAME.json in one folder: include the folder in the name
            clips = [replace(c, name=_path_name(parent, c.metadata)) if c.name == name else c for c in clips]
    if len({clip.name for clip in clips}) < len(clips):
        raise DataError(f"{parent}: two clips have the same name; rename one of {clips}")
    return source, sorted(clips, key=lambda clip: clip.name)


def _path_name(parent: Path, metadata: Path) -> str:
    return "__".join(metadata.relative_to(parent).with_suffix("").parts)


def _clip(parent: Path, source: str, metadata: Path, video: Path) -> Clip:
    folder = metadata.parent
    if source == "minerl":
        parts, key = folder.relative_to(parent).parts, folder.resolve().name
        return Clip("__".join(parts) or key, key, video, metadata)
    if folder.name == "metadata":
        folder = folder.parent
    return Clip(_path_name(parent, folder / metadata.name), metadata.stem, video, metadata)


# ------------------------------------------------------------ reading clips


def steps_per_frame(source_fps: float, target_fps: float) -> float:
    """Source steps from one kept frame to the next, at least 1, not necessarily an integer.

    Rates within 2 % of an integer count as that integer (29.97 is 30). Raises ClipError if the source is
    slower than the target.
    """
    if abs(round(source_fps) - source_fps) <= RATE_TOLERANCE * source_fps:
        source_fps = round(source_fps)
    steps = source_fps / target_fps
    if steps < 1 - RATE_TOLERANCE:
        raise ClipError(
            "slower than the target",
            f"recorded at {source_fps:g} FPS, --fps_target is {target_fps:g}; use {source_fps:g} or less",
        )
    return max(1.0, steps)


def kept_steps(count: int, first: int, steps: float) -> list[int]:
    """The kept steps among 0..count-1: the nearest to `first` + k * `steps` for k = 0, 1, 2, ..."""
    last = int((count - 1 - first) / steps + 1)
    candidates = [first + math.floor(k * steps + 0.5) for k in range(max(last, 0) + 1)]
    return [step for step in candidates if step < count]


def resample(
    every: np.ndarray, pose: np.ndarray, source_fps: float, settings: Manifest
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """All actions [N, 5] and poses [N+1, 5] of a clip -> K kept steps, pooled actions [K-1, 5], poses [K, 5].

    Camera turns are in units of the manifest's `camera_degrees_per_unit`. Raises ClipError if fewer than two
    frames remain or if the clip is slower than the target.
    """
    kept = kept_steps(
        len(pose),
        first=math.ceil(settings.trim_seconds * source_fps),
        steps=steps_per_frame(source_fps, settings.fps),
    )
    if len(kept) < 2:
        raise ClipError(
            "too short", f"{len(pose)} frames at {source_fps:g} FPS leave {len(kept)}, at least 2 needed"
        )
    pooled = pool_between(every, kept, settings.camera_degrees_per_unit, settings.pool_keys == "max")
    return kept, pooled, pose[kept]


def pool_between(
    every: np.ndarray, kept: list[int], degrees_per_unit: float, max_keys: bool = False
) -> np.ndarray:
    """All actions [N, 5] of a clip -> one between two consecutive of the K kept steps, float32 [K-1, 5].

    A camera action of 1 then means a turn by `degrees_per_unit` from one kept step to the next. Keys are
    pooled as in actions.pool.
    """
    steps = degrees_per_unit / actions.DEGREES_PER_UNIT
    pooled = [actions.pool(every[a:b], max_keys=max_keys, steps=steps) for a, b in pairwise(kept)]
    return np.array(pooled, np.float32).reshape(-1, actions.ACTION_DIM)


def read_json(path: Path) -> dict:
    """The object in a metadata file. Raises ClipError if the file is missing or not a JSON object."""
    if not path.is_file():
        raise ClipError("no metadata", f"{path} is missing")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ClipError(
            "broken metadata", f"{path}: not readable as JSON ({one_line(error)[:200]})"
        ) from None
    if not isinstance(content, dict):
        raise ClipError("broken metadata", f"{path}: expected an object, found {type(content).__name__}")
    return content


def read_gamefactory_entries(path: Path, content: dict | None = None) -> dict:
    """The entries of a GF-Minecraft metadata file; keys are frame numbers as text. Raises ClipError.

    `content` is the result of `read_json`, where the file has been read already.
    """
    entries = (read_json(path) if content is None else content).get("actions")
    if not isinstance(entries, dict) or not entries:
        raise ClipError("broken metadata", f"{path}: it has no actions")
    return entries


def world_key(content: dict) -> str:
    """ "world_SEED" of a metadata file that has a `world_seed`, else "".

    Clips of one world show the same terrain, so they must not be in both splits.
    """
    seed = content.get("world_seed")
    return "" if seed in (None, "") else f"{WORLD}{seed}"


def split_key(video: Path) -> str:
    """The name that determines the split of a video: the world in its metadata, else the file name.

    All MineRL videos have the same file name; for them it is the folder name.
    """
    if video.name == MINERL_FILES[0]:
        return video.parent.name
    nested = video.parent.parent / "metadata" if video.parent.name == "video" else video.parent
    try:
        return world_key(read_json(nested / f"{video.stem}.json")) or video.stem
    except ClipError:
        return video.stem


def gamefactory_actions(entries: dict, path: Path) -> np.ndarray:
    """Action vectors float32 [N, 5] of entries 1..N, up to the first missing number.

    Entry k led from frame k-1 to frame k, so row t leads from frame t to t+1. Raises ActionError, which names
    `path`, the metadata file.
    """
    vectors = []
    while isinstance(entry := entries.get(str(len(vectors) + 1)), dict):
        try:
            vectors.append(actions.from_gamefactory(entry))
        except actions.ActionError as error:
            raise actions.ActionError(f"{path}: entry {len(vectors) + 1}: {error}") from None
    return np.array(vectors, np.float32).reshape(-1, actions.ACTION_DIM)


def plan_gamefactory(clip: Clip, settings: Manifest, keep_failed: bool = False) -> Plan:
    """The plan of a GF-Minecraft clip. `keep_failed` has no effect: these clips record no success.

    Raises ClipError, or VideoError if the video cannot be opened.
    """
    content = read_json(clip.metadata)
    every, pose = gamefactory_track(read_gamefactory_entries(clip.metadata, content), clip.metadata)
    count = len(pose)
    kept, pooled, pose = resample(every, pose, video_fps(clip.video) or GAMEFACTORY_FPS, settings)
    return Plan(kept, pooled, pose, needed=count, world=world_key(content))


def gamefactory_track(entries: dict, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Entries -> action vectors [N, 5] and poses [N+1, 5] float32; action t leads from frame t to t+1.

    Missing poses are NaN. Raises ClipError, which names `path`, if an entry is missing or bad.
    """
    try:
        every = gamefactory_actions(entries, path)
    except actions.ActionError as error:
        raise ClipError("bad action", str(error)) from None
    count = len(entries) + ("0" not in entries)
    if len(every) + 1 < count:
        raise ClipError("broken metadata", f"{path}: entry {len(every) + 1} of 0..{count - 1} is missing")
    pose = np.full((count, 5), np.nan, np.float32)
    for k in range(1, count):
        pose[k] = read_pose(entries[str(k)])
    if count > 1 and isinstance(entries.get("0"), dict):
        # Entry 0 belongs to no frame, but some recorders write frame 0's pose there. It is used only if entry
        # 1's turn leads from it to entry 1's pose.
        start = read_pose(entries["0"])
        turned = start[3:] + actions.camera_degrees(every[0]) - pose[1, 3:]
        if (abs(actions.wrap(turned)) < 0.05).all():
            pose[0] = start
    return every, pose


def read_pose(entry: dict) -> np.ndarray:
    """[x, y, z, yaw, pitch] float32 of a GF-Minecraft entry; NaN if it has no pose."""
    try:
        return np.array([*entry["pos"], entry["yaw"], entry["pitch"]], np.float32).reshape(5)
    except (KeyError, TypeError, ValueError, OverflowError):
        return np.full(5, np.nan, np.float32)


def plan_minerl(clip: Clip, settings: Manifest, keep_failed: bool = False) -> Plan:
    """The plan of a MineRL trajectory (data v3 and v4). Raises ClipError or VideoError.

    It has N actions and N+1 observations. The video may start earlier, so it is aligned at its end. A
    trajectory without success is used only with `keep_failed`.
    """
    metadata = read_json(clip.metadata)
    # v3 writes "True" as a string, v4 a bool
    if not keep_failed and str(metadata.get("success", True)).lower() != "true":
        raise ClipError("not successful", f"{clip.metadata}: success is false; --keep_failed uses it")
    every = read_minerl_actions(clip.metadata.with_name("rendered.npz"))
    source_fps = minerl_fps(clip.metadata, metadata)
    try:
        declared = int(metadata.get("true_video_frame_count", 0))
    except (TypeError, ValueError, OverflowError):
        raise ClipError(
            "broken metadata", f"{clip.metadata}: true_video_frame_count is not a number"
        ) from None
    decoded = count_frames(clip.video)
    if decoded < declared - MISSING_FRAMES:
        raise ClipError("truncated video", f"{clip.video}: {decoded} of {declared} frames can be decoded")
    observations = len(every) + 1
    skip = max(0, declared - observations)
    frame_of_step = skip + np.rint(np.linspace(0, decoded - skip - 1, observations)).astype(int)
    pose = np.full((observations, 5), np.nan, np.float32)
    kept, pooled, pose = resample(every, pose, source_fps, settings)
    frames = frame_of_step[kept]
    if frames[0] < 0 or (np.diff(frames) < 1).any():
        raise ClipError(
            "fewer frames than actions",
            f"{clip.video}: {decoded} frames, {skip} before the start, for {observations} observations",
        )
    return Plan(frames.tolist(), pooled, pose, needed=int(frames[-1]) + 1)


def minerl_fps(path: Path, metadata: dict) -> float:
    """Steps per second of a trajectory, from its own durations: not always 20. Raises ClipError."""
    try:
        source_fps = float(metadata["duration_steps"]) * 1000.0 / float(metadata["duration_ms"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ClipError(
            "broken metadata", f"{path}: expected duration_steps and duration_ms, numbers above 0 ({error!r})"
        ) from None
    if not 0 < source_fps < 1000:
        raise ClipError("broken metadata", f"{path}: its durations give {source_fps:g} steps per second")
    return source_fps


def read_minerl_actions(path: Path) -> np.ndarray:
    """Reads `rendered.npz` -> action vectors of all steps, float32 [N, 5]. Raises ClipError."""
    try:
        return actions.from_minerl(read_arrays(path, (), MINERL_ARRAYS))
    except FileNotFoundError:
        raise ClipError("no actions", f"{path} is missing") from None
    except actions.ActionError as error:
        raise ClipError("bad action", f"{path}: {error}") from None
    except (ArraysError, OSError) as error:
        raise ClipError("broken actions", one_line(error)) from None


PLANS = {"gamefactory": plan_gamefactory, "minerl": plan_minerl}


def camera_unit(clips: list[Clip], settings: Manifest) -> float:
    """Degrees of a camera action of 1: 15 for each source step from one kept frame to the next.

    Computed from the first clip whose frame rate can be read. Clips of other rates are converted to this
    unit, so a data set never mixes units.
    """
    for clip in clips:
        try:
            if settings.source == "minerl":
                source_fps = minerl_fps(clip.metadata, read_json(clip.metadata))
            else:
                source_fps = video_fps(clip.video) or GAMEFACTORY_FPS
            return actions.DEGREES_PER_UNIT * steps_per_frame(source_fps, settings.fps)
        except (ClipError, VideoError):
            continue  # reported when the clip is encoded
    return actions.DEGREES_PER_UNIT


# ------------------------------------------------------------ writing clips


class ClipWriter:
    """Writes a clip in GF-Minecraft's layout, complete or not at all: metadata/NAME.json and
    video/NAME.mp4, and depth/NAME.npz if there is depth (surroundings.py).

    Use it as a context manager: `write` every frame, then `finish`. All files are written under temporary
    names and then renamed, the metadata last. `options` are those of the video encoder (VideoWriter). Raises
    OutputError where a file cannot be written.
    """

    def __init__(self, out: Path, name: str, fps: float, **options: str):
        self.metadata, self.video = clip_paths(out, name)
        self.depth = depth_path(self.video)
        make_folder(self.metadata.parent)
        self.writer = VideoWriter(self.video, fps, **options)

    @property
    def frames(self) -> int:
        """Number of frames written."""
        return self.writer.frames

    def write(self, frame: np.ndarray) -> None:
        """Adds a frame, [H, W, 3] uint8 RGB."""
        self.writer.write(frame)

    def finish(self, content: dict, surroundings: Surroundings | None = None) -> None:
        """Writes the metadata `content`, whose `actions` entry k led to frame k, and completes the clip."""
        self.writer.close()
        try:
            if surroundings is not None:
                with replacing(self.depth) as part:
                    write_surroundings(part, surroundings)
            write_text(self.metadata, json.dumps(content, separators=(",", ":")))
        except BaseException:
            if not self.metadata.is_file():  # half a clip is none
                self.video.unlink(missing_ok=True)
                self.depth.unlink(missing_ok=True)
            raise

    def discard(self) -> None:
        """Drops a clip that is not finished."""
        self.writer.discard()

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def clip_paths(out: Path, name: str) -> tuple[Path, Path]:
    """Paths of metadata and video of a clip that ClipWriter writes to `out`."""
    return out / "metadata" / f"{name}.json", out / "video" / f"{name}.mp4"


def depth_path(video: Path) -> Path:
    """Path of the depth file of a clip with this video, which need not exist: depth/NAME.npz."""
    folder = video.parent.parent if video.parent.name == "video" else video.parent
    return folder / "depth" / f"{video.stem}.npz"


def has_depth(clip: Clip) -> bool:
    """Whether the clip was recorded with depth."""
    return depth_path(clip.video).is_file()


def read_depth_file(video: Path, frames: int | None = None) -> Surroundings | None:
    """Reads the depth file of the clip with this video; None if there is none.

    Raises ClipError if it is broken, or if `frames` is given and it has another number of frames.
    """
    path = depth_path(video)
    if not path.is_file():
        return None
    try:
        return read_surroundings(path, frames)
    except SurroundingsError as error:
        raise ClipError("broken depth", str(error)) from None


def is_complete(out: Path, name: str) -> bool:
    """Whether ClipWriter has completed this clip."""
    return all(path.is_file() for path in clip_paths(out, name))


def remove_unfinished(out: Path) -> None:
    """Removes the unfinished files in `out` of recorders that were killed."""
    for pattern in (f"video/.*{PART}.mp4", f"depth/.*{PART}.npz", f"metadata/.*{PART}.json"):
        for part in out.glob(pattern):
            part.unlink()
