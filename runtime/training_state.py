"""What the trainers share: learning rate, optimizer step, averaged weights, saved state, when to save."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from runtime import checkpoint
from runtime.errors import UserError

MOST_SKIPPED = 30  # steps in a row; fp16 leaves out some at the start, until its loss scale fits
ENTRIES = ("step", "best", "seconds", "metrics", "optimizer", "scaler", "rng")  # of TrainingState.content


class NonFiniteError(UserError):
    """A training run whose loss or gradient is no longer finite."""


class FiniteSteps:
    """Tells which optimizer steps to take: not those with a loss or gradient that is not finite."""

    def __init__(self, skipped: int = 0):
        self.skipped = skipped  # steps left out
        self.in_a_row = 0

    def check(self, step: int, loss: float, grad_norm: float) -> bool:
        """True if both are finite; otherwise counts and prints the step.

        Raises NonFiniteError after MOST_SKIPPED steps in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        tqdm.write(f"step {step}: loss {loss:.3g}, gradient norm {grad_norm:.3g}: the step is left out")
        if self.in_a_row == MOST_SKIPPED:
            raise NonFiniteError(
                f"the loss or the gradient of the last {MOST_SKIPPED} steps, up to step {step}, was not "
                "finite (NaN or infinite); the last checkpoint is kept: lower LR or use PRECISION=fp32, and "
                "run again to continue from it"
            )
        return False


def warmup_cosine(step: int, peak: float, final: float, warmup_steps: int, steps: int) -> float:
    """Learning rate: linear warm-up to `peak` in `warmup_steps`, then cosine decay to `final` at `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


class MovingAverage:
    """An exponential moving average of a network's weights. It is what is validated and used."""

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """After optimizer step `step`. At first the average follows fast: the start must not stay in it."""
        decay = min(self.decay, step / (step + 10))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)


@dataclass
class TrainingState:
    """The network, its optimizer, its loss scaler (for fp16) and the counters of a run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    step: int = 0
    best: float = math.inf  # lowest validation loss so far
    seconds: float = 0.0  # spent in training
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    finite: FiniteSteps = field(default_factory=FiniteSteps)
    average: MovingAverage | None = None

    @property
    def used(self) -> nn.Module:
        """The network that is validated and saved as `model`: the average, if there is one."""
        return self.average.network if self.average else self.model

    def set_learning_rate(self, value: float) -> None:
        """Sets that of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def update(
        self, loss: Tensor, clip: float, average_gradients: Callable[[nn.Module], None] = lambda model: None
    ) -> float:
        """Backward pass, gradient clipping and optimizer step -> the gradient's norm before clipping.

        `average_gradients` replaces the gradients by their means over several processes. With a loss or
        gradient that is not finite the weights stay as they are, and the step counts as skipped, in all
        processes. Raises NonFiniteError if there are too many in a row.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        loss = float(loss.detach())
        if not math.isfinite(loss):  # its gradient may be finite; the other processes know only gradients
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        if self.finite.check(self.step + 1, loss, grad_norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average:
            self.average.update(self.model, self.step)
        return grad_norm

    def content(self) -> dict:
        """What a checkpoint holds of it, besides config and weights (`checkpoint.content_of`)."""
        return {
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "metrics": self.metrics,
            **({"trained": self.model.state_dict()} if self.average else {}),
            "skipped": self.finite.skipped,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(self.device),
        }

    def restore(self, content: dict, path: str | Path) -> None:
        """Continues from the content of the checkpoint `path`, random generators included.

        Raises CheckpointError if the checkpoint is of a network with another config, or if an entry does not
        fit.
        """
        checkpoint.require(content, ENTRIES, path)
        checkpoint.check_config(content, self.model.config, path)
        with checkpoint.restoring(path):
            self.model.load_state_dict(content["trained" if self.average else "model"])
            if self.average:
                self.average.network.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if content["scaler"]:  # empty: saved in another precision than fp16
                self.scaler.load_state_dict(content["scaler"])
            checkpoint.restore_rng(content["rng"], self.device)
            self.step, self.best = int(content["step"]), float(content["best"])
            self.seconds, self.metrics = float(content["seconds"]), dict(content["metrics"])
            self.finite = FiniteSteps(int(content.get("skipped", 0)))
        print(f"resumed {path} at step {self.step}")


class SaveTimer:
    """Tells when to save: every so many steps, and when so many minutes have passed since the last time."""

    def __init__(self, steps: int, minutes: float):
        self.steps, self.seconds = steps, 60 * minutes
        self.saved = time.monotonic()

    def due(self, step: int) -> bool:
        """True if a checkpoint should be written after this step; the minutes then start anew."""
        due = step % self.steps == 0 or time.monotonic() - self.saved > self.seconds
        if due:
            self.saved = time.monotonic()
        return due
