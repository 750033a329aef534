"""Speech for training: manifests, packed shards, and batches made on the device.

A *data folder* holds ``manifest.jsonl`` (one JSON object a line: id, text, speaker, licence, source, audio, dur) and
audio files. ``pack`` turns it into a *shard*: ``audio.pcm`` (16 kHz mono int16, clips back to back, each padded with
zeros to a whole number of 80 ms frames) and a ``manifest.jsonl`` whose lines also hold ``offset`` and ``samples``.
A shard is memory-mapped; for training it is copied to the device once, so that a batch is one gather and needs no
worker processes.

    with ShardWriter("out/kathleen") as shard:
        shard.add(samples, {"id": "a1", "text": "hello", "speaker": "kathleen", "licence": "CC0-1.0", "source": "..."})
    clips = Shard("out/kathleen")
    clips.audio(0), clips.clips[0].text
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
FRAME = 1280  # samples in one 80 ms encoder frame: every clip starts on this grid
MANIFEST = "manifest.jsonl"
PCM = "audio.pcm"


@dataclass(frozen=True)
class Clip:
    """One utterance: its words and where its samples lie in the shard (or pool)."""

    id: str
    text: str
    speaker: str
    licence: str
    source: str
    offset: int
    samples: int
    split: str = "train"
    corpus: str = ""
    doubt: float = 0.0  # 0 to 1: how far two recognisers disagree on the words, where nobody wrote them down

    @property
    def seconds(self) -> float:
        return self.samples / RATE

    @property
    def synthetic(self) -> bool:
        return self.corpus.startswith("synthetic")


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The manifest's records, as they stand."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: point at a data folder or a shard")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


class ShardWriter:
    """Append clips to a shard folder; the manifest is written on close, so a shard without one is unfinished."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pcm = (self.folder / PCM).open("wb")
        self._clips: list[Clip] = []
        self._offset = 0

    def add(self, samples: NDArray[Any], record: Mapping[str, Any]) -> None:
        """samples: mono 16 kHz, int16 or floating point in [-1, 1]. record: id, text, speaker, licence, source."""
        pcm = to_int16(samples)
        padded = -(-len(pcm) // FRAME) * FRAME
        self._pcm.write(np.pad(pcm, (0, padded - len(pcm))).tobytes())
        self._clips.append(
            Clip(
                id=str(record["id"]),
                text=str(record["text"]),
                speaker=str(record["speaker"]),
                licence=str(record.get("licence") or record.get("license") or "unknown"),
                source=str(record.get("source", "")),
                split=str(record.get("split", "train")),
                corpus=str(record.get("corpus") or self.folder.name),
                doubt=float(record.get("doubt") or record.get("tiny_disagreement") or 0.0),
                offset=self._offset,
                samples=len(pcm),
            )
        )
        self._offset += padded

    def close(self) -> None:
        self._pcm.close()
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as out:
            for clip in self._clips:
                out.write(json.dumps(asdict(clip)) + "\n")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._pcm.close()


class Shard:
    """A finished shard: ``clips`` and their samples, memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.clips = [Clip(**record) for record in read_manifest(self.folder)]
        self.pcm: NDArray[np.int16] = np.memmap(self.folder / PCM, dtype=np.int16, mode="r")
        end = max((clip.offset + clip.samples for clip in self.clips), default=0)
        if end > len(self.pcm):
            raise ValueError(
                f"{self.folder / PCM} holds {len(self.pcm)} samples but its manifest needs {end}: pack it again"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def audio(self, index: int) -> NDArray[np.int16]:
        clip = self.clips[index]
        return self.pcm[clip.offset : clip.offset + clip.samples]


def pack(folder: Path, out: Path) -> Shard:
    """A data folder as the shard ``out``, decoding its files unless that was done before."""
    if not (out / MANIFEST).is_file():
        from ...codecs.audio_file import read

        with ShardWriter(out) as shard:
            for record in read_manifest(folder):
                shard.add(read(folder / record["audio"], RATE), {"corpus": folder.name, **record})
    return Shard(out)


def open_data(folders: Iterable[Path], work: Path) -> list[Shard]:
    """Shards of data folders (packed below ``work`` once), of shard folders, and of folders full of shards."""
    shards = []
    for folder in folders:
        if (folder / PCM).is_file():
            shards.append(Shard(folder))
        elif any(folder.glob(f"*/{PCM}")):
            shards += [Shard(path.parent) for path in sorted(folder.glob(f"*/{PCM}"))]
        else:
            shards.append(pack(folder, work / "shards" / folder.name))
    return shards


def to_int16(samples: NDArray[Any]) -> NDArray[np.int16]:
    if samples.ndim != 1:
        raise ValueError(f"expected mono samples [N], got shape {samples.shape}")
    if samples.dtype == np.int16:
        return samples
    if not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"expected int16 or floating point samples, got {samples.dtype}")
    scaled: NDArray[np.int16] = np.clip(np.rint(samples * 32767.0), -32768, 32767).astype(np.int16)
    return scaled
