r"""What unpooling needs beside the gather of the backward, and the gather of winners.

    unpool    y[n, c, index[n,c,z,p,q]] = x[n,c,z,p,q], zeros elsewhere; of equal indices the last one wins
    gather    y[n,c,z,p,q] = x at the place of (z, p, q)'s winner; 0 where there is none

An unpooling first gathers by :mod:`.pool_backward`, with REDUCE "last": each element of the result looks through the
windows that cover it. That does not see an index that lies outside its own window; those are the strays.

Bytes (i: bytes of an index; e: bytes an element). What must come from memory once:

    unpool    |x| + 8*N*C*Z*P*Q + |y|; the strays' kernel reads each index once more
    gather    |y| + i*N*C*Z*P*Q + |x|; its instructions move (2e + i) for each output
"""

import triton
import triton.language as tl

from ._math import position, tile_offsets
from .pool_windows import INDEX_STRIDES, SIZES, STRIDES, X_STRIDES, Y_STRIDES, window_of


@triton.jit(do_not_specialize=["C", "Z", "P", "Q", "D", "H", "W", *X_STRIDES, *Y_STRIDES, *INDEX_STRIDES])
def unpool_strays_kernel(
    x_ptr, index_ptr, y_ptr,
    C, D, H, W, Z, P, Q,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_index_n: tl.int64, stride_index_c: tl.int64, stride_index_z: tl.int64,
    stride_index_p: tl.int64, stride_index_q: tl.int64,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the elements whose index lies outside their own window, which the gather does not see. A pooling makes
    none. Such an element looks through all later ones of its plane and writes if none of them has its index."""
    tiles = tl.cdiv(Z * P * Q, BLOCK)
    plane = tl.program_id(0) // tiles
    n, c = (plane // C).to(tl.int64), (plane % C).to(tl.int64)
    own = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    z, p, q = own // (P * Q), own // Q % P, own % Q
    index_plane = index_ptr + n * stride_index_n + c * stride_index_c
    mask_own = own < Z * P * Q
    own_ptrs = index_plane + z * stride_index_z + p * stride_index_p + q * stride_index_q
    index = tl.load(own_ptrs, mask=mask_own, other=-1)  # [BLOCK]
    d, h, w = index // W // H, index // W % H, index % W
    t, r, s = d - z * STRIDE_D + PAD_D, h - p * STRIDE_H + PAD_H, w - q * STRIDE_W + PAD_W
    stray = (t < 0) | (t >= T) | (r < 0) | (r >= R) | (s < 0) | (s >= S)
    stray &= (index >= 0) & (index < tl.cast(D, tl.int64) * H * W)
    if tl.max(stray.to(tl.int32), axis=0) > 0:
        last = stray.to(tl.int32)
        for first in range(tl.program_id(0) % tiles * BLOCK, Z * P * Q, BLOCK):
            other = first + tl.arange(0, BLOCK)
            other_z, other_p, other_q = other // (P * Q), other // Q % P, other % Q
            mask_other = other < Z * P * Q
            other_ptrs = index_plane + other_z * stride_index_z + other_p * stride_index_p + other_q * stride_index_q
            other_index = tl.load(other_ptrs, mask=mask_other, other=-1)  # [BLOCK]
            same = (other_index[None, :] == index[:, None]) & (other[None, :] > own[:, None])
            last = tl.where(tl.max(same.to(tl.int32), axis=1) > 0, 0, last)
        x_off = n * stride_xn + c * stride_xc + z * stride_xd + p * stride_xh + q * stride_xw
        mask = last > 0
        x = tl.load(x_ptr + x_off, mask=mask, other=0.0)  # [BLOCK]
        tl.store(y_ptr + n * stride_yn + c * stride_yc + d * stride_yz + h * stride_yp + w * stride_yq, x, mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def pool_gather_kernel(
    x_ptr, index_ptr, y_ptr,
    M, D, H, W, Z, P, Q, largest_h, largest_w,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_index_n: tl.int64, stride_index_c: tl.int64, stride_index_z: tl.int64,
    stride_index_p: tl.int64, stride_index_q: tl.int64,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr, ADAPTIVE: tl.constexpr,
    NONE: tl.constexpr, INDEX_VEC: tl.constexpr, INDEX_UNIT_C: tl.constexpr,
    Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [N, C, Z, P, Q] from x, element by element at the places of the winners. M counts the pixels of y."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    n, z, p, q = position(offs_m, Z, P, Q, RANK)
    mask = (offs_m < M)[:, None] & (c < C)[None, :]
    index_off = tile_offsets(
        n, z, p, q, c, stride_index_n, stride_index_c, stride_index_z, stride_index_p, stride_index_q,
        INDEX_VEC, INDEX_UNIT_C,
    )  # fmt: skip
    index = tl.load(index_ptr + index_off, mask=mask, other=0)  # [BLOCK_M, BLOCK_C]
    if index_ptr.dtype.element_ty == tl.int64:
        valid = (index >= 0) & (index < tl.cast(D, tl.int64) * H * W)
        d, h, w = index // W // H, index // W % H, index % W
    else:
        valid = index != NONE
        tap = index.to(tl.int32)
        taps_h = largest_h if ADAPTIVE else R
        taps_w = largest_w if ADAPTIVE else S
        d0, _ = window_of(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
        h0, _ = window_of(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
        w0, _ = window_of(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
        d = d0[:, None] + tap // taps_w // taps_h * DIL_D
        h = h0[:, None] + tap // taps_w % taps_h * DIL_H
        w = w0[:, None] + tap % taps_w * DIL_W
    x_off = (n.to(tl.int64) * stride_xn)[:, None] + (c.to(tl.int64) * stride_xc)[None, :]
    x_off += d.to(tl.int64) * stride_xd + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    x = tl.load(x_ptr + x_off, mask=mask & valid, other=0.0)  # [BLOCK_M, BLOCK_C]
    y_off = tile_offsets(n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C)
    tl.store(y_ptr + y_off, x, mask=mask)
