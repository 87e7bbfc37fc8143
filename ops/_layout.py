"""Memory formats as torch sees them."""

from __future__ import annotations

import torch


def is_channels_last(t: torch.Tensor) -> bool:
    """Does torch take this [N, C, H, W] tensor for channels last? Its rule reads the strides alone, so a tensor with
    one channel can be both; see ``is_strides_like_channels_last`` in ATen."""
    sizes, strides = t.shape, t.stride()
    if strides[1] == 0:
        return False
    lowest = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < lowest:
            return False
        # Strides (1, 1, 1, 1) of a contiguous [N, 1, 1, 1] tensor do not count.
        if dim == 0 and lowest == strides[1]:
            return False
        lowest = strides[dim]
        if sizes[dim] > 1:
            lowest *= sizes[dim]
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def autocast(tensors: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Casts to the autocast dtype what torch's own list would for a convolution; differentiable."""
    kind = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(kind):
        return tensors
    low = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(low)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64 and t.device.type == kind
        else t
        for t in tensors
    )
