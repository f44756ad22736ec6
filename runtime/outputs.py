"""Writing files: complete or not at all, and never over an input.

A file is written under a temporary name beside the wanted one, flushed to the disk, and renamed. A run that
fails, is killed, or finds the disk full therefore leaves an existing file as it was.
"""

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import UserError, one_line

PART = ".part"  # in the name of an unfinished file, before its ending
ADVICE = {
    errno.ENOSPC: "free some space, or give a file on another disk",
    errno.EDQUOT: "free some space, or give a file on another disk",
    errno.EROFS: "give a file on a disk that can be written to",
    errno.EACCES: "give a file in a folder that you may write to",
    errno.EPERM: "give a file in a folder that you may write to",
    errno.ENOTDIR: "a part of the path is a file, not a folder; give another path",
    errno.EEXIST: "a part of the path is a file, not a folder; give another path",
    errno.EISDIR: "it is a folder; give the name of a file",
}


class OutputError(UserError):
    """A file that cannot be written, or that must not be."""


def output_error(path: str | Path, error: OSError) -> OutputError:
    """The error of the system as one that names the file and says what to do."""
    reason = error.strerror or one_line(error)
    return OutputError(f"{path}: cannot be written: {reason}; {ADVICE.get(error.errno, 'give another file')}")


def check_outputs(outputs: Iterable[str | Path], inputs: Iterable[str | Path] = ()) -> None:
    """Raises OutputError unless all `outputs`, files, can be written without harm.

    An output must be no input, whatever its name (links are followed), no existing file in a folder of
    `inputs`, no folder, and not given twice; the folder it goes to must be one, or must be possible to make.
    Call it before anything is loaded.
    """
    read = list(map(Path, inputs))
    files = {_identity(path) for path in read}
    folders = [path.resolve() for path in read if path.is_dir()]
    seen = set()
    for path in map(Path, outputs):
        identity = _identity(path)
        if identity in files:
            raise OutputError(f"{path}: is read by this run and would be overwritten; give another output")
        if identity in seen:
            raise OutputError(f"{path}: two outputs of this run would be this file; give each its own")
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file to write")
        if path.exists() and any(path.resolve().is_relative_to(folder) for folder in folders):
            raise OutputError(f"{path}: exists in a folder that this run reads; give an output elsewhere")
        if path.exists() and not os.access(path, os.W_OK):
            raise OutputError(f"{path}: is protected against writing; give another output")
        seen.add(identity)
        check_folder(path.parent, path)


def check_folder(folder: str | Path, output: str | Path | None = None) -> None:
    """Raises OutputError, about `output` (default: the folder), if files cannot be written to this folder,
    which need not exist."""
    folder = Path(folder)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    output = folder if output is None else output
    if not existing.is_dir():
        raise OutputError(f"{output}: {existing} is a file, not a folder; give another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: the folder {existing} cannot be written to; give another path")


def _identity(path: Path) -> tuple[int, int] | str:
    """What two names of one file have in common."""
    try:
        status = path.stat()
        return status.st_dev, status.st_ino
    except OSError:
        return str(path.resolve())


def make_folder(folder: str | Path) -> None:
    """Makes a folder and those above it. Raises OutputError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None


def open_part(path: str | Path) -> tuple[Path, Path]:
    """-> the temporary name for a file, in a folder that exists then, and its final name, for `commit`.

    Links are followed. Raises OutputError if the file cannot be written.
    """
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not os.access(target, os.W_OK):  # a rename would not ask
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from None
    # Machines that share a folder may write one file at the same time: each needs its own temporary file.
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{PART}{target.suffix}"), target


def remove_parts(folder: str | Path) -> None:
    """Removes the temporary files that killed runs left in a folder; no other run may be writing there."""
    for part in Path(folder).glob(f".*{PART}*"):
        with suppress(OSError):
            part.unlink()


def commit(part: Path, target: Path) -> None:
    """Renames a complete file to its name, so that after a loss of power one of the two versions is there."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    sync_folder(target.parent)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name to write to; after the `with` block that file becomes `path`.

    Makes missing folders. After an exception the temporary file is removed and `path` is as it was before. A
    device or a pipe is written to directly. Raises OutputError for an OSError, also for one that is raised in
    the block.
    """
    part, target = open_part(path)
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        try:
            yield part
            commit(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(path, error) from None


def sync_folder(folder: str | Path) -> None:
    """Flushes a folder's entries to the disk, where the system can do that."""
    with suppress(OSError):  # Windows cannot open a folder
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file, complete or not at all. Raises OutputError."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Writes a file of text in UTF-8, complete or not at all. Raises OutputError."""
    write_bytes(path, content.encode())


def sheet_path(video: Path) -> Path:
    """The contact sheet of a video: NAME_sheet.png beside it. A picture NAME.png is another file."""
    return video.with_name(f"{video.stem}_sheet.png")
