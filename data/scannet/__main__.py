"""Prepare ScanNet v2: python -m data.scannet --raw=DIR."""

import sys

from h2a2_jax.prepare.prepare import raw_command
from h2a2_jax.scans.raw.scannet import ScanNet

if __name__ == "__main__":
    sys.exit(raw_command("scannet", lambda options: ScanNet(options.raw)))
