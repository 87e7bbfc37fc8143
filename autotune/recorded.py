"""Calls of a user's model in a file: what :func:`tritune.record_shapes` writes, and ``tritune tune --from`` and
``tritune explain file`` read.

A line is one call as JSON, with the number of times that it was made::

    {"op": "conv2d", "shapes": {"input": [8, 3, 32, 32], "weight": [16, 3, 3, 3]}, "dtype": "bf16", "layout": "nhwc",
     "kwargs": {"padding": 1}, "direction": "fwd+bwd", "count": 12}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .shapes import Shape


@dataclass(frozen=True)
class Recorded:
    """One call of a public function.

    Attributes:
        op: the function's name.
        shapes: of every tensor argument, by name.
        dtype: how it computes: ``"bf16"``, ``"fp16"``, ``"ieee"``, ``"tf32"`` or ``"tf32x3"``; ``"fp32"`` of a function
            that multiplies nothing, or torch's name of another dtype.
        layout: of images, ``"nhwc"`` or ``"nchw"``; ``""`` of other tensors.
        kwargs: the other arguments, without those that have their default.
        direction: ``"fwd"``, or ``"fwd+bwd"`` where a gradient was recorded.
        dtypes: torch's names of the dtypes of those tensors that have another one than the first.
        count: how often the call was made.
    """

    op: str
    shapes: dict[str, Shape]
    dtype: str
    layout: str
    kwargs: dict[str, Any]
    direction: str
    dtypes: dict[str, str]
    count: int = 1

    def number(self, name: str, default: int | None = None) -> int | None:
        """An argument that is a number, or the same number in each dimension. Raises ValueError for any other."""
        value = one_number(self.kwargs.get(name, default))
        if value is None or isinstance(value, int):
            return value
        raise ValueError(f"{name}={value} is not one number")

    def allow(self, *names: str, **values: Any) -> None:
        """Raises ValueError if an argument is not among these names, and has not the value that is given for it."""
        for name, value in self.kwargs.items():
            if name not in names and (name not in values or value != values[name]):
                raise ValueError(f"no layer is spelled with {name}={value}")


def one_number(value: Any) -> Any:
    """The number that a list has in each place; anything else as it is."""
    return value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value


def write(path: Path, calls: Iterable[Recorded]) -> None:
    path.write_text("".join(json.dumps(_document(call)) + "\n" for call in calls))


def _document(call: Recorded) -> dict[str, Any]:
    return {name: value for name, value in asdict(call).items() if name != "dtypes" or value}


def read(path: Path) -> list[Recorded]:
    """The most frequent first. Raises ValueError, in one line that names the file and the line in it."""
    if not path.is_file():
        raise ValueError(f"{path} is no file that record_shapes has written")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    calls = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    return sorted(calls, key=lambda call: -call.count)


_FIELDS = {"op": str, "shapes": dict, "dtype": str, "layout": str, "kwargs": dict, "direction": str, "dtypes": dict,
           "count": int}  # fmt: skip
_WORDS = {"layout": ("", "nhwc", "nchw"), "direction": ("fwd", "fwd+bwd")}


def _parse(line: str, where: str) -> Recorded:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} is no JSON object")
    data = {"dtypes": {}, **data}
    for name, kind in _FIELDS.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(f"{where} has no {name!r} that is of type {kind.__name__}")
    for name, words in _WORDS.items():
        if data[name] not in words:
            raise ValueError(f"{where}: {name} is one of {', '.join(map(repr, words))}, not {data[name]!r}")
    for name, sizes in data["shapes"].items():
        if not (isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)):
            raise ValueError(f"{where}: the shape of {name} is no list of sizes: {sizes}")
    shapes = {name: tuple(sizes) for name, sizes in data["shapes"].items()}
    return Recorded(**{name: data[name] for name in _FIELDS} | {"shapes": shapes})


def spelled(shapes: Iterable[Shape], options: Mapping[str, Any]) -> str:
    """As ``tritune tune`` reads it: ``"8x3x32x32,16x3x3x3,padding=1"``."""
    words = ["x".join(map(str, shape)) for shape in shapes]
    return ",".join([*words, *(f"{name}={value}" for name, value in options.items() if value is not None)])
