r"""Pooling of 1, 2 and 3 dimensions, by fixed and by adaptive windows: forward, backward as a gather, unpooling.

    y[n,c,z,p,q] = reduce over the window's taps t, r, s of x[n, c, d0 + t*DIL_D, h0 + r*DIL_H, w0 + s*DIL_W]

    fixed window      h0 = p*STRIDE_H - PAD_H                     r < R        (depth and columns alike)
    adaptive window   h0 = floor(p*H / P)                         r < ceil((p+1)*H / P) - h0

    REDUCE   max      the first of equal values wins, a NaN over everything, the last NaN over the others; a window of
                      -inf yields its first tap inside the image, one without a tap there -inf and no winner
             mean     sum / DIVISOR, or / the number of elements of the window (with INCLUDE_PAD those in the padding)
             norm1    K * mean, with K = T*R*S
             norm2    sqrt(K * mean(x^2))

Taps outside the image do not take part. Those are torch's rules. Sums are in fp32 and rounded once.

What the backward of a maximum needs is the winner's tap, (t*R + r)*S + s, and that fits one byte for windows of up to
254 taps (two bytes, four bytes beyond; NONE = no tap inside the image). torch keeps an int64 index: eight bytes.
``return_indices`` writes those, and then backward reads those.

Bytes (i: bytes of an index, 0 where none is kept; e: bytes an element). What must come from memory once:

    forward                        |x| + |y| + i*N*C*Z*P*Q
    backward                       |dy| + i*N*C*Z*P*Q + |dx|             (norm2: also x and y)
    unpool                         |x| + 8*N*C*Z*P*Q + |y|
    gather                         |y| + i*N*C*Z*P*Q + |x|

and what load and store instructions move, where neighbouring windows hit the L1 cache:

    forward, pixels x channels     taps inside the image * e + (e + i) for each output
    forward, rows                  taps of a column (T*R) * e for each element of the bands, + (e + i) for each output
    backward, pixels x channels    taps inside the image * (e + i) for each output, + e for each input
    backward, rows                 taps of a column (T*R) * (e + i) for each element of the bands, + e for each input
                                   (where windows are adaptive: windows over a row, for each input row)
    whole planes                   |x| + |y| + i*N*C, and 8 to 12 bytes for each part of a plane that is split

Two forms serve the two layouts. Channels last, a tile is pixels x channels, and a tap is one load of 16 bytes along the
channels. In NCHW a tile is rows of the output: bands of whole rows are loaded 16 bytes at a time and reduced over the
rows of the windows; then, in registers, over their columns, which other lanes hold (``tl.gather``).

Deterministic: each element is written once, by one program, which adds what reaches it in a fixed order. No atomics.
"""

from __future__ import annotations

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
from ._launch import Launch, launch, layout_strides, raw_strides, row_alignment, unit_divisor
from ._math import below, column_sum, narrow, position, tile_offsets

SIZES = [
    "M", "D", "H", "W", "Z", "P", "Q", "largest_d", "largest_h", "largest_w", "most_d", "most_h", "most_w", "span",
]  # fmt: skip
X_STRIDES = ["stride_xn", "stride_xc", "stride_xd", "stride_xh", "stride_xw"]
Y_STRIDES = ["stride_yn", "stride_yc", "stride_yz", "stride_yp", "stride_yq"]
I_STRIDES = ["stride_in", "stride_ic", "stride_iz", "stride_ip", "stride_iq"]
A_STRIDES = ["stride_an", "stride_ac", "stride_ad", "stride_ah", "stride_aw"]
B_STRIDES = ["stride_bn", "stride_bc", "stride_bz", "stride_bp", "stride_bq"]
STRIDES = [*X_STRIDES, *Y_STRIDES, *I_STRIDES, *A_STRIDES, *B_STRIDES]


# --- windows along one dimension -------------------------------------------------------------------------------------


@triton.jit
def _window(out, size, outs, STRIDE: tl.constexpr, PAD: tl.constexpr, TAPS: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Where the window of an output begins, and how many taps it has."""
    if ADAPTIVE:
        first = out * size // outs
        return first, ((out + 1) * size + outs - 1) // outs - first
    else:
        return out * STRIDE - PAD, TAPS


@triton.jit
def _tap(first, taps, tap, size, DIL: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Where a tap of a window lies, and whether it takes part."""
    if ADAPTIVE:
        return first + tap, tap < taps
    else:
        place = first + tap * DIL
        return place, (place >= 0) & (place < size)


@triton.jit
def _counted(first, taps, size, PAD: tl.constexpr, INCLUDE_PAD: tl.constexpr, ADAPTIVE: tl.constexpr):
    """How many elements of a window a mean counts. No window reaches beyond the padding, as ``ceil_mode`` lets it."""
    if ADAPTIVE:
        return taps
    elif INCLUDE_PAD:
        return tl.minimum(first + taps, size + PAD) - first
    else:
        return tl.minimum(first + taps, size) - tl.maximum(first, 0)


@triton.jit
def _last_window(place, size, outs, STRIDE: tl.constexpr, PAD: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The last window that begins at or before a place; it may lie behind the last output."""
    if ADAPTIVE:
        return ((place + 1) * outs + size - 1) // size - 1
    else:
        return (place + PAD) // STRIDE


@triton.jit
def _covers(
    out, place, size, outs,
    STRIDE: tl.constexpr, PAD: tl.constexpr, TAPS: tl.constexpr, DIL: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """The tap of a window that lies at a place, and whether there is one; ``out`` is at most :func:`_last_window`."""
    if ADAPTIVE:
        return place - out * size // outs, out >= place * outs // size
    else:
        offset = place + PAD - out * STRIDE
        tap = offset // DIL
        return tap, (out >= 0) & (out < outs) & (offset % DIL == 0) & (tap < TAPS)


# --- reductions ------------------------------------------------------------------------------------------------------


@triton.jit
def _power(x, REDUCE: tl.constexpr):
    """What a sum adds."""
    if REDUCE == "norm2":
        return x * x
    else:
        return x


@triton.jit
def _divisor(count_d, count_h, count_w, DIVISOR: tl.constexpr):
    if DIVISOR != 0:
        return tl.zeros_like(count_h + count_w).to(tl.float32) + DIVISOR
    else:
        # Windows behind the last output may count nothing.
        return tl.maximum(count_d * count_h * count_w, 1).to(tl.float32)


@triton.jit
def _finish(total, divisor, REDUCE: tl.constexpr, K: tl.constexpr):
    """The mean or norm from a window's sum; K: elements of a whole window."""
    if REDUCE == "mean":
        return tl.div_rn(total, divisor)
    else:
        total *= tl.div_rn(tl.zeros_like(divisor) + K, divisor)
        return tl.sqrt_rn(total) if REDUCE == "norm2" else total


@triton.jit
def _share(dy, y, divisor, REDUCE: tl.constexpr, K: tl.constexpr):
    """What each element of a window receives of its output's gradient, up to the element's own factor."""
    if REDUCE == "mean":
        return tl.div_rn(dy, divisor)
    else:
        dy *= tl.div_rn(tl.zeros_like(divisor) + K, divisor)
        # 0 is torch's choice where the root has no derivative, and with norm 1 where the sum is NaN.
        if REDUCE == "norm2":  # half of it, and twice the element's factor, overflow where torch's gradient does
            return tl.where(y == 0.0, 0.0, 0.5 * tl.div_rn(dy, y))
        return tl.where((y == 0.0) | (y != y), 0.0, dy)


@triton.jit
def _larger(a, b):
    """The larger of two, or a NaN; a if they are equal."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _winner(a, tap_a, b, tap_b):
    """The winner of two, in either order: of equals the smaller tap, of NaNs the larger; a tap below 0 is none."""
    take = (tap_a < 0) | (b > a) | ((b == a) & (tap_b < tap_a)) | ((b != b) & ((a == a) | (tap_b > tap_a)))
    take &= tap_b >= 0
    return tl.where(take, b, a), tl.where(take, tap_b, tap_a)


@triton.jit
def _shifted(x, SHIFT: tl.constexpr):
    """Column m + SHIFT of x [rows, columns] in column m; at the ends what is there already."""
    if SHIFT == 0:
        return x
    else:
        columns = tl.arange(0, x.shape[1]) + SHIFT
        at = tl.minimum(tl.maximum(columns, 0), x.shape[1] - 1)
        return tl.gather(x, tl.broadcast_to(at[None, :], x.shape), 1)


@triton.jit
def _store_winner(index_ptr, offsets, tap, flat, mask, NONE: tl.constexpr):
    """The winner's place in the image for int64 indices, else its tap (negative: there is none)."""
    if index_ptr.dtype.element_ty == tl.int64:
        tl.store(index_ptr + offsets, flat, mask=mask)
    else:
        tl.store(index_ptr + offsets, tl.where(tap < 0, NONE, tap).to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _flat(tap, d0, h0, w0, H, W, R, S, DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr):
    """A tap's place in the image, as a flat int64 index."""
    d = d0 + tap // S // R * DIL_D
    h = h0 + tap // S % R * DIL_H
    return (d.to(tl.int64) * H + h) * W + w0 + tap % S * DIL_W


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _pool_kernel(
    x_ptr, y_ptr, index_ptr,
    M, D, H, W, Z, P, Q, largest_d, largest_h, largest_w,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr, ADAPTIVE: tl.constexpr,
    REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, NONE: tl.constexpr, X_VEC: tl.constexpr,
    X_UNIT_C: tl.constexpr, Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """index_ptr has y's strides: None, small integers (tap in the window), or int64 (place in the image). Adaptive
    windows have at most largest_d x largest_h x largest_w taps, and T, R and S count nothing."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    taps_d = largest_d if ADAPTIVE and RANK == 3 else T
    taps_h = largest_h if ADAPTIVE else R
    taps_w = largest_w if ADAPTIVE else S
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, z, p, q = position(offs_m, Z, P, Q, RANK)
    d0, size_d = _window(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
    h0, size_h = _window(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
    w0, size_w = _window(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
    LOWEST: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    acc = tl.full((BLOCK_M, BLOCK_C), LOWEST, dtype=tl.float32)
    winner = tl.full((BLOCK_M, BLOCK_C), -1, dtype=tl.int32)
    for t in range(taps_d):
        for r in range(taps_h):
            for s in range(taps_w):
                d, in_d = _tap(d0, size_d, t, D, DIL_D, ADAPTIVE)
                h, in_h = _tap(h0, size_h, r, H, DIL_H, ADAPTIVE)
                w, in_w = _tap(w0, size_w, s, W, DIL_W, ADAPTIVE)
                inside = (mask_m & in_h & in_w)[:, None]
                if RANK == 3:
                    inside &= in_d[:, None]
                off = tile_offsets(
                    n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, X_UNIT_C
                )
                x = tl.load(x_ptr + off, mask=inside & mask_c[None, :], other=LOWEST).to(tl.float32)
                if REDUCE == "max":
                    take = (x > acc) | (x != x)
                    if index_ptr is not None:
                        take |= inside & (winner < 0)
                        winner = tl.where(take, (t * taps_h + r) * taps_w + s, winner)
                    acc = tl.where(take, x, acc)
                else:
                    acc += _power(x, REDUCE)
    if REDUCE != "max":
        count_d = _counted(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
        count_h = _counted(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
        count_w = _counted(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)
        acc = _finish(acc, _divisor(count_d, count_h, count_w, DIVISOR)[:, None], REDUCE, T * R * S)
    mask = mask_m[:, None] & mask_c[None, :]
    y_off = tile_offsets(n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
    tl.store(y_ptr + y_off, narrow(acc, y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        flat = _flat(winner, d0[:, None], h0[:, None], w0[:, None], H, W, taps_h, taps_w, DIL_D, DIL_H, DIL_W)
        _store_winner(index_ptr, y_off, winner, flat, mask, NONE)


@triton.jit(do_not_specialize=["C", *SIZES, *STRIDES])
def _pool_rows_kernel(
    x_ptr, y_ptr, index_ptr,
    M, C, D, H, W, Z, P, Q, largest_d, largest_h, largest_w, span,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr, ADAPTIVE: tl.constexpr, REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    DIVISOR: tl.constexpr, NONE: tl.constexpr, X_VEC: tl.constexpr, Y_VEC: tl.constexpr,
    PHASES: tl.constexpr, LEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Rows of x are neighbours in memory; y and the winners are dense NCHW. A program takes BLOCK_R of the M rows of
    the output, in each ``span`` columns, whose windows lie in a band of BLOCK_W columns of x, and reduces the band over
    the rows of the windows first.

    Then over their columns. With PHASES = STRIDE_W output q lies over columns q*PHASES + phase of the band, so taps at
    one distance of q, in PHASES, are reduced where they are (neighbours in one thread), and only each distance is
    shifted to its q. With PHASES = 0 windows may begin anywhere, and each of their columns is fetched by itself.
    """
    taps_d = largest_d if ADAPTIVE and RANK == 3 else T
    taps_h = largest_h if ADAPTIVE else R
    taps_w = largest_w if ADAPTIVE else S
    tiles_q = tl.cdiv(Q, span)
    row = tl.program_id(0) // tiles_q * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_row = row < M
    plane, z, p = row // (Z * P), row // P % Z, row % P
    n, c = plane // C, plane % C
    d0, size_d = _window(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
    h0, size_h = _window(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)

    q0 = tl.program_id(0) % tiles_q * (span // Y_VEC) * Y_VEC
    lane = tl.arange(0, BLOCK_Q) - LEAD
    q = q0 + lane
    if PHASES > 0:
        band = q0 * PHASES // X_VEC * X_VEC - LEAD * PHASES
    else:
        band, _ = _window(q0, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
        band = tl.maximum(band, 0) // X_VEC * X_VEC
    col = band + tl.arange(0, BLOCK_W)
    mask_col = below(col, W, X_VEC)
    if LEAD > 0:
        mask_col &= col >= 0
    LOWEST: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    column = tl.full((BLOCK_R, BLOCK_W), LOWEST, dtype=tl.float32)
    row_tap = tl.full((BLOCK_R, BLOCK_W), -1, dtype=tl.int32)
    for t in range(taps_d):
        for r in range(taps_h):
            d, in_d = _tap(d0, size_d, t, D, DIL_D, ADAPTIVE)
            h, in_h = _tap(h0, size_h, r, H, DIL_H, ADAPTIVE)
            inside = (mask_row & in_h)[:, None]
            if RANK == 3:
                inside &= in_d[:, None]
            off = (n.to(tl.int64) * stride_xn + c.to(tl.int64) * stride_xc + d * stride_xd + h * stride_xh) * X_VEC
            mask = inside & mask_col[None, :]
            x = tl.load(x_ptr + off[:, None] + col[None, :], mask=mask, other=LOWEST).to(tl.float32)
            if REDUCE == "max":
                take = (x > column) | (x != x)
                if index_ptr is not None:
                    take |= inside & (row_tap < 0)
                    row_tap = tl.where(take, t * taps_h + r, row_tap)
                column = tl.where(take, x, column)
            else:
                column += _power(x, REDUCE)

    acc = tl.full((BLOCK_R, BLOCK_Q), LOWEST, dtype=tl.float32)
    winner = tl.full((BLOCK_R, BLOCK_Q), -1, dtype=tl.int32)
    w0, size_w = _window(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
    if PHASES > 0:
        FIRST: tl.constexpr = -PAD_W // PHASES
        DISTANCES: tl.constexpr = ((S - 1) * DIL_W - PAD_W) // PHASES - FIRST + 1
        for i in tl.static_range(DISTANCES):
            offset = (FIRST + i) * PHASES + tl.arange(0, BLOCK_W) % PHASES + PAD_W
            s = offset // DIL_W
            is_tap = (mask_col & (offset >= 0) & (offset % DIL_W == 0) & (s < S))[None, :]
            x = tl.where(is_tap, column, LOWEST)
            tap = tl.where(is_tap & (row_tap >= 0), row_tap * S + s[None, :], -1)
            x, tap = _fold(x, tap, PHASES, index_ptr is not None, REDUCE)
            in_band = ((lane + LEAD + FIRST + i >= 0) & (lane + LEAD + FIRST + i < BLOCK_Q))[None, :]
            x = tl.where(in_band, _shifted(x, FIRST + i), LOWEST)
            if index_ptr is not None:
                tap = tl.where(in_band, _shifted(tap, FIRST + i), -1)
            acc, winner = _merge(acc, winner, x, tap, index_ptr is not None, REDUCE)
    else:
        for s in range(taps_w):
            w, in_w = _tap(w0, size_w, s, W, DIL_W, ADAPTIVE)
            at = tl.minimum(tl.maximum(w - band, 0), BLOCK_W - 1)
            at = tl.broadcast_to(at[None, :], (BLOCK_R, BLOCK_Q))
            x = tl.where(in_w[None, :], tl.gather(column, at, 1), LOWEST)
            tap = winner
            if index_ptr is not None:
                row_of = tl.gather(row_tap, at, 1)
                tap = tl.where(in_w[None, :] & (row_of >= 0), row_of * taps_w + s, -1)
            acc, winner = _merge(acc, winner, x, tap, index_ptr is not None, REDUCE)
    if REDUCE != "max":
        count_d = _counted(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
        count_h = _counted(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
        count_w = _counted(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)
        if RANK == 3:
            count_h = count_h * count_d
        acc = _finish(acc, _divisor(1, count_h[:, None], count_w[None, :], DIVISOR), REDUCE, T * R * S)
    y_off = (row.to(tl.int64) * (Q // Y_VEC) * Y_VEC)[:, None] + q[None, :]
    mask = mask_row[:, None] & ((lane >= 0) & below(lane, span, Y_VEC) & below(q, Q, Y_VEC))[None, :]
    tl.store(y_ptr + y_off, narrow(acc, y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        flat = _flat(winner, d0[:, None], h0[:, None], w0[None, :], H, W, taps_h, taps_w, DIL_D, DIL_H, DIL_W)
        _store_winner(index_ptr, y_off, winner, flat, mask, NONE)


@triton.jit
def _merge(a, tap_a, b, tap_b, INDEX: tl.constexpr, REDUCE: tl.constexpr):
    """Two reductions as one. Rows first, columns second is not the order of the taps, so with an index equals and NaNs
    are told apart by their tap; of equals without one, zeros alone can differ, in their sign."""
    if REDUCE != "max":
        return a + b, tap_a
    elif INDEX:
        return _winner(a, tap_a, b, tap_b)
    else:
        return _larger(a, b), tap_a


@triton.jit
def _fold(x, tap, PHASES: tl.constexpr, INDEX: tl.constexpr, REDUCE: tl.constexpr):
    """x [rows, columns * PHASES] reduced to [rows, columns]; neighbours lie in one thread."""
    if PHASES > 1:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        tap_a, tap_b = tl.split(tl.reshape(tap, (tap.shape[0], tap.shape[1] // 2, 2)))
        x, tap = _merge(a, tap_a, b, tap_b, INDEX, REDUCE)
        return _fold(x, tap, PHASES // 2, INDEX, REDUCE)
    else:
        return x, tap


# --- whole planes ----------------------------------------------------------------------------------------------------


@triton.jit
def _winner_of_lanes(best, place):
    """The value and place that win among rows which hold the winners of their own elements; place < 0: none."""
    is_nan = best != best
    top = tl.max(tl.where(is_nan, float("-inf"), best), axis=0)
    last_nan = tl.max(tl.where(is_nan, place, -1), axis=0)
    first = tl.min(tl.where((best == top[None, :]) & (place >= 0), place, 2147483647), axis=0)
    winner = tl.where(last_nan < 0, first, last_nan)
    # The winner's own bits: of equal zeros the first has its sign.
    bits = tl.where(place == winner[None, :], best.to(tl.int32, bitcast=True), -2147483648)
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True), winner


@triton.jit(do_not_specialize=["C", "L", "rows", "splits", "stride_xn", "stride_xc", "stride_xl"])
def _global_pool_kernel(
    x_ptr, y_ptr, index_ptr, partial_ptr, partial_index_ptr,
    C, L, rows, splits,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xl: tl.int64,
    REDUCE: tl.constexpr, DIVISOR: tl.constexpr, VEC: tl.constexpr, UNIT_C: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [N, C, L] to y [N, C], where one window is the whole plane; rows = N*C. With splits > 1 every program reduces a
    part of the plane into partial [splits, N, C], and :func:`_combine_kernel` reduces those."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    split = pid % splits
    c = pid // splits % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = pid // splits // tiles_c
    part = tl.cdiv(tl.cdiv(L, BLOCK_L), splits) * BLOCK_L
    mask_c = below(c, C, VEC) if UNIT_C else c < C
    base = n.to(tl.int64) * stride_xn * VEC
    LOWEST: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    acc = tl.full((BLOCK_L, BLOCK_C), LOWEST, dtype=tl.float32)
    place = tl.full((BLOCK_L, BLOCK_C), -1, dtype=tl.int32)
    for first in range(split * part, tl.minimum((split + 1) * part, L), BLOCK_L):
        l = first + tl.arange(0, BLOCK_L)
        if UNIT_C:
            mask = (l < L)[:, None] & mask_c[None, :]
            off = base + (l.to(tl.int64) * stride_xl * VEC)[:, None] + c[None, :]
        else:
            mask = below(l, L, VEC)[:, None] & mask_c[None, :]
            off = base + l[:, None] + (c.to(tl.int64) * stride_xc * VEC)[None, :]
        x = tl.load(x_ptr + off, mask=mask, other=LOWEST).to(tl.float32)
        if REDUCE == "max":
            take = (x > acc) | (x != x) | (mask & (place < 0))
            place = tl.where(take, l[:, None], place)
            acc = tl.where(take, x, acc)
        else:
            acc += _power(x, REDUCE)
    if REDUCE == "max":
        result, winner = _winner_of_lanes(acc, place)
    else:
        result, winner = column_sum(acc), 0
    row = n * C + c
    if partial_ptr is not None:
        off = split.to(tl.int64) * rows + row
        tl.store(partial_ptr + off, result, mask=c < C)
        if index_ptr is not None:
            tl.store(partial_index_ptr + off, winner, mask=c < C)
    else:
        _store_plane(y_ptr, index_ptr, row, result, winner, c < C, L, REDUCE, DIVISOR)


@triton.jit
def _store_plane(y_ptr, index_ptr, row, result, winner, mask, L, REDUCE: tl.constexpr, DIVISOR: tl.constexpr):
    if REDUCE != "max":
        divisor = tl.zeros_like(result) + (DIVISOR if DIVISOR != 0 else L)
        result = tl.div_rn(result, divisor) if REDUCE == "mean" else result
        result = tl.sqrt_rn(result) if REDUCE == "norm2" else result
    tl.store(y_ptr + row, narrow(result, y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        tl.store(index_ptr + row, winner.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "rows", "splits"])
def _combine_kernel(
    y_ptr, index_ptr, partial_ptr, partial_index_ptr, L, rows, splits, REDUCE: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduces partial [splits, rows] in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    LOWEST: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    acc = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    winner = tl.full((BLOCK,), -1, dtype=tl.int32)
    for split in range(0, splits):
        off = tl.cast(split, tl.int64) * rows + row
        x = tl.load(partial_ptr + off, mask=mask, other=0.0)
        if REDUCE == "max":
            take = (x > acc) | (x != x)
            if index_ptr is not None:
                take |= winner < 0
                winner = tl.where(take, tl.load(partial_index_ptr + off, mask=mask, other=0), winner)
            acc = tl.where(take, x, acc)
        else:
            acc += x
    _store_plane(y_ptr, index_ptr, row, acc, winner, mask, L, REDUCE, DIVISOR)


# --- backward, and unpooling -----------------------------------------------------------------------------------------


@triton.jit
def _collect(acc, found, dy, covers, REDUCE: tl.constexpr):
    """Adds a window's share, or for an unpooling keeps it where no later window has come before."""
    if REDUCE == "last":
        acc = tl.where(covers & (found == 0), dy, acc)
        return acc, tl.where(covers, 1, found)
    else:
        return acc + tl.where(covers, dy, 0.0), found


@triton.jit
def _given(dy_ptr, index_ptr, y_ptr, y_off, i_off, b_off, here, divisor, mask, REDUCE: tl.constexpr, K: tl.constexpr):
    """What windows give to the elements at ``here``, and whether they do: all to the winner, or a share to each."""
    dy = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)
    if index_ptr is not None:
        index = tl.load(index_ptr + i_off, mask=mask, other=0)
        return dy, mask & (index.to(here.dtype) == here[:, None])
    else:
        y = dy
        if y_ptr is not None:
            y = tl.load(y_ptr + b_off, mask=mask, other=1.0).to(tl.float32)
        return _share(dy, y, divisor[:, None], REDUCE, K), mask


@triton.jit
def _here(t, r, s, d, h, w, H, W, R, S, FLAT: tl.constexpr):
    """What an index holds that names the element: its place in the image, or the tap of the window."""
    if FLAT:
        return (d.to(tl.int64) * H + h) * W + w
    else:
        return tl.zeros_like(w) + ((t * R + r) * S + s)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _pool_backward_kernel(
    dy_ptr, index_ptr, y_ptr, x_ptr, dx_ptr,
    M, D, H, W, Z, P, Q, largest_h, largest_w, most_d, most_h, most_w,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_in: tl.int64, stride_ic: tl.int64, stride_iz: tl.int64, stride_ip: tl.int64, stride_iq: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_an: tl.int64, stride_ac: tl.int64, stride_ad: tl.int64, stride_ah: tl.int64, stride_aw: tl.int64,
    stride_bn: tl.int64, stride_bc: tl.int64, stride_bz: tl.int64, stride_bp: tl.int64, stride_bq: tl.int64,
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr, ADAPTIVE: tl.constexpr, REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, I_VEC: tl.constexpr, I_UNIT_C: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, A_VEC: tl.constexpr, A_UNIT_C: tl.constexpr,
    B_VEC: tl.constexpr, B_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[n,c,d,h,w] = sum of dy over the windows that cover (d, h, w) and that it won (max) or shares in; M counts
    input pixels. A norm also reads x (strides a) and y (strides b). REDUCE "last" is the unpooling: dy is what is
    unpooled, and the last window that names the pixel writes it."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    windows_d = most_d if ADAPTIVE and RANK == 3 else ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    windows_h = most_h if ADAPTIVE else ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    windows_w = most_w if ADAPTIVE else ((S - 1) * DIL_W + STRIDE_W) // STRIDE_W
    taps_h = largest_h if ADAPTIVE else R
    taps_w = largest_w if ADAPTIVE else S
    FLAT: tl.constexpr = index_ptr is not None and index_ptr.dtype.element_ty == tl.int64
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, d, h, w = position(offs_m, D, H, W, RANK)
    last_z = _last_window(d, D, Z, STRIDE_D, PAD_D, ADAPTIVE)
    last_p = _last_window(h, H, P, STRIDE_H, PAD_H, ADAPTIVE)
    last_q = _last_window(w, W, Q, STRIDE_W, PAD_W, ADAPTIVE)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    found = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    for l in range(windows_d):
        for i in range(windows_h):
            for j in range(windows_w):
                # From the last window backwards, and the tap that lies on the pixel.
                z, p, q = last_z - l, last_p - i, last_q - j
                t, in_z = _covers(z, d, D, Z, STRIDE_D, PAD_D, T, DIL_D, ADAPTIVE)
                r, in_p = _covers(p, h, H, P, STRIDE_H, PAD_H, R, DIL_H, ADAPTIVE)
                s, in_q = _covers(q, w, W, Q, STRIDE_W, PAD_W, S, DIL_W, ADAPTIVE)
                covers = mask_m & in_p & in_q
                if RANK == 3:
                    covers &= in_z
                y_off = tile_offsets(
                    n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C
                )
                i_off = tile_offsets(
                    n, z, p, q, c, stride_in, stride_ic, stride_iz, stride_ip, stride_iq, I_VEC, I_UNIT_C
                )
                b_off = tile_offsets(
                    n, z, p, q, c, stride_bn, stride_bc, stride_bz, stride_bp, stride_bq, B_VEC, B_UNIT_C
                )
                here = _here(t, r, s, d, h, w, H, W, taps_h, taps_w, FLAT)
                d0, size_d = _window(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
                h0, size_h = _window(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
                w0, size_w = _window(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
                count_d = _counted(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
                count_h = _counted(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
                count_w = _counted(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)
                dy, mask = _given(
                    dy_ptr, index_ptr, y_ptr, y_off, i_off, b_off, here, _divisor(count_d, count_h, count_w, DIVISOR),
                    covers[:, None] & mask_c[None, :], REDUCE, T * R * S,
                )  # fmt: skip
                acc, found = _collect(acc, found, dy, mask, REDUCE)
    mask = mask_m[:, None] & mask_c[None, :]
    if x_ptr is not None:
        a_off = tile_offsets(n, d, h, w, c, stride_an, stride_ac, stride_ad, stride_ah, stride_aw, A_VEC, A_UNIT_C)
        acc *= 2.0 * tl.load(x_ptr + a_off, mask=mask, other=0.0).to(tl.float32)
    x_off = tile_offsets(n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, X_UNIT_C)
    tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _pool_backward_cells_kernel(
    dy_ptr, index_ptr, y_ptr, x_ptr, dx_ptr,
    M, D, H, W, Z, P, Q,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_in: tl.int64, stride_ic: tl.int64, stride_iz: tl.int64, stride_ip: tl.int64, stride_iq: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_an: tl.int64, stride_ac: tl.int64, stride_ad: tl.int64, stride_ah: tl.int64, stride_aw: tl.int64,
    stride_bn: tl.int64, stride_bc: tl.int64, stride_bz: tl.int64, stride_bp: tl.int64, stride_bq: tl.int64,
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr, REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, I_VEC: tl.constexpr, I_UNIT_C: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, A_VEC: tl.constexpr, A_UNIT_C: tl.constexpr,
    B_VEC: tl.constexpr, B_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same for fixed windows with small strides, by cells of STRIDE_D x STRIDE_H x STRIDE_W pixels, of which M
    counts all. Pixels at one place of their cells have the same taps, so these are constants, windows that do not
    reach the place are left out, and a third of the instructions remains."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    WINDOWS_D: tl.constexpr = ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    WINDOWS_H: tl.constexpr = ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    WINDOWS_W: tl.constexpr = ((S - 1) * DIL_W + STRIDE_W) // STRIDE_W
    FLAT: tl.constexpr = index_ptr is not None and index_ptr.dtype.element_ty == tl.int64
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, cell_d, cell_h, cell_w = position(offs_m, tl.cdiv(D, STRIDE_D), tl.cdiv(H, STRIDE_H), tl.cdiv(W, STRIDE_W), RANK)
    for a in tl.static_range(STRIDE_D * STRIDE_H * STRIDE_W):
        in_d = a // (STRIDE_H * STRIDE_W)
        in_h = a // STRIDE_W % STRIDE_H
        in_w = a % STRIDE_W
        d, h, w = cell_d * STRIDE_D + in_d, cell_h * STRIDE_H + in_h, cell_w * STRIDE_W + in_w
        mask_p = mask_m & (h < H) & (w < W)
        if RANK == 3:
            mask_p &= d < D
        acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        found = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
        for i in tl.static_range(WINDOWS_D * WINDOWS_H * WINDOWS_W):
            # From the last window backwards, and how far its first tap lies before the pixel.
            off_d = (in_d + PAD_D) % STRIDE_D + i // (WINDOWS_H * WINDOWS_W) * STRIDE_D
            off_h = (in_h + PAD_H) % STRIDE_H + i // WINDOWS_W % WINDOWS_H * STRIDE_H
            off_w = (in_w + PAD_W) % STRIDE_W + i % WINDOWS_W * STRIDE_W
            reaches = (off_d % DIL_D == 0) & (off_h % DIL_H == 0) & (off_w % DIL_W == 0)
            if reaches & (off_d // DIL_D < T) & (off_h // DIL_H < R) & (off_w // DIL_W < S):
                z = cell_d + (in_d + PAD_D) // STRIDE_D - i // (WINDOWS_H * WINDOWS_W)
                p = cell_h + (in_h + PAD_H) // STRIDE_H - i // WINDOWS_W % WINDOWS_H
                q = cell_w + (in_w + PAD_W) // STRIDE_W - i % WINDOWS_W
                covers = mask_p & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
                if RANK == 3:
                    covers &= (z >= 0) & (z < Z)
                y_off = tile_offsets(
                    n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C
                )
                i_off = tile_offsets(
                    n, z, p, q, c, stride_in, stride_ic, stride_iz, stride_ip, stride_iq, I_VEC, I_UNIT_C
                )
                b_off = tile_offsets(
                    n, z, p, q, c, stride_bn, stride_bc, stride_bz, stride_bp, stride_bq, B_VEC, B_UNIT_C
                )
                here = _here(off_d // DIL_D, off_h // DIL_H, off_w // DIL_W, d, h, w, H, W, R, S, FLAT)
                count_d = _counted(z * STRIDE_D - PAD_D, T, D, PAD_D, INCLUDE_PAD, False)
                count_h = _counted(p * STRIDE_H - PAD_H, R, H, PAD_H, INCLUDE_PAD, False)
                count_w = _counted(q * STRIDE_W - PAD_W, S, W, PAD_W, INCLUDE_PAD, False)
                dy, mask = _given(
                    dy_ptr, index_ptr, y_ptr, y_off, i_off, b_off, here, _divisor(count_d, count_h, count_w, DIVISOR),
                    covers[:, None] & mask_c[None, :], REDUCE, T * R * S,
                )  # fmt: skip
                acc, found = _collect(acc, found, dy, mask, REDUCE)
        mask = mask_p[:, None] & mask_c[None, :]
        if x_ptr is not None:
            a_off = tile_offsets(n, d, h, w, c, stride_an, stride_ac, stride_ad, stride_ah, stride_aw, A_VEC, A_UNIT_C)
            acc *= 2.0 * tl.load(x_ptr + a_off, mask=mask, other=0.0).to(tl.float32)
        x_off = tile_offsets(n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, X_UNIT_C)
        tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["C", *SIZES, *STRIDES])
def _pool_backward_rows_kernel(
    dy_ptr, index_ptr, y_ptr, x_ptr, dx_ptr,
    M, C, D, H, W, Z, P, Q, largest_h, largest_w, most_d, most_h, most_w,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64,
    stride_an: tl.int64, stride_ac: tl.int64, stride_ad: tl.int64, stride_ah: tl.int64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr, ADAPTIVE: tl.constexpr,
    REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr, Y_VEC: tl.constexpr, I_VEC: tl.constexpr,
    X_VEC: tl.constexpr, A_VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Rows of dy and x are neighbours in memory; dx, the winners and y are dense NCHW. A program takes BLOCK_R of the M
    rows of dx, in each BLOCK_W columns, over which lie the windows of a band of BLOCK_Q columns of dy."""
    BAND_VEC: tl.constexpr = max(I_VEC, Y_VEC)
    windows_d = most_d if ADAPTIVE and RANK == 3 else ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    windows_h = most_h if ADAPTIVE else ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    windows_w = most_w if ADAPTIVE else ((S - 1) * DIL_W + STRIDE_W) // STRIDE_W
    taps_h = largest_h if ADAPTIVE else R
    taps_w = largest_w if ADAPTIVE else S
    tiles_w = tl.cdiv(W, BLOCK_W)
    row = tl.program_id(0) // tiles_w * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_row = row < M
    plane, d, h = row // (D * H), row // H % D, row % H
    n, c = plane // C, plane % C
    last_z = _last_window(d, D, Z, STRIDE_D, PAD_D, ADAPTIVE)
    last_p = _last_window(h, H, P, STRIDE_H, PAD_H, ADAPTIVE)

    w_first = tl.program_id(0) % tiles_w * BLOCK_W
    w = w_first + tl.arange(0, BLOCK_W)
    last_q = _last_window(w, W, Q, STRIDE_W, PAD_W, ADAPTIVE)
    band = _last_window(w_first, W, Q, STRIDE_W, PAD_W, ADAPTIVE) - (windows_w - 1)
    band = tl.maximum(band, 0) // BAND_VEC * BAND_VEC
    q_band = band + tl.arange(0, BLOCK_Q)
    w0, size_w = _window(q_band, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
    count_w = _counted(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)

    acc = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32)
    found = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.int32)
    for l in range(windows_d):
        for i in range(windows_h):
            z, p = last_z - l, last_p - i
            t, in_z = _covers(z, d, D, Z, STRIDE_D, PAD_D, T, DIL_D, ADAPTIVE)
            r, in_p = _covers(p, h, H, P, STRIDE_H, PAD_H, R, DIL_H, ADAPTIVE)
            in_row = mask_row & in_p
            if RANK == 3:
                in_row &= in_z
            y_row = n.to(tl.int64) * stride_yn + c.to(tl.int64) * stride_yc + z * stride_yz + p * stride_yp
            y_off = (y_row * Y_VEC)[:, None] + q_band[None, :]
            mask = in_row[:, None] & below(q_band, Q, Y_VEC)[None, :]
            dy = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)
            dense = ((plane.to(tl.int64) * Z + z) * P + p) * (Q // I_VEC) * I_VEC
            if index_ptr is not None:
                mask = in_row[:, None] & below(q_band, Q, I_VEC)[None, :]
                index = tl.load(index_ptr + dense[:, None] + q_band[None, :], mask=mask, other=0)
                if index_ptr.dtype.element_ty != tl.int64:
                    index = index.to(tl.int32)
            else:
                d0, size_d = _window(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
                h0, size_h = _window(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
                count_h = _counted(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
                if RANK == 3:
                    count_h = count_h * _counted(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
                divisor = _divisor(1, count_h[:, None], count_w[None, :], DIVISOR)
                y = dy
                if y_ptr is not None:
                    mask = in_row[:, None] & below(q_band, Q, I_VEC)[None, :]
                    y = tl.load(y_ptr + dense[:, None] + q_band[None, :], mask=mask, other=1.0).to(tl.float32)
                dy = _share(dy, y, divisor, REDUCE, T * R * S)
            for j in range(windows_w):
                q = last_q - j
                s, in_q = _covers(q, w, W, Q, STRIDE_W, PAD_W, S, DIL_W, ADAPTIVE)
                at = tl.minimum(tl.maximum(q - band, 0), BLOCK_Q - 1)
                at = tl.broadcast_to(at[None, :], (BLOCK_R, BLOCK_W))
                covers = in_row[:, None] & in_q[None, :]
                if index_ptr is not None:
                    if index_ptr.dtype.element_ty == tl.int64:
                        here = ((d.to(tl.int64) * H + h) * W)[:, None] + w[None, :]
                    else:
                        here = ((t * taps_h + r) * taps_w)[:, None] + s[None, :]
                    covers &= tl.gather(index, at, 1) == here
                acc, found = _collect(acc, found, tl.gather(dy, at, 1), covers, REDUCE)
    if x_ptr is not None:
        a_row = n.to(tl.int64) * stride_an + c.to(tl.int64) * stride_ac + d * stride_ad + h * stride_ah
        mask = mask_row[:, None] & below(w, W, A_VEC)[None, :]
        acc *= 2.0 * tl.load(x_ptr + (a_row * A_VEC)[:, None] + w[None, :], mask=mask, other=0.0).to(tl.float32)
    x_off = (row.to(tl.int64) * (W // X_VEC) * X_VEC)[:, None] + w[None, :]
    mask = mask_row[:, None] & below(w, W, X_VEC)[None, :]
    tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["C", *SIZES, *STRIDES])
def _pool_backward_cell_rows_kernel(
    dy_ptr, index_ptr, y_ptr, x_ptr, dx_ptr,
    M, C, D, H, W, Z, P, Q, span,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64,
    stride_an: tl.int64, stride_ac: tl.int64, stride_ad: tl.int64, stride_ah: tl.int64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr, REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    Y_VEC: tl.constexpr, I_VEC: tl.constexpr, X_VEC: tl.constexpr, A_VEC: tl.constexpr,
    LEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The same by cells of STRIDE_W columns, a power of two: column m of the tile is the window at q and the cell that
    begins at column q*STRIDE_W of x. A window at another distance of the cell is shifted to it; its taps on the columns
    of a cell are constants. M counts rows of cells, ``span`` the cells of a row that a program writes."""
    WINDOWS_D: tl.constexpr = ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    WINDOWS_H: tl.constexpr = ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    LAST: tl.constexpr = (STRIDE_W - 1 + PAD_W) // STRIDE_W
    DISTANCES: tl.constexpr = LAST - (PAD_W - (S - 1) * DIL_W + STRIDE_W - 1) // STRIDE_W + 1
    BLOCK_V: tl.constexpr = BLOCK_W // STRIDE_W
    cells_d, cells_h = tl.cdiv(D, STRIDE_D), tl.cdiv(H, STRIDE_H)
    tiles = tl.cdiv(tl.cdiv(W, STRIDE_W), span)
    row = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_row = row < M
    plane, cell_d, cell_h = row // (cells_d * cells_h), row // cells_h % cells_d, row % cells_h
    n, c = plane // C, plane % C

    first = tl.program_id(0) % tiles * (span // 16) * 16  # of several tiles; one begins at 0
    lane = tl.arange(0, BLOCK_V) - LEAD
    q = first + lane
    w_lane = tl.arange(0, BLOCK_W) - LEAD * STRIDE_W
    w = first * STRIDE_W + w_lane
    in_cell = tl.arange(0, STRIDE_W)
    count_w = _counted(q * STRIDE_W - PAD_W, S, W, PAD_W, INCLUDE_PAD, False)
    y_cols, i_cols = below(q, Q, Y_VEC), below(q, Q, I_VEC)
    x_cols = below(w, W, X_VEC) & below(w_lane, span * STRIDE_W, X_VEC)
    if LEAD > 0:
        y_cols, i_cols, x_cols = y_cols & (q >= 0), i_cols & (q >= 0), x_cols & (w_lane >= 0)

    for a in tl.static_range(STRIDE_D * STRIDE_H):
        in_d = a // STRIDE_H
        in_h = a % STRIDE_H
        d, h = cell_d * STRIDE_D + in_d, cell_h * STRIDE_H + in_h
        mask_h = mask_row & (h < H)
        if RANK == 3:
            mask_h &= d < D
        acc = tl.zeros((BLOCK_R, BLOCK_V, STRIDE_W), dtype=tl.float32)
        found = tl.zeros((BLOCK_R, BLOCK_V, STRIDE_W), dtype=tl.int32)
        for i in tl.static_range(WINDOWS_D * WINDOWS_H):
            off_d = (in_d + PAD_D) % STRIDE_D + i // WINDOWS_H * STRIDE_D
            off_h = (in_h + PAD_H) % STRIDE_H + i % WINDOWS_H * STRIDE_H
            t, r = off_d // DIL_D, off_h // DIL_H
            if (off_d % DIL_D == 0) & (off_h % DIL_H == 0) & (t < T) & (r < R):
                z = cell_d + (in_d + PAD_D) // STRIDE_D - i // WINDOWS_H
                p = cell_h + (in_h + PAD_H) // STRIDE_H - i % WINDOWS_H
                in_row = mask_h & (p >= 0) & (p < P)
                if RANK == 3:
                    in_row &= (z >= 0) & (z < Z)
                y_row = n.to(tl.int64) * stride_yn + c.to(tl.int64) * stride_yc + z * stride_yz + p * stride_yp
                y_off = (y_row * Y_VEC)[:, None] + q[None, :]
                dy = tl.load(dy_ptr + y_off, mask=in_row[:, None] & y_cols[None, :], other=0.0).to(tl.float32)
                dense = (((plane.to(tl.int64) * Z + z) * P + p) * (Q // I_VEC) * I_VEC)[:, None] + q[None, :]
                index = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.int32)
                if index_ptr is not None:
                    index = tl.load(index_ptr + dense, mask=in_row[:, None] & i_cols[None, :], other=0)
                    if index_ptr.dtype.element_ty != tl.int64:
                        index = index.to(tl.int32)
                else:
                    count_h = _counted(p * STRIDE_H - PAD_H, R, H, PAD_H, INCLUDE_PAD, False)
                    if RANK == 3:
                        count_h = count_h * _counted(z * STRIDE_D - PAD_D, T, D, PAD_D, INCLUDE_PAD, False)
                    y = dy
                    if y_ptr is not None:
                        y = tl.load(y_ptr + dense, mask=in_row[:, None] & i_cols[None, :], other=1.0).to(tl.float32)
                    divisor = _divisor(1, count_h[:, None], count_w[None, :], DIVISOR)
                    dy = _share(dy, y, divisor, REDUCE, T * R * S)
                for k in tl.static_range(DISTANCES):
                    off_w = in_cell + (PAD_W - (LAST - k) * STRIDE_W)
                    s = off_w // DIL_W
                    is_tap = (off_w >= 0) & (off_w % DIL_W == 0) & (s < S)
                    moved, column = q + (LAST - k), tl.arange(0, BLOCK_V) + (LAST - k)
                    in_band = (moved >= 0) & (moved < Q) & (column >= 0) & (column < BLOCK_V)
                    covers = (in_row[:, None] & in_band[None, :])[:, :, None] & is_tap[None, None, :]
                    given = tl.expand_dims(_shifted(dy, LAST - k), 2)
                    if index_ptr is not None:
                        if index_ptr.dtype.element_ty == tl.int64:
                            row_here = (d.to(tl.int64) * H + h) * W
                            here = row_here[:, None, None] + (q[:, None] * STRIDE_W + in_cell[None, :])[None, :, :]
                        else:
                            here = ((t * R + r) * S + s)[None, None, :]
                        covers &= tl.expand_dims(_shifted(index, LAST - k), 2) == here
                    acc, found = _collect(acc, found, given, covers, REDUCE)
        dx = tl.reshape(acc, (BLOCK_R, BLOCK_W))
        if x_ptr is not None:
            a_row = n.to(tl.int64) * stride_an + c.to(tl.int64) * stride_ac + d * stride_ad + h * stride_ah
            mask = mask_h[:, None] & ((w >= 0) & below(w, W, A_VEC))[None, :]
            dx *= 2.0 * tl.load(x_ptr + (a_row * A_VEC)[:, None] + w[None, :], mask=mask, other=0.0).to(tl.float32)
        x_row = ((plane.to(tl.int64) * D + d) * H + h) * (W // X_VEC) * X_VEC
        mask = mask_h[:, None] & x_cols[None, :]
        tl.store(dx_ptr + x_row[:, None] + w[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["C", "Z", "P", "Q", "D", "H", "W", *X_STRIDES, *Y_STRIDES, *I_STRIDES])
def _unpool_strays_kernel(
    x_ptr, index_ptr, y_ptr,
    C, D, H, W, Z, P, Q,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_in: tl.int64, stride_ic: tl.int64, stride_iz: tl.int64, stride_ip: tl.int64, stride_iq: tl.int64,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Unpooling, second part: elements whose index lies outside their own window, which the gather does not see. A
    pooling makes none. Such an element looks through all later ones of its plane and writes if none has its index.
    """
    tiles = tl.cdiv(Z * P * Q, BLOCK)
    plane = tl.program_id(0) // tiles
    n, c = (plane // C).to(tl.int64), (plane % C).to(tl.int64)
    o = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    z, p, q = o // (P * Q), o // Q % P, o % Q
    i_row = index_ptr + n * stride_in + c * stride_ic
    index = tl.load(i_row + z * stride_iz + p * stride_ip + q * stride_iq, mask=o < Z * P * Q, other=-1)
    d, h, w = index // W // H, index // W % H, index % W
    t, r, s = d - z * STRIDE_D + PAD_D, h - p * STRIDE_H + PAD_H, w - q * STRIDE_W + PAD_W
    stray = (t < 0) | (t >= T) | (r < 0) | (r >= R) | (s < 0) | (s >= S)
    stray &= (index >= 0) & (index < tl.cast(D, tl.int64) * H * W)
    if tl.max(stray.to(tl.int32), axis=0) > 0:
        last = stray.to(tl.int32)
        for first in range(tl.program_id(0) % tiles * BLOCK, Z * P * Q, BLOCK):
            other = first + tl.arange(0, BLOCK)
            zz, pp, qq = other // (P * Q), other // Q % P, other % Q
            there = tl.load(i_row + zz * stride_iz + pp * stride_ip + qq * stride_iq, mask=other < Z * P * Q, other=-1)
            same = (there[None, :] == index[:, None]) & (other[None, :] > o[:, None])
            last = tl.where(tl.max(same.to(tl.int32), axis=1) > 0, 0, last)
        x_off = n * stride_xn + c * stride_xc + z * stride_xd + p * stride_xh + q * stride_xw
        mask = last > 0
        x = tl.load(x_ptr + x_off, mask=mask, other=0.0)
        tl.store(y_ptr + n * stride_yn + c * stride_yc + d * stride_yz + h * stride_yp + w * stride_yq, x, mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _pool_gather_kernel(
    x_ptr, index_ptr, y_ptr,
    M, D, H, W, Z, P, Q, largest_h, largest_w,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_in: tl.int64, stride_ic: tl.int64, stride_iz: tl.int64, stride_ip: tl.int64, stride_iq: tl.int64,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr, ADAPTIVE: tl.constexpr,
    NONE: tl.constexpr, I_VEC: tl.constexpr, I_UNIT_C: tl.constexpr, Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[n,c,z,p,q] = x at the place of (z, p, q)'s winner; 0 where there is none. M counts the pixels of y."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    n, z, p, q = position(offs_m, Z, P, Q, RANK)
    mask = (offs_m < M)[:, None] & (c < C)[None, :]
    i_off = tile_offsets(n, z, p, q, c, stride_in, stride_ic, stride_iz, stride_ip, stride_iq, I_VEC, I_UNIT_C)
    index = tl.load(index_ptr + i_off, mask=mask, other=0)
    if index_ptr.dtype.element_ty == tl.int64:
        valid = (index >= 0) & (index < tl.cast(D, tl.int64) * H * W)
        d, h, w = index // W // H, index // W % H, index % W
    else:
        valid = index != NONE
        tap = index.to(tl.int32)
        taps_h = largest_h if ADAPTIVE else R
        taps_w = largest_w if ADAPTIVE else S
        d0, _ = _window(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
        h0, _ = _window(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
        w0, _ = _window(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
        d = d0[:, None] + tap // taps_w // taps_h * DIL_D
        h = h0[:, None] + tap // taps_w % taps_h * DIL_H
        w = w0[:, None] + tap % taps_w * DIL_W
    x_off = (n.to(tl.int64) * stride_xn)[:, None] + (c.to(tl.int64) * stride_xc)[None, :]
    x_off += d.to(tl.int64) * stride_xd + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    x = tl.load(x_ptr + x_off, mask=mask & valid, other=0.0)
    y_off = tile_offsets(n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
    tl.store(y_ptr + y_off, x, mask=mask)


# --- problems --------------------------------------------------------------------------------------------------------

Ints = tuple[int, ...]
INDEX_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Window(NamedTuple):
    """The windows of a pooling; each tuple has three entries, depth first, of which a lower rank's first are neutral.

    Attributes:
        kernel: taps; of adaptive windows, whose sizes differ, the most.
    """

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    adaptive: bool

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Window:
        """From one entry for each dimension of space. Adaptive windows have no stride: ``()``."""

        def three(values: Sequence[int], neutral: int) -> Ints:
            return (*(neutral for _ in range(3 - len(values))), *values)

        return cls(three(kernel, 1), three(stride, 1), three(padding, 0), three(dilation, 1), not stride)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def constants(self) -> dict[str, Any]:
        """A change of an adaptive window's size must not compile again: it is an argument."""
        kernel = (1, 1, 1) if self.adaptive else self.kernel
        names = (
            "T", "R", "S", "STRIDE_D", "STRIDE_H", "STRIDE_W", "PAD_D", "PAD_H", "PAD_W", "DIL_D", "DIL_H", "DIL_W",
        )  # fmt: skip
        values = (*kernel, *self.stride, *self.padding, *self.dilation)
        return {**dict(zip(names, values, strict=True)), "ADAPTIVE": self.adaptive}


class PoolProblem(NamedTuple):
    """One pooling.

    Attributes:
        space, out: (D, H, W) of x and (Z, P, Q) of y.
        rank: dimensions of space.
        reduce: ``"max"``, ``"mean"``, ``"norm1"``, ``"norm2"``; ``"last"`` unpools, from y's side to x's.
        include_pad, divisor: what a mean divides by; divisor 0: its elements.
        index_bytes: 0 (values only), 1, 2, 4 (taps) or 8 (places in the image).
        layout: how a program walks the larger side: ``"nhwc"``, ``"nchw"`` (whole rows), ``"strided"`` (element by
            element, whatever the strides).
    """

    N: int
    C: int
    space: Ints
    out: Ints
    rank: int
    window: Window
    reduce: str
    include_pad: bool
    divisor: int
    dtype: torch.dtype
    index_bytes: int
    layout: str

    def most_windows(self) -> Ints:
        """How many windows cover one element, at most, in each dimension."""
        window = self.window
        if window.adaptive:
            return tuple(
                cost.cdiv(o + size - math.gcd(o, size), size) for size, o in zip(self.space, self.out, strict=True)
            )
        triples = zip(window.kernel, window.stride, window.dilation, strict=True)
        return tuple(((taps - 1) * dilation + stride) // stride for taps, stride, dilation in triples)

    def is_global(self) -> bool:
        """Is the only window the whole plane?"""
        return math.prod(self.out) == 1 and self.window.kernel == self.space and max(self.window.padding) == 0

    def elements(self) -> tuple[int, int]:
        """Elements of x and y."""
        return self.N * self.C * math.prod(self.space), self.N * self.C * math.prod(self.out)

    def forward_bytes(self) -> float:
        """What must cross the memory bus once."""
        x, y = self.elements()
        return float(x * self.dtype.itemsize + y * (self.dtype.itemsize + self.index_bytes))

    def backward_bytes(self) -> float:
        x, y = self.elements()
        return self.forward_bytes() + (x + y) * self.dtype.itemsize * (self.reduce == "norm2")


def layout_of(x: torch.Tensor, is_channels_last: bool) -> str:
    """How to walk a tensor whose partner is dense, channels last or not."""
    if is_channels_last and x.shape[1] > 1:
        return "nhwc" if x.stride(1) == 1 else "strided"
    return "nchw" if x.shape[-1] == 1 or x.stride(-1) == 1 else "strided"


def _sizes(p: PoolProblem) -> dict[str, int]:
    return dict(zip(("D", "H", "W", "Z", "P", "Q"), (*p.space, *p.out), strict=True))


def _largest(p: PoolProblem, names: Sequence[str]) -> dict[str, int]:
    """Sizes of the adaptive windows; those of fixed ones are constants."""
    values = dict(zip(("largest_d", "largest_h", "largest_w"), p.window.kernel, strict=True))
    return {name: values[name] if p.window.adaptive else 0 for name in names}


def _most(p: PoolProblem) -> dict[str, int]:
    values = p.most_windows() if p.window.adaptive else (0, 0, 0)
    return dict(zip(("most_d", "most_h", "most_w"), values, strict=True))


def _mode(p: PoolProblem) -> dict[str, Any]:
    return {
        **p.window.constants(), "RANK": p.rank, "REDUCE": p.reduce, "INCLUDE_PAD": p.include_pad, "DIVISOR": p.divisor
    }  # fmt: skip


def _none(p: PoolProblem) -> int:
    """The tap of a window that has none."""
    return 255 if p.index_bytes == 1 else -1


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# --- launchers -------------------------------------------------------------------------------------------------------


def _pixels(names: list[str], t: torch.Tensor | None, letter: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Arguments and constants of a tensor that is walked pixel by pixel; of none at all: what no code reads."""
    vec, unit, strides = (1, True, [0] * 5) if t is None else layout_strides(t)
    return dict(zip(names, strides, strict=True)), {f"{letter}_VEC": vec, f"{letter}_UNIT_C": unit}


def _row_strides(names: list[str], t: torch.Tensor | None) -> tuple[dict[str, int], int]:
    """Strides in units of the widest load that every row allows, and its width, for a tensor walked row by row."""
    if t is None:
        return dict(zip(names[:4], [0] * 4, strict=True)), 1
    vec = row_alignment(t)
    return dict(zip(names[:4], (stride // vec for stride in raw_strides(t)[:4]), strict=True)), vec


def _phases(p: PoolProblem) -> int:
    """The stride along rows, where it lets kernels keep the columns of a window where they are; else 0."""
    window = p.window
    stride, reach = window.stride[2], (window.kernel[2] - 1) * window.dilation[2]
    usable = not window.adaptive and stride in (1, 2, 4, 8) and reach // stride < 16
    return stride if usable else 0


def _has_cells(p: PoolProblem, rows: bool) -> bool:
    """Can the backward be unrolled over the pixels of a cell and the windows over it? That is a piece of code for each
    tap (of rows: for each row of taps and distance of a window), and more of them take long to compile."""
    window, dims = p.window, 2 if rows else 3
    size = math.prod(window.stride[:dims]) * math.prod(p.most_windows()[:dims])
    pieces = math.prod(window.kernel[:dims])
    if rows:
        pieces *= (window.kernel[2] - 1) * window.dilation[2] // max(1, _phases(p)) + 1
    return not window.adaptive and size <= 64 and pieces <= 32 and (not rows or _phases(p) > 0)


class Span(NamedTuple):
    """How a row is cut: columns of a tile (windows and, in the backward, cells), how many of them come before the
    first that is written, and how many are."""

    columns: int
    lead: int
    written: int

    @classmethod
    def of(cls, block: int, size: int, before: int, behind: int) -> Span:
        """A tile as wide as the row needs no neighbours; one of several has those that windows reach."""
        if size <= block:
            return cls(block, 0, size)
        lead = cost.cdiv(max(0, before), 16) * 16
        return cls(block, lead, max(0, block - lead - max(0, behind)) // 16 * 16)


def _forward_span(p: PoolProblem, config: Config, x_vec: int, y_vec: int) -> Span:
    """In outputs."""
    (size, outs), window, phases = (p.space[2], p.out[2]), p.window, _phases(p)
    reach = (window.kernel[2] - 1) * window.dilation[2]
    if phases:
        whole = size <= config.BLOCK_W and outs * phases <= config.BLOCK_W
        first, last = -window.padding[2] // phases, (reach - window.padding[2]) // phases
        return Span.of(config.BLOCK_W // phases, outs if whole else 2**30, -first, last)._replace(
            **({"written": outs} if whole else {})
        )
    if size <= config.BLOCK_W:
        return Span(max(8, _pow2(outs)), 0, outs)
    usable = config.BLOCK_W - (x_vec - 1)
    count = (usable - 2) * outs // size if window.adaptive else (usable - reach - 1) // window.stride[2] + 1
    written = max(0, count) // y_vec * y_vec
    return Span(max(8, _pow2(written)), 0, written)


def _backward_span(p: PoolProblem, config: Config) -> Span:
    """In cells."""
    (size, outs), window, phases = (p.space[2], p.out[2]), p.window, _phases(p)
    whole = size <= config.BLOCK_W and outs * phases <= config.BLOCK_W
    last = (phases - 1 + window.padding[2]) // phases
    first = (window.padding[2] - (window.kernel[2] - 1) * window.dilation[2] + phases - 1) // phases
    return Span.of(config.BLOCK_W // phases, cost.cdiv(size, phases) if whole else 2**30, -first, last)


def _band(p: PoolProblem, columns: int, vec: int) -> int:
    """How many columns of y the windows over ``columns`` columns of x span, with what alignment adds."""
    (size, outs), window = (p.space[2], p.out[2]), p.window
    least = max(8, columns // GATHER_RATIO)
    if size <= columns:
        return max(least, _pow2(outs))
    step = cost.cdiv(columns * outs, size) if window.adaptive else cost.cdiv(columns, window.stride[2])
    return max(least, _pow2(min(cost.cdiv(outs, vec) * vec, step + p.most_windows()[2] + vec)))


def plan_forward(
    p: PoolProblem, config: Config, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor | None
) -> list[Launch]:
    """index, if any, has y's strides."""
    tensors = {"x_ptr": x, "y_ptr": y, "index_ptr": index}
    largest = _largest(p, ("largest_d", "largest_h", "largest_w"))
    options = (config.num_warps, config.num_stages)
    if "BLOCK_W" in config:
        x_strides, x_vec = _row_strides(X_STRIDES, x)
        y_vec = row_alignment(y)
        rows, span = p.N * p.C * p.out[0] * p.out[1], _forward_span(p, config, x_vec, y_vec)
        grid = cost.cdiv(rows, config.BLOCK_R) * cost.cdiv(p.out[2], span.written)
        args = {**tensors, "M": rows, "C": p.C, **_sizes(p), **largest, "span": span.written, **x_strides}
        constants = {
            **_mode(p), "NONE": _none(p), "X_VEC": x_vec, "Y_VEC": y_vec, "PHASES": _phases(p), "LEAD": span.lead,
            "BLOCK_Q": span.columns, **config.constants(),
        }  # fmt: skip
        return [Launch(_pool_rows_kernel, grid, args, constants, *options)]
    x_strides, x_constants = _pixels(X_STRIDES, x, "X")
    y_strides, y_constants = _pixels(Y_STRIDES, y, "Y")
    pixels = p.N * math.prod(p.out)
    grid = cost.cdiv(pixels, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C)
    args = {**tensors, "M": pixels, **_sizes(p), **largest, **x_strides, **y_strides}
    constants = {"C": p.C, **_mode(p), "NONE": _none(p), **x_constants, **y_constants, **config.constants()}
    return [Launch(_pool_kernel, grid, args, constants, *options)]


def plan_backward(
    p: PoolProblem, config: Config, dy: torch.Tensor, index: torch.Tensor | None, y: torch.Tensor | None,
    x: torch.Tensor | None, dx: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    """y and x for norms only; y, index and dx are dense."""
    x = x if p.reduce == "norm2" else None
    tensors = {"dy_ptr": dy, "index_ptr": index, "y_ptr": y, "x_ptr": x, "dx_ptr": dx}
    options = (config.num_warps, config.num_stages)
    by_cells = _has_cells(p, rows="BLOCK_W" in config)
    # Pixels and rows are counted, or the cells of them.
    steps = p.window.stride if by_cells else (1, 1, 1)
    counts = [cost.cdiv(size, step) for size, step in zip(p.space, steps, strict=True)]
    sizes, mode = _sizes(p), _mode(p)
    if by_cells:
        del mode["ADAPTIVE"]
    else:
        sizes |= {**_largest(p, ("largest_h", "largest_w")), **_most(p)}
    if "BLOCK_W" in config:
        y_strides, y_vec = _row_strides(Y_STRIDES, dy)
        a_strides, a_vec = _row_strides(A_STRIDES, x)
        saved = index if index is not None else y
        i_vec = 1 if saved is None else row_alignment(saved)
        rows = p.N * p.C * counts[0] * counts[1]
        args = {**tensors, "M": rows, "C": p.C, **sizes, **y_strides, **a_strides}
        constants = {
            **mode, "Y_VEC": y_vec, "I_VEC": i_vec, "X_VEC": row_alignment(dx), "A_VEC": a_vec, **config.constants()
        }  # fmt: skip
        if by_cells:
            span = _backward_span(p, config)
            args["span"], constants["LEAD"] = span.written, span.lead
            grid = cost.cdiv(rows, config.BLOCK_R) * cost.cdiv(counts[2], span.written)
            return [Launch(_pool_backward_cell_rows_kernel, grid, args, constants, *options)]
        constants["BLOCK_Q"] = _band(p, config.BLOCK_W, max(y_vec, i_vec))
        grid = cost.cdiv(rows, config.BLOCK_R) * cost.cdiv(p.space[2], config.BLOCK_W)
        return [Launch(_pool_backward_rows_kernel, grid, args, constants, *options)]
    args, constants = {**tensors, "M": p.N * math.prod(counts), **sizes}, {"C": p.C, **mode}
    for names, t, letter in (
        (Y_STRIDES, dy, "Y"), (I_STRIDES, index, "I"), (X_STRIDES, dx, "X"), (A_STRIDES, x, "A"), (B_STRIDES, y, "B")
    ):  # fmt: skip
        strides, vectors = _pixels(names, t, letter)
        args, constants = args | strides, constants | vectors
    grid = cost.cdiv(args["M"], config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C)
    kernel = _pool_backward_cells_kernel if by_cells else _pool_backward_kernel
    return [Launch(kernel, grid, args, {**constants, **config.constants()}, *options)]


def plan_unpool(
    p: PoolProblem, config: Config, x: torch.Tensor, index: torch.Tensor, y: torch.Tensor
) -> list[Launch]:  # fmt: skip
    """The backward's gather, then the elements that it cannot see."""
    args: dict[str, Any] = {"x_ptr": x, "index_ptr": index, "y_ptr": y, "C": p.C, **_sizes(p)}
    for names, t in ((X_STRIDES, x), (I_STRIDES, index), (Y_STRIDES, y)):
        args |= dict(zip(names, raw_strides(t), strict=True))
    window = {name: value for name, value in p.window.constants().items() if not name.startswith(("DIL", "ADAPTIVE"))}
    grid = p.N * p.C * cost.cdiv(math.prod(p.out), STRAYS)
    strays = Launch(_unpool_strays_kernel, grid, args, {**window, "BLOCK": STRAYS}, 4, 1)
    return [*plan_backward(p, config, x, index, None, None, y), strays]


def plan_gather(p: PoolProblem, config: Config, x: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> list[Launch]:
    i_strides, i_constants = _pixels(I_STRIDES, index, "I")
    y_strides, y_constants = _pixels(Y_STRIDES, y, "Y")
    pixels = p.N * math.prod(p.out)
    args = {
        "x_ptr": x, "index_ptr": index, "y_ptr": y, "M": pixels, **_sizes(p),
        **_largest(p, ("largest_h", "largest_w")), **dict(zip(X_STRIDES, raw_strides(x), strict=True)),
        **i_strides, **y_strides,
    }  # fmt: skip
    constants = {
        "C": p.C, **p.window.constants(), "RANK": p.rank, "NONE": _none(p), **i_constants, **y_constants,
        **config.constants(),
    }  # fmt: skip
    grid = cost.cdiv(pixels, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C)
    return [Launch(_pool_gather_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def _splits(p: PoolProblem, config: Config) -> int:
    """Parts of a plane. None is empty: it would have neither a maximum nor a place of one."""
    tiles = cost.cdiv(math.prod(p.space), config.BLOCK_L)
    return cost.cdiv(tiles, cost.cdiv(tiles, config.SPLIT))


def plan_global(
    p: PoolProblem, config: Config, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor | None
) -> list[Launch]:
    """x is seen as [N, C, L], and NCHW planes that all follow each other at one distance as those of one image."""
    L, (n, c) = math.prod(p.space), (p.N, p.C)
    image, channel, *_ = raw_strides(x)
    pixel, unit_c = plane_stride(x), p.layout == "nhwc"
    if not unit_c and (n == 1 or image == c * channel):
        n, c, image = 1, n * c, 0
    e = 16 // x.dtype.itemsize
    vec = unit_divisor(e, c, image, pixel) if unit_c else unit_divisor(e, L, image, channel)
    split, rows = _splits(p, config), p.N * p.C
    partial = partial_index = None
    if split > 1:
        partial = x.new_empty((split, rows), dtype=torch.float32)
        partial_index = None if index is None else x.new_empty((split, rows), dtype=torch.int32)
    strides = {"stride_xn": image // vec, "stride_xc": channel // vec, "stride_xl": pixel // vec}
    mode = {"REDUCE": p.reduce, "DIVISOR": p.divisor}
    results = {"y_ptr": y, "index_ptr": index, "partial_ptr": partial, "partial_index_ptr": partial_index}
    counts = {"L": L, "rows": rows, "splits": split}
    blocks = {"BLOCK_L": config.BLOCK_L, "BLOCK_C": config.BLOCK_C}
    first = Launch(
        _global_pool_kernel, n * cost.cdiv(c, config.BLOCK_C) * split,
        {"x_ptr": x, **results, "C": c, **counts, **strides},
        {**mode, "VEC": vec, "UNIT_C": unit_c, **blocks}, config.num_warps, config.num_stages,
    )  # fmt: skip
    if split == 1:
        return [first]
    combine = Launch(_combine_kernel, cost.cdiv(rows, 256), {**results, **counts}, {**mode, "BLOCK": 256}, 4, 1)
    return [first, combine]


def plane_stride(x: torch.Tensor) -> int:
    """At what distance the pixels of a plane follow each other; 0 where they do not follow at one distance."""
    pixel = expected = 0
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1:
            pixel = pixel or stride
            if stride == 0 or (expected and stride != expected):
                return 0
            expected = stride * size
    return pixel or 1


# --- configs ---------------------------------------------------------------------------------------------------------

# ``tl.gather`` from fewer columns than threads on a row of the result fails in the compiler of Triton 3.6 and 3.7.
GATHER_RATIO = 4
SCALAR_LOADS = 4.0  # cost of a byte that is loaded element by element, in bytes loaded 16 at a time
STRAYS = 64  # elements of an unpooling that one program looks at


def _pixel_tiles(*sizes: tuple[int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(BLOCK_M=m, BLOCK_C=c, num_warps=warps, num_stages=1) for m, c, warps in sizes)


def _row_tiles(elements: int, warps: int) -> tuple[Config, ...]:
    """By the columns of a band of x."""
    columns = (8, 16, 32, 64, 128, 256)
    return tuple(
        Config(BLOCK_R=elements // one, BLOCK_W=one, num_warps=warps, num_stages=1) for one in columns
    )  # fmt: skip


# A forward shares the work of a pixel's address among more elements of a thread; a backward by cells has several
# pixels a thread as it is.
LARGE = (*_pixel_tiles((32, 64, 4), (16, 128, 4), (64, 32, 4), (128, 16, 4), (256, 8, 4)), *_row_tiles(2048, 4))
SMALL = (*_pixel_tiles((16, 64, 4), (8, 128, 4), (32, 32, 4), (64, 16, 4), (128, 8, 4)), *_row_tiles(1024, 4))
OTHERS = (
    *_pixel_tiles((8, 64, 2), (8, 128, 2), (64, 16, 2), (128, 8, 2)), *_row_tiles(512, 2), *_row_tiles(1024, 2),
    *_row_tiles(4096, 8),
)  # fmt: skip
STRIDED = _pixel_tiles((128, 1, 4), (256, 1, 4), (64, 1, 2))
FORWARD_CONFIGS = LARGE + SMALL + OTHERS + STRIDED
BACKWARD_CONFIGS = SMALL + LARGE + OTHERS + STRIDED
GATHER_CONFIGS = tuple(config for config in BACKWARD_CONFIGS if "BLOCK_M" in config)
GLOBAL_CONFIGS = tuple(
    Config(BLOCK_L=l, BLOCK_C=c, SPLIT=split, num_warps=warps, num_stages=1)
    for l, c, warps in (
        # channels last
        (16, 64, 4), (8, 128, 4), (32, 32, 4), (64, 16, 4), (32, 64, 4), (128, 8, 4), (8, 64, 2),
        # NCHW
        (1024, 1, 4), (512, 2, 4), (256, 4, 4), (64, 16, 4), (2048, 1, 4), (512, 1, 2), (64, 32, 4), (1024, 4, 8),
    )
    for split in (1, 4, 16, 64)
)  # fmt: skip


def _name(values: Ints, rank: int) -> str:
    return "x".join(str(value) for value in values[3 - rank :])


def _features(p: PoolProblem) -> dict[str, int | str]:
    window = p.window
    return {
        "pixels": p.N * math.prod(p.out), "C": p.C, "width": p.space[2] if p.layout == "nchw" else 0,
        "taps": window.taps, "window": "adaptive" if window.adaptive else _name(window.kernel, p.rank),
        "stride": "" if window.adaptive else _name(window.stride, p.rank), "reduce": p.reduce,
        "dtype": dtype_name(p.dtype), "index": str(p.index_bytes), "layout": p.layout,
    }  # fmt: skip


def _accepts_pixels(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    """Channels last loads want a run of channels, and 16 bytes a thread; else pixels lie side by side."""
    if p.layout != "nhwc":
        return config.BLOCK_C == 1
    vec = unit_divisor(16 // p.dtype.itemsize, p.C)
    fills = config.BLOCK_M * config.BLOCK_C >= vec * device.warp_size * config.num_warps
    return fills and config.BLOCK_C > 1 and (config.BLOCK_C <= 8 or config.BLOCK_C < 2 * p.C)


def _accepts_rows(p: PoolProblem, config: Config, device: DeviceSpec, width: int) -> bool:
    """Bands as wide as the rows, or the widest; each thread loads 16 bytes, as far as rows allow it."""
    vec = unit_divisor(16 // p.dtype.itemsize, width)
    fits = config.BLOCK_W == min(256, max(8, 2 * _phases(p), _pow2(width)))
    fills = config.BLOCK_R * config.BLOCK_W >= vec * device.warp_size * config.num_warps
    rows = p.N * p.C * max(math.prod(p.space[:2]), math.prod(p.out[:2]))
    return p.layout == "nchw" and fits and fills and rows < 2**31


def _row_vectors(p: PoolProblem) -> tuple[int, int]:
    """Elements of a load along the rows of dense x and y."""
    x, y = (unit_divisor(16 // p.dtype.itemsize, size) for size in (p.space[2], p.out[2]))
    return x, y


def _row_width(p: PoolProblem) -> int:
    """Columns of x that a row needs, counted for the outputs over them too."""
    return max(p.space[2], p.out[2] * _phases(p))


def _accepts(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    if "BLOCK_W" not in config:
        return _accepts_pixels(p, config, device)
    span = _forward_span(p, config, *_row_vectors(p))
    fits = span.written > 0 and span.columns <= GATHER_RATIO * config.BLOCK_W
    return fits and _accepts_rows(p, config, device, _row_width(p))


def _accepts_backward(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    if "BLOCK_W" not in config:
        return _accepts_pixels(p, config, device)
    if not _has_cells(p, rows=True):
        return _accepts_rows(p, config, device, p.space[2]) and config.BLOCK_R * _band(p, config.BLOCK_W, 16) <= 8192
    return _accepts_rows(p, config, device, _row_width(p)) and _backward_span(p, config).written > 0


def _accepts_global(p: PoolProblem, config: Config, device: DeviceSpec) -> bool:
    L = math.prod(p.space)
    along, across, size = (config.BLOCK_L, config.BLOCK_C, L)
    if p.layout == "nhwc":
        along, across, size = (config.BLOCK_C, config.BLOCK_L, p.C)
    vec = unit_divisor(16 // p.dtype.itemsize, size)
    fills = along * across >= vec * device.warp_size * config.num_warps
    wide = along >= min(8, _pow2(size)) and (along <= 64 or along < 2 * size)
    return fills and wide and (config.SPLIT == 1 or config.SPLIT * config.BLOCK_L <= L)


def _stream(
    p: PoolProblem, config: Config, device: DeviceSpec, side: Ints, issued: float, dram: float
) -> Estimate:  # fmt: skip
    """Time of a pass whose programs walk ``side``, the output's or the input's pixels."""
    e = p.dtype.itemsize
    if "BLOCK_W" in config:
        rows, columns = p.N * p.C * side[0] * side[1], p.space[2]
        tiles, vec = cost.cdiv(columns, config.BLOCK_W), unit_divisor(16 // e, columns)
        programs = cost.cdiv(rows, config.BLOCK_R) * tiles
        waste = cost.cdiv(rows, config.BLOCK_R) * config.BLOCK_R * tiles * config.BLOCK_W / max(1, rows * columns)
        width = config.BLOCK_R * config.BLOCK_W * e * vec * e // 16
    else:
        pixels, columns = p.N * math.prod(side), cost.cdiv(p.C, config.BLOCK_C)
        programs = cost.cdiv(pixels, config.BLOCK_M) * columns
        waste = programs * config.BLOCK_M * config.BLOCK_C / max(1, p.C * pixels)
        width = config.BLOCK_M * config.BLOCK_C * e
        if config.BLOCK_C == 1:  # a load of one element takes as long as one of eight
            issued *= SCALAR_LOADS
    return cost.stream(
        device, programs=programs, issued_bytes=issued, dram_bytes=dram, config=config, tile_bytes=width, waste=waste
    )


def issued_forward(p: PoolProblem, config: Config) -> float:
    """Bytes that loads and stores move, if every tap lies in the image: the formulas of this file's head."""
    _, y = p.elements()
    stored = y * (p.dtype.itemsize + p.index_bytes)
    if "BLOCK_W" not in config:
        return float(y * p.window.taps * p.dtype.itemsize + stored)
    tiles = cost.cdiv(p.out[2], _forward_span(p, config, *_row_vectors(p)).written)
    band = p.space[2] if tiles == 1 else tiles * config.BLOCK_W
    rows = p.N * p.C * p.out[0] * p.out[1] * p.window.kernel[0] * p.window.kernel[1]
    return float(rows * band * p.dtype.itemsize + stored)


def issued_backward(p: PoolProblem, config: Config) -> float:
    """Bytes that loads and stores move, if every tap and every window lies in the image."""
    x, y = p.elements()
    e, most = p.dtype.itemsize, p.most_windows()
    saved = p.index_bytes + (e if p.reduce.startswith("norm") else 0)
    stored = x * e * (1 + (p.reduce == "norm2"))
    if "BLOCK_W" not in config:
        return float(y * p.window.taps * (e + saved) + stored)
    if _has_cells(p, rows=True):
        span = _backward_span(p, config)
        tiles = cost.cdiv(cost.cdiv(p.space[2], p.window.stride[2]), span.written)
        band, rows = (tiles * span.columns), p.N * p.C * p.out[0] * p.out[1] * p.window.kernel[0] * p.window.kernel[1]
    else:
        tiles = cost.cdiv(p.space[2], config.BLOCK_W)
        band, rows = tiles * _band(p, config.BLOCK_W, 16), p.N * p.C * p.space[0] * p.space[1] * most[0] * most[1]
    return float(rows * (p.out[2] if tiles == 1 else band) * (e + saved) + stored)


def _forward_estimate(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    return _stream(p, config, device, p.out, issued_forward(p, config), p.forward_bytes())


def _backward_estimate(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    return _stream(p, config, device, p.space, issued_backward(p, config), p.backward_bytes())


def _gather_estimate(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    _, y = p.elements()
    moved = float(y * (2 * p.dtype.itemsize + p.index_bytes))
    return _stream(p, config, device, p.out, moved, moved)


def issued_global(p: PoolProblem, config: Config) -> float:
    rows, split = p.N * p.C, _splits(p, config)
    parts = 0 if split == 1 else 2 * split * rows * (4 + 4 * (p.index_bytes > 0))
    return p.forward_bytes() + parts


def _global_estimate(p: PoolProblem, config: Config, device: DeviceSpec) -> Estimate:
    L, rows = math.prod(p.space), p.N * p.C
    tiles = p.N * cost.cdiv(p.C, config.BLOCK_C) if p.layout == "nhwc" else cost.cdiv(rows, config.BLOCK_C)
    covered = tiles * config.BLOCK_C * cost.cdiv(L, config.BLOCK_L * config.SPLIT) * config.BLOCK_L * config.SPLIT
    moved = issued_global(p, config)
    estimate = cost.stream(
        device, programs=tiles * config.SPLIT, issued_bytes=moved, dram_bytes=moved, config=config,
        tile_bytes=config.BLOCK_L * config.BLOCK_C * p.dtype.itemsize, waste=covered / max(1, L * rows),
    )  # fmt: skip
    # A program waits for its own loads, one tile after the other.
    steps = cost.cdiv(L, config.BLOCK_L * config.SPLIT)
    extra = cost.LAUNCH_US * (config.SPLIT > 1)
    return Estimate(max(estimate.us, cost.LAUNCH_US + steps * cost.ITERATION_LATENCY_US) + extra, estimate.bound)


def _meta(p: PoolProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, y and the winners."""

    def tensor(space: Ints) -> torch.Tensor:
        space = space[3 - p.rank :]
        if p.layout == "nhwc":
            return torch.empty((p.N, *space, p.C), dtype=p.dtype, device="meta").movedim(-1, 1)
        return torch.empty((p.N, p.C, *space), dtype=p.dtype, device="meta")

    y = tensor(p.out)
    return tensor(p.space), y, torch.empty_like(y, dtype=INDEX_DTYPES[p.index_bytes]) if p.index_bytes else None


def _forward_launches(p: PoolProblem, config: Config) -> list[Launch]:
    return plan_forward(p, config, *_meta(p))


def _global_launches(p: PoolProblem, config: Config) -> list[Launch]:
    return plan_global(p, config, *_meta(p))


def _backward_launches(p: PoolProblem, config: Config) -> list[Launch]:
    x, y, index = _meta(p)
    saved = (y, x) if p.reduce.startswith("norm") else (None, None)
    return plan_backward(p, config, y, index, *saved, x)


def _unpool_launches(p: PoolProblem, config: Config) -> list[Launch]:
    x, y, index = _meta(p)
    assert index is not None
    return plan_unpool(p, config, y, index, x)


def _gather_launches(p: PoolProblem, config: Config) -> list[Launch]:
    x, y, index = _meta(p)
    assert index is not None
    return plan_gather(p, config, x, index, y)


FORWARD = register(Tunable("pool", FORWARD_CONFIGS, _features, _accepts, _forward_estimate, _forward_launches))
GLOBAL = register(
    Tunable("global_pool", GLOBAL_CONFIGS, _features, _accepts_global, _global_estimate, _global_launches)
)
BACKWARD = register(
    Tunable("pool_backward", BACKWARD_CONFIGS, _features, _accepts_backward, _backward_estimate, _backward_launches)
)
UNPOOL = register(
    Tunable("max_unpool", BACKWARD_CONFIGS, _features, _accepts_backward, _backward_estimate, _unpool_launches)
)
GATHER = register(
    Tunable("pool_gather", GATHER_CONFIGS, _features, _accepts_pixels, _gather_estimate, _gather_launches)
)


# --- calls -----------------------------------------------------------------------------------------------------------


def problem_of(
    x: torch.Tensor, out: Sequence[int], window: Window, reduce: str, *, index_bytes: int = 0,
    include_pad: bool = True, divisor: int = 0, layout: str,
) -> PoolProblem:  # fmt: skip
    """The problem between x, or a tensor like it, and the sizes ``out`` in space."""
    n, c, *space = x.shape
    full = tuple((*(1 for _ in range(3 - len(sizes))), *sizes) for sizes in (space, tuple(out)))
    return PoolProblem(
        n, c, *full, len(space), window, reduce, include_pad, divisor, x.dtype, index_bytes, layout
    )  # fmt: skip


def forward_of(x: torch.Tensor, problem: PoolProblem) -> tuple[Tunable, PoolProblem]:
    """The kernel that runs a forward, and the problem as it sees it."""
    if problem.is_global():
        pixel = plane_stride(x)
        if pixel == 1 or (pixel and (x.shape[1] == 1 or x.stride(1) == 1)):
            return GLOBAL, problem._replace(layout="nchw" if pixel == 1 else "nhwc")
    return FORWARD, problem


def run_forward(
    x: torch.Tensor, y: torch.Tensor, index: torch.Tensor | None, window: Window, reduce: str, *,
    include_pad: bool = True, divisor: int = 0, is_channels_last: bool,
) -> None:  # fmt: skip
    """Fills y, and the winners if there is a tensor for them (int64: places in the image, else taps)."""
    problem = problem_of(
        x, y.shape[2:], window, reduce, index_bytes=0 if index is None else index.dtype.itemsize,
        include_pad=include_pad, divisor=divisor, layout=layout_of(x, is_channels_last),
    )  # fmt: skip
    tunable, problem = forward_of(x, problem)
    launch(tunable, plan_global if tunable is GLOBAL else plan_forward, problem, x, y, index)


def run_backward(
    dy: torch.Tensor, index: torch.Tensor | None, y: torch.Tensor | None, x: torch.Tensor | None, dx: torch.Tensor,
    window: Window, reduce: str, *, include_pad: bool = True, divisor: int = 0, is_channels_last: bool,
) -> None:  # fmt: skip
    """Fills dx. ``"max"`` reads the winners, norms read y and x."""
    problem = gathering(dy, index, y, x, dx, window, reduce, is_channels_last)
    launch(BACKWARD, plan_backward, problem._replace(include_pad=include_pad, divisor=divisor), dy, index, y, x, dx)


def run_unpool(
    x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, window: Window, *, is_channels_last: bool
) -> None:  # fmt: skip
    """Fills y with zeros and, where an int64 index names a place, x. The last of equal indices wins."""
    problem = gathering(x, index, None, None, y, window, "last", is_channels_last)
    launch(UNPOOL, plan_unpool, problem, x, index, y)


def gathering(
    dy: torch.Tensor, index: torch.Tensor | None, y: torch.Tensor | None, x: torch.Tensor | None, dx: torch.Tensor,
    window: Window, reduce: str, is_channels_last: bool,
) -> PoolProblem:  # fmt: skip
    """Rows are walked where all tensors have them."""
    if is_channels_last and dx.shape[1] > 1:
        layout = "nhwc"
    else:
        dense = all(t.is_contiguous() for t in (index, y) if t is not None)
        rows = all(layout_of(t, False) == "nchw" for t in (dy, x) if t is not None)
        layout = "nchw" if dense and rows else "strided"
    index_bytes = 0 if index is None else index.dtype.itemsize
    return problem_of(dx, dy.shape[2:], window, reduce, index_bytes=index_bytes, layout=layout)


def run_gather(
    x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, window: Window, *, is_channels_last: bool
) -> None:  # fmt: skip
    """Fills y with what x holds at the places of the winners."""
    layout = "nhwc" if is_channels_last and x.shape[1] > 1 else "strided"
    problem = problem_of(x, y.shape[2:], window, "max", index_bytes=index.dtype.itemsize, layout=layout)
    launch(GATHER, plan_gather, problem, x, index, y)
