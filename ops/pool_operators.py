"""The registered operators of pooling: implementations, fakes and autograd.

All windows are one kind to the operators: fixed ones have a kernel size, stride, padding and dilation, adaptive ones
have none of them (empty lists), only the size of the result. Each operator's gradient is another of them:

    max_pool        -> max_pool_backward, whose gradient is pool_gather (x at the winners' places), and so on
    avg_pool        -> avg_pool_backward, whose gradient is avg_pool
    lp_pool         -> lp_pool_backward, whose gradient is made of the two above
    max_unpool      -> pool_gather
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autotune.layout import empty, laid_out
from ._dispatch import runs_kernels
from ._layout import is_channels_last
from ._register import below_autograd, register
from .pool_checks import Ints
from .pool_torch import (
    TORCH_FUNCTIONS,
    differentiable_gather,
    has_ceil_mode,
    largest_windows,
    lp_gradient,
    lp_root,
    max_of_padded,
    offsets_of,
    places_of,
    torch_adaptive,
    torch_mean,
    torch_mean_backward,
    torch_unpool,
    window_taps,
)

Windows = tuple[Ints, Ints, Ints, Ints]  # kernel_size, stride, padding, dilation
ADAPTIVE: Windows = ((), (), (), ())


def kernel_window(space: Sequence[int], size: Sequence[int], windows: Sequence[Sequence[int]]) -> Any:
    """The windows as the kernels take them."""
    from ..kernels.pool import Window

    kernel_size, stride, padding, dilation = windows
    if not stride:
        kernel_size = largest_windows(space, size)
        beside = all(full == taps * outs for full, taps, outs in zip(space, kernel_size, size, strict=True))
        if beside and math.prod(size) > 1 and max(kernel_size) <= 8:
            # Windows of one size that lie beside each other are fixed ones too. Only small ones, so that few binaries
            # are made.
            stride, padding = kernel_size, [0] * len(kernel_size)
    return Window.of(kernel_size, stride, padding, dilation or [1] * len(stride))


def offset_dtype(space: Sequence[int], size: Sequence[int], kernel_size: Sequence[int]) -> torch.dtype:
    """The narrowest integer that holds every tap of a window and one number more. Of an adaptive window, whose sizes
    may be symbols, a simple bound stands for the number of taps."""
    taps = math.prod(
        kernel_size or [(full + 2 * outs - 2) // outs if outs else 1 for full, outs in zip(space, size, strict=True)]
    )
    return torch.uint8 if taps <= 254 else torch.int16 if taps <= 2**15 - 1 else torch.int32


# --- maximum ---------------------------------------------------------------------------------------------------------


def max_forward(
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
    sees = [window_taps(dim, len(size), space, size, windows, input.device)[2].all() for dim in range(len(size))]
    if not stride:
        y, winners = torch_adaptive("max", len(size))(input, size, return_indices=True)
    elif all(sees):
        ceil_mode = has_ceil_mode(space, size, *windows)
        y, winners = TORCH_FUNCTIONS[f"max_pool{len(size)}d"](input, *windows, ceil_mode, return_indices=True)
    else:
        y, winners = max_of_padded(input, size, *(tuple(values) for values in windows))
    y = laid_out(y, channels_last)
    if index_dtype is None:
        return y, None
    if index_dtype is not torch.int64:
        winners = offsets_of(winners, space, windows, index_dtype)
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
    implementation=lambda *call: max_forward(*call, index_dtype=None)[0],
    fake=_fake_forward,
    autograd=lambda *call: _MaxPool.apply(OP_MAX_WITH_OFFSETS, *call)[0],
)
OP_MAX_WITH_OFFSETS: Any = register(
    f"max_pool_with_offsets({_MAX_CALL}) -> (Tensor, Tensor)",
    implementation=lambda *call: max_forward(*call, index_dtype=offset_dtype(call[0].shape[2:], call[1], call[2])),
    fake=lambda *call: _fake_pair(None, *call),
    autograd=lambda *call: _MaxPool.apply(OP_MAX_WITH_OFFSETS, *call),
)
OP_MAX_WITH_INDICES: Any = register(
    f"max_pool_with_indices({_MAX_CALL}) -> (Tensor, Tensor)",
    implementation=lambda *call: max_forward(*call, index_dtype=torch.int64),
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
    flat, valid = places_of(winners, space, windows)
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
    return laid_out(differentiable_gather(input, winners, windows), channels_last)


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
    if winners.dtype is torch.int64 and not options[0]:
        return differentiable_gather(input, winners, options[:4])
    y: Tensor = _Gather.apply(input, winners, *options)
    return y


OP_GATHER: Any = register(
    f"pool_gather(Tensor input, Tensor winners, {_WINDOWS}, str backend) -> Tensor",
    implementation=_gather,
    fake=lambda input, winners, *_: empty(input, winners.shape, is_channels_last(winners)),
    autograd=_gather_autograd,
)


# --- mean ------------------------------------------------------------------------------------------------------------


def _mean_forward(
    input: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    include_pad: bool, divisor: int, backend: str,
) -> Tensor:  # fmt: skip
    windows, channels_last = (kernel_size, stride, padding, dilation), is_channels_last(input)
    if not runs_kernels(backend, input):
        return laid_out(torch_mean(input, size, windows, include_pad, divisor), channels_last)
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
        return laid_out(torch_mean_backward(dy, space, windows, include_pad, divisor), channels_last)
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


# --- norms -----------------------------------------------------------------------------------------------------------


def _lp_forward(
    input: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int],
    norm: float, backend: str,
) -> Tensor:  # fmt: skip
    windows, channels_last = (kernel_size, stride, padding, dilation), is_channels_last(input)
    if not runs_kernels(backend, input):
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        y = lp_root(torch_mean(wide.pow(norm), size, windows, True, 0), kernel_size, norm)
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
        spread = lambda g: torch_mean_backward(g, input.shape[2:], windows, True, 0)  # noqa: E731
        dx = lp_gradient(dy.to(wide), input.to(wide), output.to(wide), kernel_size, norm, spread)
        return laid_out(dx.to(dy.dtype), channels_last)
    from ..kernels.pool import run_backward

    dx = empty(input, input.shape, channels_last)
    if dx.numel():
        window = kernel_window(input.shape[2:], dy.shape[2:], windows)
        saved = output if is_channels_last(output) == channels_last else laid_out(output, channels_last)
        factor = input if norm == 2 else None
        run_backward(dy, None, saved, factor, dx, window, f"norm{norm:.0f}", is_channels_last=channels_last)
    return dx


def _differentiable_lp_backward(dy: Tensor, input: Tensor, output: Tensor, *options: Any) -> Tensor:
    """A first backward runs the kernel; one that is differentiated again runs the formula in our other operators."""
    *windows, norm, backend = options
    space, channels_last = input.shape[2:], is_channels_last(input)
    spread = lambda g: OP_AVG_BACKWARD(g, space, channels_last, *windows, True, 0, backend)  # noqa: E731
    return lp_gradient(dy, input, output, windows[0], norm, spread)


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
    autograd=_differentiable_lp_backward,
)


# --- unpooling -------------------------------------------------------------------------------------------------------


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
    return laid_out(torch_unpool(input, indices, size, stride, padding), channels_last)


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
        return OP_GATHER(dy, indices, *ADAPTIVE, ctx.backend), *(None,) * 6


OP_UNPOOL: Any = register(
    "max_unpool(Tensor input, Tensor indices, SymInt[] size, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, "
    "str backend) -> Tensor",
    implementation=_unpool,
    fake=lambda input, indices, size, *_: empty(input, (*input.shape[:2], *size), is_channels_last(input)),
    autograd=_MaxUnpool.apply,
)
