"""A ConvNeXt that is being trained goes on with tritune's convolutions: ``tritune.replace`` in the middle of training.

A module that is replaced stays the same object with the same Parameters, so the optimizer and its state hold on. The
model is trained for a few steps by torch's modules, and then, from the same state, once more by torch's and by ours.
First ``dry_run`` says what would become what, and ``only`` narrows it down. It takes some seconds, on a GPU if there is
one.

    python examples/replace_convnext.py
"""

import copy
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritune


class Block(nn.Module):
    """x + scale · Linear(gelu(Linear(norm(depthwise convolution of 7x7 pixels))))"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.shrink = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # [N, H, W, C]
        return x + (self.scale * self.shrink(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)


def convnext(channels: int, classes: int) -> nn.Sequential:
    """Two stages of two blocks; each stage begins with a convolution that cuts its input into patches."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, channels, 4, stride=4), Block(channels), Block(channels)),
        nn.Sequential(nn.Conv2d(channels, 2 * channels, 2, stride=2), Block(2 * channels), Block(2 * channels)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, classes)),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """One step of training: the loss before it, and the seconds that it took."""
    start = perf_counter()
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), perf_counter() - start  # item waits for a GPU


def main() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # rounded to tf32, two right results differ by 1e-3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = torch.rand(16, 3, 32, 32, device=device), torch.randint(0, 10, (16,), device=device)
    model = convnext(channels=24, classes=10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [step(model, optimizer, images, labels)[0] for _ in range(5)]
    print(f"five steps by torch, losses: {', '.join(f'{loss:.4f}' for loss in losses)}")
    theirs, their_optimizer = copy.deepcopy((model, optimizer))

    _, report = tritune.replace(model, only="*.depthwise", dry_run=True)
    print(f"\nonly the depthwise convolutions: {report}\n")
    parameters = list(model.parameters())
    model, report = tritune.replace(model)
    assert all(before is after for before, after in zip(parameters, model.parameters(), strict=True))
    print(f"all: {report}\n")

    # One step of each in turn; the fastest is the one that nothing else on the machine has slowed.
    pairs = [(step(model, optimizer, images, labels), step(theirs, their_optimizer, images, labels)) for _ in range(10)]
    print(f"ten more steps by ours, losses: {', '.join(f'{loss:.4f}' for (loss, _), _ in pairs)}")
    difference = max(abs(loss - wanted) for (loss, _), (wanted, _) in pairs)
    assert difference <= 1e-3
    print(f"largest difference to torch: {difference:.1e} of ten losses")
    ratio = min(seconds for (_, seconds), _ in pairs) / min(seconds for _, (_, seconds) in pairs)
    print(f"time of a step with ours / with torch's, the fastest of {len(pairs)} in turn: {ratio:.2f}")
    if device == "cpu":
        print("(On the CPU torch computes both, and here they differ by noise.)")


if __name__ == "__main__":
    main()
