"""Operators: validation, schemas, autograd, dispatch and the torch fallback. Kernels are imported where they run."""

from ._dispatch import Decision, UnsupportedError, explain, record, use_backend
from .attention import attention, attention_pool, scaled_dot_product_attention
from .conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .conv_pool import conv2d_max_pool2d
from .pool import max_pool2d
from .rnn import elman_step, gru, lstm, rnn

__all__ = [
    "Decision",
    "UnsupportedError",
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
    "gru",
    "lstm",
    "max_pool2d",
    "record",
    "rnn",
    "scaled_dot_product_attention",
    "use_backend",
]
