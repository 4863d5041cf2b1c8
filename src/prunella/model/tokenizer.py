"""The tokenizer of a model, or another that is given in its place."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..compat import quiet_transformers
from ..errors import ModelError, first_line
from .hub import from_hub


def load_tokenizer(directory: Path, name: str, remote_code: bool) -> Any:
    """The model's tokenizer, or None: a model without one can still be pruned on windows of token ids."""
    from transformers import AutoTokenizer

    if not any(next(directory.glob(pattern), None) for pattern in ("token*", "vocab*", "*.model")):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        pieces = next((path for path in sorted(directory.glob("*.model"))), None)
        if pieces and not (directory / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
            raise ModelError(
                f"the tokenizer of '{name}' ({pieces.name}) needs the package sentencepiece: pip install sentencepiece."
            ) from None
        raise ModelError(f"the tokenizer of '{name}' cannot be read: {first_line(error)}") from None


def given_tokenizer(given: Any, remote_code: bool) -> Any:
    """A tokenizer, or the one of a directory or hub id."""
    if not isinstance(given, str | Path):
        return given
    directory = Path(given) if Path(given).is_dir() else from_hub(str(given), False, weights=False)
    found = load_tokenizer(directory, str(given), remote_code)
    if found is None:
        raise ModelError(f"'{given}' holds no tokenizer.")
    return found
