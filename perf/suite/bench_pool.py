"""max_pool2d as a model calls it, ours and torch's in one group of the table. On a GPU also those of perf/pool.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritune.perf.case import Case
from tritune.perf.pool import CASES

WINDOW = {"kernel_size": 3, "stride": 2, "padding": 1}
CPU_CASES = [
    Case("stem", "max_pool2d", {"input": (2, 64, 56, 56)}, WINDOW, "fp32", "nchw"),
    Case("stem", "max_pool2d", {"input": (2, 64, 56, 56)}, WINDOW, "fp32", "nhwc"),
    Case("stem", "max_pool2d", {"input": (2, 64, 56, 56)}, WINDOW, "fp32", "nchw", "fwd+bwd"),
]
GPU_CASES = CASES[:4] if torch.cuda.is_available() else []


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
