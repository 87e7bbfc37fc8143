"""The validators of convolution and transposed convolution, in one, two and three dimensions. See :mod:`._checks`.

Behind torch's functions on a CPU stand oneDNN and kernels of torch's own, each with its checks, their order and texts.
The first half of this file is what torch checks before it chooses among them, the second what it leaves to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    _COMPLEX,
    _FLOATING,
    _INT64_MAX,
    _INTEGERS,
    ACTIVATIONS,
    PRECISIONS,
    _check_like,
    _check_tensor,
    _cpp_name,
    _int,
    _int_list,
    _is_left_to_torch,
    _scalar_name,
    _tensor_type,
    _type_name,
)

_CONV_DTYPES = frozenset(_FLOATING | _INTEGERS | _COMPLEX)
_DILATED_CONV_DTYPES = frozenset(_FLOATING | _COMPLEX | {torch.int64})  # and those of transposed convolution
# Of stride and dilation, transposed: torch's own kernels keep 32 bits, and oneDNN divides by zero at the last of them.
_LARGEST_STEP = 2**31 - 2
_SIDES = ("depth", "height", "width")

Ints = tuple[int, ...]


class ConvArgs(NamedTuple):
    """The normalised arguments of a legal convolution; every tuple has one entry per spatial dimension."""

    stride: Ints
    padding: Ints
    dilation: Ints
    output_padding: Ints
    """Zeros unless transposed."""
    groups: int
    output_size: Ints
    """Spatial sizes of the output."""
    pad_extra: Ints | None
    """What ``F.pad`` must add first, in its order, for ``padding="same"`` with an odd total: torch pads a copy, too."""
    mode: str | None = None
    """``"same"`` or ``"valid"`` where padding was given so."""


def check_conv(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> ConvArgs:
    """Arguments of ``tritune.conv{rank}d``, normalised. Raises what torch raises, in torch's order."""
    fn = f"conv{rank}d"
    _check_tensors(fn, input, weight, bias)
    strides = _int_list(fn, 4, "stride", stride, rank)
    mode = None if type(padding) is int else _padding_mode(padding)
    paddings = _int_list(fn, 5, "padding", padding, rank) if mode is None else (0,)
    dilations = _int_list(fn, 6, "dilation", dilation, rank)
    groups = _int(fn, 7, "groups", groups)

    # With a padding string torch looks at the dtype of the bias last, and in some of its kernels not at all.
    if bias is not None and mode is None and bias.dtype != input.dtype:
        raise RuntimeError(_text_bias_dtype(input, bias))
    shape = _batched_shape(fn, rank, input)
    if input.dtype.is_complex:
        _check_complex(input, weight, bias)
    kernel = tuple(weight.shape)
    pad_extra = None
    if mode == "same":
        paddings, pad_extra, shape = _same_padding(shape, kernel, strides, dilations, groups)
    elif mode is not None and mode != "valid":
        raise RuntimeError(_text_padding_string(mode))

    # torch fills in this argument: one value in conv1d and with a padding string, one per dimension elsewhere.
    output_paddings = (0,) * rank if mode is None else (0,)
    _check_parameters(fn, shape, kernel, strides, paddings, dilations, output_paddings, groups)
    if shape[1] != kernel[1] * groups:
        raise RuntimeError(_text_channels(shape, kernel, groups))
    _check_bias(bias, kernel, kernel[0], "")
    _check_padding_overflow(paddings)
    step, pad, dilate = _expand(strides, rank), _expand(paddings, rank), _expand(dilations, rank)
    output_size = _output_size(shape, kernel, step, pad, dilate)
    _check_pixels(shape)
    args = ConvArgs(step, pad, dilate, (0,) * rank, groups, output_size, pad_extra, mode)
    _check_operands(input, weight, bias, shape, args, transposed=False)
    filters = 0 if shape[1] == 0 else kernel[0]  # torch's rule
    if activation is not None or residual is not None or scale is not None or precision is not None:
        _check_epilogue(fn, input, weight, (filters, *output_size), kernel[0], activation, residual, scale, precision)
    return args


def check_conv_transpose(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> ConvArgs:
    """Arguments of ``tritune.conv_transpose{rank}d``, normalised. Raises what torch raises, in torch's order."""
    fn = f"conv_transpose{rank}d"
    _check_tensors(fn, input, weight, bias)
    strides = _int_list(fn, 4, "stride", stride, rank)
    paddings = _int_list(fn, 5, "padding", padding, rank)
    output_paddings = _int_list(fn, 6, "output_padding", output_padding, rank)
    groups = _int(fn, 7, "groups", groups)
    dilations = _int_list(fn, 8, "dilation", dilation, rank)

    shape = _batched_shape(fn, rank, input)
    if input.dtype.is_complex:
        _check_complex(input, weight, bias)
    kernel = tuple(weight.shape)
    _check_parameters(fn, shape, kernel, strides, paddings, dilations, output_paddings, groups)
    _check_padding_overflow(paddings)
    if shape[1] != kernel[0]:
        raise RuntimeError(_text_transposed_channels(shape, kernel))
    filters = kernel[1] * groups
    _check_bias(bias, kernel, filters, "transposed=1, ")
    _check_pixels(shape)
    step, pad, dilate = _expand(strides, rank), _expand(paddings, rank), _expand(dilations, rank)
    output_pad = _expand(output_paddings, rank)
    output_size = _transposed_output_size(shape, kernel, step, pad, dilate, output_pad)
    args = ConvArgs(step, pad, dilate, output_pad, groups, output_size, None)
    _check_operands(input, weight, bias, shape, args, transposed=True)
    _check_epilogue(fn, input, weight, (filters, *output_size), filters, activation, residual, scale, precision)
    return args


# -- what torch checks before it chooses a kernel ----------------------------------------------------------------------


def _check_tensors(fn: str, input: object, weight: object, bias: object) -> None:
    _check_tensor(fn, 1, "input", input)
    _check_tensor(fn, 2, "weight", weight)
    if bias is not None:
        _check_tensor(fn, 3, "bias", bias)


def _padding_mode(padding: Any) -> str | None:
    if isinstance(padding, str):
        return padding
    if isinstance(padding, bytes):  # torch's parser takes them as a string
        return padding.decode()
    return None


def _batched_shape(fn: str, rank: int, input: Tensor) -> Ints:
    shape = tuple(input.shape)
    if len(shape) == rank + 2:
        return shape
    if len(shape) != rank + 1:
        raise RuntimeError(_text_input_ndim(fn, rank, shape))
    return (1, *shape)


def _check_complex(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        raise RuntimeError(_text_complex_dtypes(input, weight, bias))


def _same_padding(
    shape: Ints, kernel: Ints, stride: Ints, dilation: Ints, groups: int
) -> tuple[Ints, Ints | None, Ints]:
    """Symmetric padding, what ``F.pad`` adds beside it, and the input's shape after that."""
    dims = len(kernel) - 2
    if dims < 1:
        raise RuntimeError(_text_weight_ndim(kernel))
    if groups <= 0:
        raise RuntimeError(_text_groups(groups))
    if len(kernel) != len(shape):
        raise RuntimeError(_text_ndim_mismatch(shape, kernel, ""))
    for name, values in (("stride", stride), ("dilation", dilation)):
        if len(values) not in (1, dims):
            raise RuntimeError(_text_same_broadcast(name, dims, values))
    if any(step != 1 for step in stride):
        raise RuntimeError(_text_same_stride(stride))
    totals = [dil * (taps - 1) for dil, taps in zip(_expand(dilation, dims), kernel[2:], strict=True)]
    # One below zero (a dilation of -1, or no taps) is cropped rather than padded by torch: a later check rejects it.
    if any(total < -1 for total in totals):
        raise RuntimeError(_text_negative_padding(tuple(total // 2 for total in totals)))
    padding = tuple(max(total, 0) // 2 for total in totals)
    extra = [total - 2 * pad for total, pad in zip(totals, padding, strict=True)]
    if not any(extra):
        return padding, None, shape
    padded = (*shape[:2], *(size + more for size, more in zip(shape[2:], extra, strict=True)))
    return padding, tuple(side for more in reversed(extra) for side in (0, more)), padded


def _check_parameters(
    fn: str,
    shape: Ints,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_padding: Ints,
    groups: int,
) -> None:
    dims = len(kernel) - 2
    if dims < 1:
        raise RuntimeError(_text_weight_ndim(kernel))
    if groups <= 0:
        raise RuntimeError(_text_groups(groups))
    for name, values in (
        ("stride", stride), ("padding", padding), ("dilation", dilation), ("output_padding", output_padding)
    ):  # fmt: skip
        if len(values) != dims and len(values) != 1:
            raise RuntimeError(_text_list(fn, name, values, shape, kernel))
    if min(padding) < 0:
        raise RuntimeError(_text_negative_padding(padding))
    if min(output_padding) < 0:
        raise RuntimeError(f"negative output_padding is not supported: output_padding={list(output_padding)}")
    if min(stride) <= 0:
        raise RuntimeError(f"non-positive stride is not supported: stride={list(stride)}")
    if min(dilation) < 0:
        raise RuntimeError(f"dilation should be greater than zero, but got {list(dilation)}")
    if len(kernel) != len(shape):
        raise RuntimeError(_text_ndim_mismatch(shape, kernel, " "))
    if kernel[0] < groups:
        raise RuntimeError(_text_too_few(kernel, groups))
    if kernel[0] % groups != 0:
        raise RuntimeError(_text_not_divisible(kernel, groups))


def _check_bias(bias: Tensor | None, kernel: Ints, filters: int, transposed: str) -> None:
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != filters):
        raise RuntimeError(_text_bias_shape(bias, kernel, filters, transposed))


def _check_padding_overflow(padding: Ints) -> None:
    if max(padding) > _INT64_MAX // 2:
        raise RuntimeError(_text_padding_overflow(padding))


def _check_pixels(shape: Ints) -> None:
    if 0 in shape[2:] and shape[0] != 0 and shape[1] != 0:
        raise RuntimeError(_text_no_pixels(shape))


def _expand(values: Ints, rank: int) -> Ints:
    return values if len(values) == rank else values * rank


def _output_size(shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> Ints:
    output_size = []
    for i, step in enumerate(stride):
        room, reach = shape[i + 2] + 2 * padding[i], dilation[i] * (kernel[i + 2] - 1) + 1
        if room < reach:
            raise RuntimeError(_text_kernel_too_large(shape, kernel, padding, dilation))
        output_size.append((room - reach) // step + 1)
    return tuple(output_size)


def _transposed_output_size(
    shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, output_padding: Ints
) -> Ints:
    """May be below 1, which :func:`_transposed_error` rejects."""
    return tuple(
        [
            (shape[i + 2] - 1) * step - 2 * padding[i] + dilation[i] * (kernel[i + 2] - 1) + 1 + output_padding[i]
            for i, step in enumerate(stride)
        ]
    )


# -- what torch leaves to its kernels: devices, dtypes, dilation 0, empty weights, outputs without pixels --------------


def _check_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None, shape: Ints, args: ConvArgs, transposed: bool
) -> None:
    device, dtype = input.device, input.dtype
    if weight.device != device:
        raise RuntimeError(_text_device(input, "weight", weight))
    if bias is not None and bias.device != device:
        raise RuntimeError(_text_device(input, "bias", bias))
    usual = (
        weight.dtype == dtype
        and (bias is None or bias.dtype == dtype)
        and dtype in _FLOATING
        and 0 not in weight.shape
        and 0 not in args.dilation
        and not (transposed and _is_unusual_transposed(args))
    )
    if usual or _is_left_to_torch(input):
        return
    error = _kernel_error(input, weight, bias, shape, args, transposed)
    if error is not None and _torch_would_use_onednn(input, weight, shape, args):
        error = _onednn_error(input, weight, bias, args) or error
    if error is not None:
        raise error


def _is_unusual_transposed(args: ConvArgs) -> bool:
    return any(
        size < 1 or args.output_padding[i] > 0 or args.stride[i] > _LARGEST_STEP or args.dilation[i] > _LARGEST_STEP
        for i, size in enumerate(args.output_size)
    )


def _onednn_error(input: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs) -> Exception | None:
    """What torch checks before it calls oneDNN. What oneDNN itself says gets the text of :func:`_kernel_error`."""
    if weight.dtype != input.dtype:
        return RuntimeError(_text_onednn_dtype(input, "weight", weight))
    if bias is not None and bias.dtype != input.dtype:
        return RuntimeError(_text_onednn_dtype(input, "bias", bias))
    if 0 in args.dilation:
        return RuntimeError(f"non-positive dilation is not supported: dilation={list(args.dilation)}")
    return None


def _kernel_error(
    input: Tensor, weight: Tensor, bias: Tensor | None, shape: Ints, args: ConvArgs, transposed: bool
) -> Exception | None:
    """The first complaint of torch's own kernel, which it never makes of an empty input; this function does."""
    taps = tuple(weight.shape[2:])
    dilated = not transposed and any(dil != 1 for dil in args.dilation)
    # The transposed kernel of three dimensions finds this out when it looks for an empty weight.
    if 0 in taps and not (transposed and len(taps) == 3):
        return RuntimeError(_text_no_taps(taps, dilated))
    if transposed:
        error = _transposed_error(shape, weight, args)
        if error is not None:
            return error
    elif 0 in args.dilation:
        return RuntimeError(f"dilation should be greater than zero, but got {list(_seen(args.dilation, 1))}")
    if input.dtype not in (_DILATED_CONV_DTYPES if dilated or transposed else _CONV_DTYPES):
        return NotImplementedError(_text_dtype(input, taps, args, dilated, transposed))
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != input.dtype:
            return RuntimeError(_text_mixed_dtype(input, name, other))
    return None


def _transposed_error(shape: Ints, weight: Tensor, args: ConvArgs) -> Exception | None:
    if max(args.stride) > _LARGEST_STEP or max(args.dilation) > _LARGEST_STEP:
        return RuntimeError(_text_steps(args))
    if 0 in args.dilation:
        return RuntimeError(_text_transposed_dilation(args))
    sizes = zip(args.output_padding, args.stride, args.dilation, strict=True)
    if any(pad >= step and pad >= dil for pad, step, dil in sizes):
        return RuntimeError(_text_output_padding(args))
    if 0 in weight.shape:
        return RuntimeError(_text_empty_weight(weight, args.groups))
    if any(size < 1 for size in args.output_size):
        return RuntimeError(_text_output_too_small(shape, args))
    return None


def _torch_would_use_onednn(input: Tensor, weight: Tensor, shape: Ints, args: ConvArgs) -> bool:
    """The rule by which torch chooses its CPU kernel (``use_mkldnn`` in ATen's ``Convolution.cpp``)."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if any(pad >= step for pad, step in zip(args.output_padding, args.stride, strict=True)):
        return False
    dtype = input.dtype.to_real() if input.dtype.is_complex else input.dtype
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if dtype != torch.float32:
        return False
    batch, channels, *pixels = shape[:2] + _seen(shape[2:], 1)
    taps = _seen(tuple(weight.shape[2:]), 1)[-2:]  # it looks at two of three
    worth_it = (
        any(step != 1 for step in args.stride)
        or any(dil != 1 for dil in args.dilation)
        or batch >= 16
        or taps != (1, 1)
        or torch.get_num_threads() > 1
    )
    large = args.groups > 1 or min(taps) > 3 or batch > 1 or batch * channels * pixels[0] * pixels[1] > 20480
    return worth_it and large


def _seen(values: Ints, fill: int) -> Ints:
    """As torch's kernels see them: one dimension is the second of two."""
    return (fill, *values) if len(values) == 1 else values


# -- the keywords that torch lacks -------------------------------------------------------------------------------------


def _check_epilogue(
    fn: str,
    input: Tensor,
    weight: Tensor,
    output: Ints,
    filters: int,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    precision: str | None,
) -> None:
    """``output``: the shape of one image of it."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(_text_choice("activation", activation, ACTIVATIONS))
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(_text_choice("precision", precision, PRECISIONS))
    if scale is not None:
        if not isinstance(scale, Tensor):
            raise TypeError(_text_keyword_type(fn, "scale", scale))
        _check_like("scale", scale, (filters,), weight)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(_text_keyword_type(fn, "residual", residual))
        is_batched = input.dim() > len(output)
        _check_like("residual", residual, (input.shape[0], *output) if is_batched else output, input)


# -- texts -------------------------------------------------------------------------------------------------------------


def _text_bias_dtype(input: Tensor, bias: Tensor) -> str:
    return f"Input type ({_cpp_name(input)}) and bias type ({_cpp_name(bias)}) should be the same"


def _text_input_ndim(fn: str, rank: int, shape: Ints) -> str:
    return (
        f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {fn}, but got input of size: {list(shape)}"
    )


def _text_complex_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    name, other = ("weight", weight) if bias is None or weight.dtype != input.dtype else ("bias", bias)
    return f"Input type ({_tensor_type(input)}) and {name} type ({_tensor_type(other)}) should be the same"


def _text_padding_string(mode: str) -> str:
    return f"Invalid padding string: '{mode}'; accepted are 'same' and 'valid', or one int, or one a dimension"


def _text_weight_ndim(kernel: Ints) -> str:
    return (
        f"weight should have at least three dimensions, two beside the spatial, but got weight of size {list(kernel)}"
    )


def _text_groups(groups: int) -> str:
    return f"non-positive groups is not supported: groups={groups}"


def _text_list(fn: str, name: str, values: Ints, shape: Ints, kernel: Ints) -> str:
    dims = len(kernel) - 2
    wanted = len(shape)
    wrong_weight = f": {fn} takes a {wanted}-dimensional weight, but got one of size {list(kernel)}"
    return (
        f"expected {name} to be a single integer value or a list of {dims} values "
        f"to match the convolution dimensions, but got {name}={list(values)}"
    ) + (wrong_weight if len(kernel) != wanted else "")


def _text_same_broadcast(name: str, dims: int, values: Ints) -> str:
    return f"{name} cannot broadcast to {dims} dimensions: {name}={list(values)}"


def _text_same_stride(stride: Ints) -> str:
    return f"padding='same' is not supported for strided convolutions: stride={list(stride)}"


def _text_negative_padding(padding: Ints) -> str:
    return f"negative padding is not supported: padding={list(padding)}"


def _text_ndim_mismatch(shape: Ints, kernel: Ints, space: str) -> str:
    return (
        f"Expected {len(kernel)}-dimensional input for {len(kernel)}-dimensional weight{space}{list(kernel)}, "
        f"but got {len(shape)}-dimensional input of size {list(shape)} instead"
    )


def _text_too_few(kernel: Ints, groups: int) -> str:
    return (
        f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
        f"but got weight of size {list(kernel)} instead"
    )


def _text_not_divisible(kernel: Ints, groups: int) -> str:
    return (
        f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
        f"but got weight of size [{list(kernel)}] instead"
    )


def _text_channels(shape: Ints, kernel: Ints, groups: int) -> str:
    return (
        f"Given groups={groups}, weight of size {list(kernel)}, expected input{list(shape)} "
        f"to have {kernel[1] * groups} channels, but got {shape[1]} channels instead"
    )


def _text_transposed_channels(shape: Ints, kernel: Ints) -> str:
    return (
        f"Given transposed=1, weight of size {list(kernel)}, expected input{list(shape)} "
        f"to have {kernel[0]} channels, but got {shape[1]} channels instead"
    )


def _text_bias_shape(bias: Tensor, kernel: Ints, filters: int, transposed: str) -> str:
    return (
        f"Given {transposed}weight of size {list(kernel)}, expected bias to be 1-dimensional with {filters} elements, "
        f"but got bias of size {list(bias.shape)} instead"
    )


def _text_padding_overflow(padding: Ints) -> str:
    dim = next(dim for dim, pad in enumerate(padding) if pad > _INT64_MAX // 2)
    return f"Given padding={padding[dim]} at dimension {dim} , expected padding to be at most {_INT64_MAX // 2}"


def _text_kernel_too_large(shape: Ints, kernel: Ints, padding: Ints, dilation: Ints) -> str:
    padded = [size + 2 * pad for size, pad in zip(shape[2:], padding, strict=True)]
    reach = [dil * (taps - 1) + 1 for dil, taps in zip(dilation, kernel[2:], strict=True)]
    return (
        f"Calculated padded input size per channel: ({_by(padded)}). "
        f"Kernel size: ({_by(reach)}). Kernel size can't be greater than actual input size"
    )


def _text_no_pixels(shape: Ints) -> str:
    seen = shape[:2] + _seen(shape[2:], 1)
    return f"Only zero batch or zero channel inputs are supported, but got input shape: {list(seen)}"


def _text_device(input: Tensor, name: str, other: Tensor) -> str:
    here, there = input.device, other.device
    if {here.type, there.type} != {"cpu", "cuda"}:
        return (
            "Expected all tensors to be on the same device, "
            f"but got {name} is on {there}, different from other tensors on {here}"
        )
    types = f"({_tensor_type(input, here.type)}) and {name} type ({_tensor_type(other, there.type)})"
    mkldnn = f" or input should be a MKLDNN tensor and {name} is a dense tensor" if here.type == "cpu" else ""
    return f"Input type {types} should be the same{mkldnn}: input is on {here}, {name} is on {there}"


def _text_onednn_dtype(input: Tensor, name: str, other: Tensor) -> str:
    return (
        f"Input type ({_tensor_type(input)}) and {name} type ({_tensor_type(other)}) should be the same "
        f"or input should be a MKLDNN tensor and {name} is a dense tensor"
    )


def _text_mixed_dtype(input: Tensor, name: str, other: Tensor) -> str:
    return (
        f"expected scalar type {_scalar_name(input)} but found {_scalar_name(other)}: "
        f"input is {input.dtype}, {name} is {other.dtype}"
    )


def _text_no_taps(taps: Ints, dilated: bool) -> str:
    seen = _seen(taps, 1)
    if dilated:
        got = f" {list(seen)}"
    elif len(seen) == 3:
        got = f": {_by(seen)} (TxHxW)"
    else:
        got = " " + _by_side("kernel", seen)
    return f"kernel size should be greater than zero, but got{got}"


def _text_steps(args: ConvArgs) -> str:
    return (
        f"stride and dilation of a transposed convolution must be at most {_LARGEST_STEP}, "
        f"but got stride={list(args.stride)}, dilation={list(args.dilation)}"
    )


def _text_transposed_dilation(args: ConvArgs) -> str:
    got = _by_side("dilation", _seen(args.dilation, 1), ", ")
    return f"dilation should be greater than zero, but got {got}"


def _text_output_padding(args: ConvArgs) -> str:
    got = (("output_padding", args.output_padding, 0), ("stride", args.stride, 1), ("dilation", args.dilation, 1))
    sides = " ".join(_by_side(name, _seen(values, fill)) for name, values, fill in got)
    return f"output padding must be smaller than either stride or dilation, but got {sides}"


def _text_empty_weight(weight: Tensor, groups: int) -> str:
    channels, filters, *taps = weight.shape
    kind = "2D or 4D weight tensor expected"
    if len(taps) == 3:
        kind = (
            "5D (n_output_plane x n_input_plane x kernel_depth x kernel_height x kernel_width) "
            "tensor expected for weight"
        )
    return f"non-empty {kind}, but got: {[channels // groups, filters, *_seen(tuple(taps), 1)]}"


def _text_output_too_small(shape: Ints, args: ConvArgs) -> str:
    return (
        f"Given input size per channel: ({_by(_seen(shape[2:], 1))}). "
        f"Calculated output size per channel: ({_by(_seen(args.output_size, 1))}). Output size is too small"
    )


def _text_dtype(input: Tensor, taps: Ints, args: ConvArgs, dilated: bool, transposed: bool) -> str:
    rank = len(taps)
    fn = f"conv_transpose{rank}d" if transposed else f"conv{rank}d"
    if transposed:
        kernel = f"slow_conv_transpose{max(rank, 2)}d_out_cpu"
    elif dilated:
        kernel = "slow_conv_dilated<>"
    elif rank < 3:
        kernel = "slow_conv2d_cpu"
    else:
        no_columns = {*taps, *args.stride, args.groups} == {1} and not any(args.padding)
        kernel = "slow_conv3d_cpu" if no_columns else "compute_columns3d"
    return f"\"{kernel}\" not implemented for '{_scalar_name(input)}': {fn} does not take {input.dtype}"


def _text_choice(name: str, value: object, accepted: Sequence[str]) -> str:
    return f"{name}={value!r} is not accepted: it must be None or one of {', '.join(map(repr, accepted))}"


def _text_keyword_type(fn: str, name: str, value: object) -> str:
    return f"{fn}(): argument '{name}' must be Tensor, not {_type_name(value)}"


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _by_side(name: str, values: Ints, separator: str = " ") -> str:
    sides = _SIDES[-len(values) :]
    return separator.join(f"{name}_{side}: {value}" for side, value in zip(sides, values, strict=True))
