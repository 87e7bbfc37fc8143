"""Device functions that several kernel families share: arithmetic in fp32, activations, and offsets into tensors."""

import triton
import triton.language as tl

# Triton's interpreter multiplies the raw bits of bf16 operands, so ``dot`` converts them to fp32 first there.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` with fp32 accumulation. PRECISION ("ieee", "tf32", "tf32x3") matters for fp32 operands only."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x, in fp32, rounded to DTYPE, to nearest even. The interpreter truncates to bf16, so there the bits are rounded
    first."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def only_if(mask, condition):
    """The mask where a scalar condition holds, else a mask of False. Triton 3.9's interpreter fails on ``&`` of a tile
    and a boolean scalar, so there the condition is made a tile first."""
    if INTERPRETED:
        return mask & (tl.zeros_like(mask).to(tl.int32) + tl.where(condition, 1, 0) > 0)
    else:
        return mask & condition


@triton.jit
def column_sum(x):
    """The sum over the rows of each column, in fp32. A GPU adds pairs of rows, pairs of pairs and so on. The
    interpreter adds one row after the other, whose rounding error is larger, so there the sum is in fp64."""
    if INTERPRETED:
        return tl.sum(x.to(tl.float64), axis=0).to(tl.float32)
    else:
        return tl.sum(x, axis=0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in fp32, within two units in the last place (ulp). Below 0.6 it is a polynomial, fitted to the
    relative error, because 1 - 2t / (1 + t) cancels there. It is this accurate because the derivative 1 - y*y magnifies
    an error of y near y = 1."""
    t = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * t / (1.0 + t)
    a = tl.minimum(tl.abs(x), 0.6)
    x2 = a * a
    tail = (((-0.0058939453 * x2 + 0.0207946177) * x2 - 0.053783293) * x2 + 0.133319153) * x2 - 0.333332975
    return tl.where(tl.abs(x) < 0.6, x + x * x2 * tail, tl.where(x < 0, -large, large))


@triton.jit
def sigmoid(x):
    """Logistic function in fp32: 0 at -inf, 1 at inf, NaN only where x is NaN."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The function of ``torch.nn.functional`` that ACTIVATION names, in fp32; it is NaN where z is NaN."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "relu6":
        return tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0.0, z, z * 0.01)
    elif ACTIVATION == "sigmoid":
        return sigmoid(z)
    elif ACTIVATION == "tanh":
        return tanh(z)
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1.0 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "hardsigmoid":
        return _clip6(z + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == "hardswish":
        return z * _clip6(z + 3.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACTIVATION == "none")
        return z


@triton.jit
def _clip6(x):
    """x limited to 0 ... 6; NaN stays NaN."""
    return tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))


@triton.jit
def activation_backward(grad, saved, ACTIVATION: tl.constexpr):
    """The gradient at the input of the activation. ``grad`` is the gradient at its output; ``saved`` is what forward
    kept: the output of the activation where its derivative follows from that, else the input.

    Where the activation is flat the result is 0 by selection, because an infinite gradient times 0 would be NaN. There,
    at NaN and where the derivative jumps, the value is that of torch 2.13's vectorised kernels on the CPU.
    """
    if ACTIVATION == "relu":
        return tl.where(saved <= 0.0, 0.0, grad)
    elif ACTIVATION == "relu6":
        return tl.where((saved > 0.0) & (saved < 6.0), grad, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(saved > 0.0, grad, grad * 0.01)
    elif ACTIVATION == "sigmoid":
        return grad * (saved * (1.0 - saved))
    elif ACTIVATION == "tanh":
        return grad * (1.0 - saved * saved)
    elif ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-saved))
        return grad * (sigmoid * (1.0 + saved * (1.0 - sigmoid)))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        return grad * (cdf + saved * 0.3989422804014327 * tl.exp(-0.5 * saved * saved))
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (saved + 0.044715 * saved * saved * saved))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * saved * saved)
        return grad * (0.5 * (1.0 + t) + 0.5 * saved * (1.0 - t * t) * inner)
    elif ACTIVATION == "hardsigmoid":
        return tl.where((saved > -3.0) & (saved < 3.0), grad * (1.0 / 6.0), 0.0)
    else:
        tl.static_assert(ACTIVATION == "hardswish")
        inner = tl.where(saved >= 3.0, grad, grad * (saved * (1.0 / 3.0) + 0.5))
        return tl.where(saved <= -3.0, 0.0, inner)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The row and the column of tile number ``pid``. Numbers go down the columns of GROUP_M rows of tiles before they
    go on to the next GROUP_M rows, so that programs that run at the same time load the same operands, which the L2
    cache holds."""
    span = GROUP_M * tiles_n
    first = pid // span * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % span % rows, pid % span // rows


@triton.jit
def position(index, Z, P, Q, RANK: tl.constexpr):
    """The image, depth, row and column of a flat index into [N, Z, P, Q]. Below rank 3 the depth is the constant 0, so
    the compiler drops what is computed from it."""
    plane = index // (P * Q)
    rest = index % (P * Q)
    if RANK == 3:
        return plane // Z, plane % Z, rest // Q, rest % Q
    else:
        return plane, tl.zeros_like(plane), rest // Q, rest % Q


@triton.jit
def below(index, size, RUN: tl.constexpr):
    """The mask ``index < size``. RUN divides ``size``, and the form of the comparison shows the compiler that all
    elements of an aligned run of RUN get the same answer, so one wide load or store may serve the run."""
    return index // RUN < size // RUN


@triton.jit
def dense_offsets(pixel, c, image, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr):
    """The offsets [pixel, c], in elements, into a dense tensor [N, CHANNELS, *space] of images of ``image`` pixels. In
    NCHW, where neighbouring pixels are neighbours in memory, RUN divides ``image``, and the division shows the compiler
    aligned runs of RUN pixels, which it stores at once."""
    if CHANNELS_LAST:
        return (pixel.to(tl.int64) * CHANNELS)[:, None] + c[None, :]
    else:
        runs = image // RUN
        run = pixel // RUN
        row = (run // runs).to(tl.int64) * CHANNELS * runs + run % runs
        return (row * RUN + pixel % RUN)[:, None] + (c.to(tl.int64) * runs * RUN)[None, :]


@triton.jit
def pixel_offsets(
    index, c, Z, P, Q, stride_n, stride_c, stride_z, stride_p, stride_q, VEC: tl.constexpr, UNIT_C: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """The offsets [index, c], in elements, into a [N, C, Z, P, Q] tensor; ``index`` is flat over all dimensions but C.
    Strides count units of VEC elements, without UNIT_C all but ``stride_q``, so that the compiler sees aligned runs of
    VEC: of neighbouring channels with UNIT_C, else of neighbouring columns of a row."""
    if UNIT_C:
        n, z, p, q = position(index, Z, P, Q, RANK)
        return tile_offsets(n, z, p, q, c, stride_n, stride_c, stride_z, stride_p, stride_q, VEC, True)
    else:
        n, z, p, q = position(index // VEC, Z, P, Q // VEC, RANK)
        offsets = tile_offsets(n, z, p, q, c, stride_n, stride_c * VEC, stride_z, stride_p, stride_q, VEC, False)
        return offsets + (index % VEC)[:, None]


@triton.jit
def tile_offsets(
    n, z, p, q, c, stride_n, stride_c, stride_z, stride_p, stride_q, VEC: tl.constexpr, UNIT_C: tl.constexpr
):  # fmt: skip
    """The offsets [pixels (n, z, p, q), channels c], in elements, into a [N, C, Z, P, Q] tensor. All strides but
    ``stride_c`` count units of VEC elements. With UNIT_C neighbouring channels are neighbours in memory, so the
    compiler sees that each row of offsets is an aligned run of channels."""
    row = n.to(tl.int64) * stride_n + z.to(tl.int64) * stride_z + p.to(tl.int64) * stride_p + q.to(tl.int64) * stride_q
    row = row * VEC
    if UNIT_C:
        return row[:, None] + c[None, :]
    else:
        return row[:, None] + (c.to(tl.int64) * stride_c)[None, :]
