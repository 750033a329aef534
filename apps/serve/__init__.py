"""The server: page, signalling, protocols, health and metrics."""
