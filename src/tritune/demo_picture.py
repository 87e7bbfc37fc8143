"""The picture of ``tritune demo``: a column for each model with its learning curves above and digits below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

DIGITS = (3, 4)  # rows and columns


class Column(NamedTuple):
    """What is drawn of a model, on the CPU.

    Attributes:
        says: what it is, in a few words.
        accuracies: after each epoch, by library.
        predictions, labels: of all test digits.
        images: ``[N, 8, 8]``.
        looks: where the model looked, ``[N, 8, 8]``, if that is known of it.
    """

    name: str
    says: str
    needed: float
    accuracies: dict[str, list[float]]
    predictions: Tensor
    labels: Tensor
    images: Tensor
    looks: Tensor | None


def draw(folder: Path, columns: Sequence[Column]) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(4.4 * len(columns), 7.8), layout="constrained")
    figure.suptitle("Handwritten digits with tritune and torch")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    above, below = halves
    lowest = min(min(curve) for one in columns for curve in one.accuracies.values())
    curves = above.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    panels: Any = below.subfigures(1, len(columns), squeeze=False, wspace=0.08)[0]
    for axis, panel, one in zip(curves, panels, columns, strict=True):
        _draw_curves(axis, one, lowest)
        _draw_digits(panel, one)
    curves[0].set_ylabel("test accuracy")
    curves[0].legend(frameon=False, loc="lower right")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_curves(axis: Any, one: Column, lowest: float) -> None:
    styles = {"tritune": ("-", "C0", 4), "torch": ("--", "C1", 1.8)}
    for name, accuracies in one.accuracies.items():
        style, color, width = styles[name]
        axis.plot(range(1, len(accuracies) + 1), accuracies, linestyle=style, color=color, label=name, linewidth=width)
    axis.axhline(one.needed, color="0.6", linewidth=1, zorder=0)
    epochs = len(one.accuracies["torch"])
    axis.annotate(
        f"needed: {one.needed:.2f}", (epochs, one.needed), (0, -3), textcoords="offset points", ha="right", va="top",
        color="0.4", fontsize="small",
    )  # fmt: skip
    last = ", ".join(f"{name} {accuracies[-1]:.3f}" for name, accuracies in one.accuracies.items())
    axis.set_title(f"{one.name}: {last}", fontweight="bold", fontsize="medium", pad=22)
    axis.annotate(one.says, (0.5, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", ha="center",
                  fontsize="small")  # fmt: skip
    axis.set(xlabel="epoch", ylim=(max(0, lowest - 0.05), 1.0))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_digits(panel: Any, one: Column) -> None:
    """A row of digits that tritune's model read right, then those that it did not."""
    is_right = one.predictions == one.labels
    right, wrong = is_right.nonzero().flatten().tolist(), (~is_right).nonzero().flatten().tolist()
    title = f"{len(wrong)} of {len(one.labels)} test digits wrong"
    panel.suptitle(title if one.looks is None else f"{title}; orange: where it looked", fontsize="medium")
    rows, columns = DIGITS
    chosen = (right[:columns] + wrong + right[columns:])[: rows * columns]
    for axis, index in zip(panel.subplots(*DIGITS).flat, chosen, strict=True):
        axis.imshow(one.images[index].numpy(), cmap="gray_r")
        if one.looks is not None:
            share = (one.looks[index] / one.looks[index].max()).numpy()
            axis.imshow(share > 0, cmap="Wistia", vmin=0, vmax=1, alpha=0.75 * share)
        axis.set(xticks=[], yticks=[])
        said, label = int(one.predictions[index]), int(one.labels[index])
        text, color = (f"{label}", "black") if said == label else (f"{label} read as {said}", "C3")
        axis.set_title(text, color=color, fontsize="small")
