"""Every weight has a name in NeMo and in transformers, and the way there and back is the identity."""

from __future__ import annotations

import pytest
import torch

from antiphon.models.conformer.config import ASRConfig, PromptConfig, TransducerConfig
from antiphon.models.conformer.model import ConformerASR
from antiphon.models.conformer.names import HF, Layout, from_layout, nemo_layout, to_layout

LAYOUTS = {
    "nemo": nemo_layout(["joint.joint_net.2.weight"]),
    "nemo, joint without dropout": nemo_layout(["joint.joint_net.1.weight"]),
    "hf": HF,
}


@pytest.fixture
def weights(kit, tokenizer):
    """Of a model with everything a layout knows of."""

    def make(layout: Layout, **changes):
        config = ASRConfig(
            kit.config(**changes),
            len(tokenizer),
            TransducerConfig(len(tokenizer), 32, 24, 2, 16),
            ctc=layout is not HF,
            prompt=PromptConfig({"auto": 3, "en-US": 0}, 7, 12),
        )
        return ConformerASR(config, tokenizer).state_dict()

    return make


def shapes(weights):
    return {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"conv_norm": "batch_norm"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_there_and_back(weights, layout, changes):
    ours = weights(layout, **changes)
    theirs = to_layout(ours, layout)
    back = from_layout(theirs, shapes(ours), layout)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    assert not set(theirs) & set(ours) or layout is HF


def test_from_nemo_to_transformers_through_ours(weights):
    ours = weights(HF)
    nemo = nemo_layout([])
    through = from_layout(to_layout(from_layout(to_layout(ours, nemo), shapes(ours), nemo), HF), shapes(ours), HF)
    assert all(torch.equal(through[key], ours[key]) for key in ours)
    assert "encoder.layers.0.self_attn.q_proj.weight" in to_layout(ours, HF)
    assert to_layout(ours, nemo)["encoder.layers.0.conv.pointwise_conv1.weight"].shape == (64, 32, 1)
    assert to_layout(ours, nemo)["encoder.pre_encode.conv.3.weight"].shape == (8, 8, 1, 1)


def test_ctc_alone_is_the_decoder_in_nemo():
    layout = nemo_layout(["decoder.decoder_layers.0.weight"])
    assert layout.names("ctc.linear.bias") == (("decoder.decoder_layers.0.bias",), ())


def test_what_does_not_fit_is_named(weights):
    layout = LAYOUTS["nemo"]
    ours = weights(layout)
    theirs = to_layout(ours, layout)
    assert from_layout(theirs | {"preprocessor.featurizer.fb": torch.zeros(1)}, shapes(ours), layout)
    with pytest.raises(ValueError, match=r"no place for encoder\.surprise"):
        from_layout(theirs | {"encoder.surprise": torch.zeros(1)}, shapes(ours), layout)
    with pytest.raises(ValueError, match=r"joint\.enc\.bias is \[3\].* \[16\]"):
        from_layout(theirs | {"joint.enc.bias": torch.zeros(3)}, shapes(ours), layout)
    del theirs["encoder.layers.1.self_attn.linear_k.weight"]
    with pytest.raises(ValueError, match=r"lacks encoder\.layers\.1\.self_attn\.linear_k\.weight"):
        from_layout(theirs, shapes(ours), layout)
