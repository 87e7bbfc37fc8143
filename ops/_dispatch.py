"""Which backend serves a call, and why: the choice is made once, in forward, and kept for backward."""

from __future__ import annotations

import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass
from functools import cache
from logging import INFO
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from ..autotune.device import DeviceSpec, detect
from ..autotune.log import logger
from ..autotune.resolve import Choice
from ..autotune.variables import WORDS, word
from ._checks import _is_static

BACKENDS = WORDS["TRITUNE_BACKEND"]
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class UnsupportedError(NotImplementedError):
    """Raised under ``use_backend("triton")`` for a call that no kernel covers (the message names the argument), and by
    :func:`explain` for one that cannot be looked at without running it (the message names the line or the type)."""


class Declined(Exception):  # no error: torch computes the call
    """Raised inside :func:`unless_declined` by a call that our function would leave to torch; the message says why."""


DEFAULT_BACKEND = word("TRITUNE_BACKEND") or "auto"
# Triton reads the variable when its kernels are defined, so it must be set before they are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`torch.compiler.assume_constant_result`, which would import the compiler: torch.compile calls the function
    instead of tracing it."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


class _State(threading.local):
    def __init__(self) -> None:
        # In every thread attributes of the instance: torch.compile does not see one that comes to hide a class's.
        self.set(DEFAULT_BACKEND, None)
        self.declines = False

    def set(self, backend: str, recorder: list[Decision] | None) -> None:
        self.backend, self.recorder = backend, recorder
        # "auto" or "torch" where torch may be called before our checks and no record() is active, else "": the fast way
        # of a call reads this one attribute.
        self.torch_first = "" if backend == "triton" or recorder is not None else backend


_state = _State()


class use_backend(ContextDecorator):  # a context manager, named like torch.no_grad
    """Chooses the backend for the calls of a block or function, in this thread.

    Args:
        name: ``"auto"`` runs whatever is known to be fastest, ``"torch"`` only torch's operators, ``"triton"`` only
            our kernels: what they do not cover raises :class:`UnsupportedError`. The backward of a call runs where
            its forward ran, also in another thread and after the block.

    Raises:
        ValueError: for another name.
        TypeError: as the decorator of a generator or of an ``async`` function.

    Example::

        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w)

    With ``TRITON_INTERPRET=1`` set before the import, ``"triton"`` runs CPU tensors too, slowly, in the interpreter.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
        self.name = name
        self.previous: dict[int, list[str]] = {}  # by thread, since several may use one object

    def __call__(self, func: Any) -> Any:
        check_decorated("use_backend", func)
        return super().__call__(func)

    def _recreate_cm(self) -> use_backend:
        return use_backend(self.name)

    def __enter__(self) -> use_backend:
        self.previous.setdefault(_thread(), []).append(_state.backend)
        _state.set(self.name, _state.recorder)
        return self

    def __exit__(self, *exc_info: object) -> None:
        before = self.previous[_thread()]
        _state.set(before.pop(), _state.recorder)
        if not before:
            del self.previous[_thread()]


@constant  # Dynamo cannot trace the question, and undoes within a graph what it has noted there
def _thread() -> int:
    return threading.get_ident()


def check_decorated(block: str, func: Any) -> None:
    """Raises TypeError for what a block cannot decorate."""
    if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
        raise TypeError(
            f"{block} cannot decorate {func.__qualname__}, whose body does not run while it is called: "
            "use a with block in it"
        )


def current_backend() -> str:
    return _state.backend


def torch_serves(input: Any) -> bool:
    """Does torch serve a call on this input, whatever the other arguments are? Not where a call is explained: that has
    to come to :func:`choose`. ``input`` may be no tensor."""
    if _state.torch_first == "auto":
        return not getattr(input, "is_cuda", False) or torch.compiler.is_compiling() or is_jit_tracing()
    return _state.torch_first == "torch"


def torch_validates(input: Any) -> bool:
    """Does torch serve a call on this input, and may its own function be called first, our validator only if that
    raises? No for meta and fake tensors, of which torch checks less, and under dispatch modes and hooks of saved
    tensors, whose exceptions would look like torch's. Always in torch.jit.trace, where our checks would make sizes
    constants."""
    if not torch_computes(input) or _state.recorder is not None:
        return False
    looked_on = (
        _len_torch_dispatch_stack() or _top_saved_tensors_default_hooks(True) is not None
        or logger.isEnabledFor(INFO)  # :func:`choose` logs why torch serves
    )  # fmt: skip
    return not looked_on or _is_tracing()


def torch_computes(input: Any) -> bool:
    """Does torch serve a call on this real tensor, whoever looks on? Looking on must not change what runs, so a module
    that may take a way of its own there goes by this, and a function, whose torch call must not be taken for the
    user's, by :func:`torch_validates`; whether :func:`choose` has to be told is :func:`is_watched`."""
    kind = type(input)
    if (kind is not Tensor and kind is not Parameter) or is_dynamo_compiling():
        return False
    backend = _state.backend
    return input.is_cpu or _is_tracing() if backend == "auto" else backend == "torch" and not input.is_meta


def is_watched() -> bool:
    """Does somebody record or log decisions?"""
    return _state.recorder is not None or logger.isEnabledFor(INFO)


# How torch's functions reject arguments. Other exceptions belong to hooks that run inside of them: by one of its own
# activation checkpointing ends a call when it has recomputed enough.
TORCH_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, ArithmeticError)


def rejections() -> tuple[type[Exception], ...]:
    """The exceptions after which our validator is asked, where :func:`torch_validates`. In torch.jit.trace there are
    none: it does not survive that another operator follows one that failed. Asked before the call, since a failure also
    ends the trace."""
    return () if _is_tracing() else TORCH_ERRORS


def torch_errors(input: Any) -> tuple[type[Exception], ...] | None:
    """May the public function call torch's own before our checks, and after which exceptions are they asked? ``None``
    if it may not. None of them, ``()``, while sizes are recorded: our checks would ask about sizes, and each answer
    would be recorded, too, as a guard or a constant. So there torch's own has the call, whatever it says."""
    if torch_validates(input):
        return rejections()
    return () if records_sizes(input) and torch_serves(input) else None


def records_sizes(input: Any) -> bool:
    """Is the call compiled or exported, or are the sizes of ``input`` symbols, as those that make_fx traces? Those of
    a nested tensor always are."""
    if torch.compiler.is_compiling():
        return True
    return getattr(input, "_has_symbolic_sizes_strides", False) and not input.is_nested


def are_plain(sizes: tuple[Any, ...], least: int = 0, *, recorded: bool) -> bool:
    """Is each of these an int from ``least`` on that fits into 31 bits, or a tuple or list of such? What else torch
    takes for ints, or takes and computes something with, is for the validators. But where sizes are ``recorded``, one
    that is computed from the input's has to stay what it is, and nothing is asked of it."""
    for size in sizes:
        kind = type(size)
        if kind is int:
            if (not recorded or _is_static(size)) and not least <= size < _LARGEST_SIZE:
                return False
        elif kind is tuple or kind is list or kind is torch.Size:
            for one in size:
                if type(one) is not int:
                    if not recorded:
                        return False
                elif (not recorded or _is_static(one)) and not least <= one < _LARGEST_SIZE:
                    return False
        elif not recorded:
            return False
    return True


_LARGEST_SIZE = 2**31 - 1


# --- what the kernels cover ------------------------------------------------------------------------------------------


@cache
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant  # before torch 2.13 a cache alone is traced through
def _triton_installed() -> bool:
    return _find_triton()


@constant  # Dynamo cannot trace the question
def is_jit_tracing() -> bool:
    """Is torch.jit.trace running, which makes a constant of whatever Python asks of a size?"""
    return _is_tracing()


@constant  # torch 2.11 takes the answer for True in whatever it compiles
def is_exporting() -> bool:
    """Is torch.export tracing?"""
    return torch.compiler.is_exporting()


def in_transform() -> bool:
    """Is a functorch transform or a forward-AD level open? There only torch's composites have derivatives.

    Dynamo opens the levels that it traces, so the answer holds for what is being compiled, too.
    """
    return forward_ad._current_level >= 0 or _in_functorch()


@constant  # traced, the comparison with None would be True everywhere
def _in_functorch() -> bool:
    return peek_interpreter_stack() is not None


@constant
def open_transforms() -> list[str]:
    """The kinds of the open functorch transforms, the outermost first: Grad, Jvp, Vmap, Functionalize."""
    return [level.key().name for level in get_interpreter_stack() or ()]


def is_plain(tensor: Tensor) -> bool:
    """Is this a tensor whose storage a kernel may read, or one that stands for such a tensor while tracing?"""
    kind = type(tensor)
    if kind is Tensor or kind is Parameter:
        return tensor.layout is torch.strided
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return kind in (FakeTensor, FunctionalTensor)


def uncovered(tensors: Sequence[Tensor], dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> str | None:
    """Why no kernel can serve a call on these tensors; ``None`` if one can. The first tensor decides the device."""
    first = tensors[0]
    kind = first.device.type
    if kind == "cpu" and not INTERPRETED:
        return "input is on the CPU, where torch serves (TRITON_INTERPRET=1 interprets the kernels there)"
    if kind not in ("cpu", "cuda"):
        return f"input is on device {kind!r}"
    if not _triton_installed():
        return "triton is not installed (pip install 'tritune[triton]')"
    compiling = torch.compiler.is_compiling()
    for tensor in tensors:
        if not compiling and not is_plain(tensor):
            return f"an argument is a {type(tensor).__name__}, {tensor.layout}: not a plain strided tensor"
        if tensor.dtype not in dtypes:
            return f"dtype {tensor.dtype} has no kernel"
    if in_transform():
        return "a torch.func transform or forward-mode AD is active"
    if is_jit_tracing():
        return "torch.jit.trace cannot record sizes for our operators: use torch.export"
    if kind == "cuda":
        return _old_gpu(first.device)
    return None


def _old_gpu(device: torch.device) -> str | None:
    if torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        return "the GPU is older than compute capability 8.0"
    return None


# --- the decision ----------------------------------------------------------------------------------------------------


class Ruling(NamedTuple):
    """Whether the kernels win, and why (not).

    Attributes:
        because: one sentence.
        origin: ``"measured"``, or ``"rule"``: by a rule that is written down and needs no measurement.
    """

    wins: bool
    because: str
    origin: str = "rule"


@dataclass(frozen=True)
class Decision:
    """What a call runs, and why.

    Attributes:
        op: public name, for example ``"conv2d"``.
        backend: ``"triton"`` or ``"torch"``.
        because: one sentence.
        kernels: of the Triton backend: name and config of each kernel, and where the config comes from.
        rejected: why the other backend was not taken.
        origin: how ``auto`` chose the backend, as :class:`Ruling` says it. Empty where nothing was left to choose: no
            kernel covers the call, or ``use_backend`` says what runs.
        instead: the kernels that ``use_backend("triton")`` would run, where ``auto`` took torch by its ruling.
    """

    op: str
    backend: str
    because: str
    kernels: tuple[tuple[str, Choice], ...] = ()
    rejected: str = ""
    origin: str = ""
    instead: tuple[tuple[str, Choice], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}: {self._why()}"]
        for name, choice in self.kernels:
            lines.append(f"  {name}: {choice}")
        for name, choice in self.instead:
            lines.append(f"  triton would run {name}: {choice}")
        if self.rejected:
            other = "torch" if self.backend == "triton" else "triton"
            lines.append(f"  not {other}: {self.rejected}")
        return "\n".join(lines)

    def summary(self) -> str:
        """The same on one line, without the configs of the kernels."""
        kernels = f" ({', '.join(name for name, _ in self.kernels)})" if self.kernels else ""
        return f"{self.op}: {self.backend}{kernels}: {self._why()}" + (f": {self.rejected}" if self.rejected else "")

    def _why(self) -> str:
        return self.because + (f"  [{self.origin}]" if self.origin else "")


class Decisions(list[Decision]):
    """What a function or model runs, in call order. It prints one decision a line; each says more of itself."""

    def __str__(self) -> str:
        return "\n".join(decision.summary() for decision in self)


def choose(
    op: str,
    tensors: Sequence[Tensor],
    rule: Callable[[DeviceSpec], Ruling],
    kernels: Callable[[DeviceSpec], tuple[tuple[str, Choice], ...]],
    limits: Callable[[], str | None],
) -> str:
    """The backend of one call: ``"triton"`` or ``"torch"``.

    Args:
        tensors: all tensor arguments, the input first.
        rule: for ``"auto"``, asked only if the kernels cover the call: do they win on this device?
        kernels: name and config of the kernels that would run, asked only when somebody wants the explanation.
        limits: asked if the tensors could be served: why this op's kernels do not cover the call, or ``None``.
    """
    backend = _state.backend
    rejected = origin = ""
    is_weighed = False  # the kernels against torch
    if backend == "torch":
        chosen, because = "torch", 'use_backend("torch") is in force'
    else:
        reason = uncovered(tensors) or limits()
        if reason is not None:
            if backend == "triton":
                raise UnsupportedError(
                    f'{op}: no kernel covers the call, and use_backend("triton") forbids torch: {reason}'
                )
            chosen, because, rejected = "torch", "no kernel covers the call", reason
            _log_fallback(op, reason)
        elif backend == "triton":
            chosen, because = "triton", 'use_backend("triton") is in force'
        elif tensors[0].device.type == "cpu":
            chosen, because, origin = "torch", "the interpreter is never taken unasked", "rule"
        elif torch.compiler.is_compiling():
            chosen, because, origin = "torch", "the compiler fuses torch's operators itself", "rule"
        else:
            wins, because, origin = rule(detect(tensors[0].device))
            chosen, is_weighed = "triton" if wins else "torch", True
    if _state.recorder is not None:
        found = kernels(detect(tensors[0].device)) if chosen == "triton" or is_weighed else ()
        used, instead = (found, ()) if chosen == "triton" else ((), found)
        _state.recorder.append(Decision(op, chosen, because, used, rejected, origin, instead))
    if chosen == "torch" and _state.declines:
        raise Declined(rejected or because)
    return chosen


def require_torch(op: str, tensors: Iterable[Tensor], reason: str | None) -> None:
    """Records the decision that torch serves a call. ``reason`` says why no kernel covers it, which is an error under
    ``use_backend("triton")``; it is None where the kernels could cover it but do not run, as on the CPU."""
    choose(op, list(tensors), lambda _: Ruling(False, reason or ""), lambda _: (), lambda: reason)


def unless_declined(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a public function for somebody who has the call in torch's own words, too.

    Raises:
        Declined: instead of computing by torch's operators.
    """
    before, _state.declines = _state.declines, True
    try:
        return function(*args, **kwargs)
    finally:
        _state.declines = before


def measured(choices: Sequence[tuple[str, Choice]]) -> Ruling | None:
    """Do a call's kernels, taken together, win by measurement, and by how much? ``None`` if one was not timed beside
    torch."""
    times = [(choice.us, choice.torch_us) for _, choice in choices if choice.us and choice.torch_us]
    if len(times) < len(choices):
        return None
    ours_us, torch_us = (sum(side) for side in zip(*times, strict=True))
    return by_times(ours_us, torch_us)


def by_times(ours_us: float, torch_us: float) -> Ruling:
    """By times that were measured, in microseconds."""
    return Ruling(ours_us < torch_us, f"measured: {ours_us:.1f} us against {torch_us:.1f} us of torch", "measured")


DEFAULT_PRECISION = "default"


def resolved_precision(input: Tensor, precision: str | None, setting: Callable[[], str]) -> str:
    """How fp32 is multiplied: as the caller said, else by torch's ``setting``, one of the functions below."""
    if precision not in (None, DEFAULT_PRECISION):
        return precision
    return setting() if input.dtype is torch.float32 and input.device.type == "cuda" else "ieee"


def operator_precision(input: Tensor, precision: str | None, setting: Callable[[], str]) -> str:
    """What an operator is told. torch.compile can neither trace cuDNN's settings nor notice that one changed, so in a
    graph the default stays DEFAULT_PRECISION: the operator reads the setting when it runs, as torch's own does."""
    if precision is None and torch.compiler.is_compiling():
        return DEFAULT_PRECISION
    return resolved_precision(input, precision, setting)


def conv_setting() -> str:
    return _tf32_or_ieee(torch.backends.cudnn.conv)  # type: ignore[attr-defined]


def rnn_setting() -> str:
    return _tf32_or_ieee(torch.backends.cudnn.rnn)


@constant  # a change of this one torch.compile notices
def matmul_setting() -> str:
    return _tf32_or_ieee(torch.backends.cuda.matmul)


def _tf32_or_ieee(knobs: Any) -> str:
    """``fp32_precision`` follows ``allow_tf32``, which raises where both ways of setting it were used."""
    return "tf32" if knobs.fp32_precision == "tf32" else "ieee"


def runs_kernels(backend: str, tensor: Tensor) -> bool:
    """Inside an operator, which is told its backend: is this a call for the kernels?

    Strictness is the public function's. An operator that was exported for the kernels runs on torch where there is no
    GPU; one that is called directly with ``"auto"`` follows :class:`use_backend`.
    """
    if backend == "auto":
        backend = current_backend()
    return backend == "triton" and (tensor.device.type == "cuda" or INTERPRETED)


_logged: set[tuple[str, str]] = set()


def _log_fallback(op: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, reason) in _logged:
        return
    _logged.add((op, reason))
    logger.info("%s runs on torch: %s", op, reason)


@contextmanager
def record() -> Iterator[Decisions]:
    """Collects the decision of every call in the block, in this thread."""
    previous = _state.recorder
    decisions = Decisions()
    _state.set(_state.backend, decisions)
    try:
        yield decisions
    finally:
        _state.set(_state.backend, previous)
