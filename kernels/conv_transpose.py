r"""Convolution transposed: the gradient of a convolution's input, and with the epilogue the transposed convolution.

    x[n,c,d,h,w] = sum of g[n,k,z,p,q] * w[k,c,t,r,s] over k and the taps with z*STRIDE_D - PAD_D + t*DIL_D = d,
                   p*STRIDE_H - PAD_H + r*DIL_H = h and q*STRIDE_W - PAD_W + s*DIL_W = w

Then comes the epilogue of :mod:`.conv_epilogue`. Input pixels whose coordinates leave the same remainders, divided by
the strides, are a parity class. The same taps reach all pixels of a class, and no other tap does, so each class of a
group is a matrix product of its own:

    rows             N*D*H*W / (STRIDE_D*STRIDE_H*STRIDE_W) input pixels, rounded up in each dimension
    columns          C channels
    reduction        the K filters of each tap of the class
    left operand     g at the outputs whose windows reach the pixel at these taps; zeros outside g
    right operand    w at these taps

Bytes (e: bytes an element; T_m, T_n: tiles of rows of a class and of columns). What must come from memory once is
|g| + |w| + |x|. What the load and store instructions move is, for each group (each of the TAPS = T*R*S taps belongs to
one class; what lies outside g is not loaded),

    T_n * N*Z*P*Q*TAPS*K*e + T_m * K*TAPS*C*e + N*D*H*W*C*e

SPLIT_K > 1 adds 8 * SPLIT_K * N*D*H*W*C: fp32 partial sums, written and read once.
"""

import triton
import triton.language as tl

from ._math import below, dense_offsets, dot, grouped_tile, position
from .conv_epilogue import store_with_epilogue
from .conv_windows import G_STRIDES, SIZES


@triton.jit
def _first_tap(position, STRIDE: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr):
    """The smallest of TAPS taps whose offset tap*DIL equals ``position`` modulo STRIDE, or TAPS if there is none. The
    remainders of the offsets repeat after STEP taps, so only the first STEP are tried."""
    first = TAPS
    for tap in tl.static_range(STEP):
        hits = (position + (STRIDE - (STEP - 1 - tap) * DIL % STRIDE)) % STRIDE == 0
        first = tl.where(hits, STEP - 1 - tap, first)
    return tl.minimum(first, TAPS)


@triton.jit(do_not_specialize=[*SIZES, *G_STRIDES])
def conv_transpose_kernel(
    g_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr, partial_ptr,
    N, D, H, W, Z, P, Q, splits,
    stride_gn: tl.int64, stride_gz: tl.int64, stride_gp: tl.int64, stride_gq: tl.int64,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr,
    # Neighbouring taps of a parity class are STEP = STRIDE / gcd(STRIDE, DIL) taps apart.
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    STRIDE_WK: tl.constexpr, STRIDE_WT: tl.constexpr, STRIDE_WC: tl.constexpr,  # of one group's weights
    G_VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """From g [N, Z, P, Q, GROUPS*K] and the weights of :func:`.conv_problem.pack_transposed_weight` to x, or with
    splits > 1 to the fp32 partial sums [splits, N*D*H*W, GROUPS*C]. A program computes BLOCK_M pixels of one parity
    class by BLOCK_N channels of a group, and sums over the taps of that class only, so it multiplies none of the zeros
    that a transposed convolution written as a convolution would insert between the elements of g."""
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
    # (z0, p0, q0) is the output whose window reaches the pixel at the first tap of the class. At the next tap of the
    # class it is the output DIL * STEP / STRIDE before that one.
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
            mask_gk = mask_g[:, None] & mask_k[None, :]
            g = tl.load(g_ptr + g_off[:, None] + k[None, :], mask=mask_gk, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptr + w_off, mask=mask_n[None, :] & mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(g, w, acc, PRECISION)

    channel = group * C + offs_n
    pixel = offs_m if PARITIES == 1 else ((n * D + d) * H + h) * W + w_col
    mask = below(offs_m, N * planes * rows * cols, RUN)[:, None] & mask_n[None, :]
    if partial_ptr is not None:
        row_off = (split.to(tl.int64) * N * D * H * W + pixel) * (C * GROUPS)
        tl.store(partial_ptr + row_off[:, None] + channel[None, :], acc, mask=mask)
    else:
        offsets = dense_offsets(pixel, channel, D * H * W, C * GROUPS, CHANNELS_LAST, RUN)
        store_with_epilogue(
            acc, channel, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr, mask_n, ACTIVATION
        )
