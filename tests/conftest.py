"""What tests share: one intra-op thread, a real server and browser, GPU tests only on a GPU, no silent skips in CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "apps"))
from running import chromium, server

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test comes first

SAMPLE = Path(__file__).parents[1] / "apps" / "samples" / "two_cities.flac"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-exact comparisons hold with one intra-op thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter with loops whose ends are tensors: it takes NumPy's arrays of one number for numbers, which
    NumPy does not from version 2.4 on."""
    if torch.cuda.is_available():
        return
    module = pytest.importorskip("triton.runtime.interpreter")
    original = module._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(module, "_patch_lang_tensor", patched)


@pytest.fixture(scope="session")
def parrot_server() -> Iterator[str]:
    """The address of ``antiphon serve --graph parrot``, warm."""
    with server("--graph", "parrot") as port:
        yield f"http://127.0.0.1:{port}"


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
    with chromium(f"--use-file-for-fake-audio-capture={speech_wav}") as running:
        yield running


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
