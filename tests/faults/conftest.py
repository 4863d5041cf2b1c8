from pathlib import Path

import pytest

import prunella


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "model"
    prunella.prune(llama, {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}}, output=out)
    return out
