"""Random calls against torch: shapes, strides, layouts, dtypes and options drawn together, a fixed seed each."""

from __future__ import annotations

import functools
import random
from contextlib import nullcontext
from typing import Any

import pytest
import test_pool
import torch
from harness import (
    TORCH_SAMPLES,
    Case,
    Errors,
    assert_close,
    backend_of,
    few_dots,
    lay_out,
    poisoned,
    run,
    without_onednn,
)
from test_conv import reference_of
from torch import Tensor

import tritune

pytestmark = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
SMOOTH = (None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")
DRAWS = 120


def draw_layout(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    """Contiguous, channels last, gaps in every dimension, a slice of a larger tensor, or transposed planes."""
    kind = rng.choice(("nchw", "nhwc", "nhwc", "strided", "slice", "transposed"))
    if kind == "slice":
        wide = torch.full([size + 2 for size in t.shape], float("nan"), dtype=t.dtype)
        wide = lay_out(wide, rng.choice(("nchw", "nhwc")))
        return wide[tuple(slice(1, -1) for _ in t.shape)].copy_(t)
    if kind == "transposed":
        return t.transpose(-2, -1).contiguous().transpose(-2, -1)
    return lay_out(t, kind)


def draw_conv(rng: random.Random) -> Case:
    """Any of the six, most often conv2d. Depth is short, so that the interpreter keeps up."""
    op = rng.choice(("conv2d", "conv2d", "conv2d", "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d",
                     "conv_transpose2d", "conv_transpose3d"))  # fmt: skip
    rank, transposed = int(op[-2]), "transpose" in op
    groups = rng.choice((1, 1, 1, 2, 3))
    c, k = rng.choice((1, 2, 3, 4, 5, 8, 16, 24)), rng.choice((1, 2, 3, 8, 16, 20))
    if rng.random() < 0.25:  # depthwise
        groups, c, k = rng.choice((2, 5, 8, 16)), 1, rng.choice((1, 1, 2))
    taps = (rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 3, 3, 5)), rng.choice((1, 2, 3, 3, 4)))[-rank:]
    dilation = (1, rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2)))[-rank:]
    stride = (rng.choice((1, 2)), rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 4)))[-rank:]
    padding = (rng.randint(0, 1), rng.randint(0, 3), rng.randint(0, 3))[-rank:]
    extra = tuple(rng.randint(0, max(step, dil) - 1) for step, dil in zip(stride, dilation, strict=True))
    sizes = []
    for i in range(rank):
        reach, more = (taps[i] - 1) * dilation[i] + 1, rng.randint(0, 2 if rank == 3 else 7)
        if transposed:  # the result has a pixel at least
            least = -(-max(0, 2 * padding[i] - reach - extra[i] + 1) // stride[i]) + 1
        else:
            least = max(1, reach - 2 * padding[i])
        sizes.append(least + more)
    kwargs: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "activation": rng.choice(SMOOTH)
    }  # fmt: skip
    if transposed:
        kwargs["output_padding"] = extra
        c, k = min(c, 16), min(k, 16)
    first, second = (c * groups, k) if transposed else (k * groups, c)
    shapes = {"input": (rng.choice((1, 2, 3)), c * groups, *sizes), "weight": (first, second, *taps)}
    if rng.random() < 0.5:
        shapes["bias"] = (k * groups,)
    if k * groups >= 8 and rng.random() < 0.5:  # the gradient of fewer numbers compares one lucky rounding with another
        shapes["scale"] = (k * groups,)
    return Case(op, getattr(tritune, op), reference_of(op), shapes, kwargs)


def draw_windows(rng: random.Random, rank: int, dilated: bool) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments, and an image that has a window at least. In three dimensions all is smaller."""
    taps = [rng.choice((1, 2, 3) if rank == 3 else (1, 2, 2, 3, 3, 5)) for _ in range(rank)]
    dilation = [rng.choice((1, 1, 1, 2, 3)) if dilated else 1 for _ in range(rank)]
    stride = rng.choice((None, *(tuple(rng.choice((1, 2, 3)) for _ in range(rank)) for _ in range(2))))
    kwargs = {
        "kernel_size": tuple(taps), "stride": stride, "padding": tuple(rng.randint(0, t // 2) for t in taps),
        "ceil_mode": rng.random() < 0.4,
    }  # fmt: skip
    reach = [(t - 1) * dil + 1 for t, dil in zip(taps, dilation, strict=True)]
    more = {1: 40, 2: 7, 3: 3}[rank]
    sizes = tuple(max(dil, low) + rng.randint(0, more) for low, dil in zip(reach, dilation, strict=True))
    return kwargs | ({"dilation": tuple(dilation)} if dilated else {}), sizes


def draw_planes(rng: random.Random) -> tuple[int, int]:
    return rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 8, 17))


def draw_max_pool(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 2, 3))
    kwargs, sizes = draw_windows(rng, rank, dilated=True)
    return pooling(f"max_pool{rank}d", (*draw_planes(rng), *sizes), kwargs)


def draw_avg_pool(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 2, 3))
    kwargs, sizes = draw_windows(rng, rank, dilated=False)
    kwargs["count_include_pad"] = rng.random() < 0.5
    if rank > 1:
        kwargs["divisor_override"] = rng.choice((None, None, 3, -2))
    return pooling(f"avg_pool{rank}d", (*draw_planes(rng), *sizes), kwargs)


def draw_lp_pool(rng: random.Random) -> Case:
    rank = rng.choice((1, 2, 2, 3))
    kwargs, sizes = draw_windows(rng, rank, dilated=False)
    kwargs |= {"norm_type": rng.choice((1, 2, 2.0))}
    del kwargs["padding"]
    if rank == 1:  # a tuple is torch's TypeError
        kwargs["kernel_size"] = kwargs["kernel_size"][0]
    return pooling(f"lp_pool{rank}d", (*draw_planes(rng), *sizes), kwargs)


def draw_adaptive_pool(rng: random.Random) -> Case:
    """To fewer elements or to more, or to one."""
    rank, kind = rng.choice((1, 2, 2, 3)), rng.choice(("avg", "max"))
    largest = {1: 40, 2: 12, 3: 5}[rank]
    sizes, outs = (tuple(rng.randint(1, largest) for _ in range(rank)) for _ in range(2))
    shape = (*draw_planes(rng), *sizes)
    if rng.random() < 0.25:
        return pooling(f"global_{kind}_pool", shape, {"keepdim": rng.random() < 0.5})
    kept = tuple(None if rng.random() < 0.2 else out for out in outs) if rank > 1 else outs
    return pooling(f"adaptive_{kind}_pool{rank}d", shape, {"output_size": kept})


def pooling(op: str, shape: tuple[int, ...], kwargs: dict[str, Any]) -> Case:
    return Case(op, getattr(tritune, op), test_pool.reference_of(op), {"input": shape}, kwargs)


DRAWN = {
    draw_conv: DRAWS, draw_max_pool: DRAWS, draw_avg_pool: DRAWS, draw_lp_pool: DRAWS // 2, draw_adaptive_pool: DRAWS
}  # fmt: skip
ROWS = [
    pytest.param(
        draw, seed, id=f"{draw.__name__.removeprefix('draw_')}-{seed}",
        marks=[pytest.mark.full] if seed >= count // 4 else [],
    )
    for draw, count in DRAWN.items()
    for seed in range(count)
]  # fmt: skip


@pytest.mark.parametrize("draw, seed", ROWS)
def test_same_as_torch(draw, seed, device, tier):
    rng = random.Random(seed)
    case = draw(rng)
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    layout_seed = rng.random()
    onednn = without_onednn if dtype is torch.bfloat16 else nullcontext

    def drawn(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
        """Inputs, torch's results in float64, and those in ``dtype`` for both layouts: of an output with two elements
        one sample of torch's error says little."""
        torch.manual_seed(seed + 1000 * number)
        inputs = case.inputs(dtype, "nchw", "cpu")
        if "weight" in inputs:
            # As in a trained net: with activations deep in saturation the errors of both sides are a lottery.
            inputs["weight"] /= inputs["weight"][0].numel() ** 0.5
        layouts = random.Random(layout_seed)
        inputs = {name: (draw_layout(layouts, t) if t.dim() > 2 else t).to(device) for name, t in inputs.items()}
        exact = run(case.reference, {name: t.double().cpu() for name, t in inputs.items()}, case.kwargs, seed)
        with onednn():
            torchs = [
                run(
                    case.reference,
                    {name: lay_out(t.contiguous(), kind) for name, t in inputs.items()},
                    case.kwargs,
                    seed,
                )
                for kind in ("nchw", "nhwc")
            ]
        return inputs, exact, torchs

    @functools.cache
    def errors(number: int) -> dict[str, list[Errors]]:
        _, exact, torchs = drawn(number)
        return {name: [Errors.of(one[name].detach(), exact[name].detach()) for one in torchs] for name in exact}

    inputs, exact, torchs = drawn(0)
    with onednn(), tritune.use_backend(backend_of(tier)), poisoned(), few_dots():
        ours = run(case.op, inputs, case.kwargs, seed)
    for name, wanted in exact.items():
        others = (error for number in range(TORCH_SAMPLES) for error in errors(number)[name])
        assert_close(f"{case} {dtype} {name}", ours[name], wanted, torchs[0][name], others)
