"""torch.compile, torch.export, fake and meta tensors."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from harness import assert_as_exact, backend_of
from torch._subclasses.fake_tensor import FakeTensorMode

import tritune
from tritune.ops._dispatch import matmul_setting

tiers = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = tritune.nn.Conv2d(3, 8, 3, padding=1, activation="relu")
        self.pool = tritune.nn.MaxPool2d(2)
        self.conv2 = tritune.nn.Conv2d(8, 8, 1, activation="silu")
        self.up = tritune.nn.ConvTranspose2d(8, 4, 2, stride=2, activation="relu")
        self.deep = tritune.nn.Conv3d(4, 4, (1, 3, 3), padding="same")
        self.flat = tritune.nn.Conv1d(4, 4, 4, padding=3, groups=4, activation="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.conv2(self.pool(self.conv1(x))))
        return self.flat(self.deep(y.unsqueeze(2)).flatten(2))


class Recorder:
    """A compiler backend that runs the graph as it is and remembers the operators of the differentiated graphs."""

    def __init__(self) -> None:
        self.graphs = 0
        self.ops: set[str] = set()

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_func

        def remember(graph: Any, inputs: Any) -> Any:
            self.ops |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
            return make_boxed_func(graph.forward)

        self.graphs += 1
        return aot_autograd(fw_compiler=remember, bw_compiler=remember)(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
class TestCompile:
    pytestmark = tiers

    def test_training_in_one_graph(self, device, tier):
        """Where torch serves, the compiler sees torch's operators and can fuse them; the kernels stay operators."""
        net, recorder = Net().to(device), Recorder()
        compiled = torch.compile(net, fullgraph=True, backend=recorder)
        x = torch.randn(2, 3, 8, 8, device=device)
        with tritune.use_backend(backend_of(tier)):
            wanted = net(x)
            wanted_grads = torch.autograd.grad(wanted.square().sum(), list(net.parameters()))
            y = compiled(x)
            grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(grads, wanted_grads)
        ours = {op for op in recorder.ops if op.startswith("tritune")}
        if tier == "torch":
            assert not ours and "aten.convolution.default" in recorder.ops
        else:
            assert ours >= {
                "tritune.conv.default", "tritune.conv_saving_input.default", "tritune.conv_weight_grad.default",
                "tritune.conv_transpose.default", "tritune.conv_epilogue_grad.default",
                "tritune.max_pool_with_offsets.default", "tritune.max_pool_backward.default",
            }  # fmt: skip
            assert "aten.convolution.default" not in recorder.ops

    def test_auto_compiles_to_torch(self, device):
        recorder = Recorder()
        compiled = torch.compile(Net().to(device), fullgraph=True, backend=recorder)
        with torch.no_grad():
            compiled(torch.randn(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last))
        assert not {op for op in recorder.ops if op.startswith("tritune")}

    def test_changing_sizes_compile_once(self, device, tier):
        recorder = Recorder()
        net = Net().to(device)
        compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=recorder)
        with tritune.use_backend(backend_of(tier)), torch.no_grad():
            for n, h, w in ((5, 8, 12), (3, 10, 6), (2, 6, 14)):
                x = torch.randn(n, 3, h, w, device=device)
                torch.testing.assert_close(compiled(x), net(x))
        assert recorder.graphs == 1

    @pytest.mark.parametrize("thread", ["this", "new"])
    def test_switching_the_backend_recompiles(self, device, tier, thread):
        """Also in a thread that never switched before."""
        recorder = Recorder()
        compiled = torch.compile(lambda x: tritune.max_pool2d(x, 2), fullgraph=True, backend=recorder)
        x = torch.randn(1, 2, 4, 4, device=device)

        def switch() -> None:
            compiled(x)
            assert not {op for op in recorder.ops if op.startswith("tritune")}
            with tritune.use_backend("triton"):
                if tier == "torch":
                    with pytest.raises(Exception, match="UnsupportedError"):
                        compiled(x)
                else:
                    compiled(x)
                    assert {op for op in recorder.ops if op.startswith("tritune")}

        if thread == "this":
            switch()
        else:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(switch).result()

    def test_use_backend_inside(self, device, tier):
        @torch.compile(fullgraph=True, backend=Recorder())
        def fn(x: torch.Tensor) -> torch.Tensor:
            with tritune.use_backend(backend_of(tier)):
                return tritune.max_pool2d(x, 2)

        x = torch.randn(1, 2, 4, 4, device=device)
        assert torch.equal(fn(x), torch.nn.functional.max_pool2d(x, 2))

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_no_channels(self, device):
        """No channels in, none out; the kernels' operator would give some, so it is not asked."""
        x, w = torch.randn(2, 0, 5, 5, device=device), torch.randn(4, 0, 3, 3, device=device)
        compiled = torch.compile(tritune.conv2d, backend="aot_eager", fullgraph=True)
        assert compiled(x, w).shape == (2, 0, 3, 3)
        with tritune.use_backend("triton"), pytest.raises(Exception, match="UnsupportedError"):
            compiled(x, w)

    def test_errors_are_torchs_own(self, device):
        compiled = torch.compile(lambda x, w: tritune.conv2d(x, w, padding=-1), fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="negative padding"):
            compiled(torch.randn(1, 2, 4, 4, device=device), torch.randn(2, 2, 3, 3, device=device))


def unpooled(x: torch.Tensor) -> torch.Tensor:
    y, places = tritune.max_pool2d(x, 2, return_indices=True)
    return tritune.max_unpool2d(y, places, 2, output_size=x.shape)


# What is called, the operators of a training step with kernels, and one of torch's with its own.
POOLINGS: dict[str, Any] = {
    "avg_pool2d": (
        lambda x: tritune.avg_pool2d(x, 3, 2, 1, True, False), {"avg_pool", "avg_pool_backward"}, "avg_pool2d"
    ),
    "adaptive_avg_pool2d": (
        lambda x: tritune.adaptive_avg_pool2d(x, (3, 9)), {"avg_pool", "avg_pool_backward"}, "_adaptive_avg_pool2d"
    ),
    "adaptive_max_pool2d": (
        lambda x: tritune.adaptive_max_pool2d(x, (3, 9)), {"max_pool_with_offsets", "max_pool_backward"},
        "adaptive_max_pool2d",
    ),
    "lp_pool2d": (lambda x: tritune.lp_pool2d(x, 2, 3, 2), {"lp_pool", "lp_pool_backward"}, "avg_pool2d"),
    "max_unpool2d": (
        unpooled, {"max_pool_with_indices", "max_pool_backward", "max_unpool", "pool_gather"}, "max_unpool2d"
    ),
    "global_avg_pool": (
        lambda x: tritune.global_avg_pool(x, keepdim=False), {"avg_pool", "avg_pool_backward"}, "mean"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
@pytest.mark.parametrize("name", POOLINGS)
class TestCompiledPooling:
    pytestmark = tiers

    def test_training_in_one_graph(self, name, device, tier):
        function, operators, aten = POOLINGS[name]
        recorder = Recorder()
        compiled = torch.compile(function, fullgraph=True, backend=recorder)
        x = torch.randn(2, 3, 8, 6, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            results = []
            for run in (function, compiled):
                y = run(x)
                results.append((y, *torch.autograd.grad(y.pow(3).sum(), x)))
        torch.testing.assert_close(*results)
        ours = {op.split(".")[1] for op in recorder.ops if op.startswith("tritune")}
        assert ours == (set() if tier == "torch" else operators)
        assert any(op.startswith(f"aten.{aten}.") for op in recorder.ops) == (tier == "torch")

    def test_changing_sizes_compile_once(self, name, device, tier):
        recorder = Recorder()
        function, *_ = POOLINGS[name]
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=recorder)
        with tritune.use_backend(backend_of(tier)):
            for n, h, w in ((5, 8, 12), (3, 10, 6), (2, 6, 14)):
                x = torch.randn(n, 3, h, w, device=device, requires_grad=True)
                results = []
                for run in (function, compiled):
                    y = run(x)
                    results.append((y, *torch.autograd.grad(y.square().sum(), x)))
                torch.testing.assert_close(*results)
        assert recorder.graphs == 1


class Sequences(torch.nn.Module):
    """torch's own layers end a trace: with gradients by an error, and as modules in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = tritune.nn.LSTM(3, 4, bidirectional=True)
        self.gru = tritune.nn.GRU(8, 4, batch_first=True)
        self.elman = tritune.nn.ElmanRNN(4, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.gru(self.lstm(x)[0].transpose(0, 1))[0]
        return self.elman(out.transpose(0, 1))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
class TestCompiledSequences:
    pytestmark = tiers

    def test_training_in_one_graph(self, device, tier):
        net, recorder = Sequences().to(device), Recorder()
        compiled = torch.compile(net, fullgraph=True, backend=recorder)
        x = torch.randn(5, 2, 3, device=device)
        with tritune.use_backend(backend_of(tier)):
            wanted = net(x)
            wanted_grads = torch.autograd.grad(wanted.square().sum(), list(net.parameters()))
            y = compiled(x)
            grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(grads, wanted_grads)
        assert {"tritune.rnn.default", "tritune.rnn_backward.default"} <= recorder.ops

    def test_changing_sizes_compile_once(self, device, tier):
        net, recorder = Sequences().to(device), Recorder()
        compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=recorder)
        with tritune.use_backend(backend_of(tier)), torch.no_grad():
            for t, b in ((5, 2), (3, 4), (7, 3)):
                x = torch.randn(t, b, 3, device=device)
                torch.testing.assert_close(compiled(x), net(x))
        assert recorder.graphs == 1


class Attentive(torch.nn.Module):
    """Fused scores, a bias with a gradient, cosine scores with a learned scale, and lse."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(1, 2, 1, 1))
        self.pool = tritune.nn.AttentionPool(8, 2, score="cosine", scale="learnable")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        y = tritune.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        y, lse = tritune.attention(y, heads, heads, bias=self.bias, return_lse=True)
        return self.pool((y * lse.unsqueeze(-1)).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
class TestCompiledAttention:
    pytestmark = tiers

    def test_training_in_one_graph(self, device, tier):
        net, recorder = Attentive().to(device), Recorder()
        compiled = torch.compile(net, fullgraph=True, backend=recorder)
        x = torch.randn(3, 7, 8, device=device, requires_grad=True)
        dy = torch.randn(3, 8, device=device)

        def outcome(function: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
            y = function(x)
            return [y, *torch.autograd.grad(y, (x, *function.parameters()), dy)]

        with tritune.use_backend(backend_of(tier)):
            results = outcome(compiled, x, dy)
        assert_as_exact(results, outcome, net, x, dy)
        ours = {op for op in recorder.ops if op.startswith("tritune")}
        names = ("attention", "attention_backward", "attention_normalize", "attention_normalize_backward")
        assert ours == (set() if tier == "torch" else {f"tritune.{name}.default" for name in names})

    def test_changing_sizes_compile_once(self, device, tier):
        net, recorder = Attentive().to(device), Recorder()
        compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=recorder)
        with tritune.use_backend(backend_of(tier)), torch.no_grad():
            compiled(torch.randn(5, 6, 8, device=device))  # traced twice: Dynamo takes eps for a variable at first
            graphs = recorder.graphs
            for b, n in ((5, 6), (3, 9), (7, 4)):
                x = torch.randn(b, n, 8, device=device)
                torch.testing.assert_close(compiled(x), net(x))
        assert recorder.graphs == graphs


LOAD_AND_RUN = """
import sys, torch, tritune
program = torch.export.load(sys.argv[1])
x, wanted = torch.load(sys.argv[2])
y = program.module()(x)
torch.testing.assert_close(y, wanted)
x = x.requires_grad_()
program.module()(x).sum().backward()
assert x.grad.abs().sum() > 0, "no gradient"
print("ok", sorted({str(n.target) for n in program.graph.nodes if "tritune" in str(n.target)}))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestExport:
    pytestmark = [pytest.mark.torch, pytest.mark.interpret]

    @pytest.mark.parametrize("kind", [Net, Sequences, Attentive])
    def test_saved_and_loaded_in_a_fresh_process(self, kind, tier, tmp_path, monkeypatch):
        """Exported for the kernels, a program keeps our operators, and still runs where there is no GPU."""
        shape = {Net: (2, 3, 8, 8), Sequences: (5, 2, 3), Attentive: (3, 7, 8)}[kind]
        net, x = kind().eval(), torch.randn(shape)
        with tritune.use_backend(backend_of(tier)):
            program = torch.export.export(net, (x,))
        torch.export.save(program, tmp_path / "net.pt2")
        torch.save((x, net(x).detach()), tmp_path / "data.pt")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        done = subprocess.run(
            [sys.executable, "-c", LOAD_AND_RUN, str(tmp_path / "net.pt2"), str(tmp_path / "data.pt")],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        op = {Net: "conv", Sequences: "rnn", Attentive: "attention"}[kind]
        assert (f"tritune.{op}.default" in done.stdout) == (tier == "interpret"), done.stdout


IMAGE, ROWS = (2, 8, 6, 6), (2, 4, 8, 16)
# What is called, the shapes of its arguments, its operator, how that is told to multiply by default.
ON_A_GPU: dict[str, tuple[Any, tuple[tuple[int, ...], ...], str, str | None]] = {
    "conv2d": (tritune.conv2d, (IMAGE, (4, 8, 3, 3)), "conv", "default"),
    "conv_transpose2d": (tritune.conv_transpose2d, (IMAGE, (8, 4, 3, 3)), "conv_transpose", "default"),
    "conv2d_max_pool2d": (tritune.conv2d_max_pool2d, (IMAGE, (4, 8, 3, 3)), "conv2d_max_pool2d", "default"),
    "max_pool2d": (lambda x: tritune.max_pool2d(x, 2), (IMAGE,), "max_pool", None),
    "lp_pool2d": (lambda x: tritune.lp_pool2d(x, 2, 2), (IMAGE,), "lp_pool", None),
    "adaptive_avg_pool2d": (lambda x: tritune.adaptive_avg_pool2d(x, 2), (IMAGE,), "avg_pool", None),
    "lstm": (lambda x, w, v: tritune.lstm(x, w, v)[0], ((5, 2, 8), (64, 8), (64, 16)), "rnn", "default"),
    "attention": (tritune.scaled_dot_product_attention, (ROWS,) * 3, "attention", "ieee"),
    "cosine": (lambda q, k, v: tritune.attention(q, k, v, score="cosine"), (ROWS,) * 3, "attention", "ieee"),
}


class Called(torch.nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.fn(*tensors)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestTracedForAGpu:
    """What is asked of CUDA tensors alone, torch's settings for one, can be traced."""

    def traced(self, fn: Any, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Any:
        with FakeTensorMode():
            tensors = tuple(torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes)
        graph = torch.export.export(Called(fn), tensors, strict=True).graph
        return {str(node.target): node for node in graph.nodes if node.op == "call_function"}

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("backend", ["triton", "auto"])
    @pytest.mark.parametrize("name", ON_A_GPU)
    def test_one_graph(self, name, backend, dtype, autocast):
        pytest.importorskip("triton")
        fn, shapes, operator, precision = ON_A_GPU[name]
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", autocast)
        try:
            with tritune.use_backend(backend):
                nodes = self.traced(fn, shapes, dtype)
        finally:
            torch.set_autocast_enabled("cuda", before)
        ours = nodes.get(f"tritune.{operator}.default")
        assert (ours is not None) == (backend == "triton")
        if ours is not None and precision:
            assert {"default", "ieee", "tf32"} & {arg for arg in ours.args if isinstance(arg, str)} == {precision}

    @pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "conv2d_max_pool2d", "lstm", "attention"])
    def test_a_callers_precision_stays(self, name):
        pytest.importorskip("triton")
        _, shapes, operator, _ = ON_A_GPU[name]

        def fn(*tensors: torch.Tensor) -> torch.Tensor:
            y = getattr(tritune, name)(*tensors, precision="tf32x3")
            return y[0] if name == "lstm" else y

        with tritune.use_backend("triton"):
            assert "tf32x3" in self.traced(fn, shapes, torch.float32)[f"tritune.{operator}.default"].args

    def test_the_setting_for_products_is_followed(self):
        pytest.importorskip("triton")
        torch.set_float32_matmul_precision("high")
        try:
            with tritune.use_backend("triton"):
                nodes = self.traced(*ON_A_GPU["attention"][:2], torch.float32)
                assert "tf32" in nodes["tritune.attention.default"].args
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_torch_compile_notices_a_change_of_the_setting_for_products(self):
        """That is why it may be read while attention is traced."""
        compiled = torch.compile(lambda x: x + (matmul_setting() == "tf32"), fullgraph=True, backend="eager")
        try:
            for setting, expected in (("highest", 0), ("high", 1), ("medium", 1), ("highest", 0)):
                torch.set_float32_matmul_precision(setting)
                assert compiled(torch.zeros(())) == expected
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.torch
class TestFake:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_cuda_tensors_without_a_gpu(self, layout):
        """Shapes, dtypes and strides of the Triton path can be had on a laptop (without gradients: recording one for
        a fake CUDA tensor ends the process in a CPU build of torch, also for torch's own operators)."""
        with FakeTensorMode(), tritune.use_backend("triton"):
            x = torch.empty(2, 8, 9, 7, device="cuda", dtype=torch.bfloat16)
            x = x.to(memory_format=layout)
            w = torch.empty(16, 8, 3, 3, device="cuda", dtype=torch.bfloat16)
            y = tritune.conv2d(x, w, padding=1, activation="silu")
            z = tritune.max_pool2d(y, 3, 2, 1)
            assert z.device.type == "cuda" and z.shape == (2, 16, 5, 4) and z.dtype == torch.bfloat16
            assert y.is_contiguous(memory_format=layout) and z.is_contiguous(memory_format=layout)
            sizes = ((5, 2, 8), (2, 64, 8), (2, 64, 16))
            out, h, c = tritune.lstm(*(torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in sizes))
            assert out.shape == (5, 2, 32) and h.shape == c.shape == (2, 2, 16) and out.device.type == "cuda"
            q, k = (torch.empty(2, n, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (9, 7))
            out, lse = tritune.attention(q, k, k, score="cosine", return_lse=True)
            assert out.shape == q.shape and out.stride() == q.stride() and out.device.type == "cuda"
            assert lse.shape == (2, 4, 9) and lse.dtype == torch.float32

    def test_meta_tensors(self):
        x, w = torch.empty(2, 8, 9, 7, device="meta"), torch.empty(16, 8, 3, 3, device="meta")
        assert tritune.conv2d(x, w, stride=2, activation="relu").shape == (2, 16, 4, 3)
        assert tritune.max_pool2d(x, 3, 2, 1).shape == (2, 8, 5, 4)
        assert tritune.nn.GRU(3, 4, device="meta")(torch.empty(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)
        q = torch.empty(2, 4, 9, 8, device="meta")
        assert tritune.attention(q, q[:, :2], q[:, :2], enable_gqa=True, is_causal=True).shape == q.shape
        call = ([5, 4], [3, 3], [2, 2], [1, 1], [1, 1], "auto")
        _, offsets = torch.ops.tritune.max_pool_with_offsets(x, *call)
        assert offsets.dtype == torch.uint8
