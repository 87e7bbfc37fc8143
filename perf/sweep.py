"""A small search over configs on a GPU: the model's best few of each kernel, every one checked before it may win.

The kernel runs alone, without bias and activation, against torch's operator for the same gradient: the store's key says
nothing of an epilogue, so what is stored must hold without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.config import Config, Tunable
from ..autotune.resolve import override, ranked
from .cases import Case, geometry_of, output_size, random_tensors, window_of
from .check import EPSILON, Machine, argument_sets, compare, poisoned, set_cudnn, without_cudnn
from .environment import fingerprint
from .timer import Competitor, Timing

CONFIGS_PER_KERNEL = 8
KEEP_DEFAULT_WITHIN = 0.98  # a config must beat the model's choice by 2 %, or noise would decide
# Case names, most important first: the layers whose kernels are swept.
SWEPT = (
    "resnet50-s1-3x3", "resnet50-s3-3x3", "resnet50-s1-1x1", "vgg-c3", "resnet50-maxpool", "convnext-dw-s1",
    "resnet50-s2-3x3", "resnet50-stem", "resnet50-s4-3x3", "vgg-c4", "efficientnet-dw",
)  # fmt: skip
Run = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a case.

    Attributes:
        tunable, problem: as the launcher looks the config up.
        ours, torch: the kernel and torch's operator for the same result, on tensors ``input``, ``weight``, ``dy``.
    """

    tunable: Tunable
    problem: Any
    ours: Run
    torch: Run


@dataclass(frozen=True)
class Target:
    """One kernel of one case to sweep."""

    case: Case
    kind: str  # "fwd", "input_grad", "weight_grad" or "bwd"

    def header(self) -> dict[str, Any]:
        header = self.case.header()
        return {**header, "id": f"sweep-{header['id']}-{self.kind}", "direction": self.kind}

    def run(self, machine: Machine) -> dict[str, Any]:
        return sweep(self, machine)

    def tensors(self, device: str, seed: int) -> dict[str, Tensor]:
        """The case's own; for the backward of a pooling also what each forward kept of the winners."""
        tensors = random_tensors(self.case, device, seed)
        if self.kind == "bwd":
            tensors |= _winners(self.case, tensors["input"])
        return tensors


def sweep_targets(cases: Sequence[Case]) -> list[Target]:
    """The kernels of the training cases among SWEPT: the forward of every layer first."""
    rank = {name: place for place, name in enumerate(SWEPT)}
    chosen = [case for case in cases if case.name in rank and case.direction != "fwd" and case.precision == "bf16"]
    chosen = sorted((case for case in chosen if case.layout == "nhwc"), key=lambda case: rank[case.name])
    return [Target(case, "fwd") for case in chosen] + [
        Target(case, kind) for case in chosen for kind in _backward_kinds(case)
    ]


def _backward_kinds(case: Case) -> tuple[str, ...]:
    if case.op == "max_pool2d":
        return ("bwd",)
    return ("input_grad", "weight_grad") if "input" in case.needs_grad else ("weight_grad",)


def sweep(target: Target, machine: Machine) -> dict[str, Any]:
    case = target.case
    tensors = target.tensors(machine.device, seed=0)
    kernel = kernel_of(case, target.kind, tensors)
    with without_cudnn():
        exact = {
            "result": kernel.torch({name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})
        }
    set_cudnn("torch_channels_last")()
    torchs = {"result": kernel.torch(tensors)}

    candidates = [config for config, _ in ranked(kernel.tunable, kernel.problem, machine.spec)[:CONFIGS_PER_KERNEL]]
    passed, failed = [], {}
    for config in candidates:
        try:
            with override(kernel.tunable, config), poisoned():
                verdict = compare({"result": kernel.ours(tensors)}, exact, torchs, EPSILON[case.dtype])
        except Exception as error:  # out of shared memory, or the compiler gives up: not a config for this kernel
            if machine.device == "cuda":
                torch.cuda.synchronize()
            failed[str(config)] = type(error).__name__
            continue
        if verdict.correct:
            passed.append(config)
        else:
            failed[str(config)] = f"wrong: {verdict.where} {verdict.error:.1e}"
    del exact, torchs
    event = {"event": "sweep", "kernel": kernel.tunable.name, "tested": len(candidates), "failed": failed}
    if machine.timer is None or not passed:
        return {**event, "entry": None}

    sets = [tensors]
    sets += [target.tensors(machine.device, seed) for seed in range(1, argument_sets(tensors, machine.spec))]
    competitors = {str(config): _competitor(kernel, config, sets) for config in passed}
    competitors["torch"] = Competitor([partial(kernel.torch, one) for one in sets], set_cudnn("torch_channels_last"))
    timings = machine.timer.measure(competitors, 2 * machine.seconds)
    measured = {name: timing for name, timing in timings.items() if isinstance(timing, Timing)}
    times = [(config, measured[str(config)].p50) for config in passed if str(config) in measured]
    if not times:
        return {**event, "entry": None}
    config, us = winner(times, default=candidates[0])
    theirs = measured.get("torch")
    entry = {
        "key": kernel.tunable.features(kernel.problem),
        "config": dict(config),
        "source": "measured" if machine.device == "cuda" else "rehearsed",
        "version": kernel.tunable.version,
        "us": round(us, 3),
        "default_us": round(measured[str(candidates[0])].p50, 3) if str(candidates[0]) in measured else None,
        "tested": len(candidates),
        "env": _entry_environment(machine),
    }
    if theirs is not None:
        entry["torch_us"] = round(theirs.p50, 3)
    return {**event, "entry": entry}


def winner(times: Sequence[tuple[Config, float]], default: Config) -> tuple[Config, float]:
    """The fastest, but the default if that is as good but for noise."""
    best = min(times, key=lambda pair: pair[1])
    for config, us in times:
        if config == default and best[1] > KEEP_DEFAULT_WITHIN * us:
            return config, us
    return best


def _entry_environment(machine: Machine) -> dict[str, Any]:
    everything = fingerprint(machine.device)
    return {name: everything.get(name) for name in ("gpu", "driver", "torch", "triton", "commit", "sources", "date")}


def _competitor(kernel: Kernel, config: Config, sets: Sequence[dict[str, Tensor]]) -> Competitor:
    def call(tensors: dict[str, Tensor]) -> Tensor:
        with override(kernel.tunable, config):
            return kernel.ours(tensors)

    return Competitor([partial(call, one) for one in sets])


# --- the kernels of a case -------------------------------------------------------------------------------------------


def kernel_of(case: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    return _pool_kernel(case, kind, tensors) if case.op == "max_pool2d" else _conv_kernel(case, kind, tensors)


def _conv_kernel(case: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    from ..kernels import conv, conv_depthwise

    x, weight = tensors["input"], tensors["weight"]
    stride, padding, dilation = ([case.kwargs[name]] * 2 for name in ("stride", "padding", "dilation"))
    groups, geometry = case.kwargs["groups"], geometry_of(case)
    depthwise = weight.shape[1] == 1 and groups > 1
    module = conv_depthwise if depthwise else conv
    # Three channels become four in the launcher, which then looks up the padded problem.
    pad = conv.pad_channels if groups == 1 and kind != "input_grad" else lambda t: t
    pq = output_size(case)
    problem = conv.problem_of(
        tuple(pad(x).shape), tuple(pad(weight).shape), pq, geometry, x.dtype, case.precision, True
    )
    options = {"precision": case.precision, "is_channels_last": True}
    shape = tuple(weight.shape)

    def gradient(mask: tuple[bool, bool, bool], place: int) -> Run:
        def run(t: dict[str, Tensor]) -> Tensor:
            return torch.ops.aten.convolution_backward(
                t["dy"], t["input"], t["weight"], None, stride, padding, dilation, False, [0, 0], groups, mask
            )[place]

        return run

    if kind == "fwd":
        return Kernel(
            module.FORWARD,
            problem,
            lambda t: module.run_forward(t["input"], t["weight"], pq, geometry, **options)[0],
            lambda t: F.conv2d(t["input"], t["weight"], None, stride, padding, dilation, groups),
        )
    if kind == "input_grad":
        return Kernel(
            module.INPUT_GRAD,
            problem,
            lambda t: module.run_input_grad(t["dy"], t["weight"], (x.shape[2], x.shape[3]), geometry, **options),
            gradient((True, False, False), 0),
        )
    return Kernel(
        module.WEIGHT_GRAD,
        problem,
        lambda t: module.run_weight_grad(t["input"], t["dy"], shape, geometry, **options),
        gradient((False, True, False), 1),
    )


def _winners(case: Case, x: Tensor) -> dict[str, Tensor]:
    from ..kernels import pool

    window = window_of(case)
    _, places = pool.run_forward(x, output_size(case), window, index_dtype=window.offset_dtype, is_channels_last=True)
    indices = F.max_pool2d(x, **case.kwargs, return_indices=True)[1]
    assert places is not None
    return {"places": places, "indices": indices}


def _pool_kernel(case: Case, kind: str, tensors: dict[str, Tensor]) -> Kernel:
    from ..kernels import pool

    x, window = tensors["input"], window_of(case)
    pq, hw = output_size(case), (x.shape[2], x.shape[3])
    index_dtype = window.offset_dtype
    problem = pool.problem_of(tuple(x.shape), pq, window, x.dtype, index_dtype.itemsize, True)
    if kind == "fwd":
        return Kernel(
            pool.FORWARD,
            problem,
            lambda t: pool.run_forward(t["input"], pq, window, index_dtype=index_dtype, is_channels_last=True)[0],
            lambda t: F.max_pool2d(t["input"], **case.kwargs),
        )
    pairs = [[case.kwargs[name]] * 2 for name in ("kernel_size", "stride", "padding")]
    return Kernel(
        pool.BACKWARD,
        problem,
        lambda t: pool.run_backward(t["dy"], t["places"], hw, window, is_channels_last=True),
        lambda t: torch.ops.aten.max_pool2d_with_indices_backward(
            t["dy"], t["input"], *pairs, [1, 1], False, t["indices"]
        ),
    )
