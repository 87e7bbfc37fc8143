"""The models of ``tritune demo``, each from this library's layers and once more from torch's operators alone.

All three classify images ``[N, 1, 8, 8]`` of handwritten digits: a CNN, an Elman network that reads an image row by
row, and attention pooling with cosine scores over its patches.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import nn
from .ops import attention_pool

CLASSES = 10
SIDE = 8  # pixels
PATCH = 2  # pixels a side
HIDDEN, OUTPUT = 64, 32  # of the Elman network
EMBED, HEADS = 64, 4  # of the patches


class Model(NamedTuple):
    """What the demo needs to know of a model; it treats all of them alike.

    Attributes:
        says: what it is, in a few words.
        ours: makes it from this library's layers.
        on_torch: makes its twin. Its trained parameters are those of ``ours``, in the same order.
        arrange: images ``[N, 1, 8, 8]`` to what both read.
        needed: least accuracy on the test digits.
        looks: of a trained ``ours``, what it reads and the classes it found: where it looked, ``[N, 8, 8]``.
    """

    says: str
    ours: Callable[[], torch.nn.Module]
    on_torch: Callable[[], torch.nn.Module]
    arrange: Callable[[Tensor], Tensor]
    needed: float
    looks: Callable[[Any, Tensor, Tensor], Tensor] | None = None


def trained(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def with_weights(net: torch.nn.Module, weights: Iterable[Tensor], device: torch.device | str) -> torch.nn.Module:
    """A model or its twin, with these values in its trained parameters."""
    with torch.no_grad():
        for parameter, weight in zip(trained(net), weights, strict=True):
            parameter.copy_(weight)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


# --- convolution and pooling -----------------------------------------------------------------------------------------


def cnn(ours: bool) -> torch.nn.Sequential:
    layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
    for name, channels, filters in (("conv1", 1, 32), ("conv2", 32, 64)):
        if ours:
            layers[name] = nn.Conv2d(channels, filters, 3, padding=1, activation="relu")
        else:
            layers[name] = torch.nn.Conv2d(channels, filters, 3, padding=1)
            layers[f"{name}_relu"] = torch.nn.ReLU()
    layers["pool"] = nn.MaxPool2d(2) if ours else torch.nn.MaxPool2d(2)
    layers["flatten"] = torch.nn.Flatten()
    layers["linear"] = torch.nn.Linear(64 * 4 * 4, CLASSES)
    return torch.nn.Sequential(layers)


# --- recurrence ------------------------------------------------------------------------------------------------------


class ReadsRows(torch.nn.Module):
    """``[N, 8, 8]``: eight steps of eight pixels, classified by the y of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.elman = nn.ElmanRNN(SIDE, HIDDEN, OUTPUT, batch_first=True)
        self.linear = torch.nn.Linear(OUTPUT, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        y, _, _ = self.elman(rows)
        scores: Tensor = self.linear(y[:, -1])
        return scores


class ReadsRowsOnTorch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.RNN(SIDE, HIDDEN, batch_first=True)
        # torch's layer adds two biases. The formula has one, and two would learn twice as fast.
        self.rnn.get_parameter("bias_hh_l0").requires_grad_(False).zero_()
        self.o = torch.nn.Linear(HIDDEN, OUTPUT)
        self.y = torch.nn.Linear(OUTPUT, OUTPUT, bias=False)
        self.linear = torch.nn.Linear(OUTPUT, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        h, _ = self.rnn(rows)
        y = torch.tanh(self.y(self.o(h)))
        scores: Tensor = self.linear(y[:, -1])
        return scores


# --- attention -------------------------------------------------------------------------------------------------------


def patches(images: Tensor) -> Tensor:
    """``[N, 16, 4]``: squares of 2 × 2 pixels, row by row."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


class PoolsPatches(torch.nn.Module):
    """Each class has a query that pools the patches, by what is in them and where they are; the result is its score."""

    def __init__(self, pool: torch.nn.Module) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.randn((SIDE // PATCH) ** 2, EMBED) / 2)
        self.embed = torch.nn.Linear(PATCH**2, EMBED)
        self.pool = pool
        # No bias here nor in the pool: what is added to all scores alike, softmax takes away again.
        self.score = torch.nn.Linear(EMBED, 1, bias=False)

    def elements(self, patches: Tensor) -> Tensor:
        return torch.relu(self.embed(patches) + self.place)

    def forward(self, patches: Tensor) -> Tensor:
        scores: Tensor = self.score(self.pool(self.elements(patches)))
        return scores.squeeze(-1)


class CosinePoolOnTorch(torch.nn.Module):
    """:class:`tritune.nn.AttentionPool` with cosine scores and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.empty(()))
        self.query = torch.nn.Parameter(torch.empty(HEADS, CLASSES, EMBED // HEADS))
        self.key, self.value, self.out = (torch.nn.Linear(EMBED, EMBED, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        key, value = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.key, self.value))
        cosines = F.normalize(self.query, dim=-1) @ F.normalize(key, dim=-1).transpose(2, 3)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        pooled = torch.softmax(scale * cosines, -1) @ value
        result: Tensor = self.out(pooled.transpose(1, 2).flatten(2))
        return result


def where_it_looks(net: PoolsPatches, patches: Tensor, classes: Tensor) -> Tensor:
    """The weights with which the query of each image's class pools the patches, mean of the heads."""
    pool: Any = net.pool
    key = pool.key(net.elements(patches)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    # Where each patch has a feature of its own, what is pooled is the weights.
    value = torch.eye(patches.shape[1], device=key.device).expand(*key.shape[:2], -1, -1)
    weights = attention_pool(pool.query, key, value, score="cosine", scale=pool.scale).mean(1)
    of_class = weights[torch.arange(len(classes), device=key.device), classes].unflatten(-1, (SIDE // PATCH, -1))
    return of_class.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


MODELS = {
    "cnn": Model(
        "two convolutions with fused relu, max pooling",
        ours=lambda: cnn(ours=True),
        on_torch=lambda: cnn(ours=False),
        arrange=lambda images: images.to(memory_format=torch.channels_last),
        needed=0.95,
    ),
    "rnn": Model(
        "an Elman network with output head, row by row",
        ours=ReadsRows,
        on_torch=ReadsRowsOnTorch,
        arrange=lambda images: images.squeeze(1),
        needed=0.90,
    ),
    "attention": Model(
        "a query for each digit pools 16 patches, cosine scores",
        ours=lambda: PoolsPatches(
            nn.AttentionPool(EMBED, HEADS, CLASSES, score="cosine", scale="learnable", bias=False)
        ),
        on_torch=lambda: PoolsPatches(CosinePoolOnTorch()),
        arrange=patches,
        needed=0.90,
        looks=where_it_looks,
    ),
}
