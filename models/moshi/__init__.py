"""Moshi (arXiv 2410.00037) and models built like it: text and speech streams through one transformer."""
