r"""Attention with dot-product or cosine scores, forward and backward, without a matrix of scores in memory.

    s_ij = scale * q_i . k_j + bias_ij          -inf where the mask, or causality (j > i + shift), hides key j
    out_i = sum_j exp(s_ij - lse_i) v_j         lse_i = log sum_j exp(s_ij)

For cosine scores another kernel has divided each row of query and key by its length before.

The letters: B sequences, H query heads, GROUP query heads that share a head of key and value, M queries, N keys, D
numbers in a row of query and key, DV in one of value; rows are padded to a power of two with zeros. A program computes
BLOCK_M queries of one head, or in the gradients of key and value BLOCK_N keys.

This file plans the launches, registers the kernels with the tuner and calls them; other folders import the family from
here. The formulas and the bytes of each pass stand at the head of the file that computes it:

    attention_tiles.py        tiles of queries, keys and scores, for all kernels
    attention_forward.py      forward, and what it stores for the backward
    attention_backward.py     the gradients of key and value, of query, and of a bias
    attention_normalize.py    rows of unit length, for cosine scores
    attention_problem.py      the sizes and options that launches and configs depend on
    attention_space.py        configs: which there are, which fit, what they move, how long they take

Deterministic: each element is written once, by one program, which adds in a fixed order. No atomics.
"""

from __future__ import annotations

from functools import partial

import torch

from ..autotune import cost
from ..autotune.config import Config, Tunable, register
from ._launch import Launch, launch, readable, strides, unit_divisor
from .attention_backward import bias_grad_kernel, delta_kernel, key_value_grad_kernel, query_grad_kernel
from .attention_forward import attention_kernel
from .attention_normalize import normalize_grad_kernel, normalize_kernel
from .attention_problem import AttentionProblem, NormalizeProblem, Scores, bias_tile_count, lse_parts
from .attention_space import (
    ROWS,
    TILES,
    accepts,
    accepts_rows,
    due_load_bytes,
    due_load_bytes_of_tiles,
    estimate,
    estimate_rows,
    features,
    moved_bias_grad,
    moved_delta,
    moved_forward,
    moved_key_value_grad,
    moved_normalize,
    moved_normalize_grad,
    moved_query_grad,
    normalize_features,
    product_rows_bias_grad,
    product_rows_forward,
    product_rows_key_value_grad,
    product_rows_query_grad,
    row_features,
)

# --- launchers -------------------------------------------------------------------------------------------------------


def _operand_arguments(**tensors: torch.Tensor) -> tuple[dict[str, object], int]:
    """``(arguments, vec)``: pointers and strides of [B, H, S, D] tensors. Strides are in units of ``vec`` elements, the
    widest load that every row of every tensor allows; the kernels multiply by it, so that the compiler knows that rows
    are aligned."""
    raw = {name: strides(t)[:3] for name, t in tensors.items()}
    itemsize = max(t.dtype.itemsize for t in tensors.values())
    vec = unit_divisor(16 // itemsize, *(stride for row in raw.values() for stride in row))
    args: dict[str, object] = {f"{name}_ptr": t for name, t in tensors.items()}
    for name, row in raw.items():
        args.update({f"stride_{name}{dim}": stride // vec for dim, stride in zip("bhs", row, strict=True)})
    return args, vec


def _score_arguments(name: str, t: torch.Tensor | None) -> tuple[dict[str, object], int]:
    """``(arguments, vec)``: pointer and strides of a mask or bias [B or 1, H or 1, M or 1, N or 1]. A dimension of size
    1 has a stride of 0, so that its one element serves all. Strides but the last are in units of ``vec`` elements."""
    if t is None:
        zeros = {f"stride_{name}_{dim}": 0 for dim in "bhm"}
        return {f"{name}_ptr": None, **zeros, f"stride_{name}_n": 0}, 1
    *outer, inner = strides(t)
    vec = unit_divisor(16 // t.dtype.itemsize, *outer) if inner == 1 else 1
    pointer = t.view(torch.uint8) if t.dtype is torch.bool else t
    args: dict[str, object] = {f"{name}_ptr": pointer, f"stride_{name}_n": inner}
    args.update({f"stride_{name}_{dim}": stride // vec for dim, stride in zip("bhm", outer, strict=True)})
    return args, vec


def _launch(
    kernel: object, p: AttentionProblem, config: Config, grid: int, tensors: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor | None], scores: Scores, constants: dict[str, object], **sizes: int,
) -> Launch:  # fmt: skip
    """The launch of a kernel that takes [B, H, S, D] ``tensors``, contiguous [B, H, M] ``rows``, mask and bias."""
    args, vec = _operand_arguments(**tensors)
    mask_args, mask_vec = _score_arguments("mask", scores.mask)
    bias_args, bias_vec = _score_arguments("bias", scores.bias)
    args.update(mask_args, **bias_args, **{f"{name}_ptr": t for name, t in rows.items()}, **sizes)
    args.update(H=p.H, M=p.M, N=p.N, shift=p.shift or 0, scale=float(scores.scale))
    constants = {
        "D": p.D, "DV": p.DV, "BLOCK_D": p.block_d, "BLOCK_DV": p.block_dv, "GROUP": p.group, "VEC": vec,
        "MASK_VEC": mask_vec, "BIAS_VEC": bias_vec, "CAUSAL": p.shift is not None, "UNIT": p.unit,
        "PRECISION": p.precision.replace("16", "ieee"), **constants, **config.constants(),
    }  # fmt: skip
    return Launch(kernel, grid, args, constants, config.num_warps, config.num_stages)


def plan_forward(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    out: torch.Tensor, lse: torch.Tensor | None, stats: torch.Tensor | None,
) -> list[Launch]:  # fmt: skip
    top, rest = (None, None) if stats is None else lse_parts(stats)
    grid = cost.cdiv(p.M, config.BLOCK_M) * p.B * p.H
    return [
        _launch(
            attention_kernel, p, config, grid, {"q": q, "k": k, "v": v, "o": out},
            {"lse": lse, "top": top, "rest": rest}, scores, {"BOUNDED": p.bounded},
        )
    ]  # fmt: skip


def plan_delta(
    p: AttentionProblem, config: Config, out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None,
    delta: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    args, vec = _operand_arguments(o=out, do=dout)
    args.update(dlse_ptr=dlse, delta_ptr=delta, H=p.H, M=p.M)
    constants = {"DV": p.DV, "BLOCK_DV": p.block_dv, "VEC": vec, **config.constants()}
    grid = cost.cdiv(p.M, config.BLOCK_M) * p.B * p.H
    return [Launch(delta_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_key_value_grad(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    dout: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    top, rest = lse_parts(stats)
    grid = cost.cdiv(p.N, config.BLOCK_N) * p.B * (p.H // p.group)
    return [
        _launch(
            key_value_grad_kernel, p, config, grid, {"q": q, "k": k, "v": v, "do": dout, "dk": dk, "dv": dv},
            {"top": top, "rest": rest, "delta": delta}, scores, {},
        )
    ]  # fmt: skip


def plan_query_grad(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    dout: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor, dq: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    top, rest = lse_parts(stats)
    grid = cost.cdiv(p.M, config.BLOCK_M) * p.B * p.H
    return [
        _launch(
            query_grad_kernel, p, config, grid, {"q": q, "k": k, "v": v, "do": dout, "dq": dq},
            {"top": top, "rest": rest, "delta": delta}, scores, {},
        )
    ]  # fmt: skip


def plan_bias_grad(
    p: AttentionProblem, config: Config, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    dout: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor, dbias: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    top, rest = lse_parts(stats)
    sums = {f"SUM_{dim.upper()}": dim not in p.bias_dims for dim in "bhmn"}
    return [
        _launch(
            bias_grad_kernel, p, config, bias_tile_count(p, config), {"q": q, "k": k, "v": v, "do": dout},
            {"top": top, "rest": rest, "delta": delta, "dbias": dbias}, scores, sums, B=p.B,
        )
    ]  # fmt: skip


def plan_normalize(
    p: NormalizeProblem, config: Config, x: torch.Tensor, limit: float, out: torch.Tensor, inverse: torch.Tensor
) -> list[Launch]:  # fmt: skip
    args, vec = _operand_arguments(q=x, o=out)
    args.update(inverse_ptr=inverse)
    return _row_launches(normalize_kernel, p, config, args, vec, x, limit)


def plan_normalize_grad(
    p: NormalizeProblem, config: Config, out: torch.Tensor, dout: torch.Tensor, inverse: torch.Tensor, limit: float,
    dx: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    args, vec = _operand_arguments(o=out, do=dout, dq=dx)
    args.update(inverse_ptr=inverse)
    return _row_launches(normalize_grad_kernel, p, config, args, vec, out, limit)


def _row_launches(
    kernel: object, p: NormalizeProblem, config: Config, args: dict[str, object], vec: int, like: torch.Tensor,
    limit: float,
) -> list[Launch]:  # fmt: skip
    """The launch of a kernel over the rows of ``like`` [B, H, M, D]."""
    b, h, m, _ = like.shape
    args.update(H=h, M=m, limit=float(limit))
    constants = {"D": p.D, "BLOCK_D": p.block_d, "VEC": vec, **config.constants()}
    return [Launch(kernel, cost.cdiv(m, config.BLOCK_M) * b * h, args, constants, config.num_warps, config.num_stages)]


# --- what the tuner is told ------------------------------------------------------------------------------------------


def _meta(p: AttentionProblem | NormalizeProblem, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or p.dtype, device="meta")


def _example_tensors(p: AttentionProblem) -> dict[str, torch.Tensor]:
    """The tensors of a problem by name, contiguous, on the meta device, because a launch that is only compiled needs no
    data."""
    q, out = _meta(p, p.B, p.H, p.M, p.D), _meta(p, p.B, p.H, p.M, p.DV)
    k, v = _meta(p, p.B, p.H // p.group, p.N, p.D), _meta(p, p.B, p.H // p.group, p.N, p.DV)
    stats = _meta(p, p.parts, p.B, p.H, p.M, dtype=torch.float32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "stats": stats,
        "delta": _meta(p, p.B, p.H, p.M, dtype=torch.float32),
    }


def _example_scores(p: AttentionProblem) -> Scores:
    """A mask and a bias as the problem has them, on the meta device, and some scale."""
    sizes = {"b": p.B, "h": p.H, "m": p.M, "n": p.N}
    bias = (sizes[dim] if dim in p.bias_dims else 1 for dim in "bhmn")
    return Scores(
        _meta(p, p.B, 1, p.M, p.N, dtype=torch.bool) if p.masked else None,
        _meta(p, *bias, dtype=p.bias) if p.bias else None, 0.125,
    )  # fmt: skip


def _forward_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example_tensors(p)
    lse = None if p.saves else t["delta"]
    stats = t["stats"] if p.saves else None
    return plan_forward(p, config, t["q"], t["k"], t["v"], _example_scores(p), t["out"], lse, stats)


def _delta_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example_tensors(p)
    return plan_delta(p, config, t["out"], _meta(p, *t["out"].shape), None, t["delta"])


def _key_value_grad_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example_tensors(p)
    grads = (_meta(p, *t[name].shape) for name in ("k", "v"))
    return plan_key_value_grad(
        p, config, t["q"], t["k"], t["v"], _example_scores(p), t["out"], t["stats"], t["delta"], *grads
    )  # fmt: skip


def _query_grad_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t = _example_tensors(p)
    dq = _meta(p, *t["q"].shape)
    return plan_query_grad(
        p, config, t["q"], t["k"], t["v"], _example_scores(p), t["out"], t["stats"], t["delta"], dq
    )  # fmt: skip


def _bias_grad_launches(p: AttentionProblem, config: Config) -> list[Launch]:
    t, scores = _example_tensors(p), _example_scores(p)
    assert scores.bias is not None
    dbias = torch.empty_like(scores.bias)
    return plan_bias_grad(p, config, t["q"], t["k"], t["v"], scores, t["out"], t["stats"], t["delta"], dbias)


def _normalize_launches(p: NormalizeProblem, config: Config) -> list[Launch]:
    x, out = _meta(p, 1, 1, p.rows, p.D), _meta(p, 1, 1, p.rows, p.D)
    return plan_normalize(p, config, x, 1e6, out, _meta(p, 1, 1, p.rows, dtype=torch.float32))


def _normalize_grad_launches(p: NormalizeProblem, config: Config) -> list[Launch]:
    out, dout, dx = (_meta(p, 1, 1, p.rows, p.D) for _ in range(3))
    return plan_normalize_grad(p, config, out, dout, _meta(p, 1, 1, p.rows, dtype=torch.float32), 1e6, dx)


FORWARD = register(
    Tunable(
        "attention", TILES, features, partial(accepts, "forward"), partial(estimate, "forward"), _forward_launches,
        moved_bytes=moved_forward, product_rows=product_rows_forward, due_load_bytes=due_load_bytes_of_tiles,
    )
)  # fmt: skip
DELTA = register(
    Tunable(
        "attention_delta", ROWS, row_features, accepts_rows, partial(estimate_rows, passes=2), _delta_launches,
        moved_bytes=moved_delta, due_load_bytes=due_load_bytes,
    )
)  # fmt: skip
# No load width is demanded: lse and delta of the streamed queries are loaded in the layout of the products, in which a
# thread's elements are not neighbours, so these loads are four bytes wide.
KEY_VALUE_GRAD = register(
    Tunable(
        "attention_key_value_grad", TILES, features, partial(accepts, "key_value_grad"),
        partial(estimate, "key_value_grad"), _key_value_grad_launches, moved_bytes=moved_key_value_grad,
        product_rows=product_rows_key_value_grad,
    )
)  # fmt: skip
QUERY_GRAD = register(
    Tunable(
        "attention_query_grad", TILES, features, partial(accepts, "query_grad"), partial(estimate, "query_grad"),
        _query_grad_launches, moved_bytes=moved_query_grad, product_rows=product_rows_query_grad,
        due_load_bytes=due_load_bytes_of_tiles,
    )
)  # fmt: skip
BIAS_GRAD = register(
    Tunable(
        "attention_bias_grad", TILES, features, partial(accepts, "bias_grad"), partial(estimate, "bias_grad"),
        _bias_grad_launches, moved_bytes=moved_bias_grad, product_rows=product_rows_bias_grad,
        due_load_bytes=due_load_bytes_of_tiles,
    )
)  # fmt: skip
NORMALIZE = register(
    Tunable(
        "attention_normalize", ROWS, normalize_features, accepts_rows, partial(estimate_rows, passes=2),
        _normalize_launches, moved_bytes=moved_normalize, due_load_bytes=due_load_bytes,
    )
)  # fmt: skip
NORMALIZE_GRAD = register(
    Tunable(
        "attention_normalize_grad", ROWS, normalize_features, accepts_rows, partial(estimate_rows, passes=3),
        _normalize_grad_launches, moved_bytes=moved_normalize_grad, due_load_bytes=due_load_bytes,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def _readable_rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` [B, H, S, D] itself if the kernels can read it in place, else a copy: the numbers of a row must be
    neighbours in memory, and the offsets of the rows of a tile must fit 32 bits."""
    return readable(t, unit=3, tile=(2,))


def run_forward(
    p: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores,
    out: torch.Tensor, lse: torch.Tensor | None, stats: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills out [B, H, M, DV] and, where they are given, lse [B, H, M] and stats [parts, B, H, M], which
    :func:`run_backward` reads."""
    q, k, v = (_readable_rows(t) for t in (q, k, v))
    launch(FORWARD, plan_forward, p, q, k, v, scores.readable(), out, lse, stats)


def run_backward(
    p: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, out: torch.Tensor,
    stats: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None,
    dq: torch.Tensor | None, dk: torch.Tensor | None, dv: torch.Tensor | None, dbias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills those of dq, dk, dv and dbias that are not None; dk and dv are given both or neither."""
    q, k, v, out, dout = (_readable_rows(t) for t in (q, k, v, out, dout))
    scores, stats = scores.readable(), readable(stats, dense=True)
    dlse = None if dlse is None else readable(dlse, dense=True)
    delta = q.new_empty(p.B, p.H, p.M, dtype=torch.float32)
    launch(DELTA, plan_delta, p, out, dout, dlse, delta)
    common = (q, k, v, scores, dout, stats, delta)
    if dk is not None:
        launch(KEY_VALUE_GRAD, plan_key_value_grad, p, *common, dk, dv)
    if dq is not None:
        launch(QUERY_GRAD, plan_query_grad, p, *common, dq)
    if dbias is not None:
        launch(BIAS_GRAD, plan_bias_grad, p, *common, dbias)


def run_normalize(
    p: NormalizeProblem, x: torch.Tensor, eps: float, out: torch.Tensor, inverse: torch.Tensor
) -> None:  # fmt: skip
    """Fills out [B, H, M, D] with ``x / max(|x|, eps)`` of each row, and inverse [B, H, M] with 1 over the divisor."""
    launch(NORMALIZE, plan_normalize, p, _readable_rows(x), 1.0 / eps, out, inverse)


def run_normalize_grad(
    p: NormalizeProblem, out: torch.Tensor, inverse: torch.Tensor, dout: torch.Tensor, eps: float, dx: torch.Tensor
) -> None:  # fmt: skip
    """Fills dx [B, H, M, D] from the results of :func:`run_normalize` and the gradient ``dout``."""
    inverse = readable(inverse, dense=True)
    launch(NORMALIZE_GRAD, plan_normalize_grad, p, _readable_rows(out), _readable_rows(dout), inverse, 1.0 / eps, dx)
