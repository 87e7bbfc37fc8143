"""A family whose configs do what the environment says, on a clock that is made up: for the tests of ``tritune tune``.

``PLANTED="good:20 wrong:1 hangs:1"`` declares three configs in the model's order, BLOCK 1 to 3; the number is the time
of a call in microseconds. A config that hangs first leaves a file ``hanging`` in the folder ``PLANTED_FOLDER``.
"""

import os
import signal
import time
from collections.abc import Mapping
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tritune.autotune.config import Config, Estimate, Tunable
from tritune.autotune.device import detect
from tritune.autotune.resolve import resolve
from tritune.autotune.timer import Competitor, Timing, interleaved, summarise
from tritune.autotune.workload import Case, Kernel, Operator, register_family

PLANTED = [part.split(":") for part in os.environ["PLANTED"].split()]
TORCH_US = 15.0


class Problem(NamedTuple):
    size: int
    dtype: str


class Clock:
    now = 0.0
    calls = 0


class SimulatedTimer:
    """Seven samples of what the calls add to the clock."""

    def measure(
        self, competitors: Mapping[str, Competitor], seconds: float, give_up_us: float = inf
    ) -> dict[str, Timing | str]:
        def sample(name: str) -> float:
            before = Clock.now
            competitors[name].calls[0]()
            return Clock.now - before

        samples = interleaved(list(competitors), sample, 0, 7, 7, give_up_us)
        return {name: summarise(times, None, "simulated") for name, times in samples.items()}


TIMER = SimulatedTimer()
TUNABLE = Tunable(
    "planted",
    tuple(Config(BLOCK=block, num_warps=4, num_stages=1) for block in range(1, len(PLANTED) + 1)),
    lambda p: {"size": p.size, "dtype": p.dtype},
    lambda p, c, d: True,
    lambda p, c, d: Estimate(c.BLOCK, "memory"),
    lambda p, c: [],
    moved_bytes=lambda p, c: 1.0,
)


def ours(t: dict[str, torch.Tensor], problem: Problem) -> torch.Tensor:
    config = resolve(TUNABLE, problem, detect(torch.device("cpu"))).config
    what, us = PLANTED[config.BLOCK - 1]
    y = torch.empty_like(t["input"])
    y.copy_(2 * t["input"])
    if what == "wrong":
        y[-1] += 1
    elif what == "forgets":
        y = torch.empty_like(y)
        y[:-1] = 2 * t["input"][:-1]
    elif what == "wavers":
        Clock.calls += 1
        least = int(y.abs().argmin())
        y[least] *= 1 + 1e-6 * (Clock.calls % 2)
    elif what == "raises":
        raise ValueError("planted in /some/place/kernel.py")
    elif what == "exits":
        os._exit(7)
    elif what == "segfaults":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "hangs":
        Path(os.environ["PLANTED_FOLDER"], "hanging").touch()
        time.sleep(1000)
    elif what == "sleeps":
        time.sleep(0.05)
    Clock.now += float(us)
    return y


def torchs(t: dict[str, torch.Tensor]) -> torch.Tensor:
    Clock.now += TORCH_US
    return 2 * t["input"]


def tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, torch.Tensor]:
    return {"input": torch.randn(one.shapes["input"], generator=torch.Generator(device).manual_seed(seed))}


def kernel_of(one: Case, kind: str, t: dict[str, torch.Tensor]) -> Kernel:
    problem = Problem(one.shapes["input"][0], one.dtype)
    return Kernel(TUNABLE, problem, lambda arguments: ours(arguments, problem), torchs)


def double(input: torch.Tensor, **_: Any) -> torch.Tensor:
    return 2 * input


CASES = tuple(
    Case(f"layer-{size}", "planted", {"input": (size,)}, dtype="fp32", layout="", direction="fwd+bwd")
    for size in (100, 200, 300)
)
OPERATORS = {
    "planted": Operator(
        double, double, None, ("tritune", "torch"), lambda case: case.name, lambda case, device: 1.0, lambda case: case
    )
}
family = SimpleNamespace(
    OPERATORS=OPERATORS, CASES=CASES, TUNED=("layer-100", "layer-200"), layers=lambda target: iter(()),
    kinds=lambda one: ("fwd",), kernel_tensors=tensors, kernel_of=kernel_of,
)  # fmt: skip
register_family("planted", family)
