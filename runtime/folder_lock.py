"""A lock on the folder that a script writes into, so that two runs do not destroy each other's files."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs in one folder are not noticed there
    fcntl = None

from runtime.config import SettingError
from runtime.outputs import make_folder, output_error, remove_parts

LOCK = ".lock"  # name of the lock file; the operating system frees a lock when its process ends in any way
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # from file systems without locks


@contextmanager
def lock_folder(folder: str | Path, script: str, setting: str, part: str = "") -> Iterator[None]:
    """Makes the folder and holds its lock during the `with` block.

    `script` is the name of the script and `setting` that of the flag or constant that gave the folder, both
    for messages. Runs with different non-empty `part`s may share a folder (shards); one without a part is
    alone in it, and what killed runs left half-written there is removed. At the end the lock file is removed,
    and the folder too if it is new and empty.

    Raises SettingError if another run holds the lock, OutputError if the folder cannot be made or used.
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        with ExitStack() as locks:
            _take(locks, folder / LOCK, not part, script, setting)
            if not part:
                remove_parts(folder)
            else:
                _take(locks, folder / f"{LOCK}-{part}", True, script, setting)
            yield
    finally:
        with suppress(OSError):  # not empty
            for path in new:
                path.rmdir()


def _take(locks: ExitStack, path: Path, alone: bool, script: str, setting: str) -> None:
    """Takes a lock file until `locks` ends: `alone`, or together with others that are not alone either."""
    if fcntl is None:
        return
    while True:
        try:
            file = locks.enter_context(open(path, "a+"))
        except OSError as error:
            raise output_error(path, error) from None
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read(200).strip() or f"another {script}"
            raise SettingError(
                f"{path.parent}: {other} is writing there; wait until it has ended, or use another {setting}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"note: {path.parent} cannot be locked; take care that no other run writes there")
            path.unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        # Its last holder removed it between `open` and `flock`.
    if alone:
        file.truncate(0)
        file.write(f"another {script} (process {os.getpid()})")
        file.flush()
    locks.callback(_remove, path, file)


def _remove(path: Path, file) -> None:
    """Removes a lock file unless another run shares it."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
