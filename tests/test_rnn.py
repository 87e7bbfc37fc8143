"""rnn, gru, lstm and their modules on every backend: values, gradients, states, directions, edge cases."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Case, assert_as_exact, backend_of, check, poisoned, without_onednn
from torch import Tensor

import tritune

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GATES = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}
every_backend = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
kernels_only = [pytest.mark.interpret, pytest.mark.gpu]


def function(cell: str) -> Callable[..., Any]:
    return {"gru": tritune.gru, "lstm": tritune.lstm}.get(cell, tritune.rnn)


def joined(outputs: Any) -> Tensor:
    """All results as one tensor, so that each takes part in the comparison and in the gradient."""
    return torch.cat([t.flatten() for t in outputs])


def ours(cell: str, **arguments: Any) -> Tensor:
    options = {"nonlinearity": cell} if cell in ("tanh", "relu") else {}
    return joined(function(cell)(**arguments, **options))


def torchs(
    cell: str, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    h0: Tensor | None = None, c0: Tensor | None = None, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """torch's own layer on the same arguments."""
    if w_ih.dim() == 2:
        w_ih, w_hh = w_ih[None], w_hh[None]
        b_ih, b_hh = (None if b is None else b[None] for b in (b_ih, b_hh))
    batched = input.dim() == 3
    directions, size = len(w_ih), w_hh.shape[-1]
    biases = [torch.zeros_like(w_ih[..., 0]) if b is None else b for b in (b_ih, b_hh)]
    weights = [t[d] for d in range(directions) for t in (w_ih, w_hh, *biases)]
    x = input if batched else input.unsqueeze(1)
    zero = x.new_zeros(directions, x.shape[1], size)
    h, c = (zero if s is None else s if batched else s.unsqueeze(1) for s in (h0, c0))
    options = (weights, True, 1, 0.0, True, directions == 2, False)
    x = x.flip(0) if reverse else x
    if cell == "lstm":
        out, *states = torch._VF.lstm(x, (h, c), *options)
    else:
        name = "gru" if cell == "gru" else f"rnn_{cell}"
        out, *states = getattr(torch._VF, name)(x, h, *options)
    return joined([out.flip(0) if reverse else out, *states])


class RnnCase(Case):
    """Weights as in a trained net: with gates deep in saturation the errors of both sides are a lottery."""

    def inputs(self, dtype: torch.dtype, layout: str, device: str) -> dict[str, Tensor]:
        tensors = super().inputs(dtype, layout, device)
        for name in ("w_ih", "w_hh"):
            tensors[name] /= tensors[name].shape[-1] ** 0.5
        return tensors


class CoarseCase(Case):
    """Quarters of small integers, whose sums are exact in every dtype: rounding must not move relu across its kink."""

    def inputs(self, dtype: torch.dtype, layout: str, device: str) -> dict[str, Tensor]:
        return {name: t.mul(2).round().div(4) for name, t in super().inputs(dtype, layout, device).items()}


def case(
    id: str, cell: str, t: int, b: int, i: int, h: int, *, directions: int = 1, biases: str = "both",
    states: bool = True, reverse: bool = False,
) -> Case:  # fmt: skip
    lead = (2,) if directions == 2 else ()
    rows = GATES[cell] * h
    shapes: dict[str, tuple[int, ...]] = {
        "input": (t, b, i), "w_ih": (*lead, rows, i), "w_hh": (*lead, rows, h)
    }  # fmt: skip
    for name in {"both": ("b_ih", "b_hh"), "none": ()}.get(biases, (biases,)):
        shapes[name] = (*lead, rows)
    if states:
        shapes["h0"] = (directions, b, h)
        if cell == "lstm":
            shapes["c0"] = (directions, b, h)
    kwargs = {"reverse": True} if reverse else {}
    kind = CoarseCase if cell == "relu" else RnnCase
    return kind(
        id, lambda **arguments: ours(cell, **arguments), lambda **arguments: torchs(cell, **arguments), shapes, kwargs
    )


CASES = [
    *(case(f"{cell}-plain", cell, 3, 5, 4, 20) for cell in GATES),
    *(case(f"{cell}-bidirectional", cell, 4, 2, 3, 9, directions=2) for cell in GATES),
    *(case(f"{cell}-no-bias", cell, 2, 8, 12, 16, biases="none", states=False) for cell in ("tanh", "gru", "lstm")),
    case("gru-input-bias", "gru", 2, 9, 12, 16, biases="b_ih"),
    case("gru-hidden-bias", "gru", 2, 9, 12, 16, biases="b_hh"),
    case("lstm-hidden-bias", "lstm", 2, 9, 12, 16, biases="b_hh"),
    *(case(f"{cell}-reverse", cell, 3, 7, 12, 15, reverse=True) for cell in ("relu", "gru", "lstm")),
    *(case(f"{cell}-one-step", cell, 1, 4, 10, 30) for cell in ("tanh", "gru", "lstm")),
    case("lstm-two-tiles", "lstm", 2, 19, 3, 33),
]
COMPAT = ("lstm-bidirectional", "gru-plain", "tanh-plain")


def parameters() -> list[Any]:
    rows = []
    for one, dtype in itertools.product(CASES, DTYPES):
        marks = [pytest.mark.compat] if one.id in COMPAT else []
        rows.append(pytest.param(one, dtype, id=f"{one.id}-{str(dtype)[6:]}", marks=marks))
    return rows


class TestCases:
    pytestmark = every_backend

    @pytest.mark.parametrize("case, dtype", parameters())
    def test_values_and_gradients(self, case, dtype, device, tier):
        check(case, dtype, "nchw", device, backend_of(tier))

    @pytest.mark.parametrize("case", CASES[1:4], ids=lambda case: case.id)
    def test_strided_views(self, case, device, tier):
        check(case, torch.float32, "strided", device, backend_of(tier))


def layers(name: str, *args: Any, device: str, **kwargs: Any) -> tuple[Any, Any]:
    """Our module and torch's with the same weights."""
    theirs = getattr(torch.nn, name)(*args, **kwargs).to(device)
    mine = getattr(tritune.nn, name)(*args, **kwargs).to(device)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def assert_same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


MODULES = ("RNN", "GRU", "LSTM")


class TestModules:
    pytestmark = every_backend

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_batches(self, name, bidirectional, batch_first, device, tier):
        mine, theirs = layers(name, 3, 5, bidirectional=bidirectional, batch_first=batch_first, device=device)
        x = torch.randn(2, 4, 3, device=device)
        with tritune.use_backend(backend_of(tier)), poisoned():
            got = mine(x)
        assert_as_exact(got, theirs, x)
        assert got[0].stride() == theirs(x)[0].stride()

    @pytest.mark.parametrize("name", MODULES)
    def test_one_sequence(self, name, device, tier):
        mine, theirs = layers(name, 3, 5, bidirectional=True, device=device)
        x, h = torch.randn(4, 3, device=device), torch.randn(2, 5, device=device)
        state = (h, h + 1) if name == "LSTM" else h
        with tritune.use_backend(backend_of(tier)):
            assert_as_exact(mine(x, state), theirs, x, state)

    @pytest.mark.parametrize("name", MODULES)
    def test_an_empty_batch(self, name, device, tier):
        mine, _ = layers(name, 3, 5, device=device)
        x = torch.randn(4, 0, 3, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            out, state = mine(x)
            out.sum().backward()
        assert out.shape == (4, 0, 5) and x.grad.shape == x.shape
        assert (state[0] if name == "LSTM" else state).shape == (1, 0, 5)
        assert all(not parameter.grad.any() for parameter in mine.parameters())

    @pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # inf, of which 1 / (1 + inf) is made
    @pytest.mark.parametrize("name", MODULES)
    def test_large_inputs_saturate(self, name, device, tier):
        mine, _ = layers(name, 3, 5, device=device)
        with tritune.use_backend(backend_of(tier)):
            for size in (100.0, 1e4):
                out = mine(size * torch.randn(3, 2, 3, device=device))[0]
                assert out.isfinite().all() and out.abs().max() <= 1

    @pytest.mark.parametrize("name", MODULES)
    def test_gradient_through_the_last_state_only(self, name, device, tier):
        """In evaluation mode, too, where cuDNN has no backward."""
        mine, theirs = layers(name, 3, 5, device=device)
        theirs = copy.deepcopy(theirs).cpu()
        mine.eval()
        x = torch.randn(3, 2, 3)

        def gradients(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            state = model(x)[1]
            last = state[1] if name == "LSTM" else state
            return torch.autograd.grad(last.square().sum(), list(model.parameters()))

        with tritune.use_backend(backend_of(tier)):
            results = gradients(mine, x.to(device))
        assert_as_exact(results, gradients, theirs, x)

    @pytest.mark.parametrize("name", MODULES)
    def test_frozen_parameters_get_no_gradient(self, name, device, tier):
        mine, _ = layers(name, 3, 5, device=device)
        mine.weight_ih_l0.requires_grad_(False)
        mine.bias_hh_l0.requires_grad_(False)
        with tritune.use_backend(backend_of(tier)):
            mine(torch.randn(2, 2, 3, device=device))[0].sum().backward()
        assert mine.weight_ih_l0.grad is None and mine.bias_hh_l0.grad is None
        assert mine.weight_hh_l0.grad is not None and mine.bias_ih_l0.grad is not None

    @pytest.mark.parametrize("name, options", [*((name, {}) for name in MODULES), ("RNN", {"nonlinearity": "relu"})])
    def test_nan_stays_in_its_sequence(self, name, options, device, tier):
        mine, theirs = layers(name, 3, 5, **options, device=device)
        x = torch.randn(3, 4, 3, device=device)
        x[1, 2] = float("nan")
        results = []
        for layer in (mine, theirs):
            leaf = x.clone().requires_grad_()
            with tritune.use_backend(backend_of(tier)):
                out = layer(leaf)[0]
            results.append((out, torch.autograd.grad(out.sum(), leaf)[0]))
        torch.testing.assert_close(*results, equal_nan=True)
        out = results[0][0]
        assert out[1:, 2].isnan().all() and out[:, [0, 1, 3]].isfinite().all() and out[0].isfinite().all()

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize("size", [5, 16, 20])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
    def test_an_infinite_state_saturates(self, name, size, device, tier):
        """Behind it the weights of padded units are 0, and 0 times infinity is no number."""
        mine, theirs = layers(name, 3, size, device=device)
        state = torch.zeros(1, 2, size, device=device)
        state[0, 0, 0], state[0, 1, 1] = float("inf"), -float("inf")
        x = torch.randn(4, 2, 3, device=device)
        hx = (state, torch.zeros_like(state)) if name == "LSTM" else state
        results = []
        for layer in (mine, theirs):
            leaf = x.clone().requires_grad_()
            with tritune.use_backend(backend_of(tier)):
                out = layer(leaf, hx)[0]
            results.append((out, torch.autograd.grad(out.sum(), leaf)[0]))
        torch.testing.assert_close(*results, equal_nan=True)
        assert name == "GRU" or results[0][0].isfinite().all()

    @pytest.mark.parametrize("name", ["RNN", "LSTM"])  # of a GRU torch subtracts infinities: docs/differences.md
    @pytest.mark.parametrize("size", [5, 16, 20])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
    def test_an_infinite_gradient_stays_infinite(self, name, size, device, tier):
        """Positive weights and states keep its sign; those of padded units are 0 and make no NaN of it."""
        state, x = torch.rand(1, 2, size, device=device), torch.rand(4, 2, 3, device=device)
        gradient = torch.randn(4, 2, size, device=device)
        gradient[-1, 0, 0] = float("inf")
        results = []
        for layer in layers(name, 3, size, device=device):
            for weight in layer.parameters():
                weight.data.abs_()
            leaves = [t.clone().requires_grad_() for t in ((x, state, state) if name == "LSTM" else (x, state))]
            with tritune.use_backend(backend_of(tier)):
                out = layer(leaves[0], tuple(leaves[1:]) if name == "LSTM" else leaves[1])[0]
            results.append(torch.autograd.grad(out, leaves, gradient))
        torch.testing.assert_close(*results, equal_nan=True)
        assert (results[0][1][:, 0] == float("inf")).all()

    @pytest.mark.parametrize("name", MODULES)
    def test_weights_changed_in_place(self, name, device, tier):
        """On the kernels the gradient of what was used, the stacked weights of both directions; torch refuses."""
        mine, theirs = layers(name, 3, 4, bidirectional=True, device=device)
        x = torch.randn(5, 2, 3, device=device, requires_grad=True)

        def gradient(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(model(x)[0].square().sum(), x)

        with tritune.use_backend(backend_of(tier)):
            loss = mine(x)[0].square().sum()
            with torch.no_grad():
                mine.weight_hh_l0.mul_(2)
            if tier == "torch":
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(loss, x)
            else:
                assert_as_exact(torch.autograd.grad(loss, x), gradient, theirs, x)


@pytest.mark.torch
class TestModulesAreTorchs:
    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_jit_trace(self, name):
        mine, _ = layers(name, 3, 4, bidirectional=True, device="cpu")
        traced = torch.jit.trace(mine.eval(), torch.randn(5, 2, 3))
        x = torch.randn(5, 2, 3)
        assert_same(traced(x), mine(x))

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize(
        "options",
        [{"num_layers": 2, "dropout": 0.0}, {"num_layers": 2, "bidirectional": True, "bias": False}, {"bias": False}],
        ids=str,
    )
    def test_state_dict_repr_and_values(self, name, options):
        mine, theirs = layers(name, 3, 4, **options, device="cpu")
        assert list(mine.state_dict()) == list(theirs.state_dict())
        assert repr(mine) == repr(theirs)
        x = torch.randn(5, 2, 3)
        assert_same(mine(x), theirs(x))

    @pytest.mark.parametrize("name", MODULES)
    def test_initial_values_are_torchs(self, name):
        torch.manual_seed(3)
        theirs = getattr(torch.nn, name)(3, 4)
        torch.manual_seed(3)
        mine = getattr(tritune.nn, name)(3, 4)
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value)

    @pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
    def test_projections(self):
        mine, theirs = layers("LSTM", 3, 4, 2, proj_size=2, bidirectional=True, device="cpu")
        x = torch.randn(5, 2, 3)
        assert_same(mine(x), theirs(x))
        assert mine(x)[0].shape == (5, 2, 4)

    @pytest.mark.parametrize("name", MODULES)
    def test_packed_sequences_unsorted(self, name):
        mine, theirs = layers(name, 3, 4, 2, bidirectional=True, device="cpu")
        x = torch.randn(5, 3, 3)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
        got, wanted = mine(packed), theirs(packed)
        assert_same(got[0].data, wanted[0].data)
        assert_same(got[1], wanted[1])

    @pytest.mark.parametrize("name", MODULES)
    def test_copies_and_pickles(self, name):
        mine, _ = layers(name, 3, 4, device="cpu")
        x = torch.randn(5, 2, 3)
        for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert_same(twin(x), mine(x))

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
    def test_a_class_put_on_a_module(self, name, options):
        """torch's becomes ours and back, with the same values."""
        theirs, mine = (getattr(nn, name) for nn in (torch.nn, tritune.nn))
        layer = theirs(3, 4, **options)
        x = torch.randn(5, 2, 3)
        wanted = layer(x)
        for kind in (mine, theirs):
            layer.__class__ = kind
            assert_same(layer(x), wanted)

    @pytest.mark.parametrize("name", [*MODULES, "ElmanRNN"])
    def test_signatures_are_whole(self, name):
        """As torch documents them, so that skip_init, help and editors see the arguments."""
        kind = getattr(tritune.nn, name)
        parameters = inspect.signature(kind).parameters
        assert all(one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters.values())
        sizes = (3, 4, 2) if name == "ElmanRNN" else (3, 4)
        assert next(torch.nn.utils.skip_init(kind, *sizes).parameters()).shape[-1] in (3, 4)
        if name != "ElmanRNN":
            documented = typing.get_overloads(getattr(torch.nn, name).__init__)[0]
            wanted = list(inspect.signature(documented).parameters.values())[1:]
            assert [(one.name, one.default) for one in parameters.values()] == [
                (one.name, one.default) for one in wanted
            ]

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
    def test_jit_script(self, name):
        model = torch.nn.Sequential(getattr(tritune.nn, name)(3, 4, 2, bidirectional=True))
        x = torch.randn(5, 2, 3)
        wanted = model(x)
        scripted = torch.jit.script(model)
        assert_same(scripted(x), wanted)
        assert dict(scripted.named_parameters()).keys() == dict(model.named_parameters()).keys()

    @pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
    def test_jit_script_of_an_elman_network(self):
        with pytest.raises(NotImplementedError, match=r"use torch\.export or torch\.jit\.trace"):
            torch.jit.script(tritune.nn.ElmanRNN(3, 4, 2))

    @pytest.mark.parametrize("function", [tritune.rnn, tritune.gru, tritune.lstm, tritune.elman_step])
    @pytest.mark.parametrize("where", range(4))
    def test_torch_function_comes_first(self, function, where):
        """Whatever argument has the method, it is asked before anything is checked."""

        class Overriding:
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return func, len(args)

        arguments = [None] * 4
        arguments[where] = Overriding()
        assert function(*arguments)[0] is function

    @pytest.mark.parametrize("name", MODULES)
    def test_a_packed_sequence_is_explained(self, name):
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
        (decision,) = tritune.explain(getattr(tritune.nn, name)(3, 4), packed)
        assert (decision.op, decision.backend) == (name.lower(), "torch")

    @pytest.mark.parametrize("name, op", [("RNN", "rnn"), ("GRU", "gru"), ("LSTM", "lstm")])
    @pytest.mark.parametrize("num_layers", [1, 2])
    def test_a_module_is_explained_by_its_functions_name(self, name, op, num_layers):
        (decision,) = tritune.explain(getattr(tritune.nn, name)(3, 4, num_layers), torch.randn(5, 2, 3))
        assert (decision.op, decision.backend) == (op, "torch")

    def test_a_step_is_explained_by_its_name(self):
        sizes = ((2, 3), (2, 4), (4, 3), (4, 4))
        assert tritune.explain(tritune.elman_step, *map(torch.randn, sizes)).op == "elman_step"

    @pytest.mark.parametrize("name", MODULES)
    def test_vmap_of_several_layers(self, name):
        layer = getattr(tritune.nn, name)(3, 4, 2, bidirectional=True)
        x = torch.randn(6, 5, 2, 3)
        got = torch.func.vmap(lambda one: layer(one)[0])(x)
        assert_as_exact(got, lambda layer, x: torch.stack([layer(one)[0] for one in x]), layer, x)

    def test_autocast(self):
        mine, theirs = layers("LSTM", 3, 4, device="cpu")
        x = torch.randn(5, 2, 3)
        # Without oneDNN, whose bfloat16 LSTM some processors lack: torch's autocast stays in float32 then.
        with without_onednn():
            with torch.autocast("cpu", torch.bfloat16):
                got = mine(x)[0]
            assert got.dtype == torch.bfloat16
            assert_as_exact(got, lambda layer, x: layer(x)[0], theirs.bfloat16(), x.bfloat16())

    @pytest.mark.parametrize("name", MODULES)
    def test_functional_call(self, name):
        mine, _ = layers(name, 3, 4, device="cpu")
        x = torch.randn(5, 2, 3)
        other = {key: value + 0.1 for key, value in mine.state_dict().items()}
        got = torch.func.functional_call(mine, other, (x,))
        mine.load_state_dict(other)
        assert_same(got, mine(x))

    def test_a_long_sequence(self):
        """Beyond 65 535 steps, where cuDNN ends."""
        x, w, h = torch.randn(70_000, 1, 1), 0.1 * torch.randn(1, 1), 0.5 * torch.ones(1, 1)
        out, h_n = tritune.rnn(x, w, h)
        assert out.shape == (70_000, 1, 1) and torch.equal(out[-1], h_n[0])


@pytest.mark.interpret
@pytest.mark.gpu
class TestKernels:
    @pytest.mark.parametrize("swap", [0, 1])
    @pytest.mark.parametrize("block", [16, 32])
    @pytest.mark.parametrize("cell", GATES)
    def test_tiles(self, cell, block, swap, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import rnn

        config = Config(BLOCK_B=block, SWAP=swap, num_warps=4, num_stages=1)
        with override(rnn.FORWARD, config), override(rnn.BACKWARD, config):
            check(case("tiles", cell, 3, 18, 3, 20, directions=2), torch.float16, "nchw", device, "triton")

    def test_a_hidden_size_beyond_the_chip(self, device):
        x, w_ih, w_hh = (torch.randn(s, device=device) for s in ((2, 1, 3), (1024, 3), (1024, 1024)))
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match="hidden_size=1024"):
            tritune.rnn(x, w_ih, w_hh)
        out, _ = tritune.rnn(x, w_ih, w_hh)
        assert out.shape == (2, 1, 1024)

    @pytest.mark.parametrize(
        "options, reason",
        [({"num_layers": 2}, "num_layers=2"), ({"proj_size": 2}, "proj_size=2")],
    )
    def test_what_modules_leave_to_torch_is_named(self, options, reason, device):
        model = tritune.nn.LSTM(3, 4, **options).to(device)
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match=reason):
            model(torch.randn(2, 1, 3, device=device))

    def test_packed_sequences_are_left_to_torch(self, device):
        model = tritune.nn.GRU(3, 4).to(device)
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 3, device=device), torch.tensor([3, 1]))
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match="packed"):
            model(packed)

    def test_gates_are_not_saved(self, device):
        """Input, weights, output and the cells: two numbers a hidden unit and step, not six."""
        x, w_ih, w_hh = (torch.randn(s, device=device, requires_grad=True) for s in ((7, 3, 2), (32, 2), (32, 8)))
        with tritune.use_backend("triton"):
            out, _, _ = tritune.lstm(x, w_ih, w_hh)
        node = out.grad_fn
        saved = [t for t in node.saved_tensors if t is not None and t.shape[:1] == (7,)]
        assert sorted(tuple(t.shape) for t in saved) == [(7, 3, 2), (7, 3, 8), (7, 3, 8)]

    def test_the_last_state_is_the_last_output(self, device):
        x, w_ih, w_hh = (torch.randn(s, device=device) for s in ((4, 3, 2), (2, 24, 2), (2, 24, 8)))
        with tritune.use_backend("triton"):
            out, h_n = tritune.gru(x, w_ih, w_hh)
        assert torch.equal(out[-1, :, :8], h_n[0]) and torch.equal(out[0, :, 8:], h_n[1])


class TestElman:
    pytestmark = every_backend

    def test_the_formulas(self, device, tier):
        sizes = ((2, 3), (2, 5), (5, 3), (5, 5), (5,), (4, 5), (4,), (6, 4))
        x, h, *weights = (torch.randn(size, device=device) for size in sizes)

        def formulas(x: Tensor, h: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            W_xh, W_hh, b_h, W_ho, b_o, W_yh = weights
            new_h = torch.tanh(h @ W_hh.T + x @ W_xh.T + b_h)
            o = new_h @ W_ho.T + b_o
            return new_h, o, torch.tanh(o @ W_yh.T)

        with tritune.use_backend(backend_of(tier)):
            step = tritune.elman_step(x, h, *weights)
            alone = tritune.elman_step(x[0], h[0], *weights)
            bare = tritune.elman_step(x, h, *weights[:2])
        assert_as_exact(step, formulas, x, h, *weights)
        assert_as_exact(alone, formulas, x[0], h[0], *weights)
        assert_as_exact(bare[0], lambda x, h, W_xh, W_hh: torch.tanh(h @ W_hh.T + x @ W_xh.T), x, h, *weights[:2])
        assert bare[1:] == (None, None)

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_the_module_is_its_steps(self, batch_first, device, tier):
        net = tritune.nn.ElmanRNN(3, 6, 4, 2, batch_first=batch_first).to(device)
        x, h = torch.randn(5, 2, 3, device=device), torch.randn(2, 6, device=device)

        def in_steps(net: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
            steps = []
            for x_t in x:
                h, o_t, y_t = net.step(x_t, h)
                steps.append((y_t, o_t))
            return *map(torch.stack, zip(*steps, strict=True)), h

        with tritune.use_backend(backend_of(tier)):
            y, o, h_n = net(x.transpose(0, 1) if batch_first else x, h)
        if batch_first:
            y, o = y.transpose(0, 1), o.transpose(0, 1)
        assert_as_exact((y, o, h_n), in_steps, net, x, h)
        assert y.shape == (5, 2, 2) and o.shape == (5, 2, 4)

    def test_one_sequence(self, device, tier):
        net = tritune.nn.ElmanRNN(3, 6, 4).to(device)
        x = torch.randn(5, 3, device=device)
        with tritune.use_backend(backend_of(tier)):
            y, _, h = net(x)
        assert y.shape == (5, 4) and h.shape == (6,)
        assert_as_exact(y, lambda net, x: net(x.unsqueeze(1), x.new_zeros(1, 6))[0][:, 0], net, x)


@pytest.mark.static
def test_changing_sizes_compile_once():
    from tritune.kernels import rnn

    binaries: dict[str, set[str]] = {}
    for tunable in (rnn.FORWARD, rnn.BACKWARD):
        for t, b in ((1, 1), (16, 16), (7, 5), (65_600, 1), (3, 2_000)):
            problem = rnn.RnnProblem("lstm", t, b, 24, 2, torch.bfloat16, "16", True)
            for launch in tunable.launches(problem, tunable.configs[2]):
                source = launch.source()
                key = (source.signature, source.constants, source.attrs)
                binaries.setdefault(tunable.name, set()).add(repr([sorted(part.items()) for part in key]))
    assert {name: len(found) for name, found in binaries.items()} == {"rnn": 1, "rnn_backward": 1}


@pytest.mark.static
@pytest.mark.parametrize(
    "cell, dtype, target, largest",
    [
        ("tanh", torch.bfloat16, "sm_90", 256),
        ("gru", torch.bfloat16, "sm_90", 128),
        ("lstm", torch.bfloat16, "sm_90", 128),
        ("tanh", torch.float32, "sm_90", 128),
        ("lstm", torch.float32, "sm_90", 64),
        ("lstm", torch.bfloat16, "sm_120", 64),
        ("lstm", torch.bfloat16, "gfx942", 64),
    ],
)
def test_the_largest_hidden_size(cell, dtype, target, largest):
    from tritune.autotune.device import named
    from tritune.kernels import rnn

    def fits(h: int) -> bool:
        precision = "ieee" if dtype is torch.float32 else "16"
        return rnn.fits(rnn.RnnProblem(cell, 8, 8, h, 1, dtype, precision, True), named(target))

    assert fits(largest) and not fits(largest + 1)
