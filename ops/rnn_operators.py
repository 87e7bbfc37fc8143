"""The registered operators of recurrence: implementations, fakes and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ._dispatch import resolved_precision, rnn_setting, runs_kernels
from ._layout import or_empty
from ._register import below_autograd, register
from .rnn_torch import formula, gate_grads, torch_layer


def rnn_problem(cell: str, input: Tensor, w_hh: Tensor, precision: str, saves: bool) -> Any:
    """The problem of a layer. ``input`` is [T, B, I], or [T, I] for one sequence; ``w_hh`` is [G * H, H], or with its
    directions stacked [D, G * H, H]."""
    from ..kernels.rnn import RnnProblem

    directions = w_hh.shape[0] if w_hh.dim() == 3 else 1
    batch = input.shape[1] if input.dim() == 3 else 1
    mode = resolved_precision(input, precision, rnn_setting) if input.dtype is torch.float32 else "16"
    return RnnProblem(cell, input.shape[0], batch, w_hh.shape[-1], directions, input.dtype, mode, saves)


_TENSORS = "Tensor input, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor? c0"


# --- a layer ---------------------------------------------------------------------------------------------------------


def _forward(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor, c0: Tensor | None,
    cell: str, reverse: bool, precision: str, saves: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not runs_kernels(backend, input):
        if cell == "lstm" and saves:
            return formula(input, w_ih, w_hh, b_ih, b_hh, h0, c0, cell, reverse)
        result = torch_layer(cell, input, w_ih, w_hh, b_ih, b_hh, h0, c0, reverse, False)
        assert result is not None
        out, h_n, c_n = result
        return out.contiguous(), h_n, or_empty(c_n, input), input.new_empty(0)
    from ..kernels.rnn import run_forward

    bias, b_n = _split_bias(cell, b_ih, b_hh, w_hh.shape[-1])
    x = linear(input, w_ih.flatten(0, 1), None if bias is None else bias.flatten())
    out, h_n, c_n, cells = run_forward(
        rnn_problem(cell, input, w_hh, precision, saves), x, w_hh, b_n, h0, c0, reverse=reverse
    )
    return out, h_n, or_empty(c_n, input), or_empty(cells, input)


def _split_bias(
    cell: str, b_ih: Tensor | None, b_hh: Tensor | None, hidden_size: int
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """``(bias, b_n)``: the bias [D, G * H] that is added to the inputs of all steps, before the recurrence, and the
    part [D, H] of the GRU's hidden bias that cannot be, because the reset gate multiplies it at each step."""
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
    """``(out, h_n, c_n, cells)`` of OP; the last two are empty tensors where the cell has none. The cells are an output
    so that a second derivative reaches them. OP computes them here even if the caller left ``saves`` False, since the
    backward reads them."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            out, h_n, c_n, cells = OP(*call[:10], True, call[11])
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


OP: Any = register(
    f"rnn({_TENSORS}, str cell, bool reverse, str precision, bool saves, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_forward,
    fake=_fake_forward,
    autograd=_Rnn.apply,
    composite=lambda *call: formula(*call[:9]),
)


# --- its gradients ---------------------------------------------------------------------------------------------------

# The products over all steps before and after the loop over the steps are in torch's operators. The loop itself is the
# kernel; where no kernel runs, and where the backward is differentiated again, it is the formula in torch's operators.


def _previous_states(states: Tensor, first: Tensor, reverse: bool) -> Tensor:
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
    """[T, B, D, 4, H]: what the functions of the gates are applied to, in the order of the kernel's slots, recomputed
    for all steps at once from the states ``before`` each step."""
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


def _backward(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor, c0: Tensor | None,
    out: Tensor, cells: Tensor | None, dout: Tensor | None, dhn: Tensor | None, dcn: Tensor | None,
    dcells: Tensor | None, needs: list[bool], cell: str, reverse: bool, precision: str, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    before = _previous_states(out, h0, reverse)
    gated = cell in ("gru", "lstm")
    gates = _gate_inputs(input, w_ih, w_hh, b_ih, b_hh, before, cell) if gated else None
    if runs_kernels(backend, input):
        from ..kernels.rnn import run_backward

        dgates = out.new_empty(*out.shape[:2], w_hh.shape[0], 1, w_hh.shape[-1]) if gates is None else gates
        problem = rnn_problem(cell, input, w_hh, precision, True)
        dh0, dc0 = run_backward(
            problem, dgates, w_hh, h0, c0, out, cells, dout, dhn, dcn, dcells, reverse=reverse
        )  # fmt: skip
    else:
        cells_before = None if cells is None or c0 is None else _previous_states(cells, c0, reverse)
        dgates, dh0, dc0 = gate_grads(
            gates, w_hh, out, before, cells, cells_before, dout, dhn, dcn, dcells, cell, reverse
        )  # fmt: skip
    return *_input_and_weight_grads(dgates, input, before, w_ih, needs, cell), dh0, or_empty(dc0, input)


def _input_and_weight_grads(
    dgates: Tensor, input: Tensor, before: Tensor, w_ih: Tensor, needs: list[bool], cell: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, w_ih, w_hh, b_ih and b_hh, each from one product or sum a direction; those that ``needs``
    does not ask for are empty tensors."""
    need_input, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needs
    wide = torch.promote_types(input.dtype, torch.float32)
    # The GRU's slots are n, r, z, hidden n, and the rows of its weights r, z, n: rolling H rows down turns one order
    # into the other.
    turn = before.shape[-1] if cell == "gru" else 0
    x = input.flatten(0, 1)
    dx, dw_ih, dw_hh, db_ih, db_hh = ([] for _ in range(5))
    for d in range(w_ih.shape[0]):
        slots = dgates[:, :, d].flatten(0, 1)
        to_input, to_hidden = (slots[:, :3], slots[:, 1:]) if turn else (slots, slots)
        to_input, to_hidden = to_input.flatten(1), to_hidden.flatten(1)
        if need_input:
            dx.append(to_input @ _rolled_rows(w_ih[d], turn))
        if need_w_ih:
            dw_ih.append(_rolled_rows(to_input.t() @ x, -turn))
        if need_w_hh:
            dw_hh.append(to_hidden.t() @ before[:, :, d].flatten(0, 1))
        if need_b_ih:
            db_ih.append(_rolled_rows(to_input.sum(0, dtype=wide).to(input.dtype), -turn))
        if need_b_hh:
            db_hh.append(to_hidden.sum(0, dtype=wide).to(input.dtype))
    grads = (torch.stack(one) if one else input.new_empty(0) for one in (dw_ih, dw_hh, db_ih, db_hh))
    return sum(dx[1:], dx[0]).view_as(input) if dx else input.new_empty(0), *grads  # type: ignore[return-value]


def _rolled_rows(t: Tensor, rows: int) -> Tensor:
    """``t`` with its rows rolled by ``rows``; ``t`` itself for 0."""
    return t.roll(rows, 0) if rows else t


def _differentiable_backward(*call: Any) -> tuple[Tensor, ...]:
    """The gradients where they are differentiated again: the formula in torch's operators, since the kernel has no
    derivative. Other backward passes run the kernel."""
    return _backward(*(*call[:-1], "torch"))


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
    autograd=_differentiable_backward,
    composite=_differentiable_backward,
)
