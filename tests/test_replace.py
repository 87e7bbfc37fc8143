"""``replace`` and ``restore`` on small models of the usual kinds: what stays, what changes, and what is undone."""

import copy
import inspect
import io
import json
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize, prune

import tritune
from tritune import replacement

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:(.torch.jit.|torch.ao.quantization is deprecated):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
]
torch_tier = pytest.mark.torch


class ResidualBlock(nn.Module):
    """As in ResNet: one ReLU, called twice."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.Sequential(ResidualBlock(8), ResidualBlock(8))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.pool(self.layers(self.stem(x))).flatten(1))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.act, self.project = (
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.project(self.act(self.expand(y)))).permute(0, 3, 1, 2)


def mobile_block(channels, wide):
    """Inverted residual, without the sum."""

    def unit(before, after, size, groups=1):
        return [nn.Conv2d(before, after, size, padding=size // 2, groups=groups, bias=False), nn.BatchNorm2d(after)]

    return nn.Sequential(
        nn.Sequential(*unit(channels, wide, 1), nn.ReLU6(inplace=True)),
        nn.Sequential(*unit(wide, wide, 3, wide), nn.ReLU6(inplace=True)),
        *unit(wide, channels, 1),
    )


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(20, 6), nn.LSTM(6, 7, batch_first=True), nn.Linear(7, 4)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv1d(3, 6, 3, padding=1), nn.MaxPool1d(2, return_indices=True)
        self.unpool, self.deconv = nn.MaxUnpool1d(2), nn.ConvTranspose1d(6, 3, 3, padding=1)

    def forward(self, x):
        return self.deconv(self.unpool(*self.pool(F.silu(self.conv(x)))))


class Reader(nn.Module):
    """Convolution, pooling and recurrence in one model."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
        self.lstm, self.head = nn.LSTM(16, 6), nn.Linear(6, 5)

    def forward(self, x):
        rows = self.pool(self.act(self.conv(x))).permute(2, 0, 1, 3).flatten(2)
        return self.head(self.lstm(rows)[0][-1])


IMAGE = (2, 8, 10, 10)
MODELS = {
    "resnet": (ResNet, lambda: torch.randn(2, 3, 12, 12)),
    "convnext": (lambda: nn.Sequential(ConvNeXtBlock(8), nn.AdaptiveAvgPool2d(2)), lambda: torch.randn(IMAGE)),
    "mobilenet": (lambda: mobile_block(8, 16), lambda: torch.randn(IMAGE)),
    "tagger": (Tagger, lambda: torch.randint(0, 20, (3, 5))),
    "autoencoder": (Autoencoder, lambda: torch.randn(2, 3, 8)),
    "reader": (Reader, lambda: torch.randn(3, 1, 8, 8)),
    "a convolution": (lambda: nn.Conv2d(8, 4, 3), lambda: torch.randn(IMAGE)),
}
REPLACED = {"resnet": 7, "convnext": 2, "mobilenet": 3, "tagger": 1, "autoencoder": 4, "reader": 3, "a convolution": 1}
OURS = {kind: getattr(tritune.nn, kind.__name__) for kind in replacement._OURS}


def build(name):
    """The model, whose batch normalisations do something, and its input."""
    make, tensors = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = (
                torch.randn(len(module.weight)),
                torch.rand(len(module.weight)) + 0.1,
            )
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model, tensors()


def snapshot(model):
    """Everything that a module holds, by identity, and its class."""
    return {
        name: (
            replacement._kind(module),
            {key: id(one) for key, one in vars(module).items() if key != replacement._BEFORE},
            *({key: id(one) for key, one in getattr(module, kind).items()}
              for kind in ("_parameters", "_buffers", "_modules", "_state_dict_hooks", *replacement._HOOKS)),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }  # fmt: skip


def equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def within_verdict(model, changed, x):
    """``changed`` is as near to the model in float64 as the model is."""
    exact = copy.deepcopy(tritune.restore(copy.deepcopy(model))).double()
    wide = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        assert_close("output", changed(x), exact(wide), model(x))


def reasons(report):
    return {row.name: row.reason for row in report.rows}


def became(report):
    return {row.name: row.became for row in report.rows}


# --- what stays the same ---------------------------------------------------------------------------------------------


@torch_tier
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_but_the_classes_stays(name, training):
    model, x = build(name)
    model.train(training)
    before, state, modules = snapshot(model), copy.deepcopy(model.state_dict()), list(model.modules())
    wanted = copy.deepcopy(model)(x)
    text = repr(model)
    returned, report = tritune.replace(model)
    assert returned is model and all(map(lambda a, b: a is b, model.modules(), modules))
    assert sum(row.became is not None for row in report.rows) == REPLACED[name]
    assert all(type(module) not in OURS for module in modules) and repr(model) == text
    for key, (kind, *rest) in snapshot(model).items():
        assert kind is OURS.get(before[key][0], before[key][0])
        assert rest == list(before[key][1:]), key
    equal(dict(model.state_dict()), dict(state))
    equal(copy.deepcopy(model)(x), wanted)
    assert tritune.restore(model) is model
    assert snapshot(model) == before and not any(replacement._BEFORE in vars(module) for module in modules)
    equal(dict(model.state_dict()), dict(state))
    equal(model(x), wanted)


@torch_tier
def test_each_class_of_the_families_is_replaced():
    assert len(OURS) >= 27
    for kind, ours in OURS.items():
        needed = [one for one in inspect.signature(ours).parameters.values() if one.default is one.empty]
        module = kind(*[2] * len(needed), **({"output_size": 2} if "Fractional" in kind.__name__ else {}))
        _, report = tritune.replace(module)
        assert type(module) is ours and became(report) == {"": f"tritune.nn.{kind.__name__}"}
        assert type(tritune.restore(module)) is kind


@torch_tier
@pytest.mark.parametrize("name", ["resnet", "tagger", "reader"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_twenty_steps_of_training_are_the_same_bits(name, when):
    """The optimizer was made before, and holds the same Parameters."""

    def train(model, x, change):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for step in range(20):
            if step == (0 if when == "before" else 10):
                change(model)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return dict(model.state_dict())

    model, x = build(name)
    other = copy.deepcopy(model)
    start = copy.deepcopy(dict(model.state_dict()))
    wanted, got = train(model, x, lambda model: None), train(other, x, tritune.replace)
    equal(got, wanted)
    assert any(not torch.equal(start[key], wanted[key]) for key in start)


@torch_tier
def test_hooks_of_all_kinds_are_called():
    model, calls = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), []
    for module in model:
        module.register_forward_pre_hook(lambda *_: calls.append("forward pre"))
        module.register_forward_hook(lambda *_: calls.append("forward"))
        module.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
        module.register_full_backward_hook(lambda *_: calls.append("backward"))
        module.register_state_dict_pre_hook(lambda *_: calls.append("state pre"))
        module.register_state_dict_post_hook(lambda *_: calls.append("state"))
        module.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
        module.register_load_state_dict_post_hook(lambda *_: calls.append("load"))

    def use():
        calls.clear()
        model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(calls)

    wanted = use()
    tritune.replace(model)
    assert use() == wanted and len(set(wanted)) == 8
    tritune.restore(model)
    assert use() == wanted


@torch_tier
def test_shared_modules_are_replaced_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"one": nn.Sequential(conv, conv), "list": nn.ModuleList([conv])})
    _, report = tritune.replace(model)
    assert became(report) == {"one.0": "tritune.nn.Conv2d"}
    assert model["one"][0] is model["one"][1] is model["list"][0] is conv and type(conv) is tritune.nn.Conv2d


def pruned(module, name):
    prune.random_unstructured(module, name, 0.5)


@torch_tier
@pytest.mark.parametrize("name", ["conv", "lstm"])
@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
             nn.utils.weight_norm, nn.utils.spectral_norm, pruned],
    ids=["weight norm", "spectral norm", "orthogonal", "old weight norm", "old spectral norm", "pruned"],
)  # fmt: skip
def test_what_computes_the_weight_goes_on(name, wrap):
    """The same is done to a model that is replaced and restored, and to one that is not."""
    make, weight, x = {
        "conv": (lambda: nn.Conv2d(3, 4, 3), "weight", torch.randn(2, 3, 8, 8)),
        "lstm": (lambda: nn.LSTM(3, 4), "weight_hh_l0", torch.randn(5, 2, 3)),
    }[name]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        module = make()
        wrap(module, weight)
        models.append(nn.Sequential(module))
    model, other = models
    module, kind = model[0], replacement._kind(other[0])
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())

    def train():
        for one in models:
            outputs(one, x).square().sum().backward()
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter -= 0.1 * parameter.grad
        equal(outputs(model, x), outputs(other, x))
        equal(dict(model.state_dict()), dict(other.state_dict()))

    tritune.replace(model)
    assert replacement._kind(module) is OURS[kind] and isinstance(module, OURS[kind])
    assert parametrize.is_parametrized(module) == parametrize.is_parametrized(other[0])
    train()
    assert list(model.state_dict()) == keys
    assert all(one is parameters[key] for key, one in model.named_parameters())
    tritune.restore(model)
    assert replacement._kind(module) is kind
    train()
    if parametrize.is_parametrized(module):
        parametrize.remove_parametrizations(module, weight)
        assert type(module) is kind


def outputs(model, x):
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


@torch_tier
def test_parametrizations_may_come_and_go_in_between():
    module, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)
    tritune.replace(parametrizations.weight_norm(module))
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is tritune.nn.Conv2d
    parametrizations.weight_norm(module)
    wanted = module(x)
    tritune.restore(module)
    assert type(module).__bases__ == (nn.Conv2d,) and parametrize.is_parametrized(module, "weight")
    equal(module(x), wanted)


@torch_tier
@pytest.mark.parametrize("options", [{}, {"fold": True, "fuse": True}], ids=["", "folded"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "reader"])
def test_copies_are_replaced_and_can_be_restored(name, how, options):
    model, x = build(name)
    wanted, state = model.eval()(x), copy.deepcopy(dict(model.state_dict()))
    kinds = list(map(type, model.modules()))
    tritune.replace(model, **options)
    replaced = model(x)
    if how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert list(map(type, copied.modules())) == list(map(type, model.modules())) != kinds
    equal(copied(x), replaced)
    tritune.restore(copied)
    assert list(map(type, copied.modules())) == kinds
    equal(dict(copied.state_dict()), state)
    equal(copied(x), wanted)
    equal(model(x), replaced)  # the copy shares nothing with it


@torch_tier
def test_state_is_exchanged_with_a_model_that_was_not_replaced():
    (model, x), (other, _) = build("resnet"), build("resnet")
    tritune.replace(model)
    model.load_state_dict(other.state_dict())
    equal(model.eval()(x), other.eval()(x))
    other.load_state_dict(model.double().state_dict(), assign=True)
    equal(model(x.double()), other(x.double()))


# --- what is chosen --------------------------------------------------------------------------------------------------


@torch_tier
@pytest.mark.parametrize("options", [{}, {"fold": True, "fuse": True}, {"only": "stem.*"}])
def test_a_dry_run_says_the_same_and_changes_nothing(options):
    model, x = build("resnet")
    before, wanted, random = snapshot(model.eval()), model(x), torch.get_rng_state()
    returned, would = tritune.replace(model, dry_run=True, **options)
    assert returned is model and snapshot(model) == before and torch.equal(torch.get_rng_state(), random)
    equal(model(x), wanted)
    _, report = tritune.replace(model, **options)
    assert would.dry_run and not report.dry_run and would.rows == report.rows


@torch_tier
def test_twice_is_once():
    model, _ = build("resnet")
    kinds = list(map(type, model.modules()))
    _, first = tritune.replace(model)
    replaced = list(map(type, model.modules()))
    _, second = tritune.replace(model)
    assert list(map(type, model.modules())) == replaced
    assert [row.name for row in second.rows] == [row.name for row in first.rows]
    assert {(row.became, row.reason) for row in second.rows} == {(None, "it is tritune's already")}
    tritune.restore(tritune.restore(model))
    assert list(map(type, model.modules())) == kinds


@torch_tier
def test_what_was_built_as_ours_stays_when_the_rest_is_restored():
    model = nn.Sequential(tritune.nn.Conv2d(3, 4, 3, precision="tf32"), nn.Conv2d(4, 4, 3), nn.ReLU())
    tritune.replace(model, fuse=True)
    assert type(model[1]) is tritune.nn.ConvActivation2d
    tritune.restore(model)
    assert list(map(type, model)) == [tritune.nn.Conv2d, nn.Conv2d, nn.ReLU] and model[0].precision == "tf32"


CHOICES = {
    "a class": (nn.MaxPool2d, {"stem.3"}),
    "a name": ("pool", {"pool"}),
    "a pattern": ("layers.*", {f"layers.{block}.conv{number}" for block in (0, 1) for number in (1, 2)}),
    "a function": (lambda name, module: name.endswith("conv1"), {"layers.0.conv1", "layers.1.conv1"}),
    "several": ([nn.AdaptiveAvgPool2d, "stem.0", lambda name, module: False], {"pool", "stem.0"}),
    "none": ([], set()),
    "a generator": ((one for one in ["stem.?"]), {"stem.0", "stem.3"}),
}


@torch_tier
@pytest.mark.parametrize("choice", CHOICES)
def test_only(choice):
    only, names = CHOICES[choice]
    model, _ = build("resnet")
    _, report = tritune.replace(model, only=only)
    assert {name for name, became in became(report).items() if became} == names
    assert {row.reason for row in report.rows if row.became is None} <= {"only leaves it out"}
    assert {name for name, module in model.named_modules() if type(module) in OURS.values()} == names


@torch_tier
@pytest.mark.parametrize(
    "only, error, text",
    [
        (nn.Linear, ValueError, "only has the class torch.nn.Linear, which is not replaced; these are: Adaptive"),
        (
            "stem",
            ValueError,
            "only has 'stem', which is the name of no module .*; 'stem[.][*]' is for all modules in it",
        ),
        (
            ["pool", "pol"],
            ValueError,
            "only has 'pol', which is the name of no module that could be replaced; model.named",
        ),
        (5, TypeError, "only must be a class of torch.nn, a pattern for .*, or several of these, not int$"),
        ([5], TypeError, "or several of these, not int"),
        ([nn.MaxPool2d(2)], TypeError, "or several of these, not MaxPool2d"),
    ],
)
def test_what_only_does_not_understand(only, error, text):
    model, _ = build("resnet")
    before = snapshot(model)
    with pytest.raises(error, match=f"^replace: .*{text}"):
        tritune.replace(model, only=only)
    assert snapshot(model) == before


@torch_tier
@pytest.mark.parametrize("function", [tritune.replace, tritune.restore])
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match=f"^{function.__name__}: model must be a torch.nn.Module, not str$"):
        function("resnet50")


# --- what stays ------------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def with_a_forward_of_its_own():
    module = nn.Conv2d(3, 3, 3)
    module.forward = lambda x: x
    return module


def prepared():
    module = nn.Conv2d(3, 4, 3)
    module.qconfig = quantization.default_qconfig
    return module


STAYS = {
    "subclass": (lambda: Standardised(3, 4, 3), "subclass of torch.nn.Conv2d, which may compute something else"),
    "parametrized subclass": (
        lambda: parametrizations.weight_norm(Standardised(3, 4, 3)),
        "subclass of torch.nn.Conv2d",
    ),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "it is lazy: call the model once first"),
    "own forward": (with_a_forward_of_its_own, "its forward was set on the instance"),
    "prepared": (prepared, "it is prepared for quantisation"),
    "scripted": (lambda: torch.jit.script(nn.Conv2d(3, 4, 3)), "compiled by TorchScript: replace before"),
    "cell": (lambda: nn.LSTMCell(3, 4), "tritune.nn has no LSTMCell"),
    "ours": (lambda: tritune.nn.LSTM(3, 4), "it is tritune's already"),
}


@torch_tier
@pytest.mark.parametrize("name", STAYS)
def test_what_stays_says_why(name):
    make, text = STAYS[name]
    model = nn.Sequential(make(), nn.Linear(2, 2))
    kind = type(model[0])
    _, report = tritune.replace(model)
    assert type(model[0]) is kind
    (row,) = report.rows  # no Linear
    assert row.name == "0" and row.became is None and text in row.reason


@torch_tier
def test_a_lazy_module_is_replaced_after_its_first_call():
    model, x = nn.Sequential(nn.LazyConv2d(4, 3)), torch.randn(1, 3, 8, 8)
    model(x)
    tritune.replace(model)
    assert type(model[0]) is tritune.nn.Conv2d


@torch_tier
def test_the_report():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Standardised(4, 4, 3))
    report = tritune.replace(model)[1]
    lines = str(report).splitlines()
    assert lines[0] == "1 of 2 modules were replaced" and lines[1].split() == ["module", "was", "became", "reason"]
    assert lines[2].split() == ["0", "torch.nn.Conv2d", "tritune.nn.Conv2d"]
    assert lines[3].startswith("2 ") and "test_replace.Standardised" in lines[3] and "  stays  " in lines[3]
    document = json.loads(report.to_json())
    assert document == report.as_dict() and document["dry_run"] is False
    assert document["modules"][0] == {
        "name": "0", "was": "torch.nn.Conv2d", "became": "tritune.nn.Conv2d", "reason": None
    }  # fmt: skip
    assert str(tritune.replace(nn.ReLU())[1]) == "0 of 0 modules were replaced"
    assert "(the model)" in str(tritune.replace(nn.Conv2d(3, 4, 3), dry_run=True)[1])


@torch_tier
def test_the_report_is_a_table_of_rich():
    rich = pytest.importorskip("rich.console")
    model = nn.ModuleDict({"[red]": nn.Conv2d(3, 4, 3)})
    console = rich.Console(width=100, file=io.StringIO())
    console.print(tritune.replace(model)[1])
    text = console.file.getvalue()
    assert "1 of 1 modules were replaced" in text and "[red]" in text and "tritune.nn.Conv2d" in text


# --- in torch's tools ------------------------------------------------------------------------------------------------


@torch_tier
def test_a_compiled_model():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    wanted = compiled(x)
    _, report = tritune.replace(compiled)
    assert type(model[0]) is tritune.nn.Conv2d and list(became(report)) == ["_orig_mod.0", "_orig_mod.2"]
    equal(compiled(x), wanted)
    equal(torch.compile(model, fullgraph=True, backend="eager")(x), wanted)
    with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError):
        model(x)
    _, report = tritune.replace(compiled, fold=True)
    assert "replace before torch._dynamo.eval_frame.OptimizedModule wraps the model" in reasons(report)["_orig_mod.1"]
    tritune.restore(compiled)
    equal(compiled(x), wanted)


@torch_tier
@pytest.mark.parametrize("options", [{}, {"fold": True, "fuse": True}], ids=["", "folded"])
@pytest.mark.parametrize("name", ["mobilenet", "reader"])
def test_a_model_is_compiled_as_one_graph_afterwards(name, options):
    model, x = build(name)
    model.eval()
    tritune.replace(model, **options)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@torch_tier
def test_a_recurrence_can_be_compiled_only_afterwards():
    model, x = build("tagger")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="eager")(x)
    wanted = model(x)
    tritune.replace(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), wanted)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@torch_tier
@pytest.mark.parametrize("when", ["before", "after"])
def test_data_parallel(one_process, when):
    model, x = build("resnet")
    other = copy.deepcopy(model)
    wanted = other(x)
    wanted.sum().backward()
    if when == "before":
        tritune.replace(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if when == "after":
        _, report = tritune.replace(wrapped)
        assert all(row.name.startswith("module.") and row.became for row in report.rows)
    got = wrapped(x)
    got.sum().backward()
    equal(got, wanted)
    equal([one.grad for one in model.parameters()], [one.grad for one in other.parameters()])
    _, report = tritune.replace(wrapped.eval(), fold=True)
    assert (
        "replace before torch.nn.parallel.distributed.DistributedDataParallel wraps" in reasons(report)["module.stem.1"]
    )


@torch_tier
def test_fully_sharded(one_process):
    from torch.distributed.fsdp import fully_shard

    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), torch.randn(2, 3, 8, 8)
    wanted = model(x)
    fully_shard(model[0], mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    _, report = tritune.replace(model)
    assert "subclass of torch.nn.Conv2d" in reasons(report)["0"] and type(model[1]) is tritune.nn.Conv2d
    equal(model(x), wanted)


@torch_tier
def test_a_graph_module():
    traced, x = torch.fx.symbolic_trace(build("mobilenet")[0].eval()), torch.randn(IMAGE)
    wanted = traced(x)
    original = copy.deepcopy(traced)
    tritune.replace(traced)
    equal(traced(x), wanted)
    _, report = tritune.replace(traced, fold=True, fuse=True)
    assert became(report)["0.0"] == "tritune.nn.ConvActivation2d"
    within_verdict(original, traced, x)
    tritune.restore(traced)
    equal(traced(x), wanted)


@torch_tier
def test_scripted_afterwards():
    model, x = build("autoencoder")
    model = nn.Sequential(model.conv, nn.MaxPool1d(2))
    wanted = model(x)
    tritune.replace(model)
    equal(torch.jit.script(model)(x), wanted)
    equal(torch.jit.trace(model, x)(x), wanted)


@torch_tier
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:must run observer")
def test_quantisation_finds_what_was_prepared():
    model = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(8, 4, 3), nn.MaxPool2d(2), quantization.DeQuantStub()
    ).eval()
    x = torch.randn(IMAGE)
    wanted = model(x)
    model.qconfig = quantization.default_qconfig
    model = quantization.prepare(model)
    _, report = tritune.replace(model)
    assert became(report) == {"1": None, "2": "tritune.nn.MaxPool2d"}
    model(x)
    got = quantization.convert(model)(x)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


# --- folding ---------------------------------------------------------------------------------------------------------


@torch_tier
def test_folding_needs_evaluation_mode():
    model, _ = build("resnet")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^replace: fold=True needs a model in evaluation mode.*call model.eval\(\)"):
        tritune.replace(model, fold=True)
    assert snapshot(model) == before


@torch_tier
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_folded_models_are_as_exact(name, fuse):
    model, x = build(name)
    original, before = copy.deepcopy(model.eval()), snapshot(model)
    norms = [key for key, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    _, report = tritune.replace(model, fold=True, fuse=fuse)
    assert {became(report)[key] for key in norms} == {"torch.nn.Identity"}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any("running" in key for key in model.state_dict())
    within_verdict(original, model, x)
    tritune.restore(model)
    assert snapshot(model) == before
    equal(model(x), original(x))


def sequential(*layers):
    return nn.Sequential(*layers).eval()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(self.bn(self.conv(x))))


class Both(Twice):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Either(Twice):
    def forward(self, x, raw=None):
        y = self.conv(x)
        return y if raw is not None else self.bn(y)


class Reading(Twice):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.sum()


class ReadingBuffers(Twice):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_var.sum()


class Keeping(Twice):
    def forward(self, x):
        self.features = {"conv": [self.conv(x)]}
        return self.bn(self.features["conv"][0])


class Unbatched(Twice):
    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


class Many(Twice):
    def forward(self, x, a=None, b=None, c=None, d=None, e=False):
        return self.bn(self.conv(x))


class Dropping(Twice):
    """In one mode forward takes other ways, attributes are set, and random numbers drawn."""

    def forward(self, x):
        self.last = x
        y = self.conv(x)
        return self.bn(y) if self.training or torch.rand(()) < 2 else y


def hooked(where):
    model = sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    model.get_submodule(where).register_forward_hook(lambda *_: None)
    return model


def partly_training():
    model = sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].train()
    return model


NOT_FOLDED = {
    "called twice": (lambda: Twice().eval(), "bn", "bn is called more than once|conv is called more than once"),
    "feeds both": (lambda: Both().eval(), "bn", "conv feeds something else, too"),
    "another way": (lambda: Either().eval(), "bn", "conv feeds something else, too, or feeds bn in some calls only"),
    "weight read": (lambda: Reading().eval(), "bn", "forward reads a parameter or buffer of conv"),
    "buffer read": (lambda: ReadingBuffers().eval(), "bn", "forward reads a parameter or buffer of conv"),
    "kept": (lambda: Keeping().eval(), "bn", "forward keeps what conv returns in an attribute"),
    "not traceable": (lambda: Unbatched().eval(), "bn", "torch.fx cannot trace forward .symbolically traced"),
    "many ways": (lambda: Many().eval(), "bn", "forward has 5 arguments that may be left out"),
    "first": (lambda: sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), "0", "it does not follow a convolution"),
    "after relu": (lambda: sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), "2", "it does not follow"),
    "own forward": (lambda: sequential(with_a_forward_of_its_own(), nn.BatchNorm2d(3)), "1", "0, which it follows"),
    "training": (partly_training, "1", "bn is in training mode"),
    "no statistics": (
        lambda: sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), "1", "no running stat"
    ),
    "weight norm": (
        lambda: sequential(nn.utils.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), "1", "a hook computes the w"
    ),
    "parametrized": (
        lambda: sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), "1", "parametrized"
    ),
    "hook of it": (lambda: hooked("1"), "1", "hooks of 1 would see other values"),
    "hook of the convolution": (lambda: hooked("0.0"), "1", "hooks of 0.0 would see other values"),
    "hook around the convolution": (lambda: hooked("0"), "1", "hooks of 0 would see other values"),
}  # fmt: skip


@torch_tier
@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_is_not_folded_says_why(name):
    make, norm, text = NOT_FOLDED[name]
    model, x = make(), torch.randn(2, 3, 4, 4)
    wanted, before = model(x), snapshot(model)
    _, report = tritune.replace(model, fold=True)
    (row,) = [row for row in report.rows if row.name == norm]
    assert row.became is None and row.was == "torch.nn.BatchNorm2d"
    assert re.match(f"not folded: .*({text})", row.reason), row.reason
    assert isinstance(model.get_submodule(norm), nn.BatchNorm2d)
    equal(model(x), wanted)
    tritune.restore(model)
    assert name in ("weight norm", "kept") or snapshot(model) == before  # in these two a call sets attributes


@torch_tier
def test_hooks_around_both_are_no_matter():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(2, 3, 4, 4)
    wanted = model(x)
    _, report = tritune.replace(model, fold=True)
    assert became(report)["0.1"] == "torch.nn.Identity"
    assert len(seen) == 1  # tracing calls no hooks
    torch.testing.assert_close(model(x), wanted)


@torch_tier
def test_tracing_leaves_no_trace():
    model, x = Dropping().eval(), torch.randn(2, 3, 4, 4)
    wanted, random = model(x), torch.get_rng_state()
    _, report = tritune.replace(model, fold=True)
    assert became(report)["bn"] == "torch.nn.Identity"
    assert model.last is x and torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model(x), wanted)


class Optional(Twice):
    """Each argument that may be left out is followed both ways, and in none of them the convolution feeds more."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x, mask=None, doubled=False, *, bias=None):
        y = self.act(self.bn(self.conv(x)))
        if doubled:
            y = 2 * y
        y = y if mask is None else y * mask
        return y if bias is None else y + bias


@torch_tier
def test_two_normalisations_in_a_row():
    """Each fold starts from the weights that the last one has left."""
    one, other = (build("mobilenet")[0] for _ in range(2))
    model = sequential(one[2], one[3], other[3])
    x, original, before = torch.randn(2, 16, 6, 6), copy.deepcopy(model), snapshot(model)
    _, report = tritune.replace(model, fold=True)
    assert reasons(report)["2"] == "not folded: another one is folded into 0: call replace once more"
    tritune.replace(model, fold=True)
    assert list(map(type, model)) == [tritune.nn.Conv2d, nn.Identity, nn.Identity]
    within_verdict(original, model, x)
    tritune.restore(model)
    assert snapshot(model) == before
    equal(model(x), original(x))


@torch_tier
def test_arguments_that_may_be_left_out():
    model, x = Optional().eval(), torch.randn(2, 3, 4, 4)
    original = copy.deepcopy(model)
    _, report = tritune.replace(model, fold=True, fuse=True)
    assert became(report)["bn"] == became(report)["act"] == "torch.nn.Identity"
    for arguments in ({}, {"mask": x}, {"doubled": True, "bias": x}):
        torch.testing.assert_close(model(x, **arguments), original(x, **arguments))


@torch_tier
def test_only_leaves_out_what_would_be_folded_and_fused():
    model = sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    _, report = tritune.replace(model, fold=True, fuse=True, only="0")
    assert list(map(type, model)) == [tritune.nn.Conv2d, nn.Identity, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert reasons(report)["3"] == "not folded: 2, which it follows, stays as it is"


@torch_tier
def test_restored_after_folding_and_more():
    """In three calls, with training, other attributes and other modes in between."""
    model, x = build("mobilenet")
    original = copy.deepcopy(model.eval())
    tritune.replace(model, fold=True)
    tritune.replace(model, fuse=True)
    tritune.replace(model, fold=True, fuse=True)
    assert type(model[0][0]) is tritune.nn.ConvActivation2d and model[0][0]._activation == "relu6"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()
    model[0][0].tag = "kept"
    tritune.restore(model)
    assert model[0][0].tag == "kept" and all(module.training for module in model.modules())
    equal(dict(model.state_dict()), dict(original.state_dict()))
    equal(model.eval()(x), original(x))


# --- fusing ----------------------------------------------------------------------------------------------------------

FUSED = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"), "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
}  # fmt: skip


@torch_tier
def test_every_activation_has_its_module():
    assert set(FUSED) == set(tritune.ops._checks.ACTIVATIONS)


@torch_tier
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose3d])
@pytest.mark.parametrize("activation", FUSED)
def test_an_activation_module_is_fused(conv, activation):
    rank = int(conv.__name__[-2])
    model, x = nn.Sequential(conv(3, 4, 3), FUSED[activation]()), torch.randn(2, 3, *(5,) * rank)
    original, before = copy.deepcopy(model), snapshot(model)
    _, report = tritune.replace(model, fuse=True)
    assert model[0].activation == activation and type(model[1]) is nn.Identity
    assert reasons(report) == {"0": f"computes the {activation} of 1", "1": "computed by 0"}
    equal(model(x), original(x))
    model(x).sum().backward(), original(x).sum().backward()
    equal([one.grad for one in model.parameters()], [one.grad for one in original.parameters()])
    tritune.restore(model)
    assert snapshot(model) == before
    equal(model(x), original(x))


@torch_tier
def test_a_fused_model_is_trained_as_before():
    model, x = build("reader")
    original = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (model, original)]
    tritune.replace(model, fuse=True)
    assert type(model.conv) is tritune.nn.ConvActivation2d
    for _ in range(5):
        for one, optimizer in zip((model, original), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    equal(dict(model.state_dict()), dict(original.state_dict()))


@torch_tier
def test_a_normed_weight_is_fused():
    for wrap in (parametrizations.weight_norm, nn.utils.weight_norm):
        model, x = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.Sigmoid()), torch.randn(2, 3, 5, 5)
        wanted = model(x)
        tritune.replace(model, fuse=True)
        assert isinstance(model[0], tritune.nn.ConvActivation2d)
        equal(model(x), wanted)
        tritune.restore(model)
        assert isinstance(model[0], nn.Conv2d)
        equal(model(x), wanted)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x):
        return self.function(self.conv(x), x)


class ByMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        return self.act(y) if self.training else y


def hooked_activation(where, register):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    getattr(model[where], register)(lambda *_: None)
    return model


FUNCTION, RESIDUAL = "the activation behind it is a function", "a residual is added behind it"
NOT_FUSED = {
    "relu": (lambda: Functional(lambda y, x: F.relu(y)), FUNCTION),
    "in place": (lambda: Functional(lambda y, x: torch.relu_(y)), FUNCTION),
    "method": (lambda: Functional(lambda y, x: y.sigmoid()), FUNCTION),
    "gelu": (lambda: Functional(lambda y, x: F.gelu(y)), FUNCTION),
    "residual": (lambda: Functional(lambda y, x: F.relu(y + x)), RESIDUAL),
    "residual in place": (lambda: Functional(lambda y, x: F.silu(y.add_(x))), RESIDUAL),
    "shared": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), *[nn.ReLU()] * 2), "1 is called more than once"),
    "evaluation": (ByMode, "conv feeds something else, too, or feeds act in some calls only"),
    "not traceable": (Unbatched, "torch.fx cannot trace forward"),
    "hook of the convolution": (lambda: hooked_activation(0, "register_forward_hook"), "hooks of 0 would see"),
    "hook of the activation": (lambda: hooked_activation(1, "register_full_backward_hook"), "hooks of 1 would see"),
}


@torch_tier
@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_not_fused_says_why(name):
    make, text = NOT_FUSED[name]
    model, x = make(), torch.randn(2, 3, 4, 4)
    wanted = model(x)
    _, report = tritune.replace(model, fuse=True)
    (row,) = report.rows
    assert row.became == "tritune.nn.Conv2d" and row.reason.startswith(f"not fused: {text}")
    equal(model(x), wanted)


@torch_tier
@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.2), nn.PReLU(), nn.ELU(), nn.Softmax(dim=1), nn.Dropout()], ids=repr
)
def test_other_activations_stay(activation):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), activation)
    _, report = tritune.replace(model, fuse=True)
    assert model[1] is activation and type(activation) is not nn.Identity
    assert became(report) == {"0": "tritune.nn.Conv2d"} and reasons(report) == {"0": None}


@torch_tier
def test_an_activation_with_a_forward_of_its_own_stays():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model[1].forward = lambda x: x
    _, report = tritune.replace(model, fuse=True)
    assert type(model[1]) is nn.ReLU and reasons(report) == {"0": None}


@torch_tier
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_an_identity_lies_between(hooked):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU())
    if hooked:
        model[1].register_forward_hook(lambda *_: None)
    tritune.replace(model, fuse=True)
    assert type(model[2]) is (nn.ReLU if hooked else nn.Identity)


@torch_tier
def test_a_convolution_before_its_hooks_is_fused():
    """What a hook before the call sees is the input, with and without the activation."""
    assert isinstance(tritune.replace(hooked_activation(0, "register_forward_pre_hook"), fuse=True)[0][1], nn.Identity)


# --- on the kernels --------------------------------------------------------------------------------------------------


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fold": True, "fuse": True}], ids=["", "fused", "folded"])
@pytest.mark.parametrize("name", ["reader", "mobilenet"])
def test_the_kernels_serve_a_replaced_model(name, options):
    model, x = build(name)
    original = copy.deepcopy(model.eval())
    tritune.replace(model, **options)

    def on_kernels(x):
        with tritune.use_backend("triton"), tritune.ops.record() as decisions:
            out = model(x)
        assert len(decisions) == REPLACED[name] and {one.backend for one in decisions} == {"triton"}
        return out

    within_verdict(original, on_kernels, x)
    with tritune.use_backend("triton") if name == "reader" else nullcontext():
        equal(tritune.restore(model)(x), original(x))  # torch's modules do not ask for a backend
