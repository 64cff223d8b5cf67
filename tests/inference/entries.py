"""Entries of scans in documents, of boxes in the frame of a scan."""

from typing import Any

from h2a2_jax.boxes import Detections
from h2a2_jax.inference.results import entry_of, in_file
from h2a2_jax.scans.specs import DatasetSpec


def scan_entry(name: str, transform: Any, found: Detections, spec: DatasetSpec, file: str | None = None) -> dict:
    """The entry of a scan, given the transform from the frame of its file to that of the boxes."""
    return entry_of(in_file(name, transform, found, file), spec.classes, spec.name)
