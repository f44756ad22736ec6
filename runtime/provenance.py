"""How a measurement was made: command, commit, machine and versions, without private paths or host names."""

import json
import os
import platform
import shlex
import subprocess
from pathlib import Path

import cv2
import numpy as np
import torch

from runtime.outputs import write_text

ROOT = Path(__file__).resolve().parents[1]


def display_path(path: str | Path) -> str:
    """A path without private folders: relative to the repository, or the bare name outside it."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def command_line(script: str | Path, arguments: list[str]) -> str:
    """The command that repeats a run. Absolute paths, also in --flag=/path, become `display_path`."""

    def without_folder(argument: str) -> str:
        flag, equals, value = argument.rpartition("=")
        return flag + equals + (display_path(value) if os.path.isabs(value) else value)

    return shlex.join(["python", display_path(script), *map(without_folder, arguments)])


def commit() -> str:
    """The short hash of the commit, with "+" if tracked files were changed; "unknown" outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The model name of the CPU; "CPU" where the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or "CPU"


def machine(device: torch.device) -> str:
    """Operating system, number and model of the CPUs, and the device that was used."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs ({processor()}), "
        f"run on {device.type}{gpu}"
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that speed and results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content`, complete or not at all; makes missing folders. Raises OutputError."""
    write_text(path, json.dumps(content, indent=1) + "\n")
