"""What may become of a file of tuned configs: the damage that its tests do to it."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from pathlib import Path

TOY = {"BLOCK": 64, "num_stages": 2, "num_warps": 4}
ENTRIES = (
    {
        "config": TOY, "env": {"gpu": None, "triton": "3.7.1"}, "key": {"dtype": "fp16", "size": 512},
        "origin": "measured", "torch_us": 9.0, "us": 4.5, "version": 1,
    },
    {
        "config": {**TOY, "BLOCK": 128}, "key": {"dtype": "fp16", "size": 1024}, "later": {"a": [1, 2.5, "b"]},
        "origin": "model", "version": 1,
    },
    {
        "config": {**TOY, "BLOCK": 256}, "counts": {"slow": 1}, "key": {"dtype": "fp16", "size": 4096},
        "origin": "measured", "unfinished": True, "us": 3, "version": 1,
    },
)  # fmt: skip
LINES = ",\n".join(json.dumps(entry) for entry in ENTRIES)
WHOLE = f'{{"schema": 1, "kernel": "toy", "note": ["kept"], "entries": [\n{LINES}\n]}}\n'.encode()

# Nothing of these files can be used.
UNREADABLE = {
    "empty": b"",
    "one brace": b"{",
    "a list": b"[]",
    "a number": b"1",
    "truncated": WHOLE[:-40],
    "a stray comma": WHOLE.replace(b"\n]}", b",\n]}"),
    "a comma too few": WHOLE.replace(b"1},\n", b"1}\n"),
    "another schema": WHOLE.replace(b'"schema": 1', b'"schema": 2'),
    "a schema that is true": WHOLE.replace(b'"schema": 1', b'"schema": true'),
    "no schema": WHOLE.replace(b'"schema": 1, ', b""),
    "no entries": b'{"schema": 1, "kernel": "toy"}',
    "entries that are an object": b'{"schema": 1, "kernel": "toy", "entries": {}}',
    "a kernel that is a number": WHOLE.replace(b'"toy"', b"7"),
    "two lists of entries": WHOLE.replace(b'"note": ["kept"]', b'"entries": []'),
    "something behind": WHOLE + b"{}",
    "a name without quotes": WHOLE.replace(b'"schema"', b"1"),
    "not UTF-8": WHOLE.replace(b"kept", b"\xff\xfe"),
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "zeros": bytes(4096),
    "nested deeply": b"[" * 100_000,
    "an entry nested deeply": WHOLE.replace(b'"b"', b"[" * 100_000 + b"]" * 100_000),
    "a conflict of git": WHOLE.replace(b"\n]}", b"\n<<<<<<< HEAD\n=======\n>>>>>>> x\n]}"),
}

# What takes the place of a value; each makes a file with one entry that cannot be used, or with none.
VALUES = (
    "null", "true", "-16", "0", "3", "1.5", "-0.0", "NaN", "-Infinity", "1e400", "1" + 400 * "0", "1" + 5000 * "0",
    '"x"', '""', r'"\ud800"', r'"\u001b[2J"', '"' + 300 * "x" + '"', "[]", "{}", "[[[]]]", '{"a": null}',
    '{"a": 1, "a": 2}', 30 * "[" + 30 * "]",
)  # fmt: skip
DEEP = 2000 * "[" + 2000 * "]"  # damages the whole file, for nobody can say where the value ends
PIECES = (*VALUES, ",", ":", "{", "}", "[", "]", '"', "\n", "\\", "\0", "\ufeff", '"us": ', '"key": ', '"config": {}, ')


def damaged(seed: int) -> bytes:
    """WHOLE with another value in one place, with damage in one to four places, or with both."""
    chance = random.Random(seed)
    data = with_another_value(chance) if seed % 4 else WHOLE
    for _ in range(chance.choice((1, 1, 1, 2, 4)) if seed % 4 < 2 else 0):
        a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        near = min(len(data), a + chance.randrange(12))
        kind = chance.randrange(6)
        if kind == 0:
            data = data[:a]
        elif kind == 1:
            data = data[:a] + data[near:]
        elif kind == 2:
            data = data[:b] + data[a:b] + data[b:]
        elif kind == 3:
            data = data[:a] + bytes([chance.randrange(256)]) + data[a + 1 :]
        else:
            data = data[:a] + chance.choice(PIECES).encode() + data[near:]
    return data


def with_another_value(chance: random.Random) -> bytes:
    """One field of one entry, or a field of a field, has another value; a new one may be among them."""
    entries = copy.deepcopy(ENTRIES)
    entry = chance.choice(entries)
    fields = chance.choice([entry, *(value for value in entry.values() if isinstance(value, dict))])
    fields[chance.choice([*fields, "new"])] = "HERE"
    lines = ",\n".join(json.dumps(one) for one in entries).replace('"HERE"', chance.choice((*VALUES, DEEP)))
    return WHOLE.replace(LINES.encode(), lines.encode())


def a_folder(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket has room for about 100 characters
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES = (a_folder, a_fifo, a_device, a_socket, a_loop)
