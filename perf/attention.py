"""Attention's layers: what is compiled without a GPU, measured with one, and the bytes each kernel should move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.device import DeviceSpec
from ..autotune.recorded import Recorded, spelled
from ..autotune.workload import (
    ALL_LAYERS,
    DTYPES,
    PRECISIONS,
    Case,
    Kernel,
    Layers,
    Operator,
    Shape,
    dtype_and_options,
    random_tensors,
    stream_us,
)
from ..ops import attention


class Layer(NamedTuple):
    """One attention of a model; ``kv_heads`` 0: as many as of the query; ``bias``: the dimensions of "bhmn" it has."""

    B: int
    H: int
    M: int
    N: int
    D: int
    kv_heads: int = 0
    causal: bool = False
    masked: bool = False
    bias: str = ""
    score: str = "dot"

    @property
    def group(self) -> int:
        return self.H // (self.kv_heads or self.H)


LAYERS = {
    "gpt-64": Layer(8, 16, 2048, 2048, 64, causal=True),
    "llama-128": Layer(2, 32, 4096, 4096, 128, kv_heads=8, causal=True),
    "dit-64": Layer(8, 16, 4096, 4096, 64),
    "vit-64": Layer(64, 12, 197, 197, 64),
    "bert-64-mask": Layer(16, 12, 512, 512, 64, masked=True),
    "bert-64-additive": Layer(16, 12, 512, 512, 64, bias="bn"),
    "t5-64-bias": Layer(8, 12, 512, 512, 64, bias="hmn"),
    "pairs-32-bias": Layer(128, 4, 256, 256, 32, bias="hmn"),
    "cross-128": Layer(4, 16, 1024, 4096, 128),
    "gemma-256": Layer(2, 8, 2048, 2048, 256, kv_heads=4, causal=True),
    "phi-80": Layer(4, 32, 2048, 2048, 80, causal=True),
    "cosine-64": Layer(8, 16, 2048, 2048, 64, score="cosine"),
    "cosine-128": Layer(4, 16, 2048, 2048, 128, causal=True, score="cosine"),
    "swin-32": Layer(1024, 4, 64, 64, 32, bias="hmn", score="cosine"),
    "pool-64": Layer(256, 4, 1, 197, 64, score="cosine"),
}
# Compiled in the narrower precisions, too, and for every target.
HEADLINE = ("gpt-64", "llama-128", "cosine-64", "t5-64-bias")


def problem_of(layer: Layer, dtype: torch.dtype, precision: str, saves: bool) -> Any:
    from ..kernels.attention import AttentionProblem

    return AttentionProblem(
        layer.B, layer.H, layer.M, layer.N, layer.D, layer.D, layer.group, dtype, precision,
        0 if layer.causal else None, layer.masked, dtype if layer.bias else None, layer.bias,
        layer.score == "cosine" and not layer.bias, saves,
    )  # fmt: skip


def layers(target: str) -> Iterator[Layers]:
    from ..kernels import attention as kernels

    for name, layer in LAYERS.items():
        if target not in ALL_LAYERS and name not in HEADLINE:
            continue
        for label in ("bf16", "fp16", "tf32", "ieee") if name in HEADLINE else ("bf16",):
            dtype, precision = PRECISIONS[label]
            problem = problem_of(layer, dtype, precision, True)
            # In fp32 wider heads, and those with a bias, have no tile that spills with no Triton from 3.6 to 3.9.
            if dtype is not torch.float32 or name == "gpt-64":
                for tunable in (kernels.FORWARD, kernels.DELTA, kernels.KEY_VALUE_GRAD, kernels.QUERY_GRAD):
                    yield f"{name}-{label}", tunable, problem
            if layer.bias:
                yield f"{name}-{label}", kernels.BIAS_GRAD, problem
            if layer.score == "cosine":
                rows = kernels.NormalizeProblem(layer.B * layer.H * layer.M, layer.D, dtype)
                yield f"{name}-{label}", kernels.NORMALIZE, rows
                yield f"{name}-{label}", kernels.NORMALIZE_GRAD, rows


# --- calls that are compared -----------------------------------------------------------------------------------------


def _ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    out: Tensor = attention(query, key, value, attn_mask=_mask(query, key, options.pop("masked", False)), bias=bias,
                            enable_gqa=True, **options)  # fmt: skip
    return out


def _torch(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, score: str = "dot",
    scale: float | None = None, is_causal: bool = False, masked: bool = False, precision: str | None = None,
) -> Tensor:  # fmt: skip
    """torch's fused attention; rows are normalised before it, where scores are cosines."""
    if score == "cosine":
        query, key = (F.normalize(t, dim=-1, eps=1e-6) for t in (query, key))
    mask = bias if bias is not None else _mask(query, key, masked)
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=True)


def _mask(query: Tensor, key: Tensor, masked: bool) -> Tensor | None:
    """[B, 1, 1, N]: sequences of different lengths, padded."""
    if not masked:
        return None
    batch, n = query.shape[0], key.shape[2]
    lengths = n - torch.arange(batch, device=query.device) % max(1, n // 2)
    return (torch.arange(n, device=query.device) < lengths.unsqueeze(1)).view(batch, 1, 1, n)


def case(
    name: str, *, layer: Layer | None = None, dtype: str = "bf16", direction: str = "fwd", rank: int = 1
) -> Case:  # fmt: skip
    layer = LAYERS[name] if layer is None else layer
    kv_heads = layer.kv_heads or layer.H
    sizes = {"b": layer.B, "h": layer.H, "m": layer.M, "n": layer.N}
    shapes: dict[str, Shape] = {
        "query": (layer.B, layer.H, layer.M, layer.D), "key": (layer.B, kv_heads, layer.N, layer.D),
        "value": (layer.B, kv_heads, layer.N, layer.D),
    }  # fmt: skip
    if layer.bias:
        shapes["bias"] = tuple(size if dim in layer.bias else 1 for dim, size in sizes.items())
    kwargs: dict[str, Any] = {"is_causal": True} if layer.causal else {}
    if layer.masked:
        kwargs["masked"] = True
    if layer.score == "cosine":
        kwargs |= {"score": "cosine", "scale": 10.0}
    dtype, options = dtype_and_options(dtype)
    kwargs |= options
    return Case(name, "attention", shapes, kwargs, dtype, "", direction, rank)


def layer_of(one: Case) -> Layer:
    b, h, m, d = one.shapes["query"]
    kv_heads, n = one.shapes["key"][1:3]
    dims = "".join(dim for dim, size in zip("bhmn", one.shapes.get("bias", (1, 1, 1, 1)), strict=True) if size != 1)
    return Layer(
        b, h, m, n, d, kv_heads, one.kwargs.get("is_causal", False), one.kwargs.get("masked", False), dims,
        one.kwargs.get("score", "dot"),
    )  # fmt: skip


def _describe(one: Case) -> str:
    layer = layer_of(one)
    options = [f"kv{layer.kv_heads}"] if layer.group > 1 else []
    options += ["cosine"] if layer.score == "cosine" else []
    options += [word for word in ("causal", "masked") if getattr(layer, word)]
    options += [f"bias-{layer.bias}"] if layer.bias else []
    return " ".join([f"{layer.B}x{layer.H} {layer.M}x{layer.N} d{layer.D}", *options])


def _floor_us(one: Case, device: DeviceSpec) -> float:
    """Products at the rate of their unit, those of hidden keys left out, or every tensor once over the memory bus.
    Backward multiplies five times where forward does twice; ours, without atomics, seven times."""
    layer, trains = layer_of(one), one.direction != "fwd"
    precision = one.precision if one.dtype == "fp32" else "16"
    problem = problem_of(layer, DTYPES[one.dtype], precision, trains)
    flops = 4.0 * layer.B * layer.H * problem.pairs * layer.D * (3.5 if trains else 1)
    elements = (2 * layer.B * layer.H * layer.M + 2 * layer.B * layer.H // layer.group * layer.N) * layer.D
    rate = device.tflops("ieee" if precision == "fp32" else precision)
    return stream_us(elements * (3 if trains else 1), flops, DTYPES[one.dtype].itemsize, rate, device)


def _tiny(one: Case) -> Case:
    layer = layer_of(one)
    heads = 2 * layer.group if layer.group > 1 else 2
    small = layer._replace(
        B=min(layer.B, 2), H=heads, M=min(layer.M, 18), N=min(layer.N, 20), D=min(layer.D, 16),
        kv_heads=heads // layer.group,
    )  # fmt: skip
    return replace(case(one.name, layer=small, dtype=one.precision), direction=one.direction, rank=one.rank)


OPERATORS = {"attention": Operator(_ours, _torch, None, ("tritune", "torch"), _describe, _floor_us, _tiny)}


def _cases() -> Iterable[Case]:
    first = ("gpt-64", "llama-128", "cosine-64")
    for name in first:
        yield case(name, rank=0)
    for name in first[:2]:
        yield case(name, direction="fwd+bwd", rank=0)
    for name in LAYERS:
        if name not in first:
            yield case(name, rank=1)
    for name in ("cosine-64", "dit-64", "t5-64-bias", "bert-64-mask", "vit-64", "swin-32", "gemma-256"):
        yield case(name, direction="fwd+bwd", rank=2)
    yield case("llama-128", dtype="fp16", rank=3)
    yield case("gpt-64", dtype="tf32", rank=3)


CASES = tuple(_cases())


# --- kernels by themselves -------------------------------------------------------------------------------------------

TUNED = ("gpt-64", "llama-128", "dit-64", "cosine-64", "gemma-256", "vit-64")
GRADIENTS = {"key_value_grad": ("key", "value"), "query_grad": ("query",)}


def explicit(
    op: str, query: Shape, key: Shape | None = None, *, causal: int = 0, masked: int = 0, bias: str = "",
    score: str = "dot",
) -> Case:  # fmt: skip
    """``bias``: the dimensions of "bhmn" that it has."""
    b, h, m, d = query
    batch, kv_heads, n, features = key or query
    if (batch, features) != (b, d) or h % kv_heads:
        raise ValueError("key must have the query's batch and features and a divisor of its heads")
    if score not in ("dot", "cosine") or set(bias) - set("bhmn"):
        raise ValueError(f"score is dot or cosine, bias some of bhmn; not {score!r} and {bias!r}")
    layer = Layer(b, h, m, n, d, kv_heads, bool(causal), bool(masked), bias, score)
    return case("explicit", layer=layer, direction="fwd+bwd")


def recorded(call: Recorded) -> tuple[str, str] | None:
    if call.op not in ("attention", "attention_pool", "scaled_dot_product_attention"):
        return None
    call.allow("scale", "is_causal", "enable_gqa", "score", "return_lse", "eps", "causal_alignment", dropout_p=0.0)
    query, key, value = (call.shapes[name] for name in ("query", "key", "value"))
    if value[-1] != key[-1]:
        raise ValueError("the value has other features than the key")
    if call.kwargs.get("causal_alignment") == "bottom_right" and query[-2] != key[-2]:
        raise ValueError("no layer is causal from the bottom right")
    query, key = ((1,) * (4 - len(shape)) + shape for shape in (query, key))
    batch = math.prod(torch.broadcast_shapes(query[:-3], key[:-3]))
    options = {"score": call.kwargs.get("score"), "causal": 1 if call.kwargs.get("is_causal") else None}
    for name in ("attn_mask", "bias"):
        if name in call.shapes:
            if call.dtypes.get(name) == "bool":
                options["masked"] = 1
            else:
                sizes = ((1,) * 4 + call.shapes[name])[-4:]
                options["bias"] = "".join(letter for letter, size in zip("bhmn", sizes, strict=True) if size > 1)
    return "attention", spelled([(batch, *query[-3:]), (batch, *key[-3:])], options)


def kinds(one: Case) -> tuple[str, ...]:
    return ("fwd", *GRADIENTS)


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    """For a gradient also what forward leaves."""
    t = random_tensors(OPERATORS["attention"], one, device, seed)
    if layer_of(one).score == "cosine":
        t |= {name: F.normalize(t[name], dim=-1) for name in ("query", "key")}
    if kind == "fwd":
        return t
    out, stats = _forward(_problem_of_case(one, t), one, t)
    return {**t, "out": out, "stats": stats, **_recorded(one, t)}


def _forward(problem: Any, one: Case, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ours, as training needs it: ``(out, stats)``."""
    from ..kernels import attention as kernels

    q = t["query"]
    out = q.new_empty(*q.shape[:3], problem.DV)
    stats = q.new_empty(problem.parts, *q.shape[:3], dtype=torch.float32)
    kernels.run_forward(problem, *_operands(t), _scores(one, t), out, None, stats)
    return out, stats


def _operands(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return t["query"], t["key"], t["value"]


def _scores(one: Case, t: dict[str, Tensor]) -> Any:
    from ..kernels.attention import Scores

    return Scores(_mask(t["query"], t["key"], layer_of(one).masked), t.get("bias"), _scale(one))


def _recorded(one: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's forward with its graph, so that its backward can be timed alone: ``"y"``, and leaves to differentiate."""
    with torch.enable_grad():
        leaves = {name: t[name].detach().requires_grad_() for name in ("query", "key", "value")}
        return {**leaves, "y": _torch_alone(one, {**t, **leaves})}


def _torch_alone(one: Case, t: dict[str, Tensor]) -> Tensor:
    """torch's attention on rows that are normalised already."""
    options = {name: value for name, value in one.kwargs.items() if name not in ("score", "precision")}
    return _torch(*_operands(t), t.get("bias"), **options)


def _scale(one: Case) -> float:
    return float(one.kwargs.get("scale", one.shapes["query"][3] ** -0.5))


def _problem_of_case(one: Case, tensors: dict[str, Tensor]) -> Any:
    precision = one.kwargs.get("precision", "ieee") if tensors["query"].dtype == torch.float32 else "16"
    return problem_of(layer_of(one), tensors["query"].dtype, precision, True)


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    """Cosine scores find their rows normalised: the kernel runs alone."""
    from ..kernels import attention as kernels

    problem = _problem_of_case(one, tensors)
    if kind == "fwd":
        return Kernel(kernels.FORWARD, problem, lambda t: _forward(problem, one, t)[0], lambda t: _torch_alone(one, t))

    names = GRADIENTS[kind]

    def gradients(t: dict[str, Tensor]) -> Tensor:
        dq, dk, dv = grads = [
            torch.empty_like(t[name]) if name in names else None for name in ("query", "key", "value")
        ]
        kernels.run_backward(
            problem, *_operands(t), _scores(one, t), t["out"], t["stats"], t["dy"], None, dq, dk, dv, None
        )  # fmt: skip
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    def their_gradients(t: dict[str, Tensor]) -> Tensor:
        if t["query"].dtype != tensors["query"].dtype:  # the reference, in float64
            t = {**t, **_recorded(one, t)}
        leaves = [t[name] for name in names]
        grads = torch.autograd.grad(t["y"], leaves, t["dy"], retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    tunable = kernels.KEY_VALUE_GRAD if kind == "key_value_grad" else kernels.QUERY_GRAD
    return Kernel(tunable, problem, gradients, their_gradients)
