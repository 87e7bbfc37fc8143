"""Recurrent modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..ops import elman_step, gru, lstm, rnn
from ..ops.rnn import elman_head, require_torch
from ..ops.rnn_checks import check_nonlinearity


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
