"""What a command checks of the paths that it was given before it begins to work. Nothing is created by looking.

Each function returns the path, or raises an OSError whose text is one line that names it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def readable_file(path: Path) -> Path:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} does not exist")
    _must_be_a_file(path)
    with path.open("rb"):
        return path


def writable_file(path: Path) -> Path:
    """A file, or a place for one in a folder that is there or could be made."""
    if os.path.lexists(path):
        _must_be_a_file(path)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    writable_folder(path.parent)
    return path


def writable_folder(path: Path) -> Path:
    """A folder, or a place for one. A file without a name, made where the path begins to exist, is the only sure test:
    permissions do not say that a file system is read-only or full."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise NotADirectoryError(
            f"{path} is not a folder" if existing == path.absolute() else f"{path}: {existing} is not a folder"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            return path
    except OSError as error:
        raise PermissionError(f"{path} cannot be written: {error.strerror}") from None


def _must_be_a_file(path: Path) -> None:
    """Anything else that can be opened, such as a FIFO, would block or swallow what is written."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no file'}")


def in_words(error: OSError) -> str:
    """An OSError of ours or of the system in one line."""
    if error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"
