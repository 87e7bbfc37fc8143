"""Attention with dot-product or cosine scores: public functions, operators, autograd, torch implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.nn import Linear
from torch.nn.functional import scaled_dot_product_attention as _sdpa
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils.checkpoint import CheckpointError

from ..autotune.device import DeviceSpec, detect
from ..autotune.resolve import Choice, resolve
from . import attention_checks
from ._checks import PRECISIONS
from ._dispatch import (
    Verdict,
    by_times,
    choose,
    in_transform,
    is_empty,
    is_jit_tracing,
    is_plain,
    matmul_setting,
    rejections,
    resolved_precision,
    runs_kernels,
    torch_serves,
    torch_validates,
)
from ._layout import autocast
from ._register import below_autograd, register
from .attention_checks import ALIGNMENTS, SCORES, AttentionArgs


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""torch's scaled dot-product attention, with its signature.

    .. math:: \mathrm{softmax}(scale \cdot Q K^T + mask)\, V

    A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention`, with derivatives of every order. Dropout is
    left to torch.

    Args:
        query, key, value: ``[..., H, M, D]``, ``[..., H, N, D]``, ``[..., H, N, DV]``; leading dimensions broadcast.
        attn_mask: broadcastable to ``[..., H, M, N]``; bool, True where a query sees a key, or numbers to add.
        dropout_p: probability of dropping a weight.
        is_causal: query i sees keys up to i; not together with ``attn_mask``.
        scale: default ``D ** -0.5``.
        enable_gqa: key and value may have fewer heads, each for as many consecutive heads of the query.

    Returns:
        ``[..., H, M, DV]``. Rows that see no key are 0.

    Raises:
        RuntimeError, TypeError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> q, k, v = torch.randn(2, 8, 100, 64), torch.randn(2, 8, 200, 64), torch.randn(2, 8, 200, 32)
        >>> tritune.scaled_dot_product_attention(q, k, v).shape
        torch.Size([2, 8, 100, 32])
    """
    tensors = (query, key, value, attn_mask)
    if has_torch_function_variadic(*tensors):
        overridden: Tensor = handle_torch_function(
            scaled_dot_product_attention, tensors, *tensors, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )  # fmt: skip
        return overridden
    if torch_validates(query) and not in_transform():
        rejected = rejections()
        try:
            if _is_torchs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) and _has_rows(query):
                out = _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
                return out if dropout_p else _twice_differentiable(out, query, key, value, attn_mask, is_causal, scale)
        except rejected:
            pass  # our validator has the words
    call = (*tensors, dropout_p, is_causal, scale, enable_gqa)
    if any(isinstance(t, Tensor) and t.is_nested for t in tensors[:3]):
        reason = "a nested tensor"
        choose("scaled_dot_product_attention", (query,), lambda _: Verdict(False, reason), lambda _: (), lambda: reason)
        if torch.compiler.is_compiling():
            return _torch_attention(*call)
        with torch._C._EnableTorchFunction():  # a jagged tensor turns its override off, which computes it
            return _torch_attention(*call)
    attention_checks.check_scaled_dot_product_attention(*call)
    if torch_serves(query):  # compiled, fake or meta tensors, or an error that is torch's alone
        q, k, v, given = autocast(*tensors)
        attention_checks.check_operands(q, k, v, (("attn_mask", given),), scale, enable_gqa)
        if _is_torchs(*call) and _has_rows(query) and (dropout_p != 0.0 or not in_transform()):
            out = _torch_attention(*call)
            return out if dropout_p else _twice_differentiable(out, query, key, value, attn_mask, is_causal, scale)
    mask, bias = _mask_and_bias(attn_mask)
    return _attend(
        "scaled_dot_product_attention", query, key, value, mask, bias, scale=scale, is_causal=is_causal,
        enable_gqa=enable_gqa, dropout_p=dropout_p,
    )[0]  # fmt: skip


def _is_torchs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Does torch's attention compute what we do, if it accepts the call? See ``docs/differences.md``."""
    if attn_mask is not None and (is_causal or attn_mask.dim() < 2):
        return False
    if scale is not None and is_causal and not scale > 0:
        return False
    if dropout_p != 0.0 and not 0.0 <= dropout_p <= 1.0:
        return False
    if enable_gqa and query.dim() < 3:
        return False
    if is_jit_tracing():
        return True
    return key.shape[-2] == value.shape[-2] and not (enable_gqa and 0 in (key.shape[-3], value.shape[-3]))


def _has_rows(query: Tensor) -> bool:
    """Rows that overlap are too much for torch's kernel for the CPU."""
    if query.is_contiguous() or torch.compiler.is_compiling() or is_jit_tracing():
        return True
    return not 0 < query.stride(-2) < query.shape[-1]


def _torch_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _twice_differentiable(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """torch's result ``out`` with the second derivative that torch's fused kernels lack; a graph has none, and a tensor
    without data needs none."""
    if not out.requires_grad or torch.compiler.is_compiling() or type(out) is not Tensor:
        return out
    node: Any = out.grad_fn
    if not node.name().startswith("ScaledDotProduct"):
        return out  # the composite has all derivatives
    if query.is_cpu:
        node._register_hook_dict(_HOOKED)
        return out
    if is_jit_tracing():
        return out  # the trace would not be the same without gradients
    doubled: Tensor = _TwiceDifferentiable.apply(out, query, key, value, *_formulas(query, attn_mask, scale, is_causal))
    return doubled


def _mask_and_bias(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """torch's one argument as our two: a boolean one hides keys, another is added to the scores."""
    return (attn_mask, None) if attn_mask is not None and attn_mask.dtype is torch.bool else (None, attn_mask)


def _formulas(
    query: Tensor, attn_mask: Tensor | None, scale: float | None, is_causal: bool
) -> tuple[Tensor | None, Tensor | None, float, int | None]:  # fmt: skip
    """``(mask, bias, scale, shift)`` of :func:`_formula` for a call of torch's."""
    mask, bias = _mask_and_bias(attn_mask)
    return mask, bias, query.size(-1) ** -0.5 if scale is None else scale, 0 if is_causal else None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "dot",
    scale: float | Tensor | None = None,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    enable_gqa: bool = False,
    return_lse: bool = False,
    eps: float = 1e-6,
    precision: str | None = None,
) -> Any:
    r"""Attention with dot-product or cosine scores.

    .. math::
        s_{ij} = scale \cdot q_i \cdot k_j + bias_{ij} \quad\text{or}\quad
        s_{ij} = scale \cdot \frac{q_i}{\max(|q_i|, eps)} \cdot \frac{k_j}{\max(|k_j|, eps)} + bias_{ij}, \qquad
        out_i = \sum_j \frac{\exp s_{ij}}{\sum_l \exp s_{il}} v_j

    The kernels never hold the scores in memory, forward or backward: memory grows with M + N, not with M * N. Mask,
    bias and causality combine: a key is hidden if any of them hides it.

    Args:
        query, key, value: ``[..., H, M, D]``, ``[..., H, N, D]``, ``[..., H, N, DV]`` of one dtype; leading dimensions
            broadcast, strides are free.
        score: ``"dot"``, or ``"cosine"`` for rows divided by their length.
        scale: a number, or a tensor ``[]`` or ``[H]``, which gets a gradient; default: ``D ** -0.5``, and 1 for cosine.
        attn_mask: bool, True where a query sees a key; broadcastable to ``[..., H, M, N]``.
        bias: added to the scores, broadcastable like the mask; float32 or the dtype of ``query``. Its gradient is
            summed in the kernel where it was broadcast.
        is_causal: query i sees keys up to i, or with ``causal_alignment="bottom_right"`` up to i + N - M.
        enable_gqa: key and value may have fewer heads, each for as many consecutive heads of the query.
        return_lse: also return the logarithm of the sum of exponentials; it has a gradient.
        eps: length below which a row of cosine scores counts as that long.
        precision: how fp32 is multiplied, as in :func:`tritune.conv2d`; default: torch's setting for matrix products.

    Returns:
        ``[..., H, M, DV]``; with ``return_lse`` a pair with ``[..., H, M]`` in float32 (float64 for float64). A row
        that sees no key is 0, its lse ``-inf``, its gradients 0.

    Raises:
        RuntimeError, TypeError, ValueError: for arguments that do not fit, before anything runs.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> q, k, v = (torch.randn(2, 8, 100, 64) for _ in range(3))
        >>> out, lse = tritune.attention(q, k, v, score="cosine", scale=10.0, is_causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 100, 64]), torch.Size([2, 8, 100]))
    """
    if has_torch_function_variadic(query, key, value, attn_mask, bias, scale):
        tensors = (query, key, value, attn_mask, bias, scale)
        return handle_torch_function(
            attention, tensors, query, key, value, score=score, scale=scale, attn_mask=attn_mask, bias=bias,
            is_causal=is_causal, causal_alignment=causal_alignment, enable_gqa=enable_gqa, return_lse=return_lse,
            eps=eps, precision=precision,
        )  # fmt: skip
    if (
        torch_validates(query) and not in_transform() and not return_lse
        and (precision is None or precision in PRECISIONS)
    ):  # fmt: skip
        rejected = rejections()
        try:
            out = _by_torch(
                query, key, value, attn_mask, bias, score, scale, is_causal, causal_alignment, enable_gqa, eps
            )
            if out is not None:
                return out
        except rejected:
            pass  # our validator has the words
    attention_checks.check_attention(
        query, key, value, attn_mask, bias, score=score, scale=scale, causal_alignment=causal_alignment, eps=eps,
        precision=precision,
    )  # fmt: skip
    if not return_lse and torch_serves(query) and not in_transform():  # compiled, fake or meta tensors
        q, k, v, added = autocast(query, key, value, bias)
        attention_checks.check_operands(q, k, v, (("attn_mask", attn_mask), ("bias", added)), scale, enable_gqa)
        out = _by_torch(query, key, value, attn_mask, bias, score, scale, is_causal, causal_alignment, enable_gqa, eps)
        if out is not None:
            return out
    out, lse = _attend(
        "attention", query, key, value, attn_mask, bias, score=score, scale=scale, is_causal=is_causal,
        bottom_right=causal_alignment == "bottom_right", enable_gqa=enable_gqa, wants_lse=return_lse, eps=eps,
        precision=precision,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "dot",
    scale: float | Tensor | None = None,
    attn_mask: Tensor | None = None,
    eps: float = 1e-6,
    precision: str | None = None,
) -> Tensor:
    r"""Attention pooling: each of a few queries, the same for the whole batch, gives one weighted mean of the values.

    .. math:: y_m = \sum_j \mathrm{softmax}_j(s(q_m, k_j))\, v_j

    Args:
        query: ``[H, M, D]``, or ``[M, D]`` without heads, or with leading dimensions of its own.
        key, value: ``[B, H, N, D]``, ``[B, H, N, DV]``, or without H.
        attn_mask: bool ``[B, N]``, True at the keys that count, or of more dimensions as in :func:`attention`.
        score, scale, eps, precision: as in :func:`attention`.

    Returns:
        ``[B, H, M, DV]``, or without H. A sequence without any key that counts gives 0.

    Example::

        >>> x = torch.randn(2, 50, 16)  # two sequences of 50
        >>> tritune.attention_pool(torch.randn(1, 16), x, x, score="cosine", scale=5.0).shape
        torch.Size([2, 1, 16])
    """
    if has_torch_function_variadic(query, key, value, attn_mask, scale):
        tensors = (query, key, value, attn_mask, scale)
        overridden: Tensor = handle_torch_function(
            attention_pool, tensors, query, key, value, score=score, scale=scale, attn_mask=attn_mask, eps=eps,
            precision=precision,
        )  # fmt: skip
        return overridden
    if isinstance(attn_mask, Tensor) and isinstance(key, Tensor) and attn_mask.dim() == 2 and key.dim() > 2:
        attn_mask = attn_mask.view(attn_mask.shape[0], *(1,) * (key.dim() - 2), attn_mask.shape[1])
    pooled: Tensor = attention(
        query, key, value, score=score, scale=scale, attn_mask=attn_mask, eps=eps, precision=precision
    )
    return pooled


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None, score: str,
    scale: Any, is_causal: bool, causal_alignment: str, enable_gqa: bool, eps: float,
) -> Tensor | None:  # fmt: skip
    """:func:`attention` by one call of torch's. ``None`` where that computes something else, or accepts what our
    validator rejects."""
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
    if not 3 <= dims <= 4 or is_empty(key):
        return None
    if value_shape != shape and value_shape[:-1] != shape[:-1]:
        return None
    is_shared = False
    if query_shape != shape and not enable_gqa:
        lead = shape[:-2]
        is_shared = query_shape[:-2] != lead
        if is_shared and query_shape[:-2] != lead[dims - len(query_shape) :] and not _expands(query, lead):
            return None
    mask = attn_mask
    if is_causal:
        shift = shape[-2] - query_shape[-2] if causal_alignment == "bottom_right" else 0
        if mask is not None or bias is not None or not _is_zero(shift):
            visible = _visible(query_shape[-2], shape[-2], shift, query.device)
            mask, is_causal = visible if mask is None else mask & visible, False
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, -inf)
    if mask is not None and mask.dim() > dims:
        return None
    if not _is_torchs(query, key, value, mask, 0.0, is_causal, scale, enable_gqa) or not _has_rows(query):
        return None

    by_products = (
        query_shape[-2] == 1 and mask is None and not is_causal and not enable_gqa and _takes_products(key, value)
    )
    lengths = None
    if score == "cosine":
        query = _unit(query, eps)
        if by_products and not (key.requires_grad and torch.is_grad_enabled()):
            lengths = _measured_lengths(key, eps)
        else:
            key = _unit(key, eps)
    if learned is not None:
        query = query * (learned if learned.dim() == 0 else learned.to(query.dtype).view(-1, 1, 1))
    if is_shared:
        query = query.expand(*shape[:-2], -1, -1)
    if by_products:
        return _products(query, key, value, scale, lengths)
    # torch takes a fused kernel only if everything has four dimensions.
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(0)
    if dims == 3:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    out = _sdpa(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    out = _twice_differentiable(out, query, key, value, mask, is_causal, scale)
    return out if dims == 4 else out.squeeze(0)


def _takes_products(key: Tensor, value: Tensor) -> bool:
    """Do two products take less time than torch's fused kernel, which is made for more than one query a head? Only if
    nothing has to be copied for them, or rounded between them."""
    return (
        not torch.compiler.is_compiling() and key.numel() >= _LONG and key.is_cpu and value.is_cpu
        and key.dtype in (torch.float32, torch.float64) and key.is_contiguous() and value.is_contiguous()
        and not _is_any_autocast_enabled() and not is_jit_tracing()
    )  # fmt: skip


_LONG = 1 << 20  # elements of the keys


def _products(query: Tensor, key: Tensor, value: Tensor, scale: float | None, lengths: Tensor | None) -> Tensor:
    """Attention without a mask, in operators that have all derivatives. ``lengths``: what keys are to be divided by;
    to divide the scores of one query takes less time."""
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-1, -2)
    if lengths is not None:
        scores = scores / lengths.transpose(-1, -2)
    return torch.softmax(scores, -1) @ value


def _expands(query: Tensor, lead: Sequence[int]) -> bool:
    """Can the query's leading dimensions be expanded to these?"""
    missing = len(lead) + 2 - query.dim()
    pairs = zip(query.shape, lead[missing:], strict=False)  # the query's last two are no leading ones
    return missing >= 0 and all(have in (1, wanted) for have, wanted in pairs)


def _is_scale_of(scale: Tensor, query: Tensor) -> bool:
    """Is this tensor one number, or one for each head of the query?"""
    if not scale.is_floating_point() or scale.device != query.device:
        return False
    return scale.dim() == 0 or (scale.dim() == 1 and query.dim() > 2 and scale.shape[0] in (1, query.shape[-3]))


def _attend(
    op: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, *, scale: Any,
    is_causal: bool, enable_gqa: bool, score: str = "dot", bottom_right: bool = False, wants_lse: bool = False,
    eps: float = 1e-6, precision: str | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Every call, of any number of dimensions: ``(out, lse)``."""
    query, key, value, bias = autocast(query, key, value, bias)
    masks = (("attn_mask", mask), ("bias" if op == "attention" else "attn_mask", bias))
    args = attention_checks.check_operands(query, key, value, masks, scale, enable_gqa)
    if isinstance(scale, Tensor) and op != "attention":
        scale = float(scale)
    q, k, v = (_four_dims(t, args, t is query) for t in (query, key, value))
    mask, bias = (None if t is None else _four_dims_of_mask(t, args) for t in (mask, bias))
    group = q.shape[1] // k.shape[1] if args.group > 1 else 1
    if scale is None:
        scale = 1.0 if score == "cosine" else max(1, q.shape[3]) ** -0.5
    shift = None if not is_causal else k.shape[2] - q.shape[2] if bottom_right else 0

    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    saves = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (*tensors, scale))
    bounded = score == "cosine" and bias is None and not isinstance(scale, Tensor) and _is_bounded(scale, q.dtype)
    resolved = resolved_precision(q, precision, matmul_setting)

    def problem() -> Any:
        return _problem(q, k, v, mask, bias, shift, bounded, resolved, saves)

    backend = choose(
        op, tensors,
        lambda device: _auto_rule(problem(), device, wants_lse),
        lambda device: _kernel_choices(problem(), device, score == "cosine", bias is not None and bias.requires_grad),
        lambda: _limits(problem, max(q.shape[3], v.shape[3]), mask, dropout_p, q.device),
    )  # fmt: skip
    if score == "cosine":
        q, k = (_normalized(t, eps, backend) for t in (q, k))
    if isinstance(scale, Tensor):
        q, scale = q * scale.to(q.dtype).view(-1, 1, 1), 1.0
    call = (q, k, v, mask, bias, float(scale), shift)
    if backend == "torch":
        out, lse = _on_torch(call, group, wants_lse, dropout_p, saves)
    elif torch.compiler.is_compiling():
        out, lse, _ = OP(*call, bounded, wants_lse, saves, resolved, backend)
    elif saves:
        out, lse, _ = _Attention.apply(*call, bounded, wants_lse, saves, resolved, backend)
    else:
        with below_autograd():
            out, lse, _ = OP(*call, bounded, wants_lse, saves, resolved, backend)
    return _original_dims(out, args), None if lse is None or not wants_lse else _original_dims(lse, args)


def _four_dims(t: Tensor, args: AttentionArgs, is_query: bool) -> Tensor:
    """[B, H, S, D], broadcast; of key and value only as many heads as there are groups."""
    if args.heads is None:
        return t.view(1, 1, *t.shape) if t.dim() == 2 else t
    heads = args.heads if is_query or args.group == 1 else args.heads // args.group
    if len(args.batch) == 1 and t.shape[:-2] == (*args.batch, heads):
        return t
    have = t.shape[-3] if t.dim() > 2 else 1
    if have not in (1, heads):
        t = t.repeat_interleave(heads // have, -3)  # grouped heads of key and value that differ in number
    t = t.expand(*args.batch, heads, *t.shape[-2:])
    return t.unsqueeze(0) if not args.batch else t.flatten(0, len(args.batch) - 1)


def _four_dims_of_mask(t: Tensor, args: AttentionArgs) -> Tensor:
    """[B, H, M, N] with 1 wherever it is broadcast, so that its gradient is summed there."""
    known = len(args.batch) + (args.heads is not None) + 2
    t = t.view(*(1,) * (max(known, 4) - t.dim()), *t.shape)
    if len(args.batch) < 2:
        return t
    if any(size != 1 for size in t.shape[: len(args.batch)]):
        t = t.expand(*args.batch, *t.shape[len(args.batch) :])
    return t.flatten(0, len(args.batch) - 1)


def _original_dims(t: Tensor, args: AttentionArgs) -> Tensor:
    if args.heads is None:
        return t.squeeze(0).squeeze(0)
    if not args.batch:
        return t.squeeze(0)
    return t if len(args.batch) == 1 else t.unflatten(0, args.batch)


def _is_bounded(scale: float, dtype: torch.dtype) -> bool:
    """May exp(s - |scale|) of scores from -|scale| on be kept in this dtype?"""
    return abs(scale) <= (4.5 if dtype is torch.float16 else 40.0)


# --- the choice of backend -------------------------------------------------------------------------------------------


MAX_HEAD = 256  # numbers a head, as kernels/attention.py has it: Dynamo must not trace into the kernels


def _limits(
    problem: Callable[[], Any], head: int, mask: Tensor | None, dropout_p: float, where: torch.device
) -> str | None:  # fmt: skip
    if dropout_p:
        return f"dropout_p={dropout_p:g}"
    if head > MAX_HEAD:
        return f"a head dimension of {head}: no kernel has more than {MAX_HEAD}"
    if torch.compiler.is_compiling():
        return None
    if mask is not None and not is_plain(mask):
        return f"attn_mask is a {type(mask).__name__}"
    from ..kernels.attention import fits, within_reach

    asked, device = problem(), detect(where)
    if not within_reach(asked, mask):
        return "rows of attn_mask, or of all heads together, of 2**22 elements or more"
    if fits(asked, device):
        return None
    return f"a head dimension of {max(asked.D, asked.DV)} in {asked.dtype}: no tile of it fits {device.slug}"


def _problem(
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


def _kernel_choices(
    problem: Any, device: DeviceSpec, normalizes: bool, needs_bias: bool
) -> tuple[tuple[str, Choice], ...]:
    from ..kernels import attention as kernels

    tunables: list[Any] = [kernels.FORWARD]
    if problem.saves:
        tunables += [kernels.DELTA, kernels.KEY_VALUE_GRAD, kernels.QUERY_GRAD]
        tunables += [kernels.BIAS_GRAD] if needs_bias else []
    found = [(tunable.name, resolve(tunable, problem, device)) for tunable in tunables]
    if normalizes:
        rows = kernels.NormalizeProblem(problem.B * problem.H * problem.M, problem.D, problem.dtype)
        both = (kernels.NORMALIZE, kernels.NORMALIZE_GRAD)
        found += [(tunable.name, resolve(tunable, rows, device)) for tunable in both[: 1 + problem.saves]]
    return tuple(found)


def _auto_rule(problem: Any, device: DeviceSpec, wants_lse: bool) -> Verdict:
    """By measurement if there is one: each kernel of backward was timed against torch's whole backward. Else only where
    torch has no fused operator and would write the matrix of scores."""
    choices = dict(_kernel_choices(problem, device, False, False))
    timed = [choice for name, choice in choices.items() if name != "attention_delta"]
    if all(choice.us and choice.torch_us for choice in timed):
        ours_us = sum(choice.us or 0.0 for choice in timed)
        torch_us = (timed[0].torch_us or 0.0) + max((choice.torch_us or 0.0 for choice in timed[1:]), default=0.0)
        return by_times(ours_us, torch_us)
    if wants_lse and problem.M * problem.N >= 4 * (problem.M + problem.N) * (problem.D + problem.DV):
        return Verdict(True, "not measured; torch has no fused attention that returns lse, and would write all scores")
    return Verdict(False, "not measured, and torch has a fused kernel as well: `tritune tune` can")


# --- torch's implementations -----------------------------------------------------------------------------------------


def _visible(m: int, n: int, shift: int, device: torch.device) -> Tensor:
    """[M, N]: key j <= query i + shift."""
    return torch.ones(m, n, dtype=torch.bool, device=device).tril(shift)


def _hidden(q: Tensor, k: Tensor, mask: Tensor | None, shift: int | None) -> Tensor | None:
    """Mask and causality in one mask."""
    if shift is None:
        return mask
    visible = _visible(q.shape[2], k.shape[2], shift, q.device)
    return visible if mask is None else mask & visible


def _on_torch(
    call: tuple[Any, ...], group: int, wants_lse: bool, dropout_p: float, saves: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if wants_lse or (in_transform() and not dropout_p):
        return _formula(*call)
    out = _composite(*call, group=group, dropout_p=dropout_p)
    if saves and not dropout_p and not (torch.compiler.is_compiling() or is_jit_tracing()) and is_plain(call[0]):
        out = _TwiceDifferentiable.apply(out, *call)
    return out, None


def _composite(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, shift: int | None, *,
    group: int, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """torch's own attention."""
    if scale <= 0:
        # torch's kernel for the CPU hides keys before it scales: -inf times 0 or less is NaN.
        q, scale = q * scale, 1.0
    if not torch.compiler.is_compiling() and q.shape[2] > 1 and 0 < q.stride(2) < q.shape[3]:
        q = q.contiguous()  # rows that overlap are too much for torch's kernel for the CPU
    is_causal = shift is not None and mask is None and bias is None and _is_zero(shift)
    if not is_causal:
        mask = _hidden(q, k, mask, shift)
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, -inf)
    return _sdpa(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=group > 1
    )  # fmt: skip


def pool_and_project(
    query: Tensor, key: Linear, value: Linear, input: Tensor, attn_mask: Tensor | None, scale: float | Tensor | None
) -> Tensor:  # fmt: skip
    """:func:`attention_pool` of ``key(input)`` and ``value(input)`` without computing these.

    A score ``q . (W_k x + b_k)`` is ``(q W_k) . x + q . b_k``, and weights whose sum is 1 can be applied before ``W_v``
    and ``b_v``. So two products over the sequence have H * M columns where those of the layers have E.

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


def _is_zero(shift: Any) -> bool:
    return isinstance(shift, int) and shift == 0


def _without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The operands have been cast; what is computed from them in float32 stays there."""

    @wraps(fn)
    def wrapped(first: Tensor, *args: Any) -> Any:
        kind = first.device.type
        if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
            return fn(first, *args)
        with torch.autocast(kind, enabled=False):
            return fn(first, *args)

    return wrapped


@_without_autocast
def _formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, shift: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition with all scores at once, for every transform and derivative."""
    p, lse = _weights(q, k, mask, bias, scale, shift)
    return (p @ _repeated(v, q).to(p.dtype)).to(q.dtype), lse


def _repeated(t: Tensor, q: Tensor) -> Tensor:
    """Key or value with as many heads as the query."""
    return t if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, shift: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(p, lse)`` in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide) * scale) @ _repeated(k, q).to(wide).transpose(-1, -2)
    if bias is not None:
        s = s + bias.to(wide)
    mask = _hidden(q, k, mask, shift)
    if mask is not None:
        s = torch.where(mask, s, -inf)
    # Rows that see nothing are computed as if they saw all, and taken back: no NaN on the way, nor in a derivative.
    empty = (s == -inf).all(-1, keepdim=True)
    s = torch.where(empty, 0.0, s)
    if k.shape[2] == 0:
        return s, s.sum(-1) - inf  # with a gradient, as everywhere
    p = torch.where(empty, 0.0, torch.softmax(s, -1))
    return p, torch.where(empty.squeeze(-1), -inf, torch.logsumexp(s, -1))


@_without_autocast
def _grads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, dout: Tensor, dlse: Tensor | None,
    scale: float, shift: int | None, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of :func:`_formula` as functions of its arguments, in torch's operators."""
    p, _ = _weights(q, k, mask, bias, scale, shift)
    wide = p.dtype
    dout, keys = dout.to(wide), _repeated(k, q).to(wide)
    dp = dout @ _repeated(v, q).to(wide).transpose(-1, -2)
    inner = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp - (inner if dlse is None else inner - dlse.unsqueeze(-1)))
    needs_q, needs_k, needs_v, needs_bias = needs
    # The scale first, which is below 1 most often: sums with keys near finfo.max stay finite.
    dq = ((scale * ds) @ keys).to(q.dtype) if needs_q else None
    dk = _folded((scale * ds).transpose(-1, -2) @ q.to(wide), k) if needs_k else None
    dv = _folded(p.transpose(-1, -2) @ dout, v) if needs_v else None
    dbias = ds.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and needs_bias else None
    return dq, dk, dv, dbias


def _folded(grad: Tensor, t: Tensor) -> Tensor:
    """Sums over the query heads that share a head of ``t``."""
    if grad.shape[1] != t.shape[1]:
        grad = grad.unflatten(1, (t.shape[1], -1)).sum(2)
    return grad.to(t.dtype)


def _before_backward(_: Tensor) -> None:
    """Hook of torch's node, called with its output's gradient. Where the node's backward is to be differentiated again,
    the gradients that it returns are exchanged for the formula's, of the tensors that the node has saved."""
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
            return None  # it hands out a tensor once: torch says that it has no second derivative
        mask, bias, scale, shift = _formulas(q, attn_mask, node._saved_scale, node._saved_is_causal)
        needs = [grad is not None for grad in grads[:3]]
        dq, dk, dv, _ = _grads(q, k, v, mask, bias, douts[0], None, scale, shift, [*needs, False])
        return dq, dk, dv, *grads[3:]

    handle: Any = torch._C._current_autograd_node().register_hook(exchange)
    # It comes before the hooks of others, which are to see and change what it returns. The node calls them in the order
    # in which they were put in.
    hooks = handle.hooks_dict_ref()
    for other in [id for id in hooks if id != handle.id]:
        hooks[other] = hooks.pop(other)


# A node takes over the hooks of a tensor in a tenth of the time of Node.register_hook, which makes a handle to remove
# the hook with; nobody removes this one, so one tensor lends it to all nodes.
_HOOKED = torch.empty(0)
_HOOKED._backward_hooks = {0: _before_backward}


class _TwiceDifferentiable(torch.autograd.Function):
    """Stands behind torch's attention, whose fused kernels have no second derivative. A first backward passes through
    to torch's own; one that is differentiated again leaves it out and takes the formula."""

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
        dq, dk, dv, dbias = _grads(q, k, v, mask, bias, dout, None, *ctx.options, [*needs[:3], needs[4]])
        return None, dq, dk, dv, None, dbias, None, None


# --- operators -------------------------------------------------------------------------------------------------------


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None, scale: float,
    shift: int | None, bounded: bool, wants_lse: bool, saves: bool, precision: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, stats = _empty_results(query, value, bias, wants_lse, saves, precision)
    if runs_kernels(backend, query):
        from ..kernels.attention import Scores, run_forward

        problem = _problem(query, key, value, attn_mask, bias, shift, bounded, precision, saves)
        scores = Scores(attn_mask, bias, scale)
        run_forward(
            problem, query, key, value, scores, out, lse if wants_lse else None, stats if saves else None
        )  # fmt: skip
        return out, lse, stats
    args = (query, key, value, attn_mask, bias, scale, shift)
    if wants_lse or saves:
        result, full_lse = _formula(*args)
        lse = full_lse if wants_lse else lse
    else:
        result = _composite(*args, group=query.shape[1] // max(1, key.shape[1]))
    # Nothing reads here what the kernels keep for backward.
    return out.copy_(result), lse, stats.zero_()


def _stats_shape(query: Tensor, bias: Tensor | None, precision: str) -> tuple[int, ...]:
    """lse in one number a row or two: see the head of ``kernels/attention.py``."""
    is_exact = query.dtype is torch.float32 and precision != "tf32"
    return (2 if is_exact or bias is not None else 1, *query.shape[:3])


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _empty_rows(like: Tensor, size: int) -> Tensor:
    """[B, H, S, size] with heads and sequence in the order in which ``like`` has them in memory, as torch's fused
    attention lays out its result."""
    b, h, s, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(b, s, h, size).transpose(1, 2)
    return like.new_empty(b, h, s, size)


def _empty_results(
    query: Tensor, value: Tensor, bias: Tensor | None, wants_lse: bool, saves: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(out, lse, stats)``; empty where nobody asked."""
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
    """``(out, lse, stats)`` of OP."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            out, lse, stats = OP(*call)
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


def _autograd(*call: Any) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in call[:5]):
        with below_autograd():
            return tuple(OP(*call))
    return tuple(_Attention.apply(*call[:9], True, *call[10:]))


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias"
OP: Any = register(
    f"attention({_TENSORS}, float scale, SymInt? shift, bool bounded, bool wants_lse, bool saves, str precision, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    implementation=_forward,
    fake=_fake_forward,
    autograd=_autograd,
)


def _backward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None, out: Tensor,
    stats: Tensor, dout: Tensor, dlse: Tensor | None, needs: list[bool], scale: float, shift: int | None,
    bounded: bool, precision: str, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    dq, dk, dv, dbias = _empty_grads(query, key, value, bias, needs)
    if runs_kernels(backend, query):
        from ..kernels.attention import Scores, run_backward

        problem = _problem(query, key, value, attn_mask, bias, shift, bounded, precision, True)
        scores = Scores(attn_mask, bias, scale)
        run_backward(problem, query, key, value, scores, out, stats, dout, dlse, dq, dk, dv, dbias)
    else:
        wanted = [grad is not None for grad in (dq, dk, dv, dbias)]
        grads = _grads(query, key, value, attn_mask, bias, dout, dlse, scale, shift, wanted)
        for grad, result in zip((dq, dk, dv, dbias), grads, strict=True):
            if grad is not None:
                grad.copy_(result)
    return _or_nothing(query, dq, dk, dv, dbias)


def _backward_autograd(*call: Any) -> tuple[Tensor, ...]:
    """A first backward runs the kernels; one that is differentiated again runs the formula in torch's operators."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in call[:9]):
        query, key, value, mask, bias, _, _, dout, dlse, needs, scale, shift, *_ = call
        grads = _grads(query, key, value, mask, bias, dout, dlse, scale, shift, needs)
        return _or_nothing(query, *grads)
    with below_autograd():
        return tuple(OP_BACKWARD(*call))


def _empty_grads(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(dq, dk, dv, dbias)``, those that are needed; dk and dv come together."""
    needs_q, needs_k, needs_v, needs_bias = needs
    pair = needs_k or needs_v
    return (
        _empty_rows(query, query.shape[3]) if needs_q else None,
        _empty_rows(key, key.shape[3]) if pair else None,
        _empty_rows(value, value.shape[3]) if pair else None,
        None if bias is None or not needs_bias else bias.new_empty(bias.shape),
    )


def _or_nothing(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors only: an empty one in place of ``None``."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, bias: Tensor | None, out: Any, stats: Any, dout: Any,
    dlse: Any, needs: list[bool], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _or_nothing(query, *_empty_grads(query, key, value, bias, needs))


OP_BACKWARD: Any = register(
    f"attention_backward({_TENSORS}, Tensor out, Tensor stats, Tensor dout, Tensor? dlse, bool[] needs, float scale, "
    "SymInt? shift, bool bounded, str precision, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_fake_backward,
    autograd=_backward_autograd,
)


# --- rows of unit length, for cosine scores --------------------------------------------------------------------------


def _normalized(t: Tensor, eps: float, backend: str) -> Tensor:
    """``t / max(|t|, eps)`` of the rows of [B, H, S, D]."""
    if backend == "torch":
        return _unit(t, eps)
    if torch.compiler.is_compiling():
        return OP_NORMALIZE(t, eps, backend)[0]
    if torch.is_grad_enabled() and t.requires_grad:
        return _Normalize.apply(t, eps, backend)[0]
    with below_autograd():
        return OP_NORMALIZE(t, eps, backend)[0]


def _unit(t: Tensor, eps: float) -> Tensor:
    """``t / max(|t|, eps)`` of the rows, in torch's operators."""
    if torch.compiler.is_compiling() or is_jit_tracing() or in_transform():
        unit = t / _lengths(t, eps)
        return unit if unit.dtype is t.dtype else unit.to(t.dtype)
    if 0 < t.numel() <= _FEW and t.is_cpu and not torch._C._len_torch_dispatch_stack():
        lengths = torch.linalg.vector_norm(t, 2, -1, True)
        if type(lengths) is Tensor:  # a fake tensor has no numbers to look at
            least, most = torch.aminmax(lengths.detach())
            if least.item() >= eps and eps >= _LEAST_SQUARED and most.item() < inf:
                return t / lengths
    if torch.is_grad_enabled() and t.requires_grad:
        differentiable: Tensor = _Unit.apply(t, eps)
        return differentiable
    return (t / _measured_lengths(t, eps)).to(t.dtype)


_FEW = 1 << 15  # numbers that take less time than a Function, whose gradient has fewer passes


def _lengths(t: Tensor, eps: float) -> Tensor:
    """[..., 1]: max(|t|, eps) in float32 at least, with derivatives of every order."""
    wide = torch.promote_types(t.dtype, torch.float32)
    if torch.compiler.is_compiling():  # of the first order only, as everything that is compiled
        lengths = _norm(t, torch.float64).clamp_min(eps)
        return lengths if wide is torch.float64 else lengths.to(wide)
    # A short row has no part in its length, which at 0 has no second derivative.
    is_short = _norm(t.detach(), torch.float64) < eps
    return torch.where(is_short, eps, _norm(torch.where(is_short, 1.0, t), torch.float64)).to(wide)


def _measured_lengths(t: Tensor, eps: float) -> Tensor:
    """The values of :func:`_lengths`. Most rows can be squared in float32, in a quarter of the time on the CPU."""
    wide = torch.promote_types(t.dtype, torch.float32)
    if t.is_cpu and eps >= _LEAST_SQUARED and not torch._C._len_torch_dispatch_stack():
        lengths = _norm(t, wide)
        if type(lengths) is Tensor and lengths.sum().item() < inf:  # a fake tensor has no numbers
            return lengths.clamp_min_(eps)
    return _norm(t, torch.float64).clamp_min_(eps).to(wide)


_LEAST_SQUARED = 1e-15  # its square is so far above the least float32 that a sum of such has all its digits


def _norm(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 1]: |t|, of squares added in ``dtype``. In float64 no row of float32 overflows or vanishes."""
    return torch.linalg.vector_norm(t, 2, -1, True, dtype=None if dtype is t.dtype else dtype)


def _unit_grad(t: Tensor, dout: Tensor, eps: float, lengths: Tensor) -> Tensor:
    """The gradient of :func:`_unit` as a function of its argument, whose ``lengths`` are given."""
    unit = t / lengths
    dout = dout.to(unit.dtype)
    along = torch.linalg.vecdot(unit, dout).unsqueeze(-1).masked_fill(lengths == eps, 0.0)
    return (torch.addcmul(dout, along, unit, value=-1) / lengths).to(t.dtype)


class _Unit(torch.autograd.Function):
    """:func:`_unit`. Its gradient takes fewer passes than those of its parts, and is right for rows too long to be
    squared and in the second order for rows of zeros."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, eps: float) -> Tensor:
        lengths = _measured_lengths(t, eps)
        ctx.save_for_backward(t, lengths)
        ctx.eps = eps
        return (t / lengths).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        t, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():
            lengths = _lengths(t, ctx.eps)
        return _unit_grad(t, dout, ctx.eps, lengths), None


def _normalize(input: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    out, inverse = _empty_units(input)
    if runs_kernels(backend, input):
        from ..kernels.attention import run_normalize

        run_normalize(_rows_problem(input), input, eps, out, inverse)
        return out, inverse
    lengths = _measured_lengths(input, eps)
    return out.copy_(input / lengths), inverse.copy_(1 / lengths.squeeze(-1))


def _empty_units(input: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, inverse)``: rows of unit length, and what they were multiplied by."""
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


def _normalize_autograd(input: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and input.requires_grad:
        return _Normalize.apply(input, eps, backend)
    with below_autograd():
        return OP_NORMALIZE(input, eps, backend)


OP_NORMALIZE: Any = register(
    "attention_normalize(Tensor input, float eps, str backend) -> (Tensor, Tensor)",
    implementation=_normalize,
    fake=lambda input, eps, backend: _empty_units(input),
    autograd=_normalize_autograd,
)


def _normalize_backward(
    input: Tensor, out: Tensor, inverse: Tensor, dout: Tensor, eps: float, backend: str
) -> Tensor:  # fmt: skip
    dx = _empty_rows(out, out.shape[3])
    if runs_kernels(backend, input):
        from ..kernels.attention import run_normalize_grad

        run_normalize_grad(_rows_problem(out), out, inverse, dout, eps, dx)
        return dx
    return dx.copy_(_unit_grad(input, dout, eps, _measured_lengths(input, eps)))


def _normalize_backward_autograd(
    input: Tensor, out: Tensor, inverse: Tensor, dout: Tensor, eps: float, backend: str
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled() and (input.requires_grad or dout.requires_grad):
        return _unit_grad(input, dout, eps, _lengths(input, eps))
    with below_autograd():
        return OP_NORMALIZE_BACKWARD(input, out, inverse, dout, eps, backend)


OP_NORMALIZE_BACKWARD: Any = register(
    "attention_normalize_backward(Tensor input, Tensor out, Tensor inverse, Tensor dout, float eps, str backend)"
    " -> Tensor",
    implementation=_normalize_backward,
    fake=lambda input, out, inverse, dout, eps, backend: _empty_rows(out, out.shape[3]),
    autograd=_normalize_backward_autograd,
)
