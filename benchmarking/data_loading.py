"""Section "data" of benchmark.py: loading training windows, and the stages of preprocessing."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarking.measure import BenchmarkConfig, Metrics, dtype_name, print_table, time_alternately
from dataset.actions import ACTION_DIM
from dataset.token_files import SAMPLES, DataError, write_token_file
from dataset.windows import TokenClips, epoch_windows
from rollout.context import World
from runtime.device import autocast
from runtime.video import read_frames, resize, to_float

TRANSITIONS, WINDOWS = 20, 64  # of a window; windows that are loaded
CLIPS, FRAMES, ENCODE_BATCH = 2, 128, 64  # sample clips that are preprocessed, frames of each, batch


def bench_data(config: BenchmarkConfig, world: World, clips: TokenClips) -> Metrics:
    """The loader against opening a file for each window, then preprocessing stage by stage."""
    lengths = [entry.frames for entry in clips.entries]
    transitions = min(TRANSITIONS, max(lengths) - 1)
    windows = epoch_windows(lengths, transitions + 1, 0, 0)[:WINDOWS]

    def loader() -> None:
        for i in range(0, len(windows), config.windows):
            clips.batch(windows[i : i + config.windows], transitions + 1)

    def file_per_window() -> None:
        for clip, start in windows:
            end = start + transitions
            with np.load(config.data_dir / clips.entries[clip].file) as file:
                tokens, actions = file["tokens"][start : end + 1], file["actions"][start:end]
                pose = file["pose"][start : end + 1]
            torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(actions), torch.from_numpy(pose)

    calls = {"loader": loader, "file_per_window": file_per_window}
    seconds = time_alternately(calls, config.repeats, torch.device("cpu"), "data, loader")
    rates = {kind: len(windows) * transitions / np.median(values) for kind, values in seconds.items()}
    print_table(
        ["loading windows", "frames/s"],
        [["clips in RAM (TokenClips)", rates["loader"]], ["np.load for each", rates["file_per_window"]]],
    )
    metrics = {f"data.{kind}.frames_per_s": rate for kind, rate in rates.items()}
    metrics["data.speedup"] = np.median(seconds["file_per_window"] / seconds["loader"])
    return metrics | bench_preprocessing(config, world)


def bench_preprocessing(config: BenchmarkConfig, world: World) -> Metrics:
    """The stages of preprocess.py on sample clips, in one process: decode, resize, encode, write.

    Encoding is timed in float32, preprocess.py's default, and in the precision of the device.
    """
    videos = sorted((SAMPLES / "video").glob("*.mp4"))[: 1 if config.quick else CLIPS]
    if not videos:
        raise DataError(f"{SAMPLES / 'video'}: no sample clip to preprocess; check out samples/")
    size = (world.tokenizer.config.height, world.tokenizer.config.width)
    wanted = range(FRAMES // 2 if config.quick else FRAMES)

    def decode() -> list[np.ndarray]:
        return [frame for video in videos for frame in read_frames(video, wanted=wanted)]

    def encode(dtype: torch.dtype) -> np.ndarray:
        tokens = []
        for i in range(0, len(pictures), ENCODE_BATCH):
            batch = to_float(torch.from_numpy(np.stack(pictures[i : i + ENCODE_BATCH])).to(world.device))
            with autocast(world.device, dtype):
                tokens.append(world.tokenizer.encode(batch))
        return torch.cat(tokens).cpu().numpy()

    frames = decode()
    pictures = [resize(frame, *size) for frame in frames]
    tokens, count = encode(torch.float32), len(frames)
    actions, pose = np.zeros((count - 1, ACTION_DIM)), np.zeros((count, 5))
    calls = {"decode": decode, "resize": lambda: [resize(frame, *size) for frame in frames]}
    for dtype in dict.fromkeys((torch.float32, world.dtype)):
        calls[f"encode_{dtype_name(dtype)}"] = partial(encode, dtype)
    with tempfile.TemporaryDirectory() as folder:
        calls["write"] = lambda: write_token_file(Path(folder) / "clip.npz", tokens, actions, pose)
        timed = time_alternately(calls, config.repeats, world.device, "data, preprocessing")
    seconds = {stage: np.median(values) for stage, values in timed.items()}
    seconds["all"] = sum(seconds[stage] for stage in ("decode", "resize", "encode_float32", "write"))
    rows = [[stage, count / s, f"{s / seconds['all']:.1%}"] for stage, s in seconds.items()]
    print_table(["preprocessing (all: with encode_float32)", "frames/s", "share of the time"], rows)
    return {f"data.preprocess.{stage}.frames_per_s": count / s for stage, s in seconds.items()}
