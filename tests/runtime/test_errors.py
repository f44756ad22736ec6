"""runtime/errors.py: one line for what the user can mend."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import UserError, run_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("a.png: broken\n  give another"), 2, "error: a.png: broken give another\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: [Errno 28] No space left\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (None, 0, ""),
    ],
)
def test_the_exit_status_and_one_line(capsys, error, status, printed):
    def body() -> None:
        if error:
            raise error

    assert run_script(body, "stopped") == status
    assert capsys.readouterr().err == printed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(buffered):
    program = "import sys; from runtime.errors import run_script; sys.exit(run_script(lambda: print('x')))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
            env={"PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")
