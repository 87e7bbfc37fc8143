"""Every public function and module beside torch's own, small and large: what Python costs, and what computing does.

The table of the README is of the same calls: ``make overhead``. There the two run in turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritune.perf.calls import CALLS, DIRECTIONS, SIZES, Call, prepare

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.benchmark(max_time=0.05, min_rounds=5, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("provider", ["tritune", "torch"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize("device", DEVICES)
def test_call(bench: Any, device: str, call: Call, size: str, direction: str, provider: str) -> None:
    with torch.set_grad_enabled(direction == "training"):
        ours, torchs = prepare(call, size, direction, device)
        # The time of a small call is the host's: there is no wait for a GPU.
        bench(f"{call.name}, {size}, {direction}, {device}", ours if provider == "tritune" else torchs,
              device if size == "large" else "cpu")  # fmt: skip
