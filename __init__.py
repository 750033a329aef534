"""Antiphon: real-time speech and video models for many people at once."""

__version__ = "0.1.0"
