"""Host time of a call that has next to nothing to compute: what Python costs, ours beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tritune

CALLS = {
    "conv2d": {
        "tritune": lambda x, w: tritune.conv2d(x, w, None, 1, 1),
        "torch": lambda x, w: F.conv2d(x, w, None, 1, 1),
    },
    "max_pool2d": {
        "tritune": lambda x, w: tritune.max_pool2d(x, 3, 2, 1),
        "torch": lambda x, w: F.max_pool2d(x, 3, 2, 1),
    },
    "scaled_dot_product_attention": {
        "tritune": lambda x, w: tritune.scaled_dot_product_attention(x, x, x),
        "torch": lambda x, w: F.scaled_dot_product_attention(x, x, x),
    },
}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.benchmark(max_time=0.3, min_rounds=20, warmup=True, warmup_iterations=100)
@pytest.mark.parametrize("provider", ["tritune", "torch"])
@pytest.mark.parametrize("direction", ["no grad", "grad", "grad and backward"])
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("device", DEVICES)
def test_host(benchmark: Any, device: str, op: str, direction: str, provider: str) -> None:
    benchmark.group = f"host {op}, {direction}, {device}"
    x = torch.randn(1, 4, 6, 6, device=device, requires_grad=direction != "no grad")
    w = torch.randn(4, 4, 3, 3, device=device, requires_grad=direction != "no grad")
    call = CALLS[op][provider]
    if direction == "grad and backward":
        dy = torch.ones_like(call(x, w))
        leaves = (x, w) if op == "conv2d" else (x,)
        benchmark(lambda: torch.autograd.grad(call(x, w), leaves, dy))
    else:
        benchmark(call, x, w)
