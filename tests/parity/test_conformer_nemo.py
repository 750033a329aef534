"""Our recogniser against NeMo's, through a ``.nemo`` archive that NeMo itself writes.

NeMo computes position embeddings in float32, whatever the model's precision; the exact comparisons give it float64
ones.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import sentencepiece
import torch

from antiphon.models.conformer.checkpoint import load
from antiphon.models.conformer.config import ConformerConfig, encoder_frames
from antiphon.models.conformer.context import sinusoids
from antiphon.models.conformer.encoder import ConformerEncoder
from antiphon.models.conformer.names import from_layout, nemo_layout, to_layout

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("nemo.collections.asr", reason="needs the parity extra: nemo_toolkit")

PAIRS = [
    (left, right) for left, rights in ((70, (0, 1, 6, 13)), (56, (0, 1, 3, 6, 13)), (8, (0, 1, 3))) for right in rights
]
LENGTHS = (903, 850, 17, 1)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.2 + centre)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(1 + torch.rand_like(buffer))


def exact_positions(encoder: torch.nn.Module, width: int) -> None:
    """Replace NeMo's float32 position embeddings, which ours agree with to float32."""
    count = encoder.pos_enc.pe.shape[1]
    exact = sinusoids(torch.arange(count // 2, count // 2 - count, -1), width)[None]
    assert (exact - encoder.pos_enc.pe).abs()[:, count // 2 - 100 : count // 2 + 100].max() < 1e-4
    encoder.pos_enc.pe = exact


def nemo_encoder(left: int, right: int, **changes: object) -> torch.nn.Module:
    from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder as NemoEncoder

    settings = encoder_settings([[left, right]]) | changes
    encoder = NemoEncoder(**settings).eval().double()
    randomise(encoder)
    exact_positions(encoder, settings["d_model"])
    return encoder


def encoder_settings(contexts: list[list[int]]) -> dict:
    return {
        "feat_in": 80,
        "feat_out": -1,
        "n_layers": 3,
        "d_model": 32,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": 16,
        "causal_downsampling": True,
        "ff_expansion_factor": 2,
        "self_attention_model": "rel_pos",
        "n_heads": 4,
        "att_context_size": contexts,
        "att_context_style": "chunked_limited",
        "xscaling": False,
        "untie_biases": True,
        "pos_emb_max_len": 5000,
        "conv_kernel_size": 9,
        "conv_norm_type": "layer_norm",
        "conv_context_size": "causal",
        "dropout": 0.1,
        "dropout_pre_encoder": 0.1,
        "dropout_emb": 0.0,
        "dropout_att": 0.1,
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"xscaling": True, "use_bias": False}, {"conv_norm_type": "batch_norm"}],
    ids=["plain", "scaled, no bias", "batch norm"],
)
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_encoder(left, right, changes):
    theirs = nemo_encoder(left, right, **changes)
    ours = ConformerEncoder(
        ConformerConfig(
            mels=80,
            width=32,
            layers=3,
            heads=4,
            feedforward=64,
            channels=16,
            left=left,
            lookaheads=(right,),
            scale_input=changes.get("xscaling", False),
            bias=changes.get("use_bias", True),
            conv_bias=changes.get("use_bias", True),
            conv_norm=changes.get("conv_norm_type", "layer_norm"),
        )
    ).double()
    weights = {f"encoder.{key}": value for key, value in theirs.state_dict().items()}
    shapes = {f"encoder.{key}": value.shape for key, value in ours.state_dict().items()}
    renamed = from_layout(weights, shapes, nemo_layout(weights))
    ours.load_state_dict({key.removeprefix("encoder."): value for key, value in renamed.items()})
    ours.prepare()
    mel = torch.randn(len(LENGTHS), max(LENGTHS), 80, dtype=torch.float64)
    lengths = torch.tensor(LENGTHS)
    for row, length in enumerate(LENGTHS):
        mel[row, length:] = 0
    with torch.no_grad():
        expected, expected_lengths = theirs.forward_internal(mel.transpose(1, 2), lengths)
        frames, frame_lengths = ours(mel, lengths, right)
    assert frame_lengths.tolist() == expected_lengths.tolist() == [encoder_frames(length) for length in LENGTHS]
    for row, length in enumerate(frame_lengths.tolist()):
        assert (frames[row, :length] - expected[row, :, :length].T).abs().max() < 1e-12


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A tiny hybrid model, and the archive that NeMo wrote of it."""
    from nemo.collections.asr.models import EncDecHybridRNNTCTCBPEModel
    from omegaconf import OmegaConf

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nemo")
    lines = ["the sea the sea", "she saw the sea", "the tea at sea", "a cat sat on the mat"] * 9
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=32,
        model_type="bpe",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = "\n".join(pieces.id_to_piece(id).replace("▁", "##") for id in range(1, len(pieces)))
    (folder / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    settings = {
        "sample_rate": 16000,
        "compute_eval_loss": False,
        "log_prediction": False,
        "model_defaults": {"enc_hidden": 32, "pred_hidden": 24, "joint_hidden": 24},
        "tokenizer": {"dir": str(folder), "type": "bpe"},
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "normalize": "NA",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": 80,
            "n_fft": 512,
            "dither": 1e-5,
            "pad_to": 0,
        },
        "spec_augment": {
            "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
            "freq_masks": 2,
            "time_masks": 2,
            "freq_width": 27,
            "time_width": 0.05,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            **encoder_settings([[8, 3], [8, 1], [8, 0]]),
        },
        "decoder": {
            "_target_": "nemo.collections.asr.modules.RNNTDecoder",
            "normalization_mode": None,
            "random_state_sampling": False,
            "blank_as_pad": True,
            "prednet": {"pred_hidden": 24, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.2},
        },
        "joint": {
            "_target_": "nemo.collections.asr.modules.RNNTJoint",
            "log_softmax": None,
            "preserve_memory": False,
            "fuse_loss_wer": False,
            "fused_batch_size": 4,
            "jointnet": {
                "joint_hidden": 24,
                "activation": "relu",
                "dropout": 0.2,
                "encoder_hidden": 32,
                "pred_hidden": 24,
            },
        },
        "decoding": {"strategy": "greedy_batch", "greedy": {"max_symbols": 3, "use_cuda_graph_decoder": False}},
        "aux_ctc": {
            "ctc_loss_weight": 0.3,
            "use_cer": False,
            "ctc_reduction": "mean_batch",
            "decoder": {
                "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
                "feat_in": 32,
                "num_classes": -1,
                "vocabulary": [],
            },
            "decoding": {"strategy": "greedy"},
        },
        "loss": {"loss_name": "default"},
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    model = EncDecHybridRNNTCTCBPEModel(cfg=OmegaConf.create(settings)).eval()
    randomise(model)
    balance(model)
    archive = folder / "tiny.nemo"
    model.save_to(str(archive))
    return model, archive


@torch.no_grad()
def balance(model: torch.nn.Module) -> None:
    """Heads that see what changes from frame to frame and so emit now and then."""
    frames, _ = model.encoder.forward_internal(torch.randn(1, 80, 800), torch.tensor([800]))
    frames = frames[0].T
    ctc = model.ctc_decoder.decoder_layers[0]
    for weight, bias in ((model.joint.enc.weight, model.joint.enc.bias), (ctc.weight[..., 0], ctc.bias)):
        weight.div_(frames.std(0)).mul_(3)
        bias.copy_(-(weight @ frames.mean(0)))
    model.decoder.prediction["embed"].weight[-1] = 0
    model.joint.joint_net[-1].bias[-1] += 3
    ctc.bias[-1] += 2


def test_archive(hybrid):
    theirs, archive = hybrid
    ours = load(archive)
    assert ours.lookaheads == (3, 1, 0)
    assert ours.config.encoder.left == 8
    assert ours.config.transducer.max_symbols == 3
    assert len(ours.vocabulary) == theirs.tokenizer.vocab_size
    assert ours.mel["features"] == 80
    weights = ours.state_dict()
    back = to_layout(weights, nemo_layout(theirs.state_dict()))
    expected = {key: value for key, value in theirs.state_dict().items() if not key.startswith("preprocessor.")}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)
    ids = list(range(len(ours.vocabulary)))
    assert [ours.vocabulary.decode([id]) for id in ids] == [theirs.tokenizer.ids_to_text([id]) for id in ids]


@pytest.mark.parametrize("right", [0, 1, 3])
def test_tokens(hybrid, right):
    """Ours streaming, NeMo's in one pass of its label-looping and CTC decoders."""
    theirs, archive = hybrid
    theirs = theirs.double()
    exact_positions(theirs.encoder, 32)
    theirs.encoder.set_default_att_context_size([8, right])
    ours = load(archive, dtype=torch.float64)
    lengths = torch.tensor([803, 640, 333, 90])
    mel = torch.randn(4, 803, 80, dtype=torch.float64)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            mel[row, length:] = 0
        frames, counts = theirs.encoder.forward_internal(mel.transpose(1, 2), lengths)
        said = theirs.decoding.rnnt_decoder_predictions_tensor(frames, counts, return_hypotheses=True)
        expected = [list(zip(said[r].y_sequence.tolist(), map(int, said[r].timestamp), strict=True)) for r in range(4)]
        labels = theirs.ctc_decoder(encoder_output=frames).argmax(-1)
    parts = (ours.encoder, ours.transducer, ours.ctc)
    state = {name: spec.new(5) for part in parts for name, spec in part.state_spec().items()}
    slots, active = torch.tensor([3, 0, 1, 2]), torch.ones(4, dtype=torch.bool)
    found, collapsed = [[] for _ in range(4)], [[] for _ in range(4)]
    block = 8 * (right + 1)
    padded = torch.nn.functional.pad(mel, (0, 0, 7, block))
    for start in range(0, int(counts.max()), right + 1):
        chunk = padded[:, 8 * start : 8 * start + block]
        out, valid = ours.encoder.step(chunk, lengths, state, slots, active)
        for head, kept in ((ours.transducer, found), (ours.ctc, collapsed)):
            tokens, times, count = head.decode(out, valid, state, slots, active)
            for row, n in enumerate(count.tolist()):
                pairs = zip(tokens[row, :n].tolist(), times[row, :n].tolist(), strict=True)
                kept[row] += [(token, start + time) for token, time in pairs]
    assert found == expected
    assert sum(map(len, found)) > 30
    for row, count in enumerate(counts.tolist()):
        kept = [int(label) for label in labels[row, :count].unique_consecutive() if label != ours.ctc.blank]
        assert [token for token, _ in collapsed[row]] == kept
    assert sum(map(len, collapsed)) > 30


def test_joint_without_dropout():
    """NeMo numbers the joint's last layer by whether there is dropout before it."""
    from nemo.collections.asr.modules.rnnt import RNNTJoint

    for dropout, index in ((0.2, 2), (0.0, 1)):
        net = {"encoder_hidden": 8, "pred_hidden": 8, "joint_hidden": 8, "activation": "relu", "dropout": dropout}
        joint = RNNTJoint(jointnet=net, num_classes=5, vocabulary=list("abcde"))
        keys = [f"joint.{key}" for key in joint.state_dict()]
        assert f"joint.joint_net.{index}.weight" in keys
        assert nemo_layout(keys).names("transducer.head.weight")[0] == (f"joint.joint_net.{index}.weight",)
