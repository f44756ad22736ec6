#!/usr/bin/env python3
"""Judges world models on whole held-out clips: do they predict, obey, stay sharp and still, remember, last?

    python evaluate.py                                   # the shipped world on the sample clips
    python evaluate.py --data_dir tokens/mine            # under half an hour on two cores
    python evaluate.py --quick --checkpoint runs/a/best.pt runs/b/best.pt --data_dir tokens/mine

Sections: teacher_forced, rollouts, obey, turn, still, memory, life and tokenizer. evaluation/ has their
modules, metrics.py defines the numbers, and README says how to read them. Beside the model stand copying the
last frame, that copy turned as the camera turned (rot), turned and moved over a flat ground (geo), and the
tokenizer's own reconstruction (ceiling).

Prints tables in Markdown and writes outputs/eval/NAME.json: `metrics` (flat), `ci95` (95 % intervals by
bootstrap over clips), `series` (over the frames of long rollouts), `meta`, and `others`, the same for further
checkpoints; plots, strips and videos go into the folder outputs/eval/NAME.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dataset.token_files import MANIFEST, SAMPLE_TOKENS, DataError
from dataset.windows import TokenClips
from evaluation import (
    controllability,
    long_rollouts,
    memory,
    pictures,
    report,
    rollouts,
    teacher_forced,
    tokenizer_quality,
)
from evaluation.aggregate import Scores
from evaluation.held_out_clips import QUICK, HeldOutClips, Judges, Plan, Subject
from evaluation.inverse_dynamics import load_or_train
from metrics.perceptual import EffNetDistance, LPIPSDistance, lpips_at_hand
from rollout.arguments import add_sampling_arguments, sampling_config_of
from rollout.world_model import SHIPPED_WORLD, load_world_model
from runtime import provenance
from runtime.device import amp_dtype, pick_device
from runtime.errors import UserError, run_script
from vq_vae.tokenizer import SHIPPED_TOKENIZER, Tokenizer, load_tokenizer

OUT = Path("outputs/eval")
SECTIONS = ("teacher_forced", "rollouts", "obey", "turn", "still", "memory", "life", "tokenizer")


def subject_names(paths: list[Path]) -> list[str]:
    """A short name for each checkpoint: its own, with its folder's where it is not one that ships.

    runs/a/best.pt is a_best. Raises UserError if two are the same.
    """
    names = []
    for path in paths:
        folder = path.resolve().parent
        names.append(path.stem if folder == SHIPPED_WORLD.parent else f"{folder.name}_{path.stem}")
    if len(set(names)) < len(names):
        raise UserError(
            f"--checkpoint: {', '.join(names)}: give each checkpoint once, with a name of its own"
        )
    return names


def check_rates(content: dict, clips: TokenClips, checkpoint: Path) -> None:
    """Raises DataError if the world was trained at another frame rate or camera scale than the tokens'."""
    for name in ("fps", "camera_degrees_per_unit"):
        trained, found = (content.get("data") or {}).get(name), getattr(clips.manifest, name)
        if trained is not None and trained != found:
            raise DataError(
                f"{clips.directory / MANIFEST}: {name} is {found:g}, {checkpoint} was trained at "
                f"{trained:g}; its actions would mean something else: give tokens made as its own were"
            )


def load_subjects(
    args: argparse.Namespace, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> list[Subject]:
    """The worlds that are judged. Raises CheckpointError or ValueError where one cannot be."""
    sampling = sampling_config_of(args)
    subjects = []
    for name, path in zip(subject_names(args.checkpoint), args.checkpoint, strict=True):
        model, content = load_world_model(path, tokenizer, device)
        subjects.append(Subject(name, path, model, content, sampling, args.seed, dtype))
    return subjects


def load_judges(args: argparse.Namespace, device: torch.device) -> tuple[Judges, str]:
    """The networks that compare pictures, and where the inverse-dynamics network comes from."""
    effnet = EffNetDistance().to(device)
    distances = {"perceptual": effnet}
    if lpips_at_hand():
        distances["lpips"] = LPIPSDistance().to(device)
    network, source = None, "not used"
    if "rollouts" in args.only:
        network, source = load_or_train(args.data_dir, args.seed, device, OUT, train=not args.quick)
        print(f"inverse dynamics: {source}")
    return Judges(distances, effnet, network), source


def judge(
    held: HeldOutClips,
    subject: Subject,
    plan: Plan,
    judges: Judges,
    recorded: rollouts.Recorded | None,
    only: list[str],
) -> report.Result:
    """All sections for one world."""
    scores = Scores(held.seed)
    result = report.Result(subject, scores)
    sections = {
        "teacher_forced": lambda: teacher_forced.measure(held, subject, plan, scores),
        "rollouts": lambda: rollouts.measure(held, subject, plan, judges, recorded, scores),
        "obey": lambda: controllability.obey(held, subject, plan, scores),
        "turn": lambda: controllability.turn(held, subject, plan, scores),
        "still": lambda: controllability.stand(held, subject, plan, scores),
        "memory": lambda: memory.measure(held, subject, plan, judges, scores),
        "life": lambda: long_rollouts.measure(held, subject, plan, judges, scores),
        "tokenizer": lambda: tokenizer_quality.measure(held, recorded, scores),
    }
    for name in only:
        began = time.monotonic()
        result.shown[name] = sections[name]()
        result.seconds[name] = round(time.monotonic() - began, 1)
    return result


def some_clips(clips: TokenClips, count: int) -> None:
    """Keeps `count` of the clips, evenly spaced."""
    kept = np.unique(np.linspace(0, len(clips.entries) - 1, count).round().astype(int))
    for name in ("entries", "tokens", "actions", "pose"):
        setattr(clips, name, [getattr(clips, name)[i] for i in kept])


def evaluate(args: argparse.Namespace, arguments: list[str], out: Path) -> None:
    """The whole run. Raises CheckpointError, DataError, OSError or ValueError for what its user can mend."""
    began = time.monotonic()
    plan = QUICK if args.quick else Plan()
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.vqvae_ckpt, device)
    dtype = amp_dtype(device, args.precision)
    subjects = load_subjects(args, tokenizer, device, dtype)
    clips = TokenClips(args.data_dir, args.split, tokenizer.fingerprint)
    for subject in subjects:
        check_rates(subject.content, clips, subject.path)
    if args.quick:
        some_clips(clips, plan.windows)
    held = HeldOutClips(clips, tokenizer, args.seed, dtype)
    judges, idm = load_judges(args, device)
    recorded = None
    if {"rollouts", "tokenizer"} & set(args.only):
        recorded = rollouts.record(held, plan, judges)
    results = [judge(held, subject, plan, judges, recorded, args.only) for subject in subjects]

    def content(result: report.Result) -> dict:
        subject = result.subject
        return {
            "metrics": result.scores.metrics,
            "ci95": result.scores.ci95,
            "series": result.shown["life"][0] if "life" in result.shown else {},
            "meta": {
                "checkpoint": provenance.shown(subject.path),
                "name": subject.name,
                "step": subject.content.get("step"),
                "parameters": sum(p.numel() for p in subject.model.parameters()),
                "data": provenance.shown(args.data_dir),
                "tokenizer": tokenizer.fingerprint,
                "split": args.split,
                "clips": [entry.name for entry in clips.entries],
                "frames": clips.frames,
                "plan": vars(plan),
                "sections": args.only,
                "sampling": vars(subject.sampling),
                "precision": str(held.dtype).removeprefix("torch."),
                "inverse_dynamics": idm,
                "quick": args.quick,
                "seed": args.seed,
                "command": provenance.command_line("evaluate.py", arguments),
                "commit": provenance.commit(),
                "machine": provenance.machine(device),
                "seconds": {"all": round(time.monotonic() - began), **result.seconds},
            },
        }

    whole = content(results[0])
    whole["others"] = {result.subject.name: content(result) for result in results[1:]}
    provenance.write_json(out, whole)
    print(
        f"\n{report.heading(whole['meta'])}\n\n{report.summary(results)}\n\n{report.horizons(results, plan)}"
    )
    made = pictures.draw(out.with_suffix(""), held, plan, recorded, results)
    print(f"\n{out}\n" + "\n".join(str(path) for path in made))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", default=[SHIPPED_WORLD], help="world models, side by side")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="tokenizer of the tokens")
    add("--data_dir", type=Path, default=SAMPLE_TOKENS, help="folder of tokens with its manifest")
    add("--split", choices=("val", "train", "all"), default="val")
    add(
        "--out",
        type=Path,
        help=f"JSON to write (default {OUT}/NAME.json); pictures go into a folder beside it",
    )
    add("--quick", action="store_true", help="a tenth of everything: does it run, is it of the right size?")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="some of the sections")
    add("--seed", type=int, default=0)
    add_sampling_arguments(parser)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16", "auto"),
        default="fp32",
        help="of the world and the decoder; figures of different ones differ a little (default fp32)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = build_parser().parse_args(arguments)

    def run() -> None:
        name = "_".join(subject_names(args.checkpoint)) + ("_quick" if args.quick else "")
        evaluate(args, arguments, args.out or OUT / f"{name}.json")

    return run_script(run)


if __name__ == "__main__":
    raise SystemExit(main())
