"""``antiphon models``: the recognisers that come with the package, are on this computer, or are known by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.padding import Padding

from ...models.conformer import hub
from ...models.conformer.checkpoint import CheckpointError, config_from
from ...models.files import read_json

FRAME_MS = 80


@dataclass(frozen=True)
class Row:
    """One line of the list, as text."""

    name: str
    where: str
    size: str
    lookaheads: str
    languages: str
    licence: str


def run() -> None:
    """Two lines a model on a terminal, tab-separated fields elsewhere."""
    for row in (*_embedded(), *_known()):
        if not sys.stdout.isatty():
            print("\t".join(astuple(row)))
            continue
        console = Console(highlight=False)
        details = (
            row.where,
            row.size,
            row.languages,
            f"lookahead {row.lookaheads} ms" if row.lookaheads else "",
            row.licence,
        )
        console.print(row.name, style="bold")
        console.print(Padding("; ".join(detail for detail in details if detail), (0, 0, 0, 4)))


def _embedded() -> Iterator[Row]:
    for name in hub.embedded():
        folder = hub.EMBEDDED / name
        card = _front_matter(folder / "README.md")
        try:
            config = config_from(read_json(folder / "config.json"))
        except (CheckpointError, TypeError, ValueError) as error:
            yield Row(name, f"embedded, unreadable: {error}", "", "", "", "")
            continue
        languages = card.get("language", [])
        yield Row(
            name,
            "embedded",
            _bytes(sum(file.stat().st_size for file in folder.iterdir())),
            _milliseconds(config.encoder.lookaheads),
            ", ".join(languages) if isinstance(languages, list) else str(languages),
            str(card.get("license", "see its README.md")),
        )


def _known() -> Iterator[Row]:
    for known in hub.KNOWN:
        folder = hub.cached(known.name)
        size = f"{known.parameters / 1e6:.0f} M parameters" if folder is None else _bytes(_weight(folder))
        where = "hub" if folder is None else "this computer"
        yield Row(known.name, where, size, _milliseconds(known.lookaheads), known.languages, known.licence)


def _milliseconds(lookaheads: tuple[int, ...]) -> str:
    """The lookaheads of a model in milliseconds, the default first."""
    return ", ".join(str(FRAME_MS * frames) for frames in lookaheads)


def _weight(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _bytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _front_matter(card: Path) -> dict[str, object]:
    """The YAML at the head of a model card; empty where there is none."""
    if not card.is_file():
        return {}
    start, _, rest = card.read_text(encoding="utf-8").partition("---\n")
    head, mark, _ = rest.partition("\n---")
    content = yaml.safe_load(head) if mark and not start.strip() else None
    return content if isinstance(content, dict) else {}
