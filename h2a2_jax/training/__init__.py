"""Joint training on several datasets."""
