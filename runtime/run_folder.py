"""The files of a training run in its folder: where it continues from, and what becomes of older files."""

import re
import sys
from pathlib import Path

from runtime import checkpoint
from runtime.checkpoint import CheckpointError
from runtime.outputs import make_folder, output_error

LAST, BEST = "last.pt", "best.pt"
# What a new run in the folder would overwrite or append to.
RUN_FILES = (LAST, BEST, "step_*.pt", "*.jsonl", "*_[0-9]*.png", "curves.png")


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints step_N.pt of a folder with their steps, in the order of these."""
    found = ((re.fullmatch(r"step_(\d+)\.pt", path.name), path) for path in folder.glob("step_*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_old_steps(folder: Path, keep: int, step: int) -> None:
    """Removes all but the newest `keep` checkpoints step_N.pt of steps up to `step`.

    Later ones, left by a run that continued from an older checkpoint, stay until they are written anew.
    """
    old = [path for number, path in step_files(folder) if number <= step]
    for path in old[: max(0, len(old) - keep)]:
        path.unlink(missing_ok=True)


def last_good(folder: Path, kind: str, resume: bool = True) -> tuple[Path, dict] | None:
    """The checkpoint that a run continues from, and its content: last.pt.

    If that cannot be read or has weights that are not finite, the one with the latest step among step_N.pt
    and best.pt is used instead, with a warning. None without `resume` or last.pt. Raises CheckpointError if
    none of them can be used.
    """
    last = folder / LAST
    if not resume or not last.is_file():
        return None
    try:
        return last, load_finite(last, kind)
    except CheckpointError as error:
        failure = error
    others = []
    for path in [*(path for _, path in step_files(folder)), folder / BEST]:
        try:
            content = load_finite(path, kind)
            others.append((int(content["step"]), path, content))
        except (CheckpointError, TypeError, ValueError):
            continue
    if not others:
        raise CheckpointError(f"{failure} (no other checkpoint beside it can be used; or give RESUME=False)")
    step, path, content = max(others, key=lambda other: other[0])
    print(f"warning: {failure}", file=sys.stderr)
    print(f"warning: continuing from {path} at step {step} instead", file=sys.stderr)
    return path, content


def load_finite(path: Path, kind: str) -> dict:
    """The content of a training checkpoint. Raises CheckpointError, also for weights that are not finite."""
    content = checkpoint.load(path, kind, needed=("step",))
    if name := checkpoint.not_finite(content):
        raise CheckpointError(
            f"{path}: its weights {name} are not finite (NaN or infinite): the training failed; remove it"
        )
    return content


def set_aside(folder: Path) -> None:
    """Moves the files of an earlier run to a folder of their own, earlier-N, and says so."""
    files = sorted({path for pattern in RUN_FILES for path in folder.glob(pattern) if path.is_file()})
    if not files:
        return
    number = 1
    while (target := folder / f"earlier-{number}").exists():
        number += 1
    make_folder(target)
    for path in files:
        try:
            path.rename(target / path.name)
        except OSError as error:
            raise output_error(target / path.name, error) from None
    print(f"{folder}: the {len(files)} files of an earlier run are now in {target}")
