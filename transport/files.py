"""Audio files as the ends of a graph: a source that plays one at the pace of its media or as fast as the consumer
takes it, and a sink that writes one.

    FileSource("talk.mp3", realtime=True) >> Transcribe()
    ... >> Speak() >> FileSink("reply.opus")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

from ..codecs.audio_file import AudioWriter, stream
from ..codecs.resample import Samples
from ..pipelines.chunk import Audio
from ..pipelines.stage import Context, Input, Stage, stage


@stage(lasting=True)
class FileSource(Stage):
    """A recording as ``Audio`` chunks of ``chunk_ms`` milliseconds, the last one ``final``.

    path: any file that FFmpeg reads. rate: hertz of the chunks, mono. realtime: give out each chunk when a microphone
    would have, at the moment its last sample is spoken; otherwise as fast as the consumer takes them, with whatever
    its edge holds. What is wrong with the file is an ``AudioWarning``.
    Raises AudioError (as the cause of the session's StageError). Decodes on the event loop: well under a millisecond
    for a second of audio.
    """

    name = "file_source"

    def __init__(self, path: str, *, rate: int = 16000, chunk_ms: float = 20.0, realtime: bool = False) -> None:
        self.path, self.rate, self.chunk_ms, self.realtime = path, rate, chunk_ms, realtime

    async def run(self, ctx: Context) -> AsyncIterator[Audio]:
        """See the class."""
        began, position = ctx.now, 0
        for samples, last in _mark_last(stream(self.path, self.rate, self.chunk_ms / 1000)):
            chunk = Audio(samples=samples, rate=self.rate, start=position, final=last)
            position = chunk.end
            if self.realtime:
                await ctx.sleep(began + chunk.end_seconds - ctx.now)
            yield chunk


@stage
class FileSink(Stage):
    """Writes the audio it is given to a file, in the format that the suffix of ``path`` names, at its own rate.

    Channels are averaged. What is written counts as played. Raises AudioError for a format or rate that cannot be
    written, and ValueError where the rate changes on the way.
    """

    name = "file_sink"

    def __init__(self, path: str) -> None:
        self.path = path

    async def run(self, ctx: Context, audio: Input) -> None:
        """See the class."""
        writer: AudioWriter | None = None
        async for chunk in audio:
            if not isinstance(chunk, Audio):
                raise TypeError(f"a file takes audio, got {chunk}")
            if writer is None:
                writer = ctx.own(AudioWriter(self.path, chunk.rate))
            elif writer.sample_rate != chunk.rate:
                raise ValueError(
                    f"{self.path}: audio at {writer.sample_rate} Hz went on at {chunk.rate} Hz; resample it"
                )
            writer.write(chunk.samples if chunk.samples.ndim == 1 else chunk.samples.mean(axis=0))
            ctx.played(chunk)
        if writer is not None:
            writer.close()


def _mark_last(pieces: Iterable[Samples]) -> Iterator[tuple[Samples, bool]]:
    """Each piece and whether it is the last."""
    held: Samples | None = None
    for piece in pieces:
        if held is not None:
            yield held, False
        held = piece
    if held is not None:
        yield held, True
