"""`python -m flowstream` is the `flowstream` command."""

import sys

from flowstream.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
