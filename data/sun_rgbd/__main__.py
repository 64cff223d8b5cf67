"""Prepare SUN RGB-D: python -m data.sun_rgbd --raw=DIR [--annotations=v1]."""

import sys

from h2a2_jax.prepare.prepare import raw_command
from h2a2_jax.scans.raw.sunrgbd import SunRgbd

_OPTIONS = {
    "--annotations": {
        "choices": ["v2", "v1"],
        "default": "v2",
        "help": "v2, the corrected boxes, or v1, those of VoteNet",
    }
}

if __name__ == "__main__":
    sys.exit(raw_command("sun_rgbd", lambda parsed: SunRgbd(parsed.raw, parsed.annotations), options=_OPTIONS))
