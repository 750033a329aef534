"""What commands say: results on standard output, everything else on standard error; colour only on a terminal."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console


class CommandError(Exception):
    """Ends a command with this line on standard error and exit status 2."""


def stderr() -> Console:
    """A console on standard error, without emphasis on numbers and paths."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"antiphon: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def warnings_as_lines(wanted: type[Warning]) -> Iterator[None]:
    """Every warning of that kind is one line on standard error, without its place in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, wanted):
            complain(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", wanted)
        warnings.showwarning = show
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What C libraries print on standard error by themselves goes nowhere; what Python writes there still does."""
    try:
        number = sys.stderr.fileno()
    except io.UnsupportedOperation:
        yield
        return
    before = sys.stderr
    before.flush()
    kept = os.dup(number)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with open(kept, "w", buffering=1, encoding=before.encoding, errors="backslashreplace", closefd=False) as ours:
            sys.stderr = ours
            os.dup2(nowhere, number)
            try:
                yield
            finally:
                os.dup2(kept, number)
                sys.stderr = before
    finally:
        os.close(nowhere)
        os.close(kept)
