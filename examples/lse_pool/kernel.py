r"""Log-sum-exp pooling: a smooth maximum over windows side by side, and its gradient.

    y[r, q] = log(1/K * sum_k exp(x[r, q*K + k]))            rows r, outputs q < Q, window of K
    dx[r, q*K + k] = dy[r, q] * exp(x[r, q*K + k] - y[r, q]) / K

A program takes BLOCK outputs of the flat result: x is contiguous with rows of Q*K elements, so output i of R*Q reads
elements i*K to i*K + K. Sums are in fp32. What is read of x: each element once; what must come from memory is the same.

    forward     |x| + |y|                 backward    |x| + |y| + |dy| + |dx|
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tritune.autotune import cost
from tritune.autotune.config import Config, Estimate, Tunable, register
from tritune.autotune.device import DeviceSpec
from tritune.kernels._launch import Launch, launch

# --- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def _lse_pool_kernel(x_ptr, y_ptr, M, K: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """M outputs; K taps of a window, padded to WINDOW, a power of two."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, WINDOW)
    inside = (i < M)[:, None] & (k < K)[None, :]
    offsets = i.to(tl.int64)[:, None] * K + k[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, WINDOW]
    x = tl.where((k < K)[None, :], x, float("-inf"))
    top = tl.max(x, 1)
    # Where all is -inf, or something is +inf, the difference below would be NaN.
    shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    y = shift + tl.log(tl.sum(tl.exp(x - shift[:, None]), 1) / K)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < M)


@triton.jit
def _lse_pool_backward_kernel(x_ptr, y_ptr, dy_ptr, dx_ptr, M, K: tl.constexpr, WINDOW: tl.constexpr,
                              BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, WINDOW)
    inside = (i < M)[:, None] & (k < K)[None, :]
    offsets = i.to(tl.int64)[:, None] * K + k[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, WINDOW]
    y = tl.load(y_ptr + i, mask=i < M, other=0.0).to(tl.float32)  # [BLOCK]
    dy = tl.load(dy_ptr + i, mask=i < M, other=0.0).to(tl.float32)  # [BLOCK]
    dx = dy[:, None] * tl.exp(x - y[:, None]) / K
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# --- host side: problem, plans, space --------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What the launches depend on: outputs, taps of a window, dtype."""

    M: int
    K: int
    dtype: torch.dtype

    @property
    def window(self) -> int:
        return triton.next_power_of_2(self.K)


def problem_of(x: torch.Tensor, kernel_size: int) -> Problem:
    return Problem(x.numel() // kernel_size, kernel_size, x.dtype)


def _plan(kernel: Any, p: Problem, config: Config, **tensors: torch.Tensor) -> list[Launch]:
    constants = {"K": p.K, "WINDOW": p.window, "BLOCK": config.BLOCK}
    grid = cost.cdiv(p.M, config.BLOCK)
    return [Launch(kernel, grid, {**tensors, "M": p.M}, constants, config.num_warps, config.num_stages)]


def plan_forward(p: Problem, config: Config, x: torch.Tensor, y: torch.Tensor) -> list[Launch]:
    return _plan(_lse_pool_kernel, p, config, x_ptr=x, y_ptr=y)


def plan_backward(
    p: Problem, config: Config, x: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor
) -> list[Launch]:  # fmt: skip
    return _plan(_lse_pool_backward_kernel, p, config, x_ptr=x, y_ptr=y, dy_ptr=dy, dx_ptr=dx)


CONFIGS = tuple(Config(BLOCK=block, num_warps=4, num_stages=1) for block in (64, 128, 256, 512))
LARGEST_TILE = 8192  # elements of x that a program of 128 threads holds in registers


def _features(p: Problem) -> dict[str, int | str]:
    return {"M": p.M, "K": p.K, "dtype": str(p.dtype).removeprefix("torch.")}


def _accepts(p: Problem, config: Config, device: DeviceSpec) -> bool:
    return config.BLOCK * p.window <= LARGEST_TILE


def _moved_bytes(passes: int) -> Any:
    """Of ``passes`` tensors of x's size and as many of y's."""
    return lambda p, config: float(passes * p.M * (p.K + 1) * p.dtype.itemsize)


def _estimate(passes: int) -> Any:
    """The bytes at the memory's rate, in whole waves of programs."""

    def estimate(p: Problem, config: Config, device: DeviceSpec) -> Estimate:
        programs = cost.cdiv(p.M, config.BLOCK)
        waves = cost.cdiv(programs, 8 * device.sms) * 8 * device.sms / programs
        bytes_us = _moved_bytes(passes)(p, config) / (device.dram_gbs * 1e3)
        return Estimate(cost.LAUNCH_US + bytes_us * waves, "memory")

    return estimate


def _meta(p: Problem, backward: bool) -> list[torch.Tensor]:
    x, y = (torch.empty(size, dtype=p.dtype, device="meta") for size in (p.M * p.K, p.M))
    return [x, y, y, x] if backward else [x, y]


FORWARD = register(
    Tunable(
        "lse_pool", CONFIGS, _features, _accepts, _estimate(1),
        lambda p, config: plan_forward(p, config, *_meta(p, backward=False)), moved_bytes=_moved_bytes(1),
    )
)  # fmt: skip
BACKWARD = register(
    Tunable(
        "lse_pool_backward", CONFIGS, _features, _accepts, _estimate(2),
        lambda p, config: plan_backward(p, config, *_meta(p, backward=True)), moved_bytes=_moved_bytes(2),
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def run_forward(x: torch.Tensor, kernel_size: int) -> torch.Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // kernel_size)
    if y.numel():
        launch(FORWARD, plan_forward, problem_of(x, kernel_size), x, y)
    return y


def run_backward(dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor, kernel_size: int) -> torch.Tensor:
    dx = torch.empty_like(x)
    if y.numel():
        launch(BACKWARD, plan_backward, problem_of(x, kernel_size), x, y, dy.contiguous(), dx)
    return dx
