"""The library's one logger. ``TRITUNE_LOG`` names a level (``debug`` shows each decision once) and adds a handler."""

import logging
import os

logger = logging.getLogger("tritune")
logger.addHandler(logging.NullHandler())

if os.environ.get("TRITUNE_LOG"):
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("tritune: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(os.environ["TRITUNE_LOG"].upper())
