"""Convolution and max pooling in one kernel, for inference: public function, and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from . import conv, pool
from ._checks import Size
from ._dispatch import Ruling, choose, conv_setting, measured, operator_precision, torch_serves
from ._layout import autocast
from ._register import requires_grad, run_operator
from .conv_checks import ConvArgs, check_conv
from .conv_operators import result_is_channels_last
from .conv_pool_operators import OP, pool_window
from .pool_checks import PoolArgs, check_max_pool


def conv2d_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0,
    dilation: Size = 1, groups: int = 1, *, activation: str | None = "relu", scale: Tensor | None = None,
    precision: str | None = None, pool_kernel_size: Size = 2, pool_stride: Size | None = None, pool_padding: Size = 0,
) -> Tensor:  # fmt: skip
    r"""``max_pool2d(conv2d(input, weight, bias, ...), ...)`` whose convolution's output never reaches memory.

    .. math:: y_{nkuv} = \max_{i,j} z_{n,k,\,u\,pool\_stride + i - pool\_padding,\,v\,pool\_stride + j - pool\_padding}
              \qquad z = \mathrm{conv2d}(input, \ldots)

    The stem of a network, and blocks that end in pooling. For inference: where a gradient is needed the call is
    :func:`conv2d` followed by :func:`max_pool2d`, whatever the backend. Windows that overlap compute some pixels of the
    convolution twice, so ``"auto"`` takes the kernel only where that cannot cost what it saves; otherwise it is the two
    calls as well, each of which chooses for itself.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in :func:`conv2d`.
        activation, scale, precision: as in :func:`conv2d`; the activation comes before the maximum.
        pool_kernel_size, pool_stride, pool_padding: as in :func:`max_pool2d`; ``pool_stride`` defaults to the window.

    Returns:
        ``[N, K, U, V]`` in the dtype of ``input``; channels last if ``input`` or ``weight`` is.

    Raises:
        RuntimeError, TypeError, ValueError: what :func:`conv2d` raises, then what :func:`max_pool2d` raises.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Memory: beside the result what :func:`conv2d` re-lays, and a copy of a result that is not channels last.

    Example::

        >>> x, w = torch.randn(2, 3, 224, 224), torch.randn(64, 3, 7, 7)
        >>> pool = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
        >>> tritune.conv2d_max_pool2d(x, w, stride=2, padding=3, **pool).shape
        torch.Size([2, 64, 56, 56])
    """
    if has_torch_function_variadic(input, weight, bias, scale):
        overridden: Tensor = handle_torch_function(
            conv2d_max_pool2d, (input, weight, bias, scale), input, weight, bias, stride, padding, dilation, groups,
            activation=activation, scale=scale, precision=precision, pool_kernel_size=pool_kernel_size,
            pool_stride=pool_stride, pool_padding=pool_padding,
        )  # fmt: skip
        return overridden
    geometry, window = (stride, padding, dilation, groups), (pool_kernel_size, pool_stride, pool_padding)
    if torch_serves(input) or requires_grad((input, weight, bias, scale)):
        return _apart(input, weight, bias, geometry, activation, scale, precision, window)
    input, weight, bias, scale = autocast(input, weight, bias, scale)
    args = check_conv(
        2, input, weight, bias, *geometry, activation=activation, scale=scale, precision=precision
    )  # fmt: skip
    sizes = check_max_pool(2, _convolved(input, weight, args), *window)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    backend = choose(
        "conv2d_max_pool2d",
        [t for t in (input, weight, bias, scale) if t is not None],
        lambda device: _auto_rule(batched, weight, args, sizes, precision, device),
        lambda device: (_choice(_problem(batched, weight, args, sizes, precision), device),),
        lambda: conv.limits(batched, weight, args),
    )
    if backend == "torch":
        return _apart(input, weight, bias, geometry, activation, scale, precision, window)

    if args.pad_extra is not None:
        batched = conv.pad_around(batched, args.pad_extra)
    multiplied = operator_precision(input, precision, conv_setting)
    call = (
        batched, weight, bias, scale, args.output_size, args.stride, args.padding, args.dilation, args.groups,
        activation or "none", multiplied, sizes.kernel_size, sizes.stride, sizes.padding, "triton",
    )  # fmt: skip
    y: Tensor = run_operator(OP, call, False)
    return y if input.dim() == 4 else y.squeeze(0).contiguous()  # of a single image torch pools to a contiguous one


# --- from arguments to a call ----------------------------------------------------------------------------------------


def _apart(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], activation: str | None,
    scale: Tensor | None, precision: str | None, window: tuple[Any, Any, Any],
) -> Tensor:  # fmt: skip
    """The two calls, each of which checks its arguments and chooses for itself."""
    y = conv.convolve(
        conv.conv2d, False, 2, input, weight, bias, geometry, activation, None, scale, precision
    )  # fmt: skip
    pooled: Tensor = pool.max_pool(pool.max_pool2d, 2, y, *window, 1, False, False)
    return pooled


def _convolved(input: Tensor, weight: Tensor, args: ConvArgs) -> Tensor:
    """One number that passes for the convolution's output: what is checked of it is shape and dtype."""
    channels = weight.shape[0] if weight.shape[1] else 0  # torch's rule
    shape = (*input.shape[:-3], channels, *args.output_size)
    return torch.empty((), dtype=input.dtype).expand(shape)


# --- the choice of backend -------------------------------------------------------------------------------------------


def _problem(input: Tensor, weight: Tensor, args: ConvArgs, window: PoolArgs, precision: str | None) -> Any:
    from ..kernels.conv_pool import conv_pool_problem

    one = conv.conv_problem(input, weight, args, False, precision)._replace(channels_last=True)
    return conv_pool_problem(one, pool_window(window.kernel_size, window.stride, window.padding), window.output_size)


def _choice(problem: Any, device: DeviceSpec) -> tuple[str, Choice]:
    from ..kernels.conv_pool import CONV_MAX_POOL

    return CONV_MAX_POOL.name, resolve(CONV_MAX_POOL, problem, device)


def _auto_rule(
    input: Tensor, weight: Tensor, args: ConvArgs, window: PoolArgs, precision: str | None,
    device: DeviceSpec,
) -> Ruling:  # fmt: skip
    """Does the kernel win? By measurement if there is one; else where it reads the image in place and would win even at
    60 % of the rate of the tensor cores, with what it computes twice, against two kernels at the machine's limits."""
    problem = _problem(input, weight, args, window, precision)
    name, choice = _choice(problem, device)
    known = measured([(name, choice)])
    if known:
        return known
    one = problem.conv
    again = problem.computed_pixels(choice.config) / one.pixels
    products_us = one.flops / (device.tflops(one.precision) * 1e6)
    bytes_us = 1e-3 / device.dram_gbs
    between = one.pixels * one.K * one.geometry.groups * one.itemsize
    fused_us = max(problem.minimal_bytes() * bytes_us, again * products_us / 0.6)
    pooling_us = (problem.minimal_bytes() - one.minimal_bytes() + 2 * between) * bytes_us
    apart_us = max(one.minimal_bytes() * bytes_us, products_us) + pooling_us
    reads_in_place = result_is_channels_last(input, weight) and input.shape[1] == one.C * one.geometry.groups
    if reads_in_place and fused_us < apart_us:
        return Ruling(
            True,
            f"not measured; {again:.2f} times the products at 60 % of their rate, {fused_us:.1f} us, take less than "
            f"two kernels at their limits, {apart_us:.1f} us",
        )
    return Ruling(False, "not measured, and counted traffic does not promise a win: conv2d, then max_pool2d")
