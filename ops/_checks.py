"""One validator per operator: it runs once, before a backend is chosen, and is the only place that rejects arguments.

Here are what all validators share, and pooling's; other families have files of their own (``*_checks.py``).

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


def _int(fn: str, position: int, name: str, value: Any) -> int:
    if type(value) is int and _INT64_MIN <= value <= _INT64_MAX:
        return value
    if type(value) is not int:
        index = _as_index(value)
        if index is None:
            raise TypeError(_text_argument_type(fn, position, name, "int", value))
        value = index
    _check_int64(name, value)
    return value


def _int_list(fn: str, position: int, name: str, value: Any, count: int = 2) -> tuple[int, ...]:
    """A tuple as long as given; one int stands for ``count``, a tuple's length is left to the caller to judge."""
    if type(value) is int and _INT64_MIN <= value <= _INT64_MAX:
        return (value,) * count
    if not isinstance(value, (tuple, list)):
        index = _as_index(value)
        if index is None:
            raise TypeError(_text_argument_type(fn, position, name, "tuple of ints", value))
        _check_int64(name, index)
        return (index,) * count
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
