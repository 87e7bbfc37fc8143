r"""Convolution forward without matrix products, and the transpose with strides of 1.

    y[n,k,z,p,q] = epilogue(sum_{c,t,r,s} x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H,
                                              q*STRIDE_W - PAD_W + s*DIL_W] * w[k,c,t,r,s])

The sum over c covers the channels of filter k's group; the epilogue is that of :mod:`.conv_epilogue`. The transpose
with strides of 1 is this convolution, with C and K exchanged, other padding, and the taps in reverse order (TURNED).

Two kernels serve the two layouts:

    channels last    A thread loads up to 16 bytes of neighbouring channels. It sums ROWS outputs that lie below one
                     another, and loads each row of x once for all of them. It holds all channels of a group, so that
                     one load serves the group's K filters.
    rows             NCHW. A thread sums RUN neighbouring outputs of a row. It loads the columns of x that their windows
                     read as aligned runs of RUN elements, and separates the columns in registers.

Bytes (e: bytes an element; G: groups; a weight has 4 bytes). What must come from memory once is |x| + |w| + |y|. What
the load and store instructions move is at most (what lies outside the image is not loaded, and the L1 cache serves most
of what neighbouring outputs share)

    channels last    T*S*J/ROWS * |y|*C/K + 4*T_m * T*R*S*C*K*G + |y|    J: rows of x that ROWS rows of outputs read,
                                                                         ROWS + R - 1 if stride and dilation are 1;
                                                                         T_m: tiles of BLOCK_M positions
    rows             T*R*L * |y|*C + 4*programs * T*R*S*C + |y|          L: runs of x that a run of outputs reads
"""

import triton
import triton.language as tl

from ._math import below, only_if, position, tile_offsets
from .conv_direct_tiles import (
    MAX_ROWS,
    channel_columns,
    equal_block,
    first_run,
    is_within,
    load_columns,
    packed_columns,
    reads_row,
    repeated_columns,
    zero_sums,
)
from .conv_epilogue import store_with_epilogue
from .conv_windows import SIZES, X_STRIDES, Y_STRIDES

# --- channels last ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES, "columns"])
def direct_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, saved_ptr,
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
    """From x [N, D, H, W, C*GROUPS] and w, fp32 [T, R, S, C, K*GROUPS], to y [N, Z, P, Q, K*GROUPS]. A program sums
    BLOCK_M positions by BLOCK_C filters, where a position is ROWS outputs that lie below one another; M counts the
    positions.

    The loop runs over the planes and columns of the window, of which there are ``columns`` = T*S together. The rows of
    the window are unrolled, because which rows of x meet which rows of outputs is a constant. ``columns`` is a run-time
    argument because the compiler would unroll a loop of constant length, and hold the loads of all columns in
    registers."""
    FILTERS: tl.constexpr = K * GROUPS
    TILES_C: tl.constexpr = (FILTERS + BLOCK_C - 1) // BLOCK_C
    BLOCK_X: tl.constexpr = BLOCK_C // K * C
    BLOCK_R: tl.constexpr = equal_block(R, MAX_ROWS)
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
    accs = zero_sums(ROWS, (BLOCK_M, BLOCK_C))
    for first in tl.static_range(0, R, BLOCK_R):
        for step in range(1 if T * S == 1 else columns):
            t = step // S
            s = step % S
            mask = mask_m & is_within(w0 + s * DIL_W, W)
            if RANK == 3:
                mask &= is_within(d0 + t * DIL_D, D)
            xs = ()
            for j in tl.static_range((ROWS - 1) * STRIDE_H + (R - 1) * DIL_H + 1):
                if reads_row(j, ROWS, first, BLOCK_R, R, STRIDE_H, DIL_H):
                    shift = (t * DIL_D * stride_xd + j * stride_xh + s * DIL_W * stride_xw) * X_VEC
                    mask_x = (mask & is_within(h0 + j, H))[:, None] & mask_c[None, :]
                    xs += (tl.load(x_ptrs + shift, mask=mask_x, other=0.0),)  # [BLOCK_M, BLOCK_X]
                else:
                    xs += (0.0,)
            for channel in tl.static_range(C):
                for r in tl.static_range(BLOCK_R):
                    if first + r < R:
                        tap = (t * R + first + r) * S + s
                        if TURNED:
                            tap = T * R * S - 1 - tap
                        w = tl.load(w_ptr + (tap * C + channel) * FILTERS + k, mask=mask_k, other=0.0)  # [BLOCK_C]
                        sums = ()
                        for row in tl.static_range(ROWS):
                            x = channel_columns(xs[row * STRIDE_H + (first + r) * DIL_H], channel, C)
                            sums += (accs[row] + repeated_columns(x, K).to(tl.float32) * w[None, :],)
                        accs = sums
    for row in tl.static_range(ROWS):
        p = i * ROWS + row
        y_off = tile_offsets(n, z, p, q, k, stride_yn, 1, stride_yz, stride_yp, stride_yq, Y_VEC, True)
        mask = (mask_m & (p < P))[:, None] & mask_k[None, :]
        store_with_epilogue(
            accs[row], k, y_off, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, saved_ptr, mask_k, ACTIVATION
        )


# --- rows: NCHW ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES, "rows"])
def direct_rows_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, saved_ptr,
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
    """From x [N, C*GROUPS, D, H, W] and w, fp32 [T, R, S, C, K*GROUPS], to y [N, K*GROUPS, Z, P, Q]. A program sums
    BLOCK_P rows by BLOCK_Q runs of outputs of one filter; the tile lies within one plane, so that finding the place of
    a run takes a thread no division by P or Q. The loop runs over the ``rows`` = T*R*C of the window, of all its planes
    and channels. The columns of the window are unrolled."""
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
    accs = zero_sums(RUN, (BLOCK_P * BLOCK_Q,))
    for step in range(1 if T * R * C == 1 else rows):
        c = step % C
        r = step // C % R
        t = step // C // R
        h = h0 + r * DIL_H
        d = d0 + t * DIL_D
        mask = only_if(mask_m & is_within(h, H), (d >= 0) & (d < D))
        shifted = row + (t * DIL_D * stride_xd + r * DIL_H * stride_xh + c * stride_xc)
        # A tuple of columns of x, each [BLOCK_P * BLOCK_Q].
        xs = load_columns(x_ptr, shifted, q, mask, W, stride_xw, S, STRIDE_W, PAD_W, DIL_W, X_VEC, RUN)
        for s in tl.static_range(S):
            tap = (t * R + r) * S + s
            if TURNED:
                tap = T * R * S - 1 - tap
            w = tl.load(w_ptr + (tap * C + c) * FILTERS + k)  # a scalar
            sums = ()
            for j in tl.static_range(RUN):
                x = xs[j * STRIDE_W + s * DIL_W - PAD_W - first_run(RUN, PAD_W) * RUN]
                sums += (accs[j] + x.to(tl.float32) * w,)
            accs = sums
    acc = packed_columns(accs)  # [BLOCK_P * BLOCK_Q, RUN]
    column = q[:, None] * RUN + tl.arange(0, RUN)[None, :]
    y_row = n.to(tl.int64) * stride_yn + k * stride_yk + z * stride_yz + p.to(tl.int64) * stride_yp
    # A row holds a whole number of runs of Y_VEC elements, and the mask decides for such a run as a whole, so the
    # compiler may store Y_VEC elements at once.
    mask = mask_m[:, None] & below(column, Q, Y_VEC)
    filters = k + tl.arange(0, 1)
    store_with_epilogue(
        acc, filters, y_row[:, None] * Y_VEC + column, mask, scale_ptr, bias_ptr, residual_ptr, y_ptr, saved_ptr,
        filters < FILTERS, ACTIVATION,
    )  # fmt: skip
