#!/usr/bin/env python3
"""Recorded clips -> token files and one manifest.json, ready for train.py.

    python preprocess.py --parent_dir CLIPS --out_dir tokens/NAME

CLIPS is searched at any depth for GF-Minecraft clips (metadata/NAME.json + video/NAME.mp4, or NAME.json
beside NAME.mp4) or for MineRL trajectories (folders with recording.mp4, metadata.json and rendered.npz).

Run it again to continue: finished token files are kept, half-written ones never count. A clip that cannot be
used is skipped; the reason is printed and kept in the manifest. Clips of a faster rate are thinned out to
--fps_target and the actions between two kept frames are pooled; a clip that is slower is skipped, since
frames are never invented.

Before it encodes GF-Minecraft clips it compares the pictures of a few with their actions and poses, a few
seconds, and warns of wrong alignment, signs or field of view (clip_check.py; python record.py --check CLIPS
prints the whole table). A warning stops nothing; --no_check leaves the check out.

Where clips have depth files (surroundings.py) the token files get depth, at twice the tokens' grid, and the
nodes around the player, of the same frames as the tokens.

Whole clips are held out for validation, and whole worlds where the metadata names a world_seed.

Several machines: give each the same CLIPS and its own --shard 1/N ... N/N. With one shared --out_dir each
writes manifest-shard-I-of-N.json and, at its end, joins all manifests there into manifest.json. With separate
folders, copy the .npz and manifest-shard files into one and run once more on CLIPS without --shard: that
encodes only what is missing.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from dataset import clip_check
from dataset.recordings import (
    PLANS,
    Clip,
    ClipError,
    Plan,
    camera_unit,
    depth_path,
    find_clips,
    read_depth_file,
)
from dataset.surroundings import SCALE
from dataset.token_files import (
    EXTRAS,
    MANIFEST,
    ClipEntry,
    DataError,
    Manifest,
    pack_indices,
    read_token_file,
    split_of,
    write_token_file,
)
from runtime.config import positive_int
from runtime.device import amp_dtype, autocast, pick_device
from runtime.errors import run_script
from runtime.video import RESIZE, ShortVideoError, VideoError, read_frames, resize
from vq_vae.tokenizer import SHIPPED_TOKENIZER, Tokenizer, load_tokenizer

SAVE_EVERY = 5.0  # seconds between two saves of the manifest
CHECKED_CLIPS, CHECKED_FRAMES = 4, 200  # clips, and frames from the start of each, that the check looks at
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
        self.tokenizer: Tokenizer = load_tokenizer(job.checkpoint, self.device)

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
                split=split_of(plan.world or clip.key, settings.val_fraction),
                video=video_path(clip, self.job.out_dir),
                kept=pack_indices(plan.frames),
            )
            if self.job.resume and is_finished(entry, self.job.out_dir, settings, has_depth(clip)):
                return Outcome(clip.name, entry)
            extras = surroundings_of(clip, plan, settings.latent_size)
            tokens = self.encode(clip, plan, seconds)
        except ShortVideoError as error:
            return skip(clip, ClipError("fewer frames than actions", str(error)))
        except (VideoError, cv2.error) as error:
            return skip(clip, ClipError("broken video", str(error)))
        except ClipError as error:
            return skip(clip, error)
        with stopwatch(seconds, "write"):
            write_token_file(self.job.out_dir / file, tokens, plan.actions, plan.pose, **extras)
        return Outcome(clip.name, entry, encoded=True, seconds=seconds)


def skip(clip: Clip, error: ClipError) -> Outcome:
    """The outcome of a clip that cannot be used."""
    return Outcome(clip.name, kind=error.kind, reason=str(error))


def video_path(clip: Clip, out_dir: Path) -> str:
    """Where the clip's video lies, relative to the manifest."""
    return Path(os.path.relpath(clip.video, out_dir)).as_posix()


def has_depth(clip: Clip) -> bool:
    """Whether the clip was recorded with depth."""
    return depth_path(clip.video).is_file()


def surroundings_of(clip: Clip, plan: Plan, latent_size: list[int]) -> dict[str, np.ndarray]:
    """The optional arrays of a token file, of the kept frames: depth [K, 2H, 2W], and nodes and origin where
    the clip has them; {} without a depth file. Raises ClipError if that is broken or of another length.

    Depth of another size is read at the nearest places: a mean over an edge would lie between two surfaces.
    """
    found = read_depth_file(clip.video, plan.needed)
    if found is None:
        return {}
    sizes = zip(found.log_inverse.shape[1:], latent_size, strict=True)
    rows, columns = (((np.arange(2 * new) + 0.5) * old / (2 * new)).astype(int) for old, new in sizes)
    extras = {"depth": found.log_inverse[plan.frames][:, rows[:, None], columns]}
    if found.nodes is not None:
        extras |= {"nodes": found.nodes[plan.frames], "origin": found.origin[plan.frames]}
    return extras


def is_finished(entry: ClipEntry, out_dir: Path, settings: Manifest, with_depth: bool = False) -> bool:
    """True if the token file of `entry` is there, whole, of the right size, and has depth if it should."""
    if not (out_dir / entry.file).is_file():
        return False
    try:
        content = read_token_file(out_dir / entry.file, EXTRAS if with_depth else ())
    except DataError:
        return False
    if with_depth and "depth" not in content:
        return False
    return list(content["tokens"].shape) == [entry.frames, *settings.latent_size]


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
        if None not in (found.depth_scale, settings.depth_scale):
            pairs.append(("depth_scale", found.depth_scale, settings.depth_scale))
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
        settings = replace(settings, depth_scale=settings.depth_scale or found.depth_scale)
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


def is_done(clip: Clip, entry: ClipEntry | None, out_dir: Path, settings: Manifest) -> bool:
    """True if a manifest lists the clip and its token file is whole.

    Raises ClipError if the name belongs to another video, which would be lost without a word.
    """
    if entry is None or not is_finished(entry, out_dir, settings, has_depth(clip)):
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
        index, shards = map(int, text.split("/"))
    except ValueError:
        index, shards = 0, 0
    if not 1 <= index <= shards:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with 1 <= I <= N, for example 1/4")
    return index, shards


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
    add("--encode_batch", type=positive_int, default=64, help="pictures encoded at once (default 64)")
    add("--workers", type=positive_int, default=1, help="processes, each with its own tokenizer (default 1)")
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="do the I-th of N parts, I from 1 to N")
    val_help = "share of whole clips, or of worlds where clips name theirs, held out (default 0.1)"
    add("--val_fraction", type=float, default=0.1, help=val_help)
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
    check_help = "do not compare a few clips' pictures with their actions first; that only ever warns"
    add("--no_check", action="store_true", help=check_help)
    precision_help = "fp32 (default) gives the same codes on all machines but for ties; the others are faster"
    add("--precision", choices=("fp32", "auto", "bf16", "fp16"), default="fp32", help=precision_help)
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of these that is there)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns 0, 1 without a usable clip, 2 if the run was refused, 130 if interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.fps_target <= 0 or args.trim_seconds < 0 or not 0 <= args.val_fraction <= 1:
        parser.error(
            "--fps_target must be above 0, --trim_seconds at least 0, --val_fraction between 0 and 1"
        )
    return run_script(
        lambda: preprocess_all(args),
        "interrupted; what is done is kept, run the same command again to continue",
    )


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
        depth_scale=SCALE if any(map(has_depth, clips)) else None,
    )
    args.out_dir.mkdir(parents=True, exist_ok=True)
    entries, _, settings = load_manifests(args.out_dir, settings)
    resume = settings.camera_degrees_per_unit > 0  # there was a manifest
    if not resume:
        settings.camera_degrees_per_unit = camera_unit(clips, settings)
    index, shards = args.shard
    clips = clips[index - 1 :: shards]
    manifest_name = MANIFEST
    if shards > 1:
        manifest_name = f"manifest-shard-{index}-of-{shards}.json"
        names = {clip.name for clip in clips}
        entries = {name: entry for name, entry in entries.items() if name in names}
    device = str(pick_device(args.device))
    job = Job(args.out_dir, args.vqvae_ckpt, device, args.encode_batch, args.keep_failed, resume, settings)

    if not args.no_check and source == "gamefactory":
        warn_of_problems(job, clips, entries)
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


def warn_of_problems(job: Job, clips: list[Clip], entries: dict[str, ClipEntry]) -> None:
    """Compares pictures and metadata of a few clips that are still to be encoded; problems go to stderr.

    Clips that cannot be read are reported when their turn comes; what is too little to tell is no problem.
    """
    done = {name for name, entry in entries.items() if (job.out_dir / entry.file).is_file()}
    waiting = [clip for clip in clips if clip.name not in done]
    sample = random.Random(0).sample(waiting, min(CHECKED_CLIPS, len(waiting)))
    fov = job.settings.vertical_fov_degrees
    for problem in clip_check.check_pictures(sample, CHECKED_FRAMES, fov, progress=False).problems:
        print(f"warning: {problem} (seen in a sample of {len(sample)} clips)", file=sys.stderr)


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
