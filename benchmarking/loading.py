"""The part "data" of benchmark.py: reading token files, and the stages of preprocessing."""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarking.measure import Metrics, in_turn, name_of, table
from dataset.actions import ACTION_DIM
from dataset.token_files import SAMPLES, write_token_file
from dataset.windows import TokenClips, epoch_windows
from rollout.context import World
from runtime.device import autocast
from runtime.video import read_frames, resize, to_float

TRANSITIONS, WINDOWS = 20, 64  # of a loaded window, and how many of them
CLIPS, FRAMES, ENCODE_BATCH = 2, 128, 64  # sample clips, and frames of each, that are preprocessed


def bench_data(args: argparse.Namespace, world: World, notes: list[str]) -> Metrics:
    """The loader against opening a file for each sample; preprocessing stage by stage."""
    clips = TokenClips(args.data_dir, "all", world.tokenizer.fingerprint)
    lengths = [entry.frames for entry in clips.entries]
    length = min(TRANSITIONS, max(lengths) - 1)
    windows = epoch_windows(lengths, length + 1, 0, 0)[:WINDOWS]

    def loader() -> None:
        chosen = epoch_windows(lengths, length + 1, 0, 0)[:WINDOWS]
        for i in range(0, len(chosen), args.windows):
            clips.batch(chosen[i : i + args.windows], length + 1)

    def naive() -> None:
        for clip, start in windows:
            with np.load(args.data_dir / clips.entries[clip].file) as file:
                tokens, actions = file["tokens"][start : start + length + 1], file["actions"][start:]
            torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(actions[:length])

    cpu = torch.device("cpu")
    taken = in_turn({"loader": loader, "naive": naive}, args.repeats, cpu, "data, loader")
    found = {f"data.{k}.frames_per_s": len(windows) * length / np.median(s) for k, s in taken.items()}
    found["data.speedup"] = np.median(taken["naive"] / taken["loader"])
    rows = [["clips in RAM (TokenClips)", found["data.loader.frames_per_s"]]]
    rows += [["np.load for each window", found["data.naive.frames_per_s"]]]
    table(["loading windows", "frames/s"], rows)
    return found | preprocessing(args, world)


def preprocessing(args: argparse.Namespace, world: World) -> Metrics:
    """The stages of preprocess.py on the sample clips, one after the other; its default precision is fp32."""
    videos = sorted((SAMPLES / "video").glob("*.mp4"))[: 1 if args.quick else CLIPS]
    if not videos:
        raise OSError(f"{SAMPLES / 'video'}: no sample clip to preprocess; check out samples/")
    size = (world.tokenizer.config.height, world.tokenizer.config.width)

    wanted = range(FRAMES // 2 if args.quick else FRAMES)

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
    tokens, n = encode(world.dtype), len(frames)
    actions, pose = np.zeros((n - 1, ACTION_DIM)), np.zeros((n, 5))
    calls = {"decode": decode, "resize": lambda: [resize(frame, *size) for frame in frames]}
    for dtype in dict.fromkeys((torch.float32, world.dtype)):
        calls[f"encode_{name_of(dtype)}"] = partial(encode, dtype)
    with tempfile.TemporaryDirectory() as folder:
        calls["write"] = lambda: write_token_file(Path(folder) / "clip.npz", tokens, actions, pose)
        taken = in_turn(calls, args.repeats, world.device, "data, preprocessing")
    seconds = {stage: np.median(found) for stage, found in taken.items()}
    seconds["all"] = sum(seconds[stage] for stage in ("decode", "resize", "encode_float32", "write"))
    rows = [[stage, n / s, f"{s / seconds['all']:.1%}"] for stage, s in seconds.items()]
    table(["preprocessing, one process; all: with encode_float32", "frames/s", "of all"], rows)
    return {f"data.preprocess.{stage}.frames_per_s": n / s for stage, s in seconds.items()}
