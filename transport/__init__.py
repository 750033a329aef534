"""Ways in and out: files today."""
