#!/usr/bin/env python3
"""Encodes recorded clips into token files and one manifest.json for train.py.

    python preprocess.py --parent_dir CLIPS --out_dir tokens/NAME

CLIPS is searched at any depth for GF-Minecraft clips (metadata/NAME.json + video/NAME.mp4, or NAME.json
beside NAME.mp4) or for MineRL trajectories (folders with recording.mp4, metadata.json and rendered.npz).

Run it again to continue: finished token files are kept, half-written ones are not counted. A clip that
cannot be used is skipped; the reason is printed and kept in the manifest. Clips of a higher frame rate are
reduced to --fps_target, and the actions between two kept frames are pooled into one. Clips of a lower rate
are skipped.

Before GF-Minecraft clips are encoded, the pictures of a few are compared with their actions and poses,
which takes a few seconds. Wrong alignment, signs or field of view give a warning; the run continues.
--no_check skips this; python record.py --check CLIPS prints the whole table.

Where clips have depth files (dataset/surroundings.py), the token files also get depth, at twice the
resolution of the token grid, and the nodes around the player. With --depth predicted, the depth network
--depth_ckpt (depth/) predicts depth from the pictures of all other clips; it knows no nodes. The manifest
says for each clip where its depth comes from. --depth none ignores the depth files.

Whole worlds are held out for validation where the metadata has a world_seed, else whole clips. Where there is
one world only, clips of it are held out, and of a single clip its end, after a gap; the summary and the
manifest (held_out) say so.

Several machines: give each the same CLIPS and its own --shard 1/N ... N/N. With one shared --out_dir each
writes manifest-shard-I-of-N.json and, at its end, joins all manifests there into manifest.json. With separate
folders, copy the .npz and manifest-shard files into one and run once more on CLIPS without --shard: that
encodes only what is missing.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from dataset.manifests import is_done, join_manifests, load_manifests, shard_manifest, wanted_depth
from dataset.picture_check import check_pictures
from dataset.recordings import PLANS, Clip, ClipError, camera_unit, depth_path, find_clips
from dataset.splits import HeldOut, explain
from dataset.surroundings import SCALE
from dataset.token_files import MANIFEST, PREDICTED, RECORDED, ClipEntry, Manifest, depth_source
from depth.predictor import SHIPPED_DEPTH, load_depth
from preprocessing.clip_encoder import EncodeJob, Outcome, encode_clips, skipped, video_path
from preprocessing.clip_sheet import SHEET, clip_sheet
from runtime.config import ScriptParser, non_negative_float, positive_int, share
from runtime.device import pick_device
from runtime.errors import run_script
from runtime.folder_lock import lock_folder
from runtime.outputs import check_outputs
from runtime.ranges import FieldOfView, FramesPerSecond, flag
from runtime.video import RESIZE, save_image
from vq_vae.tokenizer import SHIPPED_TOKENIZER, Tokenizer, load_tokenizer

EXAMPLE = "python preprocess.py --parent_dir samples --out_dir tokens/samples  (a minute)"

SAVE_EVERY = 5.0  # seconds between two saves of the manifest
CHECKED_CLIPS, CHECKED_FRAMES = 4, 200  # clips to check, and frames from the start of each


@dataclass(frozen=True)
class PreprocessConfig:
    """The parsed command line."""

    clips_dir: Path
    out_dir: Path
    source: str  # "auto" or a key of PLANS
    fps: float
    tokenizer: Path
    depth: str  # "none", RECORDED or PREDICTED
    depth_ckpt: Path
    batch: int
    workers: int
    shard: tuple[int, int]  # index from 1, number of shards
    val_fraction: float
    resize: str
    pool_keys: str
    trim_seconds: float
    keep_failed: bool
    vertical_fov: float  # degrees
    check: bool
    precision: str
    device: str


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
    parser = ScriptParser(description=__doc__, example=EXAMPLE)
    add = parser.add_argument
    add(
        "--parent_dir", type=Path, required=True, metavar="DIR", help="folder of clips, searched at any depth"
    )
    add("--out_dir", type=Path, required=True, metavar="DIR", help="folder for token files and manifest")
    add("--source", choices=("auto", *PLANS), default="auto", help="layout of the clips (default: detected)")
    add(
        "--fps_target",
        type=flag(FramesPerSecond),
        default=16.0,
        help="frames per second to keep (default 16; v2: 8)",
    )
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, metavar="PATH", help="tokenizer checkpoint")
    depth_help = "depth in the token files: as recorded (default); predicted where none is recorded; or none"
    add("--depth", choices=(RECORDED, PREDICTED, "none"), default=RECORDED, help=depth_help)
    depth_ckpt_help = f"depth network for --depth predicted (default {SHIPPED_DEPTH.name} in checkpoints/)"
    add("--depth_ckpt", type=Path, metavar="PATH", help=depth_ckpt_help)
    add("--encode_batch", type=positive_int, default=64, help="pictures encoded at once (default 64)")
    add("--workers", type=positive_int, default=1, help="processes, each with its own networks (default 1)")
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="encode part I of N, I from 1 to N")
    val_help = "share of clips, or of worlds where the metadata has a world_seed, held out (default 0.1)"
    add("--val_fraction", type=share, default=0.1, help=val_help)
    add("--resize", choices=sorted(RESIZE), default="area", help="filter to shrink pictures (default area)")
    pool_help = "keys between two kept frames: mean, or max, the strongest press, as in v2 (default mean)"
    add("--pool_keys", choices=("mean", "max"), default="mean", help=pool_help)
    trim_help = "skip this much of each clip's start (default 0; v2: 1, since clips begin with teleports)"
    add("--trim_seconds", type=non_negative_float, default=0.0, help=trim_help)
    add("--keep_failed", action="store_true", help="use MineRL trajectories without success, too")
    fov_help = "vertical field of view of the recordings in degrees (default 70, as in Minecraft and Luanti)"
    add("--vertical_fov", type=flag(FieldOfView), default=70.0, help=fov_help)
    add(
        "--no_check",
        action="store_true",
        help="do not compare the pictures of a few clips with their actions",
    )
    precision_help = "fp32 (default) gives the same codes on all machines except for ties; others are faster"
    add("--precision", choices=("fp32", "auto", "bf16", "fp16"), default="fp32", help=precision_help)
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of these that is available)")
    return parser


def parse(argv: list[str] | None) -> PreprocessConfig:
    """Reads the command line. Ends the process with status 2 and a message if it is not valid."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return PreprocessConfig(
        clips_dir=args.parent_dir,
        out_dir=args.out_dir,
        source=args.source,
        fps=args.fps_target,
        tokenizer=args.vqvae_ckpt,
        depth=args.depth,
        depth_ckpt=args.depth_ckpt or SHIPPED_DEPTH,
        batch=args.encode_batch,
        workers=args.workers,
        shard=args.shard,
        val_fraction=args.val_fraction,
        resize=args.resize,
        pool_keys=args.pool_keys,
        trim_seconds=args.trim_seconds,
        keep_failed=args.keep_failed,
        vertical_fov=args.vertical_fov,
        check=not args.no_check,
        precision=args.precision,
        device=args.device,
    )


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 without a usable clip, 2 after an error, 130 if interrupted."""
    config = parse(argv)
    return run_script(
        lambda: run(config),
        "interrupted; finished clips are kept, run the same command again to continue",
    )


# ------------------------------------------------------------ the run


def run(config: PreprocessConfig) -> int:
    """Encodes all clips and returns the exit status. Raises UserError.

    Shards may share an output folder, two runs of one shard may not.
    """
    index, shards = config.shard
    part = f"shard-{index}-of-{shards}" if shards > 1 else ""
    with lock_folder(config.out_dir, "preprocess.py", "--out_dir", part):
        return encode_all(config)


def encode_all(config: PreprocessConfig) -> int:
    """As `run`, in a folder that no other run of this shard uses."""
    source, clips = find_clips(config.clips_dir, config.source, config.out_dir)
    check_outputs(
        [config.out_dir / SHEET, *(config.out_dir / f"{clip.name}.npz" for clip in clips)],
        [path for clip in clips for path in clip_inputs(clip)] + [config.tokenizer, config.depth_ckpt],
    )
    tokenizer = load_tokenizer(config.tokenizer)
    settings = settings_of(config, source, clips, tokenizer)
    entries, _, settings = load_manifests(config.out_dir, settings)
    resume = settings.camera_degrees_per_unit > 0  # the folder has a manifest
    if not resume:
        settings.camera_degrees_per_unit = camera_unit(clips, settings)
    index, shards = config.shard
    if shards > 1:
        clips = clips[index - 1 :: shards]
        names = {clip.name for clip in clips}
        entries = {name: entry for name, entry in entries.items() if name in names}
    job = EncodeJob(
        out_dir=config.out_dir,
        checkpoint=config.tokenizer,
        depth=config.depth,
        depth_checkpoint=config.depth_ckpt,
        device=str(pick_device(config.device)),
        batch=config.batch,
        keep_failed=config.keep_failed,
        resume=resume,
        settings=settings,
    )
    if config.check and source == "gamefactory":
        warn_of_problems(job, clips, entries)
    start = time.perf_counter()
    outcomes = []
    with tqdm(total=len(clips), unit="clip", desc="preprocess") as bar:
        for outcome in encode_missing(job, clips, config.workers, shard_manifest(index, shards), entries):
            outcomes.append(outcome)
            if outcome.entry is None:
                tqdm.write(f"skipped {outcome.name}: {outcome.reason}")
            bar.update()
    elapsed = time.perf_counter() - start
    joined = join_manifests(config.out_dir, settings)
    print(summary(outcomes, joined, config.out_dir, elapsed))
    if joined.clips:
        save_image(config.out_dir / SHEET, clip_sheet(config.out_dir, joined, tokenizer))
        print(
            f"look at {config.out_dir / SHEET}: the middle frame of each clip, as the world model will see it"
        )
    return 0 if joined.clips else 1


def clip_inputs(clip: Clip) -> tuple[Path, ...]:
    """All files of a clip that may be read, whether they exist or not."""
    return clip.metadata, clip.video, depth_path(clip.video), clip.metadata.with_name("rendered.npz")


def settings_of(config: PreprocessConfig, source: str, clips: list[Clip], tokenizer: Tokenizer) -> Manifest:
    """An empty manifest with the run's settings. Raises CheckpointError for a bad depth network."""
    sources = {wanted_depth(clip, config.depth) for clip in clips}
    network = load_depth(config.depth_ckpt) if config.depth == PREDICTED else None
    if network and network.config.vertical_fov_degrees != config.vertical_fov:
        print(
            f"warning: {config.depth_ckpt} was trained on a vertical field of view of "
            f"{network.config.vertical_fov_degrees:g} degrees, --vertical_fov is {config.vertical_fov:g}: "
            "its distances will be less accurate",
            file=sys.stderr,
        )
    return Manifest(
        fps=config.fps,
        picture_size=[tokenizer.config.height, tokenizer.config.width],
        latent_size=list(tokenizer.config.latent_size),
        codebook_size=tokenizer.config.codebook_size,
        tokenizer=tokenizer.fingerprint,
        vertical_fov_degrees=config.vertical_fov,
        resize=config.resize,
        source=source,
        pool_keys=config.pool_keys,
        trim_seconds=config.trim_seconds,
        precision=config.precision,
        val_fraction=config.val_fraction,
        depth_scale=SCALE if sources != {""} else None,
        depth_network=network.fingerprint if PREDICTED in sources else "",
    )


def warn_of_problems(job: EncodeJob, clips: list[Clip], entries: dict[str, ClipEntry]) -> None:
    """Compares pictures and metadata of a few clips without token file; prints problems to stderr.

    Unreadable clips are not reported here but when they are encoded.
    """
    done = {name for name, entry in entries.items() if (job.out_dir / entry.file).is_file()}
    waiting = [clip for clip in clips if clip.name not in done]
    sample = random.Random(0).sample(waiting, min(CHECKED_CLIPS, len(waiting)))
    fov = job.settings.vertical_fov_degrees
    for problem in check_pictures(sample, CHECKED_FRAMES, fov, progress=False).problems:
        print(f"warning: {problem} (measured on a sample of {len(sample)} clips)", file=sys.stderr)


def encode_missing(
    job: EncodeJob, clips: list[Clip], workers: int, manifest_name: str, entries: dict[str, ClipEntry]
) -> Iterator[Outcome]:
    """Encodes the `clips` that have no finished token file by `entries`, and keeps the manifest up to date.

    The manifest is written before the first token file, so the settings of any token file in the folder are
    known.
    """
    settings, out_dir = job.settings, job.out_dir
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
        settings.save(out_dir, manifest_name)

    save()
    try:
        for clip in clips:
            try:
                entry = entries.get(clip.name)
                if is_done(clip, entry, out_dir, settings, wanted_depth(clip, job.depth)):
                    # The clips may have been moved since; older manifests do not say where depth comes from.
                    source = depth_source(out_dir / entry.file)
                    entry = replace(entry, video=video_path(clip, out_dir), depth=source)
                    yield record(Outcome(clip.name, entry))
                else:
                    waiting.append(clip)
            except ClipError as error:
                other = entries[clip.name]  # stays: the token file of another video with this name
                yield record(skipped(clip, error))
                entries[clip.name] = other
        saved = time.monotonic()
        for outcome in encode_clips(job, waiting, workers):
            yield record(outcome)
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
    finally:
        save()


def summary(outcomes: list[Outcome], manifest: Manifest, out_dir: Path, elapsed: float) -> str:
    """The closing lines: clips kept, done before and skipped, with reasons; speed; content of the folder."""
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
        # Summed over all workers; on a GPU `encode` is only the time not hidden behind decoding.
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
    if manifest.clips:
        lines.append(explain(HeldOut(manifest.held_out), splits, manifest.val_fraction))
    sources = Counter(clip.depth or "without" for clip in manifest.clips)
    if set(sources) - {"without"}:
        parts = [f"{sources[name]} {name}" for name in (RECORDED, PREDICTED, "without") if sources[name]]
        lines.append(f"depth of the clips: {', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
