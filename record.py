#!/usr/bin/env python3
"""Records play with actions from Luanti, an open-source voxel game, in GF-Minecraft's layout.

    python record.py --out data/luanti --clips 308 --seed 1    a scripted player, in the background
    python record.py --out data/mine --human                    you play, in a window
    python record.py --check data/luanti                       checks a data set, also GF-Minecraft

Needs the game, a virtual display (Xvfb), and a C compiler:
    apt-get install minetest xvfb gcc libc6-dev                 (newer systems: luanti luanti-game-minetest)

The game runs in lockstep: one drawn frame is 1/16 s of game time however slow the machine is, and the input
for frame k+1 is sent while the game waits at frame k. Each picture contains its frame number, which must
match the line in the game's log. Depth and the nodes around the player are recorded too (depth/*.npz, see
dataset/surroundings.py). Run it again to continue: finished clips are kept. Every --clips_per_world clips
share one generated world; preprocess.py assigns whole worlds to a split. Nothing is written outside --out.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm

from dataset.clip_check import check_clips
from dataset.clip_report import report_text
from dataset.recordings import is_complete, remove_unfinished
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
from luanti.recorder import BIOMES, TIMES, WEATHERS, ClipPlan, RecorderOptions, plan_clips, record_world
from runtime.config import ScriptParser, SettingError, non_negative_int, positive_int
from runtime.errors import run_script
from runtime.folder_lock import lock_folder
from runtime.outputs import write_text
from runtime.ranges import FieldOfView, flag
from runtime.video import VideoError

EXAMPLE = "python record.py --out data/mine --clips 4 --frames 600  (minutes; needs the game Luanti)"

HUMAN_WIDTH = 1024  # pixels, least width of the window that a person plays in


@dataclass(frozen=True)
class RecordConfig:
    """The parsed command line of a recording."""

    out: Path
    clips: int
    frames: int  # per clip
    clips_per_world: int
    seed: int
    jobs: int
    size: tuple[int, int]  # width, height
    vertical_fov: float  # degrees
    biomes: list[str]
    times: list[str]
    weathers: list[str]
    human: bool
    forward: bool

    @property
    def picture(self) -> Picture:
        """The pictures; the window is scaled up if it is too small for the barcode or for a person."""
        width, height = self.size
        least = HUMAN_WIDTH if self.human else BITS * STRIP
        return Picture(width, height, self.vertical_fov, scale=-(-least // width))

    def folder_settings(self) -> dict:
        """The settings by flag that must be the same in all runs with one `out` folder."""
        return {
            "seed": self.seed,
            "frames": self.frames,
            "clips_per_world": self.clips_per_world,
            "size": list(self.size),
            "vertical_fov": self.vertical_fov,
            "biomes": self.biomes,
            "time": self.times,
            "weather": self.weathers,
            "human": self.human,
            "forward": self.forward,
        }


# ------------------------------------------------------------ command line


def size(text: str) -> tuple[int, int]:
    """argparse type: WIDTHxHEIGHT, both multiples of BLOCK, since each block of pixels gets one depth
    value.
    """
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) > 0 and int(height) > 0):
        raise argparse.ArgumentTypeError(f"{text}: expected WIDTHxHEIGHT, such as 256x144")
    if int(width) % BLOCK or int(height) % BLOCK:
        raise argparse.ArgumentTypeError(
            f"{text}: width and height must be multiples of {BLOCK}: {BLOCK}x{BLOCK} pixels share one depth"
        )
    return int(width), int(height)


def some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """argparse type: names from `known`, separated by commas, or "any" for all of them."""

    def names(text: str) -> list[str]:
        given = list(known) if text == "any" else text.split(",")
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: expected some of {', '.join(known)}, or any")
        return given

    return names


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ScriptParser(description=__doc__, example=EXAMPLE, allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--out", type=Path, help="folder for the clips; run again to continue")
    mode.add_argument("--check", type=Path, metavar="DIR", help="check the clips in DIR and record nothing")
    add = parser.add_argument
    add("--clips", type=positive_int, default=308, help="number of clips (default 308)")
    add("--frames", type=positive_int, default=1200, help="frames per clip, 16 per second (default 1200)")
    add("--clips_per_world", type=positive_int, default=7, help="clips that share a world (default 7)")
    add("--seed", type=non_negative_int, default=1, help="of worlds, start places and player (default 1)")
    jobs = max(1, min(os.cpu_count() or 1, 8))
    add("--jobs", type=positive_int, default=jobs, help=f"games at once (default here {jobs})")
    add("--size", type=size, default=(256, 144), help="of the pictures, WIDTHxHEIGHT (default 256x144)")
    add("--vertical_fov", type=flag(FieldOfView), default=70.0, help="vertical field of view in degrees (70)")
    add("--biomes", type=some_of(BIOMES), default=list(BIOMES), help="separated by commas, or any (default)")
    times, weathers = tuple(TIMES), WEATHERS
    add("--time", type=some_of(times), default=["noon"], help=f"{', '.join(times)}, or any (default noon)")
    weather_help = f"{', '.join(weathers)}, or any (default clear)"
    add("--weather", type=some_of(weathers), default=["clear"], help=weather_help)
    player = parser.add_mutually_exclusive_group()
    player.add_argument("--human", action="store_true", help="play yourself, in a window; close it to end")
    player.add_argument(
        "--forward",
        action="store_true",
        help="a player that holds W, and turns by 60 degrees when held up for half a second: what section "
        "walk of evaluate.py does in the learned world",
    )
    return parser


def parse(arguments: list[str] | None) -> Path | RecordConfig:
    """Reads the command line: the folder to check, or the recording. Ends the process if it is not valid."""
    args = build_parser().parse_args(arguments)
    if args.check:
        return args.check
    return RecordConfig(
        out=args.out,
        clips=args.clips,
        frames=args.frames,
        clips_per_world=args.clips_per_world,
        seed=args.seed,
        jobs=args.jobs,
        size=args.size,
        vertical_fov=args.vertical_fov,
        biomes=args.biomes,
        times=args.time,
        weathers=args.weather,
        human=args.human,
        forward=args.forward,
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if the check has problems or a clip failed; 2 on an error; 130 on
    Ctrl-C.
    """
    config = parse(arguments)
    if isinstance(config, Path):
        return run_script(lambda: check(config))
    return run_script(lambda: run(config), "stopped; finished clips are kept; run it again to continue")


# ------------------------------------------------------------ the run


def check(folder: Path) -> int:
    """Checks the clips in `folder` and prints the report; returns 1 if there are problems."""
    report = check_clips(folder)
    print(report_text(report))
    return 1 if report.problems else 0


def run(config: RecordConfig) -> int:
    """Records the missing clips and returns the exit status. Raises UserError."""
    if config.human and not os.environ.get("DISPLAY"):
        raise SettingError("--human needs a display, and DISPLAY is not set; run it in a desktop session")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM has the effect of Ctrl-C
    with lock_folder(config.out, "record.py", "--out"):
        return record_in_folder(config)


def record_in_folder(config: RecordConfig) -> int:
    """As `run`, in a folder that no other run uses."""
    folder = config.out.resolve() / ".recorder"
    folder.mkdir(exist_ok=True)
    try:
        check_same_settings(config)
        for profile in folder.glob("profile-*"):  # of a run that was killed
            shutil.rmtree(profile, ignore_errors=True)
        remove_unfinished(config.out)
        version = game_version(find_game())
        build_shim(folder / "lockstep.so")
        return record(config, folder, labels={"game": version})
    except GameError as error:
        raise GameError(f"{error}; finished clips are kept; run it again to continue") from None
    finally:
        remove_unfinished(config.out)  # of recorders that were stopped
        shutil.rmtree(folder, ignore_errors=True)


def check_same_settings(config: RecordConfig) -> None:
    """Writes the run's settings to the folder. Raises SettingError if its clips have other settings."""
    path = config.out / ".recording.json"
    settings = config.folder_settings()
    if path.is_file() and any(config.out.glob("metadata/*.json")):
        recorded = json.loads(path.read_text())
        if not recorded.get("depth"):
            raise SettingError(
                f"{path}: an earlier version recorded these clips, without depth; use another --out"
            )
        for name, value in settings.items():
            if recorded.get(name, False) != value:
                raise SettingError(
                    f"{path}: this folder was recorded with --{name} {recorded.get(name)}, not {value}; "
                    "use the same or another --out"
                )
    write_text(path, json.dumps({**settings, "depth": True}, indent=1) + "\n")


def record(config: RecordConfig, folder: Path, labels: dict[str, str]) -> int:
    """Records the missing clips; `labels` are added to their metadata. Returns the exit status."""
    plans = plan_clips(
        config.seed, config.clips, config.clips_per_world, config.biomes, config.times, config.weathers
    )
    missing = [plan for plan in plans if not is_complete(config.out, plan.name)]
    print(f"{len(plans)} clips, {len(plans) - len(missing)} of them recorded already")
    if not missing:
        return 0
    worlds = by_world(missing)
    options = RecorderOptions(
        config.out.resolve(), config.frames, config.picture, config.human, config.forward, labels
    )
    progress = Progress(len(missing), config.frames)
    try:
        run_workers(worlds, 1 if config.human else min(config.jobs, len(worlds)), options, folder, progress)
    finally:
        progress.close()
    return 1 if progress.failed else 0


def by_world(plans: list[ClipPlan]) -> list[list[ClipPlan]]:
    """Groups the clips that share a world."""
    return [list(group) for _, group in groupby(plans, key=lambda plan: plan.world_seed)]


# ------------------------------------------------------------ workers


def work(job: int, options: RecorderOptions, folder: Path, pipe: Connection) -> None:
    """A worker process: requests worlds to record from `pipe` until it receives None."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and sends SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds: closes the game, removes the profile
    try:
        while True:
            pipe.send(("ready", None))
            plans = pipe.recv()
            if plans is None:
                return
            record_world(plans, options, folder, job, lambda *event: pipe.send(event))
    except (GameError, VideoError, OSError) as error:  # OSError: a full disk, for example
        pipe.send(("error", str(error)))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Progress:
    """Collects the workers' events and shows a progress bar."""

    def __init__(self, clips: int, frames: int):
        self.clips = clips  # to record
        self.ended: dict[str, str] = {}  # clip -> "complete" or why it ended early
        self.failed: dict[str, str] = {}  # clip -> why it could not be recorded
        self.lost = 0  # discarded frames
        self.began = time.monotonic()
        self.bar = tqdm(total=clips * frames, unit=" frames", smoothing=0.1, dynamic_ncols=True)

    def handle(self, event: str, value: object) -> None:
        """Handles one event of `record_world`. Raises GameError for "error"."""
        if event == "frames":
            self.bar.update(value)
            self.bar.set_postfix_str(
                f"{len(self.ended)}/{self.clips} clips, {self.speed / FPS:.1f}x real time"
            )
        elif event == "lost":
            self.bar.update(-value)
            self.lost += value
        elif event == "clip":
            self.ended[value[0]] = value[1]
        elif event == "failed":
            self.failed[value[0]] = value[1]
        elif event == "note":
            tqdm.write(value)
        elif event == "error":
            raise GameError(value)

    @property
    def speed(self) -> float:
        """Recorded frames per second since the beginning, including the time to start the game and load
        terrain.
        """
        return self.bar.n / (time.monotonic() - self.began)

    def close(self) -> None:
        """Ends the bar and prints a summary."""
        self.bar.close()
        complete = sum(how == "complete" for how in self.ended.values())
        print(
            f"{len(self.ended)} clips in {time.monotonic() - self.began:.0f} s, {complete} complete and "
            f"{len(self.ended) - complete} ended early; {self.bar.n} frames kept and {self.lost} discarded: "
            f"{self.speed:.1f} frames/s, {self.speed / FPS:.1f}x real time"
        )
        for name, why in self.failed.items():
            print(f"{name}: could not be recorded: {why}", file=sys.stderr)


def run_workers(
    worlds: list[list[ClipPlan]], jobs: int, options: RecorderOptions, folder: Path, progress: Progress
) -> None:
    """Distributes the worlds to `jobs` worker processes until all are recorded."""
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
                    event, value = pipe.recv()
                except (EOFError, ConnectionError):  # the worker has ended
                    running.remove(pipe)
                    workers[pipe].join()
                    if status := workers[pipe].exitcode:
                        progress.handle("failed", (workers[pipe].name, f"it ended with status {status}"))
                    continue
                if event == "quit":
                    worlds.clear()
                if event == "ready":
                    pipe.send(worlds.pop(0) if worlds else None)
                else:
                    progress.handle(event, value)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join(20)
            worker.kill()


if __name__ == "__main__":
    raise SystemExit(main())
