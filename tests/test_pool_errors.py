"""The poolings reject what torch rejects, with torch's exception type and text, and accept the forms torch accepts."""

import itertools
import math
import random
import re
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import lp_pool
from torch import Tensor
from torch_errors import PLACES, YARDSTICK, Call, assert_same_error, at, call, outcome

import tritune
from tritune.ops.pool_checks import (
    PoolArgs,
    check_adaptive_pool,
    check_avg_pool,
    check_global_pool,
    check_lp_pool,
    check_max_pool,
    check_max_unpool,
)

pytestmark = pytest.mark.torch

KINDS: dict[str, dict[str, Any]] = {
    "max_pool": {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    "avg_pool": {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None},
    "lp_pool": {"stride": None, "ceil_mode": False},
    "adaptive_avg_pool": {},
    "adaptive_max_pool": {"return_indices": False},
    "max_unpool": {"stride": None, "padding": 0, "output_size": None},
}
"""The arguments that follow those without a default, in torch's order."""

CHECKS = {
    "max_pool": check_max_pool,
    "avg_pool": check_avg_pool,
    "lp_pool": check_lp_pool,
    "adaptive_avg_pool": lambda rank, *args, **kwargs: check_adaptive_pool(rank, "avg", *args, **kwargs),
    "adaptive_max_pool": lambda rank, *args, **kwargs: check_adaptive_pool(rank, "max", *args, **kwargs),
    "max_unpool": check_max_unpool,
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Function(NamedTuple):
    """One of the eighteen, with operands for it: two images of 3 channels and 6 pixels a side."""

    kind: str
    rank: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.rank}d"

    @property
    def theirs(self):
        return lp_pool(self.rank) if self.kind == "lp_pool" else getattr(F, self.name)

    @property
    def check(self):
        return partial(CHECKS[self.kind], self.rank)

    @property
    def has_windows(self) -> bool:
        return self.kind in ("max_pool", "avg_pool", "lp_pool")

    @property
    def lists(self) -> tuple[str, ...]:
        """The arguments that are one int or several."""
        return ("kernel_size", *(name for name in ("stride", "padding", "dilation") if name in KINDS[self.kind]))

    def x(self, n=2, c=3, size=6, dtype=torch.float32) -> Tensor:
        return torch.ones(*([] if n is None else [n]), c, *self.sides(size)).to(dtype)

    def channels_last(self, *args, **kwargs) -> Tensor:
        x = self.x(*args, **kwargs)
        return x.contiguous(memory_format=FORMATS[x.dim()])

    def sides(self, value):
        return value if isinstance(value, tuple) else (value,) * self.rank

    def last(self, value, others):
        """``value`` in the last dimension."""
        return (*((others,) * (self.rank - 1)), value)

    def call(self, input, **given) -> Call:
        """The call with what is given and its defaults, by position: of these torch's texts name the position."""
        arguments: dict[str, Any] = {"kernel_size": 2, **KINDS[self.kind]}
        if self.kind == "lp_pool":
            arguments = {"norm_type": 2.0, **arguments}
        if self.kind == "max_unpool":
            indices = torch.zeros(input.shape, dtype=torch.int64) if isinstance(input, Tensor) else None
            arguments = {"indices": indices, **arguments}
        if self.kind.startswith("adaptive"):
            arguments = {"output_size": 2, **KINDS[self.kind]}
        assert given.keys() <= arguments.keys()
        names = list(arguments)
        last = max((names.index(name) for name in given), default=0)
        required = sum(name not in KINDS[self.kind] for name in names)
        return call(input, *list((arguments | given).values())[: max(last + 1, required)])


FUNCTIONS = tuple(Function(kind, rank) for kind, rank in itertools.product(KINDS, (1, 2, 3)))
PUBLIC = {f: getattr(tritune, f.name) for f in FUNCTIONS}
ENTRIES = {**{(f, "check"): f.check for f in FUNCTIONS}, **{(f, "public"): PUBLIC[f] for f in PUBLIC}}


def functions(*kinds):
    chosen = [f for f in FUNCTIONS if f.kind in (kinds or KINDS)]
    return pytest.mark.parametrize("f", chosen, ids=[f.name for f in chosen])


def entries(*kinds):
    chosen = [(f, entry) for f, entry in ENTRIES if f.kind in (kinds or KINDS)]
    return pytest.mark.parametrize("f, entry", chosen, ids=[f"{f.name}-{entry}" for f, entry in chosen])


def rows(table, chosen=tuple(ENTRIES)):
    """Each row of each function's table, for each of its entries."""
    return pytest.mark.parametrize(
        "f, entry, make",
        [
            pytest.param(f, entry, make, id=f"{f.name}-{entry}-{name}")
            for f, entry in chosen
            for name, make in table(f).items()
        ],
    )


def spatial(result) -> tuple[int, ...]:
    """What a validator says of the output's size."""
    return result.output_size if isinstance(result, PoolArgs) else result


def values_of(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


# -- what torch rejects ------------------------------------------------------------------------------------------------

NO_INTS = (1.0, np.bool_(True), np.float32(1), "1")
LARGEST = 2**31 - 1


def rejected(f: Function):
    if f.has_windows:
        return {
            f"{name}{form}": lambda make=make, given=given: make(given)
            for form, given in forms(f).items()
            for name, make in rejected_windows(f).items()
        } | (rejected_norms(f) if f.kind == "lp_pool" else {})
    return {"max_unpool": rejected_unpooling}.get(f.kind, rejected_adaptive)(f)


def forms(f: Function) -> dict[str, dict[str, Any]]:
    """Arguments that lead torch to another function, with checks of its own."""
    if f.kind == "max_pool":
        return {"": {}, ", indices": {"return_indices": True}}
    if f.kind == "lp_pool":
        return {"": {}, ", inf": {"norm_type": math.inf}}
    return {"": {}}


def rejected_windows(f: Function):
    x, last, sides, rank = f.x, f.last, f.sides, f.rank
    both = ("kernel_size", "stride")
    has_padding, has_dilation = "padding" in f.lists, "dilation" in f.lists

    def row(input=None, **arguments):
        return lambda given: f.call(x() if input is None else input(), **given | arguments)

    table = {
        # types
        **{
            f"{name} {value!r}": row(**{name: value})
            for name in f.lists
            for value in (*NO_INTS, True, (True,) * rank, last(1.0, 1), (None,) * rank, range(1, 1 + rank))
        },
        **{f"{name} None": row(**{name: None}) for name in f.lists if name != "stride"},
        **{f"ceil_mode {value!r}": row(stride=2, ceil_mode=value) for value in (None, 0, 1, "yes", np.bool_(True))},
        # lengths of lists and sizes of numbers
        **{
            f"{name} {values}": row(**{name: values})
            for name in f.lists
            for values in ((), [], (1,) * (rank + 1), [1] * 5, *([(1, 1)] if rank == 3 else []))
            if name != "stride" or values
        },
        **{f"{name} 2**63": row(**{name: 2**63}) for name in f.lists},
        **{f"{name} (..., 2**63)": row(**{name: last(2**63, 1)}) for name in f.lists},
        "kernel_size 2**31": row(kernel_size=2**31),
        "kernel_size 2**31-1": row(kernel_size=LARGEST),
        "kernel_size -2**31": row(kernel_size=-(2**31), stride=1),
        "kernel_size -2**31-1": row(kernel_size=-(2**31) - 1),
        "stride of too many and kernel_size 2**31": row(kernel_size=2**31, stride=(1,) * (rank + 1)),
        # dimensions
        "input 0-d": row(lambda: torch.tensor(1.0)),
        "input without channels": row(lambda: torch.ones(sides(6))),
        "input without channels and stride 0": row(lambda: torch.ones(sides(6)), stride=0),
        "input without channels and bad list": row(lambda: torch.ones(sides(6)), kernel_size=(1,) * (rank + 1)),
        "input of one more": row(lambda: torch.ones(1, 2, 3, *sides(6))),
        "no channels": row(lambda: x(c=0)),
        "no channels, unbatched": row(lambda: x(n=None, c=0)),
        "no channels, empty batch": row(lambda: x(n=0, c=0)),
        "no pixels": row(lambda: x(size=0)),
        **{
            f"no pixels in dimension {dim}": row(
                lambda dim=dim: x(size=tuple(0 if i == dim else 6 for i in range(rank)))
            )
            for dim in range(rank)
        },
        "no pixels, unbatched": row(lambda: x(n=None, size=last(0, 6))),
        # geometry
        **{f"{name} 0": row(**{name: 0}) for name in both},
        **{f"{name} negative": row(**{name: -1}) for name in both},
        "kernel_size 0, stride 1": row(kernel_size=0, stride=1),
        "kernel_size negative in one place": row(kernel_size=last(-1, 2), stride=1),
        "kernel_size negative and stride negative": row(kernel_size=-2, stride=-1),
        "stride 0 in one place": row(stride=last(0, 1)),
        "kernel above the size": row(kernel_size=7),
        "kernel above the size in one place": row(kernel_size=last(9, 2)),
        "kernel above the size, ceil_mode": row(kernel_size=8, stride=2, ceil_mode=True),
        "kernel above the size, unbatched": row(lambda: x(n=None), kernel_size=7),
        "kernel above the size, empty batch": row(lambda: x(n=0), kernel_size=7),
        # dtypes
        **{
            f"{str(dtype)[6:]}{name}": row(lambda dtype=dtype, input=input: input(dtype))
            for dtype in (
                torch.float8_e4m3fn,
                *([torch.bool, torch.complex32, torch.uint16] if f.kind != "lp_pool" else []),
            )
            for name, input in {
                "": lambda dtype: x(dtype=dtype),
                ", unbatched": lambda dtype: x(n=None, dtype=dtype),
                ", empty batch": lambda dtype: x(n=0, dtype=dtype),
            }.items()
        },
        "float8 and kernel above the size": row(lambda: x(dtype=torch.float8_e5m2), kernel_size=7),
    }
    if rank > 1:
        table |= {f"late {value!r}": row(kernel_size=last(value, 2)) for value in (1.0, None, "1", np.bool_(True))}
        table |= {
            "kernel above the size, channels last": row(f.channels_last, kernel_size=7),
            "float8, channels last": row(lambda: f.channels_last(dtype=torch.float8_e5m2)),
            "no channels, channels last": row(lambda: f.channels_last(c=0)),
        }
    if has_padding:
        table |= {
            "padding negative": row(stride=1, padding=-1),
            "padding negative in one place": row(stride=1, padding=last(-1, 0)),
            "padding over half": row(stride=1, padding=2),
            "padding over half in one place": row(kernel_size=3, stride=1, padding=last(2, 1)),
            "padding over half and no pixels": row(lambda: x(size=0), stride=1, padding=2),
            "padding negative and kernel_size negative": row(kernel_size=-1, stride=1, padding=-1),
            "padding of too many and stride of too many": row(stride=(1,) * (rank + 1), padding=(1,) * (rank + 1)),
        }
    if has_dilation:
        table |= {
            "dilation 0": row(stride=1, dilation=0),
            "dilation 0, padded": row(stride=1, padding=1, dilation=0),
            "dilation negative in one place": row(stride=1, dilation=last(-1, 1)),
            "dilation 2**31-1": row(dilation=LARGEST),
            "padding over half of taps, not of reach": row(kernel_size=3, stride=1, padding=2, dilation=2),
            "no pixels and padding over half of taps": row(
                lambda: x(size=0), kernel_size=3, stride=1, padding=2, dilation=2
            ),
            "padding over half, one tap": row(kernel_size=1, stride=1, padding=1, dilation=3),
            "stride negative and dilation 0": row(stride=-1, dilation=0),
            "dilation of too many and padding of too many": row(padding=(1,) * (rank + 1), dilation=(1,) * (rank + 1)),
        }
    if f.kind == "avg_pool":
        table |= {f"count_include_pad {value!r}": row(count_include_pad=value) for value in (None, 1, np.bool_(True))}
        table |= {"ceil_mode 1 and count_include_pad 1": row(ceil_mode=1, count_include_pad=1)}
        if rank > 1:
            table |= {
                f"divisor_override {value!r}": row(divisor_override=value)
                for value in (0, 1.0, "1", True, np.bool_(True), (1,), 2**63, -(2**63) - 1)
            }
            table |= {
                "divisor_override 0 and input without channels": row(lambda: torch.ones(sides(6)), divisor_override=0),
                "divisor_override 0 and padding over half": row(padding=2, divisor_override=0),
                "divisor_override 0 and padding of too many": row(padding=(0,) * 5, divisor_override=0),
            }
    return table


def rejected_norms(f: Function):
    def row(norm_type, dtype=torch.float32, **arguments):
        return lambda: f.call(f.x(dtype=dtype), norm_type=norm_type, **arguments)

    return {
        **{f"norm_type {value!r}": row(value) for value in (0, 0.0, False, 1j, 2**64, -(2**63) - 1)},
        "norm_type 0 and kernel above the size": row(0, kernel_size=7),
        "norm_type 2 of int32": row(2, torch.int32),
        "norm_type 2 of uint16": row(2, torch.uint16),
        "norm_type 2 of complex32": row(2, torch.complex32),
        "norm_type 2 of complex64": row(2, torch.complex64),
        "norm_type True of bool": row(True, torch.bool),
        "norm_type -1 of int64": row(-1, torch.int64),
        "norm_type 2**63 of int64": row(2**63, torch.int64),
        "norm_type inf of bool": row(math.inf, torch.bool),
        "norm_type inf of uint16 and kernel_size 1.0": row(math.inf, torch.uint16, kernel_size=1.0),
        "norm_type -inf of uint16": row(-math.inf, torch.uint16),
        "norm_type -inf of float8": row(-math.inf, torch.float8_e5m2),
        "list of too many and norm_type 2 of uint16": row(2, torch.uint16, kernel_size=(1,) * (f.rank + 1)),
    }


def rejected_adaptive(f: Function):
    x, last, sides, rank = f.x, f.last, f.sides, f.rank

    def row(input=None, output_size=2):
        return lambda: f.call(x() if input is None else input(), output_size=output_size)

    table = {
        **{
            f"output_size {value!r}": row(output_size=value)
            for value in (
                None,
                *NO_INTS,
                True,
                np.array(1.5),
                (True,) * rank,
                last(1.0, 1),
                last("1", 1),
                (),
                [],
                (2,) * (rank + 1),
                (2,) * 5,
                (None,) * (rank + 1),
                (None,) * 6,
                -1,
                last(-1, 2),
                2**63,
                last(2**63, 1),
                {1.5},
            )
        },
        "output_size (2,)" if rank > 1 else "output_size [2, 2]": row(output_size=(2,) if rank > 1 else [2, 2]),
        "input 0-d": row(lambda: torch.tensor(1.0)),
        "input without channels": row(lambda: torch.ones(sides(6))),
        "input without channels, output_size of too many": row(lambda: torch.ones(sides(6)), (2,) * (rank + 1)),
        "input without channels, output_size -1": row(lambda: torch.ones(sides(6)), -1),
        "input of one more": row(lambda: torch.ones(1, 2, 3, *sides(6))),
        "no pixels": row(lambda: x(size=0)),
        "no pixels in one place": row(lambda: x(size=last(0, 6))),
        "no pixels, unbatched": row(lambda: x(n=None, size=last(0, 6))),
        "no pixels, output_size 0": row(lambda: x(size=0), 0),
        "no pixels, output_size -1": row(lambda: x(size=0), -1),
        "no pixels, empty batch": row(lambda: x(n=0, size=0)),
        **{
            f"{str(dtype)[6:]}, output_size {size}": row(lambda dtype=dtype: x(dtype=dtype), size)
            for dtype in (torch.int64, torch.bool, torch.complex32, torch.float8_e5m2, torch.uint16)
            for size in (1, 2)
        },
        "complex64": row(lambda: x(dtype=torch.complex64)),
        "bool, output_size -1": row(lambda: x(dtype=torch.bool), -1),
        "bool, no pixels": row(lambda: x(size=0, dtype=torch.bool)),
    }
    if rank == 1:
        table |= {"output_size (None,)": row(output_size=(None,))}
    else:
        table |= {"bool, channels last": row(lambda: f.channels_last(dtype=torch.bool))}
    if f.kind == "adaptive_max_pool" or rank == 3:
        table |= {
            "no channels": row(lambda: x(c=0)),
            "no channels, output_size of too many": row(lambda: x(c=0), (2,) * (rank + 1)),
            "bool, empty batch": row(lambda: x(n=0, dtype=torch.bool)),
        }
    return table


def rejected_unpooling(f: Function):
    x, last, sides, rank = f.x, f.last, f.sides, f.rank
    long, short = (2,) * (rank + 1), (2,) * (rank - 1)

    def row(input=None, **arguments):
        return lambda: f.call(x() if input is None else input(), **arguments)

    def indices(shape=None, dtype=torch.int64):
        return torch.zeros((2, 3, *sides(6)) if shape is None else shape, dtype=dtype)

    return {
        "kernel_size too long": row(kernel_size=long),
        "kernel_size too short": row(kernel_size=short),
        "stride too short": row(stride=short),
        "padding too short": row(padding=short),
        "kernel_size and padding too long": row(kernel_size=long, padding=(0,) * (rank + 1)),
        "kernel_size -1": row(kernel_size=-1),
        "stride negative": row(stride=-2),
        "padding 9": row(padding=9),
        "padding 9 in one place": row(padding=last(9, 0)),
        **{
            f"output_size {value}": row(output_size=value)
            for value in (
                (14,) * rank,
                (10,) * rank,
                last(9, 12),
                [14] * rank,
                (2, 3, *last(14, 12)),
                (),
                (12,) * (rank + 1),
                (12,) * (rank + 3),
                torch.Size((20,) * rank),
                "1" * (rank + 1),
                last(12.0, 12),
                (-2,) * rank,
                (2**63,) * rank,
            )
        },
        "output_size negative by stride": row(stride=9, padding=30, kernel_size=1, output_size=(-9,) * rank),
        "output_size 12": row(output_size=12),
        **{
            f"indices {str(dtype)[6:]}": row(indices=indices(dtype=dtype))
            for dtype in (torch.int32, torch.float32, torch.bool)
        },
        "indices of another batch": row(indices=indices((1, 3, *sides(6)))),
        "indices unbatched": row(indices=indices((3, *sides(6)))),
        "indices of another size": row(indices=indices((2, 3, *last(5, 6)))),
        "indices int32 of another size": row(indices=indices((2, 3, *last(5, 6)), torch.int32)),
        "indices of another size and a list too short": row(kernel_size=short, indices=indices((1, 3, *sides(6)))),
        "input 0-d": row(lambda: torch.tensor(1.0)),
        "input without channels": row(lambda: torch.ones(sides(6))),
        "input of one more": row(lambda: torch.ones(1, 2, 3, *sides(6))),
        "input of one more and kernel_size too short": row(lambda: torch.ones(1, 2, 3, *sides(6)), kernel_size=short),
        "input of one more and int32": row(lambda: torch.ones(1, 2, 3, *sides(6), dtype=torch.int32)),
        "no channels": row(lambda: x(c=0)),
        "no pixels": row(lambda: x(size=0), padding=-1),
        "no pixels in one place": row(lambda: x(size=last(0, 6))),
        "no pixels, unbatched": row(lambda: x(n=None, size=last(0, 6))),
        **{
            f"{str(dtype)[6:]}": row(lambda dtype=dtype: x(dtype=dtype))
            for dtype in (torch.int64, torch.bool, torch.complex64)
        },
        "int64, unbatched": row(lambda: x(n=None, dtype=torch.int64)),
        **({"int64, channels last": row(lambda: f.channels_last(dtype=torch.int64))} if rank > 1 else {}),
        **(
            {"stride 0": row(stride=0), "stride 0, int64": row(lambda: x(dtype=torch.int64), stride=0)}
            if rank == 3
            else {}
        ),
        **({"stride too long": row(stride=long), "padding too long": row(padding=long)} if rank == 3 else {}),
    }


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@rows(rejected)
def test_rejected_with_torchs_text(f, entry, make):
    made = make()
    theirs = outcome(f.theirs, made)
    for place in PLACES:
        ours = outcome(ENTRIES[f, entry], at(place, made))
        if f.kind == "max_unpool" and not YARDSTICK:  # torch 2.13 looks at sizes that broke something inside before
            assert isinstance(ours, Exception)
        else:
            assert_same_error(theirs, ours, made)


def rejected_by_type(f: Function):
    """Calls of which torch's text names a private function, an internal name or no argument at all."""
    x = f.x
    table = {"unknown keyword": lambda: call(*f.call(x()).args, foo=1)}
    if f.kind.startswith("adaptive"):
        return table | {"output_size missing": lambda: call(x())}
    table |= {"kernel_size missing": lambda: call(x(), *([torch.zeros(1)] if f.kind == "max_unpool" else []))}
    if f.kind == "lp_pool":
        return table | {
            **{f"norm_type {value!r}": lambda value=value: f.call(x(), norm_type=value) for value in (None, "2", [2])},
            "ceil_mode 1": lambda: f.call(x(), stride=None, ceil_mode=1),
        }
    if f.kind == "max_unpool":
        return (
            table
            | {
                f"{name} {value!r}": lambda name=name, value=value: f.call(x(), **{name: value})
                for name in f.lists
                for value in (1.5, "1", (1.5,) * f.rank, ("1",) * f.rank, np.array(2))
            }
            | {"output_size None inside": lambda: f.call(x(), output_size=(None,) * f.rank)}
        )
    return table | {
        **{
            f"{name} {value!r}, by keyword": lambda name=name, value=value: call(
                x(), **{"kernel_size": 2} | {name: value}
            )
            for name in f.lists
            for value in (1.0, (True,) * f.rank, torch.tensor(1.0), torch.tensor([1] * 4))
        },
        **{
            f"{name} array": lambda name=name: call(x(), **{"kernel_size": 2} | {name: np.array([2, 2])})
            for name in f.lists
        },
    }


@rows(rejected_by_type)
def test_rejected_with_torchs_type(f, entry, make):
    made = make()
    assert_same_error(outcome(f.theirs, made), outcome(ENTRIES[f, entry], made), made, compare_text=False)


def op_infos():
    pytest.importorskip("expecttest")  # torch.testing needs it
    from torch.testing._internal.common_methods_invocations import op_db

    found = [(f, op) for f in FUNCTIONS for op in op_db if op.name == f"nn.functional.{f.name}"]
    assert {f for f, _ in found} == {f for f in FUNCTIONS if f.kind != "lp_pool"}  # of which torch has none
    return found


def test_opinfo_error_inputs():
    tested = set()
    for f, op in op_infos():
        for error_input in op.error_inputs("cpu") if op.error_inputs_func else ():
            sample = error_input.sample_input
            for function in {ENTRIES[f, "check"], PUBLIC.get(f, ENTRIES[f, "check"])}:
                with pytest.raises(error_input.error_type, match=error_input.error_regex):
                    function(sample.input, *sample.args, **sample.kwargs)
            tested.add(f.kind)
    assert tested >= {"max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"}


def test_opinfo_samples():
    tested = set()
    for f, op in op_infos():
        for sample in op.sample_inputs("cpu", torch.float32, requires_grad=False):
            made = call(sample.input, *sample.args, **sample.kwargs)
            theirs = outcome(f.theirs, made)
            assert spatial(f.check(*made.args, **made.kwargs)) == tuple(values_of(theirs).shape[-f.rank :])
            tested.add((f.name, op.variant_test_name))
    assert {name for name, _ in tested} == {f.name for f in FUNCTIONS if f.kind != "lp_pool"}
    assert ("max_unpool2d", "grad") in tested


# -- where we do not follow torch: docs/differences.md -----------------------------------------------------------------


def empty_windows(f: Function):
    if f.kind != "max_pool":
        return {}
    return {
        "dilation one above the size": lambda: call(f.x(1, 1, 2), 2, 1, 1, 3),
        "in the last dimension": lambda: call(f.x(None, size=f.last(2, 6)), 2, 1, f.last(1, 0), f.last(3, 1)),
        "in the first dimension": lambda: call(
            f.x(size=(2, *(6,) * (f.rank - 1))), 2, 1, *[(n, *(m,) * (f.rank - 1)) for n, m in ((1, 0), (3, 1))]
        ),
        "ceil_mode": lambda: call(f.x(1, 1, 2), 3, 20, 1, 5, True),
    }


@rows(empty_windows)
def test_window_wholly_in_the_padding(f, entry, make):
    """torch returns an index outside the input, or in another row, and its backward then writes there."""
    made = make()
    assert f.check(*made.args, **made.kwargs).has_empty_window
    made.kwargs["return_indices"] = True
    values, _ = f.theirs(*made.args, **made.kwargs)
    assert values.min() == -torch.inf
    with pytest.raises(RuntimeError, match="no return_indices=True where a window lies wholly in the padding"):
        ENTRIES[f, entry](*made.args, **made.kwargs)


@rows(empty_windows, [(f, entry) for f, entry in ENTRIES if entry == "public"])
def test_window_wholly_in_the_padding_without_indices(f, entry, make):
    made = make()
    input = made.args[0].requires_grad_()
    output = ENTRIES[f, entry](input, *made.args[1:], **made.kwargs)
    assert torch.equal(output, f.theirs(input.detach(), *made.args[1:], **made.kwargs))
    (gradient,) = torch.autograd.grad(output, input, torch.ones_like(output))
    assert gradient.shape == input.shape
    assert gradient.sum() == (output > -torch.inf).sum()


def test_has_empty_window_is_exact():
    """Against the definition, for every small legal geometry along one dimension."""
    found = 0
    for size, kernel, stride, dilation, ceil_mode in itertools.product(
        range(1, 6), range(1, 6), range(1, 8), range(1, 8), (False, True)
    ):
        input = torch.ones(1, size)
        for padding in range(kernel // 2 + 1):
            made = call(1, input, kernel, stride, padding, dilation, ceil_mode)
            ours = outcome(check_max_pool, made)
            if isinstance(ours, Exception):
                continue
            starts = (first * stride - padding for first in range(ours.output_size[0]))
            windows = ([start + tap * dilation for tap in range(kernel)] for start in starts)
            expected = any(not any(0 <= tap < size for tap in window) for window in windows)
            assert ours.has_empty_window is expected, made
            found += expected
    assert found > 100


@entries("max_pool", "avg_pool")
def test_one_number_as_array_or_bool_tensor(f, entry):
    """torch's parser takes them in some places and fails an internal assertion in others."""
    function = ENTRIES[f, entry]
    if YARDSTICK:
        assert "INTERNAL ASSERT" in str(outcome(f.theirs, call(f.x(), np.array(2))))
        assert isinstance(outcome(f.theirs, call(f.x(), torch.tensor(True))), Tensor)
    assert not isinstance(outcome(function, call(f.x(), np.array(2))), Exception)
    assert type(outcome(function, call(f.x(), torch.tensor(True)))) is TypeError


@entries()
def test_input_that_is_no_tensor(f, entry):
    """torch's Python code asks it for a size or a power first, which is an AttributeError."""
    for input in ([1.0], None):
        made = f.call(f.x())._replace(args=(input, *f.call(f.x()).args[1:]))
        theirs = outcome(f.theirs, made)
        assert type(theirs) in (TypeError, AttributeError)
        ours = outcome(ENTRIES[f, entry], made)
        assert type(ours) is TypeError and "argument 'input' (position 1) must be Tensor" in str(ours)


@entries("max_pool")
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
def test_meta_accepts_only_what_the_cpu_accepts(dtype, f, entry):
    """torch's meta functions return a shape for dtypes that it has no kernel for."""
    made = at("meta", call(f.x(dtype=dtype), 2))
    assert not YARDSTICK or isinstance(outcome(f.theirs, made), Tensor)
    assert type(outcome(ENTRIES[f, entry], made)) is NotImplementedError


@pytest.mark.parametrize("arguments", [{"stride": 2**31}, {"kernel_size": 1, "dilation": 2**31}], ids=str)
def test_max_pool1d_beyond_32_bits(arguments):
    """torch takes them without indices and gradients, and rejects them with either."""
    f = Function("max_pool", 1)
    made = call(f.x(), **{"kernel_size": 2} | arguments)
    with_gradient = call(f.x().requires_grad_(), **made.kwargs)
    if YARDSTICK:
        assert isinstance(outcome(f.theirs, made), Tensor)
    for entry in [function for (g, _), function in ENTRIES.items() if g == f]:
        assert_same_error(outcome(f.theirs, with_gradient), outcome(entry, made), made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["avg_pool", "lp_pool"])
def test_16_bits_in_three_dimensions(dtype, kind):
    """torch averages them on a GPU but has no kernel for the CPU. Autocast widens them, and what comes of them."""
    f = Function(kind, 3)
    made = f.call(f.x(dtype=dtype))
    assert not YARDSTICK or type(outcome(f.theirs, made)) is NotImplementedError
    assert f.check(*made.args).output_size == (3, 3, 3)
    assert getattr(tritune, f"{kind}3d")(*made.args).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(tritune, f"{kind}3d")(*made.args).dtype == f.theirs(*made.args).dtype == torch.float32


NAMED = [
    f"{kind}{rank}d"
    for kind in ("max_pool", "avg_pool", "lp_pool", "adaptive_max_pool", "adaptive_avg_pool", "max_unpool")
    for rank in (1, 2, 3)
]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "sliced"])
@pytest.mark.parametrize("op", NAMED)
def test_kernels_are_named_as_torchs(op, layout):
    """By the text for a dtype without a kernel, whatever the strides; of lines, images and volumes, unbatched too."""
    rank = int(op[-2])
    args = {"lp_pool": (2.0, 2)}.get(op[:-2], (2,))
    for n, channels, size, is_batched in itertools.product((1, 2), (1, 4), (2, 6), (True, False)):
        full = torch.ones(n, channels, *(size,) * rank, dtype=torch.complex64)
        full = {
            "contiguous": full,
            "channels last": full.movedim(1, -1).contiguous().movedim(-1, 1),
            "transposed": full.transpose(0, 1).contiguous().transpose(0, 1),
            "sliced": full.repeat(1, 2, *(1,) * rank)[:, ::2],
        }[layout]
        input = full if is_batched else full[0]
        operands = (input, torch.zeros_like(input, dtype=torch.int64)) if "unpool" in op else (input,)
        made = call(*operands, *args)
        assert_same_error(outcome(getattr(F, op), made), outcome(getattr(tritune, op), made), made)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_index_outside_is_named_as_by_torch(rank):
    input = torch.ones(1, 1, *(3,) * rank)
    made = call(input, torch.full(input.shape, 10**6), 2)
    op = f"max_unpool{rank}d"
    assert_same_error(outcome(getattr(F, op), made), outcome(getattr(tritune, op), made), made)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_bytes_in_channels_last(dtype, rank):
    """torch's CPU kernel keeps an index in a byte: it rejects planes of 128 pixels that it takes in other layouts."""
    f = Function("max_pool", rank)
    input = f.channels_last(size=f.last(128, 1), dtype=dtype)
    kernel_size = f.last(2, 1)
    assert not YARDSTICK or type(outcome(f.theirs, call(input, kernel_size))) is RuntimeError
    assert isinstance(f.theirs(input.contiguous(), kernel_size), Tensor)
    assert f.check(input, kernel_size).output_size == f.last(64, 1)


@entries("adaptive_avg_pool")
def test_adaptive_average_of_whole_planes(f, entry):
    """To one pixel torch takes the mean of the last dimensions, however many there are and of however much."""
    inputs = [f.x(size=0), f.x(n=None, size=0)]
    if f.rank > 1:
        inputs += [torch.ones(f.sides(6)), torch.ones(1, 2, 3, *f.sides(6))]
    if f.rank == 3:
        inputs += [f.x(c=0)]
    for input in inputs:
        made = call(input, 1)
        assert not YARDSTICK or isinstance(outcome(f.theirs, made), Tensor), made
        assert_same_error(outcome(f.theirs, call(input, 2)), outcome(ENTRIES[f, entry], made), made)


@entries("adaptive_avg_pool", "max_unpool")
def test_empty_input_has_the_same_rules(f, entry):
    """Where there is nothing to compute torch does not look at the dtype."""
    calls = [f.call(f.x(n=0, dtype=torch.bool))]
    if f.kind == "max_unpool":
        calls += [f.call(f.x(dtype=torch.bool), padding=6)]
    elif f.rank < 3:
        calls += [f.call(f.x(dtype=torch.bool), output_size=0), f.call(f.x(c=0, dtype=torch.bool))]
    for made in calls:
        always_looks = f.name == "adaptive_avg_pool3d"
        assert not YARDSTICK or isinstance(outcome(f.theirs, made), Tensor) is not always_looks, made
        assert type(outcome(ENTRIES[f, entry], made)) is NotImplementedError, made


@entries("lp_pool")
def test_norm_types_that_are_no_numbers(f, entry):
    """torch raises to the power of any tensor, and a zero of numpy's does not divide by zero."""
    function = ENTRIES[f, entry]
    for norm_type, kind in (
        (torch.tensor(2.0), TypeError),
        (torch.tensor([2.0, 3.0]), TypeError),
        (np.int64(0), ZeroDivisionError),
    ):
        assert type(outcome(function, call(f.x(size=2), norm_type, 1))) is kind
        assert not YARDSTICK or isinstance(outcome(f.theirs, call(f.x(size=2), norm_type, 1)), Tensor)


@pytest.mark.parametrize("entry", [entry for (f, entry) in ENTRIES if f.name == "lp_pool1d"])
def test_one_element_kernel_of_lp_pool1d(entry):
    """torch takes it for norm_type=inf only: elsewhere it multiplies by it."""
    f = Function("lp_pool", 1)
    for kernel_size in ((2,), [2]):
        assert not YARDSTICK or type(outcome(f.theirs, call(f.x(), 2, kernel_size))) is TypeError
        assert isinstance(outcome(f.theirs, call(f.x(), math.inf, kernel_size)), Tensor)
        assert not isinstance(outcome(ENTRIES[f, entry], call(f.x(), 2, kernel_size)), Exception)


@entries("max_unpool")
def test_lists_of_unpooling(f, entry):
    """torch computes sizes in Python with whatever it is given: numpy's ints fail there, surplus entries do not."""
    function = ENTRIES[f, entry]
    for two in (np.int64(2), np.array([2] * f.rank), (np.int64(2),) * f.rank):
        made = f.call(f.x(), kernel_size=two)
        assert not YARDSTICK or type(outcome(f.theirs, made)) is TypeError
        assert not isinstance(outcome(function, made), Exception)
    for one in (True, (True,) * f.rank):
        made = f.call(f.x(), kernel_size=one)
        assert not YARDSTICK or isinstance(outcome(f.theirs, made), Tensor) == (f.rank < 3)
        assert type(outcome(function, made)) is TypeError
    for name in ("stride", "padding"):
        made = f.call(f.x(), **{name: (2,) * (f.rank + 1)})
        assert not YARDSTICK or isinstance(outcome(f.theirs, made), Tensor) == (f.rank < 3)
        with pytest.raises(RuntimeError, match=rf"There should be exactly \w+ elements \(.*\) in {name}, but got"):
            function(*made.args)


@entries("max_unpool")
def test_mixed_devices(f, entry):
    made = f.call(f.x(), indices=torch.zeros(f.x().shape, dtype=torch.int64, device="meta"))
    assert type(outcome(f.theirs, made)) is RuntimeError
    ours = outcome(ENTRIES[f, entry], made)
    assert type(ours) is RuntimeError and "same device, but got indices is on meta" in str(ours)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@entries()
def test_nested_tensors(f, entry, layout):
    # torch rejects them with errors of several types, from deep inside.
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    arguments = f.call(f.x()).args[1:]
    with pytest.raises(NotImplementedError, match="nested tensor"):
        ENTRIES[f, entry](nested, *arguments)


# -- what torch accepts ------------------------------------------------------------------------------------------------


def accepted(f: Function):
    if f.has_windows:
        return accepted_windows(f)
    return {"max_unpool": accepted_unpooling}.get(f.kind, accepted_adaptive)(f)


def normalised(f: Function, output, kernel_size=2, stride=None, padding=0, dilation=1, ceil_mode=False) -> PoolArgs:
    stride = kernel_size if stride is None else stride
    lists = (f.sides(value) for value in (kernel_size, stride, padding, dilation))
    return PoolArgs(*lists, ceil_mode, f.sides(output), False)


def accepted_windows(f: Function):
    x, last, sides, rank = f.x, f.last, f.sides, f.rank
    expected = partial(normalised, f)
    several = (lambda sizes: sizes[0]) if f.name == "lp_pool1d" else (lambda sizes: sizes)  # it takes one int only

    def row(args, input=None, **given):
        return (lambda: f.call(x() if input is None else input(), **given)), args

    table = {
        "defaults": row(expected(3)),
        "stride None": row(expected(3), stride=None),
        "stride ()": row(expected(3), stride=()),
        "stride []": row(expected(3), stride=[]),
        "ints": row(expected(2, 3, 2), kernel_size=3, stride=2),
        "one-element tuples": row(expected(5, 2, 1), kernel_size=several(sides(2)), stride=(1,)),
        "lists": row(
            expected(last(3, 2), last(4, 3), last(1, 2)), kernel_size=several([*last(4, 3)]), stride=[*last(1, 2)]
        ),
        "torch.Size": row(expected(last(3, 2), last(2, 3)), kernel_size=several(torch.Size(last(2, 3)))),
        "numpy ints": row(expected(last(2, 2), 3, last(2, 2)), kernel_size=np.int64(3), stride=last(np.int8(2), 2)),
        "int tensor": (
            lambda: call(x(), *([2] if f.kind == "lp_pool" else []), 3, stride=torch.tensor(2)),
            expected(2, 3, 2),
        ),
        "ceil_mode": row(
            expected(last(4, 3), 2, 2, ceil_mode=True), lambda: x(size=last(7, 6)), stride=2, ceil_mode=True
        ),
        # The last window must start inside the input or the padding before it.
        "ceil_mode 4 1 3": row(
            expected(2, 1, 3, ceil_mode=True), lambda: x(size=4), kernel_size=1, stride=3, ceil_mode=True
        ),
        "ceil_mode 5 1 2": row(
            expected(3, 1, 2, ceil_mode=True), lambda: x(size=5), kernel_size=1, stride=2, ceil_mode=True
        ),
        "stride 2**31-1": row(expected(1, 2, LARGEST), stride=LARGEST),
        "unbatched": row(expected(3), lambda: x(n=None)),
        "empty batch": row(expected(3), lambda: x(n=0)),
        "transposed": row(expected(3), lambda: x().transpose(0, 1)),
        **{f"{str(dtype)[6:]}": row(expected(3), lambda dtype=dtype: x(dtype=dtype)) for dtype in dtypes(f)},
    }
    if rank > 1:
        table |= {
            "channels last": row(expected(3), f.channels_last),
            "late bool": row(expected(last(5, 3), 2, last(1, 2)), stride=last(True, 2)),
        }
    if f.kind != "lp_pool":
        table |= {"kernel_size (2,)": row(expected(3), kernel_size=(2,))}
    if not (f.kind == "avg_pool" and rank == 3) and not (f.kind == "lp_pool" and rank == 3):
        table |= {
            "kernel above the size, ceil_mode": row(
                expected(1, 7, 2, ceil_mode=True), kernel_size=7, stride=2, ceil_mode=True
            )
        }
    if "padding" in f.lists:
        table |= {
            "padding": row(expected(3, 3, 2, 1), kernel_size=3, stride=2, padding=1),
            "padding half of an even kernel": row(expected(7, 2, 1, 1), stride=1, padding=1),
            "padding of its own": row(expected(last(7, 5), 2, 1, last(1, 0)), stride=1, padding=last(1, 0)),
            "ceil_mode 3 2 3 1": row(
                expected(2, 2, 3, 1, 1, True), lambda: x(size=3), stride=3, padding=1, ceil_mode=True
            ),
            "ceil_mode 6 2 5 1": row(expected(2, 2, 5, 1, 1, True), stride=5, padding=1, ceil_mode=True),
        }
    if f.kind == "max_pool":
        table |= {
            "dilated": row(expected(4, 3, 1, 1, 2), kernel_size=3, stride=1, padding=1, dilation=2),
            **{
                f"return_indices {value!r}": row(expected(3), return_indices=value)
                for value in (True, None, 1, "", [0], np.bool_(True))
            },
            "integers with indices": row(expected(3), lambda: x(dtype=torch.int32), return_indices=True),
        }
    if f.kind == "avg_pool":
        table |= {"count_include_pad": row(expected(4, padding=1), padding=1, count_include_pad=False)}
        if rank > 1:
            table |= {
                f"divisor_override {value!r}": row(expected(3), divisor_override=value)
                for value in (-2, 3, 2**40, np.int64(2))
            }
    if f.kind == "lp_pool":
        table |= {
            f"norm_type {value!r}": row(expected(3), norm_type=value)
            for value in (
                1,
                2.5,
                -1,
                -2.0,
                True,
                math.inf,
                -math.inf,
                math.nan,
                2**40,
                np.float32(2),
                np.int64(2),
                np.float64(math.inf),
            )
        }
        table |= {
            "norm_type 2 of bool": row(expected(3), lambda: x(dtype=torch.bool), norm_type=2),
            "norm_type 2.5 of uint16": row(expected(3), lambda: x(dtype=torch.uint16), norm_type=2.5),
            "norm_type inf of numpy's float32": row(
                expected(3), lambda: x(dtype=torch.int64), norm_type=np.float32(math.inf)
            ),
            "norm_type 2.0 of int32": row(expected(3), lambda: x(dtype=torch.int32), norm_type=2.0),
            "norm_type inf of complex": row(expected(3), lambda: x(dtype=torch.complex64), norm_type=math.inf),
            "norm_type -inf of complex": row(expected(3), lambda: x(dtype=torch.complex64), norm_type=-math.inf),
        }
    return table


def dtypes(f: Function) -> tuple[torch.dtype, ...]:
    """Beside float32."""
    if f.kind == "max_pool" and f.rank > 1:
        integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        return (torch.float64, torch.float16, torch.bfloat16, *integers)
    if f.has_windows and f.rank == 3:
        return (torch.float64, torch.int64)  # 16 bits: docs/differences.md
    return (torch.float64, torch.float16, torch.bfloat16, *((torch.int64,) if f.kind == "avg_pool" else ()))


def accepted_adaptive(f: Function):
    x, last, sides, rank = f.x, f.last, f.sides, f.rank

    def row(expected, output_size, input=None):
        return (lambda: f.call(x() if input is None else input(), output_size=output_size)), sides(expected)

    table = {
        "int": row(2, 2),
        "tuple": row(last(2, 3), last(2, 3)),
        "list": row(last(2, 3), [*last(2, 3)]),
        "torch.Size": row(2, torch.Size(sides(2))),
        "numpy ints": row(2, (np.int64(2),) * rank),
        "0": row(0, 0),
        "1": row(1, 1),
        "more than there is": row(9, 9),
        "unbatched": row(2, 2, lambda: x(n=None)),
        "empty batch": row(2, 2, lambda: x(n=0)),
        "no channels, unbatched": row(2, 2, lambda: x(n=None, c=0)) if rank < 3 or "max" in f.kind else row(2, 2),
        **{f"{str(dtype)[6:]}": row(2, 2, lambda dtype=dtype: x(dtype=dtype)) for dtype in dtypes(f)},
    }
    if rank == 1:
        table |= {"numpy int": row(2, np.int64(2))}
    else:
        table |= {
            "channels last": row(2, 2, f.channels_last),
            "None": row(6, (None,) * rank),
            "some None": row(last(6, 2), [*last(None, 2)]),
            "late bool": row(last(1, 2), last(True, 2)),
            "array": row(2, np.array([2] * rank)),
            "range": row(tuple(range(rank)), range(rank)),
        }
    if f.kind == "adaptive_avg_pool":
        table |= {"complex, whole planes": row(1, 1, lambda: x(dtype=torch.complex64))}
        if rank < 3:
            table |= {"no channels": row(2, 2, lambda: x(c=0))}
    else:
        table |= {
            f"return_indices {value!r}": (
                (lambda value=value: f.call(x(), output_size=2, return_indices=value)),
                sides(2),
            )
            for value in (True, None, 1, [])
        }
    return table


def accepted_unpooling(f: Function):
    x, last, sides, rank = f.x, f.last, f.sides, f.rank
    expected = partial(normalised, f)

    def row(args, input=None, **given):
        return (lambda: f.call(x() if input is None else input(), **given)), args

    table = {
        "defaults": row(expected(12)),
        "tuples": row(expected(last(13, 8), last(3, 3), last(2, 1)), kernel_size=last(3, 3), stride=last(2, 1)),
        "list": row(expected(12), kernel_size=[2] * rank),
        "range": row(
            expected(tuple(6 * taps for taps in range(2, 2 + rank)), tuple(range(2, 2 + rank))),
            kernel_size=range(2, 2 + rank),
        ),
        "padding": row(expected(10, 2, 2, 1), padding=1),
        "padding negative": row(expected(14, 2, 2, -1), padding=-1),
        "stride above the kernel": row(expected(17, 2, 3), stride=3),
        "output_size": row(expected(last(13, 11)), output_size=last(13, 11)),
        "output_size list": row(expected(13), output_size=[13] * rank),
        "output_size with batch": row(expected(13), output_size=(2, 3, *sides(13))),
        "output_size torch.Size": row(expected(13), output_size=torch.Size((2, 3, *sides(13)))),
        "unbatched": row(expected(12), lambda: x(n=None)),
        "empty batch": row(expected(12), lambda: x(n=0)),
        "no channels, unbatched": row(expected(12), lambda: x(n=None, c=0)),
        "nothing": row(expected(0, 2, 2, 6), padding=6),
        **{f"{str(dtype)[6:]}": row(expected(12), lambda dtype=dtype: x(dtype=dtype)) for dtype in dtypes(f)},
    }
    if rank > 1:
        table |= {"channels last": row(expected(12), f.channels_last)}
    if rank < 3:
        table |= {"stride 0": row(expected(2, 2, 0), stride=0)}
    return table


ACCEPTED = [pytest.param(f, *row, id=f"{f.name}-{name}") for f in FUNCTIONS for name, row in accepted(f).items()]


@pytest.mark.parametrize("f, make, expected", ACCEPTED)
def test_accepted_and_normalised(f, make, expected):
    made = make()
    theirs = outcome(f.theirs, made)
    assert not isinstance(theirs, Exception), theirs
    assert tuple(values_of(theirs).shape[-f.rank :]) == spatial(expected)
    for place in PLACES:
        there = at(place, made)
        ours = f.check(*there.args, **there.kwargs)
        assert ours == expected, place
        lists = (*ours[:4], ours.output_size) if isinstance(ours, PoolArgs) else (ours,)
        assert all(type(value) is int for value in itertools.chain(*lists))


@pytest.mark.parametrize("f, make, expected", [row for row in ACCEPTED if row.values[0] in PUBLIC])
def test_accepted_by_the_public_function(f, make, expected):
    made = make()
    ours, theirs = outcome(PUBLIC[f], made), outcome(f.theirs, made)
    assert type(ours) is type(theirs), ours
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@functions()
def test_left_to_torch(f):
    """Layouts that are torch's own affair pass the check; torch serves or rejects them."""
    quantised = torch.quantize_per_tensor(f.x(), 0.1, 0, torch.quint8)
    for input in (f.x().to_sparse(), f.x(dtype=torch.bool).to_sparse(), f.x().to_mkldnn(), quantised):
        made = f.call(f.x())
        assert not isinstance(outcome(f.check, call(input, *made.args[1:])), Exception)


# -- whole planes, which torch has no functions for --------------------------------------------------------------------

GLOBAL = {
    **{(kind, "check"): partial(check_global_pool, kind) for kind in ("avg", "max")},
    **{
        (kind, "public"): function
        for kind in ("avg", "max")
        if (function := getattr(tritune, f"global_{kind}_pool", None)) is not None
    },
}


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_global_pooling_accepts(kind):
    for shape in ((2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5, 6), (1, 1, 1)):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for place in PLACES:
                made = at(place, call(torch.ones(shape, dtype=dtype)))
                check_global_pool(kind, *made.args, keepdim=False)


@pytest.mark.parametrize("kind, entry", GLOBAL)
@pytest.mark.parametrize(
    "input, keepdim, error, text",
    [
        ([1.0], True, TypeError, r"argument 'input' \(position 1\) must be Tensor, not list"),
        (torch.ones(2, 3, 4), 1, TypeError, r"argument 'keepdim' \(position 2\) must be bool, not int"),
        (torch.ones(2, 3), True, RuntimeError, r"3 to 5 dimensions, .* but got \[2, 3\]"),
        (torch.ones(1, 2, 3, 4, 5, 6), True, RuntimeError, "3 to 5 dimensions"),
        (torch.ones(2, 0, 4), True, RuntimeError, r"at least one channel and one element in each, but got \[2, 0, 4\]"),
        (torch.ones(2, 3, 4, 0), True, RuntimeError, "at least one channel and one element in each"),
        (torch.ones(2, 3, 4, dtype=torch.int64), True, NotImplementedError, "floating-point tensors, not torch.int64"),
    ],
    ids=["list", "keepdim", "2-d", "6-d", "no channels", "no pixels", "integers"],
)
def test_global_pooling_rejects(kind, entry, input, keepdim, error, text):
    for place in PLACES:
        with pytest.raises(error, match=f"global_{kind}_pool.*{text}"):
            GLOBAL[kind, entry](*at(place, call(input)).args, keepdim)


# -- any call ----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2, torch.uint16]


class Draw:
    """Random calls, most of them legal but for one or two faults."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mostly(self, usual, *odd, chance: float = 0.1):
        return self.random.choice(odd) if self.random.random() < chance else usual

    def form(self, value: int, rank: int):
        other = (*(value,) * (rank - 1), 1)
        usual = self.random.choice((value, (value,) * rank, other, [value], [value] * rank))
        return self.mostly(usual, (value,) * (rank + 1), (value,) * 2, (), chance=0.05)

    def input(self, f: Function) -> Tensor:
        rnd, mostly = self.random, self.mostly
        pixels = [mostly(rnd.randint(1, 9 - 2 * (f.rank == 3)), 0, chance=0.06) for _ in range(f.rank)]
        full = (mostly(rnd.randint(1, 3), 0), mostly(rnd.randint(1, 3), 0, chance=0.06), *pixels)
        shape = mostly(rnd.choice((full, full, full[1:])), full[2:], (1, *full), (), chance=0.06)
        input = torch.ones(shape).to(mostly(torch.float32, *DTYPES, chance=0.2))
        if input.dim() in FORMATS and rnd.random() < 0.3:
            input = input.contiguous(memory_format=FORMATS[input.dim()])
        return input.transpose(0, 1) if input.dim() > 2 and rnd.random() < 0.1 else input

    def call(self, f: Function) -> Call:
        rnd, mostly, rank = self.random, self.mostly, f.rank
        input = self.input(f)
        if f.kind.startswith("adaptive"):
            size = mostly(rnd.randint(0, 9), -1)
            return f.call(
                input,
                output_size=mostly(
                    self.form(size, rank), (None,) * rank, (1,) * rank, (None,) * (rank + 1), chance=0.3
                ),
            )
        kernel = mostly(rnd.randint(1, 5 - (rank == 3)), 0, -1, 9)
        given = {
            "stride": mostly(self.form(mostly(rnd.randint(1, 6), 0, -1), rank), None),
            "padding": self.form(mostly(rnd.randint(0, max(kernel // 2, 0)), -1, 2, 3), rank),
            "dilation": self.form(mostly(rnd.randint(1, 5), 0, -1), rank),
            "ceil_mode": rnd.random() < 0.5,
            "return_indices": rnd.random() < 0.5,
            "count_include_pad": rnd.random() < 0.5,
            "divisor_override": None if rank == 1 else rnd.choice((None, 3, -1, 0)),
            "output_size": mostly(self.form(rnd.randint(0, 12), rank), None),
        }
        given = {name: value for name, value in given.items() if name in KINDS[f.kind] and rnd.random() < 0.5}
        if f.kind == "lp_pool":
            given["norm_type"] = rnd.choice((1, 2, 2.5, math.inf, -math.inf, mostly(2, 0, -1, True)))
        if f.kind == "max_unpool":
            indices = torch.zeros(
                mostly(input.shape, input.shape[1:], chance=0.05), dtype=mostly(torch.int64, torch.int32, chance=0.05)
            )
            arguments = {"kernel_size": self.form(kernel, rank), **given}
            return call(input, indices, **arguments)
        if f.kind == "avg_pool" and rank == 1:
            given.pop("divisor_override", None)
        return f.call(input, kernel_size=self.form(kernel, rank), **given)


def is_listed_difference(f: Function, made: Call, theirs, ours) -> bool:
    """docs/differences.md"""
    input = made.args[0]
    if "wholly in the padding" in str(ours):
        return isinstance(theirs, tuple)
    if "avg_pool3d_out_frame" in str(theirs) and "BFloat16" in str(theirs):
        return isinstance(ours, (PoolArgs, ZeroDivisionError))
    if f.name == "lp_pool1d" and "mul(): argument 'other'" in str(theirs):
        return True
    if f.kind == "adaptive_avg_pool":
        to_one = made.args[1] in (1, (1,) * f.rank, [1] * f.rank)
        looked_at = input.shape[1:] if f.rank == 3 else input.shape[-f.rank :]
        any_dims = to_one and (not f.rank < input.dim() < f.rank + 3 or 0 in looked_at)
        return isinstance(ours, Exception) and (any_dims or (isinstance(theirs, Tensor) and theirs.numel() == 0))
    if f.kind == "max_unpool" and isinstance(ours, Exception):
        surplus = f.rank < 3 and re.search("in (stride|padding), but", str(ours)) is not None
        return surplus or (isinstance(theirs, Tensor) and 0 in (input.numel(), theirs.numel()))
    return False


@functions()
def test_random_calls(f):
    draw = Draw(seed=20261130 + FUNCTIONS.index(f))
    accepted = rejected = 0
    while accepted < 200 or rejected < 200:
        made = draw.call(f)
        theirs, ours = outcome(f.theirs, made), outcome(f.check, made)
        if is_listed_difference(f, made, theirs, ours):
            continue
        if isinstance(theirs, Exception) and not YARDSTICK:  # of two faults torch may name the other
            rejected += 1
            assert isinstance(ours, Exception), f"we accept {made}, torch says {theirs!r}"
        elif isinstance(theirs, Exception):
            rejected += 1
            assert_same_error(theirs, ours, made, compare_text=not str(theirs).startswith('"div_cpu'))
        else:
            accepted += 1
            assert not isinstance(ours, Exception), f"torch accepts {made}, we say {ours!r}"
            assert spatial(ours) == tuple(values_of(theirs).shape[-f.rank :]), made
        meta = outcome(f.check, at("meta", made))
        assert (type(meta), str(meta)) == (type(ours), str(ours)), made


# -- torch.compile -----------------------------------------------------------------------------------------------------


def compiled(check, dynamic=None, **arguments):
    """The validator as a compiled function, and the graphs that it has been compiled into."""
    torch.compiler.reset()  # else Dynamo takes the rank, another in each test, for a symbol
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=keep)
    def function(*operands):
        return check(*operands, **arguments), operands[0] + 1

    return function, graphs


@functions()
def test_traced_with_symbolic_sizes(f):
    """Dynamo traces the check in one graph that serves other batch and image sizes."""
    arguments: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True}
    arguments = {name: value for name, value in arguments.items() if name == "kernel_size" or name in KINDS[f.kind]}
    if f.kind.startswith("adaptive"):
        arguments = {"output_size": f.last(2, None) if f.rank > 1 else 2}
    if f.kind == "lp_pool":
        arguments["norm_type"] = 3
    function, graphs = compiled(f.check, **arguments)
    for n, size in ((2, (6, 8, 7)), (3, (18, 4, 9)), (5, (4, 30, 5))):
        operands = [f.x(n, size=size[: f.rank])]
        if f.kind == "max_unpool":
            operands += [torch.zeros(operands[0].shape, dtype=torch.int64)]
        for operand in operands:
            for dim in (0, *range(2, f.rank + 2)):
                torch._dynamo.mark_dynamic(operand, dim)
        ours, _ = function(*operands)
        assert spatial(ours) == tuple(f.theirs(*operands, **arguments).shape[-f.rank :])
        assert not isinstance(ours, PoolArgs) or ours.has_empty_window is False
    assert len(graphs) == 1


@functions("max_pool")
def test_symbolic_sizes_may_have_an_empty_window(f):
    """With a symbolic size the answer would be a guard: it is the careful one instead."""
    arguments = {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 3}
    function, graphs = compiled(f.check, **arguments)
    for size in (6, 9):
        input = f.x(size=tuple(range(size, size + f.rank)))
        for dim in range(2, f.rank + 2):
            torch._dynamo.mark_dynamic(input, dim)
        assert function(input)[0].has_empty_window is True
        assert f.check(input, **arguments).has_empty_window is False
    assert len(graphs) == 1
    function, _ = compiled(f.check, dynamic=False, **arguments)
    assert function(f.x())[0].has_empty_window is False
    assert function(f.x(size=f.last(2, 6)))[0].has_empty_window is True
