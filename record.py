#!/usr/bin/env python3
"""Records action-labelled play from Luanti, a free voxel game, in GF-Minecraft's layout.

    python record.py --out data/luanti --clips 308 --seed 1    a scripted player, in the background
    python record.py --out data/mine --human                    you play, in a window
    python record.py --check data/luanti                       is a data set sound? (GF-Minecraft, too)

Needs the game, a display server for recording unseen, and a C compiler:
    apt-get install minetest xvfb gcc libc6-dev                 (newer systems: luanti luanti-game-minetest)

The game runs in lockstep: one drawn frame is 1/16 s of game time however slow the machine, the input for
frame k+1 is sent while frame k is held, and each picture bears its number, which must be that of its line in
the game's log. Beside the pictures it keeps the depth buffer and the nodes around the player (depth/*.npz,
surroundings.py). Run it again to continue: whole clips are kept. Every --clips_per_world clips share one
generated world; preprocess.py puts whole worlds into the held-out split. Nothing is written outside --out.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import groupby
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm

from dataset.clip_check import check_clips
from dataset.recordings import is_whole, remove_parts
from dataset.surroundings import BLOCK
from luanti.game import (
    BITS,
    FPS,
    STRIP,
    GameError,
    Picture,
    build_shim,
    die_with_parent,
    find_game,
    game_version,
)
from luanti.recorder import BIOMES, TIMES, WEATHERS, ClipPlan, Options, plan_clips, record_world
from runtime.config import non_negative_int, positive_float, positive_int
from runtime.errors import UserError, run_script
from runtime.video import VideoError

HUMAN_WIDTH = 1024  # pixels, at least, of the window that a person plays in
# What must agree between the runs that fill one folder.
SAME = ("seed", "frames", "clips_per_world", "size", "vertical_fov", "biomes", "time", "weather", "human")


def size(text: str) -> tuple[int, int]:
    """argparse type: WIDTHxHEIGHT, both multiples of 4: depth is read once in each block of 4x4 pixels."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0):
        raise argparse.ArgumentTypeError(f"{text}: expected WIDTHxHEIGHT, such as 256x144")
    if int(width) % BLOCK or int(height) % BLOCK:
        raise argparse.ArgumentTypeError(
            f"{text}: both sides must be multiples of {BLOCK}: {BLOCK}x{BLOCK} pixels share one depth"
        )
    return int(width), int(height)


def some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """argparse type: names out of `known`, joined by commas, or "any" for all of them."""

    def names(text: str) -> list[str]:
        chosen = list(known) if text == "any" else text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: expected some of {', '.join(known)}, or any")
        return chosen

    return names


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the clips; run again to continue")
    what.add_argument("--check", type=Path, metavar="DIR", help="check the clips in DIR and record nothing")
    parser.add_argument("--clips", type=positive_int, default=308)
    parser.add_argument("--frames", type=positive_int, default=1200, help="frames of a clip, 16 a second")
    parser.add_argument("--clips_per_world", type=positive_int, default=7)
    parser.add_argument("--seed", type=non_negative_int, default=1, help="of worlds, places and player")
    parser.add_argument(
        "--jobs", type=positive_int, default=max(1, min(os.cpu_count() or 1, 8)), help="games at once"
    )
    parser.add_argument("--size", type=size, default=(256, 144), help="of the pictures, WIDTHxHEIGHT")
    parser.add_argument("--vertical_fov", type=positive_float, default=70.0, help="degrees")
    parser.add_argument(
        "--biomes", type=some_of(BIOMES), default=list(BIOMES), help="joined by commas, or any"
    )
    parser.add_argument(
        "--time", type=some_of(tuple(TIMES)), default=["noon"], help=f"of {', '.join(TIMES)}, or any"
    )
    parser.add_argument(
        "--weather", type=some_of(WEATHERS), default=["clear"], help=f"of {', '.join(WEATHERS)}, or any"
    )
    parser.add_argument("--human", action="store_true", help="play yourself, in a window; close it to end")
    return parser


def picture_of(args: argparse.Namespace) -> Picture:
    """The pictures, drawn larger where the window would be too small for the barcode or for a person."""
    width, height = args.size
    least = HUMAN_WIDTH if args.human else BITS * STRIP
    return Picture(width, height, args.vertical_fov, scale=-(-least // width))


def settings_of(args: argparse.Namespace) -> dict:
    """What is kept in the folder, so that a later run with other settings is refused."""
    found = {name: list(value) if isinstance(value := getattr(args, name), tuple) else value for name in SAME}
    return {**found, "depth": True}


def check_same(args: argparse.Namespace) -> None:
    """Writes the run's settings into the folder, or raises UserError if it holds clips of others."""
    path = args.out / ".recording.json"
    mine = settings_of(args)
    if path.is_file() and any(args.out.glob("metadata/*.json")):
        theirs = json.loads(path.read_text())
        if not theirs.get("depth"):
            raise UserError(
                f"{path}: an earlier version recorded these clips, without depth; use another --out"
            )
        for name in SAME:
            if theirs.get(name) != mine[name]:
                raise UserError(
                    f"{path}: this folder was recorded with --{name} {theirs.get(name)}, not {mine[name]}; "
                    "use the same or another --out"
                )
    path.write_text(json.dumps(mine, indent=1) + "\n")


# ------------------------------------------------------------ workers


def work(job: int, options: Options, folder: Path, pipe: Connection) -> None:
    """One worker: asks for worlds until it is sent none."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and sends SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the game is closed, the profile removed
    try:
        while True:
            pipe.send(("ready", None))
            plans = pipe.recv()
            if plans is None:
                return
            record_world(plans, options, folder, job, lambda *news: pipe.send(news))
    except (GameError, VideoError, OSError) as error:  # OSError: the disk is full, say
        pipe.send(("error", str(error)))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Progress:
    """What the workers have told, and the bar that shows it."""

    def __init__(self, clips: int, frames: int):
        self.clips = clips  # that are missing
        self.ended: dict[str, str] = {}  # clip -> how it ended
        self.failed: dict[str, str] = {}  # clip -> why it could not be recorded
        self.lost = 0  # frames thrown away
        self.began = time.monotonic()
        self.bar = tqdm(total=clips * frames, unit=" frames", smoothing=0.1, dynamic_ncols=True)

    def hear(self, what: str, value: object) -> None:
        """Takes one of the reports that `record_world` makes."""
        if what == "frames":
            self.bar.update(value)
            self.bar.set_postfix_str(
                f"{len(self.ended)}/{self.clips} clips, {self.speed / FPS:.1f}x real time"
            )
        elif what == "lost":
            self.bar.update(-value)
            self.lost += value
        elif what == "clip":
            self.ended[value[0]] = value[1]
        elif what == "failed":
            self.failed[value[0]] = value[1]
        elif what == "note":
            tqdm.write(value)
        elif what == "error":
            raise GameError(value)

    @property
    def speed(self) -> float:
        """Frames a second since the beginning, the time for starts and settling counted in."""
        return self.bar.n / (time.monotonic() - self.began)

    def close(self) -> None:
        """Ends the bar and prints the sum."""
        self.bar.close()
        whole = sum(how == "complete" for how in self.ended.values())
        print(
            f"{len(self.ended)} clips in {time.monotonic() - self.began:.0f} s, {whole} whole and "
            f"{len(self.ended) - whole} cut; {self.bar.n} frames kept and {self.lost} thrown away: "
            f"{self.speed:.1f} frames/s, {self.speed / FPS:.1f}x real time"
        )
        for name, why in self.failed.items():
            print(f"{name}: could not be recorded: {why}", file=sys.stderr)


def run_workers(
    worlds: list[list[ClipPlan]], jobs: int, options: Options, folder: Path, progress: Progress
) -> None:
    """Hands the worlds out to `jobs` workers, one after the other, until all are recorded."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, multiprocessing.Process] = {}
    for job in range(jobs):
        ours, theirs = context.Pipe()
        workers[ours] = context.Process(
            target=work, args=(job, options, folder, theirs), name=f"job {job}", daemon=True
        )
        workers[ours].start()
        theirs.close()
    running = list(workers)
    try:
        while running:
            for pipe in wait(running):
                try:
                    what, value = pipe.recv()
                except (EOFError, ConnectionError):  # it has ended
                    running.remove(pipe)
                    workers[pipe].join()
                    if status := workers[pipe].exitcode:
                        progress.hear("failed", (workers[pipe].name, f"it ended with status {status}"))
                    continue
                if what == "quit":
                    worlds.clear()
                if what == "ready":
                    pipe.send(worlds.pop(0) if worlds else None)
                else:
                    progress.hear(what, value)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join(20)
            worker.kill()


def by_world(plans: list[ClipPlan]) -> list[list[ClipPlan]]:
    """The clips in groups that share a world."""
    return [list(group) for _, group in groupby(plans, key=lambda plan: plan.world_seed)]


def record(args: argparse.Namespace, options: Options, folder: Path) -> int:
    """Records what is missing -> the script's exit status."""
    plans = plan_clips(args.seed, args.clips, args.clips_per_world, args.biomes, args.time, args.weather)
    missing = [plan for plan in plans if not is_whole(args.out, plan.name)]
    print(f"{len(plans)} clips, {len(plans) - len(missing)} of them recorded already")
    if not missing:
        return 0
    worlds = by_world(missing)
    progress = Progress(len(missing), args.frames)
    try:
        run_workers(worlds, 1 if args.human else min(args.jobs, len(worlds)), options, folder, progress)
    finally:
        progress.close()
    return 1 if progress.failed else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = build_parser().parse_args(arguments)
    return run_script(lambda: run(args), "stopped; whole clips are kept; run it again to continue")


def run(args: argparse.Namespace) -> int:
    """Checks or records, as the flags say; returns the exit status. Raises UserError."""
    if args.check:
        report = check_clips(args.check)
        print(report.text())
        return 1 if report.problems else 0
    if args.human and not os.environ.get("DISPLAY"):
        raise UserError("--human needs a display, and DISPLAY is not set; run it in a desktop session")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    folder = args.out.resolve() / ".recorder"
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{args.out}: another record.py is writing there") from None
    try:
        check_same(args)
        for profile in folder.glob("profile-*"):  # of a run that was killed
            shutil.rmtree(profile, ignore_errors=True)
        remove_parts(args.out)
        version = game_version(find_game())
        build_shim(folder / "lockstep.so")
        options = Options(
            args.out.resolve(), args.frames, picture_of(args), args.human, labels={"game": version}
        )
        return record(args, options, folder)
    except GameError as error:
        raise GameError(f"{error}; whole clips are kept; run it again to continue") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
