"""Random calls against torch: shapes, strides, layouts, dtypes and options drawn together, a fixed seed each."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, assert_close, backend_of, few_dots, lay_out, poisoned, run, without_onednn
from test_conv import reference

import tritune

pytestmark = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
SMOOTH = (None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")
DRAWS = 120


def draw_layout(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    """Contiguous, channels last, gaps in every dimension, a slice of a larger tensor, or transposed planes."""
    kind = rng.choice(("nchw", "nhwc", "nhwc", "strided", "slice", "transposed"))
    if kind == "slice":
        wide = torch.full([size + 2 for size in t.shape], float("nan"), dtype=t.dtype)
        wide = wide.contiguous(memory_format=rng.choice((torch.contiguous_format, torch.channels_last)))
        return wide[tuple(slice(1, -1) for _ in t.shape)].copy_(t)
    if kind == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return lay_out(t, kind)


def draw_conv2d(rng: random.Random) -> Case:
    groups = rng.choice((1, 1, 1, 2, 3))
    c, k = rng.choice((1, 2, 3, 4, 5, 8, 16, 24)), rng.choice((1, 2, 3, 8, 16, 20))
    if rng.random() < 0.25:  # depthwise
        groups, c, k = rng.choice((2, 5, 8, 16)), 1, rng.choice((1, 1, 2))
    r, s = rng.choice((1, 1, 2, 3, 3, 5)), rng.choice((1, 2, 3, 3, 4))
    dilation = (rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2)))
    padding = (rng.randint(0, 3), rng.randint(0, 3))
    need = [max(1, (taps - 1) * dil + 1 - 2 * pad) for taps, dil, pad in zip((r, s), dilation, padding, strict=True)]
    h, w = (low + rng.randint(0, 7) for low in need)
    kwargs: dict[str, Any] = {
        "stride": (rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 4))), "padding": padding, "dilation": dilation,
        "groups": groups, "activation": rng.choice(SMOOTH),
    }  # fmt: skip
    shapes = {"input": (rng.choice((1, 2, 3)), c * groups, h, w), "weight": (k * groups, c, r, s)}
    if rng.random() < 0.5:
        shapes["bias"] = (k * groups,)
    if k * groups >= 8 and rng.random() < 0.5:  # the gradient of fewer numbers compares one lucky rounding with another
        shapes["scale"] = (k * groups,)
    return Case("conv2d", tritune.conv2d, reference, shapes, kwargs)


def draw_max_pool2d(rng: random.Random) -> Case:
    r, s = rng.choice((1, 2, 2, 3, 3, 5)), rng.choice((1, 2, 2, 3, 4))
    dilation = (rng.choice((1, 1, 2)), rng.choice((1, 1, 3)))
    padding = (rng.randint(0, r // 2), rng.randint(0, s // 2))
    reach = [(taps - 1) * dil + 1 for taps, dil in zip((r, s), dilation, strict=True)]
    h, w = (max(dil, low) + rng.randint(0, 7) for low, dil in zip(reach, dilation, strict=True))
    kwargs = {
        "kernel_size": (r, s), "stride": rng.choice((None, (1, 1), (2, 2), (3, 1))), "padding": padding,
        "dilation": dilation, "ceil_mode": rng.random() < 0.4,
    }  # fmt: skip
    shape = (rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 8, 17)), h, w)
    return Case("max_pool2d", tritune.max_pool2d, F.max_pool2d, {"input": shape}, kwargs)


@pytest.mark.parametrize("draw", [draw_conv2d, draw_max_pool2d], ids=["conv2d", "max_pool2d"])
@pytest.mark.parametrize("seed", range(DRAWS))
def test_same_as_torch(draw, seed, device, tier):
    rng = random.Random(seed)
    case = draw(rng)
    dtype = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    torch.manual_seed(seed)
    inputs = case.inputs(dtype, "nchw", "cpu")
    if "weight" in inputs:
        # As in a trained net: with activations deep in saturation the errors of both sides are a lottery.
        inputs["weight"] /= inputs["weight"][0].numel() ** 0.5
    inputs = {name: (draw_layout(rng, t) if t.dim() == 4 else t).to(device) for name, t in inputs.items()}
    exact = run(case.reference, {name: t.double().cpu() for name, t in inputs.items()}, case.kwargs, seed)
    # torch's own error, sampled in both layouts: of an output with two elements one sample says little.
    layouts = [{name: lay_out(t.contiguous(), kind) for name, t in inputs.items()} for kind in ("nchw", "nhwc")]
    with without_onednn() if dtype is torch.bfloat16 else nullcontext():
        torchs = [run(case.reference, laid_out, case.kwargs, seed) for laid_out in layouts]
        with tritune.use_backend(backend_of(tier)), poisoned(), few_dots():
            ours = run(case.op, inputs, case.kwargs, seed)
    for name, wanted in exact.items():
        worst = max((one[name] for one in torchs), key=lambda t: (t.double().cpu() - wanted).nan_to_num().norm())
        assert_close(f"{case} {dtype} {name}", ours[name], wanted, worst)
