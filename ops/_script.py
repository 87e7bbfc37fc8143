"""``torch.jit.script`` compiles source, and cannot compile ours: what it takes in the place of a public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._jit_internal import boolean_dispatched
from torch.jit._builtins import _find_builtin, _register_builtin

# TorchScript fails on torch's own three with an internal assertion.
_UNSCRIPTABLE = tuple(f"max_unpool{rank}d" for rank in (1, 2, 3))


def scripted_as_torchs(function: Callable[..., Any]) -> None:
    """Lets TorchScript compile torch's function of the same name wherever scripted code calls ours.

    torch.jit.script refuses, with one sentence, a function that torch lacks or cannot script itself.
    """
    name = function.__name__
    theirs = None if name in _UNSCRIPTABLE else getattr(torch.nn.functional, name, None)

    def prepared() -> Callable[..., Any]:
        if theirs is None:
            raise NotImplementedError(f"torch.jit.script cannot compile {name}: use torch.export or torch.jit.trace")
        return theirs

    function.__prepare_scriptable__ = prepared  # type: ignore[attr-defined]
    if theirs is None:
        return
    # The compiler knows these two kinds by the function object, and asks it nothing.
    builtin = _find_builtin(theirs)
    if builtin is not None:
        _register_builtin(function, builtin)
    elif theirs in boolean_dispatched:
        boolean_dispatched[function] = boolean_dispatched[theirs]
