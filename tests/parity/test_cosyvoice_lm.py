"""Our language model against upstream's (``cosyvoice2-eu``, installed with ``--no-deps``), with upstream's weights.

Upstream's own greedy decoding is the reference for text known as a whole; for arriving text, one causal pass of its
backbone over the layout that it is trained on. Its step gives the backbone a mask of the new positions, which current
transformers take for one of all positions; all are real, so no mask is passed on. The backbone computes its
rotary angles and its norms in float32; the comparisons give it float64 ones.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import logging
import random
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antiphon.models.cosyvoice.lm import SpeechLM
from antiphon.models.cosyvoice.lm_checkpoint import from_upstream
from antiphon.models.cosyvoice.lm_config import LMConfig
from antiphon.models.cosyvoice.sampling import Sampling
from antiphon.models.cosyvoice.stream import IGNORED, TextStream, lay_out
from antiphon.models.cosyvoice.tokenizer import END_OF_TEXT, SPECIALS, TextTokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
for package in ("cosyvoice", "transformers"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: see CONTRIBUTING", allow_module_level=True)

SPEECH, TEXT = 81, 150
OURS = LMConfig(
    text=TEXT, speech=SPEECH, width=64, layers=2, heads=4, kv_heads=2, feedforward=128, capacity=256, prefill=(4, 16)
)
GREEDY = Sampling(temperature=0.0)


def import_upstream(patch: pytest.MonkeyPatch) -> None:
    """Stand in for what upstream imports beside the language model: audio input and output."""
    for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
        if importlib.util.find_spec("torchaudio") is None:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            patch.setitem(sys.modules, name, module)


class Angles(torch.nn.Module):
    """Qwen2's rotary embedding in float64."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rates = 1e6 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        angles = (position_ids[..., None] * rates).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


class Norm(torch.nn.Module):
    """Qwen2's norm in float64."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def build_upstream() -> torch.nn.Module:
    from cosyvoice.llm.llm import Qwen2Encoder, Qwen2LM
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    settings = Qwen2Config(
        vocab_size=TEXT,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    encoder = Qwen2Encoder.__new__(Qwen2Encoder)
    torch.nn.Module.__init__(encoder)
    encoder.model = Qwen2ForCausalLM(settings)
    encoder.model.model.rotary_emb = Angles()
    for name, norm in list(encoder.model.named_modules()):
        if name.endswith("norm"):
            encoder.model.set_submodule(name, Norm(norm.weight.detach()))
    forward = encoder.model.forward
    encoder.model.forward = lambda *, attention_mask, **given: forward(**given)
    encoder.hidden_size = 64
    encoder.get_input_embeddings = encoder.model.get_input_embeddings
    with redirect_stdout(io.StringIO()):
        lm = Qwen2LM(
            64, 64, SPEECH, encoder, sampling=lambda scores, *_: scores.argmax(keepdim=True), mix_ratio=[5, 15]
        )
    lm = lm.double().eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.2 if parameter.dim() < 2 else 1.5 * parameter.shape[-1] ** -0.5))
        lm.llm_decoder.bias[SPEECH:] -= 30
    return lm


@pytest.fixture(scope="module")
def upstream() -> Iterator[torch.nn.Module]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with pytest.MonkeyPatch.context() as patch:
        import_upstream(patch)
        yield build_upstream()
        for name in [name for name in sys.modules if name.split(".")[0] in ("cosyvoice", "matcha")]:
            del sys.modules[name]
    logging.disable(level)


@pytest.fixture(scope="module")
def lm(upstream: torch.nn.Module) -> SpeechLM:
    with torch.device("meta"):
        made = SpeechLM(OURS)
    weights = {name: value.clone() for name, value in upstream.state_dict().items()}
    made.load_state_dict(from_upstream(weights, OURS), assign=True)
    made.prepare()
    return made


class Case:
    """A prompt and a text."""

    def __init__(self, prompt_text: int = 6, prompt_speech: int = 17, text: int = 12) -> None:
        generator = torch.Generator().manual_seed(prompt_speech)
        self.prompt_text, self.prompt_speech, self.text = (
            torch.randint(0, most, (count,), generator=generator).tolist()
            for most, count in ((TEXT, prompt_text), (SPEECH, prompt_speech), (TEXT, text))
        )


def generate(
    lm: SpeechLM, stream: TextStream, arriving: list[int] | None = None
) -> tuple[list[int], list[tuple[Tensor, int]]]:
    """Run a stream to its end, arriving text coming one token at a time.

    Returns what was read, and of each step its logits and the place they belong to.
    """
    state = {name: spec.new(2) for name, spec in lm.state_spec().items()}
    read, logits = [], []
    hook = lm.head.register_forward_hook(lambda module, given, made: logits.append((made[0].clone(), len(read) - 1)))
    rest = iter(arriving or ())
    while stream.end is None:
        if (feed := stream.feed()) is None:
            if stream.end is None:
                token = next(rest, None)
                stream.finish() if token is None else stream.push([token])
            continue
        read += feed.inputs["tokens"][: int(feed.inputs["count"])].tolist()
        inputs = {name: torch.from_numpy(value)[None] for name, value in feed.inputs.items()}
        stream.take(int(lm.step(inputs, state, torch.tensor([0]), torch.tensor([True]))["token"]))
    hook.remove()
    return read, logits


def embed(upstream: torch.nn.Module, read: list[int]) -> Tensor:
    """Our numbering in upstream's tables."""
    speech, starts = SPEECH + 3, SPEECH + 5
    text = upstream.llm.model.get_input_embeddings().weight
    rows = [
        upstream.speech_embedding.weight[token]
        if token < speech
        else upstream.llm_embedding.weight[token - speech]
        if token < starts
        else text[token - starts]
        for token in read
    ]
    return torch.stack(rows)[None]


@torch.no_grad()
def theirs(upstream: torch.nn.Module, read: list[int]) -> Tensor:
    """Logits of one causal pass, ``[T, classes]``."""
    heard = upstream.llm.model.model(inputs_embeds=embed(upstream, read)).last_hidden_state
    logits: Tensor = upstream.llm_decoder(heard)[0]
    return logits


def row(tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], dtype=torch.int64)


def length(tokens: list[int]) -> Tensor:
    return torch.tensor([len(tokens)], dtype=torch.int32)


@pytest.mark.parametrize("prompted", [True, False])
def test_text_known_as_a_whole(upstream: torch.nn.Module, lm: SpeechLM, prompted: bool) -> None:
    case = Case() if prompted else Case(0, 0)
    expected = upstream.inference(
        text=row(case.text),
        text_len=length(case.text),
        prompt_text=row(case.prompt_text),
        prompt_text_len=length(case.prompt_text),
        prompt_speech_token=row(case.prompt_speech),
        prompt_speech_token_len=length(case.prompt_speech),
        embedding=torch.zeros(1, 192),
        max_token_text_ratio=6,
    )
    expected = list(map(int, expected))
    stream = TextStream(
        OURS,
        case.text,
        prompt_text=case.prompt_text,
        prompt_speech=case.prompt_speech,
        sampling=GREEDY,
        lengths=(2, 6),
    )
    read, logits = generate(lm, stream)
    assert stream.speech == expected
    assert len(expected) == 72
    assert len(set(expected)) > 20
    whole = theirs(upstream, read)
    for made, place in logits:
        assert (made[:SPEECH] - whole[place, :SPEECH]).abs().max() < 1e-10
    with torch.no_grad():
        assert (lm(row(read))[0] - whole).abs().max() < 1e-10


@pytest.mark.parametrize("prompt", [(6, 17), (0, 0), (6, 15), (3, 40)], ids=str)
def test_arriving_text_is_read_as_trained(upstream: torch.nn.Module, lm: SpeechLM, prompt: tuple[int, int]) -> None:
    """The whole of what was read and drawn is upstream's training layout, and each draw is its causal pass's."""
    case = Case(*prompt, text=23)
    stream = TextStream(
        OURS, prompt_text=case.prompt_text, prompt_speech=case.prompt_speech, sampling=GREEDY, lengths=(2, 4)
    )
    read, logits = generate(lm, stream, case.text)
    text, speech = case.prompt_text + case.text, case.prompt_speech + stream.speech
    assert len(stream.speech) == 92
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "random", lambda: 0.0)
        ids = [OURS.text_id(token) for token in text]
        given = (row(text), embed(upstream, ids), length(text), row(speech), embed(upstream, speech), length(speech))
        target, laid, _ = upstream.prepare_lm_input_target(*given)
    ours_read, ours_drawn = lay_out(OURS, text, speech, OURS.mix)
    assert torch.equal(embed(upstream, ours_read), laid)
    assert ours_drawn == [IGNORED if drawn < 0 else drawn for drawn in target[0].tolist()]
    if prompt[1] % 15:  # after whole blocks upstream waits for another block's speech before it forces a fill
        assert [*read, stream.speech[-1]] == ours_read
    whole = theirs(upstream, read)
    after = [*read, stream.speech[-1]][1:]
    places = [place for place, token in enumerate(after) if token < SPEECH][len(case.prompt_speech) :]
    assert whole[places, :SPEECH].argmax(1).tolist() == stream.speech
    with torch.no_grad():
        assert (lm(row(read))[0] - whole).abs().max() < 1e-10
    drawn = torch.stack([made for made, place in logits if place in places])
    assert (drawn[:, :SPEECH] - whole[places, :SPEECH]).abs().max() < 1e-10


def test_text_tokens(tmp_path: Path) -> None:
    """Upstream adds its special tokens to transformers' Qwen2 tokenizer in this way."""
    from transformers import Qwen2Tokenizer

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    pairs = ["t h", "th e", "\u0120 the", "i n", "in g", "e r", "\u0120 a", "l l", "' ll"]
    vocabulary = [*map(chr, plain), *(chr(256 + index) for index in range(256 - len(plain)))]
    vocabulary += [*(pair.replace(" ", "") for pair in pairs), END_OF_TEXT]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    theirs = Qwen2Tokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens(
        {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "additional_special_tokens": list(SPECIALS)}
    )
    ours = TextTokenizer(tmp_path)
    for text in (
        "the thing, I'll see the  other's\n\n 1234 caf\u00e9 cafe\u0301 \u4f60\u597d\uff0c\u4e16\u754c!",
        "Speak fast<|endofprompt|>the [laughter]ring <strong>all</strong>[mn] <|im_end|>",
        "\tthe\r\nthe   ",
    ):
        assert ours.encode(text) == theirs([text])["input_ids"][0]
