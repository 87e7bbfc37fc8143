"""Unmodified code under ``accelerate``: what is sent where, and that nothing else about it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, few_dots
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import tritune
from tritune.ops import _dispatch


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def _with(function: Callable[..., Any], *options: Any, **named: Any) -> Callable[..., Any]:
    return lambda *tensors: function(*tensors, *options, **named)


def _by_keyword(convolution: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, w: convolution(weight=w, input=x, stride=2)


def _calls() -> dict[str, tuple[str, Callable[..., Any], tuple[Tensor, ...]]]:
    """By a name for the test: the function of ours that has to get the call, the call, and its tensors."""
    table: dict[str, tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = {}
    for rank in (1, 2, 3):
        x, w, b = normal(2, 4, *(6,) * rank), normal(4, 4, *(3,) * rank), normal(4)
        conv, up = f"conv{rank}d", f"conv_transpose{rank}d"
        for place in (torch, F):
            table[f"{place.__name__}.{conv}"] = conv, getattr(place, conv), (x, w, b)
            table[f"{place.__name__}.{up}"] = up, getattr(place, up), (x, w, b)
        table[f"{conv} same"] = conv, _with(getattr(F, conv), padding="same"), (x, w)
        table[f"{conv} keywords"] = conv, _by_keyword(getattr(F, conv)), (x, w)
        pool = f"max_pool{rank}d"
        for place in (torch, F):
            table[f"{place.__name__}.{pool}"] = pool, _with(getattr(place, pool), 2), (x,)
        table[f"{pool} indices"] = pool, _with(getattr(F, pool), 2, return_indices=True), (x,)
        table[f"{pool}_with_indices"] = pool, _with(getattr(F, f"{pool}_with_indices"), 2, 1), (x,)
        adaptive = f"adaptive_max_pool{rank}d"
        table[adaptive] = adaptive, _with(getattr(F, adaptive), 3), (x,)
        table[f"{adaptive} indices"] = adaptive, _with(getattr(F, adaptive), 3, return_indices=True), (x,)
        for name, options in ((f"avg_pool{rank}d", (3, 1, 1)), (f"adaptive_avg_pool{rank}d", (2,))):
            table[name] = name, _with(getattr(F, name), *options), (x,)
        norm = f"lp_pool{rank}d"
        table[norm] = norm, _with(getattr(F, norm), 2.0, 2), (x,)
        pooled, places = getattr(F, pool)(x, 2, return_indices=True)
        back = f"max_unpool{rank}d"
        table[back] = back, _with(getattr(F, back), places, 2), (pooled,)
    x = normal(2, 4, 6, 6)
    table["torch._C._nn.max_pool2d_with_indices"] = (
        "max_pool2d", _with(torch._C._nn.max_pool2d_with_indices, [2, 2]), (x,)
    )  # fmt: skip
    table["torch.adaptive_max_pool1d"] = "adaptive_max_pool1d", _with(torch.adaptive_max_pool1d, 3), (x[0],)
    q, k, v = normal(2, 4, 6, 8), normal(2, 4, 5, 8), normal(2, 4, 5, 8)
    sdpa = "scaled_dot_product_attention"
    table[sdpa] = sdpa, F.scaled_dot_product_attention, (q, k, v)
    table[f"{sdpa} keywords"] = sdpa, lambda q: F.scaled_dot_product_attention(query=q, key=q, value=q), (q,)
    for kind, options in (
        (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu", "bias": False}), (nn.GRU, {"bidirectional": True}),
        (nn.LSTM, {"batch_first": True}), (nn.LSTM, {"bidirectional": True, "bias": False}),
    ):  # fmt: skip
        for sequence in (normal(5, 2, 3), normal(5, 3)):
            layer = kind(3, 4, **options)
            table[f"nn.{kind.__name__} {options} {sequence.dim()}"] = kind.__name__.lower(), layer, (sequence,)
    h = normal(1, 2, 4)
    table["nn.GRU with a state"] = "gru", nn.GRU(3, 4), (normal(5, 2, 3), h)
    lstm = nn.LSTM(3, 4)
    table["nn.LSTM with states"] = "lstm", lambda x, h: lstm(x, (h, 2 * h)), (normal(5, 2, 3), h)
    for kind, options in ((nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu", "bias": False}), (nn.GRUCell, {}),
                          (nn.LSTMCell, {})):  # fmt: skip
        name = f"{kind.__name__.removesuffix('Cell').lower()}_cell"
        for step in (normal(2, 3), normal(3)):
            table[f"nn.{kind.__name__} {options} {step.dim()}"] = name, kind(3, 4, **options), (step,)
    return table


torch.manual_seed(0)
CALLS = _calls()


def outcome(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, and the gradients of their sum."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = [t for t in tree_leaves(function(*leaves)) if isinstance(t, Tensor)]
    total = sum(t.square().sum() for t in results if t.requires_grad)
    return [t.detach() for t in results] + list(torch.autograd.grad(total, leaves))


class Net(nn.Module):
    """A convolution, pooling, recurrence and attention, of torch's modules only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.conv(x)))).flatten(2).mT
        x = self.rnn(x)[0]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


SENT = {"conv2d": 1, "max_pool2d": 1, "gru": 1, "scaled_dot_product_attention": 1}


@pytest.mark.torch
class TestCalls:
    @pytest.mark.parametrize("name", CALLS)
    def test_on_the_cpu_it_is_torchs_bit_for_bit(self, name):
        function, call, tensors = CALLS[name]
        expected = outcome(call, tensors)
        with tritune.accelerate() as sent:
            found = outcome(call, tensors)
        assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
        assert dict(sent.torch) == {(function, "input is on the CPU"): 1} and not sent.kernels

    @pytest.mark.parametrize("name", CALLS)
    def test_where_our_function_would_leave_it_to_torch(self, name):
        """As on a GPU, our function is asked, since somebody records."""
        function, call, tensors = CALLS[name]
        expected = outcome(call, tensors)
        with _dispatch.record() as decisions, tritune.accelerate() as sent:
            found = outcome(call, tensors)
        assert all(map(torch.equal, found, expected))
        ((recorded, reason),) = sent.torch
        assert recorded == function and "on the CPU, where torch serves" in reason and not sent.kernels
        assert [decision.op for decision in decisions] == [function.removesuffix("_cell")]

    @pytest.mark.parametrize("name", CALLS)
    def test_triton_never_falls_back(self, name):
        _, call, tensors = CALLS[name]
        with (
            tritune.use_backend("triton"), tritune.accelerate(),
            pytest.raises(tritune.UnsupportedError, match="forbids torch: input is on the CPU"),
        ):  # fmt: skip
            call(*tensors)

    def test_every_function_of_ours_that_torch_has_is_sent(self):
        names = {name for name in tritune.ops.__all__ if hasattr(F, name) or hasattr(torch, name)}
        names -= {"rnn"}  # of torch it is rnn_tanh and rnn_relu
        names -= {"fractional_max_pool2d", "fractional_max_pool3d"}  # no kernel computes them
        assert names <= {function for function, _, _ in CALLS.values()} and len(names) >= 24

    @pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
    def test_what_is_not_covered_says_why(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "INTERPRETED", True)  # else the CPU is the reason
        x = normal(5, 2, 3)
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
        for layer, input, reason in (
            (nn.LSTM(3, 4, num_layers=2), x, "num_layers=2"),
            (nn.RNN(3, 4, num_layers=2, nonlinearity="relu", bias=False), x, "num_layers=2"),
            (nn.LSTM(3, 4, proj_size=2), x, "an LSTM with projections"),
            (nn.GRU(3, 4), packed, "a packed sequence"),
            (nn.LSTM(3, 4), packed, "a packed sequence"),
        ):
            with _dispatch.record(), tritune.accelerate() as sent:
                layer(input)
            name = layer._get_name().lower()
            assert dict(sent.torch) == {(name, reason): 1} and not sent.kernels
            with (
                tritune.use_backend("triton"), tritune.accelerate() as sent,
                pytest.raises(tritune.UnsupportedError, match=f"{name}: .* forbids torch: {reason}"),
            ):  # fmt: skip
                layer(input)
            assert not sent.torch and not sent.kernels

    def test_errors_are_torchs_word_for_word(self):
        for call in (
            lambda: F.conv2d(normal(2, 3, 4, 4), normal(4, 5, 3, 3)),
            lambda: F.max_pool2d(normal(2, 3, 4, 4), 2, padding=2),
            lambda: F.scaled_dot_product_attention(normal(1, 2, 3, 4), normal(1, 2, 3, 5), normal(1, 2, 3, 4)),
            lambda: torch.conv1d(normal(1, 2, 3), 3),
        ):
            with pytest.raises((RuntimeError, TypeError, ValueError)) as plain:
                call()
            with pytest.raises(plain.type) as sent, tritune.accelerate():
                call()
            with pytest.raises(plain.type) as asked, tritune.accelerate(), _dispatch.record():
                call()
            assert str(plain.value) == str(sent.value) == str(asked.value)

    def test_what_ours_rejects_and_torch_accepts_is_torchs(self):
        q = normal(1, 2, 3, 4)
        mask = torch.ones(3, 3, dtype=torch.bool)
        expected = F.scaled_dot_product_attention(q, q, q, mask, is_causal=True)  # the CPU combines them
        with _dispatch.record(), tritune.accelerate() as sent:
            assert torch.equal(F.scaled_dot_product_attention(q, q, q, mask, is_causal=True), expected)
        assert "rejected: " in str(sent)
        with _dispatch.record(), tritune.accelerate() as sent:
            out = torch.empty(1, 2, 2, 2)
            torch._C._nn.avg_pool2d(normal(1, 2, 4, 4), 2, out=out)
        assert "rejected: " in str(sent)

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
    def test_other_kinds_of_tensors(self):
        quantised = torch.quantize_per_tensor(normal(1, 2, 4, 4), 0.1, 0, torch.quint8)
        with tritune.accelerate(), _dispatch.record():
            assert F.max_pool2d(quantised, 2).is_quantized
        with FakeTensorMode(), tritune.accelerate():
            assert F.conv2d(normal(2, 3, 4, 4), normal(4, 3, 3, 3)).shape == (2, 4, 2, 2)
        with tritune.accelerate():
            assert F.conv2d(torch.empty(2, 3, 4, 4, device="meta"), torch.empty(4, 3, 3, 3, device="meta")).is_meta
        lengths = (3, 5)
        q = torch.nested.nested_tensor([normal(n, 2, 4) for n in lengths], layout=torch.jagged).transpose(1, 2)
        with tritune.accelerate() as sent:
            out = F.scaled_dot_product_attention(q, q, q)
        assert out.is_nested and "an argument is a NestedTensor" in str(sent)

    def test_a_tensor_with_a_torch_function_gets_torchs_function(self):
        seen = []

        class Mine(Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                seen.append(func)
                return super().__torch_function__(func, types, args, kwargs)

        x = normal(2, 3, 4, 4).as_subclass(Mine)
        with tritune.accelerate() as sent:
            y = F.conv2d(x, normal(4, 3, 3, 3))
        assert isinstance(y, Mine) and torch.conv2d in seen
        assert "an argument is a Mine" in str(sent)


@pytest.mark.torch
class TestBlocks:
    def test_a_model_says_what_was_sent(self):
        net, x = Net(), normal(2, 3, 4, 4)
        with tritune.accelerate() as sent:
            net(x)
        counted = {name: count for (name, _), count in sent.torch.items()}
        assert counted == {"conv2d": 1, "max_pool2d": 1, "gru": 1, "multi_head_attention": 1}
        assert "conv2d: 1 on torch: input is on the CPU" in str(sent).splitlines()
        assert str(tritune.accelerate()) == "nothing was sent"

    def test_training_is_torchs_bit_for_bit(self):
        torch.manual_seed(1)
        plain, sent, x = Net(), Net(), normal(2, 3, 4, 4)
        sent.load_state_dict(plain.state_dict())
        plain(x).sum().backward()
        with tritune.accelerate():
            loss = sent(x).sum()
        loss.backward()
        for one, other in zip(plain.parameters(), sent.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)

    def test_explain_sees_what_would_run(self):
        with tritune.accelerate():
            decisions = tritune.explain(Net(), normal(2, 3, 4, 4))
        assert [decision.op for decision in decisions] == list(SENT)
        assert not tritune.explain(Net(), normal(2, 3, 4, 4))

    def test_blocks_nest_and_each_counts(self):
        x, w = normal(2, 3, 4, 4), normal(4, 3, 3, 3)
        with tritune.accelerate() as outer:
            F.conv2d(x, w)
            with tritune.accelerate() as inner:
                F.conv2d(x, w)
            with outer:
                F.max_pool2d(x, 2)
        assert sum(inner.torch.values()) == 1
        assert {name: count for (name, _), count in outer.torch.items()}["conv2d"] == 2
        with pytest.raises(ZeroDivisionError), tritune.accelerate() as sent:
            1 / 0  # noqa: B018
        F.conv2d(x, w)
        assert not sent.torch

    def test_a_decorated_function_is_a_block(self):
        block = tritune.accelerate()

        @block
        def run(n: int) -> Tensor:
            """Says so."""
            y = F.avg_pool2d(normal(1, 1, 4, 4), 2)
            return run(n - 1) if n else y

        assert run.__doc__ == "Says so."
        run(0)
        assert sum(block.torch.values()) == 1
        run(2)
        assert block.torch["avg_pool2d", "input is on the CPU"] >= 4

    @pytest.mark.parametrize("kind", ["generator", "async", "async generator"])
    def test_it_decorates_no_generators(self, kind):
        def generator():
            yield

        async def coroutine():
            pass

        async def both():
            yield

        function = {"generator": generator, "async": coroutine, "async generator": both}[kind]
        with pytest.raises(TypeError, match=r"accelerate cannot decorate .* use a with block"):
            tritune.accelerate()(function)

    def test_it_holds_for_one_thread(self):
        def work() -> None:
            F.avg_pool2d(normal(1, 1, 4, 4), 2)

        with tritune.accelerate() as sent:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert not sent.torch

    def test_one_object_counts_for_many_threads(self):
        block = tritune.accelerate()
        x = normal(1, 1, 4, 4)

        @block
        def work() -> None:
            for _ in range(200):
                F.avg_pool2d(x, 2)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(block.torch.values()) == 800

    def test_it_lies_among_other_modes(self):
        seen = []

        class Log(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        x, w = normal(2, 3, 4, 4), normal(4, 3, 3, 3)
        for inside in (False, True):
            seen.clear()
            with Log(), tritune.accelerate() as sent:
                if inside:
                    with Log():
                        F.conv2d(x, w)
                else:
                    F.conv2d(x, w)
            assert seen.count(torch.conv2d) == 1 + inside and sum(sent.torch.values()) == 1
        with torch.device("meta"), tritune.accelerate():
            assert F.conv2d(torch.empty(1, 3, 4, 4), torch.empty(4, 3, 3, 3)).is_meta

    def test_ours_are_called_as_ever(self):
        x, w = normal(2, 3, 4, 4), normal(4, 3, 3, 3)
        expected = tritune.conv2d(x, w, activation="relu")
        with tritune.accelerate() as sent:
            assert torch.equal(tritune.conv2d(x, w, activation="relu"), expected)
        assert not sent.torch
        net = tritune.nn.LSTM(3, 4, num_layers=2)
        x = normal(5, 2, 3)
        with tritune.accelerate():
            assert torch.equal(net(x)[0], net(x)[0])


@pytest.mark.torch
class TestEverydayTorch:
    def test_autocast(self):
        net, x = Net(), normal(2, 3, 4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            expected = net(x)
            with tritune.accelerate():
                assert torch.equal(net(x), expected)
            with tritune.accelerate(), _dispatch.record():
                assert torch.equal(net(x), expected)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch's decompositions
    def test_transforms(self):
        x, w = normal(5, 2, 3, 4, 4), normal(4, 3, 3, 3)

        def loss(w: Tensor, x: Tensor) -> Tensor:
            return F.max_pool2d(F.conv2d(x, w), 2).square().sum()

        expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
        tangent = torch.func.jvp(lambda w: loss(w, x[0]), (w,), (w,))[1]
        with tritune.accelerate() as sent:
            assert torch.equal(torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x), expected)
            assert torch.equal(torch.func.jvp(lambda w: loss(w, x[0]), (w,), (w,))[1], tangent)
        assert "conv2d: 2 on torch" in str(sent)

    def test_checkpointing(self):
        net, x = Net(), normal(2, 3, 4, 4).requires_grad_()
        expected = torch.autograd.grad(net(x).sum(), x)[0]
        sent = tritune.accelerate()
        y = checkpoint(sent(net.forward), x, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
        assert sent.torch["conv2d", "input is on the CPU"] == 2

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace")
    def test_tracing_records_torchs_functions(self):
        x = normal(2, 3, 4, 4)
        block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
        with tritune.accelerate():
            graph = torch.fx.symbolic_trace(block).graph
            traced = torch.jit.trace(block, x)
        assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
        assert "aten::_convolution" in str(traced.inlined_graph)
        exported = torch.export.export(block, (x,)).graph
        with tritune.accelerate():
            assert str(torch.export.export(block, (x,)).graph) == str(exported)


@pytest.mark.torch
class TestCompiled:
    """One graph, that which torch's function has outside of the block; under ``"triton"`` it holds our operators."""

    @staticmethod
    def graph_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Any]:
        torch._dynamo.reset()
        backend = EagerAndRecordGraphs()
        result = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
        (graph,) = backend.graphs
        return result, [(node.op, node.target) for node in graph.graph.nodes if node.op == "call_function"]

    @pytest.mark.parametrize("where", ["around", "inside", "decorator"])
    def test_the_graph_is_torchs(self, where):
        x, w = normal(2, 3, 6, 6), normal(4, 3, 3, 3)

        def run(x: Tensor, w: Tensor) -> Tensor:
            y = F.max_pool2d(F.conv2d(x, w).relu(), 2)
            y = F.scaled_dot_product_attention(y, y, y)
            return F.adaptive_avg_pool2d(F.lp_pool2d(y, 2.0, 1), 1)

        def inside(x: Tensor, w: Tensor) -> Tensor:
            with tritune.accelerate():
                return run(x, w)

        expected, graph = self.graph_of(run, x, w)
        if where == "around":
            with tritune.accelerate():
                found, sent = self.graph_of(run, x, w)
        else:
            found, sent = self.graph_of(inside if where == "inside" else tritune.accelerate()(run), x, w)
        assert torch.equal(found, expected)
        assert sent == graph

    @pytest.mark.parametrize("where", ["around", "inside"])
    def test_under_triton_it_holds_our_operators(self, where, monkeypatch):
        monkeypatch.setattr(_dispatch, "INTERPRETED", True)
        monkeypatch.setattr(_dispatch, "runs_kernels", lambda *_: False)  # compiled, torch's operators serve
        x, w = normal(2, 3, 6, 6), normal(4, 3, 3, 3)

        def run(x: Tensor, w: Tensor) -> Tensor:
            return F.avg_pool2d(F.conv2d(x, w), 2)

        def inside(x: Tensor, w: Tensor) -> Tensor:
            with tritune.accelerate():
                return run(x, w)

        with tritune.use_backend("triton"):
            if where == "around":
                with tritune.accelerate():
                    graph = self.names(run, x, w)
            else:
                graph = self.names(inside, x, w)
        assert graph == ["tritune.conv", "tritune.avg_pool"]

    @staticmethod
    def names(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
        """The operators of this package in the one graph, which is made and not run."""
        torch._dynamo.reset()
        graph = torch._dynamo.export(function)(*inputs).graph_module.graph
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        return [target.rpartition(".")[0] for target in targets if target.startswith("tritune.")]

    def test_a_block_is_one_more_graph_and_no_recompilation_after_it(self):
        torch._dynamo.reset()
        backend = EagerAndRecordGraphs()
        compiled = torch.compile(lambda x: F.avg_pool2d(x, 2), backend=backend)
        x = normal(1, 1, 4, 4)
        for _ in range(3):
            compiled(x)
            with tritune.accelerate():
                compiled(x)
        assert len(backend.graphs) == 2

    def test_a_break_of_the_graph_within_the_block(self):
        torch._dynamo.reset()
        backend = EagerAndRecordGraphs()

        def run(x: Tensor) -> Tensor:
            with tritune.accelerate():
                y = F.avg_pool2d(x, 2)
                torch._dynamo.graph_break()
                return F.avg_pool2d(y, 2)

        x = normal(1, 1, 8, 8)
        assert torch.equal(torch.compile(run, backend=backend)(x), F.avg_pool2d(F.avg_pool2d(x, 2), 2))
        assert len(backend.graphs) == 2


@pytest.mark.interpret
@pytest.mark.gpu
class TestKernels:
    def test_a_model_runs_on_the_kernels(self, device):
        """Forward and every gradient, held to torch's own error against float64."""
        net, x = Net(), normal(2, 3, 4, 4)
        weight = normal(2, 3)

        def run(net: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
            leaf = x.detach().requires_grad_()
            y = net(leaf)
            names, parameters = zip(*net.named_parameters(), strict=True)
            gradients = torch.autograd.grad((y * weight).sum(), [leaf, *parameters])
            return {"output": y, "grad x": gradients[0], **dict(zip(names, gradients[1:], strict=True))}

        def moved(dtype: torch.dtype, device: str) -> list[Any]:
            copy = Net()
            copy.load_state_dict(net.state_dict())
            return [one.to(device, dtype) for one in (copy, x, weight)]

        exact, torchs = run(*moved(torch.float64, "cpu")), run(*moved(torch.float32, device))
        with tritune.use_backend("triton"), tritune.accelerate() as outer, tritune.accelerate() as sent, few_dots():
            ours = run(*moved(torch.float32, device))
        assert dict(sent.kernels) == SENT == dict(outer.kernels) and not sent.torch
        for name, result in ours.items():
            assert_close(name, result, exact[name], torchs[name])

    def test_cells_and_layers(self, device):
        for kind in (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell):
            module = kind(8, 16).to(device)
            name = kind.__name__.lower().replace("cell", "_cell")
            for x in (normal(16, 8),) if "_cell" in name else (normal(3, 4, 8), normal(8, 8)):
                reference = kind(8, 16)
                reference.load_state_dict(module.state_dict())
                exact = tree_leaves(reference.double()(x.double()))
                torchs = tree_leaves(module(x.to(device)))
                with tritune.use_backend("triton"), tritune.accelerate() as sent:
                    ours = tree_leaves(module(x.to(device)))
                assert dict(sent.kernels) == {name: 1}
                for one, other, own in zip(ours, exact, torchs, strict=True):
                    assert_close(name, one, other, own)

    def test_places_of_a_maximum(self, device):
        x = normal(2, 4, 6, 6).to(device)
        calls = [call for name, call, _ in CALLS.values() if name.endswith("max_pool2d")]
        for call in calls:
            expected = call(x)
            with tritune.use_backend("triton"), tritune.accelerate() as sent:
                found = call(x)
            assert sum(sent.kernels.values()) == 1
            assert tree_map(torch.equal, found, expected) in (True, (True, True))
