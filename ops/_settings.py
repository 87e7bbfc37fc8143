"""Settings of the process and of this thread that a call may change, and how :func:`explain` puts them back.

A setting is a pair of functions: one that reads it and one that sets what was read. Those of ``torch._C`` are found by
their names, so that a new one of torch is not forgotten.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal wraps each handler that it returns, which takes a hundred times as long
import decimal
import functools
import gc
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import forward_ad
from torch.overrides import _pop_mode
from torch.utils import _python_dispatch

from ._dispatch import _state

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextmanager
def settings_restored() -> Iterator[None]:
    """Puts back what a call in the block changes."""
    settings = _settings()
    before = [_read(read) for read, _ in settings]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.clear_autocast_cache()  # of tensors without data
        for (read, restore), value in zip(settings, before, strict=True):
            if _read(read) != value:
                restore(value)


def _read(read: Callable[[], Any]) -> Any:
    """The value; ``None`` where torch does not say it, as of TF32 that was set both the old and the new way."""
    with suppress(RuntimeError):
        return read()
    return None


# Names of torch._C with a getter and a setter that are no settings, but what torch itself is doing.
_NO_SETTINGS = ("dispatch_mode", "tensor_metadata", "tracing_state", "value_trace", "graph_exec_group", "thread_name")


@functools.cache
def settings_of_torch() -> dict[str, Setting]:
    """Every ``_get_<name>`` or ``_is_<name>`` of torch's C++ side that has a ``_set_<name>``."""
    found: dict[str, Setting] = {}
    for getter in dir(torch._C):
        for start in ("_get_", "_is_"):
            name = getter.removeprefix(start)
            setter = getattr(torch._C, f"_set_{name}", None)
            if getter.startswith(start) and setter is not None and name not in _NO_SETTINGS:
                found[name] = (getattr(torch._C, getter), functools.partial(_set, setter))
    return found


def _set(setter: Callable[..., Any], value: Any) -> None:
    """Two settings of cuBLAS are pairs, which their setters take apart. One that could not be read stays."""
    if isinstance(value, tuple):
        setter(*value)
    elif value is not None:
        setter(value)


_PRODUCTS = ("all", "conv", "rnn", "matmul")
_PRECISIONS = (("generic", "all"), *((backend, op) for backend in ("cuda", "mkldnn") for op in _PRODUCTS))
_SDP = ("flash", "math", "mem_efficient", "cudnn")


def _settings() -> list[Setting]:
    """In the order in which they are restored: those that others bring with them come last."""
    return [
        *settings_of_torch().values(),
        (torch.is_grad_enabled, torch._C._set_grad_enabled),
        (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_num_threads, torch.set_num_threads),
        (_flushes_denormals, torch.set_flush_denormal),
        *(
            (getattr(torch.backends.cuda, f"{name}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{name}_sdp"))
            for name in _SDP
        ),
        *(
            (
                functools.partial(torch._C._get_fp32_precision_getter, backend, op),
                functools.partial(torch._C._set_fp32_precision_setter, backend, op),
            )
            for backend, op in _PRECISIONS
        ),
        *(
            tuple(functools.partial(side, kind) for side in setting)
            for kind in ("cpu", "cuda") for setting in (
                (torch.is_autocast_enabled, torch.set_autocast_enabled),
                (torch.get_autocast_dtype, torch.set_autocast_dtype),
            )
        ),
        (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        (_autocast_nesting, _set_autocast_nesting),
        (_saved_tensors_hooks, _leave_saved_tensors_hooks),
        (_default_device, torch.set_default_device),
        (torch._C._len_torch_function_stack, _leave_function_modes),
        (torch._C._len_torch_dispatch_stack, _leave_dispatch_modes),
        (lambda: forward_ad._current_level, _leave_forward_ad),
        (lambda: dict(vars(torch.__future__)), vars(torch.__future__).update),
        (lambda: dict(vars(torch._tensor_str.PRINT_OPTS)), vars(torch._tensor_str.PRINT_OPTS).update),
        (lambda: _state.backend, lambda backend: _state.set(backend, _state.recorder)),
        *_cudnn_benchmark_limit(),
        (torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy),
        (_dynamo_config, _set_dynamo_config),
        *((vars(space).copy, functools.partial(_set_names, space)) for space in (torch, torch.nn.functional)),
        *_settings_of_python(),
        (np.geterr, lambda modes: np.seterr(**modes)),
        (np.get_printoptions, lambda options: np.set_printoptions(**options)),
        (lambda: dict(os.environ), _set_environment),
        (lambda: logging.root.manager.disable, logging.disable),
        (_loggers, _set_loggers),
    ]  # fmt: skip


def _settings_of_python() -> list[Setting]:
    names = ("stdin", "stdout", "stderr", "excepthook", "displayhook", "unraisablehook")
    return [
        *((functools.partial(getattr, sys, name), functools.partial(setattr, sys, name)) for name in names),
        (lambda: sys.path[:], lambda path: sys.path.__setitem__(slice(None), path)),
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (sys.get_int_max_str_digits, sys.set_int_max_str_digits),
        (sys.getswitchinterval, sys.setswitchinterval),
        (sys.getprofile, sys.setprofile),
        (sys.gettrace, sys.settrace),
        (gc.isenabled, lambda is_enabled: gc.enable() if is_enabled else gc.disable()),
        (gc.get_threshold, lambda thresholds: gc.set_threshold(*thresholds)),
        (_signal_handlers, _set_signal_handlers),
        (lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
        (_decimal_context, _set_decimal_context),
        (lambda: threading.excepthook, functools.partial(setattr, threading, "excepthook")),
        (_folder, _set_folder),
        (lambda: logging.raiseExceptions, functools.partial(setattr, logging, "raiseExceptions")),
    ]


def _folder() -> str | None:
    """None where it has been removed."""
    with suppress(OSError):
        return str(Path.cwd())
    return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _signal_handlers() -> dict[int, Any]:
    """Only the main thread may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: _signal.getsignal(number) for number in range(1, signal.NSIG)}


def _set_signal_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and _signal.getsignal(number) != handler:  # None was not set from Python
            signal.signal(number, handler)


_DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")


def _decimal_context() -> tuple[Any, ...]:
    """The context itself and what it holds."""
    context = decimal.getcontext()
    return context, [getattr(context, name) for name in _DECIMAL], dict(context.flags), dict(context.traps)


def _set_decimal_context(state: tuple[Any, ...]) -> None:
    context, values, flags, traps = state
    decimal.setcontext(context)
    for name, value in zip(_DECIMAL, values, strict=True):
        setattr(context, name, value)
    context.flags.update(flags)
    context.traps.update(traps)


def _dynamo_config() -> dict[str, Any]:
    """Empty where it has not been imported, so that nobody has set anything."""
    config: Any = sys.modules.get("torch._dynamo.config")
    return config.get_config_copy() if config else {}


def _set_dynamo_config(before: dict[str, Any]) -> None:
    for name, value in _dynamo_config().items():
        if name in before and value != before[name]:
            setattr(sys.modules["torch._dynamo.config"], name, before[name])


def _set_names(space: Any, before: dict[str, Any]) -> None:
    """Puts back what was replaced and takes away what was added, but not modules, which stay imported."""
    for name, value in dict(vars(space)).items():
        if name in before and value is not before[name]:
            setattr(space, name, before[name])
        elif name not in before and not isinstance(value, ModuleType):
            delattr(space, name)
    for name in before.keys() - vars(space).keys():
        setattr(space, name, before[name])


def _cudnn_benchmark_limit() -> list[Setting]:
    """By the functions below ``torch.backends``, whose flags torch's tests forbid to set. A CPU build has none."""
    read, restore = (getattr(torch._C, f"_cuda_{verb}_cudnn_benchmark_limit", None) for verb in ("get", "set"))
    return [(read, restore)] if read is not None and restore is not None else []


def _default_device() -> Any:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return context and context.device


def _flushes_denormals() -> bool:
    """torch has no getter: does a number below the smallest normal one survive a product?"""
    smallest = float("5e-324")
    return smallest * 1.0 == 0.0


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast_nesting(depth: int) -> None:
    step = torch.autocast_increment_nesting if _autocast_nesting() < depth else torch.autocast_decrement_nesting
    while step() != depth:
        pass


def _saved_tensors_hooks() -> Any:
    return _top_saved_tensors_default_hooks(True)


def _leave_saved_tensors_hooks(before: Any) -> None:
    while _top_saved_tensors_default_hooks(True) not in (before, None):
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _leave_function_modes(depth: int) -> None:
    while torch._C._len_torch_function_stack() > depth:
        _pop_mode()


def _leave_dispatch_modes(depth: int) -> None:
    while torch._C._len_torch_dispatch_stack() > depth:
        _python_dispatch._pop_mode()


def _leave_forward_ad(level: int) -> None:
    while forward_ad._current_level > level:
        forward_ad.exit_dual_level()


def _loggers() -> dict[logging.Logger, tuple[Any, ...]]:
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    return {
        one: (one.level, one.disabled, one.propagate, one.handlers[:], one.filters[:])
        for one in (logging.root, *loggers)
    }


def _set_loggers(states: dict[logging.Logger, tuple[Any, ...]]) -> None:
    for one, state in states.items():
        level, one.disabled, one.propagate, one.handlers[:], one.filters[:] = state
        one.setLevel(level)
