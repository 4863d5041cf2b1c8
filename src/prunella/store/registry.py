"""What a store is, and the registry of stores.

Third parties register their own: `@register_store("mine")` in a file of theirs, then `--format path/to/mine.py:mine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..layers import Slot
from ..model.checkpoint import Source
from ..model.network import Model
from ..outcome import BlockResult
from ..registry import Method, lookup
from ..tensors import GRIDS, grids_in, write_grids


class Store:
    """Where the weights of a run go, one block after the other, and where they are read again.

    Its unit is a version of a layer, and a block is written as one commit of the versions in a `BlockResult`. A version
    has the name of its layer, as masks and grids have it. A store that keeps a layer at several levels calls them
    `LAYER@LEVEL`, such as `model.layers.0.mlp.up_proj@2:4`; the level is whatever the writer says of it (sparsity,
    pattern, bits), the same for a whole commit. What is read is a `Source`, which has one version of each layer; where
    there are several, `{layer: level}` says which, and no choice of them is a copy.

    A store is made of three things, and of those of a recipe's `bits`, `group` and `round_head` that its signature has
    as keyword arguments:

    folder: what becomes the output; everything that is no weight, mask or grid is put there by others
    aside:  what only a run that resumes needs; it goes in the end
    model:  whose weights they are. What no step touched is as it is there

    Everything that writes may raise OSError, of a full disk say.
    """

    def __init__(self, folder: Path, aside: Path, model: Model):
        self.folder, self.aside, self.model = folder, aside, model

    @classmethod
    def check(cls, model: Model) -> None:
        """Raises InputError for a model of which it holds nothing."""

    def create(self, slots: Sequence[Slot]) -> None:
        """Begin a run that prunes these layers: the folder is empty."""

    def open(self) -> None:
        """Begin to write: after `create`, or in a run that resumes."""

    def write(self, result: BlockResult) -> dict[str, Any]:
        """Put a block on disk, which is loaded: its masks, grids and changed parameters, and what it has beside them.
        When this returns it is there even if the machine stops. Returns what `restore` takes, plain data."""
        raise NotImplementedError

    def begin(self, result: BlockResult) -> Callable[[], dict[str, Any]]:
        """`write` in two parts: what needs the block or a device, and, returned, what is left to do. A thread does that
        while the next block is computed. A store that does not know better writes at once."""
        entry = self.write(result)
        return lambda: entry

    def write_outside(self, changed: Mapping[str, Tensor]) -> None:
        """Put parameters on disk that no block holds: embeddings, the head, the last norm."""
        raise InputError(f"the format '{type(self).__name__}' takes no healed weights: heal a dense model.")

    def restore(self, index: int, entry: Mapping[str, Any]) -> None:
        """Take block `index` as written, by an earlier run."""

    def complete(self) -> None:
        """Write what is not there yet, as it is in the model: after this `source` has all of it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Bring what lies beside the weights into its last form; config.json is there by now."""

    def close(self) -> None:
        """Let go of the files. What is on disk stays."""

    @property
    def source(self) -> Source:
        """What is written so far."""
        return self.read(self.folder)

    @classmethod
    def read(cls, directory: Path) -> Source:
        """The weights of a finished directory. Raises ModelError if they are missing or damaged."""
        raise NotImplementedError

    def merge_grids(self) -> None:
        """Make one file of the grids that were put aside, block by block."""
        parts = sorted(self.aside.glob(f"{GRIDS}-*"))
        write_grids(self.folder / GRIDS, {name: grid for part in parts for name, grid in grids_in(part).items()})


MakeStore = partial[Store]  # of (folder, aside, model)

stores: dict[str, Method] = {}


def register_store(name: str) -> Callable[[type[Store]], type[Store]]:
    """Make a class a store: a decorator.

    Args:
        name: what users call it, as `format` of a recipe.
    """

    def add(kind: type[Store]) -> type[Store]:
        if not issubclass(kind, Store):
            raise TypeError(f"store '{name}' is no Store")
        stores[name] = Method(name, frozenset(), kind, per_layer=False)
        return kind

    return add


def find_store(name: str) -> Method:
    """The registered store `name`, or the one that `path/to/file.py:name` registers. Raises InputError."""
    return lookup("format", stores, name)


def check_store(name: str, model: Model) -> None:
    """Raises InputError for a model that the store of this name does not hold."""
    kind: Any = find_store(name).function
    kind.check(model)


def make_store(name: str, options: Mapping[str, Any] | None = None) -> MakeStore:
    """A store that is ready to be made for a folder, with those of these options that it takes. Raises InputError."""
    method = find_store(name)
    return partial(method.function, **{key: value for key, value in (options or {}).items() if key in method.options})
