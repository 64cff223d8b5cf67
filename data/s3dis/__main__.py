"""Prepare S3DIS: python -m data.s3dis --raw=DIR [--val-area=5]."""

import sys

from h2a2_jax.prepare.prepare import raw_command
from h2a2_jax.scans.raw.s3dis import S3dis

_USUAL_AREA = 5
_OPTIONS = {"--val-area": {"type": int, "default": _USUAL_AREA, "help": "area of the validation split (5)"}}

if __name__ == "__main__":
    sys.exit(
        raw_command(
            "s3dis",
            lambda parsed: S3dis(parsed.raw, parsed.val_area),
            options=_OPTIONS,
            comparable=lambda parsed: parsed.val_area == _USUAL_AREA,
        )
    )
