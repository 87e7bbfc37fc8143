"""Tuned configs in files: ``configs/<slug>/<kernel>.json``, shipped in the wheel and overlaid by the user's.

A slug is a device (``nvidia_h200``, entries measured there) or a target (``sm_90``, entries ranked without a GPU).
One entry per line, sorted, so that a change reads well in a diff::

    {"schema": 1, "kernel": "conv", "entries": [
    {"key": {"pixels": 100352, ...}, "config": {"BLOCK_M": 128, ...}, "origin": "model", "version": 1, ...}
    ]}

Reading never raises: a file that cannot be read, and an entry that cannot be used, is one warning and counts as absent
(``schema.py`` says what is checked). Writing loses nothing: it locks the file, merges and replaces it in one step; what
it does not understand stays in the file as it is, or the file is set aside under another name.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import schema
from .config import Config, Tunable
from .device import DEVICES, DeviceSpec
from .log import logger, one_line

SHIPPED = Path(__file__).resolve().parent / "configs"
LARGEST_FILE = 16 << 20  # bytes; ten thousand entries take 5 MB
MOST_WARNINGS = 20  # of one file: whoever reads them has seen what is wrong
LOCK_SECONDS = 60.0  # a writer holds the lock for milliseconds
LEFTOVER_SECONDS = 3600.0  # so old is a temporary file only if its process was killed
LEFTOVERS = re.compile(r"tmp\w{8}\.tmp|.+\.json\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Entry:
    """One tuned config.

    Attributes:
        key: the features it holds for.
        origin: ``"measured"`` on the device, ``"model"``: ranked without a GPU, or ``"rehearsed"`` on the CPU.
        version: the kernel's version of its parameters.
        us, torch_us: medians of our kernel and of torch's operator on the same inputs; ``None`` if not measured.
        extra: everything else in the file (environment, static figures), kept as it is.
        line: where it stands in its file; 0 if it comes from none.
    """

    key: dict[str, int | str]
    config: Config
    origin: str
    version: int = 1
    us: float | None = None
    torch_us: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    line: int = field(default=0, compare=False, repr=False)

    def triton(self) -> str:
        """The version that it was made with; empty if unknown."""
        return str(self.extra.get("env", {}).get("triton") or "")

    def staleness(self) -> str:
        """Why the entry deserves a second look: it was made with another Triton minor. Empty if it does not."""
        made_with = self.triton()
        running = _triton_minor()
        if not made_with or not running or made_with.split(".")[:2] == running.split("."):
            return ""
        return f"made with Triton {made_with}, running {running}"

    def rejected(self, tunable: Tunable) -> str:
        """Why the kernel as it is now takes no notice of the entry. Empty if it does."""
        if self.version != tunable.version:
            return f"made for version {self.version} of the kernel, which is at {tunable.version}"
        return tunable.undeclared(self.config)

    def to_json(self) -> dict[str, Any]:
        known = {"key": self.key, "config": dict(self.config), "origin": self.origin, "version": self.version}
        times = {name: value for name, value in (("us", self.us), ("torch_us", self.torch_us)) if value is not None}
        return {**known, **times, **self.extra}

    def to_text(self) -> str:
        """One line for a file. Raises ValueError if it could not be read again."""
        text = json.dumps(self.to_json(), sort_keys=True)
        schema.check(text)
        return text

    @classmethod
    def from_text(cls, text: str, line: int = 0) -> Entry:
        """Raises ValueError in words if the schema does not hold it."""
        rest = schema.check(text)
        key, config, origin = (rest.pop(name) for name in schema.REQUIRED)
        times = {name: rest.pop(name, None) for name in ("us", "torch_us")}
        return cls(key, Config(config), origin, rest.pop("version", 1), **times, extra=rest, line=line)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        return cls.from_text(json.dumps(data))


# --- where files are -------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The user's folder: ``TRITUNE_CACHE_DIR``, else the platform's cache folder. Raises OSError if there is none."""
    override = os.environ.get("TRITUNE_CACHE_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "tritune"
    except RuntimeError:
        raise OSError("this user has no home folder: set TRITUNE_CACHE_DIR to a folder for tuned configs") from None


def user_paths() -> list[Path]:
    """Folders of user entries, first wins: those of ``TRITUNE_CONFIG_PATH``, then ``configs`` in the cache folder."""
    folders = [Path(part) for part in os.environ.get("TRITUNE_CONFIG_PATH", "").split(os.pathsep) if part]
    try:
        return [*folders, cache_dir() / "configs"]
    except OSError:
        return folders


def files() -> Iterator[tuple[str, Path]]:
    """Every file that a lookup may read, with its layer: ``"user"`` or ``"shipped"``."""
    for layer, folder in [*(("user", folder) for folder in user_paths()), ("shipped", SHIPPED)]:
        try:
            found = sorted(folder.glob("*/*.json"))
        except OSError as error:
            warn(f"ignoring the tuned configs in {folder}: {error.strerror}")
            continue
        for path in found:
            yield layer, path


def layers(kernel: str, device: DeviceSpec) -> Iterator[tuple[str, Path, tuple[Entry, ...]]]:
    """Entries to search, nearest first: this device's, its siblings', its target's; each time the user's before those
    that ship. With each its place (``"user"``, ``"shipped"``, ``"sibling"`` or ``"target"``) and its file."""
    siblings = [spec.slug for spec in DEVICES.values() if spec.target == device.target and spec.slug != device.slug]
    own = user_paths()
    for place, slugs in (("shipped", [device.slug]), ("sibling", siblings), ("target", [device.target])):
        for where, folders in (("user", own), (place, [SHIPPED])):
            for path in (folder / slug / f"{kernel}.json" for folder in folders for slug in slugs):
                yield where, path, load(path, kernel)


# --- reading ---------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """What a file holds.

    Attributes:
        kernel: whose configs they are; empty if the file does not say.
        entries: those that can be used.
        texts: their text by key, as :func:`_key` writes it.
        strange: texts of the others.
        fields: texts of the fields that this version does not know.
        problems: one line about each of the others, if they are not too many, or about the whole file.
    """

    kernel: str = ""
    entries: tuple[Entry, ...] = ()
    texts: dict[str, str] = {}  # noqa: RUF012  never written to
    strange: tuple[str, ...] = ()
    fields: dict[str, str] = {}  # noqa: RUF012  never written to
    problems: tuple[str, ...] = ()


_loaded: dict[Path, File] = {}
_warned: set[str] = set()


def clear() -> None:
    """Forgets what was read, and what was warned of."""
    _loaded.clear()
    _warned.clear()


def warn(message: str) -> None:
    """Logs a warning, unless it was logged before."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(one_line(message))


def load(path: Path, kernel: str = "") -> tuple[Entry, ...]:
    """The entries of a file, read once; none if it is absent, cannot be read or is for another kernel than this."""
    file = contents(path)
    for problem in file.problems:
        warn(problem)
    if kernel and file.kernel not in ("", kernel):
        warn(f"ignoring {path}: it holds configs of {file.kernel}")
        return ()
    return file.entries


def contents(path: Path) -> File:
    """All of a file, read once."""
    file = _loaded.get(path)
    if file is None:
        file = _loaded[path] = _contents(path)
    return file


def _contents(path: Path) -> File:
    try:
        return _parsed(path, _text(path))
    except FileNotFoundError:
        return File()
    except OSError as error:
        return File(problems=(f"ignoring the tuned configs in {path}: {error.strerror or error}",))
    except ValueError as error:
        return File(problems=(f"ignoring the tuned configs in {path}: {error}",))


def _size(path: Path) -> int:
    """Bytes of a file. Raises OSError if it is none, before anything is opened: a FIFO would wait for a writer."""
    try:
        found = path.stat()
    except PermissionError:  # a folder on the way is closed to this user, so nothing here is theirs
        raise FileNotFoundError(path) from None
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise OSError(f"{path} is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file")
    return found.st_size


def _text(path: Path) -> str:
    """Raises OSError if the file cannot be read, and ValueError if it holds no text."""
    if _size(path) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB")
    return path.read_bytes().decode("utf-8-sig")


def _parsed(path: Path, text: str) -> File:
    """Raises ValueError if nothing of the file can be used."""
    document = schema.parse(text)
    entries, texts, strange, problems = [], {}, [], []
    for line, one in document.entries:
        try:
            entry = Entry.from_text(one, line)
            if _key(entry) in texts:
                raise ValueError("an earlier one has its key")
        except ValueError as error:
            strange.append(one)
            problems.append(f"ignoring an entry in {path}, line {line}: {error}")
            continue
        entries.append(entry)
        texts[_key(entry)] = one
    if len(problems) > MOST_WARNINGS:
        problems[MOST_WARNINGS:] = [f"ignoring {len(problems) - MOST_WARNINGS} more entries in {path}"]
    return File(document.kernel, tuple(entries), texts, tuple(strange), document.fields, tuple(problems))


def _key(entry: Entry) -> str:
    return json.dumps(entry.key, sort_keys=True)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, kernel: str, entries: Iterable[Entry], fields: Mapping[str, str] = MappingProxyType({})) -> None:
    """Merges entries into a file: same key, new entry. Safe beside other writers and readers.

    Args:
        fields: texts of more fields of the file; one that it has already stays.

    Raises:
        OSError: in one sentence, if something there is no file, or cannot be read, locked or written.
    """
    new = {_key(entry): entry.to_text() for entry in entries}
    target = Path(os.path.realpath(path))  # a link stays a link
    with contextlib.suppress(FileNotFoundError):
        _size(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        sweep(target.parent, LEFTOVERS)
        file = _kept(target, kernel)
        texts = {**file.texts, **new}
        lines = ",\n".join(_one_line(text) for text in (*(texts[key] for key in sorted(texts)), *file.strange))
        head = {"schema": str(schema.SCHEMA), "kernel": json.dumps(kernel), **fields, **file.fields}
        first = ", ".join(f"{json.dumps(name)}: {_one_line(text)}" for name, text in head.items())
        _replace(target, f'{{{first}, "entries": [\n{lines}\n]}}\n')
    _loaded.pop(path, None)
    _loaded.pop(target, None)


def _one_line(text: str) -> str:
    """JSON has no line breaks within its strings."""
    return re.sub(r"[\r\n][ \t\r\n]*", " ", text)


def _kept(path: Path, kernel: str) -> File:
    """What a file holds that is about to be written again. One that cannot be extended is set aside first."""
    try:
        file = _parsed(path, _text(path))
        if file.kernel not in ("", kernel):
            raise ValueError(f"it holds configs of {file.kernel}")
        return file
    except FileNotFoundError:
        return File()
    except ValueError as error:
        names = (path.with_name(f"{path.name}.set-aside-{number}") for number in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        warn(f"{path} is written anew, and what it held is kept in {aside}: {error}")
        return File()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other writers of the file out."""
    from filelock import FileLock, Timeout  # here, because only tuning writes

    lock = f"{path}.lock"
    try:
        # filelock would try again and again where no file can be made; this fails at once.
        os.close(os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666))
    except OSError as error:
        raise OSError(f"{path} is not written, for {lock} cannot be made: {error.strerror}") from None
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise OSError(f"{path} is not written: another process has held {lock} for {LOCK_SECONDS:.0f} s") from None


def _replace(path: Path, text: str) -> None:
    """Writes a file in one step, with the mode that it had, or the umask's."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine might leave an empty file under the name
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path, names: re.Pattern[str]) -> None:
    """Removes the temporary files of killed processes: of these names, and an hour old."""
    oldest = time.time() - LEFTOVER_SECONDS
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        for path in [one for one in folder.iterdir() if names.fullmatch(one.name)]:
            with contextlib.suppress(OSError):  # another process was faster, or the file is another user's
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_mtime < oldest:
                    path.unlink()


def _triton_minor() -> str:
    """The installed Triton's "major.minor" without importing it."""
    global _minor
    if _minor is None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            _minor = ".".join(version("triton").split(".")[:2])
        except PackageNotFoundError:
            _minor = ""
    return _minor


_minor: str | None = None
