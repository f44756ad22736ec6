#!/usr/bin/env python3
"""Packs a trained world into one file that plays on another machine.

    python tools/pack_world.py outputs/my.zip --checkpoint runs/world/best.pt
    python live_inference.py --world outputs/my.zip        # there

The file holds the world model, its tokenizer and depth network, the start places in --starts (default: those
that ship), a card, and checksums (rollout/world_file.py). Optimizer and random state are left out, as by
tools/strip_checkpoint.py. Everything is loaded once before, so a file that was written plays.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.token_files import MANIFEST, DataError
from depth.predictor import SHIPPED_DEPTH
from rollout.context import START_PLACES, load_recording, load_world, start_places
from rollout.world_file import CARD, DEPTH, MOST_BYTES, STARTS, TOKENIZER, WORLD, write_world_file
from rollout.world_model import SHIPPED_WORLD
from runtime import checkpoint
from runtime.config import ScriptParser
from runtime.errors import run_script
from runtime.outputs import check_outputs
from tools.strip_checkpoint import stripped
from vq_vae.tokenizer import SHIPPED_TOKENIZER

EXAMPLE = "python tools/pack_world.py outputs/world.zip  (seconds; packs the world that ships)"


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    checkpoint: Path
    vqvae_ckpt: Path
    depth_ckpt: Path
    starts: Path
    card: Path | None


def default_card(name: str, content: dict) -> str:
    """A card of a world from its checkpoint's content: what it is, what it was trained on and how far."""
    data, metrics, constants = (content.get(key) or {} for key in ("data", "metrics", "constants"))
    lines = [f"# {name}", "", f"A world model of Project Ochre, architecture {content.get('architecture')}."]
    lines += ["", f"- tokenizer: {content['tokenizer']}; depth network: {content.get('depth', 'none')}"]
    lines += [f"- data: {data.get('fps', '?')} frames/s; trained for {content.get('step', '?')} steps"]
    lines += [f"- {name}: {value:.4g}" for name, value in sorted(metrics.items()) if isinstance(value, float)]
    if constants:
        lines += ["", "Constants of the training: " + ", ".join(f"{k}={v}" for k, v in constants.items())]
    return "\n".join(lines) + "\n"


def run(options: Options) -> None:
    """Checks everything and writes the file. Raises UserError."""
    read = [options.checkpoint, options.vqvae_ckpt, options.depth_ckpt, options.starts]
    check_outputs([options.out], [*read, *([options.card] if options.card else [])])
    if options.out.suffix != ".zip":
        raise DataError(f"{options.out}: expected a name that ends in .zip; give one")
    world = load_world(options.checkpoint, options.vqvae_ckpt, "cpu", "fp32", options.depth_ckpt)
    places = start_places(options.starts)
    if not places:
        raise DataError(
            f"{options.starts / MANIFEST}: lists no start place; cut some: tools/cut_start_places.py"
        )
    for path in places.values():
        load_recording(path, world)
    content = stripped(checkpoint.load(options.checkpoint))
    buffer = io.BytesIO()
    torch.save(content, buffer)
    card = options.card.read_bytes() if options.card else default_card(options.out.stem, content).encode()
    if len(card) > MOST_BYTES[".md"]:
        raise DataError(f"{options.card}: longer than 1 MB; give a text")
    members: dict[str, bytes | Path] = {
        CARD: card,
        WORLD: buffer.getvalue(),
        TOKENIZER: options.vqvae_ckpt,
        f"{STARTS}/{MANIFEST}": options.starts / MANIFEST,
    }
    if hasattr(world.model, "depth"):
        members[DEPTH] = options.depth_ckpt
    members |= {f"{STARTS}/{path.name}": path for path in places.values()}
    write_world_file(options.out, members)
    print(
        f"wrote {options.out}: {options.out.stat().st_size / 1e6:.0f} MB, {len(places)} start places; "
        f"play it with: python live_inference.py --world {options.out}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE, allow_abbrev=False)
    add = parser.add_argument
    add("out", type=Path, metavar="NAME.zip", help="file to write")
    add("--checkpoint", type=Path, default=SHIPPED_WORLD, help="world model (default: ships)")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="its tokenizer (default: ships)")
    add("--depth_ckpt", type=Path, default=SHIPPED_DEPTH, help="its depth network (default: ships)")
    add("--starts", type=Path, default=START_PLACES, help="folder of start places (default: those that ship)")
    add("--card", type=Path, help="text on the world (default: made of the checkpoint)")
    options = Options(**vars(parser.parse_args(arguments)))
    return run_script(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
