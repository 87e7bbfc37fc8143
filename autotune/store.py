"""Tuned configs in files: ``configs/<slug>/<kernel>.json``, shipped in the wheel and overlaid by the user's.

A slug is a device (``nvidia_h200``, entries measured there) or a target (``sm_90``, entries ranked without a GPU).
One entry per line, sorted, so that a change reads well in a diff::

    {"schema": 1, "kernel": "conv", "entries": [
    {"key": {"pixels": 100352, ...}, "config": {"BLOCK_M": 128, ...}, "source": "model", "version": 1, ...}
    ]}

A file or entry that cannot be read is one warning and counts as absent. Unknown fields are kept. Writing locks the
file, merges and replaces it in one step.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import Config, Tunable
from .device import DEVICES, DeviceSpec
from .log import logger

SCHEMA = 1
SHIPPED = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class Entry:
    """One tuned config.

    Attributes:
        key: the features it holds for.
        source: ``"measured"`` on the device, or ``"model"``: ranked without a GPU.
        version: the kernel's version of its parameters.
        us, torch_us: medians of our kernel and of torch's operator on the same inputs; ``None`` if not measured.
        extra: everything else in the file (environment, static figures), kept as it is.
    """

    key: dict[str, int | str]
    config: Config
    source: str
    version: int = 1
    us: float | None = None
    torch_us: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

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
        declared = {tuple(config) for config in tunable.configs}  # a kernel for two layouts has two kinds of tiles
        if declared and not any(self.config.keys() == set(names) for names in declared):
            wanted = " or ".join(", ".join(names) for names in sorted(declared))
            return f"its parameters are {', '.join(self.config)}, the kernel has {wanted}"
        return ""

    def to_json(self) -> dict[str, Any]:
        known = {"key": self.key, "config": dict(self.config), "source": self.source, "version": self.version}
        times = {name: value for name, value in (("us", self.us), ("torch_us", self.torch_us)) if value is not None}
        return {**known, **times, **self.extra}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        rest = dict(data)
        key, config = rest.pop("key"), rest.pop("config")
        if not all(isinstance(value, int | str) for value in key.values()):
            raise TypeError(f"key {key} holds something that is neither a size nor a name")
        if not all(isinstance(value, int) for value in config.values()):
            raise TypeError(f"config {config} holds something that is not an integer")
        times = {name: rest.pop(name, None) for name in ("us", "torch_us")}
        return cls(key, Config(config), rest.pop("source"), rest.pop("version", 1), **times, extra=rest)


def cache_dir() -> Path:
    """The user's folder: ``TRITUNE_CACHE_DIR``, else the platform's cache folder."""
    override = os.environ.get("TRITUNE_CACHE_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or str(Path.home() / ".cache")
    return Path(base) / "tritune"


def user_paths() -> list[Path]:
    """Folders of user entries, first wins: those of ``TRITUNE_CONFIG_PATH``, then ``configs`` in the cache folder."""
    listed = [Path(part) for part in os.environ.get("TRITUNE_CONFIG_PATH", "").split(os.pathsep) if part]
    return [*listed, cache_dir() / "configs"]


def files() -> Iterator[tuple[str, Path]]:
    """Every file that a lookup may read, with its layer: ``"user"`` or ``"shipped"``."""
    for layer, folder in [*(("user", folder) for folder in user_paths()), ("shipped", SHIPPED)]:
        for path in sorted(folder.glob("*/*.json")):
            yield layer, path


_loaded: dict[Path, tuple[Entry, ...]] = {}


def clear() -> None:
    _loaded.clear()


def load(path: Path) -> tuple[Entry, ...]:
    """The entries of a file, read once; none if it is absent or unreadable."""
    entries = _loaded.get(path)
    if entries is None:
        entries = _loaded[path] = tuple(_read(path))
    return entries


def _read(path: Path) -> Iterator[Entry]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, this version reads {SCHEMA}")
        raw = list(document["entries"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("ignoring the tuned configs in %s: %s", path, error)
        return
    for number, data in enumerate(raw):
        try:
            yield Entry.from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.warning("ignoring entry %d of %s: %r", number, path, error)


def layers(kernel: str, device: DeviceSpec) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    """Entries to search, layer by layer: the user's, those shipped for the device, its siblings, its target."""
    file = f"{kernel}.json"
    for folder in user_paths():
        yield "user", load(folder / device.slug / file)
    yield "shipped", load(SHIPPED / device.slug / file)
    for sibling in DEVICES.values():
        if sibling.target == device.target and sibling.slug != device.slug:
            yield "sibling", load(SHIPPED / sibling.slug / file)
    yield "target", load(SHIPPED / device.target / file)


def write(path: Path, kernel: str, entries: Iterable[Entry]) -> None:
    """Merges entries into a file: same key, new entry. Safe beside other writers and readers."""
    from filelock import FileLock  # here, because only tuning writes

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path) + ".lock"):
        merged = {_key(entry): entry for entry in _read(path)}
        merged.update((_key(entry), entry) for entry in entries)
        lines = ",\n".join(json.dumps(merged[key].to_json(), sort_keys=True) for key in sorted(merged))
        text = f'{{"schema": {SCHEMA}, "kernel": "{kernel}", "entries": [\n{lines}\n]}}\n'
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    _loaded.pop(path, None)


def _key(entry: Entry) -> str:
    return json.dumps(entry.key, sort_keys=True)


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
