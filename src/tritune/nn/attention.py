"""Attention modules."""

import math
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.functional import linear, pad
from torch.nn.modules.module import _has_any_global_hook

from ..ops import attention, attention_pool, scaled_dot_product_attention
from ..ops._checks import PRECISIONS
from ..ops._dispatch import (
    Ruling,
    choose,
    current_backend,
    in_transform,
    is_jit_tracing,
    is_plain,
    is_watched,
    torch_computes,
)
from ..ops.attention_checks import ALIGNMENTS, SCORES, check_eps, check_multi_head, check_scale
from ..ops.attention_torch import pool_and_project
from ._of_torch import OfTorch, Quantizable

# What is shown of a module only where it is otherwise.
_USUAL = {"is_causal": False, "causal_alignment": "top_left", "enable_gqa": False, "eps": 1e-6, "precision": None}


class _Scored(OfTorch, torch.nn.Module):
    """What the attention modules share: scores, and a scale that may be learned."""

    logit_scale: torch.nn.Parameter | None

    def __init__(
        self, score: str, scale: float | str | None, eps: float, precision: str | None, device: Any, dtype: Any
    ) -> None:  # fmt: skip
        super().__init__()
        _check_choice("score", score, SCORES)
        _check_choice("precision", precision, (None, *PRECISIONS))
        if isinstance(scale, str) and scale != "learnable":
            raise ValueError(f"scale={scale!r} is not accepted: it must be a number, 'learnable' or None")
        check_scale(None if isinstance(scale, str) else scale)
        check_eps(eps)
        self.score, self.eps, self.precision = score, eps, precision
        self.fixed_scale = None if isinstance(scale, str) else scale
        learned = torch.nn.Parameter(torch.empty((), device=device, dtype=dtype)) if isinstance(scale, str) else None
        self.register_parameter("logit_scale", learned)

    def reset_parameters(self) -> None:
        if self.logit_scale is not None:
            torch.nn.init.constant_(self.logit_scale, math.log(10.0))

    @property
    def scale(self) -> float | Tensor | None:
        """What the scores are multiplied by."""
        logit_scale = self.logit_scale
        if logit_scale is None:
            return self.fixed_scale
        # At most 100, as in CLIP and Swin V2. Dynamo takes a number that is no literal for an input.
        return logit_scale.clamp(max=4.605170185988092).exp()

    def extra_repr(self) -> str:
        scale = "learnable" if self.logit_scale is not None else self.fixed_scale
        options = {name: getattr(self, name, usual) for name, usual in _USUAL.items()}
        unusual = (f"{name}={value!r}" for name, value in options.items() if value != _USUAL[name])
        return ", ".join([f"score={self.score!r}, scale={scale!r}", *unusual])


class Attention(_Scored):
    """:func:`tritune.attention` without any projection.

    Args:
        score: ``"dot"`` or ``"cosine"``.
        scale: a number; ``None`` for the score's default; ``"learnable"`` for ``exp(logit_scale)``, a parameter that
            starts at log 10 and counts as at most log 100.
        is_causal, causal_alignment, enable_gqa, eps, precision: as in :func:`tritune.attention`.

    Shape: ``[..., H, M, D]``, ``[..., H, N, D]``, ``[..., H, N, DV]`` to ``[..., H, M, DV]``.

    Example::

        >>> layer = tritune.nn.Attention(score="cosine", scale="learnable")
        >>> layer(*(torch.randn(2, 4, 10, 16) for _ in range(3))).shape
        torch.Size([2, 4, 10, 16])
    """

    def __init__(
        self, *, score: str = "dot", scale: float | str | None = None, is_causal: bool = False,
        causal_alignment: str = "top_left", enable_gqa: bool = False, eps: float = 1e-6, precision: str | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(score, scale, eps, precision, device, dtype)
        _check_choice("causal_alignment", causal_alignment, ALIGNMENTS)
        self.is_causal, self.causal_alignment, self.enable_gqa = is_causal, causal_alignment, enable_gqa
        self.reset_parameters()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        out: Tensor = attention(
            query, key, value, score=self.score, scale=self.scale, attn_mask=attn_mask, bias=bias,
            is_causal=self.is_causal, causal_alignment=self.causal_alignment, enable_gqa=self.enable_gqa, eps=self.eps,
            precision=self.precision,
        )  # fmt: skip
        return out


class AttentionPool(_Scored):
    r"""A sequence to one vector, or a few: :func:`tritune.attention_pool` with learned queries and projections.

    .. math:: y_m = W_o \big[\textstyle\sum_j \mathrm{softmax}_j\, s(q_{hm}, W_k x_j)\, W_v x_j\big]_h

    Args:
        embed_dim: size of an element, and of the result; a multiple of ``num_heads``.
        num_heads: H, each with ``embed_dim / H`` features.
        num_queries: M; with one the result has no dimension for it.
        score, scale, eps, precision: as in :class:`Attention`.
        bias: of the projections.

    Parameters: ``query [H, M, embed_dim / H]``, normally distributed, and linear layers ``key``, ``value``, ``out``.

    Shape: ``[B, N, embed_dim]`` or ``[N, embed_dim]`` to ``[B, embed_dim]`` or ``[embed_dim]``, with M queries
    ``[B, M, embed_dim]`` or ``[M, embed_dim]``.

    On the CPU a large batch in float32 or float64 with dot-product scores is pooled first and projected afterwards: the
    two products over the sequence have H * M columns, where those of ``key`` and ``value`` have ``embed_dim``. These
    two are not called then, unless they have hooks or are anything but linear layers.

    Example::

        >>> pool = tritune.nn.AttentionPool(32, num_heads=4, score="cosine", scale="learnable")
        >>> pool(torch.randn(2, 50, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 1, num_queries: int = 1, *, score: str = "dot",
        scale: float | str | None = None, bias: bool = True, eps: float = 1e-6, precision: str | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(score, scale, eps, precision, device, dtype)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}")
        self.embed_dim, self.num_heads, self.num_queries = embed_dim, num_heads, num_queries
        shape = (num_heads, num_queries, embed_dim // num_heads)
        self.query = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.key, self.value, self.out = (
            torch.nn.Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype) for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        torch.nn.init.normal_(self.query)
        for layer in (self.key, self.value, self.out):
            layer.reset_parameters()

    def forward(self, input: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """``attn_mask``: bool ``[B, N]``, or ``[N]``: True at the elements that count."""
        if self._projects_last(input, attn_mask):
            if is_watched():
                reason = "pooled first and projected afterwards, in torch's operators"
                choose("attention", (input,), lambda _: Ruling(False, reason), lambda _: (), lambda: reason)
            pooled = pool_and_project(self.query, self.key, self.value, input, attn_mask, self.scale)
            projected: Tensor = self.out(pooled)
            return projected.squeeze(-2) if self.num_queries == 1 else projected
        by_head = (self.num_heads, -1)
        key = self.key(input).unflatten(-1, by_head).transpose(-3, -2)
        value = self.value(input).unflatten(-1, by_head).transpose(-3, -2)
        pooled = attention_pool(
            self.query, key, value, score=self.score, scale=self.scale, attn_mask=attn_mask, eps=self.eps,
            precision=self.precision,
        )  # fmt: skip
        result: Tensor = self.out(pooled.transpose(-3, -2).flatten(-2))
        return result.squeeze(-2) if self.num_queries == 1 else result

    def _projects_last(self, input: Tensor, attn_mask: Tensor | None) -> bool:
        """Does torch serve a batch for which it is faster to project what is pooled, and does no hook look at the
        projected sequence?"""
        if self.score != "dot" or not torch_computes(input) or not input.is_cpu:
            return False
        spared = input.numel() * (self.embed_dim - 2 * self.num_heads * self.num_queries)
        if spared < _MANY or input.dim() != 3 or input.dtype not in (torch.float32, torch.float64):
            return False
        if attn_mask is not None and not (attn_mask.dtype is torch.bool and attn_mask.shape == input.shape[:2]):
            return False
        if torch._C._is_any_autocast_enabled() or torch._C._is_tracing() or in_transform():
            return False
        return self._is_as_made() and _is_only_a_product(self.key, input) and _is_only_a_product(self.value, input)

    def _is_as_made(self) -> bool:
        """Are options and parameters such as the constructor makes? Others are for the function and its checks."""
        scale = self.fixed_scale if self.logit_scale is None else self.logit_scale
        shape = (self.num_heads, self.num_queries, self.embed_dim // self.num_heads)
        is_one_number = scale.dim() == 0 if isinstance(scale, Tensor) else type(scale) in (NoneType, float, int)
        return is_one_number and self.query.shape == shape and self.precision is None and self.eps > 0

    def extra_repr(self) -> str:
        sizes = f"{self.embed_dim}, num_heads={self.num_heads}, num_queries={self.num_queries}"
        return f"{sizes}, {super().extra_repr()}"


class MultiheadAttention(Quantizable, torch.nn.MultiheadAttention):
    r""":class:`torch.nn.MultiheadAttention` on :func:`tritune.scaled_dot_product_attention`: same arguments, parameters
    and ``state_dict``.

    .. math::
        y = W_o \big[\mathrm{softmax}(D^{-1/2}\, Q_h K_h^T + mask)\, V_h\big]_h + b_o, \qquad
        Q, K, V = W_q q + b_q,\ W_k k + b_k,\ W_v v + b_v

    The kernels compute calls with ``need_weights=False`` and without dropout. Where torch serves, torch's own module
    computes the whole call. That includes calls of inference under ``"auto"`` for which torch has a fused operator.
    :class:`torch.nn.TransformerEncoderLayer` does not call this module in inference, unless
    ``torch.backends.mha.set_fastpath_enabled(False)`` turns its own fused operator off.

    Shape: query ``[L, N, E]``, key ``[S, N, kdim]``, value ``[S, N, vdim]`` (``[N, L, E]`` and so on with
    ``batch_first``, without N for one sequence) to ``(output, weights)``: the query's shape, and ``None``, or with
    ``need_weights`` ``[N, L, S]``.

    Raises:
        UnsupportedError: under ``use_backend("triton")``, for ``need_weights=True``, which is torch's default, for
            dropout in training, and for what :func:`tritune.scaled_dot_product_attention` does not cover.

    Example::

        >>> layer, x = tritune.nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 10, 32)
        >>> layer(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 10, 32])
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As in torch: of a bool mask True hides a key, and ``is_causal`` is a hint that says what ``attn_mask`` is."""
        call = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if isinstance(query, Proxy) and (leaf := self._leaf(*call)) is not None:
            return leaf
        tensors = (query, key, value)
        if all(isinstance(one, Tensor) for one in tensors):
            reason = self._uncovered(tensors, need_weights)
            # torch's fused operators have no forward-mode derivative, which our function has.
            if _is_left_to_torch(query) and (forward_ad._current_level < 0 or reason is not None):
                if not torch.compiler.is_compiling() and is_watched():
                    self._note_torch(tensors, reason)
            elif reason is not None:
                self._note_torch(tensors, reason)
            elif current_backend() == "auto" and self._may_be_fused(tensors):
                self._note_torch(tensors)
            else:
                return self._by_function(tensors, key_padding_mask, attn_mask, is_causal), None
        return super().forward(*call)

    def _leaf(self, *args: Any) -> Proxy | None:
        while len(args) > 3 and args[-1] is _DEFAULTS[len(args) - 4]:
            args = args[:-1]
        return super()._leaf(*args)

    def _uncovered(self, tensors: Sequence[Tensor], need_weights: bool) -> str | None:
        if any(one.is_nested for one in tensors):
            return "a nested tensor"
        if need_weights:
            return "need_weights=True"
        return f"dropout={self.dropout}" if self.training and self.dropout else None

    def _may_be_fused(self, tensors: Sequence[Tensor]) -> bool:
        """May torch compute the call by its fused operator for inference, which ours was not measured beside?"""
        query, key, value = tensors
        return query is key is value and self.batch_first and not self.training and not torch.is_grad_enabled()

    def _note_torch(self, tensors: Sequence[Tensor], reason: str | None = None) -> None:
        """Torch serves, for a reason that is an error under ``use_backend("triton")``, or for none of this call."""
        rule = Ruling(False, "not measured beside torch's fused operator for inference")
        choose("scaled_dot_product_attention", tensors, lambda _: rule, lambda _: (), lambda: reason)

    def _by_function(
        self, tensors: Sequence[Tensor], key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:  # fmt: skip
        query, key, value = tensors
        check_multi_head(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        is_batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not is_batched:
            q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        elif self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        if is_causal and key_padding_mask is None:
            attn_mask = None
        else:
            is_causal = False  # it is a hint, and says no more than attn_mask
        mask = _joint_mask(key_padding_mask, attn_mask, q.shape[1], q.dtype)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([t, one.expand(1, t.shape[1], -1)]) for t, one in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (pad(t, (0, 0, 0, 1)) for t in (k, v))
        if mask is not None and k.shape[2] > mask.shape[-1]:  # the keys that were added are seen
            mask = pad(mask, (0, k.shape[2] - mask.shape[-1]), value=mask.dtype is torch.bool)
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).permute(2, 0, 1, 3).flatten(2)
        out = linear(out, self.out_proj.weight, self.out_proj.bias)
        if not is_batched:
            return out.squeeze(1)
        return out.transpose(0, 1) if self.batch_first else out

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """One product for all three where they are one tensor."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key is value:
            return linear(query, weight, bias).chunk(3, -1)
        else:
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [linear(*one) for one in zip((query, key, value), weights, biases, strict=True)]


_DEFAULTS: tuple[Any, ...] = torch.nn.MultiheadAttention.forward.__defaults__ or ()


def _is_left_to_torch(input: Tensor) -> bool:
    """Does torch serve every call on this input, whoever looks on?"""
    backend = current_backend()
    if backend == "auto":
        return not input.is_cuda or torch.compiler.is_compiling() or is_jit_tracing()
    return backend == "torch"


def _joint_mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, batch: int, dtype: torch.dtype
) -> Tensor | None:  # fmt: skip
    """What :func:`tritune.scaled_dot_product_attention` takes for the two masks of torch's module: True where a key is
    seen, or numbers to add. ``[N or 1, H or 1, L or 1, S]``."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, -1)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(batch, 1, 1, -1))
    if all(one.dtype is torch.bool for one in masks):
        seen = [~one for one in masks]
        return seen[0] & seen[1] if len(seen) == 2 else seen[0] if seen else None
    added = [
        torch.zeros_like(one, dtype=dtype).masked_fill(one, -math.inf) if one.dtype is torch.bool else one
        for one in masks
    ]
    return added[0] + added[1] if len(added) == 2 else added[0]


_MANY = 1 << 20  # multiplications that take longer than the operators which a small call has more


def _is_only_a_product(layer: torch.nn.Module, input: Tensor) -> bool:
    """Is this torch's own linear layer as it is made, in the dtype of ``input``, and does nothing else happen where it
    is called?"""
    if type(layer) is not torch.nn.Linear or "forward" in layer.__dict__ or layer._compiled_call_impl is not None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    weight, width = layer.weight, input.shape[-1]
    if layer.bias is not None and layer.bias.shape != (width,):
        return False
    if weight.shape != (width, width) or weight.dtype is not input.dtype or not weight.is_cpu:
        return False
    return is_plain(weight) and not _has_any_global_hook()


def _check_choice(name: str, given: str | None, accepted: Sequence[str | None]) -> None:
    if given not in accepted:
        raise ValueError(f"{name}={given!r} is not accepted: it must be one of {', '.join(map(repr, accepted))}")
