"""The shapes of your own model, recorded while it runs, and configs of the kernels for them, ranked without a GPU.

``tritune.record_shapes`` writes a line for each different call of a model, and ``tritune tune --from`` tunes for these.
With ``--static --target`` it ranks configs by the cost model and takes the best that the compiler finds clean, for a
GPU that this machine need not have. On a machine with a GPU ``tritune tune --from FILE`` measures them, and torch
beside them. It takes half a minute, and needs Triton and what the command needs (pip install 'tritune[cli,triton]').

    python examples/tune_own_shapes.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import tritune


class Reader(nn.Module):
    """Photographs of a line of text to letters: convolutions and pooling find strokes, and a GRU reads them in turn."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.strokes = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.gru, self.head = nn.GRU(64 * 8, 64, batch_first=True), nn.Linear(64, letters)

    def forward(self, images: Tensor) -> Tensor:
        columns = self.strokes(images).permute(0, 3, 1, 2).flatten(2)  # [N, W / 4, 64 * H / 4]
        return self.head(self.gru(columns)[0])


def command(*words: str) -> None:
    print(f"\n$ tritune {' '.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "tritune", *words], check=False).returncode
    if status:
        raise SystemExit(status)  # the command has said why


def main() -> None:
    model, images = Reader(letters=40).bfloat16(), torch.rand(4, 1, 32, 128, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        shapes, store = Path(folder, "shapes.jsonl"), Path(folder, "store")
        with torch.no_grad(), tritune.record_shapes(shapes):
            for _ in range(3):
                model(images)
        print(f"The calls of the model, as {shapes.name} has them:\n{shapes.read_text()}", end="")

        command("tune", "--from", str(shapes), "--static", "--target", "sm_90", "--out", str(store))
        print(f"\nWith TRITUNE_CONFIG_PATH={store} the kernels run with these configs, where they serve.")
        print("Whether they serve is for measurements to say, or for the bytes that they save. Until then, on an H200:")
        command("explain", "file", str(shapes), "--device", "h200")


if __name__ == "__main__":
    main()
