"""A recogniser's networks and vocabulary in one place, as checkpoints hold them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import Linear
from ..layers.packing import pack
from .config import ASRConfig, PromptConfig
from .ctc import CTCHead
from .encoder import ConformerEncoder
from .language_model import LanguageModel
from .tokenizer import Tokenizer
from .transducer import Transducer


class LanguagePrompt(nn.Module):
    """Tells the decoder which language to write: a one-hot beside every encoder frame through two linear layers."""

    def __init__(self, config: PromptConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.first = Linear(width + config.count, config.hidden)
        self.second = Linear(config.hidden, width)

    @property
    def default(self) -> int:
        """The index used where no language is chosen."""
        return self.config.languages[self.config.default]

    def index(self, language: str | None) -> int:
        """Of a language by name, such as ``en-US``. Raises ValueError naming the nearest for one that is unknown."""
        if language is None:
            return self.default
        if language not in self.config.languages:
            near = difflib.get_close_matches(language, self.config.languages, 3, 0.4)
            known = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(self.config.languages)}"
            raise ValueError(f"no language {language!r}{known}")
        return self.config.languages[language]

    def forward(self, frames: Tensor, languages: Tensor) -> Tensor:
        """frames ``[B, n, d]``, languages ``[B]`` int64 indices -> ``[B, n, d]``."""
        choice = torch.arange(self.config.count, device=frames.device) == languages[:, None]
        choice = choice[:, None].expand(-1, frames.shape[1], -1).to(frames.dtype)
        return self.second(F.relu(self.first(torch.cat((frames, choice), 2))))


class ConformerASR(nn.Module):
    """Encoder, decoders and vocabulary of one checkpoint."""

    def __init__(self, config: ASRConfig, vocabulary: Tokenizer) -> None:
        super().__init__()
        if len(vocabulary) != config.vocabulary:
            raise ValueError(f"the tokenizer has {len(vocabulary)} pieces, the model {config.vocabulary} labels")
        self.config = config
        self.vocabulary = vocabulary
        self.encoder = ConformerEncoder(config.encoder)
        self.transducer = None if config.transducer is None else Transducer(config.transducer)
        self.ctc = CTCHead(config.encoder.width, config.vocabulary) if config.ctc else None
        self.prompt = None if config.prompt is None else LanguagePrompt(config.prompt, config.encoder.width)
        language_model = config.language_model
        self.language_model = None if language_model is None else LanguageModel(language_model, config.vocabulary)

    @property
    def lookaheads(self) -> tuple[int, ...]:
        """In encoder frames, the default first."""
        return self.config.encoder.lookaheads

    @property
    def mel(self) -> Mapping[str, Any]:
        """The features' settings, under the names of NeMo's ``preprocessor`` section."""
        return self.config.mel

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.encoder.dtype

    def prepare(self) -> ConformerASR:
        """Make everything ready to stream: see :meth:`ConformerEncoder.prepare`."""
        self.eval()
        self.encoder.prepare()
        for decoder in (self.transducer, self.language_model):
            if decoder is not None:
                decoder.prepare()
        for part in (self.ctc, self.prompt):
            if part is not None:
                pack(part)
        return self
