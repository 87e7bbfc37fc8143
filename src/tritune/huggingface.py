"""Attention of Hugging Face transformers: ``attn_implementation="tritune"``.

A model of that library asks two functions, which it finds by the name of its attention implementation: one makes the
mask, once for all layers, and one computes the attention of a layer. ``"eager"`` is the definition that both of ours
are held to. ``"sdpa"`` is the convention for models that know it: boolean masks, and none at all for plain causality.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import attention, scaled_dot_product_attention
from .ops._dispatch import Ruling, choose, constant, in_transform, is_jit_tracing

NAME = "tritune"


def register_with_transformers() -> None:
    r"""Registers ``attn_implementation="tritune"`` with Hugging Face transformers: attention and masks.

    .. math:: \mathrm{softmax}(softcap \cdot \tanh(scale \cdot Q K^T / softcap) + bias + mask)\, V

    Results and gradients are those of ``attn_implementation="eager"``, whatever :func:`use_backend` says. Causality,
    masks, windows (as masks), grouped heads, position biases and sinks (one more score of a row that takes weight and
    gives no value) run on the kernels. Dropout runs on torch, and so do soft caps and ``output_attentions=True``, which
    hold all scores in memory.

    Calling it again changes nothing.

    Raises:
        ImportError: if transformers is not installed, or too old to have an interface for masks.

    A model raises while it runs:
        ValueError: where it asks for sparse attention over chosen keys, or passes no mask and does not say whether that
            means causal.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        tritune.register_with_transformers()
        model = transformers.AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="tritune")
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_with_transformers needs Hugging Face transformers (pip install 'tritune[models]' has the version "
            f"that the tests run on), and its import failed: {error}"
        ) from error
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


# --- masks -----------------------------------------------------------------------------------------------------------


def make_mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """The mask of a model's forward, with the arguments of transformers' mask functions.

    A model that says that it runs with SDPA gets a boolean mask, True where a query sees a key, or ``None`` where there
    is none or causality is all. Any other may compute with the mask, as with the one of ``"eager"``, so it gets that:
    numbers to add, 0 or the smallest of their dtype.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    convention = "sdpa" if runs_with_sdpa(type(config)) else "eager"
    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[convention](*args, config=config, **options)
    return made


_run_with_sdpa: dict[type, bool] = {}


@constant  # Dynamo need not trace the walk over all models
def runs_with_sdpa(config: type) -> bool:
    """Do the models of this class of configurations say that they run with SDPA? No, if nobody knows the class."""
    known = _run_with_sdpa.get(config)
    if known is None:
        from transformers import PreTrainedModel

        models = [model for model in _subclasses(PreTrainedModel) if model.config_class is config]
        known = _run_with_sdpa[config] = bool(models) and all(model._supports_sdpa for model in models)
    return known


def _subclasses(of: Any) -> set[Any]:
    return set().union(*({one} | _subclasses(one) for one in of.__subclasses__()))


# --- attention -------------------------------------------------------------------------------------------------------

# Keywords by which a model leaves it to the attention which keys a query sees. Under "eager" it puts them in the mask.
SPARSE = ("indices", "block_indices")


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    output_attentions: bool | None = None,
    **ignored: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of a layer, with the arguments of transformers' attention functions.

    Args:
        module: the layer. Its ``is_causal`` counts where the argument is ``None``; dropout only while it is training.
        query: ``[B, H, M, D]``.
        key, value: ``[B, HK, N, D]`` and ``[B, HK, N, DV]``; each head serves H / HK consecutive heads of the query.
        attention_mask: bool, True where a query sees a key, or numbers to add; broadcastable to ``[B, H, M, N]``. Where
            it is ``None``, several queries of a causal layer see the keys up to their own position, and any other query
            sees all keys.
        scaling: default ``D ** -0.5``.
        position_bias: numbers to add to the scores, broadcastable like the mask.
        s_aux, sinks: one more score for each head, ``[H]``, or for each row, ``[B, H, M, 1]``.
        ignored: what ``"eager"`` ignores as well, such as ``sliding_window``, which is part of the mask.

    Returns:
        ``[B, M, H, DV]``, and with ``output_attentions`` the weights, ``[B, H, M, N]``, else ``None``.
    """
    for keyword in SPARSE:
        if ignored.get(keyword) is not None:
            raise ValueError(
                f"{type(module).__name__} asks for sparse attention ({keyword}), which {NAME!r} does not compute: "
                'use attn_implementation="eager"'
            )
    queries = query.shape[2]
    causal = attention_mask is None and queries > 1 and _none_means_causal(module, is_causal)
    if causal and key.shape[2] > queries:  # a static cache, of which the rest is empty
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    mask, bias = _mask_and_bias(query, attention_mask, position_bias)
    sinks = sinks if s_aux is None else s_aux.view(-1, 1, 1)

    beyond = _beyond_the_operators(softcap, output_attentions, dropout, sinks)
    if beyond:
        choose("attention", (query, key, value), lambda _: Ruling(False, beyond), lambda _: (), lambda: beyond)
        out, weights = _formula(query, key, value, mask, bias, scale, causal, softcap, sinks, dropout)
        return out.transpose(1, 2).contiguous(), weights if output_attentions else None

    grouped = query.shape[1] != key.shape[1]
    if dropout:
        both = bias if mask is None else mask if bias is None else torch.where(mask, bias, -torch.inf)
        out = scaled_dot_product_attention(query, key, value, both, dropout, causal, scale=scale, enable_gqa=grouped)
    elif sinks is None:
        out = attention(query, key, value, scale=scale, attn_mask=mask, bias=bias, is_causal=causal, enable_gqa=grouped)
    else:
        out, lse = attention(
            query, key, value, scale=scale, attn_mask=mask, bias=bias, is_causal=causal, enable_gqa=grouped,
            return_lse=True,
        )  # fmt: skip
        # exp(lse) of exp(lse) + exp(sink) is what the keys keep of the weight.
        out = (out * torch.sigmoid(lse.unsqueeze(-1) - sinks)).to(out.dtype)
    if attention_mask is not None and sinks is None:
        sees = _sees_a_key(attention_mask)
        if not (_may_be_asked(sees) and sees.all()):
            out = torch.where(sees, out, _mean(query, key, value, scale).to(out.dtype))
    return out.transpose(1, 2).contiguous(), None


def _none_means_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    """Does a layer that gets no mask mean causality? ``"eager"`` knows no such convention, ``"sdpa"`` does."""
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None or (causal and not runs_with_sdpa(type(getattr(module, "config", None)))):
        why = "does not say whether it is causal" if causal is None else "is of a model that does not run with SDPA"
        raise ValueError(
            f"{type(module).__name__} got no mask and {why}, so {NAME!r} cannot know which keys its queries see: "
            'use attn_implementation="eager"'
        )
    return bool(causal)


def _mask_and_bias(
    query: Tensor, attention_mask: Tensor | None, position_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """What is boolean, and the sum of what is added."""
    if attention_mask is None or attention_mask.dtype is torch.bool:
        mask, bias = attention_mask, position_bias
    else:
        mask, bias = None, attention_mask if position_bias is None else position_bias + attention_mask
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    return mask, bias


def _beyond_the_operators(
    softcap: float | None, output_attentions: bool | None, dropout: float, sinks: Tensor | None
) -> str | None:  # fmt: skip
    """Which argument needs the formula."""
    if softcap is not None:
        return f"softcap={softcap:g}"
    if output_attentions:
        return "output_attentions=True"
    return f"dropout={dropout:g} together with sinks" if dropout and sinks is not None else None


def _formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
    softcap: float | None, sinks: Tensor | None, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, weights)`` of the definition, with all scores at once and in float32 at least."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:  # the smallest number of 16 bits hides a key, of which float32 would keep the score
        hides = bias <= torch.finfo(bias.dtype).min
        scores = scores + torch.where(hides, torch.finfo(scores.dtype).min, bias.to(scores.dtype))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].to(value.dtype)
    weights = F.dropout(weights, dropout)
    return weights @ value, weights


# --- queries that see no key -----------------------------------------------------------------------------------------


def _sees_a_key(mask: Tensor) -> Tensor:
    """``[..., M, 1]``: not where all that a row of the mask adds is the smallest number."""
    if mask.dtype is torch.bool:
        return mask.any(-1, keepdim=True)
    return mask.detach().amax(-1, keepdim=True) > torch.finfo(mask.dtype).min


def _may_be_asked(t: Tensor) -> bool:
    """Does it cost nothing to look at the values?"""
    return type(t) is Tensor and t.is_cpu and not (torch.compiler.is_compiling() or in_transform() or is_jit_tracing())


def _mean(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What ``"eager"`` gives to a query that sees no key, while our operators give 0: ``[B, H, M or 1, DV]``.

    It adds the smallest number of the dtype to hidden scores, in whose rounding they vanish: all weights are 1 / N, and
    the result is the mean of the values. But its backward knows nothing of the rounding, and goes on into query and
    key as from scores of 0. So does the term that is added here, whose value is 0.
    """
    group = query.shape[1] // key.shape[1]
    mean = value.mean(-2, keepdim=True)
    full = mean.repeat_interleave(group, 1)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        slope = (key * (scale / key.shape[2])).transpose(-1, -2) @ (value - mean).detach()  # [B, HK, D, DV]
        first_order = query @ slope.repeat_interleave(group, 1)
        full = full + (first_order - first_order.detach())
    return full
