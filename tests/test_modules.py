"""Every module of ``tritune.nn`` as torch's tools meet it: built, loaded, exchanged, folded, scripted, quantised.

One table holds them all; a new module fails :func:`test_every_module_is_in_the_table` until it has a row.
"""

import copy
import functools
import inspect
import io
import pickle
import re
import typing
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from harness import assert_as_exact, assert_close
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils import fusion, parametrizations, parametrize, prune, skip_init
from torch_errors import call, outcome

import tritune

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings(r"ignore:(.torch.jit.|torch.ao.quantization is deprecated):DeprecationWarning"),
]

RECURRENT = ("RNN", "GRU", "LSTM")
X = {rank: (2, 4, *(7,) * rank) for rank in (1, 2, 3)}


def rows():
    """Name to arguments of the constructor, and the shapes of the call's tensors."""
    for rank, x in X.items():
        yield f"Conv{rank}d", ((4, 6, 3), {"groups": 2, "padding": 1, "padding_mode": "circular"}), (x,)
        yield f"ConvTranspose{rank}d", ((4, 6, 3), {"groups": 2, "stride": 2}), (x,)
        yield f"ConvActivation{rank}d", ((4, 6, 3), {"activation": "relu"}), (x,)
        yield f"ConvTransposeActivation{rank}d", ((4, 6, 3), {"activation": "silu", "stride": 2}), (x,)
        yield f"MaxPool{rank}d", ((3,), {"stride": 2}), (x,)
        yield f"AvgPool{rank}d", ((3,), {"count_include_pad": False, "padding": 1}), (x,)
        yield f"LPPool{rank}d", ((2, 3), {}), (x,)
        yield f"AdaptiveAvgPool{rank}d", ((3,), {}), (x,)
        yield f"AdaptiveMaxPool{rank}d", ((3,), {}), (x,)
        yield f"MaxUnpool{rank}d", ((2,), {}), (x, x)
        if rank > 1:
            samples = torch.full((2, 4, rank), 0.3)
            yield f"FractionalMaxPool{rank}d", ((2, 3), {"_random_samples": samples}), (x,)
    for name in RECURRENT:
        yield name, ((4, 5), {}), ((3, 2, 4),)
    yield "ElmanRNN", ((4, 5, 6), {}), ((3, 2, 4),)
    yield "MultiheadAttention", ((4, 2), {"batch_first": True}), ((2, 5, 4),) * 3
    yield "Attention", ((), {"score": "cosine", "scale": "learnable"}), ((2, 3, 5, 4),) * 3
    yield "AttentionPool", ((4, 2), {"num_queries": 3}), ((2, 5, 4),)


TABLE = {name: (arguments, shapes) for name, arguments, shapes in rows()}
OF_TORCH = [name for name in TABLE if hasattr(torch.nn, name)]
OUR_OWN = [name for name in TABLE if not hasattr(torch.nn, name)]
# torch's tracer cannot follow its own modules of these names.
UNTRACEABLE = (*RECURRENT, "MultiheadAttention")
CONVOLUTIONS = [f"Conv{kind}{rank}d" for kind in ("", "Transpose") for rank in (1, 2, 3)]
# They are what torch's tools meet only before their first input, so the rest of the table is not for them.
LAZY = [f"Lazy{name}" for name in CONVOLUTIONS]


def activated(name):
    """The class that computes an activation behind the convolution ``name``."""
    return getattr(tritune.nn, f"{name[:-2]}Activation{name[-2:]}")


def build(name, namespace=tritune.nn):
    args, kwargs = TABLE[name][0]
    return getattr(namespace, name)(*args, **kwargs)


def inputs(name):
    tensors = [torch.randn(shape) for shape in TABLE[name][1]]
    if name == "MultiheadAttention":  # of itself, as torch's fused operator wants it
        return tensors[:1] * 3
    if "Unpool" in name:
        rank = int(name[-2])
        tensors[1] = torch.arange(7**rank).expand(2, 4, -1).reshape(X[rank])
    return tensors


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_every_module_is_in_the_table():
    kinds = {name for name, kind in vars(tritune.nn).items() if inspect.isclass(kind)}
    assert kinds == {*TABLE, *LAZY}
    assert all(issubclass(getattr(tritune.nn, name), torch.nn.Module) for name in kinds)
    assert len(OF_TORCH) > 20


# --- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TABLE, *LAZY])
def test_the_signature_can_be_read_and_begins_as_torchs(name):
    ours = inspect.signature(getattr(tritune.nn, name)).parameters
    kinds = {one.kind for one in ours.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if hasattr(torch.nn, name):
        constructor = getattr(torch.nn, name).__init__
        overloads = typing.get_overloads(constructor)  # of the recurrent modules: in truth they take *args, **kwargs
        _, *theirs = inspect.signature(overloads[0] if overloads else constructor).parameters.values()
        begin, rest = list(ours.values())[: len(theirs)], list(ours.values())[len(theirs) :]
        assert [(one.name, one.default) for one in begin] == [(one.name, one.default) for one in theirs]
        assert all(one.kind is one.KEYWORD_ONLY for one in rest)


def test_the_signature_of_a_users_subclass_is_its_own():
    class Block(tritune.nn.Conv2d):
        def __init__(self, width, *, activation):
            super().__init__(width, width, 3)
            self.after = activation

    assert list(inspect.signature(Block).parameters) == ["width", "activation"]
    assert Block(4, activation="swish").after == "swish"


OVERRIDDEN = [name for name in TABLE if name.startswith("Conv") and "Transpose" not in name]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_convolution_with_another_weight_is_that_of_the_subclass(name):
    """Weight standardisation and its like override ``_conv_forward``."""

    def halved(self, input, weight, bias):
        return super(kind, self)._conv_forward(input, weight / 2, None)

    kind = type("Halved", (getattr(tritune.nn, name),), {"_conv_forward": halved})
    module, (x,) = kind(*TABLE[name][0][0], **TABLE[name][0][1]), inputs(name)
    plain = build(name)
    with torch.no_grad():
        plain.weight.copy_(module.weight / 2)
        plain.bias.zero_()
    torch.testing.assert_close(module(x), plain(x))
    plain._conv_forward = lambda input, weight, bias: input
    assert plain(x) is x


@pytest.mark.parametrize("name", [activated(name).__name__ for name in CONVOLUTIONS])
def test_a_subclass_fills_its_parameters(name):
    def sevens(self):
        torch.nn.init.constant_(self.weight, 7.0)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    kind = type("Sevens", (getattr(tritune.nn, name),), {"reset_parameters": sevens})
    for bias in (True, False):
        module = kind(4, 6, 3, activation="relu", bias=bias, dtype=torch.float64)
        assert module.weight.unique().tolist() == [7.0] and module.weight.dtype is torch.float64
        assert [name for name, _ in module.named_parameters()] == ["weight", "bias"][: 1 + bias]
        assert module.bias is None or module.bias.unique().tolist() == [0.0]


def helpers(kind):
    """The methods that torch's forward calls on its own module."""
    names = sorted(set(kind.forward.__code__.co_names) - set(dir(torch.nn.Module)))
    return [name for name in names if inspect.isfunction(getattr(kind, name, None))]


HELPERS = {name: helpers(getattr(torch.nn, name)) for name in OF_TORCH}


def test_torchs_forward_calls_methods():
    assert HELPERS["Conv2d"] == ["_conv_forward"] and HELPERS["ConvTranspose2d"] == ["_output_padding"]
    assert "check_forward_args" in HELPERS["LSTM"] and not HELPERS["MaxPool2d"]


def noting(helper, calls):
    def method(self, *args, **kwargs):
        calls.append((helper, len(args)))
        return getattr(super(type(self), self), helper)(*args, **kwargs)

    return method


@pytest.mark.parametrize("on", ["subclass", "instance"])
@pytest.mark.parametrize("name", [name for name in OF_TORCH if HELPERS[name]])
def test_the_methods_that_torchs_forward_calls_are_called(name, on):
    called = []
    for namespace in (torch.nn, tritune.nn):
        calls = []
        methods = {one: noting(one, calls) for one in HELPERS[name]}
        child = type(name, (getattr(namespace, name),), methods if on == "subclass" else {})
        args, kwargs = TABLE[name][0]
        module = child(*args, **kwargs)
        if on == "instance":
            for one, method in methods.items():
                setattr(module, one, functools.partial(method, module))
        module(*inputs(name))
        with torch.no_grad():  # torch's fused operators are for inference
            module.eval()(*inputs(name))
        called.append(calls)
    assert called[0] == called[1] != []


@pytest.mark.parametrize("name", [name for name in TABLE if hasattr(getattr(tritune.nn, name), "reset_parameters")])
def test_the_constructor_calls_what_a_subclass_overrides_and_torchs_hooks(name):
    """As often as torch's, where it has the module; and each Parameter is registered once, with the module itself."""
    counts, registered = {}, []
    args, kwargs = TABLE[name][0]

    def make(kind, **kwargs):
        class Constant(kind):
            resets = 0

            def reset_parameters(self):
                self.resets += 1
                super().reset_parameters()
                for one in self.parameters():
                    torch.nn.init.constant_(one, 7)

        module = Constant(*args, **kwargs)
        counts[kind] = module.resets
        assert all((one == 7).all() for one in module.parameters())
        return module

    hook = register_module_parameter_registration_hook(lambda module, name, one: registered.append((module, name)))
    try:
        module = make(getattr(tritune.nn, name), **kwargs)
    finally:
        hook.remove()
    held = [(one, key) for one in module.modules() for key in one._parameters if key in dict(one.named_parameters())]
    expected = {(id(one), key) for one, key in held}
    with_values = [(id(one), key) for one, key in registered if one._parameters[key] is not None]
    assert set(with_values) == expected and len(with_values) == len(expected)
    assert not {"register_parameter", "reset_parameters"} & set(vars(module))
    theirs = getattr(torch.nn, name.replace("Activation", ""), None)
    if theirs is not None:
        make(theirs, **{key: one for key, one in kwargs.items() if key != "activation"})
    assert set(counts.values()) == {1}


def test_initialisation_may_depend_on_the_activation():
    class Kaiming(tritune.nn.ConvActivation2d):
        def reset_parameters(self):
            assert (self.activation, self.precision) == ("relu", "ieee")

    Kaiming(4, 6, 3, activation="relu", precision="ieee")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_activation_does_not_change_the_random_start(name):
    torch.manual_seed(1)
    plain, after = getattr(torch.nn, name)(4, 6, 3), torch.rand(3)
    torch.manual_seed(1)
    ours = activated(name)(4, 6, 3, activation="relu")
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.rand(3), after)


OTHER_VALUES = {
    "in_channels": 8, "out_channels": 8, "kernel_size": 2, "stride": 3, "padding": 2, "output_padding": 1,
    "dilation": 2, "groups": 2, "bias": False, "padding_mode": "replicate", "activation": "gelu",
    "precision": "tf32x3", "input_size": 7, "hidden_size": 7, "output_size": 7, "y_size": 7, "batch_first": True,
    "score": "dot", "scale": 2.5, "is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True,
    "eps": 1e-3, "embed_dim": 8, "num_heads": 4, "num_queries": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", OUR_OWN)
def test_its_repr_shows_every_argument(name):
    signature = inspect.signature(getattr(tritune.nn, name))
    args, kwargs = TABLE[name][0]
    given = signature.bind(*args, **kwargs).arguments
    for parameter in set(signature.parameters) - {"device", "dtype"}:
        if parameter == "padding_mode" and "Transpose" in name:
            continue  # it has to be "zeros"
        value = OTHER_VALUES[parameter]
        if value == given.get(parameter, signature.parameters[parameter].default):
            value = {"score": "cosine"}[parameter]
        other = getattr(tritune.nn, name)(**{**given, parameter: value})
        assert repr(other) != repr(build(name)), parameter


@pytest.mark.parametrize("name", TABLE)
def test_its_fx_graph_can_be_pickled(name):
    theirs = getattr(torch.nn, name.replace("Activation", ""), None)
    if theirs is not None:
        try:
            pickle.dumps(torch.fx.symbolic_trace(theirs(*TABLE[name][0][0])))
        except Exception:
            pytest.skip("nor can that of torch's module")
    module, x = build(name), inputs(name)
    traced = through_pickle(torch.fx.symbolic_trace(module))
    if len(inspect.signature(module.forward).parameters) == len(x):  # a graph has no arguments that may be missing
        torch.testing.assert_close(traced(*x), module(*x))


class Layer(torch.nn.Module):
    """A model of one layer, called with as many tensors as the layer takes."""

    def __init__(self, layer, count):
        super().__init__()
        self.layer, self.count = layer, count

    def forward(self, first, second, third):
        return self.layer(*(first, second, third)[: self.count])


class IntoEverything(torch.fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return False


def nodes(layer, count, tracer):
    return [(node.op, node.target, len(node.args)) for node in tracer().trace(Layer(layer, count)).nodes]


@pytest.mark.parametrize("name", OF_TORCH)
def test_it_is_a_leaf_where_torchs_is(name):
    count = len(inputs(name))
    ours, theirs = build(name), build(name, torch.nn)
    assert nodes(ours, count, torch.fx.Tracer) == nodes(theirs, count, torch.fx.Tracer)
    assert "call_module" in [op for op, *_ in nodes(ours, count, torch.fx.Tracer)]
    model, tensors = Layer(ours, count), (*inputs(name), None, None)[:3]
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*tensors), model(*tensors))
    if name not in UNTRACEABLE:
        assert "call_module" not in [op for op, *_ in nodes(ours, count, IntoEverything)]

        class Own(getattr(tritune.nn, name)):
            pass

        args, kwargs = TABLE[name][0]
        assert "call_module" not in [op for op, *_ in nodes(Own(*args, **kwargs), count, torch.fx.Tracer)]


@pytest.mark.parametrize("name", [name for name in OUR_OWN if name != "Attention"])
def test_what_torch_has_no_module_of_is_traced_into(name):
    assert "layer" not in [target for _, target, _ in nodes(build(name), 1, torch.fx.Tracer)]


@pytest.mark.parametrize("name", [*TABLE, *LAZY])
def test_it_is_an_instance_of_torchs_exactly_if_it_computes_the_same(name):
    kinds = {kind for kind in getattr(tritune.nn, name).__mro__ if kind.__module__.startswith("torch.")}
    if name in RECURRENT:  # Dynamo refuses to trace instances of torch's own three
        assert kinds == {torch.nn.RNNBase, torch.nn.Module}
    elif hasattr(torch.nn, name):
        assert getattr(torch.nn, name) in kinds
    else:
        assert kinds == {torch.nn.Module}


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_torch_module_becomes_ours_and_torchs_again(name):
    module, x = build(name, torch.nn), inputs(name)
    wanted, text, keys = module(*x), repr(module), list(module.state_dict())
    module.__class__ = getattr(tritune.nn, name)
    torch.testing.assert_close(module(*x), wanted)
    assert (repr(module), list(module.state_dict())) == (text, keys)
    for copied in (copy.deepcopy(module), through_pickle(module)):
        torch.testing.assert_close(copied(*x), wanted)
    module.__class__ = getattr(torch.nn, name)
    torch.testing.assert_close(module(*x), wanted)
    module = build(name)
    wanted = module(*x)
    module.__class__ = getattr(torch.nn, name)
    torch.testing.assert_close(module(*x), wanted)


@pytest.mark.parametrize("name", TABLE)
def test_our_functions_in_the_place_of_torchs_are_not_called_by_modules(name, monkeypatch):
    module, x = build(name), inputs(name)
    wanted = module(*x)
    for function in tritune.__all__:
        if hasattr(F, function):
            monkeypatch.setattr(F, function, getattr(tritune, function))
    monkeypatch.setattr(F, "pad", None)
    torch.testing.assert_close(module(*x), wanted)


SET_AFTERWARDS = (None, 0, 1, 2, 3, 0.5, 2.0, "same", "zeros", "circular", "reflect", "RNN_RELU", "GRU", "LSTM")
# Of these the functions themselves judge otherwise than torch's: docs/differences.md.
JUDGED_OTHERWISE = {
    ("LPPool", "kernel_size", tuple), ("LPPool", "kernel_size", list),
    *(("MaxUnpool", name, str) for name in ("kernel_size", "stride", "padding")),
}  # fmt: skip


@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@pytest.mark.parametrize("name", OF_TORCH)
def test_attributes_that_are_set_afterwards_count_as_in_torch(name, watched):
    ours, theirs = build(name), build(name, torch.nn)
    theirs.load_state_dict(ours.state_dict())
    tensors = inputs(name)
    rank = 1 if name in UNTRACEABLE else int(name[-2])
    attributes = {one for one in vars(theirs) if one[0] != "_"} - set(vars(torch.nn.Module()))
    compared = 0
    for attribute in attributes:
        for value in (*SET_AFTERWARDS, (1,) * rank, (2,) * rank, [2] * rank):
            if (name[:-2], attribute, type(value)) in JUDGED_OTHERWISE:
                continue
            outcomes = []
            for module in (theirs, ours):
                changed = copy.deepcopy(module)
                setattr(changed, attribute, value)
                torch.manual_seed(0)
                with tritune.ops.record() if watched else nullcontext():
                    outcomes.append(outcome(changed, call(*tensors)))
            expected, got = outcomes
            compared += 1
            if isinstance(expected, Exception):
                assert type(got) is type(expected), f"{attribute}={value!r}: torch: {expected!r}, ours: {got!r}"
            else:
                assert not isinstance(got, Exception), f"{attribute}={value!r}: {got!r}"
                for one, other in zip(values(got), values(expected), strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert compared >= len(SET_AFTERWARDS)


@pytest.mark.parametrize("kind", ["ConvTranspose", "ConvTransposeActivation"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_transposed_convolution_pads_with_zeros_only(kind, rank):
    module = build(f"{kind}{rank}d")
    module.padding_mode = "circular"
    with pytest.raises(ValueError, match=f"^Only `zeros` padding mode is supported for ConvTranspose{rank}d"):
        module(*inputs(f"{kind}{rank}d"))


@pytest.mark.parametrize("name", TABLE)
def test_copies_compute_the_same(name):
    module, x = build(name), inputs(name)
    wanted = module(*x)
    for copied in (copy.copy(module), copy.deepcopy(module), through_pickle(module), through_a_file(module)):
        assert type(copied) is type(module) and repr(copied) == repr(module)
        torch.testing.assert_close(copied(*x), wanted)


@pytest.mark.parametrize("name", [name for name in TABLE if hasattr(torch.nn, name.replace("Activation", ""))])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_states_load_strictly_both_ways(name, assign):
    torchs = name.replace("Activation", "")
    args, kwargs = TABLE[name][0]
    theirs = getattr(torch.nn, torchs)(*args, **{key: one for key, one in kwargs.items() if key != "activation"})
    ours, x = build(name), inputs(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    state = {key: one + 1 for key, one in ours.state_dict().items()}
    for module in (theirs, ours):
        module.load_state_dict(state, assign=assign)
        torch.testing.assert_close(dict(module.state_dict()), state)
    if name == torchs:
        torch.testing.assert_close(ours(*x), theirs(*x))


@pytest.mark.parametrize(
    "name", [name for name in TABLE if "device" in inspect.signature(getattr(tritune.nn, name)).parameters]
)
def test_skip_init_and_the_same_numbers_from_a_seed(name):
    args, kwargs = TABLE[name][0]
    empty = skip_init(getattr(tritune.nn, name), *args, **kwargs)
    assert {one.device.type for one in empty.parameters()} <= {"cpu"}
    empty.load_state_dict(build(name).state_dict())
    empty(*inputs(name))
    if name in OF_TORCH:
        states = []
        for namespace in (tritune.nn, torch.nn):
            torch.manual_seed(3)
            states.append(dict(build(name, namespace).state_dict()))
        torch.testing.assert_close(*states, rtol=0, atol=0)


# --- modules whose first input tells of their channels ---------------------------------------------------------------


@pytest.mark.parametrize("name", LAZY)
class TestLazy:
    def pair(self, name, **options):
        return (getattr(nn, name)(6, 3, stride=2, **options) for nn in (torch.nn, tritune.nn))

    def test_it_becomes_our_convolution(self, name):
        """With the numbers that torch's would have, and its hooks and the printed form."""
        x, made = torch.randn(X[int(name[-2])]), []
        for module in self.pair(name):
            text = repr(module)
            torch.manual_seed(3)
            y = module.double()(x.double())
            made.append((text, repr(module), y, module.state_dict()))
            assert not module._forward_pre_hooks and not module._load_state_dict_pre_hooks
        assert made[0][:2] == made[1][:2]
        torch.testing.assert_close(made[0][2:], made[1][2:], rtol=0, atol=0)
        assert type(module) is getattr(tritune.nn, name.removeprefix("Lazy"))
        (decision,) = tritune.explain(module, x.double())
        assert decision.op.startswith("conv")

    def test_copies_are_lazy_and_become_ours(self, name):
        x = torch.randn(X[int(name[-2])])
        module = build_lazy(name)
        for copied in (copy.deepcopy(module), through_pickle(module), through_a_file(module)):
            assert type(copied) is type(module) and repr(copied) == repr(module)
            copied(x)
            assert type(copied) is getattr(tritune.nn, name.removeprefix("Lazy"))
        assert module.has_uninitialized_params()

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    @pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
    def test_states_load_both_ways(self, name, assign, bias):
        x = torch.randn(X[int(name[-2])])
        for one, other in (self.pair(name, bias=bias), reversed([*self.pair(name, bias=bias)])):
            other.load_state_dict(one.state_dict())
            assert other.has_uninitialized_params()
            wanted = one(x)
            other.load_state_dict(one.state_dict(), assign=assign)
            torch.testing.assert_close(other(x), wanted)

    def test_a_torch_module_becomes_ours(self, name):
        theirs, _ = self.pair(name)
        theirs.__class__ = getattr(tritune.nn, name)
        theirs(torch.randn(X[int(name[-2])]))
        assert type(theirs) is getattr(tritune.nn, name.removeprefix("Lazy"))

    def test_its_errors_are_torchs(self, name):
        wrong = torch.randn(2), torch.randn(1, 2, 3, 4, 5, 6), None
        for made in (call(x) for x in wrong):
            theirs, ours = (outcome(module, made) for module in self.pair(name))
            assert type(ours) is type(theirs) and str(ours) == str(theirs)
        (theirs, ours), x = self.pair(name, groups=3), torch.randn(X[int(name[-2])])
        for module in (theirs, ours):
            with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
                module(x)
        for model in (torch.nn.Sequential(build_lazy(name)), build_lazy(name)):
            with pytest.raises(RuntimeError, match="has uninitialized parameters"):
                torch.jit.script(model)

    def test_it_is_a_leaf_where_torchs_is(self, name):
        theirs, ours = (nodes(module, 1, torch.fx.Tracer) for module in self.pair(name))
        assert ours == theirs and "call_module" in [op for op, *_ in ours]
        model, x = torch.nn.Sequential(build_lazy(name)), torch.randn(X[int(name[-2])])
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), model(x))
        assert type(model[0]) is getattr(tritune.nn, name.removeprefix("Lazy"))

    def test_it_may_have_a_precision_but_no_activation(self, name):
        module = build_lazy(name)
        module.precision = "tf32x3"
        module(torch.randn(X[int(name[-2])]))
        assert module.precision == "tf32x3"
        with pytest.raises(TypeError, match="activation"):
            getattr(tritune.nn, name)(6, 3, activation="relu")


def build_lazy(name):
    return getattr(tritune.nn, name)(6, 3, padding=1)


# --- what convolutions and pools compute -----------------------------------------------------------------------------


class TestValues:
    CONV = (
        {}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 2}, {"padding": "same", "dilation": 2},
        *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
        {"padding": "same", "padding_mode": "circular"},
    )  # fmt: skip
    CONV_TRANSPOSE = (
        {}, {"stride": 2, "padding": 1, "output_padding": 1, "bias": False}, {"groups": 2, "dilation": 2},
    )  # fmt: skip
    MAX_POOL = ({}, {"stride": 2, "padding": 1}, {"ceil_mode": True, "return_indices": True})
    AVG_POOL = ({}, {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False})
    ROWS = (
        *((f"{name}{rank}d", (4, 6, 3), options) for name, table in (("Conv", CONV), ("ConvTranspose", CONV_TRANSPOSE))
          for rank in (1, 2, 3) for options in table),
        *((f"{name}{rank}d", sizes, options)
          for name, sizes, table in (
              ("MaxPool", (3,), MAX_POOL), ("AvgPool", (3,), AVG_POOL), ("LPPool", (2, 3), ({}, {"ceil_mode": True})),
              ("AdaptiveAvgPool", (3,), ({},)), ("AdaptiveMaxPool", (9,), ({}, {"return_indices": True})),
              ("MaxUnpool", (2,), ({}, {"stride": 3}))
          )
          for rank in (1, 2, 3) for options in table),
        ("AvgPool2d", (3,), {"divisor_override": 5}),
        *((f"FractionalMaxPool{rank}d", (2, 3), {"_random_samples": torch.full((2, 4, rank), 0.7), **options})
          for rank in (2, 3) for options in ({}, {"return_indices": True})),
        ("AdaptiveMaxPool3d", ((None, 2, 3),), {}),
    )  # fmt: skip

    @pytest.mark.parametrize("name, sizes, options", ROWS)
    def test_same_as_torch(self, name, sizes, options):
        theirs, ours = (getattr(nn, name)(*sizes, **options) for nn in (torch.nn, tritune.nn))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 4, *(7,) * int(name[-2]), requires_grad=True)
        places = torch.arange(7 ** int(name[-2])).expand(2, 4, -1).view(x.shape) + 1
        wanted, *rest = values(theirs(*(x, places)[: 1 + ("Unpool" in name)]))
        y, *others = values(ours(*(x, places)[: 1 + ("Unpool" in name)]))
        torch.testing.assert_close([y, *others], [wanted, *rest])
        dy = torch.randn_like(y)
        torch.testing.assert_close(*(torch.autograd.grad(one, x, dy) for one in (y, wanted)))
        assert repr(ours) == repr(theirs)

    @pytest.mark.parametrize("activation", [None, "relu"])
    @pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d"])
    def test_fused_options(self, name, activation):
        rank = int(name[-2])
        layer = getattr(tritune.nn, name)(4, 6, 3, activation=activation, precision="ieee")
        x, residual = torch.randn(1, 4, *(5,) * rank), torch.randn(1, 6, *(3,) * rank)
        wanted = getattr(F, name.lower())(x, layer.weight, layer.bias) + residual
        torch.testing.assert_close(layer(x, residual), wanted.relu() if activation else wanted)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_transposed_options(self, rank):
        layer = getattr(tritune.nn, f"ConvTranspose{rank}d")(4, 6, 3, stride=2, activation="relu")
        x, residual = torch.randn(1, 4, *(5,) * rank), torch.randn(1, 6, *(12,) * rank)
        function = getattr(F, f"conv_transpose{rank}d")
        wanted = (function(x, layer.weight, layer.bias, stride=2, output_padding=1) + residual).relu()
        torch.testing.assert_close(layer(x, (12,) * rank, residual), wanted)
        with pytest.raises(ValueError, match="requested an output size"):
            layer(x, (20,) * rank)


def values(result):
    return result if isinstance(result, tuple) else (result,)


# --- options that are ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, option",
    [
        (name, one.name)
        for name in TABLE
        for one in inspect.signature(getattr(tritune.nn, name)).parameters.values()
        if "str" in re.findall(r"\w+", str(one.annotation))
    ],
)
def test_what_is_misspelt_fails_at_construction(name, option):
    args, kwargs = TABLE[name][0]
    with pytest.raises(ValueError, match=r"['\"]\w+['\"]"):
        getattr(tritune.nn, name)(*args, **{**kwargs, option: "rleu"})


@pytest.mark.parametrize("option", ["activation", "precision"])
def test_what_is_accepted_is_listed(option):
    with pytest.raises(
        ValueError, match=f"{option}='rleu' is not accepted: it must be None or one of '(relu|ieee)', '"
    ):
        tritune.nn.Conv2d(4, 6, 3, **{option: "rleu"})


@pytest.mark.parametrize("name", CONVOLUTIONS)
class TestActivation:
    def test_the_constructor_returns_a_class_that_is_not_torchs(self, name):
        x = torch.randn(X[int(name[-2])])
        module = getattr(tritune.nn, name)(4, 6, 3, 2, padding=1, activation="gelu", precision="ieee")
        assert type(module) is activated(name) and not isinstance(module, torch.nn.modules.conv._ConvNd)
        plain = getattr(torch.nn, name)(4, 6, 3, 2, padding=1)
        assert vars(plain).keys() <= vars(module).keys()
        for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                    "transposed", "output_padding", "padding_mode"):  # fmt: skip
            assert getattr(module, key) == getattr(plain, key), key
        wanted = repr(plain).replace(name, activated(name).__name__)
        assert repr(module) == f"{wanted[:-1]}, activation='gelu', precision='ieee')"
        plain.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x), F.gelu(plain(x)))
        torch.manual_seed(3)
        module.reset_parameters()
        torch.manual_seed(3)
        plain.reset_parameters()
        assert torch.equal(module.weight, plain.weight) and torch.equal(module.bias, plain.bias)

    def test_it_is_fixed(self, name):
        for module in (build(name), build(activated(name).__name__)):
            with pytest.raises(AttributeError, match="activation"):
                module.activation = "tanh"

    def test_its_class_needs_one(self, name):
        with pytest.raises(TypeError, match=f"{activated(name).__name__} needs an activation"):
            activated(name)(4, 6, 3)

    def test_a_subclass_has_to_derive_from_the_right_class(self, name):
        sentence = f"^Block computes more than a {name} .*: derive it from tritune.nn.{activated(name).__name__}$"
        with pytest.raises(TypeError, match=sentence):
            type("Block", (getattr(tritune.nn, name),), {})(4, 6, 3, activation="relu")
        block = type("Block", (activated(name),), {})(4, 6, 3, activation="relu")
        assert block(torch.randn(X[int(name[-2])])).min() == 0


# --- tools that fold, prune and parametrize --------------------------------------------------------------------------


def normalisation(rank, features, **options):
    """A batch normalisation in evaluation mode that does something."""
    bn = getattr(torch.nn, f"BatchNorm{rank}d")(features, **options).eval()
    bn.running_mean, bn.running_var = torch.randn(features), torch.rand(features) + 0.1
    if bn.affine:
        torch.nn.init.normal_(bn.weight)
        torch.nn.init.normal_(bn.bias)
    return bn


@pytest.mark.parametrize("name", CONVOLUTIONS)
class TestFusing:
    def test_torchs_tool_fuses_what_is_torchs(self, name):
        rank, transposed = int(name[-2]), "Transpose" in name
        conv, bn, x = getattr(tritune.nn, name)(4, 6, 3).eval(), normalisation(rank, 6), torch.randn(X[rank])
        fused = fusion.fuse_conv_bn_eval(conv, bn, transpose=transposed)
        assert_as_exact(fused(x), torch.nn.Sequential(conv, bn), x)

    def test_torchs_tool_is_stopped_where_an_activation_lies_between(self, name):
        rank = int(name[-2])
        conv = getattr(tritune.nn, name)(4, 6, 3, activation="relu", bias=name != "Conv2d").eval()
        with pytest.raises(TypeError, match=r"would come before the activation: .*\(`del module.weight`\)"):
            fusion.fuse_conv_bn_eval(conv, normalisation(rank, 6), transpose="Transpose" in name)

    def test_eager_fusing_says_that_it_cannot(self, name):
        model = torch.nn.Sequential(getattr(tritune.nn, name)(4, 6, 3), normalisation(int(name[-2]), 6)).eval()
        with pytest.raises((AssertionError, NotImplementedError), match="fuser method"):
            quantization.fuse_modules(model, ["0", "1"])


class TestActivationParameters:
    """``weight`` and ``bias`` of the modules with an activation: all may change their values, nothing swaps them."""

    @pytest.fixture
    def module(self):
        return tritune.nn.Conv2d(4, 6, 3, activation="relu")

    def values(self, module, weight=None):
        """The module computes what its Parameters say."""
        x = torch.randn(X[2], dtype=module.bias.dtype)
        wanted = F.conv2d(x, module.weight if weight is None else weight, module.bias).relu()
        torch.testing.assert_close(module(x), wanted)

    @pytest.mark.parametrize("key", ["weight", "bias"])
    def test_assignment(self, module, key):
        old = getattr(module, key)
        setattr(module, key, old)
        with pytest.raises(TypeError, match=f"^the {key} of ConvActivation2d is not replaced"):
            setattr(module, key, torch.nn.Parameter(old + 1))
        with pytest.raises(TypeError, match=f"^the {key} of ConvActivation2d is not replaced"):
            module.register_parameter(key, torch.nn.Parameter(old + 1))
        assert getattr(module, key) is old
        delattr(module, key)
        setattr(module, key, torch.nn.Parameter(old + 1))
        module.other = torch.nn.Parameter(torch.zeros(1))
        module.other = torch.nn.Parameter(torch.ones(1))
        self.values(module)

    def test_a_failed_load_leaves_it_guarded(self, module):
        state = {"weight": torch.zeros(1), "bias": torch.zeros(6)}
        with pytest.raises(RuntimeError, match="size mismatch"):
            module.load_state_dict(state, assign=True)
        with pytest.raises(TypeError, match="is not replaced"):
            module.weight = torch.nn.Parameter(module.weight + 1)

    def test_a_load_inside_a_load(self, module):
        state = {key: one.clone() for key, one in module.state_dict().items()}
        hook = module.register_load_state_dict_pre_hook(
            lambda *_: [hook.remove(), module.load_state_dict(state, assign=True)]
        )
        module.load_state_dict(state, assign=True)
        with pytest.raises(TypeError, match="is not replaced"):
            module.weight = torch.nn.Parameter(module.weight + 1)
        self.values(module)

    def test_moving(self, module):
        self.values(module.double().to(memory_format=torch.channels_last))
        state = module.state_dict()
        module.to("meta").to_empty(device="cpu").load_state_dict(state)
        self.values(module)
        module.to("meta").weight = torch.nn.Parameter(state["weight"])

    @pytest.mark.parametrize("name", ["overwrite_module_params_on_conversion", "swap_module_params_on_conversion"])
    def test_the_other_ways_that_torch_moves_and_loads(self, module, name):
        getattr(torch.__future__, f"set_{name}")(True)
        try:
            module.double().load_state_dict({key: one.clone() for key, one in module.state_dict().items()})
        finally:
            getattr(torch.__future__, f"set_{name}")(False)
        self.values(module)

    def test_a_tensor_of_another_kind(self, module):
        class Distributed(torch.Tensor):
            pass

        module.weight = torch.nn.Parameter(torch.zeros(6, 4, 3, 3).as_subclass(Distributed))
        assert type(module.weight) is Distributed

    def test_functional_call_and_what_sharding_does(self, module):
        x, doubled = torch.randn(X[2]), {key: 2 * one for key, one in module.named_parameters()}
        wanted = F.conv2d(x, doubled["weight"], doubled["bias"]).relu()
        torch.testing.assert_close(torch.func.functional_call(module, doubled, x), wanted)
        module._parameters["weight"] = torch.nn.Parameter(doubled["weight"])
        self.values(module)

    @pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
    def test_parametrizations(self, module, wrap):
        wrap(module.eval())
        self.values(module)
        parametrize.remove_parametrizations(module, "weight")
        assert type(module) is tritune.nn.ConvActivation2d
        self.values(module)

    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    def test_hooks_that_compute_the_weight(self, module):
        torch.nn.utils.weight_norm(module)
        self.values(module)
        torch.nn.utils.remove_weight_norm(module)
        prune.l1_unstructured(module, "weight", 0.5)
        self.values(module)
        prune.remove(module, "weight")
        assert (module.weight == 0).float().mean() == 0.5
        self.values(module)


@pytest.mark.parametrize("kinds", [("Conv2d",), ("ConvActivation2d",), ("Conv2d", "MaxPool2d"), ("ConvTranspose2d",)])
def test_fx_fuses_right_or_not_at_all(kinds):
    from torch.fx.experimental import optimization  # warns when it is imported

    layers = [build(kinds[0]), normalisation(2, 6), torch.nn.ReLU(), *map(build, kinds[1:])]
    model, x = torch.nn.Sequential(*layers).eval(), torch.randn(X[2])
    assert_as_exact(optimization.fuse(model)(x), model, x)


# --- fold_bn ---------------------------------------------------------------------------------------------------------


class TestFoldBn:
    @pytest.mark.parametrize("activation", [None, "silu"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_no_less_exact_than_both_in_turn(self, name, dtype, activation):
        rank = int(name[-2])
        layers = torch.nn.Sequential(
            getattr(torch.nn, name)(4, 6, 3, stride=2, padding=1, groups=2), normalisation(rank, 6),
            *([torch.nn.SiLU()] if activation else []),
        ).to(dtype)  # fmt: skip
        folded, x = tritune.fold_bn(*layers[:2], activation=activation), torch.randn(X[rank], dtype=dtype)
        assert_close(name, folded(x), copy.deepcopy(layers).double()(x.double()), layers(x))

    @pytest.mark.parametrize("options", [{"affine": True}, {"affine": False}], ids=["affine", "plain"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    @pytest.mark.parametrize("nn", [torch.nn, tritune.nn], ids=["torch", "tritune"])
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_the_result_is_a_module_as_any(self, nn, name, bias, options):
        rank = int(name[-2])
        conv = getattr(nn, name)(4, 6, 3, stride=2, padding=1, groups=2, bias=bias)
        bn, x = normalisation(rank, 6, **options), torch.randn(X[rank])
        before = copy.deepcopy(conv.state_dict())
        folded = tritune.fold_bn(conv, bn)
        assert_as_exact(folded(x), torch.nn.Sequential(conv, bn), x)
        assert type(folded) is getattr(tritune.nn, name) and not folded.training
        torch.testing.assert_close(conv.state_dict(), before)
        theirs = getattr(torch.nn, name)(4, 6, 3, stride=2, padding=1, groups=2)
        theirs.load_state_dict(folded.state_dict())
        torch.testing.assert_close(theirs(x), folded(x))
        folded = tritune.fold_bn(conv, bn, activation="relu")
        assert type(folded) is activated(name) and list(folded.state_dict()) == ["weight", "bias"]
        assert_as_exact(through_a_file(folded)(x), torch.nn.Sequential(conv, bn, torch.nn.ReLU()), x)

    def test_sync_batch_norm_and_gradients_that_are_off(self):
        conv, bn, x = torch.nn.Conv2d(4, 6, 3), normalisation(2, 6), torch.randn(X[2])
        synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(bn)
        folded = tritune.fold_bn(conv.requires_grad_(False), synced)
        assert_as_exact(folded(x), torch.nn.Sequential(conv, bn), x)
        assert not any(one.requires_grad for one in folded.parameters())

    @pytest.mark.parametrize("wrap", [
        parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
    ])  # fmt: skip
    def test_parametrized_weights_are_taken_as_they_are(self, wrap):
        conv, bn, x = wrap(torch.nn.Conv2d(4, 6, 3)).eval(), normalisation(2, 6), torch.randn(X[2])
        folded = tritune.fold_bn(conv, bn)
        assert_as_exact(folded(x), torch.nn.Sequential(conv, bn), x)
        assert list(through_pickle(folded).state_dict()) == ["weight", "bias"]

    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    @pytest.mark.parametrize("wrap", [
        torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm,
        lambda conv: prune.random_unstructured(conv, "weight", 0.5),
        lambda conv: prune.random_unstructured(conv, "bias", 0.5),
    ])  # fmt: skip
    @pytest.mark.parametrize("namespace", [torch.nn, tritune.nn])
    def test_a_weight_that_a_hook_computes_may_be_out_of_date(self, wrap, namespace):
        conv = wrap(namespace.Conv2d(4, 6, 3)).eval()
        with pytest.raises(TypeError, match=r"a hook computes the (weight|bias) of conv"):
            tritune.fold_bn(conv, normalisation(2, 6))

    @pytest.mark.parametrize("method", ["forward", "_conv_forward"])
    def test_a_computation_of_the_one_module_is_not_dropped(self, method):
        for parent in (torch.nn.Conv2d, tritune.nn.Conv2d):
            conv = parent(4, 6, 3)
            setattr(conv, method, lambda input, *_: input)
            with pytest.raises(TypeError, match="conv must be a convolution"):
                tritune.fold_bn(conv, normalisation(2, 6))
        bn = normalisation(2, 6)
        bn.forward = lambda input: input + 1
        with pytest.raises(TypeError, match="bn must be a batch normalisation"):
            tritune.fold_bn(torch.nn.Conv2d(4, 6, 3), bn)

    @pytest.mark.parametrize("on", ["subclass", "instance"])
    @pytest.mark.parametrize("nn", [torch.nn, tritune.nn], ids=["torch", "tritune"])
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_no_method_that_torchs_forward_calls_is_dropped(self, name, nn, on):
        for helper in HELPERS[name]:
            kind = getattr(nn, name)
            method = getattr(kind, helper)
            child = type("Other", (kind,), {helper: functools.partialmethod(method)})
            conv = (child if on == "subclass" else kind)(4, 6, 3)
            if on == "instance":
                setattr(conv, helper, functools.partial(method, conv))
            with pytest.raises(TypeError, match="conv must be a convolution"):
                tritune.fold_bn(conv, normalisation(int(name[-2]), 6))

    @pytest.mark.parametrize("method", ["forward", "_conv_forward"])
    def test_a_computation_of_its_own_is_not_dropped(self, method):
        def standardised(self, input, *_):
            return F.conv2d(input, self.weight / self.weight.std(), self.bias)

        for parent in (torch.nn.Conv2d, tritune.nn.Conv2d):
            conv = type("Standardised", (parent,), {method: standardised})(4, 6, 3)
            with pytest.raises(TypeError, match=r"conv must be a convolution .* not Standardised"):
                tritune.fold_bn(conv, normalisation(2, 6))
        bn = type("Shifted", (torch.nn.BatchNorm2d,), {"forward": lambda self, input: input + 1})(6).eval()
        with pytest.raises(TypeError, match=r"bn must be a batch normalisation .* not Shifted"):
            tritune.fold_bn(torch.nn.Conv2d(4, 6, 3), bn)

    def test_padding_mode_and_precision_are_kept(self):
        conv, bn = (
            tritune.nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", precision="tf32x3"),
            normalisation(2, 6),
        )
        x, folded = torch.randn(X[2]), tritune.fold_bn(conv, bn)
        assert_as_exact(folded(x), torch.nn.Sequential(conv, bn), x)
        assert folded.precision == "tf32x3"

    @pytest.mark.parametrize(
        "conv, bn, error, text",
        [
            (torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6).eval(), TypeError, "conv must be a convolution"),
            (torch.nn.Conv2d(4, 6, 3), torch.nn.GroupNorm(2, 6), TypeError, "bn must be a batch normalisation"),
            (torch.nn.Conv2d(4, 6, 3), torch.nn.InstanceNorm2d(6).eval(), TypeError, "bn must be a batch normal"),
            (torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(4).eval(), ValueError, "4 features and conv 6"),
            (torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6), ValueError, "bn is in training mode"),
            (torch.nn.Conv2d(4, 6, 3), torch.nn.SyncBatchNorm(6), ValueError, "bn is in training mode"),
            (torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6, track_running_stats=False).eval(), ValueError,
             "statistics"),
            (tritune.nn.Conv2d(4, 6, 3, activation="relu"), torch.nn.BatchNorm2d(6).eval(), TypeError,
             "without an activation, not ConvActivation2d"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_rejected(self, conv, bn, error, text):
        with pytest.raises(error, match=text):
            tritune.fold_bn(conv, bn)

    def test_a_misspelt_activation_is_rejected(self):
        with pytest.raises(ValueError, match="activation='rleu' is not accepted"):
            tritune.fold_bn(torch.nn.Conv2d(4, 6, 3), normalisation(2, 6), activation="rleu")


# --- TorchScript and quantisation ------------------------------------------------------------------------------------


class Calls(torch.nn.Module):
    """A model of one layer: torch's recurrent modules have no ``forward`` when they are scripted alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input: torch.Tensor):
        return self.layer(input)


class CallsOfItself(Calls):
    """Attention of a sequence to itself."""

    def forward(self, input: torch.Tensor):
        return self.layer(input, input, input)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TABLE)
def test_scripting_works_or_says_what_to_use(name):
    layer, x = build(name), inputs(name)
    if name in OUR_OWN or "Unpool" in name:  # TorchScript cannot compile torch's own unpooling either
        for model in (layer, Calls(layer)):
            with pytest.raises(NotImplementedError, match=f"^torch.jit.script cannot compile {name}: use torch.export"):
                torch.jit.script(model)
        with torch.no_grad():  # what the sentence says to use
            for other in (torch.jit.trace(layer, tuple(x)), torch.export.export(layer, tuple(x)).module()):
                torch.testing.assert_close(other(*x), layer(*x))
        return
    torch.jit.script(layer)
    model, x = (CallsOfItself if name == "MultiheadAttention" else Calls)(layer), x[:1]
    wanted, file = model(*x), io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    for computes in (torch.jit.load(file), model):
        torch.testing.assert_close(computes(*x), wanted)
    assert type(layer) is getattr(tritune.nn, name)
    assert all(a is b for a, b in zip(model.parameters(), layer.parameters(), strict=True))


def test_scripting_keeps_what_a_subclass_computes():
    class Doubled(tritune.nn.MaxPool2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * input

    class Named(tritune.nn.MaxPool2d):
        pass

    assert torch.jit.script(Doubled(2))(torch.ones(1)) == 2
    with pytest.raises(NotImplementedError, match="cannot compile Named"):
        torch.jit.script(Named(2))


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *UNTRACEABLE])
def test_quantisation_that_passes_a_module_over_says_so(name):
    module = build(name)
    sentence = rf"passes over tritune's {name}: set `module.__class__ = torch.nn.{name}` before"
    with pytest.warns(UserWarning, match=sentence):
        module.qconfig = quantization.default_qconfig
    for copied in (module, copy.deepcopy(module), through_pickle(module)):
        copied(*inputs(name))
        assert type(copied.qconfig) is quantization.QConfig
        del copied.qconfig
        assert not hasattr(copied, "qconfig")
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'qconfig'"):
        _ = module.qconfig


def test_quantisation_of_a_module_with_an_activation_says_what_to_use():
    with pytest.warns(UserWarning, match="tritune's ConvActivation2d: build it from modules of torch.nn"):
        quantization.propagate_qconfig_(
            torch.nn.Sequential(build("ConvActivation2d")), {"": quantization.default_qconfig}
        )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_dynamic_quantisation(name):
    model = torch.nn.ModuleDict({"one": build(name)}).eval()
    with pytest.warns(UserWarning, match=f"passes over tritune's {name}"):
        assert type(quantization.quantize_dynamic(model).one) is getattr(tritune.nn, name)
    model.one.__class__ = getattr(torch.nn, name)
    assert type(quantization.quantize_dynamic(model).one) is getattr(torch.ao.nn.quantized.dynamic, name)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_left_out_on_purpose_gets_no_warning():
    model = torch.nn.Sequential(build("Conv2d"), build("MaxPool2d"), build("ConvActivation2d"), torch.nn.Linear(1, 1))
    model[0].qconfig = None
    model[1].qconfig = quantization.default_qconfig  # a pool computes on quantised tensors as they are
    quantization.quantize_dynamic(model, {torch.nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ["MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"])
def test_pools_compute_on_quantised_tensors(name):
    layers = quantization.QuantStub(), torch.nn.Conv2d(4, 6, 3), build(name), quantization.DeQuantStub()
    model, x = torch.nn.Sequential(*layers).eval(), torch.randn(X[2])
    wanted = model(x)
    model.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(model)
    prepared(x)
    got = quantization.convert(prepared)(x)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:Please use quant_min", "ignore:torch.quantize_per_tensor", "ignore:must run obs")
@pytest.mark.parametrize("names", [("Conv2d", "MaxPool2d"), ("ConvActivation2d",), ("ConvTranspose2d", "AvgPool2d")])
def test_fx_quantisation_gives_right_values(names):
    model, x = torch.nn.Sequential(*map(build, names), torch.nn.ReLU()).eval(), torch.randn(X[2])
    mapping = quantization.get_default_qconfig_mapping()
    with pytest.warns(UserWarning, match="passes over tritune's") if "Activation" not in names[0] else nullcontext():
        prepared = prepare_fx(model, mapping, (x,))
    torch.testing.assert_close(prepared(x), model(x))
    quantised = convert_fx(prepared)(x)
    assert (quantised - model(x)).abs().max() < 0.05 * model(x).abs().max()
