"""The shapes of a model's calls, for the tuner."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import ops
from ._accelerate import SENT, Function, attention_forward
from .autotune import recorded
from .autotune.recorded import Recorded, one_number
from .ops._dispatch import (
    TORCH_ERRORS,
    Declined,
    conv_setting,
    in_transform,
    matmul_setting,
    rnn_setting,
    unless_declined,
)
from .ops._layout import is_channels_last


@contextmanager
def record_shapes(path: str | Path) -> Iterator[None]:
    """Writes the shapes of all calls of a block to a file, each with its count, for ``tritune tune --from FILE``.

    Recorded are the calls of our functions, by their names or from modules of ``tritune.nn``, and those of torch's that
    :class:`accelerate` would send, within its block or not. So a model that was written for torch is recorded as it is.
    Not recorded are calls that raise, those of which no kernel covers any (as of an LSTM of several layers), those in a
    ``torch.func`` transform, and those in compiled graphs: record a model before it is compiled. Nothing has to be
    computed: in a ``FakeTensorMode`` tensors have shapes and no data.

    Args:
        path: the file, one call a line as JSON (:mod:`tritune.autotune.recorded` describes the fields); what was in it
            is replaced. It is written when the block ends, also by an exception.

    The block holds in the thread that enters it, and costs some tens of microseconds a call; outside nothing.

    Raises:
        OSError: the file cannot be written; at the start of the block.

    Example::

        >>> with tritune.record_shapes("shapes.jsonl"):
        ...     y = torch.nn.Conv2d(3, 8, 3)(torch.randn(1, 3, 16, 16))
        >>> # tritune tune --from shapes.jsonl; elsewhere: tritune tune --from shapes.jsonl --static --target sm_90
    """
    place = Path(path)
    place.write_text("")
    recorder = _Recorder()
    try:
        with recorder:
            yield
    finally:
        recorded.write(place, recorder.calls())


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Recorded] = {}
        self.counts: Counter[str] = Counter()

    def calls(self) -> list[Recorded]:
        """The most frequent first."""
        return [replace(self.seen[key], count=count) for key, count in self.counts.most_common()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        overridden = any(kind is not Tensor for kind in types)  # its torch function may do anything
        if torch.compiler.is_compiling() or overridden or not (func in _PUBLIC or func in SENT):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention_forward(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _PUBLIC:
            self.note(func, args, kwargs)
        else:
            _, ours = SENT[func]
            assert ours is not None
            try:
                with _Intercepting():
                    unless_declined(ours, *args, **kwargs)
            except _Intercepted as call:
                self.note(*call.args)
            except (Declined, *TORCH_ERRORS):
                pass  # no kernel covers it, or only torch takes it
        return result

    @cached_property
    def _attention_forward(self) -> Function:
        inner = F.scaled_dot_product_attention
        return attention_forward(lambda *args, **kwargs: self.__torch_function__(inner, (), args, kwargs))

    def note(self, function: Function, args: Any, kwargs: Any) -> None:
        call = None if in_transform() else _recorded(function, args, kwargs)
        if call is not None:
            key = repr(call)
            self.seen[key] = call
            self.counts[key] += 1


class _Intercepted(Exception):  # no error: what a function of ours was called with
    pass


class _Intercepting(TorchFunctionMode):
    """Ends the way from torch's arguments to ours at the function of ours."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PUBLIC:
            raise _Intercepted(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_PUBLIC = {
    function
    for name in ops.__all__
    if inspect.isfunction(function := getattr(ops, name)) and name not in ("explain", "record")
}


def _recorded(function: Function, args: Any, kwargs: Any) -> Recorded | None:
    """``None`` of a call with sizes that are symbols."""
    op = function.__name__
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if any(type(size) is not int for shape in shapes.values() for size in shape):
        return None
    defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    given = {name: _plain(value) for name, value in arguments.items() if name not in tensors}
    others = {name: one_number(value) if name in _PER_DIMENSION else value for name, value in given.items()}
    others = {name: value for name, value in others.items() if value != defaults[name]}
    first = next(iter(tensors.values()))
    dtype, is_cast = _how_it_computes(op, first, others.pop("precision", None))
    dtypes = {
        name: _name(t.dtype) for name, t in tensors.items()
        if t.dtype != first.dtype and not (is_cast and t.is_floating_point())
    }  # fmt: skip
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    return Recorded(op, shapes, dtype, _layout(op, tensors), others, "fwd+bwd" if needs_grad else "fwd", dtypes)


# Arguments of which one number stands for the same number in each dimension.
_PER_DIMENSION = ("kernel_size", "stride", "padding", "dilation", "output_padding", "pool_kernel_size", "pool_stride",
                  "pool_padding")  # fmt: skip


def _plain(value: Any) -> Any:
    """What JSON has a word for; of the rest, numbers of numpy are ints."""
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    return int(value) if hasattr(value, "__index__") else str(value)


def _how_it_computes(op: str, first: Tensor, precision: str | None) -> tuple[str, bool]:
    """The word for it, and whether autocast says so."""
    dtype = first.dtype
    setting = next((one for word, one in _SETTINGS.items() if op.startswith(word)), None)
    kind = first.device.type
    is_cast = bool(setting) and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    if is_cast and dtype.is_floating_point:
        dtype = torch.get_autocast_dtype(kind)
    if dtype is torch.float32 and setting:
        return precision or setting(), is_cast
    words = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return words.get(dtype, _name(dtype)), is_cast


# Functions that multiply, by how their names begin: torch's setting for fp32.
_SETTINGS = {
    "conv": conv_setting, "rnn": rnn_setting, "gru": rnn_setting, "lstm": rnn_setting, "elman": rnn_setting,
    "attention": matmul_setting, "scaled": matmul_setting,
}  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(op: str, tensors: dict[str, Tensor]) -> str:
    """Results are channels last where the input or the weight is."""
    if not ("conv" in op or "pool" in op) or op == "attention_pool":
        return ""
    rank = int(op[-2]) if op.endswith("d") else tensors["input"].dim() - 2
    images = [tensors[name] for name in ("input", "weight") if name in tensors]
    batched = [t if t.dim() == rank + 2 else t.unsqueeze(0) for t in images]
    return "nhwc" if any(map(is_channels_last, batched)) else "nchw"
