"""Recording a session's inputs and outputs to a file, and replaying it to the same outputs.

    async with graph.session(record=Recorder("call.antiphon")) as session: ...
    outputs = await replay("call.antiphon", graph)          # in run_virtual: as fast as it computes

What is recorded: every chunk of every source (a stage without inputs, an ``Inlet`` too) with the clock time at which it
was emitted, every interruption from outside the graph, and the outputs. A replay puts recorded sources in the place of
the graph's own and lets everything else run. Outputs are identical when the stages are deterministic and take the time
they took (on the virtual clock: always).

The file: the magic line, then records. A record is a JSON line that ends in the byte lengths and CRC-32 of what
follows, then the raw bytes of its arrays. The last record says how many there were: a file without it was cut.
Nothing is pickled.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .chunk import Audio, Chunk, Event, Joined, Text, Tokens, Video, Word
from .graph import Connection, Graph, Port
from .stage import Context, Stage

if TYPE_CHECKING:
    from .session import Session

MAGIC = b"antiphon recording 1\n"
KINDS: dict[str, type[Chunk]] = {kind.__name__: kind for kind in (Audio, Text, Tokens, Video, Event, Joined)}
_DTYPES = {"float32", "int64", "uint8"}
_LONGEST_LINE = 1 << 24


class RecordingError(ValueError):
    """A recording that cannot be read, or that does not fit the graph."""


class Recorder:
    """Writes one session to ``path``. Pass it as ``graph.session(record=...)``."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._count = 0
        self._now: Callable[[], float] = lambda: 0.0
        self._began = 0.0

    def begin(self, session: Session) -> None:
        """The session starts: times count from here."""
        self._now, self._began = session.clock.now, session.clock.now()
        self._file = self.path.open("wb")
        self._file.write(MAGIC)
        self._write({"is": "session", "id": session.id, "stages": list(session.graph.names.values())}, [])

    def source(self, stage: str, port: str) -> Callable[[Chunk], None]:
        """What takes the chunks that a source emits at a port."""
        return lambda chunk: self._chunk("source", chunk, stage, port)

    def output(self, chunk: Chunk) -> None:
        """A chunk the session gave out."""
        self._chunk("output", chunk, "", "")

    def interrupt(self) -> None:
        """An interruption from outside the graph."""
        self._write({"is": "interrupt", "at": self._time()}, [])

    def end(self) -> None:
        """The session has ended: close the file."""
        if self._file is not None:
            self._write({"is": "end", "records": self._count, "at": self._time()}, [])
            self._file.close()
            self._file = None

    def _time(self) -> float:
        return round(self._now() - self._began, 9)

    def _chunk(self, role: str, chunk: Chunk, stage: str, port: str) -> None:
        arrays: list[np.ndarray[Any, Any]] = []
        body = _pack(chunk, arrays)
        self._write({"is": role, "stage": stage, "port": port, "at": self._time(), "chunk": body}, arrays)

    def _write(self, record: dict[str, Any], arrays: list[np.ndarray[Any, Any]]) -> None:
        if self._file is None:
            return
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        text = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
        crc = zlib.crc32(data, zlib.crc32(text.encode()))
        line = f'{{"bytes":{len(data)},"crc":{crc},"record":{text}}}\n'
        self._file.write(line.encode() + data)
        self._count += 1


@dataclass(frozen=True)
class Recorded:
    """One chunk and the seconds after the session's start at which it was emitted."""

    at: float
    chunk: Chunk


@dataclass(frozen=True)
class Recording:
    """A recorded session: chunks by source and port, interruptions, outputs."""

    path: Path
    sources: dict[tuple[str, str], list[Recorded]] = field(default_factory=dict)
    interrupts: list[float] = field(default_factory=list)
    outputs: list[Recorded] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Recording:
        """Raises RecordingError for a file that is not a recording, is cut short, or is damaged, saying where."""
        recording = cls(Path(path))
        with recording.path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise RecordingError(f"{path} is not an antiphon recording (it does not begin with {MAGIC[:-1]!r})")
            count = 0
            while True:
                record, arrays = _read_record(file, path)
                match record:
                    case {"is": "session", "stages": list()}:
                        pass
                    case {"is": "source", "stage": str(stage), "port": str(port), "at": int() | float() as at}:
                        chunk = _unpack(record.get("chunk"), arrays, path)
                        recording.sources.setdefault((stage, port), []).append(Recorded(at, chunk))
                    case {"is": "output", "at": int() | float() as at}:
                        recording.outputs.append(Recorded(at, _unpack(record.get("chunk"), arrays, path)))
                    case {"is": "interrupt", "at": int() | float() as at}:
                        recording.interrupts.append(at)
                    case {"is": "end", "records": int(records)}:
                        if records != count:
                            raise RecordingError(f"{path} holds {count} records where its end says {records}")
                        return recording
                    case _:
                        raise RecordingError(f"{path}: record {count} is of no known kind: {record.get('is')!r}")
                count += 1

    def graph(self, graph: Graph) -> Graph:
        """``graph`` with its sources replaced by what was recorded. Raises RecordingError where they do not fit."""
        names = graph.names
        wanted = {(names[node], port) for node in graph.nodes if not node.inputs for port in node.outputs}
        stray = set(self.sources) - wanted
        if stray:
            stage, port = min(stray)
            known = ", ".join(sorted(f"{name}.{port}" for name, port in wanted)) or "none"
            raise RecordingError(f"{self.path}: no source {stage}.{port} in this graph (its sources: {known})")
        swap: dict[Stage, Stage] = {
            node: Played(names[node], node, {port: self.sources.get((names[node], port), []) for port in node.outputs})
            for node in graph.nodes
            if not node.inputs
        }
        kept = {node: node if node.name == names[node] else node.named(names[node]) for node in graph.nodes}
        kept |= swap
        return Graph(
            tuple(kept[node] for node in graph.nodes),
            tuple(
                Connection(Port(kept[c.source.stage], c.source.name), Port(kept[c.target.stage], c.target.name), c.link)
                for c in graph.connections
            ),
        )


class Played(Stage):
    """A recorded source: the same chunks at the same times."""

    def __init__(self, name: str, original: Stage, chunks: dict[str, list[Recorded]]) -> None:
        self.name, self.outputs, self.lasting = name, original.outputs, original.lasting
        self.optional = original.optional
        self._chunks = sorted(
            (
                (recorded.at, order, port, recorded.chunk)
                for port in chunks
                for order, recorded in enumerate(chunks[port])
            ),
            key=lambda entry: entry[:2],
        )

    async def run(self, ctx: Context) -> AsyncIterator[Any]:
        """See the class."""
        began = ctx.session.began
        for at, _, port, chunk in self._chunks:
            await ctx.clock.sleep_until(began + at)
            yield chunk if len(self.outputs) == 1 else (port, chunk)


async def replay(path: str | PathLike[str], graph: Graph, **options: Any) -> list[Recorded]:
    """Run the recorded session again and return its outputs with their times; the options are ``Session``'s.

    Compare with ``Recording.read(path).outputs``. Raises RecordingError, StageError.
    """
    recording = Recording.read(path)
    outputs: list[Recorded] = []
    async with recording.graph(graph).session(**options) as session:

        async def interrupt() -> None:
            for at in recording.interrupts:
                await session.clock.sleep_until(session.began + at)
                session.interrupt()

        session.spawn(Context(session, Stage(), "recorded interruptions"), interrupt())
        async for chunk in session.outputs():
            outputs.append(Recorded(round(session.clock.now() - session.began, 9), chunk))
    return outputs


def _pack(value: Any, arrays: list[np.ndarray[Any, Any]]) -> Any:
    """JSON for a chunk, word or plain value; arrays go to the side."""
    if isinstance(value, Chunk):
        body = {f.name: _pack(getattr(value, f.name), arrays) for f in fields(value) if _differs(f, value)}
        return {"kind": type(value).__name__, **body}
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _DTYPES:
            raise TypeError(f"cannot record an array of {value.dtype}: chunks hold {', '.join(sorted(_DTYPES))}")
        arrays.append(value)
        return {"array": list(value.shape), "dtype": value.dtype.name}
    if isinstance(value, tuple):
        return [_pack(one, arrays) for one in value]
    if hasattr(value, "text") and hasattr(value, "start") and hasattr(value, "end"):
        return {"word": value.text, "start": value.start, "end": value.end}
    return {"json": dict(value)} if isinstance(value, Mapping) else value


def _differs(f: Any, value: Chunk) -> bool:
    given = getattr(value, f.name)
    return f.default is MISSING or isinstance(given, np.ndarray) or given != f.default


def _read_record(file: BinaryIO, path: str | PathLike[str]) -> tuple[dict[str, Any], bytes]:
    at = file.tell()
    line = file.readline(_LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise RecordingError(f"{path} is cut short at byte {at + len(line)}: the session did not end in it")
    try:
        frame = json.loads(line)
        size, crc, record = frame["bytes"], frame["crc"], frame["record"]
        text = line[line.index(b'"record":') + 9 : -2]
        if not isinstance(record, dict) or not isinstance(size, int) or size < 0:
            raise TypeError(record)
    except (ValueError, KeyError, TypeError):
        raise RecordingError(f"{path} is damaged at byte {at}: not a record") from None
    data = file.read(size)
    if len(data) < size:
        raise RecordingError(f"{path} is cut short at byte {at + len(line) + len(data)}: {size - len(data)} bytes lack")
    if zlib.crc32(data, zlib.crc32(text)) != crc:
        raise RecordingError(f"{path} is damaged in the record at byte {at}: its checksum does not match")
    return record, data


def _unpack(body: Any, data: bytes, path: str | PathLike[str]) -> Chunk:
    """The chunk of a record. Its checksum has matched: what does not fit was not written by a Recorder."""
    offset = 0

    def value(packed: Any) -> Any:
        nonlocal offset
        match packed:
            case {"kind": str(kind)}:
                return KINDS[kind](**{name: value(one) for name, one in packed.items() if name != "kind"})
            case {"array": list(shape), "dtype": str(dtype)} if dtype in _DTYPES:
                count = int(np.prod(shape, dtype=np.int64))
                array = np.frombuffer(data, dtype, count, offset).reshape(shape)
                offset += array.nbytes
                return array
            case {"word": str(text), "start": start, "end": end}:
                return Word(text, start, end)
            case {"json": dict(plain)}:
                return plain
            case list():
                return tuple(value(one) for one in packed)
        return packed

    try:
        chunk = value(body)
        if not isinstance(chunk, Chunk):
            raise TypeError(body)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordingError(f"{path}: a record holds no chunk that this version knows: {error}") from None
    return chunk
