"""Convolution modules, and the convolution that a batch normalisation is folded into.

What computes the same as torch's module is a subclass of it, since tools that find it by its class (fusing, pruning,
summaries) then do the right thing. With an activation it computes more: the constructors below return a class that is
no subclass of torch's then.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from ..ops import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from ..ops._checks import ACTIVATIONS, PRECISIONS
from ..ops.conv_checks import _text_choice
from ._of_torch import Quantizable

Size = int | Sequence[int]


class _Epilogue(Quantizable):
    """What all convolution modules share: the options of the epilogue. Defaults stand here for a module of torch's
    that was given one of our classes with ``module.__class__ = ...``."""

    __jit_unused_properties__: ClassVar = [*Quantizable.__jit_unused_properties__, "activation"]
    _run: Callable[..., Tensor]
    _activation: str | None = None
    precision: str | None = None
    # torch's constructor sets these.
    weight: Any
    bias: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    padding_mode: Any
    output_padding: Any

    def __new__(cls, *args: Any, activation: str | None = None, **kwargs: Any) -> Self:
        if activation is not None and cls in _WITH_ACTIVATION:
            return _WITH_ACTIVATION[cls](*args, activation=activation, **kwargs)
        return super().__new__(cls)

    def _set_epilogue(self, activation: str | None, precision: str | None) -> None:
        for name, given, accepted in (("activation", activation, ACTIVATIONS), ("precision", precision, PRECISIONS)):
            if given is not None and given not in accepted:
                raise ValueError(_text_choice(name, given, accepted))
        kind = type(self)
        if isinstance(self, _WithActivation):
            if activation is None:
                raise TypeError(f"{kind.__name__} needs an activation; without one it is a {self._plain.__name__}")
        elif activation is not None:
            base = next(one for one in kind.__mro__ if one in _WITH_ACTIVATION)
            raise TypeError(
                f"{kind.__name__} computes more than a {base.__name__} if it has an activation: derive it from "
                f"tritune.nn.{_WITH_ACTIVATION[base].__name__}"
            )
        self._activation, self.precision = activation, precision

    @property
    def activation(self) -> str | None:
        """Fixed when the module is made."""
        return self._activation

    def extra_repr(self: Any) -> str:
        options = [
            f"{name}={value!r}"
            for name, value in (("activation", self.activation), ("precision", self.precision))
            if value is not None
        ]
        return ", ".join([_ConvNd.extra_repr(self), *options])


class _Conv(_Epilogue):
    _reversed_padding_repeated_twice: Any

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size | str = 0,
        dilation: Size = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros", device: Any = None,
        dtype: Any = None, *, activation: str | None = None, precision: str | None = None,
    ) -> None:  # fmt: skip
        self._set_epilogue(activation, precision)  # first, since reset_parameters may go by the activation
        super().__init__(  # type: ignore[call-arg]  # torch's class stands behind this one
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual`` has the output's shape and is added before the activation."""
        if isinstance(input, Proxy) and (leaf := self._leaf(input, residual)) is not None:
            return leaf
        if residual is None:
            return self._conv_forward(input, self.weight, self.bias)
        return self._conv_forward(input, self.weight, self.bias, residual)

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """As in torch the place to compute with another weight or bias, which subclasses override."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._run(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation=self._activation,
            residual=residual, precision=self.precision,
        )  # fmt: skip


class _ConvTranspose(_Epilogue):
    kernel_size: Any
    _rank: ClassVar[int]
    _output_padding: Any = _ConvTransposeNd._output_padding

    def _leaf(self, *args: Any) -> Proxy | None:
        """torch.ao.quantization would refuse this leaf: by default it chooses weights that it cannot observe for all
        transposed convolutions, but those of torch's exact classes. It traces into ours."""
        if type(args[0].tracer).__module__.startswith("torch.ao.quantization"):
            self._warn_of_quantization()
            return None
        return super()._leaf(*args)

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
        output_padding: Size = 0, groups: int = 1, bias: bool = True, dilation: Size = 1, padding_mode: str = "zeros",
        device: Any = None, dtype: Any = None, *, activation: str | None = None, precision: str | None = None,
    ) -> None:  # fmt: skip
        self._set_epilogue(activation, precision)
        super().__init__(  # type: ignore[call-arg]  # torch's class stands behind this one
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip

    def forward(self, input: Tensor, output_size: list[int] | None = None, residual: Tensor | None = None) -> Tensor:
        """``output_size`` as in torch; ``residual`` has the output's shape and is added before the activation."""
        if isinstance(input, Proxy) and (leaf := self._leaf(input, output_size, residual)) is not None:
            return leaf
        # The constructor rejects both, but attributes may be set afterwards.
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for ConvTranspose{self._rank}d")
        if not isinstance(self.padding, tuple):
            raise AssertionError("self.padding must be a tuple")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, self._rank, self.dilation
        )
        return self._run(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation,
            activation=self._activation, residual=residual, precision=self.precision,
        )  # fmt: skip


class _WithActivation(torch.nn.Module):
    """In the place of torch's class, for the modules that compute more than it: the same attributes and Parameters."""

    _plain: type[_ConvNd]
    _is_loading = False
    reset_parameters: Any = _ConvNd.reset_parameters

    def __init__(self, *args: Any) -> None:
        super().__init__()
        # torch's constructor takes instances of its class only. This one shares our attributes, and the methods that
        # the constructor calls are ours: those of a subclass, and what torch's hooks on registration see.
        instance = self._plain.__new__(self._plain)
        instance.__dict__ = self.__dict__
        called = ("register_parameter", "reset_parameters")
        self.__dict__.update({name: getattr(self, name) for name in called})
        instance.__init__(*args)  # type: ignore[misc]
        for name in called:
            del self.__dict__[name]

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """As in torch, which comes here when a Parameter is assigned; but ``weight`` and ``bias`` are not replaced.

        Tools that fold what follows into a convolution (``torch.nn.utils.fusion.fuse_conv_bn_eval``) take any module
        and assign its new ``weight``, which is wrong where an activation lies between. Loading, ``module.to`` and
        tensors of other kinds (distributed, quantised) replace them as ever.

        Raises:
            TypeError: if ``weight`` or ``bias`` is there and holds values.
        """
        old = self._parameters.get(name)
        if (
            name in ("weight", "bias") and type(old) is type(param) is torch.nn.Parameter and old is not param
            and not old.is_meta and not self._is_loading
        ):  # fmt: skip
            raise TypeError(
                f"the {name} of {type(self).__name__} is not replaced, since what is folded into it would come before "
                f"the activation: copy into it, load it, or delete it first (`del module.{name}`)"
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """A hook may load once more while this one loads."""
        was_loading = self._is_loading
        self._is_loading = True  # with assign=True it replaces Parameters
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            if not was_loading:
                self.__dict__.pop("_is_loading", None)


class Conv1d(_Conv, torch.nn.Conv1d):
    """:class:`torch.nn.Conv1d` on :func:`tritune.conv1d`; see :class:`Conv2d`.

    Shape: ``[N, C, L]`` or ``[C, L]`` to ``[N, K, Q]`` or ``[K, Q]``.
    """

    _run = staticmethod(conv1d)


class Conv2d(_Conv, torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` on :func:`tritune.conv2d`; a residual may be added in the same kernel.

    Args:
        activation: applied to the output before it is stored; see :func:`tritune.conv2d`. With one the constructor
            returns a :class:`ConvActivation2d`.
        precision: how fp32 is multiplied; see :func:`tritune.conv2d`.
        (all others): as in torch; a ``padding_mode`` other than ``"zeros"`` pads a copy of the input first, as there.

    Raises:
        ValueError: for an activation or a precision that is not accepted, and what torch rejects.
        TypeError: for an activation in a subclass, which has to derive from :class:`ConvActivation2d`.

    Shape: ``[N, C, H, W]`` or ``[C, H, W]`` to ``[N, K, P, Q]`` or ``[K, P, Q]``.

    Example::

        >>> layer = tritune.nn.Conv2d(3, 32, 3, padding=1, activation="relu")
        >>> layer(torch.randn(1, 3, 28, 28)).shape
        torch.Size([1, 32, 28, 28])
    """

    _run = staticmethod(conv2d)


class Conv3d(_Conv, torch.nn.Conv3d):
    """:class:`torch.nn.Conv3d` on :func:`tritune.conv3d`; see :class:`Conv2d`.

    Shape: ``[N, C, D, H, W]`` or ``[C, D, H, W]`` to ``[N, K, Z, P, Q]`` or ``[K, Z, P, Q]``.
    """

    _run = staticmethod(conv3d)


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` on :func:`tritune.conv_transpose1d`; see :class:`ConvTranspose2d`.

    Shape: ``[N, C, Q]`` or ``[C, Q]`` to ``[N, K, L]`` or ``[K, L]``.
    """

    _run = staticmethod(conv_transpose1d)
    _rank = 1


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` on :func:`tritune.conv_transpose2d`; see :class:`Conv2d`.

    Args:
        activation, precision: see :func:`tritune.conv_transpose2d`; with an activation the constructor returns a
            :class:`ConvTransposeActivation2d`.
        (all others): as in torch.

    Shape: ``[N, C, P, Q]`` or ``[C, P, Q]`` to ``[N, K, H, W]`` or ``[K, H, W]``.

    Example::

        >>> layer = tritune.nn.ConvTranspose2d(16, 8, 2, stride=2, activation="relu")
        >>> layer(torch.randn(1, 16, 14, 14)).shape
        torch.Size([1, 8, 28, 28])
    """

    _run = staticmethod(conv_transpose2d)
    _rank = 2


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` on :func:`tritune.conv_transpose3d`; see :class:`ConvTranspose2d`.

    Shape: ``[N, C, Z, P, Q]`` or ``[C, Z, P, Q]`` to ``[N, K, D, H, W]`` or ``[K, D, H, W]``.
    """

    _run = staticmethod(conv_transpose3d)
    _rank = 3


class _Lazy(LazyModuleMixin):
    """What the lazy modules add to torch's: torch.fx takes them for leaves, too, so no input tells of the channels."""

    def _infer_parameters(self, module: Any, args: Any, kwargs: Any = None) -> None:
        if not any(isinstance(one, Proxy) for one in args):
            super()._infer_parameters(module, args, kwargs)  # type: ignore[misc]


class LazyConv1d(_Lazy, torch.nn.LazyConv1d, Conv1d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConv1d` on :func:`tritune.conv1d`; see :class:`LazyConv2d`."""

    cls_to_become = Conv1d


class LazyConv2d(_Lazy, torch.nn.LazyConv2d, Conv2d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConv2d`: takes ``in_channels`` from its first input and is a :class:`Conv2d` from then on.

    Its arguments are torch's. ``precision`` may be set as an attribute; one with an activation cannot be lazy.

    Shape: as :class:`Conv2d`.

    Example::

        >>> layer = tritune.nn.LazyConv2d(8, 3)
        >>> layer(torch.randn(1, 5, 28, 28)).shape, type(layer) is tritune.nn.Conv2d
        (torch.Size([1, 8, 26, 26]), True)
    """

    cls_to_become = Conv2d


class LazyConv3d(_Lazy, torch.nn.LazyConv3d, Conv3d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConv3d` on :func:`tritune.conv3d`; see :class:`LazyConv2d`."""

    cls_to_become = Conv3d


class LazyConvTranspose1d(_Lazy, torch.nn.LazyConvTranspose1d, ConvTranspose1d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConvTranspose1d` on :func:`tritune.conv_transpose1d`; see :class:`LazyConv2d`."""

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(_Lazy, torch.nn.LazyConvTranspose2d, ConvTranspose2d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConvTranspose2d` on :func:`tritune.conv_transpose2d`; see :class:`LazyConv2d`."""

    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(_Lazy, torch.nn.LazyConvTranspose3d, ConvTranspose3d):  # type: ignore[misc]
    """:class:`torch.nn.LazyConvTranspose3d` on :func:`tritune.conv_transpose3d`; see :class:`LazyConv2d`."""

    cls_to_become = ConvTranspose3d


class ConvActivation1d(_Conv, _WithActivation):
    """:class:`Conv1d` with an ``activation``; see :class:`ConvActivation2d`."""

    _plain = torch.nn.Conv1d
    _run = staticmethod(conv1d)


class ConvActivation2d(_Conv, _WithActivation):
    """A 2-d convolution and an activation in one kernel: what :class:`Conv2d` with an ``activation`` makes.

    Attributes, Parameters and ``state_dict`` are those of :class:`torch.nn.Conv2d`, but it is no instance of it, as it
    computes more. ``activation`` is fixed, and ``weight`` and ``bias`` cannot be replaced by assignment.

    Args:
        activation, precision: see :func:`tritune.conv2d`.
        (all others): as in :class:`Conv2d`.

    Shape: as :class:`Conv2d`.

    Example::

        >>> layer = tritune.nn.ConvActivation2d(3, 32, 3, padding=1, activation="relu")
        >>> isinstance(layer, torch.nn.Conv2d), list(layer.state_dict())
        (False, ['weight', 'bias'])
    """

    _plain = torch.nn.Conv2d
    _run = staticmethod(conv2d)


class ConvActivation3d(_Conv, _WithActivation):
    """:class:`Conv3d` with an ``activation``; see :class:`ConvActivation2d`."""

    _plain = torch.nn.Conv3d
    _run = staticmethod(conv3d)


class ConvTransposeActivation1d(_ConvTranspose, _WithActivation):
    """:class:`ConvTranspose1d` with an ``activation``; see :class:`ConvActivation2d`."""

    _plain = torch.nn.ConvTranspose1d
    _run = staticmethod(conv_transpose1d)
    _rank = 1


class ConvTransposeActivation2d(_ConvTranspose, _WithActivation):
    """:class:`ConvTranspose2d` with an ``activation``; see :class:`ConvActivation2d`."""

    _plain = torch.nn.ConvTranspose2d
    _run = staticmethod(conv_transpose2d)
    _rank = 2


class ConvTransposeActivation3d(_ConvTranspose, _WithActivation):
    """:class:`ConvTranspose3d` with an ``activation``; see :class:`ConvActivation2d`."""

    _plain = torch.nn.ConvTranspose3d
    _run = staticmethod(conv_transpose3d)
    _rank = 3


_WITH_ACTIVATION: dict[type, Any] = {
    Conv1d: ConvActivation1d,
    Conv2d: ConvActivation2d,
    Conv3d: ConvActivation3d,
    ConvTranspose1d: ConvTransposeActivation1d,
    ConvTranspose2d: ConvTransposeActivation2d,
    ConvTranspose3d: ConvTransposeActivation3d,
}


def fold_bn(conv: _ConvNd, bn: _BatchNorm, *, activation: str | None = None) -> Any:
    r"""A convolution followed by a batch normalisation in evaluation mode, as one convolution.

    .. math:: \mathrm{bn}(w * x + b) = (s\,w) * x + s\,(b - \mathrm{mean}) + \beta,\qquad
              s = \gamma / \sqrt{\mathrm{var} + \epsilon}

    Weight and bias are computed in fp32 at least and rounded once to the dtype of ``conv.weight``. A weight that is
    parametrized (``torch.nn.utils.parametrizations.weight_norm``) is taken as it is now. The result shares nothing
    with ``conv`` and ``bn``, nor does it take over their hooks.

    Args:
        conv: one of torch's six convolutions or of ours, without an activation, in either mode.
        bn: ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` or ``SyncBatchNorm`` in evaluation mode, with running statistics,
            over the channels of ``conv``.
        activation: of the result, see :func:`tritune.conv2d`.

    Returns:
        The module of :mod:`tritune.nn`, in evaluation mode; its ``state_dict`` is that of torch's module.

    Raises:
        TypeError: for other modules, also for a subclass with a computation of its own; if a hook computes the weight
            (``torch.nn.utils.weight_norm``, pruning).
        ValueError: if they do not fit, or ``bn`` is in training mode or has no running statistics.

    Example::

        >>> conv, bn = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8).eval()
        >>> folded = tritune.fold_bn(conv, bn)
        >>> x = torch.randn(1, 3, 9, 9)
        >>> torch.allclose(folded(x), bn(conv(x)), atol=1e-5)
        True
    """
    kind = _kind_of(conv)
    if kind is None:
        raise TypeError(
            "fold_bn: conv must be a convolution of torch.nn or tritune.nn without an activation, "
            f"not {type(conv).__name__}"
        )
    if not isinstance(bn, _BatchNorm) or not _computes_as(bn, "forward", _BatchNorm, torch.nn.SyncBatchNorm):
        raise TypeError(f"fold_bn: bn must be a batch normalisation of torch.nn, not {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: bn keeps no running statistics, so its result depends on the batch")
    if bn.training:
        raise ValueError("fold_bn: bn is in training mode, where its result depends on the batch: call bn.eval() first")
    if bn.num_features != conv.out_channels:
        raise ValueError(f"fold_bn: bn has {bn.num_features} features and conv {conv.out_channels} output channels")
    for name, module in (("conv", conv), ("bn", bn)):
        hooked = [one for one in ("weight", "bias") if one in module.__dict__]
        if hooked:
            raise TypeError(
                f"fold_bn: a hook computes the {hooked[0]} of {name} before each call, so what it is now may be out of "
                "date: make it a Parameter first (torch.nn.utils.remove_weight_norm, prune.remove)"
            )
    weight = conv.weight  # of a parametrized convolution computed anew each time
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.to(wide)
        bias = -scale * bn.running_mean.to(wide)
        if conv.bias is not None:
            bias = bias + scale * conv.bias.to(wide)
        if bn.bias is not None:
            bias = bias + bn.bias.to(wide)
        ones = (1,) * len(conv.kernel_size)
        if conv.transposed:  # [C, K / groups, ...]; the channels of a group are neighbours
            by_group = weight.to(wide).unflatten(0, (conv.groups, -1))
            folded_weight = (by_group * scale.view(conv.groups, 1, -1, *ones)).flatten(0, 1)
        else:
            folded_weight = weight.to(wide) * scale.view(-1, 1, *ones)
    folded = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, dilation=conv.dilation,
        groups=conv.groups, padding_mode=conv.padding_mode, device="meta", activation=activation,
        precision=getattr(conv, "precision", None),
        **({"output_padding": conv.output_padding} if conv.transposed else {}),
    )  # fmt: skip
    folded.weight = torch.nn.Parameter(folded_weight.to(weight.dtype), weight.requires_grad)
    folded.bias = torch.nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
    return folded.eval()


def _kind_of(conv: torch.nn.Module) -> Any:
    """The class of ours that computes what ``conv`` does; None for all but plain convolutions."""
    for ours, with_activation in _WITH_ACTIVATION.items():
        theirs = with_activation._plain
        if isinstance(conv, theirs):
            methods = ("forward", "_conv_forward", "_output_padding")
            return ours if all(_computes_as(conv, method, ours, theirs) for method in methods) else None
    return None


def _computes_as(module: torch.nn.Module, method: str, *kinds: type) -> bool:
    """Whether a method of ``module`` is that of one of these classes, not its own or one of somebody's subclass."""
    own = module.__dict__.get(method, getattr(type(module), method, None))
    return any(own is getattr(kind, method, None) for kind in kinds)
