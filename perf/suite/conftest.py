"""Benchmarks beside torch: ``pytest perf/``, or ``make bench``. pytest-benchmark times one call after the other, so a
few percent of difference are noise; what must hold is tested in tests/test_perf.py."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("tritune") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))


@pytest.fixture
def bench_case(benchmark: Any) -> Callable[[Any, str, str], None]:
    """Times one provider on one case of tritune.perf.cases; on a GPU a call and the wait for its result (the device's
    own time is what `make gpu` measures)."""
    from tritune.perf.cases import prepare, random_tensors

    def run(case: Any, provider: str, device: str) -> None:
        benchmark.group = case.id
        call = prepare(case, provider, random_tensors(case, device, seed=0))

        def call_and_wait() -> None:
            call()
            torch.cuda.synchronize()

        benchmark(call if device == "cpu" else call_and_wait)

    return run
