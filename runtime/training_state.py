"""What the trainers share: learning rate, averaged weights, saved state, when to save."""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from runtime import checkpoint


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
    average: MovingAverage | None = None

    @property
    def used(self) -> nn.Module:
        """The network that is validated and saved as `model`: the average, if there is one."""
        return self.average.network if self.average else self.model

    def set_learning_rate(self, value: float) -> None:
        """Sets that of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def content(self) -> dict:
        """What a checkpoint holds of it, besides config and weights (`checkpoint.content_of`)."""
        return {
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "metrics": self.metrics,
            **({"trained": self.model.state_dict()} if self.average else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(self.device),
        }

    def restore(self, content: dict, path: str | Path) -> None:
        """Continues from the content of the checkpoint `path`, random generators included.

        Raises CheckpointError if the checkpoint is of a network with another config.
        """
        checkpoint.check_config(content, self.model.config, path)
        self.model.load_state_dict(content.get("trained", content["model"]))
        if self.average:
            self.average.network.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        checkpoint.restore_rng(content["rng"], self.device)
        self.step, self.best = content["step"], content["best"]
        self.seconds, self.metrics = content["seconds"], content["metrics"]
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
