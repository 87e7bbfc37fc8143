"""What every measurement shares: where it runs, and whether a result is right before it may be timed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .device import DeviceSpec
from .timer import Timer

EPSILON = {"fp32": 6e-8, "fp16": 5e-4, "bf16": 4e-3}
MAX_ARGUMENT_SETS = 32


class Machine(NamedTuple):
    """Where and how everything is measured. Without a timer calls are only checked, which compiles their kernels."""

    device: str
    spec: DeviceSpec
    timer: Timer | None
    seconds: float


class Verdict(NamedTuple):
    """Is a result as good as torch's own? ``error`` and ``allowed`` are those of the worst measure, named ``where``."""

    correct: bool
    error: float
    allowed: float
    where: str

    def to_json(self) -> dict[str, Any]:
        return {"where": self.where, "error": _finite(self.error), "allowed": _finite(self.allowed)}


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def compare(
    ours: dict[str, Tensor], exact: dict[str, Tensor], torchs: dict[str, Tensor], epsilon: float
) -> Verdict:  # fmt: skip
    """The error against float64, relative to the reference as a whole, once by the largest element and once by root
    mean square: each at most twice that of torch's own operator in the same dtype, plus one epsilon. NaN fails."""
    worst = Verdict(True, 0.0, epsilon, "")
    for name, reference in exact.items():
        if ours[name].shape != reference.shape:
            return Verdict(False, float("nan"), epsilon, f"{name}: shape")
        ours_64, torchs_64 = ours[name].double(), torchs[name].double()
        for measure, size in (("max", _largest), ("rms", _root_mean_square)):
            scale = max(size(reference), 1e-30)
            error = size(ours_64 - reference) / scale
            allowed = 2 * size(torchs_64 - reference) / scale + epsilon
            verdict = Verdict(error <= allowed, error, allowed, f"{name}: {measure}")
            if not verdict.correct:
                return verdict
            if error / allowed > worst.error / worst.allowed:
                worst = verdict
    return worst


def _largest(t: Tensor) -> float:
    return float(t.abs().max())


def _root_mean_square(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN (integers: their maximum): what nobody wrote fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """For references: on a GPU the products are cuBLAS's then."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def set_cudnn(provider: str) -> Callable[[], None]:
    """What runs before a sample of a provider: cuDNN's search belongs to the channels-last peers."""

    def before() -> None:
        torch.backends.cudnn.benchmark = provider in ("torch_channels_last", "torch_bare", "torch_compile")

    return before


def argument_sets(tensors: dict[str, Tensor], spec: DeviceSpec) -> int:
    """How many sets of arguments hold three times what the last-level cache does."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return min(MAX_ARGUMENT_SETS, ceil(3 * (spec.l2_mb << 20) / size))


def device_alive(device: str) -> bool:
    """After an illegal access every later call of the process fails."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
