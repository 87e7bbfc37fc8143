"""The convolutions reject what torch rejects, with torch's exception type and text, and accept what torch accepts."""

import itertools
import random
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_errors import PLACES, YARDSTICK, Call, assert_same_error, at, call, outcome

import tritune
from tritune.ops._checks import ACTIVATIONS, PRECISIONS
from tritune.ops.conv_checks import ConvArgs, check_conv, check_conv_transpose

pytestmark = pytest.mark.torch


class Function(NamedTuple):
    """One of the six, with operands for it: two images of 4 channels, 8 filters of 3 taps a side."""

    name: str
    rank: int
    transposed: bool

    def x(self, n=2, c=4, size=6, dtype=torch.float32) -> Tensor:
        return torch.ones(*([] if n is None else [n]), c, *self.sides(size)).to(dtype)

    def w(self, k=8, c=4, taps=3, groups=1, dtype=torch.float32) -> Tensor:
        """``c`` channels and ``k`` filters in all."""
        shape = (c, k // groups) if self.transposed else (k, c // groups)
        return torch.ones(*shape, *self.sides(taps)).to(dtype)

    def sides(self, size):
        return size if isinstance(size, tuple) else (size,) * self.rank

    def last(self, value, others):
        """``value`` in the last dimension."""
        return (*((others,) * (self.rank - 1)), value)


FUNCTIONS = tuple(
    Function(f"conv{'_transpose' * transposed}{rank}d", rank, transposed)
    for transposed, rank in itertools.product((False, True), (1, 2, 3))
)
NAMES = tuple(function.name for function in FUNCTIONS)
BY_NAME = dict(zip(NAMES, FUNCTIONS, strict=True))
CHECKS = {f.name: partial(check_conv_transpose if f.transposed else check_conv, f.rank) for f in FUNCTIONS}
ENTRIES = {
    **{(name, "check"): CHECKS[name] for name in NAMES},
    **{(name, "public"): getattr(tritune, name) for name in NAMES},
}

each_function = pytest.mark.parametrize("f", FUNCTIONS, ids=NAMES)


def entries(names=NAMES):
    pairs = [pair for pair in ENTRIES if pair[0] in names]
    return pytest.mark.parametrize("name, entry", pairs, ids=map("-".join, pairs))


each_entry = entries()
each_transposed_entry = entries([f.name for f in FUNCTIONS if f.transposed])


def theirs_of(name):
    return getattr(F, name)


# conv2d's operands
def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (2, 4, 6, 6)).to(dtype)


def w(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (8, 4, 3, 3)).to(dtype)


def b(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (8,)).to(dtype)


def tables(of_all, of_convolutions=None, of_transposed=None, of_conv2d=None):
    """A table of rows for each function, put together from those of all functions, of its kind, and of conv2d."""
    return {
        f.name: {
            **of_all(f),
            **(kind(f) if (kind := of_transposed if f.transposed else of_convolutions) else {}),
            **((of_conv2d or {}) if f.name == "conv2d" else {}),
        }
        for f in FUNCTIONS
    }


def rows(tables):
    """Each row of each function's table, for each of its entries."""
    return pytest.mark.parametrize(
        "name, entry, make",
        [
            pytest.param(name, entry, make, id=f"{name}-{entry}-{row}")
            for name, entry in ENTRIES
            for row, make in tables[name].items()
        ],
    )


# -- what torch rejects ------------------------------------------------------------------------------------------------

CONV2D_REJECTED = {
    # dimensions
    "input 0-d": lambda: call(torch.tensor(1.0), w()),
    "input 1-d": lambda: call(x(6), w()),
    "input 2-d": lambda: call(x(6, 6), w()),
    "input 5-d": lambda: call(x(1, 2, 4, 6, 6), w()),
    "weight 1-d": lambda: call(x(), w(3)),
    "weight 2-d": lambda: call(x(), w(8, 4)),
    "weight 3-d": lambda: call(x(), w(8, 4, 3)),
    "weight 3-d, one-element lists": lambda: call(x(), w(8, 4, 3), None, (1,), (0,), (1,)),
    "weight 3-d, padding valid": lambda: call(x(), w(8, 4, 3), None, (1,), "valid"),
    "weight 3-d, padding valid, one-element lists": lambda: call(x(), w(8, 4, 3), None, (1,), "valid", (1,)),
    "weight 3-d, dilation negative": lambda: call(x(), w(8, 4, 3), None, (1,), "valid", (-1,)),
    "weight 3-d, padding same": lambda: call(x(), w(8, 4, 3), padding="same"),
    "weight 3-d, chw": lambda: call(x(4, 6, 6), w(4, 3, 3)),
    "weight 5-d": lambda: call(x(), w(1, 8, 4, 3, 3)),
    "weight 5-d, chw": lambda: call(x(4, 6, 6), w(1, 8, 4, 3, 3)),
    "weight 5-d, padding same": lambda: call(x(), w(1, 8, 4, 3, 3), padding="same"),
    # channels and groups
    "channels": lambda: call(x(2, 3, 6, 6), w()),
    "channels, chw": lambda: call(x(3, 6, 6), w()),
    "channels, padding same with even kernel": lambda: call(x(2, 3, 6, 6), w(8, 4, 2, 2), padding="same"),
    "channels, empty batch": lambda: call(x(0, 3, 6, 6), w()),
    "channels, input has none": lambda: call(x(2, 0, 6, 6), w()),
    "channels, weight has none": lambda: call(x(), w(8, 0, 3, 3)),
    "channels of two groups": lambda: call(x(), w(), groups=2),
    "groups 0": lambda: call(x(), w(), groups=0),
    "groups negative": lambda: call(x(), w(), groups=-1),
    "groups 0, padding same": lambda: call(x(), w(), groups=0, padding="same"),
    "groups more than filters": lambda: call(x(), w(2, 1, 3, 3), groups=4),
    "groups do not divide filters": lambda: call(x(), w(9, 2, 3, 3), groups=2),
    "groups do not divide filters, same": lambda: call(x(), w(), groups=3, padding="same"),
    "no filters": lambda: call(x(), w(0, 4, 3, 3)),
    "no filters, two groups": lambda: call(x(), w(0, 2, 3, 3), groups=2),
    "no filters, empty batch": lambda: call(x(0, 4, 6, 6), w(0, 4, 3, 3)),
    "no filters, no channels": lambda: call(x(2, 0, 6, 6), w(0, 0, 3, 3)),
    # geometry
    "padding negative": lambda: call(x(), w(), padding=-1),
    "padding negative in one place": lambda: call(x(), w(), padding=(0, -1)),
    "padding over half of int64": lambda: call(x(), w(), padding=2**62),
    "padding over half of int64, width": lambda: call(x(), w(), padding=(0, 2**62)),
    "stride 0": lambda: call(x(), w(), stride=0),
    "stride 0 in one place": lambda: call(x(), w(), stride=(1, 0)),
    "stride negative": lambda: call(x(), w(), stride=-1),
    "stride 0, padding valid": lambda: call(x(), w(), stride=0, padding="valid"),
    "dilation 0": lambda: call(x(), w(), dilation=0),
    "dilation 0 in one place": lambda: call(x(), w(), dilation=(0, 1)),
    "dilation 0, batch of one": lambda: call(x(1, 4, 6, 6), w(), dilation=0),
    "dilation 0, float64": lambda: call(x(dtype=torch.float64), w(dtype=torch.float64), dilation=(1, 0)),
    "dilation 0, complex": lambda: call(x(dtype=torch.complex64), w(dtype=torch.complex64), dilation=0),
    "dilation 0, padding same": lambda: call(x(), w(), dilation=0, padding="same"),
    "dilation negative": lambda: call(x(), w(), dilation=-2),
    "dilation -1, padding same, 1 tap": lambda: call(x(), w(8, 4, 1, 1), dilation=-1, padding="same"),
    "dilation -1, padding same, 2 taps": lambda: call(x(), w(8, 4, 2, 2), dilation=-1, padding="same"),
    "dilation -1, padding same, 3 taps": lambda: call(x(), w(), dilation=-1, padding="same"),
    "dilation -1, padding same, 4 taps": lambda: call(x(), w(8, 4, 4, 4), dilation=-1, padding="same"),
    "kernel too large": lambda: call(x(), w(8, 4, 7, 3)),
    "kernel too large, padded": lambda: call(x(), w(8, 4, 9, 3), padding=1),
    "kernel too large, width": lambda: call(x(), w(8, 4, 3, 9), padding=(2, 1)),
    "kernel too large, dilated": lambda: call(x(), w(), dilation=3),
    "kernel too large, dilation 2**40": lambda: call(x(), w(), dilation=2**40),
    "kernel too large, chw": lambda: call(x(4, 6, 6), w(8, 4, 7, 3)),
    "kernel too large, empty batch": lambda: call(x(0, 4, 6, 6), w(8, 4, 7, 3)),
    "height 0": lambda: call(x(2, 4, 0, 6), w()),
    "height 0, 1x1 kernel": lambda: call(x(2, 4, 0, 6), w(8, 4, 1, 1)),
    "height 0, padded": lambda: call(x(2, 4, 0, 6), w(), padding=2),
    "width 0, padded": lambda: call(x(2, 4, 6, 0), w(), padding=2),
    "height 0, padded, chw": lambda: call(x(4, 0, 6), w(), padding=2),
    "height 0, padding same": lambda: call(x(2, 4, 0, 6), w(), padding="same"),
    "height 0, padding same, even kernel": lambda: call(x(2, 4, 0, 6), w(8, 4, 2, 2), padding="same"),
    "kernel 0, float64": lambda: call(x(dtype=torch.float64), w(8, 4, 0, 3, dtype=torch.float64)),
    "kernel 0, float64, dilated": lambda: call(x(dtype=torch.float64), w(8, 4, 0, 3, dtype=torch.float64), dilation=2),
    "kernel 0, batch of one": lambda: call(x(1, 4, 6, 6), w(8, 4, 3, 0)),
    "kernel 0, padding same, dilated": lambda: call(x(), w(8, 4, 0, 3), padding="same", dilation=2),
    # lengths of lists
    **{
        f"{name} {values}": lambda name=name, values=values: call(x(), w(), **{name: values})
        for name in ("stride", "padding", "dilation")
        for values in ((), [], (1, 1, 1), [1, 1, 1, 1])
    },
    "stride of 3, padding valid": lambda: call(x(), w(), stride=(1, 1, 1), padding="valid"),
    "stride of 3, padding same": lambda: call(x(), w(), stride=(1, 1, 1), padding="same"),
    "stride of 0, padding same": lambda: call(x(), w(), stride=(), padding="same"),
    "dilation of 3, padding same": lambda: call(x(), w(), dilation=(1, 1, 1), padding="same"),
    "dilation of 0, padding same": lambda: call(x(), w(), dilation=(), padding="same"),
    "late bool is an int": lambda: call(x(), w(), stride=[1, 1, False]),
    # padding strings
    "padding full": lambda: call(x(), w(), padding="full"),
    "padding SAME": lambda: call(x(), w(), padding="SAME"),
    "padding b'full'": lambda: call(x(), w(), padding=b"full"),
    "padding same, stride 2": lambda: call(x(), w(), padding="same", stride=2),
    "padding same, stride (1, 2)": lambda: call(x(), w(), padding="same", stride=(1, 2)),
    "padding same, stride 0": lambda: call(x(), w(), padding="same", stride=0),
    # bias
    "bias too short": lambda: call(x(), w(), b(7)),
    "bias 0-d": lambda: call(x(), w(), torch.tensor(1.0)),
    "bias 2-d": lambda: call(x(), w(), b(1, 8)),
    "bias column": lambda: call(x(), w(), b(8, 1)),
    "bias complex and 2-d": lambda: call(
        x(dtype=torch.complex64), w(dtype=torch.complex64), b(1, 8, dtype=torch.complex64)
    ),
    "bias float64": lambda: call(x(), w(), b(dtype=torch.float64)),
    "bias float32 of float64": lambda: call(x(dtype=torch.float64), w(dtype=torch.float64), b()),
    "bias float64, padding same": lambda: call(x(), w(), b(dtype=torch.float64), padding="same"),
    "bias float64, padding same, even kernel": lambda: call(x(), w(8, 4, 2, 2), b(dtype=torch.float64), padding="same"),
    "bias float32, padding same, complex": lambda: call(
        x(dtype=torch.complex64), w(dtype=torch.complex64), b(), padding="same"
    ),
    # dtypes
    "weight float64": lambda: call(x(), w(dtype=torch.float64)),
    "weight float64, batch of one": lambda: call(x(1, 4, 6, 6), w(dtype=torch.float64)),
    "weight float64, chw": lambda: call(x(4, 6, 6), w(dtype=torch.float64)),
    "weight float64, 1x1": lambda: call(x(), w(8, 4, 1, 1, dtype=torch.float64)),
    "weight float64, batch of one, large": lambda: call(x(1, 4, 80, 80), w(dtype=torch.float64)),
    "weight float64, batch of one, 5x5": lambda: call(x(1, 4, 6, 6), w(8, 4, 5, 5, dtype=torch.float64)),
    "weight float64, batch of one, grouped": lambda: call(x(1, 4, 6, 6), w(8, 2, 3, 3, dtype=torch.float64), groups=2),
    "weight float64, batch of one, dilated": lambda: call(x(1, 4, 6, 6), w(dtype=torch.float64), dilation=2),
    "weight float64, batch of 16": lambda: call(x(16, 4, 6, 6), w(8, 4, 1, 1, dtype=torch.float64)),
    "weight float32 of complex": lambda: call(x(dtype=torch.complex64), w()),
    "bool": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool)),
    "bool, dilated": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool), dilation=2),
    "bool, grouped": lambda: call(x(dtype=torch.bool), w(8, 2, 3, 3, dtype=torch.bool), groups=2),
    "int32, dilated": lambda: call(x(dtype=torch.int32), w(dtype=torch.int32), dilation=2),
    "float8": lambda: call(x(dtype=torch.float8_e5m2), w(dtype=torch.float8_e5m2)),
    "uint16": lambda: call(x(dtype=torch.uint16), w(dtype=torch.uint16)),
    # several faults: the first that torch finds
    "input 2-d and weight 2-d": lambda: call(x(6, 6), w(8, 4)),
    "input 2-d and bias float64": lambda: call(x(6, 6), w(), b(dtype=torch.float64)),
    "input 2-d and bias float64, same": lambda: call(x(6, 6), w(), b(dtype=torch.float64), padding="same"),
    "input 2-d and bad string": lambda: call(x(6, 6), w(), padding="full"),
    "weight 2-d and groups 0": lambda: call(x(), w(8, 4), groups=0),
    "weight 2-d and groups 0, same": lambda: call(x(), w(8, 4), groups=0, padding="same"),
    "weight 2-d and bad string": lambda: call(x(), w(8, 4), padding="full"),
    "groups 0 and stride of 3": lambda: call(x(), w(), stride=(1, 1, 1), groups=0),
    "stride of 3 and padding of 3": lambda: call(x(), w(), stride=(1, 1, 1), padding=(1, 1, 1)),
    "padding of 3 and dilation of 3": lambda: call(x(), w(), padding=(1, 1, 1), dilation=(1, 1, 1)),
    "padding negative and stride 0": lambda: call(x(), w(), stride=0, padding=-1),
    "stride 0 and dilation negative": lambda: call(x(), w(), stride=0, dilation=-1),
    "dilation 0 and channels": lambda: call(x(2, 3, 6, 6), w(), dilation=0),
    "dilation 0 and height 0": lambda: call(x(2, 4, 0, 6), w(), dilation=0, padding=1),
    "dilation 0 and weight float64": lambda: call(x(), w(dtype=torch.float64), dilation=0),
    "dilation 0 and bool": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool), dilation=0),
    "height 0 and weight float64": lambda: call(x(2, 4, 0, 6), w(dtype=torch.float64), padding=2),
    "kernel 0 and weight float32": lambda: call(x(dtype=torch.float64), w(8, 4, 0, 3)),
    "kernel 0 and bool": lambda: call(x(dtype=torch.bool), w(8, 4, 0, 3, dtype=torch.bool)),
    "bool and weight float32": lambda: call(x(dtype=torch.bool), w()),
    "bool and bias float32, valid": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool), b(), padding="valid"),
    "channels and mixed complex": lambda: call(x(2, 3, 6, 6, dtype=torch.complex64), w()),
    "bad string and mixed complex": lambda: call(x(dtype=torch.complex64), w(), padding="full"),
    "weight float64 and bias float64, same": lambda: call(
        x(), w(dtype=torch.float64), b(dtype=torch.float64), padding="same"
    ),
    "bias too short and float64, same": lambda: call(x(), w(), b(7, dtype=torch.float64), padding="same"),
    "stride 2 and bias float64, same": lambda: call(x(), w(), b(dtype=torch.float64), stride=2, padding="same"),
    "stride 2 and dilation of 3, same": lambda: call(x(), w(), stride=2, padding="same", dilation=(1, 1, 1)),
    "stride 2 and groups 0, same": lambda: call(x(), w(), stride=2, padding="same", groups=0),
}


def rejected(f: Function):
    """Rows for all functions."""
    x, w, sides, last = f.x, f.w, f.sides, f.last
    f64, c64 = torch.float64, torch.complex64
    short, long = (3,) * (f.rank - 1), (3,) * (f.rank + 1)
    one_element = {"stride": [1], "padding": [0], "dilation": [1]}
    lists = ("stride", "padding", "dilation", *(["output_padding"] if f.transposed else []))
    return {
        # dimensions
        "input 0-d": lambda: call(torch.tensor(1.0), w()),
        "input without channels": lambda: call(torch.ones(sides(6)), w()),
        "input of one more": lambda: call(torch.ones(1, 2, 4, *sides(6)), w()),
        "weight 1-d": lambda: call(x(), torch.ones(3)),
        "weight 2-d": lambda: call(x(), torch.ones(8, 4)),
        "weight of one less": lambda: call(x(), w(taps=short)),
        "weight of one less, one-element lists": lambda: call(x(), w(taps=short), **one_element),
        "weight of one more": lambda: call(x(), w(taps=long)),
        "weight of one more, unbatched": lambda: call(x(n=None), w(taps=long)),
        "weight of one more, one-element lists": lambda: call(x(), w(taps=long), **one_element),
        "weight of one more, negative padding": lambda: call(x(), w(taps=long), **one_element | {"padding": [-1]}),
        # channels and groups
        "channels": lambda: call(x(c=3), w()),
        "channels, unbatched": lambda: call(x(n=None, c=3), w()),
        "channels, empty batch": lambda: call(x(n=0, c=3), w()),
        "channels, input has none": lambda: call(x(c=0), w()),
        "channels of two groups": lambda: call(x(c=2 if f.transposed else 4), w(), groups=2),
        "channels, weight has none": lambda: call(x(), w(c=0)),
        "groups 0": lambda: call(x(), w(), groups=0),
        "groups negative": lambda: call(x(), w(), groups=-1),
        "groups more than weights": lambda: call(x(), w(), groups=16),
        "groups do not divide": lambda: call(x(), w(), groups=3),
        # geometry
        "padding negative": lambda: call(x(), w(), padding=-1),
        "padding negative in one place": lambda: call(x(), w(), padding=last(-1, 0)),
        "padding over half of int64": lambda: call(x(), w(), padding=2**62),
        "padding over half of int64 in one place": lambda: call(x(), w(), padding=last(2**62, 0)),
        "stride 0": lambda: call(x(), w(), stride=0),
        "stride 0 in one place": lambda: call(x(), w(), stride=last(0, 1)),
        "stride negative": lambda: call(x(), w(), stride=-1),
        "dilation negative": lambda: call(x(), w(), dilation=-1),
        "dilation 0, batch of one": lambda: call(x(n=1), w(), dilation=0),
        "dilation 0 in one place, batch of one": lambda: call(x(n=1), w(), dilation=last(0, 1)),
        "dilation 0, float64": lambda: call(x(dtype=f64), w(dtype=f64), dilation=0),
        "no pixels, padded": lambda: call(x(size=0), w(), padding=2),
        "no pixels in one place, padded": lambda: call(x(size=last(0, 6)), w(), padding=2),
        "no pixels, padded, unbatched": lambda: call(x(n=None, size=0), w(), padding=2),
        "kernel 0, batch of one": lambda: call(x(n=1), w(taps=0)),
        "kernel 0 in one place, batch of one": lambda: call(x(n=1), w(taps=last(0, 3))),
        "kernel 0, float64": lambda: call(x(dtype=f64), w(taps=0, dtype=f64)),
        "kernel 0, float64, dilated": lambda: call(x(dtype=f64), w(taps=0, dtype=f64), dilation=2),
        "kernel 0, float64, groups": lambda: call(x(dtype=f64), w(taps=0, groups=2, dtype=f64), groups=2),
        # lengths of lists
        **{
            f"{name} {values}": lambda name=name, values=values: call(x(), w(), **{name: values})
            for name in lists
            for values in ((), [], (1,) * (f.rank + 1), [1, 1, 1, 1, 1])
        },
        "late bool is an int": lambda: call(x(), w(), stride=[1] * f.rank + [False]),
        # bias
        "bias too short": lambda: call(x(), w(), b(7)),
        "bias 0-d": lambda: call(x(), w(), torch.tensor(1.0)),
        "bias 2-d": lambda: call(x(), w(), b(1, 8)),
        "bias column": lambda: call(x(), w(), b(8, 1)),
        "bias of groups": lambda: call(x(), w(groups=2), b(4), groups=2),
        "bias float64": lambda: call(x(), w(), b(dtype=f64)),
        "bias float32, complex": lambda: call(x(dtype=c64), w(dtype=c64), b()),
        # dtypes
        "weight float64": lambda: call(x(), w(dtype=f64)),
        "weight float64, unbatched": lambda: call(x(n=None), w(dtype=f64)),
        "weight float64, 1 tap": lambda: call(x(), w(taps=1, dtype=f64)),
        "weight float64, batch of one, 5 taps": lambda: call(x(n=1), w(taps=5, dtype=f64)),
        "weight float64, batch of one, large": lambda: call(
            x(n=1, size=last(90, 60)) if f.rank < 3 else x(n=1, size=(20, 40, 20)), w(dtype=f64)
        ),
        "weight float64, 1 tap, strided": lambda: call(x(), w(taps=1, dtype=f64), stride=2),
        "weight float64, 1 tap, dilated": lambda: call(x(), w(taps=1, dtype=f64), dilation=2),
        "weight float64, batch of one, strided": lambda: call(x(n=1), w(taps=1, dtype=f64), stride=2),
        "weight float64, batch of one, grouped": lambda: call(x(n=1), w(groups=2, dtype=f64), groups=2),
        "weight float64, batch of 16, 1 tap": lambda: call(x(n=16), w(taps=1, dtype=f64)),
        "weight float32 of float64": lambda: call(x(dtype=f64), w()),
        "weight float32 of complex": lambda: call(x(dtype=c64), w()),
        "weight complex of float32": lambda: call(x(), w(dtype=c64)),
        "bool": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool)),
        "bool, 1 tap": lambda: call(x(dtype=torch.bool), w(taps=1, dtype=torch.bool)),
        "bool, 1 tap, padded": lambda: call(x(dtype=torch.bool), w(taps=1, dtype=torch.bool), padding=1),
        "bool, 1 tap, strided": lambda: call(x(dtype=torch.bool), w(taps=1, dtype=torch.bool), stride=2),
        "bool, 1 tap, grouped": lambda: call(x(dtype=torch.bool), w(taps=1, groups=2, dtype=torch.bool), groups=2),
        "bool, dilated": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool), dilation=2),
        "int32, dilated": lambda: call(x(dtype=torch.int32), w(dtype=torch.int32), dilation=2),
        "float8": lambda: call(x(dtype=torch.float8_e5m2), w(dtype=torch.float8_e5m2)),
        "uint16": lambda: call(x(dtype=torch.uint16), w(dtype=torch.uint16)),
        # several faults: the first that torch finds
        "input and weight without channels": lambda: call(torch.ones(sides(6)), torch.ones(8, 4)),
        "weight 2-d and groups 0": lambda: call(x(), torch.ones(8, 4), groups=0),
        "groups 0 and stride too long": lambda: call(x(), w(), stride=(1,) * (f.rank + 1), groups=0),
        "stride and padding too long": lambda: call(x(), w(), stride=long, padding=long),
        "padding and dilation too long": lambda: call(x(), w(), padding=long, dilation=long),
        "padding negative and stride 0": lambda: call(x(), w(), stride=0, padding=-1),
        "stride 0 and dilation negative": lambda: call(x(), w(), stride=0, dilation=-1),
        "dilation negative and weight of one more": lambda: call(x(), w(taps=long), **one_element | {"dilation": [-1]}),
        "groups and channels": lambda: call(x(c=3), w(), groups=3),
        "channels and bias": lambda: call(x(c=3), w(), b(7)),
        "padding over half of int64 and channels": lambda: call(x(c=3), w(), padding=2**62),
        "dilation 0 and weight float64": lambda: call(x(), w(dtype=f64), dilation=0),
        "dilation 0 and weight float64, batch of one": lambda: call(x(n=1), w(dtype=f64), dilation=0),
        "dilation 0 and bool": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool), dilation=0),
        "no pixels and weight float64": lambda: call(x(size=0), w(dtype=f64), padding=2),
        "kernel 0 and weight float32": lambda: call(x(dtype=f64), w(taps=0)),
        "kernel 0 and dilation 0": lambda: call(x(dtype=f64), w(taps=0, dtype=f64), dilation=0),
        "kernel 0 and bool": lambda: call(x(dtype=torch.bool), w(taps=0, dtype=torch.bool)),
        "bool and weight float32": lambda: call(x(dtype=torch.bool), w()),
        "weight and bias float64": lambda: call(x(), w(dtype=f64), b(dtype=f64)),
        "channels and mixed complex": lambda: call(x(c=3, dtype=c64), w()),
    }


def rejected_convolutions(f: Function):
    x, w, last = f.x, f.w, f.last
    f64 = torch.float64
    short, long = (3,) * (f.rank - 1), (3,) * (f.rank + 1)
    return {
        "dilation 0": lambda: call(x(), w(), dilation=0),
        "dilation 0 in one place": lambda: call(x(), w(), dilation=last(0, 1)),
        "dilation 0 and channels": lambda: call(x(c=3), w(), dilation=0),
        "no filters": lambda: call(x(), w(k=0)),
        "no filters, two groups": lambda: call(x(), w(k=0, groups=2), groups=2),
        "no filters, empty batch": lambda: call(x(n=0), w(k=0)),
        "no pixels": lambda: call(x(size=0), w()),
        "no pixels, empty batch": lambda: call(x(n=0, size=0), w()),
        "no pixels, 1 tap": lambda: call(x(size=0), w(taps=1)),
        "kernel too large": lambda: call(x(), w(taps=last(7, 3))),
        "kernel too large, padded": lambda: call(x(), w(taps=last(9, 3)), padding=1),
        "kernel too large, dilated": lambda: call(x(), w(), dilation=3),
        "kernel too large, dilation 2**40": lambda: call(x(), w(), dilation=2**40),
        "kernel too large, unbatched": lambda: call(x(n=None), w(taps=7)),
        "kernel too large, empty batch": lambda: call(x(n=0), w(taps=7)),
        # padding strings
        "padding full": lambda: call(x(), w(), padding="full"),
        "padding b'full'": lambda: call(x(), w(), padding=b"full"),
        "padding full and weight 2-d": lambda: call(x(), torch.ones(8, 4), padding="full"),
        "same, stride 2": lambda: call(x(), w(), padding="same", stride=2),
        "same, stride 2 in one place": lambda: call(x(), w(), padding="same", stride=last(2, 1)),
        "same, stride too long": lambda: call(x(), w(), padding="same", stride=long),
        "same, stride of none": lambda: call(x(), w(), padding="same", stride=()),
        "same, dilation too long": lambda: call(x(), w(), padding="same", dilation=long),
        "same, dilation of none": lambda: call(x(), w(), padding="same", dilation=()),
        "same, dilation 0": lambda: call(x(), w(), padding="same", dilation=0),
        **{
            f"same, dilation -1, {taps} taps": lambda taps=taps: call(x(), w(taps=taps), dilation=-1, padding="same")
            for taps in (1, 2, 3, 4)
        },
        "same, dilation -1 in one place": lambda: call(x(), w(taps=2), dilation=last(-1, 1), padding="same"),
        "same, groups 0": lambda: call(x(), w(), padding="same", groups=0),
        "same, channels": lambda: call(x(c=3), w(), padding="same"),
        "same, channels, even kernel": lambda: call(x(c=3), w(taps=last(2, 3)), padding="same"),
        "same, no pixels": lambda: call(x(size=0), w(), padding="same"),
        "same, no pixels, even kernel": lambda: call(x(size=0), w(taps=2), padding="same"),
        "same, weight of one less": lambda: call(x(), w(taps=short), padding="same"),
        "same, weight of one more": lambda: call(x(), w(taps=long), padding="same"),
        "same, bias float64": lambda: call(x(), w(), b(dtype=f64), padding="same"),
        "same, weight and bias float64": lambda: call(x(), w(dtype=f64), b(dtype=f64), padding="same"),
        "valid, stride 0": lambda: call(x(), w(), padding="valid", stride=0),
        "valid, stride too long": lambda: call(x(), w(), padding="valid", stride=long),
        "valid, weight of one less": lambda: call(x(), w(taps=short), padding="valid"),
        "valid, weight of one more": lambda: call(x(), w(taps=long), padding="valid"),
        "valid, weight of one more, one-element lists": lambda: call(x(), w(taps=long), None, [1], "valid", [1]),
        "valid, bias float64": lambda: call(x(), w(), b(dtype=f64), padding="valid"),
    }


def rejected_transposed(f: Function):
    x, w, last = f.x, f.w, f.last
    f64, long = torch.float64, (3,) * (f.rank + 1)
    one = {"n": 1}  # oneDNN takes the others, and has texts of its own
    return {
        "output_padding negative": lambda: call(x(), w(), output_padding=-1),
        "output_padding negative in one place": lambda: call(x(), w(), output_padding=last(-1, 0)),
        "output_padding of stride and dilation": lambda: call(x(), w(), output_padding=1),
        "output_padding in one place": lambda: call(x(), w(), output_padding=last(1, 0)),
        "output_padding of stride 2": lambda: call(x(), w(), stride=2, output_padding=2),
        "output_padding over stride 2 and dilation 3": lambda: call(x(), w(), None, 2, 0, 4, 1, 3),
        "output_padding below stride in another place": lambda: call(x(), w(), stride=last(1, 2), output_padding=1),
        "output_padding, float64": lambda: call(x(dtype=f64), w(dtype=f64), output_padding=1),
        "output_padding, groups": lambda: call(x(), w(groups=2), groups=2, output_padding=1),
        "output_padding, unbatched": lambda: call(x(n=None), w(), output_padding=1),
        "no channels": lambda: call(x(c=0), w(c=0)),
        "no channels, empty batch": lambda: call(x(n=0, c=0), w(c=0)),
        "no filters, batch of one": lambda: call(x(**one), w(k=0)),
        "no filters, float64, groups": lambda: call(x(dtype=f64), w(k=0, groups=2, dtype=f64), groups=2),
        "no pixels": lambda: call(x(size=0), w()),
        "output of size 0": lambda: call(x(**one), w(), padding=4),
        "output of size 0 in one place": lambda: call(x(**one), w(), padding=last(4, 0)),
        "output of size 0, float64": lambda: call(x(dtype=f64), w(dtype=f64), padding=4),
        "output of negative size": lambda: call(x(dtype=f64), w(dtype=f64), padding=6),
        "output of negative size, strided": lambda: call(x(n=None), w(), stride=2, padding=8, output_padding=1),
        "output of negative size, groups": lambda: call(x(dtype=f64), w(groups=2, dtype=f64), groups=2, padding=6),
        "int32": lambda: call(x(dtype=torch.int32), w(dtype=torch.int32)),
        "int8, 1 tap": lambda: call(x(dtype=torch.int8), w(taps=1, dtype=torch.int8)),
        # several faults
        "output_padding and dilation too long": lambda: call(x(), w(), output_padding=long, dilation=long),
        "output_padding and padding negative": lambda: call(x(), w(), padding=-1, output_padding=-1),
        "output_padding negative and stride 0": lambda: call(x(), w(), stride=0, output_padding=-1),
        "output_padding and dilation 0": lambda: call(x(), w(), output_padding=1, dilation=0),
        "output_padding and kernel 0": lambda: call(x(), w(taps=0), output_padding=1),
        "output_padding and no filters": lambda: call(x(), w(k=0), output_padding=1),
        "output_padding and output of size 0": lambda: call(x(), w(), padding=5, output_padding=1),
        "output_padding and bool": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool), output_padding=1),
        "output_padding and weight float64": lambda: call(x(), w(dtype=f64), output_padding=1),
        "output_padding and channels": lambda: call(x(c=3), w(), output_padding=1),
        "output of size 0 and no filters": lambda: call(x(**one), w(k=0), padding=4),
        "output of size 0 and bool": lambda: call(x(dtype=torch.bool), w(dtype=torch.bool), padding=4),
        "output of size 0 and weight float64": lambda: call(x(), w(dtype=f64), padding=4),
        "output of size 0 and weight float64, batch of one": lambda: call(x(**one), w(dtype=f64), padding=4),
        "no filters and weight float64": lambda: call(x(), w(k=0, dtype=f64)),
        "weight float64 and bias float32": lambda: call(x(), w(dtype=f64), b()),
        "weight float64 and bias float32, batch of one": lambda: call(x(**one), w(dtype=f64), b()),
        # types of arguments, given by position: by keyword torch leaves their number out
        "input list": lambda: call([1.0], w()),
        "weight list": lambda: call(x(), [1.0]),
        "bias float": lambda: call(x(), w(), 1.0),
        **{
            f"argument {place} {value!r}": lambda place=place, value=value: call(x(), w(), None, *(1,) * place, value)
            for place, value in itertools.product(range(5), (None, 1.0, True, "same", 1j))
        },
        "padding (None,)": lambda: call(x(), w(), None, 1, (None,)),
        "output_padding (1.0, 1)": lambda: call(x(), w(), None, 1, 0, (1.0, 1)),
        "stride 1.0 and padding 1.0": lambda: call(x(), w(), None, 1.0, 1.0),
    }


REJECTED = tables(rejected, rejected_convolutions, rejected_transposed, CONV2D_REJECTED)

# torch's text is the list of its signatures, or names an argument by its place in the C++ one.
CONV2D_REJECTED_BY_TYPE = {
    "input list": lambda: call([1.0], w()),
    "input None": lambda: call(None, w()),
    "input array": lambda: call(np.ones((2, 4, 6, 6)), w()),
    "weight list": lambda: call(x(), [1.0]),
    "weight missing": lambda: call(x()),
    "bias list": lambda: call(x(), w(), [1.0]),
    "bias float": lambda: call(x(), w(), 1.0),
    "unknown keyword": lambda: call(x(), w(), output_padding=0),
    **{
        f"{name} {value!r}": lambda name=name, value=value: call(x(), w(), **{name: value})
        for name, value in itertools.product(
            ("stride", "padding", "dilation", "groups"), (None, 1.0, True, np.bool_(True), np.float64(1), 1j)
        )
    },
    **{
        f"{name} {value!r}": lambda name=name, value=value: call(x(), w(), **{name: value})
        for name, value in itertools.product(
            ("stride", "padding", "dilation"),
            ((True, 1), (np.bool_(True), 1), (1.0, 1), (None, 1), ("1", 1), ((1, 1), 1), range(1, 3), {1, 2}),
        )
    },
    **{
        f"late {value!r}": lambda value=value: call(x(), w(), stride=(1, value))
        for value in (1.0, None, "1", np.bool_(True), np.float32(1), torch.tensor(1.0), torch.tensor([1, 1]))
    },
    "stride array": lambda: call(x(), w(), stride=np.array([1, 2])),
    "stride tensor of two": lambda: call(x(), w(), stride=torch.tensor([1, 2])),
    "stride float tensor": lambda: call(x(), w(), stride=torch.tensor(1.0)),
    "stride string": lambda: call(x(), w(), stride="same"),
    "padding bytearray": lambda: call(x(), w(), padding=bytearray(b"same")),
    "padding strings": lambda: call(x(), w(), padding=("same", "same")),
    "groups tuple": lambda: call(x(), w(), groups=(1,)),
    "groups string": lambda: call(x(), w(), groups="1"),
    "groups float tensor": lambda: call(x(), w(), groups=torch.tensor(1.0)),
    "stride 2**63": lambda: call(x(), w(), stride=2**63),
    "stride -2**63-1": lambda: call(x(), w(), stride=-(2**63) - 1),
    "groups 2**64": lambda: call(x(), w(), groups=2**64),
    "stride (2**63, 1)": lambda: call(x(), w(), stride=(2**63, 1)),
    "stride (1, 2**63)": lambda: call(x(), w(), stride=(1, 2**63)),
    # oneDNN speaks here, of its own internals
    "kernel 0": lambda: call(x(), w(8, 4, 0, 3)),
    "kernel 0, width": lambda: call(x(), w(8, 4, 3, 0)),
    "kernel 0, dilated": lambda: call(x(), w(8, 4, 0, 3), dilation=2),
    "kernel 0, padding same": lambda: call(x(), w(8, 4, 0, 3), padding="same"),
    "kernel 0, bfloat16": lambda: call(x(dtype=torch.bfloat16), w(8, 4, 0, 0, dtype=torch.bfloat16)),
    "dilation 2**62": lambda: call(x(), w(), dilation=2**62),  # overflows in torch
    "height 0, dilation -1, padding same": lambda: call(x(2, 4, 0, 6), w(8, 4, 2, 2), dilation=-1, padding="same"),
}


def rejected_by_type(f: Function):
    x, w, last = f.x, f.w, f.last
    lists = ("stride", "padding", "dilation", *(["output_padding"] if f.transposed else []))
    return {
        "input list": lambda: call([1.0], w()),
        "input None": lambda: call(None, w()),
        "weight list": lambda: call(x(), [1.0]),
        "weight missing": lambda: call(x()),
        "bias list": lambda: call(x(), w(), [1.0]),
        "unknown keyword": lambda: call(x(), w(), kernel_size=0),
        **{
            f"{name} {value!r}": lambda name=name, value=value: call(x(), w(), **{name: value})
            for name, value in itertools.product((*lists, "groups"), (None, 1.0, True, np.bool_(True), 1j))
        },
        **{
            f"{name} {value!r}": lambda name=name, value=value: call(x(), w(), **{name: value})
            for name, value in itertools.product(lists, ((True, 1), (1.0, 1), ("1", 1), ((1, 1), 1), {1, 2}))
        },
        **{f"late {value!r}": lambda value=value: call(x(), w(), stride=last(value, 1)) for value in (1.0, None, "1")},
        "stride array": lambda: call(x(), w(), stride=np.array([1, 2])),
        "padding strings": lambda: call(x(), w(), padding=("same", "same")),
        "groups tuple": lambda: call(x(), w(), groups=(1,)),
        **{
            f"{name} {value}": lambda name=name, value=value: call(x(), w(), **{name: value})
            for name in lists
            for value in (2**63, (2**63,), last(2**63, 1))
        },
        "groups 2**64": lambda: call(x(), w(), groups=2**64),
        # oneDNN speaks here, of its own internals
        "kernel 0": lambda: call(x(), w(taps=0)),
        "kernel 0 in one place": lambda: call(x(), w(taps=last(0, 3))),
        "kernel 0, dilated": lambda: call(x(), w(taps=0), dilation=2),
    }


def rejected_transposed_by_type(f: Function):
    x, w, last = f.x, f.w, f.last
    f64 = torch.float64
    return {
        "padding same": lambda: call(x(), w(), padding="same"),
        "padding b'same'": lambda: call(x(), w(), padding=b"same"),
        "dilation 0": lambda: call(x(), w(), dilation=0),
        "dilation 0 in one place": lambda: call(x(), w(), dilation=last(0, 1)),
        "dilation 0, groups": lambda: call(x(), w(groups=2), dilation=0, groups=2),
        "no filters": lambda: call(x(), w(k=0)),
        "no filters, two groups": lambda: call(x(), w(k=0, groups=2), groups=2),
        "output of negative size, float32": lambda: call(x(), w(), padding=5),
        "output of negative size, empty batch": lambda: call(x(n=0), w(), padding=5),
        "no pixels, empty batch": lambda: call(x(n=0, size=0), w(), padding=2),
        # a C int holds them
        "stride 2**31": lambda: call(x(dtype=f64), w(dtype=f64), stride=2**31),
        "stride 2**32 in one place": lambda: call(x(dtype=f64), w(dtype=f64), stride=last(2**32, 1)),
        "output_padding 2**40": lambda: call(x(), w(), output_padding=2**40),
        "dilation 2**32": lambda: call(x(dtype=f64), w(dtype=f64), dilation=2**32),
        "dilation 2**63 - 1": lambda: call(x(n=1), w(), dilation=2**63 - 1),
    }


REJECTED_BY_TYPE = tables(rejected_by_type, None, rejected_transposed_by_type, CONV2D_REJECTED_BY_TYPE)


@rows(REJECTED)
def test_rejected_with_torchs_text(name, entry, make):
    made = make()
    theirs = outcome(theirs_of(name), made)
    for place in PLACES:
        assert_same_error(theirs, outcome(ENTRIES[name, entry], at(place, made)), f"{place}: {made}")


@rows(REJECTED_BY_TYPE)
def test_rejected_with_torchs_type(name, entry, make):
    made = make()
    theirs = outcome(theirs_of(name), made)
    for place in PLACES:
        ours = outcome(ENTRIES[name, entry], at(place, made))
        assert_same_error(theirs, ours, f"{place}: {made}", compare_text=False)


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex32, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_function
def test_mixed_dtypes(f, dtype, dilation):
    for other in DTYPES:
        made_calls = [
            call(f.x(dtype=dtype), f.w(dtype=other), dilation=dilation),
            call(f.x(n=1, dtype=dtype), f.w(dtype=other), dilation=dilation),
        ]
        if other == dtype or not f.transposed:  # docs/differences.md: transposed, some kernels do not look at the bias
            made_calls.append(call(f.x(dtype=dtype), f.w(dtype=dtype), b(dtype=other), dilation=dilation))
        for made in made_calls:
            theirs, ours = outcome(theirs_of(f.name), made), outcome(CHECKS[f.name], made)
            if isinstance(theirs, Tensor):
                assert isinstance(ours, ConvArgs), f"{made}: {ours}"
            else:
                assert_same_error(theirs, ours, made)


@each_entry
def test_mixed_dtypes_on_a_gpu(name, entry):
    """They get the text of the CPU: one fault, one text."""
    f, function = BY_NAME[name], ENTRIES[name, entry]
    on_cpu = outcome(function, call(f.x(), f.w(dtype=torch.float64)))
    with FakeTensorMode():
        on_gpu = outcome(function, call(f.x().to("cuda:0"), f.w(dtype=torch.float64).to("cuda:0")))
    assert (type(on_gpu), str(on_gpu)) == (type(on_cpu), str(on_cpu))


# What torch says for a CPU model that is given CUDA data, and the other way round
MIXED_DEVICES = {
    ("cuda:0", "cpu", "cpu"): "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be",
    ("cpu", "cuda:0", "cpu"): "Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be",
    ("cuda:0", "cuda:0", "cpu"): "Input type (torch.cuda.FloatTensor) and bias type (torch.FloatTensor) should be",
    ("cuda:0", "cuda:1", "cuda:1"): "Expected all tensors to be on the same device, but got weight is on cuda:1",
    ("meta", "cpu", "cpu"): "Expected all tensors to be on the same device, but got weight is on cpu",
    ("cpu", "meta", "meta"): "Expected all tensors to be on the same device, but got weight is on meta",
    ("meta", "meta", "cpu"): "Expected all tensors to be on the same device, but got bias is on cpu",
}


@each_entry
@pytest.mark.parametrize("devices", MIXED_DEVICES, ids=" ".join)
def test_mixed_devices(name, entry, devices):
    """torch's own fake and meta tensors accept the mix that its real ones reject."""
    f = BY_NAME[name]
    with FakeTensorMode():  # a CPU build of torch has no other CUDA tensors
        made = call(*(operand.to(device) for operand, device in zip((f.x(), f.w(), b()), devices, strict=True)))
        assert not YARDSTICK or isinstance(outcome(theirs_of(name), made), Tensor)
        ours = outcome(ENTRIES[name, entry], made)
    assert type(ours) is RuntimeError
    assert str(ours).startswith(MIXED_DEVICES[devices])


@each_function
def test_opinfo(f):
    """torch's own samples, good and bad; it has no bad ones of transposed convolution."""
    info = op_info(f"nn.functional.{f.name}")
    for sample in info.sample_inputs("cpu", torch.float32):
        output = theirs_of(f.name)(sample.input, *sample.args, **sample.kwargs)
        args = CHECKS[f.name](sample.input, *sample.args, **sample.kwargs)
        assert args.output_size == tuple(output.shape[-f.rank :])
    bad = list(info.error_inputs("cpu")) if info.error_inputs_func else []
    assert f.transposed or bad
    for error_input in bad:
        sample = error_input.sample_input
        for name, entry in ENTRIES:
            if name == f.name:
                with pytest.raises(error_input.error_type, match=error_input.error_regex):
                    ENTRIES[name, entry](sample.input, *sample.args, **sample.kwargs)


def op_info(name):
    pytest.importorskip("expecttest")  # torch.testing needs it
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == name)


# -- where we do not follow torch: docs/differences.md -----------------------------------------------------------------


def rejected_if_not_empty(f: Function):
    """torch looks at these operands only where there is something to compute, and then rejects them."""
    x, w, i32 = f.x, f.w, torch.int32
    return {
        "weight float64": lambda n, c: call(x(n, c), w(c=c, dtype=torch.float64)),
        "bool": lambda n, c: call(x(n, c, dtype=torch.bool), w(c=c, dtype=torch.bool)),
        "int32, dilated": lambda n, c: call(x(n, c, dtype=i32), w(c=c, dtype=i32), dilation=2),
        "dilation 0": lambda n, c: call(x(n, c), w(c=c), dilation=0),
        "kernel 0": lambda n, c: call(x(n, c), w(c=c, taps=0)),
        "kernel 0 in one place": lambda n, c: call(x(n, c), w(c=c, taps=f.last(0, 3))),
    }


def transposed_rejected_if_not_empty(f: Function):
    x, w = f.x, f.w
    return {
        "no filters": lambda n, c: call(x(n, c), w(k=0, c=c)),
        "output_padding": lambda n, c: call(x(n, c), w(c=c), output_padding=1),
        "output of size 0": lambda n, c: call(x(n, c), w(c=c), padding=4),
    }


REJECTED_IF_NOT_EMPTY = tables(rejected_if_not_empty, None, transposed_rejected_if_not_empty)


@rows(REJECTED_IF_NOT_EMPTY)
def test_empty_input_has_the_same_rules(name, entry, make):
    full = outcome(theirs_of(name), make(1, 4))
    # Transposed, no channels are too few for any number of groups.
    for made in (make(0, 4),) if BY_NAME[name].transposed else (make(0, 4), make(2, 0), make(0, 0)):
        assert type(outcome(ENTRIES[name, entry], made)) is type(full)
        assert not YARDSTICK or isinstance(outcome(theirs_of(name), made), (Tensor, IndexError))


@entries([f.name for f in FUNCTIONS if not f.transposed])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_bias_dtype_with_a_padding_string(name, entry, padding):
    """torch compares the dtypes of input and bias unless padding is a string and the kernel is its own."""
    f = BY_NAME[name]
    for made in (
        call(f.x(dtype=torch.float64), f.w(dtype=torch.float64), b(), padding=padding),
        call(f.x(n=1), f.w(), b(dtype=torch.float64), padding=padding),
    ):
        assert not YARDSTICK or isinstance(outcome(theirs_of(name), made), Tensor)
        ours = outcome(ENTRIES[name, entry], made)
        assert type(ours) is RuntimeError
        assert "expected scalar type" in str(ours)


@each_transposed_entry
def test_bias_dtype_of_a_transposed_convolution(name, entry):
    """torch does not compare the dtypes of input and bias, and its kernels for one and two dimensions add any."""
    f = BY_NAME[name]
    for made in (
        call(f.x(dtype=torch.float64), f.w(dtype=torch.float64), b()),
        call(f.x(n=1), f.w(), b(dtype=torch.float64)),
    ):
        assert not YARDSTICK or isinstance(outcome(theirs_of(name), made), Tensor) == (f.rank < 3)
        ours = outcome(ENTRIES[name, entry], made)
        assert type(ours) is RuntimeError
        assert "expected scalar type" in str(ours)


@each_transposed_entry
def test_transposed_dilation_0_of_one_tap(name, entry):
    """oneDNN takes it, torch's own kernels do not."""
    f = BY_NAME[name]
    made = call(f.x(), f.w(taps=1), dilation=0)
    assert not YARDSTICK or isinstance(outcome(theirs_of(name), made), Tensor) == (f.rank < 3)
    ours = outcome(ENTRIES[name, entry], made)
    assert type(ours) is RuntimeError
    assert "dilation" in str(ours)


@each_transposed_entry
def test_transposed_output_without_pixels(name, entry):
    """oneDNN returns it, torch's own kernels do not."""
    f = BY_NAME[name]
    made = call(f.x(), f.w(), padding=4)
    assert not YARDSTICK or isinstance(outcome(theirs_of(name), made), Tensor)
    ours = outcome(ENTRIES[name, entry], made)
    assert type(ours) is RuntimeError
    assert "Output size is too small" in str(ours)


@each_transposed_entry
def test_transposed_beyond_32_bits(name, entry):
    """torch's own kernels keep stride and dilation in 32 bits, and compute with what is left of them."""
    f = BY_NAME[name]
    one_pixel = f.x(size=1)
    wrapped = [call(one_pixel, f.w(), stride=2**32 + 1), call(one_pixel, f.w(taps=1), dilation=2**32 + 1)]
    assert not YARDSTICK or all(isinstance(outcome(theirs_of(name), made), Tensor) for made in wrapped)
    # Not to be asked of torch: the process ends in oneDNN.
    for made in (*wrapped, call(one_pixel, f.w(), stride=2**31 - 1)):
        ours = outcome(ENTRIES[name, entry], made)
        assert type(ours) is RuntimeError
        assert "at most 2147483646" in str(ours)


@each_entry
def test_one_number_as_array_or_bool_tensor(name, entry):
    """torch's parser takes them in some places and fails an internal assertion in others."""
    f, theirs, function = BY_NAME[name], theirs_of(name), ENTRIES[name, entry]
    x, w = f.x(), f.w()
    if YARDSTICK:
        assert "INTERNAL ASSERT" in str(outcome(theirs, call(x, w, stride=np.array(2))))
        assert isinstance(outcome(theirs, call(x, w, stride=torch.tensor(True))), Tensor)
        assert isinstance(outcome(theirs, call(x, w, groups=torch.tensor(True))), RuntimeError)
    for number in (np.array(2), np.int64(2), torch.tensor(2)):
        ours, expected = function(x, w, stride=number), function(x, w, stride=2)
        assert torch.equal(ours, expected) if isinstance(ours, Tensor) else ours == expected
    for argument in ("stride", "groups"):
        assert type(outcome(function, call(x, w, **{argument: torch.tensor(True)}))) is TypeError


@each_entry
@pytest.mark.parametrize(
    "fault",
    [{"padding": -1}, {"stride": 0}, {"dilation": 0}, {"dilation": -1}, {"stride": (1, 1, 1, 1)}, {"bias": b(7)}],
    ids=str,
)
def test_meta_accepts_only_what_the_cpu_accepts(name, entry, fault):
    """torch's meta conv returns a shape or divides by zero here."""
    f = BY_NAME[name]
    made = at("meta", call(f.x(), f.w(), **fault))
    assert not YARDSTICK or not isinstance(outcome(theirs_of(name), made), RuntimeError)
    assert type(outcome(ENTRIES[name, entry], made)) is RuntimeError


@pytest.mark.checkout
def test_differences_are_tested():
    """Each test that docs/differences.md names exists."""
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (tests.parent / "docs/differences.md").read_text())
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"^ *def {test}\(", (tests / f"{file}.py").read_text(), re.MULTILINE), f"{file}::{test}"


# -- what torch accepts ------------------------------------------------------------------------------------------------


def normal(stride, padding, dilation, groups, pad_extra, output_padding=None) -> ConvArgs:
    """The arguments but for the size of the output, which torch's output says."""
    return ConvArgs(stride, padding, dilation, output_padding or (0,) * len(stride), groups, (), pad_extra)


def normal_of(f, stride=1, padding=0, dilation=1, groups=1, pad_extra=None, output_padding=0) -> ConvArgs:
    return normal(f.sides(stride), f.sides(padding), f.sides(dilation), groups, pad_extra, f.sides(output_padding))


ONE, TWO, NONE = (1, 1), (2, 2), (0, 0)
CONV2D_ACCEPTED = {
    "defaults": (lambda: call(x(), w()), normal(ONE, NONE, ONE, 1, None)),
    "ints": (lambda: call(x(), w(), b(), 2, 1, 2), normal(TWO, ONE, TWO, 1, None)),
    "one-element tuples": (lambda: call(x(), w(), b(), (2,), (1,), (2,)), normal(TWO, ONE, TWO, 1, None)),
    "tuples": (lambda: call(x(), w(), b(), (1, 2), (3, 1), (2, 1)), normal((1, 2), (3, 1), (2, 1), 1, None)),
    "lists": (lambda: call(x(), w(), b(), [1, 2], [3, 1], [2, 1]), normal((1, 2), (3, 1), (2, 1), 1, None)),
    "torch.Size": (lambda: call(x(), w(), stride=torch.Size((1, 2))), normal((1, 2), NONE, ONE, 1, None)),
    "numpy ints": (
        lambda: call(x(), w(8, 2, 3, 3), None, np.int64(2), (np.int32(1), np.uint8(0)), 1, np.int64(2)),
        normal(TWO, (1, 0), ONE, 2, None),
    ),
    "int tensors": (
        lambda: call(
            x(), w(), stride=torch.tensor(2), padding=(torch.tensor(1), torch.tensor([0])), groups=torch.tensor(1)
        ),
        normal(TWO, (1, 0), ONE, 1, None),
    ),
    "late bool": (lambda: call(x(), w(), stride=(2, True)), normal((2, 1), NONE, ONE, 1, None)),
    "groups": (lambda: call(x(), w(8, 2, 3, 3), groups=2), normal(ONE, NONE, ONE, 2, None)),
    "depthwise": (lambda: call(x(), w(8, 1, 3, 3), groups=4), normal(ONE, NONE, ONE, 4, None)),
    "valid": (lambda: call(x(), w(), padding="valid", stride=2), normal(TWO, NONE, ONE, 1, None)),
    "same": (lambda: call(x(), w(), padding="same"), normal(ONE, ONE, ONE, 1, None)),
    "same, numpy string": (lambda: call(x(), w(), padding=np.str_("same")), normal(ONE, ONE, ONE, 1, None)),
    "same, bytes": (lambda: call(x(), w(), padding=b"same"), normal(ONE, ONE, ONE, 1, None)),
    "same, one-element lists": (
        lambda: call(x(), w(), None, [1], "same", [2]),
        normal(ONE, TWO, TWO, 1, None),
    ),
    "same, even": (lambda: call(x(), w(8, 4, 2, 4), padding="same"), normal(ONE, (0, 1), ONE, 1, (0, 1, 0, 1))),
    "same, even height": (
        lambda: call(x(), w(8, 4, 4, 3), padding="same"),
        normal(ONE, ONE, ONE, 1, (0, 0, 0, 1)),
    ),
    "same, even width": (
        lambda: call(x(), w(8, 4, 1, 2), padding="same"),
        normal(ONE, NONE, ONE, 1, (0, 1, 0, 0)),
    ),
    "same, even, dilated by 2": (
        lambda: call(x(), w(8, 4, 2, 2), padding="same", dilation=2),
        normal(ONE, ONE, TWO, 1, None),
    ),
    "same, even, dilated by 3": (
        lambda: call(x(), w(8, 4, 2, 2), padding="same", dilation=3),
        normal(ONE, ONE, (3, 3), 1, (0, 1, 0, 1)),
    ),
    "same, chw": (
        lambda: call(x(4, 6, 6), w(8, 4, 2, 2), padding="same"),
        normal(ONE, NONE, ONE, 1, (0, 1, 0, 1)),
    ),
    "chw": (lambda: call(x(4, 6, 6), w(), b()), normal(ONE, NONE, ONE, 1, None)),
    "kernel as large as the padded input": (
        lambda: call(x(), w(8, 4, 8, 8), padding=1),
        normal(ONE, ONE, ONE, 1, None),
    ),
    "stride 2**40": (lambda: call(x(), w(), stride=2**40), normal((2**40, 2**40), NONE, ONE, 1, None)),
    "padding beyond the kernel": (lambda: call(x(), w(), padding=5), normal(ONE, (5, 5), ONE, 1, None)),
    "empty batch": (lambda: call(x(0, 4, 6, 6), w(), b()), normal(ONE, NONE, ONE, 1, None)),
    "empty batch, height 0": (
        lambda: call(x(0, 4, 0, 6), w(), padding=2),
        normal(ONE, TWO, ONE, 1, None),
    ),
    "no channels": (lambda: call(x(2, 0, 6, 6), w(8, 0, 3, 3)), normal(ONE, NONE, ONE, 1, None)),
    "no channels, chw": (lambda: call(x(0, 6, 6), w(8, 0, 3, 3)), normal(ONE, NONE, ONE, 1, None)),
    "no channels, two groups": (
        lambda: call(x(2, 0, 6, 6), w(8, 0, 3, 3), groups=2),
        normal(ONE, NONE, ONE, 2, None),
    ),
    **{
        f"{dtype}": (
            lambda dtype=dtype: call(x(dtype=dtype), w(dtype=dtype), b(dtype=dtype), 1, 1),
            normal(ONE, ONE, ONE, 1, None),
        )
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.complex64)
    },
    "int64, dilated": (
        lambda: call(x(dtype=torch.int64), w(dtype=torch.int64), dilation=2),
        normal(ONE, NONE, TWO, 1, None),
    ),
}


def accepted(f: Function):
    """Rows for all functions."""
    x, w, last = f.x, f.w, f.last
    args = partial(normal_of, f)
    return {
        "defaults": (lambda: call(x(), w()), args()),
        "ints": (lambda: call(x(), w(), b(), 2, 1, dilation=2), args(2, 1, 2)),
        "one-element tuples": (lambda: call(x(), w(), b(), (2,), (1,), dilation=(2,)), args(2, 1, 2)),
        "tuples": (
            lambda: call(x(), w(), stride=last(2, 1), padding=last(1, 3), dilation=last(1, 2)),
            args(last(2, 1), last(1, 3), last(1, 2)),
        ),
        "lists": (
            lambda: call(x(), w(), stride=list(last(2, 1)), padding=list(last(1, 3))),
            args(last(2, 1), last(1, 3)),
        ),
        "numpy ints": (
            lambda: call(x(), w(groups=2), stride=np.int64(2), padding=last(np.uint8(0), 1), groups=np.int64(2)),
            args(2, last(0, 1), 1, 2),
        ),
        "int tensors": (
            lambda: call(x(), w(), stride=torch.tensor(2), padding=last(torch.tensor([0]), 1), groups=torch.tensor(1)),
            args(2, last(0, 1)),
        ),
        "groups": (lambda: call(x(), w(groups=2), b(), groups=2), args(groups=2)),
        "depthwise": (lambda: call(x(), w(groups=4), b(), groups=4), args(groups=4)),
        "unbatched": (lambda: call(x(n=None), w(), b()), args()),
        "1 tap": (lambda: call(x(), w(taps=1), padding=0, stride=3), args(3)),
        "empty batch": (lambda: call(x(n=0), w(), b()), args()),
        **{
            f"{dtype}": (lambda dtype=dtype: call(x(dtype=dtype), w(dtype=dtype), b(dtype=dtype), 1, 1), args(1, 1))
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.complex128)
        },
        "int64, dilated": (
            lambda: call(x(dtype=torch.int64), w(dtype=torch.int64), dilation=2),
            args(dilation=2),
        ),
    }


def accepted_convolutions(f: Function):
    x, w, last = f.x, f.w, f.last
    nothing = (0, 0) * (f.rank - 1)
    args = partial(normal_of, f)
    return {
        "positions": (lambda: call(x(), w(groups=2), b(), 2, 1, 2, 2), args(2, 1, 2, 2)),
        "valid": (lambda: call(x(), w(), padding="valid", stride=2), args(2)),
        "same": (lambda: call(x(), w(), padding="same"), args(padding=1)),
        "same, bytes": (lambda: call(x(), w(), padding=b"same"), args(padding=1)),
        "same, one-element lists": (lambda: call(x(), w(), None, [1], "same", [2]), args(1, 2, 2)),
        "same, even": (lambda: call(x(), w(taps=4), padding="same"), args(padding=1, pad_extra=(0, 1) * f.rank)),
        "same, even in the last place": (
            lambda: call(x(), w(taps=last(2, 3)), padding="same"),
            args(padding=last(0, 1), pad_extra=(0, 1, *nothing)),
        ),
        "same, even in the first place": (
            lambda: call(x(), w(taps=last(2, 3)[::-1]), padding="same"),
            args(padding=last(0, 1)[::-1], pad_extra=(*nothing, 0, 1)),
        ),
        "same, even, dilated by 2": (lambda: call(x(), w(taps=2), padding="same", dilation=2), args(1, 1, 2)),
        "same, unbatched": (
            lambda: call(x(n=None), w(taps=2), padding="same"),
            args(pad_extra=(0, 1) * f.rank),
        ),
        "kernel as large as the padded input": (lambda: call(x(), w(taps=8), padding=1), args(padding=1)),
        "stride 2**40": (lambda: call(x(), w(), stride=2**40), args(2**40)),
        "empty batch, no pixels": (lambda: call(x(n=0, size=0), w(), padding=2), args(padding=2)),
        "no channels": (lambda: call(x(c=0), w(c=0)), args()),
        "no channels, unbatched": (lambda: call(x(n=None, c=0), w(c=0)), args()),
        "no channels, no pixels": (lambda: call(x(c=0, size=0), w(c=0), padding=2), args(padding=2)),
        "no channels, two groups": (lambda: call(x(c=0), w(c=0), groups=2), args(groups=2)),
        "int8": (lambda: call(x(dtype=torch.int8), w(dtype=torch.int8)), args()),
    }


def accepted_transposed(f: Function):
    x, w, last = f.x, f.w, f.last
    args = partial(normal_of, f)
    return {
        "positions": (lambda: call(x(), w(groups=2), b(), 2, 1, 1, 2, 3), args(2, 1, 3, 2, output_padding=1)),
        "output_padding": (lambda: call(x(), w(), stride=2, output_padding=1), args(2, output_padding=1)),
        "output_padding, unbatched": (
            lambda: call(x(n=None), w(), stride=2, output_padding=1),
            args(2, output_padding=1),
        ),
        "output_padding, one-element list": (
            lambda: call(x(), w(), stride=[2], output_padding=[1]),
            args(2, output_padding=1),
        ),
        "output_padding, tuple": (
            lambda: call(x(), w(), stride=2, output_padding=last(1, 0)),
            args(2, output_padding=last(1, 0)),
        ),
        "output_padding, int tensor": (
            lambda: call(x(), w(), stride=2, output_padding=torch.tensor(1)),
            args(2, output_padding=1),
        ),
        "output_padding, empty batch": (
            lambda: call(x(n=0), w(), stride=2, output_padding=1),
            args(2, output_padding=1),
        ),
        "output_padding below dilation alone": (
            lambda: call(x(), w(), dilation=3, output_padding=2),
            args(dilation=3, output_padding=2),
        ),
        "output_padding below stride or dilation": (
            lambda: call(x(), w(), stride=last(3, 1), dilation=last(1, 3), output_padding=2),
            args(last(3, 1), 0, last(1, 3), output_padding=2),
        ),
        "output of one pixel": (lambda: call(x(), w(taps=2), padding=3), args(1, 3)),
        "output_padding of one pixel": (
            lambda: call(x(), w(taps=2), stride=2, padding=6, output_padding=1),
            args(2, 6, output_padding=1),
        ),
        # Without images: for such a stride torch's transposed kernels take minutes, leave memory unwritten, or crash.
        "stride 2**31 - 2": (lambda: call(x(n=0, size=1), w(), stride=2**31 - 2), args(2**31 - 2)),
        "dilation 2**31 - 2": (lambda: call(x(), w(taps=1), dilation=2**31 - 2), args(dilation=2**31 - 2)),
        "empty batch, no pixels": (lambda: call(x(n=0, size=0), w()), args()),
        "more filters than channels": (lambda: call(x(c=2), w(k=12, c=2)), args()),
    }


ACCEPTED = tables(accepted, accepted_convolutions, accepted_transposed, CONV2D_ACCEPTED)


def accepted_rows(names):
    return pytest.mark.parametrize(
        "name, make, args",
        [pytest.param(name, *row, id=f"{name}-{case}") for name in names for case, row in ACCEPTED[name].items()],
    )


@accepted_rows(NAMES)
def test_accepted_and_normalised(name, make, args):
    f, made = BY_NAME[name], make()
    theirs = outcome(theirs_of(name), made)
    assert isinstance(theirs, Tensor)
    padding = made.kwargs.get("padding", made.args[4] if len(made.args) > 4 else 0)
    mode = padding.decode() if isinstance(padding, bytes) else padding if isinstance(padding, str) else None
    for place in PLACES:
        moved = at(place, made)
        normalised = CHECKS[name](*moved.args, **moved.kwargs)
        assert normalised == args._replace(output_size=tuple(theirs.shape[-f.rank :]), mode=mode), place
        assert all(type(value) is int for value in itertools.chain(*normalised[:4], [normalised.groups]))

    input, weight = made.args[:2]
    operands = (
        input if args.pad_extra is None else F.pad(input, args.pad_extra),
        weight,
        made.args[2] if len(made.args) > 2 else None,
    )
    if f.transposed:
        options = (args.stride, args.padding, args.output_padding, args.groups, args.dilation)
    else:
        options = (args.stride, args.padding, args.dilation, args.groups)
    torch.testing.assert_close(theirs_of(name)(*operands, *options), theirs)


@accepted_rows(NAMES)
def test_accepted_by_the_public_function(name, make, args):
    made = make()
    ours = outcome(getattr(tritune, name), made)
    assert isinstance(ours, Tensor), ours
    torch.testing.assert_close(ours, outcome(theirs_of(name), made))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@each_function
def test_left_to_torch(f):
    """Layouts that are torch's own affair pass the check; torch serves or rejects them."""
    quantised = torch.quantize_per_tensor(f.x(), 0.1, 0, torch.quint8)
    weight = f.w(dtype=torch.int8)
    for made in (call(f.x().to_sparse(), f.w()), call(f.x().to_mkldnn(), f.w()), call(quantised, weight)):
        assert isinstance(outcome(CHECKS[f.name], made), ConvArgs)


# -- our own keywords --------------------------------------------------------------------------------------------------


@each_entry
def test_keywords_accepted(name, entry):
    f, function = BY_NAME[name], ENTRIES[name, entry]
    x, w = f.x, f.w
    for activation in (None, *ACTIVATIONS):
        assert not isinstance(outcome(function, call(x(), w(), activation=activation)), Exception)
    for precision in (None, *PRECISIONS):
        assert not isinstance(outcome(function, call(x(), w(), precision=precision)), Exception)
    calls = [
        call(x(), w(), b()),
        call(x(n=None), w()),
        call(x(), w(groups=2), groups=2),
        call(x(n=0), w()),
        call(x(), w(), stride=f.last(2, 1), padding=f.last(1, 2), dilation=f.last(2, 1)),
    ]
    if f.transposed:
        calls += [call(x(), w(), stride=2, output_padding=1)]
    else:
        calls += [call(x(), w(taps=f.last(2, 3)), padding="same"), call(x(c=0), w(c=0))]
    for made in calls:
        keywords = {"residual": theirs_of(name)(*made.args, **made.kwargs), "scale": b()}
        ours = outcome(function, Call(made.args, made.kwargs | keywords))
        assert not isinstance(ours, Exception), (made, ours)


CONV2D_KEYWORDS_REJECTED = {
    "activation unknown": (lambda: call(x(), w(), activation="swish"), ValueError, "'relu', 'relu6'.*'tanh'"),
    "activation function": (lambda: call(x(), w(), activation=torch.relu), ValueError, "'relu'"),
    "precision unknown": (lambda: call(x(), w(), precision="highest"), ValueError, "'ieee', 'tf32', 'tf32x3'"),
    "scale float": (lambda: call(x(), w(), scale=2.0), TypeError, "'scale' must be Tensor, not float"),
    "scale 0-d": (lambda: call(x(), w(), scale=torch.tensor(1.0)), RuntimeError, r"shape \[8\], but got .* \[\]"),
    "scale shape": (lambda: call(x(), w(), scale=b(4)), RuntimeError, r"shape \[8\], but got .* \[4\]"),
    "scale 4-d": (lambda: call(x(), w(), scale=b(1, 8, 1, 1)), RuntimeError, r"shape \[8\]"),
    "scale dtype": (lambda: call(x(), w(), scale=b(dtype=torch.float64)), RuntimeError, "torch.float32 tensor"),
    "residual float": (lambda: call(x(), w(), residual=1.0), TypeError, "'residual' must be Tensor, not float"),
    "residual shape": (lambda: call(x(), w(), residual=x(2, 8, 4, 5)), RuntimeError, r"shape \[2, 8, 4, 4\]"),
    "residual broadcast": (lambda: call(x(), w(), residual=x(1, 8, 1, 1)), RuntimeError, r"shape \[2, 8, 4, 4\]"),
    "residual unbatched": (lambda: call(x(), w(), residual=x(8, 4, 4)), RuntimeError, r"shape \[2, 8, 4, 4\]"),
    "residual batched": (lambda: call(x(4, 6, 6), w(), residual=x(1, 8, 4, 4)), RuntimeError, r"shape \[8, 4, 4\]"),
    "residual dtype": (
        lambda: call(x(), w(), residual=x(2, 8, 4, 4, dtype=torch.float64)),
        RuntimeError,
        "residual must be a torch.float32 tensor",
    ),
    "residual without channels": (
        lambda: call(x(2, 0, 6, 6), w(8, 0, 3, 3), residual=x(2, 8, 4, 4)),
        RuntimeError,
        r"shape \[2, 0, 4, 4\]",
    ),
    "torch's errors come first": (
        lambda: call(x(), w(), padding=-1, activation="swish"),
        RuntimeError,
        "negative padding",
    ),
}


def keywords_rejected(f: Function):
    """Rows for all functions."""
    x, w = f.x, f.w
    output = theirs_of(f.name)(x(), w())
    fault = f"shape {re.escape(str(list(output.shape)))}"
    return {
        "scale float": (lambda: call(x(), w(), scale=2.0), TypeError, f"{f.name}.*'scale' must be Tensor, not float"),
        "residual float": (
            lambda: call(x(), w(), residual=1.0),
            TypeError,
            f"{f.name}.*'residual' must be Tensor, not float",
        ),
        "scale of the channels": (lambda: call(x(), w(), scale=b(4)), RuntimeError, r"shape \[8\], but got .* \[4\]"),
        "scale of a group": (
            lambda: call(x(), w(groups=2), groups=2, scale=b(4)),
            RuntimeError,
            r"shape \[8\], but got .* \[4\]",
        ),
        "residual of the input": (lambda: call(x(), w(), residual=x()), RuntimeError, fault),
        "residual unbatched": (lambda: call(x(), w(), residual=output[0]), RuntimeError, fault),
        "residual batched": (
            lambda: call(x(n=None), w(), residual=output[:1]),
            RuntimeError,
            f"shape {re.escape(str(list(output.shape[1:])))}",
        ),
        "residual dtype": (lambda: call(x(), w(), residual=output.double()), RuntimeError, "torch.float32 tensor"),
        "activation unknown": (lambda: call(x(), w(), activation="swish"), ValueError, "'relu', 'relu6'.*'tanh'"),
        "precision unknown": (lambda: call(x(), w(), precision="high"), ValueError, "'ieee', 'tf32', 'tf32x3'"),
        "torch's errors come first": (
            lambda: call(x(), w(), padding=-1, activation="swish"),
            RuntimeError,
            "negative padding",
        ),
    }


KEYWORDS_REJECTED = tables(keywords_rejected, of_conv2d=CONV2D_KEYWORDS_REJECTED)


@rows(KEYWORDS_REJECTED)
def test_keywords_rejected(name, entry, make):
    make, kind, text = make
    for place in PLACES:
        made = at(place, make())
        with pytest.raises(kind, match=text) as caught:
            ENTRIES[name, entry](*made.args, **made.kwargs)
        assert caught.type is kind


@each_entry
def test_keywords_on_another_device(name, entry):
    f = BY_NAME[name]
    for keyword, tensor in (("residual", theirs_of(name)(f.x(), f.w())), ("scale", b())):
        with pytest.raises(RuntimeError, match="same device, but got " + keyword):
            ENTRIES[name, entry](f.x(), f.w(), **{keyword: tensor.to("meta")})


@each_entry
def test_keywords_are_keyword_only(name, entry):
    f = BY_NAME[name]
    with pytest.raises(TypeError):
        ENTRIES[name, entry](f.x(), f.w(), None, *((1, 0, 0, 1, 1) if f.transposed else (1, 0, 1, 1)), "relu")


# -- any call ----------------------------------------------------------------------------------------------------------


class Draw:
    """Random calls, most of them legal but for one or two faults."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mostly(self, usual, *odd, chance: float = 0.1):
        return self.random.choice(odd) if self.random.random() < chance else usual

    def form(self, value: int, rank: int):
        other = (*(value,) * (rank - 1), 1)
        return self.random.choice(
            (value, (value,) * rank, other, [value], [value] * rank, other[::-1], (value,) * (rank + 1), ())
        )

    def function(self) -> Function:
        return self.random.choice(FUNCTIONS)

    def call(self, f: Function) -> Call:
        rnd, mostly = self.random, self.mostly
        groups = mostly(rnd.choice((1, 1, 2)), 0, -1, 3)
        channels = mostly(rnd.randint(1, 3), 0) * max(groups, 1)
        filters = mostly(rnd.choice((2, 4)), 0, 1, 3)
        batch = mostly(rnd.randint(1, 3), 0)
        pixels = [mostly(rnd.randint(1, 7), 0, chance=0.1 / f.rank) for _ in range(f.rank)]
        taps = [mostly(rnd.randint(1, 4), 0, 5, 8, chance=0.1 / f.rank) for _ in range(f.rank)]
        full = (batch, mostly(channels, channels + 1), *pixels)
        shape = mostly(rnd.choice((full, full, full[1:])), full[2:], (1, *full), chance=0.05)
        kernel = list(f.w(filters, channels, tuple(taps), max(groups, 1)).shape)
        kernel = mostly(kernel, kernel[:-1], kernel[:2], [*kernel, 1], chance=0.05)
        dtype = mostly(torch.float32, *DTYPES, chance=0.3)
        right = kernel[1] * max(groups, 1) if f.transposed else filters
        bias = mostly((right,), None, (right + 1,), (1, right), ())
        padding = self.form(mostly(rnd.randint(0, 3), -1), f.rank)
        kwargs = {
            "stride": self.form(mostly(rnd.randint(1, 3), 0, -1), f.rank),
            "padding": padding if f.transposed else mostly(padding, "same", "valid", "full", chance=0.4),
            "dilation": self.form(mostly(rnd.randint(1, 3), 0, -1), f.rank),
            "groups": groups,
        }
        if f.transposed:
            kwargs["output_padding"] = self.form(mostly(rnd.randint(0, 2), -1), f.rank)
        return call(
            torch.ones(shape).to(dtype),
            torch.ones(kernel).to(mostly(dtype, *DTYPES, chance=0.05)),
            None if rnd.random() < 0.4 or bias is None else torch.ones(bias).to(mostly(dtype, *DTYPES, chance=0.05)),
            **{name: value for name, value in kwargs.items() if rnd.random() < 0.6 or name == "groups"},
        )


def is_listed_difference(f: Function, made: Call, theirs) -> bool:
    """docs/differences.md: torch skips the operands of an empty convolution, and sometimes the dtype of the bias;
    oneDNN takes what torch's own kernels do not."""
    input, weight, bias = made.args
    padding, dilation = made.kwargs.get("padding"), made.kwargs.get("dilation", 1)
    images = input.shape[-f.rank - 1 :]
    is_batched = input.dim() == f.rank + 2
    nothing_to_compute = input.dim() > f.rank and (images[0] == 0 or (is_batched and input.shape[0] == 0))
    no_taps = weight.dim() == f.rank + 2 and (0 in weight.shape[2:] or (f.transposed and weight.shape[1] == 0))
    bias_unseen = bias is not None and bias.dtype != input.dtype and (f.transposed or isinstance(padding, str))
    cropped = padding == "same" and input.dim() > f.rank and 0 in images[1:]
    accepted = isinstance(theirs, Tensor)
    taken_by_onednn = f.transposed and accepted and (0 in np.ravel(dilation) or 0 in theirs.shape[-f.rank :])
    return nothing_to_compute or no_taps or bias_unseen or cropped or taken_by_onednn


ONEDNN_SPEAKS = ("could not create a primitive", "could not construct a memory descriptor", "dimensions are invalid")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_random_calls():
    draw = Draw(seed=20261130)
    accepted, rejected = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    while min(*accepted.values(), *rejected.values()) < 100:
        f = draw.function()
        made = draw.call(f)
        theirs, ours = outcome(theirs_of(f.name), made), outcome(CHECKS[f.name], made)
        if is_listed_difference(f, made, theirs):
            assert isinstance(ours, Exception) or isinstance(theirs, Tensor), f"we accept {f.name}{made}"
            continue
        if isinstance(theirs, Exception):
            rejected[f.name] += 1
            assert_same_error(theirs, ours, made, compare_text=not str(theirs).startswith(ONEDNN_SPEAKS))
        else:
            accepted[f.name] += 1
            assert isinstance(ours, ConvArgs), f"torch accepts {f.name}{made}, we say {ours!r}"
            assert ours.output_size == tuple(theirs.shape[-f.rank :]), f"{f.name}{made}"
        meta = outcome(CHECKS[f.name], at("meta", made))
        assert (type(meta), str(meta)) == (type(ours), str(ours)), made


def test_random_residuals():
    """The output shape by which a residual is judged is torch's."""
    draw = Draw(seed=20261201)
    for _ in range(600):
        f = draw.function()
        made = draw.call(f)
        theirs = outcome(theirs_of(f.name), made)
        if isinstance(theirs, Tensor) and not is_listed_difference(f, made, theirs):
            CHECKS[f.name](*made.args, **made.kwargs, residual=theirs)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@each_function
def test_traced_with_symbolic_sizes(f):
    """Dynamo traces the check in one graph that serves other batch and image sizes."""
    graphs = []
    options = {"stride": 2, "output_padding": 1} if f.transposed else {"padding": "same", "dilation": f.last(1, 2)}
    theirs = theirs_of(f.name)

    def keep(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=keep)
    def function(input, weight, bias, residual):
        args = CHECKS[f.name](input, weight, bias, **options, activation="relu", residual=residual)
        if args.pad_extra is not None:
            input = F.pad(input, args.pad_extra)
        normalised = {"stride": args.stride, "padding": args.padding, "dilation": args.dilation, "groups": args.groups}
        if f.transposed:
            normalised["output_padding"] = args.output_padding
        return theirs(input, weight, bias, **normalised)

    kernel = f.w(taps=f.last(4, 2))
    for n, size in ((2, (6, 7, 5)), (3, (9, 4, 6)), (5, (4, 30, 7))):
        input = f.x(n, size=size[-f.rank :])
        expected = outcome(theirs, call(input, kernel, b(), **options))
        residual = torch.ones(expected.shape)
        for dim in (0, *range(2, f.rank + 2)):
            torch._dynamo.mark_dynamic(input, dim)
            torch._dynamo.mark_dynamic(residual, dim)
        torch.testing.assert_close(function(input, kernel, b(), residual), expected)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@each_entry
def test_nested_tensors(name, entry, layout):
    # docs/differences.md: torch rejects them with errors of several types, from deep inside.
    f, function = BY_NAME[name], ENTRIES[name, entry]
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    for operands in ((nested, f.w()), (f.x(), nested), (f.x(), f.w(), nested)):
        with pytest.raises(NotImplementedError, match="nested tensor"):
            function(*operands)
