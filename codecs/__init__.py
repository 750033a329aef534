"""Signals to and from features or tokens: log-mel, resampling, audio files."""
