"""Checkpoints that come with the package, and those of the Hugging Face hub: the copy on this computer, or the files
that a reader asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from .files import CheckpointError, read_json

# How a network fails: the base error of the HTTP library that this version of huggingface_hub uses is no OSError.
NETWORK_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    *(
        base
        for base in HfHubHTTPError.__mro__
        if issubclass(base, Exception) and base.__name__ in ("HTTPError", "RequestException")
    ),
)
PATIENCE = 10.0  # seconds to wait for the hub's first answer
EMBEDDED = Path(__file__).parent / "weights"


def embedded(folder: Path, key: str, value: str) -> list[str]:
    """Names of the checkpoints in ``folder`` (``EMBEDDED``) of one kind: whose ``config.json`` has this value there."""
    return sorted(path.parent.name for path in folder.glob("*/config.json") if read_json(path).get(key) == value)


def cached(name: str) -> Path | None:
    """The folder of what is already on this computer of a hub checkpoint, which may be a part of its files."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def fetch(
    name: str,
    choose: Callable[[Sequence[str]], Sequence[str]],
    *,
    unknown: str = "",
    unreachable: str = "",
) -> Path:
    """The folder of a hub checkpoint, fetched as far as needed.

    choose: from the names of its files to the patterns of those to fetch; raises CheckpointError where none will do.
    unknown, unreachable: what to add to the message about a name that the hub does not have, or cannot be asked for.
    Raises CheckpointError with the remedy.
    """
    remedy = f"run 'hf download {name}' where there is a network, or give the path of a copy"
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=PATIENCE).siblings or ()]
        return Path(snapshot_download(name, allow_patterns=list(choose(files))))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} asks for its licence to be accepted: see hf.co/{name}, then 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"no checkpoint {name!r} on the hub{unknown}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is no hub name{unknown}") from error
    except NETWORK_ERRORS as error:
        raise CheckpointError(
            f"{name} is not on this computer and the hub cannot be reached: {remedy}{unreachable}"
        ) from error
