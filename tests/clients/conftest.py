"""The server that the clients of others are driven against."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

LEAVING_SECONDS = 10.0


@pytest.fixture
def server(parrot_server: str) -> Iterator[str]:
    """The address of ``antiphon serve --graph parrot``; a client that leaves must not leave its call there."""
    yield parrot_server
    with httpx.Client(base_url=parrot_server) as client:
        until = time.monotonic() + LEAVING_SECONDS
        while calls := client.get("/info").json()["calls"]:
            assert time.monotonic() < until, f"{calls} calls run on {LEAVING_SECONDS:g} s after their client has left"
            time.sleep(0.2)
