"""A finished ResNet by tritune's operators: ``tritune.replace``, with batch normalisations folded, and ``restore``.

The model is written for torch and knows nothing of tritune. ``replace`` changes the classes of its modules in place.
With ``fold`` each batch normalisation becomes a part of the convolution before it, and with ``fuse`` that convolution
computes the ReLU behind it, too. The report says which module became what, and why. ``restore`` brings back what was
there, bit for bit. It takes some seconds, on a GPU if there is one.

    python examples/replace_resnet.py
"""

import copy
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor, nn

import tritune


class BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(after), nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(after), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int, classes: int) -> nn.Module:
    """Four stages of two blocks, for images of 32x32 pixels; the widths of the original are those of width=64."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    channels = [width, width, 2 * width, 4 * width, 8 * width]
    stages = [
        nn.Sequential(BasicBlock(before, after, 1 if before == after else 2), BasicBlock(after, after, 1))
        for before, after in pairwise(channels)
    ]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


def seconds(model: nn.Module, x: Tensor) -> float:
    start = perf_counter()
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # rounded to tf32, two right results differ by 1e-3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, images = resnet18(width=16, classes=10).to(device), torch.rand(8, 3, 32, 32, device=device)
    for _ in range(20):
        model(images)  # in training mode, so that the batch normalisations have statistics to fold
    model.eval()
    theirs, wanted = copy.deepcopy(model), model(images)

    print(f"before: the first block is {model[4][0]}\n")
    model, report = tritune.replace(model, fold=True, fuse=True)
    print(f"after: the first block is {model[4][0]}\n\n{report}\n")

    difference, largest = float((model(images) - wanted).abs().max()), float(wanted.abs().max())
    assert difference <= 1e-4 * largest
    print(f"largest difference to torch: {difference:.1e}, and the largest output is {largest:.1f}")
    # One call of each in turn; the fastest is the one that nothing else on the machine has slowed.
    pairs = [(seconds(model, images), seconds(theirs, images)) for _ in range(20)]
    fastest, their_fastest = map(min, zip(*pairs, strict=True))
    print(f"time of ours / time of torch's, the fastest of {len(pairs)} in turn: {fastest / their_fastest:.2f}")
    if device == "cpu":
        print("(On the CPU torch computes both, and ours differs by the batch normalisations that are gone.)")

    tritune.restore(model)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(model(images), wanted)
    print(f"\nrestored: the first convolution is {model[0]},\nand every output has the bits that it had before")


if __name__ == "__main__":
    main()
