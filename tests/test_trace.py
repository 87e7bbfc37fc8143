"""torch.jit.trace of each function: what is traced at one size computes another as torch's own does, without warnings
that torch's does not give."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tritune

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings(r"ignore:.torch.jit.trace.* is deprecated:DeprecationWarning"),
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
