from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from healing import SETTINGS
from torch import Tensor

import prunella


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA of two blocks, its head tied to its embeddings, with a tokenizer. Read only."""
    path = tmp_path_factory.mktemp("heal") / "dense"
    tiny.build("llama", max_position_embeddings=128, tie_word_embeddings=True).save_pretrained(path)
    tiny.write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def pruned(dense: Path) -> Path:
    """That one with half of its weights pruned. Read only."""
    path = dense.with_name("pruned")
    prunella.prune(str(dense), {**SETTINGS, "steps": ["magnitude"], "heal": {}}, output=path)
    return path


@pytest.fixture
def ids() -> Tensor:
    return tiny.token_windows(4, 24)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
