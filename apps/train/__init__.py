"""Training recipes of the embedded checkpoints."""
