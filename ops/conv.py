"""Convolution and transposed convolution with a fused epilogue: public functions, and the choice of backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from ._checks import Size
from ._dispatch import (
    Ruling,
    are_plain,
    choose,
    conv_setting,
    measured,
    operator_precision,
    resolved_precision,
    torch_errors,
)
from ._layout import autocast, has_unit_channels, is_channels_last
from ._register import requires_grad, run_operator
from .conv_checks import ConvArgs, check_conv, check_conv_transpose
from .conv_operators import OPS, is_direct, module_of, result_is_channels_last, weight_grad_module_of
from .conv_torch import by_torch, composite


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
    return convolve(
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
    return convolve(
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
    return convolve(
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
    return convolve(
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
    return convolve(
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
    return convolve(
        conv_transpose3d, True, 3, input, weight, bias, (stride, padding, output_padding, groups, dilation),
        activation, residual, scale, precision,
    )  # fmt: skip


# --- from arguments to a call ----------------------------------------------------------------------------------------


def convolve(
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
    errors = torch_errors(input)
    if (
        errors is not None
        and (are_plain(geometry, recorded=not errors) or _pads_by_a_word(geometry, not errors))
        # There torch takes a dilation of 0 for a window of one tap.
        and (not transposed or are_plain(geometry[4:], 1, recorded=not errors))
    ):
        try:
            y = by_torch(
                transposed, rank, input, weight, bias, geometry, activation, residual, scale, precision, not errors
            )
            if y is not None:
                return y
        except errors:
            pass  # our validator has the words
    input, weight, bias, residual, scale = autocast(input, weight, bias, residual, scale)
    check = check_conv_transpose if transposed else check_conv
    args = check(
        rank, input, weight, bias, *geometry, activation=activation, residual=residual, scale=scale,
        precision=precision,
    )  # fmt: skip
    return _serve(transposed, args, (input, weight, bias, scale, residual), activation, precision)


def _pads_by_a_word(geometry: tuple[Any, ...], recorded: bool) -> bool:
    """Is the second of them, the padding, a word and are the others plain?"""
    return type(geometry[1]) is str and are_plain((geometry[0], *geometry[2:]), recorded=recorded)


def _serve(
    transposed: bool, args: ConvArgs, operands: tuple[Any, ...], activation: str | None, precision: str | None
) -> Tensor:
    """Chooses the backend of a legal call and runs it. ``operands``: input, weight, bias, scale, residual."""
    input, weight, bias, scale, residual = operands
    rank = len(args.stride)
    present = [t for t in operands if t is not None]

    def problem() -> Any:
        return conv_problem(_batched(input, rank), weight, args, transposed, precision)

    backend = choose(
        f"conv_transpose{rank}d" if transposed else f"conv{rank}d",
        present,
        lambda device: _auto_rule(problem(), device, transposed, (activation, scale, residual)),
        lambda device: _kernel_choices(
            problem(), device, (_batched(input, rank), *operands[1:]), activation, transposed
        ),
        lambda: limits(_batched(input, rank), weight, args),
    )  # fmt: skip
    activation = activation or "none"
    if backend == "torch":
        return composite(input, weight, bias, scale, residual, args, transposed, activation)

    batched = _batched(input, rank)
    if args.pad_extra is not None:
        batched = pad_around(batched, args.pad_extra)
    if residual is not None and residual.dim() == rank + 1:
        residual = residual.unsqueeze(0)
    multiplied = operator_precision(input, precision, conv_setting)
    call = (
        batched, weight, bias, scale, residual, args.output_size, None, args.stride, args.padding, args.dilation,
        args.groups, activation, multiplied, "triton",
    )  # fmt: skip
    y: Tensor = run_operator(OPS[transposed], call, requires_grad(present))
    return y if input.dim() == rank + 2 else y.squeeze(0)


def _batched(input: Tensor, rank: int) -> Tensor:
    return input if input.dim() == rank + 2 else input.unsqueeze(0)


def pad_around(input: Tensor, extra: tuple[int, ...]) -> Tensor:
    """Zeros around ``input``, whose layout stays: :func:`F.pad` alone loses it in one dimension of space."""
    if is_channels_last(input):
        return pad(input.movedim(1, -1), (0, 0, *extra)).movedim(-1, 1)
    return pad(input, extra)


# --- the choice of backend -------------------------------------------------------------------------------------------


def limits(input: Tensor, weight: Tensor, args: ConvArgs) -> str | None:
    """What the kernels leave to torch beyond dtypes and devices."""
    if weight.numel() == 0:
        return "weight is empty"
    if torch.compiler.is_compiling():
        return None
    pixels = max(input.shape[0] * math.prod(space) for space in (input.shape[2:], args.output_size))
    if pixels >= 2**31 or weight.numel() >= 2**31:
        return "input or output has 2**31 pixels, or weight 2**31 elements, or more"
    return None


def conv_problem(input: Tensor, weight: Tensor, args: ConvArgs, transposed: bool, precision: str | None) -> Any:
    from ..kernels import conv

    geometry = conv.Geometry.of(args.stride, args.padding, args.dilation, args.groups)
    extra = args.pad_extra or (0,) * (2 * len(args.stride))
    n, c, *space = input.shape
    padded = [size + sum(extra[2 * i : 2 * i + 2]) for i, size in enumerate(reversed(space))][::-1]
    x_shape, output = (n, c, *padded), args.output_size
    if transposed:
        x_shape, output = (n, weight.shape[1] * args.groups, *args.output_size), tuple(space)
    resolved = resolved_precision(input, precision, conv_setting)
    channels_last = result_is_channels_last(input, weight)
    return conv.problem_of(x_shape, weight.shape, output, geometry, input.dtype, resolved, channels_last)


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
    relays = not is_direct(*kind) and not unit_channels and (need_input or need_weight)
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
) -> Ruling:  # fmt: skip
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
        return Ruling(True, f"not measured; fusing {passes} passes saves {1 - ours / theirs:.0%} of torch's bytes")
    return Ruling(False, "not measured, and counted traffic does not promise a win: `tritune tune` can")
