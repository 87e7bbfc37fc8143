"""``tritune explain``: what a call would run on a device, here or not, and why."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import torch

from .autotune.device import named
from .ops import conv2d, explain, max_pool2d, use_backend

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=("conv2d", "max_pool2d"))
    parser.add_argument("shapes", nargs="+", type=_shape, help="input and, for conv2d, weight: 32x64x56x56 64x64x3x3")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layout", choices=("nhwc", "nchw"), default="nhwc")
    parser.add_argument("--device", default="h200", help="a device or target, such as h200 or sm_90; or cpu")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="triton")
    parser.add_argument("--kernel", type=int, default=2, help="window of max_pool2d")
    parser.add_argument("--stride", type=int)
    parser.add_argument("--padding", type=int, default=0)
    parser.add_argument("--dilation", type=int, default=1)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--activation")
    parser.add_argument("--json", action="store_true")


def main(args: argparse.Namespace) -> int:
    if args.op == "conv2d" and not 2 <= len(args.shapes) <= 3:
        return _fail("conv2d takes an input and a weight, and perhaps a bias")
    if args.op == "max_pool2d" and len(args.shapes) != 1:
        return _fail("max_pool2d takes an input")
    before = os.environ.get("TRITUNE_DEVICE")
    try:
        if args.device != "cpu":
            os.environ["TRITUNE_DEVICE"] = named(args.device).slug
        decision = _decide(args)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return _fail(str(error))
    finally:
        os.environ.pop("TRITUNE_DEVICE", None)
        if before is not None:
            os.environ["TRITUNE_DEVICE"] = before
    if args.json:
        document = asdict(decision)
        document["kernels"] = [{"kernel": name, **choice._asdict()} for name, choice in decision.kernels]
        print(json.dumps(document, indent=1))
    else:
        print(decision)
    return 0


def _decide(args: argparse.Namespace) -> Any:
    """The decision for fake tensors, which may be on a GPU that is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "cpu" if args.device == "cpu" else "cuda"
    layout = torch.channels_last if args.layout == "nhwc" else torch.contiguous_format
    with FakeTensorMode(), torch.no_grad(), use_backend(args.backend):
        tensors = [
            torch.empty(
                shape, dtype=DTYPES[args.dtype], device=device,
                memory_format=layout if len(shape) == 4 else torch.contiguous_format,
            )
            for shape in args.shapes
        ]  # fmt: skip
        if args.op == "max_pool2d":
            return explain(max_pool2d, *tensors, args.kernel, args.stride, args.padding, args.dilation)
        return explain(
            conv2d, *tensors, stride=args.stride or 1, padding=args.padding, dilation=args.dilation,
            groups=args.groups, activation=args.activation,
        )  # fmt: skip


def _fail(message: str) -> int:
    print(f"tritune explain: {message.splitlines()[0]}", file=sys.stderr)
    return 1
