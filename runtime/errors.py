"""The base class of errors that a user can fix, and the function that prints them."""

import errno
import io
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix: in a file, a flag or a setting.

    The message names the file or the flag, what was expected, what was found, and what to do.
    """


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def file_error(error: OSError) -> str:
    """An error of the operating system in one line: the file, the reason, what to do."""
    if error.filename is None:
        return one_line(error)
    advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "give another path"
    return f"{error.filename}: {error.strerror}; {advice}"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of Python or PyTorch (which has two kinds) says that memory is full."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "not enough memory" in str(error)


def run_script(body: Callable[[], int | None], interrupted: str = "") -> int:
    """Runs the body of a script and returns its exit status.

    What the body returns, or 0; 2 after one line on stderr for a UserError, an OSError or a lack of memory;
    130 after Ctrl-C, which prints `interrupted`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    try:
        status = body() or 0
        sys.stdout.flush()
        return status
    except (UserError, OSError) as error:
        reason = one_line(error) if isinstance(error, UserError) else file_error(error)
        print(f"error: {reason}", file=sys.stderr)
        drop_unwritten_output()
        return 2
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print(
            f"error: out of memory ({one_line(error)[:200]}); give smaller sizes or batches", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 130


def drop_unwritten_output() -> None:
    """Drops what stdout cannot take (a full disk, a closed pipe): Python would complain again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")
