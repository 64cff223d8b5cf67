"""Faults that a training must survive; `python -m benchmarks.faults`."""
