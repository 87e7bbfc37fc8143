r"""Pooling of 1, 2 and 3 dimensions, by fixed and by adaptive windows: forward, backward as a gather, unpooling.

    y[n,c,z,p,q] = reduce over the window's taps t, r, s of x[n, c, d0 + t*DIL_D, h0 + r*DIL_H, w0 + s*DIL_W]

This file is what other modules call: it plans the launches, registers the kernels with the tuner and calls them. The
formulas and the bytes of each pass stand at the head of the file that computes it:

    pool_windows.py     where windows lie and what their sums are made of, for all kernels
    pool_forward.py     forward: maximum, mean, norms, whole planes
    pool_backward.py    backward: each element gathers from the windows that cover it
    pool_unpool.py      unpooling beyond that gather, and the gather of winners
    pool_problem.py     what a pooling is, and how kernels walk it
    pool_space.py       configs: which there are, which fit, what they move, how long they take

Deterministic: each element is written once, by one program, which adds what reaches it in a fixed order. No atomics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..autotune import cost
from ..autotune.config import Config, Tunable, register
from ._launch import Launch, launch, layout_strides, raw_strides, row_alignment, unit_divisor
from .pool_backward import (
    pool_backward_cell_rows_kernel,
    pool_backward_cells_kernel,
    pool_backward_kernel,
    pool_backward_rows_kernel,
)
from .pool_forward import combine_planes_kernel, global_pool_kernel, pool_kernel, pool_rows_kernel
from .pool_problem import (
    INDEX_DTYPES,
    Ints,
    PoolProblem,
    Window,
    backward_span,
    band_columns,
    forward_span,
    has_cells,
    layout_of,
    plane_parts,
    problem_of,
    row_phases,
)
from .pool_space import (
    BACKWARD_CONFIGS,
    FORWARD_CONFIGS,
    GATHER_CONFIGS,
    GLOBAL_CONFIGS,
    accepts_backward,
    accepts_forward,
    accepts_global,
    accepts_pixels,
    due_load_bytes,
    due_load_bytes_backward,
    estimate_backward,
    estimate_forward,
    estimate_gather,
    estimate_global,
    features,
    moved_backward,
    moved_forward,
    moved_gather,
    moved_global,
    moved_unpool,
)
from .pool_unpool import pool_gather_kernel, unpool_strays_kernel
from .pool_windows import INDEX_STRIDES, SAVED_X_STRIDES, SAVED_Y_STRIDES, X_STRIDES, Y_STRIDES

STRAYS = 64  # elements of an unpooling that one program looks at


# --- launchers -------------------------------------------------------------------------------------------------------


def _sizes(p: PoolProblem) -> dict[str, int]:
    return dict(zip(("D", "H", "W", "Z", "P", "Q"), (*p.space, *p.out), strict=True))


def _largest(p: PoolProblem, names: Sequence[str]) -> dict[str, int]:
    """Sizes of the adaptive windows; those of fixed ones are constants."""
    values = dict(zip(("largest_d", "largest_h", "largest_w"), p.window.kernel, strict=True))
    return {name: values[name] if p.window.adaptive else 0 for name in names}


def _most(p: PoolProblem) -> dict[str, int]:
    """The most adaptive windows that lie over one pixel, in each dimension; 0 for fixed windows."""
    values = p.most_windows() if p.window.adaptive else (0, 0, 0)
    return dict(zip(("most_d", "most_h", "most_w"), values, strict=True))


def _mode(p: PoolProblem) -> dict[str, Any]:
    return {
        **p.window.constants(), "RANK": p.rank, "REDUCE": p.reduce, "INCLUDE_PAD": p.include_pad, "DIVISOR": p.divisor
    }  # fmt: skip


def _none(p: PoolProblem) -> int:
    """The tap of a window that has none."""
    return 255 if p.index_bytes == 1 else -1


def _pixel_strides(names: list[str], t: torch.Tensor | None, name: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Arguments and constants of a tensor that is walked pixel by pixel; of none at all: what no code reads."""
    vec, unit, strides = (1, True, [0] * 5) if t is None else layout_strides(t)
    return dict(zip(names, strides, strict=True)), {f"{name}_VEC": vec, f"{name}_UNIT_C": unit}


def _row_strides(names: list[str], t: torch.Tensor | None) -> tuple[dict[str, int], int]:
    """Strides in units of the widest load that every row allows, and its width, for a tensor walked row by row."""
    if t is None:
        return dict(zip(names[:4], [0] * 4, strict=True)), 1
    vec = row_alignment(t)
    return dict(zip(names[:4], (stride // vec for stride in raw_strides(t)[:4]), strict=True)), vec


def plan_forward(
    p: PoolProblem, config: Config, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor | None
) -> list[Launch]:
    """index, if any, has y's strides."""
    tensors = {"x_ptr": x, "y_ptr": y, "index_ptr": index}
    largest = _largest(p, ("largest_d", "largest_h", "largest_w"))
    options = (config.num_warps, config.num_stages)
    if "BLOCK_W" in config:
        x_strides, x_vec = _row_strides(X_STRIDES, x)
        y_vec = row_alignment(y)
        rows, span = p.N * p.C * p.out[0] * p.out[1], forward_span(p, config, x_vec, y_vec)
        grid = cost.cdiv(rows, config.BLOCK_R) * cost.cdiv(p.out[2], span.written)
        args = {**tensors, "M": rows, "C": p.C, **_sizes(p), **largest, "span": span.written, **x_strides}
        constants = {
            **_mode(p), "NONE": _none(p), "X_VEC": x_vec, "Y_VEC": y_vec, "PHASES": row_phases(p), "LEAD": span.lead,
            "BLOCK_Q": span.columns, **config.constants(),
        }  # fmt: skip
        return [Launch(pool_rows_kernel, grid, args, constants, *options)]
    x_strides, x_constants = _pixel_strides(X_STRIDES, x, "X")
    y_strides, y_constants = _pixel_strides(Y_STRIDES, y, "Y")
    pixels = p.N * math.prod(p.out)
    grid = cost.cdiv(pixels, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C)
    args = {**tensors, "M": pixels, **_sizes(p), **largest, **x_strides, **y_strides}
    constants = {"C": p.C, **_mode(p), "NONE": _none(p), **x_constants, **y_constants, **config.constants()}
    return [Launch(pool_kernel, grid, args, constants, *options)]


def plan_backward(
    p: PoolProblem, config: Config, dy: torch.Tensor, index: torch.Tensor | None, y: torch.Tensor | None,
    x: torch.Tensor | None, dx: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    """y and x for norms only; y, index and dx are dense."""
    x = x if p.reduce == "norm2" else None
    tensors = {"dy_ptr": dy, "index_ptr": index, "saved_y_ptr": y, "saved_x_ptr": x, "dx_ptr": dx}
    options = (config.num_warps, config.num_stages)
    by_cells = has_cells(p, rows="BLOCK_W" in config)
    # M counts pixels, or rows; with a kernel by cells it counts cells, or rows of cells.
    steps = p.window.stride if by_cells else (1, 1, 1)
    counts = [cost.cdiv(size, step) for size, step in zip(p.space, steps, strict=True)]
    sizes, mode = _sizes(p), _mode(p)
    if by_cells:
        del mode["ADAPTIVE"]
    else:
        sizes |= {**_largest(p, ("largest_h", "largest_w")), **_most(p)}
    if "BLOCK_W" in config:
        y_strides, y_vec = _row_strides(Y_STRIDES, dy)
        saved_x_strides, saved_x_vec = _row_strides(SAVED_X_STRIDES, x)
        saved = index if index is not None else y
        dense_vec = 1 if saved is None else row_alignment(saved)
        rows = p.N * p.C * counts[0] * counts[1]
        args = {**tensors, "M": rows, "C": p.C, **sizes, **y_strides, **saved_x_strides}
        constants = {
            **mode, "Y_VEC": y_vec, "DENSE_VEC": dense_vec, "X_VEC": row_alignment(dx), "SAVED_X_VEC": saved_x_vec,
            **config.constants(),
        }  # fmt: skip
        if by_cells:
            span = backward_span(p, config)
            args["span"], constants["LEAD"] = span.written, span.lead
            grid = cost.cdiv(rows, config.BLOCK_R) * cost.cdiv(counts[2], span.written)
            return [Launch(pool_backward_cell_rows_kernel, grid, args, constants, *options)]
        constants["BLOCK_Q"] = band_columns(p, config.BLOCK_W, max(y_vec, dense_vec))
        grid = cost.cdiv(rows, config.BLOCK_R) * cost.cdiv(p.space[2], config.BLOCK_W)
        return [Launch(pool_backward_rows_kernel, grid, args, constants, *options)]
    args, constants = {**tensors, "M": p.N * math.prod(counts), **sizes}, {"C": p.C, **mode}
    for names, t, name in (
        (Y_STRIDES, dy, "Y"), (INDEX_STRIDES, index, "INDEX"), (X_STRIDES, dx, "X"), (SAVED_X_STRIDES, x, "SAVED_X"),
        (SAVED_Y_STRIDES, y, "SAVED_Y"),
    ):  # fmt: skip
        strides, vectors = _pixel_strides(names, t, name)
        args, constants = args | strides, constants | vectors
    grid = cost.cdiv(args["M"], config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C)
    kernel = pool_backward_cells_kernel if by_cells else pool_backward_kernel
    return [Launch(kernel, grid, args, {**constants, **config.constants()}, *options)]


def plan_unpool(
    p: PoolProblem, config: Config, x: torch.Tensor, index: torch.Tensor, y: torch.Tensor
) -> list[Launch]:  # fmt: skip
    """The backward's gather, then the elements that it cannot see."""
    args: dict[str, Any] = {"x_ptr": x, "index_ptr": index, "y_ptr": y, "C": p.C, **_sizes(p)}
    for names, t in ((X_STRIDES, x), (INDEX_STRIDES, index), (Y_STRIDES, y)):
        args |= dict(zip(names, raw_strides(t), strict=True))
    window = {name: value for name, value in p.window.constants().items() if not name.startswith(("DIL", "ADAPTIVE"))}
    grid = p.N * p.C * cost.cdiv(math.prod(p.out), STRAYS)
    strays = Launch(unpool_strays_kernel, grid, args, {**window, "BLOCK": STRAYS}, 4, 1)
    return [*plan_backward(p, config, x, index, None, None, y), strays]


def plan_gather(p: PoolProblem, config: Config, x: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> list[Launch]:
    index_strides, index_constants = _pixel_strides(INDEX_STRIDES, index, "INDEX")
    y_strides, y_constants = _pixel_strides(Y_STRIDES, y, "Y")
    pixels = p.N * math.prod(p.out)
    args = {
        "x_ptr": x, "index_ptr": index, "y_ptr": y, "M": pixels, **_sizes(p),
        **_largest(p, ("largest_h", "largest_w")), **dict(zip(X_STRIDES, raw_strides(x), strict=True)),
        **index_strides, **y_strides,
    }  # fmt: skip
    constants = {
        "C": p.C, **p.window.constants(), "RANK": p.rank, "NONE": _none(p), **index_constants, **y_constants,
        **config.constants(),
    }  # fmt: skip
    grid = cost.cdiv(pixels, config.BLOCK_M) * cost.cdiv(p.C, config.BLOCK_C)
    return [Launch(pool_gather_kernel, grid, args, constants, config.num_warps, config.num_stages)]


def plan_global(
    p: PoolProblem, config: Config, x: torch.Tensor, y: torch.Tensor, index: torch.Tensor | None
) -> list[Launch]:
    """x is seen as [N, C, L], and NCHW planes that all follow each other at one distance as those of one image."""
    L, (n, c) = math.prod(p.space), (p.N, p.C)
    image, channel, *_ = raw_strides(x)
    pixel, unit_c = plane_stride(x), p.layout == "nhwc"
    if not unit_c and (n == 1 or image == c * channel):
        n, c, image = 1, n * c, 0
    e = 16 // x.dtype.itemsize
    vec = unit_divisor(e, c, image, pixel) if unit_c else unit_divisor(e, L, image, channel)
    split, rows = plane_parts(p, config), p.N * p.C
    partial = partial_index = None
    if split > 1:
        partial = x.new_empty((split, rows), dtype=torch.float32)
        partial_index = None if index is None else x.new_empty((split, rows), dtype=torch.int32)
    strides = {"stride_xn": image // vec, "stride_xc": channel // vec, "stride_xl": pixel // vec}
    mode = {"REDUCE": p.reduce, "DIVISOR": p.divisor}
    results = {"y_ptr": y, "index_ptr": index, "partial_ptr": partial, "partial_index_ptr": partial_index}
    counts = {"L": L, "rows": rows, "splits": split}
    blocks = {"BLOCK_L": config.BLOCK_L, "BLOCK_C": config.BLOCK_C}
    first = Launch(
        global_pool_kernel, n * cost.cdiv(c, config.BLOCK_C) * split,
        {"x_ptr": x, **results, "C": c, **counts, **strides},
        {**mode, "VEC": vec, "UNIT_C": unit_c, **blocks}, config.num_warps, config.num_stages,
    )  # fmt: skip
    if split == 1:
        return [first]
    combine = Launch(combine_planes_kernel, cost.cdiv(rows, 256), {**results, **counts}, {**mode, "BLOCK": 256}, 4, 1)
    return [first, combine]


def plane_stride(x: torch.Tensor) -> int:
    """At what distance the pixels of a plane follow each other; 0 where they do not follow at one distance."""
    pixel = expected = 0
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1:
            pixel = pixel or stride
            if stride == 0 or (expected and stride != expected):
                return 0
            expected = stride * size
    return pixel or 1


# --- what the tuner knows --------------------------------------------------------------------------------------------


def _meta(p: PoolProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, y and the winners."""

    def tensor(space: Ints) -> torch.Tensor:
        space = space[3 - p.rank :]
        if p.layout == "nhwc":
            return torch.empty((p.N, *space, p.C), dtype=p.dtype, device="meta").movedim(-1, 1)
        return torch.empty((p.N, p.C, *space), dtype=p.dtype, device="meta")

    y = tensor(p.out)
    return tensor(p.space), y, torch.empty_like(y, dtype=INDEX_DTYPES[p.index_bytes]) if p.index_bytes else None


def _forward_launches(p: PoolProblem, config: Config) -> list[Launch]:
    return plan_forward(p, config, *_meta(p))


def _global_launches(p: PoolProblem, config: Config) -> list[Launch]:
    return plan_global(p, config, *_meta(p))


def _backward_launches(p: PoolProblem, config: Config) -> list[Launch]:
    x, y, index = _meta(p)
    saved = (y, x) if p.reduce.startswith("norm") else (None, None)
    return plan_backward(p, config, y, index, *saved, x)


def _unpool_launches(p: PoolProblem, config: Config) -> list[Launch]:
    x, y, index = _meta(p)
    assert index is not None
    return plan_unpool(p, config, y, index, x)


def _gather_launches(p: PoolProblem, config: Config) -> list[Launch]:
    x, y, index = _meta(p)
    assert index is not None
    return plan_gather(p, config, x, index, y)


FORWARD = register(
    Tunable(
        "pool", FORWARD_CONFIGS, features, accepts_forward, estimate_forward, _forward_launches,
        moved_bytes=moved_forward, due_load_bytes=due_load_bytes,
    )
)  # fmt: skip
GLOBAL = register(
    Tunable(
        "global_pool", GLOBAL_CONFIGS, features, accepts_global, estimate_global, _global_launches,
        moved_bytes=moved_global, due_load_bytes=due_load_bytes,
    )
)  # fmt: skip
BACKWARD = register(
    Tunable(
        "pool_backward", BACKWARD_CONFIGS, features, accepts_backward, estimate_backward, _backward_launches,
        moved_bytes=moved_backward, due_load_bytes=due_load_bytes_backward,
    )
)  # fmt: skip
# What is gathered, and strays, lie anywhere: no width is due.
UNPOOL = register(
    Tunable(
        "max_unpool", BACKWARD_CONFIGS, features, accepts_backward, estimate_backward, _unpool_launches,
        moved_bytes=moved_unpool,
    )
)  # fmt: skip
GATHER = register(
    Tunable(
        "pool_gather", GATHER_CONFIGS, features, accepts_pixels, estimate_gather, _gather_launches,
        moved_bytes=moved_gather,
    )
)  # fmt: skip


# --- calls -----------------------------------------------------------------------------------------------------------


def forward_of(x: torch.Tensor, problem: PoolProblem) -> tuple[Tunable, PoolProblem]:
    """The kernel that runs a forward, and the problem as it sees it."""
    if problem.is_global():
        pixel = plane_stride(x)
        if pixel == 1 or (pixel and (x.shape[1] == 1 or x.stride(1) == 1)):
            return GLOBAL, problem._replace(layout="nchw" if pixel == 1 else "nhwc")
    return FORWARD, problem


def run_forward(
    x: torch.Tensor, y: torch.Tensor, index: torch.Tensor | None, window: Window, reduce: str, *,
    include_pad: bool = True, divisor: int = 0, is_channels_last: bool,
) -> None:  # fmt: skip
    """Fills y, and the winners if there is a tensor for them (int64: places in the image, else taps)."""
    problem = problem_of(
        x, y.shape[2:], window, reduce, index_bytes=0 if index is None else index.dtype.itemsize,
        include_pad=include_pad, divisor=divisor, layout=layout_of(x, is_channels_last),
    )  # fmt: skip
    tunable, problem = forward_of(x, problem)
    launch(tunable, plan_global if tunable is GLOBAL else plan_forward, problem, x, y, index)


def run_backward(
    dy: torch.Tensor, index: torch.Tensor | None, y: torch.Tensor | None, x: torch.Tensor | None, dx: torch.Tensor,
    window: Window, reduce: str, *, include_pad: bool = True, divisor: int = 0, is_channels_last: bool,
) -> None:  # fmt: skip
    """Fills dx. ``"max"`` reads the winners, norms read y and x."""
    problem = gathering(dy, index, y, x, dx, window, reduce, is_channels_last)
    launch(BACKWARD, plan_backward, problem._replace(include_pad=include_pad, divisor=divisor), dy, index, y, x, dx)


def run_unpool(
    x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, window: Window, *, is_channels_last: bool
) -> None:  # fmt: skip
    """Fills y with zeros and, where an int64 index names a place, x. The last of equal indices wins."""
    problem = gathering(x, index, None, None, y, window, "last", is_channels_last)
    launch(UNPOOL, plan_unpool, problem, x, index, y)


def gathering(
    dy: torch.Tensor, index: torch.Tensor | None, y: torch.Tensor | None, x: torch.Tensor | None, dx: torch.Tensor,
    window: Window, reduce: str, is_channels_last: bool,
) -> PoolProblem:  # fmt: skip
    """Rows are walked where all tensors have them."""
    if is_channels_last and dx.shape[1] > 1:
        layout = "nhwc"
    else:
        dense = all(t.is_contiguous() for t in (index, y) if t is not None)
        rows = all(layout_of(t, False) == "nchw" for t in (dy, x) if t is not None)
        layout = "nchw" if dense and rows else "strided"
    index_bytes = 0 if index is None else index.dtype.itemsize
    return problem_of(dx, dy.shape[2:], window, reduce, index_bytes=index_bytes, layout=layout)


def run_gather(
    x: torch.Tensor, index: torch.Tensor, y: torch.Tensor, window: Window, *, is_channels_last: bool
) -> None:  # fmt: skip
    """Fills y with what x holds at the places of the winners."""
    layout = "nhwc" if is_channels_last and x.shape[1] > 1 else "strided"
    problem = problem_of(x, y.shape[2:], window, "max", index_bytes=index.dtype.itemsize, layout=layout)
    launch(GATHER, plan_gather, problem, x, index, y)
