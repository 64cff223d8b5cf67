"""Procedural frames as those of SUN RGB-D."""
