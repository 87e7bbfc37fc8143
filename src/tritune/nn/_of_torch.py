"""What torch's tools find in every module of ours: TorchScript, torch.fx and quantisation know torch's own only."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch.fx import Proxy

_PACKAGE = __name__.rpartition(".")[0]


def counterpart(kind: type) -> type[torch.nn.Module] | None:
    """torch's class of the same name and meaning; None where torch has none, and for a class of somebody else's."""
    return getattr(torch.nn, kind.__name__, None) if _is_ours(kind) else None


def _is_ours(definition: Any) -> bool:
    """Whether a class or a function is defined in this package."""
    return bool(definition.__module__.rpartition(".")[0] == _PACKAGE)


class OfTorch:
    """What torch's tools ask of any module of ours."""

    _torchs_can_be_scripted = True

    def _leaf(self, *args: Any) -> Proxy | None:
        """A call of this module in a graph of ``torch.fx``, where its tracer would take torch's own module for a leaf.

        ``None`` where it would trace into torch's, as in the module that it was asked to trace, and for what torch has
        no counterpart of. The first argument is the tracer's; arguments at the end that are None were left out.
        """
        tracer, theirs = args[0].tracer, self._as_torchs()
        if theirs is None or tracer.root is self:
            return None
        path = tracer.path_of_module(self)
        while args[-1] is None:
            args = args[:-1]
        return tracer.create_proxy("call_module", path, args, {}) if tracer.is_leaf_module(theirs, path) else None

    def _as_torchs(self) -> torch.nn.Module | None:
        """torch's own module around the same Parameters, hooks and flags; ``None`` where torch has none."""
        theirs = counterpart(type(self))
        if theirs is None:
            return None
        module = theirs.__new__(theirs)
        module.__dict__ = self.__dict__
        return module

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` compiles in place of this module, since it compiles the source of ``forward`` and
        cannot compile ours: torch's own. torch puts it into the model that was scripted, too, where it computes the
        same.

        Raises:
            NotImplementedError: for a module that torch has no counterpart of, or one that cannot be scripted either.
        """
        kind, theirs = type(self), self._as_torchs()
        if theirs is not None and self._torchs_can_be_scripted:
            return theirs
        if not _is_ours(kind.forward):  # type: ignore[attr-defined]
            return self  # TorchScript judges the forward of somebody else's subclass
        raise NotImplementedError(
            f"torch.jit.script cannot compile {kind.__name__}: use torch.export or torch.jit.trace"
        )


class Quantizable(OfTorch):
    """For ``torch.ao.quantization``, which goes by the exact class and would pass over ours without a word.

    It marks each module that it looks at with a ``qconfig``, so that is where we warn.
    """

    __jit_unused_properties__: ClassVar = ["qconfig"]  # torch.jit.trace compiles the other properties

    @property
    def qconfig(self) -> Any:
        try:
            return self.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None  # torch.nn.Module says the rest

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value
        theirs = counterpart(type(self))
        if value is not None or _is_quantized_dynamically(theirs):
            self._warn_of_quantization()

    @qconfig.deleter
    def qconfig(self) -> None:
        self.__dict__.pop("qconfig", None)

    def _warn_of_quantization(self) -> None:
        theirs = counterpart(type(self))
        advice = "build it from modules of torch.nn"
        if theirs is not None:
            advice = f"set `module.__class__ = torch.nn.{theirs.__name__}`"
        warnings.warn(
            "torch.ao.quantization goes by the exact class of a module and passes over tritune's "
            f"{type(self).__name__}: {advice} before you quantise it",
            stacklevel=3,
        )


def _is_quantized_dynamically(theirs: type[torch.nn.Module] | None) -> bool:
    """``quantize_dynamic`` marks what it passes over with None, and so do users who want a module left as it is."""
    from torch.ao.quantization.quantization_mappings import get_default_dynamic_quant_module_mappings

    return theirs in get_default_dynamic_quant_module_mappings()
