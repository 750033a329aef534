"""Reading a checkpoint's files: whatever is wrong with one is a :class:`CheckpointError` that names it."""

from __future__ import annotations

import json
import pickle
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be found or used; the message says which file, why, and what to do."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every way in which a file can be bad into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than weights, or is damaged; nothing in it was run") from error
    except (safetensors.SafetensorError, tarfile.TarError, zlib.error, EOFError) as error:
        raise CheckpointError(f"{path}: damaged or incomplete ({error}); fetch it again") from error
    except (json.JSONDecodeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not valid ({' '.join(str(error).split())})") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks {error}") from error
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}, not an object")
        return content


def read_safetensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """``model.safetensors`` of a folder, or the shards that ``model.safetensors.index.json`` lists.

    prefix: read only the tensors whose names begin with it, and name them without it.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with reading(single):
            return _part(single, prefix)
    if not index.is_file():
        raise CheckpointError(f"{folder}: holds no model.safetensors; other weight files are not read")
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: names a shard outside its folder")
    tensors: dict[str, Tensor] = {}
    for name in names:
        with reading(folder / name):
            tensors |= _part(folder / name, prefix)
    return tensors


def _part(path: Path, prefix: str) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no mapping
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_pt(path: Path) -> dict[str, Tensor]:
    """The weights of a file of ``torch.save``, by name. Nothing in it is run. Raises CheckpointError."""
    with reading(path):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise CheckpointError(f"{path}: holds no mapping of names to tensors")
    return dict(weights)


def check_keys(found: Collection[str], wanted: Collection[str], what: str) -> None:
    """Raise ValueError, naming keys, unless a checkpoint has exactly those that ``what`` is made of."""
    for problem, keys in (("lacks", set(wanted) - set(found)), ("has no place for", set(found) - set(wanted))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{what} {problem} {', '.join(sorted(keys)[:3])}{more}")
