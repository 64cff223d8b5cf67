"""Procedural rooms as those of S3DIS."""
