"""Protocols that speak for a call: one module each, with ``routes(service)`` or ``serve(service, ...)``."""
