"""From predictions to boxes."""
