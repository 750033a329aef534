"""Make the embedded voice: ``antiphon train tts STEP``, one step after the other.

    bank        sentences, each spoken by one of its voices
    join        banks that were spoken apart
    tokens      the speech tokenizer, and the bank's tokens
    encode      the bank's tokens by a tokenizer that is there
    flow        tokens to mel frames
    vocoder     mel frames to sound
    lm          text to tokens
    card        all of it as a checkpoint with its card
    evaluate    how well it speaks

What each needs is in ``README.md`` beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from . import tts_bank, tts_card, tts_eval, tts_flow, tts_join, tts_lm, tts_tokens, tts_vocoder


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
    command.command("bank")(tts_bank.make)
    command.command("join")(tts_join.join)
    command.command("tokens")(tts_tokens.train)
    command.command("encode")(tts_tokens.encode)
    command.command("flow")(tts_flow.train)
    command.command("vocoder")(tts_vocoder.train)
    command.command("lm")(tts_lm.train)
    command.command("card")(tts_card.card)
    command.command("evaluate")(tts_eval.evaluate)
    command(list(arguments), standalone_mode=False, prog_name="antiphon train tts")


if __name__ == "__main__":
    main(sys.argv[1:])
