"""Files of tensors: safetensors written tensor by tensor, masks as bits, grids.

Beside what transformers needs, a model's directory may hold

    prunella.masks   safetensors: for each pruned layer its mask (O, I) as bits, rows one after the other,
                     the first weight in the highest bit of the first byte (numpy.packbits)
    prunella.grids   safetensors, if layers were quantized: for each its scales (O, G), and as metadata
                     `grids`, JSON: {layer name: {"bits": …, "group": …}} (`Grid`)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import ModelError, ReadError
from .grid import Grid
from .model.checkpoint import Checkpoint, read_header
from .model.files import SINGLE, files_in
from .pattern import unpack

INDEX = f"{SINGLE}.index.json"
MASKS = "prunella.masks"
GRIDS = "prunella.grids"
CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
FLOATS = {"F32", "BF16", "F16"}
_SIZES = dict.fromkeys(("F64", "I64", "U64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)  # bytes; else 2 or 1
_SIZES |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)


class TensorFile:
    """A safetensors file of known layout whose tensors are written one at a time, in any order.

    The whole length is claimed when it is created, so that a full disk shows at once.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], base: int):
        self.path = path
        self.tensors = tensors
        self.base = base
        self.written: set[str] = set()
        self._file = os.open(path, os.O_RDWR)

    @classmethod
    def create(
        cls, path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
    ) -> TensorFile:
        """A new file for {name: (dtype code, shape)}, stored in this order."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (code, shape) in tensors.items():
            nbytes = int(np.prod(shape, dtype=np.int64)) * _SIZES.get(code, 1)
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            claim(file.fileno(), 8 + len(text) + offset)
        return cls.reopen(path)

    @classmethod
    def like(cls, path: Path, source: Path) -> TensorFile:
        """A new file with the very header of `source`."""
        with source.open("rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        with path.open("wb") as file:
            file.write(length + header)
            file.flush()
            claim(file.fileno(), source.stat().st_size)
        return cls.reopen(path)

    @classmethod
    def reopen(cls, path: Path) -> TensorFile:
        tensors, _ = read_header(path)
        base = min((start for _, _, start, _ in tensors.values()), default=0)
        return cls(path, tensors, base)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to the dtype of its place. Raises ModelError if its shape is another."""
        data = self.cast(name, tensor).cpu().contiguous().flatten().view(torch.uint8).numpy()
        _write_all(self._file, memoryview(data.data), self.tensors[name][2])
        self.written.add(name)

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the dtype of its place. Raises ModelError if its shape is another."""
        code, shape, *_ = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(f"tensor '{name}' has shape {tuple(tensor.shape)}, but its place in the file {shape}.")
        return tensor.detach().to(DTYPES[code])

    def copy(self, name: str, source: Path, start: int, end: int) -> None:
        """Copy one tensor's bytes from another file."""
        at = self.tensors[name][2]
        with source.open("rb") as file:
            file.seek(start)
            while start < end:
                try:
                    data = file.read(min(1 << 24, end - start))
                except OSError as error:
                    raise ReadError(f"'{source}' cannot be read: {error.strerror}.") from None
                if not data:
                    raise ModelError(f"'{source}' is truncated.")
                _write_all(self._file, memoryview(data), at)
                start, at = start + len(data), at + len(data)
        self.written.add(name)

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file that appears when it is whole. Raises OSError if the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    layout = {name: (CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    file = TensorFile.create(temporary, layout, metadata or {"format": "pt"})
    try:
        for name, tensor in tensors.items():
            file.write(name, tensor)
        file.sync()
    finally:
        file.close()
    temporary.replace(path)


def claim(file: int, size: int) -> None:
    """Make an open file so long, on the disk too where the file system can say so. Raises OSError if it is full."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.ftruncate(file, size)
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.ftruncate(file, size)  # a file system that cannot claim space ahead


def _write_all(file: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(file, data[: 1 << 26], at)
        data, at = data[count:], at + count


# ---------------------------------------------------------------------------------------------------------
# Masks and grids


def read_masks(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The masks saved with a pruned model: {layer name: bool (outputs, inputs)}, True where a weight was kept. A
    convolution's inputs are those of all places of its kernel, one place after the other: (O, k… C) of (O, C, k…).

    Args:
        directory: of the pruned model.
        names: layers whose masks to read; None: all.

    Raises:
        ModelError: there are none, or they are damaged.
    """
    shapes = mask_shapes(directory)
    path = Path(directory) / MASKS
    try:
        with safe_open(path, framework="pt") as file:
            return {name: unpack(file.get_tensor(name), shapes[name]) for name in (shapes if names is None else names)}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"'{path}' is damaged: {error}.") from None


def mask_shapes(directory: str | Path) -> dict[str, tuple[int, int]]:
    """The layers that have a mask, and the shape of each. Raises ModelError as `read_masks` does."""
    path = Path(directory) / MASKS
    if not path.is_file():
        raise ModelError(f"'{directory}' holds no masks ({MASKS}): it was not pruned by Prunella.")
    return masks_in(path)


def masks_in(path: Path) -> dict[str, tuple[int, int]]:
    """Shapes of the masks in one file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: (rows, columns) for name, (rows, columns) in json.loads(file.metadata()["shapes"]).items()}
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' is damaged: {error}.") from None


def write_masks(path: Path, bits: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Save masks, given as bits (`pattern.pack`), as `read_masks` reads them."""
    about = json.dumps({name: list(shapes[name]) for name in bits})
    save_tensors(path, bits, {"shapes": about})


def read_grids(directory: str | Path) -> dict[str, Grid]:
    """The grids saved with a quantized model, {layer name: grid}; none for a model that was not quantized.

    Raises ModelError if they are damaged.
    """
    path = Path(directory) / GRIDS
    return grids_in(path) if path.is_file() else {}


def grids_in(path: Path) -> dict[str, Grid]:
    """The grids in one file."""
    out = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, about in json.loads(file.metadata()["grids"]).items():
                out[name] = Grid(about["bits"], about["group"], file.get_tensor(name))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"'{path}' is damaged: {error}.") from None
    return out


def write_grids(path: Path, grids: Mapping[str, Grid]) -> None:
    """Save grids as `read_grids` reads them; no file if there are none."""
    if grids:
        about = {name: {"bits": grid.bits, "group": grid.group} for name, grid in grids.items()}
        scales = {name: grid.scale_OG.cpu().contiguous() for name, grid in grids.items()}
        write_bytes(path, save(scales, {"grids": json.dumps(about)}))


# ---------------------------------------------------------------------------------------------------------
# Small files


def write_index(directory: Path) -> None:
    """Say which tensor is in which file, where there are several files."""
    checkpoint = Checkpoint(directory, files_in(directory))
    if list(checkpoint.files) != [SINGLE]:
        index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": dict(sorted(checkpoint.where.items()))}
        write_json(directory / INDEX, index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As the config files beside a model's weights are written."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file that appears when it is whole."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
