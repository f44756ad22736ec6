"""What every training run keeps: its log, on disk and in wandb, and an ear for signals to stop."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

MODES = ("auto", "online", "offline", "disabled")


def wandb_mode(wanted: str) -> str:
    """The mode for wandb.init; "auto" is online where a key is known, else disabled: it never asks."""
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


class StopRequest:
    """True once SIGINT or SIGTERM has come: the loop then ends after the step in hand, and saves."""

    def __init__(self):
        self.asked = False
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, *_) -> None:
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked

    def release(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class RunLog:
    """Metrics to `log.jsonl` and to wandb, over optimizer steps. A logger that fails never ends a run."""

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
        self._send(lambda: self.run.log(metrics, step=step))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """An [H, W, 3] uint8 picture, to wandb only (the caller writes its own file)."""
        self._send(lambda: self.run.log({name: self.wandb.Image(image)}, step=step))

    def _send(self, entry: Callable[[], None]) -> None:
        """Sends an entry to wandb, which is given up at its first failure: it must not cost a run."""
        if self.run:
            try:
                entry()
            except Exception as error:
                print(f"wandb: {error}; going on without it")
                self.run = None

    def close(self) -> None:
        """Flushes and closes both logs."""
        self.file.close()
        self._send(lambda: self.run.finish())
