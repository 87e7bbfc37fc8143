"""Formulas for :mod:`torch.utils.flop_counter`, which counts the products of operators that it has a formula for.

They are torch's counts for the same call: two for each multiplication and addition, nothing skipped for causality,
padding or masks, and of a recurrence those of the formula, not what a kernel computes once more to save memory.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from ._register import NAMESPACE

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def register_when_imported() -> None:
    """Gives torch's counter the formulas when it is imported, which loads Triton and takes longer than this package."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AtImport())


class _AtImport(MetaPathFinder):
    """Finds torch's counter as ever, and adds the formulas once the module has run."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType) -> None:
    namespace = getattr(torch.ops, NAMESPACE)
    for name, formula in _formulas(counter).items():
        counter.register_flop_formula(getattr(namespace, name))(formula)


def _formulas(counter: ModuleType) -> dict[str, Callable[..., int]]:
    """By operator. They are called as the operator, with the shape of each tensor in its place."""

    def convolution(transposed: bool, input: Shape, weight: Shape, size: Shape) -> int:
        return int(counter.conv_flop_count(input, weight, [input[0], 0, *size], transposed=transposed))

    def conv(input: Shape, weight: Shape, bias: Any, scale: Any, residual: Any, size: Shape, *_: Any, **__: Any) -> int:
        return convolution(False, input, weight, size)

    def conv_transpose(
        input: Shape, weight: Shape, bias: Any, scale: Any, residual: Any, size: Shape, *_: Any, **__: Any
    ) -> int:  # fmt: skip
        return convolution(True, input, weight, size)

    def conv_weight_grad(input: Shape, g: Shape, window: Shape, *_: Any, **__: Any) -> int:
        # As a convolution of images whose channels are the batch. Groups are not taken off, as torch does not.
        (n, c, *space), (_n, k, *output) = input, g
        return convolution(False, [c, n, *space], [k, n, *output], window)

    def conv2d_max_pool2d(input: Shape, weight: Shape, bias: Any, scale: Any, size: Shape, *_: Any, **__: Any) -> int:
        return convolution(False, input, weight, size)

    def rnn(input: Shape, w_ih: Shape, w_hh: Shape, *_: Any, **__: Any) -> int:
        (steps, batch, features), (directions, rows, hidden) = input, w_hh
        return 2 * steps * batch * directions * rows * (features + hidden)

    def rnn_backward(input: Shape, w_ih: Shape, w_hh: Shape, *others: Any, **__: Any) -> int:
        needs_input, needs_w_ih, needs_w_hh, *_ = others[10]
        (steps, batch, features), (directions, rows, hidden) = input, w_hh
        columns = hidden * (1 + needs_w_hh) + features * (needs_input + needs_w_ih)
        return 2 * steps * batch * directions * rows * columns

    def attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
        (b, h, m, d), n, features = query, key[2], value[3]
        return 2 * b * h * m * n * (d + features)

    def attention_backward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
        # The scores once more, and the gradients of weights, value, query and key.
        (b, h, m, d), n, features = query, key[2], value[3]
        return 2 * b * h * m * n * (3 * d + 2 * features)

    return {
        "conv": conv, "conv_saving_input": conv, "conv_transpose": conv_transpose,
        "conv_transpose_saving_input": conv_transpose, "conv_weight_grad": conv_weight_grad,
        "conv2d_max_pool2d": conv2d_max_pool2d, "rnn": rnn, "rnn_backward": rnn_backward, "attention": attention,
        "attention_backward": attention_backward,
    }  # fmt: skip
