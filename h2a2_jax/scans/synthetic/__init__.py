"""Procedural scans of furnished rooms as different sensors acquire them."""

from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

__all__ = ["SyntheticSource"]
