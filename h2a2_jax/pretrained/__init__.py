"""Weights by name: a catalog of published detectors, their download, and folders in which detectors are passed on."""
