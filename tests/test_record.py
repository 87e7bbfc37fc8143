"""The shapes of a model's calls in a file, and what the commands make of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CALLS, Net
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tritune
from tritune import cli
from tritune.autotune import recorded
from tritune.autotune.recorded import Recorded
from tritune.autotune.tune import _case_of
from tritune.perf import families
from tritune.perf.calls import CALLS as OURS
from tritune.perf.calls import prepare

assert families


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "shapes.jsonl"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def counts(file: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in lines(file):
        found[line["op"]] = found.get(line["op"], 0) + line["count"]
    return found


@pytest.mark.torch
class TestWhatIsRecorded:
    def test_a_line_says_everything(self, file):
        x, w, b = normal(2, 3, 8, 8), normal(4, 3, 3, 3).requires_grad_(), normal(4)
        with tritune.record_shapes(file):
            for _ in range(3):
                tritune.conv2d(x, w, b, (2, 2), padding=1, activation="relu")
            tritune.max_pool2d(x.bfloat16().to(memory_format=torch.channels_last), [3, 2])
        assert lines(file) == [
            {"op": "conv2d", "shapes": {"input": [2, 3, 8, 8], "weight": [4, 3, 3, 3], "bias": [4]},
             "dtype": "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee", "layout": "nchw",
             "kwargs": {"stride": 2, "padding": 1, "activation": "relu"}, "direction": "fwd+bwd", "count": 3},
            {"op": "max_pool2d", "shapes": {"input": [2, 3, 8, 8]}, "dtype": "bf16", "layout": "nhwc",
             "kwargs": {"kernel_size": [3, 2]}, "direction": "fwd", "count": 1},
        ]  # fmt: skip
        assert recorded.read(file)[0].shapes["input"] == (2, 3, 8, 8)

    @pytest.mark.parametrize("name", CALLS)
    def test_a_call_of_torchs_is_recorded_once_wherever_accelerate_stands(self, name, file):
        function, call, tensors = CALLS[name]
        found = []
        for place in ("nowhere", "inside", "around", "fake"):
            with torch.no_grad():
                if place == "around":
                    with tritune.accelerate(), tritune.record_shapes(file):
                        call(*tensors)
                elif place == "fake":
                    with FakeTensorMode(allow_non_fake_inputs=True) as mode, tritune.record_shapes(file):
                        call(*map(mode.from_tensor, tensors))
                elif place == "inside":
                    with tritune.record_shapes(file), tritune.accelerate():
                        call(*tensors)
                else:
                    with tritune.record_shapes(file):
                        call(*tensors)
            found.append(lines(file))
        assert [line["op"] for line in found[0]] == [function.removesuffix("_cell")]
        assert found[0][0]["count"] == 1
        assert all(one == found[0] for one in found)

    @pytest.mark.parametrize("call", OURS, ids=lambda call: call.name)
    def test_functions_and_modules_of_ours(self, call, file):
        """The table of what calls cost has each of them."""
        run = prepare(call, "small", "forward")[0]
        run()
        with tritune.record_shapes(file):
            run()
        found = counts(file)
        # Multi-head attention computes its weights by default, without a function of ours.
        assert found or any(word in call.name for word in ("layers", "packed", "Multihead")), call.name
        assert set(found) <= set(tritune.ops.__all__)
        if not call.public_name.startswith("nn.") and call.public_name != "fold_bn":
            assert found == {call.public_name: 1}

    def test_the_same_result(self, file):
        net, x = Net(), normal(2, 3, 4, 4)
        expected = net(x)
        with tritune.record_shapes(file):
            assert torch.equal(net(x), expected)
        assert counts(file) == {"conv2d": 1, "max_pool2d": 1, "gru": 1, "scaled_dot_product_attention": 1}

    def test_what_has_no_kernel_or_raises_is_not_there(self, file):
        x = normal(5, 2, 3)
        with tritune.record_shapes(file):
            nn.LSTM(3, 4, num_layers=2)(x)
            torch.func.vmap(lambda x: F.avg_pool1d(x, 2))(x[None])
            with pytest.raises(RuntimeError):
                F.conv2d(x, x)
        assert lines(file) == []

    def test_what_was_seen_before_an_exception_is_written(self, file):
        def run() -> None:
            with tritune.record_shapes(file):
                F.avg_pool2d(normal(1, 1, 4, 4), 2)
                1 / 0  # noqa: B018

        with pytest.raises(ZeroDivisionError):
            run()
        assert counts(file) == {"avg_pool2d": 1}

    def test_autocast_and_other_dtypes(self, file):
        x, w = normal(2, 3, 8, 8), normal(4, 3, 3, 3)
        q, mask = normal(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool)
        with tritune.record_shapes(file), torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                y = F.conv2d(x, w)
                F.conv2d(y, normal(2, 4, 3, 3))
                F.max_pool2d(x, 2)
            F.conv2d(x.double(), w.double())
            F.scaled_dot_product_attention(q, q, q, mask)
            tritune.conv2d(x, w, precision="tf32x3")
        assert [line["dtype"] for line in lines(file)] == ["bf16", "bf16", "fp32", "float64", "ieee", "tf32x3"]
        assert [line.get("dtypes", {}) for line in lines(file)] == [{}, {}, {}, {}, {"attn_mask": "bool"}, {}]

    def test_a_compiled_graph_is_left_alone(self, file):
        torch._dynamo.reset()
        x = normal(1, 1, 4, 4)
        with tritune.record_shapes(file):
            y = torch.compile(lambda x: F.avg_pool2d(x, 2), backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(y, F.avg_pool2d(x, 2)) and not lines(file)

    def test_a_place_that_cannot_be_written_is_an_error_at_the_start(self, tmp_path):
        ran = []
        with pytest.raises(OSError, match="no-such"), tritune.record_shapes(tmp_path / "no-such" / "file"):
            ran.append(1)
        assert not ran


CONV = {"input": (2, 3, 8, 8), "weight": (16, 3, 3, 3), "bias": (16,)}
Q, KV = (2, 4, 16, 8), (2, 2, 12, 8)
# What a recorded call is tuned as: function, shapes, arguments, dtypes of tensors, the words of `tritune tune`.
LAYERS = [
    ("conv2d", CONV, {"padding": 1, "activation": "relu"}, {}, "conv2d 2x3x8x8,16x3x3x3,padding=1"),
    ("conv2d", CONV, {"padding": "same", "dilation": 2}, {}, "conv2d 2x3x8x8,16x3x3x3,dilation=2,padding=2"),
    ("conv2d", CONV, {"padding": "valid"}, {}, "conv2d 2x3x8x8,16x3x3x3"),
    ("conv2d", {**CONV, "input": (3, 8, 8)}, {"stride": 2}, {}, "conv2d 1x3x8x8,16x3x3x3,stride=2"),
    ("conv1d", {"input": (2, 6, 9), "weight": (6, 1, 3)}, {"groups": 6}, {}, "conv1d 2x6x9,6x1x3,groups=6"),
    ("conv_transpose2d", {"input": (2, 3, 8, 8), "weight": (3, 4, 2, 2)}, {"stride": 2}, {},
     "conv_transpose2d 2x3x8x8,3x4x2x2,stride=2"),
    ("conv2d_max_pool2d", CONV, {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1, "padding": 1}, {},
     "conv2d_max_pool2d 2x3x8x8,16x3x3x3,padding=1,kernel=3,pool_stride=2,pool_padding=1"),
    ("max_pool2d", {"input": (2, 3, 8, 8)}, {"kernel_size": 3, "stride": 2, "padding": 1}, {},
     "max_pool2d 2x3x8x8,kernel=3,stride=2,padding=1"),
    ("max_pool1d", {"input": (3, 8)}, {"kernel_size": 2}, {}, "max_pool1d 1x3x8,kernel=2"),
    ("adaptive_avg_pool2d", {"input": (2, 3, 8, 8)}, {"output_size": [7, 7]}, {}, "adaptive_avg_pool2d 2x3x8x8,size=7"),
    ("global_avg_pool", {"input": (2, 3, 8, 8)}, {}, {}, "global_avg_pool 2x3x8x8"),
    ("lstm", {"input": (2, 5, 3), "w_ih": (2, 16, 3), "w_hh": (2, 16, 4)}, {"batch_first": True}, {},
     "rnn 5x2x3,hidden=4,cell=lstm,directions=2"),
    ("rnn", {"input": (5, 3), "w_ih": (4, 3), "w_hh": (4, 4)}, {}, {}, "rnn 5x1x3,hidden=4,cell=tanh,directions=1"),
    ("elman_step", {"x": (2, 3), "h": (2, 4), "W_xh": (4, 3), "W_hh": (4, 4)}, {}, {},
     "rnn 1x2x3,hidden=4,cell=tanh,directions=1"),
    ("scaled_dot_product_attention", {"query": Q, "key": KV, "value": KV, "attn_mask": (16, 12)},
     {"enable_gqa": True}, {"attn_mask": "bool"}, "attention 2x4x16x8,2x2x12x8,masked=1"),
    ("scaled_dot_product_attention", {"query": Q, "key": Q, "value": Q, "attn_mask": (4, 16, 16)}, {}, {},
     "attention 2x4x16x8,2x4x16x8,bias=hmn"),
    ("attention", {"query": Q[1:], "key": Q[1:], "value": Q[1:]}, {"score": "cosine", "is_causal": True, "scale": 2.0},
     {}, "attention 1x4x16x8,1x4x16x8,score=cosine,causal=1"),
    ("attention_pool", {"query": (4, 1, 8), "key": Q, "value": Q}, {}, {}, "attention 2x4x1x8,2x4x16x8"),
]  # fmt: skip
NO_LAYER = [
    ("conv2d", CONV, {"stride": [2, 1]}, {}, "bf16", r"stride=\[2, 1\] is not one number"),
    ("conv2d", {**CONV, "weight": (16, 3, 2, 2)}, {"padding": "same"}, {}, "bf16", "padding='same' is not one number"),
    ("conv2d", CONV, {"output_padding": 1}, {}, "bf16", "no layer is spelled with output_padding=1"),
    ("conv2d", CONV, {}, {}, "float64", "dtype float64 has no kernel"),
    ("max_pool2d", {"input": (2, 3, 8, 8)}, {"kernel_size": 2, "ceil_mode": True}, {}, "fp32", "ceil_mode=True"),
    ("lp_pool2d", {"input": (2, 3, 8, 8)}, {"norm_type": math.inf, "kernel_size": 2}, {}, "fp32", "norm_type=inf"),
    ("avg_pool1d", {"input": (2, 3, 8)}, {"kernel_size": 2}, {}, "fp32", "no family has layers of it"),
    ("rnn", {"input": (5, 3), "w_ih": (4, 3), "w_hh": (4, 4)}, {"nonlinearity": "relu"}, {}, "bf16",
     "cell must be one of tanh, gru, lstm"),
    ("attention", {"query": Q, "key": KV, "value": (*KV[:3], 4)}, {}, {}, "bf16", "other features"),
    ("scaled_dot_product_attention", {"query": Q, "key": Q, "value": Q}, {"dropout_p": 0.5}, {}, "bf16", "dropout_p"),
    ("attention", {"query": Q, "key": KV, "value": KV}, {"causal_alignment": "bottom_right"}, {}, "bf16", "bottom"),
]  # fmt: skip


@pytest.mark.torch
class TestLayers:
    """A recorded call becomes the layer that its words spell."""

    @pytest.mark.parametrize("op, shapes, kwargs, dtypes, words", LAYERS, ids=[row[-1] for row in LAYERS])
    def test_is_spelled(self, op, shapes, kwargs, dtypes, words):
        pytest.importorskip("triton")
        dtype = "fp32" if "pool" in op and op not in ("attention_pool", "conv2d_max_pool2d") else "tf32"
        layout = "nchw" if "conv" in op or ("pool" in op and op != "attention_pool") else ""
        case = _case_of(Recorded(op, shapes, dtype, layout, kwargs, "fwd", dtypes))
        assert f"{case.op} {case.name}" == words
        assert case.layout == layout and case.precision == dtype

    @pytest.mark.parametrize("op, shapes, kwargs, dtypes, dtype, reason", NO_LAYER, ids=[row[-1] for row in NO_LAYER])
    def test_or_it_says_why_not(self, op, shapes, kwargs, dtypes, dtype, reason):
        with pytest.raises(ValueError, match=reason):
            _case_of(Recorded(op, shapes, dtype, "", kwargs, "fwd", dtypes))


@pytest.mark.torch
class TestCommands:
    @pytest.fixture
    def model(self, file: Path) -> Path:
        pytest.importorskip("triton")
        with tritune.record_shapes(file):
            Net()(normal(2, 3, 4, 4))
            F.avg_pool1d(normal(2, 3, 4), 2)
            with torch.no_grad():
                for _ in range(2):
                    F.conv2d(normal(2, 16, 8, 8).bfloat16(), normal(16, 16, 3, 3).bfloat16())
        return file

    def test_tune_takes_the_calls_as_layers(self, model, capsys):
        assert cli.main(["tune", "--from", str(model), "--rehearse", "--dry-run"]) == 0
        out, err = capsys.readouterr()
        assert "left out, 1 x avg_pool1d: no family has layers of it" in err and err.count("\n") == 1
        kernels = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
        # Forward first, the most frequent call first; the inference call has no backward.
        assert kernels[0] == "conv" and kernels.count("conv_weight_grad") == 1 and "attention_query_grad" in kernels
        assert {"pool", "pool_backward", "rnn", "rnn_backward"} <= set(kernels)
        assert cli.main(["tune", "conv2d", "--from", str(model), "--rehearse", "--dry-run", "--direction", "fwd"]) == 0
        out, _ = capsys.readouterr()
        assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} == {"conv"}

    @pytest.mark.slow
    def test_static_ranks_them(self, model, tmp_path, capsys):
        arguments = ["--static", "--target", "sm_90", "-k", "16x16x3x3", "--out", str(tmp_path / "store"), "--json"]
        assert cli.main(["tune", "--from", str(model), *arguments]) == 0
        document = json.loads(capsys.readouterr().out)
        (entry,) = document["kernels"]["conv"]
        assert entry["origin"] == "model" and list(document["kernels"]) == ["conv"]
        assert (tmp_path / "store" / "sm_90" / "conv.json").is_file()

    def test_explain_says_what_each_would_run(self, model, capsys):
        assert cli.main(["explain", "file", str(model), "--device", "h200"]) == 0
        rows = capsys.readouterr().out.splitlines()
        assert len(rows) == 6 and rows[0].startswith("2 x 2x16x8x8 16x16x3x3 bf16 conv2d: ")
        assert cli.main(["explain", "file", str(model), "--device", "h200", "--backend", "triton", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert {one["backend"] for one in document} == {"triton"}
        assert document[0]["call"]["count"] == 2

    @pytest.mark.parametrize(
        "text, problem",
        [
            ("{", ":1 is no JSON"), ("3", ":1 is no JSON object"), ("{}", ":1 has no 'op'"),
            ("\n\n[]", ":3 is no JSON"),
            ('{"op": "conv2d", "shapes": {"input": [1, -1]}, "dtype": "bf16", "layout": "", "kwargs": {}, '
             '"direction": "fwd", "count": 1}', "the shape of input"),
            ('{"op": "conv2d", "shapes": {}, "dtype": "bf16", "layout": "x", "kwargs": {}, "direction": "fwd", '
             '"count": 1}', "layout is one of"),
            ('{"op": "conv2d", "shapes": {}, "dtype": "bf16", "layout": "", "kwargs": {}, "direction": "fwd", '
             '"count": "many"}', "has no 'count'"),
            ("", "no call that can be tuned"),
        ],
    )  # fmt: skip
    def test_a_bad_file_is_one_line(self, text, problem, file, capsys):
        file.write_text(text)
        assert cli.main(["tune", "--from", str(file), "--dry-run"]) == 2
        out, err = capsys.readouterr()
        assert problem in err and str(file) in err and err.count("\n") == 1 and not out

    def test_layers_come_from_one_place(self, model, capsys):
        assert cli.main(["tune", "conv2d", "--from", str(model), "--shapes", "vgg-c3"]) == 2
        assert "--from" in capsys.readouterr().err


@pytest.mark.interpret
class TestInterpreted:
    def test_kernels_that_run_are_recorded_and_tuned(self, file, capsys):
        net, x = Net(), normal(2, 3, 4, 4)
        ours = tritune.nn.LSTM(3, 4)
        with tritune.use_backend("triton"), tritune.record_shapes(file), tritune.accelerate() as sent:
            net(x)
            ours(normal(5, 2, 3))
        assert sum(sent.kernels.values()) == 4
        assert counts(file) == {
            "conv2d": 1, "max_pool2d": 1, "gru": 1, "scaled_dot_product_attention": 1, "lstm": 1,
        }  # fmt: skip
