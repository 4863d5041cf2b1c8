"""A store in a file of a third party's own: the parameters of each block in one .npz, with the masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunella.store import BlockResult, Source, Store, register_store


@register_store("toy")
class Toy(Store):
    """A .npz a block, and one for what lies outside of the blocks."""

    def write(self, result: BlockResult) -> dict[str, Any]:
        named = self.model.module(result.name).named_parameters(prefix=result.name)
        masks = {f"{name}.mask": bits for name, bits in result.masks.items()}
        self._save(result.name, {**dict(named), **result.changed, **masks})
        return {}

    def complete(self) -> None:
        with self.model.whole() as network:
            for block in (*self.model.blocks, "outside"):
                if not (self.folder / f"{block}.npz").exists():
                    named = network.named_parameters()
                    self._save(block, {n: p for n, p in named if (self.model.block_of(n) or "outside") == block})

    def _save(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        np.savez(self.folder / "half.npz", **{n: t.detach().cpu().float().numpy() for n, t in tensors.items()})
        (self.folder / "half.npz").replace(self.folder / f"{block}.npz")

    @classmethod
    def read(cls, directory: Path) -> Source:
        return Arrays(directory)


class Arrays(Source):
    """What the .npz files of a directory hold."""

    def __init__(self, directory: Path):
        self.directory = directory
        every = {name: path for path in sorted(directory.glob("*.npz")) for name in np.load(path)}
        self.own = {name: path for name, path in every.items() if not name.endswith(".mask")}

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.own.values()))

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.load(self.own[name])[name]).to(dtype)
