"""ScanNet v2: 1,513 scans of rooms as meshes."""
