"""Looking changes nothing: what a call reaches is, after ``explain``, what it was before, bit for bit."""

from __future__ import annotations

import contextlib
import ctypes
import decimal
import enum
import functools
import gc
import importlib
import io
import locale
import logging
import os
import random
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from os import environ
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import explained_helpers
import numpy as np
import pytest
import test_extremes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tritune
from tritune.ops import _settings, record
from tritune.ops._dispatch import current_backend

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def hooks_of_all_modules(monkeypatch):
    """Those that a call registers are gone after its test."""
    for name, value in vars(nn.modules.module).items():
        if name.startswith("_global_"):
            monkeypatch.setattr(nn.modules.module, name, value.copy() if isinstance(value, dict) else value)


# --- the deep comparison ---------------------------------------------------------------------------------------------


def snapshot(one: Any, seen: dict[int, Any]) -> Any:
    """Everything that ``one`` holds, by identity and by value, as nested tuples that compare by ``==``."""
    if isinstance(one, bool | int | float | str | bytes | None | torch.dtype | ModuleType):
        return one
    if id(one) in seen:
        return id(one)
    seen[id(one)] = one  # an object that is gone would leave its id to another

    def inside(*parts: Any) -> Any:
        return tuple(snapshot(part, seen) for part in parts)

    held: Any = ()
    if isinstance(one, type):
        held = tuple((name, *inside(value)) for name, value in vars(one).items() if name[0] != "_")
        held = (*held, *inside(type(one)))
        return id(one), held if one.__module__ in (__name__, "explained_helpers") else ()
    if isinstance(one, Tensor):
        values = one.detach().contiguous().view(-1).view(torch.uint8).tolist() if one.numel() else []
        held = (values, one._version, one.requires_grad, tuple(one.shape), one.stride())
        held = (*held, *inside(one.grad if one.is_leaf else None, one._backward_hooks))
    elif isinstance(one, np.ndarray):
        held = one.tobytes()
    elif isinstance(one, np.random.Generator):
        held = str(one.bit_generator.state)
    elif isinstance(one, dict):
        held = tuple(inside(key, value) for key, value in one.items())
    elif isinstance(one, list | tuple | set | frozenset):
        held = inside(*one)
    elif isinstance(one, FunctionType):
        held = inside(one.__defaults__, one.__kwdefaults__, *(one.__closure__ or ()))
    elif isinstance(one, CellType):
        held = inside(one.cell_contents)
    elif isinstance(one, MethodType):
        held = inside(one.__self__, one.__func__)
    elif isinstance(one, BuiltinMethodType):
        held = inside(one.__self__) if isinstance(one.__self__, list | Tensor) else ()
    elif isinstance(one, functools.partial):
        held = inside(one.func, one.args, one.keywords)
    elif isinstance(one, type(table)):
        held = tuple(one.cache_info())
    if hasattr(one, "__dict__"):
        held = (held, inside(type(one), vars(one)))
    elif isinstance(one, Slotted):
        held = inside(*(getattr(one, name, None) for name in one.__slots__))
    return (type(one), None if isinstance(one, tuple) else id(one), held)


def everything(call: Any) -> Any:
    """The call, the state of this module, and those of the random generators."""
    seen: dict[int, Any] = {}
    randomness = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    state = {name: value for name, value in globals().items() if name in GLOBALS}
    state |= {name: value for name, value in vars(explained_helpers).items() if name[0] != "_"}
    state |= {name: one for name, one in vars(nn.modules.module).items() if name.startswith("_global_")}
    return [snapshot(call, seen), [(name, snapshot(value, seen)) for name, value in state.items()], randomness]


# --- calls that leave traces -----------------------------------------------------------------------------------------

WRITTEN: list[Tensor] = []
COUNT = 0
STATIC = nn.Sequential(tritune.nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
GLOBALS = ("WRITTEN", "COUNT", "CREATED", "STATIC", "table")


@functools.cache
def table(size: int) -> Tensor:
    return torch.arange(size) * torch.ones(size)


class Pooling(nn.Module):
    """Something to explain; what follows derives from it and leaves traces as well."""

    def __init__(self) -> None:
        super().__init__()
        self.note()

    def note(self) -> None: ...

    def touch(self, x: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        self.touch(x)
        return tritune.max_pool2d(x, 2)


class Counter(Pooling):
    def note(self) -> None:
        self.count, self.calls = 0, {"of": {"forward": [0]}}

    def touch(self, x: Tensor) -> None:
        self.count += 1
        self.calls["of"]["forward"].append(x.shape)


class Cache(Pooling):
    def note(self) -> None:
        self.cache: list[Tensor] = [torch.zeros(1)]
        self.last = None

    def touch(self, x: Tensor) -> None:
        self.cache.append(x.mean())
        self.cache[0].add_(1)
        self.last = x


class Average(Pooling):
    def note(self) -> None:
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("ready", torch.tensor(False))

    def touch(self, x: Tensor) -> None:
        if not self.ready:
            self.ready.fill_(True)
        self.steps += 1
        self.mean.lerp_(x.mean((0, 2, 3)), 1 / int(self.steps))


class Lazy(Pooling):
    def touch(self, x: Tensor) -> None:
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(x.shape[-1], 3)
            self.register_buffer("size", torch.tensor(x.shape[-1]))
        self.layer(x)


class OnTheClass(Pooling):
    seen: list[Tensor] = []
    calls = 0

    def touch(self, x: Tensor) -> None:
        self.seen.append(x)
        type(self).calls += 1
        type(self).created = x


class Global(Pooling):
    def touch(self, x: Tensor) -> None:
        global COUNT, CREATED
        WRITTEN.append(x)
        COUNT += 1
        CREATED = x
        x + table(x.shape[-1])


class RandomNumbers(Pooling):
    def note(self) -> None:
        self.own = np.random.default_rng(1)

    def touch(self, x: Tensor) -> None:
        torch.manual_seed(random.randrange(9) + int(np.random.randint(9)) + int(self.own.integers(9)))  # noqa: NPY002


class Parameters(Pooling):
    def note(self) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        self.weight.grad = torch.ones(1)
        self.weight.tag = [1]

    def touch(self, x: Tensor) -> None:
        self.weight.tag.append(2)
        with torch.no_grad():
            self.weight.mul_(2)
            self.weight.grad.zero_()
        self.weight.requires_grad_(False)
        self.weight = nn.Parameter(x[0, 0, 0])
        self.eval()


class Numpy(Pooling):
    def note(self) -> None:
        self.histogram = np.zeros(3)

    def touch(self, x: Tensor) -> None:
        self.histogram += 1


class Hooked(Pooling):
    def note(self) -> None:
        outputs: list[Tensor] = []
        self.register_forward_hook(lambda module, args, result: outputs.append(result))
        self.register_forward_pre_hook(self.before)

    def before(self, module: Any, args: Any) -> None:
        self.register_forward_hook(print)


class Enumerated(Pooling):
    @functools.lru_cache(8)  # noqa: B019
    def positions(self, size: int) -> Tensor:
        return torch.ones(size) * self.training

    def touch(self, x: Tensor) -> None:
        self.positions(x.shape[-1]) + x


class OfAModule(Pooling):
    """What the functions and classes of another module remember, by each way to come to them."""

    def touch(self, x: Tensor) -> None:
        x * explained_helpers.causal(x.shape[-1])


class ClassOfAModule(Pooling):
    def touch(self, x: Tensor) -> None:
        x * explained_helpers.Registry.get(x.shape[-1])


class VariableOfAModule(Pooling):
    def touch(self, x: Tensor) -> None:
        explained_helpers.seen = x


class CallbackOfAModule(Pooling):
    def touch(self, x: Tensor) -> None:
        explained_helpers.CALLBACK(self, x)


class ImportedInside(Pooling):
    def touch(self, x: Tensor) -> None:
        import explained_helpers as helpers

        helpers.causal(x.shape[-1])


class HeldModule(Pooling):
    def note(self) -> None:
        self.helpers = explained_helpers

    def touch(self, x: Tensor) -> None:
        self.helpers.causal(x.shape[-1])


class NamedAsAWord(Pooling):
    def touch(self, x: Tensor) -> None:
        getattr(explained_helpers, "causal")(x.shape[-1])  # noqa: B009


class Adds(Pooling):
    """Names that were not there, on modules and classes of others."""

    def touch(self, x: Tensor) -> None:
        explained_helpers.added = x
        explained_helpers.Registry.added = x


class AddsInAClassMethod(Pooling):
    def touch(self, x: Tensor) -> None:
        explained_helpers.Registry.put(x)


class HooksAllModules(Pooling):
    def touch(self, x: Tensor) -> None:
        nn.modules.module.register_module_forward_hook(lambda module, args, result: None)
        nn.modules.module.register_module_full_backward_hook(lambda module, args, result: None)


class UnhooksAllModules(Pooling):
    def note(self) -> None:
        self.log: list[Any] = []
        self.handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: self.log.append(args))

    def touch(self, x: Tensor) -> None:
        self.handle.remove()


class Noting:
    """An object that deepcopy takes for its own copy, as what derives from it does in other ways."""

    def __init__(self) -> None:
        self.count, self.seen, self.last = 0, [], None

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def note(self, x: Tensor) -> None:
        self.count += 1
        self.seen.append(x)
        del self.last
        self.added = self.last = x


class Named(Noting):
    __deepcopy__ = None  # type: ignore[assignment]

    def __reduce__(self) -> str:
        return "named"


class Single(Noting):
    __deepcopy__ = None  # type: ignore[assignment]
    one: Any = None

    def __new__(cls) -> Any:
        cls.one = cls.one or super().__new__(cls)
        return cls.one


class Slotted:
    __slots__ = ("count", "later", "seen")

    def __init__(self) -> None:
        self.count, self.seen = 0, []

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def note(self, x: Tensor) -> None:
        self.count += 1
        self.seen.append(x)
        self.later = x


class Entries(dict):
    def __init__(self) -> None:
        super().__init__(first=[], last=0)

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def note(self, x: Tensor) -> None:
        self["first"].append(self.pop("first"))
        self["first"] = self["added"] = x


class Within(Noting):
    """Comes to another of its kind."""

    def __init__(self) -> None:
        self.inner = {"held": [Noting()]}

    def note(self, x: Tensor) -> None:
        self.inner["held"][0].note(x)
        self.inner["held"].append(x)


class StaysItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def note(self, x: Tensor) -> None:
        self.mean += x.mean((0, 2, 3))
        self.register_buffer("added", x)
        self.eval()


class MethodsOfC:
    """Which deepcopy does not copy, unlike those of Python."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.append, self.write = self.seen.append, sys.stdout.write
        self.zero = torch.ones(1).zero_

    def note(self, x: Tensor) -> None:
        self.append(x)
        self.zero()


class Member(enum.Enum):
    A = 1

    def note(self, x: Tensor) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        self.last = x


class Counting(type):
    count = 0

    def note(cls, x: Tensor) -> None:
        Counting.count += 1
        type(cls).last = x


class OfCounting(metaclass=Counting):
    pass


NOTING = {kind.__name__: kind for kind in (Noting, Named, Single, Slotted, Entries, Within, StaysItself, MethodsOfC)}
NOTING |= {"member of an Enum": lambda: Member.A, "metaclass": lambda: OfCounting}


def noting(make: Callable[[], Any]) -> Any:
    one = make()

    def call(x: Tensor) -> Tensor:
        one.note(x)
        return tritune.max_pool2d(x, 2)

    return call, (torch.randn(IMAGE),)


IMAGE = (3, 2, 4, 4)
POOLINGS = (
    Counter, Cache, Average, Lazy, OnTheClass, Global, RandomNumbers, Parameters, Numpy, Hooked, Enumerated, OfAModule,
    ClassOfAModule, VariableOfAModule, CallbackOfAModule, ImportedInside, HeldModule, NamedAsAWord, Adds,
    AddsInAClassMethod, HooksAllModules, UnhooksAllModules,
)  # fmt: skip


def normalised() -> Any:
    layers = nn.Sequential(tritune.nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(), tritune.nn.MaxPool2d(2))
    return layers, (torch.randn(IMAGE, requires_grad=True),)


def cumulative() -> Any:
    return nn.Sequential(tritune.nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=None)), (torch.randn(IMAGE),)


def normalised_weight(of: Callable[..., Any]) -> Callable[[], Any]:
    def make() -> Any:
        with warnings.catch_warnings():  # the older ones are deprecated, and in use
            warnings.simplefilter("ignore")
            return of(tritune.nn.Conv2d(2, 3, 1)), (torch.randn(IMAGE),)

    return make


def sequence(kind: Any, packed: bool) -> Callable[[], Any]:
    def make() -> Any:
        x = torch.randn(3, 2, 4)
        return kind(4, 5, bidirectional=True), (pack_padded_sequence(x, torch.tensor([3, 1])) if packed else x,)

    return make


def packs_inside() -> Any:
    layer = tritune.nn.LSTM(4, 5, batch_first=True)

    def call(x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(layer(packed)[0], batch_first=True)[0]

    return call, (torch.randn(3, 5, 4), torch.tensor([2, 5, 3]))


def closure() -> Any:
    net, seen = normalised()[0], []

    def call(x: Tensor, *, memory: list[Any] = []) -> Tensor:  # noqa: B006
        nonlocal net
        seen.append(x)
        memory.append(x)
        call.calls += 1
        result, net = net(x), None
        return result

    call.calls = 0
    return call, (torch.randn(IMAGE),)


def bound_method() -> Any:
    class Trainer:
        def __init__(self) -> None:
            self.net, self.losses, self.step = normalised()[0], [], 0

        def run(self, x: Tensor) -> None:
            self.step += 1
            self.losses.append(self.net(x).sum())

    return Trainer().run, (torch.randn(IMAGE),)


def partial() -> Any:
    cache: dict[str, Tensor] = {}

    def call(net: Any, cache: dict[str, Tensor], x: Tensor) -> None:
        cache["x"] = net(x)

    return functools.partial(call, normalised()[0], cache=cache), (), {"x": torch.randn(IMAGE)}


def arguments() -> Any:
    past = {"keys": [torch.randn(1, 1, 2, 8)]}

    def call(q: Tensor, past: dict[str, list[Tensor]]) -> Tensor:
        past["keys"].append(q)
        q.mul_(2)
        keys = torch.cat(past["keys"], 2)
        return tritune.scaled_dot_product_attention(q, keys, keys)

    return call, (torch.randn(1, 1, 1, 8), past)


def among_its_own_arguments() -> Any:
    def call(x: Tensor, again: Any) -> Tensor:
        return tritune.max_pool2d(x * explained_helpers.causal(x.shape[-1]), 2)

    return call, (torch.randn(IMAGE), [call])


def trains() -> Any:
    net, x = normalised()
    optimizer = torch.optim.AdamW(net.parameters())

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        net(x).sum().backward()
        optimizer.step()

    return step, x


CALLS: dict[str, Callable[[], Any]] = {
    **{kind.__name__: lambda kind=kind: (kind(), (torch.randn(IMAGE),)) for kind in POOLINGS},
    **{name: lambda make=make: noting(make) for name, make in NOTING.items()},
    "BatchNorm": normalised,
    "cumulative BatchNorm": cumulative,
    "evaluation": lambda: (normalised()[0].eval(), (torch.randn(IMAGE),)),
    "spectral_norm": normalised_weight(parametrizations.spectral_norm),
    "weight_norm": normalised_weight(parametrizations.weight_norm),
    "older spectral_norm": normalised_weight(nn.utils.spectral_norm),
    "older weight_norm": normalised_weight(nn.utils.weight_norm),
    **{
        f"{kind.__name__}, {'packed' if packed else 'padded'}": sequence(kind, packed)
        for kind in (tritune.nn.LSTM, tritune.nn.GRU, tritune.nn.RNN)
        for packed in (False, True)
    },
    "packs inside": packs_inside,
    "closure": closure,
    "bound method": bound_method,
    "partial": partial,
    "arguments": arguments,
    "training step": trains,
    "among its own arguments": among_its_own_arguments,
    "global model": lambda: (lambda x: STATIC(x).sum(), (torch.randn(IMAGE),)),
    "decorated": lambda: (tritune.use_backend("torch")(torch.no_grad()(normalised()[0])), (torch.randn(IMAGE),)),
}


LEAVE_NOTHING = (
    "evaluation",
    "weight_norm",
    "packs inside",
    *(name for name in CALLS if "padded" in name or "packed" in name),
)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_changed(name):
    call = CALLS[name]()
    fn, args, *kwargs = call
    kwargs = kwargs[0] if kwargs else {}
    before = everything(call)
    decisions = tritune.explain(fn, *args, **kwargs)
    assert everything(call) == before
    with record() as made:
        fn(*args, **kwargs)
    assert [one.op for one in decisions] == [one.op for one in made]
    assert made, "the call comes to no operator of ours, so it shows nothing"
    assert (everything(call) == before) == (name in LEAVE_NOTHING), "what the call itself leaves is not seen"


def inner_variable(name: str) -> Any:
    """What child processes get."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(name.encode())


def other_locale() -> str:
    return "C" if locale.setlocale(locale.LC_CTYPE) != "C" else "C.UTF-8"


LOGGER = logging.getLogger("explained")
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "grad mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "no_grad": (torch.is_grad_enabled, lambda: torch.no_grad().__enter__()),
    "dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "deterministic": (
        torch.are_deterministic_algorithms_enabled, lambda: torch.use_deterministic_algorithms(True),
    ),
    "anomaly": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
    "cudnn": (
        lambda: torch.backends.cudnn.benchmark, lambda: torch._C._set_cudnn_benchmark(True),
    ),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "autocast": (
        lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        lambda: torch.autocast("cpu", torch.float16).__enter__(),
    ),
    "autocast's depth": (_settings._autocast_nesting, lambda: torch.autocast("cuda", enabled=False).__enter__()),
    "hooks of saved tensors": (
        lambda: torch._C._autograd._top_saved_tensors_default_hooks(True),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda one: one, lambda one: one).__enter__(),
    ),
    "backend": (current_backend, lambda: tritune.use_backend("torch").__enter__()),
    "numpy's errors": (np.geterr, lambda: np.seterr(all="raise")),
    "environment": (lambda: dict(os.environ), lambda: (os.environ.pop("PATH"), os.environ.update(EXPLAINED="1"))),
    "its inner one": (lambda: inner_variable("EXPLAINED"), lambda: environ.update(EXPLAINED="1")),
    "filters of warnings": (lambda: warnings.filters[:], lambda: warnings.filterwarnings("ignore", "explained")),
    "level of a logger": (lambda: LOGGER.level, lambda: LOGGER.setLevel(logging.ERROR)),
    "level, by name": (lambda: LOGGER.level, lambda: logging.getLogger("explained").setLevel(logging.ERROR)),
    "handlers": (lambda: LOGGER.handlers[:], lambda: LOGGER.addHandler(logging.NullHandler())),
    "all loggers": (lambda: logging.root.manager.disable, lambda: logging.disable(logging.ERROR)),
    "a mode of functions": (torch._C._len_torch_function_stack, lambda: SilentFunctions().__enter__()),
    "a device's mode": (torch.get_default_device, lambda: torch.device("meta").__enter__()),
    "a mode of operators": (torch._C._len_torch_dispatch_stack, lambda: Silent().__enter__()),
    "a level of forward AD": (lambda: forward_ad._current_level, forward_ad.enter_dual_level),
    "denormals": (_settings._flushes_denormals, lambda: torch.set_flush_denormal(True)),
    "printing": (lambda: torch._tensor_str.PRINT_OPTS.precision, lambda: torch.set_printoptions(precision=3)),
    "the future": (
        torch.__future__.get_overwrite_module_params_on_conversion,
        lambda: torch.__future__.set_overwrite_module_params_on_conversion(True),
    ),
    "flash attention": (torch.backends.cuda.flash_sdp_enabled, lambda: torch.backends.cuda.enable_flash_sdp(False)),
    "precision": (
        lambda: torch._C._get_fp32_precision_getter("cuda", "conv"),
        lambda: torch._C._set_fp32_precision_setter("cuda", "conv", "ieee"),
    ),
    "shared memory": (
        torch.multiprocessing.get_sharing_strategy, lambda: torch.multiprocessing.set_sharing_strategy("file_system"),
    ),
    "Dynamo's config": (lambda: dynamo.recompile_limit, lambda: setattr(dynamo, "recompile_limit", 3)),
    "a function of torch": (lambda: torch.relu, lambda: setattr(torch, "relu", torch.sigmoid)),
    "a new name in torch": (lambda: hasattr(torch, "explained"), lambda: setattr(torch, "explained", 1)),
    "a function of torch.nn": (lambda: F.conv2d, lambda: setattr(F, "conv2d", tritune.conv2d)),
    "a function less": (lambda: hasattr(F, "conv2d"), lambda: delattr(F, "conv2d")),
    "folder": (os.getcwd, lambda: os.chdir(os.sep)),
    "places of modules": (lambda: sys.path[:], lambda: sys.path.append(os.sep)),
    "recursion": (sys.getrecursionlimit, lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 1)),
    "digits": (sys.get_int_max_str_digits, lambda: sys.set_int_max_str_digits(1000)),
    "switches of threads": (sys.getswitchinterval, lambda: sys.setswitchinterval(0.1)),
    "profile": (sys.getprofile, lambda: sys.setprofile(lambda *_: None)),
    "standard output": (lambda: id(sys.stdout), lambda: setattr(sys, "stdout", io.StringIO())),
    "uncaught exceptions": (lambda: sys.excepthook, lambda: setattr(sys, "excepthook", print)),
    "those of threads": (lambda: threading.excepthook, lambda: setattr(threading, "excepthook", print)),
    "garbage": (gc.isenabled, gc.disable),
    "its thresholds": (gc.get_threshold, lambda: gc.set_threshold(1)),
    "signals": (lambda: signal.getsignal(signal.SIGTERM), lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)),
    "decimals": (lambda: decimal.getcontext().prec, lambda: setattr(decimal.getcontext(), "prec", 5)),
    "another context of decimals": (decimal.getcontext, lambda: decimal.setcontext(decimal.Context(5))),
    "numpy's printing": (np.get_printoptions, lambda: np.set_printoptions(precision=2)),
    "locale": (lambda: locale.setlocale(locale.LC_ALL), lambda: locale.setlocale(locale.LC_CTYPE, other_locale())),
    "errors of logging": (lambda: logging.raiseExceptions, lambda: setattr(logging, "raiseExceptions", False)),
    "precision everywhere": (
        lambda: torch._C._get_fp32_precision_getter("generic", "all"),
        lambda: torch._C._set_fp32_precision_setter("generic", "all", "tf32"),
    ),
}  # fmt: skip


class SilentFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Silent(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _changed_on_torchs_side(name: str) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """How to read a setting of torch's C++ side, and to change it; of those that are true or false, and that this
    processor can change."""
    read, restore = _settings.settings_of_torch()[name]
    before = read()
    if not isinstance(before, bool):
        return None
    try:
        restore(not before)
    except RuntimeError:
        return None
    restore(before)
    return read, lambda: restore(not read())


ON_TORCHS_SIDE = {name: _changed_on_torchs_side(name) for name in _settings.settings_of_torch()}
SETTINGS |= {name: found for name, found in ON_TORCHS_SIDE.items() if found is not None}
if limits := _settings._cudnn_benchmark_limit():  # not in a CPU build
    SETTINGS["cuDNN's search"] = (limits[0][0], lambda: limits[0][1](3))


def test_the_settings_of_torch_are_found():
    assert len(ON_TORCHS_SIDE) > 25
    assert {"cudnn_allow_tf32", "multithreading_enabled", "view_replay_enabled", "warnAlways"} <= SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_the_process_and_the_thread(name, fails):
    read, change = SETTINGS[name]
    before = read()

    def call(x: Tensor) -> Tensor:
        change()
        assert read() != before, "the call changes nothing"
        if fails:
            raise LookupError
        return tritune.max_pool2d(x, 2)

    with pytest.raises(LookupError) if fails else contextlib.nullcontext():
        tritune.explain(call, torch.randn(IMAGE))
    assert read() == before


def test_settings_that_a_call_does_not_change_stay():
    """And the call sees them."""

    def call(x: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled() and current_backend() == "torch"
        return tritune.max_pool2d(x, 2)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), tritune.use_backend("torch"):
        assert tritune.explain(call, torch.randn(IMAGE))


@pytest.mark.parametrize("register", [
    nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook,
    nn.modules.module.register_module_full_backward_hook, nn.modules.module.register_module_full_backward_pre_hook,
    nn.modules.module.register_module_parameter_registration_hook,
    nn.modules.module.register_module_buffer_registration_hook,
])  # fmt: skip
@pytest.mark.parametrize("kind", ["closure", "method"])
def test_hooks_of_all_modules(register, kind):
    log = explained_helpers.Log()
    handle = register(log.hook if kind == "method" else lambda *values: log.results.append(values) or None)
    try:
        net, x = Lazy(), torch.randn(IMAGE, requires_grad=True)
        call = lambda: net(x).sum().backward()  # noqa: E731
        before = everything((call, log))
        tritune.explain(call)
        assert everything((call, log)) == before
        call()
        assert log.results, "the hook was not called"
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"])
def test_hooks_of_all_optimizers(name):
    log = explained_helpers.Log()
    handle = getattr(sys.modules["torch.optim.optimizer"], name)(log.hook)
    try:
        step, args = trains()
        before = everything((step, log))
        tritune.explain(step, *args)
        assert everything((step, log)) == before
        step(*args)
        assert log.results, "the hook was not called"
    finally:
        handle.remove()


def test_hooks_of_saved_tensors():
    log = explained_helpers.Log()
    net, args = normalised()

    def pack(tensor: Tensor) -> Tensor:
        log.hook(None, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        before = everything((net, log))
        tritune.explain(net, *args)
        assert everything((net, log)) == before
        net(*args)
        assert log.results, "the hook was not called"


def test_what_is_imported_is_forgotten(tmp_path, monkeypatch):
    """Its tensors would have no data."""
    (tmp_path / "explained_pack").mkdir()
    (tmp_path / "explained_pack/__init__.py").write_text("")
    (tmp_path / "explained_pack/late.py").write_text("import torch\nTABLE = torch.ones(64, 64).tril()\n")
    (tmp_path / "explained_pack/model.py").write_text(
        "import tritune\nfrom . import known\ndef call(x):\n    from . import late\n    from .known import masks\n"
        "    masks(64)\n    return tritune.max_pool2d(x, 2), late.TABLE\n"
    )
    (tmp_path / "explained_pack/known.py").write_text(
        "import torch\nMASKS = {}\ndef masks(n):\n    return MASKS.setdefault(n, torch.ones(n, n))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("explained_pack.model")
    try:
        tritune.explain(model.call, torch.randn(IMAGE))
        assert model.known.MASKS == {}
        assert type(model.call(torch.randn(IMAGE))[1]) is Tensor
    finally:
        for name in [name for name in sys.modules if name.startswith("explained_pack")]:
            del sys.modules[name]


# --- calls that cannot be explained ----------------------------------------------------------------------------------


class Generating(Pooling):
    def note(self) -> None:
        self.batches = (number for number in range(3))


class Locked(Pooling):
    def note(self) -> None:
        self.lock = threading.Lock()


DEPEND_ON_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.max()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "assert": lambda x: None if x.isfinite().all() else x,
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x) + 1,
    "format": lambda x: f"{x.sum():.2f}",
    "allclose": lambda x: torch.allclose(x, x),
    "counted": lambda x: int(torch.arange(4).index_add_(0, torch.arange(4), x[0, 0, 0].long())[0]),
    "lengths": lambda x: pack_padded_sequence(x[0], x[0, 0, 0, :2].long().abs() + 1),
    "repeats": lambda x: torch.repeat_interleave(x[0, 0, 0].long()),
}


@pytest.mark.parametrize("name", DEPEND_ON_VALUES)
def test_what_depends_on_values_is_refused(name):
    class Model(Counter):
        def touch(self, x: Tensor) -> None:
            super().touch(x)
            DEPEND_ON_VALUES[name](x)

    call = Model(), (torch.randn(IMAGE),)
    before = everything(call)
    with pytest.raises(tritune.UnsupportedError) as refused:
        tritune.explain(call[0], *call[1])
    assert everything(call) == before
    assert re.fullmatch(
        rf'explain: {re.escape(__file__)}:\d+ \("{name}": .*\) needs the values of a tensor.*', str(refused.value)
    )


@pytest.mark.parametrize("model, what", [(Generating, "generator"), (Locked, "lock")])
def test_what_cannot_be_copied_is_refused(model, what):
    call = model(), (torch.randn(IMAGE),)
    before = everything(call)
    with pytest.raises(tritune.UnsupportedError, match=f"^explain: something .* cannot be copied .*{what}.*record"):
        tritune.explain(call[0], *call[1])
    assert everything(call) == before


class Listed(list):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


def test_a_list_that_stays_itself_is_refused():
    call, args = Listed([1]).append, (torch.randn(IMAGE),)
    before = everything((call, args))
    with pytest.raises(tritune.UnsupportedError, match=r"^explain: something .* cannot be copied \(.*Listed.*record"):
        tritune.explain(call, *args)
    assert everything((call, args)) == before


@pytest.mark.parametrize("make", [
    lambda leaf: leaf * 2, lambda leaf: (leaf * 2)[:1], lambda leaf: tritune.avg_pool2d(leaf, 2, 1),
])  # fmt: skip
def test_backward_through_what_was_computed_before_is_refused(make):
    """Its graph may hold our operators, and hooks: to leave them out would be another call."""
    leaf = torch.randn(IMAGE, requires_grad=True)
    computed = make(leaf)
    for call in (
        (lambda x: tritune.max_pool2d(x, 2).sum().backward(), computed),
        (lambda: tritune.max_pool2d(computed, 2).sum().backward(),),
    ):
        before = everything((call, leaf))
        with pytest.raises(tritune.UnsupportedError) as refused:
            tritune.explain(*call)
        assert everything((call, leaf)) == before
        assert re.fullmatch(rf"explain: {re.escape(__file__)}:\d+ \(.*\) runs backward through .*", str(refused.value))
    assert tritune.explain(lambda x: torch.autograd.grad(tritune.max_pool2d(x, 2).sum(), x), computed)


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
def test_modes_of_the_user_are_refused_and_torchs_are_not(mode):
    net, args = normalised()
    with torch.device("cpu"):
        assert tritune.explain(net, *args)
    with mode(), pytest.raises(tritune.UnsupportedError, match=f"^explain: inside the mode {mode.__name__}, .*record"):
        tritune.explain(net, *args)


def test_errors_are_the_calls_own_and_leave_nothing():
    class Fails(Counter):
        def touch(self, x: Tensor) -> None:
            super().touch(x)
            WRITTEN.append(x)
            raise LookupError("the call's own")

    call = Fails(), (torch.randn(IMAGE),)
    before = everything(call)
    with pytest.raises(LookupError, match=r"^the call's own$"):
        tritune.explain(call[0], *call[1])
    assert everything(call) == before


@pytest.mark.parametrize("name", test_extremes.CALLS)
def test_every_public_function(name):
    one = test_extremes.CALLS[name]
    call = one.function, {key: torch.randn(shape, requires_grad=True) for key, shape in one.shapes.items()}, one.kwargs
    before = everything(call)
    decisions = tritune.explain(call[0], **call[1], **call[2])
    assert everything(call) == before
    assert decisions
