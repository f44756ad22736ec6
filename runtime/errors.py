"""The base class of errors that a user can fix, and the function that prints them."""

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


def run_script(body: Callable[[], int | None], interrupted: str = "") -> int:
    """Runs the body of a script and returns its exit status.

    What the body returns, or 0; 2 after one line on stderr for a UserError or an OSError; 130 after Ctrl-C,
    which prints `interrupted`.
    """
    try:
        status = body() or 0
        sys.stdout.flush()
        return status
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        drop_unwritten_output()
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
