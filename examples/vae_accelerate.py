"""A convolutional VAE, written for torch, trains under ``tritune.accelerate()`` without a change.

It learns handwritten digits (1797 images of 8x8 pixels, from scikit-learn, which it needs: pip install scikit-learn)
twice from the same state, with the context manager and without. The object that ``with`` gives says which calls the
kernels served, which went to torch, and why. On the CPU torch serves all of them, and every loss has the same bits. It
takes some seconds, on a GPU if there is one.

    python examples/vae_accelerate.py
"""

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritune

STEPS, BATCH, LATENT = 40, 256, 8


class VAE(nn.Module):
    """Images [N, 1, 8, 8] to logits of their pixels, and means and log variances of their codes [N, LATENT]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 2 * 2, 2 * LATENT),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 32 * 2 * 2), nn.ReLU(), nn.Unflatten(1, (32, 2, 2)),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance


def loss_of(logits: Tensor, mean: Tensor, log_variance: Tensor, images: Tensor) -> Tensor:
    """The negative evidence lower bound of an image, in nats."""
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    return (reconstruction + divergence) / len(images)


class Training:
    def __init__(self, images: Tensor, block: AbstractContextManager) -> None:
        torch.manual_seed(0)
        self.images, self.block, self.vae = images, block, VAE().to(images.device)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=3e-3)
        self.losses: list[float] = []

    def step(self) -> float:
        """Gives the seconds that it took."""
        start = perf_counter()
        torch.manual_seed(len(self.losses))  # both trainings draw the same batch and the same noise
        images = self.images[torch.randint(len(self.images), (BATCH,))]
        with self.block:  # around the forward only: backward runs where its forward ran
            loss = loss_of(*self.vae(images), images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        return perf_counter() - start


def main() -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("This example reads the digits of scikit-learn: pip install scikit-learn") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # rounded to tf32, two right results differ by 1e-3
    images = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1).to(device)

    sent = tritune.accelerate()
    plain, accelerated = Training(images, nullcontext()), Training(images, sent)
    # One step of each in turn; the fastest is the one that nothing else on the machine has slowed.
    seconds, their_seconds = map(min, zip(*((accelerated.step(), plain.step()) for _ in range(STEPS)), strict=True))

    print(f"losses by torch:   {', '.join(f'{loss:.3f}' for loss in plain.losses[::10])}")
    print(f"with accelerate(): {', '.join(f'{loss:.3f}' for loss in accelerated.losses[::10])}")
    difference = max(abs(a - b) for a, b in zip(plain.losses, accelerated.losses, strict=True))
    print(f"largest difference to torch: {difference:.1e} of {STEPS} losses")
    same_operators = device == "cpu" and not sent.kernels  # on a GPU torch's own may differ from run to run
    assert difference <= (0 if same_operators else 1e-2)
    print(f"time of a step with / without, the fastest of {STEPS} in turn: {seconds / their_seconds:.2f}")
    if device == "cpu":
        print("(Within the block each call of torch takes one to two microseconds longer. The rest is noise.)")
    print(f"what was sent:\n{sent}")


if __name__ == "__main__":
    main()
