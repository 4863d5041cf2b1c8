"""A block is written by a thread while the next one is computed: no other bytes, no other errors, and one at a time."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from test_resume import Killed
from test_save import files_of

import prunella
from prunella import InputError
from prunella.save import Output
from prunella.store.dense import DenseStore
from prunella.stream import Stream
from prunella.tensors import TensorFile

RECIPE = {"steps": ["wanda"], "calibration": {"samples": 2, "length": 32}, "evaluate": {"source": None}}


def failing(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """The disk fails when the weights of a block, counted from 0, are to be on it."""
    put, count = DenseStore._put, 0

    def fail(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > call:
            raise error
        return put(*arguments)

    monkeypatch.setattr(DenseStore, "_put", fail)


def test_the_next_block_is_computed_while_one_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, threads = threading.Event(), set()
    prune, write = Stream.prune, TensorFile.write
    blocks = 0

    def pruned(*arguments: Any, **options: Any) -> Any:
        nonlocal blocks
        blocks += 1
        if blocks == 2:
            begun.set()
        return prune(*arguments, **options)

    def written(*arguments: Any) -> None:
        threads.add(threading.current_thread().name)
        assert begun.wait(60)
        write(*arguments)

    monkeypatch.setattr(Stream, "prune", pruned)
    monkeypatch.setattr(TensorFile, "write", written)
    prunella.prune(llama, RECIPE, output=tmp_path / "out")
    assert {name.rpartition("_")[0] for name in threads} == {"prunella-write"}


def test_no_more_than_one_block_waits_to_be_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, put = DenseStore.begin, DenseStore._put
    waiting = 0

    def begun(*arguments: Any) -> Any:
        nonlocal waiting
        assert waiting == 0
        waiting += 1
        return begin(*arguments)

    def done(*arguments: Any) -> Any:
        nonlocal waiting
        found = put(*arguments)
        waiting -= 1
        return found

    monkeypatch.setattr(DenseStore, "begin", begun)
    monkeypatch.setattr(DenseStore, "_put", done)
    prunella.prune(llama, RECIPE, output=tmp_path / "out")
    assert waiting == 0


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_disk_that_is_full_is_said_as_ever_and_the_run_goes_on(
    blocks: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prunella.prune(llama, RECIPE, output=tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, blocks, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(InputError, match="no space left on the disk of") as caught:
            prunella.prune(llama, RECIPE, output=out)
    assert ("--resume" in str(caught.value)) == (blocks > 0)
    assert out.with_name("out.partial").exists() == (blocks > 0)  # nothing is kept where nothing was done
    report = prunella.prune(llama, RECIPE, output=out, resume=blocks > 0)
    assert report.run["resumed_after_blocks"] == blocks
    assert files_of(out) == files_of(tmp_path / "whole")


def test_the_journal_knows_a_block_when_its_bytes_are_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prunella.prune(llama, RECIPE, output=tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, 1, Killed())
        with pytest.raises(Killed):
            prunella.prune(llama, RECIPE, output=out)
    lines = [json.loads(line) for line in (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()]
    assert [line["block"] for line in lines if "block" in line] == [0]
    prunella.prune(llama, RECIPE, output=out, resume=True)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_what_comes_next_waits_for_what_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note stands behind the line of a block, which is counted by then."""
    seen = []
    write = Output.write

    def noted(out: Output, result: Any) -> None:
        write(out, result)
        out.note("after", result.index)
        lines = [json.loads(line) for line in (out.partial / "journal.jsonl").read_text().splitlines()]
        seen.append([line.get("block", "note") for line in lines][-2:])
        assert out.blocks == result.index + 1

    monkeypatch.setattr(Output, "write", noted)
    prunella.prune(llama, RECIPE, output=tmp_path / "out")
    assert seen == [[0, "note"], [1, "note"], [2, "note"]]
