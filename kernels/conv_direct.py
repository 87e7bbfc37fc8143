r"""Convolution without matrix products, for groups of 1, 2, 4 or 8 channels: depthwise, multipliers, small groups.

    y[n,k,z,p,q] = act(scale[k] * sum_{c,t,r,s} x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H,
                                                  q*STRIDE_W - PAD_W + s*DIL_W] * w[k,c,t,r,s]
                       + bias[k] + residual[n,k,z,p,q])

The letters are those of :mod:`.conv`: C and K count one group's channels. So few channels meet in a sum that tensor
cores would multiply mostly zeros; here every product is an fp32 FMA, and what limits a kernel is how many instructions
it spends beside them. Each form saves those by keeping in registers what several sums share:

    channels last    8 channels a thread. ROWS rows of outputs are summed together, and a row of x is loaded once for
                     all of them. Of a group of several channels a thread holds all, so one load serves K filters.
    rows             NCHW. RUN neighbouring outputs a thread; the columns of x that their windows share are loaded as
                     aligned runs and picked apart in registers.
    transpose        with a stride: each program writes the block of STRIDE_H * STRIDE_W pixels that share the same
                     inputs. Without a stride the transpose is a convolution with the window turned over.
    weight gradient  channels last walks along a row of outputs, so a column of x enters once and serves S taps as the
                     window slides over it; NCHW holds runs of x and g. Only C = 1: groups of several channels are
                     merged into matrices by :mod:`.conv`.

Bytes. What must come from memory once is |x| + |w| + |y|. What the load and store instructions move, with e bytes an
element, G groups, T_m tiles of outputs and 4 bytes a weight, is at most (what lies outside the image is not loaded, and
neighbours find most of it in the L1 cache)

    channels last    T*S*J/ROWS * |y|*C/K + 4*T_m * T*R*S*C*K*G + |y|     (J rows of x meet ROWS rows of outputs:
                                                                          ROWS + R - 1 without stride and dilation)
    rows             T*R*L * |y|*C + 4*programs * T*R*S*C + |y|           (L runs of x lie under a run's windows)
    transpose        T*A*B/(STRIDE_H*STRIDE_W) * |x|*K/C + 4*T_m * T*R*S*C*K*G + |x|    (A x B inputs reach a block)
    weight gradient  T*R * (min(S, STRIDE_W/DIL_W) * |y|/K + |y|) + 8*splits * T*R*S*K*G + |w|
                     T*R * (L + 1) * |y| + 8*splits * T*R*S*K*G + |w|     (NCHW)

Strides of channels-last tensors count units of VEC elements, as in :mod:`.conv`. Deterministic: gathers only; the
weight gradient adds its partial sums in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ._launch import Launch, launch, layout_strides, raw_strides, readable, row_alignment, unit_divisor
from ._math import below, column_sum, only_if, position, tile_offsets
from .conv import (
    SIZES,
    X_STRIDES,
    Y_STRIDES,
    ConvProblem,
    Epilogue,
    Geometry,
    channels_last,
    empty_output,
    epilogue,
    features,
    meta_tensors,
    prepare,
    problem_of,
    sum_splits,
)

CHANNELS = (1, 2, 4, 8)  # of a group, and filters of a group, that the kernels know
MAX_BLOCK, MAX_PRODUCTS = 16, 256  # outputs and products of one position that the transpose writes out
MAX_ROWS = tl.constexpr(8)  # window rows, or columns, that are held in registers at once; larger windows are cut


# --- tiles in registers ----------------------------------------------------------------------------------------------


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def _channel(x, c: tl.constexpr, C: tl.constexpr):
    """Columns c, c + C, c + 2*C, ... of a tile: channel c of every group. Free if a thread holds C columns."""
    for bit in tl.static_range(_log2(C)):
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        if c >> bit & 1:
            x = odd
        else:
            x = even
    return x


@triton.jit
def _repeat(x, TIMES: tl.constexpr):
    """Every column of a tile TIMES times, in place: one for each filter of a group."""
    for _ in tl.static_range(_log2(TIMES)):
        x = tl.reshape(tl.join(x, x), (x.shape[0], 2 * x.shape[1]))
    return x


@triton.jit
def _unpack(x):
    """The columns of a tile [M, V], V vectors. Free if a thread holds whole rows."""
    columns = (x,)
    for _ in tl.static_range(_log2(x.shape[1])):
        evens = ()
        odds = ()
        for i in tl.static_range(len(columns)):
            even, odd = tl.split(tl.reshape(columns[i], (x.shape[0], columns[i].shape[1] // 2, 2)))
            evens += (even,)
            odds += (odd,)
        columns = evens + odds
    vectors = ()
    for i in tl.static_range(len(columns)):
        vectors += (tl.reshape(columns[i], (x.shape[0],)),)
    return vectors


@triton.jit
def _pack(columns):
    """The tile whose columns these vectors are: :func:`_unpack` undone."""
    tiles = ()
    for i in tl.static_range(len(columns)):
        tiles += (tl.reshape(columns[i], (columns[i].shape[0], 1)),)
    for _ in tl.static_range(_log2(len(columns))):
        pairs = ()
        for i in tl.static_range(len(tiles) // 2):
            pair = tl.join(tiles[i], tiles[i + len(tiles) // 2])
            pairs += (tl.reshape(pair, (pair.shape[0], 2 * pair.shape[1])),)
        tiles = pairs
    return tiles[0]


@triton.jit
def _within(i, size):
    """0 <= i < size in one comparison: as an unsigned number a negative one is large."""
    return i.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """Sums of nothing yet: COUNT fp32 tiles."""
    accs = ()
    for _ in tl.static_range(COUNT):
        accs += (tl.zeros(SHAPE, dtype=tl.float32),)
    return accs


# What the geometry decides, as constants.


@triton.constexpr_function
def _cut(size, limit):
    """The size of equal blocks, at most ``limit``, that cover ``size``."""
    blocks = -(-size // limit)
    return -(-size // blocks)


@triton.constexpr_function
def _reads_row(j, rows, first, block, window, stride, dil):
    """Does row j of x meet one of ``rows`` rows of outputs under a tap of first ... first + block - 1?"""
    taps = range(first, min(first + block, window))
    return any(row * stride + tap * dil == j for row in range(rows) for tap in taps)


@triton.constexpr_function
def _first_run(run, pad):
    """The first run of columns under the windows of a run of outputs; run 0 starts at the first output's column."""
    return -pad // run


@triton.constexpr_function
def _last_run(run, window, stride, pad, dil):
    return ((run - 1) * stride + (window - 1) * dil - pad) // run


@triton.constexpr_function
def _reads_run(i, run, window, stride, pad, dil):
    """Does run i hold a column that a window looks at?"""
    columns = (j * stride + tap * dil - pad for j in range(run) for tap in range(window))
    return any(column // run == i for column in columns)


@triton.constexpr_function
def _adds(tap, output, stride, pad, dil):
    """Does a tap of the transpose add to output ``output`` of a block of ``stride``?"""
    return (tap * dil - pad) % stride == output


@triton.constexpr_function
def _block_input(tap, stride, pad, dil):
    """The input that the tap multiplies for it, counted from the one with the block's number."""
    return -((tap * dil - pad) // stride)


@triton.constexpr_function
def _reads_input(i, window, stride, pad, dil):
    """Does a tap multiply that input?"""
    return any((tap * dil - pad) // stride == -i for tap in range(window))


# --- channels last ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES, "columns"])
def _direct_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
    M, D, H, W, Z, P, Q, columns,
    stride_xn: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    C: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr,
    X_VEC: tl.constexpr, Y_VEC: tl.constexpr, TURNED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M positions, each of ROWS outputs below one another, by BLOCK_C filters. The loop runs over the window's
    planes and columns; its rows are written out, for which rows of x meet which rows of outputs is known here. How many
    columns there are is not: a loop of known length is unrolled, with the loads of all columns in registers."""
    FILTERS: tl.constexpr = K * GROUPS
    TILES_C: tl.constexpr = (FILTERS + BLOCK_C - 1) // BLOCK_C
    BLOCK_X: tl.constexpr = BLOCK_C // K * C
    BLOCK_R: tl.constexpr = _cut(R, MAX_ROWS)
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    c = pid % TILES_C * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_m = offs_m < M
    mask_k = k < FILTERS
    mask_c = c < C * GROUPS
    n, z, i, q = position(offs_m, Z, tl.cdiv(P, ROWS), Q, RANK)
    d0 = z * STRIDE_D - PAD_D
    h0 = i * (ROWS * STRIDE_H) - PAD_H
    w0 = q * STRIDE_W - PAD_W
    corner = n.to(tl.int64) * stride_xn + d0.to(tl.int64) * stride_xd
    corner += h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
    x_ptrs = x_ptr + (corner * X_VEC)[:, None] + c[None, :]
    accs = _zeros(ROWS, (BLOCK_M, BLOCK_C))
    for first in tl.static_range(0, R, BLOCK_R):
        for step in range(1 if T * S == 1 else columns):
            t = step // S
            s = step % S
            mask = mask_m & _within(w0 + s * DIL_W, W)
            if RANK == 3:
                mask &= _within(d0 + t * DIL_D, D)
            xs = ()
            for j in tl.static_range((ROWS - 1) * STRIDE_H + (R - 1) * DIL_H + 1):
                if _reads_row(j, ROWS, first, BLOCK_R, R, STRIDE_H, DIL_H):
                    shift = (t * DIL_D * stride_xd + j * stride_xh + s * DIL_W * stride_xw) * X_VEC
                    mask_x = (mask & _within(h0 + j, H))[:, None] & mask_c[None, :]
                    xs += (tl.load(x_ptrs + shift, mask=mask_x, other=0.0),)  # [BLOCK_M, BLOCK_X]
                else:
                    xs += (0.0,)
            for channel in tl.static_range(C):
                for r in tl.static_range(BLOCK_R):
                    if first + r < R:
                        tap = (t * R + first + r) * S + s
                        if TURNED:
                            tap = T * R * S - 1 - tap
                        w = tl.load(w_ptr + (tap * C + channel) * FILTERS + k, mask=mask_k, other=0.0)
                        sums = ()
                        for row in tl.static_range(ROWS):
                            x = _channel(xs[row * STRIDE_H + (first + r) * DIL_H], channel, C)
                            sums += (accs[row] + _repeat(x, K).to(tl.float32) * w[None, :],)
                        accs = sums
    for row in tl.static_range(ROWS):
        p = i * ROWS + row
        y_off = tile_offsets(n, z, p, q, k, stride_yn, 1, stride_yz, stride_yp, stride_yq, Y_VEC, True)
        mask = (mask_m & (p < P))[:, None] & mask_k[None, :]
        epilogue(accs[row], k, y_off, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr, mask_k, ACTIVATION)


# --- rows: NCHW ------------------------------------------------------------------------------------------------------


@triton.jit
def _load_columns(
    x_ptr, row, q, mask, W, stride_xw, S: tl.constexpr, STRIDE_W: tl.constexpr, PAD_W: tl.constexpr,
    DIL_W: tl.constexpr, X_VEC: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The columns of x under the windows of the RUN outputs q*RUN ..., a vector each. They are loaded as whole runs:
    where the rows of x start on a multiple of RUN, that is one load a run."""
    FIRST: tl.constexpr = _first_run(RUN, PAD_W)
    LAST: tl.constexpr = _last_run(RUN, S, STRIDE_W, PAD_W, DIL_W)
    columns = ()
    for i in tl.static_range(LAST - FIRST + 1):
        if _reads_run(FIRST + i, RUN, S, STRIDE_W, PAD_W, DIL_W):
            run = q * STRIDE_W + (FIRST + i)
            w = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
            if X_VEC == RUN:
                inside = _within(run, W // RUN)[:, None]
            else:
                inside = _within(w, W)
            if RUN == 1:
                w = w.to(tl.int64) * stride_xw
            x = tl.load(x_ptr + row[:, None] * X_VEC + w, mask=mask[:, None] & inside, other=0.0)
            columns += _unpack(x)
        else:
            for _ in tl.static_range(RUN):
                columns += (0.0,)
    return columns


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES, "rows"])
def _direct_rows_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
    D, H, W, Z, P, Q, rows,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64,
    C: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_VEC: tl.constexpr, Y_VEC: tl.constexpr, TURNED: tl.constexpr, ACTIVATION: tl.constexpr,
    RUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """BLOCK_P rows of BLOCK_Q runs of one filter's outputs: the position of a run costs no division. The loop runs over
    the ``rows`` of the window, plane by plane and channel by channel; its columns are written out."""
    FILTERS: tl.constexpr = K * GROUPS
    pid = tl.program_id(0)
    tiles_q = tl.cdiv(Q, RUN * BLOCK_Q)
    tiles_p = tl.cdiv(P, BLOCK_P)
    m = tl.arange(0, BLOCK_P * BLOCK_Q)
    q = pid % tiles_q * BLOCK_Q + m % BLOCK_Q
    p = pid // tiles_q % tiles_p * BLOCK_P + m // BLOCK_Q
    plane = pid // tiles_q // tiles_p
    z = plane % Z
    k = plane // Z % FILTERS
    n = plane // Z // FILTERS
    mask_m = (p < P) & (q * RUN < Q)
    h0 = p * STRIDE_H - PAD_H
    d0 = z * STRIDE_D - PAD_D
    image = n.to(tl.int64) * stride_xn + k // K * C * stride_xc + d0 * stride_xd
    row = image + h0.to(tl.int64) * stride_xh
    accs = _zeros(RUN, (BLOCK_P * BLOCK_Q,))
    for step in range(1 if T * R * C == 1 else rows):
        c = step % C
        r = step // C % R
        t = step // C // R
        h = h0 + r * DIL_H
        d = d0 + t * DIL_D
        mask = only_if(mask_m & _within(h, H), (d >= 0) & (d < D))
        shifted = row + (t * DIL_D * stride_xd + r * DIL_H * stride_xh + c * stride_xc)
        xs = _load_columns(x_ptr, shifted, q, mask, W, stride_xw, S, STRIDE_W, PAD_W, DIL_W, X_VEC, RUN)
        for s in tl.static_range(S):
            tap = (t * R + r) * S + s
            if TURNED:
                tap = T * R * S - 1 - tap
            w = tl.load(w_ptr + (tap * C + c) * FILTERS + k)
            sums = ()
            for j in tl.static_range(RUN):
                x = xs[j * STRIDE_W + s * DIL_W - PAD_W - _first_run(RUN, PAD_W) * RUN]
                sums += (accs[j] + x.to(tl.float32) * w,)
            accs = sums
    acc = _pack(accs)  # [BLOCK_P * BLOCK_Q, RUN]
    column = q[:, None] * RUN + tl.arange(0, RUN)[None, :]
    y_row = n.to(tl.int64) * stride_yn + k * stride_yk + z * stride_yz + p.to(tl.int64) * stride_yp
    # Counted in runs of Y_VEC, which a row holds a whole number of: so the compiler may store that many at once.
    mask = mask_m[:, None] & below(column, Q, Y_VEC)
    filters = k + tl.arange(0, 1)
    epilogue(
        acc, filters, y_row[:, None] * Y_VEC + column, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
        filters < FILTERS, ACTIVATION,
    )  # fmt: skip


# --- transpose with a stride -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def _direct_transpose_kernel(
    g_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, x_ptr, z_ptr,
    M, D, H, W, Z, P, Q,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    C: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr,
    G_VEC: tl.constexpr, X_VEC: tl.constexpr, UNIT_C: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_M blocks of STRIDE_H x STRIDE_W pixels by BLOCK_C channels. In rows and columns each tap adds to one pixel
    of a block, from an input that is known here: nothing is multiplied in vain. Planes are masked."""
    CHANNELS: tl.constexpr = C * GROUPS
    TILES_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    # Of its group's K inputs a thread holds all, or without neighbouring channels one after the other.
    HELD: tl.constexpr = K if UNIT_C else 1
    BLOCK_K: tl.constexpr = BLOCK_C // C * K if UNIT_C else 1
    REPEATS: tl.constexpr = C if UNIT_C else 1
    FIRST_H: tl.constexpr = _block_input(R - 1, STRIDE_H, PAD_H, DIL_H)
    FIRST_W: tl.constexpr = _block_input(S - 1, STRIDE_W, PAD_W, DIL_W)
    INPUTS_H: tl.constexpr = _block_input(0, STRIDE_H, PAD_H, DIL_H) - FIRST_H + 1
    INPUTS_W: tl.constexpr = _block_input(0, STRIDE_W, PAD_W, DIL_W) - FIRST_W + 1
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    if UNIT_C:
        k0 = pid % TILES_C * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        k0 = c // C * K
    mask_m = offs_m < M
    mask_c = c < CHANNELS
    mask_k = k0 < K * GROUPS
    n, d, i, j = position(offs_m, D, tl.cdiv(H, STRIDE_H), tl.cdiv(W, STRIDE_W), RANK)
    accs = _zeros(STRIDE_H * STRIDE_W, (BLOCK_M, BLOCK_C))
    for step in range(T * (K // HELD)):
        t = step // (K // HELD)
        k = step % (K // HELD)
        mask = mask_m
        z = d
        if RANK == 3:
            z = d + PAD_D - t * DIL_D
            mask &= (z >= 0) & (z % STRIDE_D == 0)
            z = z // STRIDE_D
            mask &= z < Z
        gs = ()
        for a in tl.static_range(INPUTS_H):
            for b in tl.static_range(INPUTS_W):
                if _reads_input(FIRST_H + a, R, STRIDE_H, PAD_H, DIL_H) and _reads_input(
                    FIRST_W + b, S, STRIDE_W, PAD_W, DIL_W
                ):
                    p = i + FIRST_H + a
                    q = j + FIRST_W + b
                    g_off = tile_offsets(
                        n, z, p, q, k0 + k, stride_yn, stride_yk, stride_yz, stride_yp, stride_yq, G_VEC, UNIT_C
                    )  # fmt: skip
                    mask_g = mask & _within(p, P) & _within(q, Q)
                    gs += (tl.load(g_ptr + g_off, mask=mask_g[:, None] & mask_k[None, :], other=0.0),)
                else:
                    gs += (0.0,)
        sums = ()
        for u in tl.static_range(STRIDE_H):
            for v in tl.static_range(STRIDE_W):
                acc = accs[u * STRIDE_W + v]
                for r in tl.static_range(R):
                    for s in tl.static_range(S):
                        if _adds(r, u, STRIDE_H, PAD_H, DIL_H) and _adds(s, v, STRIDE_W, PAD_W, DIL_W):
                            g = gs[
                                (_block_input(r, STRIDE_H, PAD_H, DIL_H) - FIRST_H) * INPUTS_W
                                + _block_input(s, STRIDE_W, PAD_W, DIL_W) - FIRST_W
                            ]  # fmt: skip
                            for held in tl.static_range(HELD):
                                w_off = (((t * R + r) * S + s) * K + k + held) * CHANNELS + c
                                w = tl.load(w_ptr + w_off, mask=mask_c, other=0.0)
                                acc += _repeat(_channel(g, held, HELD), REPEATS).to(tl.float32) * w[None, :]
                sums += (acc,)
        accs = sums
    for u in tl.static_range(STRIDE_H):
        for v in tl.static_range(STRIDE_W):
            h = i * STRIDE_H + u
            w = j * STRIDE_W + v
            x_off = tile_offsets(n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, UNIT_C)
            mask = (mask_m & (h < H) & (w < W))[:, None] & mask_c[None, :]
            epilogue(
                accs[u * STRIDE_W + v], c, x_off, mask, scale_ptr, bias_ptr, residual_ptr, x_ptr, z_ptr, mask_c,
                ACTIVATION,
            )  # fmt: skip


# --- weight gradient -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES, "run"])
def _direct_weight_grad_kernel(
    x_ptr, g_ptr, partial_ptr,
    M, D, H, W, Z, P, Q, splits, run,
    stride_xn: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    K: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr,
    X_VEC: tl.constexpr, Y_VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [splits * runs, K * GROUPS, T*R*S]: one program sums one row of the window over ``run`` columns of its
    share of the M = N*Z*P rows of outputs. From one output to the next the window moves on, and only what comes into
    view is loaded."""
    FILTERS: tl.constexpr = K * GROUPS
    TILES_C: tl.constexpr = (FILTERS + BLOCK_C - 1) // BLOCK_C
    BLOCK_X: tl.constexpr = BLOCK_C // K
    TAPS: tl.constexpr = _cut(S, MAX_ROWS)  # of a row, side by side, in one program
    BLOCKS_S: tl.constexpr = (S + TAPS - 1) // TAPS
    NEW: tl.constexpr = min(TAPS, STRIDE_W // DIL_W if STRIDE_W % DIL_W == 0 else TAPS)
    pid = tl.program_id(0)
    s0 = pid % BLOCKS_S * TAPS
    r = pid // BLOCKS_S % R
    t = pid // (BLOCKS_S * R) % T
    tile = pid // (BLOCKS_S * R * T) % TILES_C
    split = pid // (BLOCKS_S * R * T * TILES_C)
    runs = tl.cdiv(Q, run)
    k = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    c = tile * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_k = k < FILTERS
    mask_c = c < GROUPS
    first_q = split % runs * run
    last_q = tl.minimum(first_q + run, Q)
    w0 = s0 * DIL_W - PAD_W
    steps = tl.cdiv(M, BLOCK_M)
    per_split = tl.cdiv(steps, splits)
    first = split // runs * per_split
    last = tl.minimum(first + per_split, steps)
    accs = _zeros(TAPS, (BLOCK_M, BLOCK_C))
    for step in range(first, last):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        n, z, _, p = position(offs_m, Z, 1, P, RANK)
        d = z * STRIDE_D - PAD_D + t * DIL_D
        h = p * STRIDE_H - PAD_H + r * DIL_H
        mask_x = mask_m & (d >= 0) & (d < D) & (h >= 0) & (h < H)
        x_row = n.to(tl.int64) * stride_xn + d.to(tl.int64) * stride_xd + h.to(tl.int64) * stride_xh
        g_row = n.to(tl.int64) * stride_yn + z.to(tl.int64) * stride_yz + p.to(tl.int64) * stride_yp
        x_ptrs = x_ptr + (x_row * X_VEC)[:, None] + c[None, :]
        g_ptrs = g_ptr + (g_row * Y_VEC)[:, None] + k[None, :]
        mask_x = mask_x[:, None] & mask_c[None, :]
        mask_g = mask_m[:, None] & mask_k[None, :]
        seen = ()
        for s in tl.static_range(TAPS - NEW):
            seen += (_load_column(x_ptrs, first_q * STRIDE_W + w0 + s * DIL_W, W, stride_xw, mask_x, X_VEC),)
        for q in range(first_q, last_q):
            xs = seen
            for s in tl.static_range(TAPS - NEW, TAPS):
                xs += (_load_column(x_ptrs, q * STRIDE_W + w0 + s * DIL_W, W, stride_xw, mask_x, X_VEC),)
            g = tl.load(g_ptrs + tl.cast(q, tl.int64) * stride_yq * Y_VEC, mask=mask_g, other=0.0).to(tl.float32)
            sums = ()
            for s in tl.static_range(TAPS):
                sums += (accs[s] + _repeat(xs[s], K).to(tl.float32) * g,)
            accs = sums
            seen = xs[NEW:]
    out = (split.to(tl.int64) * FILTERS + k) * (T * R * S) + (t * R + r) * S + s0
    for s in tl.static_range(TAPS):
        tl.store(partial_ptr + out + s, column_sum(accs[s]), mask=only_if(mask_k, s0 + s < S))


@triton.jit
def _load_column(x_ptrs, w, W, stride_xw, mask, X_VEC: tl.constexpr):
    """Column w, a scalar, of the rows that ``x_ptrs`` point at."""
    shift = tl.cast(w, tl.int64) * stride_xw * X_VEC
    return tl.load(x_ptrs + shift, mask=only_if(mask, (w >= 0) & (w < W)), other=0.0)


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def _direct_rows_weight_grad_kernel(
    x_ptr, g_ptr, partial_ptr,
    N, D, H, W, Z, P, Q, splits,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    K: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    X_VEC: tl.constexpr, G_VEC: tl.constexpr, RUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial [splits, K * GROUPS, T*R*S]: one program sums one row of one filter's window over its share of the tiles
    of BLOCK_P rows by BLOCK_Q runs of outputs."""
    FILTERS: tl.constexpr = K * GROUPS
    pid = tl.program_id(0)
    r = pid % R
    t = pid // R % T
    k = pid // (R * T) % FILTERS
    split = pid // (R * T * FILTERS)
    tiles_q = tl.cdiv(Q, RUN * BLOCK_Q)
    tiles_p = tl.cdiv(P, BLOCK_P)
    tiles = N * Z * tiles_p * tiles_q
    per_split = tl.cdiv(tiles, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    m = tl.arange(0, BLOCK_P * BLOCK_Q)
    accs = _zeros(S, (BLOCK_P * BLOCK_Q,))
    for tile in range(first, last):
        q = tile % tiles_q * BLOCK_Q + m % BLOCK_Q
        p = tile // tiles_q % tiles_p * BLOCK_P + m // BLOCK_Q
        z = tile // (tiles_q * tiles_p) % Z
        n = tl.cast(tile // (tiles_q * tiles_p) // Z, tl.int64)
        d = z * STRIDE_D - PAD_D + t * DIL_D
        h = p * STRIDE_H - PAD_H + r * DIL_H
        mask_g = (p < P) & (q * RUN < Q)
        mask_x = only_if(mask_g & (h >= 0) & (h < H), (d >= 0) & (d < D))
        x_row = n * stride_xn + k // K * stride_xc + d * stride_xd + h.to(tl.int64) * stride_xh
        g_row = n * stride_yn + k * stride_yk + z * stride_yz + p.to(tl.int64) * stride_yp
        xs = _load_columns(x_ptr, x_row, q, mask_x, W, stride_xw, S, STRIDE_W, PAD_W, DIL_W, X_VEC, RUN)
        gs = _load_columns(g_ptr, g_row, q, mask_g, Q, stride_yq, 1, 1, 0, 1, G_VEC, RUN)
        sums = ()
        for s in tl.static_range(S):
            acc = accs[s]
            for j in tl.static_range(RUN):
                x = xs[j * STRIDE_W + s * DIL_W - PAD_W - _first_run(RUN, PAD_W) * RUN].to(tl.float32)
                if G_VEC < RUN:  # a run may reach past the row: there g is 0, and x must not be infinite
                    x = tl.where(q * RUN + j < Q, x, 0.0)
                acc += x * gs[j].to(tl.float32)
            sums += (acc,)
        accs = sums
    out = (split.to(tl.int64) * FILTERS + k) * (T * R * S) + (t * R + r) * S
    for s in tl.static_range(S):
        tl.store(partial_ptr + out + s, column_sum(accs[s]))


# --- launchers -------------------------------------------------------------------------------------------------------


def takes(p: ConvProblem) -> bool:
    """Which convolutions, and transposes of them, are for these kernels."""
    outputs, products = _block(p)
    fits = p.geometry.parities == 1 or (outputs <= MAX_BLOCK and products <= MAX_PRODUCTS)
    return p.geometry.groups > 1 and p.C in CHANNELS and p.K in CHANNELS and fits


def _block(p: ConvProblem) -> tuple[int, int]:
    """Outputs of a block of the transpose, and products that a channel sums in it: its code is that long."""
    _, stride_h, stride_w = p.geometry.stride
    return stride_h * stride_w, p.window[1] * p.window[2] * p.K


def takes_weight_grad(p: ConvProblem) -> bool:
    return takes(p) and p.C == 1


def _turned(p: ConvProblem) -> ConvProblem:
    """The convolution that a transpose without stride is; its window is turned over in every dimension."""
    g = p.geometry
    padding = tuple(dil * (taps - 1) - pad for dil, taps, pad in zip(g.dilation, p.window, g.padding, strict=True))
    return p._replace(C=p.K, K=p.C, image=p.output, output=p.image, geometry=g._replace(padding=padding))


def _upright(p: ConvProblem) -> ConvProblem:
    """Width and height exchanged: so outputs of one dimension lie below one another, and ROWS of them share loads."""
    sizes = (p.image, p.window, p.output, *p.geometry[:3])
    image, window, output, *geometry = ((depth, width, height) for depth, height, width in sizes)
    return p._replace(image=image, window=window, output=output, geometry=Geometry(*geometry, p.geometry.groups))


def _is_flat(p: ConvProblem) -> bool:
    return p.image[1] == p.window[1] == p.output[1] == 1 and p.geometry.stride[1] == 1


def _run(itemsize: int, *alignments: int) -> int:
    """RUN: as many outputs as the rows are aligned to. Where they are not at all, 16 bytes: such rows are loaded an
    element a thread and exchanged through shared memory, half the instructions of a load for every tap."""
    alignment = min(alignments)
    return 16 // itemsize if alignment == 1 else max(1, alignment)


def _window(p: ConvProblem) -> dict[str, int]:
    return {"GROUPS": p.geometry.groups, **dict(zip("TRS", p.window, strict=True)), **p.geometry.constants()}


def plan_forward(
    p: ConvProblem, config: Config, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, epilogue: Epilogue,
    turned: bool = False,
) -> list[Launch]:  # fmt: skip
    """x laid out as y, w dense fp32 [T, R, S, C, K * GROUPS]; ``turned``: its taps come in reverse."""
    operands = {
        "x_ptr": x, "w_ptr": w, "scale_ptr": epilogue.scale, "bias_ptr": epilogue.bias,
        "residual_ptr": epilogue.residual, "y_ptr": y, "z_ptr": epilogue.z,
    }  # fmt: skip
    constants = {"C": p.C, "K": p.K, "TURNED": turned, "ACTIVATION": epilogue.activation}
    if "BLOCK_Q" in config:
        xs, ys = raw_strides(x), raw_strides(y)
        run = _run(p.itemsize, row_alignment(x))
        x_vec, y_vec = (unit_divisor(run, max(1, row_alignment(t))) for t in (x, y))
        xs = [*(stride // x_vec for stride in xs[:4]), xs[4]]
        ys = [stride // y_vec for stride in ys[:4]]
        tiles = cost.cdiv(p.output[2], run * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
        sizes = {**p.sizes(), "rows": p.window[0] * p.window[1] * p.C}
        args = {**operands, **sizes, **_named(X_STRIDES, xs), **_named(Y_STRIDES[:4], ys)}
        constants |= {**_window(p), "X_VEC": x_vec, "Y_VEC": y_vec, "RUN": run, **config.constants()}
        grid = p.N * p.K * p.geometry.groups * p.output[0] * tiles
        return [Launch(_direct_rows_kernel, grid, args, constants, config.num_warps, config.num_stages)]
    x_vec, _, xs = layout_strides(x, p.C * p.geometry.groups)
    y_vec, _, ys = layout_strides(y)
    if _is_flat(p):
        p, xs, ys = _upright(p), [*xs[:3], xs[4], xs[3]], [*ys[:3], ys[4], ys[3]]
    positions = p.N * p.output[0] * cost.cdiv(p.output[1], config.ROWS) * p.output[2]
    args = {
        **operands, "M": positions, **p.sizes(), "columns": p.window[0] * p.window[2],
        **_named(X_STRIDES, xs), **_named(Y_STRIDES, ys),
    }  # fmt: skip
    del args["stride_xc"], args["stride_yk"]
    constants |= {**_window(p), "RANK": p.rank, "X_VEC": x_vec, "Y_VEC": y_vec, **config.constants()}
    grid = cost.cdiv(positions, config.BLOCK_M) * cost.cdiv(p.K * p.geometry.groups, config.BLOCK_C)
    return [Launch(_direct_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_transpose(
    p: ConvProblem, config: Config, g: torch.Tensor, w: torch.Tensor, x: torch.Tensor, epilogue: Epilogue
) -> list[Launch]:
    """g laid out as x, w dense fp32 [T, R, S, K, C * GROUPS]; x is the result."""
    if p.geometry.parities == 1:
        return plan_forward(_turned(p), config, g, w, x, epilogue, turned=True)
    unit_c = "BLOCK_Q" not in config
    block_m, block_c = (config.BLOCK_M, config.BLOCK_C) if unit_c else (config.BLOCK_P * config.BLOCK_Q, 1)
    if unit_c:
        g_vec, _, gs = layout_strides(g, p.K * p.geometry.groups)
        x_vec, _, xs = layout_strides(x)
    else:
        g_vec, gs, x_vec, xs = 1, raw_strides(g), 1, raw_strides(x)
    blocks = _blocks(p)
    args = {
        "g_ptr": g, "w_ptr": w, "scale_ptr": epilogue.scale, "bias_ptr": epilogue.bias,
        "residual_ptr": epilogue.residual, "x_ptr": x, "z_ptr": epilogue.z,
        "M": blocks, **p.sizes(), **_named(Y_STRIDES, gs), **_named(X_STRIDES, xs),
    }  # fmt: skip
    constants = {
        "C": p.C, "K": p.K, **_window(p), "RANK": p.rank, "G_VEC": g_vec, "X_VEC": x_vec, "UNIT_C": unit_c,
        "ACTIVATION": epilogue.activation, "BLOCK_M": block_m, "BLOCK_C": block_c,
    }  # fmt: skip
    grid = cost.cdiv(blocks, block_m) * cost.cdiv(p.C * p.geometry.groups, block_c)
    return [Launch(_direct_transpose_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_weight_grad(
    p: ConvProblem, config: Config, x: torch.Tensor, g: torch.Tensor, dw: torch.Tensor
) -> list[Launch]:
    """x and g laid out alike; dw dense [K * GROUPS, 1, T, R, S]."""
    filters = p.K * p.geometry.groups
    operands = {"x_ptr": x, "g_ptr": g}
    constants = {"K": p.K, **_window(p)}
    if "BLOCK_Q" in config:
        xs, gs = raw_strides(x), raw_strides(g)
        run = _run(p.itemsize, row_alignment(x), row_alignment(g))
        x_vec, g_vec = (unit_divisor(run, max(1, row_alignment(t))) for t in (x, g))
        xs = [*(stride // x_vec for stride in xs[:4]), xs[4]]
        gs = [*(stride // g_vec for stride in gs[:4]), gs[4]]
        splits = _rows_splits(p, config, run)
        partial = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
        args = {
            **operands, "partial_ptr": partial, "N": p.N, **p.sizes(), "splits": splits,
            **_named(X_STRIDES, xs), **_named(Y_STRIDES, gs),
        }  # fmt: skip
        constants |= {"X_VEC": x_vec, "G_VEC": g_vec, "RUN": run, "BLOCK_P": config.BLOCK_P, "BLOCK_Q": config.BLOCK_Q}
        grid = p.window[0] * p.window[1] * filters * splits
        main = Launch(_direct_rows_weight_grad_kernel, grid, args, constants, config.num_warps, config.num_stages)
        return [main, sum_splits(partial, dw)]
    x_vec, _, xs = layout_strides(x, p.geometry.groups)
    y_vec, _, gs = layout_strides(g)
    splits, run = _splits(p, config)
    parts = splits * cost.cdiv(p.output[2], run)
    partial = torch.empty((parts, dw.numel()), dtype=torch.float32, device=x.device)
    args = {
        **operands, "partial_ptr": partial, "M": p.N * p.output[0] * p.output[1], **p.sizes(), "splits": splits,
        "run": run, **_named(X_STRIDES, xs), **_named(Y_STRIDES, gs),
    }  # fmt: skip
    del args["stride_xc"], args["stride_yk"]
    constants |= {
        "RANK": p.rank, "X_VEC": x_vec, "Y_VEC": y_vec, "BLOCK_M": config.BLOCK_M, "BLOCK_C": config.BLOCK_C,
    }  # fmt: skip
    rows = p.window[0] * p.window[1] * cost.cdiv(p.window[2], MAX_ROWS.value)
    grid = rows * cost.cdiv(filters, config.BLOCK_C) * parts
    main = Launch(_direct_weight_grad_kernel, grid, args, constants, config.num_warps, config.num_stages)
    return [main, sum_splits(partial, dw)]


def _rows_splits(p: ConvProblem, config: Config, run: int) -> int:
    tiles = cost.cdiv(p.output[2], run * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
    return max(1, min(config.SPLIT_M, p.N * p.output[0] * tiles // 4))  # less would not repay a program's last step


def _splits(p: ConvProblem, config: Config) -> tuple[int, int]:
    """Shares of the rows of outputs, and if those are too few for SPLIT_M shares, the columns of a run of each row."""
    splits = max(1, min(config.SPLIT_M, cost.cdiv(p.N * p.output[0] * p.output[1], config.BLOCK_M)))
    runs = min(cost.cdiv(config.SPLIT_M, splits), cost.cdiv(p.output[2], 4 * p.window[2]))
    return splits, cost.cdiv(p.output[2], max(1, runs))


def _named(names: Sequence[str], values: Sequence[int]) -> dict[str, int]:
    return dict(zip(names, values, strict=True))


# --- configs ---------------------------------------------------------------------------------------------------------

_TILES = (
    # BLOCK_M, BLOCK_C, warps: channels last, 16 bytes of 16-bit channels a thread of 32 a warp
    (16, 64, 4),
    (32, 32, 4),
    (8, 128, 4),
    (64, 16, 4),
    (128, 8, 4),
    (4, 64, 1),
    (8, 32, 1),
    (32, 8, 1),
    # of 64 a warp
    (16, 64, 2),
    (32, 32, 2),
    (8, 128, 2),
    (64, 16, 2),
    (128, 8, 2),
    (8, 64, 1),
    (16, 32, 1),
    (64, 8, 1),
    # less, for 32-bit channels and for groups and blocks that hold more beside it
    (8, 64, 4),
    (16, 32, 4),
    (32, 16, 4),
    (64, 8, 4),
    (8, 32, 4),
    (32, 8, 4),
    (16, 8, 1),
)

# BLOCK_P, BLOCK_Q, warps: NCHW, in runs of outputs
_ROW_TILES = tuple(
    (size // block_q, block_q, warps)
    for size, warps in ((512, 4), (256, 4), (128, 4), (128, 2), (64, 1), (32, 1))
    for block_q in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
    if size // 64 <= block_q <= size
)


def _config(block_m: int, block_c: int, warps: int, **more: int) -> Config:
    return Config(BLOCK_M=block_m, BLOCK_C=block_c, **more, num_warps=warps, num_stages=1)


def _row_config(block_p: int, block_q: int, warps: int, **more: int) -> Config:
    return Config(BLOCK_P=block_p, BLOCK_Q=block_q, **more, num_warps=warps, num_stages=1)


CONFIGS = (
    *(_config(*tile, ROWS=rows) for rows in (4, 2, 1) for tile in _TILES),
    *(_row_config(*tile) for tile in _ROW_TILES),
)
_NARROW_TILES = ((2, 128, 1), (1, 256, 1), (1, 512, 1))  # few rows of outputs, as one dimension has
WEIGHT_GRAD_CONFIGS = tuple(
    config(*tile, SPLIT_M=splits)
    for splits in (16, 64, 256, 1)
    for config, tiles in ((_config, (*_TILES, *_NARROW_TILES)), (_row_config, _ROW_TILES))
    for tile in tiles
)


def _dense_run(p: ConvProblem, *others: int) -> int:
    """RUN for dense tensors of x's and other widths."""
    return _run(p.itemsize, unit_divisor(16 // p.itemsize, p.image[2], *others))


def _tile_fits(p: ConvProblem, config: Config, device: DeviceSpec, results: int, most: int = 16) -> bool:
    """Has a thread 16 bytes to load, and registers for its sums? ``results``: outputs at one position of the tile;
    ``most``: sums of a thread for one of them."""
    read, written = p.C * p.geometry.groups, p.K * p.geometry.groups
    sums = config.BLOCK_M * config.BLOCK_C / (device.warp_size * config.num_warps)
    widest = sums * max(1.0, p.C / p.K)
    enough = widest >= min(unit_divisor(16 // p.itemsize, read, written), max(1, 16 // results), most)
    return (
        config.BLOCK_C % p.K == 0
        and (config.BLOCK_C <= 8 or config.BLOCK_C < 2 * written)
        and sums <= min(most, 32 // results)
        and widest <= 16
        and enough
    )


def _row_tile_fits(p: ConvProblem, config: Config, device: DeviceSpec, run: int) -> bool:
    """At least a run a thread, and but for the smallest tiles none twice as large as a plane in a direction."""
    size, runs = config.BLOCK_P * config.BLOCK_Q, cost.cdiv(p.output[2], run)
    fits = config.BLOCK_P == 1 or config.BLOCK_P < 2 * p.output[1] or size <= device.warp_size
    return size >= device.warp_size * config.num_warps and config.BLOCK_Q < 2 * runs and fits


def _forward_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    if not p.channels_last:
        return _row_tile_fits(p, config, device, _dense_run(p))
    rows = (_upright(p) if _is_flat(p) else p).output[1]
    return (config.ROWS == 1 or config.ROWS <= rows) and _tile_fits(p, config, device, config.ROWS)


def _transpose_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.geometry.parities == 1:
        return _forward_accepts(_turned(p), config, device)
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    blocks, products = _block(p)
    if not p.channels_last:
        threads = device.warp_size * config.num_warps
        return config.BLOCK_P == 1 and config.BLOCK_Q <= max(1, 32 // blocks) * threads
    swapped = p._replace(C=p.K, K=p.C)
    most = 8 if products <= 40 else 4 if products <= 100 else 2  # the compiler loads many weights ahead
    return config.ROWS == 1 and _tile_fits(swapped, config, device, blocks, most)


def _weight_grad_accepts(p: ConvProblem, config: Config, device: DeviceSpec) -> bool:
    if p.channels_last == ("BLOCK_Q" in config):
        return False
    if not p.channels_last:
        held = config.BLOCK_P * config.BLOCK_Q / (device.warp_size * config.num_warps)  # runs of a thread, S sums each
        few = held <= min(2, max(1, 32 // p.window[2]))
        return few and _row_tile_fits(p, config, device, _dense_run(p, p.output[2]))
    rows = p.N * p.output[0] * p.output[1]
    return (config.num_warps == 1 or config.BLOCK_M < 2 * rows) and _tile_fits(p, config, device, 1, most=8)


# What load and store instructions move, by the formulas above, less what lies outside the image.


def forward_bytes(p: ConvProblem, config: Config) -> float:
    filters = p.K * p.geometry.groups
    weights = _programs(p, config) * p.taps * p.C
    if "BLOCK_Q" in config:
        run = _dense_run(p)
        read = p.N * _hits(p, 0) * _hits(p, 1) * _columns(p, run) * p.C * filters
    else:
        if _is_flat(p):
            p = _upright(p)
        weights *= min(config.BLOCK_C, filters)
        read = p.N * _hits(p, 0) * _rows(p, config.ROWS) * _hits(p, 2) * p.C * p.geometry.groups
    return float((read + p.pixels * filters) * p.itemsize + 4 * weights)


def transpose_bytes(p: ConvProblem, config: Config) -> float:
    if p.geometry.parities == 1:
        return forward_bytes(_turned(p), config)
    channels, unit_c = p.C * p.geometry.groups, "BLOCK_Q" not in config
    inputs = math.prod(
        sum(_inside(size, -i, 1, blocks) for i in {_block_input(tap, *shape) for tap in range(taps)})
        for size, blocks, taps, shape in (
            (p.output[axis], cost.cdiv(p.image[axis], p.geometry.stride[axis]), p.window[axis], _axis(p, axis))
            for axis in (1, 2)
        )
    )
    read = p.N * _hits(p, 0) * inputs * p.K * p.geometry.groups * (1 if unit_c else p.C)
    tiles = cost.cdiv(_blocks(p), config.BLOCK_M if unit_c else config.BLOCK_P * config.BLOCK_Q)
    return float((read + p.image_pixels * channels) * p.itemsize + 4 * tiles * p.taps * p.K * channels)


def weight_grad_bytes(p: ConvProblem, config: Config) -> float:
    filters, (t, r, s) = p.K * p.geometry.groups, p.window
    weights = filters * p.taps
    if "BLOCK_Q" in config:
        run = _dense_run(p, p.output[2])
        splits = _rows_splits(p, config, run)
        read = p.N * _hits(p, 0) * _hits(p, 1) * _columns(p, run) * filters + p.pixels * filters * t * r
    else:
        splits, columns = _splits(p, config)
        parts = cost.cdiv(p.output[2], columns)
        stride, _, dil = _axis(p, 2)
        taps = _cut(s, MAX_ROWS.value)
        new = min(taps, stride // dil if stride % dil == 0 else taps)
        seen = parts * (taps - new) + p.output[2] * new
        blocks = cost.cdiv(s, taps)
        x = p.N * _hits(p, 0) * _hits(p, 1) * min(blocks * seen, _hits(p, 2)) * p.geometry.groups
        read = x + p.pixels * filters * t * r * blocks
        splits *= parts
    return float(read * p.itemsize + 8 * splits * weights + weights * p.itemsize)


def _axis(p: ConvProblem, axis: int) -> tuple[int, int, int]:
    """Stride, padding and dilation of depth (0), height (1) or width (2)."""
    return p.geometry.stride[axis], p.geometry.padding[axis], p.geometry.dilation[axis]


def _inside(size: int, start: int, stride: int, count: int) -> int:
    """How many of the ``count`` places ``-start + i * stride`` lie in [0, size)."""
    first = max(0, cost.cdiv(start, stride))
    last = min(count - 1, (size - 1 + start) // stride)
    return max(0, last - first + 1)


def _hits(p: ConvProblem, axis: int) -> int:
    """Pairs of an output and a tap that meet inside the image, along an axis."""
    stride, pad, dil = _axis(p, axis)
    return sum(_inside(p.image[axis], pad - tap * dil, stride, p.output[axis]) for tap in range(p.window[axis]))


def _rows(p: ConvProblem, rows: int) -> int:
    """Rows of x that are loaded for all rows of outputs."""
    stride, pad, dil = _axis(p, 1)
    window, blocks = p.window[1], cost.cdiv(p.output[1], rows)
    block = _cut(window, MAX_ROWS.value)
    return sum(
        _inside(p.image[1], pad - j, rows * stride, blocks)
        for first in range(0, window, block)
        for j in range((rows - 1) * stride + (window - 1) * dil + 1)
        if _reads_row(j, rows, first, block, window, stride, dil)
    )


def _columns(p: ConvProblem, run: int) -> int:
    """Columns of x that are loaded for all runs of a row of outputs."""
    stride, pad, dil = _axis(p, 2)
    window, runs = p.window[2], cost.cdiv(p.output[2], run)
    return sum(
        _inside(p.image[2], -(i * run + lane), stride * run, runs)
        for i in range(_first_run(run, pad), _last_run(run, window, stride, pad, dil) + 1)
        for lane in range(run)
        if _reads_run(i, run, window, stride, pad, dil)
    )


def _blocks(p: ConvProblem) -> int:
    """Blocks of pixels that the transpose writes."""
    _, stride_h, stride_w = p.geometry.stride
    return p.N * p.image[0] * cost.cdiv(p.image[1], stride_h) * cost.cdiv(p.image[2], stride_w)


def _programs(p: ConvProblem, config: Config) -> int:
    """Of the forward pass."""
    filters = p.K * p.geometry.groups
    if "BLOCK_Q" in config:
        tiles = cost.cdiv(p.output[2], _dense_run(p) * config.BLOCK_Q) * cost.cdiv(p.output[1], config.BLOCK_P)
        return p.N * filters * p.output[0] * tiles
    if _is_flat(p):
        p = _upright(p)
    positions = p.N * p.output[0] * cost.cdiv(p.output[1], config.ROWS) * p.output[2]
    return cost.cdiv(positions, config.BLOCK_M) * cost.cdiv(filters, config.BLOCK_C)


def _stream(
    p: ConvProblem, config: Config, device: DeviceSpec, *, programs: int, results: int, tile: int, issued: float,
    partial: float = 0.0,
) -> Estimate:  # fmt: skip
    """``results``: elements that the grid sums at a time, ``tile`` of them in a program."""
    if "BLOCK_C" in config:
        issued *= max(1.0, 32 / (config.BLOCK_C * p.itemsize))  # the cache hands out 32 bytes at least
    return cost.stream(
        device,
        programs=programs,
        issued_bytes=issued,
        dram_bytes=p.minimal_bytes() + partial,
        config=config,
        tile_bytes=tile * p.itemsize,
        waste=max(1.0, programs * tile / max(1, results)),
        flops=p.flops,
    )


def _tile(p: ConvProblem, config: Config, run: int) -> int:
    return config.BLOCK_P * config.BLOCK_Q * run if "BLOCK_Q" in config else config.BLOCK_M * config.BLOCK_C


def _forward_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    results = p.pixels * p.K * p.geometry.groups
    rows = config.get("ROWS", 1)
    return _stream(
        p, config, device, programs=_programs(p, config), results=cost.cdiv(results, rows),
        tile=_tile(p, config, _dense_run(p)), issued=forward_bytes(p, config),
    )  # fmt: skip


def _transpose_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    if p.geometry.parities == 1:
        return _forward_estimate(_turned(p), config, device)
    channels, tile = p.C * p.geometry.groups, _tile(p, config, 1)
    block_c = config.get("BLOCK_C", 1)
    programs = cost.cdiv(_blocks(p), tile // block_c) * cost.cdiv(channels, block_c)
    return _stream(
        p, config, device, programs=programs, results=_blocks(p) * channels, tile=tile,
        issued=transpose_bytes(p, config),
    )  # fmt: skip


def _weight_grad_estimate(p: ConvProblem, config: Config, device: DeviceSpec) -> Estimate:
    filters, (t, r, s) = p.K * p.geometry.groups, p.window
    run = _dense_run(p, p.output[2])
    if "BLOCK_Q" in config:
        splits, columns = _rows_splits(p, config, run), filters
        sides = ((p.output[1], config.BLOCK_P), (cost.cdiv(p.output[2], run), config.BLOCK_Q))
    else:
        splits, width = _splits(p, config)
        splits *= cost.cdiv(p.output[2], width)
        columns = cost.cdiv(filters, config.BLOCK_C)
        sides = ((p.N * p.output[0] * p.output[1], config.BLOCK_M),)
    programs = splits * columns * t * r * (1 if "BLOCK_Q" in config else cost.cdiv(s, MAX_ROWS.value))
    waste = math.prod(cost.cdiv(size, lanes) * lanes / max(1, size) for size, lanes in sides)
    return cost.stream(
        device,
        programs=programs,
        issued_bytes=weight_grad_bytes(p, config),
        dram_bytes=p.minimal_bytes() + 8.0 * splits * filters * p.taps,
        config=config,
        tile_bytes=_tile(p, config, run) * p.itemsize,
        waste=waste * (columns * config.get("BLOCK_C", 1)) / filters,
        flops=p.flops,
    )


def _forward_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_forward(p, config, x, w.float(), y, Epilogue(bias=w.new_empty(y.shape[1]), activation="relu"))


def _transpose_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_transpose(p, config, y, w.float(), x, Epilogue(bias=w.new_empty(x.shape[1])))


def _weight_grad_launches(p: ConvProblem, config: Config) -> list[Launch]:
    x, w, y = meta_tensors(p)
    return plan_weight_grad(p, config, x, y, w)


FORWARD = register(Tunable("conv_direct", CONFIGS, features, _forward_accepts, _forward_estimate, _forward_launches))
TRANSPOSE = register(
    Tunable(
        "conv_direct_transpose", CONFIGS, features, _transpose_accepts, _transpose_estimate, _transpose_launches
    )
)  # fmt: skip
WEIGHT_GRAD = register(
    Tunable(
        "conv_direct_weight_grad", WEIGHT_GRAD_CONFIGS, features, _weight_grad_accepts, _weight_grad_estimate,
        _weight_grad_launches,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def _laid_as(t: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """The tensor itself if it can be read in place beside a result of that layout, else a copy."""
    if is_channels_last:
        return channels_last(t)
    return readable(t, dense=t.stride(1) == 1 and t.stride(-1) != 1)


def _widened(weight: torch.Tensor) -> torch.Tensor:
    """The weights dense, in fp32: converting them once here spares every program that."""
    return torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight)


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
    packed = _widened(weight.movedim((1, 0), (-2, -1)))  # [*window, C, K * GROUPS]
    launch(FORWARD, plan_forward, problem, _laid_as(x, is_channels_last), packed, y, epilogue)
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
    grouped = weight.unflatten(0, (geometry.groups, problem.K))
    packed = _widened(grouped.movedim((1, 0, 2), (-3, -2, -1)))  # [*window, K, GROUPS, C]
    launch(TRANSPOSE, plan_transpose, problem, _laid_as(g, is_channels_last), packed, x, epilogue)
    return x, epilogue.z


def run_weight_grad(
    x: torch.Tensor, g: torch.Tensor, weight_shape: Sequence[int], geometry: Geometry, *,
    precision: str = "ieee", is_channels_last: bool = False,
) -> torch.Tensor:  # fmt: skip
    """dw; with one channel a group it has one layout, and the kernel's is that of x."""
    dw = empty_output(x, weight_shape, is_channels_last)
    unit_channels = x.stride(1) == 1
    problem = problem_of(x.shape, weight_shape, g.shape[2:], geometry, x.dtype, precision, unit_channels)
    launch(WEIGHT_GRAD, plan_weight_grad, problem, x, _laid_as(g, unit_channels), dw)
    return dw
