"""2-d max pooling: public function, operators, autograd, torch implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from . import pool_checks
from ._dispatch import choose, runs_kernels
from ._layout import is_channels_last, memory_format
from ._register import below_autograd, register

Pair = tuple[int, int]


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
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
    args = pool_checks.check_max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    needs_grad = torch.is_grad_enabled() and input.requires_grad
    index_bytes = 8 if return_indices else _offset_bytes(args.kernel_size) if needs_grad else 0
    backend = choose(
        "max_pool2d",
        (input,),
        lambda device: _auto_rule(_problem(batched, args, index_bytes), device, needs_grad),
        lambda device: _kernel_choices(_problem(batched, args, index_bytes), device, needs_grad),
        lambda: _limits(batched),
    )
    if backend == "torch":
        return _composite(input, args, return_indices)

    call = (batched, args.kernel_size, args.stride, args.padding, args.dilation, args.ceil_mode, "triton")
    if torch.compiler.is_compiling():
        result = OP_WITH_INDICES(*call) if return_indices else OP(*call)
    elif needs_grad:
        y, winners = _MaxPool2d.apply(OP_WITH_INDICES if return_indices else OP_WITH_OFFSETS, *call)
        result = (y, winners) if return_indices else y
    else:
        with below_autograd():
            result = OP_WITH_INDICES(*call) if return_indices else OP(*call)
    if input.dim() == 4:
        return result
    return tuple(t.squeeze(0) for t in result) if return_indices else result.squeeze(0)


# --- the choice of backend -------------------------------------------------------------------------------------------


def _limits(input: Tensor) -> str | None:
    if not torch.compiler.is_compiling() and input.numel() >= 2**31 * input.shape[1]:
        return "input has 2**31 pixels or more"
    return None


def _offset_bytes(kernel_size: Pair) -> int:
    taps = kernel_size[0] * kernel_size[1]
    return 1 if taps <= 254 else 2 if taps <= 2**15 - 1 else 4


def _window(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    from ..kernels.pool import Window

    return Window(*kernel_size, *stride, *padding, *dilation)


def _problem(input: Tensor, args: pool_checks.PoolArgs, index_bytes: int) -> Any:
    from ..kernels import pool

    window = _window(args.kernel_size, args.stride, args.padding, args.dilation)
    channels_last = is_channels_last(input)
    return pool.problem_of(tuple(input.shape), args.output_size, window, input.dtype, index_bytes, channels_last)


def _kernel_choices(problem: Any, device: DeviceSpec, needs_grad: bool) -> tuple[tuple[str, Choice], ...]:
    from ..kernels import pool

    tunables = (pool.FORWARD, pool.BACKWARD) if needs_grad else (pool.FORWARD,)
    return tuple((tunable.name, resolve(tunable, problem, device)) for tunable in tunables)


def _auto_rule(problem: Any, device: DeviceSpec, needs_grad: bool) -> tuple[bool, str]:
    """Do the kernels win? By measurement if there is one; else where torch's int64 indices cost a sixth more bytes."""
    choices = [choice for _, choice in _kernel_choices(problem, device, needs_grad)]
    measured = [(choice.us, choice.torch_us) for choice in choices if choice.us and choice.torch_us]
    if len(measured) == len(choices):
        ours_us = sum(us for us, _ in measured)
        torch_us = sum(us for _, us in measured)
        return ours_us < torch_us, f"measured: {ours_us:.1f} us against {torch_us:.1f} us of torch"
    ours = problem.minimal_bytes()
    theirs = problem._replace(index_bytes=8).minimal_bytes()  # torch's CUDA kernel always writes the indices
    if problem.channels_last and theirs >= 7 / 6 * ours:
        return True, f"not measured; small offsets save {1 - ours / theirs:.0%} of torch's bytes"
    return False, "not measured, and counted traffic does not promise a win: `tritune tune` can"


# --- torch's implementation: fallback and yardstick ------------------------------------------------------------------


def _composite(input: Tensor, args: pool_checks.PoolArgs, return_indices: bool) -> Any:
    window = (args.kernel_size, args.stride, args.padding, args.dilation)
    if args.has_empty_window:
        y, h, w = _pool_of_padded(input, args.output_size, *window)
        # The indices only of a compiled call, whose sizes may turn out to have no such window.
        return (y, h * input.shape[-1] + w) if return_indices else y
    return F.max_pool2d(input, *window, args.ceil_mode, return_indices)  # type: ignore[call-overload]


def _pool_of_padded(input: Tensor, output_size: Any, *window: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Pooling of a copy padded by hand: the same values, and defined where a window sees only padding (torch 2.13
    writes outside its buffers there). Also row and column of each winner in the image; those in the padding lie
    outside of it."""
    kernel_size, stride, padding, dilation = window
    height, width = input.shape[-2:]
    below = max(0, (output_size[0] - 1) * stride[0] + (kernel_size[0] - 1) * dilation[0] + 1 - padding[0] - height)
    right = max(0, (output_size[1] - 1) * stride[1] + (kernel_size[1] - 1) * dilation[1] + 1 - padding[1] - width)
    lowest = float("-inf") if input.is_floating_point() else torch.iinfo(input.dtype).min
    padded = F.pad(input, (padding[1], right, padding[0], below), value=lowest)
    y, flat = F.max_pool2d(padded, kernel_size, stride, 0, dilation, return_indices=True)
    y, flat = (t[..., : output_size[0], : output_size[1]] for t in (y, flat))
    full = padding[1] + width + right
    return y, flat // full - padding[0], flat % full - padding[1]


def _taps(device: torch.device, size: int, out: int, *window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one dimension: where each window starts, its first tap inside the image, and whether it has one."""
    taps, stride, padding, dilation = window
    start = torch.arange(out, device=device) * stride - padding
    inside = start[:, None] + torch.arange(taps, device=device) * dilation
    inside = (inside >= 0) & (inside < size)
    return start, inside.int().argmax(1), inside.any(1)


# --- operators -------------------------------------------------------------------------------------------------------


def _output_size(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Pair:  # fmt: skip
    return tuple(
        pool_checks.pool_output_size(*sizes, ceil_mode)
        for sizes in zip(input.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    )  # type: ignore[return-value]


def _offset_dtype(kernel_size: Any) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[_offset_bytes(kernel_size)]


def _forward(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, backend: str, *,
    index_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    pq = _output_size(input, kernel_size, stride, padding, dilation, ceil_mode)
    channels_last = is_channels_last(input)
    if runs_kernels(backend, input):
        from ..kernels.pool import run_forward

        window = _window(kernel_size, stride, padding, dilation)
        return run_forward(input, pq, window, index_dtype=index_dtype, is_channels_last=channels_last)

    (height, width), layout, window = input.shape[2:], memory_format(channels_last), (kernel_size, stride, padding)
    p, first_r, sees_rows = _taps(input.device, height, pq[0], *(pair[0] for pair in (*window, dilation)))
    q, first_s, sees_cols = _taps(input.device, width, pq[1], *(pair[1] for pair in (*window, dilation)))
    if bool(sees_rows.all()) and bool(sees_cols.all()):
        y, flat = F.max_pool2d(input, *window, dilation, ceil_mode, return_indices=True)
        h, w = flat // width, flat % width
    else:
        y, h, w = _pool_of_padded(input, pq, *window, dilation)
    y = y.contiguous(memory_format=layout)
    if index_dtype is None:
        return y, None
    # A winner in the padding only ties with taps of -inf: the first of those in the image is the winner then.
    h = torch.where((h >= 0) & (h < height), h, (p + first_r * dilation[0])[:, None])
    w = torch.where((w >= 0) & (w < width), w, (q + first_s * dilation[1])[None, :])
    winners = h * width + w
    if index_dtype != torch.int64:
        tap = (h - p[:, None]) // dilation[0] * kernel_size[1] + (w - q[None, :]) // dilation[1]
        none = 255 if index_dtype == torch.uint8 else -1
        winners = torch.where(sees_rows[:, None] & sees_cols[None, :], tap, none)
    return y, winners.to(index_dtype).contiguous(memory_format=layout)


def _fake_forward(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, backend: str
) -> Tensor:
    pq = _output_size(input, kernel_size, stride, padding, dilation, ceil_mode)
    layout = memory_format(is_channels_last(input))
    return torch.empty((*input.shape[:2], *pq), dtype=input.dtype, device=input.device, memory_format=layout)


def _fake_pair(index_dtype: torch.dtype | None, *call: Any) -> tuple[Tensor, Tensor]:
    y = _fake_forward(*call)
    return y, torch.empty_like(y, dtype=index_dtype or _offset_dtype(call[1]))


class _MaxPool2d(torch.autograd.Function):
    """``(y, winners)`` of OP_WITH_OFFSETS or OP_WITH_INDICES; the winners have no gradient."""

    @staticmethod
    def forward(ctx: Any, op: Any, input: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            y, winners = op(input, *options)
        ctx.mark_non_differentiable(winners)
        ctx.save_for_backward(winners)
        ctx.geometry = (*input.shape[2:], is_channels_last(input), *options[:4], options[5])
        ctx.set_materialize_grads(False)
        return y, winners

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        (winners,) = ctx.saved_tensors
        dx = None if dy is None else OP_BACKWARD(dy, winners, *ctx.geometry)
        return None, dx, *(None,) * 6


_WINDOW = "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
_CALL = f"Tensor input, {_WINDOW}, bool ceil_mode, str backend"
OP: Any = register(
    f"max_pool2d({_CALL}) -> Tensor",
    implementation=lambda *call: _forward(*call, index_dtype=None)[0],
    fake=_fake_forward,
    autograd=lambda *call: _MaxPool2d.apply(OP_WITH_OFFSETS, *call)[0],
)
OP_WITH_OFFSETS: Any = register(
    f"max_pool2d_with_offsets({_CALL}) -> (Tensor, Tensor)",
    implementation=lambda *call: _forward(*call, index_dtype=_offset_dtype(call[1])),
    fake=lambda *call: _fake_pair(None, *call),
    autograd=lambda *call: _MaxPool2d.apply(OP_WITH_OFFSETS, *call),
)
OP_WITH_INDICES: Any = register(
    f"max_pool2d_with_indices({_CALL}) -> (Tensor, Tensor)",
    implementation=lambda *call: _forward(*call, index_dtype=torch.int64),
    fake=lambda *call: _fake_pair(torch.int64, *call),
    autograd=lambda *call: _MaxPool2d.apply(OP_WITH_INDICES, *call),
)


# Backward: linear in dy, so its own gradient picks what the winners' places hold.


def _places(winners: Tensor, width: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """The winners as flat int64 indices into the plane, and where there is one at all."""
    if winners.dtype == torch.int64:
        return winners, None
    tap = winners.long()
    valid = tap != (255 if winners.dtype == torch.uint8 else -1)
    tap = torch.where(valid, tap, 0)
    p = torch.arange(winners.shape[2], device=winners.device)[:, None] * stride[0] - padding[0]
    q = torch.arange(winners.shape[3], device=winners.device)[None, :] * stride[1] - padding[1]
    flat = (p + tap // kernel_size[1] * dilation[0]) * width + q + tap % kernel_size[1] * dilation[1]
    return torch.where(valid, flat, 0), valid


def _backward(
    dy: Tensor, winners: Tensor, h: int, w: int, channels_last: bool,
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, backend: str,
) -> Tensor:  # fmt: skip
    if runs_kernels(backend, dy):
        from ..kernels.pool import run_backward

        window = _window(kernel_size, stride, padding, dilation)
        return run_backward(dy, winners, (h, w), window, is_channels_last=channels_last)
    flat, valid = _places(winners, w, kernel_size, stride, padding, dilation)
    source = dy.to(torch.promote_types(dy.dtype, torch.float32))
    if valid is not None:
        source = source * valid
    dx = source.new_zeros(*dy.shape[:2], h * w).scatter_add_(2, flat.flatten(2), source.flatten(2))
    return dx.to(dy.dtype).view(*dy.shape[:2], h, w).contiguous(memory_format=memory_format(channels_last))


def _fake_backward(dy: Tensor, winners: Tensor, h: int, w: int, channels_last: bool, *rest: Any) -> Tensor:
    layout = memory_format(channels_last)
    return torch.empty((*dy.shape[:2], h, w), dtype=dy.dtype, device=dy.device, memory_format=layout)


class _MaxPool2dBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, winners: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(winners)
        ctx.options = options
        with below_autograd():
            return OP_BACKWARD(dy, winners, *options)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        (winners,) = ctx.saved_tensors
        _, width, _, *window, _ = ctx.options
        flat, valid = _places(winners, width, *window)
        picked = ddx.flatten(2).gather(2, flat.flatten(2)).view(winners.shape)
        return picked if valid is None else picked * valid, *(None,) * 10


OP_BACKWARD: Any = register(
    f"max_pool2d_backward(Tensor dy, Tensor winners, SymInt h, SymInt w, bool channels_last, {_WINDOW}, "
    "str backend) -> Tensor",
    implementation=_backward,
    fake=_fake_backward,
    autograd=_MaxPool2dBackward.apply,
)
