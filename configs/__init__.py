"""What to run: the configs of run.py."""
