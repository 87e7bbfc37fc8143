r"""Dense and grouped 2-d convolution as implicit matrix products: forward, input gradient, weight gradient.

    y[n,k,p,q] = act(scale[k] * sum_{c,r,s} x[n, c, p*STRIDE_H - PAD_H + r*DIL_H, q*STRIDE_W - PAD_W + s*DIL_W]
                                            * w[k,c,r,s]  + bias[k] + residual[n,k,p,q])

Letters are the literature's: N images, C input and K output channels *of one group*, H x W input, R x S window,
P x Q output. All sums are in fp32; results are rounded once.

Each pass is one tiled matrix product whose left operand is gathered from the tensor, never materialised:

    pass             rows                   columns        reduction      left operand      right operand
    forward          N*P*Q output pixels    K              R*S*C          x, per window tap w
    input gradient   input pixels           C              taps*K         g, per window tap w, transposed
    weight gradient  K                      R*S*C          N*P*Q pixels   g, transposed     x, per window tap

Tensors lie channels last here (the launchers re-lay what does not), weights as [K*GROUPS, R, S, C].

Bytes. What must come from memory once is |x| + |w| + |y|. What the load and store instructions move, with T_m, T_n
tiles of rows and columns and e bytes an element, is

    forward          T_n * N*P*Q*R*S*C*e + T_m * K*R*S*C*e + N*P*Q*K*e    (per group; taps outside load nothing)
    input gradient   T_n * N*P*Q*R*S*K*e + T_m * K*R*S*C*e + N*H*W*C*e    (T_m, per parity class with its taps)
    weight gradient  T_m * N*P*Q*R*S*C*e + T_n * N*P*Q*K*e + R*S*C*K*e
    split s > 1      + 8 * s * (size of the output) for the fp32 partial sums, written and read once

Strides of a channels-last tensor come in units of its VEC elements (the widest load that all of them allow), and the
kernel multiplies by the constant VEC: so the compiler sees that every row starts on a multiple of VEC and keeps 16-byte
loads although strides are run-time values. A hint (``tl.multiple_of``) does the same until some folding drops it.

Everything is deterministic: a split reduction writes partial sums that a second kernel adds in order. No atomics.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ._launch import Launch, launch, layout_strides, strides
from ._math import activate, activation_grad, column_sum, dot, grouped_tile, narrow, pixel, tile_offsets

SIZES = ["M", "N", "H", "W", "P", "Q", "splits"]


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _epilogue(
    acc, k, y_off, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, mask_k, ACTIVATION: tl.constexpr
):  # fmt: skip
    """``act(scale * acc + bias + residual)`` in fp32, stored at ``y_off``; keeps the activation's input in z."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + y_off, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + y_off, narrow(acc, z_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + y_off, narrow(activate(acc, ACTIVATION), y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "stride_xn", "stride_xh", "stride_xw",
                               "stride_yn", "stride_yk", "stride_yp", "stride_yq"])  # fmt: skip
def _conv2d_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, partial_ptr,
    M, H, W, P, Q, splits,
    stride_xn: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_VEC: tl.constexpr, Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # A reduction tile lies in one tap when BLOCK_K divides C; otherwise every element finds its own tap.
    ONE_TAP: tl.constexpr = C % BLOCK_K == 0
    STEPS: tl.constexpr = (R * S * C + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * TILES_N
    group = pid // tiles % GROUPS
    split = pid // tiles // GROUPS
    pid_m, pid_n = grouped_tile(pid % tiles, tiles_m, TILES_N, GROUP_M)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < K
    n, p, q = pixel(offs_m, P, Q)
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    row = n.to(tl.int64) * stride_xn + h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
    row = (row + group * (C // X_VEC)) * X_VEC
    w_row = (group * K + offs_n) * (R * S * C)

    per_split = tl.cdiv(STEPS, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, STEPS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K + offs_k
        if ONE_TAP:
            tap = step // (C // BLOCK_K)
            r = tap // S * DIL_H
            s = tap % S * DIL_W
            mask_x = mask_m
            if PADDED:
                mask_x &= (h0 + r >= 0) & (h0 + r < H) & (w0 + s >= 0) & (w0 + s < W)
            x_row = row + (r * stride_xh + s * stride_xw) * X_VEC
            x_off = x_row[:, None] + (step % (C // BLOCK_K) * BLOCK_K + offs_k)[None, :]
            x = tl.load(x_ptr + x_off, mask=mask_x[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            tap = k // C
            r = tap // S * DIL_H
            s = tap % S * DIL_W
            mask_k = k < R * S * C
            mask_x = mask_m[:, None] & mask_k[None, :]
            if PADDED:
                h = h0[:, None] + r[None, :]
                mask_x &= (h >= 0) & (h < H)
                col = w0[:, None] + s[None, :]
                mask_x &= (col >= 0) & (col < W)
            tap_off = (r * stride_xh + s * stride_xw) * X_VEC + k % C
            x = tl.load(x_ptr + row[:, None] + tap_off[None, :], mask=mask_x, other=0.0)
            w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = dot(x, w, acc, PRECISION)

    channel = group * K + offs_n
    mask = mask_m[:, None] & mask_n[None, :]
    if partial_ptr is not None:
        row_off = (split.to(tl.int64) * M + offs_m) * (K * GROUPS)
        tl.store(partial_ptr + row_off[:, None] + channel[None, :], acc, mask=mask)
    else:
        y_off = tile_offsets(n, p, q, channel, stride_yn, stride_yk, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
        _epilogue(acc, channel, y_off, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, mask_n, ACTIVATION)


@triton.jit(do_not_specialize=[*SIZES, "stride_yn", "stride_yk", "stride_yp", "stride_yq"])
def _conv2d_reduce_kernel(
    partial_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
    M, P, Q, splits,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    K: tl.constexpr, Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums [splits, M, K] in order and runs the epilogue; K counts all groups."""
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    offs_m = tl.program_id(0) // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(0, splits):
        row_off = (offs_m + tl.cast(split, tl.int64) * M) * K
        acc += tl.load(partial_ptr + row_off[:, None] + offs_n[None, :], mask=mask, other=0.0)
    n, p, q = pixel(offs_m, P, Q)
    y_off = tile_offsets(n, p, q, offs_n, stride_yn, stride_yk, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
    _epilogue(acc, offs_n, y_off, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, mask_n, ACTIVATION)


# --- gradients -------------------------------------------------------------------------------------------------------


@triton.jit
def _first_tap(position, STRIDE: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr):
    """The smallest tap whose offset meets ``position`` modulo STRIDE; TAPS if none does. Taps repeat every STEP."""
    first = TAPS
    for tap in tl.static_range(STEP):
        hits = (position + (STRIDE - (STEP - 1 - tap) * DIL % STRIDE)) % STRIDE == 0
        first = tl.where(hits, STEP - 1 - tap, first)
    return tl.minimum(first, TAPS)


@triton.jit(do_not_specialize=[*SIZES, "stride_gn", "stride_gp", "stride_gq",
                               "stride_xn", "stride_xc", "stride_xh", "stride_xw"])  # fmt: skip
def _conv2d_input_grad_kernel(
    g_ptr, w_ptr, dx_ptr,
    N, H, W, P, Q,
    stride_gn: tl.int64, stride_gp: tl.int64, stride_gq: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,  # taps of one parity class lie STEP apart: STRIDE / gcd(STRIDE, DIL)
    STRIDE_WK: tl.constexpr, STRIDE_WT: tl.constexpr, STRIDE_WC: tl.constexpr,  # of the weights: channel, tap, channel
    G_VEC: tl.constexpr, X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A strided window touches an input pixel only with taps of its parity, so each of the STRIDE_H * STRIDE_W
    classes of pixels is a product of its own with just those taps: no zeros are inserted and none multiplied."""
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(N * tl.cdiv(H, STRIDE_H) * tl.cdiv(W, STRIDE_W), BLOCK_M)
    tiles = tiles_m * TILES_N
    group = pid // tiles % GROUPS
    parity = pid // tiles // GROUPS
    pid_m, pid_n = grouped_tile(pid % tiles, tiles_m, TILES_N, GROUP_M)
    parity_h = parity // STRIDE_W
    parity_w = parity % STRIDE_W
    rows = (H - parity_h + STRIDE_H - 1) // STRIDE_H
    cols = (W - parity_w + STRIDE_W - 1) // STRIDE_W

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < N * rows * cols
    mask_n = offs_n < C
    n, i, j = pixel(offs_m, tl.maximum(rows, 1), tl.maximum(cols, 1))
    h = i * STRIDE_H + parity_h
    w_col = j * STRIDE_W + parity_w

    r0 = _first_tap(parity_h + PAD_H, STRIDE_H, DIL_H, STEP_H, R)
    s0 = _first_tap(parity_w + PAD_W, STRIDE_W, DIL_W, STEP_W, S)
    taps_h = (R - r0 + STEP_H - 1) // STEP_H
    taps_w = (S - s0 + STEP_W - 1) // STEP_W
    # The output row that tap r0 reads; the next tap of the class reads DIL * STEP / STRIDE rows above it.
    p0 = (h + PAD_H - r0 * DIL_H) // STRIDE_H
    q0 = (w_col + PAD_W - s0 * DIL_W) // STRIDE_W
    BACK_P: tl.constexpr = DIL_H * STEP_H // STRIDE_H
    BACK_Q: tl.constexpr = DIL_W * STEP_W // STRIDE_W
    row = n.to(tl.int64) * stride_gn + p0.to(tl.int64) * stride_gp + q0.to(tl.int64) * stride_gq
    row = (row + group * (K // G_VEC)) * G_VEC

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, taps_h * taps_w * CHUNKS):
        tap_h = step // CHUNKS // taps_w
        tap_w = step // CHUNKS % taps_w
        k = step % CHUNKS * BLOCK_K + offs_k
        mask_k = k < K
        p = p0 - tap_h * BACK_P
        q = q0 - tap_w * BACK_Q
        mask_g = mask_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        g_off = row - (tap_h * BACK_P * stride_gp + tap_w * BACK_Q * stride_gq) * G_VEC
        tap = (r0 + tap_h * STEP_H) * S + s0 + tap_w * STEP_W
        w_off = ((group * K + k) * STRIDE_WK)[:, None] + (tap * STRIDE_WT + offs_n * STRIDE_WC)[None, :]
        if K % BLOCK_K == 0:
            g = tl.load(g_ptr + g_off[:, None] + k[None, :], mask=mask_g[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptr + w_off, mask=mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            g = tl.load(g_ptr + g_off[:, None] + k[None, :], mask=mask_g[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptr + w_off, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = dot(g, w, acc, PRECISION)

    x_off = tile_offsets(n, h, w_col, group * C + offs_n, stride_xn, stride_xc, stride_xh, stride_xw, X_VEC, X_UNIT_C)
    tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=[*SIZES, "stride_xn", "stride_xh", "stride_xw", "stride_gn", "stride_gp", "stride_gq"])
def _conv2d_weight_grad_kernel(
    x_ptr, g_ptr, dw_ptr,
    M, H, W, P, Q, splits,
    stride_xn: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_gn: tl.int64, stride_gp: tl.int64, stride_gq: tl.int64,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    STRIDE_WT: tl.constexpr, STRIDE_WC: tl.constexpr,  # of dw: tap, channel; a row has R * S * C elements
    X_VEC: tl.constexpr, G_VEC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw [K * GROUPS, R*S*C], or with splits > 1 the fp32 partial sums [splits, K * GROUPS, R*S*C]."""
    ONE_TAP: tl.constexpr = C % BLOCK_N == 0
    TILES_M: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (R * S * C + BLOCK_N - 1) // BLOCK_N
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0

    # Programs that read the same pixels run side by side: tiles of one split are neighbours.
    pid = tl.program_id(0)
    pid_n = pid % TILES_N
    pid_m = pid // TILES_N % TILES_M
    group = pid // (TILES_N * TILES_M) % GROUPS
    split = pid // (TILES_N * TILES_M * GROUPS)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < K
    mask_n = offs_n < R * S * C
    if ONE_TAP:
        tap = pid_n // (C // BLOCK_N)
        r = tap // S * DIL_H
        s = tap % S * DIL_W
        c0 = pid_n % (C // BLOCK_N) * BLOCK_N
        c_off = (group * (C // X_VEC)) * X_VEC + c0 + tl.arange(0, BLOCK_N)
    else:
        tap = offs_n // C
        r = tap // S * DIL_H
        s = tap % S * DIL_W
        c_off = offs_n % C + (group * (C // X_VEC)) * X_VEC

    steps = tl.cdiv(M, BLOCK_K)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        offs_p = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_p = offs_p < M
        n, p, q = pixel(offs_p, P, Q)
        g_row = n.to(tl.int64) * stride_gn + p.to(tl.int64) * stride_gp + q.to(tl.int64) * stride_gq
        g_off = ((g_row + group * (K // G_VEC)) * G_VEC)[:, None] + offs_m[None, :]
        g = tl.load(g_ptr + g_off, mask=mask_p[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        h0 = p * STRIDE_H - PAD_H
        w0 = q * STRIDE_W - PAD_W
        if ONE_TAP:
            mask_x = mask_p
            if PADDED:
                mask_x &= (h0 + r >= 0) & (h0 + r < H) & (w0 + s >= 0) & (w0 + s < W)
            x_row = n.to(tl.int64) * stride_xn + (h0 + r).to(tl.int64) * stride_xh + (w0 + s).to(tl.int64) * stride_xw
            x_off = (x_row * X_VEC)[:, None] + c_off[None, :]
            x = tl.load(x_ptr + x_off, mask=mask_x[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            mask_x = mask_p[:, None] & mask_n[None, :]
            if PADDED:
                h = h0[:, None] + r[None, :]
                mask_x &= (h >= 0) & (h < H)
                col = w0[:, None] + s[None, :]
                mask_x &= (col >= 0) & (col < W)
            x_row = n.to(tl.int64) * stride_xn + h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
            x_off = (x_row * X_VEC)[:, None] + ((r * stride_xh + s * stride_xw) * X_VEC + c_off)[None, :]
            x = tl.load(x_ptr + x_off, mask=mask_x, other=0.0)
        acc = dot(tl.trans(g), x, acc, PRECISION)

    if ONE_TAP:
        column = tap * STRIDE_WT + (c0 + tl.arange(0, BLOCK_N)) * STRIDE_WC
    else:
        column = tap * STRIDE_WT + offs_n % C * STRIDE_WC
    out_row = (split * GROUPS * K + group * K + offs_m).to(tl.int64) * (R * S * C)
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(dw_ptr + out_row[:, None] + column[None, :], narrow(acc, dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "splits"])
def _sum_splits_kernel(partial_ptr, out_ptr, L: tl.int64, splits, BLOCK: tl.constexpr):
    """out[l] = sum of partial[split, l] over the splits, in order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < L
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, splits):
        acc += tl.load(partial_ptr + split * L + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "stride_yn", "stride_yk", "stride_yp", "stride_yq",
                               "stride_zn", "stride_zk", "stride_zp", "stride_zq"])  # fmt: skip
def _conv2d_epilogue_grad_kernel(
    dy_ptr, saved_ptr, g_ptr, partial_ptr,
    M, P, Q, splits,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_zn: tl.int64, stride_zk: tl.int64, stride_zp: tl.int64, stride_zq: tl.int64,
    K: tl.constexpr, Y_UNIT_C: tl.constexpr, Z_UNIT_C: tl.constexpr, G_CHANNELS_LAST: tl.constexpr,
    Y_VEC: tl.constexpr, Z_VEC: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g = dy * act'(saved), dense in either layout, and the bias gradient: column sums of g.

    Reads dy (and saved), writes g: one pass, |dy| + |saved| + |g| bytes. K counts all groups here. Each program walks
    one of ``splits`` runs of rows and leaves its column sums in partial [splits, K].
    """
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0) // TILES_N
    offs_n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    steps = tl.cdiv(M, BLOCK_M)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        n, p, q = pixel(offs_m, P, Q)
        y_off = tile_offsets(n, p, q, offs_n, stride_yn, stride_yk, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
        g = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)
        if saved_ptr is not None:
            z_off = tile_offsets(n, p, q, offs_n, stride_zn, stride_zk, stride_zp, stride_zq, Z_VEC, Z_UNIT_C)
            saved = tl.load(saved_ptr + z_off, mask=mask, other=0.0).to(tl.float32)
            g = tl.where(mask, g * activation_grad(saved, ACTIVATION), 0.0)
        if g_ptr is not None:
            if G_CHANNELS_LAST:
                g_off = (offs_m.to(tl.int64) * K)[:, None] + offs_n[None, :]
            else:
                image = n.to(tl.int64) * K * P * Q + p * Q + q
                g_off = image[:, None] + (offs_n.to(tl.int64) * P * Q)[None, :]
            tl.store(g_ptr + g_off, narrow(g, g_ptr.dtype.element_ty), mask=mask)
        acc += g
    if partial_ptr is not None:
        tl.store(partial_ptr + split * K + offs_n, column_sum(acc), mask=mask_n)


# --- launchers -------------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """The window: what the kernels take as constants."""

    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int
    groups: int

    def constants(self) -> dict[str, int]:
        return {
            "STRIDE_H": self.stride_h,
            "STRIDE_W": self.stride_w,
            "PAD_H": self.pad_h,
            "PAD_W": self.pad_w,
            "DIL_H": self.dil_h,
            "DIL_W": self.dil_w,
        }


class Conv2dProblem(NamedTuple):
    """One convolution; C and K count one group's channels. ``precision`` is "16", "ieee", "tf32" or "tf32x3"."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    geometry: Geometry
    dtype: torch.dtype
    precision: str
    channels_last: bool = True

    @property
    def pixels(self) -> int:
        return self.N * self.P * self.Q

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def flops(self) -> float:
        return 2.0 * self.pixels * self.K * self.R * self.S * self.C * self.geometry.groups

    def minimal_bytes(self) -> float:
        """|x| + |w| + |y|: what must cross the memory bus at least once."""
        g = self.geometry
        x = self.N * self.H * self.W * self.C * g.groups
        w = self.K * self.R * self.S * self.C * g.groups
        return float((x + w + self.pixels * self.K * g.groups) * self.itemsize)


def problem_of(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], pq: tuple[int, int], geometry: Geometry,
    dtype: torch.dtype, precision: str, channels_last: bool,
) -> Conv2dProblem:  # fmt: skip
    n, _, h, w = x_shape
    k, c, r, s = w_shape
    precision = precision if dtype == torch.float32 else "16"
    return Conv2dProblem(n, c, h, w, k // geometry.groups, r, s, *pq, geometry, dtype, precision, channels_last)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself if neighbouring channels are neighbours in memory, else a channels-last copy."""
    return t if t.shape[1] == 1 or t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights [K, C, R, S] as dense [K, R, S, C]; a view where they are channels last already."""
    return weight.permute(0, 2, 3, 1).contiguous()


def padded_channels(c: int) -> int:
    """Up to four channels become four, up to eight eight, so that a pixel is one aligned load."""
    return 4 if c <= 4 else max(c, 8)


def pad_problem(p: Conv2dProblem) -> Conv2dProblem:
    """What the kernels that read x solve, forward and weight gradient: without groups a narrow image is padded."""
    return p._replace(C=padded_channels(p.C)) if p.geometry.groups == 1 else p


def pad_channels(t: torch.Tensor) -> torch.Tensor:
    """The channels of :func:`padded_channels`, zeros behind."""
    c = t.shape[1]
    padded = padded_channels(c)
    if c == padded:
        return t
    out = t.new_empty(t.shape[0], t.shape[2], t.shape[3], padded).permute(0, 3, 1, 2)
    out[:, :c].copy_(t)
    out[:, c:].zero_()
    return out


def empty_output(like: torch.Tensor, shape: tuple[int, ...], is_channels_last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def plan_forward(
    p: Conv2dProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, *,
    z: torch.Tensor | None = None, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none",
) -> list[Launch]:  # fmt: skip
    """x channels last, w packed [K, R, S, C]; z and residual have y's strides."""
    groups = p.geometry.groups
    x_vec, _, (xn, _, xh, xw) = layout_strides(x, p.C)
    y_vec, y_unit, (yn, yk, yp, yq) = layout_strides(y)
    tiles = cost.cdiv(p.pixels, config.BLOCK_M) * cost.cdiv(p.K, config.BLOCK_N)
    split = config.SPLIT_K
    partial = None
    if split > 1:
        partial = torch.empty((split, p.pixels, p.K * groups), dtype=torch.float32, device=x.device)
    y_constants = {"Y_VEC": y_vec, "Y_UNIT_C": y_unit, "ACTIVATION": activation}
    y_strides = {"stride_yn": yn, "stride_yk": yk, "stride_yp": yp, "stride_yq": yq}
    operands = {"scale_ptr": scale, "bias_ptr": bias, "residual_ptr": residual, "y_ptr": y, "z_ptr": z}
    main = Launch(
        _conv2d_kernel,
        tiles * groups * split,
        {
            "x_ptr": x, "w_ptr": w, **operands, "partial_ptr": partial,
            "M": p.pixels, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "splits": split,
            "stride_xn": xn, "stride_xh": xh, "stride_xw": xw, **y_strides,
        },
        {
            "C": p.C, "K": p.K, "R": p.R, "S": p.S, "GROUPS": groups, **p.geometry.constants(),
            "X_VEC": x_vec, **y_constants, "PRECISION": dot_precision(p),
            **_blocks(config),
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    if partial is None:
        return [main]
    block_m, block_n = 16, 64
    reduce = Launch(
        _conv2d_reduce_kernel,
        cost.cdiv(p.pixels, block_m) * cost.cdiv(p.K * groups, block_n),
        {"partial_ptr": partial, **operands, "M": p.pixels, "P": p.P, "Q": p.Q, "splits": split, **y_strides},
        {"K": p.K * groups, **y_constants, "BLOCK_M": block_m, "BLOCK_N": block_n},
        num_warps=4,
        num_stages=1,
    )
    return [main, reduce]


def plan_input_grad(
    p: Conv2dProblem, config: Config, g: torch.Tensor, w: torch.Tensor, dx: torch.Tensor,
    w_strides: tuple[int, int, int],
) -> list[Launch]:  # fmt: skip
    """g channels last; w_strides are those of (output channel, tap, input channel) in w's storage."""
    geometry = p.geometry
    g_vec, _, (gn, _, gp, gq) = layout_strides(g, p.K)
    x_vec, x_unit, (xn, xc, xh, xw) = layout_strides(dx)
    rows, cols = cost.cdiv(p.H, geometry.stride_h), cost.cdiv(p.W, geometry.stride_w)
    tiles = cost.cdiv(p.N * rows * cols, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_N)
    return [
        Launch(
            _conv2d_input_grad_kernel,
            tiles * geometry.groups * geometry.stride_h * geometry.stride_w,
            {
                "g_ptr": g, "w_ptr": w, "dx_ptr": dx,
                "N": p.N, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q,
                "stride_gn": gn, "stride_gp": gp, "stride_gq": gq,
                "stride_xn": xn, "stride_xc": xc, "stride_xh": xh, "stride_xw": xw,
            },
            {
                "C": p.C, "K": p.K, "R": p.R, "S": p.S, "GROUPS": geometry.groups, **geometry.constants(),
                "STEP_H": geometry.stride_h // math.gcd(geometry.stride_h, geometry.dil_h),
                "STEP_W": geometry.stride_w // math.gcd(geometry.stride_w, geometry.dil_w),
                "STRIDE_WK": w_strides[0], "STRIDE_WT": w_strides[1], "STRIDE_WC": w_strides[2],
                "G_VEC": g_vec, "X_VEC": x_vec, "X_UNIT_C": x_unit, "PRECISION": dot_precision(p), **_blocks(config),
            },
            config.num_warps,
            config.num_stages,
        )
    ]  # fmt: skip


def plan_weight_grad(
    p: Conv2dProblem, config: Config, x: torch.Tensor, g: torch.Tensor, dw: torch.Tensor
) -> list[Launch]:
    """x and g channels last; dw [K, C, R, S] contiguous or channels last (``p.channels_last``)."""
    groups = p.geometry.groups
    x_vec, _, (xn, _, xh, xw) = layout_strides(x, p.C)
    g_vec, _, (gn, _, gp, gq) = layout_strides(g, p.K)
    taps, split = p.R * p.S, config.SPLIT_K
    tiles = cost.cdiv(p.K, config.BLOCK_M) * cost.cdiv(taps * p.C, config.BLOCK_N)
    out = dw
    if split > 1:
        out = torch.empty((split, dw.numel()), dtype=torch.float32, device=x.device)
    main = Launch(
        _conv2d_weight_grad_kernel,
        tiles * groups * split,
        {
            "x_ptr": x, "g_ptr": g, "dw_ptr": out,
            "M": p.pixels, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "splits": split,
            "stride_xn": xn, "stride_xh": xh, "stride_xw": xw,
            "stride_gn": gn, "stride_gp": gp, "stride_gq": gq,
        },
        {
            "C": p.C, "K": p.K, "R": p.R, "S": p.S, "GROUPS": groups, **p.geometry.constants(),
            "STRIDE_WT": p.C if p.channels_last else 1, "STRIDE_WC": 1 if p.channels_last else taps,
            "X_VEC": x_vec, "G_VEC": g_vec,
            "PRECISION": dot_precision(p), **_blocks(config),
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if split == 1 else [main, sum_splits(out, dw)]


def sum_splits(partial: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that adds partial [splits, out.numel()] into out, in order."""
    block = 1024
    return Launch(
        _sum_splits_kernel,
        cost.cdiv(out.numel(), block),
        {"partial_ptr": partial, "out_ptr": out, "L": out.numel(), "splits": partial.shape[0]},
        {"BLOCK": block},
        num_warps=4,
        num_stages=1,
    )


class EpilogueProblem(NamedTuple):
    """Gradient of the epilogue over M pixels and K channels; what is read and written decides the traffic."""

    M: int
    K: int
    dtype: torch.dtype
    has_saved: bool
    writes_g: bool
    has_bias: bool

    def minimal_bytes(self) -> float:
        return float(self.M * self.K * self.dtype.itemsize * (1 + self.has_saved + self.writes_g))


def plan_epilogue_grad(
    p: EpilogueProblem, config: Config, dy: torch.Tensor, saved: torch.Tensor | None, g: torch.Tensor | None,
    bias_grad: torch.Tensor | None, activation: str,
) -> list[Launch]:  # fmt: skip
    y_vec, y_unit, (yn, yk, yp, yq) = layout_strides(dy)
    z_vec, z_unit, (zn, zk, zp, zq) = layout_strides(dy if saved is None else saved)
    split = max(1, min(config.SPLIT_M, cost.cdiv(p.M, config.BLOCK_M)))
    partial = None
    if bias_grad is not None:
        partial = torch.empty((split, p.K), dtype=torch.float32, device=dy.device)
    main = Launch(
        _conv2d_epilogue_grad_kernel,
        split * cost.cdiv(p.K, config.BLOCK_N),
        {
            "dy_ptr": dy, "saved_ptr": saved, "g_ptr": g, "partial_ptr": partial,
            "M": p.M, "P": dy.shape[2], "Q": dy.shape[3], "splits": split,
            "stride_yn": yn, "stride_yk": yk, "stride_yp": yp, "stride_yq": yq,
            "stride_zn": zn, "stride_zk": zk, "stride_zp": zp, "stride_zq": zq,
        },
        {
            "K": p.K, "Y_UNIT_C": y_unit, "Z_UNIT_C": z_unit,
            "G_CHANNELS_LAST": g is None or layout_strides(g)[1],
            "Y_VEC": y_vec, "Z_VEC": z_vec,
            "ACTIVATION": activation,
            "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N,
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if bias_grad is None or partial is None else [main, sum_splits(partial, bias_grad)]


def dot_precision(p: Conv2dProblem) -> str:
    return "ieee" if p.precision == "16" else p.precision


def _blocks(config: Config) -> dict[str, int]:
    """A config's constexpr arguments: how often a reduction is split is a run-time argument, so it never recompiles."""
    return {name: value for name, value in config.constants().items() if not name.startswith("SPLIT_")}


# --- configs: which tile for which shape -----------------------------------------------------------------------------


def _gemm_config(m: int, n: int, k: int, warps: int, stages: int, **more: int) -> Config:
    return Config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **more, num_warps=warps, num_stages=stages)


_TILES = (
    # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: large tiles for wide layers, small ones to fill the device
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (256, 64, 64, 8, 3),
    (128, 32, 64, 4, 3),
    (128, 64, 32, 4, 4),
    (128, 32, 32, 4, 4),
    (64, 32, 32, 4, 4),
    (128, 16, 32, 4, 3),
    (64, 16, 32, 4, 3),
    (128, 128, 32, 8, 2),
    (64, 64, 32, 4, 2),
    (32, 32, 32, 4, 2),
    (64, 64, 16, 4, 2),
    (128, 16, 16, 4, 3),
    (32, 16, 16, 4, 2),  # serves every shape
)
FORWARD_CONFIGS = tuple(
    _gemm_config(*tile, GROUP_M=8, SPLIT_K=split)
    for split in (1, 2, 4, 8)
    for tile in _TILES
    if split == 1 or tile[:2] in ((128, 128), (64, 64), (64, 32))
)
INPUT_GRAD_CONFIGS = tuple(_gemm_config(*tile, GROUP_M=8) for tile in _TILES)
WEIGHT_GRAD_CONFIGS = tuple(
    _gemm_config(*tile, SPLIT_K=split) for tile in _TILES if tile[0] <= 128 for split in (1, 4, 16, 64)
)
EPILOGUE_CONFIGS = tuple(
    Config(BLOCK_M=m, BLOCK_N=n, SPLIT_M=split, num_warps=4, num_stages=2)
    for m, n in ((32, 64), (64, 32), (16, 128), (128, 16), (64, 64))
    for split in (64, 256, 1024)
)


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _fits(p: Conv2dProblem, config: Config, device: DeviceSpec, rows: int, columns: int, reduction: int) -> bool:
    """Is the tile no larger than the problem and than the machine?"""
    stages = config.num_stages - 1 if device.is_amd else config.num_stages
    smem = cost.gemm_smem_bytes(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, p.itemsize, max(1, stages))
    tile = config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    if tile > {"ieee": 64 * 32 * 32, "tf32x3": 64 * 64 * 32}.get(p.precision, tile):
        return False  # the fp32 pipes hold whole operand rows in registers: larger tiles spill
    return (
        smem <= device.smem_kb * 1024
        and max(32, _next_power_of_2(rows)) >= config.BLOCK_M
        and max(16, _next_power_of_2(columns)) >= config.BLOCK_N
        and max(16, _next_power_of_2(reduction)) >= config.BLOCK_K
    )


def _stores(p: Conv2dProblem, config: Config, device: DeviceSpec) -> bool:
    """Into NCHW every element has an address of its own, two registers each: larger tiles spill."""
    return p.channels_last or config.BLOCK_M * config.BLOCK_N <= 32 * device.warp_size * config.num_warps


def _forward_accepts(p: Conv2dProblem, config: Config, device: DeviceSpec) -> bool:
    reduction = p.R * p.S * p.C
    enough = config.SPLIT_K == 1 or cost.cdiv(reduction, config.BLOCK_K) >= 4 * config.SPLIT_K
    return enough and _stores(p, config, device) and _fits(p, config, device, p.pixels, p.K, reduction)


def _forward_estimate(p: Conv2dProblem, config: Config, device: DeviceSpec) -> Estimate:
    groups, split = p.geometry.groups, config.SPLIT_K
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(p.pixels, config.BLOCK_M) * cost.cdiv(p.K, config.BLOCK_N) * groups,
        steps=cost.cdiv(p.R * p.S * p.C, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.pixels * p.K * groups if split > 1 else 0.0,
    )


def _input_grad_accepts(p: Conv2dProblem, config: Config, device: DeviceSpec) -> bool:
    parities = p.geometry.stride_h * p.geometry.stride_w
    rows = cost.cdiv(p.N * p.H * p.W, parities)
    return _stores(p, config, device) and _fits(p, config, device, rows, p.C, p.K)


def _input_grad_estimate(p: Conv2dProblem, config: Config, device: DeviceSpec) -> Estimate:
    parities = p.geometry.stride_h * p.geometry.stride_w
    rows = p.N * cost.cdiv(p.H, p.geometry.stride_h) * cost.cdiv(p.W, p.geometry.stride_w)
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(rows, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_N) * p.geometry.groups * parities,
        steps=cost.cdiv(p.R * p.S, parities) * cost.cdiv(p.K, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
    )


def _weight_grad_accepts(p: Conv2dProblem, config: Config, device: DeviceSpec) -> bool:
    enough = config.SPLIT_K == 1 or cost.cdiv(p.pixels, config.BLOCK_K) >= 2 * config.SPLIT_K
    return enough and _fits(p, config, device, p.K, p.R * p.S * p.C, p.pixels)


def _weight_grad_estimate(p: Conv2dProblem, config: Config, device: DeviceSpec) -> Estimate:
    groups, split, columns = p.geometry.groups, config.SPLIT_K, p.R * p.S * p.C
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(p.K, config.BLOCK_M) * cost.cdiv(columns, config.BLOCK_N) * groups,
        steps=cost.cdiv(p.pixels, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.K * columns * groups if split > 1 else 0.0,
    )


def _epilogue_accepts(p: EpilogueProblem, config: Config, device: DeviceSpec) -> bool:
    return max(16, _next_power_of_2(p.K)) >= config.BLOCK_N


def _epilogue_estimate(p: EpilogueProblem, config: Config, device: DeviceSpec) -> Estimate:
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.M, config.BLOCK_M)))
    columns = cost.cdiv(p.K, config.BLOCK_N)
    return cost.stream(
        device,
        programs=splits * columns,
        issued_bytes=p.minimal_bytes() + 8.0 * splits * p.K,
        dram_bytes=p.minimal_bytes(),
        config=config,
        tile_bytes=config.BLOCK_M * config.BLOCK_N * p.dtype.itemsize,
        waste=columns * config.BLOCK_N / max(1, p.K),
    )


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))


def _features(p: Conv2dProblem) -> dict[str, int | str]:
    """Sizes by which stored measurements are compared, and what must match exactly."""
    g = p.geometry
    return {
        "pixels": p.pixels, "C": p.C, "K": p.K, "taps": p.R * p.S, "groups": g.groups,
        "stride": f"{g.stride_h}x{g.stride_w}", "dtype": dtype_name(p.dtype), "precision": p.precision,
        "layout": "nhwc" if p.channels_last else "nchw",
    }  # fmt: skip


def _epilogue_features(p: EpilogueProblem) -> dict[str, int | str]:
    return {
        "M": p.M, "K": p.K, "dtype": dtype_name(p.dtype),
        "passes": f"{int(p.has_saved)}{int(p.writes_g)}{int(p.has_bias)}",
    }  # fmt: skip


def _meta(p: Conv2dProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, packed w and y of a problem on the meta device."""
    groups = p.geometry.groups
    like = torch.empty(0, dtype=p.dtype, device="meta")
    x = empty_output(like, (p.N, p.C * groups, p.H, p.W), True)
    w = like.new_empty(p.K * groups, p.R, p.S, p.C)
    return x, w, empty_output(like, (p.N, p.K * groups, p.P, p.Q), p.channels_last)


def _forward_launches(p: Conv2dProblem, config: Config) -> list[Launch]:
    x, w, y = _meta(p)
    return plan_forward(p, config, x, w, y, bias=w.new_empty(p.K * p.geometry.groups), activation="relu")


def _input_grad_launches(p: Conv2dProblem, config: Config) -> list[Launch]:
    x, w, y = _meta(p)
    g = empty_output(y, tuple(y.shape), True)
    dx = empty_output(x, tuple(x.shape), p.channels_last)
    return plan_input_grad(p, config, g, w, dx, _weight_strides(p))


def _weight_grad_launches(p: Conv2dProblem, config: Config) -> list[Launch]:
    x, w, y = _meta(p)
    return plan_weight_grad(p, config, x, empty_output(y, tuple(y.shape), True), w)


def _epilogue_launches(p: EpilogueProblem, config: Config) -> list[Launch]:
    y = empty_output(torch.empty(0, dtype=p.dtype, device="meta"), (1, p.K, p.M, 1), True)
    saved = torch.empty_like(y) if p.has_saved else None
    g = torch.empty_like(y) if p.writes_g else None
    bias_grad = y.new_empty(p.K) if p.has_bias else None
    return plan_epilogue_grad(p, config, y, saved, g, bias_grad, "relu" if p.has_saved else "none")


FORWARD = register(
    Tunable("conv2d", FORWARD_CONFIGS, _features, _forward_accepts, _forward_estimate, _forward_launches)
)
INPUT_GRAD = register(
    Tunable(
        "conv2d_input_grad", INPUT_GRAD_CONFIGS, _features, _input_grad_accepts, _input_grad_estimate,
        _input_grad_launches,
    )
)  # fmt: skip
WEIGHT_GRAD = register(
    Tunable(
        "conv2d_weight_grad", WEIGHT_GRAD_CONFIGS, _features, _weight_grad_accepts, _weight_grad_estimate,
        _weight_grad_launches,
    )
)  # fmt: skip
EPILOGUE_GRAD = register(
    Tunable(
        "conv2d_epilogue_grad", EPILOGUE_CONFIGS, _epilogue_features, _epilogue_accepts, _epilogue_estimate,
        _epilogue_launches,
    )
)  # fmt: skip


# --- calls: allocate, look up the config, launch ---------------------------------------------------------------------


def _weight_strides(p: Conv2dProblem) -> tuple[int, int, int]:
    """Strides (output channel, tap, input channel) of packed weights [K * GROUPS, R, S, C]."""
    return p.R * p.S * p.C, p.C, 1


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
    if geometry.groups == 1:
        x, weight = pad_channels(x), pad_channels(weight)
    x = channels_last(x)
    problem = problem_of(tuple(x.shape), tuple(weight.shape), pq, geometry, x.dtype, precision, is_channels_last)
    launch(
        FORWARD, plan_forward, problem, x, pack_weight(weight), y, z=z, bias=contiguous(bias), scale=contiguous(scale),
        residual=residual, activation=activation,
    )  # fmt: skip
    return y, z


def run_input_grad(
    g: torch.Tensor, weight: torch.Tensor, hw: tuple[int, int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    dx = empty_output(g, (g.shape[0], weight.shape[1] * geometry.groups, *hw), is_channels_last)
    pq = (g.shape[2], g.shape[3])
    problem = problem_of(tuple(dx.shape), tuple(weight.shape), pq, geometry, g.dtype, precision, is_channels_last)
    launch(
        INPUT_GRAD, plan_input_grad, problem, channels_last(g), pack_weight(weight), dx, _weight_strides(problem)
    )  # fmt: skip
    return dx


def run_weight_grad(
    x: torch.Tensor, g: torch.Tensor, weight_shape: tuple[int, int, int, int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    k, c, r, s = weight_shape
    if geometry.groups == 1:
        x = pad_channels(x)
    x = channels_last(x)
    shape = (k, x.shape[1] // geometry.groups, r, s)
    dw = empty_output(x, shape, is_channels_last)
    pq = (g.shape[2], g.shape[3])
    problem = problem_of(tuple(x.shape), shape, pq, geometry, x.dtype, precision, is_channels_last)
    launch(WEIGHT_GRAD, plan_weight_grad, problem, x, channels_last(g), dw)
    return dw if shape[1] == c else empty_output(x, weight_shape, is_channels_last).copy_(dw[:, :c])


def run_epilogue_grad(
    dy: torch.Tensor, saved: torch.Tensor | None, activation: str, *, need_bias: bool, is_channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient at the activation's input, laid out as asked, and the bias gradient if needed."""
    n, k, height, width = dy.shape
    g = empty_output(dy, tuple(dy.shape), is_channels_last)
    bias_grad = dy.new_empty(k) if need_bias else None
    problem = EpilogueProblem(n * height * width, k, dy.dtype, saved is not None, True, need_bias)
    launch(EPILOGUE_GRAD, plan_epilogue_grad, problem, dy, saved, g, bias_grad, activation)
    return g, bias_grad


def run_bias_grad(g: torch.Tensor) -> torch.Tensor:
    n, k, height, width = g.shape
    bias_grad = g.new_empty(k)
    problem = EpilogueProblem(n * height * width, k, g.dtype, has_saved=False, writes_g=False, has_bias=True)
    launch(EPILOGUE_GRAD, plan_epilogue_grad, problem, g, None, None, bias_grad, "none")
    return bias_grad


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()
