"""Operators: validation, schemas, autograd, dispatch and the torch fallback. Kernels are imported where they run.

Of each family ``<family>.py`` holds the public functions and the way from their arguments to a call, with the choice of
backend; ``<family>_operators.py`` the registered operators with their implementations, fakes and autograd Functions;
``<family>_torch.py`` what torch's operators compute instead, the fallback and yardstick; ``<family>_checks.py`` the
validators. ``pool_fractional.py`` has no kernels, and so none of these. Files that begin with an underscore are shared
by the families.
"""

from ._dispatch import Decision, UnsupportedError, record, use_backend
from ._explain import explain
from ._flops import register_when_imported
from ._script import scripted_as_torchs
from .attention import attention, attention_pool, scaled_dot_product_attention
from .conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .conv_pool import conv2d_max_pool2d
from .pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    global_avg_pool,
    global_max_pool,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_unpool1d,
    max_unpool2d,
    max_unpool3d,
)
from .pool_fractional import fractional_max_pool2d, fractional_max_pool3d
from .rnn import elman_step, gru, lstm, rnn

__all__ = [
    "Decision",
    "UnsupportedError",
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
    "record",
    "rnn",
    "scaled_dot_product_attention",
    "use_backend",
]

for _name in set(__all__) - {"Decision", "UnsupportedError", "explain", "record", "use_backend"}:
    scripted_as_torchs(globals()[_name])

register_when_imported()
