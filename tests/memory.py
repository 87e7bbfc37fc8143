"""A memory checker for the interpreted tier: each address that a kernel touches, and each program that touches it.

:func:`checked` takes the place of the interpreter's loop over the programs of a launch. Kernels then see made-up
addresses, which tell the arguments apart, and each load and store is held against the argument's view and storage:

- an access outside the storage, in a gap between the strides of the view, or off the elements' boundaries;
- an element that is written twice, whether by two programs, by one, or by one store;
- an element that a program reads and another one writes, or that a program reads back after it wrote it;
- an atomic operation, whose order nobody fixes.

Each is a :class:`MemoryFault`, raised where it happens. With ``orders`` a launch also runs backwards and shuffled, and
its results must be the same bits.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.jit import _normalize_ty
from triton.tools.tensor_descriptor import TensorDescriptor

import tritune
from tritune.perf.traffic import observed

# An argument's addresses begin at a multiple of 2**44 bytes: 32-bit arithmetic that wraps never reaches a neighbour.
SHIFT = 44
MOST_CELLS = 2**22  # elements of a storage that are followed one by one; of larger ones those in the views
NOBODY, SEVERAL = -1, -2
KERNELS = Path(tritune.__path__[-1]) / "kernels"


class MemoryFault(AssertionError):
    """A kernel touched what it must not, or two of its programs depend on each other."""


class Storage:
    """Memory of one or several arguments of a launch: which program wrote and which read each element.

    A storage of more than MOST_CELLS elements has cells for the elements of its views only, found by bisection.
    """

    def __init__(self, views: list[torch.Tensor]) -> None:
        self.views = views
        self.itemsize = views[0].element_size()
        assert all(view.element_size() == self.itemsize for view in views), "one storage, elements of two sizes"
        count = views[0].untyped_storage().nbytes() // self.itemsize
        self.places = None
        if count > MOST_CELLS:
            self.places = np.unique(np.concatenate([_elements(view) for view in views]))
            count = len(self.places)
        self.writer = np.full(count, NOBODY, np.int32)
        self.reader = np.full(count, NOBODY, np.int32)
        self.lane = np.zeros(count, np.int32)

    def cells(self, elements: np.ndarray) -> np.ndarray:
        """The cells of elements that lie in one of the views."""
        return elements if self.places is None else np.searchsorted(self.places, elements)

    def forget(self) -> None:
        self.writer.fill(NOBODY)
        self.reader.fill(NOBODY)

    def values(self) -> np.ndarray:
        """All that the views hold, as bytes."""
        parts = [view.contiguous().view(-1).view(torch.uint8).numpy() for view in self.views if view.numel()]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def restore(self, values: np.ndarray) -> None:
        start = 0
        for view in self.views:
            size = view.numel() * self.itemsize
            part = torch.from_numpy(values[start : start + size].copy())
            # Of a view that repeats elements each holds the same.
            _distinct(view).copy_(_distinct(part.view(view.dtype).view(view.shape), view))
            start += size


class Argument:
    """A tensor as a kernel sees it."""

    def __init__(self, name: str, number: int, view: torch.Tensor, storage: Storage) -> None:
        self.name, self.view, self.storage = name, view, storage
        self.offset = view.storage_offset()
        self.size = view.untyped_storage().nbytes() // storage.itemsize
        # As far from a multiple of 4096 as the tensor itself: what is aligned stays so.
        self.address = ((number + 1) << SHIFT) + view.data_ptr() % 4096
        self.to_real = np.uint64((view.data_ptr() - self.address) % 2**64)
        self.inside = None
        if not view.is_contiguous() or view.numel() != self.size:
            self.inside = np.zeros(len(storage.writer), bool)
            self.inside[storage.cells(_elements(view))] = True


def _distinct(t: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    steps = (t if like is None else like).stride()
    return t[tuple(slice(0, 1) if step == 0 else slice(None) for step in steps)]


def _elements(view: torch.Tensor) -> np.ndarray:
    """Where the elements of a view lie in its storage."""
    places = np.array([view.storage_offset()])
    for size, step in zip(view.shape, view.stride(), strict=True):
        places = (places[:, None] + np.arange(size if step else min(size, 1)) * step).reshape(-1)
    return places


class Checker:
    """What is known of the launch that runs.

    Attributes:
        programs: how many programs of each kernel were checked, by its name.
        orders: run each launch in three orders.
        idle: ``None``, or where masks in the kernels' source kept a lane from a fault; :meth:`would_fault` adds them.
    """

    def __init__(self) -> None:
        self.programs: collections.Counter[str] = collections.Counter()
        self.orders = False
        self.idle: set[tuple[str, int]] | None = None
        self.arguments: list[Argument] = []
        self.kernel, self.program = "", 0
        self.patched: set[int] = set()  # modules in which this launch has patched the language already

    # --- one load or store

    def access(self, pointers: Any, mask: Any, writes: bool) -> Any:
        """Real pointers for made-up ones, once they are found to be allowed."""
        addresses = pointers.data.reshape(-1)
        on = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape).reshape(-1)
        if self.idle is not None and not on.all():
            self.would_fault(pointers, addresses[~on], writes)
        argument = self.allow(pointers, addresses[on], writes)
        if argument is None:
            return pointers
        return interpreter.TensorHandle(pointers.data + argument.to_real, pointers.dtype)

    def allow(self, pointers: Any, addresses: np.ndarray, writes: bool) -> Argument | None:
        if addresses.size == 0:
            return None
        verb = "writes" if writes else "reads"
        first, last = (int(number) for number in (addresses[[0, -1]] + np.uint64(1 << (SHIFT - 1))) >> np.uint64(SHIFT))
        if first != last or not 0 < first <= len(self.arguments):
            raise self.fault(f"{verb} far from every argument")
        one = self.arguments[first - 1]
        storage = one.storage
        bytes_off = addresses.astype(np.int64) - one.address
        elements = bytes_off // storage.itemsize + one.offset
        if pointers.get_element_ty().primitive_bitwidth != 8 * storage.itemsize or (bytes_off % storage.itemsize).any():
            raise self.fault(f"{verb} {one.name} in other pieces than its elements")
        low, high = int(elements.min()), int(elements.max())
        if low < 0 or high >= one.size:
            raise self.fault(f"{verb} {one.name} outside its storage: elements {low} to {high} of {one.size}")
        cells = storage.cells(elements)
        if storage.places is not None and not np.array_equal(
            storage.places[np.minimum(cells, len(storage.places) - 1)], elements
        ):
            raise self.fault(f"{verb} {one.name} outside the view that was passed")
        if one.inside is not None and not one.inside[cells].all():
            raise self.fault(f"{verb} {one.name} outside the view that was passed")
        self.note(one, cells, writes)
        return one

    def note(self, one: Argument, cells: np.ndarray, writes: bool) -> None:
        """Who touched these cells; a fault if that makes the result depend on the order of programs."""
        storage, program = one.storage, self.program
        writers, readers = storage.writer[cells], storage.reader[cells]
        if (writers != NOBODY).any():
            other = int(writers[writers != NOBODY][0])
            verb = "writes" if writes else "reads"
            raise self.fault(f"program {program} {verb} an element of {one.name} that program {other} wrote")
        if not writes:
            alone = (readers == NOBODY) | (readers == program)
            storage.reader[cells] = program if alone.all() else np.where(alone, program, SEVERAL)
            return
        if ((readers != NOBODY) & (readers != program)).any():
            raise self.fault(f"program {program} writes an element of {one.name} that another program read")
        lanes = np.arange(len(cells), dtype=np.int32)
        storage.lane[cells] = lanes
        if not np.array_equal(storage.lane[cells], lanes):
            raise self.fault(f"program {program} writes an element of {one.name} twice in one store")
        storage.writer[cells] = program

    def would_fault(self, pointers: Any, addresses: np.ndarray, writes: bool) -> None:
        """Remembers the place in the kernel's source if the lanes that its mask stops would be at fault."""
        assert self.idle is not None
        site = next(self.sites())
        if site in self.idle:
            return
        with mock.patch.object(self, "note"):
            try:
                self.allow(pointers, addresses, writes)
            except MemoryFault:
                self.idle.add(site)

    def fault(self, what: str) -> MemoryFault:
        where = " < ".join(f"{name}:{line}" for name, line in self.sites())
        return MemoryFault(f"{self.kernel} {what} ({where})")

    @staticmethod
    def sites() -> Iterator[tuple[str, int]]:
        """File and line of the load or store, and of the calls that led there."""
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.parent == KERNELS and path.name != "_launch.py":
                yield path.name, frame.f_lineno
            frame = frame.f_back

    # --- one launch

    def launch(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        """``GridExecutor.__call__``, for tensors on the CPU."""
        self.kernel = executor.fn.__name__
        known = inspect.signature(executor.fn).parameters
        named = inspect.getcallargs(executor.fn, *args, **{k: v for k, v in kwargs.items() if k in known})
        tensors = {name: _base(value) for name, value in named.items() if _base(value) is not None}
        storages: dict[int, Storage] = {}
        key = {name: t.untyped_storage().data_ptr() or -id(t) for name, t in tensors.items()}
        for place in set(key.values()):
            storages[place] = Storage([t for name, t in tensors.items() if key[name] == place])
        self.arguments = [
            Argument(name, number, t, storages[key[name]]) for number, (name, t) in enumerate(tensors.items())
        ]
        scope = interpreter._patch_lang(executor.fn)
        self.patched.clear()
        try:
            by_name = {one.name: one for one in self.arguments}
            converted = {
                name: value if name in executor.constexprs else self.convert(value, by_name.get(name), known[name])
                for name, value in named.items()
            }
            grid = executor.grid(converted) if callable(executor.grid) else executor.grid
            self.run(executor.fn, converted, (*grid, *(1,) * (3 - len(grid))), storages.values())
        finally:
            scope.restore()
            self.arguments = []

    def run(self, fn: Any, args: dict[str, Any], grid: tuple[int, ...], storages: Iterable[Storage]) -> None:
        interpreter.interpreter_builder.set_grid_dim(*grid)
        programs = list(enumerate(itertools.product(*map(range, grid))))
        orders = [programs]
        if self.orders and len(programs) > 1:
            orders += [programs[::-1], random.Random(len(programs)).sample(programs, len(programs))]
        before = [storage.values() for storage in storages] if len(orders) > 1 else []
        results: list[list[np.ndarray]] = []
        for order in orders:
            if results:
                for storage, values in zip(storages, before, strict=True):
                    storage.restore(values)
                    storage.forget()
            for self.program, place in order:
                interpreter.interpreter_builder.set_grid_idx(*place)
                fn(**args)
            results.append([storage.values() for storage in storages] if len(orders) > 1 else [])
        self.programs[self.kernel] += len(programs)
        for result in results[1:]:
            if not all(map(np.array_equal, results[0], result)):
                raise MemoryFault(f"{self.kernel}: its result depends on the order of the programs")

    def convert(self, value: Any, argument: Argument | None, parameter: inspect.Parameter) -> Any:
        """An argument as the interpreter hands it to a kernel; integers are as wide as the kernel declares them."""
        if isinstance(value, TensorDescriptor):
            semantic = interpreter.TritonSemantic(interpreter.InterpreterBuilder())
            steps = [interpreter._implicit_cvt(step) for step in value.strides[:-1]]
            return semantic.make_tensor_descriptor(
                base=self.convert(value.base, argument, parameter),
                shape=[interpreter._implicit_cvt(size) for size in value.shape], strides=[*steps, tl.constexpr(1)],
                block_shape=[tl.constexpr(size) for size in value.block_shape], padding_option=value.padding,
            )  # fmt: skip
        if argument is not None:
            kind = tl.str_to_ty(interpreter.triton.runtime.jit.mangle_type(value), None)
            return tl.tensor(interpreter.TensorHandle(np.array([argument.address], np.uint64), kind), kind)
        if isinstance(value, int) and _normalize_ty(parameter.annotation) == "i64":
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.int64), tl.int64), tl.int64)
        return interpreter._implicit_cvt(value)

    def atomic(self, *_: Any) -> Any:
        raise self.fault("uses an atomic operation")


def _base(value: Any) -> torch.Tensor | None:
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value if isinstance(value, torch.Tensor) else None


CHECKER = Checker()


@contextlib.contextmanager
def checked() -> Iterator[Checker]:
    """Every launch in the block is checked."""
    builder = interpreter.InterpreterBuilder

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        CHECKER.launch(executor, *args, **kwargs)

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # Triton patches the language anew for each call of a device function, which takes most of its time. Once in a
        # launch for each module is enough. It also wraps exceptions, which would hide the kind of a fault.
        if id(function.fn.__globals__) not in CHECKER.patched:
            CHECKER.patched.add(id(function.fn.__globals__))
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with (
        observed(CHECKER.access),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", call),
        mock.patch.object(builder, "create_atomic_rmw", CHECKER.atomic),
        mock.patch.object(builder, "create_atomic_cas", CHECKER.atomic),
    ):
        yield CHECKER
