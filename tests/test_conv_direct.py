"""The kernels of convolution by FMA, branch by branch: forward, transpose and weight gradient against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import TORCH_SAMPLES, Errors, assert_as_exact, assert_close, poisoned
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("nhwc", "nchw")
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)

kernels_only = [pytest.mark.interpret, pytest.mark.gpu]


class Layer(NamedTuple):
    """``x`` [N, C * groups, *image], ``w`` [K * groups, C, *window]; the other sizes are per dimension."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        return CONVOLUTIONS[x.dim() - 3](x, w, None, self.stride, self.padding, self.dilation, self.groups)


def layer(
    x: tuple[int, ...], window: Any, *, c: int = 1, k: int = 1, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> Layer:
    """``c`` channels and ``k`` filters a group."""
    rank, groups = len(x) - 2, x[1] // c
    sizes = ((size,) * rank if isinstance(size, int) else size for size in (window, stride, padding, dilation))
    window, *geometry = sizes
    return Layer(x, (k * groups, c, *window), *geometry, groups)


def lay_out(t: Tensor, layout: str) -> Tensor:
    if layout == "nhwc":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":  # every dimension has gaps
        wide = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
        return wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)
    return t.contiguous()


def check(
    one: Layer, dtype: torch.dtype, layout: str, device: str, passes: str = "ftw", out: str | None = None,
    tensors: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Forward, transpose and weight gradient of a layer whose operands lie in ``layout`` and results in ``out``."""
    from tritune.kernels import conv, conv_direct
    from tritune.ops.conv_operators import module_of, weight_grad_module_of

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        x, w = torch.randn(one.x).to(dtype), torch.randn(one.w).to(dtype)
        return x, w, torch.randn(one.convolve(x, w).shape).to(dtype)

    def reference(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
        x, w = (t.detach().requires_grad_() for t in (x, w))
        y = one.convolve(x, w)
        return dict(zip("ftw", (y.detach(), *torch.autograd.grad(y, (x, w), g)), strict=True))

    def torch_errors(name: str) -> Iterator[Errors]:
        for _ in range(TORCH_SAMPLES - 1):
            operands = draw()
            exact = reference(*(t.double() for t in operands))
            yield Errors.of(reference(*operands)[name], exact[name])

    x, w, g = tensors or draw()
    exact, torchs = reference(x.double(), w.double(), g.double()), reference(x, w, g)
    geometry = conv.Geometry.of(*one[2:])
    assert module_of(one.w, one.stride, one.groups) is conv_direct
    out = out or ("nhwc" if layout == "nhwc" else "nchw")
    x, g, w = lay_out(x, layout).to(device), lay_out(g, layout).to(device), w.to(device)
    ours = {}
    with poisoned():
        if "f" in passes:
            ours["f"] = conv_direct.run_forward(x, w, g.shape[2:], geometry, is_channels_last=out == "nhwc")[0]
        if "t" in passes:
            ours["t"] = conv_direct.run_transpose(g, w, x.shape[2:], geometry, is_channels_last=out == "nhwc")[0]
        if "w" in passes and weight_grad_module_of(one.w, one.stride, one.groups) is conv_direct:
            ours["w"] = conv_direct.run_weight_grad(x, g, one.w, geometry)
    for name, result in ours.items():
        assert_close(name, result, exact[name], torchs[name], [] if tensors else torch_errors(name))
        assert name == "w" or lay_out(result, out).data_ptr() == result.data_ptr(), "the result has another layout"


@contextlib.contextmanager
def configured(layout: str, *, rows: int = 1, block_m: int = 16, splits: int = 2) -> Iterator[None]:
    """Small tiles for results of that layout, operands' for the weight gradient."""
    from tritune.autotune.config import Config
    from tritune.autotune.resolve import override
    from tritune.kernels import conv_direct

    last = layout == "nhwc"
    tile = {"BLOCK_M": block_m, "BLOCK_C": 16} if last else {"BLOCK_P": 8, "BLOCK_Q": 4}
    options = {"num_warps": 4, "num_stages": 1}
    forward = Config(**tile, **({"ROWS": rows} if last else {}), **options)
    with (
        override(conv_direct.FORWARD, forward),
        override(conv_direct.TRANSPOSE, forward),
        override(conv_direct.WEIGHT_GRAD, Config(**tile, SPLIT_M=splits, **options)),
    ):
        yield


def run(one: Layer, dtype: torch.dtype, layout: str, device: str, passes: str = "ftw", **config: int) -> None:
    with configured(layout, **config):
        check(one, dtype, layout, device, passes)


# One case for each branch of a kernel; sizes do not divide the blocks.
CASES = {
    "3x3": layer((2, 2, 5, 7), 3, padding=1),
    "wide-rows": layer((1, 2, 5, 24), (3, 7), padding=(1, 3)),
    "rows-of-2": layer((1, 2, 5, 14), 3, padding=1),
    "even-window": layer((1, 2, 6, 9), (2, 4), padding=(0, 2)),
    "strided": layer((1, 2, 9, 16), 3, stride=2, padding=1),
    "rectangular": layer((1, 2, 10, 8), (5, 4), stride=(2, 3), padding=(3, 1), dilation=(1, 2)),
    "stride-one-way": layer((1, 2, 8, 8), 3, stride=(2, 1), padding=1),
    "stride-and-dilation-share-a-factor": layer((1, 2, 11, 12), 3, stride=(2, 4), padding=1, dilation=2),
    "stride-beyond-window": layer((1, 2, 9, 8), (1, 2), stride=3),
    "dilated": layer((1, 2, 9, 16), 3, padding=4, dilation=(2, 5)),
    "padding-beyond-window": layer((1, 2, 5, 8), 2, padding=3),
    "tall-window": layer((1, 2, 12, 8), (11, 1), padding=(5, 0)),
    "broad-window": layer((1, 2, 4, 16), (1, 11), padding=(0, 5)),
    "one-pixel": layer((3, 2, 1, 1), 3, padding=1),
    "multiplier": layer((1, 2, 6, 8), 3, k=2, padding=1),
    "multiplier-strided": layer((1, 2, 7, 8), 3, k=8, stride=2, padding=1),
    "1d": layer((2, 2, 24), 3, padding=1),
    "1d-causal": layer((1, 2, 24), 4, padding=3),
    "1d-strided": layer((2, 2, 21), 5, stride=2, padding=2),
    "3d": layer((1, 2, 3, 4, 8), (2, 3, 3), padding=1),
    "3d-strided": layer((1, 2, 5, 4, 6), 3, stride=(3, 1, 2), padding=(1, 0, 1), dilation=(2, 1, 1)),
}  # fmt: skip
# One case per kernel: these run on other versions of Triton too.
COMPAT = ("3x3", "strided", "wide-rows")


class TestPasses:
    pytestmark = kernels_only

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.compat] if name in COMPAT else []) for name in CASES]
    )
    def test_all_three(self, name, layout, device):
        run(CASES[name], torch.float32, layout, device)

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", ["strided", "1d-causal"])
    def test_16_bit(self, name, layout, dtype, device):
        run(CASES[name], dtype, layout, device)

    @pytest.mark.parametrize("rows", [2, 4])
    @pytest.mark.parametrize("name", ["3x3", "rectangular", "dilated", "tall-window", "1d-causal", "3d"])
    def test_rows_of_outputs_together(self, name, rows, device):
        run(CASES[name], torch.bfloat16 if rows == 2 else torch.float32, "nhwc", device, "f", rows=rows)
        run(CASES[name], torch.float32, "nhwc", device, "t", rows=rows)

    def test_channels_that_do_not_fill_the_tile(self, device):
        run(layer((1, 20, 4, 3), 3, padding=1), torch.bfloat16, "nhwc", device, rows=2)
        run(layer((1, 36, 4, 3), 2, c=2), torch.bfloat16, "nhwc", device, "ft")

    @pytest.mark.parametrize("c, k", [(c, k) for c in (1, 2, 4, 8) for k in (1, 2, 4, 8) if (c, k) != (1, 1)])
    def test_groups(self, c, k, device):
        one = layer((1, 2 * c, 4, 6), (3, 2), c=c, k=k, padding=(1, 0))
        run(one, torch.float16, "nhwc", device, rows=2)
        run(layer((1, 2 * c, 5, 4), 2, c=c, k=k, stride=2), torch.float32, "nhwc", device, "t")

    @pytest.mark.parametrize("c, k", [(1, 2), (2, 1), (4, 4), (2, 8), (8, 2)])
    def test_groups_in_planes(self, c, k, device):
        run(layer((1, 2 * c, 3, 8), 2, c=c, k=k, padding=1), torch.float16, "nchw", device)
        run(layer((1, 2 * c, 3, 4), 2, c=c, k=k, stride=2), torch.float32, "nchw", device, "t")

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("one", [CASES["3x3"], layer((1, 4, 6, 8), 3, c=2, k=4, padding=1)], ids=["dw", "groups"])
    def test_declared_configs(self, one, layout, device):
        """What the model ranks first, in place of the overrides above."""
        check(one, torch.float16, layout, device)

    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_splits(self, splits, layout, device):
        one = layer((5, 2, 5, 36), 3, padding=1)
        run(one, torch.float32, layout, device, "w", splits=splits, block_m=4)


class TestOperands:
    pytestmark = kernels_only

    @pytest.mark.parametrize("out", LAYOUTS)
    @pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
    def test_layouts_mix(self, layout, out, device):
        with configured(out):
            check(CASES["3x3"], torch.float32, layout, device, "ft", out)
            check(CASES["strided"], torch.float32, layout, device, "t", out)
        with configured("nhwc" if layout == "nhwc" else "nchw"):
            check(CASES["3x3"], torch.float32, layout, device, "w")

    def test_weight_gradient_takes_g_in_another_layout(self, device):
        from tritune.kernels import conv, conv_direct

        one = CASES["3x3"]
        x, w = torch.randn(one.x), torch.randn(one.w, requires_grad=True)
        g = torch.randn(one.convolve(x, w).shape)
        for layout in LAYOUTS:
            other = "nchw" if layout == "nhwc" else "nhwc"
            with configured(layout):
                dw = conv_direct.run_weight_grad(
                    lay_out(x, layout).to(device), lay_out(g, other).to(device), one.w, conv.Geometry.of(*one[2:])
                )
            assert_as_exact(dw, lambda x, w, g: torch.autograd.grad(one.convolve(x, w), w, g), x, w, g)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_one_expanded_element_as_gradient(self, layout, device):
        from tritune.kernels import conv, conv_direct

        one = layer((1, 16, 5, 8), 3, padding=1)
        x, w = torch.randn(one.x, requires_grad=True), torch.randn(one.w, requires_grad=True)
        g = torch.ones(1, device=device).expand(one.x)
        geometry = conv.Geometry.of(*one[2:])
        operand, weight = lay_out(x.detach(), layout).to(device), w.detach().to(device)
        with configured(layout), poisoned():
            dx, _ = conv_direct.run_transpose(g, weight, (5, 8), geometry, is_channels_last=layout == "nhwc")
            dw = conv_direct.run_weight_grad(operand, g, one.w, geometry)
        assert_as_exact((dx, dw), lambda x, w: torch.autograd.grad(one.convolve(x, w).sum(), (x, w)), x, w)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("pass_", ["forward", "transpose", "transpose-strided"])
    def test_epilogue(self, pass_, layout, device):
        from tritune.kernels import conv, conv_direct

        one = layer((2, 4, 7, 8), 3, c=2, k=4, stride=2 if pass_.endswith("strided") else 1, padding=1)
        x, w = torch.randn(one.x), torch.randn(one.w)
        y = one.convolve(x, w)
        operand, shape = (x, y.shape) if pass_ == "forward" else (torch.randn(y.shape), x.shape)
        run_pass = conv_direct.run_forward if pass_ == "forward" else conv_direct.run_transpose
        scale, bias, residual = torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape)

        def theirs(operand: Tensor, w: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            if pass_ == "forward":
                plain = one.convolve(operand, w)
            else:
                x = torch.zeros(shape, dtype=w.dtype, requires_grad=True)
                (plain,) = torch.autograd.grad(one.convolve(x, w), x, operand)
            z = plain * scale.view(-1, 1, 1) + bias.view(-1, 1, 1) + residual
            return F.silu(z), z

        with configured(layout, rows=2), poisoned():
            ours = run_pass(
                lay_out(operand, layout).to(device), w.to(device), shape[2:], conv.Geometry.of(*one[2:]),
                is_channels_last=layout == "nhwc", bias=bias.to(device), scale=scale.to(device),
                residual=residual.to(device), activation="silu", save_input=True,
            )  # fmt: skip
        assert_as_exact(ours, theirs, operand, w, scale, bias, residual)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_transpose_writes_images_that_no_window_reaches(self, layout, device):
        """What output_padding asks for, and more: pixels beyond the last window get the epilogue of 0."""
        from tritune.kernels import conv, conv_direct

        g, w = torch.randn(1, 4, 3, 4), torch.randn(4, 1, 2, 2)
        for stride in (1, 3):

            def padded(g: Tensor, w: Tensor, stride: int = stride) -> Tensor:
                return F.pad(F.conv_transpose2d(g, w, stride=stride, groups=4), (0, 5, 0, 4))

            with configured(layout, rows=2 if stride == 1 else 1), poisoned():
                x, _ = conv_direct.run_transpose(
                    lay_out(g, layout).to(device), w.to(device), padded(g, w).shape[2:],
                    conv.Geometry.of((stride, stride), (0, 0), (1, 1), 4), is_channels_last=layout == "nhwc",
                )  # fmt: skip
            assert_as_exact(x, padded, g, w)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("width", [8, 11])
    def test_nan_and_infinity_stay_where_torch_has_them(self, width, layout, device):
        one = layer((1, 4, 6, width), 3, padding=1)
        x, w, g = torch.randn(one.x), torch.randn(one.w), torch.randn(one.x)
        x[0, 0, 1, 1], x[0, 1, 4, -2], x[0, 2, -1, -1] = float("nan"), float("inf"), float("inf")
        g[0, 3, 0, 0] = float("-inf")
        for rows in (1, 4):
            with configured(layout, rows=rows):
                check(one, torch.float32, layout, device, tensors=(x, w, g))
        # In the last column of x, under windows of outputs that do not exist.
        one = layer((1, 4, 6, width), 3)
        x, g = torch.randn(one.x), torch.randn(one.convolve(x, w).shape)
        x[:, :, :, -1] = float("inf")
        with configured(layout):
            check(one, torch.float32, layout, device, tensors=(x, w, g))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, inside the interpreter
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_padding_multiplies_infinite_weights(self, layout, device):
        one = layer((1, 4, 5, 8), 3, padding=1)
        x, w, g = torch.randn(one.x), torch.randn(one.w), torch.randn(one.x)
        w[1, 0, 0, 1] = float("inf")
        for rows in (1, 4):
            with configured(layout, rows=rows):
                check(one, torch.float32, layout, device, "f", tensors=(x, w, g))


MEETINGS = {
    # the last run of columns is shorter, and behind it lie real columns of x and the next row of g
    "ragged-runs": (layer((2, 2, 29), 3), "nhwc", "w"),
    # an image of one row under a window of several is not flat
    "one-row-under-3x3": (layer((1, 2, 1, 8), 3, padding=1), "nhwc", "ft"),
    # windows that are cut, with dilation and with several rows
    "broad-window-dilated": (layer((1, 2, 4, 32), (1, 11), padding=(0, 5), dilation=(1, 2)), "nhwc", "w"),
    "tall-window-dilated": (layer((1, 2, 24, 4), (11, 1), padding=(5, 0), dilation=(2, 1)), "nhwc", "f"),
    "broad-window-of-2-rows": (layer((1, 2, 4, 16), (2, 11), padding=(0, 5)), "nhwc", "w"),
    # planes and several filters a group in one loop
    "3d-multiplier-strided": (layer((1, 2, 5, 5, 6), 2, k=2, stride=2), "nchw", "t"),
    # planes of the window and several tiles of channels
    "3d-channels": (layer((1, 20, 3, 3, 4), 2), "nhwc", "w"),
    # one dimension is turned upright with its dilation
    "1d-dilated": (layer((1, 2, 24), 3, padding=2, dilation=2), "nhwc", "ft"),
}


class TestMeetings:
    """Branches that the cases above take one at a time, together."""

    pytestmark = kernels_only

    @pytest.mark.parametrize("name", MEETINGS)
    def test_branches_that_meet(self, name, device):
        one, layout, passes = MEETINGS[name]
        run(one, torch.float32, layout, device, passes)

    def test_rows_with_gaps_between_them(self, device):
        """Columns side by side and a width of whole loads, but rows that do not start on one."""
        from tritune.kernels import conv, conv_direct

        one = layer((1, 2, 4, 8), 3, padding=1)
        x, w, g = torch.randn(one.x), torch.randn(one.w), torch.randn(one.x)
        a, b = (F.pad(t, (1, 2), value=float("nan")).to(device)[..., 1:-2] for t in (x, g))
        geometry = conv.Geometry.of(*one[2:])
        with configured("nchw"):
            y, _ = conv_direct.run_forward(a, w.to(device), (4, 8), geometry)
            dx, _ = conv_direct.run_transpose(b, w.to(device), (4, 8), geometry)
            dw = conv_direct.run_weight_grad(a, b, one.w, geometry)

        def theirs(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            y = one.convolve(x, w)
            return y, *torch.autograd.grad(y, (x, w), g)

        assert_as_exact((y, dx, dw), theirs, x.requires_grad_(), w.requires_grad_(), g)

    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_shares_that_do_not_divide_the_tiles(self, layout, device):
        """15 tiles in 2 shares. What lies behind the batch is another image, not zeros."""
        from tritune.kernels import conv, conv_direct

        one = layer((5, 2, 5, 36), 3, padding=1)
        x, w, g = torch.randn(6, *one.x[1:]), torch.randn(one.w, requires_grad=True), torch.randn(6, *one.x[1:])
        a, b = (lay_out(t, layout).to(device)[:5] for t in (x, g))
        with configured(layout, splits=2, block_m=4):
            dw = conv_direct.run_weight_grad(a, b, one.w, conv.Geometry.of(*one[2:]))
        assert_as_exact(dw, lambda x, w, g: torch.autograd.grad(one.convolve(x, w), w, g), x[:5], w, g[:5])
