"""Recurrent modules."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.fx import Proxy
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from ..ops import elman_step, rnn
from ..ops._dispatch import in_transform, is_exporting, is_watched, require_torch, torch_computes, torch_serves
from ..ops.rnn import elman_head, is_traced_as_torch, sequence_layer
from ..ops.rnn_checks import check_dtypes, check_input_dims, check_nonlinearity, check_state_dims
from ..ops.rnn_torch import TORCH_LAYERS
from ._of_torch import OfTorch, Quantizable


class _Recurrent(Quantizable, torch.nn.RNNBase):
    """What RNN, GRU and LSTM share.

    They derive from torch's base class, not from torch's own three: Dynamo refuses each module that is an instance of
    one of those, by isinstance, unless everybody sets ``torch._dynamo.config.allow_rnn``.
    """

    __jit_unused_properties__ = [  # type: ignore[misc]  # noqa: RUF012
        *Quantizable.__jit_unused_properties__, *torch.nn.RNNBase.__jit_unused_properties__
    ]  # fmt: skip
    _torch: type[torch.nn.RNNBase]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As in torch. On our kernels one layer over a padded batch; torch's own module serves the rest."""
        data = input.data if isinstance(input, PackedSequence) else input
        if (
            torch_computes(data) and data.is_floating_point() and not _is_any_autocast_enabled() and not in_transform()
        ):  # fmt: skip
            if is_watched():
                require_torch(self._torch.__name__.lower(), [data, *self.parameters()], self._uncovered(input))
            if hx is not None:
                check_dtypes(data, self._states(hx))
            return self._torch.forward(self, input, hx)
        if isinstance(input, Proxy) and (leaf := self._leaf(input, hx)) is not None:
            return leaf
        if not isinstance(data, Tensor):
            return self._torch.forward(self, input, hx)  # raises
        if not torch_serves(data):
            reason = self._uncovered(input)
            if reason is not None:
                require_torch(self._torch.__name__.lower(), [data, *self.parameters()], reason)
                return self._torch.forward(self, input, hx)
        return self._serve_packed(input, hx) if isinstance(input, PackedSequence) else self._serve(input, hx)

    def _uncovered(self, input: Any) -> str | None:
        if isinstance(input, PackedSequence):
            return "a packed sequence"
        if self.num_layers > 1:
            return f"num_layers={self.num_layers}"
        return f"proj_size={self.proj_size}" if self.proj_size else None

    def _serve(self, input: Tensor, hx: Any) -> Any:
        if self.num_layers > 1 or self.proj_size or is_exporting():
            check_input_dims(_CELLS[self.mode], input)
            if hx is not None:
                check_state_dims(_CELLS[self.mode], input, self._states(hx))
            if input.dim() == 2:
                batch_dim = 0 if self.batch_first else 1
                hx = None if hx is None else self._joined([state.unsqueeze(1) for state in self._states(hx)])
                out, state = self._serve(input.unsqueeze(batch_dim), hx)
                return out.squeeze(batch_dim), self._joined([one.squeeze(1) for one in self._states(state)])
            self.check_input(input, None)
            if hx is not None:
                self.check_forward_args(input, hx, None)
            if is_traced_as_torch(input.shape[1 if self.batch_first else 0]):
                return self._exported(input, hx)
        return self._by_layer(input, None, hx)

    def _exported(self, input: Tensor, hx: Any) -> Any:
        """What torch's module leaves in an exported program. Its own forward would also assign to its attributes,
        which torch.export warns of."""
        if hx is None:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            batch = input.shape[0 if self.batch_first else 1]
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)
            hx = self._joined(
                [torch.zeros(rows, batch, size, dtype=input.dtype, device=input.device)
                 for size in sizes[: 2 if self.mode == "LSTM" else 1]]
            )  # fmt: skip
        weights = [getattr(self, name) for name in self._flat_weights_names]
        out, *states = TORCH_LAYERS[_CELLS[self.mode]](
            input, hx, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first,
        )  # fmt: skip
        return out, self._joined(states)

    def _serve_packed(self, input: PackedSequence, hx: Any) -> Any:
        rows, batch_sizes, sorted_indices, unsorted_indices = input
        self.check_input(rows, batch_sizes)
        if hx is not None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            for state in self._states(hx):
                if state.shape[0] != count:
                    raise RuntimeError(f"Expected {count} hidden states, got {list(state.shape)}")
            hx = self.permute_hidden(self._joined(self._states(hx)), sorted_indices)
        batch = int(batch_sizes[0])
        for state in () if hx is None else self._states(hx):
            torch._check(state.shape[1] == batch)
        out, state = self._by_layer(rows, batch_sizes, hx, batch)
        packed = PackedSequence(out, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(state, unsorted_indices)

    def _by_layer(self, input: Tensor, batch_sizes: Tensor | None, hx: Any, batch: int = 0) -> Any:
        directions = 2 if self.bidirectional else 1
        given = () if hx is None else self._states(hx)
        lasts = []
        for layer in range(self.num_layers):
            states = given if self.num_layers == 1 else [s.narrow(0, layer * directions, directions) for s in given]
            h0, c0, *_ = (*states, None, None)
            weights = self._weights(layer)
            input, *last = sequence_layer(
                _CELLS[self.mode], input, batch_sizes, weights, h0, c0, self.batch_first, batch
            )
            lasts.append(last if self.mode == "LSTM" else last[:1])
            if layer + 1 < self.num_layers and self.training and self.dropout:
                input = dropout(input, self.dropout)
        if self.num_layers == 1:
            return input, self._joined(lasts[0])
        return input, self._joined([torch.cat(layers) for layers in zip(*lasts, strict=True)])

    def _weights(self, layer: int) -> list[Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh, w_hr, each with its directions stacked; ``None`` for one that the module lacks."""
        stacked: list[Tensor | None] = []
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
            one = getattr(self, f"{kind}_l{layer}", None)
            if one is not None:
                reverse = [getattr(self, f"{kind}_l{layer}_reverse")] if self.bidirectional else []
                one = torch.stack([one, *reverse]) if reverse else one.unsqueeze(0)
            stacked.append(one)
        return stacked

    def _states(self, hx: Any) -> Sequence[Tensor]:
        return (hx,)

    def _joined(self, states: Sequence[Tensor]) -> Any:
        return states[0]


_CELLS = {"RNN_TANH": "tanh", "RNN_RELU": "relu", "GRU": "gru", "LSTM": "lstm"}


class RNN(_Recurrent):
    """:class:`torch.nn.RNN` on :func:`tritune.rnn`: same arguments, parameters and ``state_dict``.

    Shape: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``, ``[T, I]`` for one sequence) to ``(output, h_n)``.
    """

    _torch = torch.nn.RNN

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        check_nonlinearity(nonlinearity)
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class GRU(_Recurrent):
    """:class:`torch.nn.GRU` on :func:`tritune.gru`: same arguments, parameters and ``state_dict``.

    Shape: as :class:`RNN`.
    """

    _torch = torch.nn.GRU

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device,
            dtype=dtype,
        )  # fmt: skip


class LSTM(_Recurrent):
    """:class:`torch.nn.LSTM` on :func:`tritune.lstm`: same arguments, parameters and ``state_dict``.

    Shape: as :class:`RNN`, to ``(output, (h_n, c_n))``.
    """

    _torch = torch.nn.LSTM
    # torch's forward, which serves what we do not, calls these.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip

    def _states(self, hx: Any) -> Sequence[Tensor]:
        if not (
            isinstance(hx, tuple | list) and len(hx) == 2 and isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor)
        ):
            raise TypeError(f"LSTM: hx must be a pair of tensors (h_0, c_0), got {type(hx).__name__}")
        return hx

    def _joined(self, states: Sequence[Tensor]) -> Any:
        return tuple(states)


class ElmanRNN(OfTorch, torch.nn.Module):
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
        is_tensor = isinstance(h0, Tensor)
        if h0 is not None and not isinstance(h0, Proxy) and (not is_tensor or h0.dim() != input.dim() - 1):
            got = list(h0.shape) if is_tensor else type(h0).__name__
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
