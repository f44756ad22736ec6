"""The lock on an output folder: one run at a time, shards together, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime import folder_lock
from runtime.config import SettingError
from runtime.folder_lock import lock_folder

ROOT = Path(__file__).resolve().parents[2]


def locked(folder: Path, part: str = "") -> bool:
    """Whether a run cannot have the folder."""
    try:
        with lock_folder(folder, "train.py", "OUT_DIR", part):
            return False
    except SettingError:
        return True


def test_a_second_run_is_refused_and_names_the_first(tmp_path):
    with lock_folder(tmp_path, "train.py", "OUT_DIR"):
        with pytest.raises(SettingError, match=rf"{tmp_path}: another train.py \(process \d+\) is writing"):
            with lock_folder(tmp_path, "preprocess.py", "--out_dir"):
                raise AssertionError("two runs at once")
        assert locked(tmp_path, "shard-1-of-2")
    assert not locked(tmp_path)


def test_shards_share_a_folder_but_not_a_part(tmp_path):
    with lock_folder(tmp_path, "preprocess.py", "--out_dir", "shard-1-of-2"):
        assert not locked(tmp_path, "shard-2-of-2")
        assert locked(tmp_path, "shard-1-of-2") and locked(tmp_path)
    assert not locked(tmp_path)


@pytest.mark.parametrize("part", ["", "shard-1-of-2"])
def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path, part):
    with pytest.raises(KeyError), lock_folder(tmp_path / "new" / "out", "train.py", "OUT_DIR", part):
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    with lock_folder(tmp_path / "old", "train.py", "OUT_DIR", part):
        pass
    assert not list((tmp_path / "old").iterdir()) and (tmp_path / "old").is_dir()


def test_a_killed_run_frees_its_folder(tmp_path):
    code = f"""
import os
from runtime.folder_lock import lock_folder
with lock_folder({str(tmp_path)!r}, "train.py", "OUT_DIR"):
    print("ready", flush=True)
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    (tmp_path / ".last.0123abcd.part.pt").touch()  # it was writing
    assert (tmp_path / folder_lock.LOCK).is_file() and not locked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_only_noted(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(folder_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with lock_folder(tmp_path, "train.py", "OUT_DIR"):
        assert "cannot be locked" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
