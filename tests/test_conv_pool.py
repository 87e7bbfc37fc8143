"""conv2d_max_pool2d on every backend: values, layouts, what counts in a maximum, gradients, errors, the choice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    Allocations,
    Case,
    Errors,
    assert_as_exact,
    assert_close,
    backend_of,
    check,
    few_dots,
    in_turn,
    poisoned,
    product,
)
from test_conv import reference
from torch import Tensor
from torch.library import opcheck

import tritune

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_backend = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
kernels_only = [pytest.mark.interpret, pytest.mark.gpu]
STEM: dict[str, Any] = {"stride": 2, "padding": 3, "pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}


def pooled_reference(
    *args: Any, activation: str | None = "relu", pool_kernel_size: Any = 2, pool_stride: Any = None,
    pool_padding: Any = 0, **kwargs: Any,
) -> Tensor:  # fmt: skip
    z = reference(*args, activation=activation, **kwargs)
    return F.max_pool2d(z, pool_kernel_size, pool_stride, pool_padding)


def case(id: str, x: tuple[int, ...], w: tuple[int, ...], *extra: str, **kwargs: Any) -> Case:
    """``extra`` names further tensor arguments: bias, scale."""
    shapes = {"input": x, "weight": w, **dict.fromkeys(extra, (w[0],))}
    return Case(id, tritune.conv2d_max_pool2d, pooled_reference, shapes, kwargs)


CASES = [
    case("stem", (2, 3, 18, 15), (12, 3, 7, 7), "bias", **STEM),
    case("vgg", (2, 16, 8, 10), (24, 16, 3, 3), "bias", padding=1),
    case("alexnet", (1, 3, 31, 35), (16, 3, 11, 11), "bias", stride=4, padding=2, pool_kernel_size=3, pool_stride=2),
    case("lenet", (2, 1, 14, 12), (6, 1, 5, 5), "bias", activation="tanh"),
    case("odd-channels", (1, 5, 9, 8), (7, 5, 3, 3), pool_kernel_size=2),
    case("scale", (2, 24, 7, 9), (40, 24, 3, 3), "bias", "scale", padding=1, activation="silu", pool_kernel_size=3,
         pool_stride=2, pool_padding=1),
    case("no-activation", (1, 8, 9, 7), (16, 8, 3, 2), activation=None, pool_kernel_size=(3, 2), pool_stride=(2, 1),
         pool_padding=(1, 0)),
    case("rectangular", (2, 8, 12, 11), (12, 8, 3, 2), "bias", stride=(2, 1), padding=(2, 1), dilation=(1, 2),
         pool_kernel_size=(2, 5), pool_stride=(1, 3), pool_padding=(0, 2)),
    case("windows-by-one", (1, 16, 8, 7), (8, 16, 1, 1), pool_kernel_size=4, pool_stride=1, pool_padding=2),
    case("stride-beyond-window", (1, 16, 12, 11), (8, 16, 3, 3), pool_kernel_size=2, pool_stride=3, pool_padding=1),
    case("whole-plane", (2, 8, 6, 5), (8, 8, 3, 3), padding=1, pool_kernel_size=(6, 5)),
    case("windows-of-one", (1, 8, 5, 6), (8, 8, 3, 3), pool_kernel_size=1),
    case("groups", (2, 20, 8, 7), (30, 4, 3, 3), "bias", padding=1, groups=5),
    case("depthwise", (2, 10, 8, 7), (10, 1, 3, 3), "bias", padding=1, groups=10),
    case("same-even-kernel", (1, 8, 7, 6), (8, 8, 2, 4), "bias", padding="same"),
    case("unbatched", (8, 9, 7), (8, 8, 3, 3), "bias", padding=1),
]  # fmt: skip
COMPAT = ("stem", "vgg", "scale")


def check_forward(case: Case, dtype: torch.dtype, layout: str, device: str, backend: str) -> Tensor:
    """As :func:`harness.check`, without gradients: with them it is not this kernel that runs."""

    def draw() -> tuple[dict[str, Tensor], Tensor, Tensor]:
        inputs = case.inputs(dtype, layout, device)
        exact = case.reference(**{name: t.double().cpu() for name, t in inputs.items()}, **case.kwargs)
        return inputs, exact, case.reference(**inputs, **case.kwargs)

    def others() -> Any:
        for _ in range(3):
            _, exact, torchs = draw()
            yield Errors.of(torchs, exact)

    inputs, exact, torchs = draw()
    with tritune.use_backend(backend), poisoned(), few_dots(), torch.no_grad():
        ours = case.op(**inputs, **case.kwargs)
        assert_close("output", ours, exact, torchs, others())
        assert ours.stride() == torchs.stride(), "output layout differs from torch's"
        if device == "cuda":
            assert torch.equal(ours, case.op(**inputs, **case.kwargs)), "differs between two runs"
    return ours


def named(id: str) -> Case:
    (one,) = (case for case in CASES if case.id == id)
    return one


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
class TestCases:
    pytestmark = every_backend

    @pytest.mark.parametrize("case, dtype, layout", product(CASES, DTYPES, ("nchw", "nhwc"), compat=COMPAT))
    def test_forward(self, case, dtype, layout, device, tier):
        check_forward(case, dtype, layout, device, backend_of(tier))

    @pytest.mark.parametrize("id", ["stem", "vgg"])
    def test_strided_views(self, id, device, tier):
        check_forward(named(id), torch.float32, "strided", device, backend_of(tier))

    @pytest.mark.parametrize("id", ["vgg", "scale", "windows-of-one"])
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_gradients_are_those_of_the_two_operators(self, id, layout, device, tier):
        check(named(id), torch.float32, layout, device, backend_of(tier))

    def test_empty_batch(self, device, tier):
        x, w = torch.randn(0, 3, 20, 20, device=device), torch.randn(8, 3, 7, 7, device=device)
        with tritune.use_backend(backend_of(tier)):
            assert tritune.conv2d_max_pool2d(x, w, **STEM).shape == (0, 8, 5, 5)

    def test_autocast(self, device, tier):
        x, w = torch.randn(1, 16, 6, 6, device=device), torch.randn(8, 16, 3, 3, device=device)
        with tritune.use_backend(backend_of(tier)), torch.autocast(device, torch.bfloat16):
            y = tritune.conv2d_max_pool2d(x, w)
        assert y.dtype == torch.bfloat16
        assert_as_exact(y, pooled_reference, x.bfloat16(), w.bfloat16())


class TestMaximum:
    """What takes part in a maximum, and when."""

    # The interpreter's numpy tells where an infinity meets a masked weight.
    pytestmark = [*every_backend, pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")]

    def pixels(self, values: list[float], device: str, tier: str, **kwargs: Any) -> list[float]:
        """The pooling of a row of ``values``, which the convolution leaves alone."""
        x = torch.tensor(values, device=device).view(1, 1, 1, -1)
        with tritune.use_backend(backend_of(tier)), poisoned():
            y = tritune.conv2d_max_pool2d(x, torch.ones(1, 1, 1, 1, device=device), **kwargs)
        return y.flatten().tolist()

    def test_padding_is_not_zero(self, device, tier):
        row = {"activation": None, "pool_kernel_size": (1, 3), "pool_stride": (1, 2), "pool_padding": (0, 1)}
        assert self.pixels([-3.0, -2.0, -5.0, -4.0], device, tier, **row) == [-2, -2]

    def test_nan_wins(self, device, tier):
        row = {"activation": None, "pool_kernel_size": (1, 3), "pool_stride": (1, 2)}
        values = [1.0, float("nan"), 2.0, float("inf"), 4.0, float("-inf"), float("-inf")]
        first, *rest = self.pixels(values, device, tier, **row)
        assert first != first and rest == [float("inf"), 4.0]

    def test_negative_infinity_alone(self, device, tier):
        row = {"activation": None, "pool_kernel_size": (1, 2)}
        assert self.pixels([float("-inf")] * 4, device, tier, **row) == [float("-inf")] * 2

    def test_activation_comes_first(self, device, tier):
        """silu falls before it rises: of -4 and -1 the activation of the smaller is the larger."""
        y = self.pixels([-4.0, -1.0], device, tier, activation="silu", pool_kernel_size=(1, 2))
        assert_as_exact(torch.tensor(y), F.silu, torch.tensor([-4.0]))

    def test_infinities_behind_a_window_stay_there(self, device, tier):
        """The rows of a narrow image's windows are read with what lies behind them."""
        x = torch.randn(1, 3, 17, 30, device=device)
        x[..., 8::9], x[0, :, 5, 20] = float("inf"), float("nan")
        w = torch.randn(8, 3, 7, 7, device=device)
        with tritune.use_backend(backend_of(tier)):
            y = tritune.conv2d_max_pool2d(x, w, **STEM, activation=None)
        assert_as_exact(y, partial(pooled_reference, **STEM, activation=None), x, w)


class TestBranches:
    pytestmark = kernels_only

    @pytest.mark.parametrize("lane", [(1, 1), (2, 1), (4, 2), (1, 2), (8, 2)], ids=str)
    @pytest.mark.parametrize(
        "window", [{}, {"pool_kernel_size": 5, "pool_stride": 3, "pool_padding": 2}], ids=["3x3", "5x5"]
    )
    def test_lanes_of_overlapping_windows(self, lane, window, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels.conv_pool import CONV_MAX_POOL

        tile = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
        one = case("lanes", (2, 3, 21, 31), (12, 3, 5, 7), "bias", **{**STEM, **window}, activation="silu")
        with override(CONV_MAX_POOL, Config(TALL=lane[0], WIDE=lane[1], **tile)):
            check_forward(one, torch.float16, "nhwc", device, "triton")

    @pytest.mark.parametrize("tile", [(64, 32, 64), (32, 16, 16), (16, 64, 32)], ids=str)
    @pytest.mark.parametrize("channels", [64, 24])  # a reduction tile inside one tap; one that spans taps
    def test_tiles(self, tile, channels, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels.conv_pool import CONV_MAX_POOL

        m, n, k = tile
        config = Config(TALL=1, WIDE=1, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=4, num_stages=2)
        one = case("tiles", (1, channels, 7, 6), (40, channels, 3, 3), "bias", padding=1)
        with override(CONV_MAX_POOL, config):
            check_forward(one, torch.bfloat16, "nhwc", device, "triton")

    def test_lanes_serve_only_windows_that_overlap(self):
        from tritune.autotune.device import TARGETS, named
        from tritune.kernels import conv_pool
        from tritune.perf.conv_pool import LAYERS, problem_of

        problem = problem_of(LAYERS["resnet50-stem-pool"], "bf16")
        for (r, stride), (tall, wide) in {
            (2, 2): (False, False), (3, 2): (True, True), (4, 2): (True, True), (5, 2): (False, True),
            (3, 1): (False, True), (2, 3): (False, False),
        }.items():  # fmt: skip
            window = problem.window._replace(r=r, s=r, stride_h=stride, stride_w=stride)
            one = problem._replace(window=window)
            for target in TARGETS:
                taken = [c for c in conv_pool.CONFIGS if conv_pool._accepts(one, c, named(target))]
                assert {c.TALL > 1 for c in taken} == {False, tall}
                assert {c.WIDE > 1 for c in taken} == {False, wide}

    def test_memory(self, device):
        """Beside the result nothing in channels last: the convolution's output is nowhere."""
        x = torch.randn(1, 16, 12, 12, device=device).to(memory_format=torch.channels_last)
        w = torch.randn(16, 16, 3, 3, device=device).to(memory_format=torch.channels_last)
        with tritune.use_backend("triton"), torch.no_grad(), Allocations() as allocated:
            y = tritune.conv2d_max_pool2d(x, w)
        assert allocated.bytes <= y.untyped_storage().nbytes() + 4  # what passes for the convolution's output


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestOperator:
    # opcheck's fake tensors look for the gradient of what lies between the two operators.
    @pytest.mark.filterwarnings("ignore:The .grad attribute")
    @pytest.mark.parametrize("needs_grad", [False, True])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_opcheck(self, layout, needs_grad):
        x = torch.randn(2, 3, 14, 13).to(memory_format=layout).requires_grad_(needs_grad)
        w = torch.randn(8, 3, 3, 3, requires_grad=needs_grad)
        b, s = (torch.randn(8, requires_grad=needs_grad) for _ in range(2))
        geometry = ([12, 11], [1, 1], [0, 0], [1, 1], 1)
        call = (x, w, b, s, *geometry, "silu", "ieee", [3, 3], [2, 2], [1, 1], "auto")
        opcheck(torch.ops.tritune.conv2d_max_pool2d.default, call)

    def test_gradcheck(self):
        x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 7, 6), (3, 2, 3, 3), (3,)))
        call = ([5, 4], [1, 1], [0, 0], [1, 1], 1, "tanh", "ieee", [2, 2], [2, 2], [0, 0], "auto")
        op = torch.ops.tritune.conv2d_max_pool2d
        assert torch.autograd.gradcheck(lambda *args: op(*args, None, *call), (x, w, b))
        assert torch.autograd.gradgradcheck(lambda *args: op(*args, None, *call), (x, w, b))

    def test_vmap_and_derivatives_of_func(self):
        x, w = torch.randn(2, 1, 3, 8, 8), torch.randn(4, 3, 3, 3)
        wanted = torch.stack([pooled_reference(one, w) for one in x])
        torch.testing.assert_close(torch.func.vmap(lambda one: tritune.conv2d_max_pool2d(one, w))(x), wanted)
        tangent = torch.randn_like(w)
        _, ours = torch.func.jvp(lambda w: tritune.conv2d_max_pool2d(x[0], w), (w,), (tangent,))
        _, theirs = torch.func.jvp(lambda w: pooled_reference(x[0], w), (w,), (tangent,))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
class TestCompile:
    pytestmark = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]

    @pytest.mark.parametrize("dynamic, needs_grad", in_turn([False, True], [False, True]))
    def test_one_graph(self, dynamic, needs_grad, device, tier):
        seen: set[str] = set()

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            seen.update(str(node.target) for node in graph.graph.nodes)
            return graph

        w = torch.randn(8, 3, 7, 7, device=device, requires_grad=needs_grad)
        compiled = torch.compile(
            lambda x: tritune.conv2d_max_pool2d(x, w, **STEM), fullgraph=True, dynamic=dynamic, backend=backend
        )
        with tritune.use_backend(backend_of(tier)):
            for size in (18, 22):
                x = torch.randn(2, 3, size, size, device=device)
                torch.testing.assert_close(compiled(x), tritune.conv2d_max_pool2d(x, w, **STEM))
        assert ("tritune.conv2d_max_pool2d.default" in seen) == (tier != "torch" and not needs_grad)


@pytest.mark.torch
class TestErrors:
    """Both validators speak, the convolution's first, for all backends alike."""

    @pytest.mark.parametrize(
        "change, error, text",
        [
            ({"padding": -1}, RuntimeError, "negative padding is not supported"),
            ({"groups": 2}, RuntimeError, "expected weight to be|Given groups=2"),
            ({"activation": "swish"}, ValueError, "activation"),
            ({"scale": torch.ones(3)}, RuntimeError, "scale"),
            ({"precision": "fp8"}, ValueError, "precision"),
            ({"pool_kernel_size": 0, "pool_padding": 0}, RuntimeError, "kernel size should be greater than zero"),
            ({"pool_kernel_size": "3"}, TypeError, "kernel_size"),
            ({"pool_stride": 0}, RuntimeError, "stride should not be zero"),
            ({"pool_padding": 2}, RuntimeError, "pad should be at most half"),
            ({"pool_kernel_size": 99}, RuntimeError, r"input size: \(8x10x10\).*too small"),
            ({"padding": -1, "pool_stride": 0}, RuntimeError, "negative padding"),
        ],
    )
    @pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
    def test_both_validators(self, backend, change, error, text):
        x, w = torch.randn(2, 3, 20, 20), torch.randn(8, 3, 7, 7)
        with tritune.use_backend(backend), pytest.raises(error, match=text):
            tritune.conv2d_max_pool2d(x, w, **{**STEM, **change})

    def test_no_input_channels(self):
        with pytest.raises(RuntimeError, match="Expected 3D or 4D"):
            tritune.conv2d_max_pool2d(torch.randn(2, 0, 5, 5), torch.randn(4, 0, 3, 3))

    def test_integers_are_torchs(self):
        x, w = torch.randint(5, (1, 2, 6, 6)), torch.randint(5, (2, 2, 3, 3))
        assert torch.equal(tritune.conv2d_max_pool2d(x, w), pooled_reference(x, w))

    def test_what_no_kernel_covers(self):
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match=r"conv2d_max_pool2d: .*CPU"):
            tritune.conv2d_max_pool2d(torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3))


@pytest.mark.torch
class TestChoice:
    """On an H200 that is not here."""

    @pytest.fixture(autouse=True)
    def h200(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITUNE_DEVICE", "h200")

    def decide(self, x: tuple[int, ...], w: tuple[int, ...], layout: torch.memory_format, **kwargs: Any) -> list[Any]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        from tritune.ops import record

        with FakeTensorMode(), record() as decisions, torch.no_grad():
            image, weight = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in (x, w))
            image, weight = (t.to(memory_format=layout) for t in (image, weight))
            try:
                tritune.conv2d_max_pool2d(image, weight, **kwargs)
            except RuntimeError:  # a CPU build of torch cannot index GPU tensors, not even fake ones
                assert decisions
        return decisions

    def test_where_it_cannot_lose(self):
        small = ((32, 16, 224, 224), (16, 16, 3, 3))
        (taken,) = self.decide(*small, torch.channels_last, padding=1)
        assert taken.backend == "triton" and "1.00 times the products" in taken.because
        first, *rest = self.decide(*small, torch.contiguous_format, padding=1)
        assert first.backend == "torch" and "not measured" in first.because
        assert [one.op for one in rest] in (["conv2d", "max_pool2d"], ["conv2d"])

    @pytest.mark.parametrize("channels", [3, 64])
    def test_where_it_might(self, channels):
        """A re-laid image, and products that would have to be as fast as torch's."""
        decisions = self.decide((32, channels, 224, 224), (64, channels, 3, 3), torch.channels_last, padding=1)
        assert decisions[0].backend == "torch" and "not measured" in decisions[0].because

    @pytest.mark.parametrize("ours, theirs", [(10.0, 20.0), (20.0, 10.0)])
    def test_measurements_decide(self, ours, theirs, tmp_path, monkeypatch):
        from tritune.autotune import resolve, store
        from tritune.kernels.conv_pool import CONV_MAX_POOL
        from tritune.perf.conv_pool import LAYERS, problem_of

        monkeypatch.setenv("TRITUNE_CONFIG_PATH", str(tmp_path))
        layer = LAYERS["resnet50-stem-pool"]
        features = CONV_MAX_POOL.features(problem_of(layer, "bf16"))
        entry = store.Entry(features, CONV_MAX_POOL.configs[-1], "measured", us=ours, torch_us=theirs)
        store.write(tmp_path / "nvidia_h200" / "conv_max_pool.json", "conv_max_pool", [entry])
        resolve.clear_memo()
        (first, *_) = self.decide(layer.conv.input, layer.conv.weight, torch.channels_last, **STEM)
        assert first.backend == ("triton" if ours < theirs else "torch")
        assert "measured: " in first.because

    def test_explain_of_a_fused_call(self, capsys):
        from tritune import cli

        window = ["--kernel", "3", "--pool-stride", "2", "--pool-padding", "1"]
        call = ["32x3x224x224", "64x3x7x7", "--stride", "2", "--padding", "3", *window]
        assert cli.main(["explain", "conv2d_max_pool2d", *call, "--device", "h200", "--backend", "triton"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("conv2d_max_pool2d: triton") and "conv_max_pool: BLOCK_K=" in text


@pytest.mark.gpu
class TestLarge:
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_layers(self, layout, device):
        check_forward(case("r50", (32, 3, 224, 224), (64, 3, 7, 7), "bias", **STEM), torch.bfloat16, layout, device,
                      "triton")  # fmt: skip
        one = case("vgg", (4, 64, 224, 224), (64, 64, 3, 3), "bias", padding=1)
        check_forward(one, torch.bfloat16, layout, device, "triton")

    def test_offsets_beyond_2_31(self, device):
        x = torch.zeros(3, 64, 4096, 4096, device=device, dtype=torch.float16).to(memory_format=torch.channels_last)
        x[2, :, -2:, -2:] = torch.rand(64, 2, 2, device=device, dtype=torch.float16)
        w = torch.eye(64, device=device, dtype=torch.float16).view(64, 64, 1, 1)
        with tritune.use_backend("triton"):
            y = tritune.conv2d_max_pool2d(x, w)
        assert torch.equal(y[2, :, -1, -1], x[2, :, -2:, -2:].amax((-2, -1)))


@pytest.mark.static
class TestCompiled:
    def test_changing_sizes_compile_once(self):
        from tritune.kernels import conv, conv_pool

        binaries = set()
        geometry = conv.Geometry.of((1, 1), (1, 1), (1, 1), 1)
        for n, h, w in ((1, 2, 2), (2, 7, 9), (16, 32, 48), (1, 16, 2), (3, 2, 17), (64, 64, 64)):
            one = conv.problem_of((n, 24, h, w), (32, 24, 3, 3), (h, w), geometry, torch.bfloat16, "16", True)
            problem = conv_pool.conv_pool_problem(
                one, conv_pool.PoolWindow(3, 3, 2, 2, 1, 1), ((h + 1) // 2, (w + 1) // 2)
            )
            (launch,) = conv_pool.CONV_MAX_POOL.launches(problem, conv_pool.CONFIGS[0])
            source = launch.source()
            key = (source.signature, source.constants, source.attrs)
            binaries.add(repr([sorted(part.items()) for part in key]))
        assert len(binaries) == 1

    @pytest.mark.compat
    def test_the_stems_image_is_cached_and_multiplied_from_shared_memory(self):
        """Copies of 8 bytes, which go through the L1 cache; no thread holds what was copied."""
        from tritune.autotune.device import named
        from tritune.autotune.resolve import resolve
        from tritune.kernels.conv_pool import CONV_MAX_POOL
        from tritune.perf.conv_pool import LAYERS, problem_of

        problem = problem_of(LAYERS["resnet50-stem-pool"], "bf16")
        config = resolve(CONV_MAX_POOL, problem, named("sm_90")).config
        (launch,) = CONV_MAX_POOL.launches(problem, config)
        compiled = launch.compile("sm_90").asm
        products = [line for line in compiled["ttgir"].splitlines() if "warp_group_dot " in line]
        assert products and all("#ttg.dot_op" not in line for line in products)
        assert "cp.async.ca.shared.global" in compiled["ptx"]
