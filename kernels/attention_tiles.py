r"""Tiles of queries, keys and scores: device code that all kernels of attention share.

    s_ij = scale * q_i . k_j + bias_ij          -inf where the mask, or causality (j > i + shift), hides key j

Heads are D (query, key) or DV (value) numbers wide, padded to a power of two with zeros. UNIT says in which unit scores
are: "log2" in units of log 2, for exponentials of base 2; "natural" where a bias is added to them; "exact" where the
products have all digits of fp32, and the exponential keeps them.
"""

import triton
import triton.language as tl

from ._math import narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# LN2 in two parts, of which the first has few digits: multiplied by a small integer it is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)

# Sizes and strides of batch (b), head (h) and sequence (s, m): none of them may compile anything anew.
SIZES = ["H", "M", "N", "shift", "scale"]
OPERAND_STRIDES = [f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for dim in "bhs"]
SCORE_STRIDES = [f"stride_{tensor}{dim}" for tensor in ("mask", "bias") for dim in ("_b", "_h", "_m")]


@triton.jit
def head_start(ptr, b, h, stride_b, stride_h, VEC: tl.constexpr):
    """The address where batch ``b`` and head ``h`` of a tensor start."""
    return ptr + (b * stride_b + h * stride_h) * VEC


@triton.jit
def load_rows(
    ptr, first, count, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The rows from ``first`` on, [BLOCK, WIDTH]. Columns from SIZE on are 0, and with CHECK rows from ``count``."""
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
def store_rows(
    ptr, values, first, count, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Stores ``values`` [BLOCK, WIDTH] as the rows from ``first`` to ``count``, up to column SIZE."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    tile = ptr + tl.cast(first, tl.int64) * stride * VEC + ((i * stride * VEC)[:, None] + d[None, :])
    mask = (i + first < count)[:, None] & (d < SIZE)[None, :]
    tl.store(tile, narrow(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def prescaled(x, scale):
    """``(x, scale)``, with the power of two of a scale below 1 moved to the rows x of query or key. That is exact, and
    the products then stay finite where the scores are. In float16 they always do, and small numbers would be lost."""
    if x.dtype == tl.float16:
        return x, scale
    else:
        scale = tl.cast(scale, tl.float32)
        power = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.where((power > 0.0) & (power < 1.0), power, 1.0)
        return narrow(x.to(tl.float32) * power, x.dtype), tl.div_rn(scale, power)


@triton.jit
def scores_of(
    products, row, column, first_row, first_key, M, N, shift, scale,
    mask_ptr, stride_mask_m, stride_mask_n, MASK_VEC: tl.constexpr,
    bias_ptr, stride_bias_m, stride_bias_n, BIAS_VEC: tl.constexpr,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The scores of queries ``first_row + row`` and keys ``first_key + column``, from their products. Of ``row`` and
    ``column`` one runs down, the other across. With CHECK some key may lie behind the end or be hidden by causality.
    Offsets within a tile are 32-bit, because a tile of 64-bit ones would take twice the registers."""
    i = first_row + row
    j = first_key + column
    inside = (i < M) & (j < N)
    if UNIT == "log2":
        s = products * (scale * LOG2E)
    else:
        s = products * scale
    if bias_ptr is not None:
        corner = tl.cast(first_row, tl.int64) * stride_bias_m * BIAS_VEC
        corner += tl.cast(first_key, tl.int64) * stride_bias_n
        bias_ptr += corner
        bias_ptrs = bias_ptr + (row * stride_bias_m * BIAS_VEC + column * stride_bias_n)
        bias = tl.load(bias_ptrs, mask=inside, other=float("-inf"))  # as products
        s += bias.to(tl.float32)
    if mask_ptr is not None:
        corner = tl.cast(first_row, tl.int64) * stride_mask_m * MASK_VEC
        corner += tl.cast(first_key, tl.int64) * stride_mask_n
        mask_ptr += corner
        mask_ptrs = mask_ptr + (row * stride_mask_m * MASK_VEC + column * stride_mask_n)
        seen = tl.load(mask_ptrs, mask=inside, other=0)  # as products
        s = tl.where(seen != 0, s, float("-inf"))
    if CHECK:
        if CAUSAL:
            s = tl.where((j < N) & (j <= i + shift), s, float("-inf"))
        else:
            s = tl.where(j < N, s, float("-inf"))
    return s


@triton.jit
def exp_of(s, UNIT: tl.constexpr):
    """The exponential of differences of scores. They are multiplied after the subtraction, which keeps finfo.min
    finite; "exact" loses nothing of a long difference, as torch's own exponential in fp32 does not."""
    if UNIT == "log2":
        return tl.exp2(s)
    elif UNIT == "natural":
        return tl.exp2(s * LOG2E)
    else:
        x = tl.where(s < -150.0, -150.0, s)  # the exponential is 0 all the same, and NaN stays NaN
        n = tl.floor(x * LOG2E + 0.5)
        return tl.exp2(n) * tl.exp2((x - n * LN2_HIGH - n * LN2_LOW) * LOG2E)


@triton.jit
def key_limits(first, rows: tl.constexpr, N, shift, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(whole, end)`` for the queries from ``first`` on: all of them see the keys before ``whole``, which are whole
    tiles, and none of them sees a key from ``end`` on."""
    if CAUSAL:
        whole = tl.minimum(tl.maximum(first + shift + 1, 0), N) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.maximum(first + rows + shift, 0), N)
    else:
        whole = N // BLOCK_N * BLOCK_N
        end = N
    return whole, end
