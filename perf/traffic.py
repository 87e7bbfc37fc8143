"""Bytes that a kernel's load and store instructions move, counted in Triton's interpreter, and what they should be.

The formulas are those at the heads of the kernels. Masked elements move nothing, so padding makes the count smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from ..autotune.config import Config, Tunable
from ..autotune.cost import cdiv

LIMIT = 1.1  # how much more than its formula a kernel may move


@dataclass
class Traffic:
    """Bytes so far."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the bytes of every load and store that the interpreter executes in the block."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
    ):
        yield traffic


def measure(tunable: Tunable, problem: Any, config: Config) -> Traffic:
    """Runs the launches of one problem on random tensors and counts."""
    tensors: dict[int, torch.Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in tensors:
            tensors[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if value.is_floating_point():
                tensors[id(value)].normal_()
            else:
                tensors[id(value)].random_(4)  # places in a window
        return tensors[id(value)]

    with counted() as traffic:
        for launch in tunable.launches(problem, config):
            launch._replace(args={name: real(value) for name, value in launch.args.items()}).run()
    return traffic


# --- the formulas at the kernels' heads ------------------------------------------------------------------------------


def _conv2d(p: Any, config: Config) -> float:
    tiles_m, tiles_n = cdiv(p.pixels, config.BLOCK_M), cdiv(p.K, config.BLOCK_N)
    taps = p.R * p.S * p.C
    output = p.pixels * p.K
    partial = 8 * config.SPLIT_K * output if config.SPLIT_K > 1 else 0
    bytes_a_group = (tiles_n * p.pixels * taps + tiles_m * p.K * taps + output) * p.itemsize + partial
    return float(p.geometry.groups * bytes_a_group)


def _conv2d_input_grad(p: Any, config: Config) -> float:
    g = p.geometry
    tiles_n = cdiv(p.C, config.BLOCK_N)
    weights = 0
    for row in range(g.stride_h):
        for column in range(g.stride_w):
            taps = sum((r * g.dil_h) % g.stride_h == row for r in range(p.R))
            taps *= sum((s * g.dil_w) % g.stride_w == column for s in range(p.S))
            pixels = p.N * cdiv(p.H, g.stride_h) * cdiv(p.W, g.stride_w)
            weights += cdiv(pixels, config.BLOCK_M) * taps * p.K * p.C
    gathered = tiles_n * p.pixels * p.R * p.S * p.K
    return float(g.groups * (gathered + weights + p.N * p.H * p.W * p.C) * p.itemsize)


def _conv2d_weight_grad(p: Any, config: Config) -> float:
    columns = p.R * p.S * p.C
    tiles_m, tiles_n = cdiv(p.K, config.BLOCK_M), cdiv(columns, config.BLOCK_N)
    partial = 8 * config.SPLIT_K * columns * p.K if config.SPLIT_K > 1 else 0
    operands = tiles_m * p.pixels * columns + tiles_n * p.pixels * p.K + columns * p.K
    return float(p.geometry.groups * (operands * p.itemsize + partial))


def _conv2d_epilogue_grad(p: Any, config: Config) -> float:
    splits = max(1, min(config.SPLIT_M, cdiv(p.M, config.BLOCK_M)))
    return p.minimal_bytes() + p.has_bias * p.K * (8 * splits + p.dtype.itemsize)


def _depthwise(p: Any, config: Config) -> float:
    filters, taps = p.K * p.geometry.groups, p.R * p.S
    weights = cdiv(p.pixels, config.BLOCK_M) * taps * filters
    return float((taps * p.pixels * filters + weights + p.pixels * filters) * p.itemsize)


def _depthwise_input_grad(p: Any, config: Config) -> float:
    filters, taps, pixels = p.K * p.geometry.groups, p.R * p.S, p.N * p.H * p.W
    weights = cdiv(pixels, config.BLOCK_M) * taps * filters
    return float((taps * p.pixels * filters + weights + pixels * p.geometry.groups) * p.itemsize)


def _depthwise_weight_grad(p: Any, config: Config) -> float:
    filters, taps = p.K * p.geometry.groups, p.R * p.S
    splits = max(1, min(config.SPLIT_M, cdiv(p.pixels, config.BLOCK_M)))
    return float(taps * filters * (2 * p.pixels * p.itemsize + 8 * splits + p.itemsize))


def _max_pool2d(p: Any, config: Config) -> float:
    outputs = p.N * p.C * p.P * p.Q
    return float(outputs * (p.window.r * p.window.s * p.dtype.itemsize + p.dtype.itemsize + p.index_bytes))


def _max_pool2d_backward(p: Any, config: Config) -> float:
    inputs, e = p.N * p.C * p.H * p.W, p.dtype.itemsize
    return float(inputs * (p.window.windows_over_a_pixel() * (e + p.index_bytes) + e))


FORMULAS: dict[str, Callable[[Any, Config], float]] = {
    "conv2d": _conv2d,
    "conv2d_input_grad": _conv2d_input_grad,
    "conv2d_weight_grad": _conv2d_weight_grad,
    "conv2d_epilogue_grad": _conv2d_epilogue_grad,
    "conv2d_depthwise": _depthwise,
    "conv2d_depthwise_input_grad": _depthwise_input_grad,
    "conv2d_depthwise_weight_grad": _depthwise_weight_grad,
    "max_pool2d": _max_pool2d,
    "max_pool2d_backward": _max_pool2d_backward,
}


def fault(kernel: str, problem: Any, config: Config, traffic: Traffic) -> str:
    """What is wrong with a count, or nothing."""
    expected = FORMULAS[kernel](problem, config)
    if traffic.total > LIMIT * expected:
        return f"traffic: {traffic.total / expected:.2f} times the formula of {kernel}"
    return ""
