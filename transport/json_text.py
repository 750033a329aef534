"""JSON from strangers."""

from __future__ import annotations

import json
import re
from typing import Any

DEEPEST = 64  # arrays and objects inside each other

_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def parse(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises ValueError for what is none, and for one nested deeper than 64, before it is read: reading it would bring the
    stack to its end, where whatever is finalised meanwhile fails.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(text)
    return json.loads(text)


def _check_depth(text: str) -> None:
    depth = 0
    for mark in _MARKS.finditer(text):
        character = text[mark.start()]
        if character in "[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"arrays and objects are nested deeper than {DEEPEST}")
        elif character != '"':
            depth -= 1
