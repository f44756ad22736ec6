#!/usr/bin/env python3
"""Evaluates prediction, control, sharpness, stability, memory, long rollouts and walks of world models on
whole held-out clips.

    python evaluate.py                                   # the shipped world on the sample clips
    python evaluate.py --data_dir tokens/mine            # about an hour on two cores, half of it for walk
    python evaluate.py --quick --checkpoint runs/a/best.pt runs/b/best.pt --data_dir tokens/mine

Sections: teacher_forced, rollouts, control, rotation, still, memory, long, walk, recovery, motion, depth and
tokenizer; --only selects some. depth measures the depth network, motion the motion model with that depth, the
others the world model and the tokenizer.
The tables compare the models with copying the last frame (copy), with that frame warped as the camera rotated
(rot), with the same and moved over a flat ground (geo), and with the recording as the tokenizer reconstructs
it (recording).

Prints tables in Markdown and writes outputs/eval/NAME.json: `metrics` (flat), `ci95` (95 % bootstrap
intervals over clips), `series` (over the frames of long rollouts and walks), `meta`, and `others`, the same
for further checkpoints. Plots, strips and videos are written into the folder outputs/eval/NAME.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dataset.token_files import SAMPLE_TOKENS
from dataset.windows import TokenClips
from depth.predictor import SHIPPED_DEPTH, load_depth
from evaluation import (
    controllability,
    depth_warps,
    detail_recovery,
    long_rollouts,
    memory,
    pictures,
    player_motion,
    report,
    rollouts,
    teacher_forced,
    tokenizer_quality,
    walk,
)
from evaluation.aggregate import Scores
from evaluation.evaluated_model import EvaluatedModel, check_rates, load_model
from evaluation.held_out_clips import HeldOutClips
from evaluation.inverse_dynamics_training import load_or_train
from evaluation.picture_networks import PictureNetworks, load_picture_networks
from evaluation.plan import FULL, QUICK, Plan
from rollout.arguments import add_sampling_arguments, sampling_config_of
from rollout.sampling import SamplingConfig
from rollout.world_model import SHIPPED_WORLD
from runtime import provenance
from runtime.config import SettingError, non_negative_int, positive_int
from runtime.device import amp_dtype, pick_device
from runtime.errors import run_script
from runtime.outputs import check_folder, check_outputs
from runtime.ranges import PositiveShare, flag
from vq_vae.tokenizer import SHIPPED_TOKENIZER, load_tokenizer

OUT = Path("outputs/eval")
SECTIONS = (
    "teacher_forced", "rollouts", "control", "rotation", "still", "memory", "long", "walk", "recovery",
    "motion", "depth", "tokenizer",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig:
    """The command line of a run."""

    checkpoints: dict[str, Path]  # by unique name
    tokenizer: Path
    depth: Path
    data_dir: Path
    split: str
    out: Path
    quick: bool
    train_inverse_dynamics: bool
    plan: Plan
    sections: tuple[str, ...]
    seed: int
    sampling: SamplingConfig
    device: torch.device
    dtype: torch.dtype


@dataclass
class Recorded:
    """What the sections need of the recordings, and what does not depend on the model; None if not needed."""

    windows: rollouts.RecordedWindows | None = None
    walks: walk.RecordedWalks | None = None
    warps: depth_warps.DepthWarps | None = None
    motion: player_motion.RecordedMotion | None = None


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", default=[SHIPPED_WORLD], help="world models to compare")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="tokenizer that made the tokens")
    add(
        "--depth_ckpt",
        type=Path,
        default=SHIPPED_DEPTH,
        help="depth network of the world models and of the sections depth and motion",
    )
    add("--data_dir", type=Path, default=SAMPLE_TOKENS, help="folder of token files with a manifest")
    add("--split", choices=("val", "train", "all"), default="val", help="clips to evaluate on")
    add("--out", type=Path, help=f"JSON file (default {OUT}/NAME.json); pictures go into the folder NAME")
    add("--quick", action="store_true", help="a smoke test: about a tenth of the clips and windows")
    add(
        "--share",
        type=flag(PositiveShare),
        default=1.0,
        help="share of the windows and starts of a full run (default: %(default)s)",
    )
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    add(
        "--shipped_idm",
        action="store_true",
        help="measure control by the inverse-dynamics network that ships, instead of one that is trained "
        "on this data first (a quarter of an hour)",
    )
    add("--walk_starts", type=positive_int, help=f"starts of the section walk (default {FULL.walk_starts})")
    add("--walk_seconds", type=positive_int, help=f"length of its walks (default {FULL.walk_seconds})")
    add("--seed", type=non_negative_int, default=0, help="of windows, sampling and bootstrap")
    add_sampling_arguments(parser)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16", "auto"),
        default="fp32",
        help="of the world model and the decoder; compare only results of one precision (default fp32)",
    )
    return parser


def parse_config(arguments: list[str]) -> EvaluationConfig:
    """The flags as a config. Raises SettingError or DeviceError for values that cannot be used."""
    args = build_parser().parse_args(arguments)
    checkpoints = named_checkpoints(args.checkpoint)
    name = "_".join(checkpoints) + ("_quick" if args.quick else "")
    device = pick_device(args.device)
    return EvaluationConfig(
        checkpoints=checkpoints,
        tokenizer=args.vqvae_ckpt,
        depth=args.depth_ckpt,
        data_dir=args.data_dir,
        split=args.split,
        out=json_file(args.out or OUT / f"{name}.json"),
        quick=args.quick,
        train_inverse_dynamics=not (args.quick or args.shipped_idm),
        plan=plan_of(args),
        sections=tuple(args.only),
        seed=args.seed,
        sampling=sampling_config_of(args),
        device=device,
        dtype=amp_dtype(device, args.precision),
    )


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the flags ask for."""
    plan = QUICK if args.quick else FULL.scaled(args.share)
    asked = {"walk_starts": args.walk_starts, "walk_seconds": args.walk_seconds}
    return replace(plan, **{name: value for name, value in asked.items() if value is not None})


def json_file(path: Path) -> Path:
    """The file with the ending .json, so that the folder of pictures beside it has another name.

    Raises SettingError for another ending.
    """
    if path.suffix not in ("", ".json"):
        raise SettingError(f"--out {path}: expected a name that ends in .json, or without an ending")
    return path.with_suffix(".json")


def named_checkpoints(paths: list[Path]) -> dict[str, Path]:
    """Each checkpoint under a short name: a_best for runs/a/best.pt, the bare file name for shipped ones.

    Raises SettingError if two names are equal.
    """
    names = []
    for path in paths:
        folder = path.resolve().parent
        names.append(path.stem if folder == SHIPPED_WORLD.parent else f"{folder.name}_{path.stem}")
    if len(set(names)) < len(names):
        raise SettingError(
            f"--checkpoint: found the names {', '.join(names)}, expected different ones; "
            "give each checkpoint once and rename files of the same folder and file name"
        )
    return dict(zip(names, paths, strict=True))


def evaluate(config: EvaluationConfig, command: str) -> None:
    """The whole run; `command` is written into the JSON. Raises UserError or OSError."""
    began = time.monotonic()
    check_outputs([config.out], [*config.checkpoints.values(), config.tokenizer, config.data_dir])
    check_folder(config.out.with_suffix(""))
    print(
        f"measures {', '.join(config.sections)}: in full up to an hour on two cores, half of it for walk; "
        "less: --quick (4 minutes on one core), --share 0.1, --only teacher_forced"
    )
    tokenizer = load_tokenizer(config.tokenizer, config.device)
    models = [
        load_model(name, path, tokenizer, config.sampling, config.seed, config.dtype, config.depth)
        for name, path in config.checkpoints.items()
    ]
    extras = ("depth",) if {"rollouts", "depth"} & set(config.sections) else ()
    clips = TokenClips(config.data_dir, config.split, tokenizer.fingerprint, extras=extras)
    for model in models:
        check_rates(model, clips)
    if config.quick:
        last, count = len(clips.entries) - 1, config.plan.windows
        clips = clips.subset(np.unique(np.linspace(0, last, count).round().astype(int)))
    held_out = HeldOutClips(clips, tokenizer, config.seed, config.dtype)
    inverse_dynamics, origin = None, "not used"
    if "rollouts" in config.sections:
        inverse_dynamics, origin = load_or_train(
            config.data_dir, config.seed, config.device, cache=OUT, train=config.train_inverse_dynamics
        )
        print(f"inverse dynamics: {origin}")
    networks = load_picture_networks(inverse_dynamics, config.device)
    predictor = None
    if {"depth", "motion"} & set(config.sections):
        predictor = load_depth(config.depth, config.device)

    recorded = Recorded()
    if {"rollouts", "tokenizer"} & set(config.sections):
        recorded.windows = rollouts.read_windows(held_out, config.plan, networks)
    if "walk" in config.sections:
        recorded.walks = walk.read_walks(held_out, config.plan, networks)
    if "depth" in config.sections:
        recorded.warps = depth_warps.read(held_out, config.plan, predictor)
    if "motion" in config.sections:
        recorded.motion = player_motion.read(held_out, config.plan, predictor)
    results = [run_sections(config, model, held_out, networks, recorded) for model in models]

    meta = {
        "data": provenance.display_path(config.data_dir),
        "tokenizer": tokenizer.fingerprint,
        "split": config.split,
        "clips": [entry.name for entry in clips.entries],
        "frames": clips.frames,
        "plan": vars(config.plan),
        "sections": config.sections,
        "sampling": vars(config.sampling),
        "precision": str(config.dtype).removeprefix("torch."),
        "inverse_dynamics": origin,
        "quick": config.quick,
        "seed": config.seed,
        "command": command,
        "commit": provenance.commit(),
        "machine": provenance.machine(config.device),
        "seconds": {"all": round(time.monotonic() - began)},
    }
    first, *others = (report.as_json(result, meta) for result in results)
    provenance.write_json(config.out, {**first, "others": {other["meta"]["name"]: other for other in others}})
    tables = report.heading(first["meta"]), report.summary(results, config.plan)
    print("", *tables, report.horizons(results, config.plan), *report.more_tables(results), sep="\n\n")
    folder = config.out.with_suffix("")
    print("", config.out, *pictures.draw(folder, held_out, config.plan, recorded.windows, results), sep="\n")


def run_sections(
    config: EvaluationConfig,
    model: EvaluatedModel,
    held_out: HeldOutClips,
    networks: PictureNetworks,
    recorded: Recorded,
) -> report.Result:
    """The selected sections for one model."""
    plan, scores = config.plan, Scores(config.seed)
    result = report.Result(model, scores)
    sections = {
        "teacher_forced": lambda: teacher_forced.measure(held_out, model, plan, scores),
        "rollouts": lambda: rollouts.measure(held_out, model, plan, networks, recorded.windows, scores),
        "control": lambda: controllability.control(held_out, model, plan, scores),
        "rotation": lambda: controllability.rotation(held_out, model, plan, scores),
        "still": lambda: controllability.standing_still(held_out, model, plan, scores),
        "memory": lambda: memory.measure(held_out, model, plan, networks, scores),
        "long": lambda: long_rollouts.measure(held_out, model, plan, networks, scores),
        "walk": lambda: walk.measure(held_out, model, plan, networks, recorded.walks, scores),
        "recovery": lambda: detail_recovery.measure(held_out, model, plan, scores),
        "motion": lambda: player_motion.report(held_out, model, recorded.motion, scores),
        "depth": lambda: depth_warps.report(recorded.warps, scores),
        "tokenizer": lambda: tokenizer_quality.measure(held_out, recorded.windows, scores),
    }
    for number, name in enumerate(config.sections, 1):
        began = time.monotonic()
        print(f"{model.name}: {name}, section {number} of {len(config.sections)}")
        result.outputs[name] = sections[name]()
        result.seconds[name] = round(time.monotonic() - began, 1)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = provenance.command_line("evaluate.py", arguments)
    return run_script(lambda: evaluate(parse_config(arguments), command))


if __name__ == "__main__":
    raise SystemExit(main())
