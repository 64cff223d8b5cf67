"""Generate procedural scans: python -m data.synthetic 3rscan --train=1000 --val=100 --seed=0."""

import sys

from data.synthetic.synthetic_dataset_builder import STAND_INS
from h2a2_jax.prepare.prepare import synthetic_command

if __name__ == "__main__":
    sys.exit(synthetic_command("synthetic", stands_for=tuple(STAND_INS)))
