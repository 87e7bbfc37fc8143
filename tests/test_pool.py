"""Pooling on every backend: values, winners, gradients, ties, NaN, windows that see only padding, unpooling."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, backend_of, check, lay_out, lp_pool, poisoned

import tritune

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_backend = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
kernels_only = [pytest.mark.interpret, pytest.mark.gpu]


def whole_planes(kind: str) -> Callable[..., torch.Tensor]:
    def function(input: torch.Tensor, keepdim: bool = True) -> torch.Tensor:
        y: torch.Tensor = getattr(F, f"adaptive_{kind}_pool{input.dim() - 2}d")(input, 1)
        return y if keepdim else y.flatten(1)

    return function


GLOBAL = {"global_avg_pool": whole_planes("avg"), "global_max_pool": whole_planes("max")}


def reference_of(op: str) -> Callable[..., torch.Tensor]:
    """torch's function; its CPU kernel of 3-d averages has no 16-bit types, which the test then widens."""
    theirs: Callable[..., torch.Tensor] = getattr(F, op, None) or GLOBAL[op]
    if op.startswith("lp_pool"):
        theirs = lp_pool(int(op[-2]))
    if op not in ("avg_pool3d", "lp_pool3d"):
        return theirs

    def widened(input: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        wide = input.float() if input.dtype.itemsize == 2 and input.device.type == "cpu" else input
        return theirs(wide, **kwargs).to(input.dtype)

    return widened


def case(op: str, id: str, x: tuple[int, ...], *args: Any, **kwargs: Any) -> Case:
    ours = getattr(tritune, op)
    names = list(inspect.signature(ours).parameters)[1:]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    return Case(f"{op}-{id}", ours, reference_of(op), {"input": x}, kwargs)


MAX2D = [
    case("max_pool2d", "resnet", (2, 20, 9, 7), 3, 2, 1),
    case("max_pool2d", "vgg", (2, 16, 8, 6), 2),
    case("max_pool2d", "ceil", (1, 8, 10, 9), 2, 2, 0, 1, True),
    case("max_pool2d", "ceil-padded", (1, 5, 7, 6), 3, 3, 1, 1, True),
    case("max_pool2d", "overlapping", (1, 9, 6, 5), 3, 1, 1),
    case("max_pool2d", "rectangular", (2, 9, 8, 8), (3, 2), (1, 3), 1, (2, 1)),
    case("max_pool2d", "dilated", (1, 6, 9, 9), 2, 1, 1, 3),
    case("max_pool2d", "stride-beyond-window", (1, 4, 10, 9), 2, 3),
    case("max_pool2d", "unbatched", (6, 7, 5), 3, 2, 1),
    case("max_pool2d", "one-channel", (2, 1, 7, 5), 2),
    case("max_pool2d", "whole-plane", (2, 12, 4, 3), (4, 3)),
    case("max_pool2d", "wide-offsets", (1, 1, 18, 17), (18, 16), 1, (1, 0)),  # 288 taps: two bytes
    case("max_pool2d", "aligned-rows", (1, 3, 8, 16), 3, 2, 1),
]
MAXIMA = [
    *MAX2D,
    case("max_pool2d", "more-taps-than-are-unrolled", (1, 8, 9, 8), 7, 1, 3),
    case("max_pool1d", "padded", (2, 9, 30), 3, 2, 1),
    case("max_pool1d", "rows-in-parts", (1, 2, 700), 4, 3, 2, 2),
    case("max_pool1d", "window-beyond-a-band", (1, 2, 400), 260, 70),
    case("max_pool1d", "steps-of-two-in-parts", (1, 3, 600), 3, 2, 1),
    case("max_pool1d", "steps-of-one-in-parts", (1, 2, 304), 5, 1, 2, 2),
    case("max_pool1d", "odd-rows-in-parts", (1, 1, 701), 2, 3),
    case("max_pool1d", "unbatched", (4, 16), 2, ceil_mode=True),
    case("max_pool3d", "padded", (1, 9, 5, 6, 7), 3, 2, 1),
    case("max_pool3d", "rectangular", (2, 8, 4, 6, 8), (2, 3, 2), (1, 2, 2), (1, 1, 0), (2, 1, 1)),
    case("max_pool3d", "unbatched", (3, 4, 4, 5), 2, ceil_mode=True),
    case("adaptive_max_pool1d", "uneven", (2, 9, 31), 7),
    case("adaptive_max_pool1d", "in-parts", (1, 1, 768), 368),
    case("adaptive_max_pool2d", "even", (2, 16, 8, 12), (4, 6)),
    case("adaptive_max_pool2d", "uneven", (2, 9, 10, 13), (4, 5)),
    case("adaptive_max_pool2d", "upwards", (1, 8, 3, 4), (5, 9)),
    case("adaptive_max_pool2d", "wide", (1, 2, 3, 300), (2, 40)),
    case("adaptive_max_pool2d", "unbatched", (5, 7, 6), (None, 4)),
    case("adaptive_max_pool3d", "uneven", (1, 8, 5, 6, 7), (2, 4, 3)),
    case("global_max_pool", "2d", (3, 20, 7, 9)),
    case("global_max_pool", "3d", (2, 6, 3, 4, 5), False),
    case("global_max_pool", "1d", (2, 6, 50)),
]
MEANS = [
    case("avg_pool1d", "padded", (2, 9, 30), 3, 2, 1),
    case("avg_pool1d", "rows-in-parts", (1, 2, 700), 6, 2, 3, count_include_pad=False),
    case("avg_pool1d", "steps-of-four", (1, 3, 64), 6, 4, 3),
    case("avg_pool1d", "steps-of-eight-in-parts", (1, 2, 528), 11, 8, 2, True, False),
    case("avg_pool1d", "windows-that-overlap-in-parts", (1, 1, 900), 133, 3),
    case("avg_pool2d", "plain", (2, 16, 8, 6), 2),
    case("avg_pool2d", "padded", (2, 20, 9, 7), 3, 2, 1),
    case("avg_pool2d", "exclude-pad", (1, 9, 9, 8), 3, 2, 1, count_include_pad=False),
    case("avg_pool2d", "ceil", (1, 8, 10, 9), 3, 2, 1, True),
    case("avg_pool2d", "ceil-exclude-pad", (1, 8, 10, 9), 3, 2, 1, True, False),
    case("avg_pool2d", "divisor", (1, 8, 6, 16), (3, 2), (1, 2), (1, 0), divisor_override=-5),
    case("avg_pool2d", "unbatched", (6, 7, 5), 3, 1, 1),
    case("avg_pool2d", "whole-plane", (2, 12, 4, 3), (4, 3)),
    case("avg_pool3d", "exclude-pad", (1, 8, 5, 6, 7), 3, 2, 1, True, False),
    case("avg_pool3d", "divisor", (1, 3, 4, 4, 8), 2, divisor_override=3),
    case("adaptive_avg_pool1d", "uneven", (2, 9, 31), 7),
    case("adaptive_avg_pool2d", "even", (2, 16, 8, 12), (4, 6)),
    case("adaptive_avg_pool2d", "uneven", (2, 9, 10, 13), (4, 5)),
    case("adaptive_avg_pool2d", "upwards", (1, 8, 3, 4), (5, 9)),
    case("adaptive_avg_pool2d", "wide", (1, 2, 3, 300), (2, 40)),
    case("adaptive_avg_pool2d", "large-windows", (1, 2, 140, 3), (2, 1)),
    case("adaptive_avg_pool3d", "uneven", (1, 8, 5, 6, 7), (2, 4, 3)),
    case("global_avg_pool", "2d", (3, 20, 7, 9)),
    case("global_avg_pool", "3d", (2, 6, 3, 4, 5), False),
    case("global_avg_pool", "1d", (2, 6, 50)),
    case("lp_pool1d", "2", (2, 9, 30), 2, 3, 2),
    case("lp_pool2d", "2", (2, 16, 8, 16), 2, 3, 2, True),
    case("lp_pool2d", "1", (2, 9, 8, 7), 1, 2),
    case("lp_pool2d", "large-windows", (2, 9, 4, 6), 2.0, (4, 3)),
    case("lp_pool2d", "3", (1, 4, 8, 7), 3, 2),
    case("lp_pool2d", "4.5-of-negative-numbers", (1, 4, 8, 7), 4.5, 2),
    case("lp_pool2d", "inf", (1, 4, 8, 7), float("inf"), 2),
    case("lp_pool2d", "-inf", (1, 4, 8, 7), float("-inf"), 2),
    case("lp_pool3d", "2", (1, 8, 4, 5, 6), 2, 2, 1),
]
CASES = MAXIMA + MEANS
COMPAT = ("max_pool2d-resnet", "max_pool2d-aligned-rows", "avg_pool2d-exclude-pad", "global_max_pool-2d")


def parameters() -> list[Any]:
    """On the kernels dtypes and layouts take turns: half of them in the interpreter, a third on a GPU, where each row
    compiles."""
    rows = []
    for (number, one), (i, dtype), (j, layout) in itertools.product(
        enumerate(CASES), enumerate(DTYPES), enumerate(("nchw", "nhwc"))
    ):
        if "unbatched" in one.id and layout == "nhwc":
            continue  # three or four dimensions have no such format
        marks = [pytest.mark.interpret, pytest.mark.compat] if one.id in COMPAT else []
        if (number + i + j) % 2 == 0:
            marks.append(pytest.mark.interpret)
        if (number + i + j) % 3 == 0:
            marks.append(pytest.mark.gpu)
        rows.append(pytest.param(one, dtype, layout, id=f"{one.id}-{str(dtype)[6:]}-{layout}", marks=marks))
    return rows


@pytest.mark.torch
@pytest.mark.parametrize("case, dtype, layout", parameters())
def test_forward_and_gradient(case, dtype, layout, device, tier):
    check(case, dtype, layout, device, backend_of(tier))


@pytest.mark.interpret
@pytest.mark.gpu
def test_a_sequence_with_channels_last(device):
    """One layout with and without a gradient; torch's depends on it (docs/differences.md)."""
    x = torch.randn(2, 20, 8, device=device).transpose(1, 2)
    with tritune.use_backend("triton"):
        plain, trained = (tritune.max_pool1d(one, 2) for one in (x, x.clone().requires_grad_()))
    assert torch.equal(plain, trained) and torch.equal(plain, F.max_pool1d(x, 2))
    assert plain.stride() == trained.stride() == (80, 1, 8)


class TestCases:
    pytestmark = every_backend

    @pytest.mark.parametrize("case", [CASES[0], MAX2D[-1], MEANS[3], MEANS[-12], MEANS[-8]], ids=lambda case: case.id)
    def test_strided_views_are_read_in_place(self, case, device, tier):
        check(case, torch.float32, "strided", device, backend_of(tier))

    @pytest.mark.parametrize("case", [one for one in MAXIMA if "global" not in one.id], ids=lambda case: case.id)
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_values_and_indices_are_exact(self, case, layout, device, tier):
        # Coarse values make ties; with NaN and -inf among them every rule of the winner is used.
        x = torch.randn(case.shapes["input"]).mul(2).round()
        odd = torch.rand(x.shape)
        x[odd < 0.1], x[(odd > 0.1) & (odd < 0.4)] = float("nan"), float("-inf")
        x = lay_out(x, layout if "unbatched" not in case.id else "nchw")
        wanted, places = case.reference(x, **case.kwargs, return_indices=True)
        with tritune.use_backend(backend_of(tier)), poisoned():
            y, indices = case.op(x.to(device), **case.kwargs, return_indices=True)
            plain = case.op(x.to(device), **case.kwargs)
        torch.testing.assert_close(y.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(plain.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices.cpu(), places)
        assert indices.dtype == torch.int64 and indices.stride() == y.stride()


def pool(x: torch.Tensor, device: str, tier: str, *args: Any, **kwargs: Any) -> Any:
    with tritune.use_backend(backend_of(tier)), poisoned():
        return tritune.max_pool2d(x.to(device), *args, **kwargs)


class TestRules:
    """torch's rules, written down (the values were read off torch 2.13 on the CPU)."""

    pytestmark = every_backend

    def test_the_last_nan_wins(self, device, tier):
        x = torch.tensor([[[[float("nan"), 1.0], [float("nan"), 3.0]]]])
        y, index = pool(x, device, tier, 2, return_indices=True)
        assert y.isnan().all() and index.item() == 2

    def test_the_first_of_equals_wins(self, device, tier):
        y, index = pool(torch.tensor([[[[1.0, 3.0], [3.0, 3.0]]]]), device, tier, 2, return_indices=True)
        assert y.item() == 3 and index.item() == 1

    def test_negative_zero_is_kept_if_first(self, device, tier):
        y = pool(torch.tensor([[[[-0.0, 0.0], [0.0, 0.0]]]]), device, tier, 2)
        assert torch.signbit(y).all()

    @pytest.mark.parametrize("winners", ["indices", "gradient", "none"])
    def test_sign_of_equal_zeros(self, winners, device, tier):
        """Rows first, columns second is another order; see docs/differences.md."""
        x = torch.tensor([[[[-1.0, 0.0], [-0.0, -1.0]]]]).repeat(1, 3, 2, 8)
        x = x.to(device).requires_grad_(winners == "gradient")
        y = pool(x, device, tier, 2, return_indices=winners == "indices")
        y = y[0] if winners == "indices" else y
        assert (y == 0).all() and (winners == "none" or not torch.signbit(y).any())

    def test_all_negative_infinity(self, device, tier):
        x = torch.full((1, 1, 2, 2), float("-inf"))
        assert pool(x, device, tier, 2, return_indices=True)[1].item() == 0
        _, index = pool(x, device, tier, 2, 1, 1, return_indices=True)
        assert index.flatten().tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_index_of_negative_infinity_in_three_dimensions(self, dtype, layout, device, tier):
        """torch's CPU kernel for 16 bits in channels last forgets the plane; see docs/differences.md."""
        x = lay_out(torch.full((1, 8, 4, 4, 4), float("-inf"), dtype=dtype), layout).to(device)
        with tritune.use_backend(backend_of(tier)):
            _, index = tritune.max_pool3d(x, 2, return_indices=True)
        if device != "cpu" or tier != "torch" or dtype == torch.float32 or layout == "nchw":
            wanted = torch.tensor([0, 2, 8, 10, 32, 34, 40, 42], device=device)
            assert (index[0].flatten(1) == wanted).all()

    def test_gradient_of_an_all_negative_infinity_window_goes_to_its_first_pixel(self, device, tier):
        x = torch.full((1, 1, 2, 2), float("-inf"), device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            tritune.max_pool2d(x, 2).sum().backward()
        assert x.grad.flatten().tolist() == [1, 0, 0, 0]

    def test_window_in_the_padding(self, device, tier):
        """Legal arguments where torch 2.13 writes outside its buffers; see docs/differences.md."""
        x = torch.randn(1, 1, 2, 2, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)), poisoned():
            y = tritune.max_pool2d(x, 2, 1, 1, dilation=3)
            y.sum().backward()
        finite = y.isfinite()
        assert y.shape == (1, 1, 1, 1)
        assert not finite.any() or torch.isin(y[finite], x).all()
        assert x.grad.sum().item() == finite.sum().item()
        with pytest.raises(RuntimeError, match="padding"):
            tritune.max_pool2d(x, 2, 1, 1, dilation=3, return_indices=True)

    @pytest.mark.parametrize("columns", [2, 128])  # of the window: 4 taps, one byte, and 256, two bytes
    def test_second_derivative_of_windows_in_the_padding(self, columns, device, tier):
        """The gradient of the gradient picks what lies where the winners do, and nothing where there is none."""
        x = torch.randn(1, 2, 2, 2, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)), poisoned():
            y = tritune.max_pool2d(x, (2, columns), 1, (1, columns // 2), dilation=(3, 1))
            v = torch.ones_like(y, requires_grad=True)
            (dx,) = torch.autograd.grad(y, x, v, create_graph=True)
            (dv,) = torch.autograd.grad(dx, v, torch.ones_like(dx))
        assert not y.isfinite().any() and torch.equal(dv, torch.zeros_like(dv))

    def test_empty_batch(self, device, tier):
        x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            y = tritune.max_pool2d(x, 2)
            y.sum().backward()
        assert y.shape == (0, 3, 2, 2) and x.grad.shape == x.shape


def indices_of(kind: str, x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Where the elements of x go in planes of that size."""
    full, rows = math.prod(size), x.shape[0] * x.shape[1]
    count = x.numel() // rows
    if kind == "permuted":  # mostly outside of their own windows, each once
        flat = torch.stack([torch.randperm(full)[:count] for _ in range(rows)])
    elif kind == "equal":
        flat = torch.full((rows, count), full // 2)
    elif kind == "repeated":  # in and out of their windows, several times each
        flat = torch.randint(0, 6, (rows, count))
    else:
        flat = torch.randint(0, full, (rows, count))
    return flat.view(x.shape)


class TestUnpooling:
    """Values, and the gradient, exactly as torch on the CPU, where the last of several writers wins."""

    pytestmark = every_backend
    SHAPES = ((2, 9, 11), (2, 5, 6, 7), (1, 3, 4, 5, 4))

    def both(self, call: Callable[..., torch.Tensor], x: torch.Tensor, device: str, tier: str) -> None:
        """Of ``call(namespace, x)``; twice, as one launch after the other may not differ."""
        exact = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        wanted = call(F, exact)
        dy = torch.randn_like(wanted)
        for _ in range(2):
            leaf = x.detach().to(device).requires_grad_()
            # torch's own refuses to run where memory is poisoned.
            with tritune.use_backend(backend_of(tier)), nullcontext() if tier == "torch" else poisoned():
                y = call(tritune, leaf)
                (gradient,) = torch.autograd.grad(y, leaf, dy.to(device))
            torch.testing.assert_close(y.cpu(), wanted, rtol=0, atol=0)
            torch.testing.assert_close(gradient.cpu(), torch.autograd.grad(wanted, exact, dy, True)[0], rtol=0, atol=0)
            assert y.dim() != 4 or y.stride() == wanted.stride()  # in three dimensions torch's is never channels last

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
    @pytest.mark.parametrize("shape", SHAPES, ids=len)
    def test_round_trip(self, shape, layout, dtype, device, tier):
        rank = len(shape) - 2
        x = lay_out(torch.randn(shape).to(dtype), layout)
        for window in ((2,), (3, 2, 1)):
            y, places = getattr(F, f"max_pool{rank}d")(x, *window, return_indices=True)
            y = torch.randn_like(y)  # windows that share a maximum give different values to it

            def call(namespace: Any, y: torch.Tensor, window: Any = window, places: Any = places) -> torch.Tensor:
                function: Callable[..., torch.Tensor] = getattr(namespace, f"max_unpool{rank}d")
                return function(y, places.to(y.device), *window, output_size=shape)

            self.both(call, y, device, tier)

    @pytest.mark.parametrize("kind", ["permuted", "equal", "repeated", "random"])
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    @pytest.mark.parametrize("shape", SHAPES, ids=len)
    def test_any_indices(self, shape, layout, kind, device, tier):
        """Windows overlap, and the result is larger than by default."""
        rank = len(shape) - 2
        x = lay_out(torch.randn(shape), layout)
        size = tuple(2 * (full - 1) + 2 for full in shape[2:])
        places = lay_out(indices_of(kind, x, size), layout)

        def call(namespace: Any, x: torch.Tensor) -> torch.Tensor:
            function: Callable[..., torch.Tensor] = getattr(namespace, f"max_unpool{rank}d")
            return function(x, places.to(x.device), 3, 2, 1, output_size=size)

        self.both(call, x, device, tier)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_one_window(self, rank, device, tier):
        """Behind it the next would lie over the same pixel, if there were one."""
        places, function = torch.zeros((1, 1, *(1,) * rank), dtype=torch.int64), f"max_unpool{rank}d"
        x = torch.ones(places.shape)
        self.both(lambda namespace, x: getattr(namespace, function)(x, places.to(x.device), 3, 1, 1), x, device, tier)

    @pytest.mark.parametrize("shape", [(1, 1, 300), (1, 1, 12, 12)], ids=len)
    def test_more_strays_than_one_program_sees(self, shape, device, tier):
        rank = len(shape) - 2
        x = torch.randn(shape)
        places = torch.randint(0, 40, shape)
        function = f"max_unpool{rank}d"
        self.both(lambda namespace, x: getattr(namespace, function)(x, places.to(x.device), 2), x, device, tier)

    def test_layouts_mix(self, device, tier):
        x = torch.randn(2, 5, 4, 6)
        y, places = F.max_pool2d(lay_out(torch.randn(2, 5, 8, 12), "nhwc"), 2, return_indices=True)
        self.both(lambda namespace, x: namespace.max_unpool2d(x, places.to(x.device), 2), x, device, tier)
        places = places.contiguous()
        self.both(lambda namespace, y: namespace.max_unpool2d(y, places.to(y.device), 2), y, device, tier)

    @pytest.mark.parametrize("unbatched", [(3, 9), (3, 4, 5), (2, 3, 4, 3)], ids=len)
    def test_unbatched(self, unbatched, device, tier):
        rank = len(unbatched) - 1
        x = torch.randn(unbatched)
        places = indices_of("random", x.unsqueeze(0), (4,) * rank).squeeze(0)
        function = f"max_unpool{rank}d"
        self.both(lambda namespace, x: getattr(namespace, function)(x, places.to(x.device), 2), x, device, tier)

    @pytest.mark.parametrize("stray", [-1, 24, 2**40])
    def test_indices_outside_of_the_result(self, stray, device, tier):
        """The kernels leave them out, in the gradient too; on the CPU they are torch's error."""
        x = torch.randn(1, 1, 2, 3, device=device, requires_grad=True)
        places = torch.tensor([[[[0, stray, 5], [13, 14, 23]]]], device=device)
        with tritune.use_backend(backend_of(tier)):
            if tier == "torch":
                with pytest.raises(RuntimeError, match="invalid max index"):
                    tritune.max_unpool2d(x, places, 2)
                return
            y = tritune.max_unpool2d(x, places, 2)
            (gradient,) = torch.autograd.grad(y.sum(), x)
        wanted = torch.zeros(24, device=device)
        kept = torch.tensor([True, False, True, True, True, True], device=device)
        wanted[places.flatten()[kept]] = x.detach().flatten()[kept]
        assert torch.equal(y.flatten(), wanted)
        assert torch.equal(gradient.flatten(), kept.float())


class TestBranches:
    pytestmark = kernels_only

    @pytest.mark.parametrize("block", [(8, 4), (64, 1), (16, 32)], ids=str)
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_tiles(self, block, layout, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import pool

        config = Config(BLOCK_M=block[0], BLOCK_C=block[1], num_warps=4, num_stages=1)
        with override(pool.FORWARD, config), override(pool.BACKWARD, config):
            check(CASES[0], torch.float16, layout, device, "triton")

    @pytest.mark.parametrize("splits", [2, 4, 7])
    @pytest.mark.parametrize("tile", [(16, 1), (4, 8)], ids=str)
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_planes_in_parts(self, layout, tile, splits, device):
        """Of 80 elements, which 4 parts of 2 tiles of 16 would not share evenly: one would be empty."""
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import pool

        config = Config(BLOCK_L=tile[0], BLOCK_C=tile[1], SPLIT=splits, num_warps=4, num_stages=1)
        x = lay_out(-1 - torch.rand(2, 9, 8, 10).mul(8).round(), layout)
        x[0, :4, ::3, ::4], x[0, 4] = float("nan"), float("-inf")
        with tritune.use_backend("triton"), override(pool.GLOBAL, config), poisoned():
            y, index = tritune.adaptive_max_pool2d(x.to(device), 1, return_indices=True)
            plain = tritune.global_max_pool(x.to(device))
            mean = tritune.global_avg_pool(x[1:].to(device))
        wanted, places = F.adaptive_max_pool2d(x, 1, return_indices=True)
        assert torch.equal(index.cpu(), places)
        for values in (y, plain):
            torch.testing.assert_close(values.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(mean.cpu(), x[1:].mean((2, 3), keepdim=True))

    @pytest.mark.parametrize("view", ["cut", "every-other-row", "expanded", "one-pixel", "transposed", "channels"])
    @pytest.mark.parametrize("op", ["global_avg_pool", "global_max_pool"])
    def test_planes_that_are_not_dense(self, op, view, device):
        x, shape = torch.randn(2, 6, 8, 10), (2, 6, 8, 10)
        views = {
            "cut": x[..., 1:9],
            "every-other-row": x[:, :, ::2],
            "expanded": x[:, :, :1].expand(shape),
            "one-pixel": x[:, :, :1, :1].expand(shape),
            "transposed": x.transpose(2, 3),
            "channels": x[:, :5],
        }
        with tritune.use_backend("triton"), poisoned():
            y = getattr(tritune, op)(views[view].to(device))
        torch.testing.assert_close(y.cpu(), GLOBAL[op](views[view]))

    def test_offset_width_follows_the_window(self):
        from tritune.ops.pool_operators import offset_dtype

        widths = [offset_dtype((200, 200), (9, 9), (k, k)) for k in (15, 16, 181, 182)]
        assert widths == [torch.uint8, torch.int16, torch.int16, torch.int32]
        assert offset_dtype((200, 200), (20, 20), ()) == torch.uint8
        assert offset_dtype((200, 200), (9, 9), ()) == torch.int16

    @pytest.mark.parametrize("kernel_size", [(2, 2), (16, 16)])
    @pytest.mark.parametrize("return_indices", [False, True])
    def test_what_is_saved_for_backward(self, kernel_size, return_indices, device):
        x = torch.randn(1, 2, 17, 18, device=device, requires_grad=True)
        with tritune.use_backend("triton"):
            y = tritune.max_pool2d(x, kernel_size, 1, return_indices=return_indices)
        node = (y[0] if return_indices else y).grad_fn
        (winners,) = node.saved_tensors
        assert winners.dtype == (torch.int64 if return_indices else torch.uint8 if kernel_size[0] == 2 else torch.int16)

    def test_gradient_through_indices_op_layouts_mix(self, device):
        x = torch.randn(1, 6, 7, 7, device=device).to(memory_format=torch.channels_last).requires_grad_()
        dy = torch.randn(1, 6, 3, 3, device=device)  # contiguous, unlike the output
        with tritune.use_backend("triton"):
            (ours,) = torch.autograd.grad(tritune.max_pool2d(x, 3, 2), x, dy)
        (wanted,) = torch.autograd.grad(F.max_pool2d(x, 3, 2), x, dy)
        torch.testing.assert_close(ours, wanted)
        assert ours.stride() == x.stride()


@pytest.mark.gpu
class TestLarge:
    def test_offsets_beyond_2_31(self, device):
        x = torch.zeros(3, 64, 4096, 4096, device=device, dtype=torch.float16).to(memory_format=torch.channels_last)
        x[2, :, -2:, -2:] = torch.rand(64, 2, 2, device=device, dtype=torch.float16) + 1
        with tritune.use_backend("triton"):
            y, index = tritune.max_pool2d(x, 2, return_indices=True)
        wanted, _ = F.max_pool2d(x[2:, :, -2:, -2:], 2, return_indices=True)
        assert torch.equal(y[2:, :, -1:, -1:], wanted)
        assert (index[2, :, -1, -1] >= 4094 * 4096).all()

    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_resnet_stem(self, layout, device):
        check(case("stem", (32, 64, 112, 112), 3, 2, 1), torch.bfloat16, layout, device, "triton")


@pytest.mark.static
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("windows", ["fixed", "adaptive"])
def test_changing_sizes_compile_once(windows, layout):
    """In NCHW a change of the width may: rows have another alignment and their bands another size."""
    from tritune.kernels import pool
    from tritune.ops.pool_operators import kernel_window

    binaries: dict[str, set[str]] = {}
    sizes = ((1, 1, 16), (2, 7, 16), (16, 32, 16), (1, 16, 16), (64, 64, 16))
    if layout == "nhwc":
        sizes = (*sizes, (1, 1, 1), (2, 7, 9), (16, 32, 48), (1, 16, 1), (3, 1, 17), (64, 64, 64))
    for tunable in (pool.FORWARD, pool.BACKWARD, pool.UNPOOL, pool.GATHER):
        for n, h, w in sizes:
            out = ((h - 1) // 2 + 1, (w - 1) // 2 + 1)
            window = pool.Window.of((3, 3), (2, 2), (1, 1), (1, 1))
            if windows == "adaptive":
                out = (out[0], 7)  # windows of more than one size
                window = kernel_window((h, w), out, ((), (), (), ()))
            x = torch.empty(n, 24, h, w, dtype=torch.bfloat16, device="meta")
            index_bytes = 8 if tunable in (pool.UNPOOL, pool.GATHER) else 1
            reduce = "last" if tunable is pool.UNPOOL else "max"
            problem = pool.problem_of(x, out, window, reduce, index_bytes=index_bytes, layout=layout)
            config = next(one for one in tunable.configs if layout == "nhwc" or one.get("BLOCK_W", 16) == 16)
            if layout == "nchw" and tunable is not pool.GATHER:
                config = next(one for one in tunable.configs if one.get("BLOCK_W") == 16)
            for launch in tunable.launches(problem, config):
                source = launch.source()
                key = (source.signature, source.constants, source.attrs)
                name = f"{tunable.name} {launch.kernel.fn.__name__}"
                binaries.setdefault(name, set()).add(repr([sorted(part.items()) for part in key]))
    assert {name: len(found) for name, found in binaries.items() if len(found) > 1} == {}
