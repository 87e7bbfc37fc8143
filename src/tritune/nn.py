"""Modules: ``torch.nn``'s names, constructor arguments and ``state_dict``, running on this library's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import conv2d, max_pool2d

__all__ = ["Conv2d", "MaxPool2d"]


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an optional activation and residual in the same kernel.

    Args:
        activation: applied to the output before it is stored; see :func:`tritune.conv2d`.
        precision: how fp32 is multiplied; see :func:`tritune.conv2d`.
        (all others): as in torch.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, K, P, Q]`` or ``[K, P, Q]``.

    Example::

        >>> layer = tritune.nn.Conv2d(3, 32, 3, padding=1, activation="relu")
        >>> layer(torch.randn(1, 3, 28, 28)).shape
        torch.Size([1, 32, 28, 28])
    """

    def __init__(self, *args: Any, activation: str | None = None, precision: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.precision = precision

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual`` has the output's shape and is added before the activation."""
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            activation=self.activation, residual=residual, precision=self.precision,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = [
            f"{name}={value!r}"
            for name, value in (("activation", self.activation), ("precision", self.precision))
            if value is not None
        ]
        return ", ".join([super().extra_repr(), *options])


class MaxPool2d(torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on :func:`tritune.max_pool2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, P, Q]`` or ``[C, P, Q]``; with ``return_indices`` a pair.
    """

    def forward(self, input: Tensor) -> Any:
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )
