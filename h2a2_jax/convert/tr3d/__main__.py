"""Convert checkpoints of TR3D: see `h2a2_jax.convert.conversion`."""

import sys

from h2a2_jax.convert.conversion import convert_command

if __name__ == "__main__":
    sys.exit(convert_command(sys.argv[1:]))
