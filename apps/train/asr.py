"""Train the embedded recogniser: a small streaming FastConformer with RNN-T and CTC heads.

    python -m antiphon.apps.train.asr --data FOLDER ... --test FOLDER ... --hold-out ls-1867 --texts FILE ... \\
        --teacher WHISPER --noise FOLDER --out DIR

Data folders (``data.py``) are packed on first use; shards, such as ``synthesise.py`` writes, are taken as they are.
Stop and start again at will: the run continues where its checkpoint stands. On several GPUs start it under
``torchrun``. The checkpoint with its card is ``OUT/model``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import sentencepiece
import torch
import typer
from rich.console import Console

from ...codecs.mel import LogMel, MelConfig
from ...models.conformer.config import ConformerConfig, TransducerConfig
from .batches import Augmentation, Batcher, Pool
from .card import AVERAGED, LOOKAHEADS, RUN, by_corpus, export, summary
from .data import Clip, Shard, open_data
from .evaluate import Head, choose_tests, total_errors, transcribe
from .teacher import WhisperEncoder, listen
from .text import spoken
from .trainer import Recipe, Student, Trainer

UNSURE = 0.15  # pseudo-labelled clips on which two recognisers differ more than this teach by features alone


def train_tokenizer(texts: Iterable[str], vocabulary: int, path: Path) -> None:
    """A SentencePiece unigram model of ``vocabulary`` pieces, written to ``path``."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=vocabulary,
            model_type="unigram",
            character_coverage=1.0,
            normalization_rule_name="identity",
            bos_id=-1,
            eos_id=-1,
            input_sentence_size=300_000,
            shuffle_input_sentence=False,
            num_threads=8,
            minloglevel=2,
        )
    partial.replace(path)


def trusted(clip: Clip) -> bool:
    """Whether a clip's words are sure enough to learn from. Pseudo labels carry their doubt."""
    return clip.doubt <= UNSURE and bool(clip.text)


def measure_student(
    student: Student, tests: dict[str, list[tuple[Shard, int]]], tokenizer: sentencepiece.SentencePieceProcessor
) -> dict[str, dict[str, dict[str, float]]]:
    """Word error rates of greedy decoding: test set -> lookahead -> head -> percent."""
    device = next(student.parameters()).device
    student.encoder.eval()
    heads: dict[str, Head] = {"rnnt": student.transducer.prepare(), "ctc": student.ctc}
    mel = LogMel(MelConfig()).to(device)
    seconds = 1500.0 if device.type == "cuda" else 120.0
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, clips in tests.items():
        audio = [shard.audio(index) for shard, index in clips]
        words = [shard.clips[index].text for shard, index in clips]
        for lookahead in sorted(LOOKAHEADS):
            texts = transcribe(audio, mel, student.encoder, heads, tokenizer.decode, lookahead, seconds)
            rates = {head: round(total_errors(zip(words, said, strict=True)).rate, 2) for head, said in texts.items()}
            results.setdefault(name, {})[str(lookahead)] = rates
    return results


def train(
    data: Annotated[list[Path], typer.Option(help="Data folder, shard or folder of shards to train on; repeat it.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint, log and results go.")],
    teacher: Annotated[Path, typer.Option(help="Folder of a CTranslate2 whisper model.bin to distil.")],
    test: Annotated[list[Path] | None, typer.Option(help="Data folder that is only tested on; repeat it.")] = None,
    hold_out: Annotated[list[str] | None, typer.Option(help="Speaker that is only tested on; repeat it.")] = None,
    texts: Annotated[
        list[Path] | None, typer.Option(help="Plain text the tokenizer also learns from; repeat it.")
    ] = None,
    noise: Annotated[Path | None, typer.Option(help="Data folder of noises to mix in.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this SentencePiece model instead of training one.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates in all; the schedule follows from it.")] = Recipe.steps,
    until: Annotated[int | None, typer.Option(help="Stop at this step; start again to go on.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long; start again to go on.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps from one checkpoint to the next.")] = 1000,
    fit: Annotated[bool, typer.Option(help="Let --steps follow from --minutes at the measured pace.")] = False,
    batch_seconds: Annotated[float, typer.Option(help="Speech in a batch, for each process.")] = Recipe.batch_seconds,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = Recipe.rate,
    synthetic: Annotated[float, typer.Option(help="Share of each batch that synthetic speech makes up.")] = 0.5,
    layers: Annotated[int, typer.Option(help="Encoder blocks.")] = 9,
    width: Annotated[int, typer.Option(help="Encoder width; heads are 64 wide.")] = 256,
    vocabulary: Annotated[
        int, typer.Option(help="Pieces of a new tokenizer; with the blank, a multiple of 8 is fastest.")
    ] = 511,
    dropout: Annotated[float, typer.Option(help="In the networks.")] = 0.1,
    test_clips: Annotated[int, typer.Option(help="Most clips of a test set.")] = 250,
    device: Annotated[str, typer.Option(help="cpu or cuda; under torchrun each process takes its own GPU.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
) -> None:
    """Train a streaming recogniser and measure it."""
    began = time.perf_counter()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = True
    console = Console(quiet=rank > 0)
    out.mkdir(parents=True, exist_ok=True)
    held_out = set(hold_out or [])

    shards = open_data(data, out)
    model_file = tokenizer or out / "tokenizer.model"
    if rank == 0 and not model_file.is_file():
        lines = [
            spoken(clip.text)
            for shard in shards
            for clip in shard.clips
            if trusted(clip) and clip.speaker not in held_out
        ]
        lines += [spoken(line) for path in texts or [] for line in path.read_text(encoding="utf-8").splitlines()]
        train_tokenizer((line for line in lines if line), vocabulary, model_file)
    if world > 1:
        torch.distributed.barrier()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))

    kept = [clip for shard in shards for clip in shard.clips if clip.speaker not in held_out]
    spoken_seconds = {kind: sum(clip.seconds for clip in kept if clip.synthetic is kind) for kind in (True, False)}
    portion = {True: synthetic / max(1, spoken_seconds[True]), False: (1 - synthetic) / max(1, spoken_seconds[False])}
    pool = Pool(
        shards,
        encode=lambda text: pieces.encode(spoken(text)),
        device=place,
        share=lambda clip: portion[clip.synthetic],
        keep=lambda clip: clip.speaker not in held_out,
        trust=trusted,
    )
    hours = {kind: seconds / 3600 for kind, seconds in spoken_seconds.items()}
    console.print(
        f"{hours[False]:.1f} h of human and {hours[True]:.1f} h of synthetic speech; {pool.skipped} clips too long"
    )
    whisper = WhisperEncoder.from_ctranslate2(teacher).to(place)
    features = listen(whisper, pool.pcm)
    noises = (
        torch.cat([torch.from_numpy(np.array(shard.pcm)) for shard in open_data([noise], out)]).to(place)
        if noise
        else None
    )

    recipe = Recipe(steps=steps, batch_seconds=batch_seconds, rate=rate)
    torch.manual_seed(seed)
    student = Student(
        ConformerConfig(
            width=width,
            layers=layers,
            heads=width // 64,
            feedforward=4 * width,
            channels=128,
            lookaheads=LOOKAHEADS,
            dropout=dropout,
            attention_dropout=dropout,
        ),
        TransducerConfig(
            vocabulary=pieces.vocab_size(), encoder_width=width, width=320, joint_width=320, dropout=dropout
        ),
        teacher_width=whisper.width,
        block=max(0, layers - 3),
    )
    count = sum(p.numel() for name, p in student.named_parameters() if not name.startswith("distil"))
    console.print(f"{count / 1e6:.1f} M parameters, {pieces.vocab_size()} pieces, {world} process(es) on {place.type}")
    batcher = Batcher(pool, LogMel(MelConfig()).to(place), Augmentation(), noises, seed)
    trainer = Trainer(student, recipe, batcher, features, out, seed, rank, world)
    if trainer.resume():
        console.print(f"continuing at step {trainer.step}")
    trainer.run(until, minutes and minutes - (time.perf_counter() - began) / 60, fit, save_every)
    if rank == 0:
        averaged = trainer.averaged()
        torch.save({name: value.half() for name, value in averaged.state_dict().items()}, out / AVERAGED)
        corpora = {name: summary(clips) for name, clips in by_corpus(kept).items()}
        run = {
            "command": sys.argv,
            "corpora": corpora,
            "held_out": sorted(held_out),
            "seed": seed,
            "steps": trainer.step,
        }
        (out / RUN).write_text(json.dumps({**run, "recipe": asdict(trainer.recipe)}, indent=1), encoding="utf-8")
        tests = choose_tests(open_data(test or [], out), set(), test_clips, seed)
        if held_out:
            held_out_clips = choose_tests(shards, held_out, test_clips, seed)
            tests |= {f"{name} (held-out speakers)": clips for name, clips in held_out_clips.items()}
        results = measure_student(averaged, tests, pieces)
        (out / "wer.json").write_text(json.dumps({"step": trainer.step, "wer": results}, indent=1), encoding="utf-8")
        console.print(json.dumps(results))
        export(out, model_file, out / "model")
    if world > 1:
        torch.distributed.destroy_process_group()


def main(arguments: Sequence[str]) -> None:
    """The command line; see ``--help``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(train)
    command(list(arguments), standalone_mode=False, prog_name="antiphon train asr")


if __name__ == "__main__":
    main(sys.argv[1:])
