"""What lies on a disk for good, and how much room there is."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

__all__ = ["error_number", "flush", "free_bytes"]


def flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int | None:
    """Bytes that may be written into a folder that is there, or will be; None where the file system does not tell."""
    try:
        return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free
    except (OSError, StopIteration):
        return None


def error_number(error: BaseException | None) -> int | None:
    """The operating system's number of an error: libraries written in Rust have errors of their own, which say it in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
