"""Saving and loading of networks: the only torch.save and torch.load in the repo.

A checkpoint is a dict of tensors and plain values. tools/strip_checkpoint.py makes one small enough to ship.
"""

import hashlib
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.errors import UserError

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints"
SUMS = SHIPPED / "SHA256SUMS"  # of the shipped files, in the format of sha256sum


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, of another kind, or made for another tokenizer."""


def save(path: str | Path, content: dict) -> None:
    """Writes atomically: to a temporary name beside `path`, flushed to disk, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | Path, kind: str | None = None) -> dict:
    """Reads a checkpoint onto the CPU with weights_only=True.

    Raises CheckpointError if it is missing, unreadable, not of `kind`, or a shipped file with a wrong
    checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; train one or give the path of one that exists")
    check_sum(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason}); copy or train it again"
        ) from None
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if kind is not None and found != kind:
        raise CheckpointError(
            f"{path}: expected a checkpoint of kind {kind!r}, found {found!r}; give the right file"
        )
    return content


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_sum(path: Path) -> None:
    """Raises CheckpointError if a shipped file does not have the checksum in SUMS."""
    if path.resolve().parent != SUMS.parent or not SUMS.is_file():
        return
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in SUMS.read_text().splitlines())}
    found = sha256(path)
    if sums.get(path.name, found) != found:
        raise CheckpointError(
            f"{path}: its sha256 begins with {found[:12]}, {SUMS.name} says {sums[path.name][:12]}: it is "
            "damaged or incomplete: download it again; for your own: python tools/strip_checkpoint.py --sums"
        )


def write_sums() -> None:
    """Writes SUMS for the shipped weights and start places."""
    files = sorted([*SUMS.parent.glob("*.pt"), *SUMS.parent.glob("starts/*.npz")])
    names = (file.relative_to(SUMS.parent).as_posix() for file in files)
    SUMS.write_text("".join(f"{sha256(file)}  {name}\n" for file, name in zip(files, names, strict=True)))


def content_of(kind: str, model: nn.Module, **extra) -> dict:
    """The dict that `build` reads: a network's config and weights, with `extra` plain values."""
    return {"kind": kind, "config": asdict(model.config), "model": model.state_dict(), **extra}


def fingerprint(config: object, weights: Mapping[str, Tensor]) -> str:
    """16 hex digits: sha256 of a network's config, a dataclass, and of its weights by name."""
    digest = hashlib.sha256(repr(sorted(asdict(config).items())).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def build(
    make: Callable[[object], nn.Module], config_class: type, content: dict, path: str | Path
) -> nn.Module:
    """The model that a checkpoint describes, with its weights: `make` of its config.

    Raises CheckpointError if config and weights do not fit.
    """
    try:
        model = make(config_class(**content["config"]))
        model.load_state_dict(content["model"], strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 300)  # one line, however many tensors do not fit
        raise CheckpointError(f"{path}: its weights do not fit its own config: {reason}") from None
    return model


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random generators that a run on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores the random generators from `rng_state`. A GPU generator that was not saved stays as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_config(content: dict, config: object, path: str | Path) -> None:
    """Raises CheckpointError unless the checkpoint in `path` is of a model with this config (a dataclass)."""
    if content["config"] != asdict(config):
        raise CheckpointError(
            f"{path}: was trained with {content['config']}, the constants now give {asdict(config)}; "
            "give the same, or another OUT_DIR, RESUME=False or no INIT_FROM"
        )
