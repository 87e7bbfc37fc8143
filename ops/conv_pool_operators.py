"""The registered operator of convolution with max pooling: implementation, fake and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..autotune.layout import empty
from . import conv_operators, pool_operators
from ._dispatch import conv_setting, resolved_precision, runs_kernels
from ._register import register
from .pool_checks import pool_output_size


def pool_window(kernel_size: Any, stride: Any, padding: Any) -> Any:
    from ..kernels.conv_pool import PoolWindow

    return PoolWindow(*kernel_size, *stride, *padding)


def pooled_size(size: Sequence[int], kernel_size: Any, stride: Any, padding: Any) -> tuple[int, int]:
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
            input, weight, size, kernels.Geometry.of(stride, padding, dilation, groups), pool_window(*window),
            pooled_size(size, *window), precision=resolved_precision(input, precision, conv_setting), bias=bias,
            scale=scale, activation=activation, is_channels_last=conv_operators.result_is_channels_last(input, weight),
        )  # fmt: skip
    z, _ = conv_operators.forward(
        False, input, weight, bias, scale, None, size, None, stride, padding, dilation, groups, activation, precision,
        backend, save_input=False,
    )  # fmt: skip
    y, _ = pool_operators.max_forward(z, list(pooled_size(size, *window)), *window, [1, 1], backend, index_dtype=None)
    return y


def _fake(
    input: Tensor, weight: Tensor, bias: Any, scale: Any, size: Any, stride: Any, padding: Any, dilation: Any,
    groups: int, activation: str, precision: str, pool_kernel_size: Any, pool_stride: Any, pool_padding: Any,
    backend: str,
) -> Tensor:  # fmt: skip
    output = pooled_size(size, pool_kernel_size, pool_stride, pool_padding)
    shape = (input.shape[0], weight.shape[0], *output)
    return empty(input, shape, conv_operators.result_is_channels_last(input, weight))


def _autograd(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, size: Any, stride: Any, padding: Any,
    dilation: Any, groups: int, activation: str, precision: str, pool_kernel_size: Any, pool_stride: Any,
    pool_padding: Any, backend: str,
) -> Tensor:  # fmt: skip
    """The two operators that have a gradient."""
    geometry, window = (stride, padding, dilation, groups), (pool_kernel_size, pool_stride, pool_padding)
    z = conv_operators.OP(input, weight, bias, scale, None, size, None, *geometry, activation, precision, backend)
    return pool_operators.OP_MAX(z, pooled_size(size, *window), *window, [1, 1], backend)


OP: Any = register(
    "conv2d_max_pool2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, SymInt[2] size, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, str activation, str precision, SymInt[2] pool_kernel_size, "
    "SymInt[2] pool_stride, SymInt[2] pool_padding, str backend) -> Tensor",
    implementation=_forward,
    fake=_fake,
    autograd=_autograd,
)
