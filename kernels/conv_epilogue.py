r"""What follows the matrix products of a convolution: the epilogue, its gradient, and the sums of split reductions.

    y = act(scale[k] * acc + bias[k] + residual)        in fp32, rounded once; acc is the convolution's sum
    g = dy * act'(saved)                                0 where the activation is flat, even where dy is infinite
    dbias[k] = sum of g over images and pixels
    out = sum over the splits of partial                in order, in fp32; then the epilogue, if there is one

Bytes (e: bytes an element). Each element is loaded and stored once, so the load and store instructions move just
what must come from memory:

    epilogue             |residual| + |y| + |saved|, in the kernel that computes acc
    its gradient         |dy| + |saved| + |g|, and for the bias 8*SPLIT_M*K + K*e: partial sums, written and read once
    sums of splits       4*SPLIT_K for each element of the result, which another kernel wrote, and the epilogue's bytes

Each element is written once, by one program, which adds in a fixed order. No atomics.
"""

import triton
import triton.language as tl

from ._math import activate, activation_backward, below, column_sum, dense_offsets, narrow, pixel_offsets
from .conv_windows import SAVED_STRIDES, SIZES, Y_STRIDES


@triton.jit
def store_with_epilogue(
    acc, k, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr, mask_k, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Stores ``act(scale * acc + bias + residual)``, computed in fp32, at ``offsets`` of out_ptr. Stores the input of
    the activation at the same offsets of saved_ptr, if that is given. acc, offsets and mask are [pixels, channels]; k
    and mask_k are [channels]."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]  # [1, channels]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]  # [1, channels]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [pixels, channels]
    if saved_ptr is not None:
        tl.store(saved_ptr + offsets, narrow(acc, saved_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offsets, narrow(activate(acc, ACTIVATION), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *Y_STRIDES, *SAVED_STRIDES])
def epilogue_grad_kernel(
    dy_ptr, saved_ptr, g_ptr, partial_ptr,
    M, Z, P, Q, splits,
    stride_yn: tl.int64, stride_yk: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_saved_n: tl.int64, stride_saved_k: tl.int64, stride_saved_z: tl.int64,
    stride_saved_p: tl.int64, stride_saved_q: tl.int64,
    K: tl.constexpr, RANK: tl.constexpr, Y_UNIT_C: tl.constexpr,
    SAVED_UNIT_C: tl.constexpr, G_CHANNELS_LAST: tl.constexpr,
    Y_VEC: tl.constexpr, SAVED_VEC: tl.constexpr, G_RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From dy and saved [M pixels, K] to g, dense in either layout, and to the sums of g over the pixels, which are the
    gradient of the bias; K counts the channels of all groups. A program reads one of ``splits`` equal parts of the
    pixels, BLOCK_M at a time, and stores its sums over them in partial [splits, K]. saved_ptr, g_ptr and partial_ptr
    may be None."""
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0) // TILES_N
    offs_n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    steps = tl.cdiv(M, BLOCK_M)
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        offs_m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = below(offs_m, M, 1 if Y_UNIT_C else Y_VEC)[:, None] & mask_n[None, :]
        y_off = pixel_offsets(
            offs_m, offs_n, Z, P, Q, stride_yn, stride_yk, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C, RANK
        )  # fmt: skip
        g = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if saved_ptr is not None:
            mask_saved = below(offs_m, M, 1 if SAVED_UNIT_C else SAVED_VEC)[:, None] & mask_n[None, :]
            saved_off = pixel_offsets(
                offs_m, offs_n, Z, P, Q, stride_saved_n, stride_saved_k, stride_saved_z, stride_saved_p, stride_saved_q,
                SAVED_VEC, SAVED_UNIT_C, RANK,
            )  # fmt: skip
            saved = tl.load(saved_ptr + saved_off, mask=mask_saved, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
            g = tl.where(mask, activation_backward(g, saved, ACTIVATION), 0.0)
        if g_ptr is not None:
            mask_g = below(offs_m, M, G_RUN)[:, None] & mask_n[None, :]
            g_off = dense_offsets(offs_m, offs_n, Z * P * Q, K, G_CHANNELS_LAST, G_RUN)
            tl.store(g_ptr + g_off, narrow(g, g_ptr.dtype.element_ty), mask=mask_g)
        acc += g
    if partial_ptr is not None:
        tl.store(partial_ptr + split * K + offs_n, column_sum(acc), mask=mask_n)


# --- sums of splits --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "image", "splits"])
def reduce_splits_kernel(
    partial_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr,
    M, image, splits,
    K: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the fp32 partial sums [splits, M, K] in order and stores the result with the epilogue. M counts the pixels,
    ``image`` those of one image, K the channels of all groups."""
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    offs_m = tl.program_id(0) // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < K
    mask = below(offs_m, M, RUN)[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for split in range(0, splits):
        row_off = (offs_m + tl.cast(split, tl.int64) * M) * K
        acc += tl.load(partial_ptr + row_off[:, None] + offs_n[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    offsets = dense_offsets(offs_m, offs_n, image, K, CHANNELS_LAST, RUN)
    store_with_epilogue(
        acc, offs_n, offsets, mask, scale_ptr, bias_ptr, residual_ptr, out_ptr, saved_ptr, mask_n, ACTIVATION
    )


@triton.jit(do_not_specialize=["L", "splits"])
def sum_splits_kernel(partial_ptr, out_ptr, L: tl.int64, splits, BLOCK: tl.constexpr):
    """out[l] = sum of partial[split, l] over the splits, in order, for L elements. The rounding error of each addition
    is computed (Knuth's two-sum), and their sum is added at the end, so the result is as accurate with hundreds of
    splits as with one. It takes no more time, because memory bounds the kernel."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < L
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    lost = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(0, splits):
        term = tl.load(partial_ptr + split * L + offs, mask=mask, other=0.0)  # [BLOCK]
        total = acc + term
        added = total - acc
        lost += (acc - (total - added)) + (term - added)
        acc = total
    acc = tl.where(lost == lost, acc + lost, acc)  # the rounding error of an infinite sum is computed as NaN
    tl.store(out_ptr + offs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)
