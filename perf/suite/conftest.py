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
    """Times one provider on one case of a family; on a GPU a call and the wait for its result (the device's
    own time is what `make gpu` measures)."""
    from tritune.perf.case import prepare, random_tensors
    from tritune.perf.families import operator_of

    def run(case: Any, provider: str, device: str) -> None:
        benchmark.group = case.id
        operator = operator_of(case)
        call = prepare(operator, case, provider, random_tensors(operator, case, device, seed=0))

        def call_and_wait() -> None:
            call()
            torch.cuda.synchronize()

        benchmark(call if device == "cpu" else call_and_wait)

    return run
