"""Where weights come from: a source, and the usual one, tensors in safetensors files that are read one by one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError, ReadError
from .files import read_json, weight_files
from .quantized import Scaled, find_scales

Place = tuple[str, tuple[int, ...], int, int]  # of a tensor in a file: dtype, shape, first byte, last byte + 1


class Source:
    """Where weights come from: what `Model.load` reads. Some stand there as tensors of the model's files (`where`,
    `open`); others in a form of the source's own, of which `parameter` makes what the network has (`own`).

    directory: what messages name
    files:     file name -> {tensor name: its place}
    where:     tensor name -> file name
    own:       {parameter: what the source knows it by}, under its name in the network or in the files of a plain model
    """

    directory: Path
    files: Mapping[str, Mapping[str, Place]] = {}
    where: Mapping[str, str] = {}
    own: Mapping[str, Any] = {}

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(end - start for tensors in self.files.values() for _, _, start, end in tensors.values())

    @contextlib.contextmanager
    def open(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        """Tensors of these names, each read when it is sliced, as those of `safe_open` are."""
        yield {}

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """One of `own`, in `dtype`. Raises ModelError, naming the tensor, if it is missing or damaged."""
        raise NotImplementedError


class Checkpoint(Source):
    """The safetensors files of a directory, read tensor by tensor: those that transformers would read, or those of
    these `names`. FP8 weights are read times their scales, and stand here as what they are read as, bfloat16.

    scales: FP8 tensor -> (its scale, the file of that)
    """

    def __init__(self, directory: Path, names: Iterable[str] | None = None):
        self.directory = directory
        self.files: dict[str, dict[str, Place]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.where: dict[str, str] = {}
        for name in weight_files(directory) if names is None else names:
            self.files[name], self.metadata[name] = read_header(directory / name)
            self.where.update(dict.fromkeys(self.files[name], name))
        if not self.files:
            raise ModelError(f"directory '{directory}' holds no .safetensors file.")
        codes = {name: tensor[0] for tensors in self.files.values() for name, tensor in tensors.items()}
        scales, beside = find_scales(codes)
        self.scales = {name: (scale, self.where[scale]) for name, scale in scales.items()}
        self.altered = {self.where[name] for name in (*scales, *beside)}  # files that are not read as they are
        block = self.quantization.get("weight_block_size")
        self._block = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
        for name in scales:
            tensors = self.files[self.where[name]]
            tensors[name] = ("BF16", *tensors[name][1:])
        for name in beside:
            del self.files[self.where.pop(name)][name]
        for name, code in codes.items():
            if code.startswith(("F8_", "F4", "F6")) and name in self.where and name not in scales:
                raise ModelError(
                    f"tensor '{name}' in '{directory}' is stored as {code} without a scale (…_scale_inv or …_scale):"
                    " only F32, BF16 and F16 can be pruned. Dequantize the model first."
                )

    @property
    def quantization(self) -> dict[str, Any]:
        """What config.json says of how the weights are quantized; nothing if they are not."""
        said = read_json(self.directory / "config.json").get("quantization_config")
        return said if isinstance(said, dict) else {}

    def dtype(self) -> torch.dtype:
        """The floating-point dtype that most bytes are stored in."""
        count: dict[str, int] = {}
        for tensors in self.files.values():
            for kind, _, start, end in tensors.values():
                count[kind] = count.get(kind, 0) + end - start
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        best = max((kind for kind in count if kind in kinds), key=lambda kind: count[kind], default=None)
        if best is None:
            raise ModelError(
                f"the weights in '{self.directory}' are stored as {', '.join(sorted(count)) or 'nothing'}: only F32,"
                " BF16 and F16 can be pruned. Dequantize the model first."
            )
        return kinds[best]

    @contextlib.contextmanager
    def open(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazy slices of the named tensors. Read by pread, not mmap, so that resident memory stays small."""
        with contextlib.ExitStack() as stack:
            handles: dict[str, Any] = {}
            slices: dict[str, Any] = {}

            def lazy(name: str, file: str) -> Any:
                try:
                    if file not in handles:
                        opened = safe_open(self.directory / file, framework="pt", device="cpu", backend="pread")
                        handles[file] = stack.enter_context(opened)
                    return handles[file].get_slice(name)
                except OSError as error:
                    raise ReadError(f"'{self.directory / file}' cannot be read: {error}.") from None

            for name in names:
                slices[name] = lazy(name, self.where[name])
                if name in self.scales:
                    slices[name] = Scaled(name, slices[name], lazy(*self.scales[name]), self._block)
            try:
                yield slices
            except SafetensorError as error:
                raise ReadError(f"a tensor in '{self.directory}' cannot be read: {error}.") from None


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """The tensors of a safetensors file, {name: (dtype, shape, start, end)} with offsets in the file, and its
    metadata. Raises ModelError, naming the file, if it is truncated or damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu", backend="pread") as handle:
            handle.keys()  # the library's own validation: sizes, overlaps, holes, file length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"'{path}' is truncated or damaged ({error}). Fetch or write it again.") from None
    metadata = header.pop("__metadata__", {})
    base = 8 + length
    tensors = {
        name: (t["dtype"], tuple(t["shape"]), base + t["data_offsets"][0], base + t["data_offsets"][1])
        for name, t in header.items()
    }
    return tensors, metadata
