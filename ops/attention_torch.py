"""Attention in torch's operators: what runs where no kernel does, and what the tests compare the kernels with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _get_dispatch_mode,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.nn import Linear
from torch.nn.functional import scaled_dot_product_attention as _sdpa
from torch.utils.checkpoint import CheckpointError

from ._dispatch import in_transform, is_jit_tracing, is_plain, open_transforms
from ._register import requires_grad
from .attention_checks import ALIGNMENTS, SCORES

# --- what torch's own attention takes as it is -----------------------------------------------------------------------


def torch_computes_the_same(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, recorded: bool,
) -> bool:  # fmt: skip
    """Whether torch's attention, if it accepts the call, computes what ours does; ``docs/differences.md`` lists where
    it does not. Where sizes are ``recorded`` they are not compared, because each comparison would become a guard."""
    if attn_mask is not None and (is_causal or attn_mask.dim() < 2):
        return False
    if scale is not None and is_causal and not scale > 0:
        return False
    if dropout_p != 0.0 and not 0.0 <= dropout_p <= 1.0:
        return False
    if enable_gqa and query.dim() < 3:
        return False
    if recorded:
        return True
    return key.shape[-2] == value.shape[-2] and not (enable_gqa and 0 in (key.shape[-3], value.shape[-3]))


def rows_are_disjoint(query: Tensor) -> bool:
    """Whether no two rows of the query share an element in memory. torch's kernel for the CPU computes something else
    where rows of neighbouring elements overlap."""
    if query.is_contiguous() or query.stride(-1) != 1 or query.shape[-2] == 1:
        return True
    return not 0 < query.stride(-2) < query.shape[-1]


def torch_attention_or_none(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, *, recorded: bool,
) -> Tensor | None:  # fmt: skip
    """torch's attention with derivatives of every order; ``None`` where it computes something else, or has no
    derivative for the transform that is open. Where sizes are ``recorded`` they are not compared."""
    if not torch_computes_the_same(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, recorded):
        return None
    if not recorded and not rows_are_disjoint(query):
        return None
    if not in_transform():
        out = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out if dropout_p else twice_differentiable(out, query, key, value, attn_mask, is_causal, scale)
    if not dropout_p and not has_derivatives(query, key, value, attn_mask):
        return None
    out = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out if dropout_p else twice_differentiable_below(out)


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch's function, with arguments that are all positional."""
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def by_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None, score: str,
    scale: Any, is_causal: bool, causal_alignment: str, enable_gqa: bool, eps: float, *, recorded: bool,
) -> Tensor | None:  # fmt: skip
    """:func:`attention` by one call of torch's function. ``None`` where torch computes something else, or accepts what
    our validator rejects."""
    if score not in SCORES or causal_alignment not in ALIGNMENTS or not eps > 0:
        return None
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        return None
    if bias is not None and bias.dtype is not query.dtype and bias.dtype is not torch.float32:
        return None
    learned = None
    if scale is None:
        scale = 1.0 if score == "cosine" else None
    elif isinstance(scale, Tensor):
        if not _is_scale_of(scale, query):
            return None
        learned, scale = scale, 1.0
    elif type(scale) is not float and type(scale) is not int:
        return None
    shape, query_shape, value_shape = key.shape, query.shape, value.shape
    dims = len(shape)
    if not 3 <= dims <= 4 or (not (recorded and is_jit_tracing()) and key.numel() == 0):
        return None
    if value_shape != shape and value_shape[:-1] != shape[:-1]:
        return None
    is_shared = False
    if query_shape != shape and not enable_gqa:
        lead = shape[:-2]
        is_shared = query_shape[:-2] != lead
        if is_shared and query_shape[:-2] != lead[dims - len(query_shape) :] and not _is_expandable(query, lead):
            return None
    mask = attn_mask
    if is_causal:
        shift = shape[-2] - query_shape[-2] if causal_alignment == "bottom_right" else 0
        if mask is not None or bias is not None or not _is_zero(shift):
            visible = _causal_mask(query_shape[-2], shape[-2], shift, query.device)
            mask, is_causal = visible if mask is None else mask & visible, False
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, -inf)
    if mask is not None and mask.dim() > dims:
        return None
    if not torch_computes_the_same(query, key, value, mask, 0.0, is_causal, scale, enable_gqa, recorded):
        return None
    if not recorded and not rows_are_disjoint(query):
        return None

    by_products = (
        query_shape[-2] == 1 and mask is None and not is_causal and not enable_gqa and _products_are_faster(key, value)
    )
    lengths = None
    if score == "cosine":
        query = unit_rows(query, eps)
        if by_products and not (key.requires_grad and torch.is_grad_enabled()):
            lengths = lengths_without_gradient(key, eps)
        else:
            key = unit_rows(key, eps)
    if learned is not None:
        query = query * (learned if learned.dim() == 0 else learned.to(query.dtype).view(-1, 1, 1))
    if is_shared:
        query = query.expand(*shape[:-2], -1, -1)
    if by_products:
        return _attention_by_products(query, key, value, scale, lengths)
    # torch chooses a fused kernel only if all tensors have four dimensions.
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(0)
    if dims == 3:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    out = _sdpa(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    out = twice_differentiable(out, query, key, value, mask, is_causal, scale)
    return out if dims == 4 else out.squeeze(0)


def _products_are_faster(key: Tensor, value: Tensor) -> bool:
    """Whether two products take less time than torch's fused kernel for one query a head, for which that kernel is not
    made. Only for many keys, and if nothing has to be copied before the products or rounded between them."""
    return (
        not torch.compiler.is_compiling() and key.numel() >= _MANY_ELEMENTS and key.is_cpu and value.is_cpu
        and key.dtype in (torch.float32, torch.float64) and key.is_contiguous() and value.is_contiguous()
        and not _is_any_autocast_enabled() and not is_jit_tracing()
    )  # fmt: skip


_MANY_ELEMENTS = 1 << 20  # elements of key from which on two products take less time


def _attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, lengths: Tensor | None
) -> Tensor:
    """Attention without a mask, in operators that have all derivatives. ``lengths`` [..., N, 1] are what the keys are
    to be divided by. The scores are divided instead, which takes less time, since there is one for each key."""
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-1, -2)
    if lengths is not None:
        scores = scores / lengths.transpose(-1, -2)
    return torch.softmax(scores, -1) @ value


def _is_expandable(query: Tensor, lead: Sequence[int]) -> bool:
    """Whether the query's leading dimensions can be expanded to ``lead``."""
    missing = len(lead) + 2 - query.dim()
    pairs = zip(query.shape, lead[missing:], strict=False)  # ends before the query's last two dimensions
    return missing >= 0 and all(have in (1, wanted) for have, wanted in pairs)


def _is_scale_of(scale: Tensor, query: Tensor) -> bool:
    """Whether this tensor is one floating-point number, or one for each head of the query, on its device."""
    if not scale.is_floating_point() or scale.device != query.device:
        return False
    return scale.dim() == 0 or (scale.dim() == 1 and query.dim() > 2 and scale.shape[0] in (1, query.shape[-3]))


# --- any call --------------------------------------------------------------------------------------------------------


def out_and_lse_by_torch(
    call: tuple[Any, ...], group: int, wants_lse: bool, dropout_p: float, saves: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``(out, lse)`` of a call with the arguments of :func:`formula`; lse may be ``None`` unless ``wants_lse``.
    ``group`` is the number of query heads that share a head of key and value; ``saves`` says that a gradient is
    needed."""
    if wants_lse or (in_transform() and not dropout_p):
        return formula(*call)
    out = composite(*call, group=group, dropout_p=dropout_p)
    if saves and not dropout_p and not (torch.compiler.is_compiling() or is_jit_tracing()) and is_plain(call[0]):
        out = _TwiceDifferentiable.apply(out, *call)
    return out, None


def composite(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, shift: int | None, *,
    group: int, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """``out`` by torch's own attention, from the arguments of :func:`formula`."""
    if scale <= 0:
        # torch's kernel for the CPU sets hidden scores to -inf before it scales them. Times 0 that is NaN, and times a
        # negative number it is +inf, of which softmax makes NaN.
        q, scale = q * scale, 1.0
    if not torch.compiler.is_compiling() and not rows_are_disjoint(q):
        q = q.contiguous()
    is_causal = shift is not None and mask is None and bias is None and _is_zero(shift)
    if not is_causal:
        mask = _combined_mask(q, k, mask, shift)
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, -inf)
    return _sdpa(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=group > 1
    )  # fmt: skip


def _is_zero(shift: Any) -> bool:
    return isinstance(shift, int) and shift == 0


def _causal_mask(m: int, n: int, shift: int, device: torch.device) -> Tensor:
    """[M, N], True where query i sees key j: j <= i + shift."""
    return torch.ones(m, n, dtype=torch.bool, device=device).tril(shift)


def _combined_mask(q: Tensor, k: Tensor, mask: Tensor | None, shift: int | None) -> Tensor | None:
    """The mask that hides what ``mask`` or causality hides; None if there is neither."""
    if shift is None:
        return mask
    visible = _causal_mask(q.shape[2], k.shape[2], shift, q.device)
    return visible if mask is None else mask & visible


def pool_and_project(
    query: Tensor, key: Linear, value: Linear, input: Tensor, attn_mask: Tensor | None, scale: float | Tensor | None
) -> Tensor:  # fmt: skip
    """:func:`attention_pool` of ``key(input)`` and ``value(input)`` without computing these.

    A score ``q . (W_k x + b_k)`` is ``(q W_k) . x + q . b_k``, and a mean of values is ``W_v`` times the mean of x,
    plus ``b_v``, because the weights of the mean add up to 1. So the two products over the whole sequence have H * M
    columns, where the products of the two layers would have E.

    Args:
        query: ``[H, M, E / H]``.
        input: ``[B, N, E]``.
        attn_mask: bool ``[B, N]``.

    Returns:
        ``[B, M, E]``, in torch's operators and with all derivatives.
    """
    heads, queries, features = query.shape
    batch, _, width = input.shape
    query = query * (features**-0.5 if scale is None else scale)
    asked = torch.bmm(query, key.weight.view(heads, features, width)).flatten(0, 1)
    scores = asked.expand(batch, -1, -1) @ input.transpose(1, 2)
    if key.bias is not None:
        scores = scores + torch.bmm(query, key.bias.view(heads, features, 1)).flatten(0, 1)
    if attn_mask is not None:
        has_key = attn_mask.any(-1, keepdim=True)
        scores = scores.masked_fill((~attn_mask & has_key).unsqueeze(1), -inf)
    means = (torch.softmax(scores, -1) @ input).unflatten(1, (heads, queries))
    by_head = means.movedim(1, 0).flatten(1, 2)
    weight = value.weight.view(heads, features, width).transpose(1, 2)
    if value.bias is None:
        pooled = torch.bmm(by_head, weight)
    else:
        pooled = torch.baddbmm(value.bias.view(heads, 1, features), by_head, weight)
    pooled = pooled.unflatten(1, (batch, queries)).movedim(0, 2).flatten(2)
    return pooled if attn_mask is None else torch.where(has_key.unsqueeze(-1), pooled, 0.0)


# --- the formula and its gradients -----------------------------------------------------------------------------------


def _without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with autocast turned off. Its operands have been cast already, and what it computes from them in float32
    must not be cast to 16 bits."""

    @wraps(fn)
    def wrapped(first: Tensor, *args: Any) -> Any:
        kind = first.device.type
        if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
            return fn(first, *args)
        with torch.autocast(kind, enabled=False):
            return fn(first, *args)

    return wrapped


@_without_autocast
def formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, shift: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out [B, H, M, DV], lse [B, H, M])`` by the definition, with all scores in memory, in operators that every
    transform knows and that have all derivatives.

    Args:
        q, k, v: ``[B, H, M, D]``, ``[B, H or fewer, N, D]``, ``[B, H or fewer, N, DV]``.
        mask, bias: broadcastable to ``[B, H, M, N]``; a key is hidden where the mask is False.
        scale: the factor of the products.
        shift: with causality query i sees the keys up to i + shift; None without.
    """
    p, lse = _probabilities_and_lse(q, k, mask, bias, scale, shift)
    return (p @ _repeated_heads(v, q).to(p.dtype)).to(q.dtype), lse


def _repeated_heads(t: Tensor, q: Tensor) -> Tensor:
    """Key or value ``t`` with each head repeated for the query heads that share it."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _probabilities_and_lse(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, shift: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(p [B, H, M, N], lse [B, H, M])`` in float32, or in float64 for float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide) * scale) @ _repeated_heads(k, q).to(wide).transpose(-1, -2)
    if bias is not None:
        s = s + bias.to(wide)
    mask = _combined_mask(q, k, mask, shift)
    if mask is not None:
        s = torch.where(mask, s, -inf)
    # A row from which all keys are hidden would make NaN of softmax and of its derivative. Its scores are set to 0, and
    # its probabilities after softmax.
    empty = (s == -inf).all(-1, keepdim=True)
    s = torch.where(empty, 0.0, s)
    if k.shape[2] == 0:
        return s, s.sum(-1) - inf  # both depend on q and k, so that they have a gradient here as well
    p = torch.where(empty, 0.0, torch.softmax(s, -1))
    return p, torch.where(empty.squeeze(-1), -inf, torch.logsumexp(s, -1))


@_without_autocast
def formula_grads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dout: Tensor, dlse: Tensor | None,
    scale: float, shift: int | None, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``(dq, dk, dv, dbias)``: the gradients of :func:`formula` for the gradients ``dout`` and ``dlse`` of its results,
    in operators that have derivatives themselves; None for those that ``needs`` does not ask for."""
    p, _ = _probabilities_and_lse(q, k, mask, bias, scale, shift)
    wide = p.dtype
    dout, keys = dout.to(wide), _repeated_heads(k, q).to(wide)
    dp = dout @ _repeated_heads(v, q).to(wide).transpose(-1, -2)
    inner = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - (inner if dlse is None else inner - dlse.unsqueeze(-1)))
    needs_q, needs_k, needs_v, needs_bias = needs
    # ds is scaled before the product, because the scale is most often below 1: sums with keys near finfo.max then stay
    # finite.
    dq = ((scale * ds) @ keys).to(q.dtype) if needs_q else None
    dk = _summed_over_group((scale * ds).transpose(-1, -2) @ q.to(wide), k) if needs_k else None
    dv = _summed_over_group(p.transpose(-1, -2) @ dout, v) if needs_v else None
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and needs_bias else None
    return dq, dk, dv, dbias


def _summed_over_group(grad: Tensor, t: Tensor) -> Tensor:
    """``grad``, which has the query's heads, summed over those that share a head of ``t``, in the dtype of ``t``."""
    if grad.shape[1] != t.shape[1]:
        grad = grad.unflatten(1, (t.shape[1], -1)).sum(2)
    return grad.to(t.dtype)


# --- second derivatives of torch's own attention, whose fused kernels have none --------------------------------------


def twice_differentiable(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """torch's result ``out`` with the second derivative that torch's fused kernels lack. While compiling, and for fake
    and other tensors that are no plain ones, it is ``out`` itself: compiled graphs have no second derivative."""
    if not out.requires_grad or torch.compiler.is_compiling() or type(out) is not Tensor:
        return out
    node: Any = out.grad_fn
    if not node.name().startswith("ScaledDotProduct"):
        return out  # the composite has all derivatives
    if query.is_cpu:
        node._register_hook_dict(_HOOK_CARRIER)
        return out
    if is_jit_tracing():
        return out  # torch.jit.trace compares with a trace without gradients, which would lack the Function
    doubled: Tensor = _TwiceDifferentiable.apply(
        out, query, key, value, *_formula_arguments(query, attn_mask, scale, is_causal)
    )
    return doubled


def has_derivatives(*tensors: Tensor | None) -> bool:
    """Whether torch's fused attention has every derivative that the open transforms need, and autograd outside of them.
    It has the first derivative, by backward, only. While compiling no second one is needed, since compiled graphs have
    none."""
    if forward_ad._current_level >= 0:
        return False
    kinds = open_transforms()
    if "Jvp" in kinds or kinds.count("Grad") > 1:
        return False
    if torch.compiler.is_compiling():
        return True
    outside = [unwrapped(t) for t in tensors if t is not None]
    return not any(t.requires_grad for t in outside) or ("Grad" not in kinds and outside[0].is_cpu)


def unwrapped(t: Tensor) -> Tensor:
    """The tensor that is wrapped by the transforms, outside of all of them."""
    while is_functorch_wrapped_tensor(t):
        t = get_unwrapped(t)
    return t


def twice_differentiable_below(out: Tensor) -> Tensor:
    """torch's result ``out`` inside of transforms, with the second derivative for autograd outside of them. vmap calls
    the fused kernel once for each sample, so several of its nodes may lie below a node of stack and nodes of views."""
    if torch.compiler.is_compiling():
        return out
    nodes: list[Any] = [unwrapped(out).grad_fn]
    while nodes:
        node = nodes.pop()
        name = "" if node is None else node.name()
        if name.startswith("ScaledDotProduct"):
            node._register_hook_dict(_HOOK_CARRIER)
        elif name.startswith(_VMAP_NODES):
            nodes += [below for below, _ in node.next_functions]
    return out


# The nodes that vmap puts above those of the samples: it stacks their results and reorders the dimensions.
_VMAP_NODES = ("StackBackward", "ViewBackward", "ReshapeAliasBackward", "UnsafeViewBackward", "PermuteBackward")


def mask_and_bias(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``(mask, bias)`` of torch's one argument: a boolean tensor hides keys, any other is added to the scores."""
    return (attn_mask, None) if attn_mask is not None and attn_mask.dtype is torch.bool else (None, attn_mask)


def _formula_arguments(
    query: Tensor, attn_mask: Tensor | None, scale: float | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None, float, int | None]:  # fmt: skip
    """``(mask, bias, scale, shift)`` of :func:`formula` for the arguments of torch's function."""
    mask, bias = mask_and_bias(attn_mask)
    return mask, bias, query.size(-1) ** -0.5 if scale is None else scale, 0 if is_causal else None


def _before_backward(_: Tensor) -> None:
    """A hook of torch's autograd node, called before its backward with the gradient of its output. Where that backward
    is to be differentiated again, the gradients that the node returns are replaced by those of :func:`formula_grads`,
    computed from the tensors that the node has saved."""
    if not torch.is_grad_enabled():
        return

    def exchange(grads: Sequence[Tensor | None], douts: Sequence[Tensor]) -> tuple[Tensor | None, ...] | None:
        handle.remove()
        if not torch.is_grad_enabled():
            return None  # the backward that asked for this hook did not run the node itself
        node: Any = torch._C._current_autograd_node()
        try:
            q, k, v, attn_mask = node._saved_query, node._saved_key, node._saved_value, node._saved_attn_mask
        except CheckpointError:
            return None  # checkpointing gives a saved tensor once; torch then raises for the second derivative
        mask, bias, scale, shift = _formula_arguments(q, attn_mask, node._saved_scale, node._saved_is_causal)
        needs = [grad is not None for grad in grads[:3]]
        dq, dk, dv, _ = formula_grads(q, k, v, mask, bias, douts[0], None, scale, shift, [*needs, False])
        return dq, dk, dv, *grads[3:]

    handle: Any = torch._C._current_autograd_node().register_hook(exchange)
    # A node calls its hooks in the order in which they were registered. This one is moved to the front, so that the
    # hooks of others see the gradients that it returns.
    hooks = handle.hooks_dict_ref()
    for other in [id for id in hooks if id != handle.id]:
        hooks[other] = hooks.pop(other)


# Node.register_hook also makes a handle by which the hook can be removed, and takes ten times as long as to give a node
# the hooks of a tensor. This hook is never removed, so one tensor that carries it serves all nodes.
_HOOK_CARRIER = torch.empty(0)
_HOOK_CARRIER._backward_hooks = {0: _before_backward}


class _TwiceDifferentiable(torch.autograd.Function):
    """The identity of ``out``, the result of torch's attention, whose fused kernels have no second derivative. A first
    backward passes the gradient on to torch's own node. One that is differentiated again passes nothing on to it, and
    computes the gradients of the arguments by :func:`formula_grads`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *call: Any) -> Tensor:
        ctx.save_for_backward(*call[:5])
        ctx.options = call[5:]
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return dout, *(None,) * 7
        q, k, v, mask, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        dq, dk, dv, dbias = formula_grads(q, k, v, mask, bias, dout, None, *ctx.options, [*needs[:3], needs[4]])
        return None, dq, dk, dv, None, dbias, None, None


# --- rows of unit length, for cosine scores --------------------------------------------------------------------------


def unit_rows(t: Tensor, eps: float) -> Tensor:
    """``t / max(|t|, eps)`` of each row, in torch's operators."""
    if torch.compiler.is_compiling() or is_jit_tracing() or in_transform():
        unit = t / row_lengths(t, eps)
        return unit if unit.dtype is t.dtype else unit.to(t.dtype)
    if 0 < t.numel() <= _FEW_ELEMENTS and t.is_cpu and not _are_operators_traced():
        lengths = torch.linalg.vector_norm(t, 2, -1, True)
        if type(lengths) is Tensor and lengths.is_cpu:  # a fake or meta tensor has no values to read
            least, most = torch.aminmax(lengths.detach())
            if least.item() >= eps and eps >= _LEAST_SQUARABLE and most.item() < inf:
                return t / lengths
    if requires_grad((t,)):
        differentiable: Tensor = _UnitRows.apply(t, eps)
        return differentiable
    return (t / lengths_without_gradient(t, eps)).to(t.dtype)


def _are_operators_traced() -> bool:
    """Whether one of torch's own modes traces operators, so that no value can be read from a tensor. Modes of users
    only observe the operators, so they do not count."""
    return _len_torch_dispatch_stack() > 0 and any(map(_get_dispatch_mode, _TRACING_MODES))


_TRACING_MODES = (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FUNCTIONAL)
_FEW_ELEMENTS = (
    1 << 15
)  # so few numbers take less time in torch's operators than an autograd Function takes to be called


def row_lengths(t: Tensor, eps: float) -> Tensor:
    """max(|t|, eps) of each row, [..., 1], in float32, or float64 for float64, with derivatives of every order."""
    wide = torch.promote_types(t.dtype, torch.float32)
    if torch.compiler.is_compiling():  # compiled graphs have derivatives of the first order only
        lengths = _row_norms(t, torch.float64).clamp_min(eps)
        return lengths if wide is torch.float64 else lengths.to(wide)
    # The result for a row shorter than eps is the constant eps. Such rows are replaced by ones before their length is
    # taken, because the length of a row of zeros has no second derivative.
    is_short = _row_norms(t.detach(), torch.float64) < eps
    return torch.where(is_short, eps, _row_norms(torch.where(is_short, 1.0, t), torch.float64)).to(wide)


def lengths_without_gradient(t: Tensor, eps: float) -> Tensor:
    """The values of :func:`row_lengths` without derivatives. On the CPU squares are added in float32, which takes a
    quarter of the time of float64, unless the sum of a row overflows."""
    wide = torch.promote_types(t.dtype, torch.float32)
    if t.is_cpu and eps >= _LEAST_SQUARABLE and not _are_operators_traced():
        lengths = _row_norms(t, wide)
        if type(lengths) is Tensor and lengths.is_cpu and lengths.sum().item() < inf:
            return lengths.clamp_min_(eps)
    return _row_norms(t, torch.float64).clamp_min_(eps).to(wide)


# The least eps whose square is so far above the least float32 that a sum of such squares keeps its digits.
_LEAST_SQUARABLE = 1e-15


def _row_norms(t: Tensor, dtype: torch.dtype) -> Tensor:
    """|t| of each row, [..., 1]; squares are added in ``dtype``. In float64 the squares of float32 numbers neither
    overflow nor become 0."""
    return torch.linalg.vector_norm(t, 2, -1, True, dtype=None if dtype is t.dtype else dtype)


def unit_grad(t: Tensor, dout: Tensor, eps: float, lengths: Tensor) -> Tensor:
    """The gradient of :func:`unit_rows` at ``t``, of which ``lengths`` are the :func:`row_lengths`."""
    unit = t / lengths
    dout = dout.to(unit.dtype)
    along = torch.linalg.vecdot(unit, dout).unsqueeze(-1).masked_fill(lengths == eps, 0.0)
    return (torch.addcmul(dout, along, unit, value=-1) / lengths).to(t.dtype)


class _UnitRows(torch.autograd.Function):
    """:func:`unit_rows` with a gradient of its own. That takes fewer passes than autograd's, and is right for rows
    whose squares overflow and, in the second order, for rows of zeros."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, eps: float) -> Tensor:
        lengths = lengths_without_gradient(t, eps)
        ctx.save_for_backward(t, lengths)
        ctx.eps = eps
        return (t / lengths).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        t, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():
            lengths = row_lengths(t, ctx.eps)
        return unit_grad(t, dout, ctx.eps, lengths), None
