"""Generate procedural scans: python -m data.synthetic_scannet --train=1000 --val=100 --seed=0."""

import sys

from h2a2_jax.prepare.prepare import synthetic_command

if __name__ == "__main__":
    sys.exit(synthetic_command("synthetic_scannet", stands_for="scannet"))
