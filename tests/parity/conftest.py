"""PersonaPlex's package is called ``moshi``, as Kyutai's is: what is compared with it runs only in its place."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def _is_personaplex() -> bool:
    found = importlib.util.find_spec("moshi")
    folders = (found and found.submodule_search_locations) or ()
    files = [Path(folder) / "models" / "lm.py" for folder in folders]
    return any(file.is_file() and "step_system_prompts" in file.read_text(encoding="utf-8") for file in files)


collect_ignore = [] if _is_personaplex() else ["test_personaplex.py"]
