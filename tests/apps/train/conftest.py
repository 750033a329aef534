"""Makes the toy bank importable, and arithmetic repeatable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toy_bank import toy_bank

from antiphon.apps.train.bank import Bank


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return toy_bank(tmp_path_factory.mktemp("bank"))


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)
