"""Compares the errors of our validators with those that torch itself raises for the same call."""

import platform
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

# Texts and oddities change between releases, and some come from the CPU library that torch was built with. On anything
# but this yardstick only the types of errors are compared.
YARDSTICK = (
    torch.__version__.startswith("2.13")
    and platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
)

PLACES = ("cpu", "meta", "fake")
NUMBERS = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "ceil_mode", "output_size")


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        args = [_short(arg) for arg in self.args] + [f"{name}={_short(arg)}" for name, arg in self.kwargs.items()]
        return f"({', '.join(args)})"


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


def _short(arg: Any) -> str:
    if isinstance(arg, torch.Tensor) and arg.dim():
        return f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}"
    return repr(arg)


def at(place: str, made: Call) -> Call:
    """The call with its operands, but not a tensor that stands for a number, moved to ``place``."""
    if place == "cpu":
        return made
    mode = FakeTensorMode()

    def move(arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        return arg.to("meta") if place == "meta" else mode.from_tensor(arg)

    args = tuple(move(arg) for arg in made.args)
    return Call(args, {name: arg if name in NUMBERS else move(arg) for name, arg in made.kwargs.items()})


def outcome(function: Callable[..., Any], made: Call) -> Any:
    """What the call returns, or the exception that it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once per process, about even kernels with padding="same"
        try:
            return function(*made.args, **made.kwargs)
        except Exception as error:
            return error


def assert_same_error(theirs: Any, ours: Any, made: Call, compare_text: bool = True) -> None:
    """``ours`` is of the type of ``theirs`` and begins with its text."""
    assert isinstance(theirs, Exception), f"torch accepts {made}"
    assert isinstance(ours, Exception), f"we accept {made}, torch says {theirs!r}"
    assert type(ours) is type(theirs), f"{made}\n  torch: {theirs!r}\n  ours:  {ours!r}"
    if compare_text and YARDSTICK:
        text = str(theirs).partition("\nException raised from")[0]  # a C++ stack trace follows
        assert str(ours).startswith(text), f"{made}\n  torch: {text}\n  ours:  {ours}"
