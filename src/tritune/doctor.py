"""``tritune doctor``: what this library sees of the machine, and what is wrong, each with its fix. Never raises."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .autotune import store
from .autotune.device import DEVICES, detect
from .autotune.log import warnings
from .configs import ignored, kernels_here

VARIABLES = ("BACKEND", "AUTOTUNE", "CONFIG_PATH", "CACHE_DIR", "LOG", "DEVICE", "ASSERT_TUNED")
OLDEST_TRITON, FIRST_UNTESTED_TRITON = (3, 6), (3, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine() -> tuple[dict[str, Any], list[str], list[str]]:
    """``(facts, problems, hints)``."""
    problems, hints = [], []
    facts: dict[str, Any] = {
        "tritune": __version__, "python": platform.python_version(), "platform": platform.platform(),
        **{name: _version_of(name) for name in ("torch", "triton", "numpy", "rich", "matplotlib", "scikit-learn")},
    }  # fmt: skip

    if facts["triton"] is None:
        hints.append("triton is not installed, so everything runs on torch: pip install 'tritune[triton]'")
    else:
        running = tuple(int(part) for part in facts["triton"].split(".")[:2])
        if not OLDEST_TRITON <= running < FIRST_UNTESTED_TRITON:
            problems.append(f"Triton {facts['triton']} is outside 3.6 to 3.9: pip install 'triton>=3.6,<3.10'")

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }  # fmt: skip
        if torch.version.hip is None and properties.major < 8:
            hints.append("this GPU is older than compute capability 8.0: the kernels leave it to torch")
    else:
        hints.append("torch sees no GPU, so the kernels run only in the interpreter (TRITON_INTERPRET=1)")

    known = {f"TRITUNE_{name}" for name in VARIABLES}
    facts["environment"] = {name: value for name, value in os.environ.items() if name.startswith("TRITUNE_")}
    problems += [
        f"{name} is not a variable of tritune: known are {', '.join(sorted(known))}"
        for name in sorted(set(facts["environment"]) - known)
    ]
    problems += _examine_store(facts, hints)
    return facts, problems, hints


def _examine_store(facts: dict[str, Any], hints: list[str]) -> list[str]:
    problems = []
    try:
        device = detect(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        return [f"TRITUNE_DEVICE: {error}"]
    facts["device"] = device.slug if device.slug in DEVICES else f"{device.slug} (as {device.target})"
    counts: dict[str, int] = {}
    stale = ranked = 0
    kernels = kernels_here()
    with warnings() as messages:
        for source, path in store.files():
            entries = store.load(path, path.stem)
            counts[f"{source} {path.parent.name}"] = counts.get(f"{source} {path.parent.name}", 0) + len(entries)
            stale += sum(bool(entry.staleness()) for entry in entries)
            ranked += sum(entry.source == "model" for entry in entries)
            problems += [
                f"{path}: {words}; tune again or remove them" for words in ignored(path.stem, entries, kernels)
            ]
    problems += messages
    facts["entries"] = counts
    if stale:
        hints.append(f"{stale} entries come from another Triton minor: `tritune configs list` says which; tune again")
    if ranked:
        hints.append(f"{ranked} entries are ranked by a model, not measured")
    try:
        cache = store.cache_dir()
    except OSError as error:
        return [*problems, str(error)]
    if not _writable(cache):
        problems.append(f"{cache} cannot be written: set TRITUNE_CACHE_DIR to a folder that can")
    return problems


def _writable(folder: Path) -> bool:
    """Could the folder be made and written? The nearest ancestor that exists decides."""
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK)


def main(args: argparse.Namespace) -> int:
    facts, problems, hints = examine()
    if args.json:
        print(json.dumps({**facts, "problems": problems, "hints": hints}, indent=1))
        return 1 if problems else 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
        print(f"{name:14} {value if value is not None else 'not installed'}")
    for hint in hints:
        print(f"hint: {hint}")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("1 problem" if len(problems) == 1 else f"{len(problems) or 'no'} problems")
    return 1 if problems else 0
