r"""2-d convolution and max pooling in one kernel, which keeps the output of the convolution in registers.

    y[n,k,u,v] = max over i, j of z[n, k, u*POOL_STRIDE_H - POOL_PAD_H + i, v*POOL_STRIDE_W - POOL_PAD_W + j]
    z[n,k,p,q] = act(scale[k] * sum_{c,r,s} x[n, c, p*STRIDE_H - PAD_H + r*DIL_H, q*STRIDE_W - PAD_W + s*DIL_W]
                                            * w[k,c,r,s] + bias[k])

The letters are those of :mod:`.conv`; U x V is the pooled output, POOL_R x POOL_S the pooling window. Pixels outside
the P x Q output of the convolution do not take part in a maximum, while the padding of the convolution is zeros. The
maximum is taken in fp32 and rounded once. Rounding keeps the order of values, so that is also the maximum of the
rounded values. A window that holds a NaN yields NaN.

Bytes (e: bytes an element; Z: pixels of z that are computed, some of them twice; T_m, T_n: tiles of lanes and of
filters). What must come from memory once is |x| + |w| + |y|; two kernels would move 2|z| more. What the load and store
instructions move is, for each group (taps outside the image load nothing),

    T_n * Z*R*S*C*e + T_m * (pixels of a lane) * K*R*S*C*e + N*U*V*K*e

A lane is a block of TALL x WIDE neighbours of y, and a row of the tile. A program computes the pixels of z that its
BLOCK_M lanes need, one pixel of every lane at a time: a matrix product [BLOCK_M, BLOCK_N] over the taps of that pixel,
the epilogue, and the maximum with each of the WIDE windows that hold the pixel. Where pooling windows overlap, the
pixels that two of them share are computed once if both windows are in one lane, and twice if they are in two. So a lane
computes

    ((TALL - 1) * POOL_STRIDE_H + POOL_R) * ((WIDE - 1) * POOL_STRIDE_W + POOL_S)    pixels of z, where only
    TALL * POOL_STRIDE_H * WIDE * POOL_STRIDE_W                                      would do without overlap.

The ratio of the two is 1 for windows that do not overlap, whose lanes are single windows. For a window of 3 x 3 with a
stride of 2 it is 2.25 with lanes of 1 x 1, 1.69 with 4 x 1, 1.41 with 4 x 2 and 1.33 with 8 x 2. A larger TALL takes no
registers: at most two windows share a row of z, so a lane keeps one more maximum, for the window below. Each of the
WIDE columns takes two tiles of registers.

An image of few channels is copied as for the convolution (:func:`.conv_problem.pad_problem`): the rows of its windows
are read as channels, rounded up to a multiple of 32. The channels of the tail belong to other windows and are masked.
Where the mask ends after an odd number of pixels, a load of 16-bit elements takes 8 bytes, one pixel of four channels.
Such copies go through the L1 cache, which holds what overlapping windows share; copies of 16 bytes would bypass it.

The kernel writes y channels last. Where y is to be NCHW it is copied, which moves 2|y|, a fraction of |z|. A kernel
that stored NCHW would need an address for each element, and its registers hold tiles of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ..autotune.layout import empty
from ._launch import Launch, launch, layout_strides
from ._math import activate, dot, narrow, position
from .conv import result_and_epilogue
from .conv_problem import (
    ConvProblem,
    Epilogue,
    Geometry,
    dot_precision,
    meta_tensors,
    pad_image,
    pad_problem,
    pad_weight,
    problem_of,
)
from .conv_space import features, tile_fits
from .conv_windows import inside_image

SIZES = ["M", "H", "W", "P", "Q", "U", "V", "strips", "blocks"]
X_STRIDES = ["stride_xn", "stride_xh", "stride_xw"]


@triton.jit
def _with_tile(tiles, place: tl.constexpr, tile):
    """The tuple ``tiles`` with ``tile`` at ``place``."""
    return tiles[:place] + (tile,) + tiles[place + 1 :]  # noqa: RUF005 (no starred expressions in Triton)


@triton.jit
def _larger(a, b):
    """The larger of two values, or a NaN if there is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES])
def _conv_max_pool_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr,
    M, H, W, P, Q, U, V, strips, blocks,
    stride_xn: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    C: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    POOL_R: tl.constexpr, POOL_S: tl.constexpr, POOL_STRIDE_H: tl.constexpr, POOL_STRIDE_W: tl.constexpr,
    POOL_PAD_H: tl.constexpr, POOL_PAD_W: tl.constexpr,
    X_VEC: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From x [N, H, W, GROUPS*C] and w [GROUPS*K, R*S, C] to y [N, U, V, GROUPS*K]. Each image has ``strips`` of TALL
    rows of y times ``blocks`` of WIDE columns of y; M counts these lanes in all images. P and Q are how many rows and
    columns of z the pooling windows hold. The last TAIL of the C channels belong to no tap.

    A program computes BLOCK_M lanes by BLOCK_N filters of a group, row by row of the lanes. ``best`` holds the maxima
    of the WIDE windows in the current row, ``carried`` those over the pixels that they share with the row below."""
    ONE_TAP: tl.constexpr = C % BLOCK_K == 0
    STEPS: tl.constexpr = (R * S * C + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    COLUMNS: tl.constexpr = (WIDE - 1) * POOL_STRIDE_W + POOL_S
    SHARED: tl.constexpr = POOL_R - POOL_STRIDE_H if TALL > 1 else 0  # rows that a window shares with the next
    tl.static_assert(SHARED >= 0)
    tl.static_assert(SHARED <= POOL_STRIDE_H)

    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * TILES_N
    group = pid // tiles % GROUPS  # the constant 0 without groups
    offs_m = pid % tiles // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < K
    channel = group * K + offs_n
    n, _, strip, block = position(offs_m, 1, strips, blocks, 2)
    p0 = strip * (TALL * POOL_STRIDE_H) - POOL_PAD_H
    q0 = block * (WIDE * POOL_STRIDE_W) - POOL_PAD_W
    row = n.to(tl.int64) * stride_xn
    row += (p0 * STRIDE_H - PAD_H).to(tl.int64) * stride_xh + (q0 * STRIDE_W - PAD_W).to(tl.int64) * stride_xw
    row = (row + group * (C // X_VEC)) * X_VEC
    w_row = channel * (R * S * C)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]

    lowest = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    best = (lowest,) * WIDE
    carried = (lowest,) * WIDE
    for down in range(TALL):
        first = tl.where(down == 0, 0, SHARED)
        for pixel in range(first * COLUMNS, POOL_R * COLUMNS):
            i = pixel // COLUMNS
            j = pixel % COLUMNS
            p = p0 + down * POOL_STRIDE_H + i
            q = q0 + j
            is_pixel = mask_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
            h0 = p * STRIDE_H - PAD_H
            w0 = q * STRIDE_W - PAD_W
            corner = row + ((down * POOL_STRIDE_H + i) * STRIDE_H * stride_xh + j * STRIDE_W * stride_xw) * X_VEC
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for step in range(STEPS):
                k = step * BLOCK_K + offs_k
                if ONE_TAP:
                    tap = step // (C // BLOCK_K)
                    r = tap // S * DIL_H
                    s = tap % S * DIL_W
                    mask_x = inside_image(is_pixel, 0, h0 + r, w0 + s, 1, H, W, 0, PAD_H, PAD_W)[:, None]
                    x_row = corner + (r * stride_xh + s * stride_xw) * X_VEC
                    x_off = x_row[:, None] + (step % (C // BLOCK_K) * BLOCK_K + offs_k)[None, :]
                    mask_w = mask_n[None, :]
                else:
                    r = (k // C // S * DIL_H)[None, :]
                    s = (k // C % S * DIL_W)[None, :]
                    mask_k = k < R * S * C
                    mask_x = is_pixel[:, None] & mask_k[None, :]
                    mask_x = inside_image(mask_x, 0, h0[:, None] + r, w0[:, None] + s, 1, H, W, 0, PAD_H, PAD_W)
                    x_off = corner[:, None] + (r * stride_xh + s * stride_xw) * X_VEC + (k % C)[None, :]
                    mask_w = mask_n[None, :] & mask_k[:, None]
                if TAIL > 0:
                    mask_x &= (k % C < C - TAIL)[None, :]
                x = tl.load(x_ptr + x_off, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
                w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
                acc = dot(x, w, acc, PRECISION)
            if scale_ptr is not None:
                acc *= scale
            if bias_ptr is not None:
                acc += bias
            z = tl.where(is_pixel[:, None], activate(acc, ACTIVATION), float("-inf"))
            for right in tl.static_range(WIDE):
                if (j >= right * POOL_STRIDE_W) & (j < right * POOL_STRIDE_W + POOL_S):
                    best = _with_tile(best, right, _larger(best[right], z))
                    if SHARED > 0:
                        if i >= POOL_STRIDE_H:
                            carried = _with_tile(carried, right, _larger(carried[right], z))
        u = strip * TALL + down
        for right in tl.static_range(WIDE):
            v = block * WIDE + right
            y_row = ((n * U + u) * V + v).to(tl.int64) * (K * GROUPS)
            mask_y = (mask_m & (u < U) & (v < V))[:, None] & mask_n[None, :]
            y = narrow(best[right], out_ptr.dtype.element_ty)
            tl.store(out_ptr + y_row[:, None] + channel[None, :], y, mask=mask_y)
        best = carried
        carried = (lowest,) * WIDE


# --- launcher --------------------------------------------------------------------------------------------------------


class PoolWindow(NamedTuple):
    """The pooling window, its stride and its padding in rows and columns: what the kernel takes as constants."""

    r: int
    s: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int

    def constants(self) -> dict[str, int]:
        return {f"POOL_{name.upper()}": value for name, value in self._asdict().items()}


class ConvPoolProblem(NamedTuple):
    """A convolution, of which :func:`.conv_problem.pad_problem` was taken, and the pooling over its output.

    Attributes:
        output: U and V, the rows and columns of the pooled output.
    """

    conv: ConvProblem
    window: PoolWindow
    output: tuple[int, int]

    @property
    def precision(self) -> str:
        return self.conv.precision

    @property
    def seen_size(self) -> tuple[int, int]:
        """How many rows and columns of the convolution the pooling windows hold."""
        w, (u, v) = self.window, self.output
        rows, columns = (u - 1) * w.stride_h - w.pad_h + w.r, (v - 1) * w.stride_w - w.pad_w + w.s
        return min(self.conv.output[1], rows), min(self.conv.output[2], columns)

    @property
    def pooled_pixels(self) -> int:
        """Pixels of y, of all images."""
        return self.conv.N * self.output[0] * self.output[1]

    def minimal_bytes(self) -> float:
        """|x| + |w| + |y|, in bytes: what must cross the memory bus at least once."""
        saved = (self.conv.pixels - self.pooled_pixels) * self.conv.K * self.conv.geometry.groups * self.conv.itemsize
        return self.conv.minimal_bytes() - saved

    def strips_and_blocks(self, config: Config) -> tuple[int, int]:
        """How many strips of TALL rows, and blocks of WIDE columns, the pooled output of an image has."""
        return cost.cdiv(self.output[0], config.TALL), cost.cdiv(self.output[1], config.WIDE)

    def pixels_a_lane(self, config: Config) -> int:
        """Pixels of the convolution that are computed for one lane."""
        w = self.window
        return ((config.TALL - 1) * w.stride_h + w.r) * ((config.WIDE - 1) * w.stride_w + w.s)

    def computed_pixels(self, config: Config) -> int:
        """Pixels of the convolution that are computed for all lanes; a pixel that two lanes need counts twice."""
        w, (strips, blocks), (rows, columns) = self.window, self.strips_and_blocks(config), self.seen_size
        down = _covered_size(rows, strips, config.TALL * w.stride_h, w.pad_h, (config.TALL - 1) * w.stride_h + w.r)
        right = _covered_size(columns, blocks, config.WIDE * w.stride_w, w.pad_w, (config.WIDE - 1) * w.stride_w + w.s)
        return self.conv.N * down * right


def _covered_size(size: int, spans: int, step: int, pad: int, reach: int) -> int:
    """The sum of the lengths of ``spans`` intervals, each cut to [0, size). The first starts at -pad, each next one
    ``step`` later, and all are ``reach`` long."""
    starts = (place * step - pad for place in range(spans))
    return sum(max(0, min(start + reach, size) - max(start, 0)) for start in starts)


def conv_pool_problem(conv: ConvProblem, window: PoolWindow, output: Sequence[int]) -> ConvPoolProblem:
    """The problem of a convolution and the pooling over it. ``conv`` is the convolution of the call, before
    ``pad_problem``; it is channels last, whatever layout the result is to have."""
    return ConvPoolProblem(pad_problem(conv), window, (output[0], output[1]))


def plan(
    p: ConvPoolProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """The launch of y from x, both channels last, and w, contiguous [K, R, S, C]. Of the epilogue it applies scale,
    bias and activation."""
    conv, window, (strips, blocks) = p.conv, p.window, p.strips_and_blocks(config)
    geometry, lanes = conv.geometry, conv.N * strips * blocks
    x_vec, _, (xn, _, _, xh, xw) = layout_strides(x, conv.C)
    return [
        Launch(
            _conv_max_pool_kernel,
            cost.cdiv(lanes, config.BLOCK_M) * cost.cdiv(conv.K, config.BLOCK_N) * geometry.groups,
            {
                "x_ptr": x, "w_ptr": w, "scale_ptr": epilogue.scale, "bias_ptr": epilogue.bias, "out_ptr": y,
                "M": lanes, "H": conv.image[1], "W": conv.image[2],
                **dict(zip("PQUV", (*p.seen_size, *p.output), strict=True)), "strips": strips, "blocks": blocks,
                "stride_xn": xn, "stride_xh": xh, "stride_xw": xw,
            },
            {
                "C": conv.C, "TAIL": conv.tail, "K": conv.K, "R": conv.window[1], "S": conv.window[2],
                "GROUPS": geometry.groups,
                **{name: value for name, value in geometry.constants().items() if not name.endswith("_D")},
                **window.constants(),
                "X_VEC": x_vec, "ACTIVATION": epilogue.activation, "PRECISION": dot_precision(conv),
                **config.constants(),
            },
            config.num_warps,
            config.num_stages,
        )
    ]  # fmt: skip


# --- configs ---------------------------------------------------------------------------------------------------------

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
_TILES = (
    (128, 64, 64, 8, 3),
    (128, 64, 32, 8, 3),
    (64, 64, 64, 4, 3),
    (64, 64, 32, 4, 3),
    (64, 64, 32, 8, 3),
    (64, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (64, 128, 64, 8, 3),
    (64, 128, 32, 8, 3),
    (128, 32, 64, 4, 3),
    (128, 32, 32, 4, 3),
    (64, 32, 32, 4, 3),
    (128, 16, 32, 4, 3),
    (64, 16, 32, 4, 3),
    (64, 32, 16, 4, 2),
    (32, 32, 16, 4, 2),
    (32, 16, 16, 4, 2),  # fits every problem
)
CONFIGS = tuple(
    Config(TALL=tall, WIDE=wide, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in _TILES
    for tall, wide in ((4, 2), (8, 2), (2, 2), (1, 2), (4, 1), (1, 1))
)
# Registers of a thread, at most, for the tiles of z that are held at the same time. With more the compiler may spill.
REGISTERS = 128


def _features(p: ConvPoolProblem) -> dict[str, int | str]:
    """The key of the store: that of the convolution, with the pixels of y in place of those of z, and the pooling
    window."""
    w = p.window
    return {
        **features(p.conv), "pixels": p.pooled_pixels, "window": f"{w.r}x{w.s}", "step": f"{w.stride_h}x{w.stride_w}",
    }  # fmt: skip


def _accepts(p: ConvPoolProblem, config: Config, device: DeviceSpec) -> bool:
    """Does the tile fit, and are lanes of several windows made only where windows overlap, in rows with one other
    window at most?"""
    conv, w, (strips, blocks) = p.conv, p.window, p.strips_and_blocks(config)
    tall = config.TALL == 1 or (w.stride_h < w.r <= 2 * w.stride_h and config.TALL < 2 * p.output[0])
    wide = config.WIDE == 1 or (w.stride_w < w.s and config.WIDE <= p.output[1])
    tiles = 1 + config.WIDE * (1 + (config.TALL > 1))
    registers = tiles * config.BLOCK_M * config.BLOCK_N // (device.warp_size * config.num_warps)
    rows, reduction = conv.N * strips * blocks, conv.taps * conv.C
    return tall and wide and registers <= REGISTERS and tile_fits(conv, config, device, rows, conv.K, reduction)


def _estimate(p: ConvPoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    conv, (strips, blocks) = p.conv, p.strips_and_blocks(config)
    lanes = conv.N * strips * blocks
    return cost.gemm(
        device,
        conv.precision,
        conv.itemsize,
        tiles=cost.cdiv(lanes, config.BLOCK_M) * cost.cdiv(conv.K, config.BLOCK_N) * conv.geometry.groups,
        steps=p.pixels_a_lane(config) * cost.cdiv(conv.taps * conv.C, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        columns=config.BLOCK_N,
    )


def _launches(p: ConvPoolProblem, config: Config) -> list[Launch]:
    x, w, z = meta_tensors(p.conv)
    y = empty(z, (*z.shape[:2], *p.output), True)
    return plan(p, config, x, w, y, Epilogue(bias=w.new_empty(y.shape[1]), activation="relu"))


def _moved_bytes(p: ConvPoolProblem, config: Config) -> float:
    """The bytes that load and store instructions move, by the formula at the head of this file."""
    conv, (strips, blocks) = p.conv, p.strips_and_blocks(config)
    tiles_m = cost.cdiv(conv.N * strips * blocks, config.BLOCK_M)
    tiles_n = cost.cdiv(conv.K, config.BLOCK_N)
    taps = conv.taps * (conv.C - conv.tail)
    weights = tiles_m * p.pixels_a_lane(config) * conv.K * conv.taps * conv.C
    elements = tiles_n * p.computed_pixels(config) * taps + weights + p.pooled_pixels * conv.K
    return float(elements * conv.geometry.groups * conv.itemsize)


def _product_rows(p: ConvPoolProblem) -> int:
    return p.pooled_pixels


def _due_load_bytes(p: ConvPoolProblem) -> int:
    """How many bytes each load must take, for 16-bit tensors with a multiple of 8 channels and of 8 filters: 16, or 8
    where the mask of the tail ends at a multiple of 4 channels. 0 means any width."""
    conv = p.conv
    if conv.itemsize != 2 or conv.C % 8 or conv.K % 8:
        return 0
    return 8 if conv.tail % 8 else 16


CONV_MAX_POOL = register(
    Tunable(
        "conv_max_pool", CONFIGS, _features, _accepts, _estimate, _launches, moved_bytes=_moved_bytes,
        product_rows=_product_rows, due_load_bytes=_due_load_bytes,
    )
)  # fmt: skip


# --- call: allocate, look up the config, launch ----------------------------------------------------------------------


def run(
    x: torch.Tensor, weight: torch.Tensor, size: Sequence[int], geometry: Geometry, window: PoolWindow,
    output: Sequence[int], *, precision: str = "ieee", is_channels_last: bool = False,
    bias: torch.Tensor | None = None, scale: torch.Tensor | None = None, activation: str = "none",
) -> torch.Tensor:  # fmt: skip
    """y [N, K, U, V]; ``size`` is the convolution's P x Q, ``output`` U x V."""
    y, epilogue = result_and_epilogue(
        x, (x.shape[0], weight.shape[0], *output), True, bias=bias, scale=scale, residual=None, activation=activation,
        save_input=False,
    )  # fmt: skip
    conv = problem_of(x.shape, weight.shape, size, geometry, x.dtype, precision, True)
    problem = conv_pool_problem(conv, window, output)
    x, weight = pad_image(x, conv, problem.conv), pad_weight(weight, conv, problem.conv)
    launch(CONV_MAX_POOL, plan, problem, x, weight, y, epilogue)
    return y if is_channels_last else empty(y, y.shape, False).copy_(y)
