"""conv2d as a model calls it, ours and torch's in one group of the table. On a GPU also the layers of perf/conv.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritune.perf.case import Case
from tritune.perf.conv import CASES

CPU_CASES = [
    Case("small", "conv2d", {"input": (1, 32, 32, 32), "weight": (32, 32, 3, 3), "bias": (32,)},
         {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "activation": "relu"}, "fp32", "nchw"),
    Case("wide", "conv2d", {"input": (4, 64, 28, 28), "weight": (64, 64, 3, 3), "bias": (64,)},
         {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}, "fp32", "nhwc"),
    Case("depthwise", "conv2d", {"input": (4, 64, 28, 28), "weight": (64, 1, 3, 3)},
         {"stride": 1, "padding": 1, "dilation": 1, "groups": 64}, "fp32", "nchw"),
    Case("wide", "conv2d", {"input": (4, 64, 28, 28), "weight": (64, 64, 3, 3), "bias": (64,)},
         {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}, "fp32", "nhwc", "fwd+bwd"),
]  # fmt: skip
GPU_CASES = CASES[:6] if torch.cuda.is_available() else []


pytestmark = pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=True, warmup_iterations=3)


@pytest.mark.parametrize("provider", ["tritune", "torch"])
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.id)
def test_cpu(bench_case: Any, case: Case, provider: str) -> None:
    # torch gets the layout that we get.
    peer = "torch" if case.layout == "nchw" else "torch_channels_last"
    bench_case(case, peer if provider == "torch" else provider, "cpu")


@pytest.mark.parametrize("provider", ["tritune", "torch", "torch_channels_last"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
def test_gpu(bench_case: Any, case: Case, provider: str) -> None:
    bench_case(case, provider, "cuda")
