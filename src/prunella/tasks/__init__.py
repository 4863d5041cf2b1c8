"""Tasks: what networks are for. One file a task."""
