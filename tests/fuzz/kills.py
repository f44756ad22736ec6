"""Random SIGKILLs: a run that is killed, again and again, and started again ends like one that was not.

    python tests/fuzz/kills.py [--kills 30] [--seed 0] [--only NAME] [--record]        or: make kill

The runs are preprocess.py, train.py with both models, train_vqvae.py on tiny data, and, with --record,
record.py with the game. Each is first run unbroken, then killed at random times in its life until all kills
are used, and run to its end. After every kill each file under its own name must be complete. Prints a table;
exits with 1 if a run differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import numpy as np
import torch
from cases import PREPROCESS, TRAIN, VQVAE, write_world

import preprocess
import record
import train
from dataset.clip_check import check_clips
from dataset.token_files import Manifest, read_token_file
from runtime import checkpoint
from vq_vae import train_vqvae

OFTEN = ("SAVE_STEPS=1", "LOG_STEPS=1", "VAL_STEPS=3", "KEEP=2")


@dataclass(frozen=True)
class Run:
    """A script on the tiny world, its output folder, and how two finished runs are compared."""

    name: str
    main: Callable
    words: tuple[str, ...]
    out: str
    check: Callable[[Path], object]  # raises for a broken file; the result of equal runs is equal
    arguments: bool = False  # `main` takes the words; otherwise it reads the command line


def weights(out: Path) -> object:
    """Everything that a training run ends with, but for times; reads all its checkpoints."""
    found = [checkpoint.load(path) for path in sorted(out.glob("*.pt"))]
    if not (out / "last.pt").is_file():
        return None
    last = checkpoint.load(out / "last.pt")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if last["step"] else []
    steps = [row["step"] for row in rows if "loss" in row]
    assert len(found) >= 1
    return last["step"], last["best"], steps, [v.numpy().tobytes() for v in last["model"].values()]


def tokens(out: Path) -> object:
    """The token files of the manifest, and all others under their own name."""
    arrays = {path.name: read_token_file(path) for path in sorted(out.glob("*.npz"))}
    if not (out / "manifest.json").is_file():
        return None
    listed = [(clip.name, clip.frames, clip.split) for clip in Manifest.load(out).clips]
    return listed, {name: [a.tobytes() for a in content.values()] for name, content in arrays.items()}


def clips(out: Path) -> object:
    """The number of sound clips and of their frames."""
    if not list(out.glob("metadata/*.json")):
        return None
    report = check_clips(out, clips=2, progress=False)
    assert not report.bad_files, report.bad_files
    return report.clips, report.frames


RUNS = (
    Run("preprocess", preprocess.main, (*PREPROCESS[:3], "out", *PREPROCESS[4:]), "out", tokens, True),
    Run("train convgru", train.main, (*TRAIN, "OUT_DIR=convgru", "STEPS=8", *OFTEN), "convgru", weights),
    Run(
        "train geometry",
        train.main,
        (
            *TRAIN,
            "OUT_DIR=geometry",
            "MODEL=geometry",
            "DEPTH_CKPT=depth.pt",
            "CHANNELS=8",
            "COARSE_CHANNELS=8",
            "KEYFRAMES=2",
            "MOTION_STEPS=2",
            "STEPS=6",
            *OFTEN,
        ),
        "geometry",
        weights,
    ),
    Run(
        "train_vqvae",
        train_vqvae.main,
        (*VQVAE, "STEPS=8", *OFTEN[:2], "VAL_STEPS=8", "VAL_PICTURES=2"),
        "vq",
        weights,
    ),
)
RECORD = Run(
    "record",
    record.main,
    (
        "--out",
        "rec",
        "--clips",
        "2",
        "--clips_per_world",
        "1",
        "--frames",
        "24",
        "--jobs",
        "1",
        "--size",
        "64x36",
    ),
    "rec",
    clips,
    True,
)


def start(run: Run, folder: Path) -> int:
    """Starts the run in a process of its own; returns its id."""
    if process := os.fork():
        return process
    os.setsid()
    os.chdir(folder)
    log = os.open(folder / f"{run.out}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(log, number)
    given = {}
    for word in run.words:  # the last one counts
        given[word.partition("=")[0] if "=" in word else word] = word
    sys.argv = [run.name, *given.values()]
    code = 70
    try:
        code = run.main(list(run.words)) if run.arguments else run.main()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code or 0)


def finish(run: Run, folder: Path) -> float:
    """Runs to the end; returns the seconds. Raises AssertionError if the script fails."""
    began = time.monotonic()
    _, status = os.waitpid(start(run, folder), 0)
    log = (folder / f"{run.out}.log").read_text(errors="replace")
    assert os.waitstatus_to_exitcode(status) == 0, f"{run.name}: status {status}\n{log[-2000:]}"
    return time.monotonic() - began


def kill_run(run: Run, world: Path, kills: int, rng: random.Random) -> tuple[bool, float, int]:
    """-> whether the killed run ends like the unbroken one, its seconds, and the kills that hit it."""
    unbroken, broken = (Path(tempfile.mkdtemp(prefix="kill-")) for _ in range(2))
    try:
        for folder in (unbroken, broken):
            shutil.copytree(world, folder, dirs_exist_ok=True)
        seconds, hit = finish(run, unbroken), 0
        for _ in range(kills):
            process = start(run, broken)
            time.sleep(rng.uniform(0, seconds))
            os.killpg(process, signal.SIGKILL) if hit_running(process) else None
            _, status = os.waitpid(process, 0)
            hit += os.WIFSIGNALED(status)
            run.check(broken / run.out)  # raises if a file is not complete
            if not os.WIFSIGNALED(status):
                shutil.rmtree(broken / run.out)  # it was faster: begin anew
        finish(run, broken)
        same = run.check(broken / run.out) == run.check(unbroken / run.out)
        left = [path.name for path in (broken / run.out).rglob(".*") if path.name != ".recording.json"]
        return same and not left, seconds, hit
    finally:
        for folder in (unbroken, broken):
            shutil.rmtree(folder)


def hit_running(process: int) -> bool:
    """Whether the process has not ended by itself, and is the leader of its group by now."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            if os.getpgid(process) == process:
                return True
        except ProcessLookupError:
            return False
        time.sleep(0.001)
    return False


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="over all runs (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (default 0)")
    parser.add_argument("--only", default="", help="a run whose name has this in it")
    parser.add_argument("--record", action="store_true", help="kill record.py too; needs the game")
    args = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    os.environ |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    runs = [run for run in (*RUNS, *([RECORD] if args.record else [])) if args.only in run.name]
    world, rng, bad = Path(tempfile.mkdtemp(prefix="kill-world-")), random.Random(args.seed), 0
    try:
        if not os.fork():
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            write_world(world)
            os._exit(0)
        os.wait()
        shutil.rmtree(world / "run")
        for n, run in enumerate(runs):
            kills = args.kills // len(runs) + (n < args.kills % len(runs))
            same, seconds, hit = kill_run(run, world, kills, rng)
            bad += not same
            how = "equal" if same else "DIFFERENT"
            print(f"{run.name}: {kills} kills, {hit} while it ran, {seconds:.1f} s: {how}", flush=True)
    finally:
        shutil.rmtree(world)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
