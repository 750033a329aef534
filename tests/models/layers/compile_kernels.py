"""Compiles the kernels for a GPU that need not be there, and prints how many registers spill (for test_kernels.py)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from antiphon.models.layers import triton_fused as fused
from antiphon.models.layers import triton_ring as ring

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUMBERS = {
    **dict.fromkeys(("slots", "target", "seen", "count"), "*i64"),
    **dict.fromkeys(("cos", "sin", "far_cos", "far_sin", "parts", "stats"), "*fp32"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
    "slot_stride": "i64",
}
FLOATS = ("heads", "query", "far", "out", "x", "branch", "weight", "bias", "total", "normed", "cache")


def spills(kernel: Any, kind: str, warps: int, **sizes: Any) -> int:
    """Loads and stores of registers that found no room. kind: dtype of the rings."""
    signature = {name: "constexpr" if name in sizes else NUMBERS.get(name, "i32") for name in kernel.arg_names}
    signature |= {name: "*bf16" for name in FLOATS if name in signature}
    if "ring" in signature:
        signature["ring"] = f"*{kind}"
    if kernel is fused._add_norm:
        signature["scale"] = "*bf16"
    pointers = [place for place, type_ in enumerate(signature.values()) if type_.startswith("*")]
    divisible = {(place,): [["tt.divisibility", 16]] for place in pointers}
    constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
    source = ASTSource(kernel, signature, constants, divisible)
    made = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        listing = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    assert "LDG" in listing
    return len(re.findall(r"\b(?:STL|LDL)\b", listing))


MOSHI = {"KEYS": 32, "WIDTH": 128, "PIECE": ring.PIECE, "FAR": False, "JOIN": True}
QWEN = {"KEYS": 2, "WIDTH": 64, "PIECE": ring.PIECE, "FAR": True, "JOIN": True}
STORE = {"WIDTH": 128, "BLOCK": ring.HEADS, "TURN": True, "HALF": False, "FAR": True, "COUNT": True}

found = {
    **{
        f"{kind} {name}": spills(kernel, kind, warps, **sizes)
        for kind in ("bf16", "fp8e4nv")
        for name, kernel, warps, sizes in (
            ("store", ring._store, 2, {"QUERIES": 32, "KEYS": 32, **STORE}),
            ("attend one", ring._attend_one, ring.ONE["num_warps"], {**MOSHI, "BLOCK": ring.ONE["BLOCK"]}),
            (
                "attend some",
                ring._attend_some,
                ring.SOME["num_warps"],
                {**QWEN, "GROUP": 7, "QUERIES": 64, "BLOCK": ring.SOME["BLOCK"]},
            ),
        )
    },
    "join": spills(ring._join, "bf16", 2, WIDTH=128, PIECES=16),
    "add and norm": spills(fused._add_norm, "bf16", 16, BLOCK=4096, ADD=True, SCALE=True, LAYER=True),
    "gated": spills(fused._gated, "bf16", 4, BLOCK=1024),
    "frame": spills(fused._frame, "bf16", 1, QUERIES=16, KEYS=16, WIDTH=64, STEPS=8),
}
for kernel, count in found.items():
    print(f"{kernel}: {count}")
