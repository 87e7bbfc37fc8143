r"""Rows of unit length, for cosine scores: y = x / max(|x|, eps). The kernels get limit = 1 / eps.

    y = x * inverse,  inverse = min(1 / |x|, limit)          dx = (dy - y (y . dy)) * inverse
                                                             dx = dy * limit for rows shorter than eps

Bytes (e: bytes an element), each once from memory: 2 e B H M D + 4 B H M forward, 3 e B H M D + 4 B H M backward, where
the 4 bytes are the inverse length of a row.

This is a kernel of its own because attention loads each row of query or key once for every tile of the other, and would
normalise it as often.
"""

import triton
import triton.language as tl

from .attention_tiles import OPERAND_STRIDES, head_pointer, load_rows, store_rows


@triton.jit(do_not_specialize=["H", "M", "limit", *OPERAND_STRIDES])
def normalize_kernel(
    q_ptr, o_ptr, inverse_ptr, stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os, H, M, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """q [B, H, M, D] to o = q / max(|q|, 1 / limit) and to ``inverse`` [B, H, M], 1 over those divisors. Rows are first
    divided by a power of two near their largest element, so that their squares neither overflow nor become 0."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr = head_pointer(q_ptr, b, h, stride_qb, stride_qh, VEC)
    x = load_rows(q_ptr, first_row, M, stride_qs, D, BLOCK_D, BLOCK_M, VEC, True).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    # The power of two at or below the largest element of a row. To divide by it and to multiply by it are exact.
    power = (tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    safe = tl.where(power == 0.0, 1.0, power)
    y = x / safe[:, None]
    length = tl.sqrt(tl.sum(y * y, 1))
    unit = 1.0 / tl.where(length == 0.0, 1.0, length)
    # The comparison is false for a row with a NaN or an infinity, so such a row is divided by its length, too.
    short = length * safe * limit < 1.0
    y = tl.where(short[:, None], x * limit, y * unit[:, None])
    o_ptr = head_pointer(o_ptr, b, h, stride_ob, stride_oh, VEC)
    store_rows(o_ptr, y, first_row, M, stride_os, D, BLOCK_D, BLOCK_M, VEC)
    i = first_row + tl.arange(0, BLOCK_M)
    tl.store(inverse_ptr + bh * M + i, tl.where(short, limit, unit / safe), mask=i < M)


@triton.jit(do_not_specialize=["H", "M", "limit", *OPERAND_STRIDES])
def normalize_grad_kernel(
    o_ptr, do_ptr, inverse_ptr, dq_ptr, stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos,
    stride_dqb, stride_dqh, stride_dqs, H, M, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dq = (do - o (o . do)) * inverse, all [B, H, M, D] but inverse [B, H, M]. Rows shorter than 1 / limit were
    multiplied by the constant ``limit``, so their gradient is do * limit."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    o_ptr = head_pointer(o_ptr, b, h, stride_ob, stride_oh, VEC)
    do_ptr = head_pointer(do_ptr, b, h, stride_dob, stride_doh, VEC)
    # Both are [BLOCK_M, BLOCK_D].
    o = load_rows(o_ptr, first_row, M, stride_os, D, BLOCK_D, BLOCK_M, VEC, True).to(tl.float32)
    do = load_rows(do_ptr, first_row, M, stride_dos, D, BLOCK_D, BLOCK_M, VEC, True).to(tl.float32)
    i = first_row + tl.arange(0, BLOCK_M)
    inverse = tl.load(inverse_ptr + bh * M + i, mask=i < M, other=0.0)  # [BLOCK_M]
    along = tl.where(inverse >= limit, 0.0, tl.sum(o * do, 1))
    dq = (do - o * along[:, None]) * inverse[:, None]
    dq_ptr = head_pointer(dq_ptr, b, h, stride_dqb, stride_dqh, VEC)
    store_rows(dq_ptr, dq, first_row, M, stride_dqs, D, BLOCK_D, BLOCK_M, VEC)
