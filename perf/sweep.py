"""Trials of configs on this machine: each checked before it may win, the kernel alone against torch's operator.

:class:`Bench` is what runs a config for :mod:`..autotune.tuner`: within `make gpu`, which searches among the model's
best few in the process that measures, and within the worker of ``tritune tune``, which is told what to try.
"""

from __future__ import annotations

import math
import subprocess
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autotune.config import Config, Tunable
from ..autotune.device import TARGETS
from ..autotune.resolve import override, ranked
from ..autotune.tuner import Final, Search, Trial
from .case import DTYPES, Case, Kernel
from .check import EPSILON, Machine, Verdict, argument_sets, compare, poisoned, set_cudnn, without_cudnn
from .environment import fingerprint, without_paths
from .families import FAMILIES, Family, family_of_op, header, operator_of, tuned_kernels
from .timer import Competitor, Timing

CONFIGS_PER_KERNEL = 8
ENVIRONMENT = ("gpu", "driver", "torch", "triton", "commit", "sources", "date")  # what an entry keeps of it


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

    def identity(self) -> tuple[Tunable, Any]:
        """Kernel and problem, from shapes alone."""
        dtype, shapes = DTYPES[self.case.dtype], self.case.shapes
        meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        kernel = self.family.kernel_of(self.case, self.kind, meta)
        return kernel.tunable, kernel.problem


def sweep_targets(cases: Sequence[Case]) -> list[Target]:
    """The kernels that are tuned, of those among the cases."""
    by_id = {case.id: case for case in cases}
    return [Target(by_id[case.id], kind) for case, kind in tuned_kernels() if case.id in by_id]


def sweep(target: Target, machine: Machine) -> dict[str, Any]:
    """The event of one item of `make gpu`."""
    bench = Bench(target, machine, prunes=False)
    tunable, problem = bench.kernel.tunable, bench.kernel.problem
    candidates = [config for config, _ in ranked(tunable, problem, machine.spec)[:CONFIGS_PER_KERNEL]]
    search = Search(candidates, bench)
    search.run()
    entry = search.entry(tunable, problem, origin_of(machine.device), entry_environment(fingerprint(machine.device)))
    return {
        "event": "sweep", "kernel": tunable.name, "tested": len(search.trials),
        "failed": {str(trial.config): trial.fault for trial in search.trials if trial.fault},
        "entry": entry.to_json() if entry else None,
    }  # fmt: skip


def origin_of(device: str) -> str:
    """Times of a rehearsal on the CPU are never passed off as measured."""
    return "measured" if device == "cuda" else "rehearsed"


def entry_environment(everything: dict[str, Any]) -> dict[str, Any]:
    return {name: everything.get(name) for name in ENVIRONMENT}


class Bench:
    """One kernel of one case, with its tensors, its float64 reference and torch's own result, ready for trials.

    Args:
        prunes: asks the compiler first. Reading a binary takes longer than timing a good config: worth it where many
            are bad.
    """

    def __init__(self, target: Target, machine: Machine, prunes: bool = True) -> None:
        self.target, self.machine = target, machine
        self.prunes = prunes and machine.device == "cuda"
        self.tensors = target.tensors(machine.device, seed=0)
        self.kernel: Kernel = target.family.kernel_of(target.case, target.kind, self.tensors)
        self.before = set_cudnn(operator_of(target.case).yardstick)
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in self.tensors.items()}
        with without_cudnn():
            self.exact = {"result": self.kernel.torch(doubles)}
        del doubles
        self.before()
        self.torchs = {"result": self.kernel.torch(self.tensors)}
        with poisoned():  # its first use imports much of torch, which is no trial's fault
            pass
        self._sets: list[dict[str, Tensor]] = []

    @property
    def sets(self) -> list[dict[str, Tensor]]:
        """Arguments for timing, more than the last-level cache holds; made when something is timed."""
        if not self._sets:
            more = range(1, argument_sets(self.tensors, self.machine.spec))
            self._sets = [self.tensors, *(self.target.tensors(self.machine.device, seed) for seed in more)]
        return self._sets

    def attempt(self, config: Config, give_up_us: float = math.inf) -> Trial:
        """What the compiler made of it, then the result on poisoned memory, twice, then the time."""
        facts: dict[str, Any] = {}
        try:
            if self.prunes:
                facts["static"], found = compiled(self.kernel, config, self.machine.spec.target)
                if found:
                    return Trial(config, fault=found)
            verdict = self._verdict(config)
        except Exception as error:  # out of shared memory, or the compiler gives up: not a config for this kernel
            if self.machine.device == "cuda":
                torch.cuda.synchronize()  # raises if the fault took the device with it
            return Trial(config, fault=f"raised: {in_words(error)}")
        if not verdict.correct:
            return Trial(config, fault=f"wrong: {verdict.where} {verdict.error:.1e}")
        facts["err"] = verdict.to_json()
        if self.machine.timer is None:
            return Trial(config, facts=facts)
        timing = self.machine.timer.measure({"ours": self._competitor(config)}, 0.0, give_up_us)["ours"]
        if isinstance(timing, str):
            return Trial(config, fault=f"raised: {without_paths(timing)[:200]}")
        return Trial(config, timing.p50, timing.n, facts=facts)

    def final(self, configs: Sequence[Config]) -> Final:
        assert self.machine.timer is not None
        competitors = {str(config): self._competitor(config) for config in configs}
        competitors["torch"] = Competitor([partial(self.kernel.torch, one) for one in self.sets], self.before)
        timings = self.machine.timer.measure(competitors, 2 * self.machine.seconds)
        measured = {name: timing.p50 for name, timing in timings.items() if isinstance(timing, Timing)}
        us = {config: measured[str(config)] for config in configs if str(config) in measured}
        return Final(us, measured.get("torch"))

    def _verdict(self, config: Config) -> Verdict:
        with override(self.kernel.tunable, config), poisoned():
            ours, again = self.kernel.ours(self.tensors), self.kernel.ours(self.tensors)
        verdict = compare({"result": ours}, self.exact, self.torchs, EPSILON[self.target.case.dtype])
        if verdict.correct and not torch.equal(ours, again):
            return verdict._replace(correct=False, where="two runs differ")
        return verdict

    def _competitor(self, config: Config) -> Competitor:
        def call(tensors: dict[str, Tensor]) -> Tensor:
            with override(self.kernel.tunable, config):
                return self.kernel.ours(tensors)

        return Competitor([partial(call, one) for one in self.sets])


def compiled(kernel: Kernel, config: Config, target: str) -> tuple[dict[str, Any] | None, str]:
    """``(profile, fault)`` of a config without running it. Nothing for a GPU whose limits are not in the table, or
    without the vendor's tools to read the binary."""
    from . import static  # needs triton

    if target not in TARGETS:
        return None, ""
    try:
        one = static.profile(kernel.tunable.launches(kernel.problem, config)[0], target)
    except (OSError, subprocess.CalledProcessError):
        return None, ""
    return asdict(one), "; ".join(static.faults(kernel.tunable, kernel.problem, one, target))


def in_words(error: BaseException) -> str:
    """One line, without a path."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return without_paths(lines[0])[:200]
