"""Pooling over windows at random, which no kernel of ours computes: public functions that leave it to torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._checks import Size
from ._dispatch import Ruling, choose, current_backend, torch_serves
from .pool_torch import TORCH_FUNCTIONS


def fractional_max_pool2d(
    input: Tensor, kernel_size: Size, output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None, return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:  # fmt: skip
    r"""The maximum of each of P x Q windows whose distances are random, near H / P and W / Q.

    .. math:: y_{ncpq} = \max_{r,s} x_{n,c,a_p + r,b_q + s}

    With a sample u in [0, 1) and step :math:`\alpha = (H - R) / (P - 1)` window p starts at
    :math:`a_p = \lfloor (p + u) \alpha \rfloor - \lfloor u \alpha \rfloor`, the last one at H - R; columns likewise.

    A drop-in for :func:`torch.nn.functional.fractional_max_pool2d` on torch's implementation: no kernel of ours
    computes it yet.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size: R and S, or one number for both.
        output_size: P and Q, or one number for both.
        output_ratio: what H and W are multiplied by for P and Q, if there is no ``output_size``.
        return_indices: also return where the maxima lie, ``h * W + w``.
        _random_samples: ``[N, C, 2]`` in [0, 1), in the dtype of ``input``, for columns and rows; by default drawn from
            torch's generator.

    Returns:
        ``[N, C, P, Q]``; with ``return_indices`` a pair with int64 of the same shape.

    Raises:
        RuntimeError, TypeError, ValueError: what torch raises.
        UnsupportedError: under ``use_backend("triton")``.

    Example::

        >>> tritune.fractional_max_pool2d(torch.randn(2, 16, 50, 32), 3, output_size=(13, 12)).shape
        torch.Size([2, 16, 13, 12])
    """
    return _fractional_max_pool(
        fractional_max_pool2d, input, kernel_size, output_size, output_ratio, return_indices, _random_samples
    )


def fractional_max_pool3d(
    input: Tensor, kernel_size: Size, output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None, return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:  # fmt: skip
    """3-d pooling over windows at random: :func:`fractional_max_pool2d` with three dimensions of space.

    A drop-in for :func:`torch.nn.functional.fractional_max_pool3d`: ``[N, C, D, H, W]`` or ``[C, D, H, W]``, with
    samples ``[N, C, 3]`` for depth, rows and columns.

    Example::

        >>> tritune.fractional_max_pool3d(torch.randn(2, 16, 20, 20, 20), 3, output_ratio=0.5).shape
        torch.Size([2, 16, 10, 10, 10])
    """
    return _fractional_max_pool(
        fractional_max_pool3d, input, kernel_size, output_size, output_ratio, return_indices, _random_samples
    )


def _fractional_max_pool(
    function: Callable[..., Any], input: Tensor, kernel_size: Any, output_size: Any, output_ratio: Any,
    return_indices: bool, samples: Tensor | None,
) -> Any:  # fmt: skip
    """torch's own function, which is its own validator; for the kernels the one for tensors without data."""
    call = (kernel_size, output_size, output_ratio, return_indices)
    if has_torch_function_variadic(input, samples):
        return handle_torch_function(function, (input, samples), input, *call, samples)
    theirs = TORCH_FUNCTIONS[function.__name__]
    if not torch_serves(input) and isinstance(input, Tensor):
        if current_backend() == "triton":
            theirs(input.to("meta"), *call, samples.to("meta") if isinstance(samples, Tensor) else samples)
        reason = "no kernel has windows at random"
        choose(function.__name__, (input,), lambda _: Ruling(False, reason), lambda _: (), lambda: reason)
    return theirs(input, *call, samples)
