"""Attention rejects what torch's rejects, with its exception type and text, on every kind of tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_errors import PLACES, assert_same_error, at, call, outcome

import tritune

pytestmark = pytest.mark.torch

sdpa = tritune.scaled_dot_product_attention


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


Q, K, V = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)

REJECTED = {
    "one dimension": lambda: call(x(8), x(8), x(8)),
    "one dimension of the query": lambda: call(x(8), x(*K), x(*V)),
    "features": lambda: call(x(*Q), x(2, 3, 7, 4), x(*V)),
    "heads": lambda: call(x(2, 6, 5, 8), x(*K), x(*V)),
    "batch": lambda: call(x(3, 3, 5, 8), x(*K), x(*V)),
    "a dimension more": lambda: call(x(4, 2, 6, 5, 8), x(*K), x(*V)),
    "dtype of key": lambda: call(x(*Q), x(*K, dtype=torch.float64), x(*V)),
    "dtype of value": lambda: call(x(*Q), x(*K), x(*V, dtype=torch.bfloat16)),
    "integers": lambda: call(x(*Q, dtype=torch.int32), x(*K, dtype=torch.int32), x(*V, dtype=torch.int32)),
    "booleans": lambda: call(x(*Q, dtype=torch.bool), x(*K, dtype=torch.bool), x(*V, dtype=torch.bool)),
    "complex": lambda: call(*(x(*s, dtype=torch.complex64) for s in (Q, K, V))),
    "integer mask": lambda: call(x(*Q), x(*K), x(*V), x(5, 7, dtype=torch.int32)),
    "double mask": lambda: call(x(*Q), x(*K), x(*V), x(5, 7, dtype=torch.float64)),
    "half mask": lambda: call(x(*Q), x(*K), x(*V), x(5, 7, dtype=torch.float16)),
    "mask of another length": lambda: call(x(*Q), x(*K), x(*V), x(4, 7)),
    "mask of other heads": lambda: call(x(*Q), x(*K), x(*V), x(2, 5, 7)),
    "boolean mask of another length": lambda: call(x(*Q), x(*K), x(*V), x(5, 6, dtype=torch.bool)),
    "mask of more dimensions": lambda: call(x(*Q), x(*K), x(*V), x(9, 2, 3, 5, 7)),
    "dropout above 1": lambda: call(x(*Q), x(*K), x(*V), dropout_p=2.0),
    "groups that do not divide": lambda: call(x(2, 4, 5, 8), x(*K), x(*V), enable_gqa=True),
    "fewer heads than groups": lambda: call(x(2, 1, 5, 8), x(*K), x(*V), enable_gqa=True),
    "no query": lambda: call(None, x(*K), x(*V)),
    "a list": lambda: call(x(*Q), [1], x(*V)),
    "a mask of text": lambda: call(x(*Q), x(*K), x(*V), "a"),
    "a scale of text": lambda: call(x(*Q), x(*K), x(*V), scale="a"),
    "a causality of text": lambda: call(x(*Q), x(*K), x(*V), is_causal="a"),
    "a causality of None": lambda: call(x(*Q), x(*K), x(*V), is_causal=None),
    "groups of text": lambda: call(x(*Q), x(*K), x(*V), enable_gqa="a"),
    "a scale of two numbers": lambda: call(x(*Q), x(*K), x(*V), scale=torch.ones(2)),
    "a seventh position": lambda: call(x(*Q), x(*K), x(*V), None, 0.0, False, 1.0),
}
# torch words these after the function that happened to notice, with sizes of its own making.
ONLY_THE_TYPE = ("a seventh position", "booleans", "integers")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("made", REJECTED)
def test_what_torch_rejects(made, place):
    arguments = REJECTED[made]()
    wanted = outcome(F.scaled_dot_product_attention, arguments)
    got = outcome(sdpa, at(place, arguments))
    assert_same_error(wanted, got, arguments, made not in ONLY_THE_TYPE)


def test_devices():
    made = call(x(*Q), x(*K).to("meta"), x(*V))
    assert_same_error(outcome(F.scaled_dot_product_attention, made), outcome(sdpa, made), made)


class TestWhereTorchContradictsItself:
    """docs/differences.md has these: torch's backends disagree, or the default one reads beyond an end."""

    def test_values_of_another_length(self):
        with pytest.raises(RuntimeError, match="same length"):
            sdpa(x(*Q), x(*K), x(2, 3, 6, 4))

    def test_a_mask_with_causality(self):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            made = call(x(*Q), x(*K), x(*V), x(5, 7), is_causal=True)
            wanted = outcome(F.scaled_dot_product_attention, made)
        assert_same_error(wanted, outcome(sdpa, made), made)

    def test_negative_dropout(self):
        with pytest.raises(RuntimeError, match=r"between 0 and 1, but got -0\.1"):
            sdpa(x(*Q), x(*K), x(*V), dropout_p=-0.1)

    @pytest.mark.parametrize(
        "mask", [torch.tensor(1.5), torch.tensor(True), torch.randn(7)], ids=["0-d", "bool", "1-d"]
    )
    def test_masks_of_few_dimensions(self, mask):
        q, k, v = (torch.randn(s) for s in (Q, K, V))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            wanted = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(sdpa(q, k, v, mask), wanted)

    def test_groups_without_heads(self):
        with pytest.raises(RuntimeError, match="must divide"):
            sdpa(x(*Q), x(2, 0, 7, 8), x(2, 0, 7, 8), enable_gqa=True)

    def test_groups_without_a_dimension_of_heads(self):
        with pytest.raises(RuntimeError, match="dimension of heads"):
            sdpa(x(5, 8), x(7, 8), x(7, 8), enable_gqa=True)

    @pytest.mark.parametrize("scale", [0.0, -0.5])
    def test_a_scale_of_zero_or_less_with_causality(self, scale):
        q, k, v = (torch.randn(s) for s in (Q, (2, 3, 5, 8), (2, 3, 5, 8)))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            seen = torch.ones(5, 5, dtype=torch.bool).tril()
            wanted = F.scaled_dot_product_attention(q * scale, k, v, seen, scale=1.0)
        torch.testing.assert_close(sdpa(q, k, v, is_causal=True, scale=scale), wanted)


OURS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "score": ({"score": "l2"}, ValueError, "score='l2'"),
    "alignment": ({"causal_alignment": "middle"}, ValueError, "causal_alignment='middle'"),
    "precision": ({"precision": "bf16"}, ValueError, "precision='bf16'"),
    "precision of text": ({"precision": "None"}, ValueError, "precision='None'"),
    "eps": ({"eps": 0.0}, ValueError, "eps must be positive"),
    "eps NaN": ({"eps": float("nan")}, ValueError, "eps must be positive"),
    "float mask": ({"attn_mask": x(5, 7)}, RuntimeError, "attn_mask must be bool"),
    "mask of text": ({"attn_mask": "a"}, TypeError, "attn_mask must be a Tensor"),
    "bias of text": ({"bias": "a"}, TypeError, "bias must be a Tensor"),
    "integer bias": ({"bias": x(5, 7, dtype=torch.int64)}, RuntimeError, "Expected bias dtype"),
    "bias of another shape": ({"bias": x(5, 6)}, RuntimeError, "bias must be broadcastable"),
    "mask of another shape": ({"attn_mask": x(6, 7, dtype=torch.bool)}, RuntimeError, "attn_mask must be broadcast"),
    "scale of text": ({"scale": "big"}, TypeError, "scale must be a number"),
    "scale of integers": ({"scale": torch.ones(3, dtype=torch.int64)}, ValueError, "floating-point tensor"),
    "scale of other heads": ({"scale": torch.ones(4)}, RuntimeError, "one number or one a head"),
    "scale of two dimensions": ({"scale": torch.ones(3, 1)}, ValueError, "shape"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("made", OURS)
def test_keywords_of_attention(made, place):
    options, kind, text = OURS[made]
    moved = at(place, call(x(*Q), x(*K), x(*V), **options))
    with pytest.raises(kind, match=text):
        tritune.attention(*moved.args, **moved.kwargs)


@pytest.mark.parametrize("value", [None, [1.0], 3])
def test_no_tensor(value):
    with pytest.raises(TypeError, match="query must be a Tensor"):
        tritune.attention(value, x(*K), x(*V))
    with pytest.raises(TypeError, match="value must be a Tensor"):
        tritune.attention_pool(x(5, 8), x(7, 8), value)
