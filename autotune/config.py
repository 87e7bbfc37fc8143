"""What a tuner may choose: the launch configuration of one kernel, and the kernel's declared space of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from .device import DeviceSpec


class Config(dict[str, int]):
    """Block sizes and launch options of one kernel, immutable by convention and hashable.

    Example::

        config = Config(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3)
        config.BLOCK_M       # 128
        config.constants()   # everything but num_warps and num_stages: the kernel's constexpr arguments
    """

    __slots__ = ()
    OPTIONS = ("num_warps", "num_stages")

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this config has no {name}: {self}") from None

    def __hash__(self) -> int:  # type: ignore[override]  # dict is unhashable; a Config is never mutated
        return hash(frozenset(self.items()))

    def __repr__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items())

    def constants(self) -> dict[str, int]:
        return {name: value for name, value in self.items() if name not in self.OPTIONS}


class Estimate(NamedTuple):
    """Predicted device time of one kernel: microseconds, and what bounds it ("compute", "memory", "launch")."""

    us: float
    bound: str


def _zero(problem: Any) -> int:
    return 0


@dataclass(frozen=True)
class Tunable:
    """One kernel as the tuner sees it. ``kernels/`` declares them; a *problem* is the kernel's own NamedTuple.

    Attributes:
        name: file name in the store and first word of every message, for example ``"conv_transpose"``.
        configs: the declared space, best default first.
        features: problem -> the key under which measurements are stored. Integers are sizes, compared by
            log2 distance; strings must match exactly.
        accepts: does this config serve this problem at all (block sizes, shared memory)?
        estimate: predicted time of a config, used to rank configs where nothing was measured.
        launches: every kernel launch of one call, on meta tensors, for compiling without a GPU.
        moved_bytes: what the load and store instructions of these launches move, in bytes.
        product_rows: rows of the tiles that the matrix units multiply; 0 where a kernel has no products.
        due_load_bytes: how wide every load has to be; 0 for any width.
        version: raised by hand when a config's parameters change their meaning.
    """

    name: str
    configs: tuple[Config, ...]
    features: Callable[[Any], dict[str, int | str]]
    accepts: Callable[[Any, Config, DeviceSpec], bool]
    estimate: Callable[[Any, Config, DeviceSpec], Estimate]
    launches: Callable[[Any, Config], list[Any]] = field(repr=False)
    moved_bytes: Callable[[Any, Config], float] = field(repr=False)
    product_rows: Callable[[Any], int] = field(default=_zero, repr=False)
    due_load_bytes: Callable[[Any], int] = field(default=_zero, repr=False)
    version: int = 1

    @cached_property
    def space(self) -> frozenset[Config]:
        return frozenset(self.configs)

    def holds(self, problem: Any, config: Config, device: DeviceSpec) -> bool:
        """Is this a declared config, and one that serves this problem? No other may run: the kernel was never tried
        with it, and might be silently wrong."""
        return config in self.space and self.accepts(problem, config, device)

    def undeclared(self, config: Config) -> str:
        """Why the declared space does not hold a config, whatever the problem. Empty if it does."""
        if config in self.space:
            return ""
        names = {tuple(one) for one in self.configs}  # a kernel for two layouts has two kinds of tiles
        alike = [one for one in self.configs if one.keys() == config.keys()]
        if not alike:
            wanted = " or ".join(", ".join(one) for one in sorted(names))
            return f"its parameters are {', '.join(config)}, the kernel has {wanted}"
        for name, value in config.items():
            if all(one[name] != value for one in alike):
                return f"the kernel has no config with {name}={value}"
        return f"the kernel has no config {config}"


TUNABLES: dict[str, Tunable] = {}


def register(tunable: Tunable) -> Tunable:
    """Adds a kernel to the registry that the store, the tuner and the static suite walk."""
    TUNABLES[tunable.name] = tunable
    return tunable
