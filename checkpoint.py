"""Saving and loading, for the tokenizer and the world model: the only torch.save and torch.load in the repo.

A checkpoint is a dict of tensors and plain values. `python checkpoint.py IN OUT` strips a training checkpoint to
what play needs (no optimizer, no RNG state).
"""

import hashlib
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from model_convGru import ConvGRUWorldModel, WorldModelConfig
from vq_vae.vq_vae import VQVAE, VQVAEConfig

SHIPPED = Path(__file__).resolve().parent / "checkpoints"
SHIPPED_TOKENIZER, SHIPPED_WORLD = SHIPPED / "vqvae.pt", SHIPPED / "world.pt"
TOKENIZER_KIND, WORLD_KIND = "vq_vae", "world_model"


class CheckpointError(RuntimeError):
    """A file that is missing, broken, of another kind, or made for another tokenizer."""


def fingerprint(tokenizer: VQVAE) -> str:
    """16 hex digits that change when the tokenizer's codes or pictures could: sha256 of its weights."""
    digest = hashlib.sha256(repr(sorted(asdict(tokenizer.config).items())).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if "ema_" not in name:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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

    Raises CheckpointError, naming the file and what to do, if it is missing, unreadable or not of `kind`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; train one or give the path of one that exists")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError) as error:
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


def _fill(model: nn.Module, state: dict, path: str | Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit its own config: {error}") from None


def tokenizer_content(tokenizer: VQVAE, **extra) -> dict:
    """The dict that `load_tokenizer` reads, with `extra` plain values (constants, step, metrics, ...)."""
    return {
        "kind": TOKENIZER_KIND,
        "config": asdict(tokenizer.config),
        "model": tokenizer.state_dict(),
        "fingerprint": fingerprint(tokenizer),
        **extra,
    }


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> VQVAE:
    """The tokenizer in `path`, frozen, in eval mode, on `device`, with its fingerprint as `.fingerprint`."""
    content = load(path, TOKENIZER_KIND)
    tokenizer = VQVAE(VQVAEConfig(**content["config"]))
    _fill(tokenizer, content["model"], path)
    found = fingerprint(tokenizer)
    if found != content["fingerprint"]:
        raise CheckpointError(
            f"{path}: its weights have fingerprint {found}, the file says {content['fingerprint']}; "
            "it was changed after it was written: copy or train it again"
        )
    tokenizer.fingerprint = found
    return tokenizer.requires_grad_(False).eval().to(device)


def world_content(model: ConvGRUWorldModel, tokenizer_fingerprint: str, **extra) -> dict:
    """The dict that `load_world_model` reads, with `extra` (constants, step, optimizer, RNG, fps, ...)."""
    return {
        "kind": WORLD_KIND,
        "config": asdict(model.config),
        "model": model.state_dict(),
        "tokenizer": tokenizer_fingerprint,
        **extra,
    }


def check_tokenizer(expected: str, found: str, what: str, whose: str) -> None:
    """Raises CheckpointError unless two tokenizer fingerprints agree.

    `what` names the thing that was made by tokenizer `found`; `whose` names the file that wants `expected`.
    """
    if expected != found:
        raise CheckpointError(
            f"{what} was made by tokenizer {found}, but {whose} belongs to tokenizer {expected}; "
            f"change one of the two: encode the clips again with that tokenizer, or use the files that go together"
        )


def load_world_model(
    path: str | Path, tokenizer: VQVAE, device: torch.device | str = "cpu"
) -> tuple[ConvGRUWorldModel, dict]:
    """The world model in `path` in eval mode on `device`, and the checkpoint's whole content.

    Raises CheckpointError if it was trained on the tokens of another tokenizer.
    """
    content = load(path, WORLD_KIND)
    check_tokenizer(
        content["tokenizer"], tokenizer.fingerprint, "the tokenizer checkpoint (--vqvae_ckpt)", str(path)
    )
    model = ConvGRUWorldModel(WorldModelConfig(**content["config"]))
    _fill(model, content["model"], path)
    return model.eval().to(device), content


def strip(source: str | Path, target: str | Path) -> None:
    """Copies a checkpoint without what only training needs."""
    content = load(source)
    for name in ("optimizer", "scaler", "rng", "position"):
        content.pop(name, None)
    save(target, content)


if __name__ == "__main__":
    if len(sys.argv) != 3 or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        raise SystemExit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    strip(sys.argv[1], sys.argv[2])
