"""Chunks, edges, stages, graphs, sessions; the engine that steps every model for every session."""
