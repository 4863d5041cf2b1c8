"""Batches that are handed over, in whatever form a network is called with them, as samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..samples import Batch, Samples, size_of

TARGET = "target:"  # what the names of targets begin with: no argument of a network is called so


@dataclass(frozen=True)
class Place:
    """Where a tensor of samples stands in a tree, by its name there."""

    name: str


@dataclass(frozen=True)
class Form:
    """How a network is called with a batch of samples: trees in which tensors stand as places, all else as it is."""

    args: tuple[Any, ...] = ()
    kwargs: Any = None
    target: Any = None
    paired: bool = False  # are there targets?

    def call(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        return filled(self.args, batch), filled(self.kwargs or {}, batch)

    def batch(self, batch: Batch) -> Any:
        """A batch in the form in which it was handed over: a tensor, a tuple, a dictionary, or a pair of one of these
        and the targets."""
        args, kwargs = self.call(batch)
        inputs = kwargs or (args[0] if len(args) == 1 else args)
        return (inputs, filled(self.target, batch)) if self.paired else inputs


def filled(tree: Any, batch: Batch) -> Any:
    """A tree with a batch's tensors in their places."""
    if isinstance(tree, Place):
        return batch[tree.name]
    if isinstance(tree, Mapping):
        return {key: filled(item, batch) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(filled(item, batch) for item in tree)
    return tree


def flat(tree: Any, name: str, found: dict[str, Tensor]) -> Any:
    """A tree with places for its tensors, which are put into `found` by their names. Those without a dimension are
    settings, as numbers are."""
    if type(tree).__module__ == "numpy" and hasattr(tree, "shape") and tree.shape:
        tree = torch.as_tensor(tree)
    if isinstance(tree, Tensor) and tree.ndim:
        found[name] = tree.detach().cpu()
        return Place(name)
    if isinstance(tree, Tensor):
        return tree.item()
    glue = "" if not name or name.endswith(":") else "."
    if isinstance(tree, Mapping):
        return {key: flat(item, f"{name}{glue}{key}", found) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(flat(item, f"{name}{glue}{number}", found) for number, item in enumerate(tree))
    return tree


def read(given: Any, network: nn.Module, what: str = "calibration") -> tuple[Samples, Form]:
    """Samples, and how the network is called with them.

    Args:
        given: a batch, a list of batches, or anything else that yields some. A batch is a tensor, a tuple of positional
            arguments, or a dictionary of keyword arguments, nested ones too; each tensor has a sample a row. What a
            DataLoader yields in pairs, and a tuple of two where the network takes one argument, is inputs and targets.
        what: the argument that messages name.

    Raises:
        InputError: there are none; a tensor has not a sample a row; batches are called in different ways.
    """
    groups: dict[Any, list[dict[str, Tensor]]] = {}
    form: Form | None = None
    for number, batch in enumerate(_batches(given)):
        tensors, found = _read(batch, network, _is_loader(given), f"batch {number} of {what}")
        if form is None:
            form = found
        elif not same(form, found):
            raise InputError(
                f"batch {number} of {what} calls the network in another way than the one before: arguments that are no"
                " tensors, and the names of all, must be the same in each batch."
            )
        if size_of(tensors):
            shape = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items())
            groups.setdefault(shape, []).append(tensors)
    if form is None or not groups:
        raise InputError(
            f"{what} holds no batch: give tensors, tuples or dictionaries that the network is called with."
        )
    joined = ({name: torch.cat([one[name] for one in some]) for name in some[0]} for some in groups.values())
    return Samples.of(list(joined)), form


def _batches(given: Any) -> Iterator[Any]:
    if isinstance(given, Tensor | tuple | Mapping):
        yield given
        return
    if isinstance(given, Samples):
        yield from given.groups
        return
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(
            f"a {type(given).__name__} is no batch for a network: give a tensor, a tuple of positional arguments, a"
            " dictionary of keyword arguments, or a list or DataLoader of these."
        )
    yield from given


def _is_loader(given: Any) -> bool:
    return isinstance(given, torch.utils.data.DataLoader)


def _read(batch: Any, network: nn.Module, loader: bool, where: str) -> tuple[dict[str, Tensor], Form]:
    """The tensors of a batch by their names, and how the network is called with them."""
    tensors: dict[str, Tensor] = {}
    paired, target = False, None
    if isinstance(batch, tuple | list):
        parts = tuple(batch)
        if len(parts) == 2 and (loader or not _takes(network, parts, {})):
            paired, (batch, target) = True, parts
        else:
            batch = parts
    args: tuple[Any, ...] = () if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, list):
        args = tuple(batch)
    if not _takes(network, args, kwargs):
        raise InputError(
            f"{where} does not fit the arguments of {type(network).__name__}.forward{_takes_what(network)}."
        )
    names = _names(network, len(args))
    placed = tuple(flat(item, name, tensors) for item, name in zip(args, names, strict=True))
    named = {key: flat(item, key, tensors) for key, item in kwargs.items()}
    if not tensors:
        raise InputError(f"{where} holds no tensor with a sample a row.")
    wanted = flat(target, TARGET, tensors) if paired else None
    if len({len(tensor) for tensor in tensors.values()}) != 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(
            f"the tensors of {where} have not a sample a row, as many in each: {shapes}. What is the same for all"
            " samples belongs into the network (a buffer, say)."
        )
    return tensors, Form(placed, named, wanted, paired)


def _takes(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Can the network be called so, as far as its signature tells?"""
    try:
        inspect.signature(network.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # of a compiled function, say: it has none
        return True
    return True


def _takes_what(network: nn.Module) -> str:
    return str(inspect.signature(network.forward))


def _names(network: nn.Module, count: int) -> list[str]:
    """What the network calls its first so many arguments."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except ValueError:
        parameters = ()  # type: ignore[assignment]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    return names + [f"argument {number}" for number in range(len(names), count)]


def same(one: Any, other: Any) -> bool:
    """Are two trees the same but for the tensors in their places?"""
    if isinstance(one, Form) and isinstance(other, Form):
        ours, theirs = ((f.args, f.kwargs, f.target, f.paired) for f in (one, other))
        return same(ours, theirs)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(item, other[key]) for key, item in one.items())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or bool(type(one) is type(other) and one == other)
