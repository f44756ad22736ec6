"""The campaign of malformed inputs: every case in its own process, forked from one that has imported all.

    python tests/fuzz/campaign.py [--every 12] [--only WORD] [--keep]        or: make fuzz

A case runs a real script on one malformed input. It must end with the expected exit code within its time;
without a traceback or a signal; with exactly one line `error: ...` (or one `skipped ...` for a bad clip) that
names the input; and with everything else on disk as it was. Prints the cases that fail; exits with 1 if any.
"""

import argparse
import contextlib
import hashlib
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

SECONDS = 40  # of CPU time, for one case
MEMORY = 12 * 2**30  # address space of one case; an array bomb must not get near it


@dataclass(frozen=True)
class Case:
    """A script, its command line, and how its input is spoiled. Paths are relative to the scratch folder."""

    name: str
    script: str  # module of the script
    words: tuple[str, ...]
    spoil: Callable[[Path], None]  # is given the scratch folder
    names: str  # what the message must name
    status: int | tuple[int, ...] = 2  # allowed exit codes
    writes: tuple[str, ...] = ()  # what a case that does not fail may write below


@dataclass
class Result:
    """How a case ended."""

    case: Case
    problems: list[str]
    output: str
    seconds: float


def snapshot(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, and of where links lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.stat().st_size else ""
        else:
            found[name] = "folder"
    return found


def child(case: Case, folder: Path) -> None:
    """Runs the case in this process, which ends with its exit code."""
    os.chdir(folder)
    log = os.open(folder.parent / "output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = [f"{case.script}.py", *case.words]
    code = 70
    try:
        module = importlib.import_module(case.script)
        code = module.main() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run(case: Case, world: Path, keep: bool = False) -> Result:
    """Runs a case on a copy of the folder `world`."""
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder = scratch / "work"
    shutil.copytree(world, folder, symlinks=True)
    case.spoil(folder)
    before, began = snapshot(folder), time.monotonic()
    if not (process := os.fork()):
        child(case, folder)
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() - began > 6 * SECONDS:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    seconds = time.monotonic() - began
    output = (scratch / "output.txt").read_text(errors="replace")
    problems = list(check(case, os.waitstatus_to_exitcode(ended[1]), output, before, snapshot(folder)))
    if problems and keep:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(scratch)
    return Result(case, problems, output, seconds)


def check(case: Case, status: int, output: str, before: dict, after: dict):
    """Yields what is wrong with how a case ended."""
    allowed = case.status if isinstance(case.status, tuple) else (case.status,)
    if status < 0:
        yield f"ended by {signal.Signals(-status).name}"
    elif status not in allowed:
        yield f"exit code {status}, expected {case.status}"
    if "Traceback" in output or "Exception ignored" in output:
        yield "traceback"
    lines = output.replace("\r", "\n").splitlines()
    errors = [line for line in lines if "error: " in line and not line.startswith("[")]
    told = errors or [line for line in lines if "skipped" in line or "bad file" in line or "warning" in line]
    if status == 2 and len(errors) != 1:
        yield f"{len(errors)} error messages"
    if case.names and not any(case.names in line for line in told):
        yield f"no message names {case.names}"
    if any(len(line) > 1500 for line in told):
        yield "a message of more than 1,500 characters"
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    may = ("outputs",) if status == 2 else ("outputs", *case.writes)
    harmed = [name for name in changed if name in before or not name.startswith(may) or status == 2]
    if harmed and not (status != 2 and all(name.startswith(case.writes or ("outputs",)) for name in harmed)):
        yield f"changed on disk: {', '.join(sorted(harmed)[:5])}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th case")
    parser.add_argument("--only", default="", metavar="WORD", help="only cases with this in their name")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases that fail")
    args = parser.parse_args()
    results = campaign(args.every, args.only, args.keep, report=True)
    return 1 if any(result.problems for result in results) else 0


def campaign(every: int, only: str = "", keep: bool = False, report: bool = False) -> list[Result]:
    """Runs every N-th case whose name has `only` in it; with `report` prints those that fail and counts."""
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    os.environ |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    from cases import all_cases, write_world

    world = Path(tempfile.mkdtemp(prefix="fuzz-world-"))
    try:
        if not os.fork():  # the parent stays without threads
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            write_world(world)
            os._exit(0)
        os.wait()
        selected = [case for case in all_cases()[::every] if only in case.name]
        for script in {case.script for case in selected}:
            importlib.import_module(script)
        results, began = [], time.monotonic()
        for case in selected:
            results.append(run(case, world, keep))
            if report and len(results) % 50 == 0:
                print(f"{len(results)} of {len(selected)} cases", flush=True)
            if report and results[-1].problems:
                print(f"FAILED {case.name}: {'; '.join(results[-1].problems)}", flush=True)
                print("    " + results[-1].output.strip()[-600:].replace("\n", "\n    "), flush=True)
    finally:
        shutil.rmtree(world)
    if report:
        kinds = Counter("right" if not r.problems else r.problems[0].split(",")[0] for r in results)
        print(f"{len(results)} cases in {time.monotonic() - began:.0f} s: {dict(kinds)}")
    return results


if __name__ == "__main__":
    raise SystemExit(main())
