"""Worker processes that end with the process that started them, also while they still import."""

import multiprocessing
import os
import signal
import threading
import time

INTERVAL = 0.5  # seconds between two looks at who the parent is


def end_with_parent() -> None:
    """Sends SIGTERM to this process when its parent has ended, in whatever way.

    For workers that `multiprocessing` starts; does nothing in another process. Importing the package calls it
    too: a new worker first imports for seconds, and knows no `parent_process` in that time.
    """
    importing = getattr(multiprocessing.current_process(), "_inheriting", False)
    if importing or multiprocessing.parent_process() is not None:
        threading.Thread(target=_wait, args=(os.getppid(),), daemon=True).start()


def _wait(parent: int) -> None:
    known = multiprocessing.parent_process()
    if known is not None:
        known.join()
    else:
        while os.getppid() == parent:
            time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
