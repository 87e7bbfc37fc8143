"""Registration of operators: ``torch.ops.<package>.<name>`` with schema, implementations, fake and autograd.

The namespace is the top package's name, so that a copy of the package loaded under another name registers beside this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._dispatch import UnsupportedError, in_transform

NAMESPACE = __name__.split(".", 1)[0]
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


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
        autograd: runs with gradients enabled and inputs that may need them. Everybody who calls the operator without
            our public function (an exported program, another library) gets gradients through it.
        composite: the same in torch's operators, for a ``torch.func`` transform or a level of forward AD, into which an
            exported program or another library may bring the operator: our public functions call none there.
    """

    def by_level(*call: Any) -> Any:
        if not in_transform():
            return autograd(*call)
        if composite is None or call[-1] == "triton":
            raise UnsupportedError(
                f"torch.ops.{NAMESPACE}.{name}: no kernel has derivatives in a torch.func transform or forward-mode AD"
            )
        return composite(*call)

    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _library.impl(name, by_level, "Autograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# Inside this block an operator's own implementation runs, not its autograd: the wrapping Function has recorded it.
below_autograd = torch._C._AutoDispatchBelowAutograd
