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


class Errors(NamedTuple):
    """Of a result against float64, relative to the reference as a whole: by the largest element, and by root mean
    square. Only where the reference is finite."""

    max: float
    rms: float

    @classmethod
    def of(cls, result: Tensor, reference: Tensor) -> Errors:
        finite = reference.isfinite()
        count = int(finite.sum())
        if not count:
            return cls(0.0, 0.0)
        error, size = (t.masked_fill(~finite, 0.0) for t in (result.double() - reference, reference))
        rms = (float(t.square().sum() / count) ** 0.5 for t in (error, size))
        largest = (float(t.abs().max()) for t in (error, size))
        return cls(*(ours / max(whole, 1e-30) for ours, whole in (largest, rms)))

    def allowed(self, epsilon: float) -> Errors:
        """For us, where these are torch's: twice as much, plus one epsilon."""
        return Errors(2 * self.max + epsilon, 2 * self.rms + epsilon)


def compare(
    ours: dict[str, Tensor], exact: dict[str, Tensor], torchs: dict[str, Tensor], epsilon: float
) -> Verdict:  # fmt: skip
    """Are the errors against float64 at most twice those of torch's own operator in the same dtype, plus one epsilon?
    NaN and infinities must stand where the reference has them."""
    worst = Verdict(True, 0.0, epsilon, "")
    for name, reference in exact.items():
        if ours[name].shape != reference.shape:
            return Verdict(False, float("nan"), epsilon, f"{name}: shape")
        if not _same_where_not_finite(ours[name], reference):
            return Verdict(False, float("nan"), epsilon, f"{name}: NaN or inf misplaced")
        errors, allowed = Errors.of(ours[name], reference), Errors.of(torchs[name], reference).allowed(epsilon)
        for measure in Errors._fields:
            error, limit = getattr(errors, measure), getattr(allowed, measure)
            verdict = Verdict(error <= limit, error, limit, f"{name}: {measure}")
            if not verdict.correct:
                return verdict
            if error / limit > worst.error / worst.allowed:
                worst = verdict
    return worst


def _same_where_not_finite(ours: Tensor, reference: Tensor) -> bool:
    finite = reference.isfinite()
    if bool(finite.all()):
        return True
    return torch.equal(ours.double()[~finite].nan_to_num(nan=-1.0), reference[~finite].nan_to_num(nan=-1.0))


@contextmanager
def poisoned(*, strict: bool = False) -> Iterator[None]:
    """Uninitialised memory is NaN (integers: their maximum): what nobody wrote fails the comparison.

    Args:
        strict: what torch cannot compute deterministically is an error, too.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        with warnings.catch_warnings():
            if not strict:
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
