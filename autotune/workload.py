"""What is tuned and measured: cases as plain data, the operators and kernels behind them, the families they come from.

A case names shapes and arguments only. From it come random inputs, our call and torch's on the same inputs, the floor
of its device time, and a tiny layer of the same kind for a rehearsal without a GPU.

No family is known here. A module that declares one calls :func:`register_family`; whoever wants families imports the
module that registers them (``tritune.perf.families`` for those that ship).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import TUNABLES, Tunable
from .device import DeviceSpec
from .layout import laid_out
from .recorded import Recorded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# How a layer's products are computed: dtype of the operands, and the name that kernels know the precision by.
PRECISIONS = {
    "bf16": (torch.bfloat16, "16"), "fp16": (torch.float16, "16"), "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"), "ieee": (torch.float32, "ieee"),
}  # fmt: skip
# Targets that get a config for every layer; the others get one for each family's headline layers.
ALL_LAYERS = ("sm_90", "gfx942")
Shape = tuple[int, ...]
Layers = tuple[str, Tunable, Any]
"""One line of the static suite: name, kernel, problem."""


@dataclass(frozen=True)
class Case:
    """One layer to measure.

    Attributes:
        name: model and layer.
        op: key of the family's OPERATORS.
        shapes: of every tensor argument, the input first.
        kwargs: the other arguments.
        dtype: key of DTYPES.
        layout: of the images that our call gets, ``"nhwc"`` or ``"nchw"`` (the peers have their own); ``""`` without.
        direction: ``"fwd"``, or ``"fwd+bwd"``: the gradients of ``needs_grad`` too.
        rank: 0 for what most models spend their time in, up to 3: the order in which a GPU run goes.
    """

    name: str
    op: str
    shapes: dict[str, Shape]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    layout: str = "nhwc"
    direction: str = "fwd"
    rank: int = 1

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """JSON knows lists only; shapes and arguments are tuples."""
        shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
        kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in data["kwargs"].items()}
        return cls(**{**data, "shapes": shapes, "kwargs": kwargs})

    @property
    def epilogue(self) -> str:
        """The pointwise steps around the operator."""
        steps = [name for name in ("bias", "residual") if name in self.shapes]
        return "+".join([*steps, *filter(None, [self.kwargs.get("activation")])])

    @property
    def precision(self) -> str:
        return self.kwargs.get("precision", self.dtype)

    @property
    def id(self) -> str:
        return "-".join(filter(None, [self.name, self.epilogue, self.precision, self.layout, self.direction]))

    @property
    def needs_grad(self) -> tuple[str, ...]:
        """All tensors, but an image that enters a network: nobody asks for its gradient."""
        if self.direction == "fwd":
            return ()
        return tuple(name for name, shape in self.shapes.items() if not (self.layout and shape[1:2] == (3,)))


@dataclass(frozen=True)
class Operator:
    """How the cases of one operator run.

    Attributes:
        ours, torch: the operator and the same function by torch's own operators, called ``(**tensors, **kwargs)``;
            one tensor is the result.
        bare: torch's operator without the pointwise steps around it; ``None`` if there are none.
        providers: who can run it, of PROVIDERS.
        describe: the sizes of a case in one short line.
        floor_us: device time in microseconds that the case cannot beat.
        tiny: the same kind of layer with toy sizes.
        compiled: torch.compile has a kernel of its own for the operator by itself.
        traffic: of operators that only move memory: the bytes that a case needs, and those that the loads and stores
            of our kernels move.
    """

    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    bare: Callable[..., Tensor] | None
    providers: tuple[str, ...]
    describe: Callable[[Case], str]
    floor_us: Callable[[Case, DeviceSpec], float]
    tiny: Callable[[Case], Case]
    compiled: bool = False
    traffic: Callable[[Case, DeviceSpec], tuple[float, float]] | None = None

    def output_shape(self, case: Case) -> Shape:
        tensors = {name: torch.empty(shape, device="meta") for name, shape in case.shapes.items()}
        return tuple(self.torch(**tensors, **case.kwargs).shape)

    @property
    def yardstick(self) -> str:
        """The peer whose rounding error ours is held to: torch with images as our kernels read them."""
        return "torch_channels_last" if "torch_channels_last" in self.providers else "torch"

    def providers_of(self, case: Case) -> list[str]:
        """Without pointwise steps around the operator nothing is left to leave out, nor for a compiler to fuse.
        Compiling takes seconds, so only the most telling cases pay for it, and only where kernels are timed."""
        has_steps = self.bare is not None and bool(case.epilogue)
        compiles = (has_steps or self.compiled) and case.rank == 0 and torch.cuda.is_available()
        if case.direction != "fwd":
            return list(self.providers)
        return [*self.providers, *["torch_bare"] * has_steps, *["torch_compile"] * compiles]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a case, by itself: what the tuner measures.

    Attributes:
        tunable, problem: as the launcher looks the config up.
        ours, torch: the kernel and torch's operator for the same result, on the case's tensors.
    """

    tunable: Tunable
    problem: Any
    ours: Callable[[dict[str, Tensor]], Tensor]
    torch: Callable[[dict[str, Tensor]], Tensor]


# --- inputs ----------------------------------------------------------------------------------------------------------


def random_tensors(operator: Operator, case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Normally distributed arguments, and ``"dy"`` of the output's shape where there is a backward; never zeros, which
    draw less power and so run at higher clocks. Weights are scaled so that outputs have a variance near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = dict(case.shapes)
    if case.direction != "fwd":
        shapes["dy"] = operator.output_shape(case)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
        if name.startswith("w"):
            values *= prod(shape[1:]) ** -0.5
        tensors[name] = lay_out(values.to(DTYPES[case.dtype]), case.layout)
    return tensors


def lay_out(t: Tensor, layout: str) -> Tensor:
    if not layout or t.dim() < 3:
        return t
    return laid_out(t, layout == "nhwc")


def stream_us(elements: float, flops: float, itemsize: int, rate_tflops: float, device: DeviceSpec) -> float:
    """The longer of moving ``elements`` once and of ``flops`` at the rate of their unit."""
    return max(elements * itemsize / (device.dram_gbs * 1e3), flops / (rate_tflops * 1e6))


def dtype_and_options(precision: str) -> tuple[str, dict[str, Any]]:
    """The dtype of a case's tensors, and the option that says how fp32 is multiplied: ``"tf32"`` is fp32 with one."""
    return (precision, {}) if precision in DTYPES else ("fp32", {"precision": precision})


def precisions_for(target: str) -> list[str]:
    """tf32x3 is NVIDIA's; the others compile for every target."""
    return [one for one in PRECISIONS if one != "tf32x3" or target.startswith("sm_")]


# --- families --------------------------------------------------------------------------------------------------------


class Family(Protocol):
    """What the module of a family declares.

    Attributes:
        OPERATORS: how the cases of each operator run.
        CASES: the layers to measure.
        TUNED: names of cases whose kernels a GPU run tunes, most important first.
        layers: what ships for a target: ``(name, kernel, problem)``.
        explicit: a training case of an operator from the shapes and options that ``tritune tune`` was given. Raises
            TypeError or ValueError.
        recorded: the operator, and the text by which ``tritune tune`` is given such a layer, of a call that
            ``tritune.record_shapes`` has written; ``None`` for another family's. Raises ValueError for a call that no
            text says. A family may lack it, if its functions are not recorded.
        kinds: the kernels of a training case, forward first.
        kernel_tensors, kernel_of: one of those kernels by itself, and random tensors for it. Which kernel and problem
            it is must follow from the case's arguments alone, which may be meta tensors.
    """

    OPERATORS: dict[str, Operator]
    CASES: tuple[Case, ...]
    TUNED: tuple[str, ...]

    def layers(self, target: str) -> Iterator[Layers]: ...
    def explicit(self, op: str, *shapes: Any, **options: Any) -> Case: ...
    def recorded(self, call: Recorded) -> tuple[str, str] | None: ...
    def kinds(self, one: Case) -> tuple[str, ...]: ...
    def kernel_tensors(self, one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]: ...
    def kernel_of(self, one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel: ...


FAMILIES: dict[str, Family] = {}


def register_family(name: str, family: Any) -> None:
    """Adds a family, most often a module with the names of :class:`Family`, to those that all below walks over."""
    FAMILIES[name] = family


def family_of_op(op: str) -> str:
    """The name of the family that runs an operator's cases."""
    return next(name for name, family in FAMILIES.items() if op in family.OPERATORS)


def operator_of(case: Case) -> Operator:
    return FAMILIES[family_of_op(case.op)].OPERATORS[case.op]


def header(case: Case) -> dict[str, Any]:
    """What names a case in a result."""
    return {
        "id": case.id, "family": family_of_op(case.op), "op": case.op, "shape": operator_of(case).describe(case),
        "dtype": case.precision, "layout": case.layout, "direction": case.direction,
    }  # fmt: skip


def layers(target: str) -> Iterator[Layers]:
    """``(name, kernel, problem)`` of everything that ships for a target."""
    for family in FAMILIES.values():
        yield from family.layers(target)


def tiny(case: Case) -> Case:
    """The same kind of layer, small enough for Triton's interpreter."""
    return operator_of(case).tiny(case)


def training_cases(family: Family) -> dict[str, Case]:
    """One case a layer, with gradients, so that all of its kernels can run; the one that a GPU run measures, if any."""
    forward = {case.name: replace(case, direction="fwd+bwd") for case in reversed(family.CASES)}
    trained = {case.name: case for case in family.CASES if case.direction != "fwd" and case.rank < 3}
    return forward | trained


def tuned_kernels() -> list[tuple[Case, str]]:
    """The kernels that a GPU run tunes: the forward of every layer first, the families in turn."""
    chosen = []
    for family in FAMILIES.values():
        cases = training_cases(family)
        for place, name in enumerate(family.TUNED):
            chosen += [(kind != "fwd", place, cases[name], kind) for kind in family.kinds(cases[name])]
    return [(case, kind) for _, _, case, kind in sorted(chosen, key=lambda row: row[:2])]


def kernels_without_layers() -> set[str]:
    """Registered kernels that nothing compiles; a test wants none."""
    return set(TUNABLES) - {tunable.name for _, tunable, _ in layers("sm_90")}
