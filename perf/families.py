"""The operator families that ship, registered for the tuner and the suites. Adding a family: its line in ``ours``.

Whoever walks over families imports the walk from here and not from :mod:`..autotune.workload`, which knows none by
itself: then they are registered.
"""

from __future__ import annotations

from ..autotune.workload import (
    FAMILIES,
    family_of_op,
    header,
    kernels_without_layers,
    layers,
    operator_of,
    register_family,
    tiny,
    training_cases,
    tuned_kernels,
)
from . import attention, conv, conv_pool, pool, rnn

__all__ = [
    "CASES", "FAMILIES", "family_of_op", "header", "kernels_without_layers", "layers", "operator_of", "tiny",
    "training_cases", "tuned_kernels",
]  # fmt: skip

ours = {"conv": conv, "pool": pool, "conv_pool": conv_pool, "rnn": rnn, "attention": attention}
for name, family in ours.items():
    register_family(name, family)

# Most important first, whatever the family.
CASES = tuple(sorted((case for family in FAMILIES.values() for case in family.CASES), key=lambda case: case.rank))
