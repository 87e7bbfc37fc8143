"""Convolution and max pooling in one kernel, for inference: function, operator, torch implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from . import conv, pool
from ._dispatch import (
    Verdict,
    choose,
    conv_setting,
    measured,
    operator_precision,
    resolved_precision,
    runs_kernels,
    torch_serves,
)
from ._layout import autocast, empty
from ._register import below_autograd, register
from .conv_checks import ConvArgs, check_conv
from .pool_checks import PoolArgs, check_max_pool, pool_output_size

Size = int | Sequence[int]
Pair = tuple[int, int]


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
    if torch_serves(input) or _needs_grad((input, weight, bias, scale)):
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
        lambda: conv._limits(batched, weight, args),
    )
    if backend == "torch":
        return _apart(input, weight, bias, geometry, activation, scale, precision, window)

    if args.pad_extra is not None:
        batched = conv._pad(batched, args.pad_extra)
    multiplied = operator_precision(input, precision, conv_setting)
    call = (
        batched, weight, bias, scale, args.output_size, args.stride, args.padding, args.dilation, args.groups,
        activation or "none", multiplied, sizes.kernel_size, sizes.stride, sizes.padding, "triton",
    )  # fmt: skip
    if torch.compiler.is_compiling():
        y = OP(*call)
    else:
        with below_autograd():
            y = OP(*call)
    return y if input.dim() == 4 else y.squeeze(0).contiguous()  # of a single image torch pools to a contiguous one


def _needs_grad(tensors: tuple[Any, ...]) -> bool:
    return any(isinstance(t, Tensor) and pool._needs_grad(t) for t in tensors)


def _apart(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], activation: str | None,
    scale: Tensor | None, precision: str | None, window: tuple[Any, Any, Any],
) -> Tensor:  # fmt: skip
    """The two calls, each of which checks its arguments and chooses for itself."""
    y = conv._convolve(
        conv.conv2d, False, 2, input, weight, bias, geometry, activation, None, scale, precision
    )  # fmt: skip
    pooled: Tensor = pool._max_pool(pool.max_pool2d, 2, y, *window, 1, False, False)
    return pooled


def _convolved(input: Tensor, weight: Tensor, args: ConvArgs) -> Tensor:
    """One number that passes for the convolution's output: what is checked of it is shape and dtype."""
    channels = weight.shape[0] if weight.shape[1] else 0  # torch's rule
    shape = (*input.shape[:-3], channels, *args.output_size)
    return torch.empty((), dtype=input.dtype).expand(shape)


# --- the choice of backend -------------------------------------------------------------------------------------------


def _window(kernel_size: Any, stride: Any, padding: Any) -> Any:
    from ..kernels.conv_pool import PoolWindow

    return PoolWindow(*kernel_size, *stride, *padding)


def _problem(input: Tensor, weight: Tensor, args: ConvArgs, window: PoolArgs, precision: str | None) -> Any:
    from ..kernels.conv_pool import conv_pool_problem

    one = conv._problem(input, weight, args, False, precision)._replace(channels_last=True)
    return conv_pool_problem(one, _window(window.kernel_size, window.stride, window.padding), window.output_size)


def _choice(problem: Any, device: DeviceSpec) -> tuple[str, Choice]:
    from ..kernels.conv_pool import CONV_MAX_POOL

    return CONV_MAX_POOL.name, resolve(CONV_MAX_POOL, problem, device)


def _auto_rule(
    input: Tensor, weight: Tensor, args: ConvArgs, window: PoolArgs, precision: str | None,
    device: DeviceSpec,
) -> Verdict:  # fmt: skip
    """Does the kernel win? By measurement if there is one; else where it reads the image in place and would win even at
    60 % of the rate of the tensor cores, with what it computes twice, against two kernels at the machine's limits."""
    problem = _problem(input, weight, args, window, precision)
    name, choice = _choice(problem, device)
    known = measured([(name, choice)])
    if known:
        return known
    one = problem.conv
    again = problem.pixels(choice.config) / one.pixels
    products_us = one.flops / (device.tflops(one.precision) * 1e6)
    bytes_us = 1e-3 / device.dram_gbs
    between = one.pixels * one.K * one.geometry.groups * one.itemsize
    fused_us = max(problem.minimal_bytes() * bytes_us, again * products_us / 0.6)
    pooling_us = (problem.minimal_bytes() - one.minimal_bytes() + 2 * between) * bytes_us
    apart_us = max(one.minimal_bytes() * bytes_us, products_us) + pooling_us
    reads_in_place = conv._result_is_channels_last(input, weight) and input.shape[1] == one.C * one.geometry.groups
    if reads_in_place and fused_us < apart_us:
        return Verdict(
            True,
            f"not measured; {again:.2f} times the products at 60 % of their rate, {fused_us:.1f} us, take less than "
            f"two kernels at their limits, {apart_us:.1f} us",
        )
    return Verdict(False, "not measured, and counted traffic does not promise a win: conv2d, then max_pool2d")


# --- operator --------------------------------------------------------------------------------------------------------


def _pooled_size(size: Sequence[int], kernel_size: Any, stride: Any, padding: Any) -> Pair:
    return tuple(pool_output_size(*sizes, 1, False) for sizes in zip(size, kernel_size, stride, padding, strict=True))  # type: ignore[return-value]


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, size: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, activation: str, precision: str,
    pool_kernel_size: list[int], pool_stride: list[int], pool_padding: list[int], backend: str,
) -> Tensor:  # fmt: skip
    window = (pool_kernel_size, pool_stride, pool_padding)
    if runs_kernels(backend, input):
        from ..kernels import conv as kernels
        from ..kernels.conv_pool import run

        return run(
            input, weight, size, kernels.Geometry.of(stride, padding, dilation, groups), _window(*window),
            _pooled_size(size, *window), precision=resolved_precision(input, precision, conv_setting), bias=bias,
            scale=scale, activation=activation, is_channels_last=conv._result_is_channels_last(input, weight),
        )  # fmt: skip
    z, _ = conv._forward(
        False, input, weight, bias, scale, None, size, None, stride, padding, dilation, groups, activation, precision,
        backend, save_input=False,
    )  # fmt: skip
    return pool._max_forward(z, list(_pooled_size(size, *window)), *window, [1, 1], backend, index_dtype=None)[0]


def _fake(
    input: Tensor, weight: Tensor, bias: Any, scale: Any, size: Any, stride: Any, padding: Any, dilation: Any,
    groups: int, activation: str, precision: str, pool_kernel_size: Any, pool_stride: Any, pool_padding: Any,
    backend: str,
) -> Tensor:  # fmt: skip
    output = _pooled_size(size, pool_kernel_size, pool_stride, pool_padding)
    shape = (input.shape[0], weight.shape[0], *output)
    return empty(input, shape, conv._result_is_channels_last(input, weight))


def _autograd(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, size: Any, stride: Any, padding: Any,
    dilation: Any, groups: int, activation: str, precision: str, pool_kernel_size: Any, pool_stride: Any,
    pool_padding: Any, backend: str,
) -> Tensor:  # fmt: skip
    """With a gradient the two operators that have one."""
    geometry, window = (stride, padding, dilation, groups), (pool_kernel_size, pool_stride, pool_padding)
    present = (t for t in (input, weight, bias, scale) if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in present):
        z = conv.OP(input, weight, bias, scale, None, size, None, *geometry, activation, precision, backend)
        return pool.OP_MAX(z, _pooled_size(size, *window), *window, [1, 1], backend)
    with below_autograd():
        return OP(input, weight, bias, scale, size, *geometry, activation, precision, *window, backend)


OP: Any = register(
    "conv2d_max_pool2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, SymInt[2] size, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, str activation, str precision, SymInt[2] pool_kernel_size, "
    "SymInt[2] pool_stride, SymInt[2] pool_padding, str backend) -> Tensor",
    implementation=_forward,
    fake=_fake,
    autograd=_autograd,
)
