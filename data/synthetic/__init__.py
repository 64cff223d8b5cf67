"""Procedural scans as those of ARKitScenes, MultiScan, 3RScan and ScanNet++."""
