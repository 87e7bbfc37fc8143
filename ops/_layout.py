"""Memory formats as torch sees them."""

from __future__ import annotations

from typing import Any

import torch


def is_channels_last(t: torch.Tensor) -> bool:
    """Does torch take this [N, C, *space] tensor for channels last? Its rule reads the strides alone, so a tensor with
    one channel can be both; see ``is_strides_like_channels_last`` in ATen. One dimension counts as two, the first of
    size 1, as in torch's conv1d."""
    sizes, strides = list(t.shape), list(t.stride())
    if len(sizes) == 3:
        sizes.insert(2, 1)
        strides.insert(2, sizes[3] * strides[2])
    if strides[1] == 0:
        return False
    lowest = 0
    for dim in (1, *range(len(sizes) - 1, 1, -1), 0):
        if sizes[dim] == 0 or strides[dim] < lowest:
            return False
        # Strides (1, 1, 1, 1) of a contiguous [N, 1, 1, 1] tensor do not count.
        if dim == 0 and lowest == strides[1]:
            return False
        lowest = strides[dim]
        if sizes[dim] > 1:
            lowest *= sizes[dim]
    return True


def has_unit_channels(t: torch.Tensor) -> bool:
    """Are neighbouring channels neighbours in memory?"""
    return t.shape[1] == 1 or t.stride(1) == 1


def or_empty(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """What an operator returns in place of ``None``, since it returns tensors only: one without elements."""
    return like.new_empty(0) if t is None else t


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def autocast(*arguments: Any) -> tuple[Any, ...]:
    """Casts floating-point tensors to the autocast dtype where one is in force, as torch does for a convolution."""
    kind = arguments[0].device.type if isinstance(arguments[0], torch.Tensor) else "none"
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return arguments
    low = torch.get_autocast_dtype(kind)
    return tuple(t.to(low) if isinstance(t, torch.Tensor) and _is_cast(t, kind) else t for t in arguments)


def _is_cast(t: torch.Tensor, kind: str) -> bool:
    return t.is_floating_point() and t.dtype is not torch.float64 and t.device.type == kind
