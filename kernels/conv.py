r"""Convolution of 1, 2 and 3 dimensions as implicit matrix products: forward, transpose, weight gradient.

    y[n,k,z,p,q] = act(scale[k] * sum_{c,t,r,s} x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H,
                                                  q*STRIDE_W - PAD_W + s*DIL_W] * w[k,c,t,r,s]
                       + bias[k] + residual[n,k,z,p,q])

Letters are the literature's: N images, C input and K output channels *of one group*, D x H x W input, T x R x S window,
Z x P x Q output. Dimensions that a lower rank lacks have size 1. All sums are in fp32; results are rounded once.

The transpose maps y's side to x's: it is the gradient of the input, and with the epilogue on top the transposed
convolution. The gradients of either are the three passes again.

Each pass is one tiled matrix product whose left operand is gathered from the tensor, never materialised:

    pass             rows                    columns        reduction       left operand      right operand
    forward          N*Z*P*Q output pixels   K              T*R*S*C         x, per window tap w
    transpose        N*D*H*W input pixels    C              taps*K          g, per window tap w, transposed
    weight gradient  K                       T*R*S*C        N*Z*P*Q pixels  g, transposed     x, per window tap

Tensors lie channels last here (the launchers re-lay what does not), weights as [K*GROUPS, T, R, S, C].

Bytes. What must come from memory once is |x| + |w| + |y|. What the load and store instructions move, with T_m, T_n
tiles of rows and columns, TAPS = T*R*S and e bytes an element, is

    forward          T_n * N*Z*P*Q*TAPS*C*e + T_m * K*TAPS*C*e + N*Z*P*Q*K*e    (per group; taps outside load nothing)
    transpose        T_n * N*Z*P*Q*TAPS*K*e + T_m * K*TAPS*C*e + N*D*H*W*C*e    (T_m, per parity class with its taps)
    weight gradient  T_m * N*Z*P*Q*TAPS*C*e + T_n * N*Z*P*Q*K*e + TAPS*C*K*e    (C and K of MERGED groups together)
    by lines         as forward and transpose, from packed tensors, for windows that move by one pixel
    split s > 1      + 8 * s * (size of the output) for the fp32 partial sums, written and read once

Strides of a channels-last tensor come in units of its VEC elements (the widest load that all of them allow), and the
kernel multiplies by the constant VEC: so the compiler sees that every row starts on a multiple of VEC and keeps 16-byte
loads although strides are run-time values. A hint (``tl.multiple_of``) does the same until some folding drops it.
Results are dense, addressed by the flat index of a pixel, in NCHW by runs of RUN pixels, and stored as wide.

Everything is deterministic: a split reduction writes partial sums that a second kernel adds in order. No atomics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ..autotune.schema import dtype_name
from ._launch import Launch, descriptor, launch, layout_strides, readable, unit_divisor
from ._math import (
    activate,
    activation_backward,
    below,
    column_sum,
    dense_offsets,
    dot,
    grouped_tile,
    narrow,
    pixel_offsets,
    position,
)

SIZES = ["M", "N", "D", "H", "W", "Z", "P", "Q", "splits"]
X_STRIDES = ["stride_xn", "stride_xc", "stride_xd", "stride_xh", "stride_xw"]
Y_STRIDES = ["stride_yn", "stride_yk", "stride_yz", "stride_yp", "stride_yq"]
S_STRIDES = ["stride_sn", "stride_sk", "stride_sz", "stride_sp", "stride_sq"]
G_STRIDES = ["stride_gn", "stride_gz", "stride_gp", "stride_gq"]


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def tap_shift(
    tap, R: tl.constexpr, S: tl.constexpr, DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """How far window tap ``tap`` lies from the window's corner, in depth, rows and columns."""
    if RANK == 3:
        return tap // (R * S) * DIL_D, tap // S % R * DIL_H, tap % S * DIL_W
    else:
        return tap * 0, tap // S * DIL_H, tap % S * DIL_W


@triton.jit
def inside(mask, d, h, w, D, H, W, PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr):
    """``mask`` where (d, h, w) lies in the image. Only padding lets a window look outside."""
    if PAD_D > 0:
        mask &= (d >= 0) & (d < D)
    if PAD_H > 0:
        mask &= (h >= 0) & (h < H)
    if PAD_W > 0:
        mask &= (w >= 0) & (w < W)
    return mask


@triton.jit
def epilogue(
    acc, k, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr, mask_k, ACTIVATION: tl.constexpr
):  # fmt: skip
    """``act(scale * acc + bias + residual)`` in fp32, stored at ``offsets``; keeps the activation's input in z."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + offsets, narrow(acc, z_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offsets, narrow(activate(acc, ACTIVATION), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES])
def _conv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr, partial_ptr,
    M, D, H, W, Z, P, Q, splits,
    stride_xn: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    C: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr,
    X_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """With SWAP the filters are the rows of the product and the pixels its columns: one instruction of the tensor cores
    multiplies 64 rows, so 64 filters by 256 pixels reads less shared memory than 256 pixels by 64 filters."""
    # A reduction tile lies in one tap when BLOCK_K divides C; otherwise every element finds its own tap.
    ONE_TAP: tl.constexpr = C % BLOCK_K == 0
    STEPS: tl.constexpr = (TAPS * C + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N

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
    n, z, p, q = position(offs_m, Z, P, Q, RANK)
    d0 = z * STRIDE_D - PAD_D
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    row = n.to(tl.int64) * stride_xn + d0.to(tl.int64) * stride_xd
    row += h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
    row = (row + group * (C // X_VEC)) * X_VEC
    w_row = (group * K + offs_n) * (TAPS * C)

    per_split = tl.cdiv(STEPS, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, STEPS)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K + offs_k
        if ONE_TAP:
            t, r, s = tap_shift(step // (C // BLOCK_K), R, S, DIL_D, DIL_H, DIL_W, RANK)
            mask_x = inside(mask_m, d0 + t, h0 + r, w0 + s, D, H, W, PAD_D, PAD_H, PAD_W)
            x_row = row + (t * stride_xd + r * stride_xh + s * stride_xw) * X_VEC
            x_off = x_row[:, None] + (step % (C // BLOCK_K) * BLOCK_K + offs_k)[None, :]
            x = tl.load(x_ptr + x_off, mask=mask_x[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            t, r, s = tap_shift(k // C, R, S, DIL_D, DIL_H, DIL_W, RANK)
            mask_k = k < TAPS * C
            d, h, col = d0[:, None] + t[None, :], h0[:, None] + r[None, :], w0[:, None] + s[None, :]
            mask_x = inside(mask_m[:, None] & mask_k[None, :], d, h, col, D, H, W, PAD_D, PAD_H, PAD_W)
            tap_off = (t * stride_xd + r * stride_xh + s * stride_xw) * X_VEC + k % C
            x = tl.load(x_ptr + row[:, None] + tap_off[None, :], mask=mask_x, other=0.0)
            w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        if TAIL > 0:  # of a neighbour, so not even its infinities may count; masked, it would be loaded in halves
            x = tl.where((k % C < C - TAIL)[None, :], x, 0.0)
        if SWAP:
            acc = dot(tl.trans(w), tl.trans(x), acc, PRECISION)
        else:
            acc = dot(x, w, acc, PRECISION)
    if SWAP:
        acc = tl.trans(acc)

    channel = group * K + offs_n
    mask = below(offs_m, M, RUN)[:, None] & mask_n[None, :]
    if partial_ptr is not None:
        row_off = (split.to(tl.int64) * M + offs_m) * (K * GROUPS)
        tl.store(partial_ptr + row_off[:, None] + channel[None, :], acc, mask=mask)
    else:
        offsets = dense_offsets(offs_m, channel, Z * P * Q, K * GROUPS, CHANNELS_LAST, RUN)
        epilogue(acc, channel, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr, mask_n, ACTIVATION)


@triton.jit(do_not_specialize=["L", "lines", "Z", "P", "Q"])
def _conv_lines_kernel(
    x_desc, w_desc, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr,
    L, lines, Z, P, Q,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr, TURNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Forward, or transpose (TURNED, with C and K exchanged), where windows move by one pixel: for each tap BLOCK_M
    neighbours in a line of the result read a box of x [N, D, H, W, GROUPS*C], which a tensor memory accelerator copies;
    what lies outside the image arrives as zeros. No thread computes an address, and a tile takes 30 registers fewer.

    Lines are the rows of the result, of L pixels. A window of one tap without padding makes one line of all pixels.
    """
    CHUNKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    WAY: tl.constexpr = -1 if TURNED else 1

    pid = tl.program_id(0)
    tiles_l = tl.cdiv(L, BLOCK_M)
    tiles = lines * tiles_l * TILES_N
    group = pid // tiles
    pid_m, pid_n = grouped_tile(pid % tiles, lines * tiles_l, TILES_N, GROUP_M)
    line = pid_m // tiles_l
    first = pid_m % tiles_l * BLOCK_M
    n = line // P // Z
    d0 = line // P % Z - WAY * PAD_D
    h0 = line % P - WAY * PAD_H
    w0 = first - WAY * PAD_W
    column = pid_n * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(TAPS * CHUNKS):
        tap = step // CHUNKS
        k = step % CHUNKS * BLOCK_K
        t, r, s = tap_shift(tap, R, S, DIL_D, DIL_H, DIL_W, RANK)
        box = x_desc.load([n, d0 + WAY * t, h0 + WAY * r, w0 + WAY * s, group * C + k])
        x = tl.reshape(box, (BLOCK_M, BLOCK_K))
        if TURNED:
            w = tl.reshape(w_desc.load([group * C + k, tap, column]), (BLOCK_K, BLOCK_N))
        else:
            w = tl.trans(tl.reshape(w_desc.load([group * K + column, tap, k]), (BLOCK_N, BLOCK_K)))
        acc = dot(x, w, acc, "ieee")

    offs_l = first + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    channel = group * K + offs_n
    pixel = line * (L // RUN) * RUN + offs_l
    offsets = dense_offsets(pixel, channel, Z * P * Q, K * GROUPS, CHANNELS_LAST, RUN)
    mask = below(offs_l, L, RUN)[:, None] & mask_n[None, :]
    epilogue(acc, channel, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr, mask_n, ACTIVATION)


@triton.jit(do_not_specialize=["M", "image", "splits"])
def _reduce_kernel(
    partial_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr,
    M, image, splits,
    K: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums [splits, M, K] in order and runs the epilogue; K counts all groups."""
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    offs_m = tl.program_id(0) // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    mask = below(offs_m, M, RUN)[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(0, splits):
        row_off = (offs_m + tl.cast(split, tl.int64) * M) * K
        acc += tl.load(partial_ptr + row_off[:, None] + offs_n[None, :], mask=mask, other=0.0)
    offsets = dense_offsets(offs_m, offs_n, image, K, CHANNELS_LAST, RUN)
    epilogue(acc, offs_n, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr, mask_n, ACTIVATION)


# --- transpose: the input gradient, and the transposed convolution ---------------------------------------------------


@triton.jit
def _first_tap(position, STRIDE: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr):
    """The smallest tap whose offset meets ``position`` modulo STRIDE; TAPS if none does. Taps repeat every STEP."""
    first = TAPS
    for tap in tl.static_range(STEP):
        hits = (position + (STRIDE - (STEP - 1 - tap) * DIL % STRIDE)) % STRIDE == 0
        first = tl.where(hits, STEP - 1 - tap, first)
    return tl.minimum(first, TAPS)


@triton.jit(do_not_specialize=[*SIZES, *G_STRIDES])
def _conv_transpose_kernel(
    g_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr, partial_ptr,
    N, D, H, W, Z, P, Q, splits,
    stride_gn: tl.int64, stride_gz: tl.int64, stride_gp: tl.int64, stride_gq: tl.int64,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr,
    # Taps of one parity class lie STEP apart: STRIDE / gcd(STRIDE, DIL).
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    STRIDE_WK: tl.constexpr, STRIDE_WT: tl.constexpr, STRIDE_WC: tl.constexpr,  # of one group's weights
    G_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A strided window touches an input pixel only with taps of its parity, so each of the STRIDE_D * STRIDE_H *
    STRIDE_W classes of pixels is a product of its own with just those taps: no zeros are inserted and none multiplied.
    """
    TILES_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PARITIES: tl.constexpr = STRIDE_D * STRIDE_H * STRIDE_W

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(N * tl.cdiv(D, STRIDE_D) * tl.cdiv(H, STRIDE_H) * tl.cdiv(W, STRIDE_W), BLOCK_M)
    tiles = tiles_m * TILES_N
    group = pid // tiles % GROUPS
    parity = pid // tiles // GROUPS % PARITIES
    split = pid // tiles // GROUPS // PARITIES
    pid_m, pid_n = grouped_tile(pid % tiles, tiles_m, TILES_N, GROUP_M)
    parity_d = parity // (STRIDE_H * STRIDE_W)
    parity_h = parity // STRIDE_W % STRIDE_H
    parity_w = parity % STRIDE_W
    planes = (D - parity_d + STRIDE_D - 1) // STRIDE_D
    rows = (H - parity_h + STRIDE_H - 1) // STRIDE_H
    cols = (W - parity_w + STRIDE_W - 1) // STRIDE_W

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < N * planes * rows * cols
    mask_n = offs_n < C
    n, l, i, j = position(offs_m, tl.maximum(planes, 1), tl.maximum(rows, 1), tl.maximum(cols, 1), RANK)
    d = l * STRIDE_D + parity_d
    h = i * STRIDE_H + parity_h
    w_col = j * STRIDE_W + parity_w

    t0 = _first_tap(parity_d + PAD_D, STRIDE_D, DIL_D, STEP_D, T)
    r0 = _first_tap(parity_h + PAD_H, STRIDE_H, DIL_H, STEP_H, R)
    s0 = _first_tap(parity_w + PAD_W, STRIDE_W, DIL_W, STEP_W, S)
    taps_d = (T - t0 + STEP_D - 1) // STEP_D
    taps_h = (R - r0 + STEP_H - 1) // STEP_H
    taps_w = (S - s0 + STEP_W - 1) // STEP_W
    # The output that the first tap reads; the next tap of the class reads DIL * STEP / STRIDE before it.
    z0 = (d + PAD_D - t0 * DIL_D) // STRIDE_D
    p0 = (h + PAD_H - r0 * DIL_H) // STRIDE_H
    q0 = (w_col + PAD_W - s0 * DIL_W) // STRIDE_W
    BACK_Z: tl.constexpr = DIL_D * STEP_D // STRIDE_D
    BACK_P: tl.constexpr = DIL_H * STEP_H // STRIDE_H
    BACK_Q: tl.constexpr = DIL_W * STEP_W // STRIDE_W
    row = n.to(tl.int64) * stride_gn + z0.to(tl.int64) * stride_gz
    row += p0.to(tl.int64) * stride_gp + q0.to(tl.int64) * stride_gq
    row = (row + group * (K // G_VEC)) * G_VEC

    steps = taps_d * taps_h * taps_w * CHUNKS
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        tap_h = step // CHUNKS // taps_w
        tap_d = tap_h * 0
        if RANK == 3:
            tap_d = tap_h // taps_h
            tap_h = tap_h % taps_h
        tap_w = step // CHUNKS % taps_w
        k = step % CHUNKS * BLOCK_K + offs_k
        mask_k = k < K
        p = p0 - tap_h * BACK_P
        q = q0 - tap_w * BACK_Q
        mask_g = mask_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        if RANK == 3:
            z = z0 - tap_d * BACK_Z
            mask_g &= (z >= 0) & (z < Z)
        back = tap_d * BACK_Z * stride_gz + tap_h * BACK_P * stride_gp + tap_w * BACK_Q * stride_gq
        g_off = row - back * G_VEC
        tap = ((t0 + tap_d * STEP_D) * R + r0 + tap_h * STEP_H) * S + s0 + tap_w * STEP_W
        w_off = (group * K * T * R * S * C + k * STRIDE_WK)[:, None] + (tap * STRIDE_WT + offs_n * STRIDE_WC)[None, :]
        if K % BLOCK_K == 0:
            g = tl.load(g_ptr + g_off[:, None] + k[None, :], mask=mask_g[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptr + w_off, mask=mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            g = tl.load(g_ptr + g_off[:, None] + k[None, :], mask=mask_g[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptr + w_off, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = dot(g, w, acc, PRECISION)

    channel = group * C + offs_n
    pixel = offs_m if PARITIES == 1 else ((n * D + d) * H + h) * W + w_col
    mask = below(offs_m, N * planes * rows * cols, RUN)[:, None] & mask_n[None, :]
    if partial_ptr is not None:
        row_off = (split.to(tl.int64) * N * D * H * W + pixel) * (C * GROUPS)
        tl.store(partial_ptr + row_off[:, None] + channel[None, :], acc, mask=mask)
    else:
        offsets = dense_offsets(pixel, channel, D * H * W, C * GROUPS, CHANNELS_LAST, RUN)
        epilogue(acc, channel, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, z_ptr, mask_n, ACTIVATION)


# --- weight gradient -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *G_STRIDES])
def _conv_weight_grad_kernel(
    x_ptr, g_ptr, dw_ptr,
    M, D, H, W, Z, P, Q, splits,
    stride_xn: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_gn: tl.int64, stride_gz: tl.int64, stride_gp: tl.int64, stride_gq: tl.int64,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr,
    MERGED: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr,
    STRIDE_WT: tl.constexpr, STRIDE_WC: tl.constexpr,  # of dw: tap, channel; a row has TAPS * C / MERGED elements
    X_VEC: tl.constexpr, G_VEC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw [K * GROUPS, TAPS*C], or with splits > 1 the fp32 partial sums [splits, K * GROUPS, TAPS*C].

    MERGED narrow groups make one product, so C, K and GROUPS count merged ones. Each element of the product is a sum of
    its own, so those between different groups are just not stored.
    """
    ONE_TAP: tl.constexpr = C % BLOCK_N == 0
    TILES_M: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (TAPS * C + BLOCK_N - 1) // BLOCK_N

    # Programs that read the same pixels run side by side: tiles of one split are neighbours.
    pid = tl.program_id(0)
    pid_n = pid % TILES_N
    pid_m = pid // TILES_N % TILES_M
    group = pid // (TILES_N * TILES_M) % GROUPS
    split = pid // (TILES_N * TILES_M * GROUPS)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < K
    mask_n = offs_n < TAPS * C
    if ONE_TAP:
        tap = pid_n // (C // BLOCK_N)
        c = pid_n % (C // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        tap = offs_n // C
        c = offs_n % C
    t, r, s = tap_shift(tap, R, S, DIL_D, DIL_H, DIL_W, RANK)
    c_off = group * (C // X_VEC) * X_VEC + c

    steps = tl.cdiv(M, BLOCK_K)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        offs_p = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_p = offs_p < M
        n, z, p, q = position(offs_p, Z, P, Q, RANK)
        g_row = n.to(tl.int64) * stride_gn + z.to(tl.int64) * stride_gz
        g_row += p.to(tl.int64) * stride_gp + q.to(tl.int64) * stride_gq
        g_off = ((g_row + group * (K // G_VEC)) * G_VEC)[:, None] + offs_m[None, :]
        g = tl.load(g_ptr + g_off, mask=mask_p[:, None] & mask_m[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        d0 = z * STRIDE_D - PAD_D
        h0 = p * STRIDE_H - PAD_H
        w0 = q * STRIDE_W - PAD_W
        if ONE_TAP:
            mask_x = inside(mask_p, d0 + t, h0 + r, w0 + s, D, H, W, PAD_D, PAD_H, PAD_W)
            x_row = n.to(tl.int64) * stride_xn + (d0 + t).to(tl.int64) * stride_xd
            x_row += (h0 + r).to(tl.int64) * stride_xh + (w0 + s).to(tl.int64) * stride_xw
            x_off = (x_row * X_VEC)[:, None] + c_off[None, :]
            x = tl.load(x_ptr + x_off, mask=mask_x[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            d, h, col = d0[:, None] + t[None, :], h0[:, None] + r[None, :], w0[:, None] + s[None, :]
            mask_x = inside(mask_p[:, None] & mask_n[None, :], d, h, col, D, H, W, PAD_D, PAD_H, PAD_W)
            x_row = n.to(tl.int64) * stride_xn + d0.to(tl.int64) * stride_xd
            x_row += h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
            tap_off = (t * stride_xd + r * stride_xh + s * stride_xw) * X_VEC + c_off
            x = tl.load(x_ptr + (x_row * X_VEC)[:, None] + tap_off[None, :], mask=mask_x, other=0.0)
        acc = dot(tl.trans(g), x, acc, PRECISION)

    PER_GROUP: tl.constexpr = C // MERGED
    column = tap * STRIDE_WT + c % PER_GROUP * STRIDE_WC
    out_row = (split * GROUPS * K + group * K + offs_m).to(tl.int64) * (TAPS * PER_GROUP)
    mask = mask_m[:, None] & mask_n[None, :]
    if MERGED > 1:
        mask &= (offs_m // (K // MERGED))[:, None] == (c // PER_GROUP)[None, :]
    tl.store(dw_ptr + out_row[:, None] + column[None, :], narrow(acc, dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "splits"])
def _sum_splits_kernel(partial_ptr, out_ptr, L: tl.int64, splits, BLOCK: tl.constexpr):
    """out[l] = sum of partial[split, l] over the splits, in order, with what every addition rounds away added at the
    end (Knuth's two-sum): hundreds of splits cost no accuracy, and memory no time."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < L
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    lost = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, splits):
        term = tl.load(partial_ptr + split * L + offs, mask=mask, other=0.0)
        total = acc + term
        added = total - acc
        lost += (acc - (total - added)) + (term - added)
        acc = total
    acc = tl.where(lost == lost, acc + lost, acc)  # what an infinity loses is no number
    tl.store(out_ptr + offs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


# --- gradient of the epilogue ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *Y_STRIDES, *S_STRIDES])
def _epilogue_grad_kernel(
    dy_ptr, saved_ptr, g_ptr, partial_ptr,
    M, Z, P, Q, splits,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_sn: tl.int64, stride_sk: tl.int64, stride_sz: tl.int64, stride_sp: tl.int64, stride_sq: tl.int64,
    K: tl.constexpr, RANK: tl.constexpr, Y_UNIT_C: tl.constexpr, S_UNIT_C: tl.constexpr, G_CHANNELS_LAST: tl.constexpr,
    Y_VEC: tl.constexpr, S_VEC: tl.constexpr, G_RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g = dy * act'(saved), 0 where the activation is flat, dense in either layout; the bias gradient: its column sums.

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
        mask = below(offs_m, M, 1 if Y_UNIT_C else Y_VEC)[:, None] & mask_n[None, :]
        y_off = pixel_offsets(
            offs_m, offs_n, Z, P, Q, stride_yn, stride_yk, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C, RANK
        )  # fmt: skip
        g = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)
        if saved_ptr is not None:
            mask_s = below(offs_m, M, 1 if S_UNIT_C else S_VEC)[:, None] & mask_n[None, :]
            s_off = pixel_offsets(
                offs_m, offs_n, Z, P, Q, stride_sn, stride_sk, stride_sz, stride_sp, stride_sq, S_VEC, S_UNIT_C, RANK
            )  # fmt: skip
            saved = tl.load(saved_ptr + s_off, mask=mask_s, other=0.0).to(tl.float32)
            g = tl.where(mask, activation_backward(g, saved, ACTIVATION), 0.0)
        if g_ptr is not None:
            mask_g = below(offs_m, M, G_RUN)[:, None] & mask_n[None, :]
            g_off = dense_offsets(offs_m, offs_n, Z * P * Q, K, G_CHANNELS_LAST, G_RUN)
            tl.store(g_ptr + g_off, narrow(g, g_ptr.dtype.element_ty), mask=mask_g)
        acc += g
    if partial_ptr is not None:
        tl.store(partial_ptr + split * K + offs_n, column_sum(acc), mask=mask_n)


# --- launchers -------------------------------------------------------------------------------------------------------

Triple = tuple[int, int, int]


def triple(values: Sequence[int], missing: int = 1) -> Triple:
    """Depth, height and width, from one to three of them."""
    return (*(missing for _ in range(3 - len(values))), *values)  # type: ignore[return-value]


class Geometry(NamedTuple):
    """The window, in depth, height and width: what the kernels take as constants."""

    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        return cls(triple(stride), triple(padding, 0), triple(dilation), groups)

    @property
    def parities(self) -> int:
        """Classes of input pixels that a window's taps tell apart."""
        return math.prod(self.stride)

    def constants(self) -> dict[str, int]:
        return {
            f"{name}_{axis}": value
            for name, values in (("STRIDE", self.stride), ("PAD", self.padding), ("DIL", self.dilation))
            for axis, value in zip("DHW", values, strict=True)
        }


class ConvProblem(NamedTuple):
    """One convolution, or its transpose; C and K count one group's channels.

    Attributes:
        rank: 3, or 2 for two dimensions and one.
        image, window, output: depth, height and width; the transpose goes from ``output`` to ``image``.
        precision: "16", "ieee", "tf32" or "tf32x3".
        channels_last: is what the kernel writes laid out so?
        tail: how many of the C channels, the last, belong to no tap; see :func:`pad_problem`.
    """

    rank: int
    N: int
    C: int
    K: int
    image: Triple
    window: Triple
    output: Triple
    geometry: Geometry
    dtype: torch.dtype
    precision: str
    channels_last: bool = True
    tail: int = 0

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def pixels(self) -> int:
        return self.N * math.prod(self.output)

    @property
    def image_pixels(self) -> int:
        return self.N * math.prod(self.image)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def flops(self) -> float:
        return 2.0 * self.pixels * self.K * self.taps * self.C * self.geometry.groups

    def minimal_bytes(self) -> float:
        """|x| + |w| + |y|: what must cross the memory bus at least once."""
        elements = self.image_pixels * self.C + self.K * self.taps * self.C + self.pixels * self.K
        return float(elements * self.geometry.groups * self.itemsize)

    def sizes(self) -> dict[str, int]:
        return dict(zip("DHWZPQ", (*self.image, *self.output), strict=True))


def problem_of(
    x_shape: Sequence[int], w_shape: Sequence[int], output: Sequence[int], geometry: Geometry,
    dtype: torch.dtype, precision: str, channels_last: bool,
) -> ConvProblem:  # fmt: skip
    n, _, *image = x_shape
    k, c, *window = w_shape
    precision = precision if dtype == torch.float32 else "16"
    return ConvProblem(
        3 if len(image) == 3 else 2, n, c, k // geometry.groups, triple(image), triple(window), triple(output),
        geometry, dtype, precision, channels_last,
    )  # fmt: skip


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself if neighbouring channels are neighbours in memory, else a channels-last copy."""
    return readable(t, unit=1)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights [K, C, *window] as dense [K, *window, C]; a view where they are channels last already."""
    return readable(weight.movedim(1, -1), dense=True)


def _reduction_first(p: ConvProblem) -> bool:
    """Tensor cores take tf32 operands only with the reduction along memory, which for the transpose is K."""
    return p.precision in ("tf32", "tf32x3")


def pack_transposed_weight(p: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
    """What the transpose reads: [K, *window, C], or for tf32 [C, *window, K] of each group."""
    if not _reduction_first(p):
        return pack_weight(weight)
    return readable(weight.unflatten(0, (p.geometry.groups, p.K)).movedim(1, -1), dense=True)


def _transposed_weight_strides(p: ConvProblem) -> Triple:
    """Strides (K, tap, C) of :func:`pack_transposed_weight` within a group."""
    return (1, p.K, p.taps * p.K) if _reduction_first(p) else (p.taps * p.C, p.C, 1)


def _unfolds(p: ConvProblem) -> bool:
    """Is this the convolution of a narrow image, whose window rows are read as channels?"""
    return p.geometry.groups == 1 and p.C <= 4 and p.window[2] > 1 and p.geometry.dilation[2] == 1


def pad_problem(p: ConvProblem) -> ConvProblem:
    """What the kernels that read x solve, forward and weight gradient: without groups a narrow image is re-laid.

    Up to four channels become four, up to eight eight, so that a pixel is one aligned load. The pixels of a window's
    row, of four channels each, lie side by side in memory, so they count as the channels of one wide tap, 16 or a
    multiple of 32; its tail reaches into the pixels behind.
    """
    if p.geometry.groups > 1 or p.C >= 8:
        return p
    if not _unfolds(p):
        return p._replace(C=4 if p.C <= 4 else 8)
    used = 4 * p.window[2]
    channels = 16 if used <= 16 else -(-used // 32) * 32
    geometry = p.geometry._replace(
        stride=(*p.geometry.stride[:2], 1), padding=(*p.geometry.padding[:2], 0)
    )  # fmt: skip
    image, window = (*p.image[:2], p.output[2]), (*p.window[:2], 1)
    return p._replace(C=channels, tail=channels - used, image=image, window=window, geometry=geometry)


def pad_image(x: torch.Tensor, p: ConvProblem, padded: ConvProblem) -> torch.Tensor:
    """x as ``padded`` reads it, from that of ``p``; the tensor itself where nothing is to be done."""
    n, c, *space = x.shape
    if p == padded:
        return channels_last(x)
    if not _unfolds(p):
        out = x.new_zeros(n, *space, padded.C)
        out[..., :c].copy_(x.movedim(1, -1))
        return out.movedim(-1, 1)
    step, left, columns = p.geometry.stride[2], p.geometry.padding[2], p.output[2]
    width = (columns - 1) * step + padded.C // 4
    kept = max(0, min(space[-1], width - left))
    out = x.new_zeros(n, *space[:-1], width, 4)
    out[..., left : left + kept, :c].copy_(x.movedim(1, -1)[..., :kept, :])
    windows = out.as_strided((n, *space[:-1], columns, padded.C), (*out.stride()[:-2], 4 * step, 1))
    return windows.movedim(-1, 1)


def pad_weight(weight: torch.Tensor, p: ConvProblem, padded: ConvProblem) -> torch.Tensor:
    """The packed weights [K, *window, C] of ``padded``, zeros where ``p`` has none."""
    if p == padded:
        return pack_weight(weight)
    k, c, *window = weight.shape
    out = weight.new_zeros(
        k, *window[:-1], padded.C // 4 if _unfolds(p) else window[-1], 4 if _unfolds(p) else padded.C
    )
    out[..., : window[-1], :c].copy_(weight.movedim(1, -1))
    return out


def unpad_weight_grad(dw: torch.Tensor, p: ConvProblem, shape: Sequence[int]) -> torch.Tensor:
    """The part of a weight gradient of :func:`pad_problem`'s that is the convolution's own, a view of ``shape``."""
    dw = dw.movedim(1, -1)
    if _unfolds(p):
        dw = dw.squeeze(-2).unflatten(-1, (-1, 4))[..., : shape[-1], :]
    return dw[..., : shape[1]].movedim(-1, 1)


def merged_groups(p: ConvProblem) -> int:
    """How many groups share a product of the weight gradient: as many as fill 64 rows of the tensor cores."""
    merged = 1
    while 2 * merged * max(p.C, p.K) <= 64 and p.geometry.groups % (2 * merged) == 0:
        merged *= 2
    return merged


def empty_output(like: torch.Tensor, shape: Sequence[int], is_channels_last: bool) -> torch.Tensor:
    if not is_channels_last:
        return like.new_empty(shape)
    n, c, *space = shape
    return like.new_empty((n, *space, c)).movedim(-1, 1)


def dense_layout(out: torch.Tensor, run: bool = True) -> dict[str, Any]:
    """The constants CHANNELS_LAST and RUN by which a kernel addresses a dense result."""
    last = layout_strides(out)[1]
    pixels = math.prod(out.shape[2:])
    return {"CHANNELS_LAST": last, "RUN": unit_divisor(16 // out.dtype.itemsize, pixels) if run and not last else 1}


class Epilogue(NamedTuple):
    """What is done to the sums before they are stored; ``residual`` and ``z``, the activation's input that is kept,
    have the result's strides."""

    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    z: torch.Tensor | None = None
    activation: str = "none"

    def arguments(self, out: torch.Tensor, run: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run-time arguments and constants of a kernel that stores the dense ``out``; without ``run`` neighbours in a
        tile are no neighbours in a row."""
        arguments = {
            "scale_ptr": self.scale, "bias_ptr": self.bias, "residual_ptr": self.residual, "out_ptr": out,
            "z_ptr": self.z,
        }  # fmt: skip
        return arguments, {**dense_layout(out, run), "ACTIVATION": self.activation}


def plan_forward(
    p: ConvProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """x channels last, w packed [K, T, R, S, C]."""
    if "TMA" in config:
        if _has_boxes(x, w):
            return [_lines(p, config, x, w, epilogue.arguments(y), turned=False)]
        config = _by_pointers(config, SWAP=0)
    groups, split = p.geometry.groups, config.SPLIT_K
    x_vec, _, (xn, _, xd, xh, xw) = layout_strides(x, p.C)
    tiles = cost.cdiv(p.pixels, config.BLOCK_M) * cost.cdiv(p.K, config.BLOCK_N)
    partial = None
    if split > 1:
        partial = torch.empty((split, p.pixels, p.K * groups), dtype=torch.float32, device=x.device)
    operands, constants = epilogue.arguments(y)
    main = Launch(
        _conv_kernel,
        tiles * groups * split,
        {
            "x_ptr": x, "w_ptr": w, **operands, "partial_ptr": partial, "M": p.pixels, **p.sizes(), "splits": split,
            "stride_xn": xn, "stride_xd": xd, "stride_xh": xh, "stride_xw": xw,
        },
        {
            "C": p.C, "TAIL": p.tail, "K": p.K, "R": p.window[1], "S": p.window[2], "TAPS": p.taps, "GROUPS": groups,
            **p.geometry.constants(), "RANK": p.rank, "X_VEC": x_vec, **constants, "PRECISION": dot_precision(p),
            **_blocks(config),
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if partial is None else [main, _reduce(partial, epilogue, y)]


def _lines(
    p: ConvProblem, config: Config, x: torch.Tensor, w: torch.Tensor, target: tuple[dict[str, Any], dict[str, Any]],
    turned: bool,
) -> Launch:  # fmt: skip
    """The launch by lines of the result. ``target`` are the epilogue's arguments and constants."""
    groups, (m, n, k) = p.geometry.groups, (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    images, channels, *space = x.shape
    image = [images, *triple(space), channels]
    lines, length = _line_sizes(p, turned)
    if _is_one_line(p):
        image = [1, 1, 1, math.prod(image[:-1]), channels]
    weights = [w.shape[0], p.taps, w.shape[-1]]
    operands, constants = target
    constants["RUN"] = unit_divisor(constants["RUN"], length)
    c, columns, output = (p.K, p.C, p.image) if turned else (p.C, p.K, p.output)
    return Launch(
        _conv_lines_kernel,
        line_tiles(p, m, turned) * cost.cdiv(columns, n) * groups,
        {
            "x_desc": descriptor(x, image, [1, 1, 1, m, k]),
            "w_desc": descriptor(w, weights, [k, 1, n] if turned else [n, 1, k]),
            **operands, "L": length, "lines": lines, **dict(zip("ZPQ", output, strict=True)),
        },
        {
            "C": c, "K": columns, "R": p.window[1], "S": p.window[2], "TAPS": p.taps, "GROUPS": groups,
            **{name: value for name, value in p.geometry.constants().items() if not name.startswith("STRIDE")},
            "RANK": p.rank, "TURNED": turned, **constants, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k,
            "GROUP_M": config.GROUP_M,
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip


def _is_one_line(p: ConvProblem) -> bool:
    """Do windows see one pixel each, so that rows and images may follow one another?"""
    return p.taps == 1 and not any(p.geometry.padding) and p.image == p.output


def _line_sizes(p: ConvProblem, turned: bool) -> tuple[int, int]:
    """How many lines the result has, and their length in pixels."""
    if _is_one_line(p):
        return 1, p.pixels
    output = p.image if turned else p.output
    return p.N * output[0] * output[1], output[2]


def line_tiles(p: ConvProblem, block_m: int, turned: bool) -> int:
    """Tiles of the product's rows, none of which spans lines."""
    lines, length = _line_sizes(p, turned)
    return lines * cost.cdiv(length, block_m)


def _has_boxes(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Are x's channels, columns, rows and images packed in that order, as w is, from addresses that the accelerator
    takes?"""
    return x.movedim(1, -1).is_contiguous() and x.data_ptr() % 16 == w.data_ptr() % 16 == 0


def _by_pointers(config: Config, **more: int) -> Config:
    """The same tile, for an operand that is not packed."""
    return Config(**{name: value for name, value in config.items() if name != "TMA"}, SPLIT_K=1, **more)


def _reduce(partial: torch.Tensor, epilogue: Epilogue, out: torch.Tensor) -> Launch:
    """The launch that adds partial [splits, pixels, channels] in order and stores the result, with its epilogue."""
    splits, pixels, channels = partial.shape
    operands, constants = epilogue.arguments(out)
    block_m, block_n = 16, 64
    return Launch(
        _reduce_kernel,
        cost.cdiv(pixels, block_m) * cost.cdiv(channels, block_n),
        {"partial_ptr": partial, **operands, "M": pixels, "image": math.prod(out.shape[2:]), "splits": splits},
        {"K": channels, **constants, "BLOCK_M": block_m, "BLOCK_N": block_n},
        num_warps=4,
        num_stages=1,
    )


def plan_transpose(
    p: ConvProblem, config: Config, g: torch.Tensor, w: torch.Tensor, x: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """g channels last, w from :func:`pack_transposed_weight`; x is the result."""
    if "TMA" in config:
        if _has_boxes(g, w):
            return [_lines(p, config, g, w, epilogue.arguments(x), turned=True)]
        config = _by_pointers(config)
    geometry, split = p.geometry, config.SPLIT_K
    g_vec, _, (gn, _, gz, gp, gq) = layout_strides(g, p.K)
    classes = (cost.cdiv(size, step) for size, step in zip(p.image, geometry.stride, strict=True))
    tiles = cost.cdiv(p.N * math.prod(classes), config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_N)
    partial = None
    if split > 1:
        shape = (split, p.image_pixels, p.C * geometry.groups)
        partial = torch.empty(shape, dtype=torch.float32, device=g.device)
    operands, constants = epilogue.arguments(x, run=geometry.parities == 1)
    steps = (step // math.gcd(step, dil) for step, dil in zip(geometry.stride, geometry.dilation, strict=True))
    main = Launch(
        _conv_transpose_kernel,
        tiles * geometry.groups * geometry.parities * split,
        {
            "g_ptr": g, "w_ptr": w, **operands, "partial_ptr": partial, "N": p.N, **p.sizes(), "splits": split,
            "stride_gn": gn, "stride_gz": gz, "stride_gp": gp, "stride_gq": gq,
        },
        {
            "C": p.C, "K": p.K, **dict(zip("TRS", p.window, strict=True)), "GROUPS": geometry.groups,
            **geometry.constants(), "RANK": p.rank,
            **dict(zip(("STEP_D", "STEP_H", "STEP_W"), steps, strict=True)),
            **dict(zip(("STRIDE_WK", "STRIDE_WT", "STRIDE_WC"), _transposed_weight_strides(p), strict=True)),
            "G_VEC": g_vec, **constants, "PRECISION": dot_precision(p), **_blocks(config),
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if partial is None else [main, _reduce(partial, epilogue, x)]


def plan_weight_grad(
    p: ConvProblem, config: Config, x: torch.Tensor, g: torch.Tensor, dw: torch.Tensor
) -> list[Launch]:
    """x and g channels last; dw [K, C, *window] contiguous or channels last (``p.channels_last``)."""
    merged = merged_groups(p)
    groups, c, k = p.geometry.groups // merged, p.C * merged, p.K * merged
    x_vec, _, (xn, _, xd, xh, xw) = layout_strides(x, c)
    g_vec, _, (gn, _, gz, gp, gq) = layout_strides(g, k)
    split = config.SPLIT_K
    tiles = cost.cdiv(k, config.BLOCK_M) * cost.cdiv(p.taps * c, config.BLOCK_N)
    out = dw
    if split > 1:
        out = torch.empty((split, dw.numel()), dtype=torch.float32, device=x.device)
    main = Launch(
        _conv_weight_grad_kernel,
        tiles * groups * split,
        {
            "x_ptr": x, "g_ptr": g, "dw_ptr": out, "M": p.pixels, **p.sizes(), "splits": split,
            "stride_xn": xn, "stride_xd": xd, "stride_xh": xh, "stride_xw": xw,
            "stride_gn": gn, "stride_gz": gz, "stride_gp": gp, "stride_gq": gq,
        },
        {
            "C": c, "K": k, "R": p.window[1], "S": p.window[2], "TAPS": p.taps, "GROUPS": groups, "MERGED": merged,
            **p.geometry.constants(), "RANK": p.rank,
            "STRIDE_WT": p.C if p.channels_last else 1, "STRIDE_WC": 1 if p.channels_last else p.taps,
            "X_VEC": x_vec, "G_VEC": g_vec, "PRECISION": dot_precision(p), **_blocks(config),
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
    dy, saved, g = _as_planes(dy, saved, g)
    y_vec, y_unit, y_strides = layout_strides(dy, runs=True)
    s_vec, s_unit, s_strides = layout_strides(dy if saved is None else saved, runs=True)
    layout = {"CHANNELS_LAST": True, "RUN": 1} if g is None else dense_layout(g)
    split = max(1, min(config.SPLIT_M, cost.cdiv(p.M, config.BLOCK_M)))
    partial = None
    if bias_grad is not None:
        partial = torch.empty((split, p.K), dtype=torch.float32, device=dy.device)
    main = Launch(
        _epilogue_grad_kernel,
        split * cost.cdiv(p.K, config.BLOCK_N),
        {
            "dy_ptr": dy, "saved_ptr": saved, "g_ptr": g, "partial_ptr": partial,
            "M": p.M, **dict(zip("ZPQ", triple(dy.shape[2:]), strict=True)), "splits": split,
            **dict(zip(Y_STRIDES, y_strides, strict=True)), **dict(zip(S_STRIDES, s_strides, strict=True)),
        },
        {
            "K": p.K, "RANK": 3 if dy.dim() == 5 else 2, "Y_UNIT_C": y_unit, "S_UNIT_C": s_unit,
            "Y_VEC": y_vec, "S_VEC": s_vec, "G_CHANNELS_LAST": layout["CHANNELS_LAST"], "G_RUN": layout["RUN"],
            "ACTIVATION": activation,
            "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N,
        },
        config.num_warps,
        config.num_stages,
    )  # fmt: skip
    return [main] if bias_grad is None or partial is None else [main, sum_splits(partial, bias_grad)]


def _as_planes(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors [N, K, *space] as [N, K, pixels] if that is a view of each: longer rows, fewer divisions."""
    for t in tensors:
        if t is None or t.dim() == 3:
            continue
        steps = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size != 1]
        if any(outer[1] != inner[0] * inner[1] for outer, inner in itertools.pairwise(steps)):
            return list(tensors)
    return [t if t is None else t.flatten(2) for t in tensors]


def dot_precision(p: ConvProblem) -> str:
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
_SPLIT_TILES = tuple(
    (tile, split) for split in (1, 2, 4, 8) for tile in _TILES
    if split == 1 or tile[:2] in ((128, 128), (64, 64), (64, 32))
)  # fmt: skip
_LINE_TILES = tuple(
    _gemm_config(*tile, GROUP_M=8, TMA=1) for tile in _TILES if tile[2] == 64 and tile[0] * tile[1] >= 64 * 64
)
_SWAPPED_TILES = ((256, 64, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 32, 4, 4))
FORWARD_CONFIGS = (
    *(_gemm_config(*tile, GROUP_M=8, SPLIT_K=split, SWAP=0) for tile, split in _SPLIT_TILES),
    *(_gemm_config(*tile, GROUP_M=8, SPLIT_K=1, SWAP=1) for tile in _SWAPPED_TILES),
    *_LINE_TILES,
)
TRANSPOSE_CONFIGS = (
    *(_gemm_config(*tile, GROUP_M=8, SPLIT_K=split) for tile, split in _SPLIT_TILES),
    *_LINE_TILES,
)
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


def fits(p: ConvProblem, config: Config, device: DeviceSpec, rows: int, columns: int, reduction: int) -> bool:
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


def _stores(p: ConvProblem, config: Config, device: DeviceSpec, run: int) -> bool:
    """Into NCHW every element has an address of its own, two registers each, and larger tiles spill, unless the pixels
    follow one another in stretches of ``run`` that hold a whole number of 16 bytes."""
    runs = p.channels_last or run % (16 // p.itemsize) == 0
    return runs or config.BLOCK_M * config.BLOCK_N <= 32 * device.warp_size * config.num_warps


def _splits(p: ConvProblem, config: Config, steps: int, least: int, outputs: int) -> bool:
    """May the reduction be split so? Each part gets ``least`` steps, and the partial sums are no larger than the input
    and the weights together, which is what a call may take beside its result."""
    if config.SPLIT_K == 1:
        return True
    room = (p.image_pixels + p.K * p.taps) * p.C * p.geometry.groups * p.itemsize
    return steps >= least * config.SPLIT_K and 4 * config.SPLIT_K * outputs <= max(room, 2**20)


def _lines_accept(p: ConvProblem, config: Config, device: DeviceSpec, turned: bool) -> bool:
    """A tensor memory accelerator, boxes that it takes, and no group whose last box reaches into the next."""
    reduction, columns = (p.K, p.C) if turned else (p.C, p.K)
    whole = all(size * p.itemsize % 16 == 0 for size in (p.C, reduction * p.geometry.groups))
    return (
        device.has_tma
        and p.precision == "16"
        and p.geometry.parities == 1
        and p.tail == 0
        and whole
        and (p.geometry.groups == 1 or reduction % config.BLOCK_K == 0)
        and _stores(p, config, device, math.prod(p.image if turned else p.output))
        and fits(p, config, device, _line_sizes(p, turned)[1], columns, reduction)
    )


def _forward_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if "TMA" in config:
        return _lines_accept(p, config, device, turned=False)
    reduction = p.taps * p.C
    outputs = p.pixels * p.K * p.geometry.groups
    enough = _splits(p, config, cost.cdiv(reduction, config.BLOCK_K), 4, outputs)
    if config.SWAP and (p.K > config.BLOCK_N or p.K <= config.BLOCK_N // 2 or p.precision == "ieee"):
        return False
    stores = _stores(p, config, device, math.prod(p.output))
    return enough and stores and fits(p, config, device, p.pixels, p.K, reduction)


def _lines_estimate(p: ConvProblem, config: Config, device: DeviceSpec, turned: bool) -> Estimate:
    reduction, columns = (p.K, p.C) if turned else (p.C, p.K)
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=line_tiles(p, config.BLOCK_M, turned) * cost.cdiv(columns, config.BLOCK_N) * p.geometry.groups,
        steps=p.taps * cost.cdiv(reduction, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        columns=config.BLOCK_N,
    )


def _forward_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    if "TMA" in config:
        return _lines_estimate(p, config, device, turned=False)
    groups, split = p.geometry.groups, config.SPLIT_K
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(p.pixels, config.BLOCK_M) * cost.cdiv(p.K, config.BLOCK_N) * groups,
        steps=cost.cdiv(p.taps * p.C, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.pixels * p.K * groups if split > 1 else 0.0,
        columns=min(256, config.BLOCK_M if config.SWAP else config.BLOCK_N),
    )


def _transpose_steps(p: ConvProblem, config: Config) -> int:
    return cost.cdiv(p.taps, p.geometry.parities) * cost.cdiv(p.K, config.BLOCK_K)


def _transpose_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if "TMA" in config:
        return _lines_accept(p, config, device, turned=True)
    rows = cost.cdiv(p.image_pixels, p.geometry.parities)
    enough = _splits(p, config, _transpose_steps(p, config), 4, p.image_pixels * p.C * p.geometry.groups)
    stores = _stores(p, config, device, math.prod(p.image) if p.geometry.parities == 1 else 1)
    return enough and stores and fits(p, config, device, rows, p.C, p.K)


def _transpose_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    if "TMA" in config:
        return _lines_estimate(p, config, device, turned=True)
    groups, split = p.geometry.groups, config.SPLIT_K
    rows = cost.cdiv(p.image_pixels, p.geometry.parities)
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(rows, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_N) * groups * p.geometry.parities,
        steps=_transpose_steps(p, config),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.image_pixels * p.C * groups if split > 1 else 0.0,
        columns=config.BLOCK_N,
    )


def _weight_grad_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    merged = merged_groups(p)
    enough = _splits(p, config, cost.cdiv(p.pixels, config.BLOCK_K), 2, p.K * p.taps * p.C * p.geometry.groups)
    return enough and fits(p, config, device, p.K * merged, p.taps * p.C * merged, p.pixels)


def _weight_grad_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    merged, split = merged_groups(p), config.SPLIT_K
    columns = p.taps * p.C * merged
    return cost.gemm(
        device,
        p.precision,
        p.itemsize,
        tiles=cost.cdiv(p.K * merged, config.BLOCK_M)
        * cost.cdiv(columns, config.BLOCK_N)
        * (p.geometry.groups // merged),
        steps=cost.cdiv(p.pixels, config.BLOCK_K),
        dram_bytes=p.minimal_bytes(),
        config=config,
        blocks=(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K),
        split=split,
        partial_bytes=8.0 * split * p.K * p.taps * p.C * p.geometry.groups if split > 1 else 0.0,
        columns=config.BLOCK_N,
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


def features(p: ConvProblem) -> dict[str, int | str]:
    """Sizes by which stored measurements are compared, and what must match exactly."""
    return {
        "pixels": p.pixels, "C": p.C, "K": p.K, "taps": p.taps, "groups": p.geometry.groups,
        "stride": "x".join(map(str, p.geometry.stride)), "dtype": dtype_name(p.dtype), "precision": p.precision,
        "layout": "nhwc" if p.channels_last else "nchw",
    }  # fmt: skip


def _epilogue_features(p: EpilogueProblem) -> dict[str, int | str]:
    return {
        "M": p.M, "K": p.K, "dtype": dtype_name(p.dtype),
        "passes": f"{int(p.has_saved)}{int(p.writes_g)}{int(p.has_bias)}",
    }  # fmt: skip


def meta_tensors(p: ConvProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights and y of a problem on the meta device, laid out as the problem says."""
    groups, skip = p.geometry.groups, 3 - p.rank
    like = torch.empty(0, dtype=p.dtype, device="meta")
    x = empty_output(like, (p.N, p.C * groups, *p.image[skip:]), p.channels_last)
    w = like.new_empty(p.K * groups, *p.window[skip:], p.C)
    return x, w, empty_output(like, (p.N, p.K * groups, *p.output[skip:]), p.channels_last)


def _forward_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    epilogue = Epilogue(bias=w.new_empty(y.shape[1]), activation="relu")
    return plan_forward(p, config, empty_output(x, x.shape, True), w, y, epilogue)


def _transpose_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_transpose(p, config, empty_output(y, y.shape, True), w, x, Epilogue(bias=w.new_empty(x.shape[1])))


def _weight_grad_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_weight_grad(p, config, empty_output(x, x.shape, True), empty_output(y, y.shape, True), w)


def _epilogue_launches(p: EpilogueProblem, config: Config) -> list[Launch]:
    y = empty_output(torch.empty(0, dtype=p.dtype, device="meta"), (1, p.K, p.M, 1), True)
    saved = torch.empty_like(y) if p.has_saved else None
    g = torch.empty_like(y) if p.writes_g else None
    bias_grad = y.new_empty(p.K) if p.has_bias else None
    return plan_epilogue_grad(p, config, y, saved, g, bias_grad, "relu" if p.has_saved else "none")


FORWARD = register(Tunable("conv", FORWARD_CONFIGS, features, _forward_accepts, _forward_estimate, _forward_launches))
TRANSPOSE = register(
    Tunable("conv_transpose", TRANSPOSE_CONFIGS, features, _transpose_accepts, _transpose_estimate, _transpose_launches)
)
WEIGHT_GRAD = register(
    Tunable(
        "conv_weight_grad", WEIGHT_GRAD_CONFIGS, features, _weight_grad_accepts, _weight_grad_estimate,
        _weight_grad_launches,
    )
)  # fmt: skip
EPILOGUE_GRAD = register(
    Tunable(
        "conv_epilogue_grad", EPILOGUE_CONFIGS, _epilogue_features, _epilogue_accepts, _epilogue_estimate,
        _epilogue_launches,
    )
)  # fmt: skip


# --- calls: allocate, look up the config, launch ---------------------------------------------------------------------


def prepare(
    like: torch.Tensor, shape: Sequence[int], is_channels_last: bool, *, bias: torch.Tensor | None,
    scale: torch.Tensor | None, residual: torch.Tensor | None, activation: str, save_input: bool,
) -> tuple[torch.Tensor, Epilogue]:  # fmt: skip
    """The result, not yet computed, and its epilogue."""
    y = empty_output(like, shape, is_channels_last)
    scale, bias = (None if vector is None else readable(vector, dense=True) for vector in (scale, bias))
    residual = None if residual is None else readable(residual, like=y)
    z = torch.empty_like(y) if save_input else None
    return y, Epilogue(scale, bias, residual, z, activation)


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, output: Sequence[int], geometry: Geometry, *, precision: str = "ieee",
    is_channels_last: bool = False, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none", save_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """y, and with ``save_input`` also what the activation was applied to."""
    y, epilogue = prepare(
        x, (x.shape[0], weight.shape[0], *output), is_channels_last, bias=bias, scale=scale, residual=residual,
        activation=activation, save_input=save_input,
    )  # fmt: skip
    problem = problem_of(x.shape, weight.shape, output, geometry, x.dtype, precision, is_channels_last)
    padded = pad_problem(problem)
    x, weight = pad_image(x, problem, padded), pad_weight(weight, problem, padded)
    launch(FORWARD, plan_forward, padded, x, weight, y, epilogue)
    return y, epilogue.z


def run_transpose(
    g: torch.Tensor, weight: torch.Tensor, image: Sequence[int], geometry: Geometry, *, precision: str = "ieee",
    is_channels_last: bool = False, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, activation: str = "none", save_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """x [N, C, *image] from g [N, K, *output], and with ``save_input`` also what the activation was applied to."""
    x, epilogue = prepare(
        g, (g.shape[0], weight.shape[1] * geometry.groups, *image), is_channels_last, bias=bias, scale=scale,
        residual=residual, activation=activation, save_input=save_input,
    )  # fmt: skip
    problem = problem_of(x.shape, weight.shape, g.shape[2:], geometry, g.dtype, precision, is_channels_last)
    launch(TRANSPOSE, plan_transpose, problem, channels_last(g), pack_transposed_weight(problem, weight), x, epilogue)
    return x, epilogue.z


def run_weight_grad(
    x: torch.Tensor, g: torch.Tensor, weight_shape: Sequence[int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    problem = problem_of(x.shape, weight_shape, g.shape[2:], geometry, x.dtype, precision, is_channels_last)
    padded = pad_problem(problem)
    window = padded.window[3 - len(weight_shape[2:]) :]
    dw = empty_output(x, (weight_shape[0], padded.C, *window), is_channels_last)
    launch(WEIGHT_GRAD, plan_weight_grad, padded, pad_image(x, problem, padded), channels_last(g), dw)
    if padded == problem:
        return dw
    return empty_output(x, weight_shape, is_channels_last).copy_(unpad_weight_grad(dw, problem, weight_shape))


def run_epilogue_grad(
    dy: torch.Tensor, saved: torch.Tensor | None, activation: str, *, need_bias: bool, is_channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient at the activation's input, laid out as asked, and the bias gradient if needed."""
    channels = dy.shape[1]
    g = empty_output(dy, dy.shape, is_channels_last)
    bias_grad = dy.new_empty(channels) if need_bias else None
    problem = EpilogueProblem(_pixels(dy), channels, dy.dtype, saved is not None, True, need_bias)
    launch(EPILOGUE_GRAD, plan_epilogue_grad, problem, dy, saved, g, bias_grad, activation)
    return g, bias_grad


def run_bias_grad(g: torch.Tensor) -> torch.Tensor:
    channels = g.shape[1]
    bias_grad = g.new_empty(channels)
    problem = EpilogueProblem(_pixels(g), channels, g.dtype, has_saved=False, writes_g=False, has_bias=True)
    launch(EPILOGUE_GRAD, plan_epilogue_grad, problem, g, None, None, bias_grad, "none")
    return bias_grad


def _pixels(t: torch.Tensor) -> int:
    return t.shape[0] * math.prod(t.shape[2:])
