"""Entry point of `python -m h2a2_jax.convert.tr3d`."""
