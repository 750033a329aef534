"""The package's front door, and the house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import antiphon

ROOT = Path(antiphon.__file__).parent
FLOORS = {"models": 0, "codecs": 1, "pipelines": 2, "transport": 3, "apps": 4}
SOURCES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def test_every_public_name_is_there() -> None:
    names = [name for name in dir(antiphon) if not name.startswith("_")]
    assert {"transcribe", "Transcribe", "Engine", "FileSource", "load_graph", "stage"} <= set(names)
    for name in names:
        assert getattr(antiphon, name) is not None


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, antiphon; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_graph_in_yaml_knows_all_stages(tmp_path: Path) -> None:
    path = tmp_path / "captions.yaml"
    path.write_text("stages:\n  talk: {stage: file_source, path: a.wav}\n  asr: transcribe\nedges:\n  - talk >> asr\n")
    assert list(antiphon.load_graph(path).names.values()) == ["talk", "asr"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_are_relative(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert not (node.module or "").startswith("antiphon"), f"line {node.lineno}: import it relatively"
        if isinstance(node, ast.ImportFrom) and node.level:
            package = list(parts[:-1])[: len(parts) - node.level]
            target = [*package, *(node.module or "").split(".")] if node.module else package
            for name in [target[0]] if target else [alias.name for alias in node.names]:
                if name in FLOORS:
                    assert FLOORS[name] <= FLOORS[parts[0]], f"line {node.lineno}: {parts[0]} imports {name}"
