"""Make transformers know the packed format without importing it: that takes seconds, and not every use of
Prunella needs it. The quantizer registers itself as soon as transformers' own registry is imported."""

from __future__ import annotations

import importlib

from prunella_hook import after_import


def register() -> None:
    """Register the quantizer now if transformers' registry is there already, else when it comes."""
    after_import("transformers.quantizers.auto", lambda: importlib.import_module("prunella.sparse.quantizer"))
