"""Performance cases: layers of real models as plain data, the calls that are compared, and the time none can beat.

A case names shapes and arguments only. From it come random inputs, our call and its peers on the same inputs, the
floor of its device time, and a tiny layer of the same kind for a rehearsal without a GPU.

Adding a family: a :class:`Family` in FAMILIES, rows in CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.device import DeviceSpec
from ..ops import conv2d, max_pool2d
from ..ops.conv import activate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROVIDERS = {
    "tritune": "this library's kernels",
    "torch": "torch as called: NCHW, every step an operator, cuDNN's own choice of algorithm",
    "torch_channels_last": "the same in channels last with torch.backends.cudnn.benchmark",
    "torch_bare": "torch_channels_last without bias, activation and residual",
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One layer to measure.

    Attributes:
        name: model and layer.
        op: key of FAMILIES.
        shapes: of every tensor argument, the input first.
        kwargs: the other arguments.
        dtype: key of DTYPES.
        layout: of the tensors that our call gets, ``"nhwc"`` or ``"nchw"``; the peers have their own.
        direction: ``"fwd"``, or ``"fwd+bwd"``: the gradients of ``needs_grad`` too.
    """

    name: str
    op: str
    shapes: dict[str, Shape]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"
    layout: str = "nhwc"
    direction: str = "fwd"

    @property
    def epilogue(self) -> str:
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
        return tuple(name for name, shape in self.shapes.items() if name != "input" or shape[1] != 3)

    def header(self) -> dict[str, Any]:
        """What names this case in a result."""
        return {
            "id": self.id, "op": self.op, "shape": FAMILIES[self.op].describe(self), "dtype": self.precision,
            "layout": self.layout, "direction": self.direction,
        }  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How the cases of one operator run.

    Attributes:
        ours, torch: the operator and the same function by torch's own operators, called ``(**tensors, **kwargs)``.
        bare: torch's operator without the pointwise steps around it; ``None`` if there are none.
        describe: the sizes of a case in one short line.
        floor_us: device time in microseconds that the case cannot beat.
        tiny: the same kind of layer with toy sizes.
    """

    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    bare: Callable[..., Tensor] | None
    describe: Callable[[Case], str]
    floor_us: Callable[[Case, DeviceSpec], float]
    tiny: Callable[[Case], Case]


# --- inputs and calls ------------------------------------------------------------------------------------------------


def random_tensors(case: Case, device: str, seed: int) -> dict[str, Tensor]:
    """Normally distributed arguments, and ``"dy"`` of the output's shape where there is a backward; never zeros, which
    draw less power and so run at higher clocks. Weights are scaled so that outputs have a variance near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = dict(case.shapes)
    if case.direction != "fwd":
        shapes["dy"] = output_shape(case)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
        if name == "weight":
            values *= prod(shape[1:]) ** -0.5
        tensors[name] = lay_out(values.to(DTYPES[case.dtype]), case.layout)
    return tensors


def lay_out(t: Tensor, layout: str) -> Tensor:
    if t.dim() != 4:
        return t
    return t.contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)


def output_shape(case: Case) -> Shape:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in case.shapes.items()}
    return tuple(FAMILIES[case.op].torch(**tensors, **case.kwargs).shape)


def output_size(case: Case) -> tuple[int, int]:
    p, q = output_shape(case)[2:]
    return p, q


def providers(case: Case) -> list[str]:
    """Who can run the case. Without pointwise steps around the operator nothing is left to leave out."""
    has_bare = FAMILIES[case.op].bare is not None and case.epilogue and case.direction == "fwd"
    return [name for name in PROVIDERS if name != "torch_bare" or has_bare]


def prepare(case: Case, provider: str, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """The call of one provider on its own copy of the tensors, laid out as it wants them.

    Returns:
        A function without arguments; its result holds ``"output"`` and ``"grad <name>"`` of each gradient.
    """
    family = FAMILIES[case.op]
    function = {"tritune": family.ours, "torch_bare": family.bare}.get(provider, family.torch)
    assert function is not None
    layout = {"tritune": case.layout, "torch": "nchw"}.get(provider, "nhwc")
    arguments = {name: lay_out(t, layout).detach() for name, t in tensors.items()}
    dy = arguments.pop("dy", None)
    for name in case.needs_grad:
        arguments[name].requires_grad_()
    leaves = [arguments[name] for name in case.needs_grad]
    bound = partial(function, **arguments, **case.kwargs)
    if not leaves:
        return lambda: {"output": bound()}

    def forward_and_backward() -> dict[str, Tensor]:
        y = bound()
        gradients = torch.autograd.grad(y, leaves, dy)
        return {"output": y.detach(), **{f"grad {name}": g for name, g in zip(case.needs_grad, gradients, strict=True)}}

    return forward_and_backward


def _stream_us(elements: float, flops: float, itemsize: int, rate_tflops: float, device: DeviceSpec) -> float:
    return max(elements * itemsize / (device.dram_gbs * 1e3), flops / (rate_tflops * 1e6))


# --- convolution -----------------------------------------------------------------------------------------------------


def _torch_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *,
    activation: str = "none", precision: str | None = None, **geometry: Any,
) -> Tensor:  # fmt: skip
    z = F.conv2d(input, weight, bias, **geometry)
    if residual is not None:
        z = z + residual
    return activate(z, activation)


def _bare_conv2d(input: Tensor, weight: Tensor, **others: Any) -> Tensor:
    geometry = {name: others[name] for name in ("stride", "padding", "dilation", "groups")}
    return F.conv2d(input, weight, None, **geometry)


def _conv(
    name: str, input: Shape, k: int, window: int, epilogue: str = "", *, stride: int = 1, padding: int | None = None,
    dilation: int = 1, groups: int = 1, dtype: str = "bf16", layout: str = "nhwc", direction: str = "fwd",
) -> Case:  # fmt: skip
    """``epilogue`` lists the steps after the convolution: bias, residual, an activation. ``padding`` keeps the size
    unless given. dtype ``"tf32"`` is fp32 multiplied in tf32."""
    n, c, h, w = input
    steps = epilogue.split()
    padding = dilation * (window // 2) if padding is None else padding
    shapes: dict[str, Shape] = {"input": input, "weight": (k, c // groups, window, window)}
    if "bias" in steps:
        shapes["bias"] = (k,)
    if "residual" in steps:
        p, q = ((size + 2 * padding - dilation * (window - 1) - 1) // stride + 1 for size in (h, w))
        shapes["residual"] = (n, k, p, q)
    kwargs: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for step in steps:
        if step not in ("bias", "residual"):
            kwargs["activation"] = step
    if dtype == "tf32":
        dtype, kwargs["precision"] = "fp32", "tf32"
    return Case(name, "conv2d", shapes, kwargs, dtype, layout, direction)


def _describe_conv(case: Case) -> str:
    n, c, h, w = case.shapes["input"]
    k, _, r, s = case.shapes["weight"]
    options = "".join(
        f" {letter}{case.kwargs[name]}"
        for letter, name, default in (("s", "stride", 1), ("d", "dilation", 1), ("g", "groups", 1))
        if case.kwargs[name] != default
    )
    epilogue = f" +{case.epilogue}" if case.epilogue else ""
    return f"{n}x{c}x{h}x{w} -> {k} {r}x{s}{options}{epilogue}"


def geometry_of(case: Case) -> Any:
    """The case's window as the convolution kernels take it."""
    from ..kernels.conv import Geometry

    stride, padding, dilation = (case.kwargs[name] for name in ("stride", "padding", "dilation"))
    return Geometry(stride, stride, padding, padding, dilation, dilation, case.kwargs["groups"])


def _conv_floor_us(case: Case, device: DeviceSpec) -> float:
    """Every tensor once over the memory bus, or every product at the rate of the unit that must do it."""
    from ..kernels import conv

    kw, shapes = case.kwargs, case.shapes
    geometry = geometry_of(case)
    output = output_shape(case)
    problem = conv.problem_of(
        shapes["input"], shapes["weight"], output_size(case), geometry, DTYPES[case.dtype], case.precision,
        case.layout == "nhwc",
    )  # fmt: skip
    depthwise = shapes["weight"][1] == 1 and kw["groups"] > 1
    rate = device.tflops("ieee" if depthwise else problem.precision)
    elements = problem.minimal_bytes() / problem.itemsize
    extra = prod(output) if "residual" in shapes else 0
    floor = _stream_us(elements + extra, problem.flops, problem.itemsize, rate, device)
    if case.direction == "fwd":
        return floor
    # Backward reads x, w and dy, and y for the activation's derivative; it writes each gradient.
    written = sum(prod(shapes[name]) for name in case.needs_grad)
    saved = prod(output) if "activation" in kw else 0
    products = 2 if "input" in case.needs_grad else 1
    backward = elements + saved + written
    return floor + _stream_us(backward, products * problem.flops, problem.itemsize, rate, device)


def _tiny_conv(case: Case) -> Case:
    n, _, h, w = case.shapes["input"]
    k, per_group, window, _ = case.shapes["weight"]
    kw = case.kwargs
    groups = min(kw["groups"], 8 if per_group == 1 else 2)
    dilation = min(kw["dilation"], 2)
    side = max(7, 2 * kw["stride"] + 1)
    return _conv(
        case.name, (min(n, 2), groups * min(per_group, 16), min(h, side), min(w, side)),
        groups * min(k // kw["groups"], 16), window, " ".join(case.epilogue.split("+")), stride=kw["stride"],
        padding=kw["padding"] // kw["dilation"] * dilation, dilation=dilation, groups=groups, dtype=case.precision,
        layout=case.layout, direction=case.direction,
    )  # fmt: skip


# --- pooling ---------------------------------------------------------------------------------------------------------


def _pool(
    name: str, input: Shape, window: int, stride: int, padding: int, *, dtype: str = "bf16", layout: str = "nhwc",
    direction: str = "fwd",
) -> Case:  # fmt: skip
    kwargs = {"kernel_size": window, "stride": stride, "padding": padding}
    return Case(name, "max_pool2d", {"input": input}, kwargs, dtype, layout, direction)


def _describe_pool(case: Case) -> str:
    n, c, h, w = case.shapes["input"]
    window, stride = case.kwargs["kernel_size"], case.kwargs["stride"]
    return f"{n}x{c}x{h}x{w} max {window}x{window} s{stride}"


def window_of(case: Case) -> Any:
    """The case's window as the pooling kernels take it."""
    from ..kernels.pool import Window

    size, stride, padding = (case.kwargs[name] for name in ("kernel_size", "stride", "padding"))
    return Window(size, size, stride, stride, padding, padding, 1, 1)


def _pool_floor_us(case: Case, device: DeviceSpec) -> float:
    """x read and y written; with a backward also one byte of the winner's place an output, and both gradients."""
    from ..kernels import pool

    trains = case.direction != "fwd"
    problem = pool.problem_of(
        case.shapes["input"], output_size(case), window_of(case), DTYPES[case.dtype], int(trains), case.layout == "nhwc"
    )
    return problem.minimal_bytes() * (1 + trains) / (device.dram_gbs * 1e3)


def _tiny_pool(case: Case) -> Case:
    n, c, h, w = case.shapes["input"]
    small = (min(n, 2), min(c, 20), min(h, 7), min(w, 7))
    return replace(case, shapes={"input": small})


FAMILIES = {
    "conv2d": Family(conv2d, _torch_conv2d, _bare_conv2d, _describe_conv, _conv_floor_us, _tiny_conv),
    "max_pool2d": Family(max_pool2d, F.max_pool2d, None, _describe_pool, _pool_floor_us, _tiny_pool),
}


# --- the cases, most important first ---------------------------------------------------------------------------------
# Convolutions of a deployed network carry a folded normalisation as bias, and the activation of their block; those of
# a network in training are followed by the normalisation itself and stand alone, but where the model has none.


def _case_table() -> Iterable[Case]:
    image, train = (32, 3, 224, 224), "fwd+bwd"
    stage_1, stage_2, stage_3, stage_4 = (32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7)
    pool_stem, pool_vgg = ((32, 64, 112, 112), 3, 2, 1), ((32, 64, 224, 224), 2, 2, 0)

    # What most networks spend their time in.
    yield _conv("resnet50-s1-3x3", stage_1, 64, 3, "bias relu")
    yield _conv("resnet50-s3-3x3", stage_3, 256, 3, "bias relu")
    yield _pool("resnet50-maxpool", *pool_stem)
    yield _conv("resnet50-stem", image, 64, 7, "bias relu", stride=2)
    yield _conv("resnet50-s1-1x1", stage_1, 256, 1, "bias residual relu")
    yield _conv("convnext-dw-s1", (64, 96, 56, 56), 96, 7, "bias", groups=96)
    yield _conv("vgg-c3", (32, 256, 56, 56), 256, 3, "bias relu")
    yield _conv("resnet50-s1-3x3", stage_1, 64, 3, direction=train)
    yield _pool("resnet50-maxpool", *pool_stem, direction=train)
    yield _conv("convnext-dw-s1", (64, 96, 56, 56), 96, 7, "bias", groups=96, direction=train)
    yield _conv("vgg-c3", (32, 256, 56, 56), 256, 3, "bias relu", direction=train)
    yield _conv("resnet50-s3-3x3", stage_3, 256, 3, direction=train)
    yield _conv("resnet50-s1-1x1", stage_1, 256, 1, direction=train)

    # The other layers, forward.
    yield _conv("resnet50-s2-3x3", (32, 128, 56, 56), 128, 3, "bias relu", stride=2)
    yield _conv("resnet50-s2-shortcut", (32, 256, 56, 56), 512, 1, "bias", stride=2)
    yield _conv("resnet50-s4-3x3", stage_4, 512, 3, "bias relu")
    yield _conv("resnet50-s4-1x1", stage_4, 2048, 1, "bias residual relu")
    yield _conv("convnext-stem", (64, 3, 224, 224), 96, 4, "bias", stride=4, padding=0)
    yield _conv("convnext-dw-s3", (64, 384, 14, 14), 384, 7, "bias", groups=384)
    yield _conv("mobilenetv3-dw", (64, 72, 56, 56), 72, 5, "bias relu", stride=2, groups=72)
    yield _conv("efficientnet-dw", (64, 96, 112, 112), 96, 3, "bias silu", stride=2, groups=96)
    yield _conv("resnext50-g32", (32, 128, 56, 56), 128, 3, "bias relu", groups=32)
    yield _pool("vgg-maxpool", *pool_vgg)
    yield _conv("unet-320", (2, 320, 64, 64), 320, 3, "bias")
    yield _conv("unet-1280", (2, 1280, 16, 16), 1280, 3, "bias")
    yield _conv("deeplab-aspp", (8, 2048, 33, 33), 256, 3, "bias relu", dilation=12)
    yield _conv("vgg-c4", (32, 512, 28, 28), 512, 3, "bias relu")
    yield _conv("vae-128", (1, 128, 512, 512), 128, 3, "bias")
    yield _conv("vgg-c1", (32, 64, 224, 224), 64, 3, "bias relu")

    # The same in training.
    yield _conv("resnet50-stem", image, 64, 7, stride=2, direction=train)
    yield _conv("resnet50-s2-3x3", (32, 128, 56, 56), 128, 3, stride=2, direction=train)
    yield _conv("resnet50-s2-shortcut", (32, 256, 56, 56), 512, 1, stride=2, direction=train)
    yield _conv("resnet50-s4-3x3", stage_4, 512, 3, direction=train)
    yield _conv("mobilenetv3-dw", (64, 72, 56, 56), 72, 5, stride=2, groups=72, direction=train)
    yield _conv("efficientnet-dw", (64, 96, 112, 112), 96, 3, stride=2, groups=96, direction=train)
    yield _conv("resnext50-g32", (32, 128, 56, 56), 128, 3, groups=32, direction=train)
    yield _conv("unet-320", (2, 320, 64, 64), 320, 3, "bias", direction=train)
    yield _pool("vgg-maxpool", *pool_vgg, direction=train)
    yield _conv("convnext-dw-s3", (64, 384, 14, 14), 384, 7, "bias", groups=384, direction=train)

    # Other dtypes and layouts, and the convolution alone.
    yield _conv("resnet50-s1-3x3", stage_1, 64, 3, "bias relu", dtype="fp16")
    yield _conv("resnet50-s1-3x3", stage_1, 64, 3, "bias relu", dtype="tf32")
    yield _conv("resnet50-s3-3x3", stage_3, 256, 3, dtype="tf32", direction=train)
    yield _conv("resnet50-s1-3x3", stage_1, 64, 3, "bias relu", layout="nchw")
    yield _pool("resnet50-maxpool", *pool_stem, layout="nchw")
    yield _pool("resnet50-maxpool", *pool_stem, layout="nchw", direction=train)
    yield _conv("convnext-dw-s1", (64, 96, 56, 56), 96, 7, "bias", groups=96, layout="nchw")
    yield _conv("resnet50-s1-3x3", stage_1, 64, 3)
    yield _conv("resnet50-s2-1x1", stage_2, 512, 1)
    yield _conv("resnet50-s3-3x3", stage_3, 256, 3)
    yield _pool("resnet50-maxpool", *pool_stem, dtype="fp16")


CASES = tuple(_case_table())


def tiny(case: Case) -> Case:
    """The same kind of layer, small enough for Triton's interpreter."""
    return replace(FAMILIES[case.op].tiny(case), op=case.op)
