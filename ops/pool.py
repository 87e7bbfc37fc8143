"""Pooling of 1, 2 and 3 dimensions: public functions, and the choice of backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from . import pool_checks
from ._checks import Size
from ._dispatch import Ruling, are_plain, choose, is_jit_tracing, measured, torch_errors
from ._layout import empty, is_channels_last
from ._register import requires_grad, run_operator
from .pool_checks import Ints, PoolArgs
from .pool_operators import (
    ADAPTIVE,
    OP_AVG,
    OP_LP,
    OP_MAX,
    OP_MAX_WITH_INDICES,
    OP_UNPOOL,
    Windows,
    kernel_window,
    offset_dtype,
)
from .pool_torch import (
    KNOWS_INFINITE_NORMS,
    TORCH_FUNCTIONS,
    lacks_a_kernel,
    lp_root,
    max_of_padded,
    torch_adaptive,
    torch_avg,
    torch_first,
    torch_unpool,
)

FUSED_NORMS = (1, 2)


# What torch does in an order that changes from run to run on a GPU: the backward of all of these, and the forward of
# the three max_unpool functions, too.
NONDETERMINISTIC = (
    "max_pool3d", "avg_pool3d", "lp_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "max_unpool1d", "max_unpool2d", "max_unpool3d",
)  # fmt: skip


# --- maximum over fixed windows --------------------------------------------------------------------------------------


def max_pool1d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """1-d max pooling: :func:`max_pool2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.max_pool1d`: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``.

    Example::

        >>> tritune.max_pool1d(torch.randn(2, 16, 100), 4).shape
        torch.Size([2, 16, 25])
    """
    return max_pool(max_pool1d, 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    r"""Maximum over windows of ``kernel_size``, with torch's rules for ties, NaN and -inf.

    .. math:: y_{ncpq} = \max_{r,s} x_{n,c,p\,stride + r\,dilation - padding, q\,stride + s\,dilation - padding}

    A drop-in for :func:`torch.nn.functional.max_pool2d`. For backward it keeps the winner's place in the window, one
    byte for windows of up to 254 elements, where torch keeps an int64; backward gathers, so it is deterministic.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; contiguous and channels last are read in place.
        kernel_size, stride, padding, dilation, ceil_mode: as in torch; ``stride`` defaults to ``kernel_size``.
        return_indices: also return where each maximum lies in its plane, ``h * W + w`` as int64.

    Returns:
        ``[N, C, P, Q]`` in the dtype and memory format of ``input``; with ``return_indices`` a pair.

    Raises:
        RuntimeError, TypeError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> tritune.max_pool2d(torch.randn(8, 64, 112, 112), 3, stride=2, padding=1).shape
        torch.Size([8, 64, 56, 56])
    """
    return max_pool(max_pool2d, 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, dilation: Size = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    """3-d max pooling: :func:`max_pool2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.max_pool3d`, but with a deterministic backward: ``[N, C, D, H, W]`` or
    ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``; indices are ``(d * H + h) * W + w``.

    Example::

        >>> tritune.max_pool3d(torch.randn(1, 8, 4, 16, 16), (1, 2, 2)).shape
        torch.Size([1, 8, 4, 8, 8])
    """
    return max_pool(max_pool3d, 3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


# --- mean over fixed windows -----------------------------------------------------------------------------------------


def avg_pool1d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:  # fmt: skip
    """1-d average pooling: :func:`avg_pool2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.avg_pool1d`: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``.

    Example::

        >>> tritune.avg_pool1d(torch.tensor([[1., 2., 3., 4., 5., 6., 7.]]), 3, stride=2)
        tensor([[2., 4., 6.]])
    """
    return _avg_pool(avg_pool1d, 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    r"""Mean over windows of ``kernel_size``.

    .. math:: y_{ncpq} = \frac{1}{D_{pq}} \sum_{r,s} x_{n,c,p\,stride + r - padding, q\,stride + s - padding}

    where :math:`D` is ``divisor_override``, or the number of the window's elements: those in the image, and with
    ``count_include_pad`` those in the padding. What ``ceil_mode`` adds beyond the padding never counts. A drop-in for
    :func:`torch.nn.functional.avg_pool2d`; sums are in fp32 and rounded once, backward gathers.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; contiguous and channels last are read in place.
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in torch.

    Returns:
        ``[N, C, P, Q]`` in the dtype and memory format of ``input``.

    Raises:
        RuntimeError, TypeError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> tritune.avg_pool2d(torch.ones(1, 1, 4, 4), 3, padding=1, count_include_pad=False)
        tensor([[[[1.]]]])
    """
    return _avg_pool(avg_pool2d, 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """3-d average pooling: :func:`avg_pool2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.avg_pool3d`, but with a deterministic backward: ``[N, C, D, H, W]`` or
    ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``.

    Example::

        >>> tritune.avg_pool3d(torch.randn(1, 8, 4, 16, 16), 2).shape
        torch.Size([1, 8, 2, 8, 8])
    """
    return _avg_pool(avg_pool3d, 3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


# --- power averages --------------------------------------------------------------------------------------------------


def lp_pool1d(
    input: Tensor, norm_type: int | float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """1-d power-average pooling: :func:`lp_pool2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.lp_pool1d`: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``.

    Example::

        >>> tritune.lp_pool1d(torch.tensor([[3., 4., 6., 8.]]), 2, 2)
        tensor([[ 5., 10.]])
    """
    return _lp_pool(lp_pool1d, 1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor, norm_type: int | float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    r"""Power average over windows of ``kernel_size``.

    .. math:: y_{ncpq} = \Bigl(\sum_{r,s} x_{n,c,p\,stride + r, q\,stride + s}^{norm}\Bigr)^{1/norm}

    A drop-in for :func:`torch.nn.functional.lp_pool2d`, its details included: the sum is the window's size times its
    mean, the powers are of ``x``, not of ``|x|``, and where the sum is zero the gradient is zero. Norms 1 and 2 are one
    pass over memory, in fp32; others are a power, :func:`avg_pool2d` and a power, infinite ones :func:`max_pool2d`.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; contiguous and channels last are read in place.
        norm_type, kernel_size, stride, ceil_mode: as in torch.

    Returns:
        ``[N, C, P, Q]`` in the dtype and memory format of ``input``.

    Raises:
        RuntimeError, TypeError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> tritune.lp_pool2d(torch.ones(1, 1, 4, 4), 2, 2)
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    return _lp_pool(lp_pool2d, 2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor, norm_type: int | float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> Tensor:
    """3-d power-average pooling: :func:`lp_pool2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.lp_pool3d`: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, C, Z, P, Q]``
    or ``[C, Z, P, Q]``.

    Example::

        >>> tritune.lp_pool3d(torch.randn(1, 8, 4, 16, 16), 2, 2).shape
        torch.Size([1, 8, 2, 8, 8])
    """
    return _lp_pool(lp_pool3d, 3, input, norm_type, kernel_size, stride, ceil_mode)


# --- adaptive and global windows -------------------------------------------------------------------------------------


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """1-d adaptive max pooling: :func:`adaptive_max_pool2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.adaptive_max_pool1d`.

    Example::

        >>> tritune.adaptive_max_pool1d(torch.randn(2, 16, 100), 7).shape
        torch.Size([2, 16, 7])
    """
    return _adaptive_max_pool(adaptive_max_pool1d, 1, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    r"""Maximum over windows of which ``output_size`` cover each plane.

    .. math:: y_{ncpq} = \max_{h,w} x_{nchw}, \quad \lfloor p H / P \rfloor \le h < \lceil (p + 1) H / P \rceil,
              \quad \lfloor q W / Q \rfloor \le w < \lceil (q + 1) W / Q \rceil

    A drop-in for :func:`torch.nn.functional.adaptive_max_pool2d`, but with a deterministic backward. The rules for
    ties, NaN and -inf, and what is kept for backward, are those of :func:`max_pool2d`.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; contiguous and channels last are read in place.
        output_size: ``P, Q``, or one number for both; ``None`` keeps the input's size.
        return_indices: also return where each maximum lies in its plane, ``h * W + w`` as int64.

    Returns:
        ``[N, C, P, Q]`` in the dtype and memory format of ``input``; with ``return_indices`` a pair.

    Raises:
        RuntimeError, TypeError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> tritune.adaptive_max_pool2d(torch.randn(8, 64, 13, 17), (7, None)).shape
        torch.Size([8, 64, 7, 17])
    """
    return _adaptive_max_pool(adaptive_max_pool2d, 2, input, output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """3-d adaptive max pooling: :func:`adaptive_max_pool2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.adaptive_max_pool3d`.

    Example::

        >>> tritune.adaptive_max_pool3d(torch.randn(1, 8, 9, 14, 14), (1, 7, 7)).shape
        torch.Size([1, 8, 1, 7, 7])
    """
    return _adaptive_max_pool(adaptive_max_pool3d, 3, input, output_size, return_indices)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """1-d adaptive average pooling: :func:`adaptive_avg_pool2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.adaptive_avg_pool1d`.

    Example::

        >>> tritune.adaptive_avg_pool1d(torch.tensor([[0., 1., 2.]]), 5)
        tensor([[0.0000, 0.5000, 1.0000, 1.5000, 2.0000]])
    """
    return _adaptive_avg_pool(adaptive_avg_pool1d, 1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    r"""Mean over the windows of :func:`adaptive_max_pool2d`, of which ``output_size`` cover each plane.

    A drop-in for :func:`torch.nn.functional.adaptive_avg_pool2d`, but with a deterministic backward. Sums are in fp32
    and rounded once.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; contiguous and channels last are read in place.
        output_size: ``P, Q``, or one number for both; ``None`` keeps the input's size.

    Returns:
        ``[N, C, P, Q]`` in the dtype and memory format of ``input``.

    Raises:
        RuntimeError, TypeError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> tritune.adaptive_avg_pool2d(torch.randn(8, 512, 13, 17), 7).shape
        torch.Size([8, 512, 7, 7])
    """
    return _adaptive_avg_pool(adaptive_avg_pool2d, 2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """3-d adaptive average pooling: :func:`adaptive_avg_pool2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.adaptive_avg_pool3d`.

    Example::

        >>> tritune.adaptive_avg_pool3d(torch.randn(1, 8, 9, 14, 14), (None, 7, 7)).shape
        torch.Size([1, 8, 9, 7, 7])
    """
    return _adaptive_avg_pool(adaptive_avg_pool3d, 3, input, output_size)


def global_avg_pool(input: Tensor, keepdim: bool = True) -> Tensor:
    """Mean over all dimensions behind the channels, in fp32, rounded once.

    Args:
        input: ``[N, C, L]``, ``[N, C, H, W]`` or ``[N, C, D, H, W]``; contiguous and channels last are read in place.
        keepdim: keep those dimensions, with size 1.

    Returns:
        ``[N, C, 1, 1]`` (of the input's rank), or ``[N, C]`` without ``keepdim``.

    Example::

        >>> tritune.global_avg_pool(torch.randn(8, 2048, 7, 7), keepdim=False).shape
        torch.Size([8, 2048])
    """
    if has_torch_function_unary(input):
        overridden: Tensor = handle_torch_function(global_avg_pool, (input,), input, keepdim)
        return overridden
    errors = torch_errors(input)
    pool_checks.check_global_pool("avg", input, keepdim, recorded=errors == ())
    rank = input.dim() - 2
    composite = partial(torch_adaptive("avg", rank), input, 1)
    if errors is not None:
        y = composite()
    else:
        y = _serve_mean("global_avg_pool", rank, input, (1,) * rank, ADAPTIVE, True, 0, composite)
    return y if keepdim else y.flatten(1)


def global_max_pool(input: Tensor, keepdim: bool = True) -> Tensor:
    """Maximum over all dimensions behind the channels; a NaN wins. The gradient goes to the first of equal maxima.

    Args:
        input: ``[N, C, L]``, ``[N, C, H, W]`` or ``[N, C, D, H, W]``; contiguous and channels last are read in place.
        keepdim: keep those dimensions, with size 1.

    Returns:
        ``[N, C, 1, 1]`` (of the input's rank), or ``[N, C]`` without ``keepdim``.

    Example::

        >>> tritune.global_max_pool(torch.randn(8, 64, 28, 28)).shape
        torch.Size([8, 64, 1, 1])
    """
    if has_torch_function_unary(input):
        overridden: Tensor = handle_torch_function(global_max_pool, (input,), input, keepdim)
        return overridden
    errors = torch_errors(input)
    pool_checks.check_global_pool("max", input, keepdim, recorded=errors == ())
    rank = input.dim() - 2
    composite = partial(torch_adaptive("max", rank), input, 1)
    y: Tensor
    if errors is not None:
        y = composite()
    else:
        y = _serve_max("global_max_pool", rank, input, (1,) * rank, ADAPTIVE, False, composite)
    return y if keepdim else y.flatten(1)


# --- unpooling -------------------------------------------------------------------------------------------------------


def max_unpool1d(
    input: Tensor, indices: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
    output_size: Any = None,
) -> Tensor:  # fmt: skip
    """1-d unpooling: :func:`max_unpool2d` with one dimension of space.

    A drop-in for :func:`torch.nn.functional.max_unpool1d`, but deterministic.

    Example::

        >>> y, indices = tritune.max_pool1d(torch.tensor([[1., 4., 3., 2.]]), 2, return_indices=True)
        >>> tritune.max_unpool1d(y, indices, 2)
        tensor([[0., 4., 3., 0.]])
    """
    return _max_unpool(max_unpool1d, 1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor, indices: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
    output_size: Any = None,
) -> Tensor:  # fmt: skip
    r"""Puts each element where ``indices`` says, and zeros elsewhere: a partial inverse of :func:`max_pool2d`.

    .. math:: y_{n,c,\lfloor i / W \rfloor, i \bmod W} = x_{ncpq}, \quad i = \mathrm{indices}_{ncpq}

    A drop-in for :func:`torch.nn.functional.max_unpool2d`, but deterministic: of several elements with one index the
    last is written, as torch does on a CPU. Each output looks at the windows over it; any other index is legal, too,
    and found by a second pass, which is slow where there are many of them.

    Args:
        input: ``[N, C, P, Q]`` or ``[C, P, Q]``.
        indices: int64, of the same shape: places ``h * W + w`` in the result. The kernels leave out one that lies
            outside of it; on the CPU it is torch's error.
        kernel_size, stride, padding: of the pooling.
        output_size: sizes in space of the result, or its whole shape; by default the smallest that the pooling fits.

    Returns:
        ``[N, C, H, W]`` in the dtype and memory format of ``input``.

    Raises:
        RuntimeError, TypeError, ValueError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> y, indices = tritune.max_pool2d(torch.randn(8, 64, 32, 32), 2, return_indices=True)
        >>> tritune.max_unpool2d(y, indices, 2).shape
        torch.Size([8, 64, 32, 32])
    """
    return _max_unpool(max_unpool2d, 2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor, indices: Tensor, kernel_size: Size, stride: Size | None = None, padding: Size = 0,
    output_size: Any = None,
) -> Tensor:  # fmt: skip
    """3-d unpooling: :func:`max_unpool2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.max_unpool3d`, but deterministic.

    Example::

        >>> y, indices = tritune.max_pool3d(torch.randn(1, 8, 4, 8, 8), 2, return_indices=True)
        >>> tritune.max_unpool3d(y, indices, 2).shape
        torch.Size([1, 8, 4, 8, 8])
    """
    return _max_unpool(max_unpool3d, 3, input, indices, kernel_size, stride, padding, output_size)


# --- from arguments to a call ----------------------------------------------------------------------------------------


def _windows(args: PoolArgs) -> Windows:
    return args.kernel_size, args.stride, args.padding, args.dilation


def _are_all(sizes: Any, number: int) -> bool:
    """Is this a tuple or list of one number?"""
    return (type(sizes) is tuple or type(sizes) is list) and all(one == number for one in sizes)


def max_pool(
    function: Callable[..., Any], rank: int, input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, return_indices: bool,
) -> Any:  # fmt: skip
    if has_torch_function_unary(input):
        return handle_torch_function(
            function, (input,), input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    errors = torch_errors(input)
    if (
        errors is not None
        and are_plain((kernel_size, kernel_size if stride is None else stride, dilation), 1, recorded=not errors)
        and are_plain((padding,), recorded=not errors)
        # else a window may lie wholly in the padding
        and (dilation == 1 or padding == 0 or _are_all(dilation, 1) or _are_all(padding, 0) or is_jit_tracing())
    ):  # fmt: skip
        y = torch_first(errors, function, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        if y is not None:
            return y
    args = pool_checks.check_max_pool(
        rank, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
    )  # fmt: skip
    return _serve_max_pool(rank, input, args, return_indices)


def _serve_max_pool(rank: int, input: Tensor, args: PoolArgs, return_indices: bool) -> Any:
    windows = _windows(args)

    def composite() -> Any:
        if args.has_empty_window:
            batched = input if input.dim() == rank + 2 else input.unsqueeze(0)
            pair = max_of_padded(batched, args.output_size, *windows)
            y, indices = pair if input.dim() == rank + 2 else (t.squeeze(0) for t in pair)
            # The indices only of a compiled call, whose sizes may turn out to have no such window.
            return (y, indices) if return_indices else y
        return TORCH_FUNCTIONS[f"max_pool{rank}d"](input, *windows, args.ceil_mode, return_indices)

    return _serve_max(f"max_pool{rank}d", rank, input, args.output_size, windows, return_indices, composite)


def _adaptive_max_pool(
    function: Callable[..., Any], rank: int, input: Tensor, output_size: Any, return_indices: bool
) -> Any:
    if has_torch_function_unary(input):
        return handle_torch_function(function, (input,), input, output_size, return_indices)
    errors = torch_errors(input)
    if errors is not None and are_plain((output_size,), recorded=not errors):
        y = torch_first(errors, function, input, output_size, return_indices)
        if y is not None:
            return y
    size = pool_checks.check_adaptive_pool(rank, "max", input, output_size, return_indices)
    return _serve_max(
        f"adaptive_max_pool{rank}d", rank, input, size, ADAPTIVE, return_indices,
        lambda: torch_adaptive("max", rank)(input, size, return_indices),
    )  # fmt: skip


def _avg_pool(
    function: Callable[..., Tensor], rank: int, input: Tensor, kernel_size: Any, stride: Any, padding: Any,
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    divisor = (divisor_override,) if rank > 1 else ()
    if has_torch_function_unary(input):
        overridden: Tensor = handle_torch_function(
            function, (input,), input, kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor
        )
        return overridden
    errors = torch_errors(input)
    if (
        errors is not None
        and are_plain((kernel_size, kernel_size if stride is None else stride), 1, recorded=not errors)
        and are_plain((padding,), recorded=not errors) and (divisor_override is None or type(divisor_override) is int)
        and not (rank == 3 and lacks_a_kernel(input))
    ):  # fmt: skip
        y = torch_first(errors, function, input, kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor)
        if y is not None:
            return y
    args = pool_checks.check_avg_pool(
        rank, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )  # fmt: skip
    return _serve_avg_pool(rank, input, args, bool(count_include_pad), int(divisor_override or 0))


def _serve_avg_pool(rank: int, input: Tensor, args: PoolArgs, include_pad: bool, divisor: int) -> Tensor:
    call = (args.kernel_size, args.stride, args.padding, args.ceil_mode, include_pad, divisor)
    return _serve_mean(
        f"avg_pool{rank}d", rank, input, args.output_size, _windows(args), include_pad, divisor,
        lambda: torch_avg(input, *call),
    )  # fmt: skip


def _adaptive_avg_pool(function: Callable[..., Tensor], rank: int, input: Tensor, output_size: Any) -> Tensor:
    if has_torch_function_unary(input):
        overridden: Tensor = handle_torch_function(function, (input,), input, output_size)
        return overridden
    errors = torch_errors(input)
    if (
        errors is not None and are_plain((output_size,), recorded=not errors) and rank < input.dim() <= rank + 2
        and (not errors or input.numel())
    ):  # fmt: skip
        y = torch_first(errors, function, input, output_size)
        if y is not None:
            return y
    size = pool_checks.check_adaptive_pool(rank, "avg", input, output_size)
    return _serve_mean(
        f"adaptive_avg_pool{rank}d", rank, input, size, ADAPTIVE, True, 0,
        lambda: torch_adaptive("avg", rank)(input, size),
    )  # fmt: skip


def _lp_pool(
    function: Callable[..., Tensor], rank: int, input: Tensor, norm_type: int | float, kernel_size: Any, stride: Any,
    ceil_mode: bool,
) -> Tensor:  # fmt: skip
    if has_torch_function_unary(input):
        overridden: Tensor = handle_torch_function(
            function, (input,), input, norm_type, kernel_size, stride, ceil_mode
        )  # fmt: skip
        return overridden
    errors = torch_errors(input)
    if (
        errors is not None
        and are_plain((kernel_size, kernel_size if stride is None else stride), 1, recorded=not errors)
        and type(norm_type) in (int, float)
        and (
            KNOWS_INFINITE_NORMS if abs(norm_type) == math.inf
            else abs(norm_type) > 0 and not (rank == 3 and lacks_a_kernel(input))
        )
    ):  # fmt: skip
        y = torch_first(errors, function, input, norm_type, kernel_size, stride, ceil_mode)
        if y is not None:
            return y
    args = pool_checks.check_lp_pool(rank, input, norm_type, kernel_size, stride, ceil_mode)
    if isinstance(norm_type, float) and math.isinf(norm_type):
        if norm_type > 0:
            return _serve_max_pool(rank, input.abs(), args, False)
        return -_serve_max_pool(rank, -input.abs(), args, False)
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda") and input.dtype.itemsize == 2:
        input = input.float()  # powers are in fp32 there, and so is what becomes of them
    # In three dimensions torch's kernel for the CPU has no 16-bit types: in float32 from the powers on, rounded once.
    is_widened = rank == 3 and lacks_a_kernel(input)
    wide = input.float() if is_widened else input
    dtype = wide.dtype if is_widened and torch.is_autocast_enabled("cpu") else input.dtype

    def root_of(mean: Tensor) -> Tensor:
        root = lp_root(mean, args.kernel_size, norm_type)
        return root.to(dtype) if is_widened else root

    if norm_type not in FUSED_NORMS:
        return root_of(_serve_avg_pool(rank, wide.pow(norm_type), args, True, 0))

    def composite() -> Tensor:
        window = (args.kernel_size, args.stride, args.padding)
        return root_of(torch_avg(wide.pow(norm_type), *window, args.ceil_mode, True, 0))

    return _serve(
        f"lp_pool{rank}d", rank, input, args.output_size, _windows(args), f"norm{norm_type:.0f}", 0,
        OP_LP, (float(norm_type),), requires_grad((input,)), composite,
    )  # fmt: skip


def _serve_mean(
    op: str, rank: int, input: Tensor, size: Ints, windows: Windows, include_pad: bool, divisor: int,
    composite: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    options = (include_pad, divisor)
    return _serve(op, rank, input, size, windows, "mean", 0, OP_AVG, options, requires_grad((input,)), composite)


def _serve_max(
    op: str, rank: int, input: Tensor, size: Ints, windows: Windows, return_indices: bool, composite: Callable[[], Any]
) -> Any:
    needs_grad = requires_grad((input,))
    index_bytes = 8 if return_indices else 0
    if needs_grad and not return_indices:
        index_bytes = offset_dtype(input.shape[-rank:], size, windows[0]).itemsize
    operator = OP_MAX_WITH_INDICES if return_indices else OP_MAX
    return _serve(op, rank, input, size, windows, "max", index_bytes, operator, (), needs_grad, composite)


def _serve(
    op: str, rank: int, input: Tensor, size: Ints, windows: Windows, reduce: str, index_bytes: int, operator: Any,
    options: tuple[Any, ...], needs_grad: bool, composite: Callable[[], Any],
) -> Any:  # fmt: skip
    """Chooses the backend of a legal call and runs it. What only the kernels ask for is in functions."""

    def batch() -> Tensor:
        return input if input.dim() == rank + 2 else input.unsqueeze(0)

    def problem() -> Any:
        mean = {"include_pad": options[0], "divisor": options[1]} if reduce == "mean" else {}
        return _problem(batch(), size, windows, reduce, index_bytes, **mean)

    def choices(device: DeviceSpec) -> tuple[tuple[str, Choice], ...]:
        return _kernel_choices(batch(), problem(), device, needs_grad)

    def rule(device: DeviceSpec) -> Ruling:
        return _auto_rule(op, problem(), choices(device), needs_grad)

    backend = choose(op, (input,), rule, choices, lambda: _limits(batch(), size, windows))
    if backend == "torch":
        return composite()
    result = run_operator(operator, (batch(), size, *windows, *options, "triton"), needs_grad)
    if input.dim() == rank + 2:
        return result
    return tuple(t.squeeze(0) for t in result) if isinstance(result, tuple) else result.squeeze(0)


def _max_unpool(
    function: Callable[..., Tensor], rank: int, input: Tensor, indices: Tensor, kernel_size: Any, stride: Any,
    padding: Any, output_size: Any,
) -> Tensor:  # fmt: skip
    if has_torch_function_variadic(input, indices):
        overridden: Tensor = handle_torch_function(
            function, (input, indices), input, indices, kernel_size, stride, padding, output_size
        )
        return overridden
    windows = (kernel_size, kernel_size if stride is None else stride, padding)
    errors = torch_errors(input)
    if (
        errors is not None and are_plain(windows, recorded=not errors)
        and (output_size is None or are_plain((output_size,), recorded=not errors))
        and all(type(values) is int or len(values) == rank for values in windows)
        and not is_jit_tracing()  # torch 2.13 cannot trace its own
    ):  # fmt: skip
        y: Tensor | None = torch_first(errors, function, input, indices, kernel_size, stride, padding, output_size)
        if y is not None:
            return y
    args = pool_checks.check_max_unpool(rank, input, indices, kernel_size, stride, padding, output_size)
    op, needs_grad = f"max_unpool{rank}d", requires_grad((input,))
    unbatched = input.dim() == rank + 1
    batched, places = (input.unsqueeze(0), indices.unsqueeze(0)) if unbatched else (input, indices)

    def choices(device: DeviceSpec) -> tuple[tuple[str, Choice], ...]:
        from ..kernels import pool

        return _unpool_choices(batched, places, args, device, needs_grad, pool)

    def limits() -> str | None:
        if places.dtype is not torch.int64 or (not torch.compiler.is_compiling() and places.device != input.device):
            return "indices are not int64 on the input's device"
        if min(*args.kernel_size, *args.stride) < 1:
            return "kernel_size or stride is below 1"
        return _limits(batched, args.output_size, _windows(args))

    def rule(device: DeviceSpec) -> Ruling:
        return measured(choices(device)) or _deterministic(op) or _NO_PROMISE

    if choose(op, (input,), rule, choices, limits) == "torch":
        return torch_unpool(input, indices, args.output_size, args.stride, args.padding)
    arguments = (batched, places, args.output_size, args.kernel_size, args.stride, args.padding, "triton")
    y = run_operator(OP_UNPOOL, arguments, needs_grad)
    return y.squeeze(0) if unbatched else y


# --- the choice of backend -------------------------------------------------------------------------------------------


_NO_PROMISE = Ruling(False, "not measured, and counted traffic does not promise a win: `tritune tune` can")


def _limits(input: Tensor, size: Ints, windows: Windows) -> str | None:
    if torch.compiler.is_compiling():
        return None
    space = input.shape[2:]
    pixels = input.shape[0] * max(math.prod(space), math.prod(size))
    if pixels >= 2**31:
        return "input or output has 2**31 pixels or more"
    if not windows[1] and any(a * b >= 2**31 for a, b in zip(space, size, strict=True)):
        return "output_size times the input's size is 2**31 or more"
    return None


def _problem(
    input: Tensor, size: Ints, windows: Windows, reduce: str, index_bytes: int = 0, **mean: Any
) -> Any:  # fmt: skip
    from ..kernels import pool

    window = kernel_window(input.shape[2:], size, windows)
    layout = pool.layout_of(input, is_channels_last(input))
    return pool.problem_of(input, size, window, reduce, index_bytes=index_bytes, layout=layout, **mean)


def _kernel_choices(
    input: Tensor, problem: Any, device: DeviceSpec, needs_grad: bool
) -> tuple[tuple[str, Choice], ...]:
    """The kernels of a call and of its backward, for an output gradient that is laid out as the output."""
    from ..kernels import pool

    tunable, seen = pool.forward_of(input, problem)
    kernels = [(tunable.name, resolve(tunable, seen, device))]
    if needs_grad:
        layout = "nhwc" if is_channels_last(input) and input.shape[1] > 1 else "nchw"
        if layout == "nchw" and problem.reduce == "norm2":
            layout = problem.layout
        backward = problem._replace(layout=layout)
        kernels.append((pool.BACKWARD.name, resolve(pool.BACKWARD, backward, device)))
    return tuple(kernels)


def _unpool_choices(
    input: Tensor, indices: Tensor, args: PoolArgs, device: DeviceSpec, needs_grad: bool, pool: Any
) -> tuple[tuple[str, Choice], ...]:
    channels_last = is_channels_last(input)
    window = kernel_window(args.output_size, input.shape[2:], _windows(args))
    y = empty(input, (*input.shape[:2], *args.output_size), channels_last)
    problem = pool.gathering(input, indices, None, None, y, window, "last", channels_last)
    kernels = [(pool.UNPOOL.name, resolve(pool.UNPOOL, problem, device))]
    if needs_grad:
        layout = "nhwc" if is_channels_last(indices) and y.shape[1] > 1 else "strided"
        places = kernel_window(args.output_size, input.shape[2:], ADAPTIVE)
        problem = pool.problem_of(y, input.shape[2:], places, "max", index_bytes=8, layout=layout)
        kernels.append((pool.GATHER.name, resolve(pool.GATHER, problem, device)))
    return tuple(kernels)


def _deterministic(op: str) -> Ruling | None:
    if op in NONDETERMINISTIC and torch.are_deterministic_algorithms_enabled():
        return Ruling(True, "torch.use_deterministic_algorithms(True) is set, and torch's own is not deterministic")
    return None


def _auto_rule(
    op: str, problem: Any, choices: Sequence[tuple[str, Choice]], needs_grad: bool
) -> Ruling:  # fmt: skip
    """Do the kernels win? By measurement if there is one; else where they move a seventh less than torch's."""
    known = measured(choices) or ((needs_grad or "unpool" in op) and _deterministic(op))
    if known:
        return known
    wide = problem.layout == "nhwc" or (problem.layout == "nchw" and problem.space[2] * problem.dtype.itemsize % 8 == 0)
    if not wide:
        return _NO_PROMISE
    if problem.reduce in ("norm1", "norm2"):
        return Ruling(True, "not measured; one pass takes the place of torch's eight")
    ours = problem.forward_bytes()
    # torch's CUDA kernels always write int64 indices.
    theirs = problem._replace(index_bytes=8).forward_bytes() if problem.reduce == "max" else ours
    if theirs >= 7 / 6 * ours:
        return Ruling(True, f"not measured; small offsets save {1 - ours / theirs:.0%} of torch's bytes")
    return _NO_PROMISE
