"""Convolution and its epilogue in torch's operators: the fallback of the kernels, and their yardstick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, hardsigmoid, hardswish, leaky_relu, relu6, silu

from ._checks import PRECISIONS, _is_static
from .conv_checks import ConvArgs

_TORCH: dict[bool, tuple[Any, ...]] = {
    False: (torch.conv1d, torch.conv2d, torch.conv3d),
    True: (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}


def by_torch(
    transposed: bool, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...],
    activation: str | None, residual: Tensor | None, scale: Tensor | None, precision: str | None, recorded: bool,
) -> Tensor | None:  # fmt: skip
    """torch's convolution with the epilogue; ``None`` for an empty result, and where torch accepts what our validator
    rejects. Where sizes are ``recorded`` nothing is asked of them."""
    if bias is not None and bias.dtype is not weight.dtype:
        return None
    y: Tensor = _TORCH[transposed][rank - 1](input, weight, bias if scale is None else None, *geometry)
    if (not recorded and y.numel() == 0) or (precision is not None and precision not in PRECISIONS):
        return None
    if scale is not None or residual is not None:
        if not _fits_epilogue(y, rank, residual, scale, recorded):
            return None
        y = epilogue(y, scale, None if scale is None else bias, residual, rank)
    if activation is None:
        return y
    functions = _ACTIVATIONS.get(activation)
    if functions is None:
        return None
    fresh, in_place = functions
    return (fresh if recorded or y.requires_grad else in_place)(y)


def _fits_epilogue(y: Tensor, rank: int, residual: Tensor | None, scale: Tensor | None, recorded: bool) -> bool:
    """Have residual and scale just the dtype, device and shape that the epilogue of a result ``y`` asks for?"""
    return all(
        t is None
        or (t.dim() == len(shape) and _is_shape(t, shape, recorded) and t.dtype is y.dtype and t.device == y.device)
        for t, shape in ((residual, y.shape), (scale, y.shape[-rank - 1 : -rank]))
    )


def _is_shape(t: Tensor, shape: Sequence[int], recorded: bool) -> bool:
    """Where sizes are ``recorded`` only numbers are compared, no symbols."""
    if not recorded:
        return t.shape == shape
    pairs = zip(t.shape, shape, strict=True)
    return all(not (_is_static(have) and _is_static(size)) or have == size for have, size in pairs)


def composite(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    args: ConvArgs, transposed: bool, activation: str,
) -> Tensor:  # fmt: skip
    """The convolution with its epilogue, of a call that our validator has accepted."""
    rank = len(args.stride)
    function, fused_bias = _TORCH[transposed][rank - 1], bias if scale is None else None
    if transposed:
        z = function(
            input, weight, fused_bias, args.stride, args.padding, args.output_padding, args.groups, args.dilation
        )  # fmt: skip
    else:
        padding = args.padding if args.mode is None else args.mode
        z = function(input, weight, fused_bias, args.stride, padding, args.dilation, args.groups)
    # Without input channels torch's result has no channels.
    if (scale is not None or residual is not None) and weight.shape[1]:
        z = epilogue(z, scale, None if scale is None else bias, residual, rank)
    return activate(z, activation)


def torch_convolution(
    transposed: bool, input: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """The convolution, or its transpose, with a result of just that size."""
    extra = [0] * len(size)
    if transposed:
        inverse = _image_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
        extra = [wanted - least for wanted, least in zip(size, inverse, strict=True)]
    z = torch.ops.aten.convolution(
        input, weight, None, stride, padding, dilation, transposed, extra, groups
    )  # fmt: skip
    # Where a transposed convolution padded its output, its gradient looks past the last window.
    for dim, wanted in enumerate(size, 2):
        z = z.narrow(dim, 0, wanted)
    return z


def torch_weight_grad(
    input: Tensor, g: Tensor, shape: Sequence[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """The gradient of a convolution's weight of that shape."""
    # The same sums are the weight gradient of a transposed convolution from g to input. torch takes that view only
    # where the image goes on after the last window by a stride or more, as after a padded output.
    least = _image_size(g.shape[2:], shape[2:], stride, padding, dilation)
    extra = [size - smallest for size, smallest in zip(input.shape[2:], least, strict=True)]
    transposed = any(more >= step for more, step in zip(extra, stride, strict=True))
    image, output = (g, input) if transposed else (input, g)
    like = g.new_empty(1).expand(shape)
    grad: Tensor = torch.ops.aten.convolution_backward(
        output, image, like, None, stride, padding, dilation, transposed,
        extra if transposed else [0] * len(extra), groups, [False, True, False],
    )[1]  # fmt: skip
    return grad


def _image_size(
    output: Sequence[int], window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The smallest image of which a convolution has that output."""
    return [
        (size - 1) * step - 2 * pad + dil * (taps - 1) + 1
        for size, taps, step, pad, dil in zip(output, window, stride, padding, dilation, strict=True)
    ]


# --- epilogue --------------------------------------------------------------------------------------------------------


_TANH_GELU = partial(gelu, approximate="tanh")
# Each returns a new tensor; the second, where torch has one, writes over its argument, which has to be nobody else's.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, torch.relu_),
    "relu6": (relu6, partial(relu6, inplace=True)),
    "leaky_relu": (leaky_relu, partial(leaky_relu, inplace=True)),
    "silu": (silu, partial(silu, inplace=True)),
    "gelu": (gelu, gelu),
    "gelu_tanh": (_TANH_GELU, _TANH_GELU),
    "hardswish": (hardswish, partial(hardswish, inplace=True)),
    "hardsigmoid": (hardsigmoid, partial(hardsigmoid, inplace=True)),
    "sigmoid": (torch.sigmoid, torch.sigmoid_),
    "tanh": (torch.tanh, torch.tanh_),
}


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation by torch's own operators."""
    return z if activation == "none" else _ACTIVATIONS[activation][0](z)


def epilogue(z: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, rank: int) -> Tensor:
    """What follows the convolution in ``rank`` dimensions of space, before the activation."""
    if scale is not None:
        z = z * per_channel(scale, rank)
    if bias is not None:
        z = z + per_channel(bias, rank)
    return z if residual is None else z + residual


def per_channel(t: Tensor, rank: int) -> Tensor:
    """[K] as [K, 1, ...], to meet [N, K, *space]."""
    return t.view(-1, *(1 for _ in range(rank)))


def all_but_channels(t: Tensor) -> list[int]:
    return [0, *range(2, t.dim())]


def differentiable_epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, *_: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients at the input of the activation, and of the bias (without elements where it is not needed)."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    g = dy.to(wide)
    if saved is not None:
        g = _activation_backward(g, saved.to(wide), activation)
    bias_grad = g.sum(all_but_channels(g)).to(dy.dtype) if need_bias else dy.new_empty(0)
    return g.to(dy.dtype), bias_grad


def differentiable_bias_grad(g: Tensor, *_: Any) -> Tensor:
    return g.sum(all_but_channels(g))


# Activations whose derivative needs their input; for the others the output is enough, and nothing more is saved.
SAVES_INPUT = ("silu", "gelu", "gelu_tanh", "hardsigmoid", "hardswish")


def _activation_backward(grad: Tensor, saved: Tensor, activation: str) -> Tensor:
    """Gradient at the input of the activation from its output, or from its input for SAVES_INPUT; differentiable
    itself. As the kernels' function of the same name: where the activation is flat the gradient is left out."""
    if activation == "relu":
        return torch.where(saved <= 0, 0.0, grad)
    if activation == "relu6":
        return torch.where((saved > 0) & (saved < 6), grad, 0.0)
    if activation == "leaky_relu":
        return torch.where(saved > 0, grad, grad * 0.01)
    if activation == "sigmoid":
        return grad * (saved * (1 - saved))
    if activation == "tanh":
        return grad * (1 - saved * saved)
    if activation == "silu":
        sigmoid = torch.sigmoid(saved)
        return grad * (sigmoid * (1 + saved * (1 - sigmoid)))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(saved * 0.7071067811865476))
        return grad * (cdf + saved * 0.3989422804014327 * torch.exp(-0.5 * saved * saved))
    if activation == "gelu_tanh":
        t = torch.tanh(0.7978845608028654 * (saved + 0.044715 * saved**3))
        inner = 0.7978845608028654 * (1 + 0.134145 * saved * saved)
        return grad * (0.5 * (1 + t) + 0.5 * saved * (1 - t * t) * inner)
    if activation == "hardsigmoid":
        return torch.where((saved > -3) & (saved < 3), grad / 6, 0.0)
    inner = torch.where(saved >= 3, grad, grad * (saved / 3 + 0.5))
    return torch.where(saved <= -3, 0.0, inner)  # hardswish
