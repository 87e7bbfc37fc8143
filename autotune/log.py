"""The library's one logger. ``TRITUNE_LOG`` names a level (``debug`` shows each decision once) and adds a handler."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("tritune")
logger.addHandler(logging.NullHandler())

if os.environ.get("TRITUNE_LOG"):
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("tritune: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(os.environ["TRITUNE_LOG"].upper())


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
