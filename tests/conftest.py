"""Shared test settings: one intra-op thread, GPU tests only where there is a GPU, no silent skips in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-exact comparisons hold with one intra-op thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
