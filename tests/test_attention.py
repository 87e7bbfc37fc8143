"""attention, scaled_dot_product_attention, attention_pool and their modules on every backend."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    TORCH_SAMPLES,
    Allocations,
    Case,
    Errors,
    assert_as_exact,
    assert_close,
    backend_of,
    check,
    few_dots,
    poisoned,
    recorded_precisions,
)
from torch import Tensor

import tritune

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_backend = [pytest.mark.torch, pytest.mark.interpret, pytest.mark.gpu]
kernels_only = [pytest.mark.interpret, pytest.mark.gpu]
inf = math.inf


# --- the same function by torch's own operators ----------------------------------------------------------------------


def reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, score: str = "dot",
    scale: float | None = None, attn_mask: Tensor | None = None, is_causal: bool = False,
    causal_alignment: str = "top_left", enable_gqa: bool = False, return_lse: bool = False,
) -> Any:  # fmt: skip
    """torch's fused attention, with everything that hides a key in one mask; lse from all scores."""
    m, n = query.shape[-2], key.shape[-2]
    if scale is None:
        scale = query.shape[-1] ** -0.5 if score == "dot" else 1.0
    if score == "cosine":
        query, key = (F.normalize(t, dim=-1, eps=1e-6) for t in (query, key))
    if scale <= 0:
        query, scale = query * scale, 1.0
    seen = attn_mask
    if is_causal:
        shift = n - m if causal_alignment == "bottom_right" else 0
        visible = torch.ones(m, n, dtype=torch.bool, device=query.device).tril(shift)
        seen = visible if seen is None else seen & visible
    mask = seen if bias is None else bias if seen is None else torch.where(seen, bias, -inf)
    mask = None if mask is None else torch.atleast_2d(mask)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
    if not return_lse:
        return out
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3) if enable_gqa else key
    s = query.to(wide) @ keys.to(wide).transpose(-1, -2) * scale
    s = s if bias is None else s + bias.to(wide)
    s = s if seen is None else s.masked_fill(~seen, -inf)
    return out, torch.logsumexp(s, -1)


def joined(results: Any) -> Tensor:
    """All results as one tensor, so that each takes part in the comparison and in the gradient."""
    results = results if isinstance(results, tuple) else (results,)
    return torch.cat([t.flatten().to(results[0].dtype) for t in results])


def case(
    id: str, b: int, h: int, m: int, n: int, d: int, dv: int | None = None, *, kv: int | None = None,
    bias: tuple[int, ...] | None = None, mask: tuple[int, ...] | None = None, **options: Any,
) -> Case:  # fmt: skip
    """``kv``: heads of key and value; ``mask``: the shape of a random one, where each query sees its first key."""
    shapes = {"query": (b, h, m, d), "key": (b, kv or h, n, d), "value": (b, kv or h, n, dv or d)}
    if bias is not None:
        shapes["bias"] = bias
    if kv is not None:
        options["enable_gqa"] = True
    if mask is not None:
        seen = torch.rand(mask, generator=torch.Generator().manual_seed(m + n)) > 0.4
        seen[..., 0] = True
        options["attn_mask"] = seen

    def on_device(fn: Any) -> Any:
        def call(**arguments: Any) -> Tensor:
            if "attn_mask" in arguments:
                arguments["attn_mask"] = arguments["attn_mask"].to(arguments["query"].device)
            return joined(fn(**arguments))

        return call

    return Case(id, on_device(tritune.attention), on_device(reference), shapes, options)


CASES = [
    case("plain", 2, 3, 17, 33, 20),
    case("lse", 2, 2, 20, 20, 16, return_lse=True),
    case("one-query", 2, 3, 1, 40, 24),
    case("one-key", 1, 2, 19, 1, 8, return_lse=True),
    case("values-narrower", 1, 2, 17, 18, 40, 5),
    case("values-wider", 1, 2, 17, 18, 4, 33),
    case("head-1", 1, 1, 5, 6, 1),
    case("head-256", 1, 1, 18, 20, 256),
    case("causal", 1, 2, 35, 35, 16, is_causal=True, return_lse=True),
    case("causal-wide", 1, 2, 5, 37, 16, is_causal=True),
    case("causal-tall", 1, 2, 37, 5, 16, is_causal=True),
    case("bottom-right-wide", 1, 2, 5, 37, 16, is_causal=True, causal_alignment="bottom_right"),
    case("mask", 2, 2, 18, 35, 16, mask=(2, 1, 18, 35), return_lse=True),
    case("mask-of-keys", 2, 2, 18, 35, 16, mask=(35,)),
    case("mask-of-sequences", 2, 2, 18, 35, 16, mask=(2, 1, 1, 35), is_causal=True),
    case("bias", 2, 2, 17, 19, 16, bias=(2, 2, 17, 19)),
    case("bias-of-heads", 2, 2, 18, 21, 16, bias=(2, 18, 21), return_lse=True),
    case("bias-of-pairs", 2, 2, 17, 19, 16, bias=(17, 19)),
    case("bias-of-keys", 2, 2, 18, 40, 16, bias=(2, 1, 1, 40)),
    case("bias-of-queries", 2, 2, 35, 19, 16, bias=(1, 2, 35, 1), return_lse=True),
    case("bias-and-mask-and-causal", 2, 2, 21, 37, 16, bias=(1, 2, 21, 37), mask=(2, 1, 21, 37), is_causal=True),
    case("groups", 2, 6, 18, 20, 16, kv=2, return_lse=True),
    case("groups-causal-bias", 1, 4, 18, 34, 8, kv=1, bias=(4, 18, 34), mask=(18, 34), is_causal=True),
    case("groups-mask-of-heads", 1, 4, 18, 20, 8, kv=2, bias=(4, 18, 20), mask=(1, 4, 18, 20)),
    case("cosine", 2, 2, 18, 35, 20, score="cosine", scale=8.0, return_lse=True),
    case("cosine-large-scale", 1, 2, 18, 35, 64, score="cosine", scale=42.0),
    case("cosine-causal-mask", 2, 2, 20, 35, 24, score="cosine", scale=-5.0, is_causal=True, mask=(2, 1, 20, 35)),
    case("cosine-bias-groups", 1, 4, 19, 21, 16, kv=2, score="cosine", scale=4.0, bias=(4, 19, 21)),
    case("negative-scale", 1, 2, 19, 21, 16, scale=-0.5, is_causal=True),
    case("zero-scale", 1, 2, 19, 21, 16, scale=0.0, is_causal=True, return_lse=True),
]
COMPAT = ("plain", "causal-wide", "bias-and-mask-and-causal", "groups", "cosine")


def parameters() -> list[Any]:
    rows = []
    for one, dtype in itertools.product(CASES, DTYPES):
        marks = [pytest.mark.compat] if one.id in COMPAT else []
        rows.append(pytest.param(one, dtype, id=f"{one.id}-{str(dtype)[6:]}", marks=marks))
    return rows


def tensors(*shapes: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(fn: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
    """The result, and for a random gradient of it those of the arguments that need one."""
    out = fn(*args)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad(out, [t for t in args if t.requires_grad], dout)


class TestCases:
    pytestmark = every_backend

    @pytest.mark.parametrize("case, dtype", parameters())
    def test_values_and_gradients(self, case, dtype, device, tier):
        check(case, dtype, "nchw", device, backend_of(tier))

    @pytest.mark.parametrize("layout", ["strided", "nhwc"])
    @pytest.mark.parametrize("case", [CASES[0], CASES[15]], ids=lambda case: case.id)
    def test_layouts(self, case, layout, device, tier):
        check(case, torch.float16, layout, device, backend_of(tier))


class TestShapes:
    """Any number of leading dimensions, broadcast as torch does."""

    pytestmark = every_backend

    @pytest.mark.parametrize(
        "q, k, v, bias",
        [
            ((5, 8), (7, 8), (7, 4), (5, 7)),
            ((5, 8), (7, 8), (7, 8), (7,)),
            ((3, 5, 8), (3, 7, 8), (3, 7, 8), (3, 5, 7)),
            ((3, 5, 8), (3, 7, 8), (3, 7, 8), ()),
            ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8), (5, 7)),
            ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), (3, 5, 7)),
            ((2, 3, 5, 8), (7, 8), (2, 1, 7, 8), None),
            ((5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 1, 7)),
            ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), (2, 1, 1, 5, 7)),
            ((2, 1, 3, 5, 8), (1, 2, 3, 7, 8), (2, 2, 3, 7, 8), (3, 1, 7)),
        ],
    )
    def test_broadcasting(self, q, k, v, bias, device, tier):
        args = tensors(*(s for s in (q, k, v, bias) if s is not None), device=device)
        lead = torch.broadcast_shapes(q[:-2], k[:-2], v[:-2])

        def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            return tritune.attention(q, k, v, bias=bias)

        def expanded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            mask = None if bias is None else bias.expand(*lead, q.shape[-2], k.shape[-2])
            return F.scaled_dot_product_attention(*(t.expand(*lead, *t.shape[-2:]) for t in (q, k, v)), mask)

        with tritune.use_backend(backend_of(tier)), poisoned():
            results = with_gradients(ours, *args)
        assert_as_exact(results, partial(with_gradients, expanded), *args)

    def test_one_head_for_all_is_not_copied(self, device, tier):
        """Multi-query attention by broadcasting: the gradient of the one head is summed in the kernel."""
        args = tensors((2, 4, 9, 8), (2, 1, 11, 8), (2, 1, 11, 8), device=device)

        def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1))

        with tritune.use_backend(backend_of(tier)):
            results = with_gradients(tritune.attention, *args)
        assert_as_exact(results, partial(with_gradients, expanded), *args)

    def test_groups_that_differ_between_key_and_value(self, device, tier):
        q, k, v = tensors((2, 6, 5, 8), (2, 3, 7, 8), (2, 2, 7, 8), device=device)
        with tritune.use_backend(backend_of(tier)):
            out = tritune.attention(q, k, v, enable_gqa=True)
        assert_as_exact(out, partial(F.scaled_dot_product_attention, enable_gqa=True), q, k, v)

    @pytest.mark.parametrize("inner", ["heads", "sequence"])
    def test_the_result_lies_as_the_query_does(self, inner, device, tier):
        """As torch's fused attention has it: a projection's [B, S, H, D] comes back without a copy."""
        q, k, v = (torch.randn(2, s, 3, 8, device=device).transpose(1, 2) for s in (5, 7, 7))
        if inner == "sequence":
            q = q.contiguous()
        with tritune.use_backend(backend_of(tier)):
            out = tritune.scaled_dot_product_attention(q, k, v)
        assert out.transpose(1, 2).is_contiguous() == (inner == "heads")
        assert out.is_contiguous() == (inner == "sequence")

    @pytest.mark.parametrize("kind", ["expanded", "last dimension strided", "one packed tensor", "flipped"])
    def test_views(self, kind, device, tier):
        packed = torch.randn(2, 9, 3, 4, 8, device=device, requires_grad=True)
        views = {
            "expanded": lambda packed: [packed[:1, :, 0].transpose(1, 2).expand(2, -1, -1, -1) for _ in range(3)],
            "last dimension strided": lambda packed: [packed[:, :, i].permute(0, 3, 2, 1) for i in range(3)],
            "one packed tensor": lambda packed: [t.transpose(1, 2) for t in packed.unbind(2)],
            "flipped": lambda packed: [t.transpose(1, 2).flip(-1)[..., ::2] for t in packed.unbind(2)],
        }[kind]

        def of_views(attention: Callable[..., Tensor], packed: Tensor) -> Tensor:
            return attention(*views(packed), is_causal=True)

        with tritune.use_backend(backend_of(tier)):
            results = with_gradients(partial(of_views, tritune.attention), packed)
        assert_as_exact(results, partial(with_gradients, partial(of_views, reference)), packed)

    @pytest.mark.parametrize(
        "q, k, v",
        [
            ((0, 2, 5, 8), (0, 2, 7, 8), (0, 2, 7, 8)),
            ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
            ((2, 2, 0, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
            ((2, 2, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
            ((2, 2, 5, 0), (2, 2, 7, 0), (2, 2, 7, 8)),
            ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 0)),
        ],
    )
    @pytest.mark.parametrize("score", ["dot", "cosine"])
    def test_empty(self, q, k, v, score, device, tier):
        """No keys: zeros; no features: the mean of the values."""
        args = tensors(q, k, v, device=device)
        with tritune.use_backend(backend_of(tier)), poisoned():
            out, lse = tritune.attention(*args, score=score, return_lse=True)
            grads = torch.autograd.grad(out.sum() + lse.nan_to_num(neginf=0.0).sum(), args)
        assert out.shape == (*q[:-1], v[-1]) and lse.shape == q[:-1]
        for grad, shape in zip(grads, (q, k, v), strict=True):
            assert grad.shape == shape and grad.isfinite().all()
        if k[2] == 0:
            assert not out.any() and not grads[0].any() and (lse == -inf).all()
        if q[3] == 0:
            torch.testing.assert_close(out, args[2].mean(-2, keepdim=True).expand_as(out))
            torch.testing.assert_close(lse, torch.full_like(lse, math.log(7)))


class TestEdges:
    pytestmark = every_backend

    def test_rows_that_see_nothing(self, device, tier):
        """By mask, by bias, by causality: out 0, lse -inf, no gradient, and no NaN anywhere."""
        q, k, v, bias = tensors((2, 2, 20, 8), (2, 2, 18, 8), (2, 2, 18, 8), (2, 1, 20, 18), device=device)
        mask = torch.rand(2, 2, 20, 18, device=device) > 0.3
        mask[0, 1, 3], mask[1, :, 17] = False, False
        hidden = bias.detach().clone()
        hidden[1, 0, 5] = -inf
        hidden.requires_grad_()
        empty = ~mask.any(-1)
        empty[1, :, 5] = True
        with tritune.use_backend(backend_of(tier)), poisoned():
            out, lse = tritune.attention(q, k, v, attn_mask=mask, bias=hidden, return_lse=True)
            assert not out[empty].any() and (lse[empty] == -inf).all()
            assert lse[~empty].isfinite().all() and out[~empty].abs().amax(-1).gt(0).all()
            loss = out.square().sum() + torch.where(empty, 0.0, lse).sum()
            dq, dk, dv, dbias = torch.autograd.grad(loss, (q, k, v, hidden))
            causal = tritune.attention(q, k, v, is_causal=True, causal_alignment="bottom_right")
        assert all(grad.isfinite().all() for grad in (dq, dk, dv, dbias))
        assert not dq[empty].any() and not dbias[1, 0, 5].any()
        assert not causal[:, :, :2].any() and causal[:, :, 2:].abs().amax(-1).gt(0).all()

    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # finfo.min * log2(e), of which exp is 0
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_of_the_smallest_number(self, dtype, device, tier):
        """Models hide keys by finfo.min: a row of them is finite, a plain mean, and so is its gradient."""
        q, k, v = tensors((1, 2, 6, 8), (1, 2, 9, 8), (1, 2, 9, 8), device=device, dtype=dtype)
        bias = torch.zeros(1, 1, 6, 9, device=device, dtype=dtype)
        bias[..., 2, :] = torch.finfo(dtype).min
        bias[..., 4, 3:] = torch.finfo(dtype).min
        with tritune.use_backend(backend_of(tier)):
            out = tritune.attention(q, k, v, bias=bias)
            dv = torch.autograd.grad(out[:, :, 2].sum(), v, retain_graph=True)[0]
            dq = torch.autograd.grad(out.float().square().sum(), q)[0]
        assert_as_exact(out[:, :, 2], lambda v: v.mean(2), v)
        if tier != "torch":  # torch's kernel for the CPU loses the logarithm of 9 beside finfo.min, and says 1
            assert_as_exact(dv, lambda v: torch.full_like(v, 1 / 9), v)
        assert_as_exact(out[:, :, 4:5], F.scaled_dot_product_attention, q[:, :, 4:5], k[:, :, :3], v[:, :, :3])
        assert dq.isfinite().all()

    def test_causal_alignment(self, device, tier):
        """(5, 2): top left, rows from 1 on see both keys; bottom right, rows 0 to 2 see none."""
        q, k = torch.zeros(5, 4, device=device), torch.zeros(2, 4, device=device)
        v = torch.tensor([[0.0], [1.0]], device=device)
        with tritune.use_backend(backend_of(tier)):
            top = tritune.attention(q, k, v, is_causal=True)[:, 0]
            bottom = tritune.attention(q, k, v, is_causal=True, causal_alignment="bottom_right")[:, 0]
        assert top.tolist() == [0, 0.5, 0.5, 0.5, 0.5]
        assert bottom.tolist() == [0, 0, 0, 0, 0.5]

    @pytest.mark.parametrize("dtype, size", [(torch.float32, 1e4), (torch.float16, 300.0), (torch.bfloat16, 1e4)])
    def test_huge_scores(self, dtype, size, device, tier):
        q = torch.eye(6, 8, device=device).to(dtype) * size
        v = torch.randn(6, 8, device=device).to(dtype)
        with tritune.use_backend(backend_of(tier)):
            out, lse = tritune.attention(q, q.clone(), v, scale=1.0, return_lse=True)
        assert torch.equal(out, v)
        assert_as_exact(lse, lambda q, v: reference(q, q, v, scale=1.0, return_lse=True)[1], q, v)

    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_overflow_stays_in_its_row(self, device, tier):
        q, k, v = (torch.randn(1, 2, 5, 8, device=device) for _ in range(3))
        q[0, 1, 3] = 1e30
        k[0, 1, 2] = 1e30
        bias = torch.zeros(5, 5, device=device)
        bias[1, 2] = inf
        with tritune.use_backend(backend_of(tier)):
            overflown = tritune.attention(q, k, v).isnan().any(-1)
            biased = tritune.attention(v, v, v, bias=bias).isnan().any(-1)
        assert overflown[0, 1, 3] and not overflown[0, 0].any()
        assert biased.tolist() == [[[False, True, False, False, False]] * 2]

    def test_nan_behind_the_end_and_under_the_mask(self, device, tier):
        """Rows behind the end of a view are never read; a hidden key may be NaN; a hidden value is 0 times NaN."""
        wide = torch.full((1, 2, 40, 8), math.nan, device=device)
        q, k, v = (wide.clone() for _ in range(3))
        for t in (q, k, v):
            t[:, :, :21] = torch.randn(1, 2, 21, 8, device=device)
        mask = torch.ones(21, dtype=torch.bool, device=device)
        mask[4] = False
        keys = k.clone()
        keys[:, :, 4] = math.nan
        with tritune.use_backend("triton" if tier != "torch" else "torch"):
            out = tritune.attention(q[:, :, :21], k[:, :, :21], v[:, :, :21])
            assert out.isfinite().all()
            if tier != "torch":  # torch adds -inf to the NaN
                out = tritune.attention(q[:, :, :21], keys[:, :, :21], v[:, :, :21], attn_mask=mask)
                assert out.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_cosine_of_extreme_rows(self, dtype, device, tier):
        """Rows of length 0 and 1e-20 score 0, with gradients of at most 1 / eps; long rows do not overflow."""
        eps = 1e-6 if dtype is torch.float32 else 1e-3  # 1 / eps is a gradient
        sizes = [0.0, 1e-20, 300.0, 1e30] if dtype is torch.float32 else [0.0, 1e-7, 300.0, 6e4]
        rows = torch.stack([torch.full((8,), size) for size in sizes]).to(device, dtype).requires_grad_()
        k, v = tensors((5, 8), (5, 3), device=device, dtype=dtype)
        with tritune.use_backend(backend_of(tier)), poisoned():
            out, lse = tritune.attention(rows, k, v, score="cosine", scale=3.0, eps=eps, return_lse=True)
            dq, dk = torch.autograd.grad(out.sum() + lse.sum(), (rows, k))
        options = {"score": "cosine", "scale": 3.0, "return_lse": True}
        directions = torch.ones(3, 8, device=device, dtype=dtype)
        directions[0] = 0
        assert_as_exact(lse[[0, 2, 3]], lambda *args: reference(*args, **options)[1], directions, k, v)
        assert all(t.isfinite().all() for t in (out, dq, dk))
        if dtype is torch.float32:
            assert dq[0].abs().max() <= 3e6 and dq[0].any() and not dq[3].abs().gt(1e-20).any()

    def test_gradient_of_rows_shorter_than_eps(self, device, tier):
        """They are divided by a constant: nothing of their gradient is projected away."""
        q, k, v = tensors((6, 8), (7, 8), (7, 8), device=device)
        q = (F.normalize(q, dim=-1) * torch.linspace(0.1, 1.0, 6, device=device)[:, None]).detach().requires_grad_()

        def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            a, b = (F.normalize(t, dim=-1, eps=0.5) for t in (q, k))
            return torch.softmax(3.0 * a @ b.transpose(-1, -2), -1) @ v

        with tritune.use_backend(backend_of(tier)):
            results = with_gradients(partial(tritune.attention, score="cosine", scale=3.0, eps=0.5), q, k, v)
        assert_as_exact(results, partial(with_gradients, composed), q, k, v)

    def test_a_negative_scale_of_cosine_does_not_overflow(self, device, tier):
        """The bound of the scores is |scale|: above it 10 000 exponentials would pass what fp32 holds."""
        q, k, v = (torch.full((s, 8), x, device=device) for s, x in ((1, -1.0), (10_000, 1.0), (10_000, 2.0)))
        with tritune.use_backend(backend_of(tier)), few_dots():
            results = tritune.attention(q, k, v, score="cosine", scale=-40.0, return_lse=True)
        assert_as_exact(results, partial(reference, score="cosine", scale=-40.0, return_lse=True), q, k, v)

    def test_gradient_of_lse_is_the_weights(self, device, tier):
        q, k, v = tensors((1, 2, 6, 8), (1, 2, 7, 8), (1, 2, 7, 7), device=device)
        bias = torch.zeros(1, 2, 6, 7, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            _, lse = tritune.attention(q, k, v, bias=bias, return_lse=True)
            weights = torch.autograd.grad(lse.sum(), bias)[0]
            wanted = tritune.attention(q, k, torch.eye(7, device=device).expand(1, 2, 7, 7))
        torch.testing.assert_close(weights, wanted)

    def test_only_what_needs_a_gradient_gets_one(self, device, tier):
        q, k, v, bias = (t.detach() for t in tensors((1, 2, 6, 8), (1, 2, 7, 8), (1, 2, 7, 8), (6, 7), device=device))
        for wanted in ((0,), (1,), (2,), (3,), (0, 3)):
            args = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((q, k, v, bias))]
            with tritune.use_backend(backend_of(tier)):
                tritune.attention(*args[:3], bias=args[3]).square().sum().backward()
            assert [t.grad is not None for t in args] == [i in wanted for i in range(4)]

    @pytest.mark.parametrize("shape", [(), (1,), (4,)])
    @pytest.mark.parametrize("score", ["dot", "cosine"])
    def test_a_learned_scale(self, score, shape, device, tier):
        def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            a, b = (F.normalize(t, dim=-1) for t in (q, k)) if score == "cosine" else (q, k)
            return torch.softmax(a @ b.transpose(-1, -2) * scale.view(-1, 1, 1), -1) @ v

        def outcome(fn: Callable[..., torch.Tensor], q: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
            *others, scale = rest
            q, scale = (t.detach().requires_grad_() for t in (q, scale))
            out = fn(q, *others, scale)
            return [out.detach(), *torch.autograd.grad(out.square().sum(), (scale, q))]

        def draw() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
            args = [t.detach() for t in tensors((2, 4, 6, 8), (2, 4, 7, 8), (2, 4, 7, 8), device=device)]
            args.append(1 + torch.rand(shape, device=device))
            return args, outcome(composed, *(t.double() for t in args)), outcome(composed, *args)

        args, exact, torchs = draw()
        with tritune.use_backend(backend_of(tier)):
            ours = outcome(lambda q, k, v, scale: tritune.attention(q, k, v, score=score, scale=scale), *args)
        samples = [draw()[1:] for _ in range(TORCH_SAMPLES)]  # one number's rounding is a lottery
        for i, name in enumerate(("output", "grad scale", "grad query")):
            others = [Errors.of(theirs[i], truth[i].cpu()) for truth, theirs in samples]
            assert_close(name, ours[i], exact[i], torchs[i], others)

    def test_a_length_beside_a_power_of_two_with_hidden_keys(self, device, tier):
        """Rows with lse below -90 and a sequence that ends half-way in a block of 128: torch's fused kernel on GPUs
        gives NaN gradients there."""
        q, k, v = tensors((1, 1, 192, 16), (1, 1, 192, 16), (1, 1, 192, 16), device=device)
        bias = torch.full((192, 192), -200.0, device=device)
        mask = torch.rand(192, 192, device=device) > 0.5
        with tritune.use_backend(backend_of(tier)), few_dots():
            out, lse = tritune.attention(q, k, v, bias=bias, attn_mask=mask, return_lse=True)
            grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert lse.max() < -90 and all(grad.isfinite().all() and grad.any() for grad in grads)

    def test_fp32_bias_for_narrow_heads(self, device, tier):
        q, k, v = tensors((1, 2, 6, 8), (1, 2, 7, 8), (1, 2, 7, 8), device=device, dtype=torch.bfloat16)
        bias = torch.randn(1, 1, 6, 7, device=device, requires_grad=True)
        with tritune.use_backend(backend_of(tier)):
            out = tritune.attention(q, k, v, bias=bias)
            grad = torch.autograd.grad(out.float().sum(), bias)[0]
        assert out.dtype == torch.bfloat16 and grad.dtype == torch.float32 and grad.shape == bias.shape
        assert_as_exact(out, F.scaled_dot_product_attention, q, k, v, bias)

    def test_every_head_size(self, device, tier):
        for d in (1, 2, 7, 16, 17, 31, 48, 80, 96, 127, 160, 255):
            q, k, v = (torch.randn(1, 1, 5, d, device=device) for _ in range(3))
            with tritune.use_backend(backend_of(tier)):
                assert_as_exact(tritune.attention(q, k, v), F.scaled_dot_product_attention, q, k, v)

    def test_autocast(self, device, tier):
        q, k, v = tensors((1, 2, 6, 8), (1, 2, 7, 8), (1, 2, 7, 8), device=device)
        with torch.autocast(device, torch.bfloat16), tritune.use_backend(backend_of(tier)):
            out = tritune.attention(q, k, v, bias=torch.zeros(6, 7, device=device))
            assert out.dtype == tritune.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
            assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        out.float().sum().backward()
        assert q.grad.dtype == torch.float32


class TestKernels:
    pytestmark = kernels_only

    @pytest.mark.parametrize("score, bias", [("dot", None), ("cosine", None), ("dot", (1, 2, 1, 1))])
    def test_memory_grows_with_the_length_not_with_its_square(self, score, bias, device):
        def bytes_of(length: int) -> int:
            q, k, v = tensors(*(3 * [(1, 2, length, 16)]), device=device)
            extra = None if bias is None else torch.zeros(bias, device=device, requires_grad=True)
            with tritune.use_backend("triton"), few_dots(), Allocations() as allocated:
                out = tritune.attention(q, k, v, score=score, is_causal=True, bias=extra)
                out.backward(torch.ones_like(out))
            return allocated.bytes

        short, long = bytes_of(64), bytes_of(128)
        assert short > 0 and long <= 2.1 * short, (short, long)

    @pytest.mark.parametrize("m, n", [(16, 32), (32, 16), (64, 64)])
    def test_tiles(self, m, n, device):
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import attention as kernels

        config = Config(BLOCK_M=m, BLOCK_N=n, num_warps=4, num_stages=1)
        tunables = (kernels.FORWARD, kernels.KEY_VALUE_GRAD, kernels.QUERY_GRAD, kernels.BIAS_GRAD)
        one = case("tiles", 1, 2, 70, 37, 16, bias=(1, 2, 70, 37), is_causal=True, causal_alignment="bottom_right",
                   mask=(70, 37))  # fmt: skip
        one.kwargs["attn_mask"][:, 0] = True
        options = {"is_causal": True, "causal_alignment": "bottom_right", "return_lse": True}
        args = [t.requires_grad_() for t in one.inputs(torch.float32, "nchw", device).values()]
        mask = one.kwargs["attn_mask"].to(device)

        def outcome(attention: Callable[..., Any], mask: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
            out, lse = attention(*args[:3], bias=args[3], attn_mask=mask, **options)
            results = torch.cat([out, lse.unsqueeze(-1)], -1)
            return with_gradients(lambda *_: results, *args)

        with contextlib.ExitStack() as stack:
            for tunable in tunables:
                stack.enter_context(override(tunable, config))
            with tritune.use_backend("triton"), poisoned():
                results = outcome(tritune.attention, mask, *args)
        assert_as_exact(results, partial(outcome, tritune.attention), mask, *args)

    @pytest.mark.parametrize("shift", [1, 14])
    def test_the_diagonal_beside_the_edge_of_a_tile(self, shift, device):
        """One key more or less moves the end of the visible keys, or of those that all rows see, by a tile."""
        from tritune.autotune.config import Config
        from tritune.autotune.resolve import override
        from tritune.kernels import attention as kernels

        config = Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
        one = case("edge", 1, 1, 40, 40 + shift, 16, is_causal=True, causal_alignment="bottom_right", return_lse=True)
        with contextlib.ExitStack() as stack:
            for tunable in (kernels.FORWARD, kernels.KEY_VALUE_GRAD, kernels.QUERY_GRAD):
                stack.enter_context(override(tunable, config))
            check(one, torch.float32, "nchw", device, "triton")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
    def test_compiling_knows_the_widest_head(self, device):
        from tritune.kernels.attention_space import MAX_HEAD

        wide = torch.randn(1, 1, 3, MAX_HEAD + 1, device=device)
        compiled = torch.compile(lambda x: tritune.attention(x, x, x), fullgraph=True, backend="eager")
        with tritune.use_backend("triton"), pytest.raises(Exception, match=f"head dimension of {MAX_HEAD + 1}"):
            compiled(wide)

    def test_what_is_left_to_torch_is_named(self, device):
        q, k, v = (torch.randn(1, 2, 5, 8, device=device) for _ in range(3))
        wide = torch.randn(1, 2, 5, 257, device=device)
        with tritune.use_backend("triton"):
            with pytest.raises(tritune.UnsupportedError, match=r"dropout_p=0\.1"):
                tritune.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
            with pytest.raises(tritune.UnsupportedError, match="head dimension of 257"):
                tritune.attention(wide, wide, v)
            with pytest.raises(tritune.UnsupportedError, match="float64"):
                tritune.attention(q.double(), k.double(), v.double())
        assert tritune.attention(wide, wide, v).shape == (1, 2, 5, 8)

    def test_only_lse_is_kept_of_a_row(self, device):
        q, k, v = tensors(*3 * [(1, 2, 32, 16)], device=device, dtype=torch.float16)
        with tritune.use_backend("triton"):
            out = tritune.attention(q, k, v)
        extra = [tuple(t.shape) for t in out.grad_fn.saved_tensors if t is not None]
        assert sorted(extra) == sorted([*(tuple(t.shape) for t in (q, k, v, q)), (1, 1, 2, 32)])

    @pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
    def test_precisions(self, precision, device, monkeypatch):
        asked = recorded_precisions(monkeypatch)
        q, k, v = (torch.randn(1, 2, 17, 32, device=device) for _ in range(3))
        with tritune.use_backend("triton"):
            out = tritune.attention(q, k, v, precision=precision)
        assert asked == {precision}
        if device == "cpu" or precision == "ieee":  # the interpreter always multiplies in full precision
            assert_as_exact(out, F.scaled_dot_product_attention, q, k, v)
        else:  # a number, since torch's fused kernels have no tf32
            torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=2e-3, atol=2e-3)


class TestPool:
    pytestmark = every_backend

    def test_the_formula(self, device, tier):
        query, x = tensors((3, 2, 8), (4, 3, 10, 8), device=device)
        mask = torch.ones(4, 10, dtype=torch.bool, device=device)
        mask[1, 6:] = False
        mask[2] = False
        seen = [0, 1, 3]

        def formula(query: Tensor, x: Tensor, mask: Tensor) -> Tensor:
            s = 7.0 * F.normalize(query, dim=-1) @ F.normalize(x, dim=-1).transpose(-1, -2)
            return torch.softmax(s.masked_fill(~mask[:, None, None], -inf), -1) @ x

        dy = torch.randn(4, 3, 2, 8, device=device)

        def of_seen(query: Tensor, x: Tensor, mask: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            y = formula(query, x, mask)[seen]
            dquery, dx = torch.autograd.grad(y, (query, x), dy[seen])
            return y, dquery, dx[seen]

        with tritune.use_backend(backend_of(tier)):
            y = tritune.attention_pool(query, x, x, score="cosine", scale=7.0, attn_mask=mask)
            dquery, dx = torch.autograd.grad(y, (query, x), dy)
        assert y.shape == dy.shape and not y[2].any() and not dx[2].any()
        assert_as_exact((y[seen], dquery, dx[seen]), of_seen, query, x, mask, dy)

    def test_without_heads(self, device, tier):
        query, x = tensors((2, 8), (4, 10, 8), device=device)
        with tritune.use_backend(backend_of(tier)):
            y = tritune.attention_pool(query, x, x)
        assert_as_exact(y, lambda q, x: F.scaled_dot_product_attention(q.expand(4, -1, -1), x, x), query, x)


class TestModules:
    pytestmark = every_backend

    @pytest.mark.parametrize("options", [{}, {"score": "cosine", "scale": "learnable"}, {"scale": 0.3}], ids=str)
    def test_attention(self, options, device, tier):
        layer = tritune.nn.Attention(**options).to(device)
        q, k, v = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), device=device)
        with tritune.use_backend(backend_of(tier)):
            out = layer(q, k, v)
            out.sum().backward()
            scale = layer.scale.detach() if isinstance(layer.scale, Tensor) else layer.scale
            wanted = tritune.attention(q, k, v, score=layer.score, scale=scale)
        torch.testing.assert_close(out, wanted)
        assert [p.grad is not None for p in layer.parameters()] == [True] * ("score" in options)
        assert all(word in repr(layer) for word in ("score=", "scale="))

    def test_a_learned_scale_is_bounded(self, device, tier):
        layer = tritune.nn.Attention(score="cosine", scale="learnable").to(device)
        assert math.isclose(layer.scale.item(), 10, rel_tol=1e-5)
        layer.logit_scale.data.fill_(50.0)
        assert math.isclose(layer.scale.item(), 100, rel_tol=1e-5)

    @pytest.mark.parametrize("heads, queries, score", [(1, 1, "dot"), (4, 3, "cosine"), (2, 1, "cosine")])
    def test_attention_pool(self, heads, queries, score, device, tier):
        layer = tritune.nn.AttentionPool(16, heads, queries, score=score, scale="learnable").to(device)
        x = torch.randn(3, 9, 16, device=device, requires_grad=True)
        mask = torch.rand(3, 9, device=device) > 0.3
        mask[:, 0] = True
        with tritune.use_backend(backend_of(tier)):
            y = layer(x, mask)
            alone = layer(x[1], mask[1])
            y.square().sum().backward()

        def formula(layer: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            k, v = (p(x).view(3, 9, heads, 16 // heads).transpose(1, 2) for p in (layer.key, layer.value))
            q, k = (F.normalize(t, dim=-1) if score == "cosine" else t for t in (layer.query, k))
            s = (layer.scale * q @ k.transpose(-1, -2)).masked_fill(~mask[:, None, None], -inf)
            wanted = layer.out((torch.softmax(s, -1) @ v).transpose(1, 2).flatten(2))
            wanted = wanted.squeeze(1) if queries == 1 else wanted
            return wanted, wanted[1]

        assert_as_exact((y, alone), formula, layer, x, mask)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())

    def test_copies_pickles_and_state(self, device, tier):
        layer = tritune.nn.AttentionPool(16, 2, score="cosine", scale="learnable").to(device)
        x = torch.randn(3, 9, 16, device=device)
        other = tritune.nn.AttentionPool(16, 2, score="cosine", scale="learnable").to(device)
        other.load_state_dict(layer.state_dict())
        with tritune.use_backend(backend_of(tier)):
            for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
                torch.testing.assert_close(twin(x), layer(x))

    @pytest.mark.parametrize(
        "build, text",
        [(lambda: tritune.nn.AttentionPool(10, 4), "multiple of num_heads=4"),
         (lambda: tritune.nn.Attention(score="l2"), "score='l2'"),
         (lambda: tritune.nn.Attention(scale="big"), "scale='big'")],
    )  # fmt: skip
    def test_bad_options(self, build, text):
        with pytest.raises(ValueError, match=text):
            build()


def _window(*strides):
    """A query ``[2, 3, rows, 8]`` of these last two strides, over memory of its own for each head."""
    return lambda rows: torch.randn(6, 4000).as_strided((2, 3, rows, 8), (12000, 4000, *strides))


QUERY_LAYOUTS = {
    "contiguous": lambda rows: torch.randn(2, 3, rows, 8),
    "heads inside": lambda rows: torch.randn(2, rows, 3, 8).transpose(1, 2),
    "packed with keys and values": lambda rows: torch.randn(2, rows, 3, 24)[..., :8].transpose(1, 2),
    "features outside": lambda rows: torch.randn(2, 3, 8, rows).mT,
    "features outermost": lambda rows: torch.randn(8, 2, 3, rows).permute(1, 2, 3, 0),
    "one row for all": lambda rows: torch.randn(2, 3, 1, 8).expand(2, 3, rows, 8),
    "one feature for all": lambda rows: torch.randn(2, 3, rows, 1).expand(2, 3, rows, 8),
    "one head for all": lambda rows: torch.randn(2, 1, rows, 8).expand(2, 3, rows, 8),
    "one number for all": lambda rows: torch.randn(1, 1, 1, 1).expand(2, 3, rows, 8),
    "every other feature": lambda rows: torch.randn(2, 3, rows, 16)[..., ::2],
    "rows end to end": _window(8, 1),
    "rows apart": _window(11, 1),
    "rows that interleave": _window(1, 50),
    "rows that interleave, more than features": _window(3, 121),
    "diagonals": _window(2, 2),
    "diagonals of other slopes": _window(2, 3),
}


@pytest.mark.torch
class TestOnTorch:
    """What the torch backend adds to torch's own function."""

    def test_the_drop_in_is_torchs(self):
        q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
        mask = torch.randn(9, 9)
        for args, options in (((), {}), ((mask,), {}), ((mask > 0,), {"scale": 0.3}), ((None, 0.0, True), {})):
            got = tritune.scaled_dot_product_attention(q, k, v, *args, **options)
            assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, *args, **options))
        torch.manual_seed(0)
        dropped = tritune.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        torch.manual_seed(0)
        assert torch.equal(dropped, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))

    def test_first_gradients_are_torchs(self):
        args = tensors(*(3 * [(2, 3, 9, 8)]), device="cpu")
        grads = [torch.autograd.grad(fn(*args, is_causal=True).square().sum(), args)
                 for fn in (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention)]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_backward_twice_with_the_graph_retained(self):
        q, k, v = tensors(*(3 * [(2, 3, 9, 8)]), device="cpu")
        loss = tritune.attention(q, k, v).square().sum()
        first = torch.autograd.grad(loss, q, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, q)[0])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, q)

    def test_a_bias_beside_no_keys(self):
        q, k = torch.randn(1, 1, 3, 8, requires_grad=True), torch.zeros(1, 1, 0, 8, requires_grad=True)
        bias = torch.zeros(1, 1, 3, 1, requires_grad=True)
        tritune.attention(q, k, k, bias=bias).sum().backward()
        assert not q.grad.any() and (bias.grad is None or not bias.grad.any())

    def test_dropout_in_a_transform(self):
        """Not dropped itself."""
        q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
        torch.manual_seed(0)
        out, _ = torch.func.vjp(lambda q: tritune.scaled_dot_product_attention(q, k, v, dropout_p=0.9), q)
        torch.manual_seed(0)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, dropout_p=0.9))

    def test_memory_is_torchs_to_free(self):
        """Activations under checkpointing, and everything after backward, though the loss is kept."""
        kept = []
        for checkpointed in (False, True):
            base = torch.randn(2, 2, 9, 8, requires_grad=True)

            def attend(x: Tensor) -> Tensor:
                q = x * 2
                kept.append(weakref.ref(q.untyped_storage()))
                return tritune.scaled_dot_product_attention(q, x + 1, x + 2).sin()

            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(attend, base, use_reentrant=False)
            else:
                y = attend(base).sum()
                y.backward()
            gc.collect()
            assert kept.pop()() is None, f"checkpointed: {checkpointed}"
            del y

    @pytest.mark.parametrize("learned", [False, True], ids=["", "learned scale"])
    @pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("score", ["dot", "cosine"])
    def test_one_query_a_head_and_many_keys(self, score, grad, learned):
        """Two products take its place where torch's fused kernel is slower."""
        q, k, v = torch.randn(2, 1, 16), torch.randn(64, 2, 512, 16), torch.randn(64, 2, 512, 16)
        k[0, 0, 7] = 0
        if score == "cosine":
            k[1, 0, 7], k[2, 1, 3] = 1e-20, 1e30
        scale = torch.tensor([3.0, 0.5]) if learned else 3.0
        leaves = [t.requires_grad_(grad) for t in (q, k, v)]
        dout = torch.randn(64, 2, 1, 16)

        def derivatives(attend: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
            out = attend(*leaves)
            assert not out.requires_grad or not out.grad_fn.name().startswith("Scaled")
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)] if grad else [out]

        def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if score == "cosine":
                unit = [(t.double() / t.double().norm(dim=-1, keepdim=True).clamp_min(1e-6)) for t in (q, k)]
                q, k = (t.to(v.dtype) for t in unit)
            scores = q * (scale.to(v.dtype).view(2, 1, 1) if learned else scale) @ k.transpose(-1, -2)
            return torch.softmax(scores, -1) @ v

        got = derivatives(lambda *args: tritune.attention_pool(*args, score=score, scale=scale), leaves, dout)
        torchs = derivatives(formula, leaves, dout)
        exact = derivatives(formula, [t.detach().double().requires_grad_(grad) for t in leaves], dout.double())
        for name, ours, one, other in zip(("out", "dq", "dk", "dv"), got, exact, torchs, strict=False):
            assert_close(name, ours, one, other)

    @pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
    @pytest.mark.parametrize("mask", ["", "bool", "float", "causal"])
    def test_second_derivative_of_torchs_node(self, mask, heads):
        """torch's fused kernel for the CPU has none."""
        q, k, v = (torch.randn(2, h, 5, 8, dtype=torch.float64, requires_grad=True) for h in (4, heads, heads))
        attn_mask = torch.randn(5, 5, dtype=torch.float64)
        attn_mask = {"bool": attn_mask > 0, "float": attn_mask}.get(mask)
        if mask == "bool":
            attn_mask[2] = False

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tritune.scaled_dot_product_attention(
                q, k, v, attn_mask, is_causal=mask == "causal", scale=0.4, enable_gqa=heads < 4
            )

        assert attend(q, k, v).grad_fn.name().startswith("ScaledDotProduct")
        assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)
        out = attend(q, k, v)
        torch.autograd.grad(out.sum(), out, create_graph=True)  # asks the node, which does not run
        again = [torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True) for _ in range(2)]
        for one, other in zip(*again, strict=True):
            assert one.requires_grad and torch.equal(one, other)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_hooks_of_torchs_node_see_and_change_its_gradients(self, create_graph):
        x, seen = torch.randn(1, 2, 5, 8, requires_grad=True), []
        out = tritune.attention(x, x.detach(), x.detach())
        out.grad_fn.register_hook(lambda grads, douts: seen.append(grads[0]))
        out.grad_fn.register_hook(lambda grads, douts: tuple(None if g is None else 2 * g for g in grads))
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=create_graph)
        torch.testing.assert_close(grad, 2 * seen[0])

    def test_second_derivative_under_autocast(self):
        x = torch.randn(1, 2, 5, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = tritune.scaled_dot_product_attention(x, 2 * x, x)
        (first,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert out.dtype is torch.bfloat16 and second.isfinite().all() and second.any()

    def test_create_graph_under_checkpointing(self):
        """It hands out what a node has saved once, to torch's own backward."""
        x = torch.randn(1, 2, 5, 8, requires_grad=True)

        def attend(x: Tensor) -> Tensor:
            return tritune.scaled_dot_product_attention(x * 2, x + 1, x).sum()

        (wanted,) = torch.autograd.grad(attend(x), x)
        y = torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=False)
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        torch.testing.assert_close(first, wanted)
        with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
            torch.autograd.grad(first.sum(), x)

    @pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
    @pytest.mark.parametrize(
        "heads, queries, options",
        [(2, 1, {}), (4, 3, {"bias": False}), (1, 2, {"scale": 0.3}), (2, 1, {"scale": "learnable"})],
    )
    def test_pooling_before_projecting(self, heads, queries, options, masked):
        """What a large batch takes, against float64, beside what it takes if somebody looks at the projections."""
        layer = tritune.nn.AttentionPool(32, heads, queries, **options)
        mask = torch.rand(16, 200) > 0.4 if masked else None
        if masked:
            mask[3] = False  # a sequence without any key

        def derivatives(layer: Any, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
            leaves = {"input": x.detach().requires_grad_(), **dict(layer.named_parameters())}
            y = layer(leaves["input"], mask)
            first = torch.autograd.grad(y, list(leaves.values()), dout, create_graph=True)
            again = {name: leaf for name, leaf in leaves.items() if "bias" not in name}  # those have none
            second = torch.autograd.grad(first[0].square().sum(), list(again.values()), allow_unused=True)
            every = zip(["y", *leaves, *(f"second {name}" for name in again)], [y, *first, *second], strict=True)
            return {name: t.detach() for name, t in every if t is not None}

        called = []
        looked_at, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
        for one in (looked_at, exact):
            one.key.register_forward_hook(lambda *_: called.append(1))

        def torchs_and_exact() -> tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]:
            x, dout = torch.randn(16, 200, 32), torch.randn(16, *[queries] * (queries > 1), 32)
            return x, dout, derivatives(looked_at, x, dout), derivatives(exact, x.double(), dout.double())

        x, dout, torchs, wanted = torchs_and_exact()
        assert len(called) == 2
        got = derivatives(layer, x, dout)
        assert len(called) == 2
        assert got.keys() == torchs.keys() == wanted.keys()
        others = [torchs_and_exact()[2:] for _ in range(4)]
        for name, ours in got.items():
            if name == "key.bias":  # it adds the same to all scores of a query: its gradient vanishes
                assert ours.abs().max() < 1e-4 * got["query"].abs().max()
            else:
                errors = (Errors.of(other[name], exactly[name]) for other, exactly in others)
                assert_close(name, ours, wanted[name], torchs[name], errors)
        if masked:
            torch.testing.assert_close(got["y"][3], torchs["y"][3])

    @pytest.mark.parametrize(
        "change",
        [
            lambda pool: pool.value.register_forward_pre_hook(lambda *_: None),
            lambda pool: pool.key.register_full_backward_hook(lambda *_: None),
            lambda pool: setattr(pool.key, "forward", pool.key.forward),
            lambda pool: setattr(pool, "value", torch.nn.Sequential(pool.value)),
            lambda pool: torch.nn.utils.parametrizations.weight_norm(pool.key),
            lambda pool: pool.key.compile(backend="eager"),
        ],
        ids=["pre-hook", "backward hook", "forward", "another module", "parametrized", "compiled"],
    )
    def test_projections_that_somebody_changed_are_called(self, change, monkeypatch):
        pool, x = tritune.nn.AttentionPool(64, 2), torch.randn(8, 64, 64)
        monkeypatch.setattr("tritune.nn.attention.pool_and_project", lambda *_: pytest.fail("not called"))
        with pytest.raises(pytest.fail.Exception):
            pool(x)
        change(pool)
        pool(x)

    @pytest.mark.parametrize(
        "change",
        [
            lambda pool: setattr(pool, "precision", "x"),
            lambda pool: setattr(pool, "eps", -1.0),
            lambda pool: setattr(pool, "fixed_scale", True),
            lambda pool: setattr(pool, "fixed_scale", torch.tensor([1.0, 2.0])),
            lambda pool: setattr(pool, "query", torch.nn.Parameter(torch.randn(1, 1, 32))),
            lambda pool: setattr(pool.value, "bias", torch.nn.Parameter(torch.randn(1))),
        ],
        ids=["precision", "eps", "bool", "scales", "query", "bias"],
    )
    def test_what_somebody_changed_is_the_same_for_large_batches(self, change, monkeypatch):
        pool, x = tritune.nn.AttentionPool(64, 2), torch.randn(8, 64, 64)
        change(pool)
        results = []
        for _ in range(2):
            try:
                results.append(pool(x))
            except (TypeError, ValueError) as error:
                results.append(error.args[0])
            monkeypatch.setattr(pool, "_projects_last", lambda *_: False)
        if torch.is_tensor(results[1]):
            torch.testing.assert_close(*results)
        else:
            assert results[0] == results[1]

    @pytest.mark.parametrize("name", ["Attention", "AttentionPool"])
    def test_modules_check_their_options(self, name):
        sizes = (64, 2) if name == "AttentionPool" else ()
        with pytest.raises(ValueError, match=r"^eps must be positive"):
            getattr(tritune.nn, name)(*sizes, eps=-1.0)
        with pytest.raises(TypeError, match=r"^scale must be a number"):
            getattr(tritune.nn, name)(*sizes, scale=True)

    def test_lse_under_autocast_is_float32(self):
        q, k = torch.randn(1, 1, 40, 64) * 4, torch.randn(1, 1, 40, 64) * 4
        with torch.autocast("cpu", torch.bfloat16):
            _, lse = tritune.attention(q, k, k, return_lse=True)
            cosine = tritune.attention(q, k, k, score="cosine")
        _, wanted = tritune.attention(q.bfloat16(), k.bfloat16(), k.bfloat16(), return_lse=True)
        assert lse.dtype == torch.float32 and cosine.dtype == torch.bfloat16
        torch.testing.assert_close(lse, wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("rows", [1, 2, 5, 40])
    @pytest.mark.parametrize("layout", QUERY_LAYOUTS)
    def test_a_query_of_any_layout_is_torchs(self, layout, rows, dtype):
        """But for rows that begin in one another, which torch's kernel cannot read."""
        k, v = (torch.randn(2, 3, 7, 8, dtype=dtype) for _ in range(2))
        query = QUERY_LAYOUTS[layout](rows).to(dtype)
        results = []
        for function in (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention):
            leaves = [t.detach().requires_grad_() for t in (query, k, v)]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
            results[-1] += (out.grad_fn.name(), [t.stride() for t in results[-1]])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    @pytest.mark.parametrize("function", [tritune.attention, tritune.scaled_dot_product_attention])
    @pytest.mark.parametrize("rows", [1, 2, 17, 80])
    @pytest.mark.parametrize("step", [1, 2, 63])
    def test_a_query_whose_rows_overlap(self, step, rows, function):
        q = torch.randn(2, 1, (rows - 1) * step + 64).unfold(-1, 64, step)
        k, v = torch.randn(2, 1, 20, 64), torch.randn(2, 1, 20, 64)
        dense = torch.stack([q[..., i, :] for i in range(rows)], -2)
        torch.testing.assert_close(function(q, k, v), function(dense, k, v))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
    def test_nested_tensors_are_torchs(self, layout):
        parts = [torch.randn(3, 2, 8), torch.randn(5, 2, 8)]
        q = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
        q = q.contiguous() if layout is torch.strided else q  # torch asks for it
        got, wanted = (fn(q, q, q) for fn in (tritune.scaled_dot_product_attention, F.scaled_dot_product_attention))
        for one, other in zip(got.unbind(), wanted.unbind(), strict=True):
            assert torch.equal(one, other)

    def test_second_derivative_of_a_row_of_zeros(self):
        """Padding makes such rows."""
        q, k, v = (torch.randn(1, 1, 5, 8) for _ in range(3))
        q[0, 0, 1] = k[0, 0, 2] = 0
        q.requires_grad_()
        k.requires_grad_()
        loss = tritune.attention(q, k, v, score="cosine", scale=3.0).sin().sum()
        first = torch.autograd.grad(loss, (q, k), create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), (q, k))
        assert all(g.isfinite().all() for g in second)

    def test_float64(self):
        q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
        out, lse = tritune.attention(q, k, v, return_lse=True)
        assert out.dtype == lse.dtype == torch.float64
        exact = reference(q, k, v)
        assert_close("out", out, exact, exact)


@pytest.mark.static
def test_changing_sizes_compile_once():
    from tritune.autotune.config import Config
    from tritune.kernels import attention as kernels

    config = Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
    binaries: dict[str, set[str]] = {}
    for tunable in (kernels.FORWARD, kernels.KEY_VALUE_GRAD, kernels.QUERY_GRAD):
        for b, h, m, n in ((1, 1, 1, 1), (1, 16, 16, 16), (3, 5, 100, 333), (2, 2, 4096, 70_001), (64, 1, 1, 48)):
            problem = kernels.AttentionProblem(b, h, m, n, 64, 64, 1, torch.bfloat16, "16", 0, saves=True)
            for launch in tunable.launches(problem, config):
                source = launch.source()
                key = (source.signature, source.constants, source.attrs)
                binaries.setdefault(tunable.name, set()).add(repr([sorted(part.items()) for part in key]))
    assert {name: len(found) for name, found in binaries.items()} == dict.fromkeys(binaries, 1)


def unit(t: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(t, 2, -1, True, dtype=torch.float64).clamp_min(1e-6).to(torch.float32)
    return t / lengths if t.dtype is torch.float32 else (t / lengths).to(t.dtype)


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, score: str = "dot", scale: Any = None, attn_mask: Tensor | None = None,
    bias: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The same call as somebody writes it who has torch alone; rows of cosine scores as long as 1e30 are right."""
    if score == "cosine":
        query, key = unit(query), unit(key)
        scale = 1.0 if scale is None else scale
    if isinstance(scale, Tensor):
        query, scale = query * (scale if scale.dim() == 0 else scale.to(query.dtype).view(-1, 1, 1)), 1.0
    mask = attn_mask if bias is None else bias
    mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 3 else mask  # torch fuses with 2 and 4 dimensions
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


SERVED: dict[str, tuple[dict[str, Any], int]] = {  # options, heads of key and value
    "dot": ({}, 4),
    "scale": ({"scale": 0.3}, 4),
    "causal": ({"is_causal": True}, 4),
    "mask": ({"attn_mask": torch.arange(42).view(6, 7) % 3 < 2}, 4),
    "mask of heads": ({"attn_mask": torch.arange(168).view(4, 6, 7) % 5 < 4}, 4),
    "bias": ({"bias": torch.linspace(-1, 1, 42).view(6, 7)}, 4),
    "groups": ({"enable_gqa": True}, 2),
    "learned scale": ({"scale": torch.tensor(0.7)}, 4),
    "learned scales": ({"scale": torch.tensor([0.5, 1.0, 1.5, 2.0])}, 4),
    "cosine": ({"score": "cosine"}, 4),
    "cosine, scale": ({"score": "cosine", "scale": 5.0, "is_causal": True}, 4),
    "cosine, learned scale": ({"score": "cosine", "scale": torch.tensor(0.7)}, 4),
}


@pytest.fixture(params=SERVED)
def served(request) -> Any:
    """Options of a call that torch serves, and its operands, where heads and sequence lie as a projection makes them"""
    options, heads = SERVED[request.param]
    q, k, v = (torch.randn(2, s, h, 8).transpose(1, 2) for s, h in ((6, 4), (7, heads), (7, heads)))
    return options, [q, k, v]


class Call(torch.nn.Module):
    def __init__(self, fn: Callable[..., Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.fn, self.options = fn, options

    def forward(self, *tensors: Tensor) -> Tensor:
        out = self.fn(*tensors, **self.options)
        return out.transpose(1, 2).view(*out.shape[::2], -1) if out.dim() == 4 else out


def aten(fn: Callable[..., Tensor], options: dict[str, Any], args: list[Tensor]) -> list[str]:
    """What a strictly exported program runs, in order."""
    nodes = torch.export.export(Call(fn, options), tuple(args), strict=True).graph.nodes
    return [str(node.target) for node in nodes if node.op == "call_function"]


@pytest.mark.torch
class TestWhereTorchServes:
    """One call of torch's, in eager, in graphs and in traces."""

    def test_it_is_torchs_result(self, served):
        options, args = served
        ours, wanted = tritune.attention(*args, **options), by_hand(*args, **options)
        if "score" in options:
            torch.testing.assert_close(ours, wanted)
        else:
            assert torch.equal(ours, wanted)
        assert ours.stride() == wanted.stride()

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_exported_graphs_are_those_of_torchs_functions(self, dtype, served):
        options, args = served
        args = [t.to(dtype) for t in args]
        assert aten(tritune.attention, options, args) == aten(by_hand, options, args)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
    def test_compiled_strides_are_eagers(self, served):
        options, args = served
        torch.compiler.reset()
        eager = tritune.attention(*args, **options)
        compiled = torch.compile(
            lambda *args: tritune.attention(*args, **options), fullgraph=True, backend="aot_eager"
        )  # fmt: skip
        out = compiled(*args)
        torch.testing.assert_close(out, eager)
        assert out.stride() == eager.stride()

    def test_torch_functions_are_dispatched_first(self):
        seen = []

        class Foreign:
            @classmethod
            def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(function)
                return "foreign"

        x, foreign = torch.randn(2, 3, 5, 8), Foreign()
        for name in ("query", "key", "value", "attn_mask", "bias", "scale"):
            assert tritune.attention(**({"query": x, "key": x, "value": x} | {name: foreign})) == "foreign"
        for name in ("query", "key", "value", "attn_mask", "scale"):
            assert tritune.attention_pool(**({"query": x, "key": x, "value": x} | {name: foreign})) == "foreign"
        assert seen == [tritune.attention] * 6 + [tritune.attention_pool] * 5

    @pytest.mark.parametrize("fn", [tritune.attention, tritune.attention_pool])
    def test_symbolic_traces(self, fn):
        x = torch.randn(2, 5, 8)
        graph = torch.fx.symbolic_trace(lambda x: fn(x, x, x, score="cosine"))
        assert torch.equal(graph(x), fn(x, x, x, score="cosine"))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("options", [{}, {"score": "cosine", "scale": "learnable"}], ids=str)
    @pytest.mark.parametrize("grad", [True, False])
    def test_jit_traces(self, options, grad):
        """torch.jit.trace compares a second trace, made without gradients, with the first."""
        pool, x = tritune.nn.AttentionPool(8, 2, **options), torch.randn(2, 5, 8)
        groups, q, k = tritune.nn.Attention(enable_gqa=True), torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(torch.jit.trace(pool, (x,))(x + 1), pool(x + 1))
            q.requires_grad_(grad)
            torch.testing.assert_close(torch.jit.trace(groups, (q, k, k))(q, k, k), groups(q, k, k))

    @pytest.mark.parametrize("rows", [5, 2000], ids=["few", "many"])
    @pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e18, 1e30])
    def test_rows_of_any_length(self, size, rows):
        """Few and many rows are normalised in different ways, and so are those beside a row that is short or long."""
        shapes = ((1, 1, rows, 32), (1, 1, 9, 32), (1, 1, 9, 4))
        q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
        q[0, 0, 3] = torch.linspace(-1, 1, 32) * size
        args = [t.float().requires_grad_() for t in (q, k, v)]
        exact = [t.detach().double().requires_grad_() for t in args]
        dout = torch.randn(1, 1, rows, 4)

        def derivatives(fn: Any, leaves: list[Tensor], dout: Tensor, **options: Any) -> list[Tensor]:
            out = fn(*leaves, score="cosine", scale=3.0, **options)
            first = torch.autograd.grad(out, leaves[:2], dout, create_graph=True)
            second = torch.autograd.grad(first[1].square().sum(), leaves[1])
            return [out.detach(), *(t.detach() for t in first), *second]

        # Numbers, since torch has no cosine scores, and its norms overflow or underflow in fp32 at these lengths.
        for name, got, wanted in zip(
            ("out", "dq", "dk", "ddk"),
            derivatives(tritune.attention, args, dout),
            derivatives(tritune.attention, exact, dout.double(), return_lse=False),
            strict=True,
        ):
            kept = torch.ones(got.shape[-2], dtype=torch.bool)
            if name == "dq":
                torch.testing.assert_close(got[0, 0, 3].double(), wanted[0, 0, 3], rtol=1e-3, atol=1e-35)
                kept[3] = False
            error = (got.double() - wanted)[:, :, kept].abs().max() / wanted[:, :, kept].abs().max()
            assert error < 2e-6 * (50 if name == "ddk" else 1), f"{name}: {error:.1e}"
