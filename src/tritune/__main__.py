"""``python -m tritune``: the same as the ``tritune`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
