"""Keras 3 on its torch backend: layers as its documentation writes them, under ``tritune.accelerate()``.

For convolution and pooling Keras calls torch's functions. ``accelerate`` sends these calls to tritune, and the example
prints which were sent and who served them. ``SimpleRNN`` and ``Attention`` are computed by Keras from products of
matrices, and so is ``LSTM`` where there is no GPU: there is no call of a whole layer that could be sent. tritune's own
functions, given the weights of these layers, return the same numbers in one call. It takes some seconds, on a GPU if
there is one, and needs Keras (pip install keras):

    python examples/keras_layers.py
    TRITON_INTERPRET=1 TRITUNE_BACKEND=triton python examples/keras_layers.py    # the kernels without a GPU, in minutes
"""

import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tritune

os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it when it is imported
try:
    import keras
except ImportError:
    raise SystemExit("This example needs Keras 3, which is not installed: pip install keras") from None
from keras.layers import LSTM, Attention, AveragePooling2D, Conv2D, MaxPooling2D, SimpleRNN


def seconds(call: Callable[[], Tensor]) -> float:
    start = perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> str:
    output, wanted = ours(), theirs()
    difference = float((output - wanted).abs().max())
    assert difference <= 1e-4 * wanted.abs().max()
    # One call of each in turn; the fastest is the one that nothing else on the machine has slowed.
    fastest, their_fastest = map(min, zip(*((seconds(ours), seconds(theirs)) for _ in range(20)), strict=True))
    return f"largest difference to Keras: {difference:.1e}, time {fastest / their_fastest:.2f} × that of Keras"


def rnn(layer: SimpleRNN, x: Tensor) -> Tensor:
    w_ih, w_hh, b = (variable.value for variable in layer.trainable_variables)  # [I, H], [H, H], [H]
    return tritune.rnn(x, w_ih.mT, w_hh.mT, b, batch_first=True)[0][:, -1]


def lstm(layer: LSTM, x: Tensor) -> Tensor:
    w_ih, w_hh, b = (variable.value for variable in layer.trainable_variables)  # [I, 4 H], [H, 4 H], [4 H]
    return tritune.lstm(x, w_ih.mT, w_hh.mT, b, batch_first=True)[0][:, -1]


def attention(layer: Attention, inputs: list[Tensor]) -> Tensor:
    query, value = inputs
    return tritune.attention(query, value, value, scale=1.0)  # Keras takes the values as keys, and scales by nothing


def show(layer: keras.Layer, inputs: Any, counterpart: Callable[..., Tensor] | None) -> None:
    wanted = layer(inputs)
    with tritune.accelerate() as sent:
        layer(inputs)
    print(f"{type(layer).__name__}: result {list(wanted.shape)}\n  sent to tritune: {sent}")
    accelerated = tritune.accelerate()(lambda: layer(inputs))
    print(f"  with accelerate(): {compare(accelerated, lambda: layer(inputs))}")
    if counterpart is not None:
        compared = compare(lambda: counterpart(layer, inputs), lambda: layer(inputs))
        print(f"  tritune.{counterpart.__name__}: {compared}")


@torch.no_grad()
def main() -> None:
    keras.utils.set_random_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # rounded to tf32, two right results differ by 1e-3
    images = keras.random.normal((4, 10, 10, 128))  # [N, H, W, C]
    sequences = keras.random.normal((32, 10, 8))  # [B, T, I]
    query, value = keras.random.normal((2, 12, 16)), keras.random.normal((2, 20, 16))
    show(Conv2D(32, (3, 3), activation="relu"), images, None)
    show(MaxPooling2D(pool_size=(2, 2)), images, None)
    show(AveragePooling2D(pool_size=(2, 2)), images, None)
    show(SimpleRNN(4), sequences, rnn)
    show(LSTM(4), sequences, lstm)
    show(Attention(), [query, value], attention)
    print("accelerate() costs one to two microseconds for each call of torch, and Keras makes many small ones.")


if __name__ == "__main__":
    main()
