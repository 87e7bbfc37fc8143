"""Bytes that a kernel's load and store instructions move, counted in Triton's interpreter, and what they should be.

The formulas are those at the heads of the kernels: each kernel's ``Tunable.moved_bytes``. Masked elements move nothing,
so padding makes the count smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from ..autotune.config import Config, Tunable

LIMIT = 1.1  # how much more than its formula a kernel may move


@dataclass
class Traffic:
    """Bytes so far."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextmanager
def observed(access: Callable[[Any, Any, bool], Any]) -> Iterator[None]:
    """Calls ``access(pointers, mask, writes)`` before each load and store that the interpreter executes in the block,
    which then uses the pointers that the call returns. A mask is a handle of an array or, for a box of a descriptor,
    on some versions of Triton the array itself."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(self, access(pointers, mask, False), mask, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, access(pointers, mask, True), value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
    ):
        yield


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the bytes of every load and store that the interpreter executes in the block."""
    traffic = Traffic()

    def count(pointers: Any, mask: Any, writes: bool) -> Any:
        size = int(np.asarray(mask.data).sum()) * (pointers.get_element_ty().primitive_bitwidth // 8)
        if writes:
            traffic.stored += size
        else:
            traffic.loaded += size
        return pointers

    with observed(count):
        yield traffic


def measure(
    tunable: Tunable, problem: Any, config: Config, values: Mapping[str, torch.Tensor] | None = None
) -> Traffic:
    """Runs the launches of one problem and counts; arguments are random, but for ``values``, by name."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensors: dict[int, torch.Tensor] = {}

    def real(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return dataclasses.replace(value, base=real(value.base))
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in tensors:
            tensors[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if value.is_floating_point():
                tensors[id(value)].uniform_(-1, 1)  # as states are: none may grow without bound
            else:
                tensors[id(value)].random_(4)  # places in a window
        return tensors[id(value)]

    with counted() as traffic, np.errstate(all="ignore"):  # what is masked may be 0 / 0
        for launch in tunable.launches(problem, config):
            args = {name: real(value) for name, value in launch.args.items()}
            for name, value in (values or {}).items():
                args[name].copy_(value)
            launch._replace(args=args).run()
    return traffic


def fault(tunable: Tunable, problem: Any, config: Config, traffic: Traffic) -> str:
    """What is wrong with a count, or nothing."""
    expected = tunable.moved_bytes(problem, config)
    if traffic.total > LIMIT * expected:
        return f"traffic: {traffic.total / expected:.2f} times the formula of {tunable.name}"
    return ""
