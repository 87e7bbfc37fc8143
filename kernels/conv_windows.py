"""Where the taps of a convolution's window lie: device code that all kernels of convolution share.

The lists name the run-time arguments of the kernels that may not compile anything anew: sizes, and the strides of x, of
y or its gradient, of what the gradient of an activation reads, and of g, the transpose's operand.

Strides of a channels-last tensor come in units of its VEC elements (the widest load that all of them allow), and the
kernel multiplies by the constant VEC: so the compiler sees that every row starts on a multiple of VEC and keeps 16-byte
loads although strides are run-time values. A hint (``tl.multiple_of``) does the same until some folding drops it.
Results are dense, addressed by the flat index of a pixel, in NCHW by runs of RUN pixels, and stored as wide.
"""

import triton
import triton.language as tl

SIZES = ["M", "N", "D", "H", "W", "Z", "P", "Q", "splits"]
X_STRIDES = ["stride_xn", "stride_xc", "stride_xd", "stride_xh", "stride_xw"]
Y_STRIDES = ["stride_yn", "stride_yk", "stride_yz", "stride_yp", "stride_yq"]
SAVED_STRIDES = ["stride_saved_n", "stride_saved_k", "stride_saved_z", "stride_saved_p", "stride_saved_q"]
G_STRIDES = ["stride_gn", "stride_gz", "stride_gp", "stride_gq"]


@triton.jit
def tap_shift(
    tap, R: tl.constexpr, S: tl.constexpr, DIL_D: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """How far window tap ``tap`` lies from the window's corner, in depth, rows and columns."""
    if RANK == 3:
        return tap // (R * S) * DIL_D, tap // S % R * DIL_H, tap % S * DIL_W
    else:
        return tap * 0, tap // S * DIL_H, tap % S * DIL_W


@triton.jit
def inside_image(mask, d, h, w, D, H, W, PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr):
    """``mask`` where (d, h, w) lies in the image. Only padding lets a window look outside."""
    if PAD_D > 0:
        mask &= (d >= 0) & (d < D)
    if PAD_H > 0:
        mask &= (h >= 0) & (h < H)
    if PAD_W > 0:
        mask &= (w >= 0) & (w < W)
    return mask
