r"""Pooling forward: kernels that walk pixels by channels, rows, and whole planes.

    REDUCE   max      the first of equal values wins, a NaN over everything, the last NaN over the others; a window of
                      -inf yields its first tap inside the image, one without a tap there -inf and no winner
             mean     sum / DIVISOR, or / the number of elements of the window (with INCLUDE_PAD those in the padding)
             norm1    K * mean, with K = T*R*S
             norm2    sqrt(K * mean(x^2))

Those are torch's rules; :mod:`.pool_windows` says where the windows lie. Sums are in fp32 and rounded once.

What the backward of a maximum needs is the winner's tap, (t*R + r)*S + s, and that fits one byte for windows of up to
254 taps (two bytes, four bytes beyond; NONE = no tap inside the image). torch keeps an int64 index: eight bytes.
``return_indices`` writes those, and then backward reads those.

Bytes (i: bytes of an index, 0 where none is kept; e: bytes an element). What must come from memory once is
|x| + |y| + i*N*C*Z*P*Q. What the load and store instructions move, where neighbouring windows hit the L1 cache:

    pixels x channels     taps inside the image * e + (e + i) for each output
    rows                  taps of a column (T*R) * e for each element of the bands, + (e + i) for each output
    whole planes          |x| + |y| + i*N*C, and 8 to 12 bytes for each part of a plane that is split

Two forms serve the two layouts. Channels last, a tile is pixels x channels, and a tap is one load of 16 bytes along the
channels. In NCHW a tile is rows of the output: bands of whole rows are loaded 16 bytes at a time and reduced over the
rows of the windows; then, in registers, over their columns, which other lanes hold (``tl.gather``).

Each element is written once, by one program, which adds in a fixed order. No atomics.
"""

import triton
import triton.language as tl

from ._math import below, column_sum, narrow, position, tile_offsets
from .pool_windows import SIZES, STRIDES, counted_elements, mean_divisor, shifted_columns, summand, tap_place, window_of


@triton.jit
def _mean_or_norm(total, divisor, REDUCE: tl.constexpr, K: tl.constexpr):
    """The mean or norm of a window from its sum. K is the number of elements of a whole window."""
    if REDUCE == "mean":
        return tl.div_rn(total, divisor)
    else:
        total *= tl.div_rn(tl.zeros_like(divisor) + K, divisor)
        return tl.sqrt_rn(total) if REDUCE == "norm2" else total


@triton.jit
def _larger(a, b):
    """The larger of two values, or a NaN if there is one; ``a`` if they are equal."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _winner_of_two(a, tap_a, b, tap_b):
    """The winner of two values with their taps, which may come in either order, and its tap. Of equal values the
    smaller tap wins, of NaNs the larger; a tap below 0 is none."""
    take = (tap_a < 0) | (b > a) | ((b == a) & (tap_b < tap_a)) | ((b != b) & ((a == a) | (tap_b > tap_a)))
    take &= tap_b >= 0
    return tl.where(take, b, a), tl.where(take, tap_b, tap_a)


@triton.jit
def _merge(a, tap_a, b, tap_b, INDEX: tl.constexpr, REDUCE: tl.constexpr):
    """Two partial reductions as one. To reduce rows first and columns second is not the order of the taps, so where an
    index is kept equals and NaNs are told apart by their taps; without one, only the sign of equal zeros can differ."""
    if REDUCE != "max":
        return a + b, tap_a
    elif INDEX:
        return _winner_of_two(a, tap_a, b, tap_b)
    else:
        return _larger(a, b), tap_a


@triton.jit
def _fold(x, tap, PHASES: tl.constexpr, INDEX: tl.constexpr, REDUCE: tl.constexpr):
    """x [rows, columns * PHASES] reduced to [rows, columns], each from neighbours that lie in one thread."""
    if PHASES > 1:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        tap_a, tap_b = tl.split(tl.reshape(tap, (tap.shape[0], tap.shape[1] // 2, 2)))
        x, tap = _merge(a, tap_a, b, tap_b, INDEX, REDUCE)
        return _fold(x, tap, PHASES // 2, INDEX, REDUCE)
    else:
        return x, tap


@triton.jit
def _store_winner(index_ptr, offsets, tap, flat, mask, NONE: tl.constexpr):
    """Stores the winner's place in the image as an int64 index, else its tap; a negative tap, no winner, as NONE."""
    if index_ptr.dtype.element_ty == tl.int64:
        tl.store(index_ptr + offsets, flat, mask=mask)
    else:
        tl.store(index_ptr + offsets, tl.where(tap < 0, NONE, tap).to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _flat_index(tap, d0, h0, w0, H, W, R, S, DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr):
    """The place of a tap in the image as a flat int64 index; (d0, h0, w0) is the corner of its window."""
    d = d0 + tap // S // R * DIL_D
    h = h0 + tap // S % R * DIL_H
    return (d.to(tl.int64) * H + h) * W + w0 + tap % S * DIL_W


# --- pixels by channels ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def pool_kernel(
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
    """x to y and, if index_ptr is given, to the winners: small integers name a tap of the window, int64 a place in the
    image. The index has y's strides. M counts the pixels of y. Adaptive windows have at most
    largest_d x largest_h x largest_w taps, and T, R and S mean nothing."""
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
    d0, size_d = window_of(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
    h0, size_h = window_of(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
    w0, size_w = window_of(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
    LOWEST: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    acc = tl.full((BLOCK_M, BLOCK_C), LOWEST, dtype=tl.float32)
    winner = tl.full((BLOCK_M, BLOCK_C), -1, dtype=tl.int32)
    for t in range(taps_d):
        for r in range(taps_h):
            for s in range(taps_w):
                d, in_d = tap_place(d0, size_d, t, D, DIL_D, ADAPTIVE)
                h, in_h = tap_place(h0, size_h, r, H, DIL_H, ADAPTIVE)
                w, in_w = tap_place(w0, size_w, s, W, DIL_W, ADAPTIVE)
                inside = (mask_m & in_h & in_w)[:, None]
                if RANK == 3:
                    inside &= in_d[:, None]
                off = tile_offsets(
                    n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, X_UNIT_C
                )
                x = tl.load(x_ptr + off, mask=inside & mask_c[None, :], other=LOWEST)  # [BLOCK_M, BLOCK_C]
                x = x.to(tl.float32)
                if REDUCE == "max":
                    take = (x > acc) | (x != x)
                    if index_ptr is not None:
                        take |= inside & (winner < 0)
                        winner = tl.where(take, (t * taps_h + r) * taps_w + s, winner)
                    acc = tl.where(take, x, acc)
                else:
                    acc += summand(x, REDUCE)
    if REDUCE != "max":
        count_d = counted_elements(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
        count_h = counted_elements(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
        count_w = counted_elements(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)
        acc = _mean_or_norm(acc, mean_divisor(count_d, count_h, count_w, DIVISOR)[:, None], REDUCE, T * R * S)
    mask = mask_m[:, None] & mask_c[None, :]
    y_off = tile_offsets(n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
    tl.store(y_ptr + y_off, narrow(acc, y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        flat = _flat_index(winner, d0[:, None], h0[:, None], w0[:, None], H, W, taps_h, taps_w, DIL_D, DIL_H, DIL_W)
        _store_winner(index_ptr, y_off, winner, flat, mask, NONE)


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["C", *SIZES, *STRIDES])
def pool_rows_kernel(
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
    """The elements of a row of x are neighbours in memory; y and the winners are dense NCHW. A program takes BLOCK_R of
    the M rows of the output and in each of them ``span`` columns, whose windows lie in a band of BLOCK_W columns of x.
    It reduces the band over the rows of the windows first, and then over their columns.

    With PHASES = STRIDE_W output q lies over columns q*PHASES + phase of the band. Taps at one distance of q, counted
    in PHASES, are neighbours in one thread and are reduced where they are; only the result of each distance is shifted
    to its q. With PHASES = 0 windows may begin anywhere, and each of their columns is fetched by itself.
    """
    taps_d = largest_d if ADAPTIVE and RANK == 3 else T
    taps_h = largest_h if ADAPTIVE else R
    taps_w = largest_w if ADAPTIVE else S
    tiles_q = tl.cdiv(Q, span)
    row = tl.program_id(0) // tiles_q * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_row = row < M
    plane, z, p = row // (Z * P), row // P % Z, row % P
    n, c = plane // C, plane % C
    d0, size_d = window_of(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
    h0, size_h = window_of(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)

    q0 = tl.program_id(0) % tiles_q * (span // Y_VEC) * Y_VEC
    lane = tl.arange(0, BLOCK_Q) - LEAD
    q = q0 + lane
    if PHASES > 0:
        band = q0 * PHASES // X_VEC * X_VEC - LEAD * PHASES
    else:
        band, _ = window_of(q0, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
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
            d, in_d = tap_place(d0, size_d, t, D, DIL_D, ADAPTIVE)
            h, in_h = tap_place(h0, size_h, r, H, DIL_H, ADAPTIVE)
            inside = (mask_row & in_h)[:, None]
            if RANK == 3:
                inside &= in_d[:, None]
            off = (n.to(tl.int64) * stride_xn + c.to(tl.int64) * stride_xc + d * stride_xd + h * stride_xh) * X_VEC
            mask = inside & mask_col[None, :]
            x = tl.load(x_ptr + off[:, None] + col[None, :], mask=mask, other=LOWEST)  # [BLOCK_R, BLOCK_W]
            x = x.to(tl.float32)
            if REDUCE == "max":
                take = (x > column) | (x != x)
                if index_ptr is not None:
                    take |= inside & (row_tap < 0)
                    row_tap = tl.where(take, t * taps_h + r, row_tap)
                column = tl.where(take, x, column)
            else:
                column += summand(x, REDUCE)

    acc = tl.full((BLOCK_R, BLOCK_Q), LOWEST, dtype=tl.float32)
    winner = tl.full((BLOCK_R, BLOCK_Q), -1, dtype=tl.int32)
    w0, size_w = window_of(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
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
            x = tl.where(in_band, shifted_columns(x, FIRST + i), LOWEST)
            if index_ptr is not None:
                tap = tl.where(in_band, shifted_columns(tap, FIRST + i), -1)
            acc, winner = _merge(acc, winner, x, tap, index_ptr is not None, REDUCE)
    else:
        for s in range(taps_w):
            w, in_w = tap_place(w0, size_w, s, W, DIL_W, ADAPTIVE)
            at = tl.minimum(tl.maximum(w - band, 0), BLOCK_W - 1)
            at = tl.broadcast_to(at[None, :], (BLOCK_R, BLOCK_Q))
            x = tl.where(in_w[None, :], tl.gather(column, at, 1), LOWEST)
            tap = winner
            if index_ptr is not None:
                row_of = tl.gather(row_tap, at, 1)
                tap = tl.where(in_w[None, :] & (row_of >= 0), row_of * taps_w + s, -1)
            acc, winner = _merge(acc, winner, x, tap, index_ptr is not None, REDUCE)
    if REDUCE != "max":
        count_d = counted_elements(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
        count_h = counted_elements(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
        count_w = counted_elements(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)
        if RANK == 3:
            count_h = count_h * count_d
        acc = _mean_or_norm(acc, mean_divisor(1, count_h[:, None], count_w[None, :], DIVISOR), REDUCE, T * R * S)
    y_off = (row.to(tl.int64) * (Q // Y_VEC) * Y_VEC)[:, None] + q[None, :]
    mask = mask_row[:, None] & ((lane >= 0) & below(lane, span, Y_VEC) & below(q, Q, Y_VEC))[None, :]
    tl.store(y_ptr + y_off, narrow(acc, y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        flat = _flat_index(winner, d0[:, None], h0[:, None], w0[None, :], H, W, taps_h, taps_w, DIL_D, DIL_H, DIL_W)
        _store_winner(index_ptr, y_off, winner, flat, mask, NONE)


# --- whole planes ----------------------------------------------------------------------------------------------------


@triton.jit
def _winner_of_lanes(best, place):
    """The value and the place that win in each column of ``best`` [rows, columns], whose rows hold the winners of their
    own elements; a place below 0 means that a row has none."""
    is_nan = best != best
    top = tl.max(tl.where(is_nan, float("-inf"), best), axis=0)
    last_nan = tl.max(tl.where(is_nan, place, -1), axis=0)
    first = tl.min(tl.where((best == top[None, :]) & (place >= 0), place, 2147483647), axis=0)
    winner = tl.where(last_nan < 0, first, last_nan)
    # The winner's own bits: of equal zeros the first has its sign.
    bits = tl.where(place == winner[None, :], best.to(tl.int32, bitcast=True), -2147483648)
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True), winner


@triton.jit(do_not_specialize=["C", "L", "rows", "splits", "stride_xn", "stride_xc", "stride_xl"])
def global_pool_kernel(
    x_ptr, y_ptr, index_ptr, partial_ptr, partial_index_ptr,
    C, L, rows, splits,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xl: tl.int64,
    REDUCE: tl.constexpr, DIVISOR: tl.constexpr, VEC: tl.constexpr, UNIT_C: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [N, C, L] to y [N, C], where one window is the whole plane; rows = N*C. With splits > 1 every program reduces a
    part of the plane into partial [splits, N, C], and :func:`combine_planes_kernel` reduces those."""
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
        x = tl.load(x_ptr + off, mask=mask, other=LOWEST).to(tl.float32)  # [BLOCK_L, BLOCK_C]
        if REDUCE == "max":
            take = (x > acc) | (x != x) | (mask & (place < 0))
            place = tl.where(take, l[:, None], place)
            acc = tl.where(take, x, acc)
        else:
            acc += summand(x, REDUCE)
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
    """Stores the mean or norm of a plane from its sum ``result``, or its maximum with the place ``winner``."""
    if REDUCE != "max":
        divisor = tl.zeros_like(result) + (DIVISOR if DIVISOR != 0 else L)
        result = tl.div_rn(result, divisor) if REDUCE == "mean" else result
        result = tl.sqrt_rn(result) if REDUCE == "norm2" else result
    tl.store(y_ptr + row, narrow(result, y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        tl.store(index_ptr + row, winner.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "rows", "splits"])
def combine_planes_kernel(
    y_ptr, index_ptr, partial_ptr, partial_index_ptr, L, rows, splits, REDUCE: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduces partial [splits, rows], what :func:`global_pool_kernel` left of each part of a plane, in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    LOWEST: tl.constexpr = float("-inf") if REDUCE == "max" else 0.0
    acc = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    winner = tl.full((BLOCK,), -1, dtype=tl.int32)
    for split in range(0, splits):
        off = tl.cast(split, tl.int64) * rows + row
        x = tl.load(partial_ptr + off, mask=mask, other=0.0)  # [BLOCK]
        if REDUCE == "max":
            take = (x > acc) | (x != x)
            if index_ptr is not None:
                take |= winner < 0
                winner = tl.where(take, tl.load(partial_index_ptr + off, mask=mask, other=0), winner)
            acc = tl.where(take, x, acc)
        else:
            acc += x
    _store_plane(y_ptr, index_ptr, row, acc, winner, mask, L, REDUCE, DIVISOR)
