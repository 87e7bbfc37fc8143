"""What every family's tests share: cases as data, the one tolerance, and the check that runs a case.

A new family brings a table of :class:`Case` and one parametrised test that calls :func:`check`; the tier decides the
backend (``torch`` in tier 1, the kernels in tiers 2 and 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tritune

EPSILON = {torch.float64: 1e-14, torch.float32: 6e-8, torch.float16: 5e-4, torch.bfloat16: 4e-3}
MAX_INTERPRETED_DOTS = 2000  # about 0.8 ms each


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


def lay_out(t: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        wide = torch.full([2 * size for size in t.shape], float("nan"), dtype=t.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)
    if layout == "nhwc" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t


def assert_close(name: str, ours: Tensor, reference: Tensor, torchs: Tensor) -> None:
    """The only tolerance: our error against float64 is at most twice that of torch's own operator, plus one epsilon.

    Both errors are relative to the reference as a whole, once by the largest element and once by root mean square.
    NaN and infinities must stand in the same places.
    """
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    assert ours.dtype == torchs.dtype, f"{name}: dtype {ours.dtype}, torch gives {torchs.dtype}"
    if reference.numel() == 0:
        return
    epsilon = EPSILON[ours.dtype]
    ours, torchs = ours.detach().double().cpu(), torchs.detach().double().cpu()
    finite = reference.isfinite()
    torch.testing.assert_close(ours[~finite], reference[~finite], equal_nan=True, msg=f"{name}: NaN or inf misplaced")
    ours, torchs, reference = (t[finite] for t in (ours, torchs, reference.detach()))
    if reference.numel() == 0:
        return
    for measure, of in (("max", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        size = of(reference).clamp_min(1e-30)
        error, allowed = of(ours - reference) / size, 2 * of(torchs - reference) / size + epsilon
        assert error <= allowed, f"{name}: {measure} error {error:.2e}, allowed {allowed:.2e}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN (integers: their maximum), so an element that nobody wrote fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
    inputs = case.inputs(dtype, layout, device)
    exact = run(case.reference, {name: t.double().cpu() for name, t in inputs.items()}, case.kwargs, 1)
    torchs = run(case.reference, inputs, case.kwargs, 1)
    with tritune.use_backend(backend), poisoned(), few_dots():
        ours = run(case.op, inputs, case.kwargs, 1)
    for name in exact:
        assert_close(name, ours[name], exact[name], torchs[name])
    assert ours["output"].stride() == torchs["output"].stride(), "output layout differs from torch's"
    if backend == "triton" and device == "cuda":
        with tritune.use_backend(backend):
            again = run(case.op, inputs, case.kwargs, 1)
        for name, first in ours.items():
            assert torch.equal(first, again[name]), f"{name} differs between two runs"
    return ours


def backend_of(tier: str) -> str:
    return "torch" if tier == "torch" else "triton"
