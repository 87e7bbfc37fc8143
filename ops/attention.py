"""Attention with dot-product or cosine scores: public functions, and the choice of backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..autotune.device import DeviceSpec, detect
from ..autotune.resolve import Choice, resolve
from . import attention_checks
from ._checks import PRECISIONS
from ._dispatch import (
    Ruling,
    by_times,
    choose,
    constant,
    in_transform,
    is_plain,
    matmul_setting,
    records_sizes,
    rejections,
    resolved_precision,
    torch_errors,
    torch_serves,
    torch_validates,
)
from ._layout import autocast
from ._register import requires_grad, run_operator
from .attention_checks import AttentionArgs
from .attention_operators import OP, OP_NORMALIZE, attention_problem
from .attention_torch import (
    by_torch,
    mask_and_bias,
    out_and_lse_by_torch,
    torch_attention,
    torch_attention_or_none,
    unit_rows,
)


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

    It takes the place of :func:`torch.nn.functional.scaled_dot_product_attention`, and has derivatives of every order.
    A call with dropout runs on torch.

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
        RuntimeError, TypeError: what torch raises, with torch's text, whatever the backend.
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
    call = (*tensors, dropout_p, is_causal, scale, enable_gqa)
    errors = torch_errors(query)
    if errors is not None:
        try:
            out = torch_attention_or_none(*call, recorded=not errors)
            if out is not None:
                return out
        except errors:
            pass  # The validator below raises a clearer error. What it accepts runs again, and torch raises.
    if any(isinstance(t, Tensor) and t.is_nested for t in tensors[:3]):
        reason = "a nested tensor"
        choose("scaled_dot_product_attention", (query,), lambda _: Ruling(False, reason), lambda _: (), lambda: reason)
        if torch.compiler.is_compiling():
            return torch_attention(*call)
        # A jagged tensor computes attention in its __torch_function__, and calls this function with that turned off.
        with torch._C._EnableTorchFunction():
            return torch_attention(*call)
    attention_checks.check_scaled_dot_product_attention(*call)
    call_torch = partial(torch_attention_or_none, *call, recorded=records_sizes(query))
    if torch_serves(query):  # fake and meta tensors, and calls that torch rejects and our validator accepts
        q, k, v, given = autocast(*tensors)
        attention_checks.check_operands(q, k, v, (("attn_mask", given),), scale, enable_gqa)
        out = call_torch()
        if out is not None:
            return out
    mask, bias = mask_and_bias(attn_mask)
    return _run_attention(
        "scaled_dot_product_attention", call_torch, query, key, value, mask, bias, scale=scale, is_causal=is_causal,
        enable_gqa=enable_gqa, dropout_p=dropout_p,
    )[0]  # fmt: skip


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
        query, key, value: ``[..., H, M, D]``, ``[..., H, N, D]``, ``[..., H, N, DV]`` of one dtype, with any strides;
            leading dimensions broadcast.
        score: ``"dot"``, or ``"cosine"`` for rows divided by their length.
        scale: a number, or a tensor ``[]`` or ``[H]``, which gets a gradient; default: ``D ** -0.5``, and 1 for cosine.
        attn_mask: bool, True where a query sees a key; broadcastable to ``[..., H, M, N]``.
        bias: added to the scores, broadcastable like the mask; float32 or the dtype of ``query``. Its gradient is
            summed in the kernel where it was broadcast.
        is_causal: query i sees keys up to i, or with ``causal_alignment="bottom_right"`` up to i + N - M.
        enable_gqa: key and value may have fewer heads, each for as many consecutive heads of the query.
        return_lse: also return the logarithm of the sum of exponentials; it has a gradient.
        eps: the least length that a row of query or key is divided by, for cosine scores.
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
            out = by_torch(
                query, key, value, attn_mask, bias, score, scale, is_causal, causal_alignment, enable_gqa, eps,
                recorded=not rejected,
            )  # fmt: skip
            if out is not None:
                return out
        except rejected:
            pass  # The validator below raises a clearer error. What it accepts runs again, and torch raises.
    attention_checks.check_attention(
        query, key, value, attn_mask, bias, score=score, scale=scale, causal_alignment=causal_alignment, eps=eps,
        precision=precision,
    )  # fmt: skip

    def call_torch() -> Tensor | None:
        if return_lse or in_transform():
            return None
        return by_torch(
            query, key, value, attn_mask, bias, score, scale, is_causal, causal_alignment, enable_gqa, eps,
            recorded=records_sizes(query),
        )  # fmt: skip

    if not return_lse and torch_serves(query) and not in_transform():  # compiled, fake or meta tensors
        q, k, v, added = autocast(query, key, value, bias)
        attention_checks.check_operands(q, k, v, (("attn_mask", attn_mask), ("bias", added)), scale, enable_gqa)
        out = call_torch()
        if out is not None:
            return out
    out, lse = _run_attention(
        "attention", call_torch, query, key, value, attn_mask, bias, score=score, scale=scale, is_causal=is_causal,
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
    r"""Attention pooling: each of a few queries, which the whole batch shares, gives one weighted mean of the values.

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


# --- from arguments to a call ----------------------------------------------------------------------------------------


def _run_attention(
    op: str, call_torch: Callable[[], Tensor | None], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    bias: Tensor | None, *, scale: Any, is_causal: bool, enable_gqa: bool, score: str = "dot",
    bottom_right: bool = False, wants_lse: bool = False, eps: float = 1e-6, precision: str | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``(out, lse)`` of a call with any number of dimensions; lse is None where it is not asked for.

    ``call_torch`` is what computes the call where torch serves it, also while the call is recorded or explained, so
    that to record a call does not change its result. It returns ``None`` for what torch's own attention does not
    compute.
    """
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
    saves = requires_grad((*tensors, scale))
    bounded = score == "cosine" and bias is None and not isinstance(scale, Tensor) and _is_bounded(scale, q.dtype)
    resolved = resolved_precision(q, precision, matmul_setting)

    def problem() -> Any:
        return attention_problem(q, k, v, mask, bias, shift, bounded, resolved, saves)

    backend = choose(
        op, tensors,
        lambda device: _auto_rule(problem(), device, wants_lse),
        lambda device: _kernel_choices(problem(), device, score == "cosine", bias is not None and bias.requires_grad),
        lambda: _limits(problem, max(q.shape[3], v.shape[3]), mask, dropout_p, q.device),
    )  # fmt: skip
    served = call_torch() if backend == "torch" else None
    if served is not None:
        return served, None
    if score == "cosine":
        q, k = (_normalized(t, eps, backend) for t in (q, k))
    if isinstance(scale, Tensor):
        q, scale = q * scale.to(q.dtype).view(-1, 1, 1), 1.0
    call = (q, k, v, mask, bias, float(scale), shift)
    if backend == "torch":
        out, lse = out_and_lse_by_torch(call, group, wants_lse, dropout_p, saves)
    else:
        out, lse, _ = run_operator(OP, (*call, bounded, wants_lse, saves, resolved, backend), saves)
    return _original_dims(out, args), None if lse is None or not wants_lse else _original_dims(lse, args)


def _normalized(t: Tensor, eps: float, backend: str) -> Tensor:
    """``t / max(|t|, eps)`` of the rows of [B, H, S, D]."""
    if backend == "torch":
        return unit_rows(t, eps)
    unit: Tensor = run_operator(OP_NORMALIZE, (t, eps, backend), requires_grad((t,)))[0]
    return unit


def _four_dims(t: Tensor, args: AttentionArgs, is_query: bool) -> Tensor:
    """``t`` as [B, H, S, D] with its leading dimensions broadcast. Key and value keep one head for each group of query
    heads."""
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
    """A mask or bias as [B or 1, H or 1, M or 1, N or 1]. It is not expanded, so that the gradient of a bias is summed
    over the dimensions that are 1."""
    known = len(args.batch) + (args.heads is not None) + 2
    t = t.view(*(1,) * (max(known, 4) - t.dim()), *t.shape)
    if len(args.batch) < 2:
        return t
    if any(size != 1 for size in t.shape[: len(args.batch)]):
        t = t.expand(*args.batch, *t.shape[len(args.batch) :])
    return t.flatten(0, len(args.batch) - 1)


def _original_dims(t: Tensor, args: AttentionArgs) -> Tensor:
    """A result [B, H, ...] with the leading dimensions of the call."""
    if args.heads is None:
        return t.squeeze(0).squeeze(0)
    if not args.batch:
        return t.squeeze(0)
    return t if len(args.batch) == 1 else t.unflatten(0, args.batch)


def _is_bounded(scale: float, dtype: torch.dtype) -> bool:
    """Whether exp(s - |scale|) is representable in ``dtype`` for each score, which is -|scale| or more, so that the
    kernels may use |scale| in the place of the maximum."""
    return abs(scale) <= (4.5 if dtype is torch.float16 else 40.0)


# --- the choice of backend -------------------------------------------------------------------------------------------


def _limits(
    problem: Callable[[], Any], head: int, mask: Tensor | None, dropout_p: float, where: torch.device
) -> str | None:  # fmt: skip
    """Why no kernel covers the call, or None."""
    if dropout_p:
        return f"dropout_p={dropout_p:g}"
    if head > _max_head():
        return f"a head dimension of {head}: no kernel has more than {_max_head()}"
    if torch.compiler.is_compiling():
        return None
    if mask is not None and not is_plain(mask):
        return f"attn_mask is a {type(mask).__name__}"
    from ..kernels.attention_space import fits, offsets_fit_32_bits

    asked, device = problem(), detect(where)
    if not offsets_fit_32_bits(asked, mask):
        return "rows of attn_mask, or of all heads together, of 2**22 elements or more"
    if fits(asked, device):
        return None
    return f"a head dimension of {max(asked.D, asked.DV)} in {asked.dtype}: no tile of it fits {device.slug}"


@constant  # Dynamo must not trace the import of the kernels
def _max_head() -> int:
    from ..kernels.attention_space import MAX_HEAD

    return MAX_HEAD


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


def _auto_rule(problem: Any, device: DeviceSpec, wants_lse: bool) -> Ruling:
    """Whether the kernels win: by measured times if there are any. The forward was timed beside torch's forward, and
    each kernel of the backward beside torch's whole backward. Without times the kernels run only where torch has no
    fused operator, since torch would then store the matrix of scores."""
    choices = dict(_kernel_choices(problem, device, False, False))
    timed = [choice for name, choice in choices.items() if name != "attention_delta"]
    if all(choice.us and choice.torch_us for choice in timed):
        ours_us = sum(choice.us or 0.0 for choice in timed)
        torch_us = (timed[0].torch_us or 0.0) + max((choice.torch_us or 0.0 for choice in timed[1:]), default=0.0)
        return by_times(ours_us, torch_us)
    if wants_lse and problem.M * problem.N >= 4 * (problem.M + problem.N) * (problem.D + problem.DV):
        return Ruling(True, "not measured; torch has no fused attention that returns lse, and would write all scores")
    return Ruling(False, "not measured, and torch has a fused kernel as well: `tritune tune` can")
