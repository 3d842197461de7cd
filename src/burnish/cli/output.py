"""Files that a command writes where `-o` says."""

from __future__ import annotations

from pathlib import Path

from burnish.core.errors import BurnishError


def write_new(file: Path, text: str) -> None:
    """Writes a file that is not there yet, whole or not at all.

    Raises:
        BurnishError: it is there, or its folder is not, or refuses to be written.
    """
    if file.exists():
        raise BurnishError(f"{file} exists already, and is left as it is", hint="give another file to -o")
    if not file.parent.is_dir():
        raise BurnishError(f"there is no folder {file.parent} to write {file.name} into")
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BurnishError(f"{file} cannot be written: {error.strerror or error}") from error
