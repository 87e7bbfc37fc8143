"""The kernels of the layers that ``make gpu`` measures, each with the model's best few configs searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..autotune.bench import Bench, Target, entry_environment, origin_of
from ..autotune.check import Machine
from ..autotune.environment import fingerprint
from ..autotune.resolve import ranked
from ..autotune.search import Search
from ..autotune.workload import Case
from .families import header, tuned_kernels

CONFIGS_PER_KERNEL = 8


def sweep_targets(cases: Sequence[Case]) -> list[Target]:
    """The kernels that are tuned, of those among the cases."""
    by_id = {case.id: case for case in cases}
    return [Target(by_id[case.id], kind) for case, kind in tuned_kernels() if case.id in by_id]


def sweep_header(target: Target) -> dict[str, Any]:
    """What names a sweep in a result."""
    head = header(target.case)
    return {**head, "id": f"sweep-{head['id']}-{target.kind}", "direction": target.kind}


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
