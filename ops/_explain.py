"""What a call would run: the call is made on copies without data, so that looking at it changes nothing."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import random
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, MutableSequence, MutableSet
from contextlib import contextmanager, suppress
from pathlib import Path
from types import BuiltinMethodType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ._dispatch import Decision, Decisions, UnsupportedError, record
from ._settings import settings_restored


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Decision | Decisions:
    """Says what ``fn(*args, **kwargs)`` would run, without running it, and leaves everything as it was.

    ``fn`` may be an operator of this package (the result is its :class:`Decision`) or any function, module or model
    that calls some (a list, in call order, printed one a line).

    The call is made on copies. Tensors have a shape and no data, so nothing is computed or allocated; only lengths and
    counters (integers on the CPU, in at most one dimension) keep their values. Whatever ``fn`` reaches is copied with
    them: attributes and buffers, what a closure holds, what your functions name of their globals, of classes and of
    your modules, and the hooks of all modules and optimizers. The states of the random generators are restored, as are
    settings of the process and the thread (modes of torch, the environment, loggers, filters of warnings, folder,
    signals, names replaced in ``torch`` and ``torch.nn.functional``), and modules of yours that the call imports are
    forgotten. What the call does to the world outside, such as a file that it writes
    or what an installed library remembers, cannot be undone. No other thread should run ``fn`` meanwhile.

    Raises:
        UnsupportedError: the call depends on values, as ``.item()``, a boolean mask and ``.numpy()`` do, runs backward
            through what was computed before it, reaches an object that cannot be copied, or is made inside a
            ``TorchFunctionMode`` or ``TorchDispatchMode`` of yours; the message names the line or the type.
        (others): what the call itself raises.

    Example::

        >>> print(tritune.explain(tritune.max_pool2d, torch.randn(1, 8, 4, 4), 2))
        max_pool2d: torch: no kernel covers the call
          not triton: input is on the CPU, where torch serves (TRITON_INTERPRET=1 interprets the kernels there)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        settings_restored(), _random_states_restored(), _imports_undone(),
        _copied((fn, args, kwargs), mode) as (copies, known), record() as decisions,
    ):  # fmt: skip
        call, args, kwargs = copies
        try:
            with mode, _KnownValues(known):
                call(*args, **kwargs)
        except Exception as error:
            reason = _lacking(error)
            if reason is None:
                raise
            raise UnsupportedError(
                f"explain: {_line_of(error)} {reason}, or make the call inside `with tritune.ops.record() as "
                "decisions:`"
            ) from error
    if len(decisions) == 1 and getattr(fn, "__module__", "").startswith(f"{__package__}."):
        return decisions[0]
    return decisions


# --- values that the call may read -----------------------------------------------------------------------------------

MAX_KNOWN = 1024  # elements: lengths, batch sizes and counters have fewer


def _may_be_known(tensor: Tensor) -> bool:
    """Is this likely a length or a counter, which the call may branch on?"""
    is_integer = not tensor.is_floating_point() and not tensor.is_complex()
    return is_integer and tensor.dim() <= 1 and tensor.numel() <= MAX_KNOWN and tensor.device.type == "cpu"


class _KnownValues(TorchDispatchMode):
    """Computes with lengths and counters as long as they depend on nothing else; FakeTensorMode would forget them."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()
        self._know(known)

    def _know(self, results: Any) -> Any:
        self.known.update({one: True for one in tree_leaves(results) if isinstance(one, Tensor)})
        return results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if func is torch.ops.aten.lift_fresh.default and _may_be_known(tensors[0]):  # torch.tensor and its like
            return self._know(tensors[0])
        if func is torch.ops.aten._pack_padded_sequence.default and tensors[1] in self.known:
            return self._pack(*args)
        on_cpu = kwargs.get("device") in (None, torch.device("cpu"))
        if tensors and on_cpu and all(tensor in self.known for tensor in tensors):
            with unset_fake_temporarily():
                return self._know(func(*args, **kwargs))
        result = func(*args, **kwargs)
        if not tensors and isinstance(result, Tensor) and _may_be_known(result):
            with unset_fake_temporarily():
                return self._know(func(*args, **kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                self.known.pop(value, None)
        return result

    def _pack(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """The shapes of packed rows, which follow from the lengths alone."""
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            rows, batch_sizes = torch._VF._pack_padded_sequence(torch.empty(*input.shape[:2], 1), lengths, batch_first)
        return input.new_empty(rows.shape[0], *input.shape[2:]), self._know(batch_sizes)


def _lacking(error: Exception) -> str | None:
    """What the call needs and a copy without data lacks, and what to do about it, if that is why it failed."""
    from torch._subclasses import fake_tensor

    kinds = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    # torch has no type for the others: numpy(), a format such as f"{loss:.2f}", and backward.
    if isinstance(error, kinds) or "tensor subclasses" in str(error) or "FakeTensor.__format__" in str(error):
        return "needs the values of a tensor, and explain computes none: explain what comes before and after it"
    if "Tried to backward() through example input" in str(error):
        return "runs backward through a tensor that was computed before the call: compute it inside the call"
    return None


def _line_of(error: Exception) -> str:
    """Where the user's code was: file, line and text."""
    frames = list(traceback.walk_tb(error.__traceback__))
    users = [one for one in frames if not _is_installed(one[0].f_globals.get("__name__"))] or frames
    summary = traceback.StackSummary.extract(iter(users[-1:]))[0]
    return f"{summary.filename}:{summary.lineno} ({summary.line})"


# --- copies of everything that the call reaches ----------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a function, class, module or object that stays itself keeps what a copy would have had: an entry of a
    dictionary, else an attribute."""

    holder: Any
    name: Any

    def read(self) -> Any:
        if isinstance(self.holder, dict | type | ModuleType):
            return _namespace(self.holder).get(self.name, _ABSENT)
        try:
            return object.__getattribute__(self.holder, self.name)
        except (AttributeError, ValueError):  # of a slot, or a variable of a closure, that has no value yet
            return _ABSENT

    def write(self, value: Any) -> None:
        if isinstance(self.holder, dict):
            if value is _ABSENT:
                self.holder.pop(self.name, None)
            else:
                self.holder[self.name] = value
        else:
            setter = type if isinstance(self.holder, type) else object  # a class of the user may refuse, as Enum does
            if value is not _ABSENT:
                setter.__setattr__(self.holder, self.name, value)
            elif self.read() is not _ABSENT:
                setter.__delattr__(self.holder, self.name)


_ABSENT = object()
_LruCache = type(functools.lru_cache(int))
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(torch.__file__).parents[1]),  # an environment may take torch from another one
)


class _Memo(dict[int, Any]):
    """That of deepcopy, which asks it for every object that it comes to."""

    def __init__(self, copies: dict[int, Any]) -> None:
        super().__init__(copies)
        self.asked: set[int] = set()

    def get(self, key: int, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def left_itself(self, one: Any) -> bool:
        """Has deepcopy taken the object for its own copy, as the object may ask it to?"""
        return id(one) in self.asked and super().get(id(one), one) is one


@contextmanager
def _copied(root: Any, mode: Any) -> Iterator[tuple[Any, list[Tensor]]]:
    """A copy of ``root`` with tensors that have no data, and those that kept their values.

    Within the block the functions, classes and objects that have no copy work on copies of what they hold.
    """
    tensors, caches, places, holders, objects = _reach((root, _active_hooks()))  # torch calls those hooks themselves
    before = [(place, place.read()) for place in places]
    attributes = {id(one): [(place, place.read()) for place in _attributes(one)] for one in objects}
    dictionaries = [space for one in objects for space in _dictionaries(one)]
    methods = [one for one in objects if isinstance(one, BuiltinMethodType)]  # deepcopy copies only those of Python
    with _restored([*before, *itertools.chain(*attributes.values())], [*holders, *dictionaries]):
        moved: list[tuple[_Place, Any]] = []
        try:
            memo = _Memo({id(one): one for one in (os.environ, *sys.modules.values())})
            memo |= {id(cache): _empty(cache) for cache in caches}
            known = {id(tensor): tensor.clone() for tensor in tensors if _may_be_known(tensor)}
            with warnings.catch_warnings():  # torch reads the gradient of tensors that have none, and says so
                warnings.simplefilter("ignore")
                memo |= {id(tensor): mode.from_tensor(tensor) for tensor in tensors} | known
            for tensor in tensors:
                vars(memo[id(tensor)]).update(copy.deepcopy(vars(tensor), memo))
            for method in methods:
                with suppress(Exception):  # such as that of a file, which is the world outside
                    memo[id(method)] = getattr(copy.deepcopy(method.__self__, memo), method.__name__)
            result = copy.deepcopy(root, memo)
            todo = before
            while todo:
                state = [(place, value) for place, value in todo if _is_state(place, value)]
                copies = copy.deepcopy([value for _, value in state], memo)
                moved += [(place, one) for (place, value), one in zip(state, copies, strict=True) if one is not value]
                todo = []
                for one in filter(memo.left_itself, objects):
                    if isinstance(one, MutableSequence | MutableSet | np.ndarray):  # which hold more than attributes
                        raise TypeError(f"the copy of a {type(one).__name__} is the {type(one).__name__} itself")
                    todo += attributes.pop(id(one), [])
        except Exception as error:
            raise UnsupportedError(
                f"explain: something that the call reaches cannot be copied ({error}): explain a part without it, or "
                "make the call inside `with tritune.ops.record() as decisions:`"
            ) from error
        for place, value in moved:
            place.write(value)
        yield result, list(known.values())


@contextmanager
def _restored(before: list[tuple[_Place, Any]], holders: list[Any]) -> Iterator[None]:
    """Puts back what the places held, takes away names that their holders did not have, and orders dictionaries."""
    names_before = [(holder, list(_namespace(holder))) for holder in holders]
    try:
        yield
    finally:
        for place, value in before:
            if place.read() is not value:
                place.write(value)
        for holder, names in names_before:
            for name in _namespace(holder).keys() - set(names):
                if isinstance(holder, dict) or not _is_pythons(name):
                    _Place(holder, name).write(_ABSENT)
            if isinstance(holder, dict) and list(holder) != names:
                for name in names:
                    holder[name] = holder.pop(name)


def _reach(root: Any) -> tuple[list[Tensor], list[Any], list[_Place], list[Any], list[Any]]:
    """The tensors, the results that ``functools.cache`` keeps, and the places that a call of ``root`` can come to; also
    the modules, classes and dictionaries of hooks to which it may add names, and the other objects of the user."""
    tensors: list[Tensor] = []
    caches: list[Any] = []
    places = {(id(place.holder), place.name): place for place in _global_hooks()}
    seen: dict[int, Any] = {}  # with the objects, which must outlive their ids
    modules: dict[str, ModuleType] = {}
    classes: list[type] = []
    objects: list[Any] = []
    names: set[str] = set()
    todo = [root, *(place.read() for place in places.values())]
    while todo:
        while todo:
            one = todo.pop()
            if id(one) in seen or isinstance(one, CodeType):
                continue
            seen[id(one)] = one
            if isinstance(one, ModuleType):
                if not _is_installed(one.__name__):
                    modules[one.__name__] = one
            elif isinstance(one, Tensor):
                tensors.append(one)
                todo.append(vars(one))
            elif isinstance(one, type | FunctionType | _LruCache):
                is_users = not _is_installed(one.__module__)
                found = list(_places_of(one, is_users))
                places |= {(id(place.holder), place.name): place for place in found}
                todo += [place.read() for place in found]
                if is_users:
                    todo += [*vars(one).values(), *getattr(one, "__bases__", ()), type(one)]
                if is_users and isinstance(one, _LruCache):
                    caches.append(one)
                if is_users and isinstance(one, type):
                    classes.append(one)
                if is_users and isinstance(one, FunctionType):
                    names |= _names(one.__code__) | _siblings(one)
                    todo.append(sys.modules.get(one.__module__))  # to which it may add a global
            else:
                todo += gc.get_referents(one)
                if not _is_installed(type(one).__module__) or _is_bound(one):
                    objects.append(one)
        # What is named may be a module, or an attribute of one.
        imported = (sys.modules[name] for name in names & sys.modules.keys() if not _is_installed(name))
        modules |= {module.__name__: module for module in imported}
        found = [_Place(vars(module), name) for module in modules.values() for name in names & vars(module).keys()]
        found = [place for place in found if (id(place.holder), place.name) not in places]
        places |= {(id(place.holder), place.name): place for place in found}
        todo = [place.read() for place in found]
    return tensors, caches, list(places.values()), [*modules.values(), *classes, *_hook_variables()[1]], objects


def _hook_variables() -> tuple[list[_Place], list[Any]]:
    """What torch keeps of the hooks that it calls for every module and every optimizer: flags and dictionaries."""
    modules = (sys.modules[kind.__module__] for kind in (torch.nn.Module, torch.optim.Optimizer))
    places = [_Place(vars(module), name) for module in modules for name in vars(module) if name.startswith("_global_")]
    return (
        [place for place in places if not isinstance(place.read(), dict)],
        [place.read() for place in places if isinstance(place.read(), dict)],
    )


def _global_hooks() -> list[_Place]:
    flags, dictionaries = _hook_variables()
    return flags + [_Place(hooks, key) for hooks in dictionaries for key in hooks]


def _active_hooks() -> Any:
    """The functions of the innermost ``saved_tensors_hooks``, which the call comes to.

    Raises:
        UnsupportedError: inside a mode of the user's, an object that sees every function or operator and stays itself.
    """
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if not _is_installed(type(mode).__module__):
            raise UnsupportedError(
                f"explain: inside the mode {type(mode).__name__}, which would be shown tensors without data: explain "
                "outside of it, or make the call inside `with tritune.ops.record() as decisions:`"
            )
    return _top_saved_tensors_default_hooks(True)


def _places_of(one: Any, is_users: bool) -> Iterator[_Place]:
    if isinstance(one, FunctionType):
        yield from (_Place(cell, "cell_contents") for cell in one.__closure__ or ())
    if not is_users:
        return
    if isinstance(one, FunctionType):
        yield from (_Place(one, name) for name in ("__defaults__", "__kwdefaults__", "__dict__"))
        if not _is_installed(one.__globals__.get("__name__")):
            yield from (_Place(one.__globals__, name) for name in _names(one.__code__))
    elif isinstance(one, type):
        yield from (_Place(one, name) for name in vars(one) if not _is_pythons(name))


def _is_bound(one: Any) -> bool:
    """Is this a method of C code, such as ``results.append``, and not one of a class?"""
    return isinstance(one, BuiltinMethodType) and not isinstance(one.__self__, ModuleType | type | None)


def _attributes(one: Any) -> Iterator[_Place]:
    """Where an object keeps its attributes, those in slots as well, and as a dictionary its entries."""
    yield from (_Place(space, name) for space in _dictionaries(one) for name in space)
    for kind in type(one).__mro__:
        if not _is_installed(kind.__module__):
            slots = (name for name, value in vars(kind).items() if isinstance(value, MemberDescriptorType))
            yield from (_Place(one, name) for name in slots)


def _dictionaries(one: Any) -> list[dict[Any, Any]]:
    return [space for space in (getattr(one, "__dict__", None), one) if isinstance(space, dict)]


def _namespace(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else vars(holder)


def _is_pythons(name: Any) -> bool:
    """Is this an attribute of a module or class in which Python keeps what is its own?"""
    return isinstance(name, str) and name.startswith(("__", "_abc_"))


def _names(code: CodeType) -> set[str]:
    """The globals, attributes and modules that a function names, also as words for getattr, and those inside it."""
    words = (one for one in code.co_consts if isinstance(one, str))
    inner = (_names(one) for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(words, *inner)


def _siblings(function: FunctionType) -> set[str]:
    """The modules that ``from . import name`` would mean in a function, with one dot or more."""
    found: set[str] = set()
    package = function.__globals__.get("__package__") or ""
    while package:
        found |= {f"{package}.{name}" for name in _names(function.__code__)}
        package = package.rpartition(".")[0]
    return found


def _is_state(place: _Place, value: Any) -> bool:
    """Is this something that a call may change? Not so methods and properties, which are no state, nor modules."""
    if isinstance(value, _LruCache):
        return not _is_installed(value.__module__)
    is_callback = isinstance(value, MethodType)  # bound to an object, which is state
    is_method = isinstance(place.holder, type | dict) and hasattr(type(value), "__get__") and not is_callback
    return value is not _ABSENT and not is_method and not isinstance(value, ModuleType)


def _empty(cache: Any) -> Any:
    return functools.lru_cache(**cache.cache_parameters())(cache.__wrapped__)


@functools.cache
def _is_installed(module: str | None) -> bool:
    """Is this a library's code, whose state is not the user's?"""
    root = _root(module)
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root == _root(__name__) or root in sys.stdlib_module_names or file.startswith(_INSTALLED)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


@contextmanager
def _imports_undone() -> Iterator[None]:
    """Forgets modules of the user that are imported here: tensors in their variables have no data."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules.keys() - before if not _is_installed(name)]:
            module = sys.modules.pop(name)
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
                delattr(sys.modules[parent], child)


@contextmanager
def _random_states_restored() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
