"""The library's one logger. ``TRITUNE_LOG`` names a level (``debug`` shows each decision once) and adds a handler."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .variables import word

logger = logging.getLogger("tritune")
logger.addHandler(logging.NullHandler())

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
