"""Recurrent layers: what is compiled without a GPU, measured with one, and the bytes each kernel should move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
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
from ..ops import gru, lstm, rnn, use_backend
from ..ops.rnn_operators import OP, OP_BACKWARD
from ..ops.rnn_torch import torch_layer

GATES = {"tanh": 1, "gru": 3, "lstm": 4}


class Layer(NamedTuple):
    """One layer over a batch of sequences."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741  as in the literature
    H: int
    directions: int = 1


LAYERS = {
    "tanh-256": Layer("tanh", 1024, 16, 256, 256),
    "tanh-128": Layer("tanh", 512, 64, 128, 128),
    "tanh-128-bidirectional": Layer("tanh", 512, 64, 128, 128, 2),
    "tanh-64-batch1": Layer("tanh", 1024, 1, 64, 64),
    "gru-128": Layer("gru", 512, 64, 128, 128),
    "gru-100": Layer("gru", 512, 17, 64, 100),
    "lstm-128": Layer("lstm", 512, 64, 128, 128),
    "lstm-128-bidirectional": Layer("lstm", 256, 128, 128, 128, 2),
    "lstm-64": Layer("lstm", 1024, 256, 64, 64),
    "lstm-32": Layer("lstm", 100, 512, 16, 32),
}
# Compiled in the narrower precisions, too, and for every target (with half the hidden units where the chip is small).
HEADLINE = ("tanh-128", "gru-128", "lstm-128")


def problem_of(layer: Layer, label: str, saves: bool) -> Any:
    from ..kernels.rnn import RnnProblem

    dtype, precision = PRECISIONS[label]
    return RnnProblem(layer.cell, layer.T, layer.B, layer.H, layer.directions, dtype, precision, saves)


def layers(target: str) -> Iterator[Layers]:
    from ..autotune.device import named
    from ..kernels import rnn as kernels

    device = named(target)
    for name, layer in LAYERS.items():
        if target not in ALL_LAYERS and name not in HEADLINE:
            continue
        for label in ("bf16", "fp16", "tf32", "ieee") if name in HEADLINE else ("bf16",):
            one = layer
            while not kernels.fits(problem_of(one, label, True), device):
                one = one._replace(H=one.H // 2)
            full = name if one.H == layer.H else f"{name}-as-{one.H}"
            yield f"{full}-{label}", kernels.FORWARD, problem_of(one, label, False)
            yield f"{full}-{label}", kernels.BACKWARD, problem_of(one, label, True)


# --- calls that are compared -----------------------------------------------------------------------------------------


def _ours(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *, cell: str, precision: str | None = None
) -> Tensor:
    function: Any = {"tanh": rnn, "gru": gru, "lstm": lstm}[cell]
    return function(input, w_ih, w_hh, b_ih, b_hh, precision=precision)[0]


def _torch(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *, cell: str, precision: str | None = None
) -> Tensor:
    result = torch_layer(cell, input, w_ih, w_hh, b_ih, b_hh, None, None, False, False)
    assert result is not None
    return result[0]


def case(name: str, *, layer: Layer | None = None, dtype: str = "bf16", direction: str = "fwd", rank: int = 1) -> Case:
    layer = LAYERS[name] if layer is None else layer
    rows = (layer.directions, GATES[layer.cell] * layer.H)
    shapes: dict[str, Shape] = {
        "input": (layer.T, layer.B, layer.I), "w_ih": (*rows, layer.I), "w_hh": (*rows, layer.H), "b_ih": rows,
        "b_hh": rows,
    }  # fmt: skip
    kwargs: dict[str, Any] = {"cell": layer.cell}
    dtype, options = dtype_and_options(dtype)
    kwargs |= options
    return Case(name, "rnn", shapes, kwargs, dtype, "", direction, rank)


def layer_of(one: Case) -> Layer:
    t, b, i = one.shapes["input"]
    directions, _, h = one.shapes["w_hh"]
    return Layer(one.kwargs["cell"], t, b, i, h, directions)


def _describe(one: Case) -> str:
    layer = layer_of(one)
    return f"{layer.cell} T{layer.T} B{layer.B} I{layer.I} H{layer.H}" + (" x2" if layer.directions == 2 else "")


def _floor_us(one: Case, device: DeviceSpec) -> float:
    """Input and output once over the memory bus, or all products at the rate of their unit. What really bounds the
    layer, the latency of T steps in a row, depends on the device in ways that only a measurement knows."""
    layer = layer_of(one)
    rows = layer.directions * GATES[layer.cell] * layer.H
    flops = 2.0 * layer.T * layer.B * rows * (layer.I + layer.H)
    elements = layer.T * layer.B * (layer.I + layer.directions * layer.H) + rows * (layer.I + layer.H)
    passes = 1 if one.direction == "fwd" else 3
    precision = one.precision if one.dtype == "fp32" else "16"
    rate = device.tflops("ieee" if precision == "fp32" else precision)
    return stream_us(passes * elements, passes * flops, DTYPES[one.dtype].itemsize, rate, device)


def _tiny(one: Case) -> Case:
    layer = layer_of(one)
    small = layer._replace(T=min(layer.T, 3), B=min(layer.B, 3), I=min(layer.I, 8), H=min(layer.H, 20))
    return replace(case(one.name, layer=small, dtype=one.precision), direction=one.direction, rank=one.rank)


OPERATORS = {"rnn": Operator(_ours, _torch, None, ("tritune", "torch"), _describe, _floor_us, _tiny)}


def _cases() -> Iterable[Case]:
    for name in ("lstm-128", "gru-128", "tanh-256"):
        yield case(name, rank=0)
    yield case("lstm-128", direction="fwd+bwd", rank=0)
    for name in LAYERS:
        if name not in ("lstm-128", "gru-128", "tanh-256"):
            yield case(name, rank=1)
    for name in ("gru-128", "tanh-256", "lstm-64", "lstm-128-bidirectional"):
        yield case(name, direction="fwd+bwd", rank=2)
    yield case("lstm-128", dtype="fp16", rank=3)
    yield case("tanh-128", dtype="tf32", rank=3)


CASES = tuple(_cases())


# --- kernels by themselves -------------------------------------------------------------------------------------------

TUNED = ("lstm-128", "gru-128", "tanh-256", "lstm-64")


def explicit(op: str, input: Shape, *, hidden: int, cell: str = "tanh", directions: int = 1) -> Case:
    if cell not in GATES:
        raise ValueError(f"cell must be one of {', '.join(GATES)}, not {cell!r}")
    if directions > 2:
        raise ValueError("a layer has one direction or two")
    t, b, i = input
    return case("explicit", layer=Layer(cell, t, b, i, hidden, directions), direction="fwd+bwd")


def recorded(call: Recorded) -> tuple[str, str] | None:
    if call.op not in ("rnn", "gru", "lstm", "elman_step"):
        return None
    call.allow("nonlinearity", "batch_first", "reverse")
    if call.op == "elman_step":
        (*batch, i), hidden, directions = call.shapes["x"], call.shapes["W_hh"][-1], 1
        steps, size = 1, (*batch, 1)[0]
    else:
        input, weight = call.shapes["input"], call.shapes["w_hh"]
        steps, size, i = input if len(input) == 3 else (input[0], 1, input[1])
        if len(input) == 3 and call.kwargs.get("batch_first"):
            steps, size = size, steps
        hidden, directions = weight[-1], weight[0] if len(weight) == 3 else 1
    cell = call.op if call.op in ("gru", "lstm") else call.kwargs.get("nonlinearity", "tanh")
    return "rnn", spelled([(steps, size, i)], {"hidden": hidden, "cell": cell, "directions": directions})


def kinds(one: Case) -> tuple[str, ...]:
    return ("fwd", "train", "bwd")


NAMES = ("input", "w_ih", "w_hh", "b_ih", "b_hh")


def kernel_tensors(one: Case, kind: str, device: str, seed: int) -> dict[str, Tensor]:
    """For backward also what forward leaves, ours and torch's."""
    t = random_tensors(OPERATORS["rnn"], one, device, seed)
    if kind != "bwd":
        return t
    zero = t["input"].new_zeros(t["w_hh"].shape[0], t["input"].shape[1], t["w_hh"].shape[2])
    c0 = zero if one.kwargs["cell"] == "lstm" else None
    operands = (*(t[name] for name in NAMES), zero, c0)
    out, _, _, cells = OP(*operands, one.kwargs["cell"], False, _precision(one, t), True, "triton")
    return {**t, "zero": zero, "out": out, "cells": cells, **_recorded(one, t)}


def _recorded(one: Case, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's forward with its graph, so that its backward can be timed alone: ``"y"``, and leaves to differentiate."""
    with torch.enable_grad():
        leaves = {name: t[name].detach().requires_grad_() for name in NAMES}
        return {**leaves, "y": _torch(*leaves.values(), cell=one.kwargs["cell"])}


def _precision(one: Case, tensors: dict[str, Tensor]) -> str:
    return str(one.kwargs.get("precision", "ieee")) if tensors["input"].dtype == torch.float32 else "16"


def kernel_of(one: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    """Each kernel with the products around it, as torch's layer has them. ``"train"`` is the forward that keeps what
    backward needs."""
    from ..kernels import rnn as kernels

    layer, dtype, precision = layer_of(one), tensors["input"].dtype, _precision(one, tensors)
    problem = kernels.RnnProblem(
        layer.cell, layer.T, layer.B, layer.H, layer.directions, dtype, precision, kind != "fwd"
    )  # fmt: skip

    def forward(t: dict[str, Tensor]) -> Tensor:
        with use_backend("triton"), torch.set_grad_enabled(kind == "train"):
            leaves = [t[name].detach().requires_grad_(kind == "train") for name in NAMES]
            return _ours(*leaves, **one.kwargs).detach()

    if kind != "bwd":
        return Kernel(kernels.FORWARD, problem, forward, lambda t: _torch(*(t[name] for name in NAMES), **one.kwargs))

    def gradients(t: dict[str, Tensor]) -> Tensor:
        is_lstm = layer.cell == "lstm"
        operands = [*(t[name].detach() for name in NAMES), t["zero"], t["zero"] if is_lstm else None]
        grads = OP_BACKWARD(
            *operands, t["out"], t["cells"] if is_lstm else None, t["dy"], None, None, None, [True] * 5, layer.cell,
            False, precision, "triton",
        )  # fmt: skip
        return torch.cat([grad.flatten() for grad in grads[:5]])

    def their_gradients(t: dict[str, Tensor]) -> Tensor:
        if t["input"].dtype != dtype:  # the reference, in float64
            t = {**t, **_recorded(one, t)}
        grads = torch.autograd.grad(t["y"], [t[name] for name in NAMES], t["dy"], retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    return Kernel(kernels.BACKWARD, problem, gradients, their_gradients)
