"""The validators of attention. See :mod:`._checks`; the yardstick is torch's scaled_dot_product_attention."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import _mha_shape_check  # type: ignore[attr-defined]

from ._checks import PRECISIONS, _check_tensor, _cpp_name, _scalar_name

SCORES = ("dot", "cosine")
ALIGNMENTS = ("top_left", "bottom_right")


class AttentionArgs(NamedTuple):
    """The normalised arguments of a legal call."""

    batch: tuple[int, ...]
    """The dimensions before the last three, after broadcasting."""
    heads: int | None
    """Heads of the query, after broadcasting; ``None`` if there is no such dimension."""
    group: int
    """Query heads for each head of key and value."""


def check_scale(scale: Any) -> None:
    if isinstance(scale, Tensor):
        if scale.dim() > 1 or not scale.is_floating_point():
            got = f"{scale.dtype} {list(scale.shape)}"
            raise ValueError(f"scale must be a number, or a floating-point tensor of shape [] or [H], got {got}")
    elif isinstance(scale, bool | str) or not (scale is None or hasattr(scale, "__float__")):
        raise TypeError(f"scale must be a number, a Tensor or None, got {type(scale).__name__}")


def check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def check_scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> None:
    """Checks what torch's function requires beyond :func:`check_operands`: types, the range of ``dropout_p``, and that
    ``attn_mask`` and ``is_causal`` are not given together."""
    name = "scaled_dot_product_attention"
    for position, (argument, tensor) in enumerate((("query", query), ("key", key), ("value", value)), 1):
        _check_tensor(name, position, argument, tensor)
    if attn_mask is not None:
        _check_tensor(name, 4, "attn_mask", attn_mask)
    for argument, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}(): argument '{argument}' must be bool, not {type(flag).__name__}")
    is_number = not isinstance(scale, str) and (scale is None or hasattr(scale, "__float__"))
    if not is_number or (isinstance(scale, Tensor) and scale.numel() != 1):
        kind = "Tensor" if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{name}(): argument 'scale' must be float, not {kind}")
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p:g}")
    if is_causal and attn_mask is not None:
        raise RuntimeError(
            "_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True: "
            "tritune.attention takes both and hides what either hides"
        )


def check_attention(
    query: Any, key: Any, value: Any, attn_mask: Any, bias: Any, *, score: str, scale: Any, causal_alignment: str,
    eps: float, precision: str | None,
) -> None:  # fmt: skip
    """Checks the keywords of :func:`tritune.attention` and the types of its tensors."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    for name, optional in (("attn_mask", attn_mask), ("bias", bias)):
        if optional is not None and not isinstance(optional, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(optional).__name__}")
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        raise RuntimeError(f"attn_mask must be bool, True where a query sees a key, got {attn_mask.dtype}: see bias")
    choices: tuple[tuple[str, object, Sequence[str | None]], ...] = (
        ("score", score, SCORES), ("causal_alignment", causal_alignment, ALIGNMENTS),
        ("precision", precision, (None, *PRECISIONS)),
    )  # fmt: skip
    for name, given, accepted in choices:
        if given not in accepted:
            raise ValueError(f"{name}={given!r} is not accepted: it must be one of {', '.join(map(str, accepted))}")
    check_scale(scale)
    check_eps(eps)


def check_operands(
    query: Tensor, key: Tensor, value: Tensor, masks: Sequence[tuple[str, Tensor | None]], scale: Any, enable_gqa: bool
) -> AttentionArgs:
    """Checks dtypes, devices and shapes. ``masks`` are pairs of an argument's name and its value, which has to be
    broadcastable to ``[..., H, M, N]``."""
    if not query.dtype == key.dtype == value.dtype:
        got = f"query.dtype: {_cpp_name(query)} key.dtype: {_cpp_name(key)} and value.dtype: {_cpp_name(value)}"
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {got} instead.")
    if not query.device == key.device == value.device:
        got = f"query.device: {query.device} key.device: {key.device} and value.device: {value.device} instead."
        raise RuntimeError(f"Expected query, key, and value to have the same device type, but got {got}")
    if min(query.dim(), key.dim(), value.dim()) < 2:
        got = f"query.dim: {query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        raise RuntimeError(f"Expected query, key, and value to all be  at least 2 dimensional, but got {got}")
    for name, mask in masks:
        if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
            got = f"{name}.dtype: {_cpp_name(mask)} and  query.dtype: {_cpp_name(query)} instead."
            raise RuntimeError(f"Expected {name} dtype to be bool or float or to match query dtype, but got {got}")
        if mask is not None and mask.device != query.device:
            raise RuntimeError(f"Expected {name} on the device of query, {query.device}, but got {mask.device}")
    if query.dtype.is_complex:
        raise NotImplementedError(f"\"softmax_lastdim_kernel_impl\" not implemented for '{_scalar_name(query)}'")
    if not query.is_floating_point():
        raise RuntimeError(f"expected scalar type Float but found {_scalar_name(query)}")
    args = _check_heads(query, key, value, enable_gqa)
    _check_sizes(query, key, value, args)
    shape = (*args.batch, *(() if args.heads is None else (args.heads,)), query.shape[-2], key.shape[-2])
    for name, mask in masks:
        if mask is not None:
            _check_mask(name, mask, shape)
    if isinstance(scale, Tensor):
        if scale.device != query.device:
            raise RuntimeError(f"scale must be on the device of query, {query.device}, got {scale.device}")
        if scale.dim() == 1 and scale.shape[0] not in (1, 1 if args.heads is None else args.heads):
            raise RuntimeError(f"scale must have one number or one a head, {args.heads}, got {list(scale.shape)}")
    return args


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> AttentionArgs:
    """Broadcasts what comes before sequence and features; with ``enable_gqa`` heads are repeated, not broadcast."""
    tensors = (query, key, value)
    if not enable_gqa:
        lead = _broadcast(tensors, 2)
        if not lead:
            return AttentionArgs((), None, 1)
        kv_heads = [t.shape[-3] for t in (key, value) if t.dim() > 2]
        # One head of key and value for all queries needs no copies: a group of them shares it.
        shared = len(kv_heads) == 2 and kv_heads == [1, 1]
        return AttentionArgs(lead[:-1], lead[-1], lead[-1] if shared and lead[-1] else 1)
    if min(t.dim() for t in tensors) < 3:
        raise RuntimeError(
            "enable_gqa needs a dimension of heads in query, key and value, "
            f"got {', '.join(str(list(t.shape)) for t in tensors)}"
        )
    heads, key_heads, value_heads = (t.shape[-3] for t in tensors)
    if any(not have or heads % have for have in (key_heads, value_heads)):
        raise RuntimeError(
            "Number of heads in key and value must divide the number of heads in query: "
            f"got {key_heads} and {value_heads}, and {heads}"
        )
    return AttentionArgs(_broadcast(tensors, 3), heads, heads // key_heads if key_heads == value_heads else 1)


def _broadcast(tensors: Sequence[Tensor], last: int) -> tuple[int, ...]:
    """The shape to which the tensors broadcast without their ``last`` dimensions; raises torch's error where they do
    not."""
    shapes = [tuple(t.shape[:-last]) for t in tensors]
    full = shapes[0]
    if full == shapes[1] == shapes[2]:
        return full
    for other in shapes[1:]:
        length = max(len(full), len(other))
        a, b = ((1,) * (length - len(s)) + s for s in (full, other))
        for dim, (one, two) in enumerate(zip(a, b, strict=True)):
            if one != two and one != 1 and two != 1:
                sizes = f"the size of tensor b ({two}) at non-singleton dimension {dim}"
                raise RuntimeError(f"The size of tensor a ({one}) must match {sizes}")
        full = tuple(two if one == 1 else one for one, two in zip(a, b, strict=True))
    return full


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> None:
    if query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]:
        return
    batches = prod(args.batch) * (1 if args.heads is None else args.heads)
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"Expected size for first two dimensions of batch2 tensor to be: [{batches}, {query.shape[-1]}] "
            f"but got: [{batches}, {key.shape[-1]}].: query and key must have the same number of features"
        )
    raise RuntimeError(
        f"Expected size for first two dimensions of batch2 tensor to be: [{batches}, {key.shape[-2]}] "
        f"but got: [{batches}, {value.shape[-2]}].: key and value must have the same length"
    )


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dim() > len(shape):
        raise RuntimeError(
            f"output with shape {list(shape)} doesn't match the broadcast shape {list(mask.shape)}: "
            f"{name} must be broadcastable to the scores"
        )
    offset = len(shape) - mask.dim()
    for dim, size in enumerate(mask.shape):
        if size != 1 and size != shape[offset + dim]:
            raise RuntimeError(
                f"The size of tensor a ({shape[offset + dim]}) must match the size of tensor b ({size}) "
                f"at non-singleton dimension {offset + dim}: {name} must be broadcastable to {list(shape)}"
            )


def check_multi_head(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any, attn_mask: Any, is_causal: bool
) -> None:  # fmt: skip
    """The arguments of a call of the module ``layer``, as torch's module checks them where it has no fused operator."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and not (torch.is_floating_point(mask) or mask.dtype is torch.bool):
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype is not attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=4,
        )
    is_batched = _mha_shape_check(query, key, value, key_padding_mask, attn_mask, layer.num_heads)
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    features, heads, embed_dim = query.shape[-1], layer.num_heads, layer.embed_dim
    if features != embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {embed_dim}, but got {features}")
    if features % heads:
        raise AssertionError(f"embed_dim {features} not divisible by num_heads {heads}")
    lengths_first = [t.transpose(0, 1) if is_batched and layer.batch_first else t for t in (query, key, value)]
    q, k, v = (t if is_batched else t.unsqueeze(1) for t in lengths_first)
    if layer._qkv_same_embed_dim:
        if k.shape != v.shape:
            raise AssertionError(f"key shape {k.shape} does not match value shape {v.shape}")
    elif k.shape[:2] != v.shape[:2]:
        raise AssertionError(f"key's sequence and batch dims {k.shape[:2]} do not match value's {v.shape[:2]}")
    else:
        for name, tensor in (("query", q), ("key", k), ("value", v)):
            weight, needed = getattr(layer, f"{name[0]}_proj_weight"), (features, tensor.shape[-1])
            if weight.shape != needed:
                raise AssertionError(f"expecting {name} weights shape of {needed}, but got {weight.shape}")
    (steps, batch), keys = q.shape[:2], k.shape[0]
    if attn_mask is not None and not (is_causal and key_padding_mask is None):
        sizes = (steps, keys) if attn_mask.dim() == 2 else (batch * heads, steps, keys)
        if attn_mask.shape != sizes:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {sizes}."
            )
    if (layer.bias_k is None) != (layer.bias_v is None):
        missing, given = ("v", "k") if layer.bias_v is None else ("k", "v")
        raise AssertionError(f"bias_{given} is set but bias_{missing} is None")
    if k.shape[1] != batch:
        sizes_of_view = f"[{keys}, {batch * heads}, {features // heads}]"
        raise RuntimeError(
            f"shape '{sizes_of_view}' is invalid for input of size {keys * k.shape[1] * features}: "
            f"key has a batch of {k.shape[1]}, and query one of {batch}"
        )
    if key_padding_mask is not None:
        padded = key_padding_mask.shape if is_batched else (1, *key_padding_mask.shape)
        for dim, (size, expected) in enumerate(zip(padded, (batch, keys), strict=True)):
            if size != expected:
                raise AssertionError(f"Expected key_padded_mask.shape[{dim}] to be {expected}, but got {size}")
