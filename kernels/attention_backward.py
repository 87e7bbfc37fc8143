r"""Attention backward: the gradients of key and value, of query, and of a bias.

    delta_i = out_i . dout_i - dlse_i           dp_ij = dout_i . v_j            ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i p_ij dout_i    dbias = ds, summed

Bytes that the load and store instructions move (e: bytes an element, T_M = ceil(M / BLOCK_M), T_N = ceil(N / BLOCK_N)).
With causality the kernels of dq and of dk, dv skip tiles in which no query sees a key; these are not counted, either.
All but delta also load an element of mask and of bias, where these are given, for each pair of query and key:

    delta       e B H M 2 DV                                          + 4 B H M, twice that with dlse
    dk, dv      e B H (T_N M (D + DV) + 2 N (D + DV) / GROUP)         + 12 B H M T_N
    dq          e B H (M (2 D + DV) + T_M N (D + DV))                 + 12 B H M
    dbias       e B H (T_N M (D + DV) + T_M N (D + DV)) + |dbias|     + 12 B H M T_N

The 12 bytes are top, rest and delta of a query, 8 where lse is one number. What must come from memory once is each
tensor once; the L2 cache serves the tiles that are streamed again by other programs of the same head.

The probabilities p are computed again from the scores and from what the forward stored of each query: lse, or its two
parts, the maximum ``top`` and the inverse ``rest`` of the sum. Each element of a gradient is written once, by one
program, which adds in a fixed order, so each run gives the same bits. No atomics.
"""

import triton
import triton.language as tl

from ._math import column_sum, dot, narrow
from .attention_tiles import (
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


@triton.jit(do_not_specialize=["H", "M", *OPERAND_STRIDES])
def delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos, H, M,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """o and do [B, H, M, DV] and dlse [B, H, M] to delta [B, H, M], out . dout - dlse of each query. The other kernels
    read delta, which is computed once instead of once for each tile of keys."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    o_ptr = head_pointer(o_ptr, b, h, stride_ob, stride_oh, VEC)
    do_ptr = head_pointer(do_ptr, b, h, stride_dob, stride_doh, VEC)
    # Both are [BLOCK_M, BLOCK_DV].
    o = load_rows(o_ptr, first_row, M, stride_os, DV, BLOCK_DV, BLOCK_M, VEC, True).to(tl.float32)
    do = load_rows(do_ptr, first_row, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True).to(tl.float32)
    delta = tl.sum(o * do, 1)
    i = first_row + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * M + i, mask=i < M, other=0.0)  # [BLOCK_M]
    tl.store(delta_ptr + bh * M + i, delta, mask=i < M)


@triton.jit
def _row_statistics(top_ptr, rest_ptr, delta_ptr, row, inside):
    """``(top, rest, delta)``, each [BLOCK_M]: lse as one number (``rest`` is then ``top`` and is not used) or in two
    parts, and delta. For queries outside the tensor the maximum is +inf, so that all their probabilities are 0."""
    top = tl.load(top_ptr + row, mask=inside, other=float("inf"))  # [BLOCK_M]
    rest = top
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + row, mask=inside, other=0.0)  # [BLOCK_M]
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)  # [BLOCK_M]
    return top, rest, delta


@triton.jit
def _probabilities(s, top, rest, UNIT: tl.constexpr):
    """The probabilities exp(s - lse) of a tile of scores; lse is ``top``, or with a bias or in full fp32
    ``top - log(rest)``."""
    if UNIT == "log2":
        return exp_of(s - top, UNIT)
    else:
        return exp_of(s - top, UNIT) * rest


# --- key and value ---------------------------------------------------------------------------------------------------


@triton.jit
def _key_value_grads_with_queries(
    dk, dv, k, v, first_key, begin, end, q_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr,
    stride_qs, stride_dos, M, N, shift, scale,
    mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC: tl.constexpr,
    bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    VEC: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The sums dk [BLOCK_N, BLOCK_D] and dv [BLOCK_N, BLOCK_DV] of a tile of keys, with what the queries from ``begin``
    to ``end`` contribute added. Scores are transposed, [BLOCK_N, BLOCK_M], because both sums are over the queries."""
    row = tl.arange(0, BLOCK_M)[None, :]
    column = tl.arange(0, BLOCK_N)[:, None]
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, start, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)  # [BLOCK_M, BLOCK_D]
        do = load_rows(do_ptr, start, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True)  # [BLOCK_M, BLOCK_DV]
        top, rest, delta = _row_statistics(top_ptr, rest_ptr, delta_ptr, rows, rows < M)
        products = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        s = scores_of(
            products, row, column, start, first_key, M, N, shift, scale,
            mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC,
            bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC, CAUSAL, UNIT, CHECK,
        )  # fmt: skip
        p = _probabilities(s, top[None, :], rest[None, :], UNIT)
        dv = dot(narrow(p, do.dtype), do, dv, PRECISION)
        dp = dot(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        ds = p * (dp - delta[None, :])
        dk = dot(narrow(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*SIZES, *OPERAND_STRIDES, *SCORE_STRIDES])
def key_value_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores dk [B, H / GROUP, N, D] and dv [B, H / GROUP, N, DV]; the other tensors are as in the forward. A program
    owns BLOCK_N keys of one head and streams the queries of all GROUP heads that share it, one head after the other, so
    that the sum over the group stays in registers."""
    tiles = tl.cdiv(N, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h_kv = bh // (H // GROUP), bh % (H // GROUP)
    k_ptr = head_pointer(k_ptr, b, h_kv, stride_kb, stride_kh, VEC)
    v_ptr = head_pointer(v_ptr, b, h_kv, stride_vb, stride_vh, VEC)
    k = load_rows(k_ptr, first_key, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, True)  # [BLOCK_N, BLOCK_D]
    k, rest_scale = prescaled(k, scale)
    v = load_rows(v_ptr, first_key, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, True)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    q_ptr = head_pointer(q_ptr, b, h_kv * GROUP, stride_qb, stride_qh, VEC)
    do_ptr = head_pointer(do_ptr, b, h_kv * GROUP, stride_dob, stride_doh, VEC)
    if mask_ptr is not None:
        mask_ptr = head_pointer(mask_ptr, b, h_kv * GROUP, stride_mask_b, stride_mask_h, MASK_VEC)
    if bias_ptr is not None:
        bias_ptr = head_pointer(bias_ptr, b, h_kv * GROUP, stride_bias_b, stride_bias_h, BIAS_VEC)
    row = (b * H + h_kv * GROUP) * M
    begin = 0
    whole = 0
    if CAUSAL:
        # Queries before ``begin`` see none of these keys and are skipped; those from ``whole`` on see all of them, so
        # their tiles need no check.
        begin = tl.maximum(first_key - shift, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    for _ in range(0, GROUP):
        rest_row = rest_ptr
        if rest_ptr is not None:
            rest_row = rest_ptr + row
        if CAUSAL:
            dk, dv = _key_value_grads_with_queries(
                dk, dv, k, v, first_key, begin, tl.minimum(whole, M), q_ptr, do_ptr,
                top_ptr + row, rest_row, delta_ptr + row, stride_qs, stride_dos, M, N, shift, rest_scale,
                mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC, bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC,
                D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
        # The rows of dk and dv for keys from N on are not stored, so their scores need not be hidden.
        dk, dv = _key_value_grads_with_queries(
            dk, dv, k, v, first_key, whole, M, q_ptr, do_ptr,
            top_ptr + row, rest_row, delta_ptr + row, stride_qs, stride_dos, M, N, shift, rest_scale,
            mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC,
            bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC,
            D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        row += M
        q_ptr += tl.cast(stride_qh, tl.int64) * VEC
        do_ptr += tl.cast(stride_doh, tl.int64) * VEC
        if mask_ptr is not None:
            mask_ptr += tl.cast(stride_mask_h, tl.int64) * MASK_VEC
        if bias_ptr is not None:
            bias_ptr += tl.cast(stride_bias_h, tl.int64) * BIAS_VEC
    dk_ptr = head_pointer(dk_ptr, b, h_kv, stride_dkb, stride_dkh, VEC)
    dv_ptr = head_pointer(dv_ptr, b, h_kv, stride_dvb, stride_dvh, VEC)
    store_rows(dk_ptr, dk * scale, first_key, N, stride_dks, D, BLOCK_D, BLOCK_N, VEC)
    store_rows(dv_ptr, dv, first_key, N, stride_dvs, DV, BLOCK_DV, BLOCK_N, VEC)


# --- query -----------------------------------------------------------------------------------------------------------


@triton.jit
def _query_grad_with_keys(
    dq, q, do, top, rest, delta, first_row, begin, end, k_ptr, v_ptr, stride_ks, stride_vs,
    M, N, shift, scale,
    mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC: tl.constexpr,
    bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The sum dq [BLOCK_M, BLOCK_D] of a tile of queries, with what the keys from ``begin`` to ``end`` contribute
    added."""
    row = tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    for start in range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, start, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, CHECK)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, start, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, CHECK)  # [BLOCK_N, BLOCK_DV]
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = scores_of(
            products, row, column, first_row, start, M, N, shift, scale,
            mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC,
            bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC, CAUSAL, UNIT, CHECK,
        )  # fmt: skip
        p = _probabilities(s, top[:, None], rest[:, None], UNIT)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        ds = p * (dp - delta[:, None])
        dq = dot(narrow(ds, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=[*SIZES, *OPERAND_STRIDES, *SCORE_STRIDES])
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dqb, stride_dqh, stride_dqs,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores dq [B, H, M, D]; the other tensors are as in the forward. A program owns BLOCK_M queries of one head and
    streams its keys and values."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr = head_pointer(q_ptr, b, h, stride_qb, stride_qh, VEC)
    k_ptr = head_pointer(k_ptr, b, h // GROUP, stride_kb, stride_kh, VEC)
    v_ptr = head_pointer(v_ptr, b, h // GROUP, stride_vb, stride_vh, VEC)
    do_ptr = head_pointer(do_ptr, b, h, stride_dob, stride_doh, VEC)
    dq_ptr = head_pointer(dq_ptr, b, h, stride_dqb, stride_dqh, VEC)
    if mask_ptr is not None:
        mask_ptr = head_pointer(mask_ptr, b, h, stride_mask_b, stride_mask_h, MASK_VEC)
    if bias_ptr is not None:
        bias_ptr = head_pointer(bias_ptr, b, h, stride_bias_b, stride_bias_h, BIAS_VEC)
    q = load_rows(q_ptr, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)  # [BLOCK_M, BLOCK_D]
    q, rest_scale = prescaled(q, scale)
    do = load_rows(do_ptr, first_row, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True)  # [BLOCK_M, BLOCK_DV]
    i = first_row + tl.arange(0, BLOCK_M)
    top, rest, delta = _row_statistics(top_ptr, rest_ptr, delta_ptr, bh * M + i, i < M)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole, end = key_limits(first_row, BLOCK_M, N, shift, CAUSAL, BLOCK_N)
    dq = _query_grad_with_keys(
        dq, q, do, top, rest, delta, first_row, 0, whole, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC, bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    dq = _query_grad_with_keys(
        dq, q, do, top, rest, delta, first_row, whole, end, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC, bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    store_rows(dq_ptr, dq * scale, first_row, M, stride_dqs, D, BLOCK_D, BLOCK_M, VEC)


# --- bias ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, "B", *OPERAND_STRIDES, *SCORE_STRIDES])
def bias_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
    B, H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores dbias [B or 1, H or 1, M or 1, N or 1], contiguous; the other tensors are as in the forward. SUM_B, SUM_H,
    SUM_M and SUM_N say along which dimensions the bias was broadcast: there one program computes all tiles of ds that
    one tile of the bias was added to, one after the other, and stores their sum."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Of each dimension ``own`` counts the tiles that are divided among programs, and ``walk`` those that one program
    # adds up; the product of both is the number of tiles.
    own_n, walk_n = (1, tiles_n) if SUM_N else (tiles_n, 1)
    own_m, walk_m = (1, tiles_m) if SUM_M else (tiles_m, 1)
    own_h, walk_h = (1, H) if SUM_H else (H, 1)
    walk_b = B if SUM_B else 1
    pid = tl.program_id(0)
    tile_n, tile_m = pid % own_n, pid // own_n % own_m
    own_bh = pid // own_n // own_m
    first_h, first_b = own_bh % own_h, own_bh // own_h
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, walk_b * walk_h * walk_m * walk_n):
        first_key = (tile_n + step % walk_n) * BLOCK_N
        first_row = (tile_m + step // walk_n % walk_m) * BLOCK_M
        h = tl.cast(first_h + step // walk_n // walk_m % walk_h, tl.int64)
        b = tl.cast(first_b + step // walk_n // walk_m // walk_h, tl.int64)
        i = first_row + row
        q_tile = head_pointer(q_ptr, b, h, stride_qb, stride_qh, VEC)
        k_tile = head_pointer(k_ptr, b, h // GROUP, stride_kb, stride_kh, VEC)
        v_tile = head_pointer(v_ptr, b, h // GROUP, stride_vb, stride_vh, VEC)
        do_tile = head_pointer(do_ptr, b, h, stride_dob, stride_doh, VEC)
        mask_tile = mask_ptr
        if mask_ptr is not None:
            mask_tile = head_pointer(mask_ptr, b, h, stride_mask_b, stride_mask_h, MASK_VEC)
        bias_tile = head_pointer(bias_ptr, b, h, stride_bias_b, stride_bias_h, BIAS_VEC)
        q = load_rows(q_tile, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)  # [BLOCK_M, BLOCK_D]
        q, rest_scale = prescaled(q, scale)
        k = load_rows(k_tile, first_key, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, True)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_tile, first_key, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, True)  # [BLOCK_N, BLOCK_DV]
        do = load_rows(do_tile, first_row, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True)  # [BLOCK_M, BLOCK_DV]
        top, rest, delta = _row_statistics(top_ptr, rest_ptr, delta_ptr, (b * H + h) * M + i, i < M)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = scores_of(
            products, row[:, None], column[None, :], first_row, first_key, M, N, shift, rest_scale,
            mask_tile, stride_mask_m, stride_mask_n, MASK_VEC,
            bias_tile, stride_bias_m, stride_bias_n, BIAS_VEC, CAUSAL, UNIT, True,
        )  # fmt: skip
        p = _probabilities(s, top[:, None], rest[:, None], UNIT)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        acc += p * (dp - delta[:, None])
    i = tile_m * BLOCK_M + row
    j = tile_n * BLOCK_N + column
    dtype = dbias_ptr.dtype.element_ty
    start = dbias_ptr + tl.cast(own_bh, tl.int64) * (1 if SUM_M else M) * (1 if SUM_N else N)
    if SUM_M and SUM_N:
        tl.store(start, narrow(tl.sum(column_sum(acc), 0), dtype))
    elif SUM_M:
        tl.store(start + j, narrow(column_sum(acc), dtype), mask=j < N)
    elif SUM_N:
        tl.store(start + i, narrow(tl.sum(acc, 1), dtype), mask=i < M)
    else:
        mask = (i < M)[:, None] & (j < N)[None, :]
        tl.store(start + i.to(tl.int64)[:, None] * N + j[None, :], narrow(acc, dtype), mask=mask)
