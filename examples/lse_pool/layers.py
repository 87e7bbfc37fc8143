"""Log-sum-exp pooling's layers, for the static suite, the benchmarks and the tuner: what ``perf/<family>.py`` is.

tritune tune lse_pool1d --families lse_pool.layers
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from tritune.autotune.device import DeviceSpec
from tritune.autotune.workload import (
    DTYPES,
    Case,
    Kernel,
    Layers,
    Operator,
    Shape,
    random_tensors,
    register_family,
    stream_us,
)

from . import kernel, op

LAYERS: dict[str, tuple[Shape, int]] = {"audio": ((32, 256, 8000), 8), "logits": ((64, 32000), 64)}


def layers(target: str) -> Iterator[Layers]:
    for name, (shape, size) in LAYERS.items():
        problem = kernel.problem_of(torch.empty(shape, dtype=torch.bfloat16, device="meta"), size)
        yield f"{name}-bf16", kernel.FORWARD, problem
        yield f"{name}-bf16", kernel.BACKWARD, problem


def _floor_us(case: Case, device: DeviceSpec) -> float:
    x, size = prod(case.shapes["input"]), case.kwargs["kernel_size"]
    passes = 1 if case.direction == "fwd" else 3
    return stream_us(passes * (x + x / size), 0.0, DTYPES[case.dtype].itemsize, 1.0, device)


OPERATORS = {
    "lse_pool1d": Operator(
        op.lse_pool1d, op.formula, None, ("tritune", "torch"),
        lambda case: f"{'x'.join(map(str, case.shapes['input']))} window {case.kwargs['kernel_size']}", _floor_us,
        lambda case: replace(case, shapes={"input": (2, 4 * case.kwargs["kernel_size"])}), compiled=True,
    )
}  # fmt: skip
CASES = tuple(
    Case(name, "lse_pool1d", {"input": shape}, {"kernel_size": size}, layout="", direction=direction)
    for name, (shape, size) in LAYERS.items()
    for direction in ("fwd", "fwd+bwd")
)
TUNED = tuple(LAYERS)


def explicit(op: str, input: Shape, *, kernel: int = 8) -> Case:
    return Case("explicit", op, {"input": input}, {"kernel_size": kernel}, layout="", direction="fwd+bwd")


def kinds(one: Case) -> tuple[str, ...]:
    return ("fwd", "bwd")


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    tensors = random_tensors(OPERATORS[one.op], one, device, seed)
    return {**tensors, "output": op.formula(tensors["input"], one.kwargs["kernel_size"])}


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    size = one.kwargs["kernel_size"]
    problem = kernel.problem_of(tensors["input"], size)
    if kind == "fwd":
        return Kernel(
            kernel.FORWARD, problem, lambda t: kernel.run_forward(t["input"], size),
            lambda t: op.formula(t["input"], size),
        )  # fmt: skip
    return Kernel(
        kernel.BACKWARD, problem, lambda t: kernel.run_backward(t["dy"], t["input"], t["output"], size),
        lambda t: op.gradient(t["dy"], t["input"], t["output"], size, "torch"),
    )  # fmt: skip


register_family("lse_pool", sys.modules[__name__])
