"""The operator families as the performance suite knows them, and everything that walks over all of them.

Adding a family: a module with the names of :class:`Family`, and its line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from ..autotune.config import TUNABLES
from . import attention, conv, conv_pool, pool, rnn
from .case import Case, Kernel, Layers, Operator


class Family(Protocol):
    """What a family's module declares.

    Attributes:
        OPERATORS: how the cases of each operator run.
        CASES: the layers to measure.
        TUNED: names of cases whose kernels a GPU run tunes, most important first.
        layers: what ships for a target: ``(name, kernel, problem)``.
        explicit: a training case from the shapes and options that ``tritune tune --shapes`` was given. Raises
            TypeError or ValueError.
        kinds: the kernels of a training case, forward first.
        kernel_tensors, kernel_of: one of those kernels by itself, and random tensors for it. Which kernel and problem
            it is must follow from the case's arguments alone, which may be meta tensors.
    """

    OPERATORS: dict[str, Operator]
    CASES: tuple[Case, ...]
    TUNED: tuple[str, ...]

    def layers(self, target: str) -> Iterator[Layers]: ...
    def explicit(self, *shapes: Any, **options: Any) -> Case: ...
    def kinds(self, one: Case) -> tuple[str, ...]: ...
    def kernel_tensors(self, one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]: ...
    def kernel_of(self, one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel: ...


FAMILIES: dict[str, Family] = {
    "conv": conv, "pool": pool, "conv_pool": conv_pool, "rnn": rnn, "attention": attention,  # type: ignore[dict-item]
}  # modules as instances  # fmt: skip
# Most important first, whatever the family.
CASES = tuple(sorted((case for family in FAMILIES.values() for case in family.CASES), key=lambda case: case.rank))


def family_of_op(op: str) -> str:
    """The name of the family that runs an operator's cases."""
    return next(name for name, family in FAMILIES.items() if op in family.OPERATORS)


def operator_of(case: Case) -> Operator:
    return FAMILIES[family_of_op(case.op)].OPERATORS[case.op]


def header(case: Case) -> dict[str, Any]:
    """What names a case in a result."""
    return {
        "id": case.id, "family": family_of_op(case.op), "op": case.op, "shape": operator_of(case).describe(case),
        "dtype": case.precision, "layout": case.layout, "direction": case.direction,
    }  # fmt: skip


def layers(target: str) -> Iterator[Layers]:
    """``(name, kernel, problem)`` of everything that ships for a target."""
    for family in FAMILIES.values():
        yield from family.layers(target)


def tiny(case: Case) -> Case:
    """The same kind of layer, small enough for Triton's interpreter."""
    return operator_of(case).tiny(case)


def training_cases(family: Family) -> dict[str, Case]:
    """One case a layer, with gradients, so that all of its kernels can run; the one that a GPU run measures, if any."""
    forward = {case.name: replace(case, direction="fwd+bwd") for case in reversed(family.CASES)}
    trained = {case.name: case for case in family.CASES if case.direction != "fwd" and case.rank < 3}
    return forward | trained


def tuned_kernels() -> list[tuple[Case, str]]:
    """The kernels that a GPU run tunes: the forward of every layer first, the families in turn."""
    chosen = []
    for family in FAMILIES.values():
        cases = training_cases(family)
        for place, name in enumerate(family.TUNED):
            chosen += [(kind != "fwd", place, cases[name], kind) for kind in family.kinds(cases[name])]
    return [(case, kind) for _, _, case, kind in sorted(chosen, key=lambda row: row[:2])]


def kernels_without_layers() -> set[str]:
    """Registered kernels that nothing compiles; a test wants none."""
    return set(TUNABLES) - {tunable.name for _, tunable, _ in layers("sm_90")}
