"""The recurrent layers reject what torch.nn's reject, with torch's exception type and text, on every kind of tensor."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_errors import PLACES, assert_same_error, at, call, outcome

import tritune

pytestmark = pytest.mark.torch

MODULES = ("RNN", "GRU", "LSTM")


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (5, 2, 3)).to(dtype)


def state(name: str, *shape: int) -> Any:
    """h_0, and for LSTM the pair."""
    h = torch.ones(shape)
    return (h, h.clone()) if name == "LSTM" else h


# input_size=3, hidden_size=4, one layer, two directions
REJECTED = {
    "no steps": lambda name: call(x(0, 2, 3)),
    "no steps, one sequence": lambda name: call(x(0, 3)),
    "1-d input": lambda name: call(x(3)),
    "4-d input": lambda name: call(x(5, 2, 3, 1)),
    "integers": lambda name: call(x(dtype=torch.int64)),
    "float64": lambda name: call(x(dtype=torch.float64)),
    "float16": lambda name: call(x(dtype=torch.float16)),
    "wrong feature size": lambda name: call(x(5, 2, 7)),
    "state of another batch": lambda name: call(x(), state(name, 2, 3, 4)),
    "state of one sequence is not broadcast": lambda name: call(x(), state(name, 2, 1, 4)),
    "state of one direction": lambda name: call(x(), state(name, 1, 2, 4)),
    "state of another size": lambda name: call(x(), state(name, 2, 2, 5)),
    "2-d state for a batch": lambda name: call(x(), state(name, 2, 4)),
    "3-d state for one sequence": lambda name: call(x(5, 3), state(name, 2, 1, 4)),
    "wrong state for one sequence": lambda name: call(x(5, 3), state(name, 2, 5)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("made", REJECTED)
@pytest.mark.parametrize("name", MODULES)
def test_modules_reject_what_torch_rejects(name, made, place):
    theirs, mine = (getattr(nn, name)(3, 4, bidirectional=True) for nn in (torch.nn, tritune.nn))
    arguments = REJECTED[made](name)
    wanted = outcome(theirs, arguments)
    moved = at(place, arguments)
    if name == "LSTM" and len(arguments.args) == 2:  # a pair is not moved by ``at``
        pair = at(place, call(*arguments.args[1]))
        moved = call(moved.args[0], tuple(pair.args))
    if place != "cpu":
        mine = mine.to("meta") if place == "meta" else mine
    assert_same_error(wanted, outcome(mine, moved), arguments)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_batch_first_errors(name, batch_first):
    theirs, mine = (getattr(nn, name)(3, 4, batch_first=batch_first) for nn in (torch.nn, tritune.nn))
    for made in (
        call(x(2, 5, 3), state(name, 1, 5 if batch_first else 2, 4)),
        call(x(2, 0, 3) if batch_first else x(0, 2, 3)),
    ):
        assert_same_error(outcome(theirs, made), outcome(mine, made), made)


CONSTRUCTORS = {
    "proj_size": lambda: call(3, 4, proj_size=2),
    "nonlinearity": lambda: call(3, 4, nonlinearity="sin"),
    "hidden_size 0": lambda: call(3, 0),
    "num_layers 0": lambda: call(3, 4, 0),
    "dropout": lambda: call(3, 4, dropout=1.5),
    "bias": lambda: call(3, 4, 1, bias=3),
    "projection too large": lambda: call(3, 4, proj_size=4),
}


@pytest.mark.parametrize("made", CONSTRUCTORS)
@pytest.mark.parametrize("name", MODULES)
def test_constructors_reject_what_torchs_reject(name, made):
    arguments = CONSTRUCTORS[made]()
    wanted = outcome(getattr(torch.nn, name), arguments)
    got = outcome(getattr(tritune.nn, name), arguments)
    unknown = set(arguments.kwargs) - set(inspect.signature(getattr(tritune.nn, name)).parameters)
    if unknown:  # torch's constructors take anything, and find out in different places
        assert isinstance(wanted, Exception)
        assert isinstance(got, TypeError)
        assert f"unexpected keyword argument '{unknown.pop()}'" in str(got)
    elif isinstance(wanted, Exception):
        assert_same_error(wanted, got, arguments)
    else:
        assert repr(got) == repr(wanted)


class TestOurs:
    """Arguments that torch's modules do not have, and calls that torch answers with an obscure error."""

    def test_a_state_that_is_no_pair(self):
        with pytest.raises(TypeError, match="pair of tensors"):
            tritune.nn.LSTM(3, 4)(x(), torch.ones(1, 2, 4))
        with pytest.raises(TypeError, match="pair of tensors"):
            tritune.nn.LSTM(3, 4)(x(), (torch.ones(1, 2, 4), None))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_a_state_of_another_dtype(self, dtype):
        with pytest.raises(ValueError, match="does not match"):
            tritune.nn.GRU(3, 4)(x(), torch.ones(1, 2, 4, dtype=dtype))

    @pytest.mark.parametrize("value", [None, [1.0], 3])
    def test_no_tensor(self, value):
        with pytest.raises((TypeError, AttributeError)):
            tritune.nn.RNN(3, 4)(value)
        with pytest.raises(TypeError, match="input must be a Tensor"):
            tritune.rnn(value, x(4, 3), x(4, 4))

    @pytest.mark.parametrize(
        "w_ih, w_hh, b_ih",
        [((4, 3), (4, 5), None), ((8, 3), (4, 4), None), ((4, 3), (1, 4, 4), None), ((3, 4, 3), (3, 4, 4), None),
         ((4, 3), (4, 4), (5,)), ((2, 4, 3), (2, 4, 4), (4,))],
    )  # fmt: skip
    def test_weights_that_do_not_fit(self, w_ih, w_hh, b_ih):
        with pytest.raises(RuntimeError, match="must"):
            tritune.rnn(x(), x(*w_ih), x(*w_hh), None if b_ih is None else x(*b_ih))

    def test_a_nested_tensor(self):
        nested = torch.nested.nested_tensor([torch.ones(3, 3), torch.ones(2, 3)], layout=torch.jagged)
        with pytest.raises(NotImplementedError, match="input is a nested tensor"):
            tritune.rnn(nested, x(4, 3), x(4, 4))

    def test_options(self):
        for wrong in ("sin", "gru", "lstm"):
            with pytest.raises(ValueError, match=f"Unknown nonlinearity '{wrong}'"):
                tritune.rnn(x(), x(4, 3), x(4, 4), nonlinearity=wrong)
        with pytest.raises(ValueError, match="precision='bf16'"):
            tritune.gru(x(), x(12, 3), x(12, 4), precision="bf16")
        with pytest.raises(ValueError, match="reverse"):
            tritune.rnn(x(), x(2, 4, 3), x(2, 4, 4), reverse=True)

    def test_elman_step(self):
        weights = (x(4, 3), x(4, 4))
        with pytest.raises(RuntimeError, match="x and h must both be"):
            tritune.elman_step(x(2, 3), x(4), *weights)
        with pytest.raises(TypeError, match="h must be a Tensor"):
            tritune.elman_step(x(2, 3), None, *weights)
        with pytest.raises(ValueError, match="need W_ho"):
            tritune.elman_step(x(2, 3), x(2, 4), *weights, W_yh=x(5, 4))

    @pytest.mark.parametrize(
        "name, shape, message",
        [
            ("b_h", (1,), r"b_h must be \[4\], got \[1\]"),
            ("W_ho", (5, 3), r"W_ho must be \[O, 4\], got \[5, 3\]"),
            ("b_o", (1,), r"b_o must be \[5\], got \[1\]"),
            ("W_yh", (5,), r"W_yh must be \[Y, 5\], got \[5\]"),
            ("W_yh", (6, 4), r"W_yh must be \[Y, 5\], got \[6, 4\]"),
        ],
    )
    def test_the_head_of_elman_step(self, name, shape, message):
        right = {"b_h": x(4), "W_ho": x(5, 4), "b_o": x(5), "W_yh": x(6, 5)}
        tritune.elman_step(x(2, 3), x(2, 4), x(4, 3), x(4, 4), **right)
        with pytest.raises(RuntimeError, match=message):
            tritune.elman_step(x(2, 3), x(2, 4), x(4, 3), x(4, 4), **{**right, name: x(*shape)})

    @pytest.mark.parametrize("name", ["h", "W_xh", "W_hh", "b_h", "W_ho", "b_o", "W_yh"])
    def test_elman_step_on_two_devices(self, name):
        """torch's products of a meta tensor and a real one return numbers."""
        right = {"h": x(2, 4), "W_xh": x(4, 3), "W_hh": x(4, 4), "b_h": x(4), "W_ho": x(5, 4), "b_o": x(5)}
        right |= {"W_yh": x(6, 5)}
        with pytest.raises(RuntimeError, match="device"):
            tritune.elman_step(x(2, 3), **{**right, name: right[name].to("meta")})

    def test_elman_network(self):
        for name in ("input_size", "hidden_size", "output_size", "y_size"):
            sizes = {"input_size": 3, "hidden_size": 4, "output_size": 5}
            with pytest.raises(ValueError, match=f"{name} must be greater than zero"):
                tritune.nn.ElmanRNN(**{**sizes, name: 0})
            with pytest.raises(TypeError, match=f"{name} should be of type int, got: float"):
                tritune.nn.ElmanRNN(**{**sizes, name: 2.5})
        for wrong in ([1], x(4), x(1, 2, 4)):
            with pytest.raises(RuntimeError, match=r"h0 must be \[B, H\]"):
                tritune.nn.ElmanRNN(3, 4, 2)(x(5, 2, 3), wrong)

    @pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
    def test_complex_numbers(self, name):
        layer = getattr(tritune.nn, name)(3, 4, dtype=torch.complex64)
        with pytest.raises(ValueError, match="takes floating-point tensors, got torch"):
            layer(torch.zeros(5, 2, 3, dtype=torch.complex64))
