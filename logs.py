"""One log for a training run: a line of JSON per entry on disk, and wandb where there is one to log to."""

import json
import os
from pathlib import Path

import numpy as np

MODES = ("auto", "online", "offline", "disabled")


def wandb_mode(wanted: str) -> str:
    """ "auto" is online where a wandb key is known (environment or ~/.netrc), else disabled: it never asks."""
    if wanted not in MODES:
        raise ValueError(f"WANDB={wanted!r}: expected one of {', '.join(MODES)}")
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE") in MODES[1:]:
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        return "online" if "api.wandb.ai" in (Path.home() / ".netrc").read_text() else "disabled"
    except OSError:
        return "disabled"


class RunLog:
    """Appends metrics to `log.jsonl` and sends them to wandb; the x-axis is optimizer steps. Never ends a run."""

    def __init__(self, directory: Path, mode: str, project: str, constants: dict):
        self.file = open(Path(directory) / "log.jsonl", "a")
        self.run = None
        mode = wandb_mode(mode)
        if mode != "disabled":
            try:
                import wandb

                self.wandb = wandb
                self.run = wandb.init(project=project, config=constants, dir=str(directory), mode=mode)
            except Exception as error:  # a logger that cannot start must not cost a training run
                print(f"wandb: {error}; going on without it")
        print(f"wandb: {mode if self.run else 'disabled'}; metrics in {Path(directory) / 'log.jsonl'}")

    def write(self, step: int, metrics: dict) -> None:
        """One row of metrics at an optimizer step."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.run:
            self.run.log(metrics, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """An [H, W, 3] uint8 picture, to wandb only (the caller writes its own file)."""
        if self.run:
            self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Flushes and closes both logs."""
        self.file.close()
        if self.run:
            self.run.finish()
