"""Reading .npz files that may be damaged, or made to harm."""

import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from runtime.errors import UserError, one_line

MOST_BYTES = 2**29  # of one array, where the caller knows no closer limit


class ArraysError(UserError):
    """An .npz file that cannot be used. Names the file; `reason` is the message without it."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def read_arrays(
    path: str | Path,
    required: Collection[str],
    optional: Collection[str] = (),
    most_bytes: int = MOST_BYTES,
) -> dict[str, np.ndarray]:
    """The `required` arrays of an .npz file, and those of the `optional` ones that it has.

    Nothing is inflated if an array would take more than `most_bytes`. Python objects are not loaded. Raises
    ArraysError, which says what is wrong in one line; FileNotFoundError if there is no such file.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        missing = [name for name in required if name not in sizes]
        if missing:
            raise ArraysError(
                f"{path}: has no array {', '.join(missing)}, only {', '.join(sizes) or 'nothing'}"
            )
        names = [*required, *(name for name in optional if name in sizes)]
        for name in names:
            if sizes[name] > most_bytes:
                raise ArraysError(
                    path,
                    f"its array {name} takes {sizes[name] / 1e6:.0f} MB, at most "
                    f"{most_bytes / 1e6:.0f} MB can be right",
                )
        with np.load(path) as arrays:
            return {name: arrays[name] for name in names}
    except (FileNotFoundError, ArraysError):
        raise
    except Exception as error:  # a damaged zip can fail in any way
        raise ArraysError(path, f"cannot be read as .npz ({one_line(error)[:200]})") from None
