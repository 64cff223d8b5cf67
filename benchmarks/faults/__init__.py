"""Faults met by a training, and whether it comes through them; `python -m benchmarks.faults`."""
