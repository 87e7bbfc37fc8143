"""torch's own test data for the six convolutions: every sample, on torch's backend and on the kernels."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, check
from test_conv import reference_of

import tritune

pytest.importorskip("expecttest")  # torch.testing needs it
from torch.testing._internal.common_methods_invocations import op_db

OPS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")


@functools.cache
def samples(op: str, dtype: torch.dtype) -> list[Any]:
    (info,) = (one for one in op_db if one.name == f"nn.functional.{op}")
    return list(info.sample_inputs("cpu", dtype, requires_grad=True))


COUNTS = [(op, index) for op in OPS for index in range(len(samples(op, torch.float32)))]


@pytest.mark.torch
def test_all_six_have_samples():
    assert len(COUNTS) >= 92


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op, index", COUNTS)
def test_torch_backend(op, index, dtype):
    sample = samples(op, dtype)[index]
    leaves = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
    results = []
    for function in (getattr(F, op), getattr(tritune, op)):
        y = function(sample.input, *sample.args, **sample.kwargs)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for wanted, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.interpret
@pytest.mark.gpu
@pytest.mark.parametrize("op, index, dtype", [
    # The tables of test_conv have the same kinds of calls: `make test` runs every third sample, in one dtype.
    pytest.param(op, index, dtype, marks=[] if index % 3 == 0 and (index + half) % 2 == 0 else [pytest.mark.full])
    for op, index in COUNTS for half, dtype in enumerate((torch.float32, torch.float16))
])  # fmt: skip
def test_kernels(op, index, dtype, device):
    """``use_backend("triton")`` never falls back: what no kernel covered would raise. Large tiles, so that windows of
    a hundred taps take the interpreter seconds."""
    from tritune.autotune.config import Config
    from tritune.autotune.resolve import override
    from tritune.kernels import conv, conv_direct

    sample = samples(op, torch.float32)[index]
    weight, bias = sample.args
    shapes = {"input": tuple(sample.input.shape), "weight": tuple(weight.shape)}
    if bias is not None:
        shapes["bias"] = tuple(bias.shape)
    case = Case(f"{op}-{index}", getattr(tritune, op), reference_of(op), shapes, dict(sample.kwargs))
    tile = Config(BLOCK_M=1024, BLOCK_N=16, BLOCK_K=16, GROUP_M=1, SPLIT_K=1, num_warps=8, num_stages=2)
    wide = Config(BLOCK_M=32, BLOCK_N=128, BLOCK_K=64, SPLIT_K=1, num_warps=4, num_stages=2)
    blocks = Config(BLOCK_P=1, BLOCK_Q=4096, num_warps=4, num_stages=1)
    rows = Config(BLOCK_P=4, BLOCK_Q=8, SPLIT_M=1, num_warps=1, num_stages=1)
    with (
        override(conv_direct.TRANSPOSE, blocks),
        override(conv_direct.WEIGHT_GRAD, rows),
        override(conv.FORWARD, Config(**tile, SWAP=0)),
        override(conv.TRANSPOSE, tile),
        override(conv.WEIGHT_GRAD, wide),
    ):
        check(case, dtype, "nchw", device, "triton")
