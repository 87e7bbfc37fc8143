"""Modules: ``torch.nn``'s names, constructor arguments and ``state_dict``, running on this library's operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .ops import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    attention,
    attention_pool,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    elman_step,
    gru,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    lstm,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
    rnn,
)
from .ops.rnn import elman_head, require_torch
from .ops.rnn_checks import check_nonlinearity

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "Attention",
    "AttentionPool",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ElmanRNN",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "fold_bn",
]


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


class _MaxPool(torch.nn.modules.pooling._MaxPoolNd):
    _run: Callable[..., Any]

    def forward(self, input: Tensor) -> Any:
        """The maxima; with ``return_indices`` also where they lie."""
        return self._run(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class _AvgPool(torch.nn.modules.pooling._AvgPoolNd):
    _run: Callable[..., Tensor]

    def forward(self: Any, input: Tensor) -> Tensor:
        divisor = () if isinstance(self, torch.nn.AvgPool1d) else (self.divisor_override,)
        window = (self.kernel_size, self.stride, self.padding)
        return self._run(input, *window, self.ceil_mode, self.count_include_pad, *divisor)


class _AdaptiveMaxPool(torch.nn.modules.pooling._AdaptiveMaxPoolNd):
    _run: Callable[..., Any]

    def forward(self, input: Tensor) -> Any:
        """The maxima; with ``return_indices`` also where they lie."""
        return self._run(input, self.output_size, self.return_indices)


class _AdaptiveAvgPool(torch.nn.modules.pooling._AdaptiveAvgPoolNd):
    _run: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, self.output_size)


class _LPPool(torch.nn.modules.pooling._LPPoolNd):
    _run: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class _MaxUnpool(torch.nn.modules.pooling._MaxUnpoolNd):
    _run: Callable[..., Tensor]

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        """``output_size`` as in torch: the sizes of the result, or its whole shape."""
        return self._run(input, indices, self.kernel_size, self.stride, self.padding, output_size)


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


class AvgPool1d(_AvgPool, torch.nn.AvgPool1d):
    """:class:`torch.nn.AvgPool1d` on :func:`tritune.avg_pool1d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, C, Q]`` or ``[C, Q]``.
    """

    _run = staticmethod(avg_pool1d)


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


class _Recurrent(torch.nn.RNNBase):
    """What RNN, GRU and LSTM share. They derive from torch's base class, not from torch's own three, which Dynamo
    refuses to trace."""

    _torch: type[torch.nn.RNNBase]
    _run: Callable[..., tuple[Tensor, ...]]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As in torch. One layer on a padded batch is our operator; packed sequences, several layers and projections
        run torch's."""
        reason = self._uncovered(input)
        if reason is not None:
            tensors = [input.data if isinstance(input, PackedSequence) else input, *self.parameters()]
            if isinstance(tensors[0], Tensor):
                require_torch(self.mode.lower(), tensors, reason)
            serve = self._torch.forward
            if self.mode == "LSTM" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                # Its operator cannot be traced with gradients. torch's own module breaks the graph, too.
                serve = torch.compiler.disable(serve)
            return serve(self, input, hx)
        output, *states = self._run(input, *self._weights(), hx)
        return output, states[0] if len(states) == 1 else tuple(states)

    def _uncovered(self, input: Any) -> str | None:
        if not isinstance(input, Tensor):
            return "a packed sequence" if isinstance(input, PackedSequence) else f"input is a {type(input).__name__}"
        if self.num_layers > 1:
            return f"num_layers={self.num_layers}"
        return f"proj_size={self.proj_size}" if self.proj_size else None

    def _weights(self) -> list[Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh; those of two directions stacked."""
        stacked: list[Tensor | None] = []
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            one = getattr(self, f"{kind}_l0", None)
            if one is not None and self.bidirectional:
                one = torch.stack([one, getattr(self, f"{kind}_l0_reverse")])
            stacked.append(one)
        return stacked


class RNN(_Recurrent):
    """:class:`torch.nn.RNN` on :func:`tritune.rnn`: same arguments, parameters and ``state_dict``.

    Shape: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``, ``[T, I]`` for one sequence) to ``(output, h_n)``.
    """

    _torch = torch.nn.RNN

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                 *args: Any, **kwargs: Any) -> None:  # fmt: skip
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        check_nonlinearity(nonlinearity)
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **kwargs)
        self.nonlinearity = nonlinearity

    def _run(self, input: Tensor, *weights_and_state: Any) -> Any:
        return rnn(input, *weights_and_state, nonlinearity=self.nonlinearity, batch_first=self.batch_first)


class GRU(_Recurrent):
    """:class:`torch.nn.GRU` on :func:`tritune.gru`: same arguments, parameters and ``state_dict``.

    Shape: as :class:`RNN`.
    """

    _torch = torch.nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def _run(self, input: Tensor, *weights_and_state: Any) -> Any:
        return gru(input, *weights_and_state, batch_first=self.batch_first)


class LSTM(_Recurrent):
    """:class:`torch.nn.LSTM` on :func:`tritune.lstm`: same arguments, parameters and ``state_dict``.

    Shape: as :class:`RNN`, to ``(output, (h_n, c_n))``.
    """

    _torch = torch.nn.LSTM
    # torch's forward, which serves what we do not, calls these.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _run(self, input: Tensor, *weights_and_state: Any) -> Any:
        *weights, hx = weights_and_state
        if hx is not None and not (isinstance(hx, tuple | list) and len(hx) == 2 and all(map(torch.is_tensor, hx))):
            raise TypeError(f"LSTM: hx must be a pair of tensors (h_0, c_0), got {type(hx).__name__}")
        return lstm(input, *weights, *(hx or (None, None)), batch_first=self.batch_first)


class ElmanRNN(torch.nn.Module):
    r"""An Elman network with its output head, step by step or over a sequence.

    .. math:: h_t = \tanh(W_{hh} h_{t-1} + W_{xh} x_t + b_h), \quad o_t = W_{ho} h_t + b_o, \quad
              y_t = \tanh(W_{yh} o_t)

    Args:
        input_size, hidden_size, output_size: I, H and O.
        y_size: Y; default: ``output_size``.
        batch_first: input and outputs are ``[B, T, ...]``.

    Parameters start uniform in :math:`\pm 1 / \sqrt{\text{columns}}`, biases as their matrix.

    Shape: ``[T, B, I]`` or ``[T, I]`` to ``(y, o, h_n)``: ``[T, B, Y]``, ``[T, B, O]``, ``[B, H]``.

    Example::

        >>> net = tritune.nn.ElmanRNN(3, 16, 5)
        >>> y, o, h = net(torch.randn(7, 2, 3))
        >>> y.shape, h.shape
        (torch.Size([7, 2, 5]), torch.Size([2, 16]))
    """

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, y_size: int | None = None, *,
        batch_first: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        y_size = output_size if y_size is None else y_size
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "output_size": output_size, "y_size": y_size}
        for name, size in sizes.items():
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero")
        self.input_size, self.hidden_size, self.output_size, self.y_size = sizes.values()
        self.batch_first = batch_first

        def empty(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.W_xh, self.W_hh = empty(hidden_size, input_size), empty(hidden_size, hidden_size)
        self.b_h = empty(hidden_size)
        self.W_ho, self.b_o = empty(output_size, hidden_size), empty(output_size)
        self.W_yh = empty(self.y_size, output_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        pairs = (("W_xh", ""), ("W_hh", "b_h"), ("W_ho", "b_o"), ("W_yh", ""))
        for name, bias in pairs:
            bound = getattr(self, name).shape[1] ** -0.5
            for one in filter(None, (name, bias)):
                torch.nn.init.uniform_(getattr(self, one), -bound, bound)

    def forward(self, input: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``h0`` is ``[B, H]``, or ``[H]`` for one sequence; zeros by default."""
        if h0 is not None and (not isinstance(h0, Tensor) or h0.dim() != input.dim() - 1):
            got = list(h0.shape) if isinstance(h0, Tensor) else type(h0).__name__
            raise RuntimeError(f"h0 must be [B, H], or [H] for one sequence, got {got}")
        states = None if h0 is None else h0.unsqueeze(0)
        out, h_n = rnn(input, self.W_xh, self.W_hh, self.b_h, None, states, batch_first=self.batch_first)
        o, y = elman_head(out, self.W_ho, self.b_o, self.W_yh)
        assert o is not None
        assert y is not None
        return y, o, h_n[0]

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step, :func:`tritune.elman_step`: ``[B, I]`` and ``[B, H]`` to ``(h, o, y)``."""
        h, o, y = elman_step(x, h, self.W_xh, self.W_hh, self.b_h, self.W_ho, self.b_o, self.W_yh)
        assert o is not None
        assert y is not None
        return h, o, y

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, {self.hidden_size}, {self.output_size}, y_size={self.y_size}"
        return f"{sizes}, batch_first=True" if self.batch_first else sizes


class _Scored(torch.nn.Module):
    """What the attention modules share: scores, and a scale that may be learned."""

    logit_scale: torch.nn.Parameter | None

    def __init__(self, score: str, scale: float | str | None, eps: float, device: Any, dtype: Any) -> None:
        super().__init__()
        if score not in ("dot", "cosine"):
            raise ValueError(f"score={score!r} is not accepted: it must be 'dot' or 'cosine'")
        if isinstance(scale, str) and scale != "learnable":
            raise ValueError(f"scale={scale!r} is not accepted: it must be a number, 'learnable' or None")
        self.score, self.eps = score, eps
        self.fixed_scale = None if isinstance(scale, str) else scale
        learned = torch.nn.Parameter(torch.empty((), device=device, dtype=dtype)) if isinstance(scale, str) else None
        self.register_parameter("logit_scale", learned)

    def reset_parameters(self) -> None:
        if self.logit_scale is not None:
            torch.nn.init.constant_(self.logit_scale, math.log(10.0))

    @property
    def scale(self) -> float | Tensor | None:
        """What the scores are multiplied by."""
        if self.logit_scale is None:
            return self.fixed_scale
        # At most 100, as in CLIP and Swin V2. Dynamo takes a number that is no literal for an input.
        return self.logit_scale.clamp(max=4.605170185988092).exp()

    def extra_repr(self) -> str:
        scale = "'learnable'" if self.logit_scale is not None else self.fixed_scale
        return f"score={self.score!r}, scale={scale}"


class Attention(_Scored):
    """:func:`tritune.attention` without any projection.

    Args:
        score: ``"dot"`` or ``"cosine"``.
        scale: a number; ``None`` for the score's default; ``"learnable"`` for ``exp(logit_scale)``, a parameter that
            starts at log 10 and counts as at most log 100.
        is_causal, causal_alignment, enable_gqa, eps, precision: as in :func:`tritune.attention`.

    Shape: ``[..., H, M, D]``, ``[..., H, N, D]``, ``[..., H, N, DV]`` to ``[..., H, M, DV]``.

    Example::

        >>> layer = tritune.nn.Attention(score="cosine", scale="learnable")
        >>> layer(*(torch.randn(2, 4, 10, 16) for _ in range(3))).shape
        torch.Size([2, 4, 10, 16])
    """

    def __init__(
        self, *, score: str = "dot", scale: float | str | None = None, is_causal: bool = False,
        causal_alignment: str = "top_left", enable_gqa: bool = False, eps: float = 1e-6, precision: str | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(score, scale, eps, device, dtype)
        self.is_causal, self.causal_alignment = is_causal, causal_alignment
        self.enable_gqa, self.precision = enable_gqa, precision
        self.reset_parameters()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        out: Tensor = attention(
            query, key, value, score=self.score, scale=self.scale, attn_mask=attn_mask, bias=bias,
            is_causal=self.is_causal, causal_alignment=self.causal_alignment, enable_gqa=self.enable_gqa, eps=self.eps,
            precision=self.precision,
        )  # fmt: skip
        return out

    def extra_repr(self) -> str:
        options = [name for name in ("is_causal", "enable_gqa") if getattr(self, name)]
        return ", ".join([super().extra_repr(), *(f"{name}=True" for name in options)])


class AttentionPool(_Scored):
    r"""A sequence to one vector, or a few: :func:`tritune.attention_pool` with learned queries and projections.

    .. math:: y_m = W_o \big[\textstyle\sum_j \mathrm{softmax}_j\, s(q_{hm}, W_k x_j)\, W_v x_j\big]_h

    Args:
        embed_dim: size of an element, and of the result; a multiple of ``num_heads``.
        num_heads: H, each with ``embed_dim / H`` features.
        num_queries: M; with one the result has no dimension for it.
        score, scale, eps, precision: as in :class:`Attention`.
        bias: of the projections.

    Parameters: ``query [H, M, embed_dim / H]``, normally distributed, and linear layers ``key``, ``value``, ``out``.

    Shape: ``[B, N, embed_dim]`` or ``[N, embed_dim]`` to ``[B, embed_dim]`` or ``[embed_dim]``, with M queries
    ``[B, M, embed_dim]`` or ``[M, embed_dim]``.

    Example::

        >>> pool = tritune.nn.AttentionPool(32, num_heads=4, score="cosine", scale="learnable")
        >>> pool(torch.randn(2, 50, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 1, num_queries: int = 1, *, score: str = "dot",
        scale: float | str | None = None, bias: bool = True, eps: float = 1e-6, precision: str | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(score, scale, eps, device, dtype)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}")
        self.embed_dim, self.num_heads, self.num_queries, self.precision = embed_dim, num_heads, num_queries, precision
        shape = (num_heads, num_queries, embed_dim // num_heads)
        self.query = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.key, self.value, self.out = (
            torch.nn.Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype) for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        torch.nn.init.normal_(self.query)
        for layer in (self.key, self.value, self.out):
            layer.reset_parameters()

    def forward(self, input: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """``attn_mask``: bool ``[B, N]``, or ``[N]``: True at the elements that count."""
        key, value = (
            layer(input).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for layer in (self.key, self.value)
        )
        pooled = attention_pool(
            self.query, key, value, score=self.score, scale=self.scale, attn_mask=attn_mask, eps=self.eps,
            precision=self.precision,
        )  # fmt: skip
        result: Tensor = self.out(pooled.transpose(-3, -2).flatten(-2))
        return result.squeeze(-2) if self.num_queries == 1 else result

    def extra_repr(self) -> str:
        sizes = f"{self.embed_dim}, num_heads={self.num_heads}, num_queries={self.num_queries}"
        return f"{sizes}, {super().extra_repr()}"
