"""conv2d rejects what torch rejects, with torch's exception type and text, and accepts the forms that torch accepts."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_errors import PLACES, YARDSTICK, Call, assert_same_error, at, call, outcome

import tritune
from tritune.ops._checks import ACTIVATIONS, PRECISIONS, Conv2dArgs, check_conv2d

pytestmark = pytest.mark.torch

ENTRIES = {"check": check_conv2d, "public": tritune.conv2d}
entry = pytest.mark.parametrize("entry", ENTRIES)
place = pytest.mark.parametrize("place", PLACES)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (2, 4, 6, 6)).to(dtype)


def w(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (8, 4, 3, 3)).to(dtype)


def b(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (8,)).to(dtype)


def rows(table):
    return pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in table.items()])


# -- what torch rejects ------------------------------------------------------------------------------------------------

REJECTED = {
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

# torch's text is the list of its signatures, or names an argument by its place in the C++ one.
REJECTED_BY_TYPE = {
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


@entry
@place
@rows(REJECTED)
def test_rejected_with_torchs_text(make, place, entry):
    made = make()
    assert_same_error(outcome(F.conv2d, made), outcome(ENTRIES[entry], at(place, made)), made)


@entry
@place
@rows(REJECTED_BY_TYPE)
def test_rejected_with_torchs_type(make, place, entry):
    made = make()
    assert_same_error(outcome(F.conv2d, made), outcome(ENTRIES[entry], at(place, made)), made, compare_text=False)


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex32, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, dilation):
    for other in DTYPES:
        for made in (
            call(x(dtype=dtype), w(dtype=other), None, 1, 0, dilation),
            call(x(1, 4, 6, 6, dtype=dtype), w(dtype=other), None, 1, 0, dilation),
            call(x(dtype=dtype), w(dtype=dtype), b(dtype=other), 1, 0, dilation),
        ):
            theirs, ours = outcome(F.conv2d, made), outcome(check_conv2d, made)
            if isinstance(theirs, Tensor):
                assert isinstance(ours, Conv2dArgs), f"{made}: {ours}"
            else:
                assert_same_error(theirs, ours, made)


@entry
def test_mixed_dtypes_on_a_gpu(entry):
    """They get the text of the CPU: one fault, one text."""
    on_cpu = outcome(ENTRIES[entry], call(x(), w(dtype=torch.float64)))
    with FakeTensorMode():
        on_gpu = outcome(ENTRIES[entry], call(x().to("cuda:0"), w(dtype=torch.float64).to("cuda:0")))
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


@entry
@pytest.mark.parametrize("devices", MIXED_DEVICES, ids=" ".join)
def test_mixed_devices(devices, entry):
    """torch's own fake and meta tensors accept the mix that its real ones reject."""
    with FakeTensorMode():  # a CPU build of torch has no other CUDA tensors
        input, weight, bias = (operand.to(device) for operand, device in zip((x(), w(), b()), devices, strict=True))
        assert not YARDSTICK or isinstance(outcome(F.conv2d, call(input, weight, bias)), Tensor)
        ours = outcome(ENTRIES[entry], call(input, weight, bias))
    assert type(ours) is RuntimeError
    assert str(ours).startswith(MIXED_DEVICES[devices])


def test_opinfo_error_inputs():
    for error_input in op_info("nn.functional.conv2d").error_inputs("cpu"):
        sample = error_input.sample_input
        for function in ENTRIES.values():
            with pytest.raises(error_input.error_type, match=error_input.error_regex):
                function(sample.input, *sample.args, **sample.kwargs)


def op_info(name):
    pytest.importorskip("expecttest")  # torch.testing needs it
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == name)


# -- where we do not follow torch: docs/differences.md -----------------------------------------------------------------

# torch looks at these operands only where there is something to compute, and then rejects them.
REJECTED_IF_NOT_EMPTY = {
    "weight float64": lambda n, c: call(x(n, c, 6, 6), w(8, c, 3, 3, dtype=torch.float64)),
    "bool": lambda n, c: call(x(n, c, 6, 6, dtype=torch.bool), w(8, c, 3, 3, dtype=torch.bool)),
    "int32, dilated": lambda n, c: call(x(n, c, 6, 6, dtype=torch.int32), w(8, c, 3, 3, dtype=torch.int32), dilation=2),
    "dilation 0": lambda n, c: call(x(n, c, 6, 6), w(8, c, 3, 3), dilation=0),
    "kernel 0": lambda n, c: call(x(n, c, 6, 6), w(8, c, 0, 3)),
}


@entry
@rows(REJECTED_IF_NOT_EMPTY)
def test_empty_input_has_the_same_rules(make, entry):
    full = outcome(F.conv2d, make(2, 4))
    for made in (make(0, 4), make(2, 0), make(0, 0)):
        assert type(outcome(ENTRIES[entry], made)) is type(full)
        assert not YARDSTICK or isinstance(outcome(F.conv2d, made), (Tensor, IndexError))


@entry
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_bias_dtype_with_a_padding_string(padding, entry):
    """torch compares the dtypes of input and bias unless padding is a string and the kernel is its own."""
    for made in (
        call(x(dtype=torch.float64), w(dtype=torch.float64), b(), padding=padding),
        call(x(1, 4, 6, 6), w(), b(dtype=torch.float64), padding=padding),
    ):
        assert not YARDSTICK or isinstance(outcome(F.conv2d, made), Tensor)
        ours = outcome(ENTRIES[entry], made)
        assert type(ours) is RuntimeError
        assert "expected scalar type" in str(ours)


@entry
def test_one_number_as_array_or_bool_tensor(entry):
    """torch's parser takes them in some places and fails an internal assertion in others."""
    function = ENTRIES[entry]
    if YARDSTICK:
        assert "INTERNAL ASSERT" in str(outcome(F.conv2d, call(x(), w(), stride=np.array(2))))
        assert isinstance(outcome(F.conv2d, call(x(), w(), stride=torch.tensor(True))), Tensor)
        assert isinstance(outcome(F.conv2d, call(x(), w(), groups=torch.tensor(True))), RuntimeError)
    for number in (np.array(2), np.int64(2), torch.tensor(2)):
        ours, expected = function(x(), w(), stride=number), function(x(), w(), stride=2)
        assert torch.equal(ours, expected) if isinstance(ours, Tensor) else ours == expected
    for name in ("stride", "groups"):
        assert type(outcome(function, call(x(), w(), **{name: torch.tensor(True)}))) is TypeError


@entry
@pytest.mark.parametrize(
    "fault",
    [{"padding": -1}, {"stride": 0}, {"dilation": 0}, {"dilation": -1}, {"stride": (1, 1, 1)}, {"bias": b(7)}],
    ids=str,
)
def test_meta_accepts_only_what_the_cpu_accepts(fault, entry):
    """torch's meta conv returns a shape or divides by zero here."""
    made = at("meta", call(x(), w(), **fault))
    assert not YARDSTICK or not isinstance(outcome(F.conv2d, made), RuntimeError)
    assert type(outcome(ENTRIES[entry], made)) is RuntimeError


@pytest.mark.checkout
def test_differences_are_tested():
    """Each test that docs/differences.md names exists."""
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+)::(test_\w+)`", (tests.parent / "docs/differences.md").read_text())
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"^ *def {test}\(", (tests / f"{file}.py").read_text(), re.MULTILINE), f"{file}::{test}"


# -- what torch accepts ------------------------------------------------------------------------------------------------

ONE, TWO, NONE = (1, 1), (2, 2), (0, 0)
ACCEPTED = {
    "defaults": (lambda: call(x(), w()), Conv2dArgs(ONE, NONE, ONE, 1, None)),
    "ints": (lambda: call(x(), w(), b(), 2, 1, 2), Conv2dArgs(TWO, ONE, TWO, 1, None)),
    "one-element tuples": (lambda: call(x(), w(), b(), (2,), (1,), (2,)), Conv2dArgs(TWO, ONE, TWO, 1, None)),
    "tuples": (lambda: call(x(), w(), b(), (1, 2), (3, 1), (2, 1)), Conv2dArgs((1, 2), (3, 1), (2, 1), 1, None)),
    "lists": (lambda: call(x(), w(), b(), [1, 2], [3, 1], [2, 1]), Conv2dArgs((1, 2), (3, 1), (2, 1), 1, None)),
    "torch.Size": (lambda: call(x(), w(), stride=torch.Size((1, 2))), Conv2dArgs((1, 2), NONE, ONE, 1, None)),
    "numpy ints": (
        lambda: call(x(), w(8, 2, 3, 3), None, np.int64(2), (np.int32(1), np.uint8(0)), 1, np.int64(2)),
        Conv2dArgs(TWO, (1, 0), ONE, 2, None),
    ),
    "int tensors": (
        lambda: call(
            x(), w(), stride=torch.tensor(2), padding=(torch.tensor(1), torch.tensor([0])), groups=torch.tensor(1)
        ),
        Conv2dArgs(TWO, (1, 0), ONE, 1, None),
    ),
    "late bool": (lambda: call(x(), w(), stride=(2, True)), Conv2dArgs((2, 1), NONE, ONE, 1, None)),
    "groups": (lambda: call(x(), w(8, 2, 3, 3), groups=2), Conv2dArgs(ONE, NONE, ONE, 2, None)),
    "depthwise": (lambda: call(x(), w(8, 1, 3, 3), groups=4), Conv2dArgs(ONE, NONE, ONE, 4, None)),
    "valid": (lambda: call(x(), w(), padding="valid", stride=2), Conv2dArgs(TWO, NONE, ONE, 1, None)),
    "same": (lambda: call(x(), w(), padding="same"), Conv2dArgs(ONE, ONE, ONE, 1, None)),
    "same, numpy string": (lambda: call(x(), w(), padding=np.str_("same")), Conv2dArgs(ONE, ONE, ONE, 1, None)),
    "same, bytes": (lambda: call(x(), w(), padding=b"same"), Conv2dArgs(ONE, ONE, ONE, 1, None)),
    "same, one-element lists": (
        lambda: call(x(), w(), None, [1], "same", [2]),
        Conv2dArgs(ONE, TWO, TWO, 1, None),
    ),
    "same, even": (lambda: call(x(), w(8, 4, 2, 4), padding="same"), Conv2dArgs(ONE, (0, 1), ONE, 1, (0, 1, 0, 1))),
    "same, even height": (
        lambda: call(x(), w(8, 4, 4, 3), padding="same"),
        Conv2dArgs(ONE, ONE, ONE, 1, (0, 0, 0, 1)),
    ),
    "same, even width": (
        lambda: call(x(), w(8, 4, 1, 2), padding="same"),
        Conv2dArgs(ONE, NONE, ONE, 1, (0, 1, 0, 0)),
    ),
    "same, even, dilated by 2": (
        lambda: call(x(), w(8, 4, 2, 2), padding="same", dilation=2),
        Conv2dArgs(ONE, ONE, TWO, 1, None),
    ),
    "same, even, dilated by 3": (
        lambda: call(x(), w(8, 4, 2, 2), padding="same", dilation=3),
        Conv2dArgs(ONE, ONE, (3, 3), 1, (0, 1, 0, 1)),
    ),
    "same, chw": (
        lambda: call(x(4, 6, 6), w(8, 4, 2, 2), padding="same"),
        Conv2dArgs(ONE, NONE, ONE, 1, (0, 1, 0, 1)),
    ),
    "chw": (lambda: call(x(4, 6, 6), w(), b()), Conv2dArgs(ONE, NONE, ONE, 1, None)),
    "kernel as large as the padded input": (
        lambda: call(x(), w(8, 4, 8, 8), padding=1),
        Conv2dArgs(ONE, ONE, ONE, 1, None),
    ),
    "stride 2**40": (lambda: call(x(), w(), stride=2**40), Conv2dArgs((2**40, 2**40), NONE, ONE, 1, None)),
    "padding beyond the kernel": (lambda: call(x(), w(), padding=5), Conv2dArgs(ONE, (5, 5), ONE, 1, None)),
    "empty batch": (lambda: call(x(0, 4, 6, 6), w(), b()), Conv2dArgs(ONE, NONE, ONE, 1, None)),
    "empty batch, height 0": (
        lambda: call(x(0, 4, 0, 6), w(), padding=2),
        Conv2dArgs(ONE, TWO, ONE, 1, None),
    ),
    "no channels": (lambda: call(x(2, 0, 6, 6), w(8, 0, 3, 3)), Conv2dArgs(ONE, NONE, ONE, 1, None)),
    "no channels, chw": (lambda: call(x(0, 6, 6), w(8, 0, 3, 3)), Conv2dArgs(ONE, NONE, ONE, 1, None)),
    "no channels, two groups": (
        lambda: call(x(2, 0, 6, 6), w(8, 0, 3, 3), groups=2),
        Conv2dArgs(ONE, NONE, ONE, 2, None),
    ),
    **{
        f"{dtype}": (
            lambda dtype=dtype: call(x(dtype=dtype), w(dtype=dtype), b(dtype=dtype), 1, 1),
            Conv2dArgs(ONE, ONE, ONE, 1, None),
        )
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.complex64)
    },
    "int64, dilated": (
        lambda: call(x(dtype=torch.int64), w(dtype=torch.int64), dilation=2),
        Conv2dArgs(ONE, NONE, TWO, 1, None),
    ),
}


@place
@pytest.mark.parametrize("make, args", [pytest.param(*row, id=name) for name, row in ACCEPTED.items()])
def test_accepted_and_normalised(make, args, place):
    made = make()
    normalised = check_conv2d(*at(place, made).args, **at(place, made).kwargs)
    assert normalised == args
    assert all(type(value) is int for value in itertools.chain(*normalised[:3], [normalised.groups]))
    if place == "cpu":
        theirs = outcome(F.conv2d, made)
        assert isinstance(theirs, Tensor)
        input = made.args[0] if args.pad_extra is None else F.pad(made.args[0], args.pad_extra)
        bias = made.args[2] if len(made.args) > 2 else None
        torch.testing.assert_close(
            F.conv2d(input, made.args[1], bias, args.stride, args.padding, args.dilation, args.groups), theirs
        )


@pytest.mark.parametrize("make, args", [pytest.param(*row, id=name) for name, row in ACCEPTED.items()])
def test_accepted_by_the_public_function(make, args):
    made = make()
    ours = outcome(tritune.conv2d, made)
    assert isinstance(ours, Tensor), ours
    torch.testing.assert_close(ours, outcome(F.conv2d, made))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_left_to_torch():
    """Layouts that are torch's own affair pass the check; torch serves or rejects them."""
    quantised = torch.quantize_per_tensor(x(), 0.1, 0, torch.quint8)
    for made in (call(x().to_sparse(), w()), call(x().to_mkldnn(), w()), call(quantised, w(dtype=torch.int8))):
        assert isinstance(outcome(check_conv2d, made), Conv2dArgs)


# -- our own keywords --------------------------------------------------------------------------------------------------


@entry
def test_keywords_accepted(entry):
    function = ENTRIES[entry]
    for activation in (None, *ACTIVATIONS):
        assert not isinstance(outcome(function, call(x(), w(), activation=activation)), Exception)
    for precision in (None, *PRECISIONS):
        assert not isinstance(outcome(function, call(x(), w(), precision=precision)), Exception)
    scale = b()
    for made in (
        call(x(), w(), b(), residual=x(2, 8, 4, 4), scale=scale),
        call(x(4, 6, 6), w(), residual=x(8, 4, 4), scale=scale),
        call(x(), w(8, 4, 2, 2), padding="same", residual=x(2, 8, 6, 6)),
        call(x(), w(), None, (1, 2), (2, 1), (1, 2), residual=x(2, 8, 8, 2)),
        call(x(0, 4, 6, 6), w(), residual=x(0, 8, 4, 4)),
        call(x(2, 0, 6, 6), w(8, 0, 3, 3), residual=x(2, 0, 4, 4)),
    ):
        assert not isinstance(outcome(function, made), Exception), made


KEYWORDS_REJECTED = {
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


@entry
@place
@pytest.mark.parametrize("make, kind, text", [pytest.param(*row, id=name) for name, row in KEYWORDS_REJECTED.items()])
def test_keywords_rejected(make, kind, text, place, entry):
    made = at(place, make())
    with pytest.raises(kind, match=text) as caught:
        ENTRIES[entry](*made.args, **made.kwargs)
    assert caught.type is kind


@entry
def test_keywords_on_another_device(entry):
    for name, tensor in (("residual", x(2, 8, 4, 4)), ("scale", b())):
        with pytest.raises(RuntimeError, match="same device, but got " + name):
            ENTRIES[entry](x(), w(), **{name: tensor.to("meta")})


@entry
def test_keywords_are_keyword_only(entry):
    with pytest.raises(TypeError):
        ENTRIES[entry](x(), w(), None, 1, 0, 1, 1, "relu")


# -- any call ----------------------------------------------------------------------------------------------------------


class Draw:
    """Random calls, most of them legal but for one or two faults."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mostly(self, usual, *odd, chance: float = 0.1):
        return self.random.choice(odd) if self.random.random() < chance else usual

    def form(self, value: int):
        return self.random.choice((value, (value, value), (value, 1), [value], [value, value], (value,) * 3, ()))

    def conv2d(self) -> Call:
        rnd, mostly = self.random, self.mostly
        groups = mostly(rnd.choice((1, 1, 2)), 0, -1, 3)
        channels = mostly(rnd.randint(1, 3), 0)
        filters = mostly(rnd.choice((2, 4)), 0, 1, 3)
        batch = mostly(rnd.randint(1, 3), 0)
        height, width = (mostly(rnd.randint(1, 7), 0) for _ in "hw")
        rows, columns = (mostly(rnd.randint(1, 4), 0, 5, 8, chance=0.05) for _ in "rs")
        full = (batch, mostly(channels * max(groups, 1), channels + 1), height, width)
        shape = mostly(rnd.choice((full, full, full[1:])), full[2:], (1, *full), chance=0.05)
        kernel = (filters, channels, rows, columns)
        kernel = mostly(kernel, kernel[:3], kernel[:2], (*kernel, 1), chance=0.05)
        dtype = mostly(torch.float32, *DTYPES, chance=0.3)
        bias = mostly((filters,), None, (filters + 1,), (1, filters), (), chance=0.5)
        padding = mostly(self.form(mostly(rnd.randint(0, 3), -1)), "same", "valid", "full", chance=0.4)
        kwargs = {
            "stride": self.form(mostly(rnd.randint(1, 3), 0, -1)),
            "padding": padding,
            "dilation": self.form(mostly(rnd.randint(1, 3), 0, -1)),
            "groups": groups,
        }
        return call(
            x(*shape, dtype=dtype) if shape else torch.tensor(1.0),
            w(*kernel, dtype=mostly(dtype, *DTYPES, chance=0.05)),
            None if bias is None else torch.ones(bias).to(mostly(dtype, *DTYPES, chance=0.05)),
            **{name: value for name, value in kwargs.items() if rnd.random() < 0.6 or name == "groups"},
        )


def is_listed_difference(made: Call) -> bool:
    """docs/differences.md: torch skips the operands of an empty convolution, and sometimes the dtype of the bias."""
    input, weight, bias = made.args
    padding = made.kwargs.get("padding")
    nothing_to_compute = input.dim() in (3, 4) and (input.shape[-3] == 0 or (input.dim() == 4 and input.shape[0] == 0))
    no_taps = weight.dim() == 4 and (weight.shape[2] == 0 or weight.shape[3] == 0)
    bias_unseen = isinstance(padding, str) and bias is not None and bias.dtype != input.dtype
    cropped = padding == "same" and input.dim() > 2 and (input.shape[-1] == 0 or input.shape[-2] == 0)
    return nothing_to_compute or no_taps or bias_unseen or cropped


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_random_calls():
    draw = Draw(seed=20261130)
    accepted = rejected = 0
    while accepted < 300 or rejected < 300:
        made = draw.conv2d()
        if is_listed_difference(made):
            continue
        theirs, ours = outcome(F.conv2d, made), outcome(check_conv2d, made)
        if isinstance(theirs, Exception):
            rejected += 1
            assert_same_error(theirs, ours, made)
        else:
            accepted += 1
            assert isinstance(ours, Conv2dArgs), f"torch accepts {made}, we say {ours!r}"
        meta = outcome(check_conv2d, at("meta", made))
        assert (type(meta), str(meta)) == (type(ours), str(ours)), made


def test_random_residuals():
    """The output size by which a residual is judged is torch's."""
    draw = Draw(seed=20261201)
    for _ in range(300):
        made = draw.conv2d()
        theirs = outcome(F.conv2d, made)
        if isinstance(theirs, Tensor) and not is_listed_difference(made):
            check_conv2d(*made.args, **made.kwargs, residual=theirs)


# -- torch.compile -----------------------------------------------------------------------------------------------------


def test_traced_with_symbolic_sizes():
    """Dynamo traces the check in one graph that serves other batch and image sizes."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=keep)
    def function(input, weight, bias, residual):
        args = check_conv2d(input, weight, bias, 1, "same", (2, 1), activation="relu", residual=residual)
        if args.pad_extra is not None:
            input = F.pad(input, args.pad_extra)
        return F.conv2d(input, weight, bias, args.stride, args.padding, args.dilation, args.groups)

    kernel = w(8, 4, 2, 4)
    for n, height, width in ((2, 6, 7), (3, 9, 4), (5, 4, 30)):
        input, residual = x(n, 4, height, width), x(n, 8, height, width)
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(input, dim)
            torch._dynamo.mark_dynamic(residual, dim)
        expected = outcome(F.conv2d, call(input, kernel, b(), 1, "same", (2, 1)))
        torch.testing.assert_close(function(input, kernel, b(), residual), expected)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    # docs/differences.md: torch rejects them with errors of several types, from deep inside.
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
    with pytest.raises(NotImplementedError, match="nested tensor"):
        tritune.conv2d(nested, torch.randn(4, 3, 3, 3))
    with pytest.raises(NotImplementedError, match="nested tensor"):
        tritune.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), nested)
    with pytest.raises(NotImplementedError, match="nested tensor"):
        tritune.max_pool2d(nested, 2)
