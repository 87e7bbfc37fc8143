"""The validator of the recurrent layers. See :mod:`._checks`; the yardstick here is torch.nn.RNN, GRU and LSTM."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._checks import PRECISIONS

GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}


class RnnArgs(NamedTuple):
    """The normalised arguments of a legal call."""

    is_batched: bool
    is_stacked: bool
    """Whether the weights have a leading dimension with one entry for each direction."""
    directions: int
    hidden_size: int


def _module_name(cell: str) -> str:
    return {"gru": "GRU", "lstm": "LSTM"}.get(cell, "RNN")


def check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")


def check_rnn(
    cell: str,
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    states: Sequence[Tensor | None],
    *,
    batch_first: bool,
    reverse: bool,
    precision: str | None,
) -> RnnArgs:
    """Checks the arguments of :func:`tritune.rnn`, ``gru`` and ``lstm`` and returns what they say of the call.
    ``states`` are h0, and for an LSTM also c0."""
    name = _module_name(cell)
    for argument, tensor in (("input", input), ("w_ih", w_ih), ("w_hh", w_hh)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument} must be a Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise NotImplementedError(f"{name}: {argument} is a nested tensor, which this function does not take")
    for argument, optional in (("b_ih", b_ih), ("b_hh", b_hh), *zip(("h0", "c0"), states, strict=False)):
        if optional is not None and not isinstance(optional, Tensor):
            raise TypeError(f"{argument} must be a Tensor or None, got {type(optional).__name__}")
    check_input_dims(cell, input)
    is_batched, is_stacked = input.dim() == 3, w_ih.dim() == 3
    _check_weights(cell, w_ih, w_hh, b_ih, b_hh)
    directions = w_ih.shape[0] if is_stacked else 1
    if reverse and directions == 2:
        raise ValueError("reverse=True runs one direction backwards; the weights have two")
    check_state_dims(cell, input, states)
    tensors = [t for t in (w_ih, w_hh, b_ih, b_hh, *states) if t is not None]
    check_dtypes(input, tensors)
    if not input.is_floating_point():
        raise ValueError(f"{name} takes floating-point tensors, got {input.dtype}")
    if input.shape[-1] != w_ih.shape[-1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[-1]}, got {input.shape[-1]}"
        )
    hidden_size = w_hh.shape[-1]
    batch = 1 if not is_batched else input.shape[0 if batch_first else 1]
    for index, state in enumerate(states):
        wanted = (directions, batch, hidden_size) if is_batched else (directions, hidden_size)
        if state is not None and tuple(state.shape) != wanted:
            # torch names the sizes after it has added the batch's dimension.
            got = list(state.shape) if is_batched else [state.shape[0], 1, *state.shape[1:]]
            which = f"[{index}]" if cell == "lstm" else ""
            raise RuntimeError(f"Expected hidden{which} size {(directions, batch, hidden_size)}, got {got}")
    for tensor in tensors:
        if tensor.device != input.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, "
                f"found input tensor at {input.device} and parameter tensor at {tensor.device}"
            )
    if input.shape[1 if is_batched and batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not accepted: it must be None or one of {', '.join(PRECISIONS)}")
    return RnnArgs(is_batched, is_stacked, directions, hidden_size)


def _check_weights(cell: str, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> None:
    """Checks the shapes of the parameters: ``[G * H, I]``, ``[G * H, H]`` and ``[G * H]`` with G gates, or these with a
    leading dimension of directions."""
    gates = GATES[cell]
    if w_ih.dim() not in (2, 3) or w_hh.dim() != w_ih.dim() or (w_ih.dim() == 3 and w_ih.shape[0] not in (1, 2)):
        raise RuntimeError(
            "w_ih and w_hh must both have two dimensions, or three with one or two directions first, "
            f"got {list(w_ih.shape)} and {list(w_hh.shape)}"
        )
    hidden_size = w_hh.shape[-1]
    rows = (*w_ih.shape[:-2], gates * hidden_size)
    if w_hh.shape[:-1] != rows or w_ih.shape[:-1] != rows:
        raise RuntimeError(
            f"w_ih must be {[*rows, 'input_size']} and w_hh {[*rows, hidden_size]} with {gates} gates, "
            f"got {list(w_ih.shape)} and {list(w_hh.shape)}"
        )
    for argument, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None and bias.shape != rows:
            raise RuntimeError(f"{argument} must be {list(rows)}, got {list(bias.shape)}")


def check_dtypes(input: Tensor, others: Sequence[Tensor]) -> None:
    for tensor in others:
        if tensor.dtype != input.dtype:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({tensor.dtype}). "
                f"Convert input: input.to({tensor.dtype}), or convert model: model.to({input.dtype})"
            )


def check_input_dims(cell: str, input: Tensor) -> None:
    if input.dim() not in (2, 3):
        name = _module_name(cell)
        kind = " tensor" if name == "RNN" else ""
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D{kind} instead")


def check_state_dims(cell: str, input: Tensor, states: Sequence[Tensor | None]) -> None:
    dims = input.dim()
    batched = "batched 3-D" if dims == 3 else "unbatched 2-D"
    given = [state for state in states if state is not None]
    if all(state.dim() == dims for state in given):
        return
    if cell == "lstm":
        got = ", ".join(f"{state.dim()}-D" for state in given)
        raise RuntimeError(f"For {batched} input, hx and cx should also be {dims}-D but got ({got}) tensors")
    raise RuntimeError(f"For {batched} input, hx should also be {dims}-D but got {given[0].dim()}-D tensor")


def is_regular_step(
    x: Tensor, h: Tensor, w_xh: Tensor, w_hh: Tensor, b_h: Tensor | None, w_ho: Tensor | None, b_o: Tensor | None,
    w_yh: Tensor | None,
) -> bool:  # fmt: skip
    """Whether torch's products may be called on these arguments before :func:`check_elman_step`. It is False for what
    the check rejects and torch's products accept: biases that are broadcast, inputs and weights of other numbers of
    dimensions, and weights on the meta device. What the products reject themselves is not looked at."""
    *batch, input_size = x.shape
    *others, hidden_size = h.shape
    if (
        len(batch) > 1 or batch != others or not x.is_floating_point()
        or w_hh.shape != (hidden_size, hidden_size) or w_hh.is_meta
        or w_xh.shape != (hidden_size, input_size) or w_xh.is_meta
        or (b_h is not None and b_h.shape != (hidden_size,))
    ):  # fmt: skip
        return False
    if w_ho is None:
        return b_o is None and w_yh is None
    outputs, inputs = w_ho.shape
    return (
        inputs == hidden_size and not w_ho.is_meta and (b_o is None or b_o.shape == (outputs,))
        and (w_yh is None or (w_yh.dim() == 2 and not w_yh.is_meta))
    )  # fmt: skip


def check_elman_step(
    x: Tensor, h: Tensor, w_xh: Tensor, w_hh: Tensor, b_h: Tensor | None, w_ho: Tensor | None, b_o: Tensor | None,
    w_yh: Tensor | None,
) -> None:  # fmt: skip
    """Checks the arguments of :func:`tritune.elman_step`."""
    for argument, tensor in (("x", x), ("h", h)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument} must be a Tensor, got {type(tensor).__name__}")
    if x.dim() not in (1, 2) or h.dim() != x.dim():
        raise RuntimeError(f"x and h must both be [size] or [B, size], got {list(x.shape)} and {list(h.shape)}")
    if w_ho is None and (b_o is not None or w_yh is not None):
        raise ValueError("b_o and W_yh belong to an output: they need W_ho")
    hidden, outputs = h.shape[-1], "O" if w_ho is None else w_ho.shape[0]
    wanted = (("b_h", b_h, (hidden,)), ("W_ho", w_ho, ("O", hidden)), ("b_o", b_o, (outputs,)),
              ("W_yh", w_yh, ("Y", outputs)))  # fmt: skip
    for argument, optional, shape in wanted:
        if optional is None:
            continue
        if not isinstance(optional, Tensor):
            raise TypeError(f"{argument} must be a Tensor or None, got {type(optional).__name__}")
        fits = (isinstance(size, str) or size == got for size, got in zip(shape, optional.shape, strict=False))
        if optional.dim() != len(shape) or not all(fits):
            sizes = ", ".join(map(str, shape))
            raise RuntimeError(f"{argument} must be [{sizes}], got {list(optional.shape)}")
        if optional.device != x.device:
            raise RuntimeError(f"{argument} must be on the device of x, {x.device}, got {optional.device}")
    check_rnn(
        "tanh", x.unsqueeze(0), w_xh, w_hh, b_h, None, (h.unsqueeze(0),), batch_first=False, reverse=False,
        precision=None,
    )  # fmt: skip
