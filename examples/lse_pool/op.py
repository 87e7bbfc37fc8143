"""Log-sum-exp pooling as an operator: public function, choice of backend, torch's implementation, gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tritune.autotune.device import DeviceSpec
from tritune.autotune.resolve import Choice, resolve
from tritune.ops._dispatch import Ruling, choose, measured, runs_kernels
from tritune.ops._register import below_autograd, register, requires_grad, run_operator


def lse_pool1d(input: Tensor, kernel_size: int) -> Tensor:
    r"""A smooth maximum over windows side by side along the last dimension.

    .. math:: y_q = \log \frac{1}{K} \sum_{k < K} \exp(x_{qK + k})

    Args:
        input: [..., L], floating-point.
        kernel_size: K; it divides L.

    Returns:
        [..., L / K] in the dtype of ``input``.

    Raises:
        TypeError: ``input`` is not floating-point.
        ValueError: ``kernel_size`` does not divide the last dimension.
    """
    if has_torch_function_unary(input):
        overridden: Tensor = handle_torch_function(lse_pool1d, (input,), input, kernel_size)
        return overridden
    if not input.is_floating_point():
        raise TypeError(f"lse_pool1d: input is floating-point, not {input.dtype}")
    if kernel_size < 1 or input.dim() == 0 or input.shape[-1] % kernel_size:
        raise ValueError(f"lse_pool1d: kernel_size {kernel_size} does not divide the last dimension of {input.shape}")
    saves = requires_grad((input,))
    backend = choose(
        "lse_pool1d", (input,),
        lambda device: _rule(_choices(input, kernel_size, device, saves)),
        lambda device: _choices(input, kernel_size, device, saves),
        lambda: None if kernel_size <= 128 else "kernel_size is above 128",
    )  # fmt: skip
    if backend == "torch":
        return formula(input, kernel_size)
    y: Tensor = run_operator(OP, (input.contiguous(), kernel_size, "triton"), saves)
    return y


def _choices(x: Tensor, kernel_size: int, device: DeviceSpec, saves: bool) -> tuple[tuple[str, Choice], ...]:
    from . import kernel

    problem = kernel.problem_of(x, kernel_size)
    tunables = (kernel.FORWARD, kernel.BACKWARD) if saves else (kernel.FORWARD,)
    return tuple((tunable.name, resolve(tunable, problem, device)) for tunable in tunables)


def _rule(choices: tuple[tuple[str, Choice], ...]) -> Ruling:
    return measured(choices) or Ruling(True, "not measured; one pass over memory where torch's operators take four")


def formula(input: Tensor, kernel_size: int) -> Tensor:
    """The same in torch's operators: the fallback, and the yardstick of the tests."""
    windows = input.unflatten(-1, (input.shape[-1] // kernel_size, kernel_size))
    return windows.logsumexp(-1) - math.log(kernel_size)


def _forward(x: Tensor, kernel_size: int, backend: str) -> Tensor:
    if runs_kernels(backend, x):
        from . import kernel

        return kernel.run_forward(x, kernel_size)
    return formula(x, kernel_size)


def _backward(dy: Tensor, x: Tensor, y: Tensor, kernel_size: int, backend: str) -> Tensor:
    if runs_kernels(backend, x):
        from . import kernel

        return kernel.run_backward(dy, x, y, kernel_size)
    return gradient(dy, x, y, kernel_size, backend)


def gradient(dy: Tensor, x: Tensor, y: Tensor, kernel_size: int, backend: str) -> Tensor:
    """In torch's operators, so that it has derivatives: what a backward runs that is differentiated again."""
    windows = x.unflatten(-1, (y.shape[-1], kernel_size))
    y = formula(x, kernel_size) if torch.is_grad_enabled() else y
    return (dy.unsqueeze(-1) * (windows - y.unsqueeze(-1)).exp() / kernel_size).flatten(-2)


class _LsePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel_size: int, backend: str) -> Tensor:
        with below_autograd():
            y: Tensor = OP(x, kernel_size, backend)
        ctx.save_for_backward(x, y)
        ctx.options = kernel_size, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return OP_BACKWARD(dy, *ctx.saved_tensors, *ctx.options), None, None


OP: Any = register(
    "lse_pool1d(Tensor input, SymInt kernel_size, str backend) -> Tensor",
    implementation=_forward,
    fake=lambda x, kernel_size, backend: x.new_empty(*x.shape[:-1], x.shape[-1] // kernel_size),
    autograd=_LsePool.apply,
    composite=lambda x, kernel_size, backend: formula(x, kernel_size),
)
OP_BACKWARD: Any = register(
    "lse_pool1d_backward(Tensor dy, Tensor input, Tensor output, SymInt kernel_size, str backend) -> Tensor",
    implementation=_backward,
    fake=lambda dy, x, y, kernel_size, backend: torch.empty_like(x),
    autograd=gradient,
    composite=gradient,
)
