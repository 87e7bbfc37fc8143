"""torch.compile, torch.export and torch.fx of the recurrent modules: every cell, depth, direction and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tritune

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm-projected": ("LSTM", {"proj_size": 2}),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module(cell: str, **options: Any) -> Any:
    name, own = CELLS[cell]
    return getattr(tritune.nn, name)(3, 4, **own, **options)


def sequence(batch_first: bool = False) -> Tensor:
    return torch.randn(3, 5, 3) if batch_first else torch.randn(5, 3, 3)


def initial(layer: Any, batch: int) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, batch, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(rows, batch, layer.hidden_size)) if layer.mode == "LSTM" else h


def tensors(results: Any) -> list[Tensor]:
    """All tensors of a result, those of packed sequences and states included."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        results = [one for one in results if one is not None]
    return [tensor for one in results for tensor in tensors(one)]


def packed(x: Tensor, batch_first: bool, is_sorted: bool) -> PackedSequence:
    lengths = torch.tensor([5, 3, 3] if is_sorted else [2, 5, 3])
    return pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=is_sorted)


def assert_compiled_is_eager(layer: Any, arguments: tuple[Any, ...], backend: str = "aot_eager") -> None:
    """Values, strides and, where there are gradients, those of every parameter and of the input."""
    compiled = torch.compile(layer, fullgraph=True, backend=backend if torch.is_grad_enabled() else "eager")
    leaves = [*layer.parameters(), *(t for t in tensors(arguments) if t.requires_grad)]
    outcomes = []
    for run in (layer, compiled):
        torch.manual_seed(7)
        results = tensors(run(*arguments))
        floating = [t for t in results if t.is_floating_point()]
        loss = sum(t.square().sum() for t in floating)
        grads = torch.autograd.grad(loss, leaves) if torch.is_grad_enabled() else ()
        outcomes.append((results, grads, [t.stride() for t in results]))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0])
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=1e-4, atol=1e-5)
    assert outcomes[1][2] == outcomes[0][2]


# num_layers, bidirectional, batch_first
LAYOUTS = ((1, False, True), (1, True, False), (2, False, False), (2, True, True), (3, False, True))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("num_layers, bidirectional, batch_first", LAYOUTS)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "relu"])
class TestCompiled:
    def test_padded(self, cell, num_layers, bidirectional, batch_first, training):
        layer = module(cell, num_layers=num_layers, bidirectional=bidirectional, batch_first=batch_first)
        x = sequence(batch_first).requires_grad_(training)
        with torch.set_grad_enabled(training):
            assert_compiled_is_eager(layer, (x, initial(layer, 3)) if bidirectional else (x,))

    def test_packed(self, cell, num_layers, bidirectional, batch_first, training):
        layer = module(cell, num_layers=num_layers, bidirectional=bidirectional, batch_first=batch_first)
        x = packed(sequence(batch_first), batch_first, is_sorted=not bidirectional)
        with torch.set_grad_enabled(training):
            assert_compiled_is_eager(layer, (x, initial(layer, 3)) if num_layers == 2 else (x,))


@pytest.mark.parametrize("cell", CELLS)
class TestCompiledOptions:
    def test_one_sequence(self, cell):
        layer = module(cell, num_layers=2, bidirectional=True, batch_first=True)
        hx = initial(layer, 1)
        hx = tuple(h.squeeze(1) for h in hx) if isinstance(hx, tuple) else hx.squeeze(1)
        assert_compiled_is_eager(layer, (torch.randn(5, 3, requires_grad=True), hx))

    def test_without_biases(self, cell):
        assert_compiled_is_eager(module(cell, num_layers=2, bias=False), (sequence(),))

    def test_dropout(self, cell):
        """Of everything, so that it cannot depend on the order of random numbers: the last layer gets zeros."""
        layer = module(cell, num_layers=2, dropout=1.0)
        assert_compiled_is_eager(layer, (sequence(),))
        assert_compiled_is_eager(layer.eval(), (sequence(),))

    @pytest.mark.parametrize("is_packed", [False, True])
    def test_a_state_that_does_not_fit(self, cell, is_packed):
        layer = module(cell, num_layers=2)
        x = packed(sequence(), False, True) if is_packed else sequence()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for wrong in (initial(module(cell, num_layers=3), 3), initial(layer, 2)):
            with pytest.raises(RuntimeError):
                compiled(x, wrong)


@pytest.mark.parametrize("cell, is_packed", [("lstm", False), ("gru", True)])
def test_inductor(cell, is_packed):
    layer = module(cell, num_layers=2, bidirectional=True)
    x = packed(sequence(), False, False) if is_packed else sequence().requires_grad_()
    assert_compiled_is_eager(layer, (x,), backend="inductor")
