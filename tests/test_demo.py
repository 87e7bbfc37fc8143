"""The demo from end to end, and that it cannot claim what is not so."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from tritune import cli, demo
from tritune.demo_models import HEADS, MODELS, ReadsRowsOnTorch
from tritune.ops import Decision

pytestmark = pytest.mark.torch

OPS = {"cnn": ["conv2d", "conv2d", "max_pool2d"], "rnn": ["rnn"], "attention": ["attention"]}
KERNELS = {
    "cnn": {
        "conv", "conv_epilogue_grad", "conv_transpose", "conv_weight_grad",
        "pool", "pool_backward",
    },
    "rnn": {"rnn", "rnn_backward"},
    "attention": {
        "attention", "attention_delta", "attention_key_value_grad", "attention_query_grad", "attention_normalize",
        "attention_normalize_grad",
    },
}  # fmt: skip
TENSORS = {
    "cnn": {f"{layer}.{kind}" for layer in ("conv1", "conv2", "linear") for kind in ("weight", "bias")},
    "rnn": {
        "elman.W_xh", "elman.W_hh", "elman.b_h", "elman.W_ho", "elman.b_o", "elman.W_yh",
        "linear.weight", "linear.bias",
    },
    "attention": {
        "place", "embed.weight", "embed.bias", "pool.logit_scale", "pool.query", "pool.key.weight", "pool.value.weight",
        "pool.out.weight", "score.weight",
    },
}  # fmt: skip


def compared(name):
    return {"loss", "output", "grad input", *(f"grad {tensor}" for tensor in TENSORS[name])}


@pytest.mark.slow
@pytest.mark.full
def test_demo(tmp_path):
    for module in ("triton", "rich", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    start = time.monotonic()
    command = [sys.executable, "-m", "tritune", "demo", "--json", "--out", str(tmp_path / "new" / "folder")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 180
    assert done.stderr.count("  20 epochs, accuracy: tritune ") == 3
    assert "PASSED" in done.stderr

    results = json.loads(done.stdout)
    assert results["failures"] == []
    assert (tmp_path / "new/folder/demo.png").stat().st_size > 30_000
    assert list(results["models"]) == ["cnn", "rnn", "attention"]
    for name, needed in (("cnn", 0.95), ("rnn", 0.90), ("attention", 0.90)):
        one = results["models"][name]
        assert one["needed"] == needed
        for library in demo.LIBRARIES:
            assert one[library]["accuracy"] >= needed
            assert one[library]["losses"][-1] < 0.1 * one[library]["losses"][0]
        assert [call["op"] for call in one["ran"]] == OPS[name]
        assert all(call["why"] for call in one["ran"])

        on_kernels = one["steps"]["here" if torch.cuda.is_available() else "interpreted"]
        assert {kernel["kernel"] for call in on_kernels["ran"] for kernel in call["kernels"]} == KERNELS[name]
        for step in one["steps"].values():
            assert set(step["differences"]) == compared(name)
        assert 0 < max(on_kernels["differences"].values()) < 1e-5


def short_run(tmp_path, monkeypatch, capsys, *options):
    """One epoch, and nothing interpreted."""
    for module in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    monkeypatch.setattr(demo, "_has_triton", lambda: False)
    code = cli.main(["demo", "--epochs", "1", "--out", str(tmp_path), *options])
    return code, capsys.readouterr()


def test_one_model(tmp_path, monkeypatch, capsys):
    """A model learns the same alone as with others; one that did not learn enough is an error."""
    threads = torch.get_num_threads()
    code, (out, err) = short_run(tmp_path, monkeypatch, capsys, "--model", "rnn", "--json")
    results = json.loads(out)
    assert code == 1
    assert list(results["models"]) == ["rnn"]
    assert [failure.partition(" reached")[0] for failure in results["failures"]] == ["rnn: tritune", "rnn: torch"]
    assert err.count("FAILED rnn:") == 2 and "PASSED" not in err
    assert (tmp_path / "demo.png").exists()
    assert torch.get_num_threads() == threads

    options = ("--model", "attention", "--model", "rnn", "--json")
    _, (out, _) = short_run(tmp_path, monkeypatch, capsys, *options)
    both = json.loads(out)["models"]
    assert list(both) == ["rnn", "attention"]
    assert both["rnn"]["tritune"]["losses"] == results["models"]["rnn"]["tritune"]["losses"]


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_epochs(count, capsys):
    assert cli.main(["demo", "--epochs", count]) == 2
    assert "tritune demo: Invalid value for '--epochs': " in capsys.readouterr().err


def test_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for name, model in MODELS.items():
        monkeypatch.setitem(MODELS, name, model._replace(needed=0.0))
    code, (out, _) = short_run(tmp_path, monkeypatch, capsys)
    assert code == 0
    for name, calls in (("cnn", "2 × conv2d, 1 × max_pool2d"), ("rnn", "1 × rnn"), ("attention", "1 × attention")):
        assert f"  {name:9}  {MODELS[name].says}\n" in out
        assert f"  {name:9}  {calls}\n" in out
        assert f"\n{name:9} " in out
    assert "Triton is not installed" in out
    assert "PASSED" in out
    short = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, short)) <= 80


def result(accuracy=0.97, **differences):
    one = {"accuracy": accuracy, "seconds": 1.0, "losses": [1.0, 0.1]}
    steps = {"here": {"differences": {}}, "interpreted": {"differences": differences}}
    return {"models": {"rnn": {"needed": 0.95, "tritune": one, "torch": one, "steps": steps}}}


def changed(part, **values):
    results = result()
    results["models"]["rnn"][part] = {**results["models"]["rnn"][part], **values}
    return results


@pytest.mark.parametrize(
    "results, failures",
    [
        (result(output=1e-6), []),
        (result(accuracy=0.95), []),
        (
            result(output=1e-6, weight=1e-3),
            ["rnn: weight differs from torch's by 1.0e-03 of its largest value (interpreted)"],
        ),
        (
            result(output=float("nan")),
            ["rnn: output differs from torch's by nan of its largest value (interpreted)"],
        ),
        (
            changed("steps", here={"differences": {"loss": 0.5}}),
            ["rnn: loss differs from torch's by 5.0e-01 of its largest value (here)"],
        ),
        (changed("torch", accuracy=0.949), ["rnn: torch reached a test accuracy of 0.949, less than 0.95"]),
        (changed("tritune", accuracy=0.1), ["rnn: tritune reached a test accuracy of 0.100, less than 0.95"]),
    ],
)
def test_failures_are_named(results, failures):
    assert demo.check(results) == failures


def a_step(model):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(9, 1, 8, 8, generator=generator), torch.arange(9)
    return demo.compare_step(model, demo.initial_weights(model, seed=0), images, labels, "auto")["differences"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_twin(name):
    differences = a_step(MODELS[name])
    assert set(differences) == compared(name)
    assert max(differences.values()) < 1e-5


def test_a_wrong_twin_is_noticed():
    class ForgetsTanh(ReadsRowsOnTorch):
        def forward(self, rows):
            h, _ = self.rnn(rows)
            return self.linear(self.y(self.o(h))[:, -1])

    differences = a_step(MODELS["rnn"]._replace(on_torch=ForgetsTanh))
    assert differences["output"] > demo.TOLERANCE and differences["grad elman.W_hh"] > demo.TOLERANCE


def test_attention_looks_where_its_query_says():
    model = MODELS["attention"]
    net, generator = model.ours(), torch.Generator().manual_seed(1)
    inputs, classes = model.arrange(torch.rand(3, 1, 8, 8, generator=generator)), torch.tensor([3, 0, 9])
    with torch.no_grad():
        looked = model.looks(net, inputs, classes)
        keys = net.pool.key(net.elements(inputs)).unflatten(-1, (HEADS, -1))
        for where, key, label in zip(looked, keys, classes, strict=True):
            cosines = F.cosine_similarity(key, net.pool.query[:, label], dim=-1)
            weights = torch.softmax(net.pool.scale * cosines, 0).mean(1)
            assert weights.max() > 2 * weights.min()
            # The four pixels of a patch have its weight, row by row.
            pixels = [where[row : row + 2, column : column + 2] for row in (0, 2, 4, 6) for column in (0, 2, 4, 6)]
            torch.testing.assert_close(torch.stack(pixels), weights.view(16, 1, 1).expand(16, 2, 2))


@pytest.mark.parametrize("origin, ending", [("rule", "  [rule]"), ("measured", "  [measured]"), ("", "")])
def test_how_a_backend_was_chosen_is_shown(origin, ending, capsys):
    console = pytest.importorskip("rich.console").Console()
    call = demo.describe(Decision("conv2d", "torch", "not measured", origin=origin))
    assert call["origin"] == origin
    demo.show_choices({"cnn": {"ran": [call]}}, console)
    assert capsys.readouterr().out.rstrip().endswith(f"on torch: not measured{ending}")
