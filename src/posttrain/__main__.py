"""`python -m posttrain` is the same as `posttrain`."""

import sys

from posttrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
