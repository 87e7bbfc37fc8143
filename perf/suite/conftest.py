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
def bench(benchmark: Any) -> Callable[[str, Callable[[], Any], str], None]:
    """Times a call, in a group of the table; on a GPU it is the call and the wait for its result (the device's own
    time is what `make gpu` measures)."""

    def run(group: str, call: Callable[[], Any], device: str) -> None:
        benchmark.group = group

        def call_and_wait() -> None:
            call()
            torch.cuda.synchronize()

        benchmark(call if device == "cpu" else call_and_wait)

    return run
