"""Workers end with their parent, also while they still import."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import multiprocessing, os, sys, time
import runtime
if __name__ == "__mp_main__" and {importing}:
    print(os.getpid(), flush=True)
    time.sleep(60)  # a slow import

def work():
    runtime.end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("importing", [True, False])
def test_a_worker_ends_with_its_killed_parent(tmp_path, importing):
    script = tmp_path / "parent.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})" + PARENT.format(importing=importing))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while worker.is_running() and time.monotonic() < end:
        time.sleep(0.05)
    assert not worker.is_running()
