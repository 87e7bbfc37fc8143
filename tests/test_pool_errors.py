"""max_pool2d rejects what torch rejects, with torch's exception type and text, and accepts the forms torch accepts."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_errors import PLACES, YARDSTICK, Call, assert_same_error, at, call, outcome

import tritune
from tritune.ops._checks import MaxPool2dArgs, check_max_pool2d

pytestmark = pytest.mark.torch

ENTRIES = {"check": check_max_pool2d, "public": tritune.max_pool2d}
entry = pytest.mark.parametrize("entry", ENTRIES)
place = pytest.mark.parametrize("place", PLACES)
with_indices = pytest.mark.parametrize("return_indices", [False, True], ids=["values", "indices"])


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (2, 3, 6, 6)).to(dtype)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return x(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def rows(table):
    return pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in table.items()])


# -- what torch rejects ------------------------------------------------------------------------------------------------

REJECTED = {
    # types
    "input list": lambda: call([1.0], 2),
    "input None": lambda: call(None, 2),
    "input array": lambda: call(np.ones((1, 1, 4, 4)), 2),
    **{
        f"{name} {value!r}": lambda name=name, value=value: call(x(), **({"kernel_size": 2} | {name: value}))
        for name, value in itertools.product(
            ("kernel_size", "stride", "padding", "dilation"),
            (1.0, True, np.bool_(True), np.float32(1), "1", (True, 1), (1.0, 1), (None, 1), range(1, 3)),
        )
    },
    **{
        f"{name} None": lambda name=name: call(x(), **({"kernel_size": 2} | {name: None}))
        for name in ("kernel_size", "padding", "dilation")
    },
    **{
        f"late {value!r}": lambda value=value: call(x(), (2, value))
        for value in (1.0, None, "1", np.bool_(True), torch.tensor(1.0), torch.tensor([1, 1]))
    },
    "kernel_size array": lambda: call(x(), kernel_size=np.array([2, 2])),
    "kernel_size tensor of two": lambda: call(x(), kernel_size=torch.tensor([2, 2])),
    "kernel_size float tensor": lambda: call(x(), kernel_size=torch.tensor(2.0)),
    **{
        f"ceil_mode {value!r}": lambda value=value: call(x(), 2, ceil_mode=value)
        for value in (None, 0, 1, "yes", np.bool_(True), torch.tensor(True))
    },
    # sizes of numbers
    "kernel_size 2**31": lambda: call(x(), 2**31),
    "kernel_size -2**31-1": lambda: call(x(), -(2**31) - 1),
    "kernel_size 2**64": lambda: call(x(), 2**64),
    "kernel_size (2**63, 1)": lambda: call(x(), (2**63, 1)),
    "kernel_size (1, 2**63)": lambda: call(x(), (1, 2**63)),
    "stride 2**31": lambda: call(x(), 2, 2**31),
    "stride (1, 2**31)": lambda: call(x(), 2, (1, 2**31)),
    "padding 2**31": lambda: call(x(), 2, 2, 2**31),
    "dilation 2**31": lambda: call(x(), 2, 2, 0, 2**31),
    "dilation 2**31-1": lambda: call(x(), 2, 2, 0, 2**31 - 1),
    "kernel_size 2**31-1": lambda: call(x(), 2**31 - 1),
    # lengths of lists
    **{
        f"{name} {values}": lambda name=name, values=values: call(x(), **({"kernel_size": 2} | {name: values}))
        for name in ("kernel_size", "stride", "padding", "dilation")
        for values in ((), [], (1, 1, 1), [1, 1, 1, 1])
        if name != "stride" or values
    },
    # dimensions
    "input 0-d": lambda: call(torch.tensor(1.0), 2),
    "input 1-d": lambda: call(x(6), 2),
    "input 2-d": lambda: call(x(6, 6), 2),
    "input 2-d and empty": lambda: call(x(0, 0), 2),
    "input 5-d": lambda: call(x(1, 2, 3, 6, 6), 2),
    "input 5-d, channels last": lambda: call(x(2, 3, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d), 2),
    "no channels": lambda: call(x(2, 0, 6, 6), 2),
    "no channels, chw": lambda: call(x(0, 6, 6), 2),
    "no channels, channels last": lambda: call(channels_last(2, 0, 6, 6), 2),
    "height 0": lambda: call(x(2, 3, 0, 6), 2),
    "height 0, padded": lambda: call(x(2, 3, 0, 6), 2, 1, 1),
    "width 0": lambda: call(x(2, 3, 6, 0), 2),
    "height 0, chw": lambda: call(x(3, 0, 6), 2),
    "width 0, chw": lambda: call(x(3, 6, 0), 2, 1, 1),
    "empty batch, no channels": lambda: call(x(0, 0, 6, 6), 2),
    # geometry
    "kernel_size 0": lambda: call(x(), 0),
    "kernel_size 0, stride 1": lambda: call(x(), 0, 1),
    "kernel_size negative": lambda: call(x(), -1),
    "kernel_size (2, -1)": lambda: call(x(), (2, -1), 1),
    "stride 0": lambda: call(x(), 2, 0),
    "stride 0 in one place": lambda: call(x(), 2, (1, 0)),
    "stride negative": lambda: call(x(), 2, (-1, -7)),
    "padding negative": lambda: call(x(), 2, 1, -1),
    "padding negative in one place": lambda: call(x(), 2, 1, (0, -1)),
    "dilation 0": lambda: call(x(), 2, 1, 0, 0),
    "dilation 0, padded": lambda: call(x(), 2, 1, 1, 0),
    "dilation negative": lambda: call(x(), 2, 1, 0, (1, -1)),
    "padding over half": lambda: call(x(), 2, 1, 2),
    "padding over half in one place": lambda: call(x(), (3, 2), 1, (1, 2)),
    "padding over half, one tap": lambda: call(x(), 1, 1, 1, 3),
    "padding over half of taps, not of reach": lambda: call(x(), 3, 1, 2, 2),
    "output too small": lambda: call(x(), 7),
    "output too small, width": lambda: call(x(), (2, 9)),
    "output too small, dilated": lambda: call(x(), 3, 1, 0, 3),
    "output too small, ceil_mode": lambda: call(x(), 8, 2, 0, 1, True),
    "output too small, chw": lambda: call(x(3, 6, 6), 7),
    "output too small, channels last": lambda: call(channels_last(), 7),
    "output too small, empty batch": lambda: call(x(0, 3, 6, 6), 7),
    # dtypes
    "bool": lambda: call(x(dtype=torch.bool), 2),
    "bool, chw": lambda: call(x(3, 6, 6, dtype=torch.bool), 2),
    "bool, channels last": lambda: call(channels_last(dtype=torch.bool), 2),
    "bool, empty batch": lambda: call(x(0, 3, 6, 6, dtype=torch.bool), 2),
    "complex": lambda: call(x(dtype=torch.complex64), 2),
    "float8": lambda: call(x(dtype=torch.float8_e4m3fn), 2),
    "uint16": lambda: call(x(dtype=torch.uint16), 2),
    # several faults: the first that torch finds
    "stride of 3 and padding 2**31": lambda: call(x(), 2, (1, 1, 1), 2**31),
    "kernel_size 2**31 and stride of 3": lambda: call(x(), 2**31, (1, 1, 1)),
    "padding of 3 and dilation of 3": lambda: call(x(), 2, 1, (1, 1, 1), (1, 1, 1)),
    "dilation of 3 and input 2-d": lambda: call(x(6, 6), 2, 1, 0, (1, 1, 1)),
    "input 2-d and stride 0": lambda: call(x(6, 6), 2, 0),
    "stride 0 in width and padding negative in height": lambda: call(x(), 2, (1, 0), (-1, 0)),
    "padding negative and kernel_size negative": lambda: call(x(), -1, 1, -1),
    "padding over half and height 0": lambda: call(x(2, 3, 0, 6), 2, 1, 2),
    "kernel_size negative and stride negative": lambda: call(x(), -2, -1),
    "stride negative and dilation 0": lambda: call(x(), 2, -1, 0, 0),
    "height 0 and padding over half of taps": lambda: call(x(2, 3, 0, 6), 3, 1, 2, 2),
    "complex and output too small": lambda: call(x(dtype=torch.complex64), 7),
    "bool and no channels": lambda: call(x(2, 0, 6, 6, dtype=torch.bool), 2),
}

# torch's text names a private function.
REJECTED_BY_TYPE = {
    "kernel_size missing": lambda: call(x()),
    "unknown keyword": lambda: call(x(), 2, count_include_pad=True),
    "too many arguments": lambda: call(x(), 2, 2, 0, 1, False, False, True),
    "return_indices tensor of two": lambda: call(x(), 2, return_indices=torch.tensor([1, 2])),
}


@entry
@place
@with_indices
@rows(REJECTED)
def test_rejected_with_torchs_text(make, return_indices, place, entry):
    made = make()
    made = made._replace(kwargs=made.kwargs | {"return_indices": return_indices})
    assert_same_error(outcome(F.max_pool2d, made), outcome(ENTRIES[entry], at(place, made)), made)


@entry
@rows(REJECTED_BY_TYPE)
def test_rejected_with_torchs_type(make, entry):
    made = make()
    assert_same_error(outcome(F.max_pool2d, made), outcome(ENTRIES[entry], made), made, compare_text=False)


def op_info():
    pytest.importorskip("expecttest")  # torch.testing needs it
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == "nn.functional.max_pool2d")


def test_opinfo_error_inputs():
    for error_input in op_info().error_inputs("cpu"):
        sample = error_input.sample_input
        for function in ENTRIES.values():
            with pytest.raises(error_input.error_type, match=error_input.error_regex):
                function(sample.input, *sample.args, **sample.kwargs)


# -- where we do not follow torch: docs/differences.md -----------------------------------------------------------------

EMPTY_WINDOWS = {
    "dilation one above the size": lambda: call(x(1, 1, 2, 2), 2, 1, 1, 3),
    "in height only": lambda: call(x(1, 1, 2, 6), 2, 1, (1, 0), (3, 1)),
    "in width only": lambda: call(x(3, 6, 2), 2, 1, (0, 1), (1, 3)),
    "ceil_mode": lambda: call(x(1, 1, 2, 2), 3, 20, 1, 5, True),
}


@entry
@rows(EMPTY_WINDOWS)
def test_window_wholly_in_the_padding(make, entry):
    """torch returns an index outside the input, or in another row, and its backward then writes there."""
    made = make()
    assert check_max_pool2d(*made.args, **made.kwargs).has_empty_window
    made.kwargs["return_indices"] = True
    values, _ = F.max_pool2d(*made.args, **made.kwargs)
    assert values.min() == -torch.inf
    with pytest.raises(RuntimeError, match="no return_indices=True where a window lies wholly in the padding"):
        ENTRIES[entry](*made.args, **made.kwargs)


def test_window_wholly_in_the_padding_without_indices():
    for make in EMPTY_WINDOWS.values():
        made = make()
        input = made.args[0].requires_grad_()
        output = tritune.max_pool2d(input, *made.args[1:], **made.kwargs)
        assert torch.equal(output, F.max_pool2d(input.detach(), *made.args[1:], **made.kwargs))
        (gradient,) = torch.autograd.grad(output, input, torch.ones_like(output))
        assert gradient.shape == input.shape
        assert gradient.sum() == (output > -torch.inf).sum()


def test_has_empty_window_is_exact():
    """Against the definition, for every small legal geometry along one dimension."""
    found = 0
    for size, kernel, stride, dilation, ceil_mode in itertools.product(
        range(1, 6), range(1, 6), range(1, 8), range(1, 8), (False, True)
    ):
        for padding in range(kernel // 2 + 1):
            made = call(x(1, 1, 8, size), (1, kernel), (1, stride), (0, padding), (1, dilation), ceil_mode)
            ours = outcome(check_max_pool2d, made)
            if isinstance(ours, Exception):
                continue
            starts = (first * stride - padding for first in range(ours.output_size[1]))
            windows = ([start + tap * dilation for tap in range(kernel)] for start in starts)
            expected = any(not any(0 <= tap < size for tap in window) for window in windows)
            assert ours.has_empty_window is expected, made
            found += expected
    assert found > 100


@entry
def test_one_number_as_array_or_bool_tensor(entry):
    """torch's parser takes them in some places and fails an internal assertion in others."""
    function = ENTRIES[entry]
    if YARDSTICK:
        assert "INTERNAL ASSERT" in str(outcome(F.max_pool2d, call(x(), np.array(2))))
        assert isinstance(outcome(F.max_pool2d, call(x(), torch.tensor(True))), Tensor)
    assert not isinstance(outcome(function, call(x(), np.array(2))), Exception)
    assert type(outcome(function, call(x(), torch.tensor(True)))) is TypeError


@entry
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e5m2], ids=str)
def test_meta_accepts_only_what_the_cpu_accepts(dtype, entry):
    """torch's meta max_pool2d returns a shape for dtypes that it has no kernel for."""
    made = at("meta", call(x(dtype=dtype), 2))
    assert not YARDSTICK or isinstance(outcome(F.max_pool2d, made), Tensor)
    assert type(outcome(ENTRIES[entry], made)) is NotImplementedError


# -- what torch accepts ------------------------------------------------------------------------------------------------

ONE, TWO, THREE, NONE = (1, 1), (2, 2), (3, 3), (0, 0)


def args(kernel_size, stride, padding, dilation, output_size, ceil_mode=False):
    return MaxPool2dArgs(kernel_size, stride, padding, dilation, ceil_mode, output_size, False)


ACCEPTED = {
    "defaults": (lambda: call(x(), 2), args(TWO, TWO, NONE, ONE, (3, 3))),
    "stride None": (lambda: call(x(), (2, 3), None), args((2, 3), (2, 3), NONE, ONE, (3, 2))),
    "stride ()": (lambda: call(x(), 2, ()), args(TWO, TWO, NONE, ONE, (3, 3))),
    "stride []": (lambda: call(x(), 2, []), args(TWO, TWO, NONE, ONE, (3, 3))),
    "ints": (lambda: call(x(), 3, 2, 1, 1), args(THREE, TWO, ONE, ONE, (3, 3))),
    "one-element tuples": (lambda: call(x(), (3,), (2,), (1,), (1,)), args(THREE, TWO, ONE, ONE, (3, 3))),
    "lists": (lambda: call(x(), [3, 2], [2, 1], [1, 0], [1, 2]), args((3, 2), (2, 1), (1, 0), (1, 2), (3, 4))),
    "torch.Size": (lambda: call(x(), torch.Size((3, 2))), args((3, 2), (3, 2), NONE, ONE, (2, 3))),
    "numpy ints": (lambda: call(x(), np.int64(3), (np.int8(2), 2), np.uint8(1)), args(THREE, TWO, ONE, ONE, (3, 3))),
    "int tensors": (
        lambda: call(x(), kernel_size=torch.tensor(3), stride=(torch.tensor([2]), 2)),
        args(THREE, TWO, NONE, ONE, (2, 2)),
    ),
    "late bool": (lambda: call(x(), (2, True)), args((2, 1), (2, 1), NONE, ONE, (3, 6))),
    "ceil_mode": (lambda: call(x(2, 3, 6, 7), 2, 2, 0, 1, True), args(TWO, TWO, NONE, ONE, (3, 4), True)),
    # The last window must start inside the input or the padding before it.
    "ceil_mode 4 1 3 0": (lambda: call(x(1, 1, 4, 4), 1, 3, 0, 1, True), args(ONE, THREE, NONE, ONE, (2, 2), True)),
    "ceil_mode 3 2 3 1": (lambda: call(x(1, 1, 3, 3), 2, 3, 1, 1, True), args(TWO, THREE, ONE, ONE, (2, 2), True)),
    "ceil_mode 6 2 5 1": (lambda: call(x(1, 1, 6, 6), 2, 5, 1, 1, True), args(TWO, (5, 5), ONE, ONE, (2, 2), True)),
    "ceil_mode 5 1 2 0": (lambda: call(x(1, 1, 5, 5), 1, 2, 0, 1, True), args(ONE, TWO, NONE, ONE, (3, 3), True)),
    "kernel above the size, ceil_mode": (
        lambda: call(x(), 7, 2, 0, 1, True),
        args((7, 7), TWO, NONE, ONE, (1, 1), True),
    ),
    "stride 2**31-1": (
        lambda: call(x(), 2, 2**31 - 1),
        args(TWO, (2**31 - 1, 2**31 - 1), NONE, ONE, (1, 1)),
    ),
    "dilated": (lambda: call(x(), 3, 1, 1, 2), args(THREE, ONE, ONE, TWO, (4, 4))),
    "padding half of an even kernel": (lambda: call(x(), 2, 1, 1), args(TWO, ONE, ONE, ONE, (7, 7))),
    "chw": (lambda: call(x(3, 6, 6), 2), args(TWO, TWO, NONE, ONE, (3, 3))),
    "empty batch": (lambda: call(x(0, 3, 6, 6), 2), args(TWO, TWO, NONE, ONE, (3, 3))),
    "channels last": (lambda: call(channels_last(), 2), args(TWO, TWO, NONE, ONE, (3, 3))),
    **{
        f"return_indices {value!r}": (
            lambda value=value: call(x(), 2, return_indices=value),
            args(TWO, TWO, NONE, ONE, (3, 3)),
        )
        for value in (True, None, 1, "", [0], np.bool_(True))
    },
    **{
        f"{dtype}": (lambda dtype=dtype: call(x(dtype=dtype), 2), args(TWO, TWO, NONE, ONE, (3, 3)))
        for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
        )
    },
}  # fmt: skip


@place
@pytest.mark.parametrize("make, expected", [pytest.param(*row, id=name) for name, row in ACCEPTED.items()])
def test_accepted_and_normalised(make, expected, place):
    made = make()
    normalised = check_max_pool2d(*at(place, made).args, **at(place, made).kwargs)
    assert normalised == expected
    assert all(type(value) is int for value in itertools.chain(*normalised[:4], normalised.output_size))
    theirs = outcome(F.max_pool2d, made)
    values = theirs[0] if made.kwargs.get("return_indices") else theirs
    assert values.shape[-2:] == normalised.output_size


@pytest.mark.parametrize("make, expected", [pytest.param(*row, id=name) for name, row in ACCEPTED.items()])
def test_accepted_by_the_public_function(make, expected):
    made = make()
    ours, theirs = outcome(tritune.max_pool2d, made), outcome(F.max_pool2d, made)
    assert type(ours) is type(theirs), ours
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_opinfo_samples():
    for sample in op_info().sample_inputs("cpu", torch.float32, requires_grad=False):
        made = call(sample.input, *sample.args, **sample.kwargs)
        theirs = outcome(F.max_pool2d, made)
        values = theirs if isinstance(theirs, Tensor) else theirs[0]
        assert check_max_pool2d(*made.args, **made.kwargs).output_size == tuple(values.shape[-2:])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_left_to_torch():
    """Layouts that are torch's own affair pass the check; torch serves or rejects them."""
    quantised = torch.quantize_per_tensor(x(), 0.1, 0, torch.quint8)
    for input in (x().to_sparse(), x(dtype=torch.bool).to_sparse(), x().to_mkldnn(), quantised):
        assert isinstance(outcome(check_max_pool2d, call(input, 2)), MaxPool2dArgs)


# -- any call ----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2, torch.uint16]


class Draw:
    """Random calls, most of them legal but for one or two faults."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mostly(self, usual, *odd, chance: float = 0.1):
        return self.random.choice(odd) if self.random.random() < chance else usual

    def form(self, value: int):
        usual = self.random.choice((value, (value, value), (value, 1), [value], [value, value]))
        return self.mostly(usual, (value,) * 3, (), chance=0.04)

    def max_pool2d(self) -> Call:
        rnd, mostly = self.random, self.mostly
        full = (mostly(rnd.randint(1, 3), 0), *(mostly(rnd.randint(1, high), 0, chance=0.06) for high in (3, 9, 9)))
        shape = mostly(rnd.choice((full, full, full[1:])), full[2:], (1, *full), chance=0.04)
        input = x(*shape, dtype=mostly(torch.float32, *DTYPES))
        if len(shape) == 4 and rnd.random() < 0.3:
            input = input.contiguous(memory_format=torch.channels_last)
        kernel = mostly(rnd.randint(1, 5), 0, -1, 9)
        kwargs = {
            "stride": mostly(self.form(mostly(rnd.randint(1, 6), 0, -1)), None),
            "padding": self.form(mostly(rnd.randint(0, max(kernel // 2, 0)), -1, 2, 3)),
            "dilation": self.form(mostly(rnd.randint(1, 5), 0, -1)),
            "ceil_mode": rnd.random() < 0.5,
            "return_indices": rnd.random() < 0.5,
        }
        return call(input, self.form(kernel), **{name: value for name, value in kwargs.items() if rnd.random() < 0.6})


def test_random_calls():
    draw = Draw(seed=20261130)
    accepted = rejected = 0
    while accepted < 400 or rejected < 400:
        made = draw.max_pool2d()
        theirs, ours = outcome(F.max_pool2d, made), outcome(check_max_pool2d, made)
        if isinstance(ours, RuntimeError) and "wholly in the padding" in str(ours):
            assert isinstance(theirs, tuple)  # docs/differences.md
            continue
        if isinstance(theirs, Exception):
            rejected += 1
            assert_same_error(theirs, ours, made)
        else:
            accepted += 1
            assert isinstance(ours, MaxPool2dArgs), f"torch accepts {made}, we say {ours!r}"
            values = theirs if isinstance(theirs, Tensor) else theirs[0]
            assert ours.output_size == tuple(values.shape[-2:]), made
        meta = outcome(check_max_pool2d, at("meta", made))
        assert (type(meta), str(meta)) == (type(ours), str(ours)), made


# -- torch.compile -----------------------------------------------------------------------------------------------------


def compiled(dynamic=None, **arguments):
    """max_pool2d's arguments as a compiled function, and the graphs that it has been compiled into."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=keep)
    def function(input):
        args = check_max_pool2d(input, **arguments)
        output = F.max_pool2d(input, args.kernel_size, args.stride, args.padding, args.dilation, args.ceil_mode)
        return output, args.output_size, args.has_empty_window

    return function, graphs


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_traced_with_symbolic_sizes(ceil_mode):
    """Dynamo traces the check in one graph that serves other batch and image sizes."""
    function, graphs = compiled(kernel_size=3, stride=2, padding=1, ceil_mode=ceil_mode)
    for n, height, width in ((2, 6, 8), (3, 18, 4), (5, 4, 30)):
        input = x(n, 3, height, width)
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(input, dim)
        output, output_size, has_empty_window = function(input)
        assert torch.equal(output, F.max_pool2d(input, 3, 2, 1, 1, ceil_mode))
        assert output_size == tuple(output.shape[-2:])
        assert has_empty_window is False
    assert len(graphs) == 1


def test_symbolic_sizes_may_have_an_empty_window():
    """With a symbolic size the answer would be a guard: it is the careful one instead."""
    arguments = {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 3}
    function, graphs = compiled(**arguments)
    for size in (6, 9):
        input = x(2, 3, size, size + 1)
        for dim in (2, 3):
            torch._dynamo.mark_dynamic(input, dim)
        assert function(input)[2] is True
        assert check_max_pool2d(input, **arguments).has_empty_window is False
    assert len(graphs) == 1
    function, _ = compiled(dynamic=False, **arguments)
    assert function(x(2, 3, 6, 7))[2] is False
    assert function(x(2, 3, 2, 7))[2] is True


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    # docs/differences.md: torch rejects them with errors of several types, from deep inside.
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    with pytest.raises(NotImplementedError, match="nested tensor"):
        tritune.max_pool2d(nested, 2)
