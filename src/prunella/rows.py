"""The finished cells of a sweep, each a line of a JSON Lines file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, disk_error
from .texts import same_file
from .workshop import hold

Row = dict[str, Any]
Key = tuple[str, str]  # method and cell, as tables show them


class Rows:
    """The cells of a JSON Lines file that were made with the same settings; the last line of a cell counts.

    Lines with other settings stay in the file but are not read; neither is half a line, which a run leaves that is
    killed while it writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rows: dict[Key, Row] = {}
        try:
            text = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise InputError(f"'{path}' cannot be read: {error.strerror}.") from None
        for line in text.split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if _same(row["settings"], self.settings):
                    self.rows[row["method"], row["cell"]] = row

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the file, alone, to `add` to it. Raises InputError if another sweep does, or it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise disk_error(error, self.path) from None
        with self._file:
            if not hold(self._file):
                raise InputError(f"another sweep is writing to '{self.path}': wait for it.")
            yield

    def add(self, key: Key, row: Mapping[str, Any]) -> None:
        """Write one row; it is on the disk when this returns."""
        whole = {"settings": self.settings, "method": key[0], "cell": key[1], **row}
        text = json.dumps(whole).encode() + b"\n"
        try:
            end = self._file.seek(0, os.SEEK_END)
            if end:
                self._file.seek(end - 1)
                text = text if self._file.read(1) == b"\n" else b"\n" + text  # after half a line
            self._file.write(text)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from None
        self.rows[key] = whole


def _same(settings: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Are these the same settings, the model maybe by another of its names?"""
    one, other = ({key: value for key, value in said.items() if key != "model"} for said in (settings, others))
    name, same = settings.get("model"), others.get("model")
    return one == other and (name == same or same_file(str(name), str(same)))
