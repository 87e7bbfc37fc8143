"""Registration of operators: ``torch.ops.<package>.<name>`` with schema, implementations, fake and autograd.

The namespace is the top package's name, so that a copy of the package loaded under another name registers beside this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._dispatch import UnsupportedError, in_transform

NAMESPACE = __name__.split(".", 1)[0]
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_recording: dict[Any, Callable[..., Any]] = {}  # of each operator what records its gradient

# Inside this block an operator's implementation runs, and not what its key for autograd would: a Function around the
# block records the gradient, or none is needed.
below_autograd = torch._C._AutoDispatchBelowAutograd


def register(
    schema: str,
    *,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
    composite: Callable[..., Any] | None = None,
) -> Any:
    """Registers one functional operator, whose last argument is the backend, and returns its overload.

    Args:
        schema: name, arguments and result as ``torch.library`` writes them.
        implementation: runs below autograd, on real CPU and CUDA tensors; picks kernels or torch itself.
        fake: shapes, dtypes and strides of the result, for fake and meta tensors.
        autograd: returns the same and records the gradient; called only where one is asked for. Everybody who calls the
            operator without our public function (an exported program, another library) gets gradients through it.
        composite: the same in torch's operators, for a ``torch.func`` transform or a level of forward AD, into which an
            exported program or another library may bring the operator. There our public functions call no operator.
    """

    def by_level(*call: Any) -> Any:
        """What the operator's key for autograd runs."""
        if in_transform():
            if composite is None or call[-1] == "triton":
                raise UnsupportedError(
                    f"torch.ops.{NAMESPACE}.{name}: no kernel has derivatives in a torch.func transform or "
                    "forward-mode AD"
                )
            return composite(*call)
        if requires_grad(call):
            return autograd(*call)
        with below_autograd():
            return operator(*call)

    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _library.impl(name, by_level, "Autograd")
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _recording[operator] = autograd
    return operator


def requires_grad(arguments: Iterable[Any]) -> bool:
    """Does torch record gradients, and does one of these need one? They may be other things than tensors, but no lists
    of tensors, which no operator takes."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def run_operator(operator: Any, call: tuple[Any, ...], needs_grad: bool) -> Any:
    """The one way from a public function to a registered operator.

    While torch.compile traces, the operator goes into the graph. Elsewhere its key for autograd is passed over, since
    the caller knows what that would find out: what records the gradient is called at once if one is needed, and if
    none is, the implementation.
    """
    if torch.compiler.is_compiling():
        return operator(*call)
    if needs_grad:
        return _recording[operator](*call)
    with below_autograd():
        return operator(*call)
