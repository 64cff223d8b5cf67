"""The command line: python -m h2a2_jax COMMAND."""

from h2a2_jax.cli import main
from h2a2_jax.host import leave

if __name__ == "__main__":
    leave(main())
