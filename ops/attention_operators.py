"""The registered operators of attention: implementations, fakes and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dispatch import runs_kernels
from ._layout import or_empty
from ._register import below_autograd, register
from .attention_torch import composite, formula, formula_grads, lengths_without_gradient, row_lengths, unit_grad


def attention_problem(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, shift: int | None, bounded: bool,
    precision: str, saves: bool,
) -> Any:  # fmt: skip
    from ..kernels.attention import AttentionProblem

    b, h, m, d = q.shape
    dims = "" if bias is None else "".join(dim for dim, size in zip("bhmn", bias.shape, strict=True) if size != 1)
    return AttentionProblem(
        b, h, m, k.shape[2], d, v.shape[3], max(1, h // max(1, k.shape[1])), q.dtype,
        precision if q.dtype is torch.float32 else "16", shift, mask is not None, None if bias is None else bias.dtype,
        dims, bounded, saves,
    )  # fmt: skip


def _empty_rows(like: Tensor, size: int) -> Tensor:
    """[B, H, S, size] with heads and sequence in the order in which ``like`` has them in memory, as torch's fused
    attention lays out its result."""
    b, h, s, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(b, s, h, size).transpose(1, 2)
    return like.new_empty(b, h, s, size)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


# --- attention -------------------------------------------------------------------------------------------------------


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None, scale: float,
    shift: int | None, bounded: bool, wants_lse: bool, saves: bool, precision: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, stats = _empty_results(query, value, bias, wants_lse, saves, precision)
    if runs_kernels(backend, query):
        from ..kernels.attention import Scores, run_forward

        problem = attention_problem(query, key, value, attn_mask, bias, shift, bounded, precision, saves)
        scores = Scores(attn_mask, bias, scale)
        run_forward(
            problem, query, key, value, scores, out, lse if wants_lse else None, stats if saves else None
        )  # fmt: skip
        return out, lse, stats
    args = (query, key, value, attn_mask, bias, scale, shift)
    if wants_lse or saves:
        result, full_lse = formula(*args)
        lse = full_lse if wants_lse else lse
    else:
        result = composite(*args, group=query.shape[1] // max(1, key.shape[1]))
    # The backward of the kernels reads the stats. The backward in torch's operators does not, so here they are zeros.
    return out.copy_(result), lse, stats.zero_()


def _stats_shape(query: Tensor, bias: Tensor | None, precision: str) -> tuple[int, ...]:
    """The shape of the stats, which hold lse of each query in one number or in two: see
    ``kernels/attention_forward.py``."""
    is_exact = query.dtype is torch.float32 and precision != "tf32"
    return (2 if is_exact or bias is not None else 1, *query.shape[:3])


def _empty_results(
    query: Tensor, value: Tensor, bias: Tensor | None, wants_lse: bool, saves: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(out, lse, stats)``, uninitialised; without elements where a result is not asked for."""
    rows, dtype = query.shape[:3], _lse_dtype(query)
    return (
        _empty_rows(query, value.shape[3]), query.new_empty(rows if wants_lse else 0, dtype=dtype),
        query.new_empty(_stats_shape(query, bias, precision) if saves else 0, dtype=dtype),
    )  # fmt: skip


def _fake_forward(
    query: Tensor, key: Any, value: Tensor, attn_mask: Any, bias: Any, scale: Any, shift: Any, bounded: Any,
    wants_lse: bool, saves: bool, precision: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_results(query, value, bias, wants_lse, saves, precision)


class _Attention(torch.autograd.Function):
    """``(out, lse, stats)`` of OP. The stats are computed here even if the caller left ``saves`` False, since the
    backward reads them."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            out, lse, stats = OP(*call[:9], True, *call[10:])
        ctx.save_for_backward(*call[:5], out, stats)
        ctx.options = (*call[5:8], call[10], call[11])
        ctx.has_lse = call[8]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, lse, stats

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        dout = torch.zeros_like(tensors[5]) if dout is None else dout
        dlse = dlse if ctx.has_lse else None
        needs = ctx.needs_input_grad[:5]
        dq, dk, dv, dbias = OP_BACKWARD(*tensors, dout, dlse, [*needs[:3], needs[4]], *ctx.options)
        grads = (dq, dk, dv, None, dbias)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias"
OP: Any = register(
    f"attention({_TENSORS}, float scale, SymInt? shift, bool bounded, bool wants_lse, bool saves, str precision, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    implementation=_forward,
    fake=_fake_forward,
    autograd=_Attention.apply,
)


# --- its gradients ---------------------------------------------------------------------------------------------------


def _backward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None, out: Tensor,
    stats: Tensor, dout: Tensor, dlse: Tensor | None, needs: list[bool], scale: float, shift: int | None,
    bounded: bool, precision: str, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    dq, dk, dv, dbias = _empty_grads(query, key, value, bias, needs)
    if runs_kernels(backend, query):
        from ..kernels.attention import Scores, run_backward

        problem = attention_problem(query, key, value, attn_mask, bias, shift, bounded, precision, True)
        scores = Scores(attn_mask, bias, scale)
        run_backward(problem, query, key, value, scores, out, stats, dout, dlse, dq, dk, dv, dbias)
    else:
        wanted = [grad is not None for grad in (dq, dk, dv, dbias)]
        grads = formula_grads(query, key, value, attn_mask, bias, dout, dlse, scale, shift, wanted)
        for grad, result in zip((dq, dk, dv, dbias), grads, strict=True):
            if grad is not None:
                grad.copy_(result)
    return tuple(or_empty(grad, query) for grad in (dq, dk, dv, dbias))


def _differentiable_backward(*call: Any) -> tuple[Tensor, ...]:
    """The gradients where they are differentiated again: the formula in torch's operators, since the kernels have no
    derivative. Other backward passes run the kernels."""
    query, key, value, mask, bias, _, _, dout, dlse, needs, scale, shift, *_ = call
    grads = formula_grads(query, key, value, mask, bias, dout, dlse, scale, shift, needs)
    return tuple(or_empty(grad, query) for grad in grads)


def _empty_grads(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(dq, dk, dv, dbias)``, uninitialised, None where not needed. One kernel computes dk and dv, so if one of them
    is needed, there are both."""
    needs_q, needs_k, needs_v, needs_bias = needs
    pair = needs_k or needs_v
    return (
        _empty_rows(query, query.shape[3]) if needs_q else None,
        _empty_rows(key, key.shape[3]) if pair else None,
        _empty_rows(value, value.shape[3]) if pair else None,
        None if bias is None or not needs_bias else bias.new_empty(bias.shape),
    )


def _fake_backward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, bias: Tensor | None, out: Any, stats: Any, dout: Any,
    dlse: Any, needs: list[bool], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(or_empty(grad, query) for grad in _empty_grads(query, key, value, bias, needs))


OP_BACKWARD: Any = register(
    f"attention_backward({_TENSORS}, Tensor out, Tensor stats, Tensor dout, Tensor? dlse, bool[] needs, float scale, "
    "SymInt? shift, bool bounded, str precision, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_fake_backward,
    autograd=_differentiable_backward,
)


# --- rows of unit length, for cosine scores --------------------------------------------------------------------------


def _normalize(input: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    out, inverse = _empty_units(input)
    if runs_kernels(backend, input):
        from ..kernels.attention import run_normalize

        run_normalize(_rows_problem(input), input, eps, out, inverse)
        return out, inverse
    lengths = lengths_without_gradient(input, eps)
    return out.copy_(input / lengths), inverse.copy_(1 / lengths.squeeze(-1))


def _empty_units(input: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, inverse)``, uninitialised: the rows of unit length, and what they are multiplied by."""
    return _empty_rows(input, input.shape[3]), input.new_empty(input.shape[:3], dtype=_lse_dtype(input))


def _rows_problem(t: Tensor) -> Any:
    from ..kernels.attention import NormalizeProblem

    return NormalizeProblem(t.shape[0] * t.shape[1] * t.shape[2], t.shape[3], t.dtype)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, inverse = OP_NORMALIZE(input, eps, backend)
        ctx.save_for_backward(input, out, inverse)
        ctx.options = (eps, backend)
        ctx.mark_non_differentiable(inverse)
        return out, inverse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return OP_NORMALIZE_BACKWARD(*ctx.saved_tensors, dout, *ctx.options), None, None


OP_NORMALIZE: Any = register(
    "attention_normalize(Tensor input, float eps, str backend) -> (Tensor, Tensor)",
    implementation=_normalize,
    fake=lambda input, eps, backend: _empty_units(input),
    autograd=_Normalize.apply,
)


def _normalize_backward(
    input: Tensor, out: Tensor, inverse: Tensor, dout: Tensor, eps: float, backend: str
) -> Tensor:  # fmt: skip
    dx = _empty_rows(out, out.shape[3])
    if runs_kernels(backend, input):
        from ..kernels.attention import run_normalize_grad

        run_normalize_grad(_rows_problem(out), out, inverse, dout, eps, dx)
        return dx
    return dx.copy_(unit_grad(input, dout, eps, lengths_without_gradient(input, eps)))


def _differentiable_normalize_backward(
    input: Tensor, out: Tensor, inverse: Tensor, dout: Tensor, eps: float, backend: str
) -> Tensor:  # fmt: skip
    return unit_grad(input, dout, eps, row_lengths(input, eps))


OP_NORMALIZE_BACKWARD: Any = register(
    "attention_normalize_backward(Tensor input, Tensor out, Tensor inverse, Tensor dout, float eps, str backend)"
    " -> Tensor",
    implementation=_normalize_backward,
    fake=lambda input, out, inverse, dout, eps, backend: _empty_rows(out, out.shape[3]),
    autograd=_differentiable_normalize_backward,
)
