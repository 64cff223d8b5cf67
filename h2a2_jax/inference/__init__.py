"""Prediction: boxes in scans, arrays and files of points by a trained model."""
