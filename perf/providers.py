"""Who runs a case: this library and its peers, each called on its own copy of the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..autotune.workload import Case, Operator, lay_out

PROVIDERS = {
    "tritune": "this library's kernels",
    "torch": "torch as called: images in NCHW, every step an operator, cuDNN's own choice of algorithm",
    "torch_channels_last": "the same in channels last with torch.backends.cudnn.benchmark",
    "torch_bare": "torch_channels_last without bias, activation and residual",
    "torch_compile": "torch_channels_last compiled by torch.compile",
}
IMAGES = ("tritune", "torch", "torch_channels_last")


def prepare(
    operator: Operator, case: Case, provider: str, tensors: dict[str, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    """The call of one provider on its own copy of the tensors, laid out as it wants them.

    Returns:
        A function without arguments; its result holds ``"output"`` and ``"grad <name>"`` of each gradient.
    """
    function = {"tritune": operator.ours, "torch_bare": operator.bare}.get(provider, operator.torch)
    assert function is not None
    if provider == "torch_compile":
        torch._dynamo.reset()  # it gives up after eight shapes of one function
        function = torch.compile(function, dynamic=False)
    layout = {"tritune": case.layout, "torch": "nchw"}.get(provider, "nhwc") if case.layout else ""
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
