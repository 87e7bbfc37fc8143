"""Pooling in torch's operators: the fallback of the kernels, and their yardstick."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pool_checks import Ints, pool_output_size

_max_of_cells = torch.adaptive_max_pool1d


def _max_pool(rank: int) -> Callable[..., Any]:
    """That of torch.nn.functional, which finds its operators by their names in ``torch`` when it is called."""
    maxima = getattr(torch, f"max_pool{rank}d")
    both = getattr(torch if rank == 1 else torch._C._nn, f"max_pool{rank}d_with_indices")

    def pool(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        function = both if return_indices else maxima
        return function(input, kernel_size, [] if stride is None else stride, padding, dilation, ceil_mode)

    return pool


def _adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As :func:`_max_pool`."""
    both = _max_of_cells(input, output_size)
    return both if return_indices else both[0]


# torch's own, as they are when this is imported: people put ours in their place.
TORCH_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"{kind}{rank}d": getattr(F, f"{kind}{rank}d")
        for kind in ("avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool", "max_unpool")
        for rank in (1, 2, 3)
    },
    **{f"max_pool{rank}d": _max_pool(rank) for rank in (1, 2, 3)},
    "adaptive_max_pool1d": _adaptive_max_pool1d,
    **{f"fractional_max_pool{rank}d": getattr(F, f"fractional_max_pool{rank}d") for rank in (2, 3)},
}

# Before, torch's lp_pool raises to an infinite power.
KNOWS_INFINITE_NORMS = torch.__version__ >= "2.13"


def torch_first(errors: tuple[type[Exception], ...], function: Callable[..., Any], input: Tensor, *options: Any) -> Any:
    """What torch's function of that name returns; ``None`` where it raises one of the ``errors``, and for nothing
    pooled or to pool: there the validator has the word. While sizes are recorded there are no errors, and no size is
    asked for."""
    try:
        result = TORCH_FUNCTIONS[function.__name__](input, *options)
    except errors:
        return None
    y = result[0] if type(result) is tuple else result
    return result if not errors or y.numel() else None


def torch_adaptive(kind: str, rank: int) -> Callable[..., Any]:
    return TORCH_FUNCTIONS[f"adaptive_{kind}_pool{rank}d"]


def lacks_a_kernel(t: Tensor) -> bool:
    """Are these 16-bit numbers on the CPU, for which torch has no kernel that averages in three dimensions?"""
    return t.device.type == "cpu" and t.dtype in (torch.float16, torch.bfloat16)


def has_ceil_mode(
    space: Sequence[int], size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> bool:  # fmt: skip
    """Is the result larger than without ``ceil_mode``?"""
    sizes = zip(space, kernel_size, stride, padding, dilation, strict=True)
    return list(size) != [pool_output_size(full, k, s, p, d, False) for full, k, s, p, d in sizes]


# --- maximum ---------------------------------------------------------------------------------------------------------


def max_of_padded(
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
    y, flat = TORCH_FUNCTIONS[f"max_pool{rank}d"](padded, kernel_size, stride, 0, dilation, return_indices=True)
    for dim, outs in enumerate(size, 2):
        y, flat = y.narrow(dim, 0, outs), flat.narrow(dim, 0, outs)
    winners = torch.zeros_like(flat)
    for dim, place in enumerate(_coordinates(flat, padded.shape[2:])):
        start, first, _ = window_taps(dim, rank, space, size, (kernel_size, stride, padding, dilation), flat.device)
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


def window_taps(
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


def largest_windows(space: Sequence[int], size: Sequence[int]) -> list[int]:
    """Taps of the largest adaptive window along each dimension."""
    pairs = zip(space, size, strict=True)
    return [-(-(full + outs - math.gcd(full, outs)) // max(1, outs)) for full, outs in pairs]


def _no_tap(dtype: torch.dtype) -> int:
    """What the kernels write for a window that sees only padding: a number with all bits set."""
    return 255 if dtype is torch.uint8 else -1


def offsets_of(winners: Tensor, space: Sequence[int], windows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Places in the image as taps of their windows; a window that sees only padding has none."""
    size = winners.shape[2:]
    kernel_size, stride, _, dilation = windows
    taps = kernel_size or largest_windows(space, size)
    offsets, seen = torch.zeros_like(winners), torch.ones_like(winners, dtype=torch.bool)
    for dim, place in enumerate(_coordinates(winners, space)):
        start, _, sees = window_taps(dim, len(size), space, size, windows, winners.device)
        offsets = offsets * taps[dim] + (place - start) // (dilation[dim] if stride else 1)
        seen = seen & sees
    return torch.where(seen, offsets, _no_tap(dtype)).to(dtype)


def places_of(winners: Tensor, space: Sequence[int], windows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """The winners as places in the image, and which windows have one; ``None`` where all have."""
    if winners.dtype is torch.int64:
        return winners, None
    size = winners.shape[2:]
    kernel_size, stride, _, dilation = windows
    taps = kernel_size or largest_windows(space, size)
    valid = winners != _no_tap(winners.dtype)
    flat = torch.zeros_like(winners, dtype=torch.int64)
    for dim, tap in enumerate(_coordinates(torch.where(valid, winners, 0).long(), taps)):
        start, _, _ = window_taps(dim, len(size), space, size, windows, winners.device)
        flat = flat * space[dim] + start + tap * (dilation[dim] if stride else 1)
    return torch.where(valid, flat, 0), valid


def differentiable_gather(input: Tensor, winners: Tensor, windows: Sequence[Sequence[int]]) -> Tensor:
    """The input at the winners' places, and 0 for a window that has none."""
    flat, valid = places_of(winners, input.shape[2:], windows)
    picked = input.flatten(2).gather(2, flat.flatten(2)).view(winners.shape)
    return picked if valid is None else picked * valid


# --- mean and norms --------------------------------------------------------------------------------------------------


def torch_avg(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, include_pad: bool, divisor: int
) -> Tensor:  # fmt: skip
    """torch's function, of a batch or of one sample. In three dimensions its kernel for the CPU has no 16-bit types:
    they are computed in float32, and stay so under autocast."""
    rank = len(kernel_size)
    if rank == 1:
        y: Tensor = TORCH_FUNCTIONS["avg_pool1d"](input, kernel_size, stride, padding, ceil_mode, include_pad)
        return y if divisor == 0 else y * (kernel_size[0] / divisor)
    function: Callable[..., Tensor] = TORCH_FUNCTIONS[f"avg_pool{rank}d"]
    call = (kernel_size, stride, padding, ceil_mode, include_pad, divisor or None)
    if rank == 3 and lacks_a_kernel(input):
        y = function(input.float(), *call)
        return y if torch.is_autocast_enabled("cpu") else y.to(input.dtype)
    return function(input, *call)


def torch_mean(
    input: Tensor, size: Sequence[int], windows: Sequence[Sequence[int]], include_pad: bool, divisor: int
) -> Tensor:  # fmt: skip
    """The mean over windows of any kind, with a result of just that size."""
    rank = len(size)
    if not windows[1]:
        y: Tensor = torch_adaptive("avg", rank)(input, size)
        return y
    kernel_size, stride, padding, _ = windows
    ceil_mode = has_ceil_mode(input.shape[2:], size, kernel_size, stride, padding, [1] * rank)
    return torch_avg(input, kernel_size, stride, padding, ceil_mode, include_pad, divisor).to(input.dtype)


def torch_mean_backward(
    dy: Tensor, space: Sequence[int], windows: Sequence[Sequence[int]], include_pad: bool, divisor: int
) -> Tensor:  # fmt: skip
    """The gradient of :func:`torch_mean`. torch's own kernels for it know two and three dimensions, and of the input
    they look at the shape alone."""
    rank, size = len(space), dy.shape[2:]
    if rank == 1:
        flat = [[0 if place == 2 else 1, *values] if values else [] for place, values in enumerate(windows)]
        return torch_mean_backward(dy.unsqueeze(2), (1, *space), flat, include_pad, divisor).squeeze(2)
    like = dy.new_empty(1).expand(*dy.shape[:2], *space)
    if rank == 3 and lacks_a_kernel(dy):
        return torch_mean_backward(dy.float(), space, windows, include_pad, divisor).to(dy.dtype)
    if not windows[1]:
        dx: Tensor = getattr(torch.ops.aten, f"_adaptive_avg_pool{rank}d_backward")(dy, like)
        return dx
    kernel_size, stride, padding, _ = windows
    ceil_mode = has_ceil_mode(space, size, kernel_size, stride, padding, [1] * rank)
    function: Callable[..., Tensor] = getattr(torch.ops.aten, f"avg_pool{rank}d_backward")
    return function(dy, like, kernel_size, stride, padding, ceil_mode, include_pad, divisor or None)


def lp_root(mean: Tensor, kernel_size: Sequence[int], norm_type: int | float) -> Tensor:
    """A power average from the mean of the powers. As in torch its derivative is 0 where the mean is 0."""
    return (torch.sign(mean) * F.relu(torch.abs(mean))).mul(math.prod(kernel_size)).pow(1.0 / norm_type)


def lp_gradient(
    dy: Tensor, input: Tensor, output: Tensor, kernel_size: Sequence[int], norm: float, spread: Callable[[Tensor],
    Tensor],
) -> Tensor:  # fmt: skip
    """``sum over windows of dy * y^(1-p) * K / (divisor p), times p x^(p-1)``; ``spread`` is the gradient of a mean.
    The factors are torch's, so that what overflows is NaN where torch's is. A sum that is NaN has no gradient for p = 1
    alone, as in torch."""
    flat = (output == 0) | (output.isnan() if norm == 1 else False)
    slope = torch.where(flat, 1.0, output) ** (1 - norm) * math.prod(kernel_size)
    return spread(torch.where(flat, 0.0, dy * slope) / norm) * (norm * input ** (norm - 1))


# --- unpooling -------------------------------------------------------------------------------------------------------


def torch_unpool(input: Tensor, indices: Tensor, size: Any, stride: Any, padding: Any) -> Tensor:
    """torch's unpooling, of a batch or of one sample."""
    aten: Any = torch.ops.aten
    y: Tensor
    if len(size) == 1:
        y = aten.max_unpool2d(input.unsqueeze(-1), indices.unsqueeze(-1), [*size, 1]).squeeze(-1)
    elif len(size) == 2:
        y = aten.max_unpool2d(input, indices, size)
    else:
        y = aten.max_unpool3d(input, indices, size, stride, padding)
    return y
