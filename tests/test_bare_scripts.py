"""Each script without arguments gives a result, or says what to do next and how long that takes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "tools", "vq_vae", "depth")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)
EXAMPLE = re.compile(r"for example: python \S+.*\(.*(second|minute|hour).*\)")
# An error says what to do; a progress bar counts to a total; a run that takes minutes announces it.
ANSWERS = re.compile(r"^error: .+; .+|\d+/\d+ \[|\b(seconds?|min|minutes?|hours?)\b", re.MULTILINE)


def test_all_scripts_are_found():
    assert {"train.py", "evaluate.py", "tools/pack.py", "depth/train_depth.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bare_script_tells_what_comes(script, tmp_path):
    """In an empty folder, where nothing can be found or overwritten; stopped as soon as it has told."""
    run = subprocess.Popen(
        [sys.executable, str(ROOT / script)],
        cwd=tmp_path,
        env={**os.environ, "DISPLAY": "", "WAYLAND_DISPLAY": "", "WANDB_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    said = ""
    try:
        while not ANSWERS.search(said) and (part := run.stdout.read1(4096)):
            said += part.decode().replace("\r", "\n")
    finally:
        if run.poll() is None and not EXAMPLE.search(said):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stdout.close()
    assert ANSWERS.search(said), said
    assert "Traceback" not in said
    if "the following arguments are required" in said:
        assert EXAMPLE.search(said), said
