"""conv2d on every backend: values, gradients, layouts, epilogues, edge cases."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    Allocations,
    Case,
    assert_as_exact,
    assert_close,
    backend_of,
    check,
    lay_out,
    poisoned,
    product,
    recorded_precisions,
)
from torch import Tensor

import tritune

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {
    "relu": torch.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip

every_backend = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
kernels_only = [pytest.mark.interpret, pytest.mark.gpu]


@functools.cache
def reference_of(op: str) -> Callable[..., Tensor]:
    """The operator by torch's, every step on its own."""
    function = getattr(F, op)

    def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        activation, residual, scale = (kwargs.pop(name, None) for name in ("activation", "residual", "scale"))
        per_channel = (-1, *(1 for _ in weight.shape[2:]))
        z = function(input, weight, None if scale is not None else bias, *args, **kwargs)
        if scale is not None:
            z = z * scale.view(per_channel)
            z = z if bias is None else z + bias.view(per_channel)
        if residual is not None:
            z = z + residual
        return z if activation is None else ACTIVATIONS[activation](z)

    return reference


reference = reference_of("conv2d")


def case(id: str, x: tuple[int, ...], w: tuple[int, ...], *extra: str, op: str = "conv2d", **kwargs: Any) -> Case:
    """``extra`` names further tensor arguments: bias, scale, residual."""
    shapes = {"input": x, "weight": w}
    geometry = {name: value for name, value in kwargs.items() if name not in ("activation", "precision")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that padding="same" may copy
        y = getattr(F, op)(torch.empty(x, device="meta"), torch.empty(w, device="meta"), **geometry).shape
    channels = y[1 - len(w)]
    shapes |= {name: tuple(y) if name == "residual" else (channels,) for name in extra}
    return Case(id, getattr(tritune, op), reference_of(op), shapes, kwargs)


# Sizes do not divide the blocks. One case per path: dense, parity classes, small channels, groups, depthwise.
CASES = [
    case("3x3", (2, 16, 9, 7), (24, 16, 3, 3), "bias", padding=1),
    case("3x3-wide", (1, 80, 6, 5), (72, 80, 3, 3), padding=1),
    case("1x1", (2, 40, 7, 5), (24, 40, 1, 1), "bias"),
    case("1x1-stride2", (1, 32, 9, 9), (16, 32, 1, 1), stride=2),
    case("stem-7x7-stride2", (1, 3, 17, 15), (16, 3, 7, 7), "bias", stride=2, padding=3),
    case("patch-4x4-stride4", (1, 3, 16, 12), (24, 3, 4, 4), "bias", stride=4),
    case("narrow-3x3", (1, 3, 9, 10), (16, 3, 3, 3), "bias", padding=1),
    case("narrow-window-in-the-padding", (1, 2, 3, 2), (8, 2, 2, 2), stride=3, padding=5),
    case("narrow-dilated", (1, 3, 9, 10), (16, 3, 3, 3), padding=2, dilation=2),
    case("narrow-1d", (2, 1, 40), (16, 1, 10), "bias", op="conv1d", stride=5),
    case("narrow-3d", (1, 3, 4, 6, 7), (8, 3, 2, 3, 3), op="conv3d", stride=(1, 2, 2), padding=1),
    case("channels-5", (2, 5, 8, 8), (7, 5, 3, 3), padding=1),
    case("rectangular", (2, 8, 10, 9), (12, 8, 3, 2), "bias", stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
    case("stride-and-dilation-share-a-factor", (1, 16, 13, 12), (16, 16, 3, 3), stride=(4, 2), padding=1, dilation=2),
    case("stride-beyond-window", (1, 16, 11, 10), (8, 16, 2, 1), stride=3),
    case("groups", (2, 20, 8, 7), (30, 4, 3, 3), "bias", padding=1, groups=5),
    case("groups-of-16", (1, 32, 7, 7), (32, 16, 3, 3), padding=1, groups=2),
    case("same-even-kernel", (1, 8, 7, 6), (8, 8, 2, 4), "bias", padding="same"),
    case("valid", (1, 8, 7, 6), (8, 8, 3, 3), padding="valid"),
    case("one-pixel", (3, 16, 1, 1), (16, 16, 3, 3), "bias", padding=1),
    case("one-channel", (2, 1, 9, 9), (1, 1, 3, 3), "bias", padding=1),
    case("depthwise", (2, 10, 6, 7), (10, 1, 3, 3), "bias", padding=1, groups=10),
    case("depthwise-multiplier", (1, 4, 10, 9), (8, 1, 5, 3), stride=2, padding=(2, 1), dilation=(1, 2), groups=4),
    case("unbatched", (8, 9, 7), (8, 8, 3, 3), "bias", "residual", padding=1, activation="relu"),
    case("epilogue", (2, 16, 7, 6), (24, 16, 3, 3), "bias", "scale", "residual", padding=1, activation="relu"),
    case("epilogue-saves-input", (2, 16, 7, 6), (24, 16, 1, 1), "bias", "scale", "residual", activation="silu"),
    case("epilogue-depthwise", (2, 8, 5, 6), (8, 1, 3, 3), "bias", "scale", "residual", padding=1, groups=8,
         activation="silu"),
    # One dimension, three, and the transposes.
    case("1d", (2, 16, 19), (24, 16, 3), "bias", op="conv1d", stride=2, padding=1),
    case("1d-causal-depthwise", (2, 8, 18), (8, 1, 4), "bias", op="conv1d", padding=3, groups=8, activation="silu"),
    case("1d-same-even", (1, 8, 9), (8, 8, 4), op="conv1d", padding="same", dilation=3),
    case("1d-unbatched", (8, 9), (16, 4, 3), "bias", "residual", op="conv1d", groups=2, padding=1, activation="relu"),
    case("3d", (1, 16, 3, 5, 6), (24, 16, 3, 3, 3), "bias", op="conv3d", padding=1, activation="gelu"),
    case("3d-mixed", (2, 6, 7, 5, 6), (8, 3, 2, 3, 1), "bias", "scale", "residual", op="conv3d", stride=(2, 1, 2),
         padding=(1, 2, 0), dilation=(2, 1, 1), groups=2, activation="relu"),
    case("3d-depthwise", (1, 4, 3, 5, 4), (4, 1, 2, 3, 3), op="conv3d", padding=1, groups=4),
    case("3d-same-even", (1, 4, 4, 5, 3), (4, 4, 2, 3, 2), op="conv3d", padding="same"),
    case("1d-transpose", (2, 16, 9), (16, 12, 4), "bias", op="conv_transpose1d", stride=2, padding=1),
    case("2d-transpose", (2, 16, 6, 5), (16, 24, 3, 3), "bias", op="conv_transpose2d", padding=1, activation="relu"),
    case("2d-transpose-up", (1, 32, 5, 6), (32, 16, 2, 2), "bias", op="conv_transpose2d", stride=2),
    case("2d-transpose-mixed", (1, 12, 5, 4), (12, 4, 3, 2), "bias", "scale", "residual", op="conv_transpose2d",
         stride=(3, 2), padding=(1, 0), output_padding=(2, 1), dilation=(1, 2), groups=3, activation="silu"),
    case("2d-transpose-output-padding-beyond-stride", (1, 8, 5, 4), (8, 8, 3, 3), "bias", op="conv_transpose2d",
         stride=1, output_padding=2, dilation=3),
    case("2d-transpose-depthwise", (2, 6, 6, 5), (6, 1, 3, 3), "bias", "scale", op="conv_transpose2d", stride=2,
         padding=1, output_padding=1, groups=6, activation="relu"),
    case("3d-transpose", (1, 8, 3, 4, 3), (8, 6, 3, 2, 3), "bias", op="conv_transpose3d", stride=(2, 1, 2),
         padding=1, output_padding=(1, 0, 0)),
    case("transpose-unbatched", (8, 5, 4), (8, 4, 3, 3), "residual", op="conv_transpose2d", stride=2,
         activation="tanh"),
]  # fmt: skip
# Windows that move by one pixel, 8 channels or more.
LINES = [
    case("1x1", (2, 24, 9, 11), (40, 24, 1, 1), "bias", "residual", activation="relu"),
    case("3x3", (2, 8, 2, 70), (40, 8, 3, 3), "bias", "scale", padding=1, activation="silu"),
    case("dilated-one-row", (1, 16, 5, 66), (16, 16, 3, 2), padding=(0, 3), dilation=(2, 3)),
    case("1x1-padded", (1, 16, 3, 20), (16, 16, 1, 1), padding=(1, 2)),
    case("groups", (1, 64, 3, 20), (64, 32, 2, 2), padding=1, groups=2),
    case("1d", (2, 16, 70), (24, 16, 4), "bias", op="conv1d", padding=3),
    case("3d", (2, 8, 2, 3, 20), (16, 8, 2, 2, 2), "residual", op="conv3d", padding=(1, 0, 2), dilation=(2, 1, 1)),
    case("2d-transpose", (2, 24, 4, 30), (24, 16, 3, 2), "bias", "scale", op="conv_transpose2d", padding=(1, 0),
         activation="relu"),
    case("1x1-transpose", (2, 24, 4, 30), (24, 16, 1, 1), op="conv_transpose2d"),
    case("1x1-transpose-beyond-the-last-window", (2, 8, 3, 10), (8, 16, 1, 1), op="conv_transpose2d", dilation=2,
         output_padding=1),
]  # fmt: skip
# One case per kernel: these run on other versions of Triton too.
COMPAT = ("3x3", "depthwise", "epilogue", "3d-mixed", "2d-transpose-mixed")

STRIDED = ("3x3", "groups", "depthwise", "1d", "3d-mixed", "2d-transpose-mixed", "2d-transpose-depthwise")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
class TestCases:
    pytestmark = every_backend

    @pytest.mark.parametrize("case, dtype, layout", product(CASES, DTYPES, ("nchw", "nhwc"), compat=COMPAT))
    def test_forward_and_gradients(self, case, dtype, layout, device, tier):
        check(case, dtype, layout, device, backend_of(tier))

    @pytest.mark.parametrize("case", [one for one in CASES if one.id in STRIDED], ids=lambda case: case.id)
    def test_strided_views_are_read_in_place(self, case, device, tier):
        check(case, torch.float32, "strided", device, backend_of(tier))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation, device, tier):
        one = case(activation, (2, 16, 5, 3), (16, 16, 1, 1), "bias", activation=activation)
        check(one, torch.float32, "nhwc", device, backend_of(tier))

    @pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_derivative_at_the_kinks_is_torchs(self, activation, dtype, device, tier):
        # An identity convolution, so the activation sees these values exactly: where the derivative jumps, no
        # tolerance could compare results that were rounded to either side.
        kinks = torch.tensor([-6.0, -3.0, -0.0, 0.0, 3.0, 6.0], dtype=torch.float64)
        x = torch.cat([kinks, kinks - 0.0625, kinks + 0.0625]).to(dtype).to(device).view(1, 1, 3, 6)
        if activation == "hardswish" and not torch.__version__.startswith("2.13"):
            x[x.abs() == 3.0] = 6.0  # there older versions of torch differ from the yardstick
        x = x.expand(1, 16, 3, 6).contiguous()
        weight = torch.eye(16, dtype=dtype, device=device).view(16, 16, 1, 1)
        wanted = x.clone().requires_grad_()
        ACTIVATIONS[activation](wanted).sum().backward()
        with tritune.use_backend(backend_of(tier)):
            x.requires_grad_()
            tritune.conv2d(x, weight, activation=activation).sum().backward()
        # Its x / 3 + 1/2 is the one derivative that a compiler may round once or twice.
        rtol = 2 * torch.finfo(dtype).eps if activation == "hardswish" else 0
        torch.testing.assert_close(x.grad, wanted.grad, rtol=rtol, atol=0)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("create_graph", [False, True])
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in which the interpreter computes
    def test_gradient_at_infinities_and_nan_is_torchs(self, activation, create_graph, device, tier):
        # Pairs of an input and an output gradient, 352 in all, which fill vectors of 32: for elements that fill none
        # torch's own kernels decide otherwise at NaN (relu6, hardswish).
        inf, nan = float("inf"), float("nan")
        inputs = torch.tensor([nan, inf, -inf, 100.0, -100.0, 3.0, -3.0, 1.0, -1.0, 0.0, 6.0])
        grads = torch.tensor([1.0, inf, -inf, nan])
        x = inputs.view(1, 1, -1, 1).expand(8, 1, -1, 4).contiguous()
        g = grads.expand(x.shape).contiguous()
        x_there, g_there = x.to(device).requires_grad_(), g.to(device)
        x.requires_grad_()
        (wanted,) = torch.autograd.grad(ACTIVATIONS[activation](x), x, g)
        with tritune.use_backend(backend_of(tier)):
            y = tritune.conv2d(x_there, torch.ones(1, 1, 1, 1, device=device), activation=activation)
            (grad,) = torch.autograd.grad(y, x_there, g_there, create_graph=create_graph)
        torch.testing.assert_close(grad.cpu(), wanted, equal_nan=True)


class TestBranches:
    """Paths that only a certain config, option or layout takes."""

    pytestmark = kernels_only

    @pytest.mark.parametrize("splits", [2, 3])
    @pytest.mark.parametrize("id", ["3x3-wide", "groups", "epilogue-saves-input", "3d-mixed", "2d-transpose-mixed"])
    def test_split_reduction(self, id, splits, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import conv

        tile = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
        (one,) = (case for case in CASES if case.id == id)
        with (
            override(conv.FORWARD, Config(**tile, GROUP_M=2, SPLIT_K=splits, SWAP=0)),
            override(conv.TRANSPOSE, Config(**tile, GROUP_M=2, SPLIT_K=splits)),
            override(conv.WEIGHT_GRAD, Config(**tile, SPLIT_K=splits)),
            override(conv.EPILOGUE_GRAD, Config(BLOCK_M=16, BLOCK_N=16, SPLIT_M=splits, num_warps=4, num_stages=2)),
        ):
            for layout in ("nhwc", "nchw"):
                check(one, torch.float32, layout, device, "triton")

    @pytest.mark.parametrize("swap", [0, 1])
    @pytest.mark.parametrize("tile", [(32, 16, 16), (64, 32, 32), (16, 64, 64)], ids=str)
    def test_tiles(self, tile, swap, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import conv

        m, n, k = tile
        config = Config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=3, SPLIT_K=1, SWAP=swap, num_warps=4, num_stages=2)
        weight_config = Config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, SPLIT_K=1, num_warps=4, num_stages=2)
        grad_config = Config(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=3, SPLIT_K=1, num_warps=4, num_stages=2)
        with (
            override(conv.FORWARD, config),
            override(conv.TRANSPOSE, grad_config),
            override(conv.WEIGHT_GRAD, weight_config),
        ):
            # 64 channels: a reduction tile inside one tap; 24: one that spans taps.
            for channels in (64, 24):
                one = case("tiles", (1, channels, 7, 6), (40, channels, 3, 3), "bias", padding=1)
                check(one, torch.bfloat16, "nhwc", device, "triton")

    @pytest.mark.parametrize(
        "one, layout", [*((one, "nhwc") for one in LINES), *((one, "nchw") for one in LINES if "x" in one.id)],
        ids=lambda value: getattr(value, "id", value),
    )  # fmt: skip
    def test_lines(self, one, layout, device, monkeypatch):
        """Boxes that a tensor memory accelerator copies, forward and in the gradient of the input."""
        from tritune.kernels import conv

        launched = recorded_lines(monkeypatch)
        with lines():
            check(one, torch.float16, layout, device, "triton")
        assert {launch.constants["TURNED"] for launch in launched} == {False, True}
        assert all(launch.kernel is conv.conv_lines_kernel for launch in launched)

    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("image", [(4, 6), (2, 6), (3, 6), (2, 2, 6)], ids=str)  # runs of 8, 4, 2 and 8 halves
    def test_runs_of_pixels_in_nchw(self, image, splits, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import conv

        rank = len(image)
        tile = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
        ones = [
            case("conv", (3, 8, *image), (12, 8, *(3,) * rank), "bias", "residual", op=f"conv{rank}d", padding=1,
                 activation="silu"),
            case("groups", (2, 24, *image), (24, 12, *(1,) * rank), "scale", op=f"conv{rank}d", groups=2,
                 activation="relu"),
            case("transpose", (2, 8, *image), (8, 12, *(2,) * rank), "bias", op=f"conv_transpose{rank}d", stride=2),
        ]  # fmt: skip
        with (
            override(conv.FORWARD, Config(**tile, GROUP_M=2, SPLIT_K=splits, SWAP=0)),
            override(conv.TRANSPOSE, Config(**tile, GROUP_M=2, SPLIT_K=splits)),
            override(conv.EPILOGUE_GRAD, Config(BLOCK_M=32, BLOCK_N=16, SPLIT_M=2, num_warps=4, num_stages=2)),
        ):
            for one in ones:
                check(one, torch.float16, "nchw", device, "triton")

    def test_gradient_in_another_layout_than_the_result(self, device):
        """The epilogue's gradient reads each of its tensors as it lies: runs of channels, of pixels, and neither."""
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 8, 4, 6), (8, 8, 1, 1), (8,))]
        dy = torch.randn(2, 8, 4, 6)

        def gradients(function: Callable[..., Tensor], dy: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*leaves), leaves, dy)

        ours = functools.partial(tritune.conv2d, activation="silu", precision="ieee")
        theirs = functools.partial(gradients, lambda *leaves: F.silu(F.conv2d(*leaves)))
        for x_layout, layout in itertools.product(("nchw", "nhwc"), ("nchw", "nhwc", "strided")):
            x, w, b = (t.detach().to(device).requires_grad_() for t in leaves)
            x, g = lay_out(x.detach(), x_layout).requires_grad_(), lay_out(dy, layout).to(device)
            with tritune.use_backend("triton"):
                results = gradients(ours, g, x, w, b)
            assert_as_exact(results, theirs, dy, *leaves)

    @pytest.mark.parametrize("kind", ["offset", "columns", "images"])
    def test_what_is_not_packed_is_read_by_pointers(self, kind, device, monkeypatch):
        launched = recorded_lines(monkeypatch)
        x = torch.randn(3, 9, 40, 32, device=device, dtype=torch.float16)  # NHWC
        view = {
            "offset": torch.randn(2 * 8 * 33 * 16 + 1, device=device, dtype=torch.float16)[1:].view(2, 8, 33, 16),
            "columns": x[:2, :8, :33, :16],
            "images": x.view(3, 9, 40, 32)[::2, :8, :33, :16],
        }[kind].movedim(-1, 1)
        weight = torch.randn(24, 16, 1, 1, device=device, dtype=torch.float16)
        with tritune.use_backend("triton"), lines():
            y = tritune.conv2d(view, weight)
        assert launched == []
        assert_close("output", y, F.conv2d(view.double(), weight.double()).cpu(), F.conv2d(view, weight))

    @pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
    def test_precisions(self, precision, device, monkeypatch):
        asked = recorded_precisions(monkeypatch)
        if device == "cpu" or precision == "ieee":  # the interpreter always multiplies in full precision
            one = case(precision, (2, 16, 6, 5), (16, 16, 3, 3), padding=1)
            one.kwargs["precision"] = precision
            check(Case(one.id, tritune.conv2d, _ignoring_precision, one.shapes, one.kwargs),
                  torch.float32, "nhwc", device, "triton")  # fmt: skip
            assert asked == {precision}
            return
        x, w = torch.randn(4, 64, 14, 14, device=device), torch.randn(64, 64, 3, 3, device=device)
        exact = F.conv2d(x.double().cpu(), w.double().cpu(), padding=1)
        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w, padding=1, precision=precision).double().cpu()
        error = ((y - exact).abs().max() / exact.abs().max()).item()
        # Numbers, since torch has no tf32x3, and which products cuDNN makes in tf32 is its own choice.
        assert error < {"tf32": 2e-3, "tf32x3": 3e-6}[precision] and asked == {precision}

    @pytest.mark.parametrize("op", ["conv3d", "conv_transpose3d"])
    @pytest.mark.parametrize("last", ["neither", "input", "weight"])
    def test_layout_in_three_dimensions(self, op, last, device):
        layout = {True: torch.channels_last_3d, False: torch.contiguous_format}
        x = torch.randn(2, 4, 3, 4, 3, device=device).contiguous(memory_format=layout[last == "input"])
        w = torch.randn(4, 4, 2, 2, 2, device=device).contiguous(memory_format=layout[last == "weight"])
        with tritune.use_backend("triton"):
            y = getattr(tritune, op)(x, w)
        assert y.is_contiguous(memory_format=layout[last != "neither"])

    def test_gradient_with_stride_zero(self, device):
        x, w = torch.randn(2, 8, 5, 5, device=device, requires_grad=True), torch.randn(8, 8, 3, 3, device=device)
        with tritune.use_backend("triton"), poisoned():
            tritune.conv2d(x, w).sum().backward()  # the incoming gradient is one expanded element
        assert_as_exact(x.grad, lambda x, w: torch.autograd.grad(F.conv2d(x, w).sum(), x), x, w)

    def test_unneeded_gradients_are_not_computed(self, device, monkeypatch):
        from tritune.kernels import conv

        for name in ("run_transpose", "run_epilogue_grad", "run_bias_grad"):
            monkeypatch.setattr(conv, name, lambda *a, name=name, **k: pytest.fail(f"{name} ran"))
        x = torch.randn(1, 8, 5, 5, device=device).to(memory_format=torch.channels_last)
        w = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)
        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w)
            y.backward(torch.randn_like(y))
        assert w.grad is not None

    @pytest.mark.parametrize("groups, passes", [(1, "relayed, with the bias"), (8, "the bias alone")])
    def test_nchw_gradient_is_read_once(self, groups, passes, device, monkeypatch):
        """Three gradients of a dense layer need dy channels last: one pass writes it so and sums the bias gradient."""
        from tritune.kernels import conv

        plans = []
        plan = conv.plan_epilogue_grad
        monkeypatch.setattr(
            conv, "plan_epilogue_grad", lambda problem, *a: plans.append(problem) or plan(problem, *a)
        )  # fmt: skip
        monkeypatch.setattr(conv, "channels_last", lambda t: t if t.stride(1) == 1 else pytest.fail("copied by torch"))
        x = torch.randn(2, 8, 5, 5, device=device, requires_grad=True)
        w = torch.randn(8, 8 // groups, 3, 3, device=device, requires_grad=True)
        b = torch.randn(8, device=device, requires_grad=True)
        with tritune.use_backend("triton"):
            x_last = x.to(memory_format=torch.channels_last) if groups == 1 else x
            y = tritune.conv2d(x_last, w, b, groups=groups)
            y.backward(torch.randn(y.shape, device=device))
        assert [(p.writes_g, p.has_bias) for p in plans] == [(passes.startswith("relayed"), True)]

    def test_depthwise_gradient_keeps_its_layout(self, device):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 8, 5, 5, device=device).to(memory_format=layout).requires_grad_()
            seen = []
            with tritune.use_backend("triton"):
                residual = torch.randn(2, 8, 3, 3, device=device).to(memory_format=layout).requires_grad_()
                y = tritune.conv2d(
                    x, torch.randn(8, 1, 3, 3, device=device), groups=8, residual=residual, activation="silu"
                )  # fmt: skip
                residual.register_hook(seen.append)  # the residual's gradient is the one that the kernels pass on
                y.sum().backward()
            assert seen[0].is_contiguous(memory_format=layout) and x.grad.is_contiguous(memory_format=layout)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    def test_nan_and_infinity_propagate_as_in_torch(self, device):
        x = torch.randn(1, 4, 6, 6, device=device)
        x[0, 0, 1, 1], x[0, 1, 4, 4] = float("nan"), float("inf")
        w = torch.randn(4, 4, 3, 3, device=device)
        w[2, 3, 0, 0] = float("inf")  # meets the padding: 0 * inf
        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w, padding=1)
            relu = tritune.conv2d(x, w, padding=1, activation="relu")

        def theirs(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            y = F.conv2d(x, w, padding=1)
            return y, y.relu()

        assert_as_exact((y, relu), theirs, x.cpu(), w.cpu())

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    @pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2}], ids=str)
    def test_pixels_behind_a_window_do_not_count(self, options, device):
        """A window's row of a narrow image is read as one run of channels, which ends in pixels of its neighbour."""
        x, w = torch.randn(1, 3, 9, 12, device=device), torch.randn(4, 3, 3, 3, device=device)
        x[0, 0, 4, 5], x[0, 1, 2, 11], x[0, 2, 7, 0] = float("inf"), float("nan"), float("inf")
        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w, **options, precision="ieee")
        assert_as_exact(y, functools.partial(F.conv2d, **options), x.cpu(), w.cpu())

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    def test_infinite_weights_reach_the_border_of_the_input_gradient(self, device):
        # docs/differences.md: outputs outside the image count as 0, and 0 * inf is NaN.
        g = torch.randn(1, 16, 6, 6)
        w = torch.randn(16, 8, 3, 3)
        w[2, 3, 0, 0] = float("inf")  # its outputs lie below and to the right
        x = torch.zeros(1, 8, 6, 6, device=device, requires_grad=True)
        with tritune.use_backend("triton"):
            tritune.conv2d(x, w.to(device), padding=1, precision="ieee").backward(g.to(device))
        border = torch.zeros(1, 8, 6, 6, dtype=torch.bool)
        border[:, 3, -1, :] = border[:, 3, :, -1] = True
        assert torch.equal(x.grad.cpu().isnan(), border)
        inside = ~border
        assert_as_exact(x.grad.cpu()[inside], lambda g, w: F.conv_transpose2d(g, w, padding=1)[inside], g, w)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fp16_range_is_used_in_fp32(self, dtype, device):
        x = torch.full((1, 64, 3, 3), 40.0, device=device, dtype=dtype)
        w = torch.full((16, 64, 1, 1), 40.0, device=device, dtype=dtype)
        scale = torch.full((16,), 0.01, device=device, dtype=dtype)  # 102 400 passes fp16's limit before the scale
        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w, scale=scale)
        # Numbers, since torch's own convolution passes the range of fp16: 0.01 is off by 4 in bf16.
        assert (y.float() - 1024).abs().max() < 8


@contextlib.contextmanager
def lines() -> Iterator[None]:
    """Every convolution whose windows move by one pixel goes by lines."""
    from tritune.autotune.config import Config
    from tritune.autotune.resolve import override
    from tritune.kernels import conv

    config = Config(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, GROUP_M=3, TMA=1, num_warps=4, num_stages=3)
    with override(conv.FORWARD, config), override(conv.TRANSPOSE, config):
        yield


def recorded_lines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches of the kernel by lines, as they come."""
    from tritune.kernels import conv

    plan, launches = conv._lines_launch, []

    def recording(*args: Any, **options: Any) -> Any:
        launches.append(plan(*args, **options))
        return launches[-1]

    monkeypatch.setattr(conv, "_lines_launch", recording)
    return launches


def _ignoring_precision(*args: Any, precision: str | None = None, **kwargs: Any) -> Tensor:
    return reference(*args, **kwargs)


class TestReach:
    """What lies next to an operand does not count, and every number is read where it lies."""

    pytestmark = kernels_only

    @pytest.mark.parametrize("numbers, total", [
        ((1e8, 1.0, -1e8), 1.0), ((1.0, 1e8, -1e8), 1.0), ((float("inf"), 1.0), float("inf")),
        ((float("inf"), -float("inf")), float("nan")), ((1.0, float("nan")), float("nan")),
    ])  # fmt: skip
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    def test_what_a_sum_of_splits_rounds_away_is_added_back(self, numbers, total, device):
        from tritune.kernels import conv

        out = torch.empty(1, device=device)
        conv.sum_splits_launch(torch.tensor(numbers, device=device).view(-1, 1), out).run()
        torch.testing.assert_close(out.cpu(), torch.tensor([total]), rtol=0, atol=0, equal_nan=True)

    INFINITIES = {
        # 3 taps of 8 channels in tiles of 16 or 32: the pixel behind a window must not meet the zeros of weights,
        "pixel-behind-the-window": ("conv1d", (1, 8, 12), (16, 8, 3), 1, "x", (0, 0, 8)),
        # nor the next filter's weights the pixels that are masked to 0.
        "weight-of-the-next-filter": ("conv1d", (1, 8, 12), (16, 8, 3), 1, "w", (5, 0, 0)),
        # Groups of 5 channels in tiles of 16; of one tap, so that every window lies inside and no 0 * inf is expected.
        "pixel-of-the-next-group": ("conv_transpose2d", (1, 10, 4, 4), (10, 8, 2, 2), 2, "x", (0, 5, 1, 1)),
        "weight-of-the-next-group": ("conv_transpose2d", (1, 10, 4, 4), (10, 8, 1, 1), 2, "w", (5, 0, 0, 0)),
    }

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    @pytest.mark.parametrize("name", INFINITIES)
    def test_an_infinity_reaches_what_it_does_in_torch(self, name, device):
        op, x_shape, w_shape, groups, of, where = self.INFINITIES[name]
        x, w = torch.randn(x_shape), torch.randn(w_shape)
        {"x": x, "w": w}[of][where] = float("inf")
        with tritune.use_backend("triton"):
            y = getattr(tritune, op)(x.to(device), w.to(device), groups=groups, precision="ieee")
        assert_as_exact(y, functools.partial(getattr(F, op), groups=groups), x, w)

    def test_transpose_in_tf32_with_groups(self, device):
        """These weights are packed another way."""
        x, w = torch.randn(1, 32, 4, 4), torch.randn(32, 8, 2, 2) / 8
        with tritune.use_backend("triton"):
            y = tritune.conv_transpose2d(x.to(device), w.to(device), groups=2, precision="tf32")
        if device == "cpu":  # the interpreter always multiplies in full precision
            assert_as_exact(y, functools.partial(F.conv_transpose2d, groups=2), x, w)
        else:  # a number, since which products cuDNN makes in tf32 is its own choice
            torch.testing.assert_close(y.cpu(), F.conv_transpose2d(x, w, groups=2), rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("one", [
        case("conv", (1, 16, 4, 3, 3), (16, 16, 2, 2, 1), op="conv3d", dilation=(2, 1, 1)),
        case("transpose", (1, 16, 3, 4, 3), (16, 16, 2, 2, 1), op="conv_transpose3d", dilation=(2, 1, 1)),
    ], ids=lambda one: one.id)  # fmt: skip
    def test_dilated_planes_in_tiles_of_one_tap(self, one, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import conv

        tile = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
        with (
            override(conv.FORWARD, Config(**tile, GROUP_M=2, SPLIT_K=1, SWAP=0)),
            override(conv.TRANSPOSE, Config(**tile, GROUP_M=2, SPLIT_K=1)),
            override(conv.WEIGHT_GRAD, Config(**tile, SPLIT_K=1)),
        ):
            check(one, torch.float32, "nhwc", device, "triton")

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    def test_scale_of_what_overflows_in_fp16(self, device):
        x, w = (torch.full((1, 64, 1, 1), 40.0, dtype=torch.float16, device=device) for _ in range(2))
        scale = torch.full((1,), 0.01, dtype=torch.float16, device=device, requires_grad=True)
        assert (F.conv2d(x, w) * scale).isinf().all()
        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w, scale=scale)
        assert y.isfinite().all()
        (gradient,) = torch.autograd.grad(y, scale, torch.full_like(y, 0.01))
        assert gradient.isinf().all()  # 1024 in float64; see docs/differences.md

    def test_one_residual_for_the_whole_batch(self, device):
        """Its strides differ from the result's in the batch alone."""
        x, w, one = torch.randn(2, 8, 4, 4), torch.randn(8, 8, 1, 1), torch.randn(1, 8, 4, 4)
        with tritune.use_backend("triton"):
            y = tritune.conv2d(
                x.to(device), w.to(device), residual=one.to(device).expand(2, -1, -1, -1), precision="ieee"
            )
        assert_as_exact(y, lambda x, w, one: F.conv2d(x, w) + one, x, w, one)


class TestOnceWrongElsewhere:
    """Convolutions that another library of Triton kernels computes silently wrong, or refuses."""

    pytestmark = every_backend

    def test_weight_gradient_of_channels_last_weights(self, device, tier):
        x = torch.randn(2, 8, 6, 5, device=device)
        w = torch.randn(8, 8, 3, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
        dy = torch.randn(2, 8, 4, 3, device=device)
        with tritune.use_backend(backend_of(tier)):
            tritune.conv2d(x, w).backward(dy)
        assert_as_exact(w.grad, lambda x, w, dy: torch.autograd.grad(F.conv2d(x, w), w, dy), x, w, dy)

    def test_second_derivative_is_not_dropped(self, device, tier):
        x, w = (torch.randn(shape, device=device, requires_grad=True) for shape in ((1, 4, 6, 6), (4, 4, 3, 3)))

        def second(function: Callable[..., Tensor], x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            (first,) = torch.autograd.grad(function(x, w).pow(3).sum(), x, create_graph=True)
            assert first.requires_grad
            return torch.autograd.grad(first.square().sum(), (x, w))

        with tritune.use_backend(backend_of(tier)):
            results = second(tritune.conv2d, x, w)
        assert_as_exact(results, functools.partial(second, F.conv2d), x, w)

    def test_same_with_a_stride_as_a_tuple(self, device, tier):
        x, w = torch.randn(1, 4, 6, 6, device=device), torch.randn(4, 4, 3, 3, device=device)
        with tritune.use_backend(backend_of(tier)):
            y = tritune.conv2d(x, w, stride=(1, 1), padding="same")
        assert_as_exact(y, functools.partial(F.conv2d, padding="same"), x, w)

    def test_same_with_an_even_window_pads_behind(self, device, tier):
        x, w = torch.tensor([[[1.0, 2.0, 3.0]]], device=device), torch.tensor([[[1.0, 10.0]]], device=device)
        with tritune.use_backend(backend_of(tier)):
            assert tritune.conv1d(x, w, padding="same").flatten().tolist() == [21.0, 32.0, 3.0]

    def test_one_channel_in_channels_last(self, device, tier):
        x = torch.randn(2, 1, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
        x = x.as_strided(x.shape, (25, 1, 5, 1))  # channels last as torch sees it
        w = torch.randn(4, 1, 3, 3, device=device)
        with tritune.use_backend(backend_of(tier)):
            y = tritune.conv2d(x, w)
        wanted = F.conv2d(x, w)
        assert y.stride() == wanted.stride() and not y.is_contiguous()
        assert_as_exact(y, F.conv2d, x, w)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "x, w, scale, dy, size",
    [(20.0, 0.1, 0.01, 10.0, 24), (0.01, 100.0, 1000.0, 1e-3, 2), (1e-3, 1e-3, 1000.0, 1e-5, 2)],
    ids=["large-gradient", "large-scale", "small-gradient"],
)  # fmt: skip
class TestScale:
    pytestmark = every_backend

    def test_gradients_stay_in_the_range_of_fp16(self, x, w, scale, dy, size, transposed, device, tier):
        """Only what torch's own product of result and scale rounds is rounded: the gradient at the convolution."""
        x, w = torch.full((1, 16, size, size), x), torch.full((16, 16, 1, 1), w)
        scale, op = torch.full((16,), scale), "conv_transpose2d" if transposed else "conv2d"
        half = [t.half().to(device).requires_grad_(t is not scale) for t in (x, w, scale)]
        exact = [t.detach().double().cpu().requires_grad_() for t in half]
        with tritune.use_backend(backend_of(tier)):
            y = getattr(tritune, op)(*half[:2], scale=half[2])
            ours = torch.autograd.grad(y, half[:2], torch.full_like(y, dy))
        y = reference_of(op)(*exact[:2], scale=exact[2])
        wanted = torch.autograd.grad(y, exact[:2], torch.full_like(y, dy))
        for one, other in zip(ours, wanted, strict=True):
            # A number, since torch's own steps overflow or underflow in fp16: 1% is what rounding near 1e-5 costs.
            torch.testing.assert_close(one.double().cpu(), other, rtol=0.02, atol=0)


class TestMemory:
    """A call takes what its docstring says beside results and gradients: no copy of what can be read in place."""

    pytestmark = kernels_only
    LAYERS = {
        "3x3": ((2, 16, 5, 8), (24, 16, 3, 3), {"padding": 1}),
        "1x1": ((2, 16, 5, 8), (64, 16, 1, 1), {}),
        "groups": ((2, 32, 5, 8), (32, 16, 3, 3), {"groups": 2}),
        "depthwise": ((2, 8, 5, 8), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
        "narrow": ((2, 3, 9, 9), (16, 3, 3, 3), {"stride": 2}),
    }

    @pytest.mark.parametrize("layout", ["nhwc", "nchw"])
    @pytest.mark.parametrize("name", LAYERS)
    def test_forward_and_backward(self, name, layout, device):
        x_shape, w_shape, options = self.LAYERS[name]
        x, w = (lay_out(torch.randn(shape), layout).to(device).requires_grad_() for shape in (x_shape, w_shape))
        b = torch.randn(w_shape[0], device=device, requires_grad=True)
        with tritune.use_backend("triton"), Allocations() as forward:
            y = tritune.conv2d(x, w, b, activation="silu", **options)
        dy = torch.randn_like(y)
        with tritune.use_backend("triton"), Allocations() as backward:
            gradients = torch.autograd.grad(y, (x, w, b), dy)
        is_direct = name == "depthwise"
        image = 2 * x.nbytes if name == "narrow" else 0 if is_direct or layout == "nhwc" else x.nbytes
        weight = w.nbytes if is_direct else 2 * w.nbytes if name == "narrow" else 0 if layout == "nhwc" else w.nbytes
        parts = 4096  # of the bias's gradient and of depthwise weights'
        assert forward.bytes <= 2 * y.nbytes + image + weight  # the result, and what the activation's derivative needs
        assert backward.bytes <= sum(t.nbytes for t in gradients) + y.nbytes + image + weight + parts


class TestEmpty:
    pytestmark = every_backend

    @pytest.mark.parametrize("rank", [1, 2, 3])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_empty_batch(self, transposed, rank, device, tier):
        function = getattr(tritune, f"conv{'_transpose' * transposed}{rank}d")
        x = torch.randn(0, 8, *(5,) * rank, device=device, requires_grad=True)
        w = torch.randn(*((8, 4) if transposed else (4, 8)), *(3,) * rank, device=device, requires_grad=True)
        b = torch.randn(4, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            y = function(x, w, b, activation="relu")
            y.sum().backward()
        assert y.shape == (0, 4, *(7 if transposed else 3,) * rank)
        assert x.grad.shape == x.shape
        assert w.grad.shape == w.shape and not w.grad.any()
        assert not b.grad.any()

    def test_no_channels(self, device):
        x, w = torch.randn(2, 0, 5, 5, device=device), torch.randn(3, 0, 3, 3, device=device)
        assert tritune.conv2d(x, w).shape == F.conv2d(x.cpu(), w.cpu()).shape == (2, 0, 3, 3)
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match=r"CPU|weight is empty"):
            tritune.conv2d(x, w)

    def test_no_gradient_into_integer_or_frozen_arguments(self, device, tier):
        x, w = torch.randn(1, 4, 5, 5, device=device), torch.randn(4, 4, 3, 3, device=device)
        with tritune.use_backend(backend_of(tier)):
            assert not tritune.conv2d(x, w).requires_grad
            with torch.no_grad():
                assert not tritune.conv2d(x.requires_grad_(), w).requires_grad
            with torch.inference_mode():
                assert tritune.conv2d(x, w).is_inference()


@pytest.mark.gpu
class TestLarge:
    def test_offsets_beyond_2_31(self, device):
        # Three images of 2**30 elements: the last lies beyond what 32 bits address.
        x = torch.zeros(3, 64, 4096, 4096, device=device, dtype=torch.float16).to(memory_format=torch.channels_last)
        x[2, :, -3:, -3:] = torch.randn(64, 3, 3, device=device, dtype=torch.float16)
        w = torch.randn(16, 64, 3, 3, device=device, dtype=torch.float16)
        with tritune.use_backend("triton"):
            y = tritune.conv2d(x, w)
        assert_as_exact(y[2:, :, -1:, -1:], F.conv2d, x[2:, :, -3:, -3:], w)

    @pytest.mark.parametrize("warps", [4, 8])
    @pytest.mark.parametrize("shape", [(8, 64, 56, 56, 64, 3), (4, 96, 28, 28, 128, 5), (4, 256, 14, 14, 256, 3)])
    def test_flat_loop_over_taps_is_compiled_right(self, shape, warps, device):
        # A loop like this one was once miscompiled with eight warps (pytorch/pytorch issue 173068).
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import conv

        n, c, h, w, k, r = shape
        config = Config(
            BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, GROUP_M=8, SPLIT_K=1, SWAP=0, num_warps=warps, num_stages=3
        )
        one = case("large", (n, c, h, w), (k, c, r, r), "bias", padding=r // 2)
        with override(conv.FORWARD, config):
            for dtype in (torch.float16, torch.bfloat16):
                check(one, dtype, "nhwc", device, "triton")

    def test_cuda_graph(self, device):
        x, w = torch.randn(4, 32, 28, 28, device=device), torch.randn(64, 32, 3, 3, device=device)
        with tritune.use_backend("triton"):
            tritune.conv2d(x, w, padding=1, activation="relu")
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = tritune.conv2d(x, w, padding=1, activation="relu")
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, tritune.conv2d(x, w, padding=1, activation="relu"))


@pytest.mark.static
class TestCompiles:
    @pytest.mark.parametrize("rank", [2, 3])
    @pytest.mark.parametrize("c, k, groups", [(24, 40, 1), (4, 4, 6), (1, 1, 24)])
    def test_changing_sizes_compile_once(self, c, k, groups, rank):
        """N, D, H and W are run-time values: none of them, 1 and multiples of 16 included, makes another binary."""
        from tritune.kernels import conv
        from tritune.ops.conv_operators import module_of, weight_grad_module_of

        shape = (k * groups, c)
        module, weight_grad = module_of(shape, (1,), groups), weight_grad_module_of(shape, (1,), groups).WEIGHT_GRAD
        geometry = conv.Geometry.of(*((size,) * rank for size in (1, 1, 1)), groups)
        window = conv.triple((3,) * rank)
        for tunable in (module.FORWARD, module.TRANSPOSE, weight_grad):
            config = next(c for c in tunable.configs if c.get("SPLIT_K", 1) == 1)
            binaries = set()
            for n, h, w in ((1, 1, 1), (2, 7, 9), (16, 32, 48), (1, 16, 1), (3, 1, 17), (64, 64, 64)):
                image = (h if rank == 3 else 1, h, w)
                problem = conv.ConvProblem(rank, n, c, k, image, window, image, geometry, torch.bfloat16, "16")
                binaries.add(tuple(_specialisation(launch) for launch in tunable.launches(problem, config)))
            assert len(binaries) == 1, tunable.name


def _specialisation(launch: Any) -> str:
    source = launch.source()
    return repr((sorted(source.signature.items()), sorted(source.constants.items()), sorted(source.attrs.items())))
