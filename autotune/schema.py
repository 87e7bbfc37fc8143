"""What a file of tuned configs may hold. Everything is checked when the file is read, and nothing later.

A file may come from anywhere: an editor, a merge of two branches, a newer version, a disk that ran full. It is taken
apart in two steps, so that one bad entry costs no other: :func:`parse` finds where each entry begins and ends,
:func:`check` reads one of them. Both raise ``ValueError`` in words for a person, and no other exception. What this
version does not use is handed back as the text that stands in the file.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

SCHEMA = 1
LARGEST = 2**63 - 1  # of sizes and block sizes
LONGEST = 200  # characters of a name
DEEPEST = 20  # levels of lists and objects in an entry
ORIGINS = ("measured", "model", "rehearsed")


# How keys spell a dtype: as the command line does. Some kernels once wrote torch's names.
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def dtype_name(dtype: object) -> str:
    """Of a dtype, ``None``, or a value in the key of a file, which may be something else and stays that."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.get(name, name)


class Document(NamedTuple):
    """A file, taken apart.

    Attributes:
        kernel: whose configs it says it holds; empty if it does not say.
        entries: line and text of each entry.
        fields: text of each field beside ``schema``, ``kernel`` and ``entries``.
    """

    kernel: str
    entries: list[tuple[int, str]]
    fields: dict[str, str]


# --- entries ---------------------------------------------------------------------------------------------------------


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST  # True is an int to Python


def _is_name(value: Any) -> bool:
    """It will be printed: no control characters, and nothing that has no encoding."""
    return type(value) is str and len(value) <= LONGEST and value.isprintable()


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e15


def _table_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is dict and all(_is_name(name) and holds(one) for name, one in value.items())


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


REQUIRED = ("key", "config", "origin")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "key": (_table_of(lambda value: _is_size(value) or _is_name(value)), "sizes and names"),
    "config": (_table_of(_is_size), "whole numbers that are not negative"),
    "origin": (lambda value: type(value) is str and value in ORIGINS, " or ".join(ORIGINS)),
    "version": (_is_size, "a whole number"),
    "us": (_is_time, "a time in microseconds"),
    "torch_us": (_is_time, "a time in microseconds"),
    "default_us": (_or_none(_is_time), "a time in microseconds or null"),
    "runner_up_us": (_or_none(_is_time), "a time in microseconds or null"),
    "env": (_table_of(_or_none(_is_name)), "names or null"),
    "tested": (_is_size, "a whole number"),
    "candidates": (_is_size, "a whole number"),
    "counts": (_table_of(_is_size), "whole numbers"),
    "broken": (_table_of(lambda value: type(value) is str), "faults in words"),
    "unfinished": (lambda value: type(value) is bool, "true or false"),
}


def check(text: str) -> dict[str, Any]:
    """The fields of one entry. A field that is not in FIELDS may hold any value of JSON: nothing here reads it."""
    try:
        entry = _read_entry(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(entry) is not dict:
        raise ValueError(f"{reprlib.repr(entry)} is not an object")
    if not _nests_within(entry, DEEPEST):
        raise ValueError("it is nested too deeply")
    if "origin" not in entry and "source" in entry:
        entry["origin"] = entry.pop("source")  # as files spell it that were written before the field was renamed
    for name in REQUIRED:
        if name not in entry:
            raise ValueError(f"it has no {name}")
    for name, (holds, words) in FIELDS.items():
        if name in entry and not holds(entry[name]):
            raise ValueError(f"{name} is {reprlib.repr(entry[name])}, not {words}")
    entry["key"] = {name: dtype_name(one) if type(one) is str else one for name, one in entry["key"].items()}
    return entry


def _nests_within(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    children = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_nests_within(child, levels - 1) for child in children)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has two values under one name")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(digits)} is too large")
    return value


_read_entry = json.JSONDecoder(
    object_pairs_hook=_no_name_twice, parse_constant=_no_constant, parse_float=_finite
).decode


# --- files -----------------------------------------------------------------------------------------------------------

_skip_space = re.compile(r"[ \t\r\n]*").match
# Finds where a value ends. Numbers stay text: one that Python cannot hold damages its entry, not the file.
_skip_value = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str).raw_decode


def parse(text: str) -> Document:
    """Takes a file apart. Raises if it is no JSON, or if schema or entries are not what this version reads."""
    try:
        members, end = _members(text, _after(text, 0), "{", "}")
        fields = {json.loads(name): (start, stop) for name, start, stop in members}
        if len(fields) < len(members):
            raise ValueError("it has two fields of one name")
        if end < len(text):
            raise json.JSONDecodeError("something follows its end", text, end)
        for name in ("schema", "entries"):
            if name not in fields:
                raise ValueError(f"it has no {name}")
        schema, entries, kernel = fields.pop("schema"), fields.pop("entries"), fields.pop("kernel", None)
        if text[slice(*schema)] != str(SCHEMA):
            raise ValueError(f"its schema is {reprlib.repr(text[slice(*schema)])}, this version reads {SCHEMA}")
        of = "" if kernel is None else json.loads(text[slice(*kernel)])
        if not _is_name(of):
            raise ValueError(f"kernel is {reprlib.repr(of)}, not a name")
        found, _ = _members(text, entries[0], "[", "]")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return Document(of, _with_lines(text, found), {name: text[start:stop] for name, (start, stop) in fields.items()})


def _with_lines(text: str, members: list[tuple[str, int, int]]) -> list[tuple[int, str]]:
    line, at, found = 1, 0, []
    for _, start, end in members:
        line += text.count("\n", at, start)
        at = start
        found.append((line, text[start:end]))
    return found


def _members(text: str, at: int, opening: str, closing: str) -> tuple[list[tuple[str, int, int]], int]:
    """The members of an object or a list as ``(name, start, end)``, with the name as it is quoted, empty in a list;
    and the position behind the closing bracket and the space that follows it."""
    members: list[tuple[str, int, int]] = []
    at = _expect(text, at, opening)
    while members or not text.startswith(closing, at):
        name = ""
        if opening == "{":
            if not text.startswith('"', at):
                raise json.JSONDecodeError("a name is missing", text, at)
            name = text[at : _skip_value(text, at)[1]]
            at = _expect(text, _after(text, at + len(name)), ":")
        start = at
        _, end = _skip_value(text, at)
        members.append((name, start, end))
        at = _after(text, end)
        if text.startswith(closing, at):
            break
        at = _expect(text, at, ",")
    return members, _expect(text, at, closing)


def _expect(text: str, at: int, mark: str) -> int:
    if not text.startswith(mark, at):
        raise json.JSONDecodeError(f"{mark!r} is missing", text, at)
    return _after(text, at + 1)


def _after(text: str, at: int) -> int:
    """The position behind the space that begins here."""
    return _skip_space(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
