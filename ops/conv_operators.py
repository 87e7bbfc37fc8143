"""The registered operators of convolution: implementations, fakes and autograd.

Three operators close under differentiation, in any number of dimensions, so every derivative of any order is made of
them: the convolution ``y = conv(x, w)``, its transpose ``x = conv_transpose(y, w)`` and the weight gradient
``w = conv_weight_grad(x, y)``. Each is linear in both arguments, and its gradients are the other two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autotune.layout import empty, laid_out
from ._dispatch import conv_setting, resolved_precision, runs_kernels
from ._layout import has_unit_channels, is_channels_last, or_empty
from ._register import below_autograd, register
from .conv_torch import (
    SAVES_INPUT,
    activate,
    all_but_channels,
    differentiable_bias_grad,
    differentiable_epilogue_grad,
    epilogue,
    per_channel,
    torch_convolution,
    torch_weight_grad,
)

# --- which kernels ---------------------------------------------------------------------------------------------------


def is_direct(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Do few channels meet in a group, so that the kernels multiply them one by one and not as matrices?"""
    from ..kernels.conv_direct import takes

    return takes(weight_shape, stride, groups)


def module_of(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> Any:
    """The kernels of the convolution and of its transpose."""
    from ..kernels import conv, conv_direct

    return conv_direct if is_direct(weight_shape, stride, groups) else conv


def weight_grad_module_of(weight_shape: Sequence[int], stride: Sequence[int], groups: int) -> Any:
    """Those of the weight gradient, where groups of several channels are merged into matrices."""
    from ..kernels import conv

    return module_of(weight_shape, stride, groups) if weight_shape[1] == 1 else conv


def result_is_channels_last(input: Tensor, weight: Tensor) -> bool:
    """torch's rule. In one dimension it looks at the weights alone."""
    return is_channels_last(weight) or (input.dim() > 3 and is_channels_last(input))


# --- convolution and its transpose -----------------------------------------------------------------------------------


def forward(
    transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    residual: Tensor | None, size: list[int], channels_last: bool | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, activation: str, precision: str, backend: str, *, save_input: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result and, with ``save_input``, the activation's input."""
    if channels_last is None:
        channels_last = result_is_channels_last(input, weight)
    if runs_kernels(backend, input):
        from ..kernels import conv

        geometry = conv.Geometry.of(stride, padding, dilation, groups)
        precision = resolved_precision(input, precision, conv_setting)
        module = module_of(weight.shape, stride, groups)
        run = module.run_transpose if transposed else module.run_forward
        return run(
            input, weight, size, geometry, precision=precision, is_channels_last=channels_last, bias=bias, scale=scale,
            residual=residual, activation=activation, save_input=save_input,
        )  # fmt: skip
    z = torch_convolution(transposed, input, weight, size, stride, padding, dilation, groups)
    z = laid_out(epilogue(z, scale, bias, residual, len(size)), channels_last)
    return activate(z, activation), z if save_input else None


def _fake_forward(
    transposed: bool, input: Tensor, weight: Tensor, bias: Any, scale: Any, residual: Any, size: Sequence[int],
    channels_last: bool | None, stride: Any, padding: Any, dilation: Any, groups: int, *rest: Any,
) -> Tensor:  # fmt: skip
    if channels_last is None:
        channels_last = result_is_channels_last(input, weight)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return empty(input, (input.shape[0], channels, *size), channels_last)


class _Convolution(torch.autograd.Function):
    """Returns the output and, for SAVES_INPUT, the activation's input: saved for backward, and an output so that a
    second derivative reaches it."""

    @staticmethod
    def forward(
        ctx: Any, transposed: bool, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
        residual: Tensor | None, *options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        activation = options[6]
        call = (input, weight, bias, scale, residual, *options)
        z = None
        with below_autograd():
            if activation in SAVES_INPUT:
                y, z = OPS_SAVING_INPUT[transposed](*call)
            else:
                y = OPS[transposed](*call)
        saved = None if activation == "none" else y if z is None else z
        ctx.save_for_backward(input, weight, scale, saved)
        ctx.transposed, ctx.options = transposed, options
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None and dz is None:
            return (None,) * 15
        input, weight, scale, saved = ctx.saved_tensors
        transposed, (size, _, *geometry, activation, precision, backend) = ctx.transposed, ctx.options
        groups = geometry[-1]
        need_input, need_weight, need_bias, need_scale, need_residual = ctx.needs_input_grad[1:6]

        # dz comes only from a second derivative, which reaches the activation's input through it.
        # The dense kernels want g channels last, and what reads it may as well write it so; the direct ones and torch
        # read both layouts.
        g, bias_grad = dy, None
        dense = runs_kernels(backend, input) and not is_direct(weight.shape, geometry[0], groups)
        relays = dense and (need_input or need_weight) and dy is not None and not has_unit_channels(dy)
        if dy is not None and (activation != "none" or relays):
            channels_last = dense or is_channels_last(saved)
            g, bias_grad = OP_EPILOGUE_GRAD(
                dy, saved, activation, need_bias and dz is None, channels_last, backend
            )  # fmt: skip
        if dz is not None:
            g, bias_grad = dz if g is None else g + dz, None
        if need_bias and bias_grad is None:
            bias_grad = OP_BIAS_GRAD(g, backend)

        plain = (None, None, None)  # no bias, scale or residual
        options = (*geometry, "none", precision, backend)
        input_grad = weight_grad = scale_grad = None
        scaled = g
        if scale is not None and (need_input or need_weight):
            assert g is not None
            scaled = g * per_channel(scale, len(size))
        if need_input:
            space, channels_last = input.shape[2:], is_channels_last(input)
            input_grad = OPS[not transposed](scaled, weight, *plain, space, channels_last, *options)
        if need_weight:
            image, output = (scaled, input) if transposed else (input, scaled)
            weight_grad = OP_WEIGHT_GRAD(
                image, output, weight.shape[2:], is_channels_last(weight), *geometry, precision, backend
            )  # fmt: skip
        if need_scale:
            assert g is not None
            assert scale is not None
            # The convolution again: sum(w * dw) would be the same number, but cancels where the activation saturates.
            bare = OPS[transposed](input, weight, *plain, size, None, *options)
            wide = torch.promote_types(g.dtype, torch.float32)
            scale_grad = (g.to(wide) * bare).sum(all_but_channels(g), dtype=torch.float64).to(scale.dtype)
        return (
            None, input_grad, weight_grad, bias_grad if need_bias else None, scale_grad, g if need_residual else None,
            *(None,) * 9,
        )  # fmt: skip


def _saving_input_autograd(transposed: bool, *call: Any) -> tuple[Tensor, Tensor]:
    *head, activation, precision, backend = call
    z = OPS[transposed](*head, "none", precision, backend)
    return activate(z, activation), z


_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"


def _register_convolution(name: str, transposed: bool) -> tuple[Any, Any]:
    """The operator and the one that also returns the activation's input. ``size`` is the result's in space; its layout
    is torch's where ``channels_last`` is not given."""
    call = (
        "Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, SymInt[] size, "
        f"bool? channels_last, {_GEOMETRY}, str activation, str precision, str backend"
    )
    op = register(
        f"{name}({call}) -> Tensor",
        implementation=lambda *call: forward(transposed, *call, save_input=False)[0],
        fake=lambda *call: _fake_forward(transposed, *call),
        autograd=lambda *call: _Convolution.apply(transposed, *call)[0],
    )
    saving_input = register(
        f"{name}_saving_input({call}) -> (Tensor, Tensor)",
        implementation=lambda *call: forward(transposed, *call, save_input=True),
        fake=lambda *call: (_fake_forward(transposed, *call), _fake_forward(transposed, *call)),
        autograd=lambda *call: _saving_input_autograd(transposed, *call),
    )
    return op, saving_input


OP, OP_SAVING_INPUT = _register_convolution("conv", False)
OP_TRANSPOSE, OP_TRANSPOSE_SAVING_INPUT = _register_convolution("conv_transpose", True)
OPS: dict[bool, Any] = {False: OP, True: OP_TRANSPOSE}
OPS_SAVING_INPUT: dict[bool, Any] = {False: OP_SAVING_INPUT, True: OP_TRANSPOSE_SAVING_INPUT}


# --- gradient at the input of the activation, and of the bias --------------------------------------------------------


def _epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, channels_last: bool, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if runs_kernels(backend, dy):
        from ..kernels.conv import run_epilogue_grad

        g, bias_grad = run_epilogue_grad(dy, saved, activation, need_bias=need_bias, is_channels_last=channels_last)
        return g, or_empty(bias_grad, dy)
    g, bias_grad = differentiable_epilogue_grad(dy, saved, activation, need_bias)
    # A new tensor also where nothing changes: an operator's outputs must not alias its inputs.
    return empty(g, g.shape, channels_last).copy_(g), bias_grad


def _fake_epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, channels_last: bool, backend: str
) -> Any:  # fmt: skip
    return empty(dy, dy.shape, channels_last), dy.new_empty(dy.shape[1] if need_bias else 0)


def _bias_grad(g: Tensor, backend: str) -> Tensor:
    if runs_kernels(backend, g):
        from ..kernels.conv import run_bias_grad

        return run_bias_grad(g)
    return differentiable_bias_grad(g)


# A first backward runs the kernels; one that is differentiated again runs the formulas in torch's operators.
OP_EPILOGUE_GRAD: Any = register(
    "conv_epilogue_grad(Tensor dy, Tensor? saved, str activation, bool need_bias, bool channels_last, str backend)"
    " -> (Tensor, Tensor)",
    implementation=_epilogue_grad,
    fake=_fake_epilogue_grad,
    autograd=differentiable_epilogue_grad,
)
OP_BIAS_GRAD: Any = register(
    "conv_bias_grad(Tensor g, str backend) -> Tensor",
    implementation=_bias_grad,
    fake=lambda g, backend: g.new_empty(g.shape[1]),
    autograd=differentiable_bias_grad,
)


# --- weight gradient: linear in the input and in g, and so are its own gradients, a transpose and a convolution ------


def _weight_grad(
    input: Tensor, g: Tensor, window: list[int], channels_last: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    shape = (g.shape[1], input.shape[1] // groups, *window)
    if runs_kernels(backend, input):
        from ..kernels import conv

        geometry = conv.Geometry.of(stride, padding, dilation, groups)
        precision = resolved_precision(input, precision, conv_setting)
        return weight_grad_module_of(shape, stride, groups).run_weight_grad(
            input, g, shape, geometry, precision=precision, is_channels_last=channels_last
        )
    grad = torch_weight_grad(input, g, shape, stride, padding, dilation, groups)
    return laid_out(grad, channels_last)


def _fake_weight_grad(
    input: Tensor, g: Tensor, window: Sequence[int], channels_last: bool,
    stride: Any, padding: Any, dilation: Any, groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    return empty(input, (g.shape[1], input.shape[1] // groups, *window), channels_last)


class _WeightGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, g: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(input, g)
        ctx.options = options
        with below_autograd():
            return OP_WEIGHT_GRAD(input, g, *options)

    @staticmethod
    def backward(ctx: Any, ddw: Tensor) -> tuple[Tensor | None, ...]:
        input, g = ctx.saved_tensors
        _, _, *geometry, precision, backend = ctx.options
        plain, options = (None, None, None), (*geometry, "none", precision, backend)
        input_grad = g_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = OP_TRANSPOSE(g, ddw, *plain, input.shape[2:], is_channels_last(input), *options)
        if ctx.needs_input_grad[1]:
            g_grad = OP(input, ddw, *plain, g.shape[2:], is_channels_last(g), *options)
        return input_grad, g_grad, *(None,) * 8


OP_WEIGHT_GRAD: Any = register(
    f"conv_weight_grad(Tensor input, Tensor g, SymInt[] window, bool channels_last, {_GEOMETRY}, "
    "str precision, str backend) -> Tensor",
    implementation=_weight_grad,
    fake=_fake_weight_grad,
    autograd=_WeightGrad.apply,
)
