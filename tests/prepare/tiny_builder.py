"""The builder of the tiny scans, apart from these: their workers need no TFDS.

`python -m tests.prepare.tiny_builder OUTPUT LOG TRAIN POINTS` prepares them.
"""

import sys
from pathlib import Path

from h2a2_jax.prepare.builder import ScanDatasetBuilder
from h2a2_jax.prepare.prepare import prepare
from h2a2_jax.scans.specs import S3DIS
from tests.prepare.tiny import TinyRaw


class TinyBuilder(ScanDatasetBuilder, skip_registration=True):
    """Tiny scans."""

    name = "tiny"
    spec = S3DIS
    homepage = "https://example.org"
    citation = ""
    licence = "Apache-2.0"


if __name__ == "__main__":
    output, log, train, points = sys.argv[1:]
    prepare(TinyBuilder, TinyRaw(Path(log), int(train), int(points)), {}, Path(output), workers=2)
