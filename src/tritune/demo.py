"""``tritune demo``: three models on real data, and how this library and torch compare on them.

A CNN, an Elman network and attention pooling with cosine scores (:mod:`.demo_models`) learn the UCI handwritten digits
that ship inside scikit-learn. Each is trained twice from the same weights on the same batches, once with this library's
layers and once with torch's operators. One training step of each is compared with torch's, tensor by tensor: on what
serves this machine, and on the Triton kernels, in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .autotune.device import detect
from .autotune.paths import writable_folder
from .autotune.progress import Progress
from .demo_models import MODELS, Model, with_weights
from .demo_picture import Column, draw
from .ops import Decision, explain, record, use_backend

LIBRARIES = ("tritune", "torch")
# Largest difference of a tensor, over its largest value: fp32 sums of at most 2^12 products in another order.
TOLERANCE = 1e-4
BATCH = 64
LEARNING_RATE = 5e-3
INTERPRETED_IMAGES = 2
INTERPRETED_SECONDS = 120  # the three interpreted steps take about 10


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


def initial_weights(model: Model, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: parameter.detach() for name, parameter in model.ours().named_parameters()}


def build(model: Model, library: str, weights: dict[str, Tensor], device: torch.device | str) -> torch.nn.Module:
    return with_weights(model.ours() if library == "tritune" else model.on_torch(), weights.values(), device)


class Training:
    """One model of one library, its optimiser, and what came of each epoch."""

    def __init__(
        self, model: Model, library: str, weights: dict[str, Tensor], device: str, backend: str, epochs: int, seed: int
    ) -> None:
        self.net = build(model, library, weights, device)
        self.arrange = model.arrange
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=LEARNING_RATE)
        # Down to nothing, so that the accuracy of the last epoch is not that of a lucky batch.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda epoch: 1 - epoch / epochs)
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
                loss = F.cross_entropy(self.net(self.arrange(images)), labels)
                self.optimiser.zero_grad()
                loss.backward()
                self.optimiser.step()
                total += loss.detach() * len(batch)
        self.schedule.step()
        synchronize()
        self.seconds += time.perf_counter() - start
        self.losses.append(float(total) / len(data.train_labels))
        self.accuracies.append(float((self.predict(data.test_images) == data.test_labels).float().mean()))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        with use_backend(self.backend):
            return self.net(self.arrange(images)).argmax(1)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def one_thread() -> Iterator[None]:
    """Layers as small as these spend more time on waking threads than they save, and far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- one step, ours and torch's --------------------------------------------------------------------------------------


def compare_step(
    model: Model, weights: dict[str, Tensor], images: Tensor, labels: Tensor, backend: str
) -> dict[str, Any]:
    """A training step with this library and one with torch: the largest difference of the loss, of the output and of
    each gradient."""
    results: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    # Rounded to tf32, as convolutions are on a GPU by default, two right results differ by 1e-3.
    with record() as decisions, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for library in LIBRARIES:
            net = build(model, library, weights, images.device)
            inputs = model.arrange(images).detach().clone(memory_format=torch.preserve_format).requires_grad_()
            with use_backend(backend):
                output = net(inputs)
                loss = F.cross_entropy(output, labels)
                loss.backward()
            gradients = (parameter.grad for parameter in net.parameters() if parameter.requires_grad)
            results[library] = {
                "loss": loss.detach(), "output": output.detach(), "grad input": inputs.grad,
                **{f"grad {name}": gradient for name, gradient in zip(weights, gradients, strict=True)},
            }  # fmt: skip
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
        {"kernel": name, "config": dict(choice.config), "place": choice.place, "origin": choice.origin}
        for name, choice in decision.kernels
    ]
    why = "; ".join(filter(None, [decision.because, decision.rejected]))
    return {
        "op": decision.op, "backend": decision.backend, "why": why, "origin": decision.origin, "kernels": kernels,
    }  # fmt: skip


def interpreted_steps(weights: dict[str, dict[str, Tensor]], data: Data) -> dict[str, dict[str, Any]]:
    """:func:`compare_step` of each model on the kernels, in a process of its own: the interpreter must be asked for
    before Triton is imported."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.pt")
        images, labels = data.train_images[:INTERPRETED_IMAGES].cpu(), data.train_labels[:INTERPRETED_IMAGES].cpu()
        torch.save((weights, images, labels), path)
        package_folder = str(Path(__file__).resolve().parents[1])
        search = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", __spec__.name if __name__ == "__main__" else __name__, str(path)]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}, timeout=INTERPRETED_SECONDS,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the interpreted step failed:\n{done.stderr}")
    return dict(json.loads(done.stdout))


# --- the command -----------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What ``tritune demo`` was asked: names of MODELS (all if there are none), the folder for demo.png, and so on."""

    models: Sequence[str] = ()
    out: Path = Path("tritune-demo")
    epochs: int = 20
    seed: int = 0
    json: bool = False


def main(args: Options) -> int:
    import matplotlib  # noqa: F401  what is missing shall be said now, not after the training
    import sklearn  # noqa: F401
    from rich.console import Console

    writable_folder(args.out)
    console = Console(stderr=args.json, highlight=False)
    with one_thread():
        results = run(args, console)
    results["failures"] = check(results)
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        show(results, console)
    for failure in results["failures"]:
        console.print(f"[bold red]FAILED[/] {failure}", soft_wrap=True)
    if not results["failures"]:
        console.print("[bold green]PASSED[/] every accuracy and every difference is as it should be")
    return 1 if results["failures"] else 0


def run(args: Options, console: Any) -> dict[str, Any]:
    has_triton = _has_triton()
    on_gpu = torch.cuda.is_available() and has_triton
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if on_gpu else "auto"
    models = {name: model for name, model in MODELS.items() if name in (args.models or MODELS)}
    data = load_digits(args.seed, device)
    introduce(models, data, console)

    # Each from its own seed: a model learns the same whether or not the others are there.
    weights = {name: initial_weights(model, args.seed) for name, model in models.items()}
    trainings = {
        name: {
            "tritune": Training(model, "tritune", weights[name], device, backend, args.epochs, args.seed),
            "torch": Training(model, "torch", weights[name], device, "torch", args.epochs, args.seed),
        }
        for name, model in models.items()
    }
    train(trainings, data, args.epochs, console)

    # From the first weights: a trained model leaves hardly any gradient to compare.
    first = data.train_images[:BATCH], data.train_labels[:BATCH]
    steps = {name: {"here": compare_step(model, weights[name], *first, backend)} for name, model in models.items()}
    if has_triton and not on_gpu:
        with Progress(console.file, 1) as progress:
            progress.update(0, state="one training step on the kernels, in Triton's interpreter")
            for name, step in interpreted_steps(weights, data).items():
                steps[name]["interpreted"] = step
    return {
        "device": device,
        "epochs": args.epochs,
        "models": {
            name: {
                "needed": model.needed,
                **{library: results_of(one) for library, one in trainings[name].items()},
                "ran": explained(trainings[name]["tritune"], first[0]),
                "steps": steps[name],
            }
            for name, model in models.items()
        },
        "picture": str(draw(args.out, [column(name, trainings[name], data) for name in models])),
    }


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def results_of(training: Training) -> dict[str, Any]:
    return {"accuracy": training.accuracies[-1], "seconds": training.seconds, "losses": training.losses}


def explained(training: Training, images: Tensor) -> list[dict[str, Any]]:
    with use_backend(training.backend):
        decisions = explain(training.net, training.arrange(images))
    return [describe(decision) for decision in decisions]  # type: ignore[union-attr]


def column(name: str, trainings: dict[str, Training], data: Data) -> Column:
    """What the picture shows of a model."""
    training, looks = trainings["tritune"], MODELS[name].looks
    predictions = training.predict(data.test_images)
    with torch.no_grad(), use_backend(training.backend):
        looked = looks and looks(training.net, training.arrange(data.test_images), predictions).cpu()
    return Column(
        name, MODELS[name].says, MODELS[name].needed,
        {library: one.accuracies for library, one in trainings.items()},
        predictions.cpu(), data.test_labels.cpu(), data.test_images[:, 0].cpu(), looked,
    )  # fmt: skip


def train(trainings: dict[str, dict[str, Training]], data: Data, epochs: int, console: Any) -> None:
    """Both libraries in turn, epoch by epoch, so that whatever else the machine does slows both."""
    started, total = time.perf_counter(), epochs * len(trainings)
    done = 0
    with Progress(console.file, total) as progress:
        for name, both in trainings.items():
            for _ in range(epochs):
                for training in both.values():
                    training.epoch(data)
                done += 1
                seconds_left = (time.perf_counter() - started) * (total - done) / done
                progress.update(done, seconds_left, f"epochs, {name}: {_accuracies(both)}")
            progress.line(f"{name:9}  {epochs} epochs, accuracy: {_accuracies(both)}")


def _accuracies(both: dict[str, Training]) -> str:
    return ", ".join(f"{library} {one.accuracies[-1]:.3f}" for library, one in both.items())


def check(results: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    failures = []
    for name, one in results["models"].items():
        failures += [
            f"{name}: {library} reached a test accuracy of {one[library]['accuracy']:.3f}, less than {one['needed']}"
            for library in LIBRARIES
            if one[library]["accuracy"] < one["needed"]
        ]
        failures += [
            f"{name}: {tensor} differs from torch's by {difference:.1e} of its largest value ({where})"
            for where, step in one["steps"].items()
            for tensor, difference in step["differences"].items()
            if not difference <= TOLERANCE
        ]
    return failures


# --- what is printed -------------------------------------------------------------------------------------------------


def introduce(models: dict[str, Model], data: Data, console: Any) -> None:
    where = torch.cuda.get_device_name() if data.train_images.is_cuda else "one thread of the CPU"
    console.print("Handwritten digits, learned with tritune and with torch from the same weights:\n")
    for name, model in models.items():
        console.print(f"  {name:9}  {model.says}")
    learn, test = len(data.train_labels), len(data.test_labels)
    console.print(f"\n{learn} images to learn from, {test} for the accuracy, on {where}\n")


def show(results: dict[str, Any], console: Any) -> None:
    """The explanation first and what came of it last: that is what stays on the screen."""
    show_choices(results["models"], console)
    show_kernels(results["models"], console)
    show_summary(results, console)


def show_choices(models: dict[str, Any], console: Any) -> None:
    console.print("\nWhat the trained models run here:\n")
    reasons = dict.fromkeys(_reason(call) for one in models.values() for call in one["ran"])
    for reason in reasons:
        for name, one in models.items():
            calls = Counter(call["op"] for call in one["ran"] if _reason(call) == reason)
            if calls:
                console.print(f"  {name:9}  {', '.join(f'{count} × {op}' for op, count in calls.items())}")
        console.print(f"{reason}\n")


def _reason(call: dict[str, Any]) -> str:
    return f"on {call['backend']}: {call['why']}" + (f"  \\[{call['origin']}]" if call["origin"] else "")


def show_kernels(models: dict[str, Any], console: Any) -> None:
    """What ran in one training step, each config of a model once."""
    where = "interpreted" if _was_interpreted(models) else "here"
    steps = {name: one["steps"][where] for name, one in models.items()}
    table = _table("model", "kernel", "block sizes, warps, stages", "place", "origin")
    for name, step in steps.items():
        for number, row in enumerate(dict.fromkeys(_kernels(step))):
            table.add_row("" if number else name, *row)
    if not table.row_count:
        console.print("Triton is not installed, so no kernel ran: pip install 'tritune\\[triton]'\n")
        return
    first, seconds = next(iter(steps.values())), sum(step["seconds"] for step in steps.values())
    place = "in Triton's interpreter" if where == "interpreted" else "on this GPU"
    console.print(f"A training step of {first['images']} images on the kernels, {place}, {seconds:.1f} s:\n")
    console.print(table)
    console.print(
        f"\nConfigs for {first['chosen_for']}; origin model: ranked by a cost model, not measured; rule: the first "
        "that is declared, where the model sees no difference\n"
    )


def _was_interpreted(models: dict[str, Any]) -> bool:
    return any("interpreted" in one["steps"] for one in models.values())


def _kernels(step: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for call in step["ran"]:
        for one in call["kernels"]:
            config = " ".join(
                f"{key.removeprefix('BLOCK_').removeprefix('num_')}={value}" for key, value in one["config"].items()
            )
            yield one["kernel"], config, one["place"], one["origin"]


def show_summary(results: dict[str, Any], console: Any) -> None:
    table = _table(
        "\nmodel", "accuracy\ntritune", "\ntorch", "\nneeded", "training\ntritune", "\ntorch", "difference\nhere",
        *["\nkernels"] * _was_interpreted(results["models"]),
    )  # fmt: skip
    for name, one in results["models"].items():
        table.add_row(
            name, *(f"{one[library]['accuracy']:.3f}" for library in LIBRARIES), f"{one['needed']:.2f}",
            *(f"{one[library]['seconds']:.1f} s" for library in LIBRARIES),
            *(f"{max(step['differences'].values()):.1e}" for step in one["steps"].values()),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"\nAccuracy on the test images after {results['epochs']} epochs. Difference to torch in one training step, of "
        f"loss, output or a gradient, over that tensor's largest value: at most {TOLERANCE:.0e}.\n"
    )
    console.print(f"Curves, predictions and where attention looks: {results['picture']}\n", soft_wrap=True)


def _table(*headers: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*headers, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def child(path: str, send: Callable[[str], Any] = print) -> None:
    """The process of :func:`interpreted_steps`."""
    weights, images, labels = torch.load(path)
    send(json.dumps({name: compare_step(MODELS[name], one, images, labels, "triton") for name, one in weights.items()}))


if __name__ == "__main__":
    child(sys.argv[1])
