"""tritune: PyTorch operators written as Triton kernels, tuned ahead of time, with a pure-PyTorch fallback.

The folders ``kernels/ ops/ autotune/ perf/`` lie at the root of the repository and are subpackages of this one.
An installed wheel holds them side by side; a bare checkout (``PYTHONPATH=src``) finds them through ``__path__``.
"""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
if not (_here / "ops").is_dir() and (_here.parents[1] / "ops").is_dir():
    __path__.append(str(_here.parents[1]))

from . import nn
from ._accelerate import accelerate
from ._record import record_shapes
from ._version import __version__
from .huggingface import register_with_transformers
from .nn import fold_bn
from .ops import (
    Decision,
    UnsupportedError,
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    attention,
    attention_pool,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    conv1d,
    conv2d,
    conv2d_max_pool2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    elman_step,
    explain,
    fractional_max_pool2d,
    fractional_max_pool3d,
    global_avg_pool,
    global_max_pool,
    gru,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    lstm,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
    rnn,
    scaled_dot_product_attention,
    use_backend,
)
from .replacement import replace, restore

__all__ = [
    "Decision",
    "UnsupportedError",
    "__version__",
    "accelerate",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "attention",
    "attention_pool",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
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
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "global_avg_pool",
    "global_max_pool",
    "gru",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "lstm",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "nn",
    "record_shapes",
    "register_with_transformers",
    "replace",
    "restore",
    "rnn",
    "scaled_dot_product_attention",
    "use_backend",
]
