"""runtime/outputs.py and the video writer: files complete or not at all, and no input overwritten."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime import outputs, video
from runtime.outputs import OutputError, check_folder, check_outputs, replacing, write_bytes, write_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.bin"
    path.write_bytes(b"old")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(old):
    with replacing(old) as part:
        part.write_bytes(b"new")
        assert old.read_bytes() == b"old" and part.suffix == old.suffix and part.parent == old.parent
    assert old.read_bytes() == b"new" and names(old.parent) == ["old.bin"]


def test_after_an_exception_the_old_file_is_there_and_nothing_else(old):
    with pytest.raises(KeyError), replacing(old) as part:
        part.write_bytes(b"half")
        raise KeyError
    assert old.read_bytes() == b"old" and names(old.parent) == ["old.bin"]


def test_an_error_of_the_system_names_the_file_and_what_to_do(old):
    with pytest.raises(OutputError, match="old.bin: cannot be written: No space left.*free some space"):
        with replacing(old):
            raise OSError(errno.ENOSPC, "No space left on device")
    (old.parent / "file").write_text("")
    for path, part in ((old.parent, "is a folder|Is a directory"), (old / "x.png", "old.bin/x.png: cannot")):
        with pytest.raises(OutputError, match=part):
            write_bytes(path, b"")


def test_folders_are_made_and_links_are_followed(tmp_path, old):
    write_text(tmp_path / "a" / "b" / "c.txt", "ü")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "ü".encode()
    link = tmp_path / "link.bin"
    link.symlink_to(old)
    write_bytes(link, b"through")
    assert link.is_symlink() and old.read_bytes() == b"through"


def test_devices_are_written_to(tmp_path):
    write_text(os.devnull, "x")
    assert not Path(os.devnull).is_file()
    with pytest.raises(OutputError, match="/dev/full: cannot be written: No space left"):
        write_text("/dev/full", "x")


def test_no_output_may_be_an_input(tmp_path, old):
    link, hard, folder = tmp_path / "link.bin", tmp_path / "hard.bin", tmp_path / "folder"
    link.symlink_to(old)
    hard.hardlink_to(old)
    folder.mkdir()
    (folder / "x.npz").write_bytes(b"")
    for path in (old, link, hard, tmp_path / "folder" / ".." / "old.bin"):
        with pytest.raises(OutputError, match="is read by this run and would be overwritten"):
            check_outputs([path], [old])
    with pytest.raises(OutputError, match="two outputs"):
        check_outputs([old, link])
    with pytest.raises(OutputError, match="is a folder"):
        check_outputs([folder])
    with pytest.raises(OutputError, match="exists in a folder that this run reads"):
        check_outputs([folder / "x.npz"], [folder])
    with pytest.raises(OutputError, match="old.bin is a file, not a folder"):
        check_outputs([old / "x.png"])
    check_outputs([folder / "new.npz", tmp_path / "new" / "y.png"], [folder, old, tmp_path / "gone"])
    check_folder(tmp_path / "a" / "b")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_folder(old / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_protected_files_and_folders_are_refused(tmp_path, old):
    old.chmod(0o444)
    with pytest.raises(OutputError, match="protected"):
        check_outputs([old])
    with pytest.raises(OutputError, match="cannot be written"):
        write_bytes(old, b"")
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="cannot be written"):
        check_outputs([tmp_path / "new.png"])
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".gif"])
def test_a_failing_run_leaves_the_video_of_the_last_one(tmp_path, ending):
    path, grey = tmp_path / f"v{ending}", np.full((16, 32, 3), 90, np.uint8)
    video.write_video(path, [grey] * 5, 16)
    before = path.read_bytes()

    def frames():
        yield grey
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError):
        video.write_video(path, frames(), 16)
    with pytest.raises(video.VideoError, match="no frame"):
        video.write_video(path, [], 16)
    assert path.read_bytes() == before and names(tmp_path) == [path.name]


LIMITS = 0, 1, 100, 3000, 30_000  # bytes
FULL_DISK = """
import resource, signal, sys
import numpy as np
from runtime import video
from runtime.errors import run_script
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
noise = np.random.default_rng(0).integers(0, 256, (40, 72, 128, 3), np.uint8)
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # then writes fail
    print(run_script(lambda: video.write_video(sys.argv[1], noise, 16)), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")
@pytest.mark.parametrize("ending", [".mp4", ".webm", ".gif"])
def test_a_full_disk_is_one_message_at_any_point(tmp_path, ending):
    path = tmp_path / f"v{ending}"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", FULL_DISK, path, *map(str, LIMITS)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout == "2\n" * len(LIMITS), found.stderr
    message = f"error: {path}: cannot be written: File too large; give another file\n"
    assert found.stderr == message * len(LIMITS)
    assert path.read_bytes() == b"old" and names(tmp_path) == [path.name]


def test_a_rename_is_flushed_to_the_disk(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(outputs.os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(outputs.os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_text(tmp_path / "a.txt", "a")
    assert order == ["fsync", "rename", "fsync"]
