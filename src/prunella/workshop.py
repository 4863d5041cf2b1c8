"""A directory in the making: whole or not there at all, and nobody else's.

What a command writes as OUT is made beside it, in `OUT.partial`:

    .prunella    the mark: the directory is ours; locked by the process that works in it
    run.json     what the run is, once it has begun
    before/      what is made for a run before it begins
    model/       what becomes OUT, by one rename when it is whole
    …            what a run that resumes needs: it goes after the rename, not before

A directory of that name that has files and no mark is somebody's: it is neither read nor written nor removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

from .errors import InputError, disk_error, say

MARK = ".prunella"
RUN = "run.json"
BEFORE = "before"
MODEL = "model"


class Workshop:
    """A directory of ours, held by this process until it is closed or removed.

    model:   what becomes the output
    resumed: it holds what an earlier run did

    Raises InputError if the directory is not ours, another process works in it, it cannot be written, or it holds an
    unfinished run that is not to be resumed.
    """

    def __init__(self, directory: Path, resume: bool):
        self.directory, self.model = directory, directory / MODEL
        self._mark: IO[str] | None = None
        try:
            names = sorted(os.listdir(directory)) if os.path.lexists(directory) else []
            if directory.is_symlink() or (names and MARK not in names):
                holds = "a link" if directory.is_symlink() else f"with '{names[0]}' in it"
                raise InputError(
                    f"'{directory}' is in the way: it is not an unfinished run of Prunella ({holds}). Move it away, or"
                    " choose another -o."
                )
            directory.mkdir(parents=True, exist_ok=True)
            mark = (directory / MARK).open("a")
        except OSError as error:
            raise disk_error(error, directory) from None
        if not hold(mark) or not _is(mark, directory / MARK):
            mark.close()
            raise InputError(f"another run is writing to '{directory}': wait for it, or choose another -o.")
        self._mark = mark
        self.resumed = self._begun()
        if self.resumed and not resume:
            self.close()
            raise unfinished(directory)
        if not self.resumed:
            self.clear()

    def _begun(self) -> bool:
        return any((self.directory / name).exists() for name in (RUN, BEFORE))

    def clear(self) -> None:
        """Make room for a run that begins: what is there is of one that was killed before it had begun."""
        for name in os.listdir(self.directory):
            if name not in (MARK, BEFORE):
                _delete(self.directory / name)

    def appear(self, path: Path) -> None:
        """Let the model be the output, and tidy up. Raises InputError, nothing lost, if it cannot be put there."""
        try:
            _sync(self.model)
            self.model.rename(place(path))
            with contextlib.suppress(OSError):
                _sync_directory(place(path).parent)
        except OSError as error:
            said = f"the finished model in '{self.model}' cannot be moved to '{path}': {error.strerror}."
            kept = " Mend that and repeat the command with --resume, or move it yourself."
            raise InputError(said + (kept if self._begun() else "")) from None
        self.remove(done=True)

    def close(self) -> None:
        """Let go. What was done stays, for a run that resumes; where nothing was begun, nothing stays."""
        if self._mark is not None and not self._begun():
            self.remove()
        self._release()

    def remove(self, *, done: bool = False) -> None:
        """Leave no trace. A kill meanwhile leaves no run that could be resumed, but where all is `done` one that shows
        it: `finished`. The mark goes last."""
        if self._mark is None:
            return
        order = {RUN: 1 if done else -2, BEFORE: -1, MARK: 2}
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.directory), key=lambda name: order.get(name, 0)):
                path = self.directory / name
                # Half of what is to be there before a run begins would be taken for the whole.
                _delete(path.rename(self.directory / "gone") if name == BEFORE else path)
            self.directory.rmdir()
        self._release()

    def _release(self) -> None:
        if self._mark is not None:
            self._mark.close()
            self._mark = None


def workshop(path: Path, resume: bool) -> Workshop:
    """Where the output `path` is made. Raises InputError if it cannot be made."""
    check_output(path)
    made = Workshop(partial_of(path), resume)
    try:
        check_output(path)  # another run may have finished it while we waited for the mark
    except InputError:
        made.close()
        raise
    return made


def finished(path: Path) -> bool:
    """Was a run killed when its output was there already and only its workshop was not gone yet? It goes now."""
    partial, real = partial_of(path), place(path)
    whole = real.is_dir() and any(real.iterdir())
    done = (partial / RUN).is_file()
    if not whole or not (partial / MARK).is_file() or (partial / MODEL).exists():
        return False
    if not done and (partial / BEFORE).exists():
        return False
    Workshop(partial, resume=True).remove(done=True)
    return done


def hold(file: IO[Any]) -> bool:
    """Lock a file until it is closed or the process ends; False if another process has it. Where the file system knows
    no locks, the user has to see to it, and is told."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        say(f"'{file.name}' cannot be locked ({error.strerror}): start no other run that writes there meanwhile.")
    return True


def place(path: Path) -> Path:
    """Where an output really goes: a link stays, and what it names is made. Raises InputError for what names no
    directory of its own."""
    if path.name in ("", ".."):
        raise InputError(f"'{path}' cannot be the output: give -o the name of a directory of its own.")
    return path.resolve() if path.is_symlink() else path


def partial_of(path: Path) -> Path:
    """Where an output directory is in the making."""
    path = place(path)
    return path.with_name(path.name + ".partial")


def unfinished(partial: Path) -> InputError:
    """What to say where an earlier run was interrupted."""
    return InputError(
        f"'{partial}' holds an unfinished run: repeat its command with --resume, or delete that directory."
    )


def check_output(path: Path) -> None:
    """Raises InputError if `path` cannot become a new directory."""
    real = place(path)
    if real.is_dir():
        if any(real.iterdir()):
            raise InputError(f"output directory '{path}' exists and is not empty: choose another -o, or delete it.")
        if is_mount(real):
            raise InputError(
                f"output directory '{path}' is a mount point, which nothing can be renamed to: give a directory in it,"
                f" -o {path / MODEL}."
            )
    elif os.path.lexists(real):
        raise InputError(f"output '{path}' exists and is not a directory: choose another -o.")
    parent = next(p for p in real.absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"output directory '{path}' cannot be made: '{parent}' is not a directory.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"output directory '{path}' cannot be made: '{parent}' is not writable.")


def is_mount(path: Path) -> bool:
    """Is another file system, or a part of this one, mounted there?"""
    if os.path.ismount(path):
        return True
    with contextlib.suppress(OSError):  # a part of the same one shows only here
        name = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path.resolve()))
        return any(line.split()[4] == name for line in Path("/proc/self/mountinfo").read_bytes().splitlines())
    return False


def _is(file: IO[Any], path: Path) -> bool:
    """Is the open file still the one of that name?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _sync(directory: Path) -> None:
    """All of it is on disk: what the rename makes final is not lost with the machine's power."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
