#!/usr/bin/env python3
"""Converts a geometry world model of version 0.5 or 0.6 to version 0.7.

    python tools/convert_checkpoint.py runs/world/last.pt runs/converted/last.pt

Version 0.7 composes one view from the last frame and the keyframes, where two views were warped before, takes
depth from the depth network, moves the player among the nodes that it sees, and has attention at its coarse
levels. The weights of the two views are added, the rest is copied, new blocks start as the identity, and the
motion model starts untrained. The result is a start for training (INIT_FROM), not
an equivalent world. A checkpoint of a run that switched off ROTATE, MOVE, DEPTH, CARRY_STATE or COARSE is
refused: these switches are gone. Optimizer state is left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from depth.predictor import SHIPPED_DEPTH, load_depth
from model_geometry import VIEW_CHANNELS, GeometryConfig, GeometryWorldModel
from rollout.world_model import world_content
from runtime.checkpoint import CheckpointError, load, save
from runtime.config import ScriptParser
from runtime.errors import run_script
from runtime.outputs import check_outputs
from vq_vae.tokenizer import SHIPPED_TOKENIZER, check_tokenizer, load_tokenizer

EXAMPLE = "python tools/convert_checkpoint.py OLD.pt NEW.pt  (seconds; OLD.pt: a world of version 0.5 or 0.6)"

# old name -> new name, of whole parameters or of the modules that they begin with
PARAMETERS = {
    "code_mean": "code_space.mean",
    "code_axes": "code_space.axes",
    "codes": "code_space.codes",
    "code_spread": "code_space.spread",
    "mix": "output_block",
    "reveal": "decoding_block",
    "out": "out_proj",
    "far": "depth_head",
    "scene": "motion_model.scene_proj",
    "hold": "motion_model.collision_head",
    "pace": "motion_model.motion_gru",
    "stride": "motion_model.motion_head",
}
REMOVED_SWITCHES = ("rotate", "move", "depth", "carry_state", "coarse")
VIEWS = 2  # warped views before 0.7: of the last frame and of the keyframes
# Geometry channels of the input before 0.7, and where they go: visible, exact (of both views), baseline,
# generation, distance, ground.
CHANNELS = {0: 0, 1: 1, 2: 0, 3: 1, 5: 4, 6: 5, 7: 6}


def new_name(name: str) -> str:
    """The name in version 0.6 of a parameter of version 0.5."""
    head, dot, rest = name.partition(".")
    return PARAMETERS.get(head, head) + dot + rest


def one_view(old: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """Parameters of 0.6 -> those of 0.7 that correspond to them. `dim`: of the code space."""
    new = {
        name.replace("decoding_block.0", "conditioning_block.stem").replace(
            "decoding_block.2", "conditioning_block.out"
        ): value
        for name, value in old.items()
        if not name.startswith(("depth_head", "motion_model"))
    }
    weight = old["in_proj.weight"]
    views, geometry = weight[:, : VIEWS * dim], weight[:, VIEWS * dim :]
    told = torch.zeros(len(weight), VIEW_CHANNELS, 1, 1)
    for before, after in CHANNELS.items():
        told[:, after] += geometry[:, before]
    new["in_proj.weight"] = torch.cat([views[:, :dim] + views[:, dim:], told], 1)
    for name in ("out_proj.weight", "out_proj.bias"):
        gates, corrections, query = old[name].split(
            [VIEWS, VIEWS * dim, len(old[name]) - VIEWS - VIEWS * dim]
        )
        corrections = corrections.unflatten(0, (VIEWS, dim)).mean(0)
        new[name] = torch.cat([gates.mean(0, keepdim=True), corrections, query])
    chosen, _, disoccluded = old["gate_bias"]
    new["gate_bias"] = torch.stack([chosen, disoccluded, torch.zeros(())])
    new["log_scale"] = old["log_scale"].mean()
    return new


def convert(content: dict, path: Path, vqvae_ckpt: Path, depth_ckpt: Path) -> dict:
    """The checkpoint's content for 0.7, with the depth network in `depth_ckpt`.

    Raises CheckpointError if it is not one of version 0.5 or 0.6, or of another tokenizer.
    """
    weights = content.get("model", {})
    if content.get("architecture") != "geometry" or not {"code_axes", "depth_head.0.weight"} & set(weights):
        raise CheckpointError(f"{path}: expected a geometry world of version 0.5 or 0.6; nothing to convert")
    off = [name for name in REMOVED_SWITCHES if not content["config"].get(name, True)]
    if off:
        raise CheckpointError(
            f"{path}: was trained with {', '.join(off)} switched off, which this version cannot do; "
            "train it again, or play it with version 0.5"
        )
    if "code_axes" in weights:
        weights = {new_name(name): tensor for name, tensor in weights.items()}
    config = {name: value for name, value in content["config"].items() if name not in REMOVED_SWITCHES}
    del config["motion_dim"]
    config = GeometryConfig(**config | {"sources": GeometryConfig.sources})
    tokenizer = load_tokenizer(vqvae_ckpt)
    check_tokenizer(content["tokenizer"], tokenizer.fingerprint, f"{vqvae_ckpt} (--vqvae_ckpt)", str(path))
    torch.manual_seed(0)
    model = GeometryWorldModel(config, tokenizer, load_depth(depth_ckpt))
    start = model.state_dict() | one_view(weights, config.code_dim)
    model.load_state_dict(start)
    kept = {name: content[name] for name in ("data",) if name in content}
    return world_content(model, **kept)


def run(source: Path, target: Path, vqvae_ckpt: Path, depth_ckpt: Path) -> None:
    """Reads, converts and writes. Raises CheckpointError or OutputError."""
    check_outputs([target], [source, vqvae_ckpt, depth_ckpt])
    if target.exists():
        raise CheckpointError(f"{target}: exists; give a new file to write")
    save(target, convert(load(source), source, vqvae_ckpt, depth_ckpt))
    print(f"wrote {target}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE)
    parser.add_argument("source", type=Path, help="checkpoint of version 0.5 or 0.6")
    parser.add_argument("target", type=Path, help="new file to write")
    add = parser.add_argument
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="its tokenizer (default: ships)")
    add("--depth_ckpt", type=Path, default=SHIPPED_DEPTH, help="depth network to use (default: ships)")
    args = parser.parse_args(arguments)
    return run_script(lambda: run(args.source, args.target, args.vqvae_ckpt, args.depth_ckpt))


if __name__ == "__main__":
    raise SystemExit(main())
