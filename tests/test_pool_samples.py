"""torch's own test data for pooling: every sample, on torch's backend and on the kernels."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, check, poisoned
from test_pool import reference_of
from torch import Tensor

import tritune

pytest.importorskip("expecttest")  # torch.testing needs it
from torch.testing._internal.common_methods_invocations import op_db

KINDS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "max_unpool")  # lp_pool has no samples
OPS = tuple(f"{kind}{rank}d" for kind in KINDS for rank in (1, 2, 3))
LEAST = {"max_pool1d": 864, "max_pool2d": 1440, "max_pool3d": 576, "max_unpool1d": 145, "max_unpool2d": 289,
         "max_unpool3d": 97}  # fmt: skip
MEANS = tuple(op for op in OPS if "avg" in op)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS = 5  # of the samples, of which `make test` runs one on the kernels; the tables of test_pool have the same kinds


@functools.cache
def samples(op: str, dtype: torch.dtype) -> list[Any]:
    """Those of the ``grad`` variant of unpooling, too."""
    infos = [one for one in op_db if one.name == f"nn.functional.{op}"]
    wanted = [one for one in infos if dtype in one.dtypes]
    return [s for one in wanted for s in one.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point)]


def spelled_out(op: str, sample: Any) -> tuple[Any, ...]:
    """The call, the same for all ways to say it: ints for tuples, defaults, and which values the input has."""
    x, function = sample.input, getattr(tritune, op)
    rank = int(op[-2])
    call = inspect.signature(function).bind(x, *sample.args, **sample.kwargs)
    call.apply_defaults()
    values = {name: value for name, value in call.arguments.items() if name not in ("input", "indices")}
    for name, value in values.items():
        value = values["kernel_size"] if value is None and name == "stride" else value
        if type(value) in (tuple, list, torch.Size) and len(value) == 1:
            value = value[0]
        if type(value) is int and name != "divisor_override":
            value = (value,) * rank
        values[name] = tuple(value) if isinstance(value, (tuple, list)) else value
    indices = call.arguments.get("indices")
    places = () if indices is None else tuple(indices.flatten().tolist())
    return tuple(x.shape), x.stride(), places, *values.items()


def distinct(op: str) -> list[Any]:
    return list({spelled_out(op, sample): sample for sample in samples(op, torch.float32)}.values())


def call(function: Any, sample: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The results, and the gradient for whole numbers, whose sums are exact in every dtype."""
    rest = [one.to(x.device) if isinstance(one, Tensor) else one for one in sample.args]
    result = function(x, *rest, **sample.kwargs)
    y, *places = result if isinstance(result, tuple) else (result,)
    if not x.requires_grad:
        return y, *places
    dy = torch.randint(-4, 5, y.shape, generator=torch.Generator().manual_seed(y.numel())).to(y)
    return y, *places, *torch.autograd.grad(y, x, dy)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_torch_backend(op, dtype):
    """Values, indices, gradients."""
    found = samples(op, dtype)
    known = dtype.is_floating_point and (op, dtype) != ("avg_pool3d", torch.float16)
    assert len(found) >= (LEAST.get(op, 6) if known else 0)
    for sample in found:
        wanted, ours = (call(function, sample, sample.input) for function in (getattr(F, op), getattr(tritune, op)))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.interpret
@pytest.mark.gpu
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, PARTS))])
@pytest.mark.parametrize("op", OPS)
def test_kernels(op, part, device):
    """``use_backend("triton")`` never falls back: what no kernel covers raises. The dtypes take turns, and in three
    calls of four there is nothing to differentiate, so that the winners are not kept."""
    found = list(enumerate(distinct(op)))[:: 8 if device == "cuda" else 1]  # each compiles for its window there
    chosen = found[part::PARTS]
    refused = 0
    for number, sample in chosen:
        dtype = DTYPES[number % 3]
        try:
            if op in MEANS:
                arguments = inspect.signature(getattr(tritune, op)).bind(sample.input, *sample.args, **sample.kwargs)
                shape = arguments.arguments.pop("input").shape
                case = Case(op, getattr(tritune, op), reference_of(op), {"input": tuple(shape)}, arguments.arguments)
                check(case, dtype, "nchw", device, "triton")
                continue
            x = sample.input.detach().to(dtype).requires_grad_(number % 4 == 0)
            with tritune.use_backend("triton"), poisoned():
                ours = call(getattr(tritune, op), sample, x.detach().to(device).requires_grad_(x.requires_grad))
        except tritune.UnsupportedError:
            refused += 1
            continue
        wanted = call(getattr(F, op), sample, x)
        torch.testing.assert_close([one.cpu() for one in ours], list(wanted), rtol=0, atol=0)
    assert refused <= 0.02 * len(chosen)
