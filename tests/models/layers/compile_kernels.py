"""Compiles the kernels for a GPU that need not be there, and prints how many registers spill (for test_kernels.py)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from antiphon.models.cosyvoice import triton_euler as euler
from antiphon.models.layers import triton_conv as conv
from antiphon.models.layers import triton_draw as drawing
from antiphon.models.layers import triton_few as multiplying
from antiphon.models.layers import triton_fused as fused
from antiphon.models.layers import triton_linear as linear
from antiphon.models.layers import triton_nearest as searching
from antiphon.models.layers import triton_noise as noise
from antiphon.models.layers import triton_ring as ring
from antiphon.models.layers import triton_rope as turning
from antiphon.models.layers import triton_segments as segments
from antiphon.models.layers import triton_thin as thin
from antiphon.models.layers import triton_windows as windows

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUMBERS = {
    **dict.fromkeys(
        (
            "slots",
            "target",
            "seen",
            "count",
            "top_k",
            "force",
            "positions",
            "token",
            "last",
            "voice",
            "shared",
            "length",
            "codes",
        ),
        "*i64",
    ),
    **dict.fromkeys(("cos", "sin", "far_cos", "far_sin", "parts", "stats", "logits", "noise", "temperature"), "*fp32"),
    **dict.fromkeys(("sample", "mu", "scores", "book", "left"), "*fp32"),
    **dict.fromkeys(("scale", "eps", "guidance"), "fp32"),
    "slot_stride": "i64",
    "started": "*i1",
}
FLOATS = (
    "heads", "query", "far", "out", "x", "branch", "weight", "bias", "total", "normed", "cache", "norm", "onto",
    "norm_weight", "norm_bias", "kept", "added", "tails", "fresh", "speaker", "velocity", "memory", "table", "rest",
)  # fmt: skip


def spills(
    kernel: Any, kind: str, warps: int, stages: int = 3, floats: str = "bf16", even: Sequence[str] = (), **sizes: Any
) -> int:
    """Loads and stores of registers that found no room. kind: dtype of the rings; floats: of all else; even: numbers
    that 16 divides."""
    signature = {name: "constexpr" if name in sizes else NUMBERS.get(name, "i32") for name in kernel.arg_names}
    signature |= {name: f"*{floats}" for name in FLOATS if name in signature}
    signature |= {name: f"*{kind}" for name in ("ring", "prompt") if name in signature}
    if kernel in (fused._add_norm, thin._thin):
        signature["scale"] = "*bf16"
    if kernel is noise._gumbel:
        signature |= {"seed": "*i64", "step": "*i64", "count": "i32", "out": "*fp32"}
    if kernel is windows._windows:
        signature["total"] = "i32"
    if kernel is windows._overlap:
        signature["parts"] = f"*{floats}"
    if kernel is euler._move:
        signature |= {"step": "fp32", "out": "*fp32"}
    pointers = [place for place, type_ in enumerate(signature.values()) if type_.startswith("*")]
    pointers += [kernel.arg_names.index(name) for name in even]
    divisible = {(place,): [["tt.divisibility", 16]] for place in pointers}
    constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
    source = ASTSource(kernel, signature, constants, divisible)
    made = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        listing = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    assert "LDG" in listing
    return len(re.findall(r"\b(?:STL|LDL)\b", listing))


MOSHI = {"KEYS": 32, "GROUP": 1, "WIDTH": 128, "PIECE": ring.PIECE, "FAR": False, "JOIN": True}
MIMI = {"KEYS": 8, "GROUP": 1, "WIDTH": 64, "PIECE": ring.SHORT, "FAR": False, "JOIN": True}
QWEN = {"KEYS": 2, "GROUP": 7, "WIDTH": 64, "PIECE": ring.PIECE, "FAR": True, "JOIN": True}
SUM = {"floats": "fp32", "BRANCH": True, "ELU": True}
WINDOWS = {"EARLY": 2, "PAST": 1, "DILATED": True, "REPLICATE": True, **SUM}
FLOW = {"HEADS": 8, "WIDTH": 64, "BRANCHES": 2, "ROLLING": True}
STORE = {"WIDTH": 128, "BLOCK": ring.HEADS, "TURN": True, "HALF": False, "FAR": True, "COUNT": True}


def sized(kernel: Any, kind: str, setting: dict[str, int], **sizes: Any) -> int:
    return spills(kernel, kind, setting["num_warps"], setting["num_stages"], BLOCK=setting["BLOCK"], **sizes)


def normed(width: int, bytes_: int) -> dict[str, int]:
    setting = linear.sizes(width, bytes_)
    return setting | {"warps": setting.pop("num_warps")}


def few(inputs: int, lines: int, **flags: bool) -> int:
    """Of the most rows."""
    setting = thin.sizes(inputs, lines)
    flags = dict.fromkeys(("NORM", "BIAS", "GATE", "ONTO", "SCALE"), False) | flags
    warps = setting.pop("num_warps")
    sizes = {**setting, **flags, "ROWS": thin.FEW, "VECTOR": thin.VECTOR, "EARLY": True}
    return spills(thin._thin, "", warps, even=("inputs", "outputs"), **sizes)


found = {
    **{f"{kind} store": spills(ring._store, kind, 2, QUERIES=32, KEYS=32, **STORE) for kind in ("bf16", "fp8e4nv")},
    "bf16 attend one": sized(ring._attend_some, "bf16", ring.SOME_HALF, **MOSHI, QUERIES=16),
    "fp8e4nv attend one": sized(ring._attend_one, "fp8e4nv", ring.ONE, **MOSHI),
    "fp32 attend one": sized(ring._attend_one, "fp32", ring.ONE, **MIMI),
    "bf16 attend some": sized(ring._attend_some, "bf16", ring.SOME_HALF, **QWEN, QUERIES=64),
    "fp8e4nv attend some": sized(ring._attend_some, "fp8e4nv", ring.SOME, **QWEN, QUERIES=64),
    "join": spills(ring._join, "bf16", 2, WIDTH=128, PIECES=16),
    "add and norm": spills(fused._add_norm, "bf16", 16, BLOCK=4096, ADD=True, SCALE=True, LAYER=True),
    "gated": spills(fused._gated, "bf16", 4, BLOCK=1024),
    **{
        f"windows by {block}": spills(windows._windows, "", block // 256, BLOCK=block, **WINDOWS)
        for block in (windows.BLOCK, windows.FAR)
    },
    "one output": spills(windows._single, "", 4, KERNEL=3, WIDTH=64, STEPS=windows.STEPS, PAST=128, **SUM, BIAS=True),
    "overlap": spills(windows._overlap, "", 4, floats="fp32", BLOCK=windows.BLOCK, BIAS=True),
    **{
        f"few rows of {inputs}": spills(multiplying._few, "", size.pop("num_warps"), floats="fp32", **size, BIAS=True)
        for inputs, size in ((inputs, multiplying.sizes(inputs)) for inputs in (512, multiplying.LONGEST))
    },
    **{
        f"few rows of 16 bits, {inputs} by {lines}": few(inputs, lines, **flags)
        for inputs, lines, flags in (
            (4096, 22528, {"NORM": True, "GATE": True}),
            (11264, 4096, {"ONTO": True}),
            (1024, 3072, {"NORM": True, "BIAS": True}),
            (4864, 896, {"ONTO": True, "SCALE": True}),
        )
    },
    "nearest": spills(searching._nearest, "", 4, floats="fp32", BINS=2048, WIDTH=256),
    "looked up": spills(fused._looked_up, "bf16", 4, BLOCK=1024),
    "Gumbel noise": spills(noise._gumbel, "", 4, BITS=23, BLOCK=noise.BLOCK),
    "frame": spills(fused._frame, "bf16", 1, QUERIES=16, KEYS=16, WIDTH=64, STEPS=8),
    **{
        f"{floats} norm and product of {width}": spills(
            linear._norm_linear, "", **normed(width, bytes_), floats=floats, ADD=True, BIAS=True, GELU=True
        )
        for floats, bytes_ in (("bf16", 2), ("fp32", 4))
        for width in (256, 512)
    },
    **{
        f"{floats} attend {kind} segments by {queries}": sized(
            segments._attend, kind, segments.SETTINGS[bytes_], **FLOW, floats=floats, QUERIES=queries
        )
        for floats, kind, bytes_ in (("bf16", "bf16", 2), ("bf16", "fp8e4nv", 2), ("fp32", "fp32", 4))
        for queries in {16, segments.MOST[bytes_]}
    },
    "inputs of an Euler step": spills(euler._inputs, "bf16", 1, BLOCK=128, RATE=2),
    "move of an Euler step": spills(euler._move, "", 4, BLOCK=1024),
    "convolution's windows": spills(conv._windows, "", 1, BLOCK=256, KERNEL=3, NORM=True, ADD=True, TAILS=True),
    **{
        f"draw of {size['BLOCK']}": spills(drawing._draw, "", size.pop("num_warps"), **size, FORCE=True)
        for size in map(drawing.sizes, (2048, drawing.WIDEST))
    },
}
# It compiles; sines of float64 keep a few numbers in memory.
spills(turning._rotation, "", 1, WIDTH=128, BLOCK=128, THETA=1e4, HALF=True)
for kernel, count in found.items():
    print(f"{kernel}: {count}")
