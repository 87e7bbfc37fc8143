"""Dense tensors [N, C, *space] in either memory format, for workloads, kernels and operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def laid_out(t: Tensor, channels_last: bool) -> Tensor:
    """The tensor dense in that layout: itself, or a copy."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t.contiguous()


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised tensor of that shape and layout; dtype and device are those of ``like``."""
    if not channels_last:
        return like.new_empty(shape)
    n, c, *space = shape
    return like.new_empty((n, *space, c)).movedim(-1, 1)
