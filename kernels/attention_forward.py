r"""Attention forward: one program owns a tile of queries and streams the keys and values.

    p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij),  out_i = sum_j p_ij v_j

out_i is 0 for a query from which every key is hidden.

Bytes (e: bytes an element, T_M = ceil(M / BLOCK_M); with causality, tiles of keys that no query of the tile sees are
neither loaded nor counted). What must come from memory once is each tensor once: Q, K, V, out, lse, mask and bias. What
the load and store instructions move:

    e B H (M D + M DV + T_M N (D + DV))
    + 4 B H M for lse, for top and for rest, whichever are stored
    + an element of mask and of bias, whichever are given, for each pair of query and key

The first program of a head brings its K and V into the L2 cache, which serves the head's other programs.

A program computes BLOCK_M queries of one head. It keeps for each query a running maximum ``top`` of the scores, a
running sum ``total`` of the exponentials, and the weighted sum of values; when the maximum grows, the sums are scaled
to it. Cosine scores satisfy |s| <= |scale|, so with BOUNDED this bound is used as the maximum and nothing is scaled.

For the backward the forward stores lse of each query. With a bias or in full fp32 it stores lse in two parts, the
maximum ``top`` and ``rest``, the inverse of the sum: in one number the logarithm of the sum would be rounded away next
to a maximum as large as ``finfo.min``.
"""

import triton
import triton.language as tl

from ._math import dot, narrow
from .attention_tiles import (
    LN2,
    LOG2E,
    OPERAND_STRIDES,
    SCORE_STRIDES,
    SIZES,
    exp_of,
    head_pointer,
    key_limits,
    load_rows,
    prescaled,
    scores_of,
    store_rows,
)


@triton.jit
def _sums_with_keys(
    acc, total, top, q, first_row, begin, end, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, scale,
    mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC: tl.constexpr,
    bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The running sums (acc [BLOCK_M, BLOCK_DV], total [BLOCK_M], top [BLOCK_M]) with the keys from ``begin`` to
    ``end`` added. ``q`` [BLOCK_M, BLOCK_D] is loaded; keys and values are loaded here, BLOCK_N at a time."""
    row = tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, start, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, CHECK)  # [BLOCK_N, BLOCK_D]
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = scores_of(
            products, row, column, first_row, start, M, N, shift, scale,
            mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC,
            bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC, CAUSAL, UNIT, CHECK,
        )  # fmt: skip
        if BOUNDED:
            p = exp_of(s - top[:, None], UNIT)
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet: -inf - -inf is NaN
            p = exp_of(s - base[:, None], UNIT)
            kept = exp_of(top - base, UNIT)
            acc = acc * kept[:, None]
            total = total * kept
            top = new_top
        total += tl.sum(p, 1)
        v = load_rows(v_ptr, start, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, CHECK)  # [BLOCK_N, BLOCK_DV]
        acc = dot(narrow(p, v.dtype), v, acc, PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=[*SIZES, *OPERAND_STRIDES, *SCORE_STRIDES])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, o_ptr, lse_ptr, top_ptr, rest_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q [B, H, M, D], k [B, H / GROUP, N, D], v [B, H / GROUP, N, DV], mask and bias [B, H, M, N] to o [B, H, M, DV]
    and to lse, top and rest [B, H, M], of which those that are None are not stored. Mask and bias may have strides of
    0. ``top`` alone is the whole lse, in the unit of the scores; with ``rest`` it is the maximum."""
    tiles = tl.cdiv(M, BLOCK_M)
    # With causality the last queries see the most keys. Their programs start first, so that the short ones fill the
    # multiprocessors at the end.
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr = head_pointer(q_ptr, b, h, stride_qb, stride_qh, VEC)
    k_ptr = head_pointer(k_ptr, b, h // GROUP, stride_kb, stride_kh, VEC)
    v_ptr = head_pointer(v_ptr, b, h // GROUP, stride_vb, stride_vh, VEC)
    o_ptr = head_pointer(o_ptr, b, h, stride_ob, stride_oh, VEC)
    if mask_ptr is not None:
        mask_ptr = head_pointer(mask_ptr, b, h, stride_mask_b, stride_mask_h, MASK_VEC)
    if bias_ptr is not None:
        bias_ptr = head_pointer(bias_ptr, b, h, stride_bias_b, stride_bias_h, BIAS_VEC)
    q = load_rows(q_ptr, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)  # [BLOCK_M, BLOCK_D]
    q, rest_scale = prescaled(q, scale)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if BOUNDED:
        top = tl.zeros([BLOCK_M], tl.float32) + tl.abs(scale) * (LOG2E if UNIT == "log2" else 1.0)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    whole, end = key_limits(first_row, BLOCK_M, N, shift, CAUSAL, BLOCK_N)
    acc, total, top = _sums_with_keys(
        acc, total, top, q, first_row, 0, whole, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC, bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, BOUNDED, UNIT, PRECISION, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    acc, total, top = _sums_with_keys(
        acc, total, top, q, first_row, whole, end, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC, bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, BOUNDED, UNIT, PRECISION, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    store_rows(o_ptr, acc * inverse[:, None], first_row, M, stride_os, DV, BLOCK_DV, BLOCK_M, VEC)
    i = first_row + tl.arange(0, BLOCK_M)
    row = bh * M + i
    base = tl.where(top == float("-inf"), 0.0, top)
    # The backward reads lse in the unit of the scores. For an empty row, which sees no key, it has to compute
    # probabilities of 0: exp(-inf - inf) is 0, and so is any exponential times ``inverse``, which is 0 there.
    if UNIT == "log2":
        kept = tl.where(empty, float("inf"), base + tl.log2(tl.where(empty, 1.0, total)))
        lse = kept * LN2
    else:
        kept = base
        lse = base + tl.log(tl.where(empty, 1.0, total))
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(empty, float("-inf"), lse), mask=i < M)
    if top_ptr is not None:
        tl.store(top_ptr + row, kept, mask=i < M)
    if rest_ptr is not None:
        tl.store(rest_ptr + row, inverse, mask=i < M)
