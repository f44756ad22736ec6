"""Saving and loading, for every network: the only torch.save and torch.load in the repo.

A checkpoint is a dict of tensors and plain values. `python checkpoint.py IN OUT` strips a training checkpoint
to what play needs (no optimizer, no RNG state); `python checkpoint.py --sums` writes checkpoints/SHA256SUMS
anew.
"""

import hashlib
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from model_convGru import ConvGRUWorldModel, WorldModelConfig
from model_geometry import GeometryConfig, GeometryWorldModel
from settings import fail
from vq_vae.vq_vae import VQVAE, VQVAEConfig

SHIPPED = Path(__file__).resolve().parent / "checkpoints"
SHIPPED_TOKENIZER, SHIPPED_WORLD = SHIPPED / "vqvae.pt", SHIPPED / "world.pt"
SHIPPED_INVERSE_DYNAMICS = SHIPPED / "idm.pt"
SUMS = SHIPPED / "SHA256SUMS"  # of the files that ship, as sha256sum writes and checks them
WorldModel = ConvGRUWorldModel | GeometryWorldModel
ARCHITECTURES = {
    "convgru": (ConvGRUWorldModel, WorldModelConfig),
    "geometry": (GeometryWorldModel, GeometryConfig),
}
TOKENIZER_KIND, WORLD_KIND, INVERSE_DYNAMICS_KIND = "vq_vae", "world_model", "inverse_dynamics"


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

    Raises CheckpointError, naming the file and what to do, if it is missing, unreadable or not of `kind`, or
    ships with another checksum.
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
    """Of a file's content, in hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_sum(path: Path) -> None:
    """Raises CheckpointError if a file that ships is not the one that SUMS names."""
    if path.resolve().parent != SUMS.parent or not SUMS.is_file():
        return
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in SUMS.read_text().splitlines())}
    found = sha256(path)
    if sums.get(path.name, found) != found:
        raise CheckpointError(
            f"{path}: its sha256 begins with {found[:12]}, {SUMS.name} says {sums[path.name][:12]}: damaged "
            "or fetched in part: get it again; or run python checkpoint.py --sums, if it is your own"
        )


def write_sums() -> None:
    """Writes SUMS for the weights and start places in its folder."""
    files = sorted([*SUMS.parent.glob("*.pt"), *SUMS.parent.glob("starts/*.npz")])
    names = (file.relative_to(SUMS.parent).as_posix() for file in files)
    SUMS.write_text("".join(f"{sha256(file)}  {name}\n" for file, name in zip(files, names, strict=True)))


def content_of(kind: str, model: nn.Module, **extra) -> dict:
    """The dict that `build` reads: a network's config and weights, with `extra` plain values."""
    return {"kind": kind, "config": asdict(model.config), "model": model.state_dict(), **extra}


def build(model_class: type[nn.Module], config_class: type, content: dict, path: str | Path) -> nn.Module:
    """The model that a checkpoint describes, with its weights; CheckpointError where the two do not fit."""
    try:
        model = model_class(config_class(**content["config"]))
        model.load_state_dict(content["model"], strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 300)  # one line, however many tensors are at odds
        raise CheckpointError(f"{path}: its weights do not fit its own config: {reason}") from None
    return model


def tokenizer_content(tokenizer: VQVAE, **extra) -> dict:
    """The dict that `load_tokenizer` reads, with `extra` plain values (constants, step, metrics, ...)."""
    return content_of(TOKENIZER_KIND, tokenizer, fingerprint=fingerprint(tokenizer), **extra)


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> VQVAE:
    """The tokenizer in `path`, frozen, in eval mode, on `device`, with its fingerprint as `.fingerprint`."""
    content = load(path, TOKENIZER_KIND)
    tokenizer = build(VQVAE, VQVAEConfig, content, path)
    found = fingerprint(tokenizer)
    if found != content["fingerprint"]:
        raise CheckpointError(
            f"{path}: its weights have fingerprint {found}, the file says {content['fingerprint']}; "
            "it was changed after it was written: copy or train it again"
        )
    tokenizer.fingerprint = found
    return tokenizer.requires_grad_(False).eval().to(device)


def architecture_of(model: WorldModel) -> str:
    """The name in ARCHITECTURES of a world model's class."""
    return next(name for name, (kind, _) in ARCHITECTURES.items() if isinstance(model, kind))


def world_content(model: WorldModel, tokenizer_fingerprint: str, **extra) -> dict:
    """The dict that `load_world_model` reads, with `extra` (constants, step, optimizer, RNG, fps, ...)."""
    return content_of(
        WORLD_KIND, model, tokenizer=tokenizer_fingerprint, architecture=architecture_of(model), **extra
    )


def check_tokenizer(expected: str, found: str, what: str, whose: str) -> None:
    """Raises CheckpointError unless two tokenizer fingerprints agree.

    `what` names the thing that was made by tokenizer `found`; `whose` names the file that wants `expected`.
    """
    if expected != found:
        raise CheckpointError(
            f"{what} was made by tokenizer {found}, but {whose} belongs to tokenizer {expected}; "
            "change one of the two: encode the clips again, or give files that belong together"
        )


def load_world_model(
    path: str | Path, tokenizer: VQVAE, device: torch.device | str = "cpu"
) -> tuple[WorldModel, dict]:
    """The world model in `path` in eval mode on `device`, and the checkpoint's whole content.

    Raises CheckpointError if it was trained on the tokens of another tokenizer, or is of an architecture that
    this version does not know.
    """
    content = load(path, WORLD_KIND)
    check_tokenizer(
        content["tokenizer"], tokenizer.fingerprint, "the tokenizer checkpoint (--vqvae_ckpt)", str(path)
    )
    # Checkpoints from before there were two say nothing.
    architecture = content.get("architecture", "convgru")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: of architecture {architecture!r}, this version knows {sorted(ARCHITECTURES)}; "
            "update the code or give another checkpoint"
        )
    model = build(*ARCHITECTURES[architecture], content, path)
    if architecture == "geometry":
        model.attach(tokenizer)
    return model.eval().to(device), content


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random generators that a run on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts the random generators back to a saved `rng_state`; a run that moved to a GPU starts anew there."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def check_config(content: dict, config: object, path: str | Path) -> None:
    """Raises CheckpointError unless the run in `path` was of a model with this config dataclass."""
    if content["config"] != asdict(config):
        raise CheckpointError(
            f"{path}: was trained with {content['config']}, the constants now give {asdict(config)}; "
            "give the same, or another OUT_DIR, RESUME=False or no INIT_FROM"
        )


def strip(source: str | Path, target: str | Path) -> None:
    """Copies a checkpoint without what only training needs."""
    content = load(source)
    for name in ("optimizer", "scaler", "rng", "position"):
        content.pop(name, None)
    save(target, content)


if __name__ == "__main__":
    if sys.argv[1:] == ["--sums"]:
        write_sums()
        raise SystemExit(0)
    if len(sys.argv) != 3 or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        raise SystemExit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    try:
        strip(sys.argv[1], sys.argv[2])
    except CheckpointError as error:
        fail(str(error))
