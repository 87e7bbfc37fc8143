r"""Gradient of a convolution's weights, as a matrix product that sums over the pixels.

    dw[k,c,t,r,s] = sum over (n, z, p, q) of g[n,k,z,p,q]
                    * x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H, q*STRIDE_W - PAD_W + s*DIL_W]

g is the gradient at the sums, before the epilogue. The matrix product of one group, or of MERGED groups, has

    rows             K filters
    columns          TAPS*C, with TAPS = T*R*S: the channels of every tap
    reduction        N*Z*P*Q output pixels
    left operand     g, transposed
    right operand    x at the taps of each pixel's window; taps outside the image are zeros

Bytes (e: bytes an element; T_m, T_n: tiles of rows and of columns). What must come from memory once is
|x| + |g| + |dw|. What the load and store instructions move is, for each product (C and K count the channels and filters
of all its groups; taps outside the image load nothing),

    T_m * N*Z*P*Q*TAPS*C*e + T_n * N*Z*P*Q*K*e + TAPS*C*K/MERGED*e

SPLIT_K > 1 adds 8 * SPLIT_K bytes for each element of dw: fp32 partial sums, written and read once.
"""

import triton
import triton.language as tl

from ._math import dot, narrow, position
from .conv_windows import G_STRIDES, SIZES, X_STRIDES, inside_image, tap_shift


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *G_STRIDES])
def conv_weight_grad_kernel(
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
    """From x [N, D, H, W, GROUPS*C] and g [N, Z, P, Q, GROUPS*K] to dw [GROUPS*K, TAPS*C/MERGED], or with splits > 1 to
    the fp32 partial sums [splits, GROUPS*K, TAPS*C/MERGED]; M counts the output pixels.

    MERGED groups of few channels are multiplied as one group, because tensor cores would else multiply mostly padding;
    C and K count the channels and filters of the merged group, GROUPS the merged groups. Elements of the product that
    belong to a filter and a channel of different groups are not stored.
    """
    # Where BLOCK_N divides C, all columns of a tile are channels of one tap; otherwise each column has its own tap.
    ONE_TAP: tl.constexpr = C % BLOCK_N == 0
    TILES_M: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (TAPS * C + BLOCK_N - 1) // BLOCK_N

    # The tiles of one split have neighbouring numbers, so that programs that load the same pixels run at the same time
    # and find them in the L2 cache.
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
            mask_x = inside_image(mask_p, d0 + t, h0 + r, w0 + s, D, H, W, PAD_D, PAD_H, PAD_W)
            x_row = n.to(tl.int64) * stride_xn + (d0 + t).to(tl.int64) * stride_xd
            x_row += (h0 + r).to(tl.int64) * stride_xh + (w0 + s).to(tl.int64) * stride_xw
            x_off = (x_row * X_VEC)[:, None] + c_off[None, :]
            x = tl.load(x_ptr + x_off, mask=mask_x[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            d, h, col = d0[:, None] + t[None, :], h0[:, None] + r[None, :], w0[:, None] + s[None, :]
            mask_x = inside_image(mask_p[:, None] & mask_n[None, :], d, h, col, D, H, W, PAD_D, PAD_H, PAD_W)
            x_row = n.to(tl.int64) * stride_xn + d0.to(tl.int64) * stride_xd
            x_row += h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
            tap_off = (t * stride_xd + r * stride_xh + s * stride_xw) * X_VEC + c_off
            x_ptrs = x_ptr + (x_row * X_VEC)[:, None] + tap_off[None, :]
            x = tl.load(x_ptrs, mask=mask_x, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(tl.trans(g), x, acc, PRECISION)

    PER_GROUP: tl.constexpr = C // MERGED
    column = tap * STRIDE_WT + c % PER_GROUP * STRIDE_WC
    out_row = (split * GROUPS * K + group * K + offs_m).to(tl.int64) * (TAPS * PER_GROUP)
    mask = mask_m[:, None] & mask_n[None, :]
    if MERGED > 1:
        mask &= (offs_m // (K // MERGED))[:, None] == (c // PER_GROUP)[None, :]
    tl.store(dw_ptr + out_row[:, None] + column[None, :], narrow(acc, dw_ptr.dtype.element_ty), mask=mask)
