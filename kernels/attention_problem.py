"""What a call of attention is: what plans and configs both need."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..autotune import cost
from ..autotune.config import Config
from ._launch import readable


class AttentionProblem(NamedTuple):
    """One call. ``shift``: key j is hidden from query i if j > i + shift; ``None``: no causality. ``bias``: its dtype;
    ``bias_dims``: those of "bhmn" that it was not broadcast along. ``saves``: is there a backward?"""

    B: int
    H: int
    M: int
    N: int
    D: int
    DV: int
    group: int
    dtype: torch.dtype
    precision: str
    shift: int | None = None
    masked: bool = False
    bias: torch.dtype | None = None
    bias_dims: str = ""
    bounded: bool = False
    saves: bool = False

    @property
    def block_d(self) -> int:
        return max(16, cost.next_power_of_2(self.D))

    @property
    def block_dv(self) -> int:
        return max(16, cost.next_power_of_2(self.DV))

    @property
    def unit(self) -> str:
        """Of the scores: natural where something is added to them, and with all digits where the products have them."""
        return "exact" if self.precision in ("ieee", "tf32x3") else "natural" if self.bias else "log2"

    @property
    def parts(self) -> int:
        """In how many numbers a row's lse is kept for backward."""
        return 1 if self.unit == "log2" else 2

    @property
    def pairs(self) -> float:
        """How many pairs of query and key are computed in each head."""
        if self.shift is None:
            return float(self.M * self.N)
        first, last = (min(max(i + 1 + self.shift, 0), self.N) for i in (0, self.M - 1))
        return self.M * (first + last) / 2


class NormalizeProblem(NamedTuple):
    """Rows of unit length: ``[B, H, M, D]``."""

    rows: int
    D: int
    dtype: torch.dtype
    precision: str = ""

    @property
    def block_d(self) -> int:
        return max(16, cost.next_power_of_2(self.D))


class Scores(NamedTuple):
    """What makes scores of products: ``mask`` (bool) and ``bias``, both ``[B or 1, H or 1, M or 1, N or 1]``."""

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float

    def readable(self) -> Scores:
        mask, bias = (None if t is None else readable(t, tile=(2, 3)) for t in (self.mask, self.bias))
        return Scores(mask, bias, self.scale)


def halves(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """lse of the rows as forward keeps it: [1, B, H, M], or [2, B, H, M] for the maximum and the sum's inverse."""
    return stats[0], stats[1] if len(stats) == 2 else None


def bias_tiles(p: AttentionProblem, config: Config) -> int:
    """Tiles of the gradient of a bias, one for each program."""
    tiles = {"b": p.B, "h": p.H, "m": cost.cdiv(p.M, config.BLOCK_M), "n": cost.cdiv(p.N, config.BLOCK_N)}
    count = 1
    for dim in p.bias_dims:
        count *= tiles[dim]
    return count
