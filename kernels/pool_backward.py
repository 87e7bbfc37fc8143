r"""Pooling backward: each element of dx gathers what the windows that cover it give.

    dx[n,c,d,h,w] = sum over the outputs (z, p, q) whose windows cover (d, h, w) of

    max       dy[n,c,z,p,q] where the index of (z, p, q) names (d, h, w), else 0
    mean      dy / DIVISOR, or dy / the number of elements of the window
    norm1     K * dy / that divisor; 0 where y is 0 or NaN
    norm2     2*x * (K * dy / that divisor) / (2*y); 0 where y is 0
    last      not a sum: of the windows that name (d, h, w) the last one gives what it holds. That is the unpooling.

Bytes (i: bytes of an index, 0 where none is kept; e: bytes an element). What must come from memory once is
|dy| + i*N*C*Z*P*Q + |dx|, for norm2 also x and y. What the load and store instructions move, where neighbouring windows
hit the L1 cache:

    pixels x channels     taps inside the image * (e + i) for each output, + e for each input
    rows                  taps of a column (T*R) * (e + i) for each element of the bands, + e for each input
                          (where windows are adaptive: windows over a row, for each input row)

Each element is written once, by one program, which adds what reaches it in a fixed order. No atomics.
"""

import triton
import triton.language as tl

from ._math import below, narrow, position, tile_offsets
from .pool_windows import (
    SIZES,
    STRIDES,
    counted_elements,
    last_window,
    mean_divisor,
    shifted_columns,
    tap_at,
    window_of,
)


@triton.jit
def _share(dy, y, divisor, REDUCE: tl.constexpr, K: tl.constexpr):
    """What each element of a window receives of the gradient dy of its output y, up to the element's own factor."""
    if REDUCE == "mean":
        return tl.div_rn(dy, divisor)
    else:
        dy *= tl.div_rn(tl.zeros_like(divisor) + K, divisor)
        # 0 is torch's choice where the root has no derivative, and with norm 1 where the sum is NaN.
        if REDUCE == "norm2":  # half of it, and twice the element's factor, overflow where torch's gradient does
            return tl.where(y == 0.0, 0.0, 0.5 * tl.div_rn(dy, y))
        return tl.where((y == 0.0) | (y != y), 0.0, dy)


@triton.jit
def _collected(acc, found, dy, covers, REDUCE: tl.constexpr):
    """``acc`` with the share dy of one more window, and whether a window was found. An unpooling keeps the first share:
    windows come from the last to the first."""
    if REDUCE == "last":
        acc = tl.where(covers & (found == 0), dy, acc)
        return acc, tl.where(covers, 1, found)
    else:
        return acc + tl.where(covers, dy, 0.0), found


@triton.jit
def _gradient_of_window(
    dy_ptr, index_ptr, saved_y_ptr, y_off, index_off, saved_y_off, own_index, divisor, mask, REDUCE: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """What windows give to the elements that ``own_index`` names, [BLOCK_M, BLOCK_C], and whether they give it: all to
    the winner, or a share to each."""
    dy = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    if index_ptr is not None:
        index = tl.load(index_ptr + index_off, mask=mask, other=0)  # [BLOCK_M, BLOCK_C]
        return dy, mask & (index.to(own_index.dtype) == own_index[:, None])
    else:
        y = dy
        if saved_y_ptr is not None:
            y = tl.load(saved_y_ptr + saved_y_off, mask=mask, other=1.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        return _share(dy, y, divisor[:, None], REDUCE, K), mask


@triton.jit
def _own_index(t, r, s, d, h, w, H, W, R, S, FLAT: tl.constexpr):
    """The index that names an element itself: its place (d, h, w) in the image, or the tap (t, r, s) of the window."""
    if FLAT:
        return (d.to(tl.int64) * H + h) * W + w
    else:
        return tl.zeros_like(w) + ((t * R + r) * S + s)


# --- pixels by channels ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def pool_backward_kernel(
    dy_ptr, index_ptr, saved_y_ptr, saved_x_ptr, dx_ptr,
    M, D, H, W, Z, P, Q, largest_h, largest_w, most_d, most_h, most_w,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_index_n: tl.int64, stride_index_c: tl.int64, stride_index_z: tl.int64,
    stride_index_p: tl.int64, stride_index_q: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_saved_xn: tl.int64, stride_saved_xc: tl.int64, stride_saved_xd: tl.int64,
    stride_saved_xh: tl.int64, stride_saved_xw: tl.int64,
    stride_saved_yn: tl.int64, stride_saved_yc: tl.int64, stride_saved_yz: tl.int64,
    stride_saved_yp: tl.int64, stride_saved_yq: tl.int64,
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr, ADAPTIVE: tl.constexpr, REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, INDEX_VEC: tl.constexpr, INDEX_UNIT_C: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, SAVED_X_VEC: tl.constexpr, SAVED_X_UNIT_C: tl.constexpr,
    SAVED_Y_VEC: tl.constexpr, SAVED_Y_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gather for all windows: each of the M pixels of dx looks at as many windows as lie over any pixel. Of
    adaptive windows these are most_d x most_h x most_w; of fixed ones, where most_* are 0, their number is computed
    here. Norms also read the saved x and y. With REDUCE "last", the unpooling, dy is what is unpooled and dx the
    result."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    windows_d = most_d if ADAPTIVE and RANK == 3 else ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    windows_h = most_h if ADAPTIVE else ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    windows_w = most_w if ADAPTIVE else ((S - 1) * DIL_W + STRIDE_W) // STRIDE_W
    taps_h = largest_h if ADAPTIVE else R
    taps_w = largest_w if ADAPTIVE else S
    FLAT: tl.constexpr = index_ptr is not None and index_ptr.dtype.element_ty == tl.int64
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, d, h, w = position(offs_m, D, H, W, RANK)
    last_z = last_window(d, D, Z, STRIDE_D, PAD_D, ADAPTIVE)
    last_p = last_window(h, H, P, STRIDE_H, PAD_H, ADAPTIVE)
    last_q = last_window(w, W, Q, STRIDE_W, PAD_W, ADAPTIVE)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    found = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    for l in range(windows_d):
        for i in range(windows_h):
            for j in range(windows_w):
                # Windows come from the last one backwards, each with the tap that lies on the pixel.
                z, p, q = last_z - l, last_p - i, last_q - j
                t, in_z = tap_at(z, d, D, Z, STRIDE_D, PAD_D, T, DIL_D, ADAPTIVE)
                r, in_p = tap_at(p, h, H, P, STRIDE_H, PAD_H, R, DIL_H, ADAPTIVE)
                s, in_q = tap_at(q, w, W, Q, STRIDE_W, PAD_W, S, DIL_W, ADAPTIVE)
                covers = mask_m & in_p & in_q
                if RANK == 3:
                    covers &= in_z
                y_off = tile_offsets(
                    n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C
                )
                index_off = tile_offsets(
                    n, z, p, q, c, stride_index_n, stride_index_c, stride_index_z, stride_index_p, stride_index_q,
                    INDEX_VEC, INDEX_UNIT_C,
                )  # fmt: skip
                saved_y_off = tile_offsets(
                    n, z, p, q, c, stride_saved_yn, stride_saved_yc, stride_saved_yz, stride_saved_yp, stride_saved_yq,
                    SAVED_Y_VEC, SAVED_Y_UNIT_C,
                )  # fmt: skip
                own_index = _own_index(t, r, s, d, h, w, H, W, taps_h, taps_w, FLAT)
                d0, size_d = window_of(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
                h0, size_h = window_of(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
                w0, size_w = window_of(q, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
                count_d = counted_elements(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
                count_h = counted_elements(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
                count_w = counted_elements(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)
                divisor = mean_divisor(count_d, count_h, count_w, DIVISOR)
                dy, mask = _gradient_of_window(
                    dy_ptr, index_ptr, saved_y_ptr, y_off, index_off, saved_y_off, own_index, divisor,
                    covers[:, None] & mask_c[None, :], REDUCE, T * R * S,
                )  # fmt: skip
                acc, found = _collected(acc, found, dy, mask, REDUCE)
    mask = mask_m[:, None] & mask_c[None, :]
    if saved_x_ptr is not None:
        saved_x_off = tile_offsets(
            n, d, h, w, c, stride_saved_xn, stride_saved_xc, stride_saved_xd, stride_saved_xh, stride_saved_xw,
            SAVED_X_VEC, SAVED_X_UNIT_C,
        )  # fmt: skip
        x = tl.load(saved_x_ptr + saved_x_off, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
        acc *= 2.0 * x.to(tl.float32)
    x_off = tile_offsets(n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, X_UNIT_C)
    tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def pool_backward_cells_kernel(
    dy_ptr, index_ptr, saved_y_ptr, saved_x_ptr, dx_ptr,
    M, D, H, W, Z, P, Q,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64, stride_yq: tl.int64,
    stride_index_n: tl.int64, stride_index_c: tl.int64, stride_index_z: tl.int64,
    stride_index_p: tl.int64, stride_index_q: tl.int64,
    stride_xn: tl.int64, stride_xc: tl.int64, stride_xd: tl.int64, stride_xh: tl.int64, stride_xw: tl.int64,
    stride_saved_xn: tl.int64, stride_saved_xc: tl.int64, stride_saved_xd: tl.int64,
    stride_saved_xh: tl.int64, stride_saved_xw: tl.int64,
    stride_saved_yn: tl.int64, stride_saved_yc: tl.int64, stride_saved_yz: tl.int64,
    stride_saved_yp: tl.int64, stride_saved_yq: tl.int64,
    C: tl.constexpr, T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr, REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    Y_VEC: tl.constexpr, Y_UNIT_C: tl.constexpr, INDEX_VEC: tl.constexpr, INDEX_UNIT_C: tl.constexpr,
    X_VEC: tl.constexpr, X_UNIT_C: tl.constexpr, SAVED_X_VEC: tl.constexpr, SAVED_X_UNIT_C: tl.constexpr,
    SAVED_Y_VEC: tl.constexpr, SAVED_Y_UNIT_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As pool_backward_kernel, for windows that pass ``has_cells``: fixed, with small strides. M is the number of
    cells, blocks of STRIDE_D x STRIDE_H x STRIDE_W pixels; a program writes every pixel of BLOCK_M of them. Pixels at
    one place in their cells lie under the same taps, so taps are constants here, and windows that do not reach the
    place are left out: a third of the instructions remains."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    WINDOWS_D: tl.constexpr = ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    WINDOWS_H: tl.constexpr = ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    WINDOWS_W: tl.constexpr = ((S - 1) * DIL_W + STRIDE_W) // STRIDE_W
    FLAT: tl.constexpr = index_ptr is not None and index_ptr.dtype.element_ty == tl.int64
    pid = tl.program_id(0)
    offs_m = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = c < C
    n, cell_d, cell_h, cell_w = position(offs_m, tl.cdiv(D, STRIDE_D), tl.cdiv(H, STRIDE_H), tl.cdiv(W, STRIDE_W), RANK)
    for a in tl.static_range(STRIDE_D * STRIDE_H * STRIDE_W):
        in_d = a // (STRIDE_H * STRIDE_W)
        in_h = a // STRIDE_W % STRIDE_H
        in_w = a % STRIDE_W
        d, h, w = cell_d * STRIDE_D + in_d, cell_h * STRIDE_H + in_h, cell_w * STRIDE_W + in_w
        mask_p = mask_m & (h < H) & (w < W)
        if RANK == 3:
            mask_p &= d < D
        acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        found = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
        for i in tl.static_range(WINDOWS_D * WINDOWS_H * WINDOWS_W):
            # The distance from the first tap of the i-th window to the pixel; windows are counted from the last one.
            off_d = (in_d + PAD_D) % STRIDE_D + i // (WINDOWS_H * WINDOWS_W) * STRIDE_D
            off_h = (in_h + PAD_H) % STRIDE_H + i // WINDOWS_W % WINDOWS_H * STRIDE_H
            off_w = (in_w + PAD_W) % STRIDE_W + i % WINDOWS_W * STRIDE_W
            reaches = (off_d % DIL_D == 0) & (off_h % DIL_H == 0) & (off_w % DIL_W == 0)
            if reaches & (off_d // DIL_D < T) & (off_h // DIL_H < R) & (off_w // DIL_W < S):
                z = cell_d + (in_d + PAD_D) // STRIDE_D - i // (WINDOWS_H * WINDOWS_W)
                p = cell_h + (in_h + PAD_H) // STRIDE_H - i // WINDOWS_W % WINDOWS_H
                q = cell_w + (in_w + PAD_W) // STRIDE_W - i % WINDOWS_W
                covers = mask_p & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
                if RANK == 3:
                    covers &= (z >= 0) & (z < Z)
                y_off = tile_offsets(
                    n, z, p, q, c, stride_yn, stride_yc, stride_yz, stride_yp, stride_yq, Y_VEC, Y_UNIT_C
                )
                index_off = tile_offsets(
                    n, z, p, q, c, stride_index_n, stride_index_c, stride_index_z, stride_index_p, stride_index_q,
                    INDEX_VEC, INDEX_UNIT_C,
                )  # fmt: skip
                saved_y_off = tile_offsets(
                    n, z, p, q, c, stride_saved_yn, stride_saved_yc, stride_saved_yz, stride_saved_yp, stride_saved_yq,
                    SAVED_Y_VEC, SAVED_Y_UNIT_C,
                )  # fmt: skip
                own_index = _own_index(off_d // DIL_D, off_h // DIL_H, off_w // DIL_W, d, h, w, H, W, R, S, FLAT)
                count_d = counted_elements(z * STRIDE_D - PAD_D, T, D, PAD_D, INCLUDE_PAD, False)
                count_h = counted_elements(p * STRIDE_H - PAD_H, R, H, PAD_H, INCLUDE_PAD, False)
                count_w = counted_elements(q * STRIDE_W - PAD_W, S, W, PAD_W, INCLUDE_PAD, False)
                divisor = mean_divisor(count_d, count_h, count_w, DIVISOR)
                dy, mask = _gradient_of_window(
                    dy_ptr, index_ptr, saved_y_ptr, y_off, index_off, saved_y_off, own_index, divisor,
                    covers[:, None] & mask_c[None, :], REDUCE, T * R * S,
                )  # fmt: skip
                acc, found = _collected(acc, found, dy, mask, REDUCE)
        mask = mask_p[:, None] & mask_c[None, :]
        if saved_x_ptr is not None:
            saved_x_off = tile_offsets(
                n, d, h, w, c, stride_saved_xn, stride_saved_xc, stride_saved_xd, stride_saved_xh, stride_saved_xw,
                SAVED_X_VEC, SAVED_X_UNIT_C,
            )  # fmt: skip
            x = tl.load(saved_x_ptr + saved_x_off, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
            acc *= 2.0 * x.to(tl.float32)
        x_off = tile_offsets(n, d, h, w, c, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, X_VEC, X_UNIT_C)
        tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask)


# --- rows ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["C", *SIZES, *STRIDES])
def pool_backward_rows_kernel(
    dy_ptr, index_ptr, saved_y_ptr, saved_x_ptr, dx_ptr,
    M, C, D, H, W, Z, P, Q, largest_h, largest_w, most_d, most_h, most_w,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64,
    stride_saved_xn: tl.int64, stride_saved_xc: tl.int64, stride_saved_xd: tl.int64, stride_saved_xh: tl.int64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_D: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, RANK: tl.constexpr, ADAPTIVE: tl.constexpr,
    REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    Y_VEC: tl.constexpr, DENSE_VEC: tl.constexpr,
    X_VEC: tl.constexpr, SAVED_X_VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """The elements of a row of dy and of x are neighbours in memory; dx, the winners and y are dense NCHW. A program
    takes BLOCK_R of the M rows of dx and in each of them BLOCK_W columns, over which lie the windows of a band of
    BLOCK_Q columns of dy. DENSE_VEC is the width of the loads of the winners, or of y."""
    BAND_VEC: tl.constexpr = max(DENSE_VEC, Y_VEC)
    windows_d = most_d if ADAPTIVE and RANK == 3 else ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    windows_h = most_h if ADAPTIVE else ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    windows_w = most_w if ADAPTIVE else ((S - 1) * DIL_W + STRIDE_W) // STRIDE_W
    taps_h = largest_h if ADAPTIVE else R
    taps_w = largest_w if ADAPTIVE else S
    tiles_w = tl.cdiv(W, BLOCK_W)
    row = tl.program_id(0) // tiles_w * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_row = row < M
    plane, d, h = row // (D * H), row // H % D, row % H
    n, c = plane // C, plane % C
    last_z = last_window(d, D, Z, STRIDE_D, PAD_D, ADAPTIVE)
    last_p = last_window(h, H, P, STRIDE_H, PAD_H, ADAPTIVE)

    w_first = tl.program_id(0) % tiles_w * BLOCK_W
    w = w_first + tl.arange(0, BLOCK_W)
    last_q = last_window(w, W, Q, STRIDE_W, PAD_W, ADAPTIVE)
    band = last_window(w_first, W, Q, STRIDE_W, PAD_W, ADAPTIVE) - (windows_w - 1)
    band = tl.maximum(band, 0) // BAND_VEC * BAND_VEC
    q_band = band + tl.arange(0, BLOCK_Q)
    w0, size_w = window_of(q_band, W, Q, STRIDE_W, PAD_W, S, ADAPTIVE)
    count_w = counted_elements(w0, size_w, W, PAD_W, INCLUDE_PAD, ADAPTIVE)

    acc = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32)
    found = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.int32)
    for l in range(windows_d):
        for i in range(windows_h):
            z, p = last_z - l, last_p - i
            t, in_z = tap_at(z, d, D, Z, STRIDE_D, PAD_D, T, DIL_D, ADAPTIVE)
            r, in_p = tap_at(p, h, H, P, STRIDE_H, PAD_H, R, DIL_H, ADAPTIVE)
            in_row = mask_row & in_p
            if RANK == 3:
                in_row &= in_z
            y_row = n.to(tl.int64) * stride_yn + c.to(tl.int64) * stride_yc + z * stride_yz + p * stride_yp
            y_off = (y_row * Y_VEC)[:, None] + q_band[None, :]
            mask = in_row[:, None] & below(q_band, Q, Y_VEC)[None, :]
            dy = tl.load(dy_ptr + y_off, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_Q]
            dense = ((plane.to(tl.int64) * Z + z) * P + p) * (Q // DENSE_VEC) * DENSE_VEC
            if index_ptr is not None:
                mask = in_row[:, None] & below(q_band, Q, DENSE_VEC)[None, :]
                index = tl.load(index_ptr + dense[:, None] + q_band[None, :], mask=mask, other=0)  # [BLOCK_R, BLOCK_Q]
                if index_ptr.dtype.element_ty != tl.int64:
                    index = index.to(tl.int32)
            else:
                d0, size_d = window_of(z, D, Z, STRIDE_D, PAD_D, T, ADAPTIVE)
                h0, size_h = window_of(p, H, P, STRIDE_H, PAD_H, R, ADAPTIVE)
                count_h = counted_elements(h0, size_h, H, PAD_H, INCLUDE_PAD, ADAPTIVE)
                if RANK == 3:
                    count_h = count_h * counted_elements(d0, size_d, D, PAD_D, INCLUDE_PAD, ADAPTIVE)
                divisor = mean_divisor(1, count_h[:, None], count_w[None, :], DIVISOR)
                y = dy
                if saved_y_ptr is not None:
                    mask = in_row[:, None] & below(q_band, Q, DENSE_VEC)[None, :]
                    y = tl.load(saved_y_ptr + dense[:, None] + q_band[None, :], mask=mask, other=1.0)
                    y = y.to(tl.float32)  # [BLOCK_R, BLOCK_Q]
                dy = _share(dy, y, divisor, REDUCE, T * R * S)
            for j in range(windows_w):
                q = last_q - j
                s, in_q = tap_at(q, w, W, Q, STRIDE_W, PAD_W, S, DIL_W, ADAPTIVE)
                at = tl.minimum(tl.maximum(q - band, 0), BLOCK_Q - 1)
                at = tl.broadcast_to(at[None, :], (BLOCK_R, BLOCK_W))
                covers = in_row[:, None] & in_q[None, :]
                if index_ptr is not None:
                    if index_ptr.dtype.element_ty == tl.int64:
                        own_index = ((d.to(tl.int64) * H + h) * W)[:, None] + w[None, :]
                    else:
                        own_index = ((t * taps_h + r) * taps_w)[:, None] + s[None, :]
                    covers &= tl.gather(index, at, 1) == own_index
                acc, found = _collected(acc, found, tl.gather(dy, at, 1), covers, REDUCE)
    if saved_x_ptr is not None:
        saved_x_row = n.to(tl.int64) * stride_saved_xn + c.to(tl.int64) * stride_saved_xc + d * stride_saved_xd
        saved_x_row += h * stride_saved_xh
        mask = mask_row[:, None] & below(w, W, SAVED_X_VEC)[None, :]
        saved_x_ptrs = saved_x_ptr + (saved_x_row * SAVED_X_VEC)[:, None] + w[None, :]
        x = tl.load(saved_x_ptrs, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_W]
        acc *= 2.0 * x.to(tl.float32)
    x_off = (row.to(tl.int64) * (W // X_VEC) * X_VEC)[:, None] + w[None, :]
    mask = mask_row[:, None] & below(w, W, X_VEC)[None, :]
    tl.store(dx_ptr + x_off, narrow(acc, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["C", *SIZES, *STRIDES])
def pool_backward_cell_rows_kernel(
    dy_ptr, index_ptr, saved_y_ptr, saved_x_ptr, dx_ptr,
    M, C, D, H, W, Z, P, Q, span,
    stride_yn: tl.int64, stride_yc: tl.int64, stride_yz: tl.int64, stride_yp: tl.int64,
    stride_saved_xn: tl.int64, stride_saved_xc: tl.int64, stride_saved_xd: tl.int64, stride_saved_xh: tl.int64,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr, REDUCE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    Y_VEC: tl.constexpr, DENSE_VEC: tl.constexpr, X_VEC: tl.constexpr, SAVED_X_VEC: tl.constexpr,
    LEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The same by cells of STRIDE_W columns, a power of two. Column m of the tile is the window at output q and also
    the cell that begins at column q*STRIDE_W of x. A window at another distance of the cell is shifted to it; its taps
    on the columns of a cell are constants. M counts rows of cells,
    ``span`` the cells of a row that a program writes."""
    WINDOWS_D: tl.constexpr = ((T - 1) * DIL_D + STRIDE_D) // STRIDE_D
    WINDOWS_H: tl.constexpr = ((R - 1) * DIL_H + STRIDE_H) // STRIDE_H
    LAST: tl.constexpr = (STRIDE_W - 1 + PAD_W) // STRIDE_W
    DISTANCES: tl.constexpr = LAST - (PAD_W - (S - 1) * DIL_W + STRIDE_W - 1) // STRIDE_W + 1
    BLOCK_V: tl.constexpr = BLOCK_W // STRIDE_W
    cells_d, cells_h = tl.cdiv(D, STRIDE_D), tl.cdiv(H, STRIDE_H)
    tiles = tl.cdiv(tl.cdiv(W, STRIDE_W), span)
    row = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_row = row < M
    plane, cell_d, cell_h = row // (cells_d * cells_h), row // cells_h % cells_d, row % cells_h
    n, c = plane // C, plane % C

    first = tl.program_id(0) % tiles * (span // 16) * 16  # where a row has several tiles; a single one begins at 0
    lane = tl.arange(0, BLOCK_V) - LEAD
    q = first + lane
    w_lane = tl.arange(0, BLOCK_W) - LEAD * STRIDE_W
    w = first * STRIDE_W + w_lane
    in_cell = tl.arange(0, STRIDE_W)
    count_w = counted_elements(q * STRIDE_W - PAD_W, S, W, PAD_W, INCLUDE_PAD, False)
    y_cols, dense_cols = below(q, Q, Y_VEC), below(q, Q, DENSE_VEC)
    x_cols = below(w, W, X_VEC) & below(w_lane, span * STRIDE_W, X_VEC)
    if LEAD > 0:
        y_cols, dense_cols, x_cols = y_cols & (q >= 0), dense_cols & (q >= 0), x_cols & (w_lane >= 0)

    for a in tl.static_range(STRIDE_D * STRIDE_H):
        in_d = a // STRIDE_H
        in_h = a % STRIDE_H
        d, h = cell_d * STRIDE_D + in_d, cell_h * STRIDE_H + in_h
        mask_h = mask_row & (h < H)
        if RANK == 3:
            mask_h &= d < D
        acc = tl.zeros((BLOCK_R, BLOCK_V, STRIDE_W), dtype=tl.float32)
        found = tl.zeros((BLOCK_R, BLOCK_V, STRIDE_W), dtype=tl.int32)
        for i in tl.static_range(WINDOWS_D * WINDOWS_H):
            off_d = (in_d + PAD_D) % STRIDE_D + i // WINDOWS_H * STRIDE_D
            off_h = (in_h + PAD_H) % STRIDE_H + i % WINDOWS_H * STRIDE_H
            t, r = off_d // DIL_D, off_h // DIL_H
            if (off_d % DIL_D == 0) & (off_h % DIL_H == 0) & (t < T) & (r < R):
                z = cell_d + (in_d + PAD_D) // STRIDE_D - i // WINDOWS_H
                p = cell_h + (in_h + PAD_H) // STRIDE_H - i % WINDOWS_H
                in_row = mask_h & (p >= 0) & (p < P)
                if RANK == 3:
                    in_row &= (z >= 0) & (z < Z)
                y_row = n.to(tl.int64) * stride_yn + c.to(tl.int64) * stride_yc + z * stride_yz + p * stride_yp
                y_off = (y_row * Y_VEC)[:, None] + q[None, :]
                dy = tl.load(dy_ptr + y_off, mask=in_row[:, None] & y_cols[None, :], other=0.0)
                dy = dy.to(tl.float32)  # [BLOCK_R, BLOCK_V]
                dense = (((plane.to(tl.int64) * Z + z) * P + p) * (Q // DENSE_VEC) * DENSE_VEC)[:, None] + q[None, :]
                index = tl.zeros((BLOCK_R, BLOCK_V), dtype=tl.int32)
                if index_ptr is not None:
                    index = tl.load(index_ptr + dense, mask=in_row[:, None] & dense_cols[None, :], other=0)
                    if index_ptr.dtype.element_ty != tl.int64:
                        index = index.to(tl.int32)
                else:
                    count_h = counted_elements(p * STRIDE_H - PAD_H, R, H, PAD_H, INCLUDE_PAD, False)
                    if RANK == 3:
                        count_h = count_h * counted_elements(z * STRIDE_D - PAD_D, T, D, PAD_D, INCLUDE_PAD, False)
                    y = dy
                    if saved_y_ptr is not None:
                        y = tl.load(saved_y_ptr + dense, mask=in_row[:, None] & dense_cols[None, :], other=1.0)
                        y = y.to(tl.float32)  # [BLOCK_R, BLOCK_V]
                    divisor = mean_divisor(1, count_h[:, None], count_w[None, :], DIVISOR)
                    dy = _share(dy, y, divisor, REDUCE, T * R * S)
                for k in tl.static_range(DISTANCES):
                    off_w = in_cell + (PAD_W - (LAST - k) * STRIDE_W)
                    s = off_w // DIL_W
                    is_tap = (off_w >= 0) & (off_w % DIL_W == 0) & (s < S)
                    moved, column = q + (LAST - k), tl.arange(0, BLOCK_V) + (LAST - k)
                    in_band = (moved >= 0) & (moved < Q) & (column >= 0) & (column < BLOCK_V)
                    covers = (in_row[:, None] & in_band[None, :])[:, :, None] & is_tap[None, None, :]
                    given = tl.expand_dims(shifted_columns(dy, LAST - k), 2)
                    if index_ptr is not None:
                        if index_ptr.dtype.element_ty == tl.int64:
                            row_index = ((d.to(tl.int64) * H + h) * W)[:, None, None]
                            own_index = row_index + (q[:, None] * STRIDE_W + in_cell[None, :])[None, :, :]
                        else:
                            own_index = ((t * R + r) * S + s)[None, None, :]
                        covers &= tl.expand_dims(shifted_columns(index, LAST - k), 2) == own_index
                    acc, found = _collected(acc, found, given, covers, REDUCE)
        dx = tl.reshape(acc, (BLOCK_R, BLOCK_W))
        if saved_x_ptr is not None:
            saved_x_row = n.to(tl.int64) * stride_saved_xn + c.to(tl.int64) * stride_saved_xc + d * stride_saved_xd
            saved_x_row += h * stride_saved_xh
            mask = mask_h[:, None] & ((w >= 0) & below(w, W, SAVED_X_VEC))[None, :]
            saved_x_ptrs = saved_x_ptr + (saved_x_row * SAVED_X_VEC)[:, None] + w[None, :]
            x = tl.load(saved_x_ptrs, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_W]
            dx *= 2.0 * x.to(tl.float32)
        x_row = ((plane.to(tl.int64) * D + d) * H + h) * (W // X_VEC) * X_VEC
        mask = mask_h[:, None] & x_cols[None, :]
        tl.store(dx_ptr + x_row[:, None] + w[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
