"""Reads CosyVoice 2's ``hift.pt``: its weight norm folded, strict on every key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..models.files import check_keys, read_pt, reading
from .hift import HiFT, HiFTConfig

_PREFIX = "generator."
_NORM, _DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
_PLAIN = ("m_source.", "source_downs.", "f0_predictor.classifier.")  # layers without weight norm


def key_names(vocoder: HiFT) -> dict[str, tuple[str, ...]]:
    """Our weights and the keys of ``hift.pt``, without a leading ``generator.``, that each is made of."""
    names: dict[str, tuple[str, ...]] = {}
    for key in vocoder.state_dict():
        layer, _, parameter = key.rpartition(".")
        if parameter == "weight" and not key.startswith(_PLAIN):
            names[key] = (f"{layer}.{_NORM}", f"{layer}.{_DIRECTION}")
        else:
            names[key] = (key,)
    return names


def from_upstream(weights: Mapping[str, Tensor], vocoder: HiFT) -> dict[str, Tensor]:
    """Upstream's weights under our names.

    Raises ValueError naming keys that are missing, left over or of another shape than the vocoder's configuration says.
    """
    weights = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    names = key_names(vocoder)
    wanted = {name for theirs in names.values() for name in theirs}
    check_keys(weights.keys(), wanted, "the configured vocoder")
    ours: dict[str, Tensor] = {}
    for key, mine in vocoder.state_dict().items():
        *norm, value = (weights[name] for name in names[key])
        shapes = [[*value.shape], *([*size.shape] for size in norm)]
        if shapes != [[*mine.shape], *([len(value), 1, 1] for _ in norm)]:
            raise ValueError(f"{', '.join(names[key])}: shaped {shapes}, expected of {key} is {[*mine.shape]}")
        ours[key] = value * (norm[0] / value.norm(dim=(1, 2), keepdim=True)) if norm else value
    return ours


def load(path: Path, config: HiFTConfig | None = None) -> HiFT:
    """The vocoder of a ``hift.pt``, ready to stream; config: its sizes, by default those of CosyVoice2-0.5B.

    The file is read with ``weights_only``: nothing in it is run. Raises CheckpointError for a file that is missing,
    damaged, or of another model.
    """
    weights = read_pt(path)
    with reading(path):
        vocoder = HiFT(config)
        vocoder.load_state_dict(from_upstream(weights, vocoder))
    vocoder.prepare()
    return vocoder
