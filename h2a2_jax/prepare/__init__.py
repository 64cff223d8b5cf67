"""From raw datasets to prepared ones: scans in parallel into a cache that survives kills, and from there into TFDS."""
