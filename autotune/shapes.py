"""How the command line spells a layer: the shapes of its tensors and its options, as ``tritune explain`` and
``tritune tune`` read them.

They are words, apart by spaces or commas, options anywhere among the shapes::

    32x64x56x56 64x64x3x3 padding=1
    32x64x56x56,64x64x3x3,padding=1
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Option(NamedTuple):
    """One option of an operator.

    Attributes:
        kind: type of its value; ``bool`` is a switch, as a word 1 or 0.
        default: ``None`` leaves it to the operator.
        choices: if it is one of these words.
    """

    kind: type
    default: Any = None
    help: str = ""
    choices: tuple[str, ...] = ()
    required: bool = False


def words_of(texts: Iterable[str]) -> list[str]:
    return [word for text in texts for word in re.split(r"[,\s]+", text) if word]


def is_spelled_out(text: str) -> bool:
    """Does this begin as shapes do, with a size, or is it an option? Else it is the name of something."""
    return text[:1].isdigit() or "=" in text


def shape(text: str) -> Shape:
    """From ``"32x64x56x56"``. Raises ValueError."""
    if not re.fullmatch(r"[0-9]+(x[0-9]+)*", text):
        raise ValueError(f"{text!r} is not a shape such as 32x64x56x56")
    return tuple(int(size) for size in text.split("x"))


def parse(
    texts: Iterable[str], names: str, options: Mapping[str, Option], given: Mapping[str, Any] | None = None
) -> tuple[list[Shape], dict[str, Any]]:
    """The shapes, and the values of all options by name.

    Args:
        names: what the shapes are, in order, such as ``"input weight [bias]"``; those in brackets may be left out.
        given: values that were given otherwise, by name.

    Raises:
        ValueError: in words for a person.
    """
    words = words_of(texts)
    shapes = [shape(word) for word in words if "=" not in word]
    values = dict(given or {})
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            continue
        key = name.replace("-", "_")
        if key not in options:
            likely = difflib.get_close_matches(key, options) or options
            raise ValueError(f"No such option: {name} (Possible options: {', '.join(likely)})")
        if key in values:
            raise ValueError(f"{name} is given twice")
        values[key] = _value(name, text, options[key])
    for name, option in options.items():
        if option.required and name not in values:
            raise ValueError(f"Missing option: {name}")
    least = sum(name[0] != "[" for name in names.split())
    if not least <= len(shapes) <= len(names.split()):
        raise ValueError(f"the shapes of {names} are wanted, got {len(shapes)}")
    return shapes, {name: values.get(name, option.default) for name, option in options.items()}


def _value(name: str, text: str, option: Option) -> Any:
    if option.choices and text not in option.choices:
        raise ValueError(f"{name} is one of {', '.join(option.choices)}, not {text!r}")
    if option.kind is bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name} is 1 or 0, not {text!r}")
        return text == "1"
    if option.kind is int:
        least = 0 if option.default == 0 else 1
        if not re.fullmatch("[0-9]+", text) or int(text) < least:
            raise ValueError(f"{name} is a whole number from {least} on, not {text!r}")
        return int(text)
    try:
        return option.kind(text)
    except ValueError:
        raise ValueError(f"{name} is a number, not {text!r}") from None
