"""What the parts of benchmark.py share: clocks, tables, batches, and runs of other scripts."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.actions import ACTION_DIM
from model_convGru import WorldModelConfig
from runtime.provenance import ROOT

Metrics = dict[str, float]


class Task(NamedTuple):
    """What a model of this size is given: `windows` of so many `transitions`."""

    config: WorldModelConfig
    windows: int
    transitions: int


def synchronize(device: torch.device) -> None:
    """Waits for what the device still has to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def in_turn(
    calls: dict[Hashable, Callable[[], object]], rounds: int, device: torch.device, what: str
) -> dict[Hashable, np.ndarray]:
    """Seconds of each call in each round -> {name: [rounds]}. A round before the first warms up."""
    seconds: dict[Hashable, list[float]] = {name: [] for name in calls}
    with tqdm(total=(rounds + 1) * len(calls), desc=what, leave=False) as bar:
        for turn in range(rounds + 1):
            for name, call in calls.items():
                synchronize(device)
                began = time.perf_counter()
                call()
                synchronize(device)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
                bar.update()
    return {name: np.array(taken) for name, taken in seconds.items()}


def number(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" and the like."""
    return str(dtype).removeprefix("torch.")


def table(heads: list[str], rows: list[list]) -> None:
    """Prints Markdown, "-" for None."""
    cells = [["-" if c is None else c if isinstance(c, str) else number(c) for c in row] for row in rows]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    print("\n".join("| " + " | ".join(row) + " |" for row in cells), flush=True)


def random_batch(task: Task, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, T+1, H, W] and actions [B, T, A]."""
    torch.manual_seed(0)
    shape = (task.windows, task.transitions + 1, task.config.latent_height, task.config.latent_width)
    tokens = torch.randint(task.config.codebook_size, shape, device=device)
    return tokens, torch.rand(task.windows, task.transitions, ACTION_DIM, device=device) * 2 - 1


def run_python(arguments: list, **environment: str) -> tuple[str, float]:
    """Runs Python to its end -> what it printed, and the MB that it held at most.

    Raises OSError with its last error message if it fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        command, variables = [sys.executable, *map(str, arguments)], {**os.environ, **environment}
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=errors)
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            with suppress(psutil.Error):  # it may just have ended
                peak = max(peak, watched.memory_info().rss)
            time.sleep(0.01)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = errors.read().splitlines() or ["no message"]
            said = [line for line in lines if line.startswith("error: ")] or lines[-1:]
            raise OSError(f"{shlex.join(command[1:3])} ... ended with status {process.returncode}: {said[0]}")
        return out.read(), peak / 1e6
