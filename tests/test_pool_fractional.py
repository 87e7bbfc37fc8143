"""Maxima over windows at random: torch's own, told of as everything that no kernel covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch_errors import Call, assert_same_error, call, outcome

import tritune

X = {2: (2, 3, 9, 11), 3: (2, 3, 6, 8, 7)}
RANKS = pytest.mark.parametrize("rank", [2, 3])


def functions(rank: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return getattr(F, f"fractional_max_pool{rank}d"), getattr(tritune, f"fractional_max_pool{rank}d")


def by_definition(x: torch.Tensor, kernel: int, size: int, samples: torch.Tensor) -> torch.Tensor:
    """The formula of the docstring. Of two dimensions the first sample is of the columns, of three of the depth."""
    rank, space = samples.shape[-1], x.shape[2:]
    out = x.new_empty(*x.shape[:2], *(size,) * rank)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            starts = []
            for full, u in zip(space, samples[n, c].flip(0) if rank == 2 else samples[n, c], strict=True):
                step = (full - kernel) / (size - 1)
                first = [int((p + float(u)) * step) - int(float(u) * step) for p in range(size - 1)]
                starts.append([*first, full - kernel])
            for at in torch.cartesian_prod(*(torch.arange(size),) * rank).tolist():
                window = tuple(slice(begin[p], begin[p] + kernel) for begin, p in zip(starts, at, strict=True))
                out[(n, c, *at)] = x[(n, c, *window)].max()
    return out


@pytest.mark.torch
@RANKS
class TestValues:
    def test_they_are_those_of_the_formula(self, rank: int) -> None:
        x, samples = torch.randn(X[rank], dtype=torch.float64), torch.rand(2, 3, rank, dtype=torch.float64)
        y = functions(rank)[1](x, 2, 3, _random_samples=samples)
        assert torch.equal(y, by_definition(x, 2, 3, samples))

    @pytest.mark.parametrize("options", [
        {"output_size": 3}, {"output_ratio": 0.5}, {"output_size": 4, "return_indices": True},
        {"output_size": None, "output_ratio": (0.5,) * 3},
    ], ids=str)  # fmt: skip
    def test_bits_and_random_numbers_are_torchs(self, rank: int, options: dict[str, Any]) -> None:
        if "output_ratio" in options:
            options = {**options, "output_ratio": (0.5,) * rank}
        for shape in (X[rank], X[rank][1:]):
            x, results = torch.randn(shape, requires_grad=True), []
            for function in functions(rank):
                torch.manual_seed(3)
                result = function(x, 2, **options)
                y, *indices = result if isinstance(result, tuple) else (result,)
                results.append((y, *indices, torch.autograd.grad(y.sin().sum(), x)[0], torch.rand(2)))
            torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_every_derivative(self, rank: int) -> None:
        function = functions(rank)[1]
        x = torch.randn(1, 1, *X[rank][2:], dtype=torch.float64, requires_grad=True)
        samples = torch.rand(1, 1, rank, dtype=torch.float64)

        def compute(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = function(x, 2, 2, _random_samples=samples)
            return y

        assert torch.autograd.gradcheck(compute, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(compute, x, fast_mode=True)


def malformed(rank: int) -> list[Call]:
    x, samples = torch.randn(X[rank]), torch.rand(2, 3, rank)
    return [
        call(x, 2), call(x, 2, 99), call(x, 99, 2), call(x, 2, 3, "x"), call(x, "2", 3), call(x, 2, 0),
        call(x, (2,) * (rank + 1), 3), call(x, 2, (3,) * (rank + 1)), call(x, 0, 3), call(x, 2.5, 3), call(None, 2, 3),
        call(x[0, 0], 2, 3), call(x[None], 2, 3), call(x[:, :0], 2, 3), call(x[..., :0], 2, 3), call(3, 2, 3),
        call(x, 2, None, (0.5,) * (rank + 1)), call(x, 2, 3, _random_samples=3),
        call(x, 2, 3, _random_samples=samples[0]), call(x, 2, 3, _random_samples=samples[..., :1]),
        call(x, 2, 3, _random_samples=samples.double()), call(x.long(), 2, 3), call(x, 2, 3, unknown=1),
    ]  # fmt: skip


BACKENDS = pytest.mark.parametrize(
    "backend", [pytest.param("auto", marks=pytest.mark.torch), pytest.param("triton", marks=pytest.mark.interpret)]
)


@BACKENDS
@RANKS
def test_errors_are_torchs(rank: int, backend: str) -> None:
    theirs, ours = functions(rank)
    compared = 0
    for made in malformed(rank):
        expected = outcome(theirs, made)
        if not isinstance(expected, Exception):
            continue
        compared += 1
        for watched in (False, True):
            with tritune.use_backend(backend), tritune.ops.record() if watched else tritune.use_backend(backend):
                got = outcome(ours, made)
            if backend == "triton" and isinstance(got, tritune.UnsupportedError):
                continue  # what torch sees in the data's type, or only when it computes
            assert_same_error(expected, got, made, compare_text=backend == "auto" and "unknown" not in made.kwargs)
    assert compared > 12


@BACKENDS
@RANKS
def test_no_kernel_covers_it(rank: int, backend: str) -> None:
    x, (_, function) = torch.randn(X[rank]), functions(rank)
    if backend == "triton":
        sentence = f"^fractional_max_pool{rank}d: no kernel covers the call, .*: no kernel has windows at random$"
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError, match=sentence):
            function(x, 2, 3)
        return
    before = torch.get_rng_state()
    decision = tritune.explain(function, x, 2, 3)
    assert (decision.op, decision.backend) == (f"fractional_max_pool{rank}d", "torch")
    assert torch.equal(torch.get_rng_state(), before)
