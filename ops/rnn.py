"""Recurrence over a sequence: Elman, GRU and LSTM. Public functions, operators, autograd, torch implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import _VF, Tensor
from torch._C import _is_any_autocast_enabled
from torch.nn.functional import linear, pad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..autotune.device import DeviceSpec, detect
from ..autotune.resolve import Choice, resolve
from . import rnn_checks
from ._checks import _is_static
from ._dispatch import (
    DEFAULT_PRECISION,
    Verdict,
    choose,
    in_transform,
    is_exporting,
    measured,
    operator_precision,
    rejections,
    resolved_precision,
    rnn_setting,
    runs_kernels,
    torch_serves,
    torch_validates,
)
from ._layout import autocast
from ._register import below_autograd, register


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

    The function of :class:`torch.nn.RNN`. On the kernels one product serves the inputs of all steps, and one program
    runs BLOCK_B sequences from the first step to the last with ``w_hh`` on the chip; nothing but the output is saved
    for backward.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[T, I]`` for one sequence.
        w_ih, w_hh, b_ih, b_hh: ``[H, I]``, ``[H, H]``, ``[H]``, ``[H]`` for one direction; with a leading
            dimension of 2 for both directions of a bidirectional layer.
        h0: ``[D, B, H]`` with D directions, ``[D, H]`` for one sequence; zeros by default.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        reverse: one direction, from the last step to the first.
        precision: how fp32 states are multiplied, as in :func:`tritune.conv2d`; default: torch's setting for cuDNN's
            recurrent layers. The product of the inputs follows torch's own setting for matrix products.

    Returns:
        ``(output, h_n)``: ``[T, B, D * H]`` (its transpose with ``batch_first``) and ``[D, B, H]``.

    Raises:
        RuntimeError, TypeError, ValueError: what torch.nn.RNN raises, with its text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers: above all a hidden size whose
            weights one multiprocessor cannot hold.

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
    out, h_n, _ = _recur(
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

    with :math:`x = W_{ih} x_t + b_{ih}` and :math:`h = W_{hh} h_{t-1} + b_{hh}`. The function of
    :class:`torch.nn.GRU`. Arguments, result and errors as in :func:`rnn`, with weights of ``3 * H`` rows.

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
    out, h_n, _ = _recur("gru", "gru", input, w_ih, w_hh, b_ih, b_hh, h0, None, reverse, batch_first, precision)
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

    with :math:`a = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}`. The function of :class:`torch.nn.LSTM`. Arguments
    and errors as in :func:`rnn`, with weights of ``4 * H`` rows and ``c0`` like ``h0``.

    Returns:
        ``(output, h_n, c_n)``.

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
    return _recur("lstm", "lstm", input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, batch_first, precision)


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

    The step is :func:`rnn` over one step, so that a network gives the same values whether it is run step by step or
    over the sequence; the head is two products, which cuBLAS serves.

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
            pass  # The validator has better words for it; what it accepts fails once more below.
    rnn_checks.check_elman_step(*tensors)
    if torch_serves(x):
        return _torch_step(*tensors)
    _, hidden, _ = _recur("elman_step", "tanh", x.unsqueeze(0), W_xh, W_hh, b_h, None, h.unsqueeze(0))
    o, y = elman_head(hidden[0], W_ho, b_o, W_yh)
    return hidden[0], o, y


def elman_head(
    h: Tensor, W_ho: Tensor | None, b_o: Tensor | None, W_yh: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The output of :func:`elman_step` for any number of hidden states at once."""
    o = None if W_ho is None else linear(h, W_ho, b_o)
    y = None if o is None or W_yh is None else torch.tanh(linear(o, W_yh))
    return o, y


def _torch_step(
    x: Tensor, h: Tensor, W_xh: Tensor, W_hh: Tensor, b_h: Tensor | None, W_ho: Tensor | None, b_o: Tensor | None,
    W_yh: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The formula in torch's operators."""
    hidden = torch.tanh(linear(x, W_xh, b_h) + linear(h, W_hh))
    return hidden, *elman_head(hidden, W_ho, b_o, W_yh)


def _recur(
    op: str, cell: str, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    h0: Tensor | None, c0: Tensor | None = None, reverse: bool = False, batch_first: bool = False,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """One layer of any cell, in one or two directions, over a batch or one sequence: ``(output, h_n, c_n)``."""
    if precision is None and calls_torch(input):
        rejected = rejections()
        try:
            result = torch_layer(cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, batch_first)
        except rejected:
            result = None  # The validator has better words for it; what it accepts fails once more below.
        if result is not None:
            return result
    states: tuple[Tensor | None, ...] = (h0, c0) if cell == "lstm" else (h0,)
    input, w_ih, w_hh, b_ih, b_hh, *states = autocast(input, w_ih, w_hh, b_ih, b_hh, *states)  # type: ignore[assignment]
    args = rnn_checks.check_rnn(
        cell, input, w_ih, w_hh, b_ih, b_hh, states, batch_first=batch_first, reverse=reverse, precision=precision
    )
    h0, c0, *_ = (*states, None)
    tensors = [t for t in (input, w_ih, w_hh, b_ih, b_hh, h0, c0) if t is not None]
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    multiplied = operator_precision(input, precision, rnn_setting)
    steps = input if not args.is_batched else input.transpose(0, 1) if batch_first else input

    def problem() -> Any:
        return _problem(cell, steps, w_hh, multiplied, saves)

    backend = choose(
        op, tensors, lambda device: _auto_rule(problem(), device), lambda device: _kernel_choices(problem(), device),
        lambda: _limits(problem, input.device),
    )  # fmt: skip
    traced = torch.compiler.is_compiling()
    if backend == "torch" and not in_transform() and (not traced or is_traced_as_torch(steps.shape[0])):
        result = torch_layer(cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, batch_first)
        assert result is not None
        return result
    if not args.is_batched:
        steps, h0, c0 = (None if t is None else t.unsqueeze(1) for t in (input, h0, c0))  # type: ignore[assignment]
    if not args.is_stacked:
        w_ih, w_hh = w_ih.unsqueeze(0), w_hh.unsqueeze(0)
        b_ih, b_hh = (None if b is None else b.unsqueeze(0) for b in (b_ih, b_hh))
    h0, c0 = _initial(cell, steps, w_hh, h0, c0, steps.shape[1])
    call = (steps, w_ih, w_hh, b_ih, b_hh, h0, c0, cell, reverse, multiplied, saves, backend)
    if in_transform():
        out, h_n, c_n, _ = _formula(*call[:9])
    elif traced:
        out, h_n, c_n, _ = OP(*call)
        # The operator's gradient reads its own result, and a graph does not notice that its caller changes that.
        out = out.clone() if saves else out
    elif saves:
        out, h_n, c_n, _ = _Rnn.apply(*call)
    else:
        with below_autograd():
            out, h_n, c_n, _ = OP(*call)
    if not args.is_batched:
        return out.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if cell == "lstm" else None
    return out.transpose(0, 1) if batch_first else out, h_n, c_n


# --- where torch's own layer is called as it is ----------------------------------------------------------------------


def calls_torch(input: Any) -> bool:
    """May torch's own layer be called on this input at once? Not under autocast, which torch follows for some cells
    only. In a transform that has no formula for torch's layer it raises, and ours follows."""
    return torch_validates(input) and not _is_any_autocast_enabled()


def is_traced_as_torch(count: int) -> bool:
    """May a graph of so many steps hold torch's own layer? In an exported program that is one operator, for a fixed
    number of steps. In a compiled one torch has no layer, only its steps written out: minutes of compilation for some
    hundred of them, anew for every other number, and none at all for an LSTM with gradients. There our operator stands.
    """
    return is_exporting() and _is_static(count)


def sequence_layer(
    cell: str, input: Tensor, batch_sizes: Tensor | None, weights: Sequence[Tensor | None], h0: Tensor | None,
    c0: Tensor | None, batch_first: bool, batch: int = 0,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """One layer of a module where torch's own layer cannot be called as it is.

    Args:
        input: a batch as in :func:`rnn`, or the rows of a packed one.
        batch_sizes, batch: of a packed batch; the second is the first of the first, read once for all layers, because
            while tracing each reading is another unknown.
        weights: w_ih, w_hh, b_ih, b_hh, and w_hr of an LSTM with projections, each with its directions stacked.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None
    assert w_hh is not None
    if batch_sizes is None and w_hr is None:
        op = cell if cell in ("gru", "lstm") else "rnn"
        return _recur(op, cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, batch_first=batch_first)
    input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 = autocast(input, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0)
    if batch_sizes is not None:
        return _packed_layer(cell, input, batch_sizes, batch, w_ih, w_hh, b_ih, b_hh, h0, c0, w_hr)
    steps = input.transpose(0, 1) if batch_first else input
    h0, c0 = _initial(cell, steps, w_hh, h0, c0, steps.shape[1])
    out, h_n, c_n, _ = _formula(steps, w_ih, w_hh, b_ih, b_hh, h0, c0, cell, False, w_hr)
    return out.transpose(0, 1) if batch_first else out, h_n, c_n


def _initial(
    cell: str, input: Tensor, w_hh: Tensor, h0: Tensor | None, c0: Tensor | None, batch: int
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The given states or zeros. With projections h is shorter than c."""
    directions, rows, size = w_hh.shape
    h0 = input.new_zeros(directions, batch, size) if h0 is None else h0
    if c0 is None and cell == "lstm":
        c0 = input.new_zeros(directions, batch, rows // 4)
    return h0, c0


def _packed_layer(
    cell: str, rows: Tensor, batch_sizes: Tensor, batch: int, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, h0: Tensor | None, c0: Tensor | None, w_hr: Tensor | None,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """A layer over packed rows, by way of a batch that is filled up with rows of its own. Each direction is filled up
    for itself, behind its last step, so that what is in the filling reaches no result."""
    h0, c0 = _initial(cell, rows, w_hh, h0, c0, batch)
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
            out, _, _, cells = _formula(*call, None if w_hr is None else w_hr[d : d + 1])  # type: ignore[call-arg]
        outs.append(out[row_walked, row_sequence])
        h_ns.append(out[last, sequence])
        c_ns.append(cells[last, sequence] if cell == "lstm" else None)
    return torch.cat(outs, -1), torch.stack(h_ns), torch.stack(c_ns) if cell == "lstm" else None  # type: ignore[arg-type]


# --- the choice of backend -------------------------------------------------------------------------------------------


def require_torch(op: str, tensors: Iterable[Tensor], reason: str) -> None:
    """Notes that torch serves a call which no kernel covers; under ``use_backend("triton")`` that is an error."""
    choose(op, list(tensors), lambda _: Verdict(False, reason), lambda _: (), lambda: reason)


def _limits(problem_of: Callable[[], Any], where: torch.device) -> str | None:
    if torch.compiler.is_compiling():
        return None
    from ..kernels.rnn import fits

    device, problem = detect(where), problem_of()
    if fits(problem, device):
        return None
    return f"hidden_size={problem.H} in {problem.dtype}: one multiprocessor of {device.slug} cannot hold the weights"


def _problem(cell: str, input: Tensor, w_hh: Tensor, precision: str, saves: bool) -> Any:
    """``input`` is [T, B, I], or [T, I] for one sequence; ``w_hh`` may have its directions stacked."""
    from ..kernels.rnn import RnnProblem

    directions = w_hh.shape[0] if w_hh.dim() == 3 else 1
    batch = input.shape[1] if input.dim() == 3 else 1
    mode = resolved_precision(input, precision, rnn_setting) if input.dtype is torch.float32 else "16"
    return RnnProblem(cell, input.shape[0], batch, w_hh.shape[-1], directions, input.dtype, mode, saves)


def _kernel_choices(problem: Any, device: DeviceSpec) -> tuple[tuple[str, Choice], ...]:
    from ..kernels import rnn

    tunables = (rnn.FORWARD, rnn.BACKWARD) if problem.saves else (rnn.FORWARD,)
    return tuple((tunable.name, resolve(tunable, problem, device)) for tunable in tunables)


def _auto_rule(problem: Any, device: DeviceSpec) -> Verdict:
    """Only measurements speak for the kernels: time here is latency, which counted bytes say nothing of."""
    return measured(_kernel_choices(problem, device)) or Verdict(
        False, "not measured, and the time of a step cannot be counted in bytes: `tritune tune` can"
    )


# --- torch's implementations -----------------------------------------------------------------------------------------


TORCH_LAYERS: dict[str, Callable[..., Any]] = {
    "tanh": _VF.rnn_tanh,
    "relu": _VF.rnn_relu,
    "gru": _VF.gru,
    "lstm": _VF.lstm,
}


def torch_layer(
    cell: str, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    c0: Tensor | None, reverse: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """torch's own layer, on the arguments of :func:`rnn` as they are.

    ``None`` for arguments that the validator rejects and torch would not: it looks at the sizes of its products only,
    broadcasts biases and states, and computes with integers and complex numbers. On others torch itself may raise.
    """
    sizes, dtype = input.shape, input.dtype
    is_batched = len(sizes) == 3
    if b_ih is None and b_hh is not None:
        b_ih = torch.zeros_like(b_hh)
    elif b_hh is None and b_ih is not None:
        b_hh = torch.zeros_like(b_ih)
    directions = 1
    parameters: list[Any] = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    if w_ih.dim() == 3:
        directions = w_ih.shape[0]
        by_direction = zip(*(parameter.unbind() for parameter in parameters), strict=True)
        parameters = [parameter for of_one in by_direction for parameter in of_one]
        if not 1 <= directions <= (1 if reverse else 2):
            return None
    rows, hidden_size = parameters[1].shape
    if (
        rows != rnn_checks.GATES[cell] * hidden_size or parameters[0].shape != (rows, sizes[-1])
        or not input.is_floating_point()
        or (b_ih is not None and (parameters[2].shape != (rows,) or parameters[3].shape != (rows,)))
    ):  # fmt: skip
        return None
    if not is_batched:
        batch_first = False
        input = input.unsqueeze(1)
        h0 = None if h0 is None else h0.unsqueeze(1)
        c0 = None if c0 is None else c0.unsqueeze(1)
    state = (directions, sizes[0 if batch_first else 1] if is_batched else 1, hidden_size)
    if h0 is None or (c0 is None and cell == "lstm"):
        zeros = input.new_zeros(state)
        h0, c0 = zeros if h0 is None else h0, zeros if c0 is None else c0
    if h0.shape != state or h0.dtype is not dtype:
        return None
    if cell == "lstm" and (c0.shape != state or c0.dtype is not dtype):  # type: ignore[union-attr]
        return None
    if reverse:
        input = input.flip(1 if batch_first else 0)
    # In training mode wherever there may be gradients: cuDNN has no backward otherwise. A trace is checked without.
    is_training = torch.is_grad_enabled() or torch._C._is_tracing()
    options = (parameters, b_ih is not None, 1, 0.0, is_training, directions == 2, batch_first)
    if cell == "lstm":
        out, h_n, c_n = TORCH_LAYERS["lstm"](input, (h0, c0), *options)
    else:
        (out, h_n), c_n = TORCH_LAYERS[cell](input, h0, *options), None
    if reverse:
        out = out.flip(1 if batch_first else 0)
    if not is_batched:
        return out.squeeze(1), h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
    return out, h_n, c_n


def _steps(count: int, d: int, reverse: bool) -> range:
    """The order in which a direction walks the sequence."""
    return range(count - 1, -1, -1) if reverse or d == 1 else range(count)


def _formula(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor, c0: Tensor | None,
    cell: str, reverse: bool, w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition, step by step, for every transform: ``(out, h_n, c_n, cells)``. ``w_hr``: LSTM's projections."""
    count = input.shape[0]
    directions: list[list[Tensor]] = []
    for d in range(w_ih.shape[0]):
        x = linear(input, w_ih[d], None if b_ih is None else b_ih[d])
        h, c = h0[d], None if c0 is None else c0[d]
        outs: list[Any] = [None] * count
        cells: list[Any] = [None] * count
        for t in _steps(count, d, reverse):
            a = linear(h, w_hh[d], None if b_hh is None else b_hh[d])
            if cell == "gru":
                x_r, x_z, x_n = x[t].chunk(3, -1)
                h_r, h_z, h_n = a.chunk(3, -1)
                n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
                h = n + torch.sigmoid(x_z + h_z) * (h - n)
            elif cell == "lstm":
                assert c is not None
                i, f, g, o = (x[t] + a).chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                h = h if w_hr is None else linear(h, w_hr[d])
            else:
                h = torch.relu(x[t] + a) if cell == "relu" else torch.tanh(x[t] + a)
            outs[t], cells[t] = h, c
        directions.append([torch.stack(outs), h, *([c, torch.stack(cells)] if c is not None else [])])
    parts = list(zip(*directions, strict=True))
    out, h_n = torch.cat(parts[0], -1), torch.stack(parts[1])
    if cell == "lstm":
        return out, h_n, torch.stack(parts[2]), torch.cat(parts[3], -1)
    return out, h_n, out.new_empty(0), out.new_empty(0)


# --- operators -------------------------------------------------------------------------------------------------------


def _forward(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor, c0: Tensor | None,
    cell: str, reverse: bool, precision: str, saves: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not runs_kernels(backend, input):
        if cell == "lstm" and saves:
            return _formula(input, w_ih, w_hh, b_ih, b_hh, h0, c0, cell, reverse)
        result = torch_layer(cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, False)
        assert result is not None
        out, h_n, c_n = result
        return out.contiguous(), h_n, _or_empty(c_n, input), input.new_empty(0)
    from ..kernels.rnn import run_forward

    bias, b_n = _input_bias(cell, b_ih, b_hh, w_hh.shape[-1])
    x = linear(input, w_ih.flatten(0, 1), None if bias is None else bias.flatten())
    out, h_n, c_n, cells = run_forward(
        _problem(cell, input, w_hh, precision, saves), x, w_hh, b_n, h0, c0, reverse=reverse
    )
    return out, h_n, _or_empty(c_n, input), _or_empty(cells, input)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns a tensor in any case."""
    return like.new_empty(0) if t is None else t


def _input_bias(
    cell: str, b_ih: Tensor | None, b_hh: Tensor | None, hidden_size: int
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """What can be added before the recurrence, and what of the GRU's hidden bias cannot."""
    if b_hh is None:
        return b_ih, None
    early, b_n = b_hh, None
    if cell == "gru":
        b_n = b_hh[:, 2 * hidden_size :]
        early = pad(b_hh[:, : 2 * hidden_size], (0, hidden_size))
    return early if b_ih is None else b_ih + early, b_n


def _fake_forward(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, h0: Tensor, c0: Tensor | None,
    cell: str, reverse: bool, precision: str, saves: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    directions, _, hidden_size = w_hh.shape
    out = input.new_empty(*input.shape[:2], directions * hidden_size)
    state = input.new_empty(directions, input.shape[1], hidden_size)
    if cell == "lstm":
        return out, state, torch.empty_like(state), torch.empty_like(out) if saves else input.new_empty(0)
    return out, state, input.new_empty(0), input.new_empty(0)


class _Rnn(torch.autograd.Function):
    """``(out, h_n, c_n, cells)`` of OP; the last two are empty where the cell has none. The cells are an output so that
    a second derivative reaches them."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            out, h_n, c_n, cells = OP(*call)
        ctx.save_for_backward(*call[:7], out, cells if call[7] == "lstm" else None)
        ctx.options = (*call[7:10], call[11])
        ctx.set_materialize_grads(False)
        return out, h_n, c_n, cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if ctx.options[0] != "lstm":
            grads = (*grads[:2], None, None)
        needs = list(ctx.needs_input_grad[:5])
        results = OP_BACKWARD(*tensors, *grads, needs, *ctx.options)
        wanted = ctx.needs_input_grad
        return *(grad if want else None for grad, want in zip(results, wanted[:7], strict=True)), *(None,) * 5


_TENSORS = "Tensor input, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor? c0"


def _autograd(*call: Any) -> tuple[Tensor, ...]:
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:7])
    if not saves:
        with below_autograd():
            return tuple(OP(*call))
    return tuple(_Rnn.apply(*call[:10], True, call[11]))


OP: Any = register(
    f"rnn({_TENSORS}, str cell, bool reverse, str precision, bool saves, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_forward,
    fake=_fake_forward,
    autograd=_autograd,
    composite=lambda *call: _formula(*call[:9]),
)


# Backward. What is around the reverse loop are products over all steps, in torch's operators; the loop itself is the
# kernel, or the same formula in torch's operators where there is none and where it is differentiated again.


def _previous(states: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """The state before each step: [T, B, D * H] and [D, B, H] to [T, B, D, H]."""
    directions = first.shape[0]
    by_direction = states.unflatten(-1, (directions, -1)).unbind(2)
    shifted = [
        torch.cat([one[1:], first[d : d + 1]]) if reverse or d == 1 else torch.cat([first[d : d + 1], one[:-1]])
        for d, one in enumerate(by_direction)
    ]
    return torch.stack(shifted, 2) if directions > 1 else shifted[0].unsqueeze(2)


def _gate_inputs(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, before: Tensor, cell: str
) -> Tensor:
    """[T, B, D, 4, H]: what the gates' functions are applied to, recomputed for all steps at once."""
    hidden_size = w_hh.shape[-1]
    per_direction = []
    for d in range(w_ih.shape[0]):
        b_x, b_h = (None if b is None else b[d] for b in (b_ih, b_hh))
        if cell == "lstm":
            both = b_h if b_x is None else b_x if b_h is None else b_x + b_h
            x = linear(input, w_ih[d], both)
            a = torch.addmm(x.flatten(0, 1), before[:, :, d].flatten(0, 1), w_hh[d].t()).view_as(x)
        else:
            x_rz, x_n = linear(input, w_ih[d], b_x).split((2 * hidden_size, hidden_size), -1)
            h_rz, h_n = linear(before[:, :, d], w_hh[d], b_h).split((2 * hidden_size, hidden_size), -1)
            a = torch.cat([x_n, x_rz + h_rz, h_n], -1)
        per_direction.append(a.unflatten(-1, (4, hidden_size)))
    return torch.stack(per_direction, 2) if len(per_direction) > 1 else per_direction[0].unsqueeze(2)


def _gate_grads(
    gates: Tensor | None, w_hh: Tensor, out: Tensor, before: Tensor, cells: Tensor | None, cells_before: Tensor | None,
    dout: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, dcells: Tensor | None, cell: str, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The reverse loop in torch's operators: gradients of the gate inputs, of h0 and of c0."""
    count = out.shape[0]
    per_direction, dh0, dc0 = [], [], []
    directions = w_hh.shape[0]
    for d in range(directions):
        h_t, dout_d, c_t, dcells_d = (
            None if t is None else t.unflatten(-1, (directions, -1))[:, :, d] for t in (out, dout, cells, dcells)
        )
        dh = torch.zeros_like(before[0, :, d]) if dhn is None else dhn[d]
        dc = None if cells is None else torch.zeros_like(dh) if dcn is None else dcn[d]
        slots: list[Any] = [None] * count
        for t in reversed(_steps(count, d, reverse)):
            dh = dh if dout_d is None else dh + dout_d[t]
            if gates is None:
                assert h_t is not None
                da = dh * (1 - h_t[t] * h_t[t]) if cell == "tanh" else torch.where(h_t[t] <= 0, 0.0, dh)
                dh, slots[t] = da @ w_hh[d], da.unsqueeze(1)
                continue
            a = gates[t, :, d].unbind(1)
            if cell == "gru":
                r, z = torch.sigmoid(a[1]), torch.sigmoid(a[2])
                n = torch.tanh(a[0] + r * a[3])
                dn = dh * (1 - z) * (1 - n * n)
                dr, dz = dn * a[3] * r * (1 - r), dh * (before[t, :, d] - n) * z * (1 - z)
                slots[t] = torch.stack([dn, dr, dz, dn * r], 1)
                dh = dh * z + torch.cat([dr, dz, dn * r], 1) @ w_hh[d]
            else:
                assert c_t is not None
                assert cells_before is not None
                assert dc is not None
                i, f, g, o = torch.sigmoid(a[0]), torch.sigmoid(a[1]), torch.tanh(a[2]), torch.sigmoid(a[3])
                tanh_c = torch.tanh(c_t[t])
                dc = dc + dh * o * (1 - tanh_c * tanh_c)
                dc = dc if dcells_d is None else dc + dcells_d[t]
                inner = [dc * g * i * (1 - i), dc * cells_before[t, :, d] * f * (1 - f), dc * i * (1 - g * g)]
                slots[t] = torch.stack([*inner, dh * tanh_c * o * (1 - o)], 1)
                dc, dh = dc * f, slots[t].flatten(1) @ w_hh[d]
        per_direction.append(torch.stack(slots))
        dh0.append(dh)
        dc0.append(dc)
    return torch.stack(per_direction, 2), torch.stack(dh0), None if cells is None else torch.stack(dc0)  # type: ignore[arg-type]


def _backward(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor, c0: Tensor | None,
    out: Tensor, cells: Tensor | None, dout: Tensor | None, dhn: Tensor | None, dcn: Tensor | None,
    dcells: Tensor | None, needs: list[bool], cell: str, reverse: bool, precision: str, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    before = _previous(out, h0, reverse)
    gated = cell in ("gru", "lstm")
    gates = _gate_inputs(input, w_ih, w_hh, b_ih, b_hh, before, cell) if gated else None
    if runs_kernels(backend, input):
        from ..kernels.rnn import run_backward

        dgates = out.new_empty(*out.shape[:2], w_hh.shape[0], 1, w_hh.shape[-1]) if gates is None else gates
        problem = _problem(cell, input, w_hh, precision, True)
        dh0, dc0 = run_backward(
            problem, dgates, w_hh, h0, c0, out, cells, dout, dhn, dcn, dcells, reverse=reverse
        )  # fmt: skip
    else:
        cells_before = None if cells is None or c0 is None else _previous(cells, c0, reverse)
        dgates, dh0, dc0 = _gate_grads(
            gates, w_hh, out, before, cells, cells_before, dout, dhn, dcn, dcells, cell, reverse
        )  # fmt: skip
    return *_products(dgates, input, before, w_ih, needs, cell), dh0, _or_empty(dc0, input)


def _products(
    dgates: Tensor, input: Tensor, before: Tensor, w_ih: Tensor, needs: list[bool], cell: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, w_ih, w_hh, b_ih, b_hh: one product or sum each a direction; empty where not needed."""
    need_input, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needs
    wide = torch.promote_types(input.dtype, torch.float32)
    # The GRU's slots are n, r, z, hidden n; the rows of its weights are r, z, n.
    turn = before.shape[-1] if cell == "gru" else 0
    x = input.flatten(0, 1)
    dx, dw_ih, dw_hh, db_ih, db_hh = ([] for _ in range(5))
    for d in range(w_ih.shape[0]):
        slots = dgates[:, :, d].flatten(0, 1)
        to_input, to_hidden = (slots[:, :3], slots[:, 1:]) if turn else (slots, slots)
        to_input, to_hidden = to_input.flatten(1), to_hidden.flatten(1)
        if need_input:
            dx.append(to_input @ _rolled(w_ih[d], turn))
        if need_w_ih:
            dw_ih.append(_rolled(to_input.t() @ x, -turn))
        if need_w_hh:
            dw_hh.append(to_hidden.t() @ before[:, :, d].flatten(0, 1))
        if need_b_ih:
            db_ih.append(_rolled(to_input.sum(0, dtype=wide).to(input.dtype), -turn))
        if need_b_hh:
            db_hh.append(to_hidden.sum(0, dtype=wide).to(input.dtype))
    grads = (torch.stack(one) if one else input.new_empty(0) for one in (dw_ih, dw_hh, db_ih, db_hh))
    return sum(dx[1:], dx[0]).view_as(input) if dx else input.new_empty(0), *grads  # type: ignore[return-value]


def _rolled(t: Tensor, rows: int) -> Tensor:
    return t.roll(rows, 0) if rows else t


def _backward_autograd(*call: Any) -> tuple[Tensor, ...]:
    """A first backward runs the kernel; one that is differentiated again runs the formula in torch's operators."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in call[:13]):
        return _backward(*(*call[:-1], "torch"))
    with below_autograd():
        return tuple(OP_BACKWARD(*call))


def _fake_backward(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, h0: Tensor, c0: Tensor | None, out: Tensor,
    cells: Any, dout: Any, dhn: Any, dcn: Any, dcells: Any, needs: list[bool], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = w_ih.shape[:2]
    shapes = (input.shape, w_ih.shape, w_hh.shape, rows, rows)
    grads = (input.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return *grads, input.new_empty(h0.shape), input.new_empty(0 if c0 is None else c0.shape)


OP_BACKWARD: Any = register(
    f"rnn_backward({_TENSORS}, Tensor out, Tensor? cells, Tensor? dout, Tensor? dhn, Tensor? dcn, Tensor? dcells, "
    "bool[] needs, str cell, bool reverse, str precision, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_fake_backward,
    autograd=_backward_autograd,
    composite=lambda *call: _backward(*(*call[:-1], "torch")),
)
