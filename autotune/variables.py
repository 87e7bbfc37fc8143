"""Environment variables whose values are words.

A wrong word is a warning and counts as unset: a program that imports the library shall not fail for it, and ``tritune
doctor`` can still name it.
"""

from __future__ import annotations

import os
import warnings

WORDS = {
    "TRITUNE_BACKEND": ("auto", "triton", "torch"),
    "TRITUNE_AUTOTUNE": ("cached", "missing", "always"),
    "TRITUNE_LOG": ("debug", "info", "warning", "error"),
}


def check(name: str, value: str) -> None:
    """Raises ValueError for a value that the variable cannot have."""
    if value.lower() not in WORDS[name]:
        raise ValueError(f"{name} must be one of {', '.join(WORDS[name])}, got {value!r}")


def word(name: str) -> str:
    """The variable's value in lower case; empty where it is not set, or set wrong."""
    value = os.environ.get(name, "")
    if not value:
        return ""
    try:
        check(name, value)
    except ValueError as error:
        warnings.warn(f"{error}: it counts as unset", RuntimeWarning, stacklevel=2)
        return ""
    return value.lower()
