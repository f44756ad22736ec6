"""Encodes recorded clips into token files, in this process or in several.

A worker process loads its own networks. A clip that cannot be used is returned with the reason, never
raised.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from dataset.manifests import is_finished, wanted_depth
from dataset.recordings import PLANS, Clip, ClipError, Plan
from dataset.token_files import (
    PREDICTED,
    RECORDED,
    ClipEntry,
    DataError,
    Manifest,
    depth_source,
    pack_indices,
    split_of,
    write_token_file,
)
from preprocessing.clip_depth import PredictedDepth, recorded_surroundings
from runtime.device import amp_dtype, autocast
from runtime.errors import one_line
from runtime.video import ShortVideoError, VideoError, read_frames, resize, to_float
from runtime.worker_process import end_with_parent
from vq_vae.tokenizer import load_tokenizer


@dataclass(frozen=True)
class EncodeJob:
    """What all clips of a run share; sent once to each worker process."""

    out_dir: Path
    checkpoint: Path  # of the tokenizer
    depth: str  # "none", RECORDED or PREDICTED, see wanted_depth
    depth_checkpoint: Path  # of the depth network, not read unless depth is PREDICTED
    device: str
    batch: int  # pictures encoded at once
    keep_failed: bool  # use MineRL trajectories without success, too
    resume: bool  # token files without a manifest entry may be kept: the folder's settings are known
    settings: Manifest


@dataclass
class Outcome:
    """The result for one clip."""

    name: str
    entry: ClipEntry | None = None  # None: skipped
    encoded: bool = False  # False with an entry: the token file existed already
    kind: str = ""  # of the reason, in a few words, for counting
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # decode, encode, write, depth


def skipped(clip: Clip, error: ClipError) -> Outcome:
    """The outcome of a clip that cannot be used."""
    return Outcome(clip.name, kind=error.kind, reason=str(error))


def video_path(clip: Clip, out_dir: Path) -> str:
    """Path of the clip's video relative to the manifest."""
    return Path(os.path.relpath(clip.video, out_dir)).as_posix()


class stopwatch:
    """Adds the duration of a `with` block to seconds[name]."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds[self.name] += time.perf_counter() - self.start


def timed(items: Iterator, seconds: dict[str, float], name: str) -> Iterator:
    """Yields `items`; adds the time spent waiting for them to seconds[name]."""
    while True:
        with stopwatch(seconds, name):
            item = next(items, None)
        if item is None:
            return
        yield item


# ------------------------------------------------------------ one clip


class ClipEncoder:
    """The tokenizer, and the depth network if needed, on a device; call it with a clip to write its token
    file."""

    def __init__(self, job: EncodeJob):
        self.job = job
        self.device = torch.device(job.device)
        self.dtype = amp_dtype(self.device, job.settings.precision)
        if self.dtype == torch.float32:
            # A picture should get the same codes on every machine; TF32 has a mantissa of only 10 bits.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.tokenizer = load_tokenizer(job.checkpoint, self.device)
        self.depth = None
        if job.depth == PREDICTED:
            self.depth = PredictedDepth(job.depth_checkpoint, self.device, job.settings.latent_size)

    def __call__(self, clip: Clip) -> Outcome:
        """Writes the token file of one clip, or returns why not."""
        settings, seconds = self.job.settings, {"decode": 0.0, "encode": 0.0, "write": 0.0}
        if self.depth:
            seconds["depth"] = 0.0
        file, wanted = f"{clip.name}.npz", wanted_depth(clip, self.job.depth)
        try:
            if not clip.video.is_file():
                raise ClipError("no video", f"{clip.video} is missing")
            with stopwatch(seconds, "decode"):
                plan = PLANS[settings.source](clip, settings, self.job.keep_failed)
            group = plan.world or clip.key
            entry = ClipEntry(
                name=clip.name,
                file=file,
                frames=len(plan.frames),
                group=group,
                split=split_of(group, settings.val_fraction),  # until all clips are known: join_manifests
                video=video_path(clip, self.job.out_dir),
                kept=pack_indices(plan.frames),
                depth=wanted,
            )
            if self.job.resume and is_finished(entry, self.job.out_dir, settings, wanted):
                return Outcome(clip.name, replace(entry, depth=depth_source(self.job.out_dir / file)))
            extras = {}
            if wanted == RECORDED:
                extras = recorded_surroundings(clip, plan, settings.latent_size)
            tokens, predicted = self.encode(clip, plan, wanted == PREDICTED, seconds)
        except ShortVideoError as error:
            return skipped(clip, ClipError("fewer frames than actions", str(error)))
        except (VideoError, cv2.error) as error:
            return skipped(clip, ClipError("broken video", str(error)))
        except ClipError as error:
            return skipped(clip, error)
        except (OSError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
            # No reader should raise one of these; if one does, it is still only this clip that is bad.
            reason = f"{clip.metadata}: {type(error).__name__}: {one_line(error)[:200]}"
            return skipped(clip, ClipError("cannot be read", reason))
        with stopwatch(seconds, "write"):
            write_token_file(self.job.out_dir / file, tokens, plan.actions, plan.pose, **extras, **predicted)
        return Outcome(clip.name, entry, encoded=True, seconds=seconds)

    def encode(
        self, clip: Clip, plan: Plan, predict_depth: bool, seconds: dict[str, float]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Decodes the kept frames in order and encodes them batch by batch.

        Returns tokens [K, H, W] uint16, and the token file's arrays of predicted depth, {} unless
        `predict_depth`. The frames of a clip are never in memory together. The results stay on the device
        until the end, so that a GPU encodes one batch while the next is decoded.
        """
        height, width = self.job.settings.picture_size
        frames = read_frames(clip.video, wanted=plan.frames, at_least=plan.needed)
        encoded, inverse = [], []
        batch, depth_batch, pitch = [], [], []

        def finish_batch() -> None:
            with stopwatch(seconds, "encode"):
                encoded.append(self.encode_batch(batch))
            if predict_depth:
                with stopwatch(seconds, "depth"):
                    inverse.append(self.depth.predict(depth_batch, np.array(pitch)))
            for part in (batch, depth_batch, pitch):
                part.clear()

        for frame, angle in zip(timed(frames, seconds, "decode"), plan.pose[:, 4], strict=True):
            batch.append(resize(frame, height, width, self.job.settings.resize))
            if predict_depth:
                depth_batch.append(self.depth.picture(frame))
                pitch.append(angle)
            if len(batch) == self.job.batch:
                finish_batch()
        if batch:
            finish_batch()
        with stopwatch(seconds, "encode"):
            tokens = torch.cat(encoded).cpu().numpy().astype(np.uint16)
        return tokens, self.depth.extras(inverse) if predict_depth else {}

    def encode_batch(self, frames: list[np.ndarray]) -> torch.Tensor:
        """B pictures [Hp, Wp, 3] uint8 -> tokens [B, H, W] int64 on the device, in the run's precision."""
        pictures = to_float(torch.from_numpy(np.stack(frames)).to(self.device))
        with autocast(self.device, self.dtype):
            return self.tokenizer.encode(pictures)


# ------------------------------------------------------------ several processes

_encoder: ClipEncoder | None = None  # one in each worker process


def start_worker(job: EncodeJob, threads: int) -> None:
    """Prepares a worker process: its share of the cores, its own networks."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and lets running clips finish
    end_with_parent()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    _encoder = ClipEncoder(job)


def encode_in_worker(clip: Clip) -> Outcome:
    """Encodes one clip in a worker process."""
    return _encoder(clip)


def encode_clips(job: EncodeJob, clips: list[Clip], workers: int) -> Iterator[Outcome]:
    """Yields the outcome of each clip when it is ready, from this process or from `workers` others.

    Raises DataError if a worker process dies.
    """
    if workers == 1 or len(clips) < 2:
        if clips:
            yield from map(ClipEncoder(job), clips)
        return
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(job, threads)
    )
    try:
        for future in as_completed([pool.submit(encode_in_worker, clip) for clip in clips]):
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            f"{job.out_dir}: a worker process died, perhaps out of memory; finished clips are kept: run "
            "again with fewer --workers or a smaller --encode_batch"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
