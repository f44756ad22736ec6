#!/usr/bin/env python3
"""Recorded clips -> token files and one manifest.json, ready for train.py.

    python preprocess.py --parent_dir CLIPS --out_dir tokens/NAME

CLIPS is searched at any depth for GF-Minecraft clips (metadata/NAME.json + video/NAME.mp4, or NAME.json
beside NAME.mp4) or for MineRL trajectories (folders with recording.mp4, metadata.json and rendered.npz).

Run it again to continue: finished token files are kept, half-written ones never count. A clip that cannot be
used is skipped; the reason is printed and kept in the manifest. Clips of a faster rate are thinned out to
--fps_target and the actions between two kept frames are pooled; a clip that is slower is skipped, since
frames are never invented.

Several machines: give each the same CLIPS and its own --shard 1/N ... N/N. With one shared --out_dir each
writes manifest-shard-I-of-N.json and, at its end, joins all manifests there into manifest.json. With separate
folders, copy the .npz and manifest-shard files into one and run once more on CLIPS without --shard: that
encodes only what is missing.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

import actions
from checkpoint import SHIPPED_TOKENIZER, CheckpointError, load_tokenizer
from data import (
    MANIFEST,
    ClipEntry,
    DataError,
    Manifest,
    pack_indices,
    read_token_file,
    split_of,
    write_token_file,
)
from device import amp_dtype, autocast, pick_device
from video import RESIZE, ShortVideoError, VideoError, count_frames, read_frames, resize, video_fps
from vq_vae.vq_vae import VQVAE

GAMEFACTORY_FPS = 16.0  # where a video's header does not say
RATE_TOLERANCE = 0.02  # rates closer than this count as the same
MISSING_FRAMES = 2  # a MineRL video may lack so many of its declared frames before it counts as truncated
SAVE_EVERY = 5.0  # seconds between two saves of the manifest
MINERL_FILES = ("recording.mp4", "metadata.json", "rendered.npz")
# What must agree between a run and the manifests that are already in its folder.
SETTINGS = (
    "fps",
    "picture_size",
    "latent_size",
    "codebook_size",
    "tokenizer",
    "vertical_fov_degrees",
    "resize",
    "source",
    "pool_keys",
    "trim_seconds",
    "precision",
    "val_fraction",
)


class ClipError(RuntimeError):
    """Why a clip cannot be used: `kind` in a few words, for counting, and the details."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


@dataclass(frozen=True)
class Clip:
    """A recording on disk. `name` is unique in the data set, `key` (its own name) decides the split."""

    name: str
    key: str
    video: Path
    metadata: Path


@dataclass(frozen=True)
class Plan:
    """Which frames of a clip become tokens, and what lies between them."""

    frames: list[int]  # numbers of the K kept video frames, rising
    actions: np.ndarray  # [K-1, 5] float32, actions[t] leads from kept frame t to t+1
    pose: np.ndarray  # [K, 5] float32: x, y, z, yaw, pitch; NaN where the source has none
    needed: int  # the video must have at least so many frames


@dataclass(frozen=True)
class Job:
    """What every clip of a run shares; sent once to each worker."""

    out_dir: Path
    checkpoint: Path
    device: str
    batch: int
    keep_failed: bool
    resume: bool  # token files that no manifest lists may be trusted
    settings: Manifest


@dataclass
class Outcome:
    """What became of one clip."""

    name: str
    entry: ClipEntry | None = None  # None: skipped
    encoded: bool = False  # False with an entry: it was done already
    kind: str = ""
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # decode, encode, write


# ------------------------------------------------------------ finding clips


def find_clips(parent: Path, source: str, out_dir: Path) -> tuple[str, list[Clip]]:
    """All clips below `parent`, sorted by name, and their source ("gamefactory" or "minerl").

    A clip is named after its path below `parent`, without `metadata` and `video`, joined by "__". Incomplete
    clips are listed too, to be reported. Raises DataError if there is none, or both kinds under "auto".
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
        whole = [s for s, found in pairs.items() if any(m.is_file() and v.is_file() for m, v in found)]
        if len(whole) > 1:
            raise DataError(f"{parent}: holds clips of both {' and '.join(whole)}; choose one with --source")
        source = whole[0] if whole else "minerl" if pairs["minerl"] else "gamefactory"
    if not pairs[source]:
        raise DataError(
            f"{parent}: no {source} clip in it; expected metadata/NAME.json with video/NAME.mp4, NAME.json "
            f"beside NAME.mp4, or MineRL folders with {', '.join(MINERL_FILES)}"
        )
    clips = [_clip(parent, source, metadata, video) for metadata, video in sorted(pairs[source])]
    for name, count in Counter(clip.name for clip in clips).items():
        if count > 1:  # NAME.json and metadata/NAME.json in one folder: tell them apart by the folder
            clips = [replace(c, name=_path_name(parent, c.metadata)) if c.name == name else c for c in clips]
    if len({clip.name for clip in clips}) < len(clips):
        raise DataError(f"{parent}: two clips would get the same name; rename one of {clips}")
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
    """Source steps from one kept frame to the next, at least 1; need not be whole.

    Rates within 2 % of a whole number count as that number (29.97 is 30). Raises ClipError if the source is
    slower.
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
    """The steps among 0..count-1 that are kept: `first`, then the nearest to every `steps`-th after it."""
    last = int((count - 1 - first) / steps + 1)
    chosen = [first + math.floor(k * steps + 0.5) for k in range(max(last, 0) + 1)]
    return [step for step in chosen if step < count]


def thin_out(
    every: np.ndarray, pose: np.ndarray, source_fps: float, settings: Manifest
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """All actions [N, 5] and poses [N+1, 5] of a clip -> K kept steps, pooled actions [K-1, 5], poses [K, 5].

    Camera turns come in units of the manifest's `camera_degrees_per_unit`. Raises ClipError if fewer than two
    frames are left or if the clip is slower than the target.
    """
    stride = steps_per_frame(source_fps, settings.fps)
    first = math.ceil(settings.trim_seconds * source_fps)
    kept = kept_steps(len(pose), first, stride)
    if len(kept) < 2:
        raise ClipError(
            "too short", f"{len(pose)} frames at {source_fps:g} FPS leave {len(kept)}, at least 2 needed"
        )
    unit = settings.camera_degrees_per_unit / actions.DEGREES_PER_UNIT
    most = settings.pool_keys == "max"
    pooled = np.stack([actions.pool(every[a:b], max_keys=most, steps=unit) for a, b in pairwise(kept)])
    return kept, pooled, pose[kept]


def read_json(path: Path) -> dict:
    """The object in a metadata file. Raises ClipError if it is missing, empty, broken or something else."""
    if not path.is_file():
        raise ClipError("no metadata", f"{path} is missing")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ClipError("broken metadata", f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ClipError("broken metadata", f"{path}: expected an object, found {type(content).__name__}")
    return content


def plan_gamefactory(clip: Clip, settings: Manifest, keep_failed: bool = False) -> Plan:
    """The plan of a GF-Minecraft clip. Raises ClipError, or VideoError if the video cannot be opened."""
    entries = read_json(clip.metadata).get("actions")
    if not isinstance(entries, dict) or not entries:
        raise ClipError("broken metadata", f"{clip.metadata}: no actions in it")
    count = len(entries) + ("0" not in entries)
    every = np.empty((count - 1, actions.ACTION_DIM), np.float32)
    pose = np.full((count, 5), np.nan, np.float32)
    for k in range(1, count):  # entry k led from frame k-1 to frame k
        entry = entries.get(str(k))
        if not isinstance(entry, dict):
            raise ClipError("broken metadata", f"{clip.metadata}: entry {k} of 0..{count - 1} is missing")
        try:
            every[k - 1] = actions.from_gamefactory(entry)
        except actions.ActionError as error:
            raise ClipError("bad action", f"{clip.metadata}: entry {k}: {error}") from None
        pose[k] = read_pose(entry)
    if count > 1 and isinstance(entries.get("0"), dict):
        # Entry 0 belongs to no frame, but some recorders put frame 0's pose there: taken if entry 1 follows.
        start = read_pose(entries["0"])
        turned = start[3:] + actions.camera_degrees(every[0]) - pose[1, 3:]
        if (abs((turned + 180) % 360 - 180) < 0.05).all():
            pose[0] = start
    kept, pooled, pose = thin_out(every, pose, video_fps(clip.video) or GAMEFACTORY_FPS, settings)
    return Plan(kept, pooled, pose, needed=count)


def read_pose(entry: dict) -> np.ndarray:
    """[x, y, z, yaw, pitch] float32 of a GF-Minecraft entry, NaN where it has none."""
    try:
        return np.array([*entry["pos"], entry["yaw"], entry["pitch"]], np.float32).reshape(5)
    except (KeyError, TypeError, ValueError):
        return np.full(5, np.nan, np.float32)


def plan_minerl(clip: Clip, settings: Manifest, keep_failed: bool = False) -> Plan:
    """The plan of a MineRL trajectory (data v3 and v4). Raises ClipError or VideoError.

    N actions and N+1 observations; the video may start earlier, so it is aligned at its end.
    """
    metadata = read_json(clip.metadata)
    # v3 writes "True" as a string, v4 a bool
    if not keep_failed and str(metadata.get("success", True)).lower() != "true":
        raise ClipError("not successful", f"{clip.metadata}: success is false; --keep_failed takes it")
    every = read_minerl_actions(clip.metadata.with_name("rendered.npz"))
    source_fps = minerl_fps(clip.metadata, metadata)
    try:
        declared = int(metadata.get("true_video_frame_count", 0))
    except (TypeError, ValueError, OverflowError):
        raise ClipError("broken metadata", f"{clip.metadata}: true_video_frame_count is no number") from None
    decoded = count_frames(clip.video)
    if decoded < declared - MISSING_FRAMES:
        raise ClipError("truncated video", f"{clip.video}: {decoded} of {declared} frames can be decoded")
    observations = len(every) + 1
    skip = max(0, declared - observations)
    frame_of_step = skip + np.rint(np.linspace(0, decoded - skip - 1, observations)).astype(int)
    pose = np.full((observations, 5), np.nan, np.float32)
    kept, pooled, pose = thin_out(every, pose, source_fps, settings)
    frames = frame_of_step[kept]
    if frames[0] < 0 or (np.diff(frames) < 1).any():
        raise ClipError(
            "fewer frames than actions",
            f"{clip.video}: {decoded} frames, {skip} before the start, for {observations} observations",
        )
    return Plan(frames.tolist(), pooled, pose, needed=int(frames[-1]) + 1)


def minerl_fps(path: Path, metadata: dict) -> float:
    """Steps a second of a trajectory, from its own durations: not always 20. Raises ClipError."""
    try:
        source_fps = float(metadata["duration_steps"]) * 1000.0 / float(metadata["duration_ms"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ClipError(
            "broken metadata", f"{path}: expected duration_steps and duration_ms, numbers above 0 ({error!r})"
        ) from None
    if not 0 < source_fps < 1000:
        raise ClipError("broken metadata", f"{path}: its durations mean {source_fps:g} steps a second")
    return source_fps


def read_minerl_actions(path: Path) -> np.ndarray:
    """`rendered.npz` -> action vectors of all steps, float32 [N, 5]. Raises ClipError."""
    try:
        with np.load(path) as arrays:
            return actions.from_minerl(arrays)
    except FileNotFoundError:
        raise ClipError("no actions", f"{path} is missing") from None
    except actions.ActionError as error:
        raise ClipError("bad action", f"{path}: {error}") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ClipError("broken actions", f"{path}: cannot be read ({error})") from None


PLANS = {"gamefactory": plan_gamefactory, "minerl": plan_minerl}


# ------------------------------------------------------------ encoding clips


class Encoder:
    """The tokenizer on its device, and the plan reader of the source: turns clips into token files."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device(job.device)
        self.dtype = amp_dtype(self.device, job.settings.precision)
        if self.dtype == torch.float32:
            # A picture should get the same codes on every machine; TF32 has only 10 bits of mantissa.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.tokenizer: VQVAE = load_tokenizer(job.checkpoint, self.device)

    def tokens(self, frames: list[np.ndarray]) -> torch.Tensor:
        """B pictures [Hp, Wp, 3] uint8 -> tokens [B, H, W] int64, still on the device."""
        pictures = torch.from_numpy(np.stack(frames)).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        with autocast(self.device, self.dtype):
            return self.tokenizer.encode(pictures)

    def encode(self, clip: Clip, plan: Plan, seconds: dict[str, float]) -> np.ndarray:
        """Decodes the kept frames in order and encodes them batch by batch -> tokens [K, H, W] uint16.

        The tokens stay on the device until the end: a GPU encodes one batch while the next is decoded.
        """
        height, width = self.job.settings.picture_size
        frames = read_frames(clip.video, wanted=plan.frames, at_least=plan.needed)
        encoded, batch = [], []
        for frame in timed(frames, seconds, "decode"):
            batch.append(resize(frame, height, width, self.job.settings.resize))
            if len(batch) == self.job.batch:
                with stopwatch(seconds, "encode"):
                    encoded.append(self.tokens(batch))
                batch = []
        with stopwatch(seconds, "encode"):
            if batch:
                encoded.append(self.tokens(batch))
            return torch.cat(encoded).cpu().numpy().astype(np.uint16)

    def __call__(self, clip: Clip) -> Outcome:
        """Makes the token file of one clip, or says why not."""
        settings, seconds = self.job.settings, {"decode": 0.0, "encode": 0.0, "write": 0.0}
        file = f"{clip.name}.npz"
        try:
            if not clip.video.is_file():
                raise ClipError("no video", f"{clip.video} is missing")
            with stopwatch(seconds, "decode"):
                plan = PLANS[settings.source](clip, settings, self.job.keep_failed)
            entry = ClipEntry(
                name=clip.name,
                file=file,
                frames=len(plan.frames),
                split=split_of(clip.key, settings.val_fraction),
                video=video_path(clip, self.job.out_dir),
                kept=pack_indices(plan.frames),
            )
            if self.job.resume and is_finished(entry, self.job.out_dir, settings):
                return Outcome(clip.name, entry)
            tokens = self.encode(clip, plan, seconds)
        except ShortVideoError as error:
            return skip(clip, ClipError("fewer frames than actions", str(error)))
        except (VideoError, cv2.error) as error:
            return skip(clip, ClipError("broken video", str(error)))
        except ClipError as error:
            return skip(clip, error)
        with stopwatch(seconds, "write"):
            write_token_file(self.job.out_dir / file, tokens, plan.actions, plan.pose)
        return Outcome(clip.name, entry, encoded=True, seconds=seconds)


def skip(clip: Clip, error: ClipError) -> Outcome:
    """The outcome of a clip that cannot be used."""
    return Outcome(clip.name, kind=error.kind, reason=str(error))


def video_path(clip: Clip, out_dir: Path) -> str:
    """Where the clip's video lies, relative to the manifest."""
    return Path(os.path.relpath(clip.video, out_dir)).as_posix()


def is_finished(entry: ClipEntry, out_dir: Path, settings: Manifest) -> bool:
    """True if the token file of `entry` is there, whole, and of the right size."""
    if not (out_dir / entry.file).is_file():
        return False
    try:
        tokens = read_token_file(out_dir / entry.file)["tokens"]
    except DataError:
        return False
    return list(tokens.shape) == [entry.frames, *settings.latent_size]


class stopwatch:
    """Adds the time spent in a `with` block to seconds[name]."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds[self.name] += time.perf_counter() - self.start


def timed(items: Iterator, seconds: dict[str, float], name: str) -> Iterator:
    """Passes `items` on; the time that they take to come counts as seconds[name]."""
    while True:
        with stopwatch(seconds, name):
            item = next(items, None)
        if item is None:
            return
        yield item


# ------------------------------------------------------------ worker processes

_encoder: Encoder | None = None  # one in each worker process


def start_worker(job: Job, threads: int) -> None:
    """Prepares a worker process: its share of the cores, its own tokenizer."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets running clips finish
    threading.Thread(target=follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    _encoder = Encoder(job)


def follow_parent() -> None:
    """Ends this worker when its parent is gone: after a kill nothing goes on in the background."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(clip: Clip) -> Outcome:
    """One clip in a worker process."""
    return _encoder(clip)


def run(job: Job, clips: list[Clip], workers: int) -> Iterator[Outcome]:
    """Yields the outcome of each clip as it comes, in this process or from `workers` others.

    Raises DataError if a worker process dies.
    """
    if workers == 1 or len(clips) < 2:
        if clips:
            yield from map(Encoder(job), clips)
        return
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(job, threads)
    )
    try:
        for future in as_completed([pool.submit(work, clip) for clip in clips]):
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            f"{job.out_dir}: a worker process died, perhaps out of memory; what is done is kept: run again "
            "with fewer --workers or a smaller --encode_batch"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------ the manifest


def load_manifests(
    out_dir: Path, settings: Manifest
) -> tuple[dict[str, ClipEntry], dict[str, dict], Manifest]:
    """All that the manifests in `out_dir` say: entries and skipped clips by name (the newest counts).

    Returns `settings` too, with the camera unit of the manifests that are there, or 0 if there is none.
    Raises DataError if one of them was made with other settings.
    """
    entries: dict[str, ClipEntry] = {}
    skipped: dict[str, dict] = {}
    paths = [out_dir / MANIFEST, *out_dir.glob("manifest-shard-*.json")]
    unit = None
    for path in sorted((p for p in paths if p.is_file()), key=lambda p: p.stat().st_mtime_ns):
        found = Manifest.load(out_dir, path.name)
        pairs = [(name, getattr(found, name), getattr(settings, name)) for name in SETTINGS]
        if unit is not None:
            pairs.append(("camera_degrees_per_unit", found.camera_degrees_per_unit, unit))
        unit = found.camera_degrees_per_unit
        for name, old, new in pairs:
            if old != new:
                raise DataError(
                    f"{path}: the token files here were made with {name} = {old}, this run has {new}; "
                    f"use the same settings, choose another --out_dir, or delete {out_dir} to encode anew"
                )
        for clip in found.clips:
            entries[clip.name] = clip
            skipped.pop(clip.name, None)
        skipped.update({s["name"]: s for s in found.skipped})
    return entries, skipped, replace(settings, camera_degrees_per_unit=unit or 0.0)


def join_manifests(out_dir: Path, settings: Manifest) -> Manifest:
    """Joins all manifests in `out_dir` into manifest.json; entries whose token file is gone are left out.

    Two shards may end at the same time. Each looks again after writing, so the last to write has seen all.
    """
    written = None
    while True:
        entries, skipped, joined = load_manifests(out_dir, settings)
        joined.clips = [e for _, e in sorted(entries.items()) if (out_dir / e.file).is_file()]
        joined.skipped = [s for _, s in sorted(skipped.items())]
        if joined == written:
            return joined
        joined.save(out_dir)
        written = joined


def camera_unit(clips: list[Clip], settings: Manifest) -> float:
    """Degrees that a camera action of 1 means: 15 for each source step from one kept frame to the next.

    Taken from the first clip whose rate can be read. Clips of other rates are converted to this unit, so a
    data set never mixes units.
    """
    for clip in clips:
        try:
            if settings.source == "minerl":
                source_fps = minerl_fps(clip.metadata, read_json(clip.metadata))
            else:
                source_fps = video_fps(clip.video) or GAMEFACTORY_FPS
            return actions.DEGREES_PER_UNIT * steps_per_frame(source_fps, settings.fps)
        except (ClipError, VideoError):
            continue  # the clip's own turn will report it
    return actions.DEGREES_PER_UNIT


def is_done(clip: Clip, entry: ClipEntry | None, out_dir: Path, settings: Manifest) -> bool:
    """True if a manifest lists the clip and its token file is whole.

    Raises ClipError if the name belongs to another video, which would be lost without a word.
    """
    if entry is None or not is_finished(entry, out_dir, settings):
        return False
    listed = out_dir / entry.video
    if listed.exists() and clip.video.exists() and not listed.samefile(clip.video):
        raise ClipError("name taken", f"{entry.file} was made from {listed}; use another --out_dir")
    return True


def preprocess(
    job: Job, clips: list[Clip], workers: int, manifest_name: str, entries: dict[str, ClipEntry]
) -> Iterator[Outcome]:
    """Does the `clips` that `entries` does not show as done, and keeps the manifest up to date.

    The manifest is written before the first token file: whatever lies in the folder has known settings.
    """
    settings = job.settings
    waiting = []

    def record(outcome: Outcome) -> Outcome:
        if outcome.entry:
            entries[outcome.name] = outcome.entry
        else:
            entries.pop(outcome.name, None)
            settings.skipped.append({"name": outcome.name, "reason": outcome.reason})
        return outcome

    def save() -> None:
        settings.clips = list(entries.values())
        settings.save(job.out_dir, manifest_name)

    save()
    try:
        for clip in clips:
            try:
                if is_done(clip, entries.get(clip.name), job.out_dir, settings):
                    moved = replace(entries[clip.name], video=video_path(clip, job.out_dir))
                    yield record(Outcome(clip.name, moved))
                else:
                    waiting.append(clip)
            except ClipError as error:
                kept = entries[clip.name]
                yield record(skip(clip, error))
                entries[clip.name] = kept
        saved = time.monotonic()
        for outcome in run(job, waiting, workers):
            yield record(outcome)
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
    finally:
        save()


# ------------------------------------------------------------ command line


def shard(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4); the first shard is 1."""
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with 1 <= I <= N, for example 1/4")
    return index, count


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parent_dir", type=Path, required=True, metavar="DIR", help="the clips, searched at any depth")
    add("--out_dir", type=Path, required=True, metavar="DIR", help="for the token files and the manifest")
    add("--source", choices=("auto", *PLANS), default="auto", help="kind of clips (default: by their files)")
    add("--fps_target", type=float, default=16.0, help="frames a second to keep (default 16; 8 as in v2)")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, metavar="PATH", help="tokenizer checkpoint")
    add("--encode_batch", type=positive, default=64, help="pictures encoded at once (default 64)")
    add("--workers", type=positive, default=1, help="processes, each with its own tokenizer (default 1)")
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="do the I-th of N parts, I from 1 to N")
    add("--val_fraction", type=float, default=0.1, help="share of whole clips held out (default 0.1)")
    add("--resize", choices=sorted(RESIZE), default="area", help="how pictures are shrunk (default area)")
    pool_help = "keys between two kept frames: mean, or max: the strongest press, as in v2 (default mean)"
    add("--pool_keys", choices=("mean", "max"), default="mean", help=pool_help)
    trim_help = "leave out the start of each clip (default 0; v2: 1, since clips begin with teleports)"
    add("--trim_seconds", type=float, default=0.0, help=trim_help)
    add("--keep_failed", action="store_true", help="take MineRL trajectories that did not succeed, too")
    fov_help = (
        "vertical field of view of the recordings in degrees (default 70: Minecraft's and Luanti's own)"
    )
    add("--vertical_fov", type=float, default=70.0, help=fov_help)
    precision_help = "fp32 (default) gives the same codes on all machines but for ties; the others are faster"
    add("--precision", choices=("fp32", "auto", "bf16", "fp16"), default="fp32", help=precision_help)
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of these that is there)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0, 1 if there is no usable clip, 2 if the run was refused, 130 if interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.fps_target <= 0 or args.trim_seconds < 0 or not 0 <= args.val_fraction <= 1:
        parser.error(
            "--fps_target must be above 0, --trim_seconds at least 0, --val_fraction between 0 and 1"
        )
    try:
        return preprocess_all(args)
    except (DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, run the same command again to continue", file=sys.stderr)
        return 130


def preprocess_all(args: argparse.Namespace) -> int:
    """The run that the command line asks for. Raises DataError or CheckpointError if it must be refused."""
    source, clips = find_clips(args.parent_dir, args.source, args.out_dir)
    tokenizer = load_tokenizer(args.vqvae_ckpt)
    settings = Manifest(
        fps=args.fps_target,
        picture_size=[tokenizer.config.height, tokenizer.config.width],
        latent_size=list(tokenizer.config.latent_size),
        codebook_size=tokenizer.config.codebook_size,
        tokenizer=tokenizer.fingerprint,
        vertical_fov_degrees=args.vertical_fov,
        resize=args.resize,
        source=source,
        pool_keys=args.pool_keys,
        trim_seconds=args.trim_seconds,
        precision=args.precision,
        val_fraction=args.val_fraction,
    )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    entries, _, settings = load_manifests(args.out_dir, settings)
    resume = settings.camera_degrees_per_unit > 0  # there was a manifest
    if not resume:
        settings.camera_degrees_per_unit = camera_unit(clips, settings)
    index, count = args.shard
    clips = clips[index - 1 :: count]
    manifest_name = MANIFEST
    if count > 1:
        manifest_name = f"manifest-shard-{index}-of-{count}.json"
        names = {clip.name for clip in clips}
        entries = {name: entry for name, entry in entries.items() if name in names}
    device = str(pick_device(args.device))
    job = Job(args.out_dir, args.vqvae_ckpt, device, args.encode_batch, args.keep_failed, resume, settings)

    start = time.perf_counter()
    outcomes = []
    with tqdm(total=len(clips), unit="clip", desc="preprocess") as bar:
        for outcome in preprocess(job, clips, args.workers, manifest_name, entries):
            outcomes.append(outcome)
            if outcome.entry is None:
                tqdm.write(f"skipped {outcome.name}: {outcome.reason}")
            bar.update()
    elapsed = time.perf_counter() - start
    joined = join_manifests(args.out_dir, settings)
    print(report(outcomes, joined, args.out_dir, elapsed))
    return 0 if joined.clips else 1


def report(outcomes: list[Outcome], manifest: Manifest, out_dir: Path, elapsed: float) -> str:
    """The closing lines: what was kept, done before, skipped and why; speed; what the folder now holds."""
    fresh = [o for o in outcomes if o.encoded]
    done = sum(o.entry is not None for o in outcomes) - len(fresh)
    kinds = Counter(o.kind for o in outcomes if o.entry is None)
    why = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})" if kinds else ""
    frames = sum(o.entry.frames for o in fresh)
    lines = [
        f"{len(fresh)} clips kept, {done} already done, {kinds.total()} skipped{why}; "
        f"{frames} frames in {elapsed:.1f} s, {frames / elapsed:.0f} frames/s"
    ]
    if frames:
        # Over all workers together; on a GPU `encode` is what decoding did not hide.
        spent = {name: sum(o.seconds[name] for o in fresh) for name in fresh[0].seconds}
        total = sum(spent.values())
        parts = [f"{n} {s / total:.0%} ({frames / max(s, 1e-9):.0f} frames/s)" for n, s in spent.items()]
        lines.append(f"time: {', '.join(parts)}")
    splits = Counter(clip.split for clip in manifest.clips)
    total = sum(clip.frames for clip in manifest.clips)
    lines.append(
        f"{out_dir / MANIFEST}: {len(manifest.clips)} clips ({splits['train']} train, {splits['val']} val), "
        f"{total} frames at {manifest.fps:g} FPS, {len(manifest.skipped)} skipped"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
