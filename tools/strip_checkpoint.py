#!/usr/bin/env python3
"""Makes a checkpoint fit to ship: without optimizer, random state and position in the data, and without the
absolute paths of the machine that trained it.

python tools/strip_checkpoint.py runs/world/best.pt outputs/world.pt
python tools/strip_checkpoint.py runs/world/best.pt outputs/world.pt --half    # bfloat16: half the size
python tools/strip_checkpoint.py runs/depth/best.pt outputs/depth.pt --half --base checkpoints/depth.pt
python tools/strip_checkpoint.py --sums        # writes checkpoints/SHA256SUMS anew
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.checkpoint import build, load, save, write_sums
from runtime.config import ScriptParser
from runtime.errors import run_script
from runtime.outputs import check_outputs
from runtime.provenance import display_path
from vq_vae.tokenizer import TOKENIZER_KIND, checksum
from vq_vae.vq_vae import VQVAE, VQVAEConfig

EXAMPLE = "python tools/strip_checkpoint.py runs/world/best.pt outputs/world.pt  (seconds)"

TRAINING_ONLY = (
    *("optimizer", "scaler", "rng", "position", "pairs", "pair_maker", "trained"),
    *("discriminator", "discriminator_optimizer", "discriminator_updates"),
)


def strip(source: Path, target: Path, half: bool, base: Path | None = None) -> None:
    """Copies a checkpoint without what only training needs, `half`: `halved`, `base`: `as_in_base`. Raises
    CheckpointError or OutputError."""
    check_outputs([target], [source, *([base] if base else [])])
    content = stripped(load(source))
    if half:
        rounded = halved(content, source)
        content = as_in_base(content, rounded, load(base, content["kind"])) if base else rounded
    save(target, content)


def as_in_base(content: dict, rounded: dict, base: dict) -> dict:
    """`rounded`, but weights of `content` that were not trained since `base` are those of `base`: where most
    of a network was frozen, git then stores a small difference."""
    weights = dict(rounded["model"])
    for name, tensor in base["model"].items():
        if name in weights and torch.equal(tensor.to(content["model"][name].dtype), content["model"][name]):
            weights[name] = tensor
    return {**rounded, "model": weights}


def halved(content: dict, source: Path) -> dict:
    """A checkpoint's content with float32 weights rounded to bfloat16, which are read as float32 again.

    Of a tokenizer only the decoder is rounded: tokens depend on the rest.
    """
    tokenizer = content["kind"] == TOKENIZER_KIND
    weights = {
        name: tensor.bfloat16()
        if tensor.dtype == torch.float32 and (not tokenizer or name.startswith("decoder."))
        else tensor
        for name, tensor in content["model"].items()
    }
    content = {**content, "model": weights}
    if tokenizer:
        content["checksum"] = checksum(build(VQVAE, VQVAEConfig, content, source))
    return content


def stripped(content: dict) -> dict:
    """A checkpoint's content without what only training needs, and without absolute paths."""
    content = {name: value for name, value in content.items() if name not in TRAINING_ONLY}
    if "constants" in content:
        content["constants"] = {name: without_paths(value) for name, value in content["constants"].items()}
    return content


def without_paths(value: object) -> object:
    """A constant with its absolute paths cut to what `display_path` shows; commas separate several."""
    if not isinstance(value, str):
        return value
    return ",".join(display_path(part) if os.path.isabs(part) else part for part in value.split(","))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE)
    parser.add_argument("source", type=Path, nargs="?", help="training checkpoint")
    parser.add_argument("target", type=Path, nargs="?", help="file to write")
    parser.add_argument("--sums", action="store_true", help="write checkpoints/SHA256SUMS anew")
    parser.add_argument("--half", action="store_true", help="weights as bfloat16: half the size")
    parser.add_argument(
        "--base", type=Path, help="with --half: a file whose weights stay where they are equal"
    )
    args = parser.parse_args(arguments)
    if args.sums:
        return run_script(write_sums)
    if args.target is None:
        parser.error("give SOURCE and TARGET, or --sums")
    if args.base and not args.half:
        parser.error("--base needs --half: only weights that are rounded can differ from those of the base")
    return run_script(lambda: strip(args.source, args.target, args.half, args.base))


if __name__ == "__main__":
    raise SystemExit(main())
