"""The first layers of perf/conv.py and perf/pool.py on a GPU as a model calls them, ours beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritune.autotune.workload import Case, random_tensors
from tritune.perf import conv, pool
from tritune.perf.families import operator_of
from tritune.perf.providers import prepare

CASES = [*conv.CASES[:6], *pool.CASES[:4]] if torch.cuda.is_available() else []


@pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("provider", ["tritune", "torch", "torch_channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_layer(bench: Any, case: Case, provider: str) -> None:
    operator = operator_of(case)
    bench(case.id, prepare(operator, case, provider, random_tensors(operator, case, "cuda", seed=0)), "cuda")
