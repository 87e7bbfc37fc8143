"""One validator per operator: it runs once, before a backend is chosen, and is the only place that rejects arguments.

The yardstick is torch 2.13 on the CPU: what it rejects is rejected here with the same exception type and with its text
first; what follows that text names the value and what would be accepted. The tests compare each of them with torch
itself. Where torch accepts silently, crashes or contradicts itself, ``docs/differences.md`` has our choice.

The functions see shapes, dtypes and devices, never data, so a fake or meta tensor gets the error that a real one gets.
Dynamo traces them: on the way to success they compare symbolic sizes only where torch does.
Messages are built by the functions named ``_text_...``, called only once something is wrong.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = (
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
)
PRECISIONS = ("ieee", "tf32", "tf32x3")

Pair = tuple[int, int]


class Conv2dArgs(NamedTuple):
    """The normalised arguments of a legal ``conv2d`` call."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    pad_extra: tuple[int, int, int, int] | None
    """What ``F.pad`` must add first, for ``padding="same"`` with an odd total: torch pads a copy in that case, too."""


class MaxPool2dArgs(NamedTuple):
    """The normalised arguments of a legal ``max_pool2d`` call."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool
    output_size: Pair
    has_empty_window: bool
    """Some window lies wholly in the padding (with symbolic sizes: may lie). Such a call must not reach torch."""


def check_conv2d(
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
) -> Conv2dArgs:
    """Arguments of :func:`tritune.conv2d`, normalised. Raises what torch raises, in torch's order."""
    _check_tensor("conv2d", 1, "input", input)
    _check_tensor("conv2d", 2, "weight", weight)
    if bias is not None:
        _check_tensor("conv2d", 3, "bias", bias)
    strides = _int_list("conv2d", 4, "stride", stride)
    mode = _padding_mode(padding)
    paddings = _int_list("conv2d", 5, "padding", padding) if mode is None else (0,)
    dilations = _int_list("conv2d", 6, "dilation", dilation)
    groups = _int("conv2d", 7, "groups", groups)

    # With a padding string torch looks at the dtype of the bias last, and in some of its kernels not at all.
    if bias is not None and mode is None and bias.dtype != input.dtype:
        raise RuntimeError(_text_bias_dtype(input, bias))
    shape = tuple(input.shape)
    if len(shape) != 4:
        if len(shape) != 3:
            raise RuntimeError(_text_conv_input_ndim(shape))
        shape = (1, *shape)
    if input.dtype.is_complex and (weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype)):
        raise RuntimeError(_text_complex_dtypes(input, weight, bias))

    kernel = tuple(weight.shape)
    pad_extra = None
    if mode is not None:
        if mode == "same":
            paddings, pad_extra, shape = _same_padding(shape, kernel, strides, dilations, groups)
        elif mode != "valid":
            raise RuntimeError(_text_padding_string(mode))
    _check_conv_shapes(shape, kernel, bias, strides, paddings, dilations, groups, mode)
    args = Conv2dArgs(_pair(strides), _pair(paddings), _pair(dilations), groups, pad_extra)
    _check_conv_operands(input, weight, bias, shape, args)
    _check_epilogue(input, weight, shape, args, activation, residual, scale, precision)
    return args


def check_max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> MaxPool2dArgs:
    """Arguments of :func:`tritune.max_pool2d`, normalised. Raises what torch raises, in torch's order."""
    fn = "max_pool2d_with_indices" if return_indices else "max_pool2d"
    _check_tensor(fn, 1, "input", input)
    kernels = _int_list(fn, 2, "kernel_size", kernel_size)
    strides = () if stride is None else _int_list(fn, 3, "stride", stride)
    paddings = _int_list(fn, 4, "padding", padding)
    dilations = _int_list(fn, 5, "dilation", dilation)
    if ceil_mode is not True and ceil_mode is not False:
        raise TypeError(_text_argument_type(fn, 6, "ceil_mode", "bool", ceil_mode))

    kernel = _pool_pair("kernel_size", kernels, "must either be a single int, or a tuple of two ints")
    step = kernel
    if strides:
        step = _pool_pair("stride", strides, "must either be omitted, a single int, or a tuple of two ints")
    pad = _pool_pair("padding", paddings, "must either be a single int, or a tuple of two ints")
    dilate = _pool_pair("dilation", dilations, "must be either a single int, or a tuple of two ints")

    shape = tuple(input.shape)
    if len(shape) != 4 and len(shape) != 3:
        raise RuntimeError(_text_pool_input_ndim(input))
    height, width = shape[-2:]
    output_size = (
        pool_output_size(height, kernel[0], step[0], pad[0], dilate[0], ceil_mode),
        pool_output_size(width, kernel[1], step[1], pad[1], dilate[1], ceil_mode),
    )
    _check_pool_shapes(shape, kernel, step, pad, dilate, output_size)
    if input.dtype not in _POOL_DTYPES and not _is_left_to_torch(input):
        raise NotImplementedError(_text_pool_dtype(input))

    has_empty_window = _may_have_empty_window(
        height, kernel[0], step[0], pad[0], dilate[0], ceil_mode
    ) or _may_have_empty_window(width, kernel[1], step[1], pad[1], dilate[1], ceil_mode)
    if has_empty_window and return_indices and _is_static(height) and _is_static(width):
        raise RuntimeError(_text_empty_window((height, width), kernel, pad, dilate))
    return MaxPool2dArgs(kernel, step, pad, dilate, ceil_mode, output_size, has_empty_window)


# -- argument types: what torch's parser of Python arguments accepts ---------------------------------------------------

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1


def _check_tensor(fn: str, position: int, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(_text_argument_type(fn, position, name, "Tensor", value))
    if value.is_nested:
        raise NotImplementedError(f"{fn}(): argument '{name}' is a nested tensor, which this function does not take")


def _int(fn: str, position: int, name: str, value: Any) -> int:
    if type(value) is not int:
        index = _as_index(value)
        if index is None:
            raise TypeError(_text_argument_type(fn, position, name, "int", value))
        value = index
    _check_int64(name, value)
    return value


def _int_list(fn: str, position: int, name: str, value: Any) -> tuple[int, ...]:
    """A tuple as long as given; one int stands for two, a tuple's length is left to the caller to judge."""
    if type(value) is int:
        _check_int64(name, value)
        return (value, value)
    if not isinstance(value, (tuple, list)):
        index = _as_index(value)
        if index is None:
            raise TypeError(_text_argument_type(fn, position, name, "tuple of ints", value))
        _check_int64(name, index)
        return (index, index)
    items: list[int] = []
    for place, item in enumerate(value):
        if type(item) is not int:
            # torch's parser looks closely at the first item only: a later True counts as 1.
            index = int(item) if place and isinstance(item, bool) else _as_index(item)
            if index is None:
                raise TypeError(_text_item_type(fn, position, name, place, item))
            item = index
        if not _is_symbolic(item) and not _INT64_MIN <= item <= _INT64_MAX:
            raise TypeError(_text_item_overflow(fn, name, place))
        items.append(item)
    return tuple(items)


def _as_index(value: Any) -> int | None:
    """``value`` as an int if it stands for one: numpy integers and integer tensors of one element do, bools do not."""
    if _is_symbolic(value):
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, Tensor) and (value.dtype in _NOT_AN_INDEX or value.numel() != 1):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_symbolic(value: object) -> bool:
    return isinstance(value, torch.SymInt)


def _check_int64(name: str, value: int) -> None:
    if not _is_symbolic(value) and not _INT64_MIN <= value <= _INT64_MAX:
        raise ValueError(f"Overflow when unpacking long long: {name}={value} does not fit into 64 bits")


def _text_argument_type(fn: str, position: int, name: str, wanted: str, value: object) -> str:
    return f"{fn}(): argument '{name}' (position {position}) must be {wanted}, not {_type_name(value)}"


def _text_item_type(fn: str, position: int, name: str, place: int, item: object) -> str:
    if place == 0:
        return (
            f"{fn}(): argument '{name}' (position {position}) must be tuple of ints, "
            f"but found element of type {_type_name(item)} at pos 0"
        )
    return (
        f"{fn}(): argument '{name}' failed to unpack the object at pos {place + 1} "
        f'with error "type must be tuple of ints,but got {_type_name(item)}"'
    )


def _text_item_overflow(fn: str, name: str, place: int) -> str:
    return (
        f"{fn}(): argument '{name}' failed to unpack the object at pos {place + 1} "
        'with error "Overflow when unpacking long long"'
    )


def _is_left_to_torch(input: Tensor) -> bool:
    """Quantised, sparse and MKL-DNN tensors: torch has kernels of its own, or says itself that it has none."""
    return input.is_quantized or input.layout != torch.strided


def _type_name(value: object) -> str:
    kind = type(value)
    return f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__


# -- conv2d ------------------------------------------------------------------------------------------------------------


def _padding_mode(padding: Any) -> str | None:
    if isinstance(padding, str):
        return padding
    if isinstance(padding, bytes):  # torch's parser takes them as a string
        return padding.decode()
    return None


def _same_padding(
    shape: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> tuple[tuple[int, ...], tuple[int, int, int, int] | None, tuple[int, ...]]:
    """Symmetric padding, what ``F.pad`` adds beside it, and the input's shape after that."""
    dims = len(kernel) - 2
    if dims < 1:
        raise RuntimeError(_text_weight_ndim(kernel))
    if groups <= 0:
        raise RuntimeError(_text_groups(groups))
    if dims != 2:
        raise RuntimeError(_text_conv_ndim_mismatch(shape, kernel, ""))
    if len(stride) not in (1, 2):
        raise RuntimeError(_text_same_broadcast("stride", stride))
    if len(dilation) not in (1, 2):
        raise RuntimeError(_text_same_broadcast("dilation", dilation))
    if any(s != 1 for s in stride):
        raise RuntimeError(_text_same_stride(stride))
    rows = dilation[0] * (kernel[2] - 1)
    columns = dilation[-1] * (kernel[3] - 1)
    # One below zero (a dilation of -1, or no taps) is cropped rather than padded by torch: a later check rejects it.
    if rows < -1 or columns < -1:
        raise RuntimeError(_text_negative_padding((rows // 2, columns // 2)))
    padding = (max(rows, 0) // 2, max(columns, 0) // 2)
    extra_row, extra_column = rows - 2 * padding[0], columns - 2 * padding[1]
    if extra_row == 0 and extra_column == 0:
        return padding, None, shape
    padded = (*shape[:2], shape[2] + extra_row, shape[3] + extra_column)
    return padding, (0, extra_column, 0, extra_row), padded


def _check_conv_shapes(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    mode: str | None,
) -> None:
    dims = len(kernel) - 2
    if dims < 1:
        raise RuntimeError(_text_weight_ndim(kernel))
    if groups <= 0:
        raise RuntimeError(_text_groups(groups))
    for name, values in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(values) not in (1, dims):
            raise RuntimeError(_text_conv_list(name, dims, values))
    if dims != 2 and mode is None:  # conv2d itself passes two values for this one
        raise RuntimeError(_text_conv_list("output_padding", dims, (0, 0)) + _text_weight_is_4d(kernel))
    if min(padding) < 0:
        raise RuntimeError(_text_negative_padding(padding))
    if min(stride) <= 0:
        raise RuntimeError(_text_conv_stride(stride))
    if min(dilation) < 0:
        raise RuntimeError(_text_negative_dilation(dilation))
    if dims != 2:
        raise RuntimeError(_text_conv_ndim_mismatch(shape, kernel, " "))
    if kernel[0] < groups:
        raise RuntimeError(_text_too_few_filters(kernel, groups))
    if kernel[0] % groups != 0:
        raise RuntimeError(_text_filters_not_divisible(kernel, groups))
    if shape[1] != kernel[1] * groups:
        raise RuntimeError(_text_channels(shape, kernel, groups))
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != kernel[0]):
        raise RuntimeError(_text_bias_shape(bias, kernel))
    if max(padding) > _INT64_MAX // 2:
        raise RuntimeError(_text_padding_overflow(padding))
    padded = (shape[2] + 2 * padding[0], shape[3] + 2 * padding[-1])
    reach = (dilation[0] * (kernel[2] - 1) + 1, dilation[-1] * (kernel[3] - 1) + 1)
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(_text_kernel_too_large(padded, reach))
    if (shape[2] == 0 or shape[3] == 0) and shape[0] != 0 and shape[1] != 0:
        raise RuntimeError(_text_no_pixels(shape))


def _pair(values: tuple[int, ...]) -> Pair:
    return (values[0], values[-1])


def _check_conv_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], args: Conv2dArgs
) -> None:
    """What torch leaves to its kernels: devices, dtypes, dilation 0, kernels without taps."""
    device, dtype = input.device, input.dtype
    if weight.device != device:
        raise RuntimeError(_text_device(input, "weight", weight))
    if bias is not None and bias.device != device:
        raise RuntimeError(_text_device(input, "bias", bias))
    if (
        weight.dtype != dtype
        or (bias is not None and bias.dtype != dtype)
        or dtype not in _CONV_DTYPES
        or weight.shape[2] == 0
        or weight.shape[3] == 0
        or args.dilation != (1, 1)
    ):
        _check_like_the_kernel(input, weight, bias, shape, args)


def _check_like_the_kernel(
    input: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], args: Conv2dArgs
) -> None:
    """The checks of the kernel that torch would run on a CPU: order and texts differ between its two kernels."""
    if _is_left_to_torch(input):
        return
    dilation = args.dilation
    dilated = dilation != (1, 1)
    no_taps = weight.shape[2] == 0 or weight.shape[3] == 0
    no_dilation = min(dilation) == 0
    mixed_weight = weight.dtype != input.dtype
    mixed_bias = bias is not None and bias.dtype != input.dtype
    dtypes = _DILATED_CONV_DTYPES if dilated else _CONV_DTYPES
    unsupported = input.dtype not in dtypes
    if not (no_taps or no_dilation or mixed_weight or mixed_bias or unsupported):
        return

    if _torch_would_use_onednn(input, weight, shape, args):
        if mixed_weight:
            raise RuntimeError(_text_onednn_dtype(input, "weight", weight))
        if bias is not None and mixed_bias:
            raise RuntimeError(_text_onednn_dtype(input, "bias", bias))
        if no_dilation:
            raise RuntimeError(f"non-positive dilation is not supported: dilation={dilation}")
    if no_taps:
        raise RuntimeError(_text_no_taps(weight, dilated))
    if no_dilation:
        raise RuntimeError(f"dilation should be greater than zero, but got {list(dilation)}")
    if unsupported:
        raise NotImplementedError(_text_conv_dtype(input, dilated))
    if mixed_weight:
        raise RuntimeError(_text_mixed_dtype(input, "weight", weight))
    if bias is not None and mixed_bias:
        raise RuntimeError(_text_mixed_dtype(input, "bias", bias))


def _torch_would_use_onednn(input: Tensor, weight: Tensor, shape: tuple[int, ...], args: Conv2dArgs) -> bool:
    """The rule by which torch chooses its CPU kernel (``use_mkldnn`` in ATen's ``Convolution.cpp``)."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    dtype = input.dtype.to_real() if input.dtype.is_complex else input.dtype
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if dtype != torch.float32:
        return False
    taps = tuple(weight.shape[2:])
    worth_it = (
        args.stride != (1, 1)
        or args.dilation != (1, 1)
        or shape[0] >= 16
        or taps != (1, 1)
        or torch.get_num_threads() > 1
    )
    large = args.groups > 1 or min(taps) > 3 or shape[0] > 1 or shape[0] * shape[1] * shape[2] * shape[3] > 20480
    return worth_it and large


def _check_epilogue(
    input: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    args: Conv2dArgs,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    precision: str | None,
) -> None:
    """The keywords that torch lacks."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(_text_choice("activation", activation, ACTIVATIONS))
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(_text_choice("precision", precision, PRECISIONS))
    if scale is not None:
        if not isinstance(scale, Tensor):
            raise TypeError(_text_keyword_type("scale", scale))
        _check_like("scale", scale, (weight.shape[0],), weight)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(_text_keyword_type("residual", residual))
        _check_like("residual", residual, _conv_output_shape(input, weight, shape, args), input)


def _conv_output_shape(input: Tensor, weight: Tensor, shape: tuple[int, ...], args: Conv2dArgs) -> tuple[int, ...]:
    stride, padding, dilation = args.stride, args.padding, args.dilation
    height = (shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    width = (shape[3] + 2 * padding[1] - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
    channels = 0 if shape[1] == 0 else weight.shape[0]  # torch's rule
    return (channels, height, width) if input.dim() == 3 else (shape[0], channels, height, width)


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], other: Tensor) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != other.dtype:
        raise RuntimeError(
            f"{name} must be a {other.dtype} tensor of shape {list(shape)}, "
            f"but got {tensor.dtype} and {list(tensor.shape)}"
        )
    if tensor.device != other.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, "
            f"but got {name} is on {tensor.device}, different from other tensors on {other.device}"
        )


def _text_bias_dtype(input: Tensor, bias: Tensor) -> str:
    return f"Input type ({_cpp_name(input)}) and bias type ({_cpp_name(bias)}) should be the same"


def _text_conv_input_ndim(shape: tuple[int, ...]) -> str:
    return f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(shape)}"


def _text_complex_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    name, other = ("weight", weight) if bias is None or weight.dtype != input.dtype else ("bias", bias)
    return f"Input type ({_tensor_type(input)}) and {name} type ({_tensor_type(other)}) should be the same"


def _text_padding_string(mode: str) -> str:
    return f"Invalid padding string: '{mode}'; accepted are 'same' and 'valid', or one or two ints"


def _text_weight_ndim(kernel: tuple[int, ...]) -> str:
    return f"weight should have at least three dimensions, and four for conv2d, but got weight of size {list(kernel)}"


def _text_groups(groups: int) -> str:
    return f"non-positive groups is not supported: groups={groups}"


def _text_conv_list(name: str, dims: int, values: tuple[int, ...]) -> str:
    return (
        f"expected {name} to be a single integer value or a list of {dims} values "
        f"to match the convolution dimensions, but got {name}={list(values)}"
    )


def _text_weight_is_4d(kernel: tuple[int, ...]) -> str:
    return f": conv2d takes a 4-dimensional weight, but got one of size {list(kernel)}"


def _text_same_broadcast(name: str, values: tuple[int, ...]) -> str:
    return f"{name} cannot broadcast to 2 dimensions: {name}={list(values)}"


def _text_same_stride(stride: tuple[int, ...]) -> str:
    return f"padding='same' is not supported for strided convolutions: stride={list(stride)}"


def _text_negative_padding(padding: tuple[int, ...]) -> str:
    return f"negative padding is not supported: padding={list(padding)}"


def _text_conv_stride(stride: tuple[int, ...]) -> str:
    return f"non-positive stride is not supported: stride={list(stride)}"


def _text_negative_dilation(dilation: tuple[int, ...]) -> str:
    return f"dilation should be greater than zero, but got {list(dilation)}"


def _text_conv_ndim_mismatch(shape: tuple[int, ...], kernel: tuple[int, ...], space: str) -> str:
    return (
        f"Expected {len(kernel)}-dimensional input for {len(kernel)}-dimensional weight{space}{list(kernel)}, "
        f"but got {len(shape)}-dimensional input of size {list(shape)} instead"
    )


def _text_too_few_filters(kernel: tuple[int, ...], groups: int) -> str:
    return (
        f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
        f"but got weight of size {list(kernel)} instead"
    )


def _text_filters_not_divisible(kernel: tuple[int, ...], groups: int) -> str:
    return (
        f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
        f"but got weight of size [{list(kernel)}] instead"
    )


def _text_channels(shape: tuple[int, ...], kernel: tuple[int, ...], groups: int) -> str:
    return (
        f"Given groups={groups}, weight of size {list(kernel)}, expected input{list(shape)} "
        f"to have {kernel[1] * groups} channels, but got {shape[1]} channels instead"
    )


def _text_bias_shape(bias: Tensor, kernel: tuple[int, ...]) -> str:
    return (
        f"Given weight of size {list(kernel)}, expected bias to be 1-dimensional with {kernel[0]} elements, "
        f"but got bias of size {list(bias.shape)} instead"
    )


def _text_padding_overflow(padding: tuple[int, ...]) -> str:
    dim = 0 if padding[0] > _INT64_MAX // 2 else 1
    return f"Given padding={padding[dim]} at dimension {dim} , expected padding to be at most {_INT64_MAX // 2}"


def _text_kernel_too_large(padded: Pair, reach: Pair) -> str:
    return (
        f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). "
        f"Kernel size: ({reach[0]} x {reach[1]}). Kernel size can't be greater than actual input size"
    )


def _text_no_pixels(shape: tuple[int, ...]) -> str:
    return f"Only zero batch or zero channel inputs are supported, but got input shape: {list(shape)}"


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


def _text_no_taps(weight: Tensor, dilated: bool) -> str:
    height, width = weight.shape[2:]
    got = f"[{height}, {width}]" if dilated else f"kernel_height: {height} kernel_width: {width}"
    return f"kernel size should be greater than zero, but got {got}"


def _text_conv_dtype(input: Tensor, dilated: bool) -> str:
    kernel = "slow_conv_dilated<>" if dilated else "slow_conv2d_cpu"
    return f"\"{kernel}\" not implemented for '{_scalar_name(input)}': conv2d does not take {input.dtype}"


def _text_choice(name: str, value: object, accepted: Sequence[str]) -> str:
    return f"{name}={value!r} is not accepted: it must be None or one of {', '.join(map(repr, accepted))}"


def _text_keyword_type(name: str, value: object) -> str:
    return f"conv2d(): argument '{name}' must be Tensor, not {_type_name(value)}"


# -- max_pool2d --------------------------------------------------------------------------------------------------------


def _pool_pair(name: str, values: tuple[int, ...], rule: str) -> Pair:
    if len(values) not in (1, 2):
        raise RuntimeError(f"max_pool2d: {name} {rule}, but got {list(values)}")
    first, last = values[0], values[-1]
    if not (_INT32_MIN <= first <= _INT32_MAX and _INT32_MIN <= last <= _INT32_MAX):
        raise RuntimeError(f"value cannot be converted to type int without overflow: {name}={list(values)}")
    return (first, last)


def pool_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    if stride == 0:
        raise RuntimeError("stride should not be zero")
    if padding < 0:
        raise RuntimeError(f"pad must be non-negative, but got pad: {padding}")
    reach = (kernel - 1) * dilation + 1
    if padding > (reach // 2 if reach >= 0 else -(-reach // 2)):  # C++ division rounds towards zero
        raise RuntimeError(_text_pad_effective(kernel, padding, dilation))
    last = size + 2 * padding - reach
    if not ceil_mode:
        return last // stride + 1
    count = (last + stride - 1) // stride + 1
    # The last window must start inside the input or the padding before it.
    return count - 1 if (count - 1) * stride >= size + padding else count


def _check_pool_shapes(
    shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, output_size: Pair
) -> None:
    if min(kernel) <= 0:
        raise RuntimeError(f"kernel size should be greater than zero, but got kH: {kernel[0]} kW: {kernel[1]}")
    if min(stride) <= 0:
        raise RuntimeError(f"stride should be greater than zero, but got dH: {stride[0]} dW: {stride[1]}")
    if min(dilation) <= 0:
        raise RuntimeError(
            f"dilation should be greater than zero, but got dilationH: {dilation[0]} dilationW: {dilation[1]}"
        )
    if shape[-3] == 0 or shape[-2] == 0 or shape[-1] == 0:
        raise RuntimeError(_text_pool_no_elements(shape))
    if kernel[0] // 2 < padding[0] or kernel[1] // 2 < padding[1]:
        raise RuntimeError(_text_pad_half(kernel, padding))
    if output_size[0] < 1 or output_size[1] < 1:
        raise RuntimeError(_text_pool_too_small(shape, output_size))


def _may_have_empty_window(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> bool:
    """Whether some window of a legal call has all its taps in the padding (along one dimension).

    A window that starts inside the input has a tap there, and one that starts at ``start < 0`` has its first tap from
    0 on at ``start % dilation`` (padding is at most kernel / 2, so it is reached). That tap lies beyond the input only
    if ``dilation > size``. Put into "the output has at least one element" this leaves the static condition below.
    """
    slack = stride - 1 if ceil_mode else 0
    if padding == 0 or dilation == 1 or dilation * (2 - kernel) + 2 * padding - 2 + slack < 0:
        return False
    if not _is_static(size):
        return True  # cannot be known without a guard
    return dilation > size and any(start % dilation >= size for start in range(-padding, 0, stride))


def _is_static(size: int) -> bool:
    # Dynamo shows a symbolic size as an int; the import is slow and needed by nobody else.
    if not torch.compiler.is_dynamo_compiling() and not _is_symbolic(size):
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def _text_pool_input_ndim(input: Tensor) -> str:
    if input.dim() == 5 and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last_3d):
        return "Unsupported memory format. Supports only ChannelsLast, Contiguous"
    return f"non-empty 3D or 4D (batch mode) tensor expected for input, but got input of size {list(input.shape)}"


def _text_pad_effective(kernel: int, padding: int, dilation: int) -> str:
    return (
        f"pad should be at most half of effective kernel size, but got pad={padding}, "
        f"kernel_size={kernel} and dilation={dilation}"
    )


def _text_pool_no_elements(shape: tuple[int, ...]) -> str:
    return f"Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:{list(shape)}"


def _text_pad_half(kernel: Pair, padding: Pair) -> str:
    return (
        "pad should be smaller than or equal to half of kernel size, but got "
        f"padW = {padding[1]}, padH = {padding[0]}, kW = {kernel[1]}, kH = {kernel[0]}"
    )


def _text_pool_too_small(shape: tuple[int, ...], output_size: Pair) -> str:
    channels, height, width = shape[-3:]
    return (
        f"Given input size: ({channels}x{height}x{width}). "
        f"Calculated output size: ({channels}x{output_size[0]}x{output_size[1]}). Output size is too small"
    )


def _text_pool_dtype(input: Tensor) -> str:
    channels_last = (
        input.dim() == 4 and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
    )
    kernel = "max_pool2d_channels_last" if channels_last else "max_pool2d"
    return f"\"{kernel}\" not implemented for '{_scalar_name(input)}': max_pool2d does not take {input.dtype}"


def _text_empty_window(size: Pair, kernel: Pair, padding: Pair, dilation: Pair) -> str:
    return (
        "max_pool2d: no return_indices=True where a window lies wholly in the padding and so has no index: "
        f"input size {size}, kernel_size={kernel}, padding={padding}, dilation={dilation}"
    )


# -- dtypes and their names --------------------------------------------------------------------------------------------

_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}

_CONV_DTYPES = frozenset(_FLOATING | _INTEGERS | _COMPLEX)
_DILATED_CONV_DTYPES = frozenset(_FLOATING | _COMPLEX | {torch.int64})
_POOL_DTYPES = frozenset(_FLOATING | _INTEGERS)
_NOT_AN_INDEX = frozenset(_FLOATING | _COMPLEX | {torch.bool})

# torch's messages name a dtype in three ways: as ScalarType, as a C++ type, and as a legacy tensor type.
_NAMES = {
    torch.uint8: ("Byte", "unsigned char"),
    torch.int8: ("Char", "signed char"),
    torch.int16: ("Short", "short int"),
    torch.int32: ("Int", "int"),
    torch.int64: ("Long", "long int"),
    torch.uint16: ("UInt16", "short unsigned int"),
    torch.uint32: ("UInt32", "unsigned int"),
    torch.uint64: ("UInt64", "long unsigned int"),
    torch.float16: ("Half", "c10::Half"),
    torch.float32: ("Float", "float"),
    torch.float64: ("Double", "double"),
    torch.bool: ("Bool", "bool"),
    torch.bfloat16: ("BFloat16", "c10::BFloat16"),
    torch.complex32: ("ComplexHalf", "c10::complex<c10::Half>"),
    torch.complex64: ("ComplexFloat", "c10::complex<float>"),
    torch.complex128: ("ComplexDouble", "c10::complex<double>"),
}
_LEGACY_TENSOR_TYPES = frozenset(_INTEGERS | _FLOATING) - {torch.bfloat16}


def _scalar_name(tensor: Tensor) -> str:
    return _names(tensor)[0]


def _cpp_name(tensor: Tensor) -> str:
    return _names(tensor)[1]


def _names(tensor: Tensor) -> tuple[str, str]:
    if tensor.dtype in _NAMES:
        return _NAMES[tensor.dtype]
    name = str(tensor.dtype).removeprefix("torch.").capitalize()  # float8_e5m2 is Float8_e5m2 there
    return name, f"c10::{name}"


def _tensor_type(tensor: Tensor, device: str = "cpu") -> str:
    """Where only dtypes differ the CPU's names serve all devices: one fault, one text."""
    name = _scalar_name(tensor)
    if tensor.dtype in _LEGACY_TENSOR_TYPES:
        return f"torch.{name}Tensor" if device == "cpu" else f"torch.{device}.{name}Tensor"
    return f"{device.upper()}{name}Type"
