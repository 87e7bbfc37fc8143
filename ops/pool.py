"""Pooling of 1, 2 and 3 dimensions: public functions, operators, autograd, torch implementation.

All windows are one kind to the operators: fixed ones have a kernel size, stride, padding and dilation, adaptive ones
have none of them (empty lists), only the size of the result. Each operator's gradient is another of them:

    max_pool        -> max_pool_backward, whose gradient is pool_gather (x at the winners' places), and so on
    avg_pool        -> avg_pool_backward, whose gradient is avg_pool
    lp_pool         -> lp_pool_backward, whose gradient is made of the two above
    max_unpool      -> pool_gather
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from . import pool_checks
from ._dispatch import (
    Verdict,
    are_plain,
    choose,
    is_empty,
    is_jit_tracing,
    measured,
    rejections,
    runs_kernels,
    torch_validates,
)
from ._layout import empty, is_channels_last, laid_out
from ._register import below_autograd, register
from .pool_checks import Ints, PoolArgs, pool_output_size

Size = int | Sequence[int]
FUSED_NORMS = (1, 2)

# What torch does in an order that changes from run to run on a GPU: the backward of these, and the forward of the last.
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
    return _max_pool(max_pool1d, 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


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
    return _max_pool(max_pool2d, 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


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
    return _max_pool(max_pool3d, 3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


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
    pool_checks.check_global_pool("avg", input, keepdim)
    rank = input.dim() - 2
    composite = partial(_torch_adaptive("avg", rank), input, 1)
    if torch_validates(input):
        y = composite()
    else:
        y = _serve_mean("global_avg_pool", rank, input, (1,) * rank, _ADAPTIVE, True, 0, composite)
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
    pool_checks.check_global_pool("max", input, keepdim)
    rank = input.dim() - 2
    composite = partial(_torch_adaptive("max", rank), input, 1)
    y: Tensor
    if torch_validates(input):
        y = composite()
    else:
        y = _serve_max("global_max_pool", rank, input, (1,) * rank, _ADAPTIVE, False, composite)
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

Windows = tuple[Ints, Ints, Ints, Ints]  # kernel_size, stride, padding, dilation
_ADAPTIVE: Windows = ((), (), (), ())


def _windows(args: PoolArgs) -> Windows:
    return args.kernel_size, args.stride, args.padding, args.dilation


def _max_pool(
    function: Callable[..., Any], rank: int, input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, return_indices: bool,
) -> Any:  # fmt: skip
    if has_torch_function_unary(input):
        return handle_torch_function(
            function, (input,), input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    if (
        torch_validates(input) and are_plain((kernel_size, kernel_size if stride is None else stride, dilation), 1)
        and are_plain((padding,))
        and (dilation == 1 or padding == 0 or is_jit_tracing())  # else a window may lie wholly in the padding
    ):  # fmt: skip
        y = _torch_first(function, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
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
            pair = _max_of_padded(batched, args.output_size, *windows)
            y, indices = pair if input.dim() == rank + 2 else (t.squeeze(0) for t in pair)
            # The indices only of a compiled call, whose sizes may turn out to have no such window.
            return (y, indices) if return_indices else y
        return _TORCH[f"max_pool{rank}d"](input, *windows, args.ceil_mode, return_indices)

    return _serve_max(f"max_pool{rank}d", rank, input, args.output_size, windows, return_indices, composite)


def _adaptive_max_pool(
    function: Callable[..., Any], rank: int, input: Tensor, output_size: Any, return_indices: bool
) -> Any:
    if has_torch_function_unary(input):
        return handle_torch_function(function, (input,), input, output_size, return_indices)
    if torch_validates(input) and are_plain((output_size,)):
        y = _torch_first(function, input, output_size, return_indices)
        if y is not None:
            return y
    size = pool_checks.check_adaptive_pool(rank, "max", input, output_size, return_indices)
    return _serve_max(
        f"adaptive_max_pool{rank}d", rank, input, size, _ADAPTIVE, return_indices,
        lambda: _torch_adaptive("max", rank)(input, size, return_indices),
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
    if (
        torch_validates(input) and are_plain((kernel_size, kernel_size if stride is None else stride), 1)
        and are_plain((padding,)) and (divisor_override is None or type(divisor_override) is int)
        and not (rank == 3 and _lacks_a_kernel(input))
    ):  # fmt: skip
        y = _torch_first(function, input, kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor)
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
        lambda: _torch_avg(input, *call),
    )  # fmt: skip


def _adaptive_avg_pool(function: Callable[..., Tensor], rank: int, input: Tensor, output_size: Any) -> Tensor:
    if has_torch_function_unary(input):
        overridden: Tensor = handle_torch_function(function, (input,), input, output_size)
        return overridden
    if (
        torch_validates(input) and are_plain((output_size,)) and rank < input.dim() <= rank + 2
        and not is_empty(input)
    ):  # fmt: skip
        y = _torch_first(function, input, output_size)
        if y is not None:
            return y
    size = pool_checks.check_adaptive_pool(rank, "avg", input, output_size)
    return _serve_mean(
        f"adaptive_avg_pool{rank}d", rank, input, size, _ADAPTIVE, True, 0,
        lambda: _torch_adaptive("avg", rank)(input, size),
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
    if (
        torch_validates(input) and are_plain((kernel_size, kernel_size if stride is None else stride), 1)
        and type(norm_type) in (int, float) and 0 < abs(norm_type) < math.inf
        and not (rank == 3 and _lacks_a_kernel(input))
    ):  # fmt: skip
        y = _torch_first(function, input, norm_type, kernel_size, stride, ceil_mode)
        if y is not None:
            return y
    args = pool_checks.check_lp_pool(rank, input, norm_type, kernel_size, stride, ceil_mode)
    if isinstance(norm_type, float) and math.isinf(norm_type):
        sign = 1 if norm_type > 0 else -1
        y = _serve_max_pool(rank, input.abs() * sign, args, False)
        return y * sign
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda") and input.dtype.itemsize == 2:
        input = input.float()  # powers are in fp32 there, and so is what becomes of them
    # In three dimensions torch's kernel for the CPU has no 16-bit types: in float32 from the powers on, rounded once.
    is_widened = rank == 3 and _lacks_a_kernel(input)
    wide = input.float() if is_widened else input
    dtype = wide.dtype if is_widened and torch.is_autocast_enabled("cpu") else input.dtype

    def root_of(mean: Tensor) -> Tensor:
        root = _root(mean, args.kernel_size, norm_type)
        return root.to(dtype) if is_widened else root

    if norm_type not in FUSED_NORMS:
        return root_of(_serve_avg_pool(rank, wide.pow(norm_type), args, True, 0))

    def composite() -> Tensor:
        window = (args.kernel_size, args.stride, args.padding)
        return root_of(_torch_avg(wide.pow(norm_type), *window, args.ceil_mode, True, 0))

    return _serve(
        f"lp_pool{rank}d", rank, input, args.output_size, _windows(args), f"norm{norm_type:.0f}", 0,
        OP_LP, (float(norm_type),), _needs_grad(input), composite,
    )  # fmt: skip


def _torch_first(function: Callable[..., Any], input: Tensor, *options: Any) -> Any:
    """What torch's function of that name returns; ``None`` where it raises, and for nothing pooled or to pool: there
    the validator has the word."""
    rejected = rejections()
    try:
        result = _TORCH[function.__name__](input, *options)
    except rejected:
        return None
    y = result[0] if type(result) is tuple else result
    return result if not rejected or y.numel() else None  # torch.jit.trace is asked for no size


def _root(mean: Tensor, kernel_size: Sequence[int], norm_type: int | float) -> Tensor:
    """A power average from the mean of the powers, as torch has it: its derivative where the mean is 0 is 0."""
    return (torch.sign(mean) * F.relu(torch.abs(mean))).mul(math.prod(kernel_size)).pow(1.0 / norm_type)


def _serve_mean(
    op: str, rank: int, input: Tensor, size: Ints, windows: Windows, include_pad: bool, divisor: int,
    composite: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    options = (include_pad, divisor)
    return _serve(op, rank, input, size, windows, "mean", 0, OP_AVG, options, _needs_grad(input), composite)


def _serve_max(
    op: str, rank: int, input: Tensor, size: Ints, windows: Windows, return_indices: bool, composite: Callable[[], Any]
) -> Any:
    needs_grad = _needs_grad(input)
    index_bytes = 8 if return_indices else 0
    if needs_grad and not return_indices:
        index_bytes = offset_dtype(input.shape[-rank:], size, windows[0]).itemsize
    operator = OP_MAX_WITH_INDICES if return_indices else OP_MAX
    return _serve(op, rank, input, size, windows, "max", index_bytes, operator, (), needs_grad, composite)


def _needs_grad(input: Tensor) -> bool:
    return input.requires_grad and torch.is_grad_enabled()


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

    def rule(device: DeviceSpec) -> Verdict:
        return _auto_rule(op, problem(), choices(device), needs_grad)

    backend = choose(op, (input,), rule, choices, lambda: _limits(batch(), size, windows))
    if backend == "torch":
        return composite()
    call = (batch(), size, *windows, *options, "triton")
    if torch.compiler.is_compiling():
        result = operator(*call)
    elif needs_grad:
        result = _FUNCTIONS[operator](*call)
    else:
        with below_autograd():
            result = operator(*call)
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
    if (
        torch_validates(input) and are_plain(windows) and (output_size is None or are_plain((output_size,)))
        and all(type(values) is int or len(values) == rank for values in windows)
        and not is_jit_tracing()  # torch 2.13 cannot trace its own
    ):  # fmt: skip
        y: Tensor | None = _torch_first(function, input, indices, kernel_size, stride, padding, output_size)
        if y is not None:
            return y
    args = pool_checks.check_max_unpool(rank, input, indices, kernel_size, stride, padding, output_size)
    op = f"max_unpool{rank}d"
    unbatched = input.dim() == rank + 1
    batched, places = (input.unsqueeze(0), indices.unsqueeze(0)) if unbatched else (input, indices)

    def choices(device: DeviceSpec) -> tuple[tuple[str, Choice], ...]:
        from ..kernels import pool

        return _unpool_choices(batched, places, args, device, _needs_grad(input), pool)

    def limits() -> str | None:
        if places.dtype is not torch.int64 or (not torch.compiler.is_compiling() and places.device != input.device):
            return "indices are not int64 on the input's device"
        if min(*args.kernel_size, *args.stride) < 1:
            return "kernel_size or stride is below 1"
        return _limits(batched, args.output_size, _windows(args))

    def rule(device: DeviceSpec) -> Verdict:
        return measured(choices(device)) or _deterministic(op) or _NO_PROMISE

    if choose(op, (input,), rule, choices, limits) == "torch":
        return _torch_unpool(input, indices, args.output_size, args.stride, args.padding)
    arguments = (batched, places, args.output_size, args.kernel_size, args.stride, args.padding, "triton")
    if torch.compiler.is_compiling():
        y = OP_UNPOOL(*arguments)
    elif _needs_grad(input):
        y = _MaxUnpool.apply(*arguments)
    else:
        with below_autograd():
            y = OP_UNPOOL(*arguments)
    return y.squeeze(0) if unbatched else y


# --- the choice of backend -------------------------------------------------------------------------------------------

_NO_PROMISE = Verdict(False, "not measured, and counted traffic does not promise a win: `tritune tune` can")


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


def largest_window(size: int, outs: int) -> int:
    """Taps of the largest adaptive window along one dimension."""
    return -(-(size + outs - math.gcd(size, outs)) // max(1, outs))


def offset_dtype(space: Sequence[int], size: Sequence[int], kernel_size: Sequence[int]) -> torch.dtype:
    """The narrowest integer that holds every tap of a window and one more. Of an adaptive one, whose sizes may be
    symbols, by a simple bound of its taps."""
    taps = math.prod(
        kernel_size or [(full + 2 * outs - 2) // outs if outs else 1 for full, outs in zip(space, size, strict=True)]
    )
    return torch.uint8 if taps <= 254 else torch.int16 if taps <= 2**15 - 1 else torch.int32


def kernel_window(space: Sequence[int], size: Sequence[int], windows: Sequence[Sequence[int]]) -> Any:
    """The windows as the kernels take them."""
    from ..kernels.pool import Window

    kernel_size, stride, padding, dilation = windows
    if not stride:
        kernel_size = [largest_window(full, outs) for full, outs in zip(space, size, strict=True)]
        beside = all(full == taps * outs for full, taps, outs in zip(space, kernel_size, size, strict=True))
        if beside and math.prod(size) > 1 and max(kernel_size) <= 8:
            # Windows of one size beside each other; only small ones, so that few binaries are made.
            stride, padding = kernel_size, [0] * len(kernel_size)
    return Window.of(kernel_size, stride, padding, dilation or [1] * len(stride))


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
        places = kernel_window(args.output_size, input.shape[2:], _ADAPTIVE)
        problem = pool.problem_of(y, input.shape[2:], places, "max", index_bytes=8, layout=layout)
        kernels.append((pool.GATHER.name, resolve(pool.GATHER, problem, device)))
    return tuple(kernels)


def _deterministic(op: str) -> Verdict | None:
    if op in NONDETERMINISTIC and torch.are_deterministic_algorithms_enabled():
        return Verdict(True, "torch.use_deterministic_algorithms(True) is set, and torch's own is not deterministic")
    return None


def _auto_rule(
    op: str, problem: Any, choices: Sequence[tuple[str, Choice]], needs_grad: bool
) -> Verdict:  # fmt: skip
    """Do the kernels win? By measurement if there is one; else where they move a seventh less than torch's."""
    known = measured(choices) or ((needs_grad or "unpool" in op) and _deterministic(op))
    if known:
        return known
    wide = problem.layout == "nhwc" or (problem.layout == "nchw" and problem.space[2] * problem.dtype.itemsize % 8 == 0)
    if not wide:
        return _NO_PROMISE
    if problem.reduce in ("norm1", "norm2"):
        return Verdict(True, "not measured; one pass takes the place of torch's eight")
    ours = problem.forward_bytes()
    # torch's CUDA kernels always write int64 indices.
    theirs = problem._replace(index_bytes=8).forward_bytes() if problem.reduce == "max" else ours
    if theirs >= 7 / 6 * ours:
        return Verdict(True, f"not measured; small offsets save {1 - ours / theirs:.0%} of torch's bytes")
    return _NO_PROMISE


# --- torch's implementation: fallback and yardstick ------------------------------------------------------------------


# torch's own, as they are when this is imported: people put ours in their place.
_TORCH: dict[str, Callable[..., Any]] = {
    f"{kind}{rank}d": getattr(F, f"{kind}{rank}d")
    for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool", "max_unpool")
    for rank in (1, 2, 3)
}


def _torch_adaptive(kind: str, rank: int) -> Callable[..., Any]:
    return _TORCH[f"adaptive_{kind}_pool{rank}d"]


def _has_ceil_mode(
    space: Sequence[int], size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> bool:  # fmt: skip
    """Is the result larger than without ``ceil_mode``?"""
    sizes = zip(space, kernel_size, stride, padding, dilation, strict=True)
    return list(size) != [pool_output_size(full, k, s, p, d, False) for full, k, s, p, d in sizes]


def _max_of_padded(
    input: Tensor, size: Sequence[int], kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[Tensor, Tensor]:
    """Pooling of a copy padded by hand: the same values, and defined where a window sees only padding (torch 2.13
    writes outside its buffers there). A winner in the padding only ties with taps of -inf; then the first tap in the
    image wins, and where there is none the index says nothing."""
    rank = len(size)
    space = input.shape[2:]
    behind = [
        max(0, (outs - 1) * step + (taps - 1) * dil + 1 - pad - full)
        for full, outs, taps, step, pad, dil in zip(space, size, kernel_size, stride, padding, dilation, strict=True)
    ]
    lowest = float("-inf") if input.is_floating_point() else torch.iinfo(input.dtype).min
    sides = [side for pair in zip(reversed(padding), reversed(behind), strict=True) for side in pair]
    padded = F.pad(input, sides, value=lowest)
    y, flat = _TORCH[f"max_pool{rank}d"](padded, kernel_size, stride, 0, dilation, return_indices=True)
    for dim, outs in enumerate(size, 2):
        y, flat = y.narrow(dim, 0, outs), flat.narrow(dim, 0, outs)
    winners = torch.zeros_like(flat)
    for dim, place in enumerate(_coordinates(flat, padded.shape[2:])):
        start, first, _ = _taps(dim, rank, space, size, (kernel_size, stride, padding, dilation), flat.device)
        place = place - padding[dim]
        place = torch.where((place >= 0) & (place < space[dim]), place, start + first * dilation[dim])
        winners = winners * space[dim] + place
    return y, winners


def _coordinates(flat: Tensor, space: Sequence[int]) -> list[Tensor]:
    """Flat places in planes of that size, as one coordinate for each dimension."""
    places = []
    for size in reversed(space):
        places.append(flat % size)
        flat = flat // size
    return places[::-1]


def _taps(
    dim: int, rank: int, space: Sequence[int], size: Sequence[int], windows: Sequence[Sequence[int]], device:
    torch.device,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Along one dimension: where each window starts, its first tap inside the image, and whether it has one; shaped to
    be broadcast over the result."""
    shape = [-1, *(1 for _ in range(rank - 1 - dim))]
    outputs = torch.arange(size[dim], device=device)
    if not windows[1]:
        start = outputs * space[dim] // size[dim]
        return (
            start.view(shape),
            torch.zeros_like(start).view(shape),
            torch.ones_like(start, dtype=torch.bool).view(shape),
        )
    taps, stride, padding, dilation = (values[dim] for values in windows)
    start = outputs * stride - padding
    place = start[:, None] + torch.arange(taps, device=device) * dilation
    inside = (place >= 0) & (place < space[dim])
    return start.view(shape), inside.int().argmax(1).view(shape), inside.any(1).view(shape)


def _offsets_of(winners: Tensor, space: Sequence[int], windows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Places in the image as taps of their windows; NONE where a window sees only padding."""
    size = winners.shape[2:]
    kernel_size, stride, _, dilation = windows
    taps = kernel_size or [largest_window(full, outs) for full, outs in zip(space, size, strict=True)]
    offsets, seen = torch.zeros_like(winners), torch.ones_like(winners, dtype=torch.bool)
    for dim, place in enumerate(_coordinates(winners, space)):
        start, _, sees = _taps(dim, len(size), space, size, windows, winners.device)
        offsets = offsets * taps[dim] + (place - start) // (dilation[dim] if stride else 1)
        seen = seen & sees
    return torch.where(seen, offsets, 255 if dtype is torch.uint8 else -1).to(dtype)


def _places(winners: Tensor, space: Sequence[int], windows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """The winners as places in the image, and where there is one at all."""
    if winners.dtype is torch.int64:
        return winners, None
    size = winners.shape[2:]
    kernel_size, stride, _, dilation = windows
    taps = kernel_size or [largest_window(full, outs) for full, outs in zip(space, size, strict=True)]
    valid = winners != (255 if winners.dtype is torch.uint8 else -1)
    flat = torch.zeros_like(winners, dtype=torch.int64)
    for dim, tap in enumerate(_coordinates(torch.where(valid, winners, 0).long(), taps)):
        start, _, _ = _taps(dim, len(size), space, size, windows, winners.device)
        flat = flat * space[dim] + start + tap * (dilation[dim] if stride else 1)
    return torch.where(valid, flat, 0), valid


def _lacks_a_kernel(t: Tensor) -> bool:
    """Are these 16-bit numbers on the CPU, for which torch has no kernel that averages in three dimensions?"""
    return t.device.type == "cpu" and t.dtype in (torch.float16, torch.bfloat16)


def _torch_avg(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, include_pad: bool, divisor: int
) -> Tensor:  # fmt: skip
    """torch's function, batched or not; in three dimensions its CPU kernel has no 16-bit types, which autocast widens
    for good."""
    rank = len(kernel_size)
    if rank == 1:
        y: Tensor = _TORCH["avg_pool1d"](input, kernel_size, stride, padding, ceil_mode, include_pad)
        return y if divisor == 0 else y * (kernel_size[0] / divisor)
    function: Callable[..., Tensor] = _TORCH[f"avg_pool{rank}d"]
    call = (kernel_size, stride, padding, ceil_mode, include_pad, divisor or None)
    if rank == 3 and _lacks_a_kernel(input):
        y = function(input.float(), *call)
        return y if torch.is_autocast_enabled("cpu") else y.to(input.dtype)
    return function(input, *call)


def _torch_mean(
    input: Tensor, size: Sequence[int], windows: Sequence[Sequence[int]], include_pad: bool, divisor: int
) -> Tensor:  # fmt: skip
    rank = len(size)
    if not windows[1]:
        y: Tensor = _torch_adaptive("avg", rank)(input, size)
        return y
    kernel_size, stride, padding, _ = windows
    ceil_mode = _has_ceil_mode(input.shape[2:], size, kernel_size, stride, padding, [1] * rank)
    return _torch_avg(input, kernel_size, stride, padding, ceil_mode, include_pad, divisor).to(input.dtype)


def _torch_mean_backward(
    dy: Tensor, space: Sequence[int], windows: Sequence[Sequence[int]], include_pad: bool, divisor: int
) -> Tensor:  # fmt: skip
    """torch's own kernels know two and three dimensions, and look at the shape of x alone."""
    rank, size = len(space), dy.shape[2:]
    if rank == 1:
        flat = [[0 if place == 2 else 1, *values] if values else [] for place, values in enumerate(windows)]
        return _torch_mean_backward(dy.unsqueeze(2), (1, *space), flat, include_pad, divisor).squeeze(2)
    like = dy.new_empty(1).expand(*dy.shape[:2], *space)
    if rank == 3 and _lacks_a_kernel(dy):
        return _torch_mean_backward(dy.float(), space, windows, include_pad, divisor).to(dy.dtype)
    if not windows[1]:
        dx: Tensor = getattr(torch.ops.aten, f"_adaptive_avg_pool{rank}d_backward")(dy, like)
        return dx
    kernel_size, stride, padding, _ = windows
    ceil_mode = _has_ceil_mode(space, size, kernel_size, stride, padding, [1] * rank)
    function: Callable[..., Tensor] = getattr(torch.ops.aten, f"avg_pool{rank}d_backward")
    return function(dy, like, kernel_size, stride, padding, ceil_mode, include_pad, divisor or None)


def _torch_unpool(input: Tensor, indices: Tensor, size: Any, stride: Any, padding: Any) -> Tensor:
    """Batched or not."""
    aten: Any = torch.ops.aten
    y: Tensor
    if len(size) == 1:
        y = aten.max_unpool2d(input.unsqueeze(-2), indices.unsqueeze(-2), [1, *size]).squeeze(-2)
    elif len(size) == 2:
        y = aten.max_unpool2d(input, indices, size)
    else:
        y = aten.max_unpool3d(input, indices, size, stride, padding)
    return y


# --- operators: maximum ----------------------------------------------------------------------------------------------


def _max_forward(
    input: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    backend: str, *, index_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y and, with an index dtype (int64 for places in the image, else for taps), the winners."""
    space, channels_last, windows = input.shape[2:], is_channels_last(input), (kernel_size, stride, padding, dilation)
    if runs_kernels(backend, input):
        from ..kernels.pool import run_forward

        y = empty(input, (*input.shape[:2], *size), channels_last)
        index = None if index_dtype is None else torch.empty_like(y, dtype=index_dtype)
        if y.numel():
            window = kernel_window(space, size, windows)
            run_forward(input, y, index, window, "max", is_channels_last=channels_last)
        return y, index
    sees = [_taps(dim, len(size), space, size, windows, input.device)[2].all() for dim in range(len(size))]
    if not stride:
        y, winners = _torch_adaptive("max", len(size))(input, size, return_indices=True)
    elif all(sees):
        ceil_mode = _has_ceil_mode(space, size, *windows)
        y, winners = getattr(F, f"max_pool{len(size)}d")(input, *windows, ceil_mode, return_indices=True)
    else:
        y, winners = _max_of_padded(input, size, *(tuple(values) for values in windows))
    y = laid_out(y, channels_last)
    if index_dtype is None:
        return y, None
    if index_dtype is not torch.int64:
        winners = _offsets_of(winners, space, windows, index_dtype)
    return y, laid_out(winners, channels_last)


def _fake_forward(input: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    return empty(input, (*input.shape[:2], *size), is_channels_last(input))


def _fake_pair(index_dtype: torch.dtype | None, input: Tensor, size: Any, kernel_size: Any, *rest: Any) -> Any:
    y = _fake_forward(input, size)
    return y, torch.empty_like(y, dtype=index_dtype or offset_dtype(input.shape[2:], size, kernel_size))


class _MaxPool(torch.autograd.Function):
    """``(y, winners)`` of OP_MAX_WITH_OFFSETS or OP_MAX_WITH_INDICES; the winners have no gradient."""

    @staticmethod
    def forward(ctx: Any, op: Any, input: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            y, winners = op(input, *options)
        ctx.mark_non_differentiable(winners)
        ctx.save_for_backward(winners)
        ctx.geometry = (input.shape[2:], is_channels_last(input), *options[1:])
        ctx.set_materialize_grads(False)
        return y, winners

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        (winners,) = ctx.saved_tensors
        dx = None if dy is None else OP_MAX_BACKWARD(dy, winners, *ctx.geometry)
        return None, dx, *(None,) * 6


_WINDOWS = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation"
_MAX_CALL = f"Tensor input, SymInt[] size, {_WINDOWS}, str backend"
OP_MAX: Any = register(
    f"max_pool({_MAX_CALL}) -> Tensor",
    implementation=lambda *call: _max_forward(*call, index_dtype=None)[0],
    fake=_fake_forward,
    autograd=lambda *call: _MaxPool.apply(OP_MAX_WITH_OFFSETS, *call)[0],
)
OP_MAX_WITH_OFFSETS: Any = register(
    f"max_pool_with_offsets({_MAX_CALL}) -> (Tensor, Tensor)",
    implementation=lambda *call: _max_forward(*call, index_dtype=offset_dtype(call[0].shape[2:], call[1], call[2])),
    fake=lambda *call: _fake_pair(None, *call),
    autograd=lambda *call: _MaxPool.apply(OP_MAX_WITH_OFFSETS, *call),
)
OP_MAX_WITH_INDICES: Any = register(
    f"max_pool_with_indices({_MAX_CALL}) -> (Tensor, Tensor)",
    implementation=lambda *call: _max_forward(*call, index_dtype=torch.int64),
    fake=lambda *call: _fake_pair(torch.int64, *call),
    autograd=lambda *call: _MaxPool.apply(OP_MAX_WITH_INDICES, *call),
)


def _max_backward(
    dy: Tensor, winners: Tensor, space: list[int], channels_last: bool, kernel_size: list[int], stride: list[int],
    padding: list[int], dilation: list[int], backend: str,
) -> Tensor:  # fmt: skip
    windows = (kernel_size, stride, padding, dilation)
    if dy.numel() == 0:
        return empty(dy, (*dy.shape[:2], *space), channels_last).zero_()
    if runs_kernels(backend, dy):
        from ..kernels.pool import run_backward

        dx = empty(dy, (*dy.shape[:2], *space), channels_last)
        window = kernel_window(space, dy.shape[2:], windows)
        run_backward(dy, winners, None, None, dx, window, "max", is_channels_last=channels_last)
        return dx
    flat, valid = _places(winners, space, windows)
    source = dy.to(torch.promote_types(dy.dtype, torch.float32))
    if valid is not None:
        source = source * valid
    dx = source.new_zeros(*dy.shape[:2], math.prod(space)).scatter_add_(2, flat.flatten(2), source.flatten(2))
    return laid_out(dx.to(dy.dtype).unflatten(2, space), channels_last)


def _fake_backward(dy: Tensor, winners: Tensor, space: Sequence[int], channels_last: bool, *rest: Any) -> Tensor:
    return empty(dy, (*dy.shape[:2], *space), channels_last)


class _MaxPoolBackward(torch.autograd.Function):
    """Linear in dy, so its own gradient picks what the winners' places hold."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, winners: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(winners)
        ctx.windows = options[2:]
        with below_autograd():
            return OP_MAX_BACKWARD(dy, winners, *options)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        (winners,) = ctx.saved_tensors
        return OP_GATHER(ddx, winners, *ctx.windows), *(None,) * 8


OP_MAX_BACKWARD: Any = register(
    f"max_pool_backward(Tensor dy, Tensor winners, SymInt[] space, bool channels_last, {_WINDOWS}, str backend)"
    " -> Tensor",
    implementation=_max_backward,
    fake=_fake_backward,
    autograd=_MaxPoolBackward.apply,
)


def _gather(
    input: Tensor, winners: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    backend: str,
) -> Tensor:  # fmt: skip
    windows, channels_last = (kernel_size, stride, padding, dilation), is_channels_last(winners)
    if runs_kernels(backend, input):
        from ..kernels.pool import run_gather

        y = empty(input, winners.shape, channels_last)
        if y.numel():
            window = kernel_window(input.shape[2:], winners.shape[2:], windows)
            run_gather(input, winners, y, window, is_channels_last=channels_last)
        return y
    return laid_out(_differentiable_gather(input, winners, windows), channels_last)


def _differentiable_gather(input: Tensor, winners: Tensor, windows: Sequence[Sequence[int]]) -> Tensor:
    flat, valid = _places(winners, input.shape[2:], windows)
    picked = input.flatten(2).gather(2, flat.flatten(2)).view(winners.shape)
    return picked if valid is None else picked * valid


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, winners: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(winners)
        ctx.options = (input.shape[2:], is_channels_last(input), *options)
        with below_autograd():
            return OP_GATHER(input, winners, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (winners,) = ctx.saved_tensors
        return OP_MAX_BACKWARD(dy, winners, *ctx.options), *(None,) * 6


def _gather_autograd(input: Tensor, winners: Tensor, *options: Any) -> Tensor:
    """Without windows (after an unpooling) the places may be any, and repeat: then torch's operators add them up."""
    if winners.dtype is torch.int64 and not options[0] and torch.is_grad_enabled() and input.requires_grad:
        return _differentiable_gather(input, winners, options[:4])
    y: Tensor = _Gather.apply(input, winners, *options)
    return y


OP_GATHER: Any = register(
    f"pool_gather(Tensor input, Tensor winners, {_WINDOWS}, str backend) -> Tensor",
    implementation=_gather,
    fake=lambda input, winners, *_: empty(input, winners.shape, is_channels_last(winners)),
    autograd=_gather_autograd,
)


# --- operators: mean -------------------------------------------------------------------------------------------------


def _mean_forward(
    input: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    include_pad: bool, divisor: int, backend: str,
) -> Tensor:  # fmt: skip
    windows, channels_last = (kernel_size, stride, padding, dilation), is_channels_last(input)
    if not runs_kernels(backend, input):
        return laid_out(_torch_mean(input, size, windows, include_pad, divisor), channels_last)
    from ..kernels.pool import run_forward

    y = empty(input, (*input.shape[:2], *size), channels_last)
    if y.numel():
        window = kernel_window(input.shape[2:], size, windows)
        run_forward(
            input, y, None, window, "mean", include_pad=include_pad, divisor=divisor, is_channels_last=channels_last
        )
    return y


def _mean_backward(
    dy: Tensor, space: list[int], channels_last: bool, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], include_pad: bool, divisor: int, backend: str,
) -> Tensor:  # fmt: skip
    windows = (kernel_size, stride, padding, dilation)
    if dy.numel() == 0:
        return empty(dy, (*dy.shape[:2], *space), channels_last).zero_()
    if not runs_kernels(backend, dy):
        return laid_out(_torch_mean_backward(dy, space, windows, include_pad, divisor), channels_last)
    from ..kernels.pool import run_backward

    dx = empty(dy, (*dy.shape[:2], *space), channels_last)
    window = kernel_window(space, dy.shape[2:], windows)
    run_backward(
        dy, None, None, None, dx, window, "mean", include_pad=include_pad, divisor=divisor,
        is_channels_last=channels_last,
    )  # fmt: skip
    return dx


class _AvgPool(torch.autograd.Function):
    """Linear, and so is its gradient: each is the other's."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, size: Any, *options: Any) -> Tensor:
        ctx.options = (input.shape[2:], is_channels_last(input), *options)
        with below_autograd():
            return OP_AVG(input, size, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return OP_AVG_BACKWARD(dy, *ctx.options), *(None,) * 8


class _AvgPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, space: Any, channels_last: bool, *options: Any) -> Tensor:
        ctx.options = (dy.shape[2:], *options)
        with below_autograd():
            return OP_AVG_BACKWARD(dy, space, channels_last, *options)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        return OP_AVG(ddx, *ctx.options), *(None,) * 9


OP_AVG: Any = register(
    f"avg_pool(Tensor input, SymInt[] size, {_WINDOWS}, bool include_pad, SymInt divisor, str backend) -> Tensor",
    implementation=_mean_forward,
    fake=_fake_forward,
    autograd=_AvgPool.apply,
)
OP_AVG_BACKWARD: Any = register(
    f"avg_pool_backward(Tensor dy, SymInt[] space, bool channels_last, {_WINDOWS}, bool include_pad, SymInt divisor, "
    "str backend) -> Tensor",
    implementation=_mean_backward,
    fake=lambda dy, space, channels_last, *_: empty(dy, (*dy.shape[:2], *space), channels_last),
    autograd=_AvgPoolBackward.apply,
)


# --- operators: norms ------------------------------------------------------------------------------------------------


def _lp_forward(
    input: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    norm: float, backend: str,
) -> Tensor:  # fmt: skip
    windows, channels_last = (kernel_size, stride, padding, dilation), is_channels_last(input)
    if not runs_kernels(backend, input):
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        y = _root(_torch_mean(wide.pow(norm), size, windows, True, 0), kernel_size, norm)
        return laid_out(y.to(input.dtype), channels_last)
    from ..kernels.pool import run_forward

    y = empty(input, (*input.shape[:2], *size), channels_last)
    if y.numel():
        window = kernel_window(input.shape[2:], size, windows)
        run_forward(input, y, None, window, f"norm{norm:.0f}", is_channels_last=channels_last)
    return y


def _lp_backward(
    dy: Tensor, input: Tensor, output: Tensor, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], norm: float, backend: str,
) -> Tensor:  # fmt: skip
    windows, channels_last = (kernel_size, stride, padding, dilation), is_channels_last(input)
    if not runs_kernels(backend, dy):
        wide = torch.promote_types(dy.dtype, torch.float32)
        spread = lambda g: _torch_mean_backward(g, input.shape[2:], windows, True, 0)  # noqa: E731
        dx = _lp_gradient(dy.to(wide), input.to(wide), output.to(wide), kernel_size, norm, spread)
        return laid_out(dx.to(dy.dtype), channels_last)
    from ..kernels.pool import run_backward

    dx = empty(input, input.shape, channels_last)
    if dx.numel():
        window = kernel_window(input.shape[2:], dy.shape[2:], windows)
        saved = output if is_channels_last(output) == channels_last else laid_out(output, channels_last)
        factor = input if norm == 2 else None
        run_backward(dy, None, saved, factor, dx, window, f"norm{norm:.0f}", is_channels_last=channels_last)
    return dx


def _lp_gradient(
    dy: Tensor, input: Tensor, output: Tensor, kernel_size: Sequence[int], norm: float, spread: Callable[[Tensor],
    Tensor],
) -> Tensor:  # fmt: skip
    """``sum over windows of dy * y^(1-p) * K / (divisor p), times p x^(p-1)``; ``spread`` is the gradient of a mean.
    The factors are torch's, so that what overflows is NaN where torch's is. A sum that is NaN has no gradient for p = 1
    alone, as in torch."""
    flat = (output == 0) | (output.isnan() if norm == 1 else False)
    slope = torch.where(flat, 1.0, output) ** (1 - norm) * math.prod(kernel_size)
    return spread(torch.where(flat, 0.0, dy * slope) / norm) * (norm * input ** (norm - 1))


def _lp_backward_autograd(dy: Tensor, input: Tensor, output: Tensor, *options: Any) -> Tensor:
    """A first backward runs the kernel; one that is differentiated again runs the formula in our other operators."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (dy, input, output)):
        *windows, norm, backend = options
        space, channels_last = input.shape[2:], is_channels_last(input)
        spread = lambda g: OP_AVG_BACKWARD(g, space, channels_last, *windows, True, 0, backend)  # noqa: E731
        return _lp_gradient(dy, input, output, windows[0], norm, spread)
    with below_autograd():
        dx: Tensor = OP_LP_BACKWARD(dy, input, output, *options)
    return dx


class _LpPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, size: Any, *options: Any) -> Tensor:
        with below_autograd():
            y: Tensor = OP_LP(input, size, *options)
        ctx.save_for_backward(input, y)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return OP_LP_BACKWARD(dy, *ctx.saved_tensors, *ctx.options), *(None,) * 7


OP_LP: Any = register(
    f"lp_pool(Tensor input, SymInt[] size, {_WINDOWS}, float norm, str backend) -> Tensor",
    implementation=_lp_forward,
    fake=_fake_forward,
    autograd=_LpPool.apply,
)
OP_LP_BACKWARD: Any = register(
    f"lp_pool_backward(Tensor dy, Tensor input, Tensor output, {_WINDOWS}, float norm, str backend) -> Tensor",
    implementation=_lp_backward,
    fake=lambda dy, input, *_: empty(input, input.shape, is_channels_last(input)),
    autograd=_lp_backward_autograd,
)
# What records the gradient of each operator that a public function calls.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    OP_MAX: lambda *call: _MaxPool.apply(OP_MAX_WITH_OFFSETS, *call)[0],
    OP_MAX_WITH_INDICES: lambda *call: _MaxPool.apply(OP_MAX_WITH_INDICES, *call),
    OP_AVG: _AvgPool.apply,
    OP_LP: _LpPool.apply,
}


# --- operators: unpooling --------------------------------------------------------------------------------------------


def _unpool(
    input: Tensor, indices: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int],
    backend: str,
) -> Tensor:  # fmt: skip
    channels_last = is_channels_last(input)
    if runs_kernels(backend, input):
        from ..kernels.pool import run_unpool

        y = empty(input, (*input.shape[:2], *size), channels_last)
        if input.numel() == 0 or y.numel() == 0:
            return y.zero_()
        window = kernel_window(size, input.shape[2:], (kernel_size, stride, padding, []))
        run_unpool(input, indices, y, window, is_channels_last=channels_last)
        return y
    return laid_out(_torch_unpool(input, indices, size, stride, padding), channels_last)


class _MaxUnpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.backend = options[-1]
        with below_autograd():
            return OP_UNPOOL(input, indices, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return OP_GATHER(dy, indices, *_ADAPTIVE, ctx.backend), *(None,) * 6


OP_UNPOOL: Any = register(
    "max_unpool(Tensor input, Tensor indices, SymInt[] size, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
    "str backend) -> Tensor",
    implementation=_unpool,
    fake=lambda input, indices, size, *_: empty(input, (*input.shape[:2], *size), is_channels_last(input)),
    autograd=_MaxUnpool.apply,
)
