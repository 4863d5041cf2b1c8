"""Two processes, one output directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import SHORT, Command, times
from test_kills import contents

pytestmark = pytest.mark.slow


def test_two_runs_into_one_directory(llama: Path, tmp_path: Path) -> None:
    """One writes, the other is told so; what comes out is one run's."""
    command = ("prune", llama, "-o")
    assert Command.start(tmp_path / "log", *command, tmp_path / "alone", *SHORT).finish() == 0
    for turn in range(times(5)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        both = [Command.start(folder.with_name(f"log-{turn}-{n}"), *command, folder / "out", *SHORT) for n in (0, 1)]
        codes = sorted(one.finish() for one in both)
        said = [one.said() for one in both]
        assert codes == [0, 2], said
        refused = next(text for one, text in zip(both, said, strict=True) if one.process.exitcode == 2)
        assert any(
            word in refused for word in ("another run is writing", "holds an unfinished run", "exists and is not empty")
        ), refused
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert contents(folder / "out") == contents(tmp_path / "alone")
