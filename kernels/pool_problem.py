"""What a pooling is, and how its kernels walk it: the part of the host side that plans and configs both need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..autotune import cost
from ..autotune.config import Config

Ints = tuple[int, ...]
INDEX_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# ``tl.gather`` from fewer columns than threads on a row of the result fails in the compiler of Triton 3.6 and 3.7.
GATHER_RATIO = 4


class Window(NamedTuple):
    """The windows of a pooling; each tuple has three entries, depth first, of which a lower rank's first are neutral.

    Attributes:
        kernel: taps; of adaptive windows, whose sizes differ, the most.
    """

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    adaptive: bool

    @classmethod
    def of(
        cls, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Window:
        """From one entry for each dimension of space. Adaptive windows have no stride: ``()``."""

        def three(values: Sequence[int], neutral: int) -> Ints:
            return (*(neutral for _ in range(3 - len(values))), *values)

        return cls(three(kernel, 1), three(stride, 1), three(padding, 0), three(dilation, 1), not stride)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def constants(self) -> dict[str, Any]:
        """A change of an adaptive window's size must not compile again: it is an argument."""
        kernel = (1, 1, 1) if self.adaptive else self.kernel
        names = (
            "T", "R", "S", "STRIDE_D", "STRIDE_H", "STRIDE_W", "PAD_D", "PAD_H", "PAD_W", "DIL_D", "DIL_H", "DIL_W",
        )  # fmt: skip
        values = (*kernel, *self.stride, *self.padding, *self.dilation)
        return {**dict(zip(names, values, strict=True)), "ADAPTIVE": self.adaptive}


class PoolProblem(NamedTuple):
    """One pooling.

    Attributes:
        space, out: (D, H, W) of x and (Z, P, Q) of y.
        rank: dimensions of space.
        reduce: ``"max"``, ``"mean"``, ``"norm1"``, ``"norm2"``; ``"last"`` unpools, from y's side to x's.
        include_pad, divisor: what a mean divides by; divisor 0: its elements.
        index_bytes: 0 (values only), 1, 2, 4 (taps) or 8 (places in the image).
        layout: how a program walks the larger side: ``"nhwc"``, ``"nchw"`` (whole rows), ``"strided"`` (element by
            element, whatever the strides).
    """

    N: int
    C: int
    space: Ints
    out: Ints
    rank: int
    window: Window
    reduce: str
    include_pad: bool
    divisor: int
    dtype: torch.dtype
    index_bytes: int
    layout: str

    def most_windows(self) -> Ints:
        """How many windows cover one element, at most, in each dimension."""
        window = self.window
        if window.adaptive:
            return tuple(
                cost.cdiv(o + size - math.gcd(o, size), size) for size, o in zip(self.space, self.out, strict=True)
            )
        triples = zip(window.kernel, window.stride, window.dilation, strict=True)
        return tuple(((taps - 1) * dilation + stride) // stride for taps, stride, dilation in triples)

    def is_global(self) -> bool:
        """Is the only window the whole plane?"""
        return math.prod(self.out) == 1 and self.window.kernel == self.space and max(self.window.padding) == 0

    def elements(self) -> tuple[int, int]:
        """Elements of x and y."""
        return self.N * self.C * math.prod(self.space), self.N * self.C * math.prod(self.out)

    def forward_bytes(self) -> float:
        """What must cross the memory bus once."""
        x, y = self.elements()
        return float(x * self.dtype.itemsize + y * (self.dtype.itemsize + self.index_bytes))

    def backward_bytes(self) -> float:
        x, y = self.elements()
        return self.forward_bytes() + (x + y) * self.dtype.itemsize * (self.reduce == "norm2")


def problem_of(
    x: torch.Tensor, out: Sequence[int], window: Window, reduce: str, *, index_bytes: int = 0,
    include_pad: bool = True, divisor: int = 0, layout: str,
) -> PoolProblem:  # fmt: skip
    """The problem between x, or a tensor like it, and the sizes ``out`` in space."""
    n, c, *space = x.shape
    full = tuple((*(1 for _ in range(3 - len(sizes))), *sizes) for sizes in (space, tuple(out)))
    return PoolProblem(
        n, c, *full, len(space), window, reduce, include_pad, divisor, x.dtype, index_bytes, layout
    )  # fmt: skip


def layout_of(x: torch.Tensor, is_channels_last: bool) -> str:
    """How to walk a tensor whose partner is dense, channels last or not."""
    if is_channels_last and x.shape[1] > 1:
        return "nhwc" if x.stride(1) == 1 else "strided"
    return "nchw" if x.shape[-1] == 1 or x.stride(-1) == 1 else "strided"


# --- how kernels walk it ---------------------------------------------------------------------------------------------


def row_phases(p: PoolProblem) -> int:
    """The stride along a row, if the columns of windows can be folded in registers: fixed windows, a stride of 1, 2, 4
    or 8, a reach below 16 strides. Else 0, and each column of a window is fetched by ``tl.gather``."""
    window = p.window
    stride, reach = window.stride[2], (window.kernel[2] - 1) * window.dilation[2]
    usable = not window.adaptive and stride in (1, 2, 4, 8) and reach // stride < 16
    return stride if usable else 0


def has_cells(p: PoolProblem, rows: bool) -> bool:
    """Can the backward be unrolled over the pixels of a cell and the windows over it? That is a piece of code for each
    tap (of rows: for each row of taps and distance of a window), and more of them take long to compile."""
    window, dims = p.window, 2 if rows else 3
    size = math.prod(window.stride[:dims]) * math.prod(p.most_windows()[:dims])
    pieces = math.prod(window.kernel[:dims])
    if rows:
        pieces *= (window.kernel[2] - 1) * window.dilation[2] // max(1, row_phases(p)) + 1
    return not window.adaptive and size <= 64 and pieces <= 32 and (not rows or row_phases(p) > 0)


class Span(NamedTuple):
    """How a row is cut: columns of a tile (windows and, in the backward, cells), how many of them come before the
    first that is written, and how many are."""

    columns: int
    lead: int
    written: int

    @classmethod
    def of(cls, block: int, size: int, before: int, behind: int) -> Span:
        """If one tile holds the row, all of it is written. Otherwise a tile also loads ``before`` columns in front of
        those that it writes and ``behind`` columns after them, rounded to multiples of 16."""
        if size <= block:
            return cls(block, 0, size)
        lead = cost.cdiv(max(0, before), 16) * 16
        return cls(block, lead, max(0, block - lead - max(0, behind)) // 16 * 16)


def forward_span(p: PoolProblem, config: Config, x_vec: int, y_vec: int) -> Span:
    """In outputs."""
    (size, outs), window, phases = (p.space[2], p.out[2]), p.window, row_phases(p)
    reach = (window.kernel[2] - 1) * window.dilation[2]
    if phases:
        whole = size <= config.BLOCK_W and outs * phases <= config.BLOCK_W
        first, last = -window.padding[2] // phases, (reach - window.padding[2]) // phases
        return Span.of(config.BLOCK_W // phases, outs if whole else 2**30, -first, last)._replace(
            **({"written": outs} if whole else {})
        )
    if size <= config.BLOCK_W:
        return Span(max(8, cost.next_power_of_2(outs)), 0, outs)
    usable = config.BLOCK_W - (x_vec - 1)
    count = (usable - 2) * outs // size if window.adaptive else (usable - reach - 1) // window.stride[2] + 1
    written = max(0, count) // y_vec * y_vec
    return Span(max(8, cost.next_power_of_2(written)), 0, written)


def backward_span(p: PoolProblem, config: Config) -> Span:
    """In cells."""
    (size, outs), window, phases = (p.space[2], p.out[2]), p.window, row_phases(p)
    whole = size <= config.BLOCK_W and outs * phases <= config.BLOCK_W
    last = (phases - 1 + window.padding[2]) // phases
    first = (window.padding[2] - (window.kernel[2] - 1) * window.dilation[2] + phases - 1) // phases
    return Span.of(config.BLOCK_W // phases, cost.cdiv(size, phases) if whole else 2**30, -first, last)


def band_columns(p: PoolProblem, columns: int, vec: int) -> int:
    """How many columns of y the windows over ``columns`` columns of x span, with what alignment adds."""
    (size, outs), window = (p.space[2], p.out[2]), p.window
    least = max(8, columns // GATHER_RATIO)
    if size <= columns:
        return max(least, cost.next_power_of_2(outs))
    step = cost.cdiv(columns * outs, size) if window.adaptive else cost.cdiv(columns, window.stride[2])
    return max(least, cost.next_power_of_2(min(cost.cdiv(outs, vec) * vec, step + p.most_windows()[2] + vec)))


def plane_parts(p: PoolProblem, config: Config) -> int:
    """Parts of a plane. None is empty: it would have neither a maximum nor a place of one."""
    tiles = cost.cdiv(math.prod(p.space), config.BLOCK_L)
    return cost.cdiv(tiles, cost.cdiv(tiles, config.SPLIT))
