"""What the user says, in OpenAI's Realtime protocol: turns of the input buffer, and their transcripts.

Each turn becomes an item of the conversation when it ends. Captions of the recogniser know nothing of turns: their
words go to the turn that they were said in.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ...pipelines.chunk import Event, Text, Word
from ...pipelines.turn_taking import TurnSettings
from ..call import Call
from .realtime_conversation import Conversation
from .realtime_events import BadEvent, ServerVad, new_id

LEAST_COMMIT_MS = 100  # of sound in a buffer that is committed
TRANSCRIPT_SECONDS = 5.0  # of sound after a turn's end within which its last words come, unless a commit ended it
LAST_WORDS_SECONDS = 1.0  # of a turn's end that its last final caption may not reach: words that were not understood
SETTLED_SECONDS = 0.5  # of a turn's end that a final caption may leave to silence


@dataclass(slots=True)
class _Turn:
    """What the user said in one turn, or is saying. start, end: seconds of media (end: None while it is open).

    announced: the client has heard of its id, so that transcript may go out. final_to: end of its last final caption.
    cleared: the client had it forgotten; it stays until its last words have come, which are nobody else's.
    """

    id: str
    start: float
    end: float | None = None
    announced: bool = False
    cleared: bool = False
    final_to: float = 0.0
    done: str = ""  # words of captions that are final
    sent: str = ""  # transcript that has gone out as deltas


class InputBuffer:
    """The turns of one call."""

    def __init__(self, call: Call, conversation: Conversation) -> None:
        self.call, self.conversation = call, conversation
        self._turn: _Turn | None = None  # open
        self._turns: deque[_Turn] = deque()  # committed, their transcripts not complete
        self._committed = 0.0  # media time of the last turn's end
        self._transcribed = 0.0  # media time that completed transcripts reach to
        self._caption_open = False  # the recogniser's last caption may still grow
        self._emptied = 0.0  # media time that the buffer begins at

    # ---------------------------------------------------------------- the client's doing

    async def commit(self) -> None:
        """End the turn. Raises BadEvent for a buffer that is as good as empty."""
        milliseconds = round((self.call.heard_seconds - self._emptied) * 1000)
        if milliseconds < LEAST_COMMIT_MS:
            raise BadEvent(
                f"the input buffer holds {milliseconds} ms of sound: at least {LEAST_COMMIT_MS} ms make a turn",
                "input_audio_buffer_commit_empty",
            )
        await self.call.tell("commit")
        self._emptied = self.call.heard_seconds

    async def clear(self) -> None:
        """Forget the open turn."""
        await self.call.tell("clear")
        turn, self._turn = self._turn or _Turn(new_id("item"), self._committed), None
        turn.end, turn.announced, turn.cleared = self.call.heard_seconds, False, True
        self._emptied = self._committed = turn.end
        if self._transcribed < turn.end:
            self._turns.append(turn)
        self.conversation.say("input_audio_buffer.cleared")

    def expire(self) -> None:
        """Complete the transcripts that no word came for in all this sound."""
        while self._turns and self.call.heard_seconds > (self._turns[0].end or 0.0) + TRANSCRIPT_SECONDS:
            self._complete(self._turns.popleft())

    def finish(self) -> None:
        """No more will be heard: what was understood is all."""
        while self._turns:
            self._complete(self._turns.popleft())

    # ---------------------------------------------------------------- turns

    def speech_start(self, event: Event) -> None:
        """The user has begun to speak; a pause within a turn is not told."""
        if self._turn is None or not self._turn.announced:
            self._turn = self._turn or _Turn(new_id("item"), 0.0)
            start = max(self._committed, self._padded(event.start_seconds))
            self._turn.start, self._turn.announced = start, True
            self.conversation.say(
                "input_audio_buffer.speech_started", audio_start_ms=round(start * 1000), item_id=self._turn.id
            )

    def turn_end(self, event: Event) -> None:
        """The turn becomes an item of the conversation."""
        say, ended = self.conversation.say, event.start_seconds
        turn, self._turn = self._turn or _Turn(new_id("item"), self._committed), None
        if event.data.get("reason") == "idle":
            began = max(0.0, ended - float(event.data.get("waited_ms", 0)) / 1000)
            span = {"audio_start_ms": round(began * 1000), "audio_end_ms": round(ended * 1000)}
            say("input_audio_buffer.timeout_triggered", item_id=turn.id, **span)
        elif turn.announced and self.conversation.session.audio.input.turn_detection is not None:
            say("input_audio_buffer.speech_stopped", audio_end_ms=round(ended * 1000), item_id=turn.id)
        turn.end, turn.announced, self._committed = ended, True, ended
        self._emptied = max(self._emptied, ended)
        say("input_audio_buffer.committed", item_id=turn.id, previous_item_id=self.conversation.last)
        content = [{"type": "input_audio", "transcript": None}]
        item = {
            "id": turn.id, "object": "realtime.item", "type": "message", "role": "user", "status": "completed",
            "content": content,
        }  # fmt: skip
        self.conversation.add(item)
        self.conversation.done(item)
        self._grow(turn, turn.done)
        settled = turn.done and not self._caption_open and ended - turn.final_to <= SETTLED_SECONDS
        if settled or self._transcribed >= ended:
            self._complete(turn)
        else:
            self._turns.append(turn)

    def _padded(self, start: float) -> float:
        detection = self.conversation.session.audio.input.turn_detection
        prefix = detection.prefix_padding_ms if isinstance(detection, ServerVad) else TurnSettings().prefix_ms
        return max(0.0, start - prefix / 1000)

    # ---------------------------------------------------------------- transcripts

    def caption(self, caption: Text) -> None:
        """A caption's words go to the turns they were said in; a word that may still grow is kept back."""
        if self._turn is None and all(turn.cleared for turn in self._turns):
            self._turn = _Turn(new_id("item"), self._committed)
        words = caption.words or (Word(caption.text, caption.start_seconds, caption.end_seconds),)
        said = words if caption.final else caption.settled_words
        self._caption_open = not caption.final
        turns = [*self._turns, *([self._turn] if self._turn is not None else [])]
        for at, turn in enumerate(turns):
            first = turn.start if at else self._transcribed
            until = turns[at + 1].start if at + 1 < len(turns) else float("inf")
            own = " ".join(word.text for word in said if first <= word.start < until)
            whole = f"{turn.done} {own}".strip()
            self._grow(turn, whole)
            passed = any(word.start >= until for word in words)
            if caption.final or passed:
                turn.done, turn.final_to = whole, min(caption.end_seconds, until)
            near = turn.end is not None and caption.end_seconds >= turn.end - (LAST_WORDS_SECONDS if whole else 0.0)
            if turn.end is not None and (passed or (caption.final and near)):
                self._turns.remove(turn)
                self._complete(turn)
        if caption.final:
            self._transcribed = max(self._transcribed, caption.end_seconds)

    def _grow(self, turn: _Turn, whole: str) -> None:
        """Send what the transcript has gained."""
        if turn.announced and whole.startswith(turn.sent) and len(whole) > len(turn.sent):
            self.conversation.say(
                "conversation.item.input_audio_transcription.delta",
                item_id=turn.id, content_index=0, delta=whole[len(turn.sent) :],
            )  # fmt: skip
            turn.sent = whole

    def _complete(self, turn: _Turn) -> None:
        self._transcribed = max(self._transcribed, turn.final_to)
        if turn.cleared:
            return
        transcript = turn.done or turn.sent
        self.conversation.transcribed(turn.id, transcript)
        self.conversation.say(
            "conversation.item.input_audio_transcription.completed",
            item_id=turn.id, content_index=0, transcript=transcript,
            usage={"type": "duration", "seconds": round(max(0.0, (turn.end or turn.start) - turn.start), 3)},
        )  # fmt: skip
