"""Where a result comes from: hardware, versions, sources and settings. No name of a host or user, and no path."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .device import detect

ROOT = Path(__file__).resolve().parents[1]
PATH = re.compile(r"(?<![\w.])~?/(?:[^\s/:'\"()\[\],]+/)*([^\s/:'\"()\[\],]*)")
GPU_QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"


def fingerprint(device: str) -> dict[str, Any]:
    """Everything that a later reader of a result may ask for. What cannot be read is ``None``."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tritune": __version__,
        **_sources(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        **(_gpu() if device == "cuda" else {"gpu": None, "slug": "rehearsal"}),
        "variables": variables(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    """The model, as Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    uuid = str(getattr(properties, "uuid", "")) or None
    return {
        "gpu": properties.name,
        "slug": detect(torch.device("cuda")).slug,
        "uuid": uuid,
        "sms": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "l2_mb": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        **gpu_state(uuid),
    }


def gpu_state(uuid: str | None = None) -> dict[str, Any]:
    """Driver, clocks in MHz, temperature in °C and power in W as nvidia-smi tells them now."""
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    if uuid:
        command.append(f"--id=GPU-{uuid.removeprefix('GPU-')}")
    line = _output(command) or ""
    values = [value.strip() for value in line.splitlines()[0].split(",")] if line else []
    names = ("driver", "clock_mhz", "max_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")
    if len(values) != len(names):
        return dict.fromkeys(names)
    driver, *numbers = values
    return {"driver": driver, **dict(zip(names[1:], map(_number, numbers), strict=True))}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _output(command: list[str], **options: Any) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True, **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _sources() -> dict[str, Any]:
    """The git commit and whether the tree differs from it; a hash of the kernels' sources for copies without git."""
    commit = _output(["git", "rev-parse", "HEAD"], cwd=ROOT)
    changes = _output(["git", "status", "--porcelain"], cwd=ROOT)
    digest = hashlib.sha256()
    for folder in ("autotune", "kernels", "ops"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(changes) if commit and changes is not None else None,
        "sources": digest.hexdigest()[:16],
    }


def variables() -> dict[str, str]:
    """Settings of this library and of Triton."""
    ours = {name: value for name, value in os.environ.items() if name.startswith(("TRITUNE_", "TRITON_"))}
    return {name: without_paths(value) for name, value in sorted(ours.items())}


def without_paths(text: str) -> str:
    """The text with every absolute path cut to its last part: where somebody keeps their files is not a result."""
    return PATH.sub(lambda match: match[1] or "/", text)


def in_words(error: BaseException) -> str:
    """One line, without a path."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return without_paths(lines[0])[:200]
