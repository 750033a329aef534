"""``antiphon models``: what comes with the package, is on this computer, or is known by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.padding import Padding

from ...codecs import mimi_checkpoint
from ...models import hub
from ...models.conformer import hub as recognisers
from ...models.conformer.checkpoint import CheckpointError, config_from
from ...models.cosyvoice import checkpoint as cosyvoice
from ...models.files import read_json
from ...models.moshi import checkpoint as moshi
from ...pipelines import speech_checkpoint

FRAME_MS = 80
HEARS, TALKS, SPEAKS, CODES = "recognition", "full-duplex dialogue", "speech synthesis", "codec"
KYUTAI, NVIDIA = "CC-BY-4.0", "NVIDIA Open Model License"


@dataclass(frozen=True)
class Row:
    """One line of the list, as text."""

    name: str
    what: str
    where: str
    size: str
    lookaheads: str
    languages: str
    licence: str


@dataclass(frozen=True)
class Published:
    """A checkpoint of the hub that is no FastConformer. name: as one gives it to a command."""

    name: str
    what: str
    parameters: int
    languages: str
    licence: str

    @property
    def source(self) -> str:
        """Its name on the hub."""
        return moshi.SHORT.get(self.name, self.name)


PUBLISHED = (
    Published("moshiko", TALKS, 7_690_000_000, "English", KYUTAI),
    Published("moshika", TALKS, 7_690_000_000, "English", KYUTAI),
    Published("moshiko-q8", TALKS, 7_690_000_000, "English", KYUTAI),
    Published("moshika-q8", TALKS, 7_690_000_000, "English", KYUTAI),
    Published("personaplex", TALKS, 7_690_000_000, "English", NVIDIA),
    Published("stt-1b-en_fr-candle", HEARS, 1_000_000_000, "English, French", KYUTAI),
    Published("stt-2.6b-en", HEARS, 2_600_000_000, "English", KYUTAI),
    Published(cosyvoice.DEFAULT, SPEAKS, 639_000_000, "Chinese, English, Japanese, Korean", "Apache-2.0"),
    Published(mimi_checkpoint.DEFAULT, CODES, 96_000_000, "", KYUTAI),
)


def run() -> None:
    """Two lines a model on a terminal, tab-separated fields elsewhere."""
    for row in (*_embedded(), *_known(), *_published()):
        if not sys.stdout.isatty():
            print("\t".join(astuple(row)))
            continue
        console = Console(highlight=False)
        details = (
            row.what,
            row.where,
            row.size,
            row.languages,
            f"lookahead {row.lookaheads} ms" if row.lookaheads else "",
            row.licence,
        )
        console.print(row.name, style="bold")
        console.print(Padding("; ".join(detail for detail in details if detail), (0, 0, 0, 4)))


def _embedded() -> Iterator[Row]:
    kinds = (
        (HEARS, recognisers.EMBEDDED, recognisers.embedded()),
        (TALKS, moshi.EMBEDDED, moshi.embedded()),
        (SPEAKS, hub.EMBEDDED, speech_checkpoint.embedded()),
    )
    for what, weights, names in kinds:
        for name in names:
            folder = weights / name
            try:
                card = _front_matter(folder / "README.md")
                heard = config_from(read_json(folder / "config.json")).encoder.lookaheads if what == HEARS else ()
            except (CheckpointError, TypeError, ValueError) as error:
                yield Row(name, what, f"embedded, unreadable: {error}", "", "", "", "")
                continue
            languages = card.get("language", [])
            yield Row(
                name,
                what,
                "embedded",
                _bytes(_weight(folder)),
                _milliseconds(heard),
                ", ".join(languages) if isinstance(languages, list) else str(languages),
                str(card.get("license", "see its README.md")),
            )


def _known() -> Iterator[Row]:
    for known in recognisers.KNOWN:
        where, size = _there(recognisers.cached(known.name), known.parameters)
        yield Row(known.name, HEARS, where, size, _milliseconds(known.lookaheads), known.languages, known.licence)


def _published() -> Iterator[Row]:
    for known in PUBLISHED:
        where, size = _there(hub.cached(known.source), known.parameters)
        yield Row(known.name, known.what, where, size, "", known.languages, known.licence)


def _there(folder: Path | None, parameters: int) -> tuple[str, str]:
    """Where a checkpoint of the hub is, and how large."""
    if folder is not None:
        return "this computer", _bytes(_weight(folder))
    size = f"{parameters / 1e6:.0f} M" if parameters < 1e9 else f"{parameters / 1e9:.1f} B"
    return "hub", f"{size} parameters"


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
