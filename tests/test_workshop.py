"""Nothing foreign is touched, and what is finished appears whole or can be gone on with."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import prunella
from prunella import InputError, workshop
from prunella.workshop import BEFORE, MARK, MODEL, RUN, Workshop, check_output, finished, partial_of

MAGNITUDE = {"steps": ["magnitude"], "evaluate": {"source": None}}


@pytest.fixture
def pruned(llama: Path, tmp_path: Path, ids: Tensor) -> Path:
    prunella.prune(llama, MAGNITUDE, output=tmp_path / "pruned", calibration=ids)
    return tmp_path / "pruned"


def started(directory: Path) -> Workshop:
    """One in which a run has begun."""
    shop = Workshop(directory, resume=True)
    shop.model.mkdir()
    (shop.model / "weights").write_text("w")
    (directory / "journal.jsonl").write_text("j")
    (directory / RUN).write_text("{}")
    return shop


# ---------------------------------------------------------------------------------------------------------
# Whose it is


@pytest.mark.parametrize("command", ["prune", "pack", "heal", "rounds"])
def test_a_directory_in_the_way_that_is_not_ours_is_refused_and_stays(
    command: str, llama: Path, pruned: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    thesis = tmp_path / ("out.rounds" if command == "rounds" else "out.partial") / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("words")
    commands = {
        "prune": ("prune", llama, "-o", tmp_path / "out", "--step", "magnitude"),
        "pack": ("pack", pruned, "-o", tmp_path / "out"),
        "heal": ("heal", pruned, "-o", tmp_path / "out", "--train", "norms"),
        "rounds": ("prune", llama, "-o", tmp_path / "out", "--step", "magnitude", "--heal", "norms"),
    }
    for flags in ((), ("--resume",))[: 1 if command == "pack" else 2]:
        done = run(*commands[command], *flags)
        assert done.code == 2
        assert f"'{thesis.parent}' is in the way: it is not an unfinished run of Prunella" in done.err
        assert "'thesis.txt'" in done.err
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "out").exists()


def test_directories_beside_the_output_that_bear_names_like_ours_stay(pruned: Path, tmp_path: Path) -> None:
    for suffix in ("biased", "adapted", "rounds"):
        (tmp_path / f"out.{suffix}").mkdir()
        (tmp_path / f"out.{suffix}" / "thesis.txt").write_text("words")
    recipe = {**MAGNITUDE, "calibration": {"samples": 2, "length": 32}}
    heal = {"train": ["new-biases"], "tokens": 64, "length": 32, "batch": 2, "micro": 2, "held_out": 0}
    prunella.heal(pruned, {**recipe, "heal": heal}, output=tmp_path / "out")
    for suffix in ("biased", "adapted", "rounds"):
        assert (tmp_path / f"out.{suffix}" / "thesis.txt").read_text() == "words"


def test_a_link_is_not_ours_whatever_it_leads_to(tmp_path: Path) -> None:
    started(tmp_path / "real").close()
    (tmp_path / "out.partial").symlink_to("real")
    with pytest.raises(InputError, match=r"is in the way.*\(a link\)"):
        Workshop(tmp_path / "out.partial", resume=True)
    (tmp_path / "file").write_text("words")
    with pytest.raises(InputError, match=r"'.*file' cannot be written"):
        Workshop(tmp_path / "file", resume=True)


def test_a_workshop_is_held_by_one(tmp_path: Path) -> None:
    shop = started(tmp_path / "out.partial")
    for resume in (False, True):
        with pytest.raises(InputError, match="another run is writing to"):
            Workshop(shop.directory, resume)
    shop.close()
    with pytest.raises(InputError, match=r"holds an unfinished run: repeat its command with --resume"):
        Workshop(shop.directory, resume=False)
    assert Workshop(shop.directory, resume=True).resumed


def test_where_nothing_was_begun_nothing_stays_and_nothing_is_asked(tmp_path: Path) -> None:
    shop = Workshop(tmp_path / "deep" / "out.partial", resume=False)
    (shop.directory / MODEL).mkdir()
    shop.close()
    assert not shop.directory.exists()
    shop.directory.mkdir()  # killed before its mark was there, and after
    for _ in range(2):
        assert not Workshop(shop.directory, resume=False).resumed
        (shop.directory / MODEL).mkdir()
    assert [path.name for path in shop.directory.iterdir()] == [MODEL, MARK]


def test_a_lock_that_the_file_system_does_not_know_is_said_and_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    Workshop(tmp_path / "out.partial", resume=False).close()
    said = capsys.readouterr().err
    assert "cannot be locked" in said
    assert len(said.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------
# Where the output goes


@pytest.mark.parametrize("dangling", [False, True])
def test_an_output_that_is_a_link_is_made_where_it_leads(
    dangling: bool, llama: Path, tmp_path: Path, ids: Tensor
) -> None:
    real, out = tmp_path / "disk" / "real", tmp_path / "out"
    if not dangling:
        real.mkdir(parents=True)
    out.symlink_to(real)
    prunella.prune(llama, MAGNITUDE, output=out, calibration=ids)
    assert out.is_symlink()
    assert (real / "prunella.json").is_file()
    assert sorted(path.name for path in real.parent.iterdir()) == ["real"]
    with pytest.raises(InputError, match=r"out' exists and is not empty"):
        prunella.prune(llama, MAGNITUDE, output=out, calibration=ids)


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in map(Path, ("/proc", "/dev/shm", "/sys")):
        if path.is_dir() and os.path.ismount(path):
            assert workshop.is_mount(path)
    assert not workshop.is_mount(tmp_path)
    monkeypatch.setattr(workshop, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(InputError, match=rf"'{tmp_path}' is a mount point.*-o {tmp_path / MODEL}"):
        check_output(tmp_path)


def test_a_part_of_a_file_system_that_is_mounted_is_a_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bind mount, which the numbers of devices do not show."""
    name = str(tmp_path / "a b").replace(" ", "\\040")
    monkeypatch.setattr(Path, "read_bytes", lambda self: f"36 35 98:0 /a {name} rw - ext4 /dev/a rw\n".encode())
    assert workshop.is_mount(tmp_path / "a b")
    assert not workshop.is_mount(tmp_path / "a")


def test_a_result_that_cannot_get_its_name_is_kept_and_told_where(tmp_path: Path) -> None:
    shop = started(partial_of(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("came meanwhile")
    with pytest.raises(InputError, match=rf"the finished model in '{shop.model}' cannot be moved.*--resume"):
        shop.appear(tmp_path / "out")
    shop.close()
    assert (shop.model / "weights").read_text() == "w"
    assert (shop.directory / RUN).is_file()
    assert (shop.directory / "journal.jsonl").is_file()


# ---------------------------------------------------------------------------------------------------------
# Killed while it tidies up


@pytest.mark.parametrize("kept", [[RUN, MARK], [RUN, MARK, "journal.jsonl"]])
def test_a_run_that_was_killed_when_its_output_was_there_has_finished(kept: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shop = started(partial_of(out))
    shop.close()
    assert not finished(out)
    shop.model.rename(out)
    for path in shop.directory.iterdir():
        if path.name not in kept:
            path.unlink()
    assert finished(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "weights").is_file()
    assert not finished(out)


def test_what_was_made_for_a_run_that_has_not_begun_is_no_remnant(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("of another command")
    shop = Workshop(partial_of(tmp_path / "out"), resume=False)
    (shop.directory / BEFORE / "adapted").mkdir(parents=True)
    shop.close()
    assert not finished(tmp_path / "out")
    assert (shop.directory / BEFORE / "adapted").is_dir()


def test_a_discarded_run_is_never_taken_for_one_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any of its deletions."""
    for deletions in range(5):
        shop = started(tmp_path / str(deletions))
        (shop.directory / BEFORE).mkdir()
        done = 0
        real = workshop._delete

        def dying(path: Path, allowed: int = deletions, real: Any = real) -> None:
            nonlocal done
            if done == allowed:
                raise KeyboardInterrupt
            done += 1
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(workshop, "_delete", dying)
            with pytest.raises(KeyboardInterrupt):
                shop.remove()
        shop._release()
        assert Workshop(shop.directory, resume=True).resumed is (deletions == 0)


def test_a_finished_run_is_not_begun_again_by_resuming_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Workshop, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            prunella.prune(llama, MAGNITUDE, output=out, calibration=ids)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    report = prunella.prune(llama, MAGNITUDE, output=out, calibration=ids, resume=True)
    assert report == prunella.Report.read(out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
