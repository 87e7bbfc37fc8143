"""Recurrence over a sequence, Elman, GRU and LSTM: public functions, and the choice of backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.nn.functional import linear
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..autotune.device import DeviceSpec, detect
from ..autotune.resolve import Choice, resolve
from . import rnn_checks
from ._checks import _is_static
from ._dispatch import (
    DEFAULT_PRECISION,
    Ruling,
    choose,
    in_transform,
    is_exporting,
    measured,
    operator_precision,
    rejections,
    rnn_setting,
    torch_serves,
    torch_validates,
)
from ._layout import autocast
from ._register import requires_grad, run_operator
from .rnn_operators import OP, rnn_problem
from .rnn_torch import formula, torch_layer


def rnn(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    batch_first: bool = False,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Elman recurrence, one layer in one or two directions.

    .. math:: h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    It computes what :class:`torch.nn.RNN` computes. With the kernels one matrix product multiplies the inputs of all
    steps, and one program runs a few sequences from the first step to the last with ``w_hh`` in the memory of one
    multiprocessor; for the backward only the arguments and the output are saved.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[T, I]`` for one sequence.
        w_ih, w_hh, b_ih, b_hh: ``[H, I]``, ``[H, H]``, ``[H]``, ``[H]`` for one direction; with a leading
            dimension of 2 for both directions of a bidirectional layer.
        h0: ``[D, B, H]`` with D directions, ``[D, H]`` for one sequence; zeros by default.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        reverse: run the one direction from the last step to the first.
        batch_first: input and output are ``[B, T, ...]``; the states are not affected.
        precision: how fp32 states are multiplied, as in :func:`tritune.conv2d`; default: torch's setting for cuDNN's
            recurrent layers. The product of the inputs follows torch's own setting for matrix products.

    Returns:
        ``(output, h_n)``: ``[T, B, D * H]`` (its transpose with ``batch_first``) and ``[D, B, H]``.

    Raises:
        RuntimeError, TypeError, ValueError: what torch.nn.RNN raises, with its text, whatever the backend.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers: most often a hidden size whose
            weights do not fit the memory of one multiprocessor.

    Example::

        >>> x, w_ih, w_hh = torch.randn(5, 2, 3), torch.randn(4, 3), torch.randn(4, 4)
        >>> tritune.rnn(x, w_ih, w_hh)[0].shape
        torch.Size([5, 2, 4])
    """
    if has_torch_function_variadic(input, w_ih, w_hh, b_ih, b_hh, h0):
        overridden: tuple[Tensor, Tensor] = handle_torch_function(
            rnn, (input, w_ih, w_hh, b_ih, b_hh, h0), input, w_ih, w_hh, b_ih, b_hh, h0,
            nonlinearity=nonlinearity, reverse=reverse, batch_first=batch_first, precision=precision,
        )  # fmt: skip
        return overridden
    rnn_checks.check_nonlinearity(nonlinearity)
    out, h_n, _ = _run_layer(
        "rnn", nonlinearity, input, w_ih, w_hh, b_ih, b_hh, h0, None, reverse, batch_first, precision
    )  # fmt: skip
    return out, h_n


def gru(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    batch_first: bool = False,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gated recurrent unit, one layer in one or two directions; gates in torch's order r, z, n.

    .. math::
        r = \sigma(x_r + h_r), \quad z = \sigma(x_z + h_z), \quad n = \tanh(x_n + r\, h_n), \quad
        h_t = (1 - z)\, n + z\, h_{t-1}

    with :math:`x = W_{ih} x_t + b_{ih}` and :math:`h = W_{hh} h_{t-1} + b_{hh}`, as in
    :class:`torch.nn.GRU`. Arguments, result and errors are those of :func:`rnn`; the weights have ``3 * H`` rows.

    Example::

        >>> x, w_ih, w_hh = torch.randn(5, 2, 3), torch.randn(12, 3), torch.randn(12, 4)
        >>> tritune.gru(x, w_ih, w_hh)[0].shape
        torch.Size([5, 2, 4])
    """
    if has_torch_function_variadic(input, w_ih, w_hh, b_ih, b_hh, h0):
        overridden: tuple[Tensor, Tensor] = handle_torch_function(
            gru, (input, w_ih, w_hh, b_ih, b_hh, h0), input, w_ih, w_hh, b_ih, b_hh, h0,
            reverse=reverse, batch_first=batch_first, precision=precision,
        )  # fmt: skip
        return overridden
    out, h_n, _ = _run_layer("gru", "gru", input, w_ih, w_hh, b_ih, b_hh, h0, None, reverse, batch_first, precision)
    return out, h_n


def lstm(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    reverse: bool = False,
    batch_first: bool = False,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Long short-term memory, one layer in one or two directions; gates in torch's order i, f, g, o.

    .. math::
        c_t = \sigma(a_f)\, c_{t-1} + \sigma(a_i) \tanh(a_g), \quad h_t = \sigma(a_o) \tanh(c_t)

    with :math:`a = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}`, as in :class:`torch.nn.LSTM`. Arguments
    and errors are those of :func:`rnn`; the weights have ``4 * H`` rows, and ``c0`` has the shape of ``h0``.

    Returns:
        ``(output, h_n, c_n)``: ``[T, B, D * H]`` (its transpose with ``batch_first``), and twice ``[D, B, H]``.

    Example::

        >>> x, w_ih, w_hh = torch.randn(5, 2, 3), torch.randn(16, 3), torch.randn(16, 4)
        >>> tritune.lstm(x, w_ih, w_hh)[2].shape
        torch.Size([1, 2, 4])
    """
    if has_torch_function_variadic(input, w_ih, w_hh, b_ih, b_hh, h0, c0):
        overridden: tuple[Tensor, Tensor, Tensor] = handle_torch_function(
            lstm, (input, w_ih, w_hh, b_ih, b_hh, h0, c0), input, w_ih, w_hh, b_ih, b_hh, h0, c0,
            reverse=reverse, batch_first=batch_first, precision=precision,
        )  # fmt: skip
        return overridden
    return _run_layer("lstm", "lstm", input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, batch_first, precision)


def elman_step(
    x: Tensor,
    h: Tensor,
    W_xh: Tensor,
    W_hh: Tensor,
    b_h: Tensor | None = None,
    W_ho: Tensor | None = None,
    b_o: Tensor | None = None,
    W_yh: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""One step of an Elman network with its output head.

    .. math:: h' = \tanh(W_{hh} h + W_{xh} x + b_h), \quad o = W_{ho} h' + b_o, \quad y = \tanh(W_{yh} o)

    The new state is computed by :func:`rnn` over one step, so that a network gives the same values whether it is run
    step by step or over the sequence. The head is two matrix products in torch's operators.

    Args:
        x: ``[B, I]`` or ``[I]``.
        h: ``[B, H]`` or ``[H]``.
        W_xh, W_hh, b_h: ``[H, I]``, ``[H, H]``, ``[H]``.
        W_ho, b_o, W_yh: ``[O, H]``, ``[O]``, ``[Y, O]``.

    Returns:
        ``(h', o, y)``; ``o`` and ``y`` are ``None`` without their weights.

    Example::

        >>> h, o, y = tritune.elman_step(torch.randn(2, 3), torch.zeros(2, 4), torch.randn(4, 3), torch.randn(4, 4))
        >>> h.shape
        torch.Size([2, 4])
    """
    tensors = (x, h, W_xh, W_hh, b_h, W_ho, b_o, W_yh)
    if has_torch_function_variadic(*tensors):
        overridden: tuple[Tensor, Tensor | None, Tensor | None] = handle_torch_function(elman_step, tensors, *tensors)
        return overridden
    if torch_validates(x):
        rejected = rejections()
        try:
            if rnn_checks.is_regular_step(*tensors):
                return _torch_step(*tensors)
        except rejected:
            pass  # The validator below raises a clearer error. What it accepts runs again, and torch raises.
    rnn_checks.check_elman_step(*tensors)
    if torch_serves(x):
        return _torch_step(*tensors)
    _, hidden, _ = _run_layer(
        "elman_step", "tanh", x.unsqueeze(0), W_xh, W_hh, b_h, None, h.unsqueeze(0), layer_of_torch=_step_layer
    )
    o, y = elman_head(hidden[0], W_ho, b_o, W_yh)
    return hidden[0], o, y


def elman_head(
    h: Tensor, W_ho: Tensor | None, b_o: Tensor | None, W_yh: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """``(o, y)`` of :func:`elman_step` for hidden states ``[..., H]``; None where the weights are missing."""
    o = None if W_ho is None else linear(h, W_ho, b_o)
    y = None if o is None or W_yh is None else torch.tanh(linear(o, W_yh))
    return o, y


def _torch_step(
    x: Tensor, h: Tensor, W_xh: Tensor, W_hh: Tensor, b_h: Tensor | None, W_ho: Tensor | None, b_o: Tensor | None,
    W_yh: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`elman_step` in torch's operators."""
    hidden = torch.tanh(linear(x, W_xh, b_h) + linear(h, W_hh))
    return hidden, *elman_head(hidden, W_ho, b_o, W_yh)


def _step_layer(
    cell: str, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """:func:`_torch_step` without its head, with the arguments and results of a layer over one step."""
    hidden = _torch_step(input[0], h0[0], w_ih, w_hh, b_ih, None, None, None)[0].unsqueeze(0)
    return hidden, hidden, None


# --- from arguments to a call ----------------------------------------------------------------------------------------


def _run_layer(
    op: str, cell: str, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    h0: Tensor | None, c0: Tensor | None = None, reverse: bool = False, batch_first: bool = False,
    precision: str | None = None, layer_of_torch: Callable[..., Any] = torch_layer,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """One layer of any cell, in one or two directions, over a batch or one sequence: ``(output, h_n, c_n)``.

    ``layer_of_torch`` is what computes the call where torch serves it, also while the call is recorded or explained, so
    that to record a call does not change its result.
    """
    if precision is None and calls_torch(input):
        rejected = rejections()
        try:
            result = layer_of_torch(cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, batch_first)
        except rejected:
            result = None  # The validator below raises a clearer error. What it accepts runs again, and torch raises.
        if result is not None:
            return result
    states: tuple[Tensor | None, ...] = (h0, c0) if cell == "lstm" else (h0,)
    input, w_ih, w_hh, b_ih, b_hh, *states = autocast(input, w_ih, w_hh, b_ih, b_hh, *states)  # type: ignore[assignment]
    args = rnn_checks.check_rnn(
        cell, input, w_ih, w_hh, b_ih, b_hh, states, batch_first=batch_first, reverse=reverse, precision=precision
    )
    h0, c0, *_ = (*states, None)
    tensors = [t for t in (input, w_ih, w_hh, b_ih, b_hh, h0, c0) if t is not None]
    saves = requires_grad(tensors)
    multiplied = operator_precision(input, precision, rnn_setting)
    steps = input if not args.is_batched else input.transpose(0, 1) if batch_first else input

    def problem() -> Any:
        return rnn_problem(cell, steps, w_hh, multiplied, saves)

    backend = choose(
        op, tensors, lambda device: _auto_rule(problem(), device), lambda device: _kernel_choices(problem(), device),
        lambda: _limits(problem, input.device),
    )  # fmt: skip
    traced = torch.compiler.is_compiling()
    if backend == "torch" and not in_transform() and (not traced or is_traced_as_torch(steps.shape[0])):
        result = layer_of_torch(cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, batch_first)
        assert result is not None
        return result
    if not args.is_batched:
        steps, h0, c0 = (None if t is None else t.unsqueeze(1) for t in (input, h0, c0))  # type: ignore[assignment]
    if not args.is_stacked:
        w_ih, w_hh = w_ih.unsqueeze(0), w_hh.unsqueeze(0)
        b_ih, b_hh = (None if b is None else b.unsqueeze(0) for b in (b_ih, b_hh))
    h0, c0 = _initial_states(cell, steps, w_hh, h0, c0, steps.shape[1])
    call = (steps, w_ih, w_hh, b_ih, b_hh, h0, c0, cell, reverse, multiplied, saves, backend)
    if in_transform():
        out, h_n, c_n, _ = formula(*call[:9])
    else:
        out, h_n, c_n, _ = run_operator(OP, call, saves)
        if traced and saves:
            # The backward reads the result, and in a compiled graph autograd does not notice if the caller changes it.
            out = out.clone()
    if not args.is_batched:
        return out.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if cell == "lstm" else None
    return out.transpose(0, 1) if batch_first else out, h_n, c_n


def sequence_layer(
    cell: str, input: Tensor, batch_sizes: Tensor | None, weights: Sequence[Tensor | None], h0: Tensor | None,
    c0: Tensor | None, batch_first: bool, batch: int = 0,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """One layer of a module for which torch's own layer cannot be called directly: ``(output, h_n, c_n)``.

    Args:
        input: a batch as in :func:`rnn`, or the rows of a packed batch.
        batch_sizes: of a packed batch, else None.
        batch: the first of ``batch_sizes``, the number of sequences. The module reads it once for all layers, because
            while tracing each reading makes another unbacked symbol.
        weights: w_ih, w_hh, b_ih, b_hh, and w_hr of an LSTM with projections, each with its directions stacked.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None
    assert w_hh is not None
    if batch_sizes is None and w_hr is None:
        # The public functions, so that a mode of torch sees the call.
        if cell == "lstm":
            return lstm(input, w_ih, w_hh, b_ih, b_hh, h0, c0, batch_first=batch_first)
        if cell == "gru":
            return (*gru(input, w_ih, w_hh, b_ih, b_hh, h0, batch_first=batch_first), None)
        return (*rnn(input, w_ih, w_hh, b_ih, b_hh, h0, nonlinearity=cell, batch_first=batch_first), None)
    input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 = autocast(input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0)
    if batch_sizes is not None:
        return _packed_layer(cell, input, batch_sizes, batch, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr)
    steps = input.transpose(0, 1) if batch_first else input
    h0, c0 = _initial_states(cell, steps, w_hh, h0, c0, steps.shape[1])
    out, h_n, c_n, _ = formula(steps, w_ih, w_hh, b_ih, b_hh, h0, c0, cell, False, w_hr)
    return out.transpose(0, 1) if batch_first else out, h_n, c_n


def _packed_layer(
    cell: str, rows: Tensor, batch_sizes: Tensor, batch: int, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, h0: Tensor | None, c0: Tensor | None, w_hr: Tensor | None,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """A layer over packed rows, computed over a padded batch: ``(output rows, h_n, c_n)``. The padding repeats rows of
    the input. Each direction is padded by itself after the last step that it computes, so that no result depends on the
    padding."""
    h0, c0 = _initial_states(cell, rows, w_hh, h0, c0, batch)
    sizes = batch_sizes.to(rows.device)
    ends = sizes.cumsum(0)
    starts = ends - sizes
    sequence = torch.arange(batch, device=rows.device)
    last = (sizes.unsqueeze(1) > sequence).sum(0) - 1  # each sequence's last step
    step = torch.arange(sizes.shape[0], device=rows.device).unsqueeze(1)
    row = torch.arange(rows.shape[0], device=rows.device)
    row_step = torch.searchsorted(ends, row, right=True)
    row_sequence = row - starts[row_step]
    outs, h_ns, c_ns = [], [], []
    for d in range(w_ih.shape[0]):
        walked = (last - step).clamp_min(0) if d else torch.minimum(step, last)
        row_walked = last[row_sequence] - row_step if d else row_step
        one = [None if t is None else t[d : d + 1] for t in (w_ih, w_hh, b_ih, b_hh, h0, c0)]
        call: tuple[Any, ...] = (rows[starts[walked] + sequence], *one, cell, False)
        if torch.compiler.is_compiling() and w_hr is None and not in_transform():
            out, _, _, cells = OP(*call, DEFAULT_PRECISION, True, "torch")
        else:
            out, _, _, cells = formula(*call, None if w_hr is None else w_hr[d : d + 1])  # type: ignore[call-arg]
        outs.append(out[row_walked, row_sequence])
        h_ns.append(out[last, sequence])
        c_ns.append(cells[last, sequence] if cell == "lstm" else None)
    return torch.cat(outs, -1), torch.stack(h_ns), torch.stack(c_ns) if cell == "lstm" else None  # type: ignore[arg-type]


def _initial_states(
    cell: str, input: Tensor, w_hh: Tensor, h0: Tensor | None, c0: Tensor | None, batch: int
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``(h0, c0)``: the given states, or zeros. With projections h has fewer units than c."""
    directions, rows, size = w_hh.shape
    h0 = input.new_zeros(directions, batch, size) if h0 is None else h0
    if c0 is None and cell == "lstm":
        c0 = input.new_zeros(directions, batch, rows // 4)
    return h0, c0


# --- where torch's own layer is called as it is ----------------------------------------------------------------------


def calls_torch(input: Any) -> bool:
    """Whether torch's own layer may be called on this input before anything is checked. Not under autocast, which torch
    applies to some cells only. In a transform that torch's layer does not support, torch raises, and the caller then
    runs the formula."""
    return torch_validates(input) and not _is_any_autocast_enabled()


def is_traced_as_torch(count: int) -> bool:
    """Whether a graph of ``count`` steps may hold torch's own layer.

    In an exported program torch's layer is one operator, which serves a fixed number of steps. A compiled graph has no
    such operator: torch writes out every step, which takes minutes to compile for some hundred steps, is compiled again
    for every other number, and fails for an LSTM with gradients. There the graph holds our operator.
    """
    return is_exporting() and _is_static(count)


# --- the choice of backend -------------------------------------------------------------------------------------------


def _limits(problem_of: Callable[[], Any], where: torch.device) -> str | None:
    """Why no kernel covers the problem, or None; always None while compiling."""
    if torch.compiler.is_compiling():
        return None
    from ..kernels.rnn import fits

    device, problem = detect(where), problem_of()
    if fits(problem, device):
        return None
    return f"hidden_size={problem.H} in {problem.dtype}: one multiprocessor of {device.slug} cannot hold the weights"


def _kernel_choices(problem: Any, device: DeviceSpec) -> tuple[tuple[str, Choice], ...]:
    from ..kernels import rnn

    tunables = (rnn.FORWARD, rnn.BACKWARD) if problem.saves else (rnn.FORWARD,)
    return tuple((tunable.name, resolve(tunable, problem, device)) for tunable in tunables)


def _auto_rule(problem: Any, device: DeviceSpec) -> Ruling:
    """Whether the kernels win: by measured times only. Without these torch serves, because the time of a recurrence is
    the latency of its steps, which cannot be derived from counted bytes."""
    return measured(_kernel_choices(problem, device)) or Ruling(
        False, "not measured, and the time of a step cannot be counted in bytes: `tritune tune` can"
    )
