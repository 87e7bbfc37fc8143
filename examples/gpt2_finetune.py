"""A GPT-2 of Hugging Face transformers, fine-tuned for a few steps with ``attn_implementation="tritune"``: bytes for
tokens, random weights, and the text below, which is in the public domain. Needs ``pip install transformers``.

    python examples/gpt2_finetune.py
"""

from collections import Counter

import torch
import transformers

import tritune
from tritune.ops import record

TEXT = """
A lighthouse keeper counts the ships of a year in a book. In spring he writes of fishing boats, which leave before the
sun and come back with the gulls behind them. In summer there are sails, white and brown, and one that is red. In autumn
he writes of fog, and of horns that answer each other from places that nobody sees. In winter the page stays empty for
days. Then he writes of the light itself: how the lens turns, how the beam goes out over the water and comes back.
"""
STEPS, BATCH, LENGTH = 12, 4, 64


def main() -> None:
    torch.manual_seed(0)
    tritune.register_with_transformers()
    tokens = torch.tensor(list(TEXT.encode()))
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
    batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)

    eager, ours = (gradients(model, batch, implementation) for implementation in ("eager", "tritune"))
    difference = max((a - b).abs().max() / b.abs().max() for a, b in zip(ours, eager, strict=True))
    print(f"largest difference to eager: {difference:.1e} of the largest number of a gradient")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with record() as decisions:
        for _ in range(STEPS):
            loss = model(batch, labels=batch).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        after = model(batch, labels=batch).loss.item()
    print(f"loss before: {losses[0]:.3f}, after {STEPS} steps: {after:.3f}")
    for line, calls in Counter(decision.summary() for decision in decisions).items():
        print(f"{calls} calls of {line}")
    assert after < losses[0]


def gradients(model: transformers.GPT2LMHeadModel, batch: torch.Tensor, implementation: str) -> list[torch.Tensor]:
    model.set_attn_implementation(implementation)
    loss = model(batch, labels=batch).loss
    return list(torch.autograd.grad(loss, list(model.parameters())))


if __name__ == "__main__":
    main()
