"""Convolution and transposed convolution with a fused epilogue: functions, operators, autograd, torch implementation.

Three operators close under differentiation, in any number of dimensions, so every derivative of any order is made of
them: the convolution ``y = conv(x, w)``, its transpose ``x = conv_transpose(y, w)`` and the weight gradient
``w = conv_weight_grad(x, y)``. Each is linear in both arguments, and its gradients are the other two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, hardsigmoid, hardswish, leaky_relu, pad, relu6, silu
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from ._checks import PRECISIONS
from ._dispatch import (
    Verdict,
    are_plain,
    choose,
    conv_setting,
    is_empty,
    is_jit_tracing,
    measured,
    operator_precision,
    rejections,
    resolved_precision,
    runs_kernels,
    torch_validates,
)
from ._layout import autocast, empty, has_unit_channels, is_channels_last, laid_out
from ._register import below_autograd, register
from .conv_checks import ConvArgs, check_conv, check_conv_transpose

# Activations whose derivative needs their input; for the others the output is enough, and nothing more is saved.
SAVES_INPUT = ("silu", "gelu", "gelu_tanh", "hardsigmoid", "hardswish")
# What the direct kernels take: channels of a group, filters of a group, and steps between windows, rows times columns.
DIRECT_CHANNELS = (1, 2, 4, 8)
DIRECT_BLOCK, DIRECT_PRODUCTS = 16, 256
Size = int | Sequence[int]


def conv1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0,
    dilation: Size = 1, groups: int = 1, *, activation: str | None = None, residual: Tensor | None = None,
    scale: Tensor | None = None, precision: str | None = None,
) -> Tensor:  # fmt: skip
    """1-d convolution: :func:`conv2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.conv1d`. ``input`` is ``[N, C, L]`` or ``[C, L]``, ``weight``
    ``[K, C / groups, S]``; the result is ``[N, K, Q]`` or ``[K, Q]``, and as in torch its channels are neighbours in
    memory where those of ``weight`` are. An ``input`` of either layout is read in place.

    Example::

        >>> x, w = torch.randn(2, 64, 100), torch.randn(64, 1, 4)
        >>> tritune.conv1d(x, w, padding=3, groups=64, activation="silu")[..., :100].shape  # causal
        torch.Size([2, 64, 100])
    """
    return _convolve(
        conv1d, False, 1, input, weight, bias, (stride, padding, dilation, groups), activation, residual, scale,
        precision,
    )  # fmt: skip


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0,
    dilation: Size = 1, groups: int = 1, *, activation: str | None = None, residual: Tensor | None = None,
    scale: Tensor | None = None, precision: str | None = None,
) -> Tensor:  # fmt: skip
    r"""2-d convolution with scale, bias, residual and activation applied before the result is stored.

    .. math:: y_{nkpq} = \mathrm{act}\Bigl(\mathrm{scale}_k \sum_{c,r,s} x_{n,c,p\,stride + r\,dilation - padding,
              q\,stride + s\,dilation - padding}\; w_{kcrs} + \mathrm{bias}_k + \mathrm{residual}_{nkpq}\Bigr)

    A drop-in for :func:`torch.nn.functional.conv2d`; the keyword-only arguments are ours. Sums are in fp32 and rounded
    once, after the activation.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; contiguous and channels last are read in place.
        weight: ``[K, C / groups, R, S]``.
        bias: ``[K]``.
        stride, padding, dilation, groups: as in torch; ``padding`` may be ``"same"`` or ``"valid"``.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"``,
            ``"hardswish"``, ``"hardsigmoid"``, ``"sigmoid"`` or ``"tanh"``.
        residual: shape and dtype of the output; added before the activation.
        scale: ``[K]``; with ``bias`` it carries a folded batch normalisation, see :func:`fold_bn`.
        precision: how fp32 operands are multiplied: ``"ieee"``, ``"tf32"`` or ``"tf32x3"`` (three tf32 products).
            Default: torch's setting for cuDNN convolutions. No effect on other dtypes.

    Returns:
        ``[N, K, P, Q]`` in the dtype of ``input``; channels last if ``input`` or ``weight`` is.

    Raises:
        RuntimeError, TypeError, ValueError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Memory: beside the result and the gradients, in channels last nothing; backward through an activation one tensor
    like the output. Where channels are not neighbours in memory a call re-lays ``weight``, and, but for depthwise and
    narrow groups, ``input`` or the output's gradient; an image of up to 3 channels is re-laid with 4, of 5 to 7 with 8.
    Where a result is too small to fill the GPU, sums are split over programs, and their fp32 parts take no more than
    ``input`` and ``weight`` together (or 1 MiB).

    Example::

        >>> x, w = torch.randn(8, 16, 32, 32), torch.randn(64, 16, 3, 3)
        >>> tritune.conv2d(x, w, padding=1, activation="relu").shape
        torch.Size([8, 64, 32, 32])
    """
    return _convolve(
        conv2d, False, 2, input, weight, bias, (stride, padding, dilation, groups), activation, residual, scale,
        precision,
    )  # fmt: skip


def conv3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0,
    dilation: Size = 1, groups: int = 1, *, activation: str | None = None, residual: Tensor | None = None,
    scale: Tensor | None = None, precision: str | None = None,
) -> Tensor:  # fmt: skip
    """3-d convolution: :func:`conv2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.conv3d`. ``input`` is ``[N, C, D, H, W]`` or ``[C, D, H, W]``, ``weight``
    ``[K, C / groups, T, R, S]``; the result ``[N, K, Z, P, Q]`` is ``channels_last_3d`` if ``input`` or ``weight`` is.

    Example::

        >>> x, w = torch.randn(1, 8, 5, 16, 16), torch.randn(16, 8, 3, 3, 3)
        >>> tritune.conv3d(x, w, padding="same").shape
        torch.Size([1, 16, 5, 16, 16])
    """
    return _convolve(
        conv3d, False, 3, input, weight, bias, (stride, padding, dilation, groups), activation, residual, scale,
        precision,
    )  # fmt: skip


def conv_transpose1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1, *, activation: str | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, precision: str | None = None,
) -> Tensor:  # fmt: skip
    """1-d transposed convolution: :func:`conv_transpose2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.conv_transpose1d`. ``input`` is ``[N, C, L]`` or ``[C, L]``, ``weight``
    ``[C, K / groups, S]``.

    Example::

        >>> tritune.conv_transpose1d(torch.randn(2, 8, 10), torch.randn(8, 4, 4), stride=2, padding=1).shape
        torch.Size([2, 4, 20])
    """
    return _convolve(
        conv_transpose1d, True, 1, input, weight, bias, (stride, padding, output_padding, groups, dilation),
        activation, residual, scale, precision,
    )  # fmt: skip


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1, *, activation: str | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, precision: str | None = None,
) -> Tensor:  # fmt: skip
    r"""2-d transposed convolution, the gradient of :func:`conv2d` with respect to its input, with the same epilogue.

    .. math:: y_{nkhw} = \mathrm{act}\Bigl(\mathrm{scale}_k \sum_{c,p,q,r,s} x_{ncpq}\, w_{ckrs}\,
              [h = p\,stride + r\,dilation - padding]\,[w = q\,stride + s\,dilation - padding]
              + \mathrm{bias}_k + \mathrm{residual}_{nkhw}\Bigr)

    A drop-in for :func:`torch.nn.functional.conv_transpose2d`. No zeros are inserted: each class of output pixels that
    a stride tells apart is a product with just the taps that reach it.

    Args:
        input: ``[N, C, P, Q]`` or ``[C, P, Q]``.
        weight: ``[C, K / groups, R, S]``.
        bias, scale: ``[K]``.
        stride, padding, output_padding, groups, dilation: as in torch.
        activation, residual, precision: as in :func:`conv2d`.

    Returns:
        ``[N, K, H, W]`` with ``H = (P - 1) stride - 2 padding + dilation (R - 1) + output_padding + 1``, in the dtype
        of ``input``; channels last if ``input`` or ``weight`` is.

    Raises, memory: as :func:`conv2d`.

    Example::

        >>> x, w = torch.randn(2, 16, 8, 8), torch.randn(16, 4, 2, 2)
        >>> tritune.conv_transpose2d(x, w, stride=2, activation="relu").shape
        torch.Size([2, 4, 16, 16])
    """
    return _convolve(
        conv_transpose2d, True, 2, input, weight, bias, (stride, padding, output_padding, groups, dilation),
        activation, residual, scale, precision,
    )  # fmt: skip


def conv_transpose3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1, *, activation: str | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, precision: str | None = None,
) -> Tensor:  # fmt: skip
    """3-d transposed convolution: :func:`conv_transpose2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.conv_transpose3d`. ``input`` is ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``,
    ``weight`` ``[C, K / groups, T, R, S]``.

    Example::

        >>> tritune.conv_transpose3d(torch.randn(1, 8, 2, 4, 4), torch.randn(8, 4, 2, 2, 2), stride=2).shape
        torch.Size([1, 4, 4, 8, 8])
    """
    return _convolve(
        conv_transpose3d, True, 3, input, weight, bias, (stride, padding, output_padding, groups, dilation),
        activation, residual, scale, precision,
    )  # fmt: skip


def _convolve(
    function: Callable[..., Tensor], transposed: bool, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None,
    geometry: tuple[Any, ...], activation: str | None, residual: Tensor | None, scale: Tensor | None,
    precision: str | None,
) -> Tensor:  # fmt: skip
    """Any of the six. ``geometry``: what follows bias in the signature of torch's function."""
    if has_torch_function_variadic(input, weight, bias, residual, scale):
        overridden: Tensor = handle_torch_function(
            function, (input, weight, bias, residual, scale), input, weight, bias, *geometry, activation=activation,
            residual=residual, scale=scale, precision=precision,
        )  # fmt: skip
        return overridden
    if (
        torch_validates(input) and (are_plain(geometry) or _pads_by_a_word(geometry))
        and (not transposed or are_plain(geometry[4:], 1))  # there torch takes a dilation of 0 for a window of one tap
    ):  # fmt: skip
        rejected = rejections()
        try:
            y = _by_torch(transposed, rank, input, weight, bias, geometry, activation, residual, scale, precision)
            if y is not None:
                return y
        except rejected:
            pass  # our validator has the words
    input, weight, bias, residual, scale = autocast(input, weight, bias, residual, scale)
    check = check_conv_transpose if transposed else check_conv
    args = check(
        rank, input, weight, bias, *geometry, activation=activation, residual=residual, scale=scale,
        precision=precision,
    )  # fmt: skip
    return _serve(transposed, args, (input, weight, bias, scale, residual), activation, precision)


def _pads_by_a_word(geometry: tuple[Any, ...]) -> bool:
    """Is the second of them, the padding, a word and are the others plain?"""
    return type(geometry[1]) is str and are_plain((geometry[0], *geometry[2:]))


def _by_torch(
    transposed: bool, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...],
    activation: str | None, residual: Tensor | None, scale: Tensor | None, precision: str | None,
) -> Tensor | None:  # fmt: skip
    """torch's convolution with the epilogue; ``None`` for an empty result, and where torch accepts what our validator
    rejects."""
    if bias is not None and bias.dtype is not weight.dtype:
        return None
    y: Tensor = _TORCH[transposed][rank - 1](input, weight, bias if scale is None else None, *geometry)
    if is_empty(y) or (precision is not None and precision not in PRECISIONS):
        return None
    if scale is not None or residual is not None:
        if not _fits_epilogue(y, rank, residual, scale):
            return None
        y = _epilogue(y, scale, None if scale is None else bias, residual, rank)
    if activation is None:
        return y
    functions = _ACTIVATIONS.get(activation)
    if functions is None:
        return None
    return functions[not y.requires_grad and not is_jit_tracing()](y)


def _fits_epilogue(y: Tensor, rank: int, residual: Tensor | None, scale: Tensor | None) -> bool:
    """Have residual and scale just the dtype, device and shape that the epilogue of a result ``y`` asks for? In
    torch.jit.trace, which would make sizes constants by comparing them, the number of dimensions has to do."""
    channels, is_traced = y.shape[-rank - 1], is_jit_tracing()
    return all(
        t is None
        or (
            t.dim() == len(shape) and (is_traced or t.shape == shape) and t.dtype is y.dtype and t.device == y.device
        )
        for t, shape in ((residual, y.shape), (scale, (channels,)))
    )  # fmt: skip


def _serve(
    transposed: bool, args: ConvArgs, operands: tuple[Any, ...], activation: str | None, precision: str | None
) -> Tensor:
    """Chooses the backend of a legal call and runs it. ``operands``: input, weight, bias, scale, residual."""
    input, weight, bias, scale, residual = operands
    rank = len(args.stride)
    present = [t for t in operands if t is not None]

    def problem() -> Any:
        return _problem(_batched(input, rank), weight, args, transposed, precision)

    backend = choose(
        f"conv_transpose{rank}d" if transposed else f"conv{rank}d",
        present,
        lambda device: _auto_rule(problem(), device, transposed, (activation, scale, residual)),
        lambda device: _kernel_choices(
            problem(), device, (_batched(input, rank), *operands[1:]), activation, transposed
        ),
        lambda: _limits(_batched(input, rank), weight, args),
    )  # fmt: skip
    activation = activation or "none"
    if backend == "torch":
        return _composite(input, weight, bias, scale, residual, args, transposed, activation)

    batched = _batched(input, rank)
    if args.pad_extra is not None:
        batched = _pad(batched, args.pad_extra)
    if residual is not None and residual.dim() == rank + 1:
        residual = residual.unsqueeze(0)
    multiplied = operator_precision(input, precision, conv_setting)
    call = (
        batched, weight, bias, scale, residual, args.output_size, None, args.stride, args.padding, args.dilation,
        args.groups, activation, multiplied, "triton",
    )  # fmt: skip
    if torch.compiler.is_compiling():
        y = OPS[transposed](*call)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in present):
        y = _Convolution.apply(transposed, *call)[0]
    else:
        with below_autograd():
            y = OPS[transposed](*call)
    return y if input.dim() == rank + 2 else y.squeeze(0)


def _batched(input: Tensor, rank: int) -> Tensor:
    return input if input.dim() == rank + 2 else input.unsqueeze(0)


def _pad(input: Tensor, extra: tuple[int, ...]) -> Tensor:
    """Zeros around ``input``, whose layout stays: :func:`F.pad` alone loses it in one dimension of space."""
    if is_channels_last(input):
        return pad(input.movedim(1, -1), (0, 0, *extra)).movedim(-1, 1)
    return pad(input, extra)


# --- the choice of backend -------------------------------------------------------------------------------------------


def _limits(input: Tensor, weight: Tensor, args: ConvArgs) -> str | None:
    """What the kernels leave to torch beyond dtypes and devices."""
    if weight.numel() == 0:
        return "weight is empty"
    if torch.compiler.is_compiling():
        return None
    pixels = max(input.shape[0] * math.prod(space) for space in (input.shape[2:], args.output_size))
    if pixels >= 2**31 or weight.numel() >= 2**31:
        return "input or output has 2**31 pixels, or weight 2**31 elements, or more"
    return None


def _problem(input: Tensor, weight: Tensor, args: ConvArgs, transposed: bool, precision: str | None) -> Any:
    from ..kernels import conv

    geometry = conv.Geometry.of(args.stride, args.padding, args.dilation, args.groups)
    extra = args.pad_extra or (0,) * (2 * len(args.stride))
    n, c, *space = input.shape
    padded = [size + sum(extra[2 * i : 2 * i + 2]) for i, size in enumerate(reversed(space))][::-1]
    x_shape, output = (n, c, *padded), args.output_size
    if transposed:
        x_shape, output = (n, weight.shape[1] * args.groups, *args.output_size), tuple(space)
    resolved = resolved_precision(input, precision, conv_setting)
    channels_last = _result_is_channels_last(input, weight)
    return conv.problem_of(x_shape, weight.shape, output, geometry, input.dtype, resolved, channels_last)


def _result_is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """torch's rule. In one dimension it looks at the weights alone."""
    return is_channels_last(weight) or (input.dim() > 3 and is_channels_last(input))


def _weight_shape(problem: Any) -> tuple[int, ...]:
    return problem.K * problem.geometry.groups, problem.C, *problem.window


def _forward_choice(problem: Any, device: DeviceSpec, transposed: bool) -> tuple[str, Choice]:
    from ..kernels import conv

    module = module_of(_weight_shape(problem), problem.geometry.stride, problem.geometry.groups)
    tunable = module.TRANSPOSE if transposed else module.FORWARD
    return tunable.name, resolve(tunable, problem if transposed else conv.pad_problem(problem), device)


def _kernel_choices(
    problem: Any, device: DeviceSpec, tensors: tuple[Tensor | None, ...], activation: str | None, transposed: bool
) -> tuple[tuple[str, Choice], ...]:
    """The kernels of a call and of its backward, for an output gradient that is laid out as the output."""
    from ..kernels import conv

    forward = _forward_choice(problem, device, transposed)
    input, weight = tensors[:2]
    assert input is not None
    assert weight is not None
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if not any(needs):
        return (forward,)
    need_input, need_weight, need_bias = needs[:3]
    groups = problem.geometry.groups
    kind = (_weight_shape(problem), problem.geometry.stride, groups)
    module = module_of(*kind)
    channels, pixels = problem.K * groups, problem.pixels
    if transposed:
        channels, pixels = problem.C * groups, problem.image_pixels
    has_saved = activation not in (None, "none")
    unit_channels = problem.channels_last or channels == 1 or pixels == problem.N
    relays = not _is_direct(*kind) and not unit_channels and (need_input or need_weight)
    backward: list[tuple[Any, Any]] = []
    if has_saved or relays or need_bias:
        writes_g = has_saved or relays
        epilogue = conv.EpilogueProblem(pixels, channels, input.dtype, has_saved, writes_g, need_bias)
        backward.append((conv.EPILOGUE_GRAD, epilogue))
    if need_input:
        one = problem._replace(channels_last=is_channels_last(input))
        backward.append((module.FORWARD, conv.pad_problem(one)) if transposed else (module.TRANSPOSE, one))
    if need_weight:
        weight_grad = weight_grad_module_of(*kind)
        # The direct kernel reads x as it lies, and its weights have one layout; the other kernel writes both.
        decides = is_channels_last(weight) if weight_grad is conv else has_unit_channels(input)
        backward.append((weight_grad.WEIGHT_GRAD, conv.pad_problem(problem)._replace(channels_last=decides)))
    return forward, *((tunable.name, resolve(tunable, one, device)) for tunable, one in backward)


def _auto_rule(
    problem: Any, device: DeviceSpec, transposed: bool, steps: tuple[Any, Any, Any]
) -> Verdict:  # fmt: skip
    """Do the kernels win? By measurement if there is one; else only where fusion saves passes over memory.

    torch runs every unfused step (activation, scale, residual; ``None`` where the call has none) as a pass that reads
    and writes the output. Ours is taken when memory bounds the call even at 60 % of the tensor-core rate, and torch
    would move at least a quarter more bytes.
    """
    known = measured([_forward_choice(problem, device, transposed)])
    if known:
        return known
    passes = sum(step is not None for step in steps)
    ours = problem.minimal_bytes()
    pixels, channels = (problem.image_pixels, problem.C) if transposed else (problem.pixels, problem.K)
    output = pixels * channels * problem.geometry.groups * problem.itemsize
    theirs = ours + output * (2 * passes + (steps[2] is not None))
    memory_us = ours / (device.dram_gbs * 1e3)
    compute_us = problem.flops / (0.6 * device.tflops(problem.precision) * 1e6)
    if problem.channels_last and memory_us >= compute_us and theirs >= 1.25 * ours:
        return Verdict(True, f"not measured; fusing {passes} passes saves {1 - ours / theirs:.0%} of torch's bytes")
    return Verdict(False, "not measured, and counted traffic does not promise a win: `tritune tune` can")


# --- torch's implementation: fallback and yardstick ------------------------------------------------------------------

_TORCH: dict[bool, tuple[Any, ...]] = {
    False: (torch.conv1d, torch.conv2d, torch.conv3d),
    True: (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation by torch's own operators."""
    return z if activation == "none" else _ACTIVATIONS[activation][0](z)


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


def _per_channel(t: Tensor, rank: int) -> Tensor:
    """[K] as [K, 1, ...], to meet [N, K, *space]."""
    return t.view(-1, *(1 for _ in range(rank)))


def _epilogue(z: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, rank: int) -> Tensor:
    if scale is not None:
        z = z * _per_channel(scale, rank)
    if bias is not None:
        z = z + _per_channel(bias, rank)
    return z if residual is None else z + residual


def _composite(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    args: ConvArgs, transposed: bool, activation: str,
) -> Tensor:  # fmt: skip
    rank = len(args.stride)
    function, fused_bias = _TORCH[transposed][rank - 1], bias if scale is None else None
    if transposed:
        z = function(
            input, weight, fused_bias, args.stride, args.padding, args.output_padding, args.groups, args.dilation
        )  # fmt: skip
    else:
        padding = args.padding if args.mode is None else args.mode
        z = function(input, weight, fused_bias, args.stride, padding, args.dilation, args.groups)
    if (scale is not None or residual is not None) and weight.shape[1]:  # no input channels, no output channels
        z = _epilogue(z, scale, None if scale is None else bias, residual, rank)
    return activate(z, activation)


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


# --- operators -------------------------------------------------------------------------------------------------------


def _is_direct(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Do few channels meet in a group, so that they are multiplied one by one and not as matrices?"""
    filters, channels = weight_shape[0] // groups, weight_shape[1]
    few = channels in DIRECT_CHANNELS and filters in DIRECT_CHANNELS
    block, products = math.prod(stride[-2:]), math.prod(weight_shape[2:][-2:]) * filters
    fits = math.prod(stride) == 1 or (block <= DIRECT_BLOCK and products <= DIRECT_PRODUCTS)
    return groups > 1 and few and fits


def module_of(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> Any:
    """The kernels of the convolution and of its transpose."""
    from ..kernels import conv, conv_direct

    return conv_direct if _is_direct(weight_shape, stride, groups) else conv


def weight_grad_module_of(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> Any:
    """Those of the weight gradient, where groups of several channels are merged into matrices."""
    from ..kernels import conv

    return module_of(weight_shape, stride, groups) if weight_shape[1] == 1 else conv


def _forward(
    transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    residual: Tensor | None, size: list[int], channels_last: bool | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, activation: str, precision: str, backend: str, *, save_input: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if channels_last is None:
        channels_last = _result_is_channels_last(input, weight)
    if runs_kernels(backend, input):
        from ..kernels import conv

        geometry = conv.Geometry.of(stride, padding, dilation, groups)
        precision = resolved_precision(input, precision, conv_setting)
        module = module_of(weight.shape, stride, groups)
        run = module.run_transpose if transposed else module.run_forward
        return run(
            input, weight, size, geometry, precision=precision, is_channels_last=channels_last, bias=bias, scale=scale,
            residual=residual, activation=activation, save_input=save_input,
        )  # fmt: skip
    z = _torch_convolution(transposed, input, weight, size, stride, padding, dilation, groups)
    z = laid_out(_epilogue(z, scale, bias, residual, len(size)), channels_last)
    return activate(z, activation), z if save_input else None


def _torch_convolution(
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


def _image_size(
    output: Sequence[int], window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The smallest image of which a convolution has that output."""
    return [
        (size - 1) * step - 2 * pad + dil * (taps - 1) + 1
        for size, taps, step, pad, dil in zip(output, window, stride, padding, dilation, strict=True)
    ]


def _fake_forward(
    transposed: bool, input: Tensor, weight: Tensor, bias: Any, scale: Any, residual: Any, size: Sequence[int],
    channels_last: bool | None, stride: Any, padding: Any, dilation: Any, groups: int, *rest: Any,
) -> Tensor:  # fmt: skip
    if channels_last is None:
        channels_last = _result_is_channels_last(input, weight)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return empty(input, (input.shape[0], channels, *size), channels_last)


class _Convolution(torch.autograd.Function):
    """Returns the output and, for SAVES_INPUT, the activation's input: saved for backward, and an output so that a
    second derivative reaches it."""

    @staticmethod
    def forward(
        ctx: Any, transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
        residual: Tensor | None, *options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        activation = options[6]
        call = (input, weight, bias, scale, residual, *options)
        z = None
        with below_autograd():
            if activation in SAVES_INPUT:
                y, z = OPS_SAVING_INPUT[transposed](*call)
            else:
                y = OPS[transposed](*call)
        saved = None if activation == "none" else y if z is None else z
        ctx.save_for_backward(input, weight, scale, saved)
        ctx.transposed, ctx.options = transposed, options
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None and dz is None:
            return (None,) * 15
        input, weight, scale, saved = ctx.saved_tensors
        transposed, (size, _, *geometry, activation, precision, backend) = ctx.transposed, ctx.options
        groups = geometry[-1]
        need_input, need_weight, need_bias, need_scale, need_residual = ctx.needs_input_grad[1:6]

        # dz comes only from a second derivative, which reaches the activation's input through it.
        # The dense kernels want g channels last, and what reads it may as well write it so; the direct ones read both.
        g, bias_grad = dy, None
        dense = not _is_direct(weight.shape, geometry[0], groups)
        relays = dense and (need_input or need_weight) and dy is not None and not has_unit_channels(dy)
        if dy is not None and (activation != "none" or (relays and runs_kernels(backend, dy))):
            channels_last = dense or is_channels_last(saved)
            g, bias_grad = OP_EPILOGUE_GRAD(
                dy, saved, activation, need_bias and dz is None, channels_last, backend
            )  # fmt: skip
        if dz is not None:
            g, bias_grad = dz if g is None else g + dz, None
        if need_bias and bias_grad is None:
            bias_grad = OP_BIAS_GRAD(g, backend)

        plain = (None, None, None)  # no bias, scale or residual
        options = (*geometry, "none", precision, backend)
        input_grad = weight_grad = scale_grad = None
        scaled = g
        if scale is not None and (need_input or need_weight):
            assert g is not None
            scaled = g * _per_channel(scale, len(size))
        if need_input:
            space, channels_last = input.shape[2:], is_channels_last(input)
            input_grad = OPS[not transposed](scaled, weight, *plain, space, channels_last, *options)
        if need_weight:
            image, output = (scaled, input) if transposed else (input, scaled)
            weight_grad = OP_WEIGHT_GRAD(
                image, output, weight.shape[2:], is_channels_last(weight), *geometry, precision, backend
            )  # fmt: skip
        if need_scale:
            assert g is not None
            assert scale is not None
            # The convolution again: sum(w * dw) would be the same number, but cancels where the activation saturates.
            bare = OPS[transposed](input, weight, *plain, size, None, *options)
            wide = torch.promote_types(g.dtype, torch.float32)
            scale_grad = (g.to(wide) * bare).sum(_all_but_channels(g), dtype=torch.float64).to(scale.dtype)
        return (
            None, input_grad, weight_grad, bias_grad if need_bias else None, scale_grad, g if need_residual else None,
            *(None,) * 9,
        )  # fmt: skip


def _all_but_channels(t: Tensor) -> list[int]:
    return [0, *range(2, t.dim())]


def _saving_input_autograd(transposed: bool, *call: Any) -> tuple[Tensor, Tensor]:
    *head, activation, precision, backend = call
    z = OPS[transposed](*head, "none", precision, backend)
    return activate(z, activation), z


_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"


def _register_convolution(name: str, transposed: bool) -> tuple[Any, Any]:
    """The operator and the one that also returns the activation's input. ``size`` is the result's in space; its layout
    is torch's where ``channels_last`` is not given."""
    call = (
        "Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, SymInt[] size, "
        f"bool? channels_last, {_GEOMETRY}, str activation, str precision, str backend"
    )
    op = register(
        f"{name}({call}) -> Tensor",
        implementation=lambda *call: _forward(transposed, *call, save_input=False)[0],
        fake=lambda *call: _fake_forward(transposed, *call),
        autograd=lambda *call: _Convolution.apply(transposed, *call)[0],
    )
    saving_input = register(
        f"{name}_saving_input({call}) -> (Tensor, Tensor)",
        implementation=lambda *call: _forward(transposed, *call, save_input=True),
        fake=lambda *call: (_fake_forward(transposed, *call), _fake_forward(transposed, *call)),
        autograd=lambda *call: _saving_input_autograd(transposed, *call),
    )
    return op, saving_input


OP, OP_SAVING_INPUT = _register_convolution("conv", False)
OP_TRANSPOSE, OP_TRANSPOSE_SAVING_INPUT = _register_convolution("conv_transpose", True)
OPS: dict[bool, Any] = {False: OP, True: OP_TRANSPOSE}
OPS_SAVING_INPUT: dict[bool, Any] = {False: OP_SAVING_INPUT, True: OP_TRANSPOSE_SAVING_INPUT}


# Gradient at the activation's input, and of the bias.


def _epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, channels_last: bool, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if runs_kernels(backend, dy):
        from ..kernels.conv import run_epilogue_grad

        g, bias_grad = run_epilogue_grad(dy, saved, activation, need_bias=need_bias, is_channels_last=channels_last)
        return g, dy.new_empty(0) if bias_grad is None else bias_grad
    g, bias_grad = _differentiable_epilogue_grad(dy, saved, activation, need_bias)
    # A new tensor also where nothing changes: an operator's outputs must not alias its inputs.
    return empty(g, g.shape, channels_last).copy_(g), bias_grad


def _differentiable_epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, *_: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(dy.dtype, torch.float32)
    g = dy.to(wide)
    if saved is not None:
        g = _activation_backward(g, saved.to(wide), activation)
    bias_grad = g.sum(_all_but_channels(g)).to(dy.dtype) if need_bias else dy.new_empty(0)
    return g.to(dy.dtype), bias_grad


def _epilogue_grad_autograd(*call: Any) -> tuple[Tensor, Tensor]:
    """A first backward runs the kernel; one that is differentiated again runs the formula in torch's operators."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:2]):
        return _differentiable_epilogue_grad(*call)
    with below_autograd():
        return OP_EPILOGUE_GRAD(*call)


def _fake_epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, channels_last: bool, backend: str
) -> Any:  # fmt: skip
    return empty(dy, dy.shape, channels_last), dy.new_empty(dy.shape[1] if need_bias else 0)


def _bias_grad(g: Tensor, backend: str) -> Tensor:
    if runs_kernels(backend, g):
        from ..kernels.conv import run_bias_grad

        return run_bias_grad(g)
    return g.sum(_all_but_channels(g))


def _bias_grad_autograd(g: Tensor, backend: str) -> Tensor:
    if torch.is_grad_enabled() and g.requires_grad:
        return g.sum(_all_but_channels(g))
    with below_autograd():
        return OP_BIAS_GRAD(g, backend)


OP_EPILOGUE_GRAD: Any = register(
    "conv_epilogue_grad(Tensor dy, Tensor? saved, str activation, bool need_bias, bool channels_last, str backend)"
    " -> (Tensor, Tensor)",
    implementation=_epilogue_grad,
    fake=_fake_epilogue_grad,
    autograd=_epilogue_grad_autograd,
)
OP_BIAS_GRAD: Any = register(
    "conv_bias_grad(Tensor g, str backend) -> Tensor",
    implementation=_bias_grad,
    fake=lambda g, backend: g.new_empty(g.shape[1]),
    autograd=_bias_grad_autograd,
)


# Weight gradient: linear in the input and in g, and so are its own gradients, a transpose and a convolution.


def _weight_grad(
    input: Tensor, g: Tensor, window: list[int], channels_last: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    shape = (g.shape[1], input.shape[1] // groups, *window)
    if runs_kernels(backend, input):
        from ..kernels import conv

        geometry = conv.Geometry.of(stride, padding, dilation, groups)
        precision = resolved_precision(input, precision, conv_setting)
        return weight_grad_module_of(shape, stride, groups).run_weight_grad(
            input, g, shape, geometry, precision=precision, is_channels_last=channels_last
        )
    # The same sums are the weight gradient of a transposed convolution from g to input. torch takes that view only
    # where the image goes on after the last window by a stride or more, as after a padded output.
    least = _image_size(g.shape[2:], window, stride, padding, dilation)
    extra = [size - smallest for size, smallest in zip(input.shape[2:], least, strict=True)]
    transposed = any(more >= step for more, step in zip(extra, stride, strict=True))
    image, output = (g, input) if transposed else (input, g)
    like = g.new_empty(1).expand(shape)
    grad = torch.ops.aten.convolution_backward(
        output, image, like, None, stride, padding, dilation, transposed,
        extra if transposed else [0] * len(extra), groups, [False, True, False],
    )[1]  # fmt: skip
    return laid_out(grad, channels_last)


def _fake_weight_grad(
    input: Tensor, g: Tensor, window: Sequence[int], channels_last: bool,
    stride: Any, padding: Any, dilation: Any, groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    return empty(input, (g.shape[1], input.shape[1] // groups, *window), channels_last)


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, g: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(input, g)
        ctx.options = options
        with below_autograd():
            return OP_WEIGHT_GRAD(input, g, *options)

    @staticmethod
    def backward(ctx: Any, ddw: Tensor) -> tuple[Tensor | None, ...]:
        input, g = ctx.saved_tensors
        _, _, *geometry, precision, backend = ctx.options
        plain, options = (None, None, None), (*geometry, "none", precision, backend)
        input_grad = g_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = OP_TRANSPOSE(g, ddw, *plain, input.shape[2:], is_channels_last(input), *options)
        if ctx.needs_input_grad[1]:
            g_grad = OP(input, ddw, *plain, g.shape[2:], is_channels_last(g), *options)
        return input_grad, g_grad, *(None,) * 8


OP_WEIGHT_GRAD: Any = register(
    f"conv_weight_grad(Tensor input, Tensor g, SymInt[] window, bool channels_last, {_GEOMETRY}, "
    "str precision, str backend) -> Tensor",
    implementation=_weight_grad,
    fake=_fake_weight_grad,
    autograd=_WeightGrad.apply,
)
