"""A small search over configs on a GPU: the model's best few of each kernel, every one checked before it may win.

The kernel runs alone, against torch's operator for the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autotune.config import Config
from ..autotune.resolve import override, ranked
from .case import Case, Kernel
from .check import EPSILON, Machine, argument_sets, compare, poisoned, set_cudnn, without_cudnn
from .environment import fingerprint
from .families import FAMILIES, Family, family_of_op, header, operator_of, tuned_kernels
from .timer import Competitor, Timing

CONFIGS_PER_KERNEL = 8
KEEP_DEFAULT_WITHIN = 0.98  # a config must beat the model's choice by 2 %, or noise would decide


@dataclass(frozen=True)
class Target:
    """One kernel of one case to sweep."""

    case: Case
    kind: str  # "fwd", "input_grad", "bwd", ...: one of the family's kinds

    @property
    def family(self) -> Family:
        return FAMILIES[family_of_op(self.case.op)]

    def header(self) -> dict[str, Any]:
        head = header(self.case)
        return {**head, "id": f"sweep-{head['id']}-{self.kind}", "direction": self.kind}

    def run(self, machine: Machine) -> dict[str, Any]:
        return sweep(self, machine)

    def tensors(self, device: str, seed: int) -> dict[str, Tensor]:
        return self.family.kernel_tensors(self.case, self.kind, device, seed)


def sweep_targets(cases: Sequence[Case]) -> list[Target]:
    """The kernels that are tuned, of those among the cases."""
    by_id = {case.id: case for case in cases}
    return [Target(by_id[case.id], kind) for case, kind in tuned_kernels() if case.id in by_id]


def sweep(target: Target, machine: Machine) -> dict[str, Any]:
    case = target.case
    tensors = target.tensors(machine.device, seed=0)
    kernel = target.family.kernel_of(case, target.kind, tensors)
    with without_cudnn():
        exact = {
            "result": kernel.torch({name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})
        }
    yardstick = operator_of(case).yardstick
    set_cudnn(yardstick)()
    torchs = {"result": kernel.torch(tensors)}

    candidates = [config for config, _ in ranked(kernel.tunable, kernel.problem, machine.spec)[:CONFIGS_PER_KERNEL]]
    passed, failed = [], {}
    for config in candidates:
        try:
            with override(kernel.tunable, config), poisoned():
                verdict = compare({"result": kernel.ours(tensors)}, exact, torchs, EPSILON[case.dtype])
        except Exception as error:  # out of shared memory, or the compiler gives up: not a config for this kernel
            if machine.device == "cuda":
                torch.cuda.synchronize()
            failed[str(config)] = type(error).__name__
            continue
        if verdict.correct:
            passed.append(config)
        else:
            failed[str(config)] = f"wrong: {verdict.where} {verdict.error:.1e}"
    del exact, torchs
    event = {"event": "sweep", "kernel": kernel.tunable.name, "tested": len(candidates), "failed": failed}
    if machine.timer is None or not passed:
        return {**event, "entry": None}

    sets = [tensors]
    sets += [target.tensors(machine.device, seed) for seed in range(1, argument_sets(tensors, machine.spec))]
    competitors = {str(config): _competitor(kernel, config, sets) for config in passed}
    competitors["torch"] = Competitor([partial(kernel.torch, one) for one in sets], set_cudnn(yardstick))
    timings = machine.timer.measure(competitors, 2 * machine.seconds)
    measured = {name: timing for name, timing in timings.items() if isinstance(timing, Timing)}
    times = [(config, measured[str(config)].p50) for config in passed if str(config) in measured]
    if not times:
        return {**event, "entry": None}
    config, us = winner(times, default=candidates[0])
    theirs = measured.get("torch")
    entry = {
        "key": kernel.tunable.features(kernel.problem),
        "config": dict(config),
        "source": "measured" if machine.device == "cuda" else "rehearsed",
        "version": kernel.tunable.version,
        "us": round(us, 3),
        "default_us": round(measured[str(candidates[0])].p50, 3) if str(candidates[0]) in measured else None,
        "tested": len(candidates),
        "env": _entry_environment(machine),
    }
    if theirs is not None:
        entry["torch_us"] = round(theirs.p50, 3)
    return {**event, "entry": entry}


def winner(times: Sequence[tuple[Config, float]], default: Config) -> tuple[Config, float]:
    """The fastest, but the default if that is as good but for noise."""
    best = min(times, key=lambda pair: pair[1])
    for config, us in times:
        if config == default and best[1] > KEEP_DEFAULT_WITHIN * us:
            return config, us
    return best


def _entry_environment(machine: Machine) -> dict[str, Any]:
    everything = fingerprint(machine.device)
    return {name: everything.get(name) for name in ("gpu", "driver", "torch", "triton", "commit", "sources", "date")}


def _competitor(kernel: Kernel, config: Config, sets: Sequence[dict[str, Tensor]]) -> Competitor:
    def call(tensors: dict[str, Tensor]) -> Tensor:
        with override(kernel.tunable, config):
            return kernel.ours(tensors)

    return Competitor([partial(call, one) for one in sets])
