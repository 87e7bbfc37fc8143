"""``tritune.nn.MultiheadAttention``: torch's own module where torch serves, and the same numbers on the kernels."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from harness import Case, backend_of, check
from test_graphs import compiled, exported
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_errors import Call, assert_same_error, call, outcome

import tritune

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage", "ignore:Support for mismatched key_padding_mask",
    "ignore:.torch.jit.(trace|script).* is deprecated:DeprecationWarning", "ignore::torch.jit.TracerWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule",
)  # fmt: skip
E, H, L, S, N = 8, 2, 5, 6, 3


def masks(kind: str, dtype: torch.dtype = torch.float32, keys: int = S) -> dict[str, Any]:
    """Keyword arguments; each query sees its first key."""
    draw = torch.Generator().manual_seed(1)
    padded, hidden = (torch.rand(shape, generator=draw) > 0.6 for shape in ((N, keys), (L, keys)))
    by_head = torch.rand((N * H, L, keys), generator=draw) > 0.6
    for one in (padded, hidden, by_head):
        one[..., 0] = False
    causal = torch.ones(L, keys, dtype=torch.bool).triu(1)
    added = torch.randn((L, keys), generator=draw).to(dtype)
    added[:, 2] = -math.inf
    chosen: dict[str, dict[str, Any]] = {
        "none": {},
        "padding": {"key_padding_mask": padded},
        "numbers for padding": {"key_padding_mask": torch.randn((N, keys), generator=draw).to(dtype)},
        "mask": {"attn_mask": hidden},
        "numbers": {"attn_mask": added},
        "heads": {"attn_mask": by_head},
        "both": {"attn_mask": by_head, "key_padding_mask": padded},
        "mixed": {"attn_mask": added, "key_padding_mask": padded},
        "cause": {"attn_mask": causal, "is_causal": True},
        "cause and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padded},
    }
    return chosen[kind]


MASKS = (
    "none", "padding", "numbers for padding", "mask", "numbers", "heads", "both", "mixed", "cause", "cause and padding"
)  # fmt: skip
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "widths": {"kdim": 6, "vdim": 7},
    "no bias": {"bias": False, "batch_first": True},
    "bias of keys": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "everything": {"kdim": 6, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True},
}


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """torch's and ours, with the same random parameters."""
    theirs, ours = (space.MultiheadAttention(E, H, **options) for space in (nn, tritune.nn))
    with torch.no_grad():
        for one in theirs.parameters():
            one.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def shapes(kind: str, options: dict[str, Any]) -> list[tuple[int, ...]]:
    """Of query, key and value; of one tensor for attention to itself."""
    lengths = (L, L, L) if kind == "self" else (L, S, S)
    widths = (E, options.get("kdim") or E, options.get("vdim") or E)
    if kind == "one sequence":
        return list(zip(lengths, widths, strict=True))
    batched = [(N, length) if options.get("batch_first") else (length, N) for length in lengths]
    return [(*sizes, width) for sizes, width in zip(batched, widths, strict=True)][: 1 if kind == "self" else 3]


def of_one_sequence(given: dict[str, Any]) -> dict[str, Any]:
    changed = dict(given)
    if "key_padding_mask" in given:
        changed["key_padding_mask"] = given["key_padding_mask"][0]
    if "attn_mask" in given and given["attn_mask"].dim() == 3:
        changed["attn_mask"] = given["attn_mask"][:H]
    return changed


def keywords(kind: str, mask: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    given = masks(mask, dtype, L if kind == "self" else S)
    return of_one_sequence(given) if kind == "one sequence" else given


def calls() -> list[tuple[str, str, str]]:
    """Each kind of layer with each mask, and each way to call it."""
    rows = [(layer, "others", mask) for layer, mask in itertools.product(LAYERS, MASKS)]
    rows += [(layer, "self", mask) for layer in ("plain", "batch first", "no bias") for mask in MASKS]
    return rows + [(layer, "one sequence", mask) for layer in ("batch first", "everything") for mask in MASKS]


# --- where torch serves ----------------------------------------------------------------------------------------------


def same_bits(made: Any, wanted: Any) -> None:
    torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)
    for one, other in zip(made, wanted, strict=True):
        assert one is other is None or (one.stride() == other.stride() and one.requires_grad == other.requires_grad)


@pytest.mark.torch
@pytest.mark.parametrize("layer, kind, mask", calls())
def test_bits_are_torchs(layer: str, kind: str, mask: str) -> None:
    options = {**LAYERS[layer], "dropout": 0.3}
    modules = pair(**options)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes(kind, options)]
    for trains, weights in itertools.product((True, False), (True, False)):
        if mask == "cause" and weights and options.get("add_bias_kv"):
            continue  # torch asserts that it does not compute that
        results = []
        for module in modules:
            module.train(trains)
            torch.manual_seed(1)
            tensors = leaves * 3 if kind == "self" else leaves
            with torch.set_grad_enabled(trains):
                out = module(*tensors, **keywords(kind, mask), need_weights=weights)
                grads = torch.autograd.grad(out[0].sin().sum(), [*leaves, *module.parameters()]) if trains else ()
            results.append((*out, *grads))
        same_bits(*results)


def malformed() -> list[tuple[dict[str, Any], Call]]:
    x, y = torch.randn(L, N, E), torch.randn(S, N, E)
    sure = {"need_weights": False}
    rows: list[tuple[dict[str, Any], Call]] = [({}, call(*tensors, **sure)) for tensors in (
        (x, y[0], y), (x[0], y, y), (torch.randn(1, L, N, E),) * 3, (x, y[:, :1], y[:, :1]), (x, y, y[:4]),
        (x[..., :6], y, y), (x, y[..., :6], y[..., :6]), (x.double(), y, y), (x.long(), y.long(), y.long()),
        (None, y, y), (x, y, None), (x, 3, y),
    )]  # fmt: skip
    rows += [({}, call(x, y, y, **sure, **more)) for more in (
        {"is_causal": True},
        {"attn_mask": torch.zeros(L, S, dtype=torch.long)}, {"attn_mask": torch.zeros(L, L)},
        {"attn_mask": torch.zeros(L)}, {"attn_mask": torch.zeros(N, L, S)}, {"attn_mask": torch.zeros(1, L, S)},
        {"attn_mask": torch.zeros(N * H, L, L, dtype=torch.bool)}, {"attn_mask": "causal"},
        {"attn_mask": torch.zeros(L, S, dtype=torch.float64)},
        {"key_padding_mask": torch.zeros(S)}, {"key_padding_mask": torch.zeros(N, L)},
        {"key_padding_mask": torch.zeros(1, S)}, {"key_padding_mask": torch.zeros(N, S, dtype=torch.int32)},
        {"key_padding_mask": torch.zeros(N, L), "attn_mask": torch.zeros(L, L), "is_causal": True},
    )]  # fmt: skip
    rows += [({}, call(x[:, 0], y[:, 0], y[:, 0], **sure, **more)) for more in (
        {"attn_mask": torch.zeros(N * H, L, S)}, {"key_padding_mask": torch.zeros(1, S)},
        {"key_padding_mask": torch.zeros(L)},
    )]  # fmt: skip
    widths = {"kdim": 6, "vdim": 7}
    rows += [(widths, call(x, y, y, **sure)), (widths, call(x, y[..., :6], y[:4, :, :7], **sure))]
    rows += [({"batch_first": True}, call(x, y, y, **sure))]
    return rows


MALFORMED = malformed()


@pytest.mark.parametrize(
    "backend", [pytest.param("auto", marks=pytest.mark.torch), pytest.param("triton", marks=pytest.mark.interpret)]
)
@pytest.mark.parametrize("row", range(len(MALFORMED)))
def test_errors_are_torchs(row: int, backend: str) -> None:
    options, made = MALFORMED[row]
    theirs, ours = pair(**options)
    expected = outcome(theirs, made)
    for watched in (False, True):
        with tritune.use_backend(backend), tritune.ops.record() if watched else tritune.use_backend(backend):
            got = outcome(ours, made)
        # On the kernels what follows the projections is checked by our attention, in its own words.
        assert_same_error(expected, got, made, compare_text=backend == "auto")


@pytest.mark.parametrize(
    "backend", [pytest.param("auto", marks=pytest.mark.torch), pytest.param("triton", marks=pytest.mark.interpret)]
)
@pytest.mark.parametrize("name", ["bias_k", "bias_v", "num_heads", "in_proj_weight"])
def test_what_is_set_afterwards_counts_as_in_torch(name: str, backend: str) -> None:
    values: dict[str, Any] = {"num_heads": 3, "in_proj_weight": nn.Parameter(torch.randn(3 * E, E + 1))}
    made, results = call(*(torch.randn(L, N, E),) * 3, need_weights=False), []
    for module in pair(add_bias_kv=True):
        setattr(module, name, values.get(name))
        with tritune.use_backend(backend):
            results.append(outcome(module, made))
    assert_same_error(*results, made)


@pytest.mark.parametrize(
    "backend", [pytest.param("auto", marks=pytest.mark.torch), pytest.param("triton", marks=pytest.mark.interpret)]
)
def test_masks_of_two_types_are_warned_of(backend: str) -> None:
    x, given = torch.randn(L, N, E), masks("mixed", keys=L)
    for module in pair():
        with tritune.use_backend(backend), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module(x, x, x, need_weights=False, **given)
        assert "Support for mismatched key_padding_mask and attn_mask is deprecated" in str(caught[0].message)


class OfItself(nn.Module):
    """Attention of a sequence to itself, as a model calls it."""

    def __init__(self, layer: nn.MultiheadAttention, given: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False, **self.given)[0]


@pytest.mark.torch
@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("mask", ["none", "both", "cause"])
def test_graphs_are_torchs(mask: str, trains: bool) -> None:
    given, graphs = keywords("self", mask), []
    x = torch.randn(N, L, E, requires_grad=trains)
    for module in pair(batch_first=True):
        model = OfItself(module.train(trains).requires_grad_(trains), given)
        seen, out = compiled(model, [x])
        graphs.append((out, seen, exported(model, [x.detach()])))
    assert graphs[0][1:] == graphs[1][1:]
    torch.testing.assert_close(graphs[0][0], graphs[1][0], rtol=0, atol=0)


@pytest.mark.interpret
@pytest.mark.parametrize("mask", ["none", "both", "cause"])
def test_graphs_hold_our_operator_on_the_kernels(mask: str) -> None:
    _, module = pair(batch_first=True)
    with tritune.use_backend("triton"):
        seen = exported(OfItself(module, keywords("self", mask)), [torch.randn(N, L, E)])
    assert [one for one in seen if "tritune" in one] == ["tritune.attention.default"]


@pytest.mark.torch
class TestDecisions:
    def test_torch_serves_on_the_cpu(self) -> None:
        _, module = pair()
        x = torch.randn(L, N, E)
        for options in ({}, {"need_weights": False}):
            (decision,) = tritune.explain(module, x, x, x, **options)
            assert (decision.op, decision.backend) == ("scaled_dot_product_attention", "torch")
            with tritune.ops.record() as decisions:
                module(x, x, x, **options)
            assert [(one.op, one.backend) for one in decisions] == [("scaled_dot_product_attention", "torch")]

    def decisions(self, backend: str, trains: bool, **options: Any) -> Any:
        module = tritune.nn.MultiheadAttention(64, 2, batch_first=True).train(trains)
        with FakeTensorMode():
            for one in (module, module.out_proj):
                for name, parameter in one.named_parameters(recurse=False):
                    one._parameters[name] = torch.empty(parameter.shape, device="cuda")
            x = torch.empty(4, 128, 64, device="cuda")
            with tritune.use_backend(backend), torch.no_grad(), tritune.ops.record() as decisions:
                module(x, x, x, **options)
        return decisions

    def test_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITUNE_DEVICE", "h200")
        # A CPU build of torch cannot copy a fake tensor of a GPU, as torch's module does.
        monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda *_: None)
        (forward,) = self.decisions("auto", True, need_weights=False)
        assert forward.backend == "torch" and forward.instead
        (fused,) = self.decisions("auto", False, need_weights=False)
        assert fused.because == "not measured beside torch's fused operator for inference" and not fused.instead
        (kernels,) = self.decisions("triton", False, need_weights=False)
        assert [name for name, _ in kernels.kernels] == ["attention"]
        (weights,) = self.decisions("auto", True)
        assert weights.rejected == "need_weights=True"


@pytest.mark.torch
class TestTransformerEncoder:
    """torch's layer goes by the attributes of its ``self_attn``, which are those of torch's module."""

    def layers(self) -> tuple[Any, Any]:
        theirs = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, dropout=0.2)
        ours = copy.deepcopy(theirs)
        ours.self_attn.__class__ = tritune.nn.MultiheadAttention
        return theirs, ours

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("trains", [True, False])
    @pytest.mark.parametrize("padded", [True, False])
    def test_it_computes_the_same(self, padded: bool, trains: bool, fast: bool) -> None:
        given = masks("padding", keys=L) if padded else {}
        x, results = torch.randn(N, L, E), []
        mask = torch.arange(L) >= torch.tensor([[5], [3], [4]])
        for layer in self.layers():
            model = nn.TransformerEncoder(layer, 2).train(trains)
            torch.manual_seed(1)
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(fast)
            try:
                with torch.set_grad_enabled(trains):
                    results.append(model(x, src_key_padding_mask=mask if given else None))
            finally:
                torch.backends.mha.set_fastpath_enabled(before)
        torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_inference_does_not_call_the_module_unless_the_fused_operator_is_off(self) -> None:
        _, layer = self.layers()
        x, found = torch.randn(N, L, E), []
        for fast in (True, False):
            torch.backends.mha.set_fastpath_enabled(fast)
            try:
                with torch.no_grad(), tritune.ops.record() as decisions:
                    layer.eval()(x)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)
            found.append(len(decisions))
        assert found == [0, 1]


@pytest.mark.torch
class TestOfTorch:
    def test_nested_tensors(self) -> None:
        x, results = torch.nested.nested_tensor([torch.randn(4, E), torch.randn(2, E)]), []
        for module in pair(batch_first=True):
            with torch.no_grad():
                results.append(module.eval()(x, x, x, need_weights=False)[0].to_padded_tensor(0.0))
                with tritune.ops.record() as decisions:
                    module(x, x, x, need_weights=False)
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert [one.backend for one in decisions] == ["torch"]

    def test_transforms_autocast_and_checkpoints(self) -> None:
        x, results = torch.randn(L, N, E), []
        for module in pair():

            def loss(x: Tensor, module: Any = module) -> Tensor:
                return module(x, x, x, need_weights=False)[0].square().sum()

            with torch.autocast("cpu", torch.bfloat16):
                mixed = module(x, x, x, need_weights=False)[0]
            leaf = x.clone().requires_grad_()
            torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False).backward()
            results.append((torch.func.grad(loss)(x), torch.vmap(loss, 1)(x), mixed, leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)

    @pytest.mark.parametrize("mask", ["none", "both", "cause"])
    def test_forward_mode(self, mask: str) -> None:
        """torch's fused operator has none, so two backward passes through the scores are the yardstick."""
        theirs, ours = (module.double() for module in pair())
        x, given = torch.randn(L, N, E, dtype=torch.float64), keywords("self", mask, torch.float64)
        wanted = torch.autograd.functional.jvp(lambda x: theirs(x, x, x, **given)[0], x, x)
        got = torch.func.jvp(lambda x: ours(x, x, x, need_weights=False, **given)[0], (x,), (x,))
        torch.testing.assert_close(got, wanted)

    def test_tracing(self) -> None:
        _, module = pair()
        x, longer = torch.randn(L, N, E), torch.randn(L + 1, N, E)
        traced = torch.jit.trace(OfItself(module, {}), x)
        for one in (x, longer):
            torch.testing.assert_close(traced(one), module(one, one, one)[0])

    def test_a_subclass_of_tensor(self) -> None:
        class Tagged(Tensor):
            pass

        x = torch.randn(L, N, E).as_subclass(Tagged)
        for module in pair():
            assert type(module(x, x, x, need_weights=False)[0]) is Tagged


# --- on the kernels --------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    made = []
    for layer, kind, mask in calls():
        options = LAYERS[layer]
        theirs, ours = pair(**options)

        def op(
            module: nn.MultiheadAttention, kind: str, mask: str, **tensors: Tensor
        ) -> Tensor:  # fmt: skip
            names = ("query", "key", "value")
            # A quarter, so that the scores are as small as those of a model.
            parameters = {name: one / 4 for name, one in tensors.items() if name not in names}
            operands = tuple(tensors[name] for name in names if name in tensors) * (3 if kind == "self" else 1)
            given = keywords(kind, mask, operands[0].dtype)
            given = {
                name: one.to(operands[0].device) if isinstance(one, Tensor) else one for name, one in given.items()
            }
            out: Tensor = torch.func.functional_call(module, parameters, operands, {**given, "need_weights": False})[0]
            return out

        sizes = dict(zip(("query", "key", "value"), shapes(kind, options), strict=False))
        sizes |= {name: tuple(one.shape) for name, one in ours.named_parameters()}
        by = {"kind": kind, "mask": mask}
        made.append(
            Case(f"{layer}-{kind}-{mask}", lambda m=ours, **rest: op(m, **rest), lambda m=theirs, **rest: op(m, **rest),
                 sizes, by)
        )  # fmt: skip
    return made


@pytest.mark.interpret
@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [pytest.param(one, id=one.id, marks=pytest.mark.full if at % 3 else ()) for at, one in enumerate(cases())]
)
def test_values_and_gradients(case: Case, device: str, tier: str) -> None:
    check(case, torch.float32, "nchw", device, backend_of(tier))


@pytest.mark.interpret
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases()[:: len(MASKS) + 3], ids=lambda case: case.id)
def test_half_precision(case: Case, dtype: torch.dtype, device: str, tier: str) -> None:
    check(case, dtype, "nchw", device, backend_of(tier))


@pytest.mark.interpret
class TestUncovered:
    @pytest.mark.parametrize("options, text", [
        ({}, "need_weights=True"), ({"need_weights": False}, "dropout=0.3"),
    ])  # fmt: skip
    def test_the_argument_is_named(self, options: dict[str, Any], text: str) -> None:
        _, module = pair(dropout=0.3)
        x = torch.randn(L, N, E)
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match=f"forbids torch: {text}"):
            module(x, x, x, **options)

    def test_nested_tensors(self) -> None:
        _, module = pair(batch_first=True)
        x = torch.nested.nested_tensor([torch.randn(4, E), torch.randn(2, E)])
        with tritune.use_backend("triton"), torch.no_grad(), pytest.raises(tritune.UnsupportedError, match="ested"):
            module.eval()(x, x, x, need_weights=False)

    def test_inference_runs_the_kernels(self) -> None:
        _, module = pair(batch_first=True, dropout=0.3)
        x = torch.randn(N, L, E)
        with tritune.use_backend("triton"), torch.no_grad(), tritune.ops.record() as decisions:
            module.eval()(x, x, x, need_weights=False)
        assert [one.backend for one in decisions] == ["triton"]
