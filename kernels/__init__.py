"""Device code and, beside it, its launchers, config spaces and registration with the tuner."""

from __future__ import annotations

import importlib
import pkgutil

from ..autotune.config import TUNABLES, Tunable


def registered() -> dict[str, Tunable]:
    """Every kernel by name; imports them all, so triton must be there."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return TUNABLES
