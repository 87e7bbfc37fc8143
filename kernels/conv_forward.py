r"""Convolution forward, as a matrix product whose left operand is gathered from x.

    y[n,k,z,p,q] = epilogue(sum_{c,t,r,s} x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H,
                                              q*STRIDE_W - PAD_W + s*DIL_W] * w[k,c,t,r,s])

The epilogue is that of :mod:`.conv_epilogue`. The matrix product of one group has

    rows             N*Z*P*Q output pixels
    columns          K filters
    reduction        TAPS*C, with TAPS = T*R*S: the channels of every tap
    left operand     x at the taps of each pixel's window; taps outside the image are zeros
    right operand    w, transposed

Bytes (e: bytes an element; T_m, T_n: tiles of rows and of columns). What must come from memory once is |x| + |w| + |y|.
What the load and store instructions move is, for each group (taps outside the image load nothing),

    T_n * N*Z*P*Q*TAPS*C*e + T_m * K*TAPS*C*e + N*Z*P*Q*K*e

The kernel by lines moves as much. SPLIT_K > 1 adds 8 * SPLIT_K * N*Z*P*Q*K: fp32 partial sums, written and read once.
"""

import triton
import triton.language as tl

from ._math import below, dense_offsets, dot, grouped_tile, position
from .conv_epilogue import store_with_epilogue
from .conv_windows import SIZES, X_STRIDES, inside_image, tap_shift


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES])
def conv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr, partial_ptr,
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
    """From x [N, D, H, W, GROUPS*C] and w [GROUPS*K, TAPS, C] to y, or with splits > 1 to the fp32 partial sums
    [splits, M, GROUPS*K]; M counts the output pixels. A program computes BLOCK_M pixels by BLOCK_N filters of a group.

    The last TAIL of the C channels belong to no tap (:func:`.conv_problem.pad_problem`); x is not zero there.

    With SWAP the filters are the rows of the product and the pixels its columns. One instruction of the tensor cores
    multiplies 64 rows, so a product of 64 by 256 elements reads less shared memory than one of 256 by 64."""
    # Where BLOCK_K divides C, all BLOCK_K elements of a step are channels of one tap, so the tap and the mask of x are
    # computed once for each pixel. Otherwise each element of the step has its own tap.
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
            mask_x = inside_image(mask_m, d0 + t, h0 + r, w0 + s, D, H, W, PAD_D, PAD_H, PAD_W)
            x_row = row + (t * stride_xd + r * stride_xh + s * stride_xw) * X_VEC
            x_off = x_row[:, None] + (step % (C // BLOCK_K) * BLOCK_K + offs_k)[None, :]
            x = tl.load(x_ptr + x_off, mask=mask_x[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            t, r, s = tap_shift(k // C, R, S, DIL_D, DIL_H, DIL_W, RANK)
            mask_k = k < TAPS * C
            d, h, col = d0[:, None] + t[None, :], h0[:, None] + r[None, :], w0[:, None] + s[None, :]
            mask_x = inside_image(mask_m[:, None] & mask_k[None, :], d, h, col, D, H, W, PAD_D, PAD_H, PAD_W)
            tap_off = (t * stride_xd + r * stride_xh + s * stride_xw) * X_VEC + k % C
            x = tl.load(x_ptr + row[:, None] + tap_off[None, :], mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
            mask_w = mask_n[None, :] & mask_k[:, None]
            w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask_w, other=0.0)  # [BLOCK_K, BLOCK_N]
        # The last TAIL channels are pixels behind the window. Their weights are 0, but 0 * inf is NaN, so they are set
        # to 0 here. A mask at the load would do the same, but it would halve the width of the load.
        if TAIL > 0:
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
        store_with_epilogue(
            acc, channel, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr, mask_n, ACTIVATION
        )


@triton.jit(do_not_specialize=["L", "lines", "Z", "P", "Q"])
def conv_lines_kernel(
    x_desc, w_desc, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr,
    L, lines, Z, P, Q,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, GROUPS: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr, TURNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Forward, or with TURNED the transpose (C and K exchanged), where every stride is 1. A line is a row of L pixels
    of the result; where windows have one tap and there is no padding, all pixels of all images are one line.

    A program computes BLOCK_M neighbouring pixels of one of the ``lines``. At each tap those read BLOCK_M neighbouring
    pixels of x [N, D, H, W, GROUPS*C], a box that the tensor memory accelerator copies; it writes zeros for what lies
    outside the image. So no thread computes the address of an operand, which saves 30 registers a thread.
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
        box = x_desc.load([n, d0 + WAY * t, h0 + WAY * r, w0 + WAY * s, group * C + k])  # [1, 1, 1, BLOCK_M, BLOCK_K]
        x = tl.reshape(box, (BLOCK_M, BLOCK_K))
        if TURNED:
            w = tl.reshape(w_desc.load([group * C + k, tap, column]), (BLOCK_K, BLOCK_N))  # [BLOCK_K, BLOCK_N]
        else:
            w = tl.trans(
                tl.reshape(w_desc.load([group * K + column, tap, k]), (BLOCK_N, BLOCK_K))  # [BLOCK_N, BLOCK_K]
            )
        acc = dot(x, w, acc, "ieee")

    offs_l = first + tl.arange(0, BLOCK_M)
    offs_n = column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    channel = group * K + offs_n
    pixel = line * (L // RUN) * RUN + offs_l
    offsets = dense_offsets(pixel, channel, Z * P * Q, K * GROUPS, CHANNELS_LAST, RUN)
    mask = below(offs_l, L, RUN)[:, None] & mask_n[None, :]
    store_with_epilogue(
        acc, channel, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr, mask_n, ACTIVATION
    )
