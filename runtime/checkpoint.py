"""Saving and loading of networks: the only torch.save and torch.load in the repo.

A checkpoint is a dict of tensors and plain values. tools/strip_checkpoint.py makes one small enough to ship.
"""

import hashlib
import io
import pickle
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.errors import UserError, one_line
from runtime.outputs import write_bytes, write_text

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints"
SUMS = SHIPPED / "SHA256SUMS"  # of the shipped files, in the format of sha256sum
WEIGHTS = ("model", "trained")  # entries of a checkpoint that hold weights


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, of another kind, or made for another tokenizer."""


def save(path: str | Path, content: dict) -> None:
    """Writes a checkpoint, complete or not at all.

    Raises CheckpointError for weights that are not finite, so that they never replace good ones, and
    OutputError if the file cannot be written.
    """
    if name := not_finite(content):
        raise CheckpointError(
            f"{path}: not written, because the weights {name} are not finite (NaN or infinite); lower LR or "
            "use PRECISION=fp32, and run again to continue from the last checkpoint"
        )
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError and may end the interpreter
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def not_finite(content: dict) -> str:
    """The name of a weight in a checkpoint that is not finite; "" if all of them are."""
    for group in WEIGHTS:
        for name, tensor in content.get(group, {}).items():
            if torch.is_tensor(tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                return name
    return ""


def load(path: str | Path, kind: str | None = None, needed: Collection[str] = ()) -> dict:
    """Reads a checkpoint onto the CPU with weights_only=True.

    Raises CheckpointError if it is missing, unreadable, not of `kind`, without an entry that is `needed`, or
    a shipped file with a wrong checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; train one or give the path of one that exists")
    check_sum(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # PyTorch's own message advises to load it in spite of that
        raise CheckpointError(
            f"{path}: not a readable checkpoint: it holds more than tensors and plain values, and loading "
            "that could run code; give a file that this project wrote"
        ) from None
    except Exception as error:  # a damaged file can fail in any way
        reason = textwrap.shorten(one_line(error), 200)
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason}); copy or train it again"
        ) from None
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if kind is not None and found != kind:
        raise CheckpointError(
            f"{path}: expected a checkpoint of kind {kind!r}, found {textwrap.shorten(repr(found), 100)}; "
            "give the right file"
        )
    if kind is not None:
        require(content, ("config", "model", *needed), path)
    return content


def require(content: dict, names: Collection[str], path: str | Path) -> None:
    """Raises CheckpointError if the checkpoint in `path` lacks one of these entries, or if its config or
    weights are not dicts."""
    missing = [name for name in names if name not in content]
    if missing:
        raise CheckpointError(
            f"{path}: has no {', '.join(missing)}; give a checkpoint that was written for this purpose (a "
            "stripped one can be played, but training cannot continue from it)"
        )
    for name in ("config", "model"):
        if not isinstance(content[name], Mapping):
            raise CheckpointError(
                f"{path}: expected a dict as its {name}, found {type(content[name]).__name__}; copy or train "
                "it again"
            )


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
    write_text(SUMS, "".join(f"{sha256(file)}  {name}\n" for file, name in zip(files, names, strict=True)))


def content_of(kind: str, model: nn.Module, **extra) -> dict:
    """The dict that `build` reads: a network's config and weights, with `extra` plain values."""
    return {"kind": kind, "config": asdict(model.config), "model": model.state_dict(), **extra}


def fingerprint(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> str:
    """16 hex digits: sha256 of the fields of a network's config and of its weights, both by name."""
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def build(
    make: Callable[[object], nn.Module], config_class: type, content: dict, path: str | Path
) -> nn.Module:
    """The model that a checkpoint describes, with its weights: `make` of its config.

    Raises CheckpointError if config and weights do not fit, or if a weight is not finite.
    """
    if name := not_finite(content):
        raise CheckpointError(
            f"{path}: its weights {name} are not finite (NaN or infinite): the training failed; give an "
            "earlier checkpoint or train again"
        )
    try:
        model = make(config_class(**content["config"]))
        model.load_state_dict(content["model"], strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 300)  # one line, however many tensors do not fit
        raise CheckpointError(f"{path}: its weights do not fit its own config: {reason}") from None
    return model


@contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong in its block, which restores a run's state from `path`, into CheckpointError."""
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: training cannot continue from it ({one_line(error)[:200]}); rename an older one "
            "beside it to this name, or give RESUME=False"
        ) from None


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
