"""Checkpoints of a run: what is stored, where, and what another run takes of it."""
