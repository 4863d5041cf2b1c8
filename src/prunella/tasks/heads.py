"""A new head for classes on a network that has none, to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..compat import forget_name, quiet_transformers
from ..errors import InputError, ModelError, first_line, say
from ..machine import fork_random
from ..model.names import find_directory
from ..model.tokenizer import load_tokenizer
from ..texts import ClassName, records
from .sentences import Row, Sentences

HEAD = "ForSequenceClassification"  # how transformers' classes of such networks end


def label_names(task: Sentences, sources: Sequence[str]) -> list[str]:
    """The names of all labels in these sources, in the order of the classes that they are to be: numbers 0, 1, 2 …
    are classes by number, with transformers' names for them; names are sorted. Raises InputError where there is no
    label, where numbers have gaps, and where both occur."""
    found: set[Any] = set()

    def see(row: Any, place: str) -> Row:
        one = task.read_row(row, place)
        if isinstance(one.label, str | int) and not isinstance(one.label, bool):
            found.add(one.label)
        elif one.label is not None:
            raise InputError(f"{place}: the label {one.label!r} is neither a name nor a whole number.")
        return one

    for source in sources:
        for _ in records(source, see, (*task.columns.values(),)):
            pass
    shown = ", ".join(sorted(map(str, found))[:6])
    if len(found) < 2:
        raise InputError(
            f"{' and '.join(sources)}: a head for classes needs two labels at least ('{task.columns['label']}'), and"
            f" there {'is only ' + shown if found else 'is none'}."
        )
    if all(isinstance(label, ClassName) for label in found):
        return [str(label) for label in sorted(found, key=lambda label: label.number)]
    numbers = {int(label) for label in found if str(label).isdecimal()}
    if not numbers:
        return sorted(map(str, found))
    if len(numbers) < len(found) or numbers != set(range(len(numbers))):
        raise InputError(f"labels are names, or the numbers 0, 1, 2 … without a gap; these are {shown}.")
    return [f"LABEL_{number}" for number in sorted(numbers)]


def with_head(
    name: str, folder: Path, labels: Sequence[str], *, seed: int = 0, dtype: str = "auto", remote_code: bool = False
) -> Path:
    """Write a model to a new directory as a classifier of texts, with a head of random numbers for these classes.

    Args:
        name: hub id, directory or built-in name of an encoder, or of a decoder.
        labels: names of the classes, in their order.
        seed: of the head.

    Raises:
        ModelError: transformers has no such classifier of this architecture, or more than the head is missing.
    """
    import transformers

    directory = find_directory(name, remote_code=remote_code)
    names = dict(enumerate(labels))
    kind: Any = getattr(transformers, f"AutoModel{HEAD}")
    try:
        with quiet_transformers(), fork_random(torch.device("cpu")):
            torch.manual_seed(seed)
            network, info = kind.from_pretrained(
                directory,
                num_labels=len(labels),
                id2label=names,
                label2id={label: number for number, label in names.items()},
                problem_type="single_label_classification",
                dtype=dtype,
                trust_remote_code=remote_code,
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"'{name}' cannot be made a classifier of texts: {first_line(error)}") from None
    base = f"{network.base_model_prefix}."
    made = sorted(info["missing_keys"])
    if missing := [key for key in made if key.startswith(base) and ".pooler." not in key]:
        raise ModelError(f"tensor '{missing[0]}' is missing from '{name}'.")
    if not made:
        raise ModelError(f"'{name}' has a head for classes already: leave it as it is.")
    say(f"a new head for {len(labels)} classes ({', '.join(labels)}): {', '.join(made)}, drawn with seed {seed}")
    forget_name(network.config)
    with quiet_transformers():
        network.save_pretrained(folder)
        if (tokenizer := load_tokenizer(directory, name, remote_code)) is not None:
            tokenizer.save_pretrained(folder)
    return folder
