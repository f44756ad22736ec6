#!/usr/bin/env python3
"""Converts a geometry world model of version 0.5 to the parameter names of version 0.6.

    python tools/convert_checkpoint.py runs/world/last.pt runs/converted/last.pt

Weights stay bit for bit the same. Optimizer state is kept, so training resumes. A checkpoint of a run that
switched off ROTATE, MOVE, DEPTH, CARRY_STATE or COARSE is refused: these switches are gone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.checkpoint import CheckpointError, load, save
from runtime.errors import run_script
from runtime.outputs import check_outputs

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
RENAMED_CONSTANTS = {
    "REVEALED_WEIGHT": "DISOCCLUDED_WEIGHT",
    "REVEAL": "MASKED_DECODING",
    "NEAR_CODES": "SIMILAR_CODES",
}
REMOVED_CONSTANTS = ("ROTATE", "MOVE", "DEPTH", "CARRY_STATE", "COARSE")


def new_name(name: str) -> str:
    """The name of a parameter in version 0.6."""
    head, dot, rest = name.partition(".")
    return PARAMETERS.get(head, head) + dot + rest


def convert(content: dict, path: Path) -> dict:
    """The checkpoint's content with new names. Raises CheckpointError if it is not one of version 0.5."""
    if content.get("architecture") != "geometry" or "code_axes" not in content.get("model", {}):
        raise CheckpointError(f"{path}: expected a geometry world model of version 0.5; nothing to convert")
    off = [name for name in REMOVED_SWITCHES if not content["config"].get(name, True)]
    if off:
        raise CheckpointError(
            f"{path}: was trained with {', '.join(off)} switched off, which version 0.6 cannot do; "
            "train it again, or play it with version 0.5"
        )
    config = {name: value for name, value in content["config"].items() if name not in REMOVED_SWITCHES}
    constants = {
        RENAMED_CONSTANTS.get(name, name): value
        for name, value in content.get("constants", {}).items()
        if name not in REMOVED_CONSTANTS
    }
    model = {new_name(name): tensor for name, tensor in content["model"].items()}
    converted = {**content, "config": config, "model": model}
    if "metrics" in content:
        converted["metrics"] = {
            name.replace("val_revealed", "val_disoccluded"): value
            for name, value in content["metrics"].items()
        }
    return converted | ({"constants": constants} if "constants" in content else {})


def run(source: Path, target: Path) -> None:
    """Reads, converts and writes. Raises CheckpointError or OutputError."""
    check_outputs([target], [source])
    if target.exists():
        raise CheckpointError(f"{target}: exists; give a new file to write")
    save(target, convert(load(source), source))
    print(f"wrote {target}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="checkpoint of version 0.5")
    parser.add_argument("target", type=Path, help="new file to write")
    args = parser.parse_args(arguments)
    return run_script(lambda: run(args.source, args.target))


if __name__ == "__main__":
    raise SystemExit(main())
