#!/usr/bin/env python3
"""Measures the speed and memory of training, data loading and play on this machine.

    python benchmark.py            # all three sections
    python benchmark.py play       # one section: train, data or play
    python benchmark.py --quick    # fewer repeats and smaller sizes

train: one optimizer step of train.py's default model, teacher-forced, self-fed and on pairs, against the
device's fastest matrix product.
data: the loader against opening a file for each window; the stages of preprocessing.
play: one step from the action to the picture on the screen, its parts, the time to the first frame, memory.

Calls that are compared run in alternation, A B A B ..., in one process, and medians are reported, so that a
slow moment of the machine affects all alike. Prints Markdown tables and writes outputs/benchmark.json with
`metrics` (flat) and `meta`.
"""

import argparse
import os
import sys
from pathlib import Path

import psutil
import torch

from benchmarking.data_loading import bench_data
from benchmarking.measure import BenchmarkConfig, dtype_name
from benchmarking.play_step import bench_play
from benchmarking.training_step import QUICK_WINDOWS, TRANSITIONS, WINDOWS, bench_train
from dataset.token_files import SAMPLE_TOKENS
from dataset.windows import TokenClips
from depth.predictor import SHIPPED_DEPTH
from rollout.context import load_world
from rollout.world_model import SHIPPED_WORLD, architecture_of
from runtime.config import positive_int
from runtime.errors import UserError, run_script
from runtime.outputs import check_outputs
from runtime.provenance import command_line, commit, display_path, machine, versions, write_json
from vq_vae.tokenizer import SHIPPED_TOKENIZER

REPEATS, QUICK_REPEATS = 5, 2
SECTIONS = {"train": bench_train, "data": bench_data, "play": bench_play}
# On two CPU cores without AMX, in full and with --quick.
MINUTES = {"train": (5.0, 1.0), "data": (0.5, 0.2), "play": (2.0, 0.5)}


def announce(config: BenchmarkConfig) -> None:
    """Prints what will be measured and how long it takes."""
    full, quick = (sum(MINUTES[name][i] for name in config.sections) for i in (0, 1))
    hint = "" if config.quick else f"; --quick takes about {max(1, round(quick))}"
    if len(config.sections) > 1:
        hint += "; for one section: python benchmark.py " + " or ".join(config.sections)
    minutes = max(1, round(quick if config.quick else full))
    print(f"measures {', '.join(config.sections)}: about {minutes} min on two CPU cores{hint}")


def run_benchmark(config: BenchmarkConfig, arguments: list[str]) -> dict:
    """Runs the sections -> the content of the JSON file. Raises UserError."""
    world = load_world(
        config.checkpoint, config.vqvae_ckpt, config.device, config.precision, config.depth_ckpt
    )
    clips = TokenClips(config.data_dir, "all", world.tokenizer.fingerprint, extras=("depth",))
    print(f"precision: {dtype_name(world.dtype)}")
    notes, load = [], psutil.getloadavg()[0]
    if load > 0.5:
        notes.append(
            f"the load was {load:.1f} on {os.cpu_count()} CPUs before the start; other programs slow down "
            "runs on several threads most"
        )
    metrics = {}
    for name in config.sections:
        metrics |= SECTIONS[name](config, world, clips)
    print("".join(f"\nnote: {note}" for note in notes))
    return {
        "metrics": {name: float(value) for name, value in metrics.items()},
        "meta": {
            "command": command_line(__file__, arguments),
            "commit": commit(),
            "machine": machine(world.device),
            "versions": versions(),
            "device": str(world.device),
            "threads": torch.get_num_threads(),
            "precision": dtype_name(world.dtype),
            "checkpoint": display_path(config.checkpoint),
            "architecture": architecture_of(world.model),
            "parameters": sum(p.numel() for p in world.model.parameters()),
            "data": display_path(config.data_dir),
            "windows": config.windows,
            "transitions": TRANSITIONS,
            "repeats": config.repeats,
            "quick": config.quick,
            "notes": notes,
        },
    }


def parse_config(arguments: list[str]) -> BenchmarkConfig:
    """The command line as settings; exits with argparse's message if it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("section", nargs="?", choices=(*SECTIONS, "all"), default="all", help="default: all")
    add("--out", type=Path, default=Path("outputs/benchmark.json"), help="JSON file (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: auto")
    add("--quick", action="store_true", help="fewer repeats and smaller sizes")
    add(
        "--repeats",
        type=positive_int,
        help=f"measured rounds (default: {REPEATS}; {QUICK_REPEATS} with --quick)",
    )
    add(
        "--windows",
        type=positive_int,
        help=f"windows in a training batch (default: {WINDOWS}; {QUICK_WINDOWS} with --quick)",
    )
    add("--checkpoint", type=Path, default=SHIPPED_WORLD, help="world model to play (default: ships)")
    add("--vqvae_ckpt", type=Path, default=SHIPPED_TOKENIZER, help="its tokenizer (default: ships)")
    add("--depth_ckpt", type=Path, default=SHIPPED_DEPTH, help="depth network (default: ships)")
    add("--data_dir", type=Path, default=SAMPLE_TOKENS, help="token files (default: the samples)")
    args = parser.parse_args(arguments)
    return BenchmarkConfig(
        sections=tuple(SECTIONS) if args.section == "all" else (args.section,),
        out=args.out.resolve(),
        device=args.device,
        precision=args.precision,
        quick=args.quick,
        repeats=args.repeats or (QUICK_REPEATS if args.quick else REPEATS),
        windows=args.windows or (QUICK_WINDOWS if args.quick else WINDOWS),
        checkpoint=args.checkpoint.resolve(),  # live_inference.py is started in another folder
        vqvae_ckpt=args.vqvae_ckpt.resolve(),
        depth_ckpt=args.depth_ckpt.resolve(),
        data_dir=args.data_dir.resolve(),
    )


def run(arguments: list[str]) -> None:
    """Measures and writes the JSON file. Raises UserError or OSError."""
    config = parse_config(arguments)
    announce(config)
    check_outputs([config.out], [config.checkpoint, config.vqvae_ckpt, config.data_dir])
    try:
        write_json(config.out, run_benchmark(config, arguments))
    except torch.OutOfMemoryError:
        raise UserError(f"--windows {config.windows}: the device is out of memory; give fewer") from None
    print(f"wrote {display_path(config.out)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_script(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    raise SystemExit(main())
