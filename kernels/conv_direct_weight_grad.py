r"""Gradient of a convolution's weights without matrix products, for groups of one channel.

    dw[k,t,r,s] = sum over (n, z, p, q) of g[n,k,z,p,q]
                  * x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H, q*STRIDE_W - PAD_W + s*DIL_W]

where c is the channel of filter k's group. For groups of several channels :mod:`.conv_weight_grad` multiplies matrices
of merged groups. Two kernels serve the two layouts:

    channels last    A program goes along a row of outputs. It keeps the columns of x in the window in registers, so
                     that it loads each column once for the S taps that read it, one output after the other.
    rows             NCHW. A thread loads a run of g and the runs of x that its windows read.

Bytes (G: groups; |y|: the bytes of g). What must come from memory once is |x| + |g| + |dw|. What the load and store
instructions move is at most (what lies outside the image is not loaded, and the L1 cache serves most of what
neighbouring outputs share; where DIL_W does not divide STRIDE_W, S stands in place of the minimum)

    channels last    T*R * (min(S, STRIDE_W/DIL_W) * |y|/K + |y|) + 8*splits * T*R*S*K*G + |dw|
    rows             T*R * (L + 1) * |y| + 8*splits * T*R*S*K*G + |dw|         L: runs of x that a run of outputs reads

The partial sums are in fp32. A second kernel, of :mod:`.conv_epilogue`, adds them in order.
"""

import triton
import triton.language as tl

from ._math import column_sum, only_if, position
from .conv_direct_tiles import MAX_ROWS, equal_block, first_run, load_columns, repeated_columns, zero_sums
from .conv_windows import SIZES, X_STRIDES, Y_STRIDES

# --- channels last ---------------------------------------------------------------------------------------------------


@triton.jit
def _load_column(x_ptrs, w, W, stride_xw, mask, X_VEC: tl.constexpr):
    """Column w, a scalar, of the rows of x that ``x_ptrs`` [BLOCK_M, BLOCK_X] point at; 0 outside."""
    shift = tl.cast(w, tl.int64) * stride_xw * X_VEC
    return tl.load(x_ptrs + shift, mask=only_if(mask, (w >= 0) & (w < W)), other=0.0)  # [BLOCK_M, BLOCK_X]


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES, "run"])
def direct_weight_grad_kernel(
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
    """From x [N, D, H, W, GROUPS] and g [N, Z, P, Q, K*GROUPS] to the fp32 partial sums [parts, K*GROUPS, T*R*S]. The
    M = N*Z*P rows of outputs are cut into ``splits`` equal numbers of rows, and each row into stretches of ``run``
    outputs; a part is one stretch of the rows of one split. A program sums one row of the window over one part.

    From one output of a row to the next it keeps in registers the columns of x that both windows read, and loads only
    the others."""
    FILTERS: tl.constexpr = K * GROUPS
    TILES_C: tl.constexpr = (FILTERS + BLOCK_C - 1) // BLOCK_C
    BLOCK_X: tl.constexpr = BLOCK_C // K
    TAPS: tl.constexpr = equal_block(S, MAX_ROWS)  # taps of a row of the window that one program sums
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
    accs = zero_sums(TAPS, (BLOCK_M, BLOCK_C))
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
            g = tl.load(g_ptrs + tl.cast(q, tl.int64) * stride_yq * Y_VEC, mask=mask_g, other=0.0)  # [BLOCK_M, BLOCK_C]
            g = g.to(tl.float32)
            sums = ()
            for s in tl.static_range(TAPS):
                sums += (accs[s] + repeated_columns(xs[s], K).to(tl.float32) * g,)
            accs = sums
            seen = xs[NEW:]
    out = (split.to(tl.int64) * FILTERS + k) * (T * R * S) + (t * R + r) * S + s0
    for s in tl.static_range(TAPS):
        tl.store(partial_ptr + out + s, column_sum(accs[s]), mask=only_if(mask_k, s0 + s < S))


# --- rows: NCHW ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def direct_rows_weight_grad_kernel(
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
    """From x [N, GROUPS, D, H, W] and g [N, K*GROUPS, Z, P, Q] to the fp32 partial sums [splits, K*GROUPS, T*R*S]. A
    program sums one row of the window of one filter over one split of the tiles, which are BLOCK_P rows by BLOCK_Q runs
    of outputs."""
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
    accs = zero_sums(S, (BLOCK_P * BLOCK_Q,))
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
        # Tuples of the columns of x and g, each [BLOCK_P * BLOCK_Q].
        xs = load_columns(x_ptr, x_row, q, mask_x, W, stride_xw, S, STRIDE_W, PAD_W, DIL_W, X_VEC, RUN)
        gs = load_columns(g_ptr, g_row, q, mask_g, Q, stride_yq, 1, 1, 0, 1, G_VEC, RUN)
        sums = ()
        for s in tl.static_range(S):
            acc = accs[s]
            for j in tl.static_range(RUN):
                x = xs[j * STRIDE_W + s * DIL_W - PAD_W - first_run(RUN, PAD_W) * RUN].to(tl.float32)
                # A run may reach past the end of the row. There g is 0, but x may be infinite, and 0 * inf is NaN.
                if G_VEC < RUN:
                    x = tl.where(q * RUN + j < Q, x, 0.0)
                acc += x * gs[j].to(tl.float32)
            sums += (acc,)
        accs = sums
    out = (split.to(tl.int64) * FILTERS + k) * (T * R * S) + (t * R + r) * S
    for s in tl.static_range(S):
        tl.store(partial_ptr + out + s, column_sum(accs[s]))
