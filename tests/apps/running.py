"""What runs beside a test: ``antiphon serve`` in a process of its own, and headless Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# A machine that is busy with other tests shall not refuse: admission has tests of its own.
SERVE = """
from antiphon.apps.cli import main
from antiphon.pipelines.engine import Engine
Engine.__init__.__kwdefaults__["limit"] = 1e9
main()
"""
PATIENCE = 180.0  # seconds for the models to load


@contextmanager
def server(*arguments: object) -> Iterator[int]:
    """The port of a server with these arguments, on the CPU, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", "--port", str(port), "--device", "cpu", *map(str, arguments)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until = time.monotonic() + PATIENCE
        while not ready(port):
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < until, "the server did not become ready"
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def ready(port: int) -> bool:
    """Whether the server takes calls."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


BROWSER = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--allow-loopback-in-peer-connection",
)


@contextmanager
def chromium(*flags: str) -> Iterator[Any]:
    """A browser with a microphone and a camera that are no real ones; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*BROWSER, *flags])
        yield browser
        browser.close()
