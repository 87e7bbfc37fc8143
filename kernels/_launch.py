"""Launches of kernels: how one is described, run on a GPU, or compiled where there is no GPU; and how tensors are read.

A plan returns :class:`Launch` objects, each of which describes one kernel launch. ``run`` executes it. ``source``
turns the same description into what ``triton.compile`` takes, so the static suite compiles exactly what would run.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch.autograd import profiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ..autotune.config import Config, Tunable
from ..autotune.device import detect
from ..autotune.resolve import resolve

# Triton's interpreter patches its own modules while a kernel runs, so only one thread at a time may use it.
_interpreter_lock = threading.RLock() if triton.knobs.runtime.interpret else contextlib.nullcontext()

POINTER_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: number of programs, along one axis: CUDA limits the other two axes to 65 535.
        args: run-time arguments by name, in the kernel's order: tensors, descriptors, ints, floats, ``None``.
        constants: the constexpr arguments.
        num_warps, num_stages: launch options.
    """

    kernel: Any
    grid: int
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launches the kernel on the current stream. ``enable_fp_fusion``, which rounds ``a * b + c`` once, is passed
        because its default may change between versions of Triton."""
        with _interpreter_lock:
            self.kernel[(self.grid,)](
                **self.args,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                enable_fp_fusion=True,
            )

    def source(self) -> ASTSource:
        """What :func:`triton.compile` takes: the kernel with the types of these arguments, specialised as the JIT does.

        Every tensor, a meta tensor too, counts as if it started at a multiple of 16 bytes, as storage of torch does.
        """
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        values = {**self.args, **self.constants}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (_is_specialised(parameter, value) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            signature[parameter.name] = parameter.annotation_type or _triton_type(value)
            aligned = isinstance(value, torch.Tensor) or (_is_specialised(parameter, value) and value % 16 == 0)
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, target: str) -> Any:
        """The kernel compiled for a target such as ``"sm_90"`` or ``"gfx942"``, which needs no GPU."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        is_nvidia = target.startswith("sm_")
        gpu = GPUTarget("cuda", int(target[3:]), 32) if is_nvidia else GPUTarget("hip", target, 64)
        return triton.compile(self.source(), target=gpu, options=options)


def launch(tunable: Tunable, plan: Callable[..., list[Launch]], problem: Any, *operands: Any, **options: Any) -> None:
    """Runs the launches that ``plan(problem, config, *operands, **options)`` returns, in order. The config is the
    one that the tuner finds for the problem on the first operand's device. A profiler of torch's shows the launches as
    one range, which names the kernel, the config and the bytes that they move."""
    device = operands[0].device
    config = resolve(tunable, problem, detect(device)).config
    with _device_guard(device), _named_range(tunable, problem, config):
        for one in plan(problem, config, *operands, **options):
            one.run()


def _named_range(tunable: Tunable, problem: Any, config: Config) -> contextlib.AbstractContextManager[Any]:
    if not profiler._is_profiler_enabled:  # a variable of Python's; torch's function for it takes ten times as long
        return _NO_RANGE
    moved = tunable.moved_bytes(problem, config)
    return profiler.record_function(f"tritune kernel {tunable.name} [{config}] moves {moved:.0f} bytes")


_NO_RANGE = contextlib.nullcontext()


def _device_guard(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which ``device`` is the current one: Triton launches there, wherever the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _is_specialised(parameter: Any, value: Any) -> bool:
    """Does the JIT compile anew for the integers 1 and multiples of 16 here?"""
    return isinstance(value, int) and not parameter.do_not_specialize


def _triton_type(value: Any) -> str:
    """The type of a run-time argument as a signature of Triton spells it."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTER_TYPES[value.base.dtype][1:]}{value.block_shape}>"
    if isinstance(value, torch.Tensor):
        return POINTER_TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def descriptor(t: torch.Tensor, shape: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """A descriptor of ``t`` as a contiguous array of ``shape``, from which the tensor memory accelerator copies boxes
    of ``block`` elements. The elements of ``t`` must lie in memory in that order, without gaps."""
    steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return TensorDescriptor(t, list(shape), steps, list(block))


def unit_divisor(limit: int, *numbers: int) -> int:
    """The largest power of two, at most ``limit``, that divides every number. Of strides and sizes in elements that
    is how many elements one aligned load may take."""
    divisor = limit
    for number in numbers:
        while number % divisor:
            divisor //= 2
    return divisor


# Elements between neighbours, at most, where a kernel's offsets within a tile are 32-bit. A tile has at most 256 rows
# and 256 columns, so those offsets stay below (256 + 256) * STEP = 2**31.
STEP = 2**22


def readable(
    t: torch.Tensor, *, unit: int | None = None, tile: Sequence[int] = (), dense: bool = False,
    like: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``t`` itself where a kernel can read it in place, else a copy: launchers copy operands only here. Offsets are
    64-bit, so a kernel reads any strides except where one of these arguments says what it assumes:

    Args:
        unit: a dimension along which the kernel assumes a stride of 1.
        tile: dimensions along which the kernel's offsets within a tile are 32-bit, because 64-bit offsets would take
            twice the registers. There the stride must be less than STEP elements.
        dense: the kernel assumes that ``t`` is contiguous.
        like: the kernel reads ``t`` at the offsets of this dense tensor of the same shape.
    """
    if dense:
        return t.contiguous()
    if like is not None:
        return t if strides(t) == strides(like) else torch.empty_like(like).copy_(t)
    is_unit = unit is None or t.stride(unit) == 1 or t.shape[unit] == 1
    if is_unit and all(t.stride(dim) < STEP or t.shape[dim] == 1 for dim in tile):
        return t
    # A dimension of stride 0 repeats one element; the copy holds that element once, too, and is expanded.
    once = t[tuple(slice(0, 1) if t.stride(dim) == 0 and dim != unit else slice(None) for dim in range(t.dim()))]
    last = t.dim() - 1 if unit is None else unit
    return once.movedim(last, -1).contiguous().movedim(-1, last).expand(t.shape)


def strides(t: torch.Tensor) -> list[int]:
    """The strides of ``t`` in elements, 0 for dimensions of size 1: torch leaves those arbitrary, and no address
    depends on them."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]


def raw_strides(t: torch.Tensor) -> list[int]:
    """The strides, in elements, of images, channels, depth, rows and columns of a [N, C, ..., W] tensor; 0 for a
    dimension that it lacks."""
    image, channel, *space = strides(t)
    return [image, channel, *(0 for _ in range(3 - len(space))), *space]


def row_alignment(t: torch.Tensor) -> int:
    """How many elements along W one aligned load may take in every row of a [N, C, ..., W] tensor: at most 16 bytes. 0
    where neighbours along W are not neighbours in memory."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return 0
    return unit_divisor(16 // t.dtype.itemsize, t.shape[-1], *raw_strides(t)[:4])


def layout_strides(
    t: torch.Tensor, channels: int | None = None, *, runs: bool = False
) -> tuple[int, bool, list[int]]:  # fmt: skip
    """How a kernel reads a [N, C, D, H, W] tensor in place. Dimensions that a lower rank lacks have stride 0.

    Args:
        channels: how many channels a group has, because a program starts to load at the first channel of a group;
            default: all channels of ``t``.
        runs: whether to align to the columns of a row where neighbouring channels are not neighbours in memory.

    Returns:
        ``(vec, unit_c, strides)``. With ``unit_c`` neighbouring channels are neighbours in memory, the channels of
        every pixel and group start on a multiple of ``vec`` elements (at most 16 bytes), and ``strides`` count units of
        ``vec``. Without ``unit_c``, but with ``runs``, every row starts on such a multiple, and all strides but that of
        the columns count units of ``vec``; else ``vec`` is 1.
    """
    raw = raw_strides(t)
    if t.shape[1] != 1 and raw[1] != 1:
        vec = max(1, row_alignment(t)) if runs else 1
        return vec, False, [*(stride // vec for stride in raw[:-1]), raw[-1]]
    vec = unit_divisor(16 // t.dtype.itemsize, channels or t.shape[1], raw[0], *raw[2:])
    return vec, True, [stride // vec for stride in raw]
