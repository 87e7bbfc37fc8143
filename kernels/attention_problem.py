"""The sizes and options of a call of attention, on which launches and configs depend."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..autotune import cost
from ..autotune.config import Config
from ._launch import readable


class AttentionProblem(NamedTuple):
    """One call of attention.

    Attributes:
        B, H, M, N, D, DV: sequences, query heads, queries, keys, numbers in a row of query or key, and of value.
        group: query heads that share a head of key and value.
        precision: how the products multiply: ``"16"`` for fp16 and bf16, else ``"ieee"``, ``"tf32"`` or ``"tf32x3"``.
        shift: key j is hidden from query i if j > i + shift; ``None`` without causality.
        masked: whether there is a boolean mask.
        bias: the dtype of the bias, ``None`` without one.
        bias_dims: those letters of ``"bhmn"`` along which the bias was not broadcast.
        bounded: whether |scale| bounds the scores, as for cosine scores without a bias.
        saves: whether a backward follows, for which the forward stores lse.
    """

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
        """How the kernels keep scores: UNIT in ``attention_tiles.py``."""
        return "exact" if self.precision in ("ieee", "tf32x3") else "natural" if self.bias else "log2"

    @property
    def parts(self) -> int:
        """In how many numbers lse of a query is stored for the backward: see ``attention_forward.py``."""
        return 1 if self.unit == "log2" else 2

    @property
    def pairs(self) -> float:
        """How many pairs of query and key one head has, without those that causality hides."""
        if self.shift is None:
            return float(self.M * self.N)
        first, last = (min(max(i + 1 + self.shift, 0), self.N) for i in (0, self.M - 1))
        return self.M * (first + last) / 2


class NormalizeProblem(NamedTuple):
    """Normalisation of ``rows`` rows of D numbers, the rows of ``[B, H, M, D]``."""

    rows: int
    D: int
    dtype: torch.dtype
    precision: str = ""

    @property
    def block_d(self) -> int:
        return max(16, cost.next_power_of_2(self.D))


class Scores(NamedTuple):
    """What turns products of query and key into scores: the factor ``scale``, and ``mask`` (bool, True where a query
    sees a key) and ``bias``, each ``[B or 1, H or 1, M or 1, N or 1]`` or None."""

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float

    def readable(self) -> Scores:
        """The same, with copies of a mask or bias whose offsets within a tile would pass 32 bits."""
        mask, bias = (None if t is None else readable(t, tile=(2, 3)) for t in (self.mask, self.bias))
        return Scores(mask, bias, self.scale)


def lse_parts(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(top, rest)`` of the stats that a forward stores: of [2, B, H, M] the maximum and the inverse of the sum of
    each query; of [1, B, H, M] lse and None."""
    return stats[0], stats[1] if len(stats) == 2 else None


def bias_tile_count(p: AttentionProblem, config: Config) -> int:
    """The number of tiles of the gradient of a bias; each is one program's."""
    tiles = {"b": p.B, "h": p.H, "m": cost.cdiv(p.M, config.BLOCK_M), "n": cost.cdiv(p.N, config.BLOCK_N)}
    count = 1
    for dim in p.bias_dims:
        count *= tiles[dim]
    return count
