"""``python -P -m tritune.perf.models``: the time of whole models on the CPU, ours over the original.

A ResNet-50 and a GPT-2 of their usual sizes, with random weights, made by Hugging Face transformers
(``pip install 'tritune[models]'``). Ours and the original run in turn in one process, on one thread; the ratio is the
median of all pairs, as in :mod:`.overhead`. Torch serves both, so a ratio above 1 is what our Python costs.

In the root of a checkout ``-P`` keeps the folder ``kernels/`` from hiding a package that transformers looks for.

Exit status: 0 all ratios are at most 1.02; 1 not all.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import _accelerate, huggingface, replacement
from ..autotune.timer import no_garbage_collection
from ..demo import one_thread
from .overhead import LARGE_RATIO, measure

SECONDS = 20.0  # of one measurement; it has at least 20 rounds, however long they take

Step = Callable[[], Any]


def step(model: Any, inputs: dict[str, Any], accelerates: bool = False) -> Step:
    """Forward and all gradients."""

    def run() -> None:
        model.zero_grad()
        model(**inputs).logits.sum().backward()

    return _accelerate.accelerate()(run) if accelerates else run


def peers() -> Iterator[tuple[str, Step, Step]]:
    """What is compared: ours and the original."""
    import transformers

    torch.manual_seed(0)
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig())
    pixels = {"pixel_values": torch.randn(1, 3, 224, 224)}
    replaced, _ = replacement.replace(copy.deepcopy(resnet))
    original = step(resnet, pixels)
    yield "ResNet-50 against itself", original, original
    yield "ResNet-50, replace", step(replaced, pixels), original
    yield "ResNet-50, accelerate", step(resnet, pixels, accelerates=True), original

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    tokens = {"input_ids": torch.randint(0, 50257, (1, 64)), "use_cache": False}
    original = step(gpt2, tokens)
    yield "GPT-2, accelerate", step(gpt2, tokens, accelerates=True), original
    huggingface.register_with_transformers()
    ours = copy.deepcopy(gpt2)
    ours.set_attn_implementation(huggingface.NAME)
    yield "GPT-2, attention beside SDPA", step(ours, tokens), original


def main() -> int:
    within = True
    with one_thread(), no_garbage_collection():
        for name, ours, original in peers():
            found = measure(ours, original, SECONDS)
            within &= found.ratio <= LARGE_RATIO
            print(f"{name}: {found.ratio:.3f} × {found.torch_us / 1e3:.0f} ms, {found.rounds} rounds", flush=True)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
