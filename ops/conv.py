"""2-d convolution with a fused epilogue: public function, operators, autograd, torch implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autotune.device import DeviceSpec
from ..autotune.resolve import Choice, resolve
from . import _checks
from ._dispatch import choose, resolved_precision, runs_kernels
from ._layout import autocast, has_unit_channels, is_channels_last, memory_format
from ._register import below_autograd, register

# Activations whose derivative needs their input; for the others the output is enough, and nothing more is saved.
SAVES_INPUT = ("silu", "gelu", "gelu_tanh", "hardsigmoid", "hardswish")
Pair = tuple[int, int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    r"""2-d convolution with scale, bias, residual and activation applied before the result is stored.

    .. math:: y_{nkpq} = \mathrm{act}\Bigl(\mathrm{scale}_k \sum_{c,r,s} x_{n,c,p\,stride + r\,dilation - padding,
              q\,stride + s\,dilation - padding}\; w_{kcrs} + \mathrm{bias}_k + \mathrm{residual}_{nkpq}\Bigr)

    A drop-in for :func:`torch.nn.functional.conv2d`; the keyword-only arguments are ours. Sums are in fp32 and rounded
    once, after the activation.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``; contiguous and channels last are read in place.
        weight: ``[K, C / groups, R, S]``.
        bias: ``[K]``.
        stride, padding, dilation, groups: as in torch; ``padding`` may be ``"same"`` or ``"valid"``.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"``,
            ``"hardswish"``, ``"hardsigmoid"``, ``"sigmoid"`` or ``"tanh"``.
        residual: shape and dtype of the output; added before the activation.
        scale: ``[K]``; with ``bias`` it carries a folded batch normalisation.
        precision: how fp32 operands are multiplied: ``"ieee"``, ``"tf32"`` or ``"tf32x3"`` (three tf32 products).
            Default: torch's setting for cuDNN convolutions. No effect on other dtypes.

    Returns:
        ``[N, K, P, Q]`` in the dtype of ``input``; channels last if ``input`` or ``weight`` is.

    Raises:
        RuntimeError, TypeError, ValueError: what torch raises, with torch's text, from one check for all backends.
        UnsupportedError: under ``use_backend("triton")``, for what no kernel covers.

    Example::

        >>> x, w = torch.randn(8, 16, 32, 32), torch.randn(64, 16, 3, 3)
        >>> tritune.conv2d(x, w, padding=1, activation="relu").shape
        torch.Size([8, 64, 32, 32])
    """
    input, weight, bias, residual, scale = autocast(input, weight, bias, residual, scale)
    args = _checks.check_conv2d(
        input, weight, bias, stride, padding, dilation, groups,
        activation=activation, residual=residual, scale=scale, precision=precision,
    )  # fmt: skip
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    call_tensors = (batched, weight, bias, scale, residual)
    tensors = [t for t in call_tensors if t is not None]
    backend = choose(
        "conv2d",
        tensors,
        lambda device: _auto_rule(_problem(batched, weight, args, precision), device, activation, scale, residual),
        lambda device: _kernel_choices(_problem(batched, weight, args, precision), device, call_tensors, activation),
        lambda: _limits(batched, weight),
    )
    if backend == "torch":
        return _composite(input, weight, bias, scale, residual, args, activation or "none")

    if args.pad_extra is not None:
        batched = F.pad(batched, args.pad_extra)
    if residual is not None and input.dim() == 3:
        residual = residual.unsqueeze(0)
    resolved = resolved_precision(input, precision, torch.backends.cudnn, "conv")
    call = (
        batched, weight, bias, scale, residual, args.stride, args.padding, args.dilation, args.groups,
        activation or "none", resolved, "triton",
    )  # fmt: skip
    if torch.compiler.is_compiling():
        y = OP(*call)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y = _Conv2d.apply(*call)[0]
    else:
        with below_autograd():
            y = OP(*call)
    return y if input.dim() == 4 else y.squeeze(0)


# --- the choice of backend -------------------------------------------------------------------------------------------


def _limits(input: Tensor, weight: Tensor) -> str | None:
    """What the kernels leave to torch beyond dtypes and devices."""
    if torch.compiler.is_compiling():
        return None
    if weight.numel() == 0:
        return "weight is empty"
    if input.numel() >= 2**31 * input.shape[1] or weight.numel() >= 2**31:
        return "input has 2**31 pixels, or weight 2**31 elements, or more"
    return None


def _output_size(hw: Any, window: Any, stride: Any, padding: Any, dilation: Any) -> Pair:
    return tuple(
        (size + 2 * pad - dil * (tap - 1) - 1) // step + 1
        for size, tap, step, pad, dil in zip(hw, window, stride, padding, dilation, strict=True)
    )


def _problem(input: Tensor, weight: Tensor, args: _checks.Conv2dArgs, precision: str | None) -> Any:
    from ..kernels import conv

    geometry = _geometry(args.stride, args.padding, args.dilation, args.groups)
    extra = args.pad_extra or (0, 0, 0, 0)
    n, c, h, w = input.shape
    shape = (n, c, h + extra[2] + extra[3], w + extra[0] + extra[1])
    pq = _output_size(shape[2:], weight.shape[2:], args.stride, args.padding, args.dilation)
    channels_last = is_channels_last(input) or is_channels_last(weight)
    resolved = resolved_precision(input, precision, torch.backends.cudnn, "conv")
    return conv.problem_of(shape, tuple(weight.shape), pq, geometry, input.dtype, resolved, channels_last)


def _is_depthwise(per_group: int, groups: int) -> bool:
    return per_group == 1 and groups > 1


def _forward_choice(problem: Any, device: DeviceSpec) -> tuple[str, Choice]:
    from ..kernels import conv

    tunable = _module(problem.C, problem.geometry.groups).FORWARD
    return tunable.name, resolve(tunable, conv.pad_problem(problem), device)


def _kernel_choices(
    problem: Any, device: DeviceSpec, tensors: tuple[Tensor | None, ...], activation: str | None
) -> tuple[tuple[str, Choice], ...]:
    """The kernels of a call and of its backward, for an output gradient that is laid out as the output."""
    from ..kernels import conv

    forward = _forward_choice(problem, device)
    input, weight = tensors[:2]
    assert input is not None
    assert weight is not None
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if not any(needs):
        return (forward,)
    need_input, need_weight, need_bias = needs[:3]
    groups = problem.geometry.groups
    module = _module(problem.C, groups)
    filters = problem.K * groups
    has_saved = activation not in (None, "none")
    unit_channels = problem.channels_last or filters == 1 or problem.P * problem.Q == 1
    relays = module is conv and not unit_channels and (need_input or need_weight)
    backward: list[tuple[Any, Any]] = []
    if has_saved or relays or need_bias:
        writes_g = has_saved or relays
        epilogue = conv.EpilogueProblem(problem.pixels, filters, input.dtype, has_saved, writes_g, need_bias)
        backward.append((conv.EPILOGUE_GRAD, epilogue))
    if need_input:
        backward.append((module.INPUT_GRAD, problem._replace(channels_last=is_channels_last(input))))
    if need_weight:
        # The depthwise kernel reads x as it lies, and its weights have one layout; the other kernel writes both.
        decides = has_unit_channels(input) if module is not conv else is_channels_last(weight)
        backward.append((module.WEIGHT_GRAD, conv.pad_problem(problem)._replace(channels_last=decides)))
    return forward, *((tunable.name, resolve(tunable, one, device)) for tunable, one in backward)


def _auto_rule(
    problem: Any, device: DeviceSpec, activation: str | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[bool, str]:
    """Do the kernels win? By measurement if there is one; else only where fusion saves passes over memory.

    torch runs every unfused step as a pass that reads and writes the output. Ours is taken when memory bounds the call
    even at 60 % of the tensor-core rate, and torch would move at least a quarter more bytes.
    """
    _, choice = _forward_choice(problem, device)
    if choice.us is not None and choice.torch_us is not None:
        wins = choice.us < choice.torch_us
        return wins, f"measured: {choice.us:.1f} us against {choice.torch_us:.1f} us of torch"
    passes = sum(step is not None for step in (activation, scale, residual))
    ours = problem.minimal_bytes()
    output = problem.pixels * problem.K * problem.geometry.groups * problem.itemsize
    theirs = ours + output * (2 * passes + (residual is not None))
    memory_us = ours / (device.dram_gbs * 1e3)
    compute_us = problem.flops / (0.6 * device.tflops(problem.precision) * 1e6)
    if problem.channels_last and memory_us >= compute_us and theirs >= 1.25 * ours:
        return True, f"not measured; fusing {passes} passes saves {1 - ours / theirs:.0%} of torch's bytes"
    return False, "not measured, and counted traffic does not promise a win: `tritune tune` can"


# --- torch's implementation: fallback and yardstick ------------------------------------------------------------------


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation by torch's own operators."""
    if activation == "none":
        return z
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return {
        "relu": torch.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu,
        "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    }[activation](z)  # fmt: skip


def _epilogue(z: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if scale is not None:
        z = z * scale.view(-1, 1, 1)
    if bias is not None:
        z = z + bias.view(-1, 1, 1)
    return z if residual is None else z + residual


def _composite(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    args: _checks.Conv2dArgs, activation: str,
) -> Tensor:  # fmt: skip
    if args.pad_extra is not None:
        input = F.pad(input, args.pad_extra)
    fused_bias = bias if scale is None else None
    z = F.conv2d(input, weight, fused_bias, args.stride, args.padding, args.dilation, args.groups)
    z = _epilogue(z, scale, None if scale is None else bias, residual)
    return activate(z, activation)


def _derivative(saved: Tensor, activation: str) -> Tensor:
    """Derivative of the activation from its output, or from its input for SAVES_INPUT; differentiable itself."""
    if activation == "relu":
        return (~(saved <= 0)).to(saved.dtype)  # 1 at NaN
    if activation == "relu6":
        return (~((saved <= 0) | (saved >= 6))).to(saved.dtype)
    if activation == "leaky_relu":
        return torch.where(saved > 0, 1.0, 0.01).to(saved.dtype)
    if activation == "sigmoid":
        return saved * (1 - saved)
    if activation == "tanh":
        return 1 - saved * saved
    if activation == "silu":
        sigmoid = torch.sigmoid(saved)
        return sigmoid * (1 + saved * (1 - sigmoid))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(saved * 0.7071067811865476))
        return cdf + saved * 0.3989422804014327 * torch.exp(-0.5 * saved * saved)
    if activation == "gelu_tanh":
        t = torch.tanh(0.7978845608028654 * (saved + 0.044715 * saved**3))
        return 0.5 * (1 + t) + 0.5 * saved * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * saved * saved)
    if activation == "hardsigmoid":
        return ((saved > -3) & (saved < 3)).to(saved.dtype) / 6
    inner = torch.where(saved < 3, saved / 3 + 0.5, 1.0)
    return torch.where(saved <= -3, 0.0, inner).to(saved.dtype)  # hardswish


# --- operators -------------------------------------------------------------------------------------------------------


def _module(per_group: int, groups: int) -> Any:
    from ..kernels import conv, conv_depthwise

    return conv_depthwise if _is_depthwise(per_group, groups) else conv


def _geometry(stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    from ..kernels.conv import Geometry

    window: list[int] = [*stride, *padding, *dilation]
    return Geometry(*window, groups)  # type: ignore[call-arg]


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, activation: str, precision: str,
    backend: str, *, save_input: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    channels_last = is_channels_last(input) or is_channels_last(weight)
    if runs_kernels(backend, input):
        pq = _output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
        return _module(weight.shape[1], groups).run_forward(
            input, weight, pq, _geometry(stride, padding, dilation, groups), bias=bias, scale=scale,
            residual=residual, activation=activation, precision=precision, save_input=save_input,
            is_channels_last=channels_last,
        )  # fmt: skip
    args = _checks.Conv2dArgs(tuple(stride), tuple(padding), tuple(dilation), groups, None)  # type: ignore[arg-type]
    z = _composite(input, weight, bias, scale, residual, args, "none")
    z = z.contiguous(memory_format=memory_format(channels_last))
    return activate(z, activation), z if save_input else None


def _fake_forward(
    input: Tensor, weight: Tensor, bias: Any, scale: Any, residual: Any,
    stride: list[int], padding: list[int], dilation: list[int], *rest: Any,
) -> Tensor:  # fmt: skip
    shape = (
        input.shape[0], weight.shape[0], *_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    )  # fmt: skip
    channels_last = is_channels_last(input) or is_channels_last(weight)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(channels_last))


class _Conv2d(torch.autograd.Function):
    """Returns the output and, for SAVES_INPUT, the activation's input: saved for backward, and an output so that a
    second derivative reaches it."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        activation = options[4]
        call = (input, weight, bias, scale, residual, *options)
        z = None
        with below_autograd():
            if activation in SAVES_INPUT:
                y, z = OP_SAVING_INPUT(*call)
            else:
                y = OP(*call)
        saved = None if activation == "none" else y if z is None else z
        ctx.save_for_backward(input, weight, scale, saved)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Tensor | None, ...]:
        input, weight, scale, saved = ctx.saved_tensors
        stride, padding, dilation, groups, activation, precision, backend = ctx.options
        need_input, need_weight, need_bias, need_scale, need_residual = ctx.needs_input_grad[:5]
        geometry = (stride, padding, dilation, groups, precision, backend)
        if dy is None and dz is None:
            return (None,) * 12

        # dz comes only from a second derivative, which reaches the activation's input through it.
        # The dense kernels want g channels last, and what reads it may as well write it so; depthwise reads both.
        g, bias_grad = dy, None
        depthwise = _is_depthwise(weight.shape[1], groups)
        relays = not depthwise and (need_input or need_weight) and dy is not None and not has_unit_channels(dy)
        if dy is not None and (activation != "none" or (relays and runs_kernels(backend, dy))):
            channels_last = not depthwise or is_channels_last(saved)
            g, bias_grad = OP_EPILOGUE_GRAD(
                dy, saved, activation, need_bias and dz is None, channels_last, backend
            )  # fmt: skip
        if dz is not None:
            g, bias_grad = dz if g is None else g + dz, None
        if need_bias and bias_grad is None:
            bias_grad = OP_BIAS_GRAD(g, backend)

        input_grad = weight_grad = scale_grad = None
        if need_input:
            scaled = weight if scale is None else weight * scale.view(-1, 1, 1, 1)
            input_grad = OP_INPUT_GRAD(g, scaled, input.shape[2], input.shape[3], is_channels_last(input), *geometry)
        if need_weight:
            r, s = weight.shape[2:]
            weight_grad = OP_WEIGHT_GRAD(input, g, r, s, is_channels_last(weight), *geometry)
            weight_grad = weight_grad if scale is None else weight_grad * scale.view(-1, 1, 1, 1)
        if need_scale:
            assert g is not None
            assert scale is not None
            # The convolution again: sum(w * dw) would be the same number, but cancels where the activation saturates.
            plain = OP(input, weight, None, None, None, *geometry[:4], "none", precision, backend)
            wide = torch.promote_types(g.dtype, torch.float32)
            scale_grad = (g.to(wide) * plain).sum((0, 2, 3), dtype=torch.float64).to(scale.dtype)
        return (
            input_grad, weight_grad, bias_grad if need_bias else None, scale_grad, g if need_residual else None,
            *(None,) * 7,
        )  # fmt: skip


def _saving_input_autograd(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None,
    stride: Any, padding: Any, dilation: Any, groups: int, activation: str, precision: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = OP(input, weight, bias, scale, residual, stride, padding, dilation, groups, "none", precision, backend)
    return activate(z, activation), z


_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_CALL = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, "
    f"{_GEOMETRY}, str activation, str precision, str backend"
)
OP: Any = register(
    f"conv2d({_CALL}) -> Tensor",
    implementation=lambda *call: _forward(*call, save_input=False)[0],
    fake=_fake_forward,
    autograd=lambda *call: _Conv2d.apply(*call)[0],
)
OP_SAVING_INPUT: Any = register(
    f"conv2d_saving_input({_CALL}) -> (Tensor, Tensor)",
    implementation=lambda *call: _forward(*call, save_input=True),
    fake=lambda *call: (_fake_forward(*call), _fake_forward(*call)),
    autograd=_saving_input_autograd,
)


# Gradient at the activation's input, and of the bias.


def _epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, channels_last: bool, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if runs_kernels(backend, dy):
        from ..kernels.conv import run_epilogue_grad

        g, bias_grad = run_epilogue_grad(dy, saved, activation, need_bias=need_bias, is_channels_last=channels_last)
        return g, dy.new_empty(0) if bias_grad is None else bias_grad
    g, bias_grad = _differentiable_epilogue_grad(dy, saved, activation, need_bias)
    # A new tensor also where nothing changes: an operator's outputs must not alias its inputs.
    return torch.empty_like(g, memory_format=memory_format(channels_last)).copy_(g), bias_grad


def _differentiable_epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, *_: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(dy.dtype, torch.float32)
    g = dy.to(wide)
    if saved is not None:
        g = g * _derivative(saved.to(wide), activation)
    bias_grad = g.sum((0, 2, 3)).to(dy.dtype) if need_bias else dy.new_empty(0)
    return g.to(dy.dtype), bias_grad


def _epilogue_grad_autograd(*call: Any) -> tuple[Tensor, Tensor]:
    """A first backward runs the kernel; one that is differentiated again runs the formula in torch's operators."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:2]):
        return _differentiable_epilogue_grad(*call)
    with below_autograd():
        return OP_EPILOGUE_GRAD(*call)


def _fake_epilogue_grad(
    dy: Tensor, saved: Tensor | None, activation: str, need_bias: bool, channels_last: bool, backend: str
) -> Any:  # fmt: skip
    g = torch.empty_like(dy, memory_format=memory_format(channels_last))
    return g, dy.new_empty(dy.shape[1] if need_bias else 0)


def _bias_grad(g: Tensor, backend: str) -> Tensor:
    if runs_kernels(backend, g):
        from ..kernels.conv import run_bias_grad

        return run_bias_grad(g)
    return g.sum((0, 2, 3))


def _bias_grad_autograd(g: Tensor, backend: str) -> Tensor:
    if torch.is_grad_enabled() and g.requires_grad:
        return g.sum((0, 2, 3))
    with below_autograd():
        return OP_BIAS_GRAD(g, backend)


OP_EPILOGUE_GRAD: Any = register(
    "conv2d_epilogue_grad(Tensor dy, Tensor? saved, str activation, bool need_bias, bool channels_last, str backend)"
    " -> (Tensor, Tensor)",
    implementation=_epilogue_grad,
    fake=_fake_epilogue_grad,
    autograd=_epilogue_grad_autograd,
)
OP_BIAS_GRAD: Any = register(
    "conv2d_bias_grad(Tensor g, str backend) -> Tensor",
    implementation=_bias_grad,
    fake=lambda g, backend: g.new_empty(g.shape[1]),
    autograd=_bias_grad_autograd,
)


# Input gradient: linear in g and in the weight, so its own gradients are a convolution and a weight gradient.


def _input_grad(
    g: Tensor, weight: Tensor, h: int, w: int, channels_last: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    if runs_kernels(backend, g):
        return _module(weight.shape[1], groups).run_input_grad(
            g, weight, (h, w), _geometry(stride, padding, dilation, groups), precision=precision,
            is_channels_last=channels_last,
        )  # fmt: skip
    like = g.new_empty(1).expand(g.shape[0], weight.shape[1] * groups, h, w)
    grad = torch.ops.aten.convolution_backward(
        g, like, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )[0]
    return grad.contiguous(memory_format=memory_format(channels_last))


def _fake_input_grad(
    g: Tensor, weight: Tensor, h: int, w: int, channels_last: bool,
    stride: Any, padding: Any, dilation: Any, groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    shape = (g.shape[0], weight.shape[1] * groups, h, w)
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=memory_format(channels_last))


class _InputGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.options = options
        with below_autograd():
            return OP_INPUT_GRAD(g, weight, *options)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        _, _, _, *geometry, precision, backend = ctx.options
        g_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            g_grad = OP(ddx, weight, None, None, None, *geometry, "none", precision, backend)
        if ctx.needs_input_grad[1]:
            r, s = weight.shape[2:]
            weight_grad = OP_WEIGHT_GRAD(ddx, g, r, s, is_channels_last(weight), *geometry, precision, backend)
        return g_grad, weight_grad, *(None,) * 9


OP_INPUT_GRAD: Any = register(
    f"conv2d_input_grad(Tensor g, Tensor weight, SymInt h, SymInt w, bool channels_last, {_GEOMETRY}, "
    "str precision, str backend) -> Tensor",
    implementation=_input_grad,
    fake=_fake_input_grad,
    autograd=_InputGrad.apply,
)


# Weight gradient: linear in the input and in g.


def _weight_grad(
    input: Tensor, g: Tensor, r: int, s: int, channels_last: bool,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    shape = (g.shape[1], input.shape[1] // groups, r, s)
    if runs_kernels(backend, input):
        return _module(shape[1], groups).run_weight_grad(
            input, g, shape, _geometry(stride, padding, dilation, groups), precision=precision,
            is_channels_last=channels_last,
        )  # fmt: skip
    like = g.new_empty(1).expand(shape)
    grad = torch.ops.aten.convolution_backward(
        g, input, like, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    return grad.contiguous(memory_format=memory_format(channels_last))


def _fake_weight_grad(
    input: Tensor, g: Tensor, r: int, s: int, channels_last: bool,
    stride: Any, padding: Any, dilation: Any, groups: int, precision: str, backend: str,
) -> Tensor:  # fmt: skip
    shape = (g.shape[1], input.shape[1] // groups, r, s)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(channels_last))


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
        _, _, _, *geometry, precision, backend = ctx.options
        input_grad = g_grad = None
        if ctx.needs_input_grad[0]:
            h, w = input.shape[2:]
            input_grad = OP_INPUT_GRAD(g, ddw, h, w, is_channels_last(input), *geometry, precision, backend)
        if ctx.needs_input_grad[1]:
            g_grad = OP(input, ddw, None, None, None, *geometry, "none", precision, backend)
        return input_grad, g_grad, *(None,) * 9


OP_WEIGHT_GRAD: Any = register(
    f"conv2d_weight_grad(Tensor input, Tensor g, SymInt r, SymInt s, bool channels_last, {_GEOMETRY}, "
    "str precision, str backend) -> Tensor",
    implementation=_weight_grad,
    fake=_fake_weight_grad,
    autograd=_WeightGrad.apply,
)
