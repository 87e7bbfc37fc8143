"""max_pool2d on every backend: values, winners, gradients, ties, NaN, windows that see only padding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, backend_of, check, lay_out, poisoned

import tritune

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_backend = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
kernels_only = [pytest.mark.interpret, pytest.mark.gpu]


def case(id: str, x: tuple[int, ...], *args: Any, **kwargs: Any) -> Case:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return Case(id, tritune.max_pool2d, F.max_pool2d, {"input": x}, {**dict(zip(names, args, strict=False)), **kwargs})


CASES = [
    case("resnet", (2, 20, 9, 7), 3, 2, 1),
    case("vgg", (2, 16, 8, 6), 2),
    case("ceil", (1, 8, 10, 9), 2, 2, 0, 1, True),
    case("ceil-padded", (1, 5, 7, 6), 3, 3, 1, 1, True),
    case("overlapping", (1, 9, 6, 5), 3, 1, 1),
    case("rectangular", (2, 9, 8, 8), (3, 2), (1, 3), 1, (2, 1)),
    case("dilated", (1, 6, 9, 9), 2, 1, 1, 3),
    case("stride-beyond-window", (1, 4, 10, 9), 2, 3),
    case("unbatched", (6, 7, 5), 3, 2, 1),
    case("one-channel", (2, 1, 7, 5), 2),
    case("whole-plane", (2, 12, 4, 3), (4, 3)),
    case("wide-offsets", (1, 1, 18, 17), (18, 16), 1, (1, 0)),  # 288 taps: two bytes
]
COMPAT = ("resnet",)


def parameters() -> list[Any]:
    rows = []
    for one, dtype, layout in itertools.product(CASES, DTYPES, ("nchw", "nhwc")):
        marks = [pytest.mark.compat] if one.id in COMPAT and layout == "nhwc" else []
        rows.append(pytest.param(one, dtype, layout, id=f"{one.id}-{str(dtype)[6:]}-{layout}", marks=marks))
    return rows


class TestCases:
    pytestmark = every_backend

    @pytest.mark.parametrize("case, dtype, layout", parameters())
    def test_forward_and_gradient(self, case, dtype, layout, device, tier):
        check(case, dtype, layout, device, backend_of(tier))

    @pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.id)
    def test_strided_views_are_read_in_place(self, case, device, tier):
        check(case, torch.float32, "strided", device, backend_of(tier))

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
    @pytest.mark.parametrize("layout", ["nchw", "nhwc"])
    def test_values_and_indices_are_exact(self, case, layout, device, tier):
        # Coarse values make ties; with NaN and -inf among them every rule of the winner is used.
        x = lay_out(torch.randn(case.shapes["input"]).mul(2).round(), layout)
        x[..., 1, :3], x[..., 3:6, 2:5] = float("nan"), float("-inf")
        wanted, places = F.max_pool2d(x, **case.kwargs, return_indices=True)
        with tritune.use_backend(backend_of(tier)), poisoned():
            y, indices = tritune.max_pool2d(x.to(device), **case.kwargs, return_indices=True)
            plain = tritune.max_pool2d(x.to(device), **case.kwargs)
        torch.testing.assert_close(y.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(plain.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices.cpu(), places)
        assert indices.dtype == torch.int64 and indices.stride() == places.stride()


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

    def test_all_negative_infinity(self, device, tier):
        x = torch.full((1, 1, 2, 2), float("-inf"))
        assert pool(x, device, tier, 2, return_indices=True)[1].item() == 0
        _, index = pool(x, device, tier, 2, 1, 1, return_indices=True)
        assert index.flatten().tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]

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

    def test_empty_batch(self, device, tier):
        x = torch.randn(0, 3, 4, 4, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            y = tritune.max_pool2d(x, 2)
            y.sum().backward()
        assert y.shape == (0, 3, 2, 2) and x.grad.shape == x.shape


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

    def test_offset_width_follows_the_window(self):
        from tritune.kernels.pool import Window

        widths = {k: Window(k, k, 1, 1, 0, 0, 1, 1).offset_dtype for k in (15, 16, 181, 182)}
        assert list(widths.values()) == [torch.uint8, torch.int16, torch.int16, torch.int32]

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
def test_changing_sizes_compile_once():
    from tritune.kernels import pool

    binaries: dict[str, set[str]] = {}
    window = pool.Window(3, 3, 2, 2, 1, 1, 1, 1)
    for tunable in (pool.FORWARD, pool.BACKWARD):
        for n, h, w in ((1, 1, 1), (2, 7, 9), (16, 32, 48), (1, 16, 1), (3, 1, 17), (64, 64, 64)):
            pq = ((h - 1) // 2 + 1, (w - 1) // 2 + 1)
            problem = pool.problem_of((n, 24, h, w), pq, window, torch.bfloat16, 1, True)
            for launch in tunable.launches(problem, tunable.configs[0]):
                source = launch.source()
                key = (source.signature, source.constants, source.attrs)
                binaries.setdefault(tunable.name, set()).add(repr([sorted(part.items()) for part in key]))
    assert {name: len(found) for name, found in binaries.items()} == {"max_pool2d": 1, "max_pool2d_backward": 1}
