"""What torch's counter of products and torch's profiler see of our operators."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import tritune
from tritune.ops import _dispatch
from tritune.ops.rnn_torch import formula

pytest.importorskip("triton")  # torch's counter says on a GPU build that it misses Triton


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def counted(run: Callable[[], Any]) -> dict[str, int]:
    """By operator, without the operators' namespace."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        result = run()
        result = result[0] if isinstance(result, tuple) else result
        if result.requires_grad:
            result.sum().backward()
    return {str(name).partition(".")[2]: count for name, count in counter.get_flop_counts()["Global"].items()}


def total(run: Callable[[], Any]) -> int:
    return sum(counted(run).values())


def _convolutions() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]]:
    table = {}
    for rank in (1, 2, 3):
        for name, w, options in (
            (f"conv{rank}d", (6, 4, *(3,) * rank), {"padding": 1, "stride": 2}),
            (f"conv{rank}d", (6, 2, *(3,) * rank), {"dilation": 2, "groups": 2}),
            (f"conv_transpose{rank}d", (4, 6, *(2,) * rank), {"stride": 2}),
            (f"conv_transpose{rank}d", (4, 3, *(2,) * rank), {"groups": 2, "stride": 2}),
        ):
            tensors = (normal(2, 4, *(7,) * rank), normal(*w))
            table[f"{name} {options}"] = (getattr(tritune, name), getattr(F, name), tensors, options)
    return table


CONVOLUTIONS = _convolutions()


@pytest.fixture
def ours(monkeypatch):
    """Our operators are called on the CPU, and compute with torch's."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    for name in ("conv", "rnn", "attention", "pool", "conv_pool"):
        module = sys.modules[f"tritune.ops.{name}_operators"]
        monkeypatch.setattr(module, "runs_kernels", lambda backend, tensor: False)
    with tritune.use_backend("triton"):
        yield


@pytest.mark.torch
@pytest.mark.usefixtures("ours")
class TestProducts:
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_convolution(self, name):
        function, theirs, tensors, options = CONVOLUTIONS[name]
        found = counted(lambda: function(*tensors, **options))
        wanted = counted(lambda: theirs(*tensors, **options))
        forward, backward = wanted["convolution"], wanted["convolution_backward"]
        transposed = "transpose" in name
        assert found.pop("conv_transpose" if transposed else "conv") == forward
        assert sum(found.values()) == backward and "conv_weight_grad" in found

    def test_activation_and_pooling(self):
        x, w = normal(2, 4, 8, 8), normal(6, 4, 3, 3)
        wanted = total(lambda: F.conv2d(x, w, padding=1))
        assert total(lambda: tritune.conv2d(x, w, padding=1, activation="silu")) == wanted
        assert total(lambda: tritune.conv2d_max_pool2d(x, w, padding=1)) == wanted
        with torch.no_grad():
            forward = total(lambda: F.conv2d(x, w, padding=1))
            assert total(lambda: tritune.conv2d_max_pool2d(x, w, padding=1)) == forward

    @pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_recurrence(self, kind, bidirectional):
        """Of torch's operators for the same layer. Its own is one operator, which its counter passes over."""
        module = kind(3, 4, bidirectional=bidirectional)
        x, h = normal(5, 2, 3), normal(2 if bidirectional else 1, 2, 4)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(module, f"{name}_l0") for name in names]
        if bidirectional:
            reverse = [getattr(module, f"{name}_l0_reverse") for name in names]
            weights = [torch.stack(pair) for pair in zip(weights, reverse, strict=True)]
        weights = [one.detach().requires_grad_() for one in weights]
        states = (h, normal(*h.shape)) if kind is nn.LSTM else (h,)
        function = getattr(tritune, kind.__name__.lower())
        found = counted(lambda: function(x, *weights, *states))
        assert set(found) == {"rnn", "rnn_backward"}
        cell = {"RNN": "tanh"}.get(kind.__name__, kind.__name__.lower())
        stacked = weights if bidirectional else [one.unsqueeze(0) for one in weights]
        call = (x, *stacked, h, states[1] if kind is nn.LSTM else None, cell, False)
        wanted = counted(lambda: formula(*call)[0])
        assert sum(found.values()) == sum(wanted.values())
        with torch.no_grad():
            forward = total(lambda: formula(*call)[0])
        assert found["rnn"] == forward

    @pytest.mark.parametrize("groups", [1, 2])
    def test_attention(self, groups):
        """Of torch's fused operator, forward and backward, which exists for GPUs alone."""
        q, k, v = normal(2, 4, 6, 8), normal(2, 4 // groups, 5, 8), normal(2, 4 // groups, 5, 12)
        found = counted(lambda: tritune.attention(q, k, v, enable_gqa=groups > 1))
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            assert found["attention"] == total(lambda: F.scaled_dot_product_attention(q, k, v))
        from torch.utils.flop_counter import sdpa_backward_flop_count

        shapes = [tuple(t.shape) for t in (q, k, v)]
        assert found["attention_backward"] == sdpa_backward_flop_count((2, 4, 6, 12), *shapes)
        assert set(found) == {"attention", "attention_backward"}

    def test_without_data(self):
        with FakeTensorMode():
            assert total(lambda: tritune.conv2d(normal(2, 4, 8, 8), normal(6, 4, 3, 3))) > 0


@pytest.mark.torch
class TestRegistration:
    @pytest.mark.parametrize(
        "first, second",
        [("tritune", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "tritune")],
        ids=["before", "after"],
    )
    def test_whichever_is_imported_first(self, first, second):
        code = f"""
import sys, {first}
print("torch.utils.flop_counter" in sys.modules)
import {second}, torch
from torch.utils.flop_counter import flop_registry
ours = [str(one) for one in flop_registry if str(one).startswith("tritune.")]
print(len(ours), "tritune.rnn_backward" in ours)
print(any("tritune" in type(one).__module__ for one in sys.meta_path))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout.split() == [str(first != "tritune"), "10", "True", "False"], done.stderr

    def test_every_operator_with_products_has_a_formula(self):
        """By name: what only moves, compares or adds has none."""
        from torch.utils.flop_counter import flop_registry

        names = {str(one).partition(".")[2] for one in flop_registry if str(one).startswith("tritune.")}
        registered = {one._schema.name.partition("::")[2] for one in tritune.ops._register._recording}
        left = {one for one in registered - names if not one.startswith(("max_", "avg_", "lp_", "pool_"))}
        rows = {"attention_normalize", "attention_normalize_backward"}
        assert left == {"conv_epilogue_grad", "conv_bias_grad"} | rows and names <= registered


@pytest.mark.interpret
class TestProfiler:
    def test_launches_are_ranges_that_say_what_runs(self):
        from torch.profiler import ProfilerActivity, profile

        x = torch.randn(1, 2, 6, 6, requires_grad=True)
        with tritune.use_backend("triton"):
            with profile(activities=[ProfilerActivity.CPU]) as prof:
                tritune.max_pool2d(x, 2).sum().backward()
            ranges = [event.name for event in prof.events() if event.name.startswith("tritune kernel ")]
            with tritune.ops.record() as decisions:
                tritune.max_pool2d(x, 2)
        ((kernel, choice), *_) = decisions[0].kernels
        forward, backward = ranges
        assert forward.startswith(f"tritune kernel {kernel} [{choice.config}] moves ") and forward.endswith(" bytes")
        assert backward.startswith("tritune kernel pool_backward [")

    def test_nothing_is_asked_without_a_profiler(self, monkeypatch):
        from tritune.kernels import _launch

        def fail(*_):
            raise AssertionError

        monkeypatch.setattr(_launch.profiler, "record_function", fail)
        with tritune.use_backend("triton"):
            tritune.max_pool2d(torch.randn(1, 2, 6, 6), 2)
