"""What kernels touch: operands whose elements lie far apart, and the memory checker itself."""

from __future__ import annotations

import functools
import inspect
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import tritune  # noqa: E402

pytestmark = pytest.mark.interpret
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on


# --- operands whose elements lie far apart ---------------------------------------------------------------------------


class Case(NamedTuple):
    """A call of a public function; sizes of its tensors by the names of its parameters, and its other arguments."""

    function: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Small integers, whose sums are exact in any order. A mask has some of them as booleans."""
        made = {name: torch.randint(-2, 3, shape).float() for name, shape in self.shapes.items()}
        if "attn_mask" in made and self.options.get("mask") != "float":
            made["attn_mask"] = made["attn_mask"] > -2
        if "indices" in made:
            rank = int(self.function[-2])
            space = [2 * size for size in self.shapes["input"][2:]]
            pool: Callable[..., Any] = getattr(F, f"max_pool{rank}d")
            made["indices"] = pool(torch.randn(*self.shapes["input"][:2], *space), 2, return_indices=True)[1]
        return made


def _convolutions() -> dict[str, Case]:
    found = {}
    for rank in (1, 2, 3):
        space = (6, 5, 4)[:rank] if rank > 1 else (9,)
        window = (3,) * rank if rank < 3 else (2, 3, 2)
        out = tuple(size - tap + 1 for size, tap in zip(space, window, strict=True))
        big = tuple(size + tap - 1 for size, tap in zip(space, window, strict=True))
        # Groups of few channels take long to interpret: one rank of them.
        for kind, groups, c in (("dense", 1, 8), ("depthwise", 4, 4))[: 2 if rank == 2 else 1]:
            shared = {"input": (3, c, *space), "weight": (c, c // groups, *window), "bias": (c,), "scale": (c,)}
            options = {"groups": groups, "activation": "relu"}
            name = f"conv{rank}d"
            found[f"{name}-{kind}"] = Case(name, {**shared, "residual": (3, c, *out)}, options)
            name = f"conv_transpose{rank}d"
            found[f"{name}-{kind}"] = Case(name, {**shared, "residual": (3, c, *big)}, options)
    shapes = {"input": (3, 8, 8, 7), "weight": (8, 8, 3, 3), "bias": (8,), "scale": (8,)}
    found["conv2d_max_pool2d"] = Case("conv2d_max_pool2d", shapes, {})
    return found


def _pools() -> dict[str, Case]:
    found = {}
    for rank in (1, 2, 3):
        x = {"input": (3, 3, *(6, 5, 8)[3 - rank :])}
        for name, options in (
            ("max_pool", {"kernel_size": 2}), ("avg_pool", {"kernel_size": 2}),
            ("adaptive_avg_pool", {"output_size": 3}), ("adaptive_max_pool", {"output_size": 3}),
            ("lp_pool", {"norm_type": 2, "kernel_size": 2}),
        ):  # fmt: skip
            if name.startswith("adaptive") and rank > 1:
                options = {"output_size": (3,) * rank}
            found[f"{name}{rank}d"] = Case(f"{name}{rank}d", x, options)
        both = {"input": (3, 3, *(3, 4, 3)[3 - rank :]), "indices": (3, 3, *(3, 4, 3)[3 - rank :])}
        found[f"max_unpool{rank}d"] = Case(f"max_unpool{rank}d", both, {"kernel_size": 2})
    found |= {name: Case(name, {"input": (3, 3, 5, 8)}, {}) for name in ("global_avg_pool", "global_max_pool")}
    return found


def _recurrences() -> dict[str, Case]:
    found = {}
    for name, gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
        shapes = {
            "input": (3, 3, 5), "w_ih": (2, gates * 4, 5), "w_hh": (2, gates * 4, 4), "b_ih": (2, gates * 4),
            "b_hh": (2, gates * 4), "h0": (2, 3, 4),
        }  # fmt: skip
        found[name] = Case(name, {**shapes, "c0": (2, 3, 4)} if name == "lstm" else shapes, {})
    shapes = {
        "x": (3, 5), "h": (3, 4), "W_xh": (4, 5), "W_hh": (4, 4), "b_h": (4,), "W_ho": (3, 4), "b_o": (3,),
        "W_yh": (3, 3),
    }  # fmt: skip
    found["elman_step"] = Case("elman_step", shapes, {})
    return found


def _attentions() -> dict[str, Case]:
    rows = {"query": (2, 2, 5, 8), "key": (2, 2, 6, 8), "value": (2, 2, 6, 8)}
    pairs = (2, 2, 5, 6)
    return {
        "sdpa-mask": Case("scaled_dot_product_attention", {**rows, "attn_mask": pairs}, {}),
        "sdpa-bias": Case("scaled_dot_product_attention", {**rows, "attn_mask": pairs}, {"mask": "float"}),
        "attention": Case("attention", {**rows, "attn_mask": pairs, "bias": pairs}, {"return_lse": True}),
        "attention-keys": Case("attention", {**rows, "attn_mask": (2, 1, 1, 6), "bias": (1, 2, 1, 6)}, {}),
        "attention-queries": Case("attention", {**rows, "attn_mask": (2, 1, 5, 1), "bias": (1, 2, 5, 1)}, {}),
        "attention-cosine": Case("attention", {**rows, "scale": (2,)}, {"score": "cosine"}),
        "attention_pool": Case(
            "attention_pool", {**rows, "query": (2, 5, 8), "attn_mask": (2, 6), "scale": (2,)}, {}
        ),
    }  # fmt: skip


CASES = {**_convolutions(), **_pools(), **_recurrences(), **_attentions()}


def far(t: Tensor, near: int | None) -> Tensor:
    """The same tensor with its elements 2**30 apart along each dimension, but 1 along ``near``, in memory of which only
    the pages that hold them exist."""
    # Multiples of 16, so that no launcher takes them for unaligned, and no two elements in one place.
    steps = [1 if near is not None and dim == near % t.dim() else 2**30 + 16 ** (2 + dim) for dim in range(t.dim())]
    size = 1 + sum((length - 1) * step for length, step in zip(t.shape, steps, strict=True))
    memory = mmap.mmap(-1, size * t.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, steps).copy_(t)


@functools.cache
def expected(name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A case's tensors, and its results for them."""
    tensors = CASES[name].tensors()
    return tensors, results(CASES[name], tensors)


def results(case: Case, tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    """All outputs, and the gradients of all operands that have one, for output gradients which ``change`` lays out."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    options = {name: value for name, value in case.options.items() if name != "mask"}
    with tritune.use_backend("triton"):
        found = getattr(tritune, case.function)(**leaves, **options)
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
        generator = torch.Generator().manual_seed(5)
        seeds = [change(torch.randint(-2, 3, t.shape, generator=generator).float()) for t in outputs]
        wanted = [t for t in leaves.values() if t.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, wanted, seeds)]


@pytest.mark.parametrize("near", [None, 1, -1])
@pytest.mark.parametrize("name", CASES)
def test_elements_far_apart(name, near):
    """Offsets within a tile that wrap at 2**31 read elsewhere, or nothing that is mapped."""
    tensors, right = expected(name)
    apart = {operand: far(t, near) for operand, t in tensors.items()}
    found = results(CASES[name], apart, lambda t: far(t, near))
    for ours, wanted in zip(found, right, strict=True):
        # What torch itself adds up in the order of its memory may differ in the last bits.
        torch.testing.assert_close(ours, wanted)


def test_every_operand_of_every_public_function_is_laid_out_far():
    public = {
        name: value
        for name, value in vars(tritune).items()
        if getattr(value, "__module__", "").startswith("tritune.ops.") and value.__module__ != "tritune.ops._dispatch"
    }
    for name, function in public.items():
        tensors = {one.name for one in inspect.signature(function).parameters.values() if "Tensor" in one.annotation}
        covered = {operand for case in CASES.values() if case.function == name for operand in case.shapes}
        assert tensors == covered, name
