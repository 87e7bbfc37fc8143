r"""Tiles of queries, keys and scores: device code that all kernels of attention share.

    s_ij = scale * q_i . k_j + bias_ij          -inf where the mask, or causality (j > i + shift), hides key j

A row of query and key is D numbers wide, one of value DV; both are padded to a power of two with zeros. Bytes (e: bytes
an element): :func:`load_rows` and :func:`store_rows` move e BLOCK SIZE, and :func:`scores_of` loads one element of mask
and bias for each score. The files of the kernels say how often they call these.

UNIT says how scores are kept, because exponentials of base 2 are the instruction that a GPU has:

    log2        s / log 2, so that exp(s) is one instruction
    natural     s itself, where a bias is added: a bias near finfo.min times 1 / log 2 would be infinite
    exact       s itself, where the products have all digits of fp32: :func:`exp_of` then keeps these digits
"""

import triton
import triton.language as tl

from ._math import narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# LN2 as a sum of two. The first has so few digits that its product with an integer below 2^15 is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)

# Sizes, and strides of batch (b), head (h) and sequence (s, m). The kernels are not specialised for their values, so
# that a new batch size or sequence length does not compile a kernel again.
SIZES = ["H", "M", "N", "shift", "scale"]
OPERAND_STRIDES = [f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for dim in "bhs"]
SCORE_STRIDES = [f"stride_{tensor}{dim}" for tensor in ("mask", "bias") for dim in ("_b", "_h", "_m")]


@triton.jit
def head_pointer(ptr, b, h, stride_b, stride_h, VEC: tl.constexpr):
    """The pointer to the first element of batch ``b`` and head ``h`` of a tensor."""
    return ptr + (b * stride_b + h * stride_h) * VEC


@triton.jit
def load_rows(
    ptr, first, count, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The rows from ``first`` on, [BLOCK, WIDTH], of a tensor with ``count`` rows of SIZE numbers. Columns from SIZE on
    are 0. With CHECK rows from ``count`` on are 0, too; the caller leaves it out where there are none."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    tile = ptr + tl.cast(first, tl.int64) * stride * VEC + ((i * stride * VEC)[:, None] + d[None, :])
    if CHECK:
        mask = (i + first < count)[:, None] & (d < SIZE)[None, :]
        return tl.load(tile, mask=mask, other=0.0)  # [BLOCK, WIDTH]
    elif SIZE < WIDTH:
        mask = (i >= 0)[:, None] & (d < SIZE)[None, :]
        return tl.load(tile, mask=mask, other=0.0)  # [BLOCK, WIDTH]
    else:
        return tl.load(tile)  # [BLOCK, WIDTH]


@triton.jit
def store_rows(
    ptr, values, first, count, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Stores ``values`` [BLOCK, WIDTH], rounded to the tensor's dtype, as the rows from ``first`` on. Rows from
    ``count`` on and columns from SIZE on are left out."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    tile = ptr + tl.cast(first, tl.int64) * stride * VEC + ((i * stride * VEC)[:, None] + d[None, :])
    mask = (i + first < count)[:, None] & (d < SIZE)[None, :]
    tl.store(tile, narrow(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def prescaled(x, scale):
    """The rows x of query or key times 2^e, and scale / 2^e, where 2^e is the power of two at or below a scale below 1.

    The products of x are then finite wherever the scores are: without this, queries and keys near finfo.max would
    overflow before they are scaled. To multiply by a power of two is exact. In float16 products cannot overflow fp32,
    and small elements of x would become 0, so there both are returned unchanged.
    """
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
    """The scores of queries ``first_row + row`` and keys ``first_key + column``, a tile of the shape of ``products``.

    ``row`` and ``column`` are [BLOCK_M, 1] and [1, BLOCK_N], or for transposed tiles [1, BLOCK_M] and [BLOCK_N, 1].
    With CHECK keys from N on and keys that causality hides get -inf; the caller leaves it out where there are none, or
    where it does not use their scores.
    Offsets within a tile are 32-bit, because a tile of 64-bit ones would take twice the registers.
    """
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
        bias = tl.load(bias_ptrs, mask=inside, other=float("-inf"))  # of the shape of products
        s += bias.to(tl.float32)
    if mask_ptr is not None:
        corner = tl.cast(first_row, tl.int64) * stride_mask_m * MASK_VEC
        corner += tl.cast(first_key, tl.int64) * stride_mask_n
        mask_ptr += corner
        mask_ptrs = mask_ptr + (row * stride_mask_m * MASK_VEC + column * stride_mask_n)
        seen = tl.load(mask_ptrs, mask=inside, other=0)  # of the shape of products
        s = tl.where(seen != 0, s, float("-inf"))
    if CHECK:
        if CAUSAL:
            s = tl.where((j < N) & (j <= i + shift), s, float("-inf"))
        else:
            s = tl.where(j < N, s, float("-inf"))
    return s


@triton.jit
def exp_of(s, UNIT: tl.constexpr):
    """The exponential of ``s``, a difference of two scores.

    For base 2 the difference is multiplied by 1 / log 2, and not the scores: a score of finfo.min would overflow.
    "exact" is as accurate as torch's exponential in fp32: it takes out a multiple of log 2 first, since the rounding of
    a large s / log 2 would be a relative error of its exponential.
    """
    if UNIT == "log2":
        return tl.exp2(s)
    elif UNIT == "natural":
        return tl.exp2(s * LOG2E)
    else:
        x = tl.where(s < -150.0, -150.0, s)  # below -150 the exponential is 0 in any case; NaN stays NaN
        n = tl.floor(x * LOG2E + 0.5)
        return tl.exp2(n) * tl.exp2((x - n * LN2_HIGH - n * LN2_LOW) * LOG2E)


@triton.jit
def key_limits(first, rows: tl.constexpr, N, shift, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """``(whole, end)`` for the queries ``first`` to ``first + rows - 1``. All of them see every key before ``whole``, a
    multiple of BLOCK_N, so the tiles before it need no check; none of them sees a key from ``end`` on."""
    if CAUSAL:
        whole = tl.minimum(tl.maximum(first + shift + 1, 0), N) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.maximum(first + rows + shift, 0), N)
    else:
        whole = N // BLOCK_N * BLOCK_N
        end = N
    return whole, end
