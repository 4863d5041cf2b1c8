"""Which of a model's classes the classes of a source of pictures are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, ModelError
from ..model.timm_models import named_classes, of_timm, timm

WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Labels:
    """The classes of a model.

    count: how many
    names: of each, maybe with synonyms after commas; empty if the model does not name them
    ids:   of each, by WordNet say; empty if it does not know them
    """

    count: int
    names: Sequence[str] = ()
    ids: Sequence[str] = ()

    def name(self, number: int) -> str:
        return self.names[number] if self.names else str(number)


def labels_of(network: Any) -> Labels:
    """The classes of a network, as far as its config tells."""
    if of_timm(network):
        return Labels(int(network.num_classes), *named_classes(network))
    config = getattr(network, "config", None)
    said: Mapping[int, str] = getattr(config, "id2label", None) or {}
    count = len(said)
    names = [said.get(n, "") for n in range(count)]
    if all(name == f"LABEL_{n}" for n, name in enumerate(names)):
        return Labels(count)
    return Labels(count, names, _wordnet(names))


def _wordnet(names: Sequence[str]) -> list[str]:
    """The WordNet ids of ImageNet's thousand classes, if it is these that are named; timm knows them."""
    try:
        info = timm().data.ImageNetInfo("imagenet-1k")
    except ModelError:
        return []
    words = [{w.strip().casefold() for w in text.split(",")} for text in info.label_descriptions()]
    if len(names) != len(words):
        return []
    alike = sum(bool({w.strip().casefold() for w in n.split(",")} & one) for n, one in zip(names, words, strict=True))
    return list(info.label_names()) if alike >= 0.9 * len(names) else []


@dataclass(frozen=True)
class Matched:
    """The class of the model of each class of a source.

    by:      how they were found: `name`, `WordNet id`, `leading number`, `order`
    numbers: {class of the source: number of the model's}
    """

    by: str
    numbers: dict[str, int]

    def told(self, labels: Labels) -> dict[str, object]:
        """For a report."""
        return {"matched_by": self.by, "classes": {name: labels.name(n) for name, n in self.numbers.items()}}


def match(classes: Sequence[str], labels: Labels, source: str) -> Matched:
    """Match the classes of a source to those of a model: by name (case, underscores and hyphens do not count, of
    synonyms one is enough), by WordNet id, by the number that a name begins with, or, if there are as many as the model
    has, by order (as numbers where all begin with one). Raises InputError where nothing of this holds for all of them.
    """
    ways: list[tuple[str, dict[str, int]]] = [
        ("name", _by_name(classes, labels)),
        ("WordNet id", _by_id(classes, labels)),
        ("leading number", _by_number(classes, labels.count)),
    ]
    for by, found in ways:
        if len(found) == len(classes):
            if len(set(found.values())) < len(found):
                twice = [name for name in found if list(found.values()).count(found[name]) > 1]
                raise InputError(
                    f"the classes {', '.join(map(repr, twice[:3]))} of '{source}' are one class of the model."
                )
            return Matched(by, found)
    if len(classes) == labels.count and not any(found for _, found in ways[:2]):
        counted = all(_number(name) is not None for name in classes)
        ordered = sorted(classes, key=lambda name: _number(name) or 0) if counted else sorted(classes)
        return Matched("order", {name: n for n, name in enumerate(ordered)})
    by, found = max(ways, key=lambda way: len(way[1]))
    missing = [name for name in classes if name not in found]
    shown = ", ".join(f"'{name}'" for name in missing[:3]) + (" …" if len(missing) > 3 else "")
    named = f"named as the model's ('{labels.name(0)}', '{labels.name(labels.count - 1)}')" if labels.names else ""
    ids = f"by WordNet id ('{labels.ids[0]}')" if labels.ids and WORDNET.fullmatch(labels.ids[0]) else ""
    rest = f"numbered from 0 to {labels.count - 1}, or as many as the model has ({labels.count}), in its order"
    raise InputError(
        f"{len(missing)} of {len(classes)} classes of '{source}' are none of the model's {labels.count}: {shown}."
        f" Folders of classes are {', '.join(filter(None, (named, ids, rest)))}."
    )


def plain(name: str) -> str:
    """A name without case, and with spaces for what stands between its words."""
    return " ".join(re.sub(r"[\s_\-]+", " ", name.casefold()).split())


def _number(name: str) -> int | None:
    found = re.match(r"\d+(?![^\W\d_])", name)  # not of 3d, or 2nd
    return int(found.group()) if found else None


def _keys(number: int, labels: Labels) -> Iterator[str]:
    """All that a class goes by: its names one by one, and all together."""
    if labels.names:
        yield from {plain(labels.names[number]), *map(plain, labels.names[number].split(","))}
    if labels.ids:
        yield plain(labels.ids[number])


def _by_name(classes: Sequence[str], labels: Labels) -> dict[str, int]:
    """Names of which there are two in a model (ImageNet has two cranes) match nothing."""
    known: dict[str, set[int]] = {}
    for number in range(labels.count if labels.names or labels.ids else 0):
        for key in _keys(number, labels):
            known.setdefault(key, set()).add(number)

    def found(name: str) -> set[int]:
        whole = known.get(plain(name), set())
        return whole or set().union(*(known.get(plain(part), set()) for part in name.split(",")))

    return {name: next(iter(numbers)) for name in classes if len(numbers := found(name)) == 1}


def _by_id(classes: Sequence[str], labels: Labels) -> dict[str, int]:
    known = {key: number for number, key in enumerate(labels.ids)}
    ids = {name: found.group() for name in classes if (found := WORDNET.match(name))}
    return {name: known[key] for name, key in ids.items() if key in known}


def _by_number(classes: Sequence[str], count: int) -> dict[str, int]:
    numbers = {name: _number(name) for name in classes}
    return {name: number for name, number in numbers.items() if number is not None and number < count}
