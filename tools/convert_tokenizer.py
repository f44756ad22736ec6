#!/usr/bin/env python3
"""Brings in a tokenizer checkpoint in the old form, a dict of state dicts {encoder, decoder, quantizer}.

    python tools/convert_tokenizer.py old_vqvae.pt runs/old/vqvae.pt

The layers must be those of this project's tokenizer (vq_vae/vq_vae.py) under its names: `0.weight` to
`8.bias` in the encoder, `0.weight` to `6.bias` in the decoder. The quantizer may hold its codes as
`codebook` [V, D], or as `embedding` [D, V] with `cluster_size` and `embedding_avg`. All sizes are read from
the tensors, the picture's from the entry `config` (image_height, image_width) or the flags. Nothing is
guessed, left out or filled up: a tensor too many, too few or of another shape refuses the file. Optimizer
state is left out.

Tokens belong to a tokenizer: encode the clips again with the result (preprocess.py --vqvae_ckpt).
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from runtime.checkpoint import CheckpointError, load, not_finite, save
from runtime.config import ScriptParser
from runtime.errors import run_script
from runtime.outputs import check_outputs
from runtime.ranges import PictureSide, flag
from vq_vae.tokenizer import tokenizer_content
from vq_vae.vq_vae import VQVAE, VQVAEConfig

EXAMPLE = "python tools/convert_tokenizer.py OLD.pt NEW.pt  (seconds; OLD.pt: {encoder, decoder, quantizer})"

COMPONENTS = ("encoder", "decoder", "quantizer")
CODES = {"codebook": "codebook", "ema_count": "ema_count", "ema_sum": "ema_sum", "initialised": "initialised"}
OLD_CODES = {"embedding": "codebook", "cluster_size": "ema_count", "embedding_avg": "ema_sum"}
TRANSPOSED = ("embedding", "embedding_avg")  # [D, V] in the old form
SHOWN = 4  # names in an error


def components(content: object, path: Path) -> dict[str, dict[str, Tensor]]:
    """The three state dicts of an old checkpoint. Raises CheckpointError if they are not there."""
    found = content if isinstance(content, Mapping) else {}
    if found.get("kind") is not None:
        raise CheckpointError(f"{path}: a checkpoint of kind {found['kind']!r}, which needs no conversion")
    missing = [name for name in COMPONENTS if not isinstance(found.get(name), Mapping)]
    if missing:
        what = ", ".join(sorted(map(str, found))[:8]) or type(content).__name__
        raise CheckpointError(
            f"{path}: expected the state dicts encoder, decoder and quantizer, found {what[:200]}; give an "
            "old tokenizer checkpoint"
        )
    parts = {name: dict(found[name]) for name in COMPONENTS}
    for component, weights in parts.items():
        wrong = [name for name, value in weights.items() if not torch.is_tensor(value)]
        if wrong:
            raise CheckpointError(f"{path}: {component}.{wrong[0]} is no tensor; give another file")
    return parts


def quantizer_weights(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The quantizer's buffers under today's names. Raises CheckpointError for others."""
    for names in (CODES, OLD_CODES):
        if set(weights) == set(names):
            found = {
                new: weights[old].T.contiguous() if old in TRANSPOSED else weights[old]
                for old, new in names.items()
            }
            return {"initialised": torch.tensor(True)} | found
    raise CheckpointError(
        f"{path}: expected a quantizer with {', '.join(OLD_CODES)} or {', '.join(CODES)}, found "
        f"{', '.join(sorted(weights)[:8])}; it cannot be converted: train a tokenizer anew"
    )


def config_of(weights: dict[str, Tensor], size: tuple[int, int], path: Path) -> VQVAEConfig:
    """The sizes of a tokenizer from its tensors; `size`: height and width of the picture, pixels.

    Raises CheckpointError.
    """
    blocks = {match[1] for name in weights if (match := re.match(r"encoder\.(\d+)\.layers\.", name))}
    try:
        codes, embedding = weights["quantizer.codebook"].shape
        return VQVAEConfig(*size, codes, embedding, weights["encoder.2.weight"].shape[0], len(blocks))
    except (KeyError, IndexError, ValueError) as error:
        found = ", ".join(name for name in weights if name.startswith("encoder."))
        raise CheckpointError(
            f"{path}: its encoder has not the layers of this project's tokenizer ({error}): found "
            f"{found[:150]} ...; it cannot be converted: train a tokenizer anew"
        ) from None


def convert(content: object, path: Path, height: int | None, width: int | None) -> dict:
    """The content of a tokenizer checkpoint of today. Raises CheckpointError."""
    parts = components(content, path)
    parts["quantizer"] = quantizer_weights(parts["quantizer"], path)
    weights = {
        f"{component}.{name}": tensor.float() if tensor.is_floating_point() else tensor
        for component, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    saved = content.get("config")
    saved = saved if isinstance(saved, Mapping) else {}
    size = (height or saved.get("image_height"), width or saved.get("image_width"))
    if not all(type(side) is int and 0 < side <= 4096 for side in size):
        raise CheckpointError(f"{path}: does not name the size of its pictures; give --height and --width")
    config = config_of(weights, size, path)
    with torch.random.fork_rng(devices=[]):
        model = VQVAE(config)
    wanted = model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in wanted]
    problems += [
        f"{name} is {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{path}: its layers are not those of this project's tokenizer: {'; '.join(problems[:SHOWN])}"
            f"{more}; it cannot be converted: train a tokenizer anew"
        )
    if name := not_finite({"model": weights}):
        raise CheckpointError(f"{path}: its weights {name} are not finite; give an earlier checkpoint")
    model.load_state_dict(weights, strict=True)
    return tokenizer_content(model)


def run(source: Path, target: Path, height: int | None, width: int | None) -> None:
    """Reads, converts and writes. Raises CheckpointError or OutputError."""
    check_outputs([target], [source])
    if target.exists():
        raise CheckpointError(f"{target}: exists; give a new file to write")
    content = convert(load(source), source, height, width)
    save(target, content)
    config = content["config"]
    print(
        f"wrote {target}: tokenizer {content['fingerprint']}, {config['width']}x{config['height']} pixels, "
        f"{config['codebook_size']} codes; look at it: "
        f"python vq_vae/vq_vae_inference.py --vqvae_ckpt {target}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE)
    parser.add_argument("source", type=Path, help="old checkpoint")
    parser.add_argument("target", type=Path, help="new file to write")
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}", type=flag(PictureSide), help="of the pictures, if it is not in SOURCE"
        )
    args = parser.parse_args(arguments)
    return run_script(lambda: run(args.source, args.target, args.height, args.width))


if __name__ == "__main__":
    raise SystemExit(main())
