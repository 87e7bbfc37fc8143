"""Operators: validation, schemas, autograd, dispatch and the torch fallback. Kernels are imported where they run."""

from ._dispatch import Decision, UnsupportedError, explain, record, use_backend
from .conv import conv2d
from .pool import max_pool2d
from .rnn import elman_step, gru, lstm, rnn

__all__ = [
    "Decision",
    "UnsupportedError",
    "conv2d",
    "elman_step",
    "explain",
    "gru",
    "lstm",
    "max_pool2d",
    "record",
    "rnn",
    "use_backend",
]
