"""Networks on features and tokens as streaming steps, and their checkpoints."""
