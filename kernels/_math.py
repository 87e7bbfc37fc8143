"""Device functions that several kernel families share."""

import triton
import triton.language as tl

# The interpreter multiplies the raw bits of bf16 operands; there ``dot`` widens them first.
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
    """fp32 rounded to nearest even. The interpreter would cut bf16 off, so there the round-up is added to the bits."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def only_if(mask, condition):
    """A mask where a scalar condition holds. Triton 3.9's interpreter makes no mask of a tile and a boolean scalar."""
    if INTERPRETED:
        return mask & (tl.zeros_like(mask).to(tl.int32) + tl.where(condition, 1, 0) > 0)
    else:
        return mask & condition


@triton.jit
def column_sum(x):
    """Sum over rows in fp32. A GPU adds in a tree, the interpreter one by one: there fp64 keeps the tree's accuracy."""
    if INTERPRETED:
        return tl.sum(x.to(tl.float64), axis=0).to(tl.float32)
    else:
        return tl.sum(x, axis=0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in fp32, within two ulp: a polynomial, fitted to the relative error, where the other form
    cancels. The derivative 1 - y*y magnifies what is lost near y = 1."""
    t = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * t / (1.0 + t)
    a = tl.minimum(tl.abs(x), 0.6)
    x2 = a * a
    tail = (((-0.0058939453 * x2 + 0.0207946177) * x2 - 0.053783293) * x2 + 0.133319153) * x2 - 0.333332975
    return tl.where(tl.abs(x) < 0.6, x + x * x2 * tail, tl.where(x < 0, -large, large))


@triton.jit
def sigmoid(x):
    """Logistic function in fp32; 0 and 1 at the ends, never NaN but for NaN."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation functions of ``torch.nn.functional`` in fp32; NaN in, NaN out."""
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
    return tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))


@triton.jit
def activation_backward(grad, saved, ACTIVATION: tl.constexpr):
    """Gradient at the input of the activation, from that at its output and what forward saved: the output where that
    is enough, else the input.

    Where the activation is flat the gradient is left out, whatever it is: 0 times infinity would be NaN. There, at NaN
    and where the derivative jumps, the value is that of torch 2.13's vectorised kernels on the CPU.
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
    """Tile coordinates in an order that walks GROUP_M rows of tiles column by column, so operands stay in L2."""
    span = GROUP_M * tiles_n
    first = pid // span * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % span % rows, pid % span // rows


@triton.jit
def position(index, Z, P, Q, RANK: tl.constexpr):
    """Splits a flat index into image, depth, row and column of a [N, Z, P, Q] grid. Below rank 3 depth is 0, and the
    compiler knows it."""
    plane = index // (P * Q)
    rest = index % (P * Q)
    if RANK == 3:
        return plane // Z, plane % Z, rest // Q, rest % Q
    else:
        return plane, tl.zeros_like(plane), rest // Q, rest % Q


@triton.jit
def below(index, size, RUN: tl.constexpr):
    """``index < size``, where RUN divides ``size``: the compiler sees that runs of RUN are below it together or not."""
    return index // RUN < size // RUN


@triton.jit
def dense_offsets(pixel, c, image, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr):
    """Offsets [pixel, c] in a dense tensor [N, CHANNELS, *space], whose images have ``image`` pixels. Where those are
    neighbours in memory, RUN divides ``image``, and the compiler sees aligned runs of RUN."""
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
    """Offsets [index, c] in a [N, C, Z, P, Q] tensor, ``index`` flat over all but C. Strides count units of VEC
    elements, which are neighbouring channels with UNIT_C, else neighbours in a row: the compiler sees aligned runs."""
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
    """Offsets [positions (n, z, p, q), channels c] in a [N, C, Z, P, Q] tensor. With UNIT_C neighbouring channels are
    neighbours in memory and strides count units of VEC elements, so the compiler sees aligned runs of channels."""
    row = n.to(tl.int64) * stride_n + z.to(tl.int64) * stride_z + p.to(tl.int64) * stride_p + q.to(tl.int64) * stride_q
    row = row * VEC
    if UNIT_C:
        return row[:, None] + c[None, :]
    else:
        return row[:, None] + (c.to(tl.int64) * stride_c)[None, :]
