"""The command line flags of every script that rolls the world out, and the config made from them."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.token_files import MANIFEST, DataError
from depth.predictor import SHIPPED_DEPTH
from rollout.context import find_metadata, start_places
from rollout.sampling import PLAY, SamplingConfig
from rollout.world_file import DEPTH, STARTS, TOKENIZER, WORLD, unpack_world_file
from rollout.world_model import SHIPPED_WORLD
from runtime.config import (
    SettingError,
    non_negative_int,
    number,
    positive_float,
    positive_int,
)
from runtime.ranges import PositiveShare, flag
from vq_vae.tokenizer import SHIPPED_TOKENIZER

CONTEXT_FRAMES = 16
PARTS = {"checkpoint": SHIPPED_WORLD, "vqvae_ckpt": SHIPPED_TOKENIZER, "depth_ckpt": SHIPPED_DEPTH}


@dataclass(frozen=True)
class RolloutConfig:
    """The world model, the starts, and how tokens are sampled."""

    checkpoint: Path
    vqvae_ckpt: Path
    depth_ckpt: Path
    starts: tuple[Path, ...]  # token files, pictures or clips; empty if no flag names any
    places: tuple[Path, ...]  # the start places of the world, used where no flag names a start
    context_frames: int  # 0: all
    sampling: SamplingConfig
    seed: int
    device: str
    precision: str
    world_file: Path | None = None  # where the networks and start places were unpacked from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `config_of` reads."""
    add = parser.add_argument
    add(
        "--world",
        type=Path,
        metavar="NAME.zip",
        help="a world with its networks and start places in one file, from tools/pack_world.py",
    )
    add(
        "--checkpoint",
        type=Path,
        default=SHIPPED_WORLD,
        help="world model (default: the one that ships)",
    )
    add(
        "--vqvae_ckpt",
        type=Path,
        default=SHIPPED_TOKENIZER,
        help="tokenizer of the world model (default: the one that ships)",
    )
    add(
        "--depth_ckpt",
        type=Path,
        default=SHIPPED_DEPTH,
        help="depth network of the world model (default: the one that ships)",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--start",
        nargs="+",
        metavar="START",
        help=f"a start place that ships ({', '.join(start_places())} or all), a picture, a token file, or a "
        "clip with its actions in NAME.json beside it or in ../metadata (default: start places that ship)",
    )
    start.add_argument("--context_npz", nargs="+", metavar="NPZ", help="token files to start from")
    add(
        "--context_frames",
        "--warmup",
        type=non_negative_int,
        default=CONTEXT_FRAMES,
        help="first frames of each start, which prime the world model; 0: all (default: %(default)s); "
        "both flags mean the same",
    )
    add_sampling_arguments(parser)
    add("--seed", type=non_negative_int, default=0, help="same seed, same rollout (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of autocast (default: %(default)s)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `sampling_config_of` reads."""
    add = parser.add_argument
    add("--greedy", action="store_true", help="take the most likely token everywhere instead of sampling")
    add(
        "--temperature",
        type=positive_float,
        default=PLAY.temperature,
        help="sampling temperature of disoccluded cells (default: %(default)s)",
    )
    add(
        "--topk",
        type=non_negative_int,
        default=0,
        help="sample from the k most likely tokens, 0: from all (default: %(default)s)",
    )
    add(
        "--topp",
        type=flag(PositiveShare),
        default=PLAY.top_p,
        help="sample from the most likely tokens that together have this probability (default: %(default)s)",
    )
    add(
        "--trust",
        type=number,
        default=PLAY.trust,
        help="added to the gate of the composed view's prior in visible cells (default: %(default)s)",
    )
    add(
        "--passes",
        type=positive_int,
        default=PLAY.passes,
        help="passes of masked parallel decoding, 1: sample all cells at once (default: %(default)s)",
    )
    add(
        "--code_balance",
        type=number,
        default=PLAY.code_balance,
        help="how much the sampling keeps codes as frequent as in the start's recorded frames, 0: not at all "
        "(default: %(default)s)",
    )


def sampling_config_of(args: argparse.Namespace) -> SamplingConfig:
    """The sampling flags as a config. Raises SettingError if a number is out of range."""
    return SamplingConfig(
        greedy=args.greedy,
        temperature=args.temperature,
        top_k=args.topk,
        top_p=args.topp,
        passes=args.passes,
        trust=args.trust,
        code_balance=args.code_balance,
    )


def config_of(args: argparse.Namespace) -> RolloutConfig:
    """The flags of `add_arguments` as a config.

    Raises DataError for an unknown start place, SettingError for a number out of range or for flags that
    exclude each other, WorldFileError.
    """
    files = {"checkpoint": args.checkpoint, "vqvae_ckpt": args.vqvae_ckpt, "depth_ckpt": args.depth_ckpt}
    known = start_places()
    if args.world is not None:
        for name, default in PARTS.items():
            if files[name] != default:
                raise SettingError(f"--world {args.world}: has its own --{name}; give one of the two flags")
        folder = unpack_world_file(args.world)
        files = {"checkpoint": folder / WORLD, "vqvae_ckpt": folder / TOKENIZER, "depth_ckpt": folder / DEPTH}
        known = start_places(folder / STARTS)
    return RolloutConfig(
        **files,
        world_file=args.world,
        starts=start_files(args.start or args.context_npz or (), known),
        places=tuple(known.values()),
        context_frames=args.context_frames,
        sampling=sampling_config_of(args),
        seed=args.seed,
        device=args.device,
        precision=args.precision,
    )


def start_files(words: Sequence[str], known: Mapping[str, Path]) -> tuple[Path, ...]:
    """The files that --start or --context_npz names: names of `known` start places, "all", or paths.

    Raises DataError for a word that is neither a start place nor a file name with an ending.
    """
    files = []
    for word in words:
        if word == "all":
            files += known.values()
        elif word in known:
            files.append(known[word])
        elif not Path(word).suffix:
            raise DataError(
                f"--start {word}: no such start place; give a file, or one of {', '.join(known)}, all"
            )
        else:
            files.append(Path(word))
    return tuple(files)


def input_files(config: RolloutConfig, script: str | None = None) -> list[Path]:
    """All files that a rollout reads, so that none is overwritten: networks, starts with the manifest or the
    metadata beside them, and the file of a script "@FILE"."""
    files = [config.checkpoint, config.vqvae_ckpt, config.depth_ckpt]
    if config.world_file is not None:
        files.append(config.world_file)
    for start in config.starts or config.places:
        metadata = find_metadata(start)
        files += [start, start.parent / MANIFEST, *([] if metadata is None else [metadata])]
    if script is not None and script.startswith("@"):
        files.append(Path(script[1:]))
    return files
