"""Procedural scans of furnished rooms, as three sensors would acquire them."""

from h2a2_jax.inputs.synthetic.source import SyntheticSource

__all__ = ["SyntheticSource"]
