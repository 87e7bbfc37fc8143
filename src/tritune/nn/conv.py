"""Convolution modules, and the convolution that a batch normalisation is folded into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d


class _Fused(torch.nn.modules.conv._ConvNd):
    """What the six convolutions share: the options of the epilogue."""

    _run: Callable[..., Tensor]
    scale: Tensor | None

    def __init__(self, *args: Any, activation: str | None = None, precision: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.precision = precision
        self.register_buffer("scale", None)  # :func:`fold_bn` sets it

    def _epilogue(self, residual: Tensor | None) -> dict[str, Any]:
        return {
            "activation": self.activation, "residual": residual, "scale": self.scale, "precision": self.precision
        }  # fmt: skip

    def extra_repr(self) -> str:
        options = [
            f"{name}={value!r}"
            for name, value in (("activation", self.activation), ("precision", self.precision))
            if value is not None
        ]
        return ", ".join([super().extra_repr(), *options])


class _Conv(_Fused):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual`` has the output's shape and is added before the activation."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._run(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, **self._epilogue(residual)
        )


class _ConvTranspose(_Fused, torch.nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: Any = None, residual: Tensor | None = None) -> Tensor:
        """``output_size`` as in torch; ``residual`` has the output's shape and is added before the activation."""
        window: tuple[Any, ...] = (self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation)
        output_padding = self._output_padding(input, output_size, *window)
        return self._run(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation,
            **self._epilogue(residual),
        )  # fmt: skip


class Conv1d(_Conv, torch.nn.Conv1d):
    """:class:`torch.nn.Conv1d` on :func:`tritune.conv1d`; see :class:`Conv2d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, K, Q]`` or ``[K, Q]``.
    """

    _run = staticmethod(conv1d)


class Conv2d(_Conv, torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an optional activation and residual in the same kernel.

    Args:
        activation: applied to the output before it is stored; see :func:`tritune.conv2d`.
        precision: how fp32 is multiplied; see :func:`tritune.conv2d`.
        (all others): as in torch; a ``padding_mode`` other than ``"zeros"`` pads a copy of the input first, as there.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, K, P, Q]`` or ``[K, P, Q]``.

    Example::

        >>> layer = tritune.nn.Conv2d(3, 32, 3, padding=1, activation="relu")
        >>> layer(torch.randn(1, 3, 28, 28)).shape
        torch.Size([1, 32, 28, 28])
    """

    _run = staticmethod(conv2d)


class Conv3d(_Conv, torch.nn.Conv3d):
    """:class:`torch.nn.Conv3d` on :func:`tritune.conv3d`; see :class:`Conv2d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, K, Z, P, Q]`` or ``[K, Z, P, Q]``.
    """

    _run = staticmethod(conv3d)


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` on :func:`tritune.conv_transpose1d`; see :class:`ConvTranspose2d`.

    Shape: ``[N, C, Q]`` or ``[C, Q]`` to ``[N, K, L]`` or ``[K, L]``.
    """

    _run = staticmethod(conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with an optional activation and residual in the same kernel.

    Args:
        activation, precision: see :func:`tritune.conv_transpose2d`.
        (all others): as in torch.

    Shape: ``[N, C, P, Q]`` or ``[C, P, Q]`` to ``[N, K, H, W]`` or ``[K, H, W]``.

    Example::

        >>> layer = tritune.nn.ConvTranspose2d(16, 8, 2, stride=2, activation="relu")
        >>> layer(torch.randn(1, 16, 14, 14)).shape
        torch.Size([1, 8, 28, 28])
    """

    _run = staticmethod(conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` on :func:`tritune.conv_transpose3d`; see :class:`ConvTranspose2d`.

    Shape: ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]`` to ``[N, K, D, H, W]`` or ``[K, D, H, W]``.
    """

    _run = staticmethod(conv_transpose3d)


_OF_TORCH: dict[type, Any] = {
    kind.__bases__[1]: kind for kind in (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}


def fold_bn(conv: torch.nn.modules.conv._ConvNd, bn: torch.nn.modules.batchnorm._BatchNorm) -> _Fused:
    r"""A convolution followed by a batch normalisation in evaluation mode, as one convolution.

    .. math:: \mathrm{bn}(w * x + b) = s\,(w * x) + s\,(b - \mathrm{mean}) + \beta,\qquad
              s = \gamma / \sqrt{\mathrm{var} + \epsilon}

    The factor stays out of the weights, as the ``scale`` of the result: a 16-bit weight is not rounded a second time,
    and is shared with ``conv``; one that is parametrized (``weight_norm``) is taken as it is now. Scale and bias are
    computed in fp32 at least and do not follow later changes of ``bn``.

    Args:
        conv: one of torch's six convolutions or of ours, without an activation.
        bn: ``torch.nn.BatchNorm1d``, ``2d`` or ``3d`` with running statistics, over the channels of ``conv``.

    Returns:
        The module of ours, whose ``activation`` may be set after that, in evaluation mode.

    Raises:
        TypeError: for other modules, also for a convolution with a ``forward`` of its own.
        ValueError: if they do not fit, or ``bn`` has no running statistics.

    Example::

        >>> conv, bn = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8).eval()
        >>> folded = tritune.fold_bn(conv, bn)
        >>> x = torch.randn(1, 3, 9, 9)
        >>> torch.allclose(folded(x), bn(conv(x)), atol=1e-5)
        True
    """
    kind = next((ours for theirs, ours in _OF_TORCH.items() if isinstance(conv, theirs)), None)
    if kind is None or type(conv).forward not in (kind.forward, kind.__bases__[1].forward):
        raise TypeError(f"fold_bn: conv must be a convolution of torch.nn or tritune.nn, not {type(conv).__name__}")
    if not isinstance(bn, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
        raise TypeError(f"fold_bn: bn must be a batch normalisation of torch.nn, not {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: bn keeps no running statistics, so its result depends on the batch")
    if bn.num_features != conv.out_channels:
        raise ValueError(f"fold_bn: bn has {bn.num_features} features and conv {conv.out_channels} output channels")
    if getattr(conv, "activation", None) is not None or getattr(conv, "scale", None) is not None:
        raise ValueError("fold_bn: conv has an activation or a scale already, which bn would have to come before")
    weight = conv.weight  # of a parametrized convolution computed anew each time
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.to(wide)
        bias = -scale * bn.running_mean.to(wide)
        if conv.bias is not None:
            bias = bias + scale * conv.bias.to(wide)
        if bn.bias is not None:
            bias = bias + bn.bias.to(wide)
    folded: _Fused = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, dilation=conv.dilation,
        groups=conv.groups, bias=True, padding_mode=conv.padding_mode, device="meta",
        precision=getattr(conv, "precision", None),
        **({"output_padding": conv.output_padding} if conv.transposed else {}),
    )  # fmt: skip
    folded.weight = weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight.detach())
    folded.bias = torch.nn.Parameter(bias.to(weight.dtype))
    folded.scale = scale.to(weight.dtype)
    return folded.eval()
