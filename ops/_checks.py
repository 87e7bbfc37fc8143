"""One validator per operator: it runs once, before a backend is chosen, and is the only place that rejects arguments.

Here is what they share; each family of operators has a file of its own (``*_checks.py``).

The yardstick is torch 2.13 on the CPU: what it rejects is rejected here with the same exception type and with its text
first; what follows that text names the value and what would be accepted. The tests compare each of them with torch
itself. Where torch accepts silently, crashes or contradicts itself, ``docs/differences.md`` has our choice.

The functions see shapes, dtypes and devices, never data, so a fake or meta tensor gets the error that a real one gets.
Dynamo traces them: on the way to success they compare symbolic sizes only where torch does.
Messages are built by the functions named ``_text_...``, called only once something is wrong.
"""

import operator
from collections.abc import Sequence
from typing import Any

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
Size = int | Sequence[int]  # one number for all dimensions of space, or one for each

# -- argument types: what torch's parser of Python arguments accepts ---------------------------------------------------

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


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


def _int_list(fn: str, position: int, name: str, value: Any, count: int) -> tuple[int, ...]:
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


def _is_static(size: int) -> bool:
    # Dynamo shows a symbolic size as an int, and torch.jit.trace as a tensor; the import is slow.
    if not torch.compiler.is_dynamo_compiling() and not _is_symbolic(size):
        return type(size) is int
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


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


# -- dtypes and their names --------------------------------------------------------------------------------------------

_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}

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
