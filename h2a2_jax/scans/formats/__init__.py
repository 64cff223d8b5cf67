"""Files of points: a reader for each format."""
