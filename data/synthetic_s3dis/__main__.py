"""Generate procedural scans: python -m data.synthetic_s3dis --train=1000 --val=100 --seed=0."""

import sys

from h2a2_jax.prepare.prepare import synthetic_command

if __name__ == "__main__":
    sys.exit(synthetic_command("synthetic_s3dis", stands_for="s3dis"))
