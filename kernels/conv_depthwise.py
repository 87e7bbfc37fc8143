r"""Depthwise 2-d convolution (one input channel a group): forward, input gradient, weight gradient.

    y[n,k,p,q] = act(scale[k] * sum_{r,s} x[n, k // MULT, p*STRIDE_H - PAD_H + r*DIL_H, q*STRIDE_W - PAD_W + s*DIL_W]
                                          * w[k,r,s]  + bias[k] + residual[n,k,p,q])

There is no reduction over channels, so nothing for tensor cores: each program holds a tile of pixels x channels and
adds R*S products in fp32. K counts output channels, MULT of them share an input channel. Both layouts are read in
place; channels last loads run along the channels, 16 bytes a thread, those of the weights too: the launcher lays them
out as [R, S, K]. The taps are one loop, because the compiler unrolls the inner one of two and keeps all its loads in
registers.

Bytes. What must come from memory once is |x| + |w| + |y|. What the load and store instructions move (e bytes an
element, out-of-bounds taps load nothing, neighbouring taps hit the L1 cache; T_m tiles of pixels):

    forward          R*S*N*P*Q*K*e + T_m*R*S*K*e + N*P*Q*K*e
    input gradient   R*S*N*P*Q*K*e + T_m*R*S*K*e + N*H*W*C*e    (T_m of input pixels)
    weight gradient  2*R*S*N*P*Q*K*e + 8*splits*R*S*K + R*S*K*e

Deterministic: gathers only; the weight gradient adds its partial sums in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ._launch import Launch, launch, layout_strides, strides, unit_divisor
from ._math import column_sum, narrow, pixel, tile_offsets
from .conv import Conv2dProblem, Geometry, _epilogue, _features, contiguous, empty_output, problem_of, sum_splits

SIZES = ["M", "N", "H", "W", "P", "Q", "splits"]
X_STRIDES = ["stride_xn", "stride_xc", "stride_xh", "stride_xw"]
Y_STRIDES = ["stride_yn", "stride_yk", "stride_yp", "stride_yq"]


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def _depthwise_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
    M, H, W, P, Q,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    K: tl.constexpr, MULT: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILES_C: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_k = k < K
    n, p, q = pixel(offs_m, P, Q)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for tap in range(R * S):
        h = h0 + tap // S * DIL_H
        col = w0 + tap % S * DIL_W
        inside = mask_m & (h >= 0) & (h < H) & (col >= 0) & (col < W)
        x_off = tile_offsets(n, h, col, k // MULT, stride_xn, stride_xc, stride_xh, stride_xw, X_VEC, X_UNIT_C)
        x = tl.load(x_ptr + x_off, mask=inside[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        w = tl.load(w_ptr + tap * K + k, mask=mask_k, other=0.0)  # [BLOCK_C]
        acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
    y_off = tile_offsets(n, p, q, k, stride_yn, stride_yk, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
    mask = mask_m[:, None] & mask_k[None, :]
    _epilogue(acc, k, y_off, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, mask_k, ACTIVATION)


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def _depthwise_input_grad_kernel(
    g_ptr, w_ptr, dx_ptr,
    M, H, W, P, Q,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    K: tl.constexpr, MULT: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each input pixel gathers the outputs whose window covers it; M counts input pixels."""
    C: tl.constexpr = K // MULT
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, h, col = pixel(offs_m, H, W)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for tap in range(R * S):
        up = h + PAD_H - tap // S * DIL_H
        left = col + PAD_W - tap % S * DIL_W
        p = up // STRIDE_H
        q = left // STRIDE_W
        inside = mask_m & (up >= 0) & (left >= 0) & (p < P) & (q < Q)
        inside &= (up % STRIDE_H == 0) & (left % STRIDE_W == 0)
        for m in range(MULT):
            k = c * MULT + m
            g_off = tile_offsets(n, p, q, k, stride_yn, stride_yk, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
            g = tl.load(g_ptr + g_off, mask=inside[:, None] & mask_c[None, :], other=0.0)
            w = tl.load(w_ptr + tap * K + k, mask=mask_c, other=0.0)
            acc += g.to(tl.float32) * w.to(tl.float32)[None, :]
    x_off = tile_offsets(n, h, col, c, stride_xn, stride_xc, stride_xh, stride_xw, X_VEC, X_UNIT_C)
    tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def _depthwise_weight_grad_kernel(
    x_ptr, g_ptr, partial_ptr,
    M, H, W, P, Q, splits,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    K: tl.constexpr, MULT: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [splits, K, R*S]: one program sums one tap of BLOCK_C channels over its run of output pixels. Taps are
    neighbours in the grid, so the R*S programs that read the same pixels read them from the cache."""
    TILES_C: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tap = pid % (R * S)
    k = pid // (R * S) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    split = pid // (R * S * TILES_C)
    r = tap // S * DIL_H
    s = tap % S * DIL_W
    mask_k = k < K
    steps = tl.cdiv(M, BLOCK_M)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for step in range(first, last):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        n, p, q = pixel(offs_m, P, Q)
        h = p * STRIDE_H - PAD_H + r
        col = q * STRIDE_W - PAD_W + s
        inside = mask_m & (h >= 0) & (h < H) & (col >= 0) & (col < W)
        x_off = tile_offsets(n, h, col, k // MULT, stride_xn, stride_xc, stride_xh, stride_xw, X_VEC, X_UNIT_C)
        x = tl.load(x_ptr + x_off, mask=inside[:, None] & mask_k[None, :], other=0.0)
        g_off = tile_offsets(n, p, q, k, stride_yn, stride_yk, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
        g = tl.load(g_ptr + g_off, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc += x.to(tl.float32) * g.to(tl.float32)
    out = (split.to(tl.int64) * K + k) * (R * S) + tap
    tl.store(partial_ptr + out, column_sum(acc), mask=mask_k)


# --- launchers -------------------------------------------------------------------------------------------------------


def _multiplier(p: Conv2dProblem) -> int:
    return p.K  # output channels of a group; p.C is 1


def _constants(p: Conv2dProblem, x: torch.Tensor, y: torch.Tensor, config: Config) -> tuple[dict, dict]:
    """Strides of x and y (or its gradient), and the constexprs that all three kernels share."""
    x_vec, x_unit, x_strides = layout_strides(x)
    y_vec, y_unit, y_strides = layout_strides(y)
    sizes = dict(zip((*X_STRIDES, *Y_STRIDES), (*x_strides, *y_strides), strict=True))
    constants = {
        "K": p.K * p.geometry.groups, "MULT": _multiplier(p), "R": p.R, "S": p.S, **p.geometry.constants(),
        "X_VEC": x_vec, "X_UNIT_C": x_unit, "Y_VEC": y_vec, "Y_UNIT_C": y_unit,
        "BLOCK_M": config.BLOCK_M, "BLOCK_C": config.BLOCK_C,
    }  # fmt: skip
    return sizes, constants


def plan_forward(
    p: Conv2dProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, *,
    z: torch.Tensor | None = None, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none",
) -> list[Launch]:  # fmt: skip
    """x in any layout, w dense [R, S, K]; z and residual have y's strides."""
    sizes, constants = _constants(p, x, y, config)
    tiles = cost.cdiv(p.pixels, config.BLOCK_M) * cost.cdiv(constants["K"], config.BLOCK_C)
    operands = {"scale_ptr": scale, "bias_ptr": bias, "residual_ptr": residual, "y_ptr": y, "z_ptr": z}
    args = {"x_ptr": x, "w_ptr": w, **operands, "M": p.pixels, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, **sizes}
    constants["ACTIVATION"] = activation
    return [Launch(_depthwise_kernel, tiles, args, constants, config.num_warps, config.num_stages)]


def plan_input_grad(
    p: Conv2dProblem, config: Config, g: torch.Tensor, w: torch.Tensor, dx: torch.Tensor
) -> list[Launch]:
    sizes, constants = _constants(p, dx, g, config)
    pixels = p.N * p.H * p.W
    tiles = cost.cdiv(pixels, config.BLOCK_M) * cost.cdiv(p.geometry.groups, config.BLOCK_C)
    args = {"g_ptr": g, "w_ptr": w, "dx_ptr": dx, "M": pixels, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, **sizes}
    return [Launch(_depthwise_input_grad_kernel, tiles, args, constants, config.num_warps, config.num_stages)]


def plan_weight_grad(
    p: Conv2dProblem, config: Config, x: torch.Tensor, g: torch.Tensor, dw: torch.Tensor
) -> list[Launch]:
    sizes, constants = _constants(p, x, g, config)
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.pixels, config.BLOCK_M)))
    partial = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
    tiles = p.R * p.S * cost.cdiv(constants["K"], config.BLOCK_C) * splits
    args = {
        "x_ptr": x, "g_ptr": g, "partial_ptr": partial,
        "M": p.pixels, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "splits": splits, **sizes,
    }  # fmt: skip
    main = Launch(_depthwise_weight_grad_kernel, tiles, args, constants, config.num_warps, config.num_stages)
    return [main, sum_splits(partial, dw)]


# --- configs ---------------------------------------------------------------------------------------------------------

_TILES = (
    # BLOCK_M, BLOCK_C, warps: channels last runs along the channels, NCHW along the pixels
    (16, 64, 4),
    (32, 64, 4),
    (64, 64, 8),
    (32, 32, 4),
    (64, 32, 4),
    (128, 16, 4),
    (16, 128, 4),
    (128, 8, 4),
    (8, 64, 2),
    (8, 128, 2),
    (64, 16, 2),
    (128, 8, 2),
    (128, 1, 4),
    (256, 1, 4),
    (64, 1, 2),
)
CONFIGS = tuple(Config(BLOCK_M=m, BLOCK_C=c, num_warps=w, num_stages=1) for m, c, w in _TILES)
WEIGHT_GRAD_CONFIGS = tuple(
    Config(BLOCK_M=m, BLOCK_C=c, SPLIT_M=split, num_warps=w, num_stages=1)
    for split in (16, 64, 256)
    for m, c, w in _TILES
)


def _accepts(p: Conv2dProblem, config: Config, device: DeviceSpec) -> bool:
    """Channels last loads want a run of channels, and 16 bytes a thread; NCHW loads a run of pixels."""
    channels = p.geometry.groups
    if not p.channels_last:
        return config.BLOCK_C == 1
    vec = unit_divisor(16 // p.itemsize, channels)
    fills = config.BLOCK_M * config.BLOCK_C >= vec * device.warp_size * config.num_warps
    return fills and config.BLOCK_C > 1 and (config.BLOCK_C <= 8 or config.BLOCK_C < 2 * channels)


def _issued_bytes(p: Conv2dProblem) -> float:
    return float((p.R * p.S + 1) * p.pixels * p.K * p.geometry.groups * p.itemsize)


def _estimate(p: Conv2dProblem, config: Config, device: DeviceSpec) -> Estimate:
    channels = p.K * p.geometry.groups
    columns = cost.cdiv(channels, config.BLOCK_C)
    return cost.stream(
        device,
        programs=cost.cdiv(p.pixels, config.BLOCK_M) * columns,
        issued_bytes=_issued_bytes(p),
        dram_bytes=p.minimal_bytes(),
        config=config,
        tile_bytes=config.BLOCK_M * config.BLOCK_C * p.itemsize,
        waste=columns * config.BLOCK_C / max(1, channels),
        flops=p.flops,
    )


def _weight_grad_estimate(p: Conv2dProblem, config: Config, device: DeviceSpec) -> Estimate:
    channels = p.K * p.geometry.groups
    columns = cost.cdiv(channels, config.BLOCK_C)
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.pixels, config.BLOCK_M)))
    return cost.stream(
        device,
        programs=splits * columns * p.R * p.S,
        issued_bytes=2 * _issued_bytes(p),
        dram_bytes=p.minimal_bytes() + 8.0 * splits * channels * p.R * p.S,
        config=config,
        tile_bytes=config.BLOCK_M * config.BLOCK_C * p.itemsize,
        waste=columns * config.BLOCK_C / max(1, channels),
        flops=p.flops,
    )


def _meta(p: Conv2dProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like = torch.empty(0, dtype=p.dtype, device="meta")
    channels = p.K * p.geometry.groups
    x = empty_output(like, (p.N, p.geometry.groups, p.H, p.W), p.channels_last)
    return x, like.new_empty(p.R, p.S, channels), empty_output(like, (p.N, channels, p.P, p.Q), p.channels_last)


def _forward_launches(p: Conv2dProblem, config: Config) -> list[Launch]:
    x, w, y = _meta(p)
    return plan_forward(p, config, x, w, y, bias=w.new_empty(y.shape[1]), activation="relu")


def _input_grad_launches(p: Conv2dProblem, config: Config) -> list[Launch]:
    x, w, y = _meta(p)
    return plan_input_grad(p, config, y, w, x)


def _weight_grad_launches(p: Conv2dProblem, config: Config) -> list[Launch]:
    x, w, y = _meta(p)
    return plan_weight_grad(p, config, x, y, w)


FORWARD = register(Tunable("conv2d_depthwise", CONFIGS, _features, _accepts, _estimate, _forward_launches))
INPUT_GRAD = register(
    Tunable("conv2d_depthwise_input_grad", CONFIGS, _features, _accepts, _estimate, _input_grad_launches)
)
WEIGHT_GRAD = register(
    Tunable(
        "conv2d_depthwise_weight_grad", WEIGHT_GRAD_CONFIGS, _features, _accepts, _weight_grad_estimate,
        _weight_grad_launches,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def taps_first(weight: torch.Tensor) -> torch.Tensor:
    """[K, 1, R, S] as [R, S, K]."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, pq: tuple[int, int], geometry: Geometry, *,
    bias: torch.Tensor | None = None, scale: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    activation: str = "none", precision: str = "ieee", save_input: bool = False, is_channels_last: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """y, and with ``save_input`` also what the activation was applied to."""
    y = empty_output(x, (x.shape[0], weight.shape[0], *pq), is_channels_last)
    z = torch.empty_like(y) if save_input else None
    if residual is not None and strides(residual) != strides(y):
        residual = torch.empty_like(y).copy_(residual)
    problem = problem_of(tuple(x.shape), tuple(weight.shape), pq, geometry, x.dtype, precision, is_channels_last)
    launch(
        FORWARD, plan_forward, problem, x, taps_first(weight), y, z=z, bias=contiguous(bias), scale=contiguous(scale),
        residual=residual, activation=activation,
    )  # fmt: skip
    return y, z


def run_input_grad(
    g: torch.Tensor, weight: torch.Tensor, hw: tuple[int, int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    dx = empty_output(g, (g.shape[0], geometry.groups, *hw), is_channels_last)
    pq = (g.shape[2], g.shape[3])
    problem = problem_of(tuple(dx.shape), tuple(weight.shape), pq, geometry, g.dtype, precision, is_channels_last)
    launch(INPUT_GRAD, plan_input_grad, problem, g, taps_first(weight), dx)
    return dx


def run_weight_grad(
    x: torch.Tensor, g: torch.Tensor, weight_shape: tuple[int, int, int, int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    dw = empty_output(x, weight_shape, is_channels_last)
    pq = (g.shape[2], g.shape[3])
    unit_channels = x.shape[1] == 1 or x.stride(1) == 1
    problem = problem_of(tuple(x.shape), weight_shape, pq, geometry, x.dtype, precision, unit_channels)
    launch(WEIGHT_GRAD, plan_weight_grad, problem, x, g, dw)
    return dw
