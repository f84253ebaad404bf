"""`python -m maskset`, which is how `accelerate launch -m maskset` and `torchrun -m maskset` start it."""

import sys

from maskset.cli import main

if __name__ == "__main__":
    sys.exit(main())
