"""Checkpoints of a run: the training state, its files, and starts of other runs from them."""
