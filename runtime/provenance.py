"""Where numbers come from: what a script that measures writes beside them, nothing private among it."""

import json
import os
import platform
import shlex
import subprocess
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


def shown(path: str | Path) -> str:
    """A path without what is private to this machine: relative to the repo, or the bare name outside it."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def command_line(script: str | Path, arguments: list[str]) -> str:
    """The command that repeats this run, without absolute paths; also those in --flag=/path are cut."""

    def word(argument: str) -> str:
        flag, equals, value = argument.rpartition("=")
        return flag + equals + (shown(value) if os.path.isabs(value) else value)

    return shlex.join(["python", shown(script), *map(word, arguments)])


def commit() -> str:
    """The commit of this code, "+" behind it where files differ from it; "unknown" outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The model of the CPU in words; "CPU" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or "CPU"


def machine(device: torch.device) -> str:
    """The machine in words."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs ({processor()}), "
        f"run on {device.type}{gpu}"
    )


def versions() -> dict[str, str]:
    """Versions of what the speed and the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` atomically, folders and all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
