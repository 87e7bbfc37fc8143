r"""2-d max pooling: forward with the winner's place in its window, backward as a gather.

    y[n,c,p,q] = max over r, s of x[n, c, p*STRIDE_H - PAD_H + r*DIL_H, q*STRIDE_W - PAD_W + s*DIL_W]

Taps outside the image do not take part. The rule is torch's: the first of equal values wins, a NaN wins over
everything and the last NaN over the others, and a window of -inf yields its first tap inside the image.

What backward needs is the winning tap r*S + s, and that fits one byte for windows of up to 254 taps (two bytes, four
bytes beyond; NONE = no tap inside the image). torch keeps an int64 index: eight bytes. ``return_indices`` writes those.

Bytes (i: bytes of an index, 0 for values only; e: bytes an element). Once from memory:

    forward     |x| + |y| + i*N*C*P*Q
    backward    |dy| + i*N*C*P*Q + |dx|

and moved by load and store instructions, where neighbouring windows hit the L1 cache:

    forward     R*S*N*C*P*Q*e + (e + i)*N*C*P*Q           (out-of-bounds taps load nothing)
    backward    windows over a pixel * N*C*H*W * (e + i) + N*C*H*W*e    (at most ceil(R/STRIDE_H) * ceil(S/STRIDE_W))

Deterministic: each input pixel adds the windows that cover it in a fixed order, in fp32, with one rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ._launch import Launch, launch, layout_strides, unit_divisor
from ._math import narrow, position, tile_offsets

SIZES = ["M", "H", "W", "P", "Q"]
X_STRIDES = ["stride_xn", "stride_xc", "stride_xh", "stride_xw"]
Y_STRIDES = ["stride_yn", "stride_yc", "stride_yp", "stride_yq"]
I_STRIDES = ["stride_in", "stride_ic", "stride_ip", "stride_iq"]


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def _max_pool2d_kernel(
    x_ptr, y_ptr, index_ptr,
    M, H, W, P, Q,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, NONE: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """index_ptr has y's strides: None, small integers (tap in the window), or int64 (place in the H x W plane)."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, z, p, q = position(offs_m, 1, P, Q, 2)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    winner = tl.full((BLOCK_M, BLOCK_C), -1, dtype=tl.int32)
    for r in range(R):
        for s in range(S):
            h = h0 + r * DIL_H
            col = w0 + s * DIL_W
            inside = (mask_m & (h >= 0) & (h < H) & (col >= 0) & (col < W))[:, None]
            x_off = tile_offsets(n, z, h, col, c, stride_xn, stride_xc, 0, stride_xh, stride_xw, X_VEC, X_UNIT_C)
            x = tl.load(x_ptr + x_off, mask=inside & mask_c[None, :], other=float("-inf")).to(tl.float32)
            take = (x > best) | (x != x)
            if index_ptr is not None:
                take |= inside & (winner < 0)
                winner = tl.where(take, r * S + s, winner)
            best = tl.where(take, x, best)
    mask = mask_m[:, None] & mask_c[None, :]
    y_off = tile_offsets(n, z, p, q, c, stride_yn, stride_yc, 0, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
    tl.store(y_ptr + y_off, narrow(best, y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        if index_ptr.dtype.element_ty == tl.int64:
            h = h0[:, None] + winner // S * DIL_H
            col = w0[:, None] + winner % S * DIL_W
            tl.store(index_ptr + y_off, h.to(tl.int64) * W + col, mask=mask)
        else:
            tap = tl.where(winner < 0, NONE, winner)
            tl.store(index_ptr + y_off, tap.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES, *I_STRIDES])
def _max_pool2d_backward_kernel(
    dy_ptr, index_ptr, dx_ptr,
    M, H, W, P, Q,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_in: tl.int64, stride_ic: tl.int64, stride_ip: tl.int64, stride_iq: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, I_VEC: tl.constexpr, I_UNIT_C: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[n,c,h,w] = sum of dy over the windows that cover (h, w) and that it won; M counts input pixels."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    WINDOWS_H: tl.constexpr = ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    WINDOWS_W: tl.constexpr = ((S - 1) * DIL_W + STRIDE_W) // STRIDE_W
    FLAT: tl.constexpr = index_ptr.dtype.element_ty == tl.int64
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, z, h, col = position(offs_m, 1, H, W, 2)
    last_p = (h + PAD_H) // STRIDE_H
    last_q = (col + PAD_W) // STRIDE_W
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for i in range(WINDOWS_H):
        for j in range(WINDOWS_W):
            # Windows from the last that starts at or before this pixel backwards; the tap that lands on the pixel.
            p = last_p - i
            q = last_q - j
            down = h + PAD_H - p * STRIDE_H
            right = col + PAD_W - q * STRIDE_W
            covers = mask_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
            covers &= (down % DIL_H == 0) & (down // DIL_H < R) & (right % DIL_W == 0) & (right // DIL_W < S)
            mask = covers[:, None] & mask_c[None, :]
            i_off = tile_offsets(n, z, p, q, c, stride_in, stride_ic, 0, stride_ip, stride_iq, I_VEC, I_UNIT_C)
            index = tl.load(index_ptr + i_off, mask=mask, other=0)
            y_off = tile_offsets(n, z, p, q, c, stride_yn, stride_yc, 0, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
            dy = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)
            if FLAT:
                here = h.to(tl.int64) * W + col
            else:
                here = down // DIL_H * S + right // DIL_W
            acc += tl.where(mask & (index.to(here.dtype) == here[:, None]), dy, 0.0)
    x_off = tile_offsets(n, z, h, col, c, stride_xn, stride_xc, 0, stride_xh, stride_xw, X_VEC, X_UNIT_C)
    tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


# --- launchers -------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """The pooling window: what the kernels take as constants."""

    r: int
    s: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int

    def constants(self) -> dict[str, int]:
        return {
            "R": self.r, "S": self.s, "STRIDE_H": self.stride_h, "STRIDE_W": self.stride_w,
            "PAD_H": self.pad_h, "PAD_W": self.pad_w, "DIL_H": self.dil_h, "DIL_W": self.dil_w,
        }  # fmt: skip

    @property
    def offset_dtype(self) -> torch.dtype:
        """The narrowest integer that holds every tap and NONE."""
        taps = self.r * self.s
        return torch.uint8 if taps <= 254 else torch.int16 if taps <= 2**15 - 1 else torch.int32

    @property
    def none(self) -> int:
        return 255 if self.offset_dtype == torch.uint8 else -1

    def windows_over_a_pixel(self) -> int:
        """How many windows cover one input pixel, at most."""
        high = ((self.r - 1) * self.dil_h + self.stride_h) // self.stride_h
        return high * (((self.s - 1) * self.dil_w + self.stride_w) // self.stride_w)


class Pool2dProblem(NamedTuple):
    """One pooling; ``index_bytes`` is 0 (values only), 1, 2, 4 (window offsets) or 8 (int64 indices)."""

    N: int
    C: int
    H: int
    W: int
    P: int
    Q: int
    window: Window
    dtype: torch.dtype
    index_bytes: int
    channels_last: bool

    def minimal_bytes(self) -> float:
        """What must cross the memory bus once, forward or backward alike."""
        e = self.dtype.itemsize
        return float(self.N * self.C * (self.H * self.W * e + self.P * self.Q * (e + self.index_bytes)))


def problem_of(
    x_shape: tuple[int, ...], pq: tuple[int, int], window: Window, dtype: torch.dtype, index_bytes: int,
    is_channels_last: bool,
) -> Pool2dProblem:  # fmt: skip
    n, c, h, w = x_shape
    return Pool2dProblem(n, c, h, w, *pq, window, dtype, index_bytes, is_channels_last)


def _named(names: list[str], strides: list[int]) -> dict[str, int]:
    n, c, _, h, w = strides
    return dict(zip(names, (n, c, h, w), strict=True))


def plan_forward(
    p: Pool2dProblem, config: Config, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor | None
) -> list[Launch]:
    """index, if any, has y's strides."""
    x_vec, x_unit, x_strides = layout_strides(x)
    y_vec, y_unit, y_strides = layout_strides(y)
    pixels = p.N * p.P * p.Q
    return [
        Launch(
            _max_pool2d_kernel,
            cost.cdiv(pixels, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C),
            {
                "x_ptr": x, "y_ptr": y, "index_ptr": index, "M": pixels, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q,
                **_named(X_STRIDES, x_strides), **_named(Y_STRIDES, y_strides),
            },
            {
                "C": p.C, **p.window.constants(), "NONE": p.window.none, "X_VEC": x_vec, "X_UNIT_C": x_unit,
                "Y_VEC": y_vec, "Y_UNIT_C": y_unit, **config.constants(),
            },
            config.num_warps,
            config.num_stages,
        )
    ]  # fmt: skip


def plan_backward(
    p: Pool2dProblem, config: Config, dy: torch.Tensor, index: torch.Tensor, dx: torch.Tensor
) -> list[Launch]:
    y_vec, y_unit, y_strides = layout_strides(dy)
    i_vec, i_unit, i_strides = layout_strides(index)
    x_vec, x_unit, x_strides = layout_strides(dx)
    pixels = p.N * p.H * p.W
    return [
        Launch(
            _max_pool2d_backward_kernel,
            cost.cdiv(pixels, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C),
            {
                "dy_ptr": dy, "index_ptr": index, "dx_ptr": dx, "M": pixels, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q,
                **_named(Y_STRIDES, y_strides), **_named(I_STRIDES, i_strides),
                **_named(X_STRIDES, x_strides),
            },
            {
                "C": p.C, **p.window.constants(), "Y_VEC": y_vec, "Y_UNIT_C": y_unit, "I_VEC": i_vec,
                "I_UNIT_C": i_unit, "X_VEC": x_vec, "X_UNIT_C": x_unit, **config.constants(),
            },
            config.num_warps,
            config.num_stages,
        )
    ]  # fmt: skip


# --- configs ---------------------------------------------------------------------------------------------------------

CONFIGS = tuple(
    Config(BLOCK_M=m, BLOCK_C=c, num_warps=warps, num_stages=1)
    for m, c, warps in (
        # channels last: 8 to 128 channels side by side
        (16, 64, 4),
        (32, 64, 4),
        (8, 128, 4),
        (32, 32, 4),
        (64, 32, 4),
        (64, 16, 4),
        (128, 8, 4),
        (8, 64, 2),
        (8, 128, 2),
        (64, 16, 2),
        (128, 8, 2),
        # NCHW: pixels side by side
        (128, 1, 4),
        (256, 1, 4),
        (64, 1, 2),
    )
)


def _features(p: Pool2dProblem) -> dict[str, int | str]:
    window = p.window
    return {
        "pixels": p.N * p.P * p.Q, "C": p.C, "window": f"{window.r}x{window.s}",
        "stride": f"{window.stride_h}x{window.stride_w}", "dtype": str(p.dtype).removeprefix("torch."),
        "index": str(p.index_bytes), "layout": "nhwc" if p.channels_last else "nchw",
    }  # fmt: skip


def _accepts(p: Pool2dProblem, config: Config, device: DeviceSpec) -> bool:
    """Channels last loads want a run of channels, and 16 bytes a thread; NCHW loads a run of pixels."""
    if not p.channels_last:
        return config.BLOCK_C == 1
    vec = unit_divisor(16 // p.dtype.itemsize, p.C)
    fills = config.BLOCK_M * config.BLOCK_C >= vec * device.warp_size * config.num_warps
    return fills and config.BLOCK_C > 1 and (config.BLOCK_C <= 8 or config.BLOCK_C < 2 * p.C)


def _estimate(p: Pool2dProblem, config: Config, device: DeviceSpec, pixels: int, reads: float) -> Estimate:
    columns = cost.cdiv(p.C, config.BLOCK_C)
    rows = cost.cdiv(pixels, config.BLOCK_M)
    return cost.stream(
        device,
        programs=rows * columns,
        issued_bytes=reads,
        dram_bytes=p.minimal_bytes(),
        config=config,
        tile_bytes=config.BLOCK_M * config.BLOCK_C * p.dtype.itemsize,
        waste=columns * config.BLOCK_C * rows * config.BLOCK_M / max(1, p.C * pixels),
    )


def _forward_estimate(p: Pool2dProblem, config: Config, device: DeviceSpec) -> Estimate:
    pixels, e = p.N * p.P * p.Q, p.dtype.itemsize
    reads = float(pixels * p.C * (p.window.r * p.window.s * e + e + p.index_bytes))
    return _estimate(p, config, device, pixels, reads)


def _backward_estimate(p: Pool2dProblem, config: Config, device: DeviceSpec) -> Estimate:
    pixels, e = p.N * p.H * p.W, p.dtype.itemsize
    reads = float(pixels * p.C * (p.window.windows_over_a_pixel() * (e + p.index_bytes) + e))
    return _estimate(p, config, device, pixels, reads)


def _index_dtype(p: Pool2dProblem) -> torch.dtype:
    return torch.int64 if p.index_bytes == 8 else p.window.offset_dtype


def _meta(p: Pool2dProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    layout = torch.channels_last if p.channels_last else torch.contiguous_format
    x = torch.empty((p.N, p.C, p.H, p.W), dtype=p.dtype, device="meta", memory_format=layout)
    y = torch.empty((p.N, p.C, p.P, p.Q), dtype=p.dtype, device="meta", memory_format=layout)
    return x, y, torch.empty_like(y, dtype=_index_dtype(p)) if p.index_bytes else None


def _forward_launches(p: Pool2dProblem, config: Config) -> list[Launch]:
    return plan_forward(p, config, *_meta(p))


def _backward_launches(p: Pool2dProblem, config: Config) -> list[Launch]:
    x, y, index = _meta(p)
    assert index is not None
    return plan_backward(p, config, y, index, x)


FORWARD = register(Tunable("max_pool2d", CONFIGS, _features, _accepts, _forward_estimate, _forward_launches))
BACKWARD = register(
    Tunable("max_pool2d_backward", CONFIGS, _features, _accepts, _backward_estimate, _backward_launches)
)


# --- calls -----------------------------------------------------------------------------------------------------------


def run_forward(
    x: torch.Tensor, pq: tuple[int, int], window: Window, *, index_dtype: torch.dtype | None, is_channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y, and with an index dtype (the window's own or int64) the winners."""
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    y = torch.empty((*x.shape[:2], *pq), dtype=x.dtype, device=x.device, memory_format=layout)
    index = None if index_dtype is None else torch.empty_like(y, dtype=index_dtype)
    index_bytes = 0 if index_dtype is None else index_dtype.itemsize
    problem = problem_of(tuple(x.shape), pq, window, x.dtype, index_bytes, x.stride(1) == 1)
    launch(FORWARD, plan_forward, problem, x, y, index)
    return y, index


def run_backward(
    dy: torch.Tensor, index: torch.Tensor, hw: tuple[int, int], window: Window, *, is_channels_last: bool
) -> torch.Tensor:
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    dx = torch.empty((*dy.shape[:2], *hw), dtype=dy.dtype, device=dy.device, memory_format=layout)
    pq = (dy.shape[2], dy.shape[3])
    problem = problem_of(tuple(dx.shape), pq, window, dy.dtype, index.dtype.itemsize, is_channels_last)
    launch(BACKWARD, plan_backward, problem, dy, index, dx)
    return dx
