"""SUN RGB-D: 10,335 RGB-D frames."""
