r"""Attention with dot-product or cosine scores, forward and backward, without a matrix of scores in memory.

    s_ij = scale * q_i . k_j + bias_ij          -inf where the mask, or causality (j > i + shift), hides key j
    p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij),  out_i = sum_j p_ij v_j          out_i = 0 if all is hidden

    delta_i = out_i . dout_i - dlse_i           dp_ij = dout_i . v_j            ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i p_ij dout_i    dbias = ds, summed

For cosine scores query and key come normalised, x / max(|x|, eps): a kernel of its own, since each row of either is
read once a tile of the other. Then |s| <= |scale|, and with BOUNDED that bound replaces the running maximum.

B sequences, H query heads, GROUP query heads for each head of key and value, M queries, N keys, D and DV numbers a
head, padded to a power of two with zeros. One program serves BLOCK_M queries of one head, or in the gradients of key
and value BLOCK_N keys. The forward pass keeps lse for the backward; with a bias or in full fp32 in two parts, the
maximum and the inverse of the sum: one number would lose the sum where biases are as large as ``finfo.min``. Nobody
adds to what another program wrote, so each run gives the same bits.

Bytes (e: bytes an element, T_M = ceil(M / BLOCK_M), T_N alike; causal kernels skip the tiles that nobody sees):

    forward            e B H (M D + M DV + T_M N (D + DV))          + 12 B H M          + mask and bias once a pair
    delta              e B H M 2 DV                                 + 4 B H M
    dk, dv             e B H (T_N M (D + DV) + N (D + DV)) (+ the same to write, over GROUP)   + 12 B H M T_N
    dq                 e B H (M (2 D + DV) + T_M N (D + DV))        + 12 B H M
    normalise          2 e B H M D, and backward 3 e B H M D        + 4 B H M

Once from memory it is each tensor once: K and V of a head stay in the L2 cache while its tiles of queries pass.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..autotune import cost
from ..autotune.config import Config, Estimate, Tunable, register
from ..autotune.device import DeviceSpec
from ..autotune.schema import dtype_name
from ._launch import STEP, Launch, launch, readable, strides, unit_divisor
from ._math import column_sum, dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The same in two parts, of which the first has few digits: multiplied by a small integer it is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)

# Sizes and strides of batch, head and sequence: none of them may compile anything anew.
_SIZES = ["H", "M", "N", "shift", "scale"]
_OPERANDS = [f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for dim in "bhs"]
_SCORES = [f"stride_{tensor}{dim}" for tensor in ("mask", "bias") for dim in ("_b", "_h", "_m")]


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, VEC: tl.constexpr):
    """Where a tensor's batch ``b`` and head ``h`` start."""
    return ptr + (b * stride_b + h * stride_h) * VEC


@triton.jit
def _rows(ptr, first, count, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
          VEC: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """[BLOCK, WIDTH]: rows from ``first`` on; columns from SIZE and, with CHECK, rows from ``count`` on are 0."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    tile = ptr + tl.cast(first, tl.int64) * stride * VEC + ((i * stride * VEC)[:, None] + d[None, :])
    if CHECK:
        mask = (i + first < count)[:, None] & (d < SIZE)[None, :]
        return tl.load(tile, mask=mask, other=0.0)
    elif SIZE < WIDTH:
        mask = (i >= 0)[:, None] & (d < SIZE)[None, :]
        return tl.load(tile, mask=mask, other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def _store_rows(ptr, values, first, count, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                VEC: tl.constexpr):  # fmt: skip
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    tile = ptr + tl.cast(first, tl.int64) * stride * VEC + ((i * stride * VEC)[:, None] + d[None, :])
    mask = (i + first < count)[:, None] & (d < SIZE)[None, :]
    tl.store(tile, narrow(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prescaled(x, scale):
    """``(x, scale)`` with the power of two of a scale below 1 moved to the rows x of query or key: exact, and their
    products stay finite where the scores are. In float16 they always do, and it would lose small numbers."""
    if x.dtype == tl.float16:
        return x, scale
    else:
        scale = tl.cast(scale, tl.float32)
        power = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where((power > 0.0) & (power < 1.0), power, 1.0)
        return narrow(x.to(tl.float32) * power, x.dtype), tl.div_rn(scale, power)


@triton.jit
def _scores(products, row, column, first_row, first_key, M, N, shift, scale,
            mask_ptr, mask_m, mask_n, MASK_VEC: tl.constexpr, bias_ptr, bias_m, bias_n, BIAS_VEC: tl.constexpr,
            CAUSAL: tl.constexpr, UNIT: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """Scores of queries ``first_row + row`` and keys ``first_key + column`` from their products, in units of log 2 or
    natural ones; of ``row`` and ``column`` one runs down, the other across. CHECK: some key may lie behind the end or
    be hidden by causality. Offsets within a tile are 32-bit, or their tile would take twice the registers."""
    i = first_row + row
    j = first_key + column
    inside = (i < M) & (j < N)
    if UNIT == "log2":
        s = products * (scale * LOG2E)
    else:
        s = products * scale
    if bias_ptr is not None:
        bias_ptr += tl.cast(first_row, tl.int64) * bias_m * BIAS_VEC + tl.cast(first_key, tl.int64) * bias_n
        bias = tl.load(bias_ptr + (row * bias_m * BIAS_VEC + column * bias_n), mask=inside, other=float("-inf"))
        s += bias.to(tl.float32)
    if mask_ptr is not None:
        mask_ptr += tl.cast(first_row, tl.int64) * mask_m * MASK_VEC + tl.cast(first_key, tl.int64) * mask_n
        seen = tl.load(mask_ptr + (row * mask_m * MASK_VEC + column * mask_n), mask=inside, other=0)
        s = tl.where(seen != 0, s, float("-inf"))
    if CHECK:
        if CAUSAL:
            s = tl.where((j < N) & (j <= i + shift), s, float("-inf"))
        else:
            s = tl.where(j < N, s, float("-inf"))
    return s


@triton.jit
def _exp(s, UNIT: tl.constexpr):
    """Exponential of differences of scores. To multiply after the subtraction keeps finfo.min finite; "exact" loses
    nothing of a long difference, as torch's own exponential in fp32."""
    if UNIT == "log2":
        return tl.exp2(s)
    elif UNIT == "natural":
        return tl.exp2(s * LOG2E)
    else:
        x = tl.where(s < -150.0, -150.0, s)  # 0 all the same, and NaN stays
        n = tl.floor(x * LOG2E + 0.5)
        return tl.exp2(n) * tl.exp2((x - n * LN2_HIGH - n * LN2_LOW) * LOG2E)


@triton.jit
def _whole_keys(first, rows: tl.constexpr, N, shift, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(whole, end)``: all these rows see the keys before ``whole``, whole tiles of them, and none from ``end`` on."""
    if CAUSAL:
        whole = tl.minimum(tl.maximum(first + shift + 1, 0), N) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.maximum(first + rows + shift, 0), N)
    else:
        whole = N // BLOCK_N * BLOCK_N
        end = N
    return whole, end


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(acc, total, top, q, first_row, begin, end, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, scale,
            mask_ptr, mask_m, mask_n, MASK_VEC: tl.constexpr, bias_ptr, bias_m, bias_n, BIAS_VEC: tl.constexpr,
            D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
            CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """Adds the keys from ``begin`` to ``end`` to the running sums."""
    row = tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    for start in range(begin, end, BLOCK_N):
        k = _rows(k_ptr, start, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, CHECK)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = _scores(products, row, column, first_row, start, M, N, shift, scale, mask_ptr, mask_m, mask_n, MASK_VEC,
                    bias_ptr, bias_m, bias_n, BIAS_VEC, CAUSAL, UNIT, CHECK)  # fmt: skip
        if BOUNDED:
            p = _exp(s - top[:, None], UNIT)
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
            p = _exp(s - base[:, None], UNIT)
            kept = _exp(top - base, UNIT)
            acc = acc * kept[:, None]
            total = total * kept
            top = new_top
        total += tl.sum(p, 1)
        v = _rows(v_ptr, start, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, CHECK)
        acc = dot(narrow(p, v.dtype), v, acc, PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=[*_SIZES, *_OPERANDS, *_SCORES])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, o_ptr, lse_ptr, top_ptr, rest_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_mask_b, stride_mask_h, stride_mask_m, mask_n, stride_bias_b, stride_bias_h, stride_bias_m, bias_n,
    H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr, BOUNDED: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q [B, H, M, D], k [B, H / GROUP, N, D], v [B, H / GROUP, N, DV], mask and bias [B, H, M, N] by strides,
    o [B, H, M, DV], lse, top, rest [B, H, M]."""
    tiles = tl.cdiv(M, BLOCK_M)
    # The last queries see the most keys: they start first.
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, VEC)
    k_ptr = _head(k_ptr, b, h // GROUP, stride_kb, stride_kh, VEC)
    v_ptr = _head(v_ptr, b, h // GROUP, stride_vb, stride_vh, VEC)
    o_ptr = _head(o_ptr, b, h, stride_ob, stride_oh, VEC)
    if mask_ptr is not None:
        mask_ptr = _head(mask_ptr, b, h, stride_mask_b, stride_mask_h, MASK_VEC)
    if bias_ptr is not None:
        bias_ptr = _head(bias_ptr, b, h, stride_bias_b, stride_bias_h, BIAS_VEC)
    q = _rows(q_ptr, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)
    q, rest_scale = _prescaled(q, scale)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if BOUNDED:
        top = tl.zeros([BLOCK_M], tl.float32) + tl.abs(scale) * (LOG2E if UNIT == "log2" else 1.0)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    whole, end = _whole_keys(first_row, BLOCK_M, N, shift, CAUSAL, BLOCK_N)
    acc, total, top = _attend(
        acc, total, top, q, first_row, 0, whole, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, mask_n, MASK_VEC, bias_ptr, stride_bias_m, bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, BOUNDED, UNIT, PRECISION, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, first_row, whole, end, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, mask_n, MASK_VEC, bias_ptr, stride_bias_m, bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, BOUNDED, UNIT, PRECISION, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    _store_rows(o_ptr, acc * inverse[:, None], first_row, M, stride_os, DV, BLOCK_DV, BLOCK_M, VEC)
    i = first_row + tl.arange(0, BLOCK_M)
    row = bh * M + i
    base = tl.where(top == float("-inf"), 0.0, top)
    # For backward, in the unit of the scores. With 0 and +inf every probability of an empty row is 0.
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


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "M", *_OPERANDS])
def _delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos, H, M,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out . dout - dlse of each row: o, do [B, H, M, DV], dlse, delta [B, H, M]."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    o_ptr = _head(o_ptr, b, h, stride_ob, stride_oh, VEC)
    do_ptr = _head(do_ptr, b, h, stride_dob, stride_doh, VEC)
    o = _rows(o_ptr, first_row, M, stride_os, DV, BLOCK_DV, BLOCK_M, VEC, True).to(tl.float32)
    do = _rows(do_ptr, first_row, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True).to(tl.float32)
    delta = tl.sum(o * do, 1)
    i = first_row + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + bh * M + i, mask=i < M, other=0.0)
    tl.store(delta_ptr + bh * M + i, delta, mask=i < M)


@triton.jit
def _row_statistics(top_ptr, rest_ptr, delta_ptr, row, inside):
    """lse, in one part or two, and delta. Of rows outside: such that all their probabilities are 0."""
    top = tl.load(top_ptr + row, mask=inside, other=float("inf"))
    rest = top
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + row, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    return top, rest, delta


@triton.jit
def _probabilities(s, top, rest, UNIT: tl.constexpr):
    """exp(s - lse), with lse in one part or two."""
    if UNIT == "log2":
        return _exp(s - top, UNIT)
    else:
        return _exp(s - top, UNIT) * rest


@triton.jit
def _gather_queries(dk, dv, k, v, first_key, begin, end, q_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr,
                    stride_qs, stride_dos, M, N, shift, scale,
                    mask_ptr, mask_m, mask_n, MASK_VEC: tl.constexpr, bias_ptr, bias_m, bias_n, BIAS_VEC: tl.constexpr,
                    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                    VEC: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """Adds what the queries from ``begin`` to ``end`` give to the gradients of a tile of keys. All is transposed."""
    row = tl.arange(0, BLOCK_M)[None, :]
    column = tl.arange(0, BLOCK_N)[:, None]
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = _rows(q_ptr, start, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)
        do = _rows(do_ptr, start, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True)
        top, rest, delta = _row_statistics(top_ptr, rest_ptr, delta_ptr, rows, rows < M)
        products = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        s = _scores(products, row, column, start, first_key, M, N, shift, scale, mask_ptr, mask_m, mask_n, MASK_VEC,
                    bias_ptr, bias_m, bias_n, BIAS_VEC, CAUSAL, UNIT, CHECK)  # fmt: skip
        p = _probabilities(s, top[None, :], rest[None, :], UNIT)
        dv = dot(narrow(p, do.dtype), do, dv, PRECISION)
        dp = dot(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        ds = p * (dp - delta[None, :])
        dk = dot(narrow(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*_SIZES, *_OPERANDS, *_SCORES])
def _key_value_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_mask_b, stride_mask_h, stride_mask_m, mask_n, stride_bias_b, stride_bias_h, stride_bias_m, bias_n,
    H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The query heads of a group are walked one after the other, so no partial sums meet in memory."""
    tiles = tl.cdiv(N, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h_kv = bh // (H // GROUP), bh % (H // GROUP)
    k_ptr = _head(k_ptr, b, h_kv, stride_kb, stride_kh, VEC)
    v_ptr = _head(v_ptr, b, h_kv, stride_vb, stride_vh, VEC)
    k = _rows(k_ptr, first_key, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, True)
    k, rest_scale = _prescaled(k, scale)
    v = _rows(v_ptr, first_key, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    q_ptr = _head(q_ptr, b, h_kv * GROUP, stride_qb, stride_qh, VEC)
    do_ptr = _head(do_ptr, b, h_kv * GROUP, stride_dob, stride_doh, VEC)
    if mask_ptr is not None:
        mask_ptr = _head(mask_ptr, b, h_kv * GROUP, stride_mask_b, stride_mask_h, MASK_VEC)
    if bias_ptr is not None:
        bias_ptr = _head(bias_ptr, b, h_kv * GROUP, stride_bias_b, stride_bias_h, BIAS_VEC)
    row = (b * H + h_kv * GROUP) * M
    begin = 0
    whole = 0
    if CAUSAL:
        # Queries before ``begin`` see none of these keys, those from ``whole`` on all of them.
        begin = tl.maximum(first_key - shift, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    for _ in range(0, GROUP):
        rest_row = rest_ptr
        if rest_ptr is not None:
            rest_row = rest_ptr + row
        if CAUSAL:
            dk, dv = _gather_queries(
                dk, dv, k, v, first_key, begin, tl.minimum(whole, M), q_ptr, do_ptr,
                top_ptr + row, rest_row, delta_ptr + row, stride_qs, stride_dos, M, N, shift, rest_scale,
                mask_ptr, stride_mask_m, mask_n, MASK_VEC, bias_ptr, stride_bias_m, bias_n, BIAS_VEC,
                D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
        # Keys behind the end are not stored: nothing has to hide them.
        dk, dv = _gather_queries(
            dk, dv, k, v, first_key, whole, M, q_ptr, do_ptr,
            top_ptr + row, rest_row, delta_ptr + row, stride_qs, stride_dos, M, N, shift, rest_scale,
            mask_ptr, stride_mask_m, mask_n, MASK_VEC, bias_ptr, stride_bias_m, bias_n, BIAS_VEC,
            D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        row += M
        q_ptr += tl.cast(stride_qh, tl.int64) * VEC
        do_ptr += tl.cast(stride_doh, tl.int64) * VEC
        if mask_ptr is not None:
            mask_ptr += tl.cast(stride_mask_h, tl.int64) * MASK_VEC
        if bias_ptr is not None:
            bias_ptr += tl.cast(stride_bias_h, tl.int64) * BIAS_VEC
    dk_ptr = _head(dk_ptr, b, h_kv, stride_dkb, stride_dkh, VEC)
    dv_ptr = _head(dv_ptr, b, h_kv, stride_dvb, stride_dvh, VEC)
    _store_rows(dk_ptr, dk * scale, first_key, N, stride_dks, D, BLOCK_D, BLOCK_N, VEC)
    _store_rows(dv_ptr, dv, first_key, N, stride_dvs, DV, BLOCK_DV, BLOCK_N, VEC)


@triton.jit
def _gather_keys(dq, q, do, top, rest, delta, first_row, begin, end, k_ptr, v_ptr, stride_ks, stride_vs,
                 M, N, shift, scale,
                 mask_ptr, mask_m, mask_n, MASK_VEC: tl.constexpr, bias_ptr, bias_m, bias_n, BIAS_VEC: tl.constexpr,
                 D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VEC: tl.constexpr,
                 CAUSAL: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """Adds what the keys from ``begin`` to ``end`` give to the gradient of a tile of queries."""
    row = tl.arange(0, BLOCK_M)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    for start in range(begin, end, BLOCK_N):
        k = _rows(k_ptr, start, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, CHECK)
        v = _rows(v_ptr, start, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, CHECK)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = _scores(products, row, column, first_row, start, M, N, shift, scale, mask_ptr, mask_m, mask_n, MASK_VEC,
                    bias_ptr, bias_m, bias_n, BIAS_VEC, CAUSAL, UNIT, CHECK)  # fmt: skip
        p = _probabilities(s, top[:, None], rest[:, None], UNIT)
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        ds = p * (dp - delta[:, None])
        dq = dot(narrow(ds, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=[*_SIZES, *_OPERANDS, *_SCORES])
def _query_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dqb, stride_dqh, stride_dqs,
    stride_mask_b, stride_mask_h, stride_mask_m, mask_n, stride_bias_b, stride_bias_h, stride_bias_m, bias_n,
    H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, VEC)
    k_ptr = _head(k_ptr, b, h // GROUP, stride_kb, stride_kh, VEC)
    v_ptr = _head(v_ptr, b, h // GROUP, stride_vb, stride_vh, VEC)
    do_ptr = _head(do_ptr, b, h, stride_dob, stride_doh, VEC)
    dq_ptr = _head(dq_ptr, b, h, stride_dqb, stride_dqh, VEC)
    if mask_ptr is not None:
        mask_ptr = _head(mask_ptr, b, h, stride_mask_b, stride_mask_h, MASK_VEC)
    if bias_ptr is not None:
        bias_ptr = _head(bias_ptr, b, h, stride_bias_b, stride_bias_h, BIAS_VEC)
    q = _rows(q_ptr, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)
    q, rest_scale = _prescaled(q, scale)
    do = _rows(do_ptr, first_row, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True)
    i = first_row + tl.arange(0, BLOCK_M)
    top, rest, delta = _row_statistics(top_ptr, rest_ptr, delta_ptr, bh * M + i, i < M)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole, end = _whole_keys(first_row, BLOCK_M, N, shift, CAUSAL, BLOCK_N)
    dq = _gather_keys(
        dq, q, do, top, rest, delta, first_row, 0, whole, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, mask_n, MASK_VEC, bias_ptr, stride_bias_m, bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    dq = _gather_keys(
        dq, q, do, top, rest, delta, first_row, whole, end, k_ptr, v_ptr, stride_ks, stride_vs, M, N, shift, rest_scale,
        mask_ptr, stride_mask_m, mask_n, MASK_VEC, bias_ptr, stride_bias_m, bias_n, BIAS_VEC,
        D, DV, BLOCK_D, BLOCK_DV, VEC, CAUSAL, UNIT, PRECISION, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    _store_rows(dq_ptr, dq * scale, first_row, M, stride_dqs, D, BLOCK_D, BLOCK_M, VEC)


@triton.jit(do_not_specialize=[*_SIZES, "B", *_OPERANDS, *_SCORES])
def _bias_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, do_ptr, top_ptr, rest_ptr, delta_ptr, dbias_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos,
    stride_mask_b, stride_mask_h, stride_mask_m, mask_n, stride_bias_b, stride_bias_h, stride_bias_m, bias_n,
    B, H, M, N, shift, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    VEC: tl.constexpr, MASK_VEC: tl.constexpr, BIAS_VEC: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias [B or 1, H or 1, M or 1, N or 1], contiguous. Where the bias was broadcast (SUM_...) one program walks all
    that it was broadcast to, tile by tile, and adds."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Each index splits into the part that names the program and the part that it walks.
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
        q_tile = _head(q_ptr, b, h, stride_qb, stride_qh, VEC)
        k_tile = _head(k_ptr, b, h // GROUP, stride_kb, stride_kh, VEC)
        v_tile = _head(v_ptr, b, h // GROUP, stride_vb, stride_vh, VEC)
        do_tile = _head(do_ptr, b, h, stride_dob, stride_doh, VEC)
        mask_tile = mask_ptr
        if mask_ptr is not None:
            mask_tile = _head(mask_ptr, b, h, stride_mask_b, stride_mask_h, MASK_VEC)
        bias_tile = _head(bias_ptr, b, h, stride_bias_b, stride_bias_h, BIAS_VEC)
        q = _rows(q_tile, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True)
        q, rest_scale = _prescaled(q, scale)
        k = _rows(k_tile, first_key, N, stride_ks, D, BLOCK_D, BLOCK_N, VEC, True)
        v = _rows(v_tile, first_key, N, stride_vs, DV, BLOCK_DV, BLOCK_N, VEC, True)
        do = _rows(do_tile, first_row, M, stride_dos, DV, BLOCK_DV, BLOCK_M, VEC, True)
        top, rest, delta = _row_statistics(top_ptr, rest_ptr, delta_ptr, (b * H + h) * M + i, i < M)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        s = _scores(products, row[:, None], column[None, :], first_row, first_key, M, N, shift, rest_scale,
                    mask_tile, stride_mask_m, mask_n, MASK_VEC,
                    bias_tile, stride_bias_m, bias_n, BIAS_VEC, CAUSAL, UNIT, True)  # fmt: skip
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


# --- rows of unit length ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["H", "M", "limit", *_OPERANDS])
def _normalize_kernel(
    q_ptr, o_ptr, inverse_ptr, stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os, H, M, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """o = q / max(|q|, 1 / limit), and that quotient's inverse divisor. Divided by a power of two near their largest
    element first, rows neither overflow nor vanish when they are squared."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr = _head(q_ptr, b, h, stride_qb, stride_qh, VEC)
    x = _rows(q_ptr, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True).to(tl.float32)
    # The power of two at or below the largest element: to divide by it and multiply again is exact.
    power = (tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    safe = tl.where(power == 0.0, 1.0, power)
    y = x / safe[:, None]
    length = tl.sqrt(tl.sum(y * y, 1))
    unit = 1.0 / tl.where(length == 0.0, 1.0, length)
    # NaN and inf stay what they are: the comparison is false for them.
    short = length * safe * limit < 1.0
    y = tl.where(short[:, None], x * limit, y * unit[:, None])
    o_ptr = _head(o_ptr, b, h, stride_ob, stride_oh, VEC)
    _store_rows(o_ptr, y, first_row, M, stride_os, D, BLOCK_D, BLOCK_M, VEC)
    i = first_row + tl.arange(0, BLOCK_M)
    tl.store(inverse_ptr + bh * M + i, tl.where(short, limit, unit / safe), mask=i < M)


@triton.jit(do_not_specialize=["H", "M", "limit", *_OPERANDS])
def _normalize_grad_kernel(
    o_ptr, do_ptr, inverse_ptr, dq_ptr, stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos,
    stride_dqb, stride_dqh, stride_dqs, H, M, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dq = (do - o (o . do)) * inverse; rows shorter than 1 / limit were multiplied by a constant."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    o_ptr = _head(o_ptr, b, h, stride_ob, stride_oh, VEC)
    do_ptr = _head(do_ptr, b, h, stride_dob, stride_doh, VEC)
    o = _rows(o_ptr, first_row, M, stride_os, D, BLOCK_D, BLOCK_M, VEC, True).to(tl.float32)
    do = _rows(do_ptr, first_row, M, stride_dos, D, BLOCK_D, BLOCK_M, VEC, True).to(tl.float32)
    i = first_row + tl.arange(0, BLOCK_M)
    inverse = tl.load(inverse_ptr + bh * M + i, mask=i < M, other=0.0)
    along = tl.where(inverse >= limit, 0.0, tl.sum(o * do, 1))
    dq = (do - o * along[:, None]) * inverse[:, None]
    dq_ptr = _head(dq_ptr, b, h, stride_dqb, stride_dqh, VEC)
    _store_rows(dq_ptr, dq, first_row, M, stride_dqs, D, BLOCK_D, BLOCK_M, VEC)


# --- launchers -------------------------------------------------------------------------------------------------------


class AttentionProblem(NamedTuple):
    """One call. ``shift``: key j is hidden from query i if j > i + shift; ``None``: no causality. ``bias``: its dtype;
    ``bias_dims``: those of "bhmn" that it was not broadcast along. ``saves``: is there a backward?"""

    B: int
    H: int
    M: int
    N: int
    D: int
    DV: int
    group: int
    dtype: torch.dtype
    precision: str
    shift: int | None = None
    masked: bool = False
    bias: torch.dtype | None = None
    bias_dims: str = ""
    bounded: bool = False
    saves: bool = False

    @property
    def block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.D))

    @property
    def block_dv(self) -> int:
        return max(16, triton.next_power_of_2(self.DV))

    @property
    def unit(self) -> str:
        """Of the scores: natural where something is added to them, and with all digits where the products have them."""
        return "exact" if self.precision in ("ieee", "tf32x3") else "natural" if self.bias else "log2"

    @property
    def parts(self) -> int:
        """In how many numbers a row's lse is kept for backward."""
        return 1 if self.unit == "log2" else 2

    @property
    def pairs(self) -> float:
        """How many pairs of query and key are computed in each head."""
        if self.shift is None:
            return float(self.M * self.N)
        first, last = (min(max(i + 1 + self.shift, 0), self.N) for i in (0, self.M - 1))
        return self.M * (first + last) / 2


class NormalizeProblem(NamedTuple):
    """Rows of unit length: ``[B, H, M, D]``."""

    rows: int
    D: int
    dtype: torch.dtype
    precision: str = ""

    @property
    def block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.D))


def _operands(**tensors: torch.Tensor) -> tuple[dict[str, object], int]:
    """Pointers and strides of [B, H, S, D] tensors, in units of the vector that all of them allow."""
    raw = {name: strides(t)[:3] for name, t in tensors.items()}
    itemsize = max(t.dtype.itemsize for t in tensors.values())
    vec = unit_divisor(16 // itemsize, *(stride for row in raw.values() for stride in row))
    args: dict[str, object] = {f"{name}_ptr": t for name, t in tensors.items()}
    for name, row in raw.items():
        args.update({f"stride_{name}{dim}": stride // vec for dim, stride in zip("bhs", row, strict=True)})
    return args, vec


def _score_operand(name: str, t: torch.Tensor | None) -> tuple[dict[str, object], int]:
    """Pointer and strides of a mask or bias that was broadcast to [B, H, M, N]; a stride of 0 repeats."""
    if t is None:
        zeros = {f"stride_{name}_{dim}": 0 for dim in "bhm"}
        return {f"{name}_ptr": None, **zeros, f"{name}_n": 0}, 1
    *outer, inner = strides(t)
    vec = unit_divisor(16 // t.dtype.itemsize, *outer) if inner == 1 else 1
    args: dict[str, object] = {f"{name}_ptr": t.view(torch.uint8) if t.dtype is torch.bool else t, f"{name}_n": inner}
    args.update({f"stride_{name}_{dim}": stride // vec for dim, stride in zip("bhm", outer, strict=True)})
    return args, vec


def halves(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """lse of the rows as forward keeps it: [1, B, H, M], or [2, B, H, M] for the maximum and the sum's inverse."""
    return stats[0], stats[1] if len(stats) == 2 else None


class Scores(NamedTuple):
    """What makes scores of products: ``mask`` (bool) and ``bias``, both ``[B or 1, H or 1, M or 1, N or 1]``."""

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float

    def readable(self) -> Scores:
        mask, bias = (None if t is None else readable(t, tile=(2, 3)) for t in (self.mask, self.bias))
        return Scores(mask, bias, self.scale)


def _launch(
    kernel: object, p: AttentionProblem, config: Config, grid: int, tensors: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor | None], scores: Scores, constants: dict[str, object], **sizes: int,
) -> Launch:  # fmt: skip
    """A kernel over [B, H, S, D] ``tensors`` and contiguous [B, H, M] ``rows``, with mask and bias."""
    args, vec = _operands(**tensors)
    mask_args, mask_vec = _score_operand("mask", scores.mask)
    bias_args, bias_vec = _score_operand("bias", scores.bias)
    args.update(mask_args, **bias_args, **{f"{name}_ptr": t for name, t in rows.items()}, **sizes)
    args.update(H=p.H, M=p.M, N=p.N, shift=p.shift or 0, scale=float(scores.scale))
    constants = {
        "D": p.D, "DV": p.DV, "BLOCK_D": p.block_d, "BLOCK_DV": p.block_dv, "GROUP": p.group, "VEC": vec,
        "MASK_VEC": mask_vec, "BIAS_VEC": bias_vec, "CAUSAL": p.shift is not None, "UNIT": p.unit,
        "PRECISION": p.precision.replace("16", "ieee"), **constants, **config.constants(),
    }  # fmt: skip
    return Launch(kernel, grid, args, constants, config.num_warps, config.num_stages)


def plan_forward(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    out: torch.Tensor, lse: torch.Tensor | None, stats: torch.Tensor | None,
) -> list[Launch]:  # fmt: skip
    top, rest = (None, None) if stats is None else halves(stats)
    grid = cost.cdiv(p.M, config.BLOCK_M) * p.B * p.H
    return [
        _launch(
            _attention_kernel, p, config, grid, {"q": q, "k": k, "v": v, "o": out},
            {"lse": lse, "top": top, "rest": rest}, scores, {"BOUNDED": p.bounded},
        )
    ]  # fmt: skip


def plan_delta(
    p: AttentionProblem, config: Config, out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None,
    delta: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    args, vec = _operands(o=out, do=dout)
    args.update(dlse_ptr=dlse, delta_ptr=delta, H=p.H, M=p.M)
    constants = {"DV": p.DV, "BLOCK_DV": p.block_dv, "VEC": vec, **config.constants()}
    grid = cost.cdiv(p.M, config.BLOCK_M) * p.B * p.H
    return [Launch(_delta_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_key_value_grad(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    dout: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    top, rest = halves(stats)
    grid = cost.cdiv(p.N, config.BLOCK_N) * p.B * (p.H // p.group)
    return [
        _launch(
            _key_value_grad_kernel, p, config, grid, {"q": q, "k": k, "v": v, "do": dout, "dk": dk, "dv": dv},
            {"top": top, "rest": rest, "delta": delta}, scores, {},
        )
    ]  # fmt: skip


def plan_query_grad(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    dout: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor, dq: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    top, rest = halves(stats)
    grid = cost.cdiv(p.M, config.BLOCK_M) * p.B * p.H
    return [
        _launch(
            _query_grad_kernel, p, config, grid, {"q": q, "k": k, "v": v, "do": dout, "dq": dq},
            {"top": top, "rest": rest, "delta": delta}, scores, {},
        )
    ]  # fmt: skip


def plan_bias_grad(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    dout: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor, dbias: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    top, rest = halves(stats)
    sums = {f"SUM_{dim.upper()}": dim not in p.bias_dims for dim in "bhmn"}
    return [
        _launch(
            _bias_grad_kernel, p, config, _bias_tiles(p, config), {"q": q, "k": k, "v": v, "do": dout},
            {"top": top, "rest": rest, "delta": delta, "dbias": dbias}, scores, sums, B=p.B,
        )
    ]  # fmt: skip


def _bias_tiles(p: AttentionProblem, config: Config) -> int:
    tiles = {"b": p.B, "h": p.H, "m": cost.cdiv(p.M, config.BLOCK_M), "n": cost.cdiv(p.N, config.BLOCK_N)}
    count = 1
    for dim in p.bias_dims:
        count *= tiles[dim]
    return count


def plan_normalize(
    p: NormalizeProblem, config: Config, x: torch.Tensor, limit: float, out: torch.Tensor, inverse: torch.Tensor
) -> list[Launch]:  # fmt: skip
    args, vec = _operands(q=x, o=out)
    args.update(inverse_ptr=inverse)
    return _row_launch(_normalize_kernel, p, config, args, vec, x, limit)


def plan_normalize_grad(
    p: NormalizeProblem, config: Config, out: torch.Tensor, dout: torch.Tensor, inverse: torch.Tensor, limit: float,
    dx: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    args, vec = _operands(o=out, do=dout, dq=dx)
    args.update(inverse_ptr=inverse)
    return _row_launch(_normalize_grad_kernel, p, config, args, vec, out, limit)


def _row_launch(
    kernel: object, p: NormalizeProblem, config: Config, args: dict[str, object], vec: int, like: torch.Tensor,
    limit: float,
) -> list[Launch]:  # fmt: skip
    b, h, m, _ = like.shape
    args.update(H=h, M=m, limit=float(limit))
    constants = {"D": p.D, "BLOCK_D": p.block_d, "VEC": vec, **config.constants()}
    return [Launch(kernel, cost.cdiv(m, config.BLOCK_M) * b * h, args, constants, config.num_warps, config.num_stages)]


# --- configs ---------------------------------------------------------------------------------------------------------

TILES = tuple(
    Config(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)
    for m in (128, 64, 32, 16)
    for n in (128, 64, 32, 16)
    for warps in (8, 4, 2, 16)
    for stages in (2, 3, 1)
)
ROWS = tuple(
    Config(BLOCK_M=m, num_warps=warps, num_stages=1) for m in (64, 32, 16, 128, 256, 8, 4) for warps in (4, 8, 2, 1)
)
CLOCK_GHZ = 1.7
MAX_HEAD = 256  # numbers a head; ops/attention.py says so while compiling
SMALLEST = Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)


class _Shape(NamedTuple):
    """What one program of a kernel holds: operands that stay, operands that are streamed, products a step."""

    rows: int  # of the tile that the program owns
    step: int  # rows of the tiles that pass
    kept: int  # numbers a row: accumulators
    stays: int  # numbers a row: operands
    passes: int  # numbers a row: streamed operands
    tiles: int  # score tiles alive at once
    products: int  # multiply-adds for each pair of query and key


def _shape(kind: str, p: AttentionProblem, config: Config) -> _Shape:
    d, dv = p.block_d, p.block_dv
    if kind == "forward":
        return _Shape(config.BLOCK_M, config.BLOCK_N, dv, d, d + dv, 1, d + dv)
    if kind == "query_grad":
        return _Shape(config.BLOCK_M, config.BLOCK_N, d, d + dv, d + dv, 2, 2 * d + dv)
    if kind == "key_value_grad":
        return _Shape(config.BLOCK_N, config.BLOCK_M, d + dv, d + dv, d + dv, 2, 2 * (d + dv))
    return _Shape(config.BLOCK_M, config.BLOCK_N, 0, 0, 2 * (d + dv), 3, d + dv)


def _registers(shape: _Shape, p: AttentionProblem, config: Config, device: DeviceSpec) -> float:
    """Numbers that a thread holds: accumulators, score tiles, addresses of the streamed tiles, and the rest."""
    threads = config.num_warps * device.warp_size
    vector = 16 // p.dtype.itemsize
    read = 0.5 * p.masked + 3.0 * (p.bias is not None)  # values and addresses of mask and bias
    held = shape.rows * shape.kept + (shape.tiles + 0.5 + read) * shape.rows * shape.step
    held += 2 * shape.step * shape.passes / vector
    if shape.tiles > 1:
        held += shape.rows * shape.stays * p.dtype.itemsize / 8  # half of what stays, as an operand in registers
    return held / threads + 50


def _smem_bytes(shape: _Shape, p: AttentionProblem, config: Config, device: DeviceSpec) -> int:
    """Operands that stay, one set of streamed tiles a stage, scores on their way to the next product's layout."""
    stages = max(1, config.num_stages - 1) if device.is_amd else config.num_stages
    tiles = shape.rows * shape.stays + stages * shape.step * shape.passes + shape.rows * shape.step * (shape.tiles - 1)
    return tiles * p.dtype.itemsize + 1024


def fits(p: AttentionProblem, device: DeviceSpec) -> bool:
    """Is there a tile small enough for these heads?"""
    kinds = ("forward", "query_grad", "key_value_grad") if p.saves else ("forward",)
    return max(p.D, p.DV) <= MAX_HEAD and all(_accepts(kind, p, SMALLEST, device) for kind in kinds)


def within_reach(p: AttentionProblem, mask: torch.Tensor | None) -> bool:
    """Do offsets within a tile stay 32-bit where no copy would help: in results, which may hold all heads of a position
    side by side, and in rows of a dense mask [B, H, M, N] or bias?"""
    has_rows = "m" in p.bias_dims or (mask is not None and mask.shape[2] > 1)
    return p.H * max(p.D, p.DV) < STEP and not (has_rows and p.N >= STEP)


def _accepts(kind: str, p: AttentionProblem, config: Config, device: DeviceSpec) -> bool:
    shape = _shape(kind, p, config)
    threads = config.num_warps * device.warp_size
    if _smem_bytes(shape, p, config, device) > device.smem_kb * 1024:
        return False
    if config.BLOCK_M > max(16, 2 * p.M) or config.BLOCK_N > max(16, 2 * p.N):
        return False
    if config == SMALLEST:
        return True
    if p.precision not in ("16", "tf32") or (p.precision == "tf32" and device.is_amd):
        # Operands of the fp32 pipes come from registers.
        held = shape.rows * (shape.kept + shape.stays) + shape.step * shape.passes
        return config.num_stages == 1 and held <= 96 * threads
    if device.is_amd:
        fewest = config.num_stages < 3 and config.num_warps < 16
        return fewest and _registers(shape, p, config, device) <= 240
    if shape.rows >= 64 and (
        config.num_warps < 4 or (kind == "key_value_grad" and shape.stays * p.dtype.itemsize > 512)
    ):
        return False  # WGMMA wants four warps; with wider heads its operands leave no registers
    most = 128 if config.num_warps == 16 else 260 if p.dtype.itemsize == 2 else 200
    return _registers(shape, p, config, device) <= most


def _estimate(kind: str, p: AttentionProblem, config: Config, device: DeviceSpec) -> Estimate:
    """Waves of programs; of a program the pairs it computes, in steps of a tile: products, exponentials, loads. With
    two programs on a multiprocessor one multiplies while the other takes exponentials."""
    shape = _shape(kind, p, config)
    own, walked = (p.N, p.M) if kind == "key_value_grad" else (p.M, p.N)
    heads = p.B * p.H // (p.group if kind == "key_value_grad" else 1)
    programs = heads * cost.cdiv(own, shape.rows) if kind != "bias_grad" else _bias_tiles(p, config)
    pair_tiles = p.B * p.H * cost.cdiv(own, shape.rows) * cost.cdiv(walked, shape.step)
    if p.shift is not None:
        pair_tiles *= min(1.0, p.pairs / max(1, p.M * p.N) + 0.5 * max(shape.rows, shape.step) / max(1, own, walked))
    steps = pair_tiles / max(1, programs)
    area = shape.rows * shape.step
    flops_a_clock = device.tflops(p.precision) * 1e3 / device.sms / CLOCK_GHZ
    slow = 1.0 if shape.rows >= 64 and config.num_warps >= 4 else 2.0  # mma.sync, or too few warps to feed the units
    feed = min(1.0, area / (shape.rows + shape.step) / 48)  # small tiles: operands out of shared memory too often
    products = slow * 2 * area * shape.products / flops_a_clock / feed
    pointwise = area * (1 / 16 + shape.tiles * 6 / 128)
    loads = shape.step * shape.passes * p.dtype.itemsize / (2.5 * device.dram_gbs / device.sms / CLOCK_GHZ)
    registers = min(255, _registers(shape, p, config, device))
    resident = min(
        device.smem_kb * 1024 // _smem_bytes(shape, p, config, device),
        int(65536 / (registers * 32 * config.num_warps)), 32 // config.num_warps,
    )  # fmt: skip
    resident = max(1, min(resident, cost.cdiv(programs, device.sms)))
    hidden = 0.35 if resident > 1 else 1.0
    step = max(products, loads) + hidden * pointwise + (200 if config.num_stages > 1 else 700) / resident
    waves = cost.cdiv(programs, device.sms * resident)
    busy = waves * resident * steps * step / (CLOCK_GHZ * 1e3) + cost.ITERATION_LATENCY_US
    memory = _once_bytes(p) / (device.dram_gbs * 1e3)
    return Estimate(cost.LAUNCH_US + max(busy, memory), "memory" if memory > busy else "compute")


def _once_bytes(p: AttentionProblem) -> float:
    """Every operand once over the memory bus."""
    e = p.dtype.itemsize
    scores = (p.masked + (p.bias.itemsize if p.bias else 0)) * p.M * p.N
    return float(p.B * (p.H * p.M * (p.D + p.DV) * e + p.H // p.group * p.N * (p.D + p.DV) * e + scores))


def _features(p: AttentionProblem) -> dict[str, int | str]:
    return {
        "heads": p.B * p.H, "M": p.M, "N": p.N, "D": str(p.block_d), "DV": str(p.block_dv),
        "dtype": dtype_name(p.dtype), "precision": p.precision,
        "causal": str(int(p.shift is not None)), "masked": str(int(p.masked)),
        "bias": dtype_name(p.bias),
    }  # fmt: skip


def _row_features(p: AttentionProblem) -> dict[str, int | str]:
    return {"rows": p.B * p.H * p.M, "D": str(p.block_dv), "dtype": dtype_name(p.dtype)}


def _normalize_features(p: NormalizeProblem) -> dict[str, int | str]:
    return {"rows": p.rows, "D": str(p.block_d), "dtype": dtype_name(p.dtype)}


def _row_tile(p: AttentionProblem | NormalizeProblem) -> int:
    return p.block_dv if isinstance(p, AttentionProblem) else p.block_d


def _accepts_rows(p: AttentionProblem | NormalizeProblem, config: Config, device: DeviceSpec) -> bool:
    """One to eight loads of 16 bytes a thread."""
    elements = config.BLOCK_M * _row_tile(p)
    once = config.num_warps * device.warp_size * 16 // p.dtype.itemsize
    return once <= elements <= 8 * once or (config.BLOCK_M == 64 and config.num_warps == 1)


def _estimate_rows(
    p: AttentionProblem | NormalizeProblem, config: Config, device: DeviceSpec, passes: int
) -> Estimate:  # fmt: skip
    rows, size = (p.B * p.H * p.M, p.DV) if isinstance(p, AttentionProblem) else (p.rows, p.D)
    moved = float(passes * rows * size * p.dtype.itemsize)
    return cost.stream(
        device, programs=cost.cdiv(rows, config.BLOCK_M), issued_bytes=moved, dram_bytes=moved, config=config,
        tile_bytes=config.BLOCK_M * size * p.dtype.itemsize, waste=_row_tile(p) / max(1, size),
    )  # fmt: skip


def _meta(p: AttentionProblem | NormalizeProblem, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or p.dtype, device="meta")


def _example(p: AttentionProblem) -> dict[str, torch.Tensor]:
    """All tensors of a call, contiguous, on the meta device."""
    q, out = _meta(p, p.B, p.H, p.M, p.D), _meta(p, p.B, p.H, p.M, p.DV)
    k, v = _meta(p, p.B, p.H // p.group, p.N, p.D), _meta(p, p.B, p.H // p.group, p.N, p.DV)
    stats = _meta(p, p.parts, p.B, p.H, p.M, dtype=torch.float32)
    return {"q": q, "k": k, "v": v, "out": out, "stats": stats, "delta": _meta(p, p.B, p.H, p.M, dtype=torch.float32)}


def _example_scores(p: AttentionProblem) -> Scores:
    sizes = {"b": p.B, "h": p.H, "m": p.M, "n": p.N}
    bias = (sizes[dim] if dim in p.bias_dims else 1 for dim in "bhmn")
    return Scores(
        _meta(p, p.B, 1, p.M, p.N, dtype=torch.bool) if p.masked else None,
        _meta(p, *bias, dtype=p.bias) if p.bias else None, 0.125,
    )  # fmt: skip


def _forward_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example(p)
    lse = None if p.saves else t["delta"]
    stats = t["stats"] if p.saves else None
    return plan_forward(p, config, t["q"], t["k"], t["v"], _example_scores(p), t["out"], lse, stats)


def _delta_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example(p)
    return plan_delta(p, config, t["out"], _meta(p, *t["out"].shape), None, t["delta"])


def _key_value_grad_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example(p)
    grads = (_meta(p, *t[name].shape) for name in ("k", "v"))
    return plan_key_value_grad(
        p, config, t["q"], t["k"], t["v"], _example_scores(p), t["out"], t["stats"], t["delta"], *grads
    )  # fmt: skip


def _query_grad_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example(p)
    dq = _meta(p, *t["q"].shape)
    return plan_query_grad(
        p, config, t["q"], t["k"], t["v"], _example_scores(p), t["out"], t["stats"], t["delta"], dq
    )  # fmt: skip


def _bias_grad_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t, scores = _example(p), _example_scores(p)
    assert scores.bias is not None
    dbias = torch.empty_like(scores.bias)
    return plan_bias_grad(p, config, t["q"], t["k"], t["v"], scores, t["out"], t["stats"], t["delta"], dbias)


def _normalize_launches(p: NormalizeProblem, config: Config) -> list[Launch]:
    x, out = _meta(p, 1, 1, p.rows, p.D), _meta(p, 1, 1, p.rows, p.D)
    return plan_normalize(p, config, x, 1e6, out, _meta(p, 1, 1, p.rows, dtype=torch.float32))


def _normalize_grad_launches(p: NormalizeProblem, config: Config) -> list[Launch]:
    out, dout, dx = (_meta(p, 1, 1, p.rows, p.D) for _ in range(3))
    return plan_normalize_grad(p, config, out, dout, _meta(p, 1, 1, p.rows, dtype=torch.float32), 1e6, dx)


FORWARD = register(
    Tunable(
        "attention", TILES, _features, partial(_accepts, "forward"), partial(_estimate, "forward"), _forward_launches
    )
)
DELTA = register(
    Tunable("attention_delta", ROWS, _row_features, _accepts_rows, partial(_estimate_rows, passes=2), _delta_launches)
)
KEY_VALUE_GRAD = register(
    Tunable(
        "attention_key_value_grad", TILES, _features, partial(_accepts, "key_value_grad"),
        partial(_estimate, "key_value_grad"), _key_value_grad_launches,
    )
)  # fmt: skip
QUERY_GRAD = register(
    Tunable(
        "attention_query_grad", TILES, _features, partial(_accepts, "query_grad"), partial(_estimate, "query_grad"),
        _query_grad_launches,
    )
)  # fmt: skip
BIAS_GRAD = register(
    Tunable(
        "attention_bias_grad", TILES, _features, partial(_accepts, "bias_grad"), partial(_estimate, "bias_grad"),
        _bias_grad_launches,
    )
)  # fmt: skip
NORMALIZE = register(
    Tunable(
        "attention_normalize", ROWS, _normalize_features, _accepts_rows, partial(_estimate_rows, passes=2),
        _normalize_launches,
    )
)  # fmt: skip
NORMALIZE_GRAD = register(
    Tunable(
        "attention_normalize_grad", ROWS, _normalize_features, _accepts_rows, partial(_estimate_rows, passes=3),
        _normalize_grad_launches,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def _rows_of(t: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as the kernels read it."""
    return readable(t, unit=3, tile=(2,))


def run_forward(
    p: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    out: torch.Tensor, lse: torch.Tensor | None, stats: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills out [B, H, M, DV] and, where they are given, lse [B, H, M] and stats [parts, B, H, M] for a backward."""
    q, k, v = (_rows_of(t) for t in (q, k, v))
    launch(FORWARD, plan_forward, p, q, k, v, scores.readable(), out, lse, stats)


def run_backward(
    p: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, out: torch.Tensor,
    stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None,
    dq: torch.Tensor | None, dk: torch.Tensor | None, dv: torch.Tensor | None, dbias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills those gradients that are given; dk and dv come together."""
    q, k, v, out, dout = (_rows_of(t) for t in (q, k, v, out, dout))
    scores, stats = scores.readable(), readable(stats, dense=True)
    dlse = None if dlse is None else readable(dlse, dense=True)
    delta = q.new_empty(p.B, p.H, p.M, dtype=torch.float32)
    launch(DELTA, plan_delta, p, out, dout, dlse, delta)
    common = (q, k, v, scores, dout, stats, delta)
    if dk is not None:
        launch(KEY_VALUE_GRAD, plan_key_value_grad, p, *common, dk, dv)
    if dq is not None:
        launch(QUERY_GRAD, plan_query_grad, p, *common, dq)
    if dbias is not None:
        launch(BIAS_GRAD, plan_bias_grad, p, *common, dbias)


def run_normalize(
    p: NormalizeProblem, x: torch.Tensor, eps: float, out: torch.Tensor, inverse: torch.Tensor
) -> None:  # fmt: skip
    """Fills out with ``x / max(|x|, eps)`` of the rows of [B, H, M, D], inverse with 1 over those divisors."""
    launch(NORMALIZE, plan_normalize, p, _rows_of(x), 1.0 / eps, out, inverse)


def run_normalize_grad(
    p: NormalizeProblem, out: torch.Tensor, inverse: torch.Tensor, dout: torch.Tensor, eps: float, dx: torch.Tensor
) -> None:  # fmt: skip
    inverse = readable(inverse, dense=True)
    launch(NORMALIZE_GRAD, plan_normalize_grad, p, _rows_of(out), _rows_of(dout), inverse, 1.0 / eps, dx)
