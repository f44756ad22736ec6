"""Section "play" of benchmark.py: one step of play, its parts, the time to the first frame, memory."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarking.measure import BenchmarkConfig, Metrics, dtype_name, peak_resident, print_table, synchronize
from dataset.actions import ACTION_DIM, MOVE_Z, YAW
from dataset.windows import TokenClips
from rollout.arguments import CONTEXT_FRAMES
from rollout.context import World
from rollout.rollout import Rollout
from rollout.sampling import PLAY
from runtime.errors import UserError
from runtime.provenance import ROOT

PARTS = ("model", "sampling", "decode", "draw")  # of a step
STEPS, WARMUP_STEPS = 60, 5  # of one round of one setting
ROUND_SECONDS = 4.0  # a slow setting ends its round after this, before STEPS
SCREEN_SCALE = 8  # window pixels per picture pixel
STARTS = 3  # of live_inference.py
# Walking in a circle: every frame has disoccluded cells to sample, and keyframes are written.
WALK = {MOVE_Z: 1.0, YAW: 0.3}


def walk_action() -> Tensor:
    """The action of every timed step, [1, 5]."""
    action = torch.zeros(1, ACTION_DIM)
    for axis, value in WALK.items():
        action[:, axis] = value
    return action


def primed_rollout(world: World, clips: TokenClips, dtype: torch.dtype) -> Rollout:
    """A rollout that was given the first frames of the first clip."""
    rollout = Rollout(world.model, PLAY, dtype=dtype)
    frames = min(CONTEXT_FRAMES, len(clips.tokens[0]))
    rollout.prime(*clips.batch(np.array([[0, 0]]), frames))
    return rollout


@contextmanager
def open_screen(height: int, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A pygame window, or SDL's dummy one without a display -> a function that draws a picture [H, W, 3].

    The keys and captions that live_inference.py writes over the picture are left out.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    import pygame  # here, so that the other sections do not need it

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


def whole_step(rollout: Rollout, action: Tensor, draw: Callable[[np.ndarray], None]) -> float:
    """One step of play, from the action to the drawn picture -> seconds."""
    started = time.perf_counter()
    rollout.step(action)
    draw(rollout.pictures()[0].numpy())
    return time.perf_counter() - started


def step_parts(rollout: Rollout, action: Tensor, draw: Callable[[np.ndarray], None]) -> dict[str, float]:
    """The same step, synchronized after each of its PARTS -> seconds of each."""
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


def bench_play(config: BenchmarkConfig, world: World, clips: TokenClips) -> Metrics:
    """One step of play by precision and, on a CPU, by threads; its parts; the start of live_inference.py."""
    device, threads, cores = world.device, torch.get_num_threads(), os.cpu_count() or 1
    counts = sorted({1, min(2, cores), cores}) if device.type == "cpu" else [threads]
    settings = [(dtype, n) for dtype in dict.fromkeys((world.dtype, torch.float32)) for n in counts]
    wholes: dict[tuple, list[float]] = {setting: [] for setting in settings}
    parts: dict[tuple, list[dict]] = {setting: [] for setting in settings}
    share = 3 if config.quick else 1
    action, size = walk_action(), world.tokenizer.config
    with open_screen(size.height, size.width) as draw:
        for setting in tqdm(settings * config.repeats, desc="play", leave=False):
            dtype, n = setting
            torch.set_num_threads(n)
            rollout = primed_rollout(world, clips, dtype)
            for _ in range(WARMUP_STEPS):
                whole_step(rollout, action, draw)
            started = time.perf_counter()
            for i in range(max(3, STEPS // share)):  # every third is taken apart
                if i > 2 and time.perf_counter() - started > ROUND_SECONDS / share:
                    break
                if i % 3 == 2:
                    parts[setting].append(step_parts(rollout, action, draw))
                else:
                    wholes[setting].append(whole_step(rollout, action, draw))
    torch.set_num_threads(threads)
    metrics, rows = {}, []
    for dtype, n in settings:
        name = f"{dtype_name(dtype)}.{f'threads{n}' if device.type == 'cpu' else device.type}"
        row = {f"p{p}_ms": 1000 * np.percentile(wholes[dtype, n], p) for p in (50, 95, 99)}
        row = {"frames_per_s": 1000 / row["p50_ms"], **row}
        row |= {f"{part}_ms": 1000 * np.median([p[part] for p in parts[dtype, n]]) for part in PARTS}
        metrics |= {f"play.{name}.{key}": value for key, value in row.items()}
        rows.append([name, *row.values()])
    heads = ["frames/s", "p50 ms", "p95 ms", "p99 ms", *(f"{part} ms" for part in PARTS)]
    print_table(["one step of play, walking", *heads], rows)
    return metrics | bench_start(config, clips)


def bench_start(config: BenchmarkConfig, clips: TokenClips) -> Metrics:
    """live_inference.py from the start of its process to the first generated picture, and its peak memory."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--headless", "--script", "idle*1", "--out", Path(folder) / "play.mp4"]
        flags += ["--checkpoint", config.checkpoint, "--vqvae_ckpt", config.vqvae_ckpt]
        flags += ["--depth_ckpt", config.depth_ckpt]
        flags += ["--context_npz", config.data_dir / clips.entries[0].file, "--device", config.device]
        for _ in tqdm(range(1 if config.quick else STARTS), desc="play, starts", leave=False):
            output, peak = run_python([ROOT / "live_inference.py", *flags])
            measured.append((float(re.search(r"first frame after ([\d.]+) s", output)[1]), peak / 1e6))
    seconds, megabytes = np.median(measured, 0)
    print_table(["start of live_inference.py", "s to the first frame", "MB"], [["", seconds, megabytes]])
    return {"play.first_frame_s": seconds, "play.resident_mb": megabytes}


def run_python(arguments: list) -> tuple[str, int]:
    """Runs Python to its end -> what it printed, and its peak resident memory in bytes.

    Raises UserError with its last error message if it fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors)
        peak = peak_resident(psutil.Process(process.pid), lambda: process.poll() is None)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = errors.read().splitlines() or ["no message"]
            message = ([line for line in lines if line.startswith("error: ")] or lines)[-1]
            name = shlex.quote(Path(command[1]).name)
            raise UserError(f"{name} ended with status {process.returncode}: {message}")
        return out.read(), peak
