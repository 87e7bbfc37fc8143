r"""Where the taps of a convolution's window lie: device code that all kernels of convolution share.

At the taps t, r, s of its window output (z, p, q) reads

    x[n, c, z*STRIDE_D - PAD_D + t*DIL_D, p*STRIDE_H - PAD_H + r*DIL_H, q*STRIDE_W - PAD_W + s*DIL_W]

and what lies outside the image counts as 0.

The lists below name the run-time arguments whose values must not compile a kernel anew: sizes, and the strides of x,
of y or its gradient, of the saved input of the activation, and of g, the operand of the transpose.

A kernel takes the strides of a channels-last tensor in units of VEC elements, where VEC elements are the widest load
that all of the strides allow, and multiplies them by the constant VEC. So the compiler sees that every row starts on a
multiple of VEC and keeps 16-byte loads, although strides are run-time values. The hint ``tl.multiple_of`` says the
same, but passes of the compiler drop it. Results are dense, and kernels address them by the flat index of a pixel; in
NCHW they store aligned runs of RUN pixels at once.
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
    """How far tap number ``tap`` lies from the first tap of its window, in depth, rows and columns of x."""
    if RANK == 3:
        return tap // (R * S) * DIL_D, tap // S % R * DIL_H, tap % S * DIL_W
    else:
        return tap * 0, tap // S * DIL_H, tap % S * DIL_W


@triton.jit
def inside_image(mask, d, h, w, D, H, W, PAD_D: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr):
    """``mask`` where (d, h, w) lies in the image. Along a dimension without padding no tap lies outside, so nothing is
    compared there."""
    if PAD_D > 0:
        mask &= (d >= 0) & (d < D)
    if PAD_H > 0:
        mask &= (h >= 0) & (h < H)
    if PAD_W > 0:
        mask &= (w >= 0) & (w < W)
    return mask
