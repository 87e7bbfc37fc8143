"""Recurrence in torch's operators: what runs where no kernel does, and what the tests compare the kernels with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _VF, Tensor
from torch.nn.functional import linear

from . import rnn_checks

# --- torch's own layer -----------------------------------------------------------------------------------------------


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
    """``(output, h_n, c_n)`` of torch's own layer, from the arguments of :func:`rnn` before any check.

    The result is ``None`` for arguments that our validator rejects and torch would accept: torch looks only at the
    sizes of its products, broadcasts biases and states, and computes with integers and complex numbers. For other wrong
    arguments torch itself raises.
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
    # In training mode wherever there may be gradients, because cuDNN has no backward otherwise. torch.jit.trace checks
    # its result without gradients, so there the mode must not depend on them.
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


# --- the formula, step by step ---------------------------------------------------------------------------------------


def formula(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor, c0: Tensor | None,
    cell: str, reverse: bool, w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition, step by step, in operators that every transform knows: ``(out [T, B, D * H], h_n [D, B, H], c_n
    [D, B, H], cells [T, B, D * H])``. The last two are empty but for an LSTM. ``w_hr`` are an LSTM's projections."""
    count = input.shape[0]
    directions: list[list[Tensor]] = []
    for d in range(w_ih.shape[0]):
        x = linear(input, w_ih[d], None if b_ih is None else b_ih[d])
        h, c = h0[d], None if c0 is None else c0[d]
        outs: list[Any] = [None] * count
        cells: list[Any] = [None] * count
        for t in _step_order(count, d, reverse):
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


def _step_order(count: int, d: int, reverse: bool) -> range:
    """The order in which a direction walks the sequence."""
    return range(count - 1, -1, -1) if reverse or d == 1 else range(count)


def gate_grads(
    gates: Tensor | None, w_hh: Tensor, out: Tensor, before: Tensor, cells: Tensor | None, cells_before: Tensor | None,
    dout: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, dcells: Tensor | None, cell: str, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The loop over the steps of a backward in torch's operators: the gradients of the gates' inputs [T, B, D, S, H],
    with S = 4 for GRU and LSTM and 1 otherwise, of h0 and of c0."""
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
        for t in reversed(_step_order(count, d, reverse)):
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
