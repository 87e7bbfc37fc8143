"""The library's one logger. Warnings reach standard error as Python's logging does it by default, so that nobody has to
switch them on; ``TRITUNE_LOG`` names another level (``debug`` shows each decision once) and adds a handler."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .variables import word

logger = logging.getLogger("tritune")
if _level := word("TRITUNE_LOG"):
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("tritune: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(_level.upper())


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the library warns of meanwhile, such as files and entries that it ignores."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def one_line(text: str) -> str:
    """The text without line breaks, control characters, and bytes that are no text: names of files may hold them."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
