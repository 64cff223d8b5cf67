"""Procedural scans as ScanNet's."""
