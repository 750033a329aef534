"""JSON from strangers: what is too deep is refused before it is read."""

from __future__ import annotations

import json
import sys

import pytest

from antiphon.transport import json_text


@pytest.mark.parametrize("text", ['{"a": [1, {"b": "[["}]}', b'\xef\xbb\xbf{"a": "\\""}', "[]", '"[\\"["', "3"])
def test_what_json_says(text: str | bytes) -> None:
    assert json_text.parse(text) == json.loads(text)


def test_many_and_deep_are_told_apart() -> None:
    flat = [{"text": '[[[[{{{{ \\" "'}] * 200
    assert json_text.parse(json.dumps(flat)) == flat
    deepest = "[" * json_text.DEEPEST + "]" * json_text.DEEPEST
    assert json_text.parse(deepest) == json.loads(deepest)


@pytest.mark.parametrize("count", [65, 1000, 1_000_000])
@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_what_is_too_deep_is_refused_where_the_stack_is_short(count: int, open_: str, close: str) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        with pytest.raises(ValueError, match="nested deeper than 64"):
            json_text.parse(open_ * count + "1" + close * count)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("text", ["", "{", "]" * 100, '"', '[["', b"\xff\xfe\xfd", "[" * 65 + '"\\'])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        json_text.parse(text)
