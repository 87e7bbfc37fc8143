"""``replace`` makes the torch modules of a finished model ours, in place, and ``restore`` makes them torch's again.

A module stays the object that it is: only its class changes, and ``fold`` and ``fuse`` exchange a few entries of its
``__dict__``. So Parameters, buffers, hooks, attributes and every reference to the module are kept without being copied.
What was there before lies in the module itself, under one name, where deepcopy and pickle take it along.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx._symbolic_trace import PH
from torch.nn import Identity, Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from . import nn
from .nn._of_torch import OfTorch, Quantizable, counterpart
from .ops._checks import ACTIVATIONS

Selector = type[Module] | str | Callable[[str, Module], object]

# A lazy module becomes another class at its first call, after which it is replaced.
_OURS: dict[type, type[Module]] = {
    theirs: kind
    for kind in vars(nn).values()
    if isinstance(kind, type) and (theirs := counterpart(kind)) is not None and not issubclass(theirs, LazyModuleMixin)
}
_WITH_ACTIVATION: dict[type, type[Module]] = {
    _OURS[kind._plain]: kind for kind in vars(nn).values() if hasattr(kind, "_plain")
}
_FAMILIES = ("torch.nn.modules.conv", "torch.nn.modules.pooling", "torch.nn.modules.rnn")
_BEFORE = "_tritune_before"
_MAX_OPTIONAL = 4  # arguments of forward that may be left out: each doubles the number of traces


@dataclass(frozen=True)
class Replacement:
    """One row of a :class:`Report`.

    Attributes:
        name: the qualified name of the module in the model; empty for the model itself.
        was: its class.
        became: its class now, or with ``dry_run`` what it would be; None if it stays.
        reason: why it stays, or what else was done to it.
    """

    name: str
    was: str
    became: str | None
    reason: str | None


@dataclass(frozen=True)
class Report:
    """What :func:`tritune.replace` did, a row for each module that it could be expected to serve.

    ``print(report)`` shows a table, and so does the console of rich.
    """

    rows: tuple[Replacement, ...]
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """``{"dry_run": bool, "modules": [{"name": ..., "was": ..., "became": ..., "reason": ...}, ...]}``."""
        return {"dry_run": self.dry_run, "modules": [asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        """:meth:`as_dict` as a JSON document."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        lines = [_HEADERS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([self._summary(), *(line.rstrip() for line in padded if self.rows)])

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(*_HEADERS, title=self._summary(), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for cells in self._cells():
            table.add_row(*map(Text, cells))
        return table

    def _summary(self) -> str:
        count = sum(row.became is not None for row in self.rows)
        return f"{count} of {len(self.rows)} modules {'would be' if self.dry_run else 'were'} replaced"

    def _cells(self) -> list[tuple[str, ...]]:
        return [(row.name or "(the model)", row.was, row.became or "stays", row.reason or "") for row in self.rows]


_HEADERS = ("module", "was", "became", "reason")


def replace(
    model: Module, *, only: Selector | Iterable[Selector] | None = None, dry_run: bool = False, fold: bool = False,
    fuse: bool = False,
) -> tuple[Any, Report]:  # fmt: skip
    """Makes the torch modules of a model tritune's, in place: every convolution, pooling, recurrence and multi-head
    attention.

    Each module whose class is exactly one of ``torch.nn`` that :mod:`tritune.nn` has under the same name gets our class
    and stays the same object. So Parameters, buffers, ``state_dict``, hooks, parametrizations, mode, attributes and
    optimizers are as before, and outputs too, as far as the backend that serves computes the same. What stays is in the
    report with its reason: subclasses (which may compute something else), lazy modules that were not called yet,
    modules prepared for quantisation, and those with a ``forward`` of the instance. Our recurrent modules are no
    instances of ``torch.nn.RNN``, ``GRU`` and ``LSTM``, which Dynamo refuses, but of their base ``torch.nn.RNNBase``.

    ``fold`` and ``fuse`` go by what ``torch.fx`` sees in the model's ``forward``, called with and without each argument
    whose default is None, True or False, and with modules and attributes as they are. Code that calls the parts of the
    model by itself is not seen. A model that cannot be traced is neither folded nor fused; a traceable part of it can
    be given instead.

    Args:
        model: any module; it is changed.
        only: which of the modules: a class of ``torch.nn``, a pattern for qualified names (``"encoder.*"``, as of
            :mod:`fnmatch`, where ``*`` stands for dots, too), a function ``(name, module) -> bool``, or several of
            these, of which one has to hold. Default: all.
        dry_run: change nothing, only report.
        fold: in evaluation mode, fold each batch normalisation into the convolution before it by
            :func:`tritune.fold_bn`, if that feeds nothing else. The convolution gets Parameters of its own, the batch
            normalisation becomes ``torch.nn.Identity``, and the ``state_dict`` changes accordingly.
        fuse: let a convolution compute the activation module that follows it, in the same kernel, if each is called
            once. It becomes ``ConvActivation1d`` or its like, the activation ``torch.nn.Identity``. An activation that
            is a function or a module called several times stays, as does the sum with a residual.

    Returns:
        The model and a :class:`Report` (``print(report)``, ``report.to_json()``, ``report.rows``). Nothing is
        changed if an error is raised. :func:`tritune.restore` undoes it, also in a copy and after pickle.

    Raises:
        TypeError: if ``model`` is no module or ``only`` something else.
        ValueError: if ``only`` has a class that is not replaced or a pattern that no such module has; with ``fold`` if
            the model is in training mode.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
        >>> model, report = tritune.replace(model, fuse=True)
        >>> print(report)
        3 of 3 modules were replaced
        module  was                 became                       reason
        0       torch.nn.Conv2d     tritune.nn.ConvActivation2d  computes the relu of 1
        1       torch.nn.ReLU       torch.nn.Identity            computed by 0
        2       torch.nn.MaxPool2d  tritune.nn.MaxPool2d
    """
    if not isinstance(model, Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, not {type(model).__name__}")
    if fold and model.training:
        raise ValueError(
            "replace: fold=True needs a model in evaluation mode, since in training mode batch normalisation depends "
            "on the batch: call model.eval() first"
        )
    plan = _Plan(model, _selector(model, only))
    if fold or fuse:
        plan.follow_forward(fold, fuse)
    report = Report(tuple(plan.rows()), dry_run)
    if not dry_run:
        plan.apply()
    return model, report


def restore(model: Module) -> Any:
    """Undoes :func:`tritune.replace` in place, all calls of it.

    Classes are what they were. What ``fold`` exchanged comes back as it was when it was folded: the same Parameters and
    buffers, on the same device, whatever happened to the folded ones.

    Args:
        model: that was given to :func:`tritune.replace`, or contains it, or is a copy of it. Modules of
            :mod:`tritune.nn` that were built as such stay.

    Returns:
        The model.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, not {type(model).__name__}")
    for module in model.modules():
        before = vars(module).pop(_BEFORE, None)
        if before is not None:
            _set_kind(module, before.kind)
            vars(module).update(before.entries)
            for name in before.added:
                vars(module).pop(name, None)
    return model


# --- changing a module -----------------------------------------------------------------------------------------------


@dataclass
class _Before:
    """What a module was: its class, and of the entries of its ``__dict__`` those that have changed."""

    kind: type
    entries: dict[str, Any] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)


@dataclass
class _Change:
    kind: type
    entries: dict[str, Any] = field(default_factory=dict)

    def apply(self, module: Module) -> None:
        before = vars(module).setdefault(_BEFORE, _Before(_kind(module)))
        for name, value in self.entries.items():
            if name in vars(module):
                before.entries.setdefault(name, vars(module)[name])
            else:
                before.added.add(name)
            vars(module)[name] = value
        _set_kind(module, self.kind)


def _kind(module: Module) -> type:
    """The class of a module, without the one that parametrizations lay around it."""
    return parametrize.type_before_parametrizations(module)


def _set_kind(module: Module, kind: type) -> None:
    """Gives a module another class, inside the one that parametrizations lay around it."""
    if parametrize.is_parametrized(module):
        members = {name: one for name, one in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), members)
    module.__class__ = kind


# --- which modules ---------------------------------------------------------------------------------------------------


def _selector(model: Module, only: Selector | Iterable[Selector] | None) -> Callable[[str, Module], bool]:
    if only is None:
        return lambda name, module: True
    if isinstance(only, str) or callable(only):
        only = [only]
    if not isinstance(only, Iterable):
        raise TypeError(_text_only(only))
    tests = [_test(model, one) for one in only]
    return lambda name, module: any(test(name, module) for test in tests)


def _test(model: Module, one: Selector) -> Callable[[str, Module], object]:
    if isinstance(one, type):
        if one not in _OURS:
            raise ValueError(
                f"replace: only has the class {_title(one)}, which is not replaced; these are: "
                f"{', '.join(sorted(kind.__name__ for kind in _OURS))} of torch.nn"
            )
        return lambda name, module: one in (_kind(module), counterpart(_kind(module)))
    if isinstance(one, str):
        if not any(fnmatchcase(name, one) for name, module in model.named_modules() if _torchs(module)):
            inside = any(name == one for name, _ in model.named_modules())
            advice = f"{one + '.*'!r} is for all modules in it" if inside else "model.named_modules() lists the names"
            raise ValueError(
                f"replace: only has {one!r}, which is the name of no module that could be replaced; {advice}"
            )
        return lambda name, module: fnmatchcase(name, one)
    if callable(one) and not isinstance(one, Module):
        return one
    raise TypeError(_text_only(one))


def _text_only(one: object) -> str:
    return (
        "replace: only must be a class of torch.nn, a pattern for names such as 'encoder.*', a function "
        f"(name, module) -> bool, or several of these, not {type(one).__name__}"
    )


def _torchs(module: Module) -> type | None:
    """The class of torch's families that a module belongs to, or derives from; ``None`` for all others."""
    if isinstance(module, OfTorch):
        return counterpart(_kind(module))
    if isinstance(module, torch.jit.ScriptModule):
        kinds: Iterable[Any] = [getattr(torch.nn, module.original_name, None)]
    else:
        kinds = type(module).__mro__
    return next((kind for kind in kinds if _is_expected(kind)), None)


def _is_expected(kind: Any) -> bool:
    """Whether a user of torch's class could expect that we serve it."""
    if getattr(torch.nn, getattr(kind, "__name__", ""), None) is not kind:
        return False
    return kind in _OURS or kind.__module__ in _FAMILIES or kind is torch.nn.MultiheadAttention


def _why_it_stays(module: Module, theirs: type) -> str | None:
    kind = _kind(module)
    if isinstance(module, OfTorch):
        return "it is tritune's already"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript: replace before torch.jit.script or trace"
    if isinstance(module, LazyModuleMixin):
        return "it is lazy: call the model once first"
    if kind not in _OURS:
        if kind is theirs:
            return f"tritune.nn has no {kind.__name__}"
        return f"it is a subclass of {_title(theirs)}, which may compute something else"
    own = _set_on_the_instance(module)
    if own is not None:
        return f"its {own} was set on the instance"
    if issubclass(_OURS[kind], Quantizable) and getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantisation, which goes by torch's exact classes"
    return None


def _set_on_the_instance(module: Module) -> str | None:
    """The name of a method that somebody has overridden in this one module."""
    return next((name for name in vars(module) if inspect.isfunction(getattr(type(module), name, None))), None)


def _title(kind: type) -> str:
    for space in (torch.nn, nn):
        if getattr(space, kind.__name__, None) is kind:
            return f"{space.__name__}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


class _Plan:
    """What would become of each module, by its name, and why not."""

    def __init__(self, model: Module, selected: Callable[[str, Module], bool]) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.changes: dict[str, _Change] = {}
        self.reasons: defaultdict[str, list[str]] = defaultdict(list)
        self.convolutions: list[str] = []  # those that are ours, or will be, and compute nothing else yet
        for name, module in self.modules.items():
            theirs = _torchs(module)
            if theirs is None:
                continue
            reason = _why_it_stays(module, theirs) if selected(name, module) else "only leaves it out"
            if reason is None:
                self.changes[name] = _Change(_OURS[theirs])
            else:
                self.reasons[name].append(reason)
            if selected(name, module) and self._becomes(name) in _WITH_ACTIVATION:
                self.convolutions.append(name)

    def rows(self) -> Iterator[Replacement]:
        for name, module in self.modules.items():
            change, reasons = self.changes.get(name), self.reasons.get(name)
            if change or reasons:
                became = None if change is None else _title(change.kind)
                yield Replacement(name, _title(_kind(module)), became, "; ".join(reasons) if reasons else None)

    def apply(self) -> None:
        for name, change in self.changes.items():
            change.apply(self.modules[name])

    def follow_forward(self, fold: bool, fuse: bool) -> None:
        """Adds what can be folded and fused."""
        norms = [name for name, module in self.modules.items() if fold and isinstance(module, _BatchNorm)]
        fused = self.convolutions if fuse else []
        try:
            # What is folded stays in evaluation mode; what is fused may be trained.
            forward = _Forward(self.model, [self.model.training, not self.model.training][: 1 + fuse])
        except _CannotFollowError as error:
            for name in norms:
                self.reasons[name].append(f"not folded: {error}")
            for name in fused:
                self.reasons[name].append(f"not fused: {error}")
            return
        for name, module in self.modules.items():
            if type(module) is Identity and not _hooked(module, _HOOKS):
                forward.bypass(name)
        for name in norms:
            self._fold(forward, name)
        for name in fused:
            self._fuse(forward, name)

    def _fold(self, forward: _Forward, name: str) -> None:
        before = {_name_of(source) for node in forward.calls(name) for source in node.all_input_nodes}
        conv = next(iter(before)) if len(before) == 1 else None
        if conv is None or _torchs(self.modules[conv]) not in _CONVOLUTIONS:
            self.reasons[name].append("not folded: it does not follow a convolution directly")
            return
        reason = self._why_not_folded(forward, conv, name)
        if reason is None:
            try:
                folded = nn.fold_bn(self.modules[conv], self.modules[name])
            except (TypeError, ValueError) as error:
                reason = str(error).removeprefix("fold_bn: ")
        if reason is not None:
            self.reasons[name].append(f"not folded: {reason}")
            return
        self._change(conv, self._becomes(conv), f"{name} is folded into it", _parameters=folded._parameters)
        self._change(name, Identity, f"folded into {conv}", _parameters={}, _buffers={})
        forward.bypass(name)

    def _why_not_folded(self, forward: _Forward, conv: str, norm: str) -> str | None:
        modules = [self.modules[conv], self.modules[norm]]
        if conv not in self.convolutions:
            return f"{conv}, which it follows, stays as it is"
        if conv in self.changes and self.changes[conv].entries:
            return f"another one is folded into {conv}: call replace once more"
        if any(id(t) in forward.read for module in modules for t in (*module.parameters(), *module.buffers())):
            return f"forward reads a parameter or buffer of {conv} or of itself directly"
        if any(map(parametrize.is_parametrized, modules)):
            return f"{conv} or it is parametrized: torch.nn.utils.parametrize.remove_parametrizations comes first"
        return forward.why_apart(conv, norm) or self._why_seen(conv, norm)

    def _fuse(self, forward: _Forward, conv: str) -> None:
        after = [user for node in forward.calls(conv) for user in node.users]
        names = {_name_of(user) for user in after}
        name = next((one for one in names if one is not None and _activation_of(self.modules[one])), None)
        if name is None:
            reason = next(filter(None, map(self._why_it_needs_a_graph, after)), None)
        else:
            reason = forward.why_apart(conv, name) or self._why_seen(conv, name)
        if reason is not None:
            self.reasons[conv].append(f"not fused: {reason}")
        elif name is not None:
            activation = _activation_of(self.modules[name])
            kind = _WITH_ACTIVATION[self._becomes(conv)]
            self._change(conv, kind, f"computes the {activation} of {name}", _activation=activation)
            self._change(name, Identity, f"computed by {conv}")

    def _why_it_needs_a_graph(self, node: Node) -> str | None:
        """For what follows a convolution and is no module: a module that takes it in would compute it a second time."""
        if self._is_activation(node):
            return "the activation behind it is a function; as a module, called once, it can be fused"
        if _function_of(node) in ("add", "iadd") and any(map(self._is_activation, node.users)):
            return "a residual is added behind it; tritune.nn takes it as an argument, `conv(x, residual=...)`"
        return None

    def _is_activation(self, node: Node) -> bool:
        name = _name_of(node)
        return _function_of(node) in ACTIVATIONS if name is None else _activation_of(self.modules[name]) is not None

    def _why_seen(self, first: str, second: str) -> str | None:
        """Hooks that would see other values if the first module computed what the second does, on these or on modules
        around one of them only."""
        for name, other, kinds in ((first, second, _HOOKS[1:]), (second, first, _HOOKS)):
            parts, others = name.split("."), other.split(".")
            for count in range(1, len(parts) + 1):
                around = ".".join(parts[:count])
                if parts[:count] != others[:count] and _hooked(self.modules[around], kinds):
                    return f"hooks of {around} would see other values"
        return None

    def _becomes(self, name: str) -> type:
        change = self.changes.get(name)
        return _kind(self.modules[name]) if change is None else change.kind

    def _change(self, name: str, kind: type, reason: str, **entries: Any) -> None:
        change = self.changes.setdefault(name, _Change(kind))
        change.kind = kind
        change.entries.update(entries)
        self.reasons[name].append(reason)


# --- what follows what -----------------------------------------------------------------------------------------------

_CONVOLUTIONS = {counterpart(kind) for kind in _WITH_ACTIVATION}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_WRAPPERS = ("torch.distributed.", "torch.nn.parallel.", "torch._dynamo.", "torch.jit.")
_ACTIVATIONS: dict[type, str] = {
    getattr(torch.nn, name): name.lower()
    for name in ("ReLU", "ReLU6", "SiLU", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh")
}


class _CannotFollowError(Exception):
    """Says why ``torch.fx`` has no graph of a model's forward."""


class _Forward:
    """All ways through the forward of a model, as graphs in which calls of modules are nodes.

    Attributes:
        graphs: one for each mode and each choice of the arguments that may be left out.
        read: the ids of the Parameters and buffers that forward reads itself, not through the module that has them.
        kept: what forward stores in attributes of modules.
    """

    def __init__(self, model: Module, modes: Sequence[bool]) -> None:
        copied = _without_hooks(model)
        self.graphs: list[Graph] = []
        self.read: set[int] = set()
        self.kept: set[Node] = set()
        for mode, arguments in itertools.product(modes, _ways(model)):
            if mode != model.training:
                copied.train(mode)
            try:
                with torch.random.fork_rng(devices=[]):
                    graph = _Tracer().trace(copied, arguments)
            except Exception as error:
                sentence = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
                raise _CannotFollowError(f"torch.fx cannot trace forward ({sentence})") from error
            self.graphs.append(graph)
            self.kept |= {one.node for one in _held(copied) if isinstance(one, Proxy)}
            self.read |= {id(attrgetter(node.target)(copied)) for node in graph.nodes if node.op == "get_attr"}

    def calls(self, name: str) -> list[Node]:
        return [node for graph in self.graphs for node in _calls(graph, name)]

    def bypass(self, name: str) -> None:
        """Takes a module that returns its input out of the graphs."""
        for node in self.calls(name):
            node.replace_all_uses_with(node.all_input_nodes[0])
            node.graph.erase_node(node)

    def why_apart(self, first: str, second: str) -> str | None:
        """Why the two modules, of which the second takes one argument, are no unit: all that reads the first is it."""
        for graph in self.graphs:
            calls = {name: _calls(graph, name) for name in (first, second)}
            for name, nodes in calls.items():
                if len(nodes) > 1:
                    return f"{name} is called more than once"
            if not any(calls.values()):
                continue
            if not all(calls.values()) or list(calls[first][0].users) != calls[second]:
                return f"{first} feeds something else, too, or feeds {second} in some calls only"
            if calls[first][0] in self.kept:
                return f"forward keeps what {first} returns in an attribute"
        return None


class _Tracer(Tracer):
    proxy_buffer_attributes = True


def _without_hooks(model: Module) -> Module:
    """A copy to be traced, since forward may set attributes. It has the same Parameters and buffers."""
    for module in model.modules():
        if type(module).__module__.startswith(_WRAPPERS):
            raise _CannotFollowError(f"replace before {_title(type(module))} wraps the model")
    memo: dict[int, Any] = {id(getattr(module, hooks)): OrderedDict() for module in model.modules() for hooks in _HOOKS}
    memo |= {id(one): one for one in _held(model) if isinstance(one, torch.Tensor | _Before)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise _CannotFollowError(f"deepcopy cannot copy the model ({type(error).__name__})") from error


def _held(model: Module) -> list[Any]:
    """What stands in attributes of modules, also in lists and dicts there."""
    return tree_leaves([vars(module) for module in model.modules()])


def _ways(model: Module) -> list[dict[str, Any] | None]:
    """What to trace ``forward`` with: its arguments that may be left out are so, and are not, in all combinations."""
    choices = {
        name: (None, PH) if one.default is None else (False, True)
        for name, one in inspect.signature(model.forward).parameters.items()
        if one.default is None or isinstance(one.default, bool)
    }
    if len(choices) > _MAX_OPTIONAL:
        raise _CannotFollowError(f"forward has {len(choices)} arguments that may be left out: too many combinations")
    return [
        {name: value for name, value in zip(choices, values, strict=True) if value is not PH} or None
        for values in itertools.product(*choices.values())
    ]


def _calls(graph: Graph, name: str) -> list[Node]:
    return [node for node in graph.nodes if _name_of(node) == name]


def _name_of(node: Node) -> str | None:
    """The name of the module that a node calls."""
    return str(node.target) if node.op == "call_module" else None


def _function_of(node: Node) -> str | None:
    """The name of the function or method that a node calls, without what marks it as in-place."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    return getattr(node.target, "__name__", "").rstrip("_") if node.op == "call_function" else None


def _activation_of(module: Module) -> str | None:
    """The name by which our convolutions know what a module computes."""
    if _set_on_the_instance(module) is not None:
        return None
    if type(module) is torch.nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if type(module) is torch.nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    return _ACTIVATIONS.get(type(module))


def _hooked(module: Module, kinds: Iterable[str]) -> bool:
    return any(getattr(module, kind) for kind in kinds)
