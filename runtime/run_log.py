"""The log of a training run, on disk and in wandb, means of logged values, and stopping on a signal."""

import json
import math
import os
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np

from runtime.config import SettingError
from runtime.curves import draw_curves
from runtime.outputs import output_error, write_text
from runtime.ranges import OneOf

MODES = ("auto", "online", "offline", "disabled")
WandbMode = Annotated[str, OneOf(MODES)]  # type of the constant WANDB
CURVES = "curves.png"  # in the run's folder: a plot of the log
DRAW_SECONDS = 60.0  # between two plots
RUN_ID = "wandb_run_id.txt"  # in the run's folder: the wandb run that a resumed run continues


def wandb_mode(wanted: str) -> str:
    """The mode for wandb.init. "auto" is online where an API key is found, else disabled; it never prompts.

    Raises SettingError for an unknown mode.
    """
    if wanted not in MODES:
        raise SettingError(f"WANDB={wanted}: expected one of {', '.join(MODES)}")
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
    """True once SIGINT or SIGTERM has arrived: the training loop then ends after its step and saves.

    Signals are caught within a `with` block. A second one raises KeyboardInterrupt.
    """

    def __init__(self):
        self.received = False

    def _receive(self, *_) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __bool__(self) -> bool:
        return self.received

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Means:
    """Means of the values of the steps since the last log line, and the rate of what was processed."""

    def __init__(self):
        self.values: dict[str, list[float]] = {}
        self.items = 0  # frames or pictures
        self.start = time.monotonic()

    def add(self, items: int, values: dict[str, float]) -> None:
        """The values of one step, which processed `items`; what is not finite is left out of its mean."""
        self.items += items
        for name, value in values.items():
            if math.isfinite(value):
                self.values.setdefault(name, []).append(value)

    def take(self) -> tuple[dict[str, float], float, float]:
        """-> the means, items per second and seconds since the last call; starts anew."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        seconds = time.monotonic() - self.start
        rate = self.items / seconds
        self.__init__()
        return means, rate, seconds


def announcement(step: int, steps: int, folder: Path) -> str:
    """What a training run is about to do, for its first line."""
    return (
        f"training from step {step} to {steps}; the bar shows the time left, {folder / CURVES} how it goes. "
        "Ctrl-C saves, and the same command continues"
    )


def ending(step: int, steps: int, folder: Path) -> str:
    """How a training run ended, for its last line."""
    return f"{'finished' if step >= steps else 'stopped'} at step {step}; weights in {folder}"


def remove_later_rows(path: Path, step: int) -> None:
    """Removes the rows of steps after `step` from a log, and what is no row, such as a half-written one."""
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


class RunLog:
    """Writes metrics to `log.jsonl` and to wandb, by optimizer step, and keeps the plot `curves.png` fresh.

    A failure of wandb or of the plot never ends a run.
    """

    def __init__(
        self,
        directory: Path,
        mode: str,
        project: str,
        constants: dict,
        resumed_step: int | None = None,
    ):
        """`constants` become the wandb run's config. With `resumed_step`, the step that a resumed run goes on
        from, the same wandb run is continued, and rows of later steps, which will come again, are removed.

        Raises SettingError for an unknown mode.
        """
        mode = wandb_mode(mode)
        resumed = resumed_step is not None
        for path in sorted(Path(directory).glob("*.jsonl")) if resumed else ():
            remove_later_rows(path, resumed_step)
        self.path = Path(directory) / "log.jsonl"
        try:
            self.file = open(self.path, "a")
        except OSError as error:
            raise output_error(self.path, error) from None
        self.run, self.drawn = None, time.monotonic()  # when the plot was drawn
        if mode != "disabled":
            try:
                import wandb

                self.wandb = wandb
                self.run = wandb.init(
                    project=project,
                    config=constants,
                    dir=str(directory),
                    mode=mode,
                    id=self._run_id(Path(directory) / RUN_ID, resumed),
                    resume="allow",
                )
            except Exception as error:  # wandb raises many types; none may cost a training run
                print(f"wandb: {error}; continuing without it")
        print(f"wandb: {mode if self.run else 'disabled'}; metrics in {self.path}, plotted in {CURVES}")

    @staticmethod
    def _run_id(file: Path, resumed: bool) -> str:
        """The id in `file` for a resumed run, else a new id, which is written there."""
        if resumed and file.is_file():
            return file.read_text().strip()
        file.write_text(run_id := secrets.token_hex(4))
        return run_id

    def write(self, step: int, metrics: dict) -> None:
        """One row of metrics at an optimizer step. Raises OutputError, for example if the disk is full."""
        try:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        except OSError as error:
            raise output_error(self.path, error) from None
        self._send(lambda: self.run.log(metrics, step=step))
        if time.monotonic() - self.drawn > DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draws the log into CURVES beside it."""
        self.drawn = time.monotonic()
        try:
            draw_curves(self.path, self.path.with_name(CURVES))
        except Exception as error:
            print(f"{self.path.with_name(CURVES)}: {error}; continuing without the plot")
            self.drawn = math.inf

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """An [H, W, 3] uint8 picture, to wandb only (the caller writes its own file)."""
        self._send(lambda: self.run.log({name: self.wandb.Image(image)}, step=step))

    def _send(self, entry: Callable[[], None]) -> None:
        """Sends an entry to wandb. After the first failure nothing more is sent."""
        if self.run:
            try:
                entry()
            except Exception as error:
                print(f"wandb: {error}; continuing without it")
                self.run = None

    def close(self) -> None:
        """Flushes and closes both logs."""
        with suppress(OSError):  # what a full disk did not take has been reported
            self.file.close()
        if self.drawn < math.inf:
            self.draw()
        self._send(lambda: self.run.finish())
