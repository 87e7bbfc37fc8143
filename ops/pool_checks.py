"""The validators of pooling, in one, two and three dimensions. See :mod:`._checks`.

torch pools lines as images of one row, so what it says of one dimension often names two. Only ``max_pool1d`` without
indices has checks and a kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    _FLOATING,
    _INTEGERS,
    _as_index,
    _check_tensor,
    _int,
    _int_list,
    _is_left_to_torch,
    _is_static,
    _scalar_name,
    _text_argument_type,
)

_MAX_DTYPES = frozenset(_FLOATING | _INTEGERS)
# In three dimensions torch's CPU kernel lacks the 16-bit types that its GPU kernel has: they are legal everywhere.
_AVG_DTYPES = frozenset(_FLOATING | {torch.int64})
# torch averages whole planes by ``mean``, which takes complex numbers too.
_MEAN_DTYPES = frozenset(_FLOATING | {torch.complex64, torch.complex128})

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
_NUMERALS = ("", "one int", "two ints", "three ints")

Ints = tuple[int, ...]


class PoolArgs(NamedTuple):
    """The normalised arguments of a legal pooling by fixed windows; every tuple has one entry per spatial dimension."""

    kernel_size: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    """Ones where the function has none."""
    ceil_mode: bool
    output_size: Ints
    """Spatial sizes of the output."""
    has_empty_window: bool
    """Max pooling only: some window lies wholly in the padding (with symbolic sizes: may lie). Such a call must not
    reach torch."""


def check_max_pool(
    rank: int,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> PoolArgs:
    """Arguments of ``tritune.max_pool{rank}d``, normalised. Raises what torch raises, in torch's order."""
    fn = f"max_pool{rank}d_with_indices" if return_indices else f"max_pool{rank}d"
    _check_tensor(fn, 1, "input", input)
    return _max_pool(rank, fn, input, input.dtype, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def check_avg_pool(
    rank: int,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> PoolArgs:
    """Arguments of ``tritune.avg_pool{rank}d``, normalised; that of one dimension has no ``divisor_override``."""
    _check_tensor(f"avg_pool{rank}d", 1, "input", input)
    return _avg_pool(
        rank, input, input.dtype, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def check_lp_pool(
    rank: int,
    input: Tensor,
    norm_type: float,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> PoolArgs:
    """Arguments of ``tritune.lp_pool{rank}d``, normalised: those of the pooling of powers that torch composes it of."""
    fn = f"lp_pool{rank}d"
    _check_tensor(fn, 1, "input", input)
    if type(kernel_size) is not int and rank > 1:
        _check_unpacks(fn, rank, kernel_size)
    dtype = input.dtype
    if type(norm_type) is not int and type(norm_type) is not float and not isinstance(norm_type, Number):
        raise TypeError(_text_argument_type(fn, 2, "norm_type", "Number", norm_type))
    is_maximum = isinstance(norm_type, float) and math.isinf(norm_type)  # as torch: not numpy's float32
    is_usual = type(norm_type) is float or (type(norm_type) is int and -(2**63) <= norm_type < 2**63)
    if not (is_usual and dtype in _FLOATING) and not _is_left_to_torch(input):
        dtype = _dtype_of_powers(dtype, norm_type, is_maximum)
    if is_maximum:
        return _max_pool(rank, f"max_pool{rank}d", input, dtype, kernel_size, stride, 0, 1, ceil_mode, False)
    args = _avg_pool(rank, input, dtype, kernel_size, stride, 0, ceil_mode, True, None)
    if norm_type == 0:
        raise ZeroDivisionError(f"float division by zero: {fn}() takes a root, so norm_type must not be {norm_type}")
    return args


def check_adaptive_pool(rank: int, kind: str, input: Tensor, output_size: Any, return_indices: bool = False) -> Ints:
    """Arguments of ``tritune.adaptive_{kind}_pool{rank}d``: the size of the output, None replaced by the input's.

    ``return_indices`` changes nothing: it is here so that all of the function's arguments can be passed on.
    """
    fn = f"adaptive_{kind}_pool{rank}d"
    _check_tensor(fn, 1, "input", input)
    shape = tuple(input.shape)
    if rank > 1 and type(output_size) is not int:
        output_size = _filled_in(output_size, shape)
    sizes = _int_list(fn, 2, "output_size", output_size, rank)
    if rank == 1:
        _check_lines(fn, shape, (("output_size", sizes),))
    if kind == "avg":
        _check_adaptive_avg(rank, input, shape, sizes)
    else:
        _check_adaptive_max(rank, input, shape, sizes)
    return sizes


def check_max_unpool(
    rank: int,
    input: Tensor,
    indices: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    output_size: Sequence[int] | None = None,
) -> PoolArgs:
    """Arguments of ``tritune.max_unpool{rank}d``, normalised. Indices outside the output are not seen here."""
    fn = f"max_unpool{max(rank, 2)}d"  # torch's own name for its function of one dimension
    _check_tensor(fn, 1, "input", input)
    _check_tensor(fn, 2, "indices", indices)
    kernel = _unpool_ints(fn, 3, "kernel_size", kernel_size, rank)
    step = kernel if stride is None else _unpool_ints(fn, 4, "stride", stride, rank)
    pad = _unpool_ints(fn, 5, "padding", padding, rank)
    sizes = _unpool_sizes(fn, tuple(input.shape), kernel, step, pad, output_size)
    _check_unpool(rank, input, indices, sizes, step, pad)
    return PoolArgs(kernel, step, pad, (1,) * rank, False, sizes, False)


def check_global_pool(kind: str, input: Tensor, keepdim: bool, recorded: bool = False) -> None:
    """Arguments of ``tritune.global_{kind}_pool``, which torch does not have. Nothing is asked of a size that is
    ``recorded``."""
    fn = f"global_{kind}_pool"
    _check_tensor(fn, 1, "input", input)
    if keepdim is not True and keepdim is not False:
        raise TypeError(_text_argument_type(fn, 2, "keepdim", "bool", keepdim))
    shape = tuple(input.shape)
    if not 3 <= len(shape) <= 5:
        raise RuntimeError(f"{fn}(): expected input of 3 to 5 dimensions, [N, C, ...], but got {list(shape)}")
    if 0 in (filter(_is_static, shape[1:]) if recorded else shape[1:]):
        raise RuntimeError(f"{fn}(): expected at least one channel and one element in each, but got {list(shape)}")
    if input.dtype not in _FLOATING and not _is_left_to_torch(input):
        raise NotImplementedError(f"{fn}() takes floating-point tensors, not {input.dtype}")


# -- fixed windows -----------------------------------------------------------------------------------------------------


def _max_pool(
    rank: int,
    fn: str,
    input: Tensor,
    dtype: torch.dtype,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: bool,
) -> PoolArgs:
    kernel = _int_list(fn, 2, "kernel_size", kernel_size, rank)
    step = kernel if stride is None else _int_list(fn, 3, "stride", stride, rank) or kernel
    pad = _int_list(fn, 4, "padding", padding, rank)
    dilate = _int_list(fn, 5, "dilation", dilation, rank)
    if ceil_mode is not True and ceil_mode is not False:
        raise TypeError(_text_argument_type(fn, 6, "ceil_mode", "bool", ceil_mode))

    shape = tuple(input.shape)
    if rank == 1 and not return_indices:
        output_size = _max_pool1d_output_size(shape, kernel, step, pad, dilate, ceil_mode)
    else:
        lists = (("kernel_size", kernel), ("stride", step), ("padding", pad), ("dilation", dilate))
        if rank == 1:
            _check_lines("max_pool1d", shape, lists)
        kernel, step, pad, dilate = _per_dimension("max", rank, lists)
        dims = len(shape)
        if dims != rank + 1 and dims != rank + 2:
            raise RuntimeError(_text_max_ndim(rank, input))
        if rank == 3 and dims == 4 and _is_channels_last(input):
            raise RuntimeError(_text_max_ndim(rank, input))
        output_size = _output_size("max", shape, kernel, step, pad, dilate, ceil_mode)
    if dtype not in (_MAX_DTYPES if rank > 1 or return_indices else _FLOATING) and not _is_left_to_torch(input):
        kernel_name = "max_pool1d_impl" if rank == 1 and not return_indices else _kernel_name("max_pool", rank, input)
        raise NotImplementedError(_text_dtype(kernel_name, f"max_pool{rank}d", input, dtype))

    has_empty_window = False
    if max(dilate) > 1 and max(pad) > 0:
        has_empty_window = _may_have_empty_window(shape, kernel, step, pad, dilate, ceil_mode)
        if has_empty_window and return_indices and all(map(_is_static, shape[-rank:])):
            raise RuntimeError(_text_empty_window(rank, shape, kernel, pad, dilate))
    return PoolArgs(kernel, step, pad, dilate, ceil_mode, output_size, has_empty_window)


def _avg_pool(
    rank: int,
    input: Tensor,
    dtype: torch.dtype,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: Any,
) -> PoolArgs:
    fn = f"avg_pool{rank}d"
    kernel = _int_list(fn, 2, "kernel_size", kernel_size, rank)
    step = kernel if stride is None else _int_list(fn, 3, "stride", stride, rank) or kernel
    pad = _int_list(fn, 4, "padding", padding, rank)
    if ceil_mode is not True and ceil_mode is not False:
        raise TypeError(_text_argument_type(fn, 5, "ceil_mode", "bool", ceil_mode))
    if count_include_pad is not True and count_include_pad is not False:
        raise TypeError(_text_argument_type(fn, 6, "count_include_pad", "bool", count_include_pad))
    if divisor_override is not None:
        divisor_override = _int(fn, 7, "divisor_override", divisor_override)

    shape = tuple(input.shape)
    lists = (("kernel_size", kernel), ("stride", step), ("padding", pad))
    if rank == 1:
        _check_lines(fn, shape, lists)
    kernel, step, pad = _per_dimension("avg", rank, lists)
    dilate = (1,) * rank
    if rank == 3 and len(shape) != 4 and len(shape) != 5:
        raise RuntimeError(_text_ndim(rank, shape))
    if divisor_override == 0:
        raise RuntimeError("divisor must be not zero, but got divisor_override=0")
    if rank == 2 and len(shape) < 3:
        raise IndexError(_text_no_dimension(len(shape)))
    output_size = _output_size("avg", shape, kernel, step, pad, dilate, ceil_mode)
    if dtype not in _AVG_DTYPES and not _is_left_to_torch(input):
        kernel_name = "avg_pool3d_out_frame" if rank == 3 else _kernel_name("avg_pool", rank, input)
        raise NotImplementedError(_text_dtype(kernel_name, fn, input, dtype))
    return PoolArgs(kernel, step, pad, dilate, ceil_mode, output_size, False)


def _per_dimension(kind: str, rank: int, lists: tuple[tuple[str, Ints], ...]) -> list[Ints]:
    expanded: list[Ints] = []
    for name, values in lists:
        count = len(values)
        if count != rank and count != 1:
            raise RuntimeError(_text_list(kind, rank, name, values))
        for value in values:
            if not _INT32_MIN <= value <= _INT32_MAX:
                raise RuntimeError(_text_int32(name, values))
        expanded += [values if count == rank else values * rank]
    return expanded


def _check_lines(fn: str, shape: Ints, lists: tuple[tuple[str, Ints], ...]) -> None:
    """What torch checks before it pools lines as images of one row."""
    if len(shape) != 2 and len(shape) != 3:
        raise RuntimeError(_text_line_ndim(fn, shape))
    for name, values in lists:
        if len(values) != 1:
            raise RuntimeError(
                f"{fn}() argument '{name}' should contain one int (got {len(values)}): {name}={list(values)}"
            )


def _max_pool1d_output_size(
    shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> Ints:
    if (len(shape) != 2 and len(shape) != 3) or 0 in shape[-2:]:
        raise RuntimeError(_text_max_pool1d_shape(shape))
    for name, values in (("kernel_size", kernel), ("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(values) != 1:
            raise RuntimeError(_text_max_pool1d_list(name, values))
    taps, step, pad, dil = kernel[0], stride[0], padding[0], dilation[0]
    if taps <= 0:
        raise RuntimeError(f"max_pool1d() kernel_size must be greater than zero, but got {taps}")
    if step <= 0:
        raise RuntimeError(f"max_pool1d() stride must be greater than zero, but got {step}")
    if pad < 0:
        raise RuntimeError(f"max_pool1d() padding must be non-negative, but got {pad}")
    if pad > taps // 2:
        raise RuntimeError(_text_max_pool1d_padding(taps, pad))
    if dil <= 0:
        raise RuntimeError(f"max_pool1d() dilation must be greater than zero, but got {dil}")
    size = pool_output_size(shape[-1], taps, step, pad, dil, ceil_mode)
    if size < 1:
        raise RuntimeError(f"max_pool1d() Invalid computed output size: {size}")
    for name, value in (("kernel_size", taps), ("stride", step), ("dilation", dil)):
        if value > _INT32_MAX:  # torch takes them here, but not where it needs indices or gradients
            raise RuntimeError(_text_int32(name, (value,)))
    return (size,)


def _output_size(
    kind: str, shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> Ints:
    rank = len(kernel)
    if rank == 1:  # an image of one row
        shape, padding = _as_rows(rank, shape), (0, *padding)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    windows = zip(shape[-len(kernel) :], kernel, stride, padding, dilation, strict=True)
    output_size = tuple([pool_output_size(*window, ceil_mode) for window in windows])
    _check_windows(kind, shape, kernel, stride, padding, dilation, output_size)
    return output_size[-rank:]


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


def _check_windows(
    kind: str, shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, output_size: Ints
) -> None:
    rank, dims = len(kernel), len(shape)
    if min(kernel) <= 0:
        raise RuntimeError(f"kernel size should be greater than zero, but got {_by_side('k', kernel)}")
    if min(stride) <= 0:
        raise RuntimeError(f"stride should be greater than zero, but got {_by_side('d', stride)}")
    if min(dilation) <= 0:
        raise RuntimeError(f"dilation should be greater than zero, but got {_by_side('dilation', dilation)}")
    if (dims != rank + 1 and dims != rank + 2) or 0 in shape[-rank - 1 :]:
        raise RuntimeError(_text_no_elements(kind, rank, shape))
    if kind == "avg" and rank == 3 and (shape[-3] < kernel[0] or shape[-2] < kernel[1] or shape[-1] < kernel[2]):
        raise RuntimeError(_text_input_too_small(shape, kernel))
    for taps, pad in zip(kernel, padding, strict=True):
        if taps // 2 < pad:
            raise RuntimeError(_text_pad_half(kernel, padding))
    for size in output_size:
        if size < 1:
            raise RuntimeError(_text_output_too_small(shape, output_size))


def _may_have_empty_window(
    shape: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> bool:
    """Whether some window of a legal call has all its taps in the padding, in some dimension.

    A window that starts inside the input has a tap there, and one that starts at ``start < 0`` has its first tap from
    0 on at ``start % dilation`` (padding is at most kernel / 2, so it is reached). That tap lies beyond the input only
    if ``dilation > size``. Put into "the output has at least one element" this leaves the static condition below.
    """
    for size, taps, step, pad, dil in zip(shape[-len(kernel) :], kernel, stride, padding, dilation, strict=True):
        slack = step - 1 if ceil_mode else 0
        if pad == 0 or dil == 1 or dil * (2 - taps) + 2 * pad - 2 + slack < 0:
            continue
        if not _is_static(size):
            return True  # cannot be known without a guard
        if dil > size and any(start % dil >= size for start in range(-pad, 0, step)):
            return True
    return False


# -- powers ------------------------------------------------------------------------------------------------------------


def _check_unpacks(fn: str, rank: int, kernel_size: Any) -> None:
    """torch unpacks ``kernel_size`` into as many names as there are dimensions."""
    if not isinstance(kernel_size, Iterable):
        return
    try:
        if rank == 2:
            _, _ = kernel_size
        else:
            _, _, _ = kernel_size
    except ValueError as error:
        raise ValueError(f"{error}: {fn}() takes kernel_size as {_NUMERALS[rank]}, not {kernel_size}") from None


def _dtype_of_powers(dtype: torch.dtype, norm_type: Any, is_maximum: bool) -> torch.dtype:
    """torch itself says which powers and absolute values exist, and of what dtype: it is asked for those of nothing."""
    nothing = torch.empty(0, dtype=dtype, device="cpu")
    if not is_maximum:
        return nothing.pow(norm_type).dtype
    return nothing.abs().dtype if norm_type > 0 else (-nothing.abs()).dtype


# -- adaptive windows --------------------------------------------------------------------------------------------------


def _filled_in(output_size: Any, shape: Ints) -> Any:
    """torch's ``_list_with_default``: any sized iterable, whose entries may be None."""
    if isinstance(output_size, (int, torch.SymInt)):
        return output_size
    count = len(output_size)
    if len(shape) <= count:
        raise ValueError(f"Input dimension should be at least {count + 1}, but got input of size {list(shape)}")
    defaults = shape[len(shape) - count :]
    return [default if size is None else size for size, default in zip(output_size, defaults, strict=True)]


def _check_adaptive_avg(rank: int, input: Tensor, shape: Ints, sizes: Ints) -> None:
    fn = f"adaptive_avg_pool{max(rank, 2)}d"
    if len(sizes) != rank:
        raise RuntimeError(f"{fn}: output_size must be {rank}, but got {list(sizes)}")
    if min(sizes) < 0:
        raise RuntimeError(_text_adaptive_negative(fn, sizes))
    if rank == 3 and 0 in shape[1:]:
        raise RuntimeError(_text_adaptive_empty(fn, shape, 1))
    if len(shape) != rank + 1 and len(shape) != rank + 2:
        raise RuntimeError(f"{fn}(): Expected {rank + 1}D or {rank + 2}D tensor, but got {list(shape)}")
    if 0 in shape[-rank:]:  # it may have no channels
        raise RuntimeError(_text_adaptive_empty(fn, _as_rows(rank, shape), -rank))
    is_mean = sizes == (1,) * rank
    if input.dtype not in (_MEAN_DTYPES if is_mean else _FLOATING) and not _is_left_to_torch(input):
        raise _adaptive_avg_dtype_error(rank, input, is_mean)


def _adaptive_avg_dtype_error(rank: int, input: Tensor, is_mean: bool) -> Exception:
    fn = f"adaptive_avg_pool{rank}d"
    if not is_mean:
        kernel_name = "adaptive_avg_pool3d_cpu" if rank == 3 else _kernel_name("adaptive_avg_pool", rank, input)
        return NotImplementedError(_text_dtype(kernel_name, fn, input, input.dtype))
    if input.is_floating_point() or input.is_complex():
        return NotImplementedError(_text_dtype("sum_cpu", fn, input, input.dtype))
    return RuntimeError(
        "mean(): could not infer output dtype. Input dtype must be either a floating point or complex dtype. "
        f"Got: {_scalar_name(input)}"
    )


def _check_adaptive_max(rank: int, input: Tensor, shape: Ints, sizes: Ints) -> None:
    fn = f"adaptive_max_pool{rank}d"
    if len(shape) != rank + 1 and len(shape) != rank + 2:
        raise RuntimeError(f"{fn}(): Expected {rank + 1}D or {rank + 2}D tensor, but got: {list(shape)}")
    if 0 in shape[1:]:
        raise RuntimeError(_text_adaptive_empty(fn, shape, 1))
    if len(sizes) != rank:
        raise RuntimeError(
            f"{fn}(): internal error: output_size.size() must be {rank}, but got output_size={list(sizes)}"
        )
    if min(sizes) < 0:
        raise RuntimeError(_text_negative_size(_as_rows(rank, (*shape[:-rank], *sizes))))
    if input.dtype not in _FLOATING and not _is_left_to_torch(input):
        kernel_name = "adaptive_max_pool3d_cpu" if rank == 3 else _kernel_name("adaptive_max_pool", rank, input)
        raise NotImplementedError(_text_dtype(kernel_name, fn, input, input.dtype))


# -- unpooling ---------------------------------------------------------------------------------------------------------


def _unpool_ints(fn: str, position: int, name: str, value: Any, rank: int) -> Ints:
    """torch repeats what cannot be iterated and then computes with whatever it is; only ints pass here."""
    if type(value) is int:
        return (value,) * rank
    if not isinstance(value, Iterable):
        return _int_list(fn, position, name, value, rank)
    ints = []
    for item in value:
        index = _as_index(item)
        if index is None:
            raise TypeError(_text_argument_type(fn, position, name, "tuple of ints", value) + f": {value!r}")
        ints.append(index)
    return tuple(ints)


def _unpool_sizes(fn: str, shape: Ints, kernel: Ints, stride: Ints, padding: Ints, output_size: Any) -> Ints:
    """The spatial sizes of the output as torch's Python code finds them: for as many dimensions as the kernel has."""
    count = len(kernel)
    if len(shape) < count or len(stride) < count or len(padding) < count:
        raise IndexError(_text_unpool_lists(fn, shape, kernel, stride, padding))
    sizes: Any = tuple([(shape[i - count] - 1) * stride[i] + kernel[i] - 2 * padding[i] for i in range(count)])
    if output_size is not None:
        default = sizes
        sizes = output_size[2:] if len(output_size) == count + 2 else output_size
        if len(sizes) != count:
            raise ValueError(
                f"output_size should be a sequence containing {count} or {count + 2} elements, "
                f"but it has a length of '{len(sizes)}'"
            )
        for i, size in enumerate(sizes):
            if not default[i] - stride[i] < size < default[i] + stride[i]:
                raise ValueError(_text_unpool_size(sizes, i, default, stride))
    for i, size in enumerate(sizes):
        if size < 0:
            raise ValueError(
                "max_unpooling: output_size must contain non-negative spatial dimensions, "
                f"but got output_size[{i}]={size}"
            )
    return _int_list(fn, 3, "output_size", sizes, count)


def _check_unpool(rank: int, input: Tensor, indices: Tensor, sizes: Ints, stride: Ints, padding: Ints) -> None:
    if indices.dtype != torch.int64:
        got = "" if rank == 3 else f" but got: {_scalar_name(indices)}"
        raise RuntimeError(f"elements in indices should be type int64{got}")
    shape = tuple(input.shape)
    if rank < 3 and len(sizes) != rank:
        raise RuntimeError(_text_unpool_list(rank, "output_size", sizes))
    if len(shape) != rank + 1 and len(shape) != rank + 2:
        raise RuntimeError(_text_unpool_ndim(rank, shape))
    for name, values in (("output_size", sizes), ("stride", stride), ("padding", padding)):
        if len(values) != rank:
            raise RuntimeError(_text_unpool_list(rank, name, values))
    if tuple(indices.shape) != shape:
        raise RuntimeError(_text_unpool_shape(rank, shape, tuple(indices.shape)))
    if 0 in shape[1:]:
        raise RuntimeError(_text_unpool_empty(rank, shape))
    if rank == 3 and min(stride) <= 0:
        raise RuntimeError(f"strides should be greater than zero, but got stride: {list(stride)}")
    if indices.device != input.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, "
            f"but got indices is on {indices.device}, different from other tensors on {input.device}"
        )
    if input.dtype not in _FLOATING and not _is_left_to_torch(input):
        kernel_name = "max_unpool3d" if rank == 3 else _kernel_name("max_unpool", rank, input)
        raise NotImplementedError(_text_dtype(kernel_name, f"max_unpool{rank}d", input, input.dtype))


# -- texts -------------------------------------------------------------------------------------------------------------


def _is_channels_last(input: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        input.dim() in formats and not input.is_contiguous() and input.is_contiguous(memory_format=formats[input.dim()])
    )


def _kernel_name(name: str, rank: int, input: Tensor) -> str:
    """torch's CPU kernel. Lines are images of one row, and channels last has kernels of its own; but in unpooling lines
    are images of one column, and those are never channels last."""
    images = input
    if rank == 1 and name != "max_unpool":
        images = input.unsqueeze(-2)
    elif rank == 3 and input.dim() == 4:
        images = input.unsqueeze(0)
    return f"{name}{max(rank, 2)}d" + ("_channels_last" if _is_channels_last(images) else "")


def _text_dtype(kernel_name: str, fn: str, input: Tensor, dtype: torch.dtype) -> str:
    name = _scalar_name(input if dtype == input.dtype else torch.empty(0, dtype=dtype, device="cpu"))
    return f"\"{kernel_name}\" not implemented for '{name}': {fn} does not take {dtype}"


def _as_rows(rank: int, shape: Ints) -> Ints:
    return (*shape[:-1], 1, shape[-1]) if rank == 1 else shape


def _by_side(name: str, values: Ints) -> str:
    return " ".join(f"{name}{side}: {value}" for side, value in zip("THW"[-len(values) :], values, strict=True))


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _text_ndim(rank: int, shape: Ints) -> str:
    return (
        f"non-empty {rank + 1}D or {rank + 2}D (batch mode) tensor expected for input, "
        f"but got input of size {list(shape)}"
    )


def _text_max_ndim(rank: int, input: Tensor) -> str:
    if input.dim() == 7 - rank and _is_channels_last(input):
        formats = "ChannelsLast3d" if rank == 3 else "ChannelsLast"
        return f"Unsupported memory format. Supports only {formats}, Contiguous"
    return _text_ndim(rank, tuple(input.shape))


def _text_no_dimension(dims: int) -> str:
    if dims == 0:
        return "Dimension specified as -3 but tensor has no dimensions"
    return f"Dimension out of range (expected to be in range of [-{dims}, {dims - 1}], but got -3)"


def _text_line_ndim(fn: str, shape: Ints) -> str:
    return (
        f"Expected 2 to 3 dimensions, but got {len(shape)}-dimensional tensor for argument #1 'self' "
        f"(while checking arguments for {fn})"
    )


def _text_max_pool1d_shape(shape: Ints) -> str:
    return (
        "max_pool1d: Expected 2D or 3D (batch mode) tensor with optional 0 dim batch size for input, "
        f"but got:{list(shape)}"
    )


def _text_max_pool1d_list(name: str, values: Ints) -> str:
    forms = {
        "kernel_size": "an int, list of ints or tuple of ints",
        "stride": "None, an int, list of ints, or tuple of ints",
        "padding": "an int, list of ints, or tuple of ints",
        "dilation": "an int, list of ints or tuple of ints",
    }
    return f"max_pool1d() {name} must be {forms[name]} of size 1 but got size {len(values)}: {list(values)}"


def _text_max_pool1d_padding(kernel: int, padding: int) -> str:
    return (
        "max_pool1d() padding should be at most half of kernel size, "
        f"but got padding={padding} and kernel_size={kernel}"
    )


def _text_list(kind: str, rank: int, name: str, values: Ints) -> str:
    first = "be omitted, " if name == "stride" else "be "
    must = "must " + first if kind == "avg" and rank == 3 else f"must either {first}"
    if name == "dilation":
        must = "must be either "
    return f"{kind}_pool{rank}d: {name} {must}a single int, or a tuple of {_NUMERALS[rank]}, but got {list(values)}"


def _text_int32(name: str, values: Ints) -> str:
    return f"value cannot be converted to type int without overflow: {name}={list(values)}"


def _text_pad_effective(kernel: int, padding: int, dilation: int) -> str:
    return (
        f"pad should be at most half of effective kernel size, but got pad={padding}, "
        f"kernel_size={kernel} and dilation={dilation}"
    )


def _text_no_elements(kind: str, rank: int, shape: Ints) -> str:
    if rank == 2:
        return f"Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:{list(shape)}"
    fn = "max_pool3d_with_indices_out_cpu_template()" if kind == "max" else "avg_pool3d()"
    return (
        f"{fn}: Expected input's non-batch dimensions to have positive length, but input has a shape of {list(shape)} "
        "and non-batch dimension 0 has length zero!"
    )


def _text_input_too_small(shape: Ints, kernel: Ints) -> str:
    return f"input image ({_by_side('', shape[-3:])}) smaller than kernel size ({_by_side('k', kernel)})"


def _text_pad_half(kernel: Ints, padding: Ints) -> str:
    if len(kernel) == 2:
        got = f"padW = {padding[1]}, padH = {padding[0]}, kW = {kernel[1]}, kH = {kernel[0]}"
    else:
        got = " ".join(
            f"{name}{side}: {values['THW'.index(side)]}"
            for name, values in (("k", kernel), ("pad", padding))
            for side in "TWH"
        )
    return f"pad should be smaller than or equal to half of kernel size, but got {got}"


def _text_output_too_small(shape: Ints, output_size: Ints) -> str:
    channels, *size = shape[-len(output_size) - 1 :]
    return (
        f"Given input size: ({_by((channels, *size))}). "
        f"Calculated output size: ({_by((channels, *output_size))}). Output size is too small"
    )


def _text_empty_window(rank: int, shape: Ints, kernel: Ints, padding: Ints, dilation: Ints) -> str:
    return (
        f"max_pool{rank}d: no return_indices=True where a window lies wholly in the padding and so has no index: "
        f"input size {shape[-rank:]}, kernel_size={kernel}, padding={padding}, dilation={dilation}"
    )


def _text_adaptive_negative(fn: str, sizes: Ints) -> str:
    got = (
        f"{{{sizes[0]}, {sizes[1]},{sizes[2]}}}" if len(sizes) == 3 else f"{{{', '.join(map(str, (1, *sizes)[-2:]))}}}"
    )
    return f"{fn}: elements of output_size must be greater than or equal to 0 but received {got}"


def _text_adaptive_empty(fn: str, shape: Ints, first: int) -> str:
    return (
        f"{fn}(): Expected input to have non-zero size for non-batch dimensions, "
        f"but input has sizes {list(shape)} with dimension {shape.index(0, first)} being empty"
    )


def _text_negative_size(shape: Ints) -> str:
    return f"Trying to create tensor with negative dimension {next(s for s in shape if s < 0)}: {list(shape)}"


def _text_unpool_lists(fn: str, shape: Ints, kernel: Ints, stride: Ints, padding: Ints) -> str:
    return (
        f"tuple index out of range: {fn}() got input of size {list(shape)}, "
        f"kernel_size={kernel}, stride={stride}, padding={padding}"
    )


def _text_unpool_size(sizes: Any, dim: int, default: Ints, stride: Ints) -> str:
    low, high = default[dim] - stride[dim], default[dim] + stride[dim]
    return f'invalid output_size "{sizes}" (dim {dim} must be between {low} and {high})'


def _text_unpool_list(rank: int, name: str, values: Ints) -> str:
    if rank == 3:
        colon = "" if name == "output_size" else ":"
        return (
            f"There should be exactly three elements (depth, height, width) in {name}, "
            f"but got{colon} {len(values)} elements."
        )
    count = len(values) + (1 if rank == 1 else 0)  # torch sees the rows of one dimension as images
    return f"There should be exactly two elements (height, width) in {name}, but got {count} elements."


def _text_unpool_ndim(rank: int, shape: Ints) -> str:
    seen = max(rank, 2)
    dims = len(shape) + (seen - rank)
    return (
        f"Input to max_unpooling{seen}d should be a {seen + 1}d or {seen + 2}d Tensor, "
        f"but got a tensor with {dims} dimensions."
    )


def _text_unpool_shape(rank: int, shape: Ints, indices: Ints) -> str:
    column = [1] if rank == 1 else []
    return (
        f"Expected shape of indices to be same as that of the input tensor ({[*shape, *column]}) "
        f"but got indices tensor with shape: {[*indices, *column]}"
    )


def _text_unpool_empty(rank: int, shape: Ints) -> str:
    seen = (*shape, 1) if rank == 1 else shape
    return (
        f"max_unpooling{max(rank, 2)}d_forward_out_cpu(): "
        "Expected input to have non-zero size for non-batch dimensions, "
        f"but got {list(seen)} with dimension {shape.index(0, 1)} being empty."
    )
