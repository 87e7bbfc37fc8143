"""TorchScript. What torch.jit.trace traces of a function at one size computes another as torch's own does, without
warnings that torch's does not give; what torch.jit.script compiles calls torch's own function."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_graphs
import torch
import torch.nn.functional as F

import tritune

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings(r"ignore:.torch.jit.* is deprecated:DeprecationWarning"),
]

SIZES = {1: (8,), 2: (8, 12), 3: (8, 4, 6)}
OTHER_SIZES = {1: (14,), 2: (12, 16), 3: (6, 10, 8)}


class Call(NamedTuple):
    """A call of ``function``: its arguments are computed from images [N, 3, *space], which the trace includes."""

    function: str
    rank: int
    arguments: Callable[[Any], tuple[Any, ...]]
    kwargs: dict[str, Any] = {}

    def of(self, namespace: Any, x: Any) -> Any:
        return getattr(namespace, self.function)(*self.arguments(x), **self.kwargs)


def calls(rank: int) -> Iterator[tuple[str, Call]]:
    weight, up = torch.randn(4, 3, *(3,) * rank), torch.randn(3, 4, *(3,) * rank)
    ones = (1,) * (rank - 1)
    yield "", Call(f"conv{rank}d", rank, lambda x: (x, weight))
    yield "same", Call(f"conv{rank}d", rank, lambda x: (x, weight), {"padding": "same"})
    yield "", Call(f"conv_transpose{rank}d", rank, lambda x: (x, up), {"stride": 2})
    yield "", Call(f"lp_pool{rank}d", rank, lambda x: (x, 2, 2))
    for kind in ("max_pool", "avg_pool"):
        yield "", Call(f"{kind}{rank}d", rank, lambda x: (x, 2))
        yield "by the size", Call(f"{kind}{rank}d", rank, lambda x: (x, x.shape[2] // 4))
    for kind in ("adaptive_max_pool", "adaptive_avg_pool"):
        yield "", Call(f"{kind}{rank}d", rank, lambda x: (x, 2))
        yield "by the size", Call(f"{kind}{rank}d", rank, lambda x: (x, (x.shape[2] // 2, *ones)))
        if rank > 1:
            yield "as it is", Call(f"{kind}{rank}d", rank, lambda x: (x, (None, *ones)))
    if rank == 2:
        yield "", Call("scaled_dot_product_attention", rank, lambda x: (x, x, x))
        yield "transposed", Call("scaled_dot_product_attention", rank, lambda x: (x.mT,) * 3, {"is_causal": True})


CALLS = {f"{call.function} {case}".strip(): call for rank in SIZES for case, call in calls(rank)}
NOT_TRACED = {f"max_unpool{rank}d" for rank in (1, 2, 3)}  # nor are torch's, whose Python asserts a traced size


def traced(call: Call, namespace: Any, x: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.jit.trace(lambda x: call.of(namespace, x), x, check_trace=False)
    return program, [str(one.message) for one in caught if one.category is torch.jit.TracerWarning]


@pytest.mark.parametrize("name", CALLS)
def test_a_traced_program_is_right_at_other_sizes(name):
    call = CALLS[name]
    x, other = torch.randn(2, 3, *SIZES[call.rank]), torch.randn(3, 3, *OTHER_SIZES[call.rank])
    ours, our_warnings = traced(call, tritune, x)
    theirs, their_warnings = traced(call, F, x)
    assert our_warnings == their_warnings
    torch.testing.assert_close(ours(other), theirs(other), rtol=0, atol=0)
    torch.testing.assert_close(ours(x), call.of(tritune, x))


def test_every_function_that_torch_has_is_here():
    functions = {name for name in tritune.__all__ if inspect.isroutine(getattr(F, name, None))}
    assert {call.function for call in CALLS.values()} == functions - NOT_TRACED


def scripted_calls() -> Iterator[tuple[str, str, int]]:
    """Name, arguments as they are written in scripted code, and dimensions of space."""
    for rank in SIZES:
        pair = [2] * rank
        yield f"conv{rank}d", "x, w, None, 1, 1", rank
        yield f"conv{rank}d", f'x, w, padding="same", dilation={pair}', rank
        yield f"conv_transpose{rank}d", "x, w, stride=2", rank
        yield f"avg_pool{rank}d", f"x, {pair}, count_include_pad=False", rank
        yield f"lp_pool{rank}d", "x, 2.0, 2", rank
        yield f"adaptive_avg_pool{rank}d", f"x, {pair}", rank
        for name, size in ((f"max_pool{rank}d", "2"), (f"adaptive_max_pool{rank}d", f"{pair}")):
            yield name, f"x, {size}", rank
            yield name, f"x, {size}, return_indices=True", rank
    yield "scaled_dot_product_attention", "x, x, x, is_causal=True", 2


SCRIPTED = list(scripted_calls())
UNSCRIPTED = {name for name in test_graphs.OPERATORS if not hasattr(F, name)} | NOT_TRACED


def written(code: str, path: Path) -> Callable[..., Any]:
    """A function of somebody's module, whose source TorchScript finds."""
    path.write_text(code)
    scope: dict[str, Any] = {"torch": torch, "tritune": tritune, "__name__": path.stem}
    exec(compile(code, str(path), "exec", dont_inherit=True), scope)
    return scope["compute"]


@pytest.mark.parametrize("name, arguments, rank", SCRIPTED)
def test_scripted_code_calls_torchs(name: str, arguments: str, rank: int, tmp_path: Path) -> None:
    code = f"def compute(x: torch.Tensor, w: torch.Tensor):\n    return tritune.{name}({arguments})\n"
    function, file = written(code, tmp_path / "of_a_user.py"), io.BytesIO()
    torch.jit.save(torch.jit.script(function), file)
    file.seek(0)
    x, w = torch.randn(2, 3, *SIZES[rank]), torch.randn(3, 3, *(3,) * rank)
    with tritune.use_backend("torch"):
        torch.testing.assert_close(torch.jit.load(file)(x, w), function(x, w), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(UNSCRIPTED))
def test_scripted_code_is_told_what_to_use(name: str, tmp_path: Path) -> None:
    function = written(f"def compute(x: torch.Tensor):\n    return tritune.{name}(x)\n", tmp_path / "of_a_user.py")
    for one in (function, getattr(tritune, name)):
        with pytest.raises(NotImplementedError, match=f"^torch.jit.script cannot compile {name}: use torch.export or"):
            torch.jit.script(one)


def test_every_function_is_scripted_or_not() -> None:
    assert {name for name, *_ in SCRIPTED} | UNSCRIPTED == set(test_graphs.OPERATORS)
