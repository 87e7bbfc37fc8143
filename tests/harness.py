"""What every family's tests share: cases as data, the one tolerance, and the check that runs a case.

A new family brings a table of :class:`Case` and one parametrised test that calls :func:`check`; the tier decides the
backend (``torch`` in tier 1, the kernels in tiers 2 and 4).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair, _triple
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tritune
from tritune.autotune.check import EPSILON as EPSILON_BY_NAME
from tritune.autotune.check import Errors
from tritune.autotune.check import poisoned as _poisoned
from tritune.autotune.workload import DTYPES

EPSILON = {torch.float64: 1e-14, **{DTYPES[name]: epsilon for name, epsilon in EPSILON_BY_NAME.items()}}
TORCH_SAMPLES = 16  # draws of a case's inputs that torch's error is taken from, at most
FEW = 16
MAX_INTERPRETED_DOTS = 2000  # about 0.8 ms each
poisoned = functools.partial(_poisoned, strict=True)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        id: shown by pytest.
        op: the operator under test, called as ``op(**tensors, **kwargs)``.
        reference: the same function by torch's own operators, same arguments.
        shapes: shape of each tensor argument; all of them get a gradient.
        kwargs: the other arguments.
    """

    id: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, layout: str, device: str) -> dict[str, Tensor]:
        """Random normal tensors; ``layout`` is "nchw", "nhwc" or "strided" (every dimension has gaps)."""
        return {name: lay_out(torch.randn(shape).to(dtype), layout).to(device) for name, shape in self.shapes.items()}


def product(cases: Sequence[Case], *choices: Sequence[Any], compat: Container[str] = ()) -> list[Any]:
    """A row for pytest of each case with each combination of choices, named after them.

    Of two columns each value meets each in the rows that `make test` runs; the other rows are marked ``full``. Those of
    the cases in ``compat`` also run on other versions of Triton, unless they are marked so.
    """
    rows = []
    for number, one in enumerate(cases):
        combinations = list(itertools.product(*choices))
        turned = combinations[number % len(combinations) :] + combinations[: number % len(combinations)]
        met: set[Any] = set()  # with this case
        kept: set[Any] = set()
        while new := max((set(enumerate(row)) - met for row in turned), key=len):
            row = next(row for row in turned if set(enumerate(row)) - met == new)
            met |= new
            kept.add(row)
        for row in combinations:
            marks = [pytest.mark.full] if row not in kept else [pytest.mark.compat] if one.id in compat else []
            id = "-".join([one.id, *(str(value).removeprefix("torch.") for value in row)])
            rows.append(pytest.param(one, *row, id=id, marks=marks))
    return rows


def in_turn(cases: Iterable[Any], *choices: Sequence[Any]) -> list[Any]:
    """A row for pytest of each case with each combination of choices. `make test` runs one combination for each case,
    the combinations in turn, where each case takes the same path whatever is chosen; the other rows are ``full``."""
    combinations = list(itertools.product(*choices))
    return [
        pytest.param(case, *row, marks=[] if (number - place) % len(combinations) == 0 else [pytest.mark.full])
        for number, case in enumerate(cases)
        for place, row in enumerate(combinations)
    ]


def lp_pool(rank: int) -> Callable[..., Tensor]:
    """torch's function; before 2.13 infinite norms, of which it sums infinite powers there, as since."""
    theirs: Callable[..., Tensor] = getattr(F, f"lp_pool{rank}d")
    if torch.__version__ >= "2.13":
        return theirs

    def function(
        input: Any, norm_type: Any, kernel_size: Any, stride: Any = None, ceil_mode: bool = False, **unknown: Any
    ) -> Tensor:
        if not isinstance(norm_type, (int, float)) or not math.isinf(norm_type):
            return theirs(input, norm_type, kernel_size, stride, ceil_mode, **unknown)
        if rank == 2:
            _, _ = _pair(kernel_size)
        if rank == 3:
            _, _, _ = _triple(kernel_size)
        maximum: Callable[..., Tensor] = getattr(F, f"max_pool{rank}d")
        if norm_type > 0:
            return maximum(input.abs(), kernel_size, stride, 0, 1, ceil_mode, **unknown)
        return -maximum(-input.abs(), kernel_size, stride, 0, 1, ceil_mode, **unknown)

    return function


def lay_out(t: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        wide = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)
    if layout == "nhwc" and t.dim() >= 3:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t


def assert_close(
    name: str, ours: Tensor, reference: Tensor, torchs: Tensor, others: Iterable[Errors] = (), *, together: bool = False
) -> None:
    """The only tolerance: our error against float64 is at most twice that of torch's own operator, plus one epsilon.

    ``others`` are torch's errors for other values of the inputs. They are asked for where the first would reject our
    largest error: that of a few fp32 numbers is a matter of luck, and of torch's own it rejects one in thirty. The root
    mean square of FEW numbers or more is no such matter, and is held to the first, except with ``together``, for what
    passes its errors on from number to number, as a whole model does. NaN and infinities must stand in the same places.
    """
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    assert ours.dtype == torchs.dtype, f"{name}: dtype {ours.dtype}, torch gives {torchs.dtype}"
    ours, reference, torchs = (t.detach().cpu() for t in (ours, reference, torchs))
    finite = reference.isfinite()
    strange = ours[~finite].double()
    torch.testing.assert_close(strange, reference[~finite], equal_nan=True, msg=f"{name}: NaN or inf misplaced")
    errors, epsilon = Errors.of(ours, reference), EPSILON[ours.dtype]
    allowed = Errors(0.0, 0.0)
    for sample in itertools.chain([Errors.of(torchs, reference)], others):
        limit = sample.allowed(epsilon)
        allowed = Errors(max(allowed.max, limit.max), max(allowed.rms, limit.rms))
        if errors.max <= allowed.max and errors.rms <= allowed.rms:
            return
        if errors.rms > allowed.rms and reference.numel() >= FEW and not together:
            break
    raise AssertionError(
        f"{name}: max error {errors.max:.2e}, allowed {allowed.max:.2e}; rms {errors.rms:.2e}, {allowed.rms:.2e}"
    )


def assert_as_exact(ours: Any, reference: Callable[..., Any], *args: Any, together: bool = False) -> None:
    """:func:`assert_close` of our results with those of ``reference(*args)`` in float64, and in the arguments' dtypes.

    Results are tensors or sequences of them, in the same order. Tuples of tensors and modules may be arguments, and a
    module the reference. The other values for torch's error are the arguments times random numbers between 7/8 and
    9/8, which leave zeros, NaN and infinities as they are.
    """

    def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(value, torch.nn.Module):
            return copy.deepcopy(value)._apply(change)
        return change(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    def in_float64(t: Tensor) -> Tensor:
        return (t.double() if t.is_floating_point() else t).cpu()

    def other(t: Tensor) -> Tensor:
        return t * (0.875 + torch.rand(t.shape, device=t.device) / 4).to(t.dtype) if t.is_floating_point() else t

    def both(values: list[Any]) -> list[list[Tensor]]:
        """The reference's results in float64, and torch's."""
        with tritune.use_backend("torch"):
            calls = [tree_map(functools.partial(changed, change=in_float64), values), values]
            return [[t.detach() for t in tree_leaves(function(*rest))] for function, *rest in calls]

    @functools.cache
    def sample(_: int) -> list[Errors]:
        pairs = zip(*both(tree_map(functools.partial(changed, change=other), call)), strict=True)
        return [Errors.of(theirs, exact) for exact, theirs in pairs]

    call = [reference, *args]
    results = zip(tree_leaves(ours), *both(call), strict=True)
    for index, (result, exact, theirs) in enumerate(results):
        others = (sample(number)[index] for number in range(TORCH_SAMPLES - 1))
        assert_close(f"result {index}", result, exact, theirs, others, together=together)


class Allocations(TorchDispatchMode):
    """Bytes of all memory that is allocated in the block, inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tritune":  # look inside
            kind = next(one.device.type for one in args if isinstance(one, Tensor))
            key = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}[kind]
            with self:
                return func._op_dk(key, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        storages = [one.untyped_storage() for one in tree_leaves(result) if isinstance(one, Tensor)]
        given = [one.untyped_storage() if isinstance(one, Tensor) else one for one in tree_leaves(args)]
        known = {one.data_ptr() for one in given if isinstance(one, torch.UntypedStorage)}
        self.bytes += sum(one.nbytes() for one in storages if one.data_ptr() not in known)
        return result


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """torch without oneDNN, whose bfloat16 weight gradient reads memory that nobody wrote, for some sizes."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def few_dots(limit: int = MAX_INTERPRETED_DOTS) -> Iterator[None]:
    """Fails a case whose kernels do more matrix products than the interpreter runs in reasonable time."""
    if not tritune.ops._dispatch.INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    original, count = InterpreterBuilder.create_dot, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    InterpreterBuilder.create_dot = counting
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = original
    assert count <= limit, f"{count} interpreted dots: make the case smaller"


def recorded_precisions(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """How the products of all launches from here on multiply fp32 operands. In the interpreter the values do not tell,
    since there all products are in full precision."""
    from tritune.kernels._launch import Launch

    original, precisions = Launch.run, set()

    def run(launch: Any) -> None:
        if "PRECISION" in launch.constants:
            precisions.add(launch.constants["PRECISION"])
        original(launch)

    monkeypatch.setattr(Launch, "run", run)
    return precisions


def run(fn: Callable[..., Any], inputs: dict[str, Tensor], kwargs: dict[str, Any], dy_seed: int) -> dict[str, Tensor]:
    """Outputs and the gradients of every input for a random output gradient, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = fn(**leaves, **kwargs)
    generator = torch.Generator().manual_seed(dy_seed)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y.dtype).to(y.device)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"output": y, **{f"grad {name}": grad for name, grad in zip(leaves, gradients, strict=True)}}


def check(case: Case, dtype: torch.dtype, layout: str, device: str, backend: str) -> dict[str, Tensor]:
    """Output and every gradient against float64, layout as torch's, and bit for bit the same twice."""

    def draw() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Random inputs, and torch's results for them in float64 and in ``dtype``."""
        inputs = case.inputs(dtype, layout, device)
        exact = run(case.reference, {name: t.double().cpu() for name, t in inputs.items()}, case.kwargs, 1)
        return inputs, exact, run(case.reference, inputs, case.kwargs, 1)

    @functools.cache
    def sample(index: int) -> dict[str, Errors]:
        _, exact, torchs = draw()
        return {name: Errors.of(torchs[name].detach(), exact[name].detach()) for name in exact}

    inputs, exact, torchs = draw()
    with tritune.use_backend(backend), poisoned(), few_dots():
        ours = run(case.op, inputs, case.kwargs, 1)
    for name in exact:
        others = (sample(index)[name] for index in range(TORCH_SAMPLES - 1))
        assert_close(name, ours[name], exact[name], torchs[name], others)
    if ours["output"].dim() < 5:  # of 3-d convolution it depends on which of its CPU kernels torch takes
        assert ours["output"].stride() == torchs["output"].stride(), "output layout differs from torch's"
    if backend == "triton" and device == "cuda":
        with tritune.use_backend(backend):
            again = run(case.op, inputs, case.kwargs, 1)
        for name, first in ours.items():
            assert torch.equal(first, again[name]), f"{name} differs between two runs"
    return ours


def backend_of(tier: str) -> str:
    return "torch" if tier == "torch" else "triton"
