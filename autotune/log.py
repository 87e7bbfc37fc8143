"""The library's one logger. Warnings reach standard error as Python's logging does it by default, so that nobody has to
switch them on; ``TRITUNE_LOG`` names another level (``debug`` shows each decision once) and adds a handler."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("tritune")
_level = os.environ.get("TRITUNE_LOG", "").lower()
if _level in LEVELS:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("tritune: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(_level.upper())
elif _level:
    logger.warning("TRITUNE_LOG=%s is none of %s", os.environ["TRITUNE_LOG"], ", ".join(LEVELS))


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
