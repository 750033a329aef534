"""What tests share: one intra-op thread, a real server and browser, GPU tests only on a GPU, no silent skips in CI."""

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
from pathlib import Path
from typing import Any

import av
import pytest
import torch

SAMPLE = Path(__file__).parents[1] / "apps" / "samples" / "two_cities.flac"
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--allow-loopback-in-peer-connection",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-exact comparisons hold with one intra-op thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parrot_server() -> Iterator[str]:
    """The address of ``antiphon serve --graph parrot``, warm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from antiphon.apps.cli import main; main()", "serve", "--port", str(port)]
    process = subprocess.Popen([*command, "--graph", "parrot"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while not _ready(address):
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < until, "the server did not become ready"
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


@pytest.fixture(scope="session")
def speech_wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample as Chromium's microphone plays it: 48 kHz WAV."""
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    resampler = av.AudioResampler("s16", "mono", 48000)
    with av.open(str(SAMPLE)) as source, av.open(str(path), "w") as sink:
        stream = sink.add_stream("pcm_s16le", rate=48000, layout="mono")
        for frame in source.decode(audio=0):
            for part in resampler.resample(frame):
                sink.mux(stream.encode(part))
        sink.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def browser(speech_wav: Path) -> Iterator[Any]:
    """Headless Chromium, with the sample as its microphone."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=[*BROWSER_FLAGS, f"--use-file-for-fake-audio-capture={speech_wav}"]
        )
        yield chromium
        chromium.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing = unexpected_skips(terminalreporter)
    if missing:
        terminalreporter.section("skipped in CI, where everything but GPU tests must run", red=True)
        for line in missing:
            terminalreporter.line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and unexpected_skips(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def unexpected_skips(reporter: pytest.TerminalReporter) -> list[str]:
    if os.environ.get("CI") != "true":
        return []
    reports = reporter.stats.get("skipped", [])
    return [f"{report.nodeid}: {report.longrepr}" for report in reports if "gpu" not in report.keywords]
