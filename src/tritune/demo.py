"""``tritune demo``: a CNN on real data, and how this library and torch compare on it.

The network (convolution with fused relu twice, max pooling, one linear layer) learns the UCI handwritten digits that
ship inside scikit-learn. It is trained twice from the same weights on the same batches, once with this library's
modules and once with torch's. Then one training step runs on the Triton kernels, in Triton's interpreter where there is
no GPU, and its outputs and gradients are compared with torch's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import nn
from .autotune.device import detect
from .ops import Decision, explain, record, use_backend

WANTED_ACCURACY = 0.95
# Largest difference of a tensor, over its largest value: fp32 sums of at most 2^12 products in another order.
TOLERANCE = 1e-4
BATCH = 64
STEP_IMAGES = 6
STEP_SECONDS = 60  # an interpreted step takes about 10


class Data(NamedTuple):
    """Images ``[N, 1, 8, 8]`` with values in [0, 1] and their labels, split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int, device: str) -> Data:
    """1797 digits, a quarter of each kind kept for the test."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    images, labels = datasets.load_digits(return_X_y=True)
    pixels = (images / 16.0).astype("float32").reshape(-1, 1, 8, 8)
    parts = train_test_split(pixels, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part).to(device) for part in parts)
    return Data(train_images, train_labels, test_images, test_labels)


def network(ours: bool) -> torch.nn.Sequential:
    """This library's layers or torch's, with the same names: one's ``state_dict`` is the other's."""
    layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
    for name, channels, filters in (("conv1", 1, 32), ("conv2", 32, 64)):
        if ours:
            layers[name] = nn.Conv2d(channels, filters, 3, padding=1, activation="relu")
        else:
            layers[name] = torch.nn.Conv2d(channels, filters, 3, padding=1)
            layers[f"{name}_relu"] = torch.nn.ReLU()
    layers["pool"] = nn.MaxPool2d(2) if ours else torch.nn.MaxPool2d(2)
    layers["flatten"] = torch.nn.Flatten()
    layers["linear"] = torch.nn.Linear(64 * 4 * 4, 10)
    return torch.nn.Sequential(layers)


def network_with(weights: dict[str, Tensor], ours: bool, device: torch.device | str) -> torch.nn.Sequential:
    model = network(ours)
    model.load_state_dict(weights)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class Training:
    """One network, its optimiser, and what came of each epoch."""

    def __init__(self, ours: bool, weights: dict[str, Tensor], device: str, backend: str, seed: int) -> None:
        self.model = network_with(weights, ours, device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.order = torch.Generator().manual_seed(seed)
        self.backend = backend
        self.seconds = 0.0
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def epoch(self, data: Data) -> None:
        synchronize()
        start = time.perf_counter()
        total = torch.zeros((), device=data.train_images.device)
        with use_backend(self.backend):
            for batch in torch.randperm(len(data.train_labels), generator=self.order).split(BATCH):
                images, labels = data.train_images[batch], data.train_labels[batch]
                loss = F.cross_entropy(self.model(images.to(memory_format=torch.channels_last)), labels)
                self.optimiser.zero_grad()
                loss.backward()
                self.optimiser.step()
                total += loss.detach() * len(batch)
        synchronize()
        self.seconds += time.perf_counter() - start
        self.losses.append(float(total) / len(data.train_labels))
        self.accuracies.append(float((self.predict(data.test_images) == data.test_labels).float().mean()))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        with use_backend(self.backend):
            return self.model(images).argmax(1)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- one step on the kernels -----------------------------------------------------------------------------------------


def compare_step(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Any]:
    """A training step on the kernels and one on torch: the largest difference of the output and of each gradient."""
    results: dict[str, dict[str, Tensor]] = {}
    start = time.perf_counter()
    with record() as decisions:
        for name, backend in (("tritune", "triton"), ("torch", "torch")):
            model = network_with(weights, name == "tritune", images.device)
            inputs = images.clone(memory_format=torch.channels_last).requires_grad_()
            with use_backend(backend):
                output = model(inputs)
                F.cross_entropy(output, labels).backward()
            gradients = {f"grad {key}": parameter.grad for key, parameter in model.named_parameters()}
            results[name] = {"output": output.detach(), "grad input": inputs.grad, **gradients}  # type: ignore[dict-item]
    return {
        "images": len(images),
        "chosen_for": detect(images.device).slug,
        "seconds": time.perf_counter() - start,
        "differences": {
            name: float((results["tritune"][name] - expected).abs().max() / expected.abs().max())
            for name, expected in results["torch"].items()
        },
        "ran": [describe(decision) for decision in decisions],
    }


def describe(decision: Decision) -> dict[str, Any]:
    kernels = [
        {"kernel": name, "config": dict(choice.config), "source": choice.source} for name, choice in decision.kernels
    ]
    why = "; ".join(filter(None, [decision.because, decision.rejected]))
    return {"op": decision.op, "backend": decision.backend, "why": why, "kernels": kernels}


def interpreted_step(weights: dict[str, Tensor], data: Data) -> dict[str, Any]:
    """:func:`compare_step` in a process of its own: the interpreter must be asked for before Triton is imported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.pt")
        torch.save((weights, data.train_images[:STEP_IMAGES], data.train_labels[:STEP_IMAGES]), path)
        package_folder = str(Path(__file__).resolve().parents[1])
        search = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__, str(path)]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}, timeout=STEP_SECONDS,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the interpreted step failed:\n{done.stderr}")
    return dict(json.loads(done.stdout))


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("tritune-demo"), help="folder for demo.png")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def main(args: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  what is missing shall be said now, not after the training
    import sklearn  # noqa: F401
    from rich.console import Console

    console = Console(stderr=args.json)
    has_triton = _has_triton()
    on_gpu = torch.cuda.is_available() and has_triton
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_digits(args.seed, device)
    torch.manual_seed(args.seed)
    weights = {name: tensor.clone() for name, tensor in network(ours=True).state_dict().items()}
    trainings = {
        "tritune": Training(True, weights, device, "triton" if on_gpu else "auto", args.seed),
        "torch": Training(False, weights, device, "torch", args.seed),
    }
    console.print(
        f"UCI handwritten digits: {len(data.train_labels)} to learn from, {len(data.test_labels)} to test, on "
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}"
    )
    train(trainings, data, args.epochs, console)

    # From the first weights: a trained network leaves hardly any gradient to compare.
    step: dict[str, Any] | None = None
    if on_gpu:
        step = compare_step(weights, data.train_images[:BATCH], data.train_labels[:BATCH])
    elif has_triton:
        with console.status("one training step on the kernels, in Triton's interpreter"):
            step = interpreted_step(weights, Data(*(part.cpu() for part in data)))

    with use_backend(trainings["tritune"].backend):
        here = explain(trainings["tritune"].model, data.train_images[:BATCH].to(memory_format=torch.channels_last))
    results: dict[str, Any] = {
        "device": device,
        "epochs": args.epochs,
        **{
            name: {"accuracy": one.accuracies[-1], "seconds": one.seconds, "losses": one.losses}
            for name, one in trainings.items()
        },
        "ran": [describe(decision) for decision in here],  # type: ignore[union-attr]
        "step": {**step, "interpreted": not on_gpu} if step else None,
        "picture": str(draw(args.out, trainings, data)),
    }
    failures = check(results)
    if args.json:
        print(json.dumps({**results, "failures": failures}, indent=1))
    else:
        show(results, console)
    for failure in failures:
        console.print(f"[bold red]FAILED[/] {failure}", highlight=False)
    return 1 if failures else 0


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def train(trainings: dict[str, Training], data: Data, epochs: int, console: Any) -> None:
    """Both networks in turn, epoch by epoch, so that whatever else the machine does slows both."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeRemainingColumn(), TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=epochs, state="") for name in trainings}
        for _ in range(epochs):
            for name, training in trainings.items():
                training.epoch(data)
                state = f"loss {training.losses[-1]:.4f}, test accuracy {training.accuracies[-1]:.3f}"
                progress.update(bars[name], advance=1, state=state)


def check(results: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    failures = [
        f"{name} reached a test accuracy of {results[name]['accuracy']:.3f}, less than {WANTED_ACCURACY}"
        for name in ("tritune", "torch")
        if results[name]["accuracy"] < WANTED_ACCURACY
    ]
    step = results["step"] or {"differences": {}}
    failures += [
        f"{name} differs from torch's by {difference:.1e} of its largest value"
        for name, difference in step["differences"].items()
        if not difference <= TOLERANCE
    ]
    return failures


def show(results: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table("", "test accuracy", "training", title=f"{results['epochs']} epochs", title_justify="left")
    for name in ("tritune", "torch"):
        table.add_row(name, f"{results[name]['accuracy']:.3f}", f"{results[name]['seconds']:.1f} s")
    console.print(table)

    console.print("What the trained network runs here:")
    for (op, backend, why), count in Counter((one["op"], one["backend"], one["why"]) for one in results["ran"]).items():
        console.print(f"  {count} × {op} on {backend}: {why}", highlight=False, soft_wrap=True)

    step = results["step"]
    if step is None:
        console.print("Triton is not installed, so no kernel ran: pip install 'tritune\\[triton]'")
    else:
        where = "in Triton's interpreter" if step["interpreted"] else "on this GPU"
        console.print(
            f"\nOne training step of {step['images']} images on the kernels, {where}, {step['seconds']:.1f} s:"
        )
        show_kernels(step, console)
        table = Table("", "largest difference to torch", title_justify="left")
        for name, difference in step["differences"].items():
            table.add_row(name, f"{difference:.1e} of its largest value")
        console.print(table)
    console.print(f"Learning curves and predictions: {results['picture']}", soft_wrap=True)


def show_kernels(step: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    caption = f"configs for {step['chosen_for']}; model: ranked by cost model, not measured"
    table = Table("op", "kernel", "config", "from", caption=caption, caption_justify="left")
    for one in step["ran"]:
        for number, kernel in enumerate(one["kernels"]):
            config = " ".join(f"{name}={value}" for name, value in kernel["config"].items())
            table.add_row("" if number else one["op"], kernel["kernel"], config, kernel["source"])
    console.print(table)


def draw(folder: Path, trainings: dict[str, Training], data: Data) -> Path:
    """Learning curves, and twelve digits of the test: the wrong ones first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    left, right = panels
    accuracy = left.subplots()
    styles = {"tritune": ("-", "C0"), "torch": ((0, (4, 3)), "C1")}
    for name, training in trainings.items():
        style, color = styles[name]
        epochs = range(1, len(training.accuracies) + 1)
        accuracy.plot(epochs, training.accuracies, linestyle=style, color=color, label=name, linewidth=2)
    accuracy.axhline(WANTED_ACCURACY, color="0.7", linewidth=1, zorder=0)
    accuracy.set(xlabel="epoch", ylabel="test accuracy", ylim=(min(0.8, *trainings["torch"].accuracies) - 0.02, 1.0))
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(frameon=False, loc="lower right")
    accuracy.spines[["top", "right"]].set_visible(False)

    predictions = trainings["tritune"].predict(data.test_images).cpu()
    labels, images = data.test_labels.cpu(), data.test_images.cpu()
    order = (predictions == labels).int().argsort(stable=True)
    wrong = int((predictions != labels).sum())
    right.suptitle(
        f"{wrong} of {len(labels)} test digits wrong" + (", these first" if wrong else ""), fontsize="medium"
    )
    for axis, index in zip(right.subplots(3, 4).flat, order[:12].tolist(), strict=True):
        axis.imshow(images[index, 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[])
        is_right = predictions[index] == labels[index]
        text = f"{predictions[index]}" if is_right else f"{predictions[index]}, is {labels[index]}"
        axis.set_title(text, color="black" if is_right else "C3", fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def child(path: str, send: Callable[[str], Any] = print) -> None:
    """The process of :func:`interpreted_step`."""
    weights, images, labels = torch.load(path)
    send(json.dumps(compare_step(weights, images, labels)))


if __name__ == "__main__":
    child(sys.argv[1])
