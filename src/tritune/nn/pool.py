"""Pooling modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..ops import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    fractional_max_pool2d,
    fractional_max_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
)
from ._of_torch import OfTorch


class _MaxPool(OfTorch, torch.nn.modules.pooling._MaxPoolNd):
    _run: Callable[..., Any]

    def forward(self, input: Tensor) -> Any:
        """The maxima; with ``return_indices`` also where they lie."""
        if isinstance(input, Proxy) and (leaf := self._leaf(input)) is not None:
            return leaf
        return self._run(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class _AvgPool(OfTorch, torch.nn.modules.pooling._AvgPoolNd):
    _run: Callable[..., Tensor]
    divisor_override: int | None

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := self._leaf(input)) is not None:
            return leaf
        return self._run(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class _AdaptiveMaxPool(OfTorch, torch.nn.modules.pooling._AdaptiveMaxPoolNd):
    _run: Callable[..., Any]

    def forward(self, input: Tensor) -> Any:
        """The maxima; with ``return_indices`` also where they lie."""
        if isinstance(input, Proxy) and (leaf := self._leaf(input)) is not None:
            return leaf
        return self._run(input, self.output_size, self.return_indices)


class _AdaptiveAvgPool(OfTorch, torch.nn.modules.pooling._AdaptiveAvgPoolNd):
    _run: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := self._leaf(input)) is not None:
            return leaf
        return self._run(input, self.output_size)


class _LPPool(OfTorch, torch.nn.modules.pooling._LPPoolNd):
    _run: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := self._leaf(input)) is not None:
            return leaf
        return self._run(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class _MaxUnpool(OfTorch, torch.nn.modules.pooling._MaxUnpoolNd):
    _torchs_can_be_scripted = False  # TorchScript fails on torch's own three with an internal assertion
    _run: Callable[..., Tensor]

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``output_size`` as in torch: the sizes of the result, or its whole shape."""
        if isinstance(input, Proxy) and (leaf := self._leaf(input, indices, output_size)) is not None:
            return leaf
        return self._run(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class _FractionalMaxPool(OfTorch):
    _run: Callable[..., Any]
    # torch's constructor sets these.
    kernel_size: Any
    output_size: Any
    output_ratio: Any
    return_indices: bool
    _random_samples: Any

    def forward(self, input: Tensor) -> Any:
        """The maxima; with ``return_indices`` also where they lie."""
        if isinstance(input, Proxy) and (leaf := self._leaf(input)) is not None:
            return leaf
        return self._run(
            input, self.kernel_size, self.output_size, self.output_ratio, self.return_indices, self._random_samples
        )


class MaxPool1d(_MaxPool, torch.nn.MaxPool1d):
    """:class:`torch.nn.MaxPool1d` on :func:`tritune.max_pool1d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``; with ``return_indices`` a pair.
    """

    _run = staticmethod(max_pool1d)


class MaxPool2d(_MaxPool, torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on :func:`tritune.max_pool2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, P, Q]`` or ``[C, P, Q]``; with ``return_indices`` a pair.
    """

    _run = staticmethod(max_pool2d)


class MaxPool3d(_MaxPool, torch.nn.MaxPool3d):
    """:class:`torch.nn.MaxPool3d` on :func:`tritune.max_pool3d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``; with ``return_indices``
    a pair.
    """

    _run = staticmethod(max_pool3d)


class AvgPool1d(OfTorch, torch.nn.AvgPool1d):
    """:class:`torch.nn.AvgPool1d` on :func:`tritune.avg_pool1d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (leaf := self._leaf(input)) is not None:
            return leaf
        return avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AvgPool2d(_AvgPool, torch.nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on :func:`tritune.avg_pool2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, P, Q]`` or ``[C, P, Q]``.
    """

    _run = staticmethod(avg_pool2d)


class AvgPool3d(_AvgPool, torch.nn.AvgPool3d):
    """:class:`torch.nn.AvgPool3d` on :func:`tritune.avg_pool3d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``.
    """

    _run = staticmethod(avg_pool3d)


class AdaptiveMaxPool1d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool1d):
    """:class:`torch.nn.AdaptiveMaxPool1d` on :func:`tritune.adaptive_max_pool1d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``; with ``return_indices`` a pair.
    """

    _run = staticmethod(adaptive_max_pool1d)


class AdaptiveMaxPool2d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` on :func:`tritune.adaptive_max_pool2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, P, Q]`` or ``[C, P, Q]``; with ``return_indices`` a pair.
    """

    _run = staticmethod(adaptive_max_pool2d)


class AdaptiveMaxPool3d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool3d):
    """:class:`torch.nn.AdaptiveMaxPool3d` on :func:`tritune.adaptive_max_pool3d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``; with ``return_indices``
    a pair.
    """

    _run = staticmethod(adaptive_max_pool3d)


class AdaptiveAvgPool1d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool1d):
    """:class:`torch.nn.AdaptiveAvgPool1d` on :func:`tritune.adaptive_avg_pool1d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``.
    """

    _run = staticmethod(adaptive_avg_pool1d)


class AdaptiveAvgPool2d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` on :func:`tritune.adaptive_avg_pool2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, P, Q]`` or ``[C, P, Q]``.
    """

    _run = staticmethod(adaptive_avg_pool2d)


class AdaptiveAvgPool3d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool3d):
    """:class:`torch.nn.AdaptiveAvgPool3d` on :func:`tritune.adaptive_avg_pool3d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``.
    """

    _run = staticmethod(adaptive_avg_pool3d)


class LPPool1d(_LPPool, torch.nn.LPPool1d):
    """:class:`torch.nn.LPPool1d` on :func:`tritune.lp_pool1d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``.
    """

    _run = staticmethod(lp_pool1d)


class LPPool2d(_LPPool, torch.nn.LPPool2d):
    """:class:`torch.nn.LPPool2d` on :func:`tritune.lp_pool2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, P, Q]`` or ``[C, P, Q]``.
    """

    _run = staticmethod(lp_pool2d)


class LPPool3d(_LPPool, torch.nn.LPPool3d):
    """:class:`torch.nn.LPPool3d` on :func:`tritune.lp_pool3d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``.
    """

    _run = staticmethod(lp_pool3d)


class MaxUnpool1d(_MaxUnpool, torch.nn.MaxUnpool1d):
    """:class:`torch.nn.MaxUnpool1d` on :func:`tritune.max_unpool1d`.

    Shape: ``[N, C, Q]`` or ``[C, Q]`` to ``[N, C, L]`` or ``[C, L]``.
    """

    _run = staticmethod(max_unpool1d)


class MaxUnpool2d(_MaxUnpool, torch.nn.MaxUnpool2d):
    """:class:`torch.nn.MaxUnpool2d` on :func:`tritune.max_unpool2d`.

    Shape: ``[N, C, P, Q]`` or ``[C, P, Q]`` to ``[N, C, H, W]`` or ``[C, H, W]``.
    """

    _run = staticmethod(max_unpool2d)


class MaxUnpool3d(_MaxUnpool, torch.nn.MaxUnpool3d):
    """:class:`torch.nn.MaxUnpool3d` on :func:`tritune.max_unpool3d`.

    Shape: ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]`` to ``[N, C, D, H, W]`` or ``[C, D, H, W]``.
    """

    _run = staticmethod(max_unpool3d)


class FractionalMaxPool2d(_FractionalMaxPool, torch.nn.FractionalMaxPool2d):
    """:class:`torch.nn.FractionalMaxPool2d` on :func:`tritune.fractional_max_pool2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, P, Q]`` or ``[C, P, Q]``; with ``return_indices`` a pair.
    """

    _run = staticmethod(fractional_max_pool2d)


class FractionalMaxPool3d(_FractionalMaxPool, torch.nn.FractionalMaxPool3d):
    """:class:`torch.nn.FractionalMaxPool3d` on :func:`tritune.fractional_max_pool3d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]``; with ``return_indices``
    a pair.
    """

    _run = staticmethod(fractional_max_pool3d)
