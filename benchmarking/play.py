"""The part "play" of benchmark.py: one whole step, its parts, worlds at once, the first frame."""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarking.measure import Metrics, Task, in_turn, name_of, random_batch, run_python, synchronize, table
from dataset.actions import ACTION_DIM
from dataset.token_files import Manifest
from rollout.context import World
from rollout.rollout import Rollout
from rollout.sampling import PLAY
from runtime.provenance import ROOT

PARTS = ("model", "sampling", "decode", "draw")  # of a step
STEPS, BATCHES, CONTEXT = 60, (1, 4, 16, 64), 2
TURN_SECONDS = 4.0  # then a setting's turn ends before its STEPS: two threads can be slow on busy cores
SCREEN_SCALE = 8  # pixels of the window for one of the picture
STARTS = 3  # of live_inference.py


def primed(world: World, dtype: torch.dtype, batch: int = 1) -> Rollout:
    """A running rollout of `batch` worlds that were shown random frames."""
    rollout = Rollout(world.model, PLAY, dtype=dtype)
    rollout.prime(*random_batch(Task(world.model.config, batch, CONTEXT - 1), world.device))
    return rollout


@contextmanager
def screen(height: int, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A pygame window, or SDL's dummy one -> a function that shows a picture as live_inference.py does.

    It leaves out the keys and words that are drawn over the picture.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    import pygame  # here, so that the other parts do without it

    pygame.display.init()
    surface = pygame.display.set_mode((width * SCREEN_SCALE, height * SCREEN_SCALE))

    def draw(picture: np.ndarray) -> None:
        pygame.event.pump()
        frame = pygame.image.frombuffer(picture.tobytes(), (width, height), "RGB")
        surface.fill((0, 0, 0))
        surface.blit(pygame.transform.scale(frame, surface.get_size()), surface.get_rect())
        pygame.display.flip()

    try:
        yield draw
    finally:
        pygame.display.quit()


@torch.inference_mode()
def step_parts(rollout: Rollout, action: Tensor, draw: Callable[[np.ndarray], None]) -> dict[str, float]:
    """One step of play taken apart -> seconds of each part, the device waited for after each."""
    clock = [time.perf_counter()]

    def lap() -> None:
        synchronize(rollout.device)
        clock.append(time.perf_counter())

    prediction = rollout.predict(action)
    lap()
    rollout.sample(prediction)
    lap()
    picture = rollout.pictures()[0].numpy()
    lap()
    draw(picture)
    lap()
    return dict(zip(PARTS, np.diff(clock), strict=True))


def bench_play(args: argparse.Namespace, world: World, notes: list[str]) -> Metrics:
    """One whole step, action to screen, by precision and threads; its parts; batches; the first frame."""
    device, threads, cores = world.device, torch.get_num_threads(), os.cpu_count() or 1
    counts = sorted({1, min(2, cores), cores}) if device.type == "cpu" else [threads]
    settings = [(dtype, n) for dtype in dict.fromkeys((world.dtype, torch.float32)) for n in counts]
    wholes: dict[tuple, list[float]] = {setting: [] for setting in settings}
    parts: dict[tuple, list[dict]] = {setting: [] for setting in settings}
    share = 3 if args.quick else 1
    action, size = torch.zeros(1, ACTION_DIM, device=device), world.tokenizer.config
    with screen(size.height, size.width) as draw:
        for setting in tqdm(settings * args.repeats, desc="play", leave=False):
            torch.set_num_threads(setting[1])
            rollout, turn = primed(world, setting[0]), time.perf_counter()
            for i in range(-5, STEPS // share):  # those below 0 warm up
                began = time.perf_counter()
                if i > 1 and began - turn > TURN_SECONDS / share:
                    break
                rollout.step(action)
                draw(rollout.pictures()[0].numpy())
                if i >= 0:
                    wholes[setting].append(1000 * (time.perf_counter() - began))
                    if i % 2:
                        parts[setting].append(step_parts(rollout, action, draw))
    torch.set_num_threads(threads)
    found, rows = {}, []
    for dtype, n in settings:
        name = f"{name_of(dtype)}.{f'threads{n}' if device.type == 'cpu' else device.type}"
        row = {f"p{p}_ms": np.percentile(wholes[dtype, n], p) for p in (50, 95, 99)}
        row = {"frames_per_s": 1000 / row["p50_ms"], **row}
        row |= {f"{part}_ms": 1000 * np.median([p[part] for p in parts[dtype, n]]) for part in PARTS}
        found |= {f"play.{name}.{key}": value for key, value in row.items()}
        rows.append([name, *row.values()])
    heads = ["frames/s", "p50 ms", "p95 ms", "p99 ms", *(f"{part} ms" for part in PARTS)]
    table(["play, one step", *heads], rows)
    return found | play_batches(args, world) | starting(args)


def play_batches(args: argparse.Namespace, world: World) -> Metrics:
    """Several worlds at once: model, sampling and decoding."""

    def call(batch: int) -> Callable[[], object]:
        rollout, action = primed(world, world.dtype, batch), torch.zeros(batch, ACTION_DIM)
        return lambda: (rollout.step(action), rollout.pictures())

    batches = BATCHES[:3] if args.quick else BATCHES
    taken = in_turn({b: call(b) for b in batches}, args.repeats, world.device, "play, batches")
    found = {f"play.batch{b}.frames_per_s": b / np.median(taken[b]) for b in batches}
    table(["play, worlds at once", "frames/s"], [[str(b), b / np.median(taken[b])] for b in batches])
    return found


def starting(args: argparse.Namespace) -> Metrics:
    """live_inference.py from its start to the first generated picture, and the memory it holds."""
    start = args.data_dir / Manifest.load(args.data_dir).clips[0].file
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        words = ["--headless", "--script", "idle*1", "--out", Path(folder) / "play.mp4"]
        words += ["--checkpoint", args.checkpoint, "--vqvae_ckpt", args.vqvae_ckpt, "--context_npz", start]
        words += ["--device", args.device]
        for _ in tqdm(range(1 if args.quick else STARTS), desc="play, starts", leave=False):
            said, memory = run_python([ROOT / "live_inference.py", *words])
            runs.append((float(re.search(r"first frame after ([\d.]+) s", said)[1]), memory))
    seconds, memory = np.median(runs, 0)
    table(["play, from the start of the process", "s to the first frame", "MB"], [["", seconds, memory]])
    return {"play.first_frame_s": seconds, "play.resident_mb": memory}
