"""What the sections of benchmark.py share: settings, timing, memory and tables."""

import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

Metrics = dict[str, float]


@dataclass(frozen=True)
class BenchmarkConfig:
    """The command line of benchmark.py; paths are absolute."""

    sections: tuple[str, ...]
    out: Path
    device: str
    precision: str
    quick: bool
    repeats: int  # measured rounds
    windows: int  # in a training batch
    checkpoint: Path
    vqvae_ckpt: Path
    depth_ckpt: Path
    data_dir: Path


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its queued work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_alternately(
    calls: dict[Hashable, Callable[[], object]], rounds: int, device: torch.device, label: str
) -> dict[Hashable, np.ndarray]:
    """Times all calls in alternation, A B A B ... -> {name: seconds [rounds]}.

    A slow moment of the machine then affects all calls alike. One extra round at the start warms up.
    """
    seconds: dict[Hashable, list[float]] = {name: [] for name in calls}
    with tqdm(total=(rounds + 1) * len(calls), desc=label, leave=False) as bar:
        for i in range(rounds + 1):
            for name, call in calls.items():
                synchronize(device)
                started = time.perf_counter()
                call()
                synchronize(device)
                if i:
                    seconds[name].append(time.perf_counter() - started)
                bar.update()
    return {name: np.array(values) for name, values in seconds.items()}


def peak_resident(process: psutil.Process, running: Callable[[], bool]) -> int:
    """Polls the resident memory of a process while `running()` -> its maximum in bytes."""
    peak = 0
    while running():
        with suppress(psutil.Error):  # the process may just have ended
            peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)
    return peak


def format_number(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its module: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")


def print_table(heads: list[str], rows: list[list]) -> None:
    """Prints a Markdown table; None becomes "-"."""
    cells = [["-" if c is None else c if isinstance(c, str) else format_number(c) for c in r] for r in rows]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    print("\n".join("| " + " | ".join(row) + " |" for row in cells), flush=True)
