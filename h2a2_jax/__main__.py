"""The command line: python -m h2a2_jax COMMAND."""

import sys

from h2a2_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
