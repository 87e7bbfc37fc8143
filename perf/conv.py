"""Convolution's layers: what is compiled without a GPU, measured with one, and the bytes each kernel should move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from math import prod
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
    precisions_for,
    random_tensors,
    stream_us,
)
from ..ops import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from ..ops.conv_operators import module_of, weight_grad_module_of
from ..ops.conv_torch import activate
from .providers import IMAGES


class Layer(NamedTuple):
    """One convolution of a model, of as many dimensions as the input has: images and input channels, filters, window.

    The other sizes hold in every dimension.
    """

    input: Shape
    k: int
    window: int | Shape
    stride: int = 1
    padding: int | None = None  # None keeps the size
    dilation: int = 1
    groups: int = 1
    transposed: bool = False

    @property
    def rank(self) -> int:
        return len(self.input) - 2

    @property
    def op(self) -> str:
        return f"conv_transpose{self.rank}d" if self.transposed else f"conv{self.rank}d"

    @property
    def taps(self) -> Shape:
        return (self.window,) * self.rank if isinstance(self.window, int) else self.window

    @property
    def pad(self) -> int:
        return self.dilation * (self.taps[-1] // 2) if self.padding is None else self.padding

    @property
    def weight(self) -> Shape:
        channels = (self.input[1], self.k // self.groups) if self.transposed else (self.k, self.input[1] // self.groups)
        return (*channels, *self.taps)

    @property
    def output(self) -> Shape:
        n, _, *sizes = self.input
        reach = [self.dilation * (taps - 1) + 1 for taps in self.taps]
        if self.transposed:
            space = [(size - 1) * self.stride - 2 * self.pad + r for size, r in zip(sizes, reach, strict=True)]
        else:
            space = [(size + 2 * self.pad - r) // self.stride + 1 for size, r in zip(sizes, reach, strict=True)]
        return (n, self.k, *space)

    def geometry(self) -> dict[str, int]:
        """The arguments of the call."""
        return {"stride": self.stride, "padding": self.pad, "dilation": self.dilation, "groups": self.groups}


LAYERS = {
    "resnet50-stem": Layer((32, 3, 224, 224), 64, 7, stride=2),
    "resnet50-s1-3x3": Layer((32, 64, 56, 56), 64, 3),
    "resnet50-s1-1x1": Layer((32, 64, 56, 56), 256, 1),
    "resnet50-s2-3x3": Layer((32, 128, 56, 56), 128, 3, stride=2),
    "resnet50-s2-1x1": Layer((32, 128, 28, 28), 512, 1),
    "resnet50-s2-shortcut": Layer((32, 256, 56, 56), 512, 1, stride=2),
    "resnet50-s3-3x3": Layer((32, 256, 14, 14), 256, 3),
    "resnet50-s4-3x3": Layer((32, 512, 7, 7), 512, 3),
    "resnet50-s4-1x1": Layer((32, 512, 7, 7), 2048, 1),
    "batch1-s4-3x3": Layer((1, 512, 7, 7), 512, 3),
    "vgg-c1": Layer((32, 64, 224, 224), 64, 3),
    "vgg-c3": Layer((32, 256, 56, 56), 256, 3),
    "vgg-c4": Layer((32, 512, 28, 28), 512, 3),
    "convnext-stem": Layer((64, 3, 224, 224), 96, 4, stride=4, padding=0),
    "resnext50-g32": Layer((32, 128, 56, 56), 128, 3, groups=32),
    "unet-320": Layer((2, 320, 64, 64), 320, 3),
    "unet-1280": Layer((2, 1280, 16, 16), 1280, 3),
    "unet-up": Layer((8, 1024, 32, 32), 512, 2, stride=2, padding=0, transposed=True),
    "vae-128": Layer((1, 128, 512, 512), 128, 3),
    "video-vae": Layer((1, 128, 9, 128, 128), 128, 3),
    "deeplab-aspp": Layer((8, 2048, 33, 33), 256, 3, dilation=12),
    "convnext-dw-s1": Layer((64, 96, 56, 56), 96, 7, groups=96),
    "convnext-dw-s3": Layer((64, 384, 14, 14), 384, 7, groups=384),
    "mobilenetv3-dw": Layer((64, 72, 56, 56), 72, 5, stride=2, groups=72),
    "efficientnet-dw": Layer((64, 96, 112, 112), 96, 3, stride=2, groups=96),
    "batch1-dw": Layer((1, 384, 14, 14), 384, 3, groups=384),
    "short-conv": Layer((1, 12288, 16384), 12288, 4, padding=3, groups=12288),
}
# Compiled in every precision and layout, and for every target.
HEADLINE = ("resnet50-s1-3x3", "resnet50-s1-1x1", "convnext-dw-s1")
# Compiled in both layouts.
BOTH_LAYOUTS = (*HEADLINE, "short-conv")


def _is_depthwise(layer: Layer) -> bool:
    return layer.groups == layer.input[1] > 1


def _problem(layer: Layer, dtype: torch.dtype, precision: str, channels_last: bool) -> Any:
    from ..kernels import conv

    stride, padding, dilation = ((size,) * layer.rank for size in (layer.stride, layer.pad, layer.dilation))
    geometry = conv.Geometry.of(stride, padding, dilation, layer.groups)
    x, y = (layer.output, layer.input) if layer.transposed else (layer.input, layer.output)
    return conv.problem_of(x, layer.weight, y[2:], geometry, dtype, precision, channels_last)


def problem_of(layer: Layer, label: str, channels_last: bool = True) -> Any:
    """The layer as the kernels know it; an image's three channels are padded, as the launcher does."""
    from ..kernels import conv

    return conv.pad_problem(_problem(layer, *PRECISIONS[label], channels_last))


def layers(target: str) -> Iterator[Layers]:
    from ..kernels import conv

    for name, layer in LAYERS.items():
        if target not in ALL_LAYERS and name not in HEADLINE:
            continue
        module = module_of(layer.weight, (layer.stride,) * layer.rank, layer.groups)
        weight_grad = weight_grad_module_of(layer.weight, (layer.stride,) * layer.rank, layer.groups).WEIGHT_GRAD
        for label, layout in product(PRECISIONS, ("nhwc", "nchw")):
            if label not in (precisions_for(target) if name in HEADLINE else ["bf16"]):
                continue
            if layout == "nchw" and (name not in BOTH_LAYOUTS or label != "bf16"):
                continue
            problem = problem_of(layer, label, layout == "nhwc")
            for tunable in (module.FORWARD, module.TRANSPOSE, weight_grad):
                if tunable.name.startswith("conv_direct") and label in ("tf32", "tf32x3"):
                    continue  # no products of tiles, so no precision to choose
                yield f"{name}-{label}-{layout}", tunable, problem
        n, k, *space = layer.output
        epilogue = conv.EpilogueProblem(
            n * prod(space), k, torch.bfloat16, has_saved=True, writes_g=True, has_bias=True
        )
        yield f"{name}-bf16-nhwc", conv.EPILOGUE_GRAD, epilogue


# --- calls that are compared -----------------------------------------------------------------------------------------

_OURS = {f.__name__: f for f in (conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d)}


def _torch(op: str) -> Callable[..., Tensor]:
    """The same by torch's operators, each step one of them."""
    function = getattr(F, op)

    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *,
        activation: str = "none", precision: str | None = None, **geometry: Any,
    ) -> Tensor:  # fmt: skip
        z = function(input, weight, bias, **geometry)
        if residual is not None:
            z = z + residual
        return activate(z, activation)

    return run


def _bare(op: str) -> Callable[..., Tensor]:
    function = getattr(F, op)

    def run(input: Tensor, weight: Tensor, **others: Any) -> Tensor:
        return function(input, weight, **{name: others[name] for name in ("stride", "padding", "dilation", "groups")})

    return run


def case(
    name: str, epilogue: str = "", *, layer: Layer | None = None, dtype: str = "bf16", layout: str = "nhwc",
    direction: str = "fwd", rank: int = 1,
) -> Case:  # fmt: skip
    """``epilogue`` lists the steps after the convolution: bias, residual, an activation. A dtype such as ``"tf32"`` is
    fp32 multiplied in tf32."""
    layer = LAYERS[name] if layer is None else layer
    steps = epilogue.split()
    shapes: dict[str, Shape] = {"input": layer.input, "weight": layer.weight}
    if "bias" in steps:
        shapes["bias"] = (layer.k,)
    if "residual" in steps:
        shapes["residual"] = layer.output
    kwargs: dict[str, Any] = dict(layer.geometry())
    for step in steps:
        if step not in ("bias", "residual"):
            kwargs["activation"] = step
    dtype, options = dtype_and_options(dtype)
    kwargs |= options
    return Case(name, layer.op, shapes, kwargs, dtype, layout, direction, rank)


def layer_of(case: Case) -> Layer:
    kw, transposed = case.kwargs, case.op.startswith("conv_transpose")
    first, second, *window = case.shapes["weight"]
    k = second * kw["groups"] if transposed else first
    stride, padding, dilation, groups = (kw[name] for name in ("stride", "padding", "dilation", "groups"))
    return Layer(case.shapes["input"], k, tuple(window), stride, padding, dilation, groups, transposed)


def _describe(case: Case) -> str:
    layer = layer_of(case)
    options = "".join(
        f" {letter}{case.kwargs[name]}"
        for letter, name, default in (("s", "stride", 1), ("d", "dilation", 1), ("g", "groups", 1))
        if case.kwargs[name] != default
    )
    epilogue = f" +{case.epilogue}" if case.epilogue else ""
    return f"{'x'.join(map(str, layer.input))} -> {layer.k} {'x'.join(map(str, layer.taps))}{options}{epilogue}"


def _floor_us(case: Case, device: DeviceSpec) -> float:
    """Every tensor once over the memory bus, or every product at the rate of the unit that must do it."""
    layer, shapes = layer_of(case), case.shapes
    problem = _problem(layer, DTYPES[case.dtype], case.precision, case.layout == "nhwc")
    rate = device.tflops("ieee" if _is_depthwise(layer) else problem.precision)
    elements = problem.minimal_bytes() / problem.itemsize
    extra = prod(layer.output) if "residual" in shapes else 0
    floor = stream_us(elements + extra, problem.flops, problem.itemsize, rate, device)
    if case.direction == "fwd":
        return floor
    # Backward reads x, w and dy, and y for the activation's derivative; it writes each gradient.
    written = sum(prod(shapes[name]) for name in case.needs_grad)
    saved = prod(layer.output) if "activation" in case.kwargs else 0
    products = 2 if "input" in case.needs_grad else 1
    return floor + stream_us(elements + saved + written, products * problem.flops, problem.itemsize, rate, device)


def _tiny(one: Case) -> Case:
    layer = layer_of(one)
    n, c, *space = layer.input
    per_group, filters = c // layer.groups, layer.k // layer.groups
    groups = min(layer.groups, 8 if per_group == 1 else 2)
    dilation = min(layer.dilation, 2)
    side = 5 if layer.rank == 3 else max(7, 2 * layer.stride + 1)
    small = Layer(
        (min(n, 2), groups * min(per_group, 16), *(min(size, side) for size in space)), groups * min(filters, 16),
        layer.window, layer.stride, layer.pad // layer.dilation * dilation, dilation, groups, layer.transposed,
    )  # fmt: skip
    tiny = case(one.name, " ".join(one.epilogue.split("+")), layer=small, dtype=one.precision, layout=one.layout)
    return replace(tiny, op=one.op, direction=one.direction, rank=one.rank)


OPERATORS = {
    op: Operator(function, _torch(op), _bare(op), IMAGES, _describe, _floor_us, _tiny) for op, function in _OURS.items()
}


# Convolutions of a deployed network carry a folded normalisation as bias, and the activation of their block; those of
# a network in training are followed by the normalisation itself and stand alone, but where the model has none.
DEPLOYED = {
    "resnet50-s1-3x3": "bias relu", "resnet50-s3-3x3": "bias relu", "resnet50-stem": "bias relu",
    "resnet50-s1-1x1": "bias residual relu", "convnext-dw-s1": "bias", "vgg-c3": "bias relu",
    "short-conv": "bias silu", "resnet50-s2-3x3": "bias relu", "resnet50-s2-shortcut": "bias",
    "resnet50-s4-3x3": "bias relu", "resnet50-s4-1x1": "bias residual relu", "convnext-stem": "bias",
    "convnext-dw-s3": "bias", "mobilenetv3-dw": "bias relu", "efficientnet-dw": "bias silu",
    "resnext50-g32": "bias relu", "unet-320": "bias", "unet-1280": "bias", "unet-up": "bias",
    "deeplab-aspp": "bias relu", "vgg-c4": "bias relu", "vae-128": "bias", "video-vae": "bias", "vgg-c1": "bias relu",
}  # fmt: skip
WITHOUT_NORMALISATION = ("convnext-dw-s1", "convnext-dw-s3", "short-conv", "vgg-c1", "vgg-c3", "vgg-c4", "unet-320",
                         "unet-1280", "unet-up", "vae-128", "video-vae")  # fmt: skip


def _cases() -> Iterable[Case]:
    """Every layer deployed, in training, and alone; the most telling ones first."""
    names = list(DEPLOYED)
    for place, name in enumerate(names):
        yield case(name, DEPLOYED[name], layout=_layout(name), rank=0 if place < 7 else 1)
    first = ("resnet50-s1-3x3", "convnext-dw-s1", "vgg-c3", "resnet50-s3-3x3", "resnet50-s1-1x1", "short-conv")
    for name in sorted(names, key=lambda name: name not in first):
        epilogue = DEPLOYED[name] if name in WITHOUT_NORMALISATION else ""
        yield case(name, epilogue, layout=_layout(name), direction="fwd+bwd", rank=0 if name in first else 2)
        yield case(name, layout=_layout(name), rank=3)

    # Other dtypes and layouts.
    yield case("resnet50-s1-3x3", "bias relu", dtype="fp16", rank=3)
    yield case("resnet50-s1-3x3", "bias relu", dtype="tf32", rank=3)
    yield case("resnet50-s3-3x3", dtype="tf32", direction="fwd+bwd", rank=3)
    yield case("resnet50-s1-3x3", "bias relu", layout="nchw", rank=3)
    yield case("convnext-dw-s1", "bias", layout="nchw", rank=3)
    yield case("short-conv", "bias silu", layout="nhwc", rank=3)
    yield case("resnet50-s2-1x1", rank=3)


def _layout(name: str) -> str:
    """Sequences come as [N, C, L], images channels last."""
    return "nchw" if name == "short-conv" else "nhwc"


CASES = tuple(_cases())


# --- kernels by themselves -------------------------------------------------------------------------------------------

TUNED = (
    "resnet50-s1-3x3", "resnet50-s3-3x3", "resnet50-s1-1x1", "vgg-c3", "convnext-dw-s1", "resnet50-s2-3x3",
    "resnet50-stem", "resnet50-s4-3x3", "vgg-c4", "efficientnet-dw", "short-conv", "unet-up",
)  # fmt: skip


def explicit(
    op: str, input: Shape, weight: Shape, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Case:
    transposed = op.startswith("conv_transpose")
    k = weight[1] * groups if transposed else weight[0]
    layer = Layer(input, k, weight[2:], stride, padding, dilation, groups, transposed)
    if layer.weight != weight or min(layer.output) < 1:
        raise ValueError(f"weight {weight} with {groups} groups does not fit input {input}")
    return case("explicit", layer=layer, direction="fwd+bwd")


def recorded(call: Recorded) -> tuple[str, str] | None:
    if call.op not in OPERATORS:
        return None
    return call.op, spelled(*arguments_of(call, *EPILOGUE))


EPILOGUE = ("activation", "padding", "stride", "dilation", "groups")


def arguments_of(call: Recorded, *allowed: str) -> tuple[list[Shape], dict[str, Any]]:
    """The shapes and options of :func:`explicit`."""
    call.allow(*allowed, output_padding=0)
    input, weight = call.shapes["input"], call.shapes["weight"]
    options = {name: call.number(name) for name in ("stride", "dilation", "groups")}
    padding = call.kwargs.get("padding")
    if padding == "same":
        reaches = {(options["dilation"] or 1) * (size - 1) for size in weight[2:]}
        if len(reaches) > 1 or min(reaches) % 2:
            raise ValueError("padding='same' is not one number")
        options["padding"] = reaches.pop() // 2
    elif padding != "valid":
        options["padding"] = call.number("padding")
    return [input if len(input) == len(weight) else (1, *input), weight], options


def kinds(one: Case) -> tuple[str, ...]:
    """The kernels of a training case, forward first."""
    return ("fwd", "input_grad", "weight_grad") if "input" in one.needs_grad else ("fwd", "weight_grad")


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    return random_tensors(OPERATORS[one.op], one, device, seed)


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    """The kernel runs without bias and activation: the store's key says nothing of an epilogue, so what is stored must
    hold without one."""
    from ..kernels import conv

    layer = layer_of(one)
    weight = tensors["weight"]
    last = one.layout == "nhwc"
    problem = _problem(layer, weight.dtype, one.precision, last)
    geometry, options = problem.geometry, {"precision": one.precision, "is_channels_last": last}
    module = module_of(layer.weight, (layer.stride,) * layer.rank, layer.groups)
    stride, padding, dilation = ([size] * layer.rank for size in (layer.stride, layer.pad, layer.dilation))
    zeros = [0] * layer.rank

    def forward(t: dict[str, Tensor]) -> Tensor:
        return torch.ops.aten.convolution(
            t["input"], t["weight"], None, stride, padding, dilation, layer.transposed, zeros, layer.groups
        )

    def gradient(mask: tuple[bool, bool, bool], place: int) -> Callable[[dict[str, Tensor]], Tensor]:
        def run(t: dict[str, Tensor]) -> Tensor:
            return torch.ops.aten.convolution_backward(
                t["dy"], t["input"], t["weight"], None, stride, padding, dilation, layer.transposed, zeros,
                layer.groups, mask,
            )[place]  # fmt: skip

        return run

    theirs = {
        "fwd": forward,
        "input_grad": gradient((True, False, False), 0),
        "weight_grad": gradient((False, True, False), 1),
    }[kind]
    if kind == "weight_grad":
        x, g = ("dy", "input") if layer.transposed else ("input", "dy")
        module = weight_grad_module_of(layer.weight, (layer.stride,) * layer.rank, layer.groups)
        return Kernel(
            module.WEIGHT_GRAD,
            conv.pad_problem(problem),
            lambda t: module.run_weight_grad(t[x], t[g], layer.weight, geometry, **options),
            theirs,
        )
    source, space = ("dy", layer.input[2:]) if kind == "input_grad" else ("input", layer.output[2:])
    if layer.transposed == (kind == "fwd"):
        tunable, run = module.TRANSPOSE, module.run_transpose
    else:
        # Three channels become four in the launcher, which then looks up the padded problem.
        tunable, run, problem = module.FORWARD, module.run_forward, conv.pad_problem(problem)
    return Kernel(tunable, problem, lambda t: run(t[source], t["weight"], space, geometry, **options)[0], theirs)
