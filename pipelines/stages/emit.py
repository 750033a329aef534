"""Chunks that a stage of the graph takes, sent to the session's outputs as well."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from ..chunk import UNSET, Chunk
from ..stage import Context, Input, stage


@stage(lasting=True)
async def emit(ctx: Context, chunks: Input) -> AsyncIterator[Chunk]:
    """Passes everything on: ``asr >> (turns["text"], emit().named("captions"))`` makes the captions an output too."""
    async for chunk in chunks:
        yield replace(chunk, seq=UNSET)


@stage
async def relay(ctx: Context, chunks: Input) -> AsyncIterator[Chunk]:
    """``emit`` for what an interruption takes back, such as the words of a reply."""
    async for chunk in chunks:
        yield replace(chunk, seq=UNSET)
