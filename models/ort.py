"""Published ONNX files, run through onnxruntime: an optional dependency that only the models which need it import."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

_ERRORS_ONLY = 3
CPU = ("CPUExecutionProvider",)


def open_session(path: str | PathLike[str], providers: Sequence[str] = CPU) -> Any:
    """An ``onnxruntime.InferenceSession`` on one thread that does not spin.

    providers: onnxruntime's names; others than the CPU's come with another build of it (``onnxruntime-gpu``).
    Raises ImportError and ValueError that say what to install, FileNotFoundError.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("this model runs through onnxruntime: pip install onnxruntime") from error
    if missing := [name for name in providers if name not in onnxruntime.get_available_providers()]:
        known = ", ".join(onnxruntime.get_available_providers())
        raise ValueError(f"this onnxruntime has no {missing[0]!r} (it has {known}): install the build that does")
    with open(path, "rb"):  # onnxruntime's own error for a file that cannot be read is of a class of its own
        pass
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(path, options, providers=list(providers))
