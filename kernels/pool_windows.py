r"""Where the windows of a pooling lie, and what their sums are made of: device code that all kernels of pooling share.

Output (z, p, q) reads x[n, c, d0 + t*DIL_D, h0 + r*DIL_H, w0 + s*DIL_W] for the taps t, r, s of its window, where

    fixed window      h0 = p*STRIDE_H - PAD_H                     r < R        (depth and columns alike)
    adaptive window   h0 = floor(p*H / P)                         r < ceil((p+1)*H / P) - h0

Taps outside the image do not take part. Those are torch's rules.

The lists below name the run-time arguments of the kernels that may not compile anything anew: sizes, and the strides of
x and y (or of their gradients, which have those shapes), of the index that names the winners, and of the saved x and y
that the gradient of a norm reads.
"""

import triton
import triton.language as tl

SIZES = [
    "M", "D", "H", "W", "Z", "P", "Q", "largest_d", "largest_h", "largest_w", "most_d", "most_h", "most_w", "span",
]  # fmt: skip
X_STRIDES = ["stride_xn", "stride_xc", "stride_xd", "stride_xh", "stride_xw"]
Y_STRIDES = ["stride_yn", "stride_yc", "stride_yz", "stride_yp", "stride_yq"]
INDEX_STRIDES = ["stride_index_n", "stride_index_c", "stride_index_z", "stride_index_p", "stride_index_q"]
SAVED_X_STRIDES = ["stride_saved_xn", "stride_saved_xc", "stride_saved_xd", "stride_saved_xh", "stride_saved_xw"]
SAVED_Y_STRIDES = ["stride_saved_yn", "stride_saved_yc", "stride_saved_yz", "stride_saved_yp", "stride_saved_yq"]
STRIDES = [*X_STRIDES, *Y_STRIDES, *INDEX_STRIDES, *SAVED_X_STRIDES, *SAVED_Y_STRIDES]


# --- windows along one dimension -------------------------------------------------------------------------------------


@triton.jit
def window_of(out, size, outs, STRIDE: tl.constexpr, PAD: tl.constexpr, TAPS: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The window of output ``out``: where it begins, and how many taps it has."""
    if ADAPTIVE:
        first = out * size // outs
        return first, ((out + 1) * size + outs - 1) // outs - first
    else:
        return out * STRIDE - PAD, TAPS


@triton.jit
def tap_place(first, taps, tap, size, DIL: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The place of a tap of the window that begins at ``first``, and whether the tap takes part."""
    if ADAPTIVE:
        return first + tap, tap < taps
    else:
        place = first + tap * DIL
        return place, (place >= 0) & (place < size)


@triton.jit
def counted_elements(first, taps, size, PAD: tl.constexpr, INCLUDE_PAD: tl.constexpr, ADAPTIVE: tl.constexpr):
    """How many elements of a window a mean counts. No window reaches beyond the padding, as ``ceil_mode`` lets it."""
    if ADAPTIVE:
        return taps
    elif INCLUDE_PAD:
        return tl.minimum(first + taps, size + PAD) - first
    else:
        return tl.minimum(first + taps, size) - tl.maximum(first, 0)


@triton.jit
def last_window(place, size, outs, STRIDE: tl.constexpr, PAD: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The last window that begins at or before a place; it may lie behind the last output."""
    if ADAPTIVE:
        return ((place + 1) * outs + size - 1) // size - 1
    else:
        return (place + PAD) // STRIDE


@triton.jit
def tap_at(
    out, place, size, outs,
    STRIDE: tl.constexpr, PAD: tl.constexpr, TAPS: tl.constexpr, DIL: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """The tap of a window that lies at a place, and whether there is one; ``out`` is at most :func:`last_window`."""
    if ADAPTIVE:
        return place - out * size // outs, out >= place * outs // size
    else:
        offset = place + PAD - out * STRIDE
        tap = offset // DIL
        return tap, (out >= 0) & (out < outs) & (offset % DIL == 0) & (tap < TAPS)


# --- sums over windows -----------------------------------------------------------------------------------------------


@triton.jit
def summand(x, REDUCE: tl.constexpr):
    """What the sum over a window adds for an element x."""
    if REDUCE == "norm2":
        return x * x
    else:
        return x


@triton.jit
def mean_divisor(count_d, count_h, count_w, DIVISOR: tl.constexpr):
    """What a mean divides the sum of a window by: DIVISOR, or where that is 0 the number of elements that count."""
    if DIVISOR != 0:
        return tl.zeros_like(count_h + count_w).to(tl.float32) + DIVISOR
    else:
        # Windows behind the last output may count nothing.
        return tl.maximum(count_d * count_h * count_w, 1).to(tl.float32)


# --- columns of a tile -----------------------------------------------------------------------------------------------


@triton.jit
def shifted_columns(x, SHIFT: tl.constexpr):
    """x [rows, columns] with column m + SHIFT in place of column m; at the ends the last columns repeat."""
    if SHIFT == 0:
        return x
    else:
        columns = tl.arange(0, x.shape[1]) + SHIFT
        at = tl.minimum(tl.maximum(columns, 0), x.shape[1] - 1)
        return tl.gather(x, tl.broadcast_to(at[None, :], x.shape), 1)
