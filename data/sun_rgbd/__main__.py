"""Prepares SUN RGB-D: python -m data.sun_rgbd --raw=DIR [--annotations=v1]."""

import argparse
import sys

from h2a2_jax.prepare.prepare import raw_command
from h2a2_jax.scans.raw.sunrgbd import SunRgbd


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--annotations", choices=["v2", "v1"], default="v2", help="v2, the corrected boxes, or v1, those of VoteNet"
    )


if __name__ == "__main__":
    sys.exit(raw_command("sun_rgbd", lambda options: SunRgbd(options.raw, options.annotations), add_options=_options))
