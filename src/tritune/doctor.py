"""``tritune doctor``: what this library sees of the machine, and what is wrong, each with its fix. Never raises."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .autotune import store, variables
from .autotune.device import DEVICES, detect, named
from .autotune.log import warnings
from .autotune.paths import in_words, writable_folder
from .configs import ignored, kernels_here, say

OLDEST_TRITON, FIRST_UNTESTED_TRITON = (3, 6), (3, 10)
PACKAGES = ("torch", "triton", "numpy", "typer", "rich", "matplotlib", "scikit-learn")

Facts = dict[str, Any]


def examine() -> tuple[Facts, list[str], list[str]]:
    """``(facts, problems, hints)``. What fails while it is looked at is a problem, and the rest is looked at."""
    facts: Facts = {"tritune": __version__, "python": platform.python_version(), "platform": platform.platform()}
    problems: list[str] = []
    hints: list[str] = []
    for what, look in SECTIONS.items():
        try:
            problems += look(facts, hints)
        except Exception as error:
            problems.append(f"looking at {what} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return facts, problems, hints


# --- sections: each adds facts and hints, and returns problems -------------------------------------------------------


def _packages(facts: Facts, hints: list[str]) -> list[str]:
    facts |= {name: _version_of(name) for name in PACKAGES}
    if facts["triton"] is None:
        hints.append("triton is not installed, so everything runs on torch: pip install 'tritune[triton]'")
        return []
    running = tuple(int(part) for part in facts["triton"].split(".")[:2])
    if OLDEST_TRITON <= running < FIRST_UNTESTED_TRITON:
        return []
    return [f"Triton {facts['triton']} is outside 3.6 to 3.9: pip install 'triton>=3.6,<3.10'"]


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu(facts: Facts, hints: list[str]) -> list[str]:
    facts["gpu"] = None
    if not torch.cuda.is_available():
        hints.append("torch sees no GPU, so the kernels run only in the interpreter (TRITON_INTERPRET=1)")
        return []
    properties = torch.cuda.get_device_properties(0)
    device = detect(torch.device("cuda"))
    facts["gpu"] = {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "configs": device.slug if device.slug in DEVICES else f"{device.slug} (as {device.target})",
    }  # fmt: skip
    if torch.version.hip is None and properties.major < 8:
        hints.append("this GPU is older than compute capability 8.0: the kernels leave it to torch")
    return []


def _variables(facts: Facts, hints: list[str]) -> list[str]:
    facts["environment"] = {name: value for name, value in os.environ.items() if name.startswith("TRITUNE_")}
    problems = []
    for name, value in sorted(facts["environment"].items()):
        if name not in VARIABLES:
            problems.append(f"{name} is not a variable of tritune: known are {', '.join(sorted(VARIABLES))}")
        elif value:
            try:
                VARIABLES[name](name, value)
            except OSError as error:
                problems.append(f"{name}: {in_words(error)}")
            except ValueError as error:
                problems.append(str(error) if str(error).startswith(name) else f"{name}: {error}")
    return problems


def _a_device(name: str, value: str) -> None:
    named(value)


def _folders(name: str, value: str) -> None:
    for folder in value.split(os.pathsep):
        if folder:
            list(Path(folder).iterdir())


def _yes_or_no(name: str, value: str) -> None:
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 1 or 0, got {value!r}")


# What raises, a ValueError or an OSError, if a variable has a value that it cannot have.
VARIABLES: dict[str, Callable[[str, str], object]] = {
    **dict.fromkeys(variables.WORDS, variables.check),
    "TRITUNE_CONFIG_PATH": _folders,
    "TRITUNE_CACHE_DIR": lambda name, value: writable_folder(Path(value)),
    "TRITUNE_DEVICE": _a_device,
    "TRITUNE_ASSERT_TUNED": _yes_or_no,
}


def _store(facts: Facts, hints: list[str]) -> list[str]:
    problems = []
    counts: dict[str, int] = {}
    stale = ranked = 0
    kernels = kernels_here()
    store.clear()  # a file that was read before would not be complained of again
    with warnings() as messages:
        for layer, path in store.files():
            entries = store.load(path, path.stem)
            counts[f"{layer} {path.parent.name}"] = counts.get(f"{layer} {path.parent.name}", 0) + len(entries)
            # Entries that ship were compiled with every supported Triton, whichever they were ranked with.
            stale += sum(bool(entry.staleness()) for entry in entries) if layer == "user" else 0
            ranked += sum(entry.origin == "model" for entry in entries)
            problems += [
                f"{path}: {words}; tune again or remove them" for words in ignored(path.stem, entries, kernels)
            ]
    facts["entries"] = counts
    if stale:
        hints.append(f"{stale} entries come from another Triton minor: `tritune configs list` says which; tune again")
    if ranked:
        hints.append(f"{ranked} entries are ranked by a model, not measured")
    return problems + messages


def _cache(facts: Facts, hints: list[str]) -> list[str]:
    if os.environ.get("TRITUNE_CACHE_DIR"):  # a variable, and looked at as one
        return []
    try:
        writable_folder(store.cache_dir())
    except OSError as error:
        return [f"{in_words(error)}: set TRITUNE_CACHE_DIR to a folder that can"]
    return []


SECTIONS: dict[str, Callable[[Facts, list[str]], list[str]]] = {
    "the packages": _packages, "the GPU": _gpu, "the environment": _variables, "the tuned configs": _store,
    "the cache folder": _cache,
}  # fmt: skip


# --- the command -----------------------------------------------------------------------------------------------------


def main(*, as_json: bool) -> int:
    facts, problems, hints = examine()
    if as_json:
        print(json.dumps({**facts, "problems": problems, "hints": hints}, indent=1))
        return 1 if problems else 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
        missing = "none" if name == "gpu" else "not installed"
        say(f"{name:14} {missing if value is None else value}")
    for hint in hints:
        say(f"hint: {hint}")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    print("1 problem" if len(problems) == 1 else f"{len(problems) or 'no'} problems")
    return 1 if problems else 0
