"""tritune: PyTorch operators written as Triton kernels, tuned ahead of time, with a pure-PyTorch fallback.

The folders ``kernels/ ops/ autotune/ perf/`` lie at the root of the repository and are subpackages of this one.
An installed wheel holds them side by side; a bare checkout (``PYTHONPATH=src``) finds them through ``__path__``.
"""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
if not (_here / "ops").is_dir() and (_here.parents[1] / "ops").is_dir():
    __path__.append(str(_here.parents[1]))

from . import nn
from ._version import __version__
from .nn import fold_bn
from .ops import (
    Decision,
    UnsupportedError,
    attention,
    attention_pool,
    conv1d,
    conv2d,
    conv2d_max_pool2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    elman_step,
    explain,
    gru,
    lstm,
    max_pool2d,
    rnn,
    scaled_dot_product_attention,
    use_backend,
)

__all__ = [
    "Decision",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_pool",
    "conv1d",
    "conv2d",
    "conv2d_max_pool2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "elman_step",
    "explain",
    "fold_bn",
    "gru",
    "lstm",
    "max_pool2d",
    "nn",
    "rnn",
    "scaled_dot_product_attention",
    "use_backend",
]
