"""Moshi (arXiv 2410.00037) and models built like it: speech and text streams through one transformer, frame by frame."""
