"""torch.compile, torch.export and torch.fx of the recurrent modules: every cell, depth, direction and layout."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from harness import assert_as_exact
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

    def outcome(call: Any, layer: Any, *arguments: Any) -> tuple[list[Tensor], list[Any]]:
        """What is rounded, and what is not: strides and a packed sequence's integers."""
        torch.manual_seed(7)
        results = tensors(call(*arguments))
        floating = [t for t in results if t.is_floating_point()]
        loss = sum(t.square().sum() for t in floating)
        leaves = [*layer.parameters(), *(t for t in tensors(arguments) if t.requires_grad)]
        grads = torch.autograd.grad(loss, leaves) if torch.is_grad_enabled() else ()
        others = [t.tolist() for t in results if not t.is_floating_point()]
        return [*floating, *grads], [[t.stride() for t in results], others]

    ours, others = outcome(compiled, layer, *arguments)
    assert others == outcome(layer, layer, *arguments)[1]
    # The steps of a layer pass their errors on, so these are not independent of one another.
    exact = lambda layer, *arguments: outcome(layer, layer, *arguments)[0]  # noqa: E731
    assert_as_exact(ours, exact, layer, *arguments, together=True)


# num_layers, bidirectional, batch_first; `make test` takes the smallest of each kind
LAYOUTS = (
    (1, False, True), (1, True, False), (2, True, True),
    pytest.param(2, False, False, marks=pytest.mark.full), pytest.param(3, False, True, marks=pytest.mark.full),
)  # fmt: skip


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


class Output(torch.nn.Module):
    """A layer whose outcome is one tensor."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def exported_ops(layer: Any, strict: bool, **options: Any) -> list[str]:
    program = torch.export.export(Output(layer), (sequence(),), strict=strict, **options)
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


class TestExported:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("num_layers, bidirectional", [(1, False), (2, True)])
    @pytest.mark.parametrize("cell", CELLS)
    def test_the_graph_is_that_of_torchs_module(self, cell, num_layers, bidirectional, strict):
        mine = module(cell, num_layers=num_layers, bidirectional=bidirectional)
        theirs = getattr(torch.nn, CELLS[cell][0])(
            3, 4, num_layers=num_layers, bidirectional=bidirectional, **CELLS[cell][1]
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")
            wanted = exported_ops(theirs, strict)
        assert exported_ops(mine, strict) == wanted

    @pytest.mark.parametrize("num_layers", [1, 2])
    @pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
    def test_any_number_of_steps(self, cell, num_layers):
        """There torch's own program would hold for one number only."""
        steps = torch.export.Dim("steps", min=2, max=64)
        layer = Output(module(cell, num_layers=num_layers))
        program = torch.export.export(layer, (sequence(),), dynamic_shapes=({0: steps},), strict=True)
        x = torch.randn(9, 3, 3)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_a_compiled_graph_holds_our_operator_once_a_layer(cell):
    """torch's would hold every step: minutes of compilation, anew for each length."""
    nodes: list[str] = []

    def remember(graph: Any, _: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(module(cell, num_layers=2, bidirectional=True), fullgraph=True, backend=remember)
    compiled(sequence())
    assert nodes.count("tritune.rnn.default") == 2
    assert not {name for name in nodes if "tanh" in name or "sigmoid" in name}


class TestSymbolicTrace:
    @pytest.mark.parametrize("cell", CELLS)
    def test_modules_are_leaves_as_torchs_are(self, cell):
        model = Output(module(cell, num_layers=2))
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
        x = sequence()
        assert torch.equal(traced(x), model(x))

    def test_functions_are_recorded(self):
        def fn(x: Any, w_ih: Any, w_hh: Any, h: Any) -> Any:
            out, _ = tritune.rnn(x, w_ih, w_hh, nonlinearity="relu")
            out, _ = tritune.gru(out, w_ih, w_hh, reverse=True)
            out, _, _ = tritune.lstm(out, w_ih, w_hh, batch_first=True)
            return tritune.elman_step(out, h, w_ih, w_hh)

        graph = torch.fx.symbolic_trace(fn).graph
        called = [node.target for node in graph.nodes if node.op == "call_function"]
        functions = [tritune.rnn, tritune.gru, tritune.lstm, tritune.elman_step]
        assert [target for target in called if target in functions] == functions

    def test_an_elman_network(self):
        model = Output(tritune.nn.ElmanRNN(3, 4, 2))
        traced = torch.fx.symbolic_trace(model)
        assert tritune.rnn in [node.target for node in traced.graph.nodes]
        x = sequence()
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("where", ["in the graph", "behind it"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_result_that_is_changed_in_place(name: str, batch_first: bool, where: str) -> None:
    """The gradient does not read what the caller owns. torch's own layers, which a graph holds, do not either."""
    torch.compiler.reset()
    ours, theirs = (
        getattr(package, name)(3, 4, num_layers=2, batch_first=batch_first) for package in (tritune.nn, torch.nn)
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        y = ours(x)[0]
        return y[:1].mul_(2) if where == "in the graph" else y

    y = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    y = y if where == "in the graph" else y.mul_(2)[:1]
    wanted = 2 * theirs(x)[0][:1]
    torch.testing.assert_close(y, wanted)
    (grad,), (wanted_grad,) = (torch.autograd.grad(one.square().sum(), x) for one in (y, wanted))
    torch.testing.assert_close(grad, wanted_grad)
