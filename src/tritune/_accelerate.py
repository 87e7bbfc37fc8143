"""Calls of torch's own functions in unmodified code, sent to the functions of this package."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import ops
from .ops._dispatch import (
    TORCH_ERRORS,
    Declined,
    check_decorated,
    current_backend,
    is_jit_tracing,
    require_torch,
    torch_serves,
    unless_declined,
)

Function = Callable[..., Any]


class accelerate(TorchFunctionMode, ContextDecorator):  # a context manager, named like torch.no_grad
    """Sends the calls that a block or function makes of torch to our functions, so that code which knows nothing of
    this package runs on the kernels where they serve.

    Sent are convolutions, pooling, :func:`torch.nn.functional.scaled_dot_product_attention`, the layers and cells
    behind :class:`torch.nn.RNN`, ``GRU`` and ``LSTM``, and the attention inside
    :class:`torch.nn.MultiheadAttention`, whether code names them in ``torch``, in ``torch.nn.functional`` or calls a
    module. A call that our function leaves to torch, or rejects, goes to torch as it was written: results, errors and
    gradients are those that it has without the block. So does a call on a tensor subclass with a torch function of its
    own. Under ``use_backend("triton")`` only the last is so; what is sent and not covered raises, as ever.

    The value of ``with`` is the object itself. It counts the calls of all its blocks, in all threads, except those that
    torch.compile traces:

    Attributes:
        kernels: for each function, how many calls our kernels served.
        torch: for each pair of a function and a reason, how many calls torch served.

    ``str`` gives the same, one line for each. What ``auto`` weighed, and the configs, are said by :func:`explain`, also
    within the block.

    A block holds in the thread that enters it, as every mode of torch does, and for the forward: backward runs where
    its forward ran. What activation checkpointing computes once more, in backward, is outside of the block unless the
    checkpointed function itself is decorated. Blocks nest, and each counts all calls within it.

    Cost: torch passes every function that is called within the block through the mode, also those that are not sent,
    which takes one to two and a half microseconds each; one that is sent takes up to three more. Outside of the block
    and in a compiled graph it costs nothing. Within any mode :class:`torch.nn.MultiheadAttention` and
    :class:`torch.nn.TransformerEncoderLayer` do not take torch's fused path for inference. In a compiled function
    ``auto`` is torch, and under ``"triton"`` the attention inside :class:`torch.nn.MultiheadAttention` is torch's, too.

    Raises:
        TypeError: as the decorator of a generator or of an ``async`` function.
        UnsupportedError: under ``use_backend("triton")``, by a call that no kernel covers.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> with tritune.accelerate() as sent:
        ...     y = model(torch.randn(1, 3, 16, 16))
        >>> print(sent)
        conv2d: 1 on torch: input is on the CPU
        max_pool2d: 1 on torch: input is on the CPU
    """

    # torch.compile goes on after a break of its graph only in modes that enter and leave as the base class does.

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.torch: Counter[tuple[str, str]] = Counter()

    def __call__(self, func: Any) -> Any:
        check_decorated("accelerate", func)
        return super().__call__(func)

    def __str__(self) -> str:
        lines = [f"{name}: {count} on the kernels" for name, count in self.kernels.items()]
        lines += [f"{name}: {count} on torch: {reason}" for (name, reason), count in self.torch.items()]
        return "\n".join(sorted(lines)) or "nothing was sent"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        entry = SENT.get(func)
        if entry is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        name, ours = entry
        kwargs = kwargs or {}
        overriding = [kind for kind in types if kind is not Tensor]
        if torch.compiler.is_compiling():
            return (ours if ours and not overriding and current_backend() == "triton" else func)(*args, **kwargs)
        return self._send(name, ours, func, overriding, args, kwargs)

    def _send(
        self, name: str, ours: Function | None, func: Function, overriding: Sequence[type], args: Any, kwargs: Any
    ) -> Any:  # fmt: skip
        if overriding:
            reason = f"an argument is a {overriding[0].__name__}, which has a torch function of its own"
        elif torch_serves(args[0] if args else kwargs.get("input", kwargs.get("query"))):
            reason = _why_torch_serves()
        elif ours is None:
            return self._attention_forward(*args, **kwargs)
        else:
            try:
                result = unless_declined(ours, *args, **kwargs)
            except Declined as declined:
                reason = str(declined)
            except TORCH_ERRORS as error:
                if current_backend() == "triton":
                    raise
                reason = f"rejected: {str(error).partition(chr(10))[0]}"
            else:
                for block in (self, *_get_current_function_mode_stack()):
                    if isinstance(block, accelerate):
                        with _counting:
                            block.kernels[name] += 1
                return result
        with _counting:
            self.torch[name, reason] += 1
        return func(*args, **kwargs)

    @cached_property
    def _attention_forward(self) -> Function:
        inner = F.scaled_dot_product_attention
        return attention_forward(lambda *args, **kwargs: self._send(*SENT[inner], inner, (), args, kwargs))


def attention_forward(attention: Function) -> Function:
    """torch's function behind MultiheadAttention, with another one for its ``scaled_dot_product_attention``.

    A mode is off while it runs a function that it was given, and would not see the attention in it. So the code of
    torch's function gets that name bound anew. A mode further out is not offered the whole, of which it would call
    torch's own, but sees all calls within.
    """
    whole = F.multi_head_attention_forward
    names = {
        **whole.__globals__,
        "scaled_dot_product_attention": attention,
        "has_torch_function": lambda tensors: False,
    }
    forward = FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)
    forward.__kwdefaults__ = whole.__kwdefaults__
    return forward


_counting = threading.Lock()  # one object may decorate what several threads call


def _why_torch_serves() -> str:
    if current_backend() == "torch":
        return 'use_backend("torch") is in force'
    return "torch.jit.trace records torch's functions" if is_jit_tracing() else "input is on the CPU"


# --- what is sent ----------------------------------------------------------------------------------------------------


def _with_indices(pool: Function, adaptive: bool) -> Function:
    """torch's function of a maximum with its places, which has ``return_indices`` as an argument without meaning."""

    def whole(input: Tensor, output_size: Any, return_indices: bool = True) -> Any:
        return pool(input, output_size, return_indices=True)

    def windows(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = True,
    ) -> Any:  # fmt: skip
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)

    return whole if adaptive else windows


def _layer(name: str, function: Function) -> Function:
    """What the modules of recurrent layers call: all layers and directions at once, of a batch or of packed rows."""

    def ours(
        input: Tensor, hx: Any, weights: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        # What is not covered raises, since the call came by unless_declined or is for the kernels alone.
        if not isinstance(has_biases, bool):  # rows, sizes of the batch, hx, weights, ...
            require_torch(name, [input, *has_biases], "a packed sequence")
        if num_layers > 1:
            require_torch(name, [input, *weights], f"num_layers={num_layers}")
        directions = 2 if bidirectional else 1
        count = 4 if has_biases else 2
        if len(weights) != count * directions:
            require_torch(name, [input, *weights], "an LSTM with projections")
        stacked = [torch.stack(list(weights[i::count])) for i in range(count)]
        biases = stacked[2:] or (None, None)
        states = hx if name == "lstm" else (hx,)
        return function(input, *stacked[:2], *biases, *states, batch_first=batch_first)

    return ours


def _cell(name: str, function: Function) -> Function:
    """One step: a layer over one step."""

    def ours(input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        if input.dim() != 2:
            require_torch(name, [input, w_ih, w_hh], "input is not [B, I]")
        states = [one.unsqueeze(0) for one in (hx if name == "lstm" else (hx,))]
        _, *last = function(input.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, *states)
        return tuple(one.squeeze(0) for one in last) if name == "lstm" else last[0].squeeze(0)

    return ours


def _sent() -> dict[Any, tuple[str, Function | None]]:
    """By the function that a mode of torch is shown: the name of ours, and ours with the arguments of torch's."""
    names = [
        *(f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3)),
        *(f"{kind}_pool{rank}d" for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg") for rank in (1, 2, 3)),
        *(f"max_unpool{rank}d" for rank in (1, 2, 3)),
        "scaled_dot_product_attention",
    ]
    places = (torch, F, torch._C._nn)
    table: dict[Any, tuple[str, Function | None]] = {F.multi_head_attention_forward: ("multi_head_attention", None)}
    for name in names:
        ours = getattr(ops, name)
        # Unpooling of torch._C takes other arguments, and its adaptive maximum always gives the places.
        for place in (F,) if "unpool" in name else places:
            is_maximum_with_places = name.startswith("adaptive_max") and place is not F
            adapted = _with_indices(ours, adaptive=True) if is_maximum_with_places else ours
            if hasattr(place, name):
                table[getattr(place, name)] = (name, adapted)
            if hasattr(place, f"{name}_with_indices"):
                table[getattr(place, f"{name}_with_indices")] = (name, _with_indices(ours, "adaptive" in name))
    recurrent: dict[str, tuple[str, Function]] = {
        "rnn_tanh": ("rnn", ops.rnn), "rnn_relu": ("rnn", partial(ops.rnn, nonlinearity="relu")),
        "gru": ("gru", ops.gru), "lstm": ("lstm", ops.lstm),
    }  # fmt: skip
    for theirs, (name, function) in recurrent.items():
        table[getattr(torch, theirs)] = (name, _layer(name, function))
        table[getattr(torch, f"{theirs}_cell")] = (f"{name}_cell", _cell(name, function))
    return table


SENT = _sent()
