r"""Convolution transposed with a stride above 1, without matrix products.

    x[n,c,d,h,w] = sum of g[n,k,z,p,q] * w[k,c,t,r,s] over the filters k of c's group and the taps with
                   z*STRIDE_D - PAD_D + t*DIL_D = d, p*STRIDE_H - PAD_H + r*DIL_H = h, q*STRIDE_W - PAD_W + s*DIL_W = w

Then comes the epilogue of :mod:`.conv_epilogue`. The pixels of x are computed by cells of STRIDE_H x STRIDE_W pixels.
All cells read g in the same pattern, so a cell's products are unrolled. (With strides of 1 the transpose is a
convolution whose taps come in reverse order, which :mod:`.conv_direct_forward` computes.)

Bytes (G: groups; a weight has 4 bytes). What must come from memory once is |g| + |w| + |x|. What the load and store
instructions move is at most (what lies outside g is not loaded, and the L1 cache serves most of what neighbouring cells
share)

    T*A*B/(STRIDE_H*STRIDE_W) * |x|*K/C + 4*T_m * T*R*S*C*K*G + |x|    A x B: elements of a plane of g that a cell reads
                                                                       T_m: tiles of BLOCK_M cells

In NCHW a thread holds one channel of g at a time, and the first term is C times as large.
"""

import triton
import triton.language as tl

from ._math import position, tile_offsets
from .conv_direct_tiles import channel_columns, is_within, repeated_columns, zero_sums
from .conv_epilogue import store_with_epilogue
from .conv_windows import SIZES, X_STRIDES, Y_STRIDES


@triton.constexpr_function
def _tap_adds_to(tap, output, stride, pad, dil):
    """Does a tap add to pixel number ``output`` of a cell, along one dimension?"""
    return (tap * dil - pad) % stride == output


@triton.constexpr_function
def cell_input(tap, stride, pad, dil):
    """Which element of g a tap multiplies, along one dimension: its index, less the number of the cell."""
    return -((tap * dil - pad) // stride)


@triton.constexpr_function
def _reads_input(i, window, stride, pad, dil):
    """Does a tap of the window multiply the element of g with index i, less the number of the cell?"""
    return any((tap * dil - pad) // stride == -i for tap in range(window))


@triton.jit(do_not_specialize=[*SIZES, *X_STRIDES, *Y_STRIDES])
def direct_transpose_kernel(
    g_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, x_ptr, saved_ptr,
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
    """From g [N, K*GROUPS, Z, P, Q] and w, fp32 [T, R, S, K, C*GROUPS], to x [N, C*GROUPS, D, H, W], all three of any
    layout; the names of x's and y's strides are those of the convolution. A program sums BLOCK_M cells of
    STRIDE_H x STRIDE_W pixels by BLOCK_C channels; M counts the cells.

    In rows and columns the constants of the window say to which pixel of the cell a tap adds, and which element of g it
    multiplies, so no product is masked out. In depth the taps whose plane of g does not exist are masked."""
    CHANNELS: tl.constexpr = C * GROUPS
    TILES_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    # Where channels are neighbours in memory, a thread loads all K channels of a group of g at once, else one by one.
    HELD: tl.constexpr = K if UNIT_C else 1
    BLOCK_K: tl.constexpr = BLOCK_C // C * K if UNIT_C else 1
    REPEATS: tl.constexpr = C if UNIT_C else 1
    FIRST_H: tl.constexpr = cell_input(R - 1, STRIDE_H, PAD_H, DIL_H)
    FIRST_W: tl.constexpr = cell_input(S - 1, STRIDE_W, PAD_W, DIL_W)
    INPUTS_H: tl.constexpr = cell_input(0, STRIDE_H, PAD_H, DIL_H) - FIRST_H + 1
    INPUTS_W: tl.constexpr = cell_input(0, STRIDE_W, PAD_W, DIL_W) - FIRST_W + 1
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
    accs = zero_sums(STRIDE_H * STRIDE_W, (BLOCK_M, BLOCK_C))
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
                    mask_g = mask & is_within(p, P) & is_within(q, Q)
                    mask_gk = mask_g[:, None] & mask_k[None, :]
                    gs += (tl.load(g_ptr + g_off, mask=mask_gk, other=0.0),)  # [BLOCK_M, BLOCK_K]
                else:
                    gs += (0.0,)
        sums = ()
        for u in tl.static_range(STRIDE_H):
            for v in tl.static_range(STRIDE_W):
                acc = accs[u * STRIDE_W + v]
                for r in tl.static_range(R):
                    for s in tl.static_range(S):
                        if _tap_adds_to(r, u, STRIDE_H, PAD_H, DIL_H) and _tap_adds_to(s, v, STRIDE_W, PAD_W, DIL_W):
                            g = gs[
                                (cell_input(r, STRIDE_H, PAD_H, DIL_H) - FIRST_H) * INPUTS_W
                                + cell_input(s, STRIDE_W, PAD_W, DIL_W) - FIRST_W
                            ]  # fmt: skip
                            for held in tl.static_range(HELD):
                                w_off = (((t * R + r) * S + s) * K + k + held) * CHANNELS + c
                                w = tl.load(w_ptr + w_off, mask=mask_c, other=0.0)  # [BLOCK_C]
                                acc += (
                                    repeated_columns(channel_columns(g, held, HELD), REPEATS).to(tl.float32)
                                    * w[None, :]
                                )
                sums += (acc,)
        accs = sums
    for u in tl.static_range(STRIDE_H):
        for v in tl.static_range(STRIDE_W):
            h = i * STRIDE_H + u
            w = j * STRIDE_W + v
            x_off = tile_offsets(n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, UNIT_C)
            mask = (mask_m & (h < H) & (w < W))[:, None] & mask_c[None, :]
            store_with_epilogue(
                accs[u * STRIDE_W + v], c, x_off, mask, scale_ptr, bias_ptr, residual_ptr, x_ptr, saved_ptr, mask_c,
                ACTIVATION,
            )  # fmt: skip
