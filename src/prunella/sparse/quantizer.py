"""The packed format in transformers' own registry: `from_pretrained` builds `SparseLinear` modules and fills them,
`save_pretrained` writes the same format. Imported by hook.py once transformers is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ModelError
from ..load import read_header
from .format import FLOATS, PAD, PARTS, SPAN, VERSION, expected
from .linear import DenseLinear, SparseLinear

METHOD = "prunella"
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}


@register_quantization_config(METHOD)
class PrunellaConfig(QuantizationConfigMixin):
    """What config.json says of a packed model.

    format_version: of docs/format.md
    bits:           None, 8 or 4
    group:          inputs to a scale; 0: one scale to a row
    modules:        {name: {"shape": [O, I]}} of the modules whose weights are packed; "transposed": true for
                    those that are stored as (I, O) when they are dense; "bits" and "group" of those that have their
                    own
    """

    def __init__(
        self,
        format_version: int = VERSION,
        bits: int | None = None,
        group: int = SPAN,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if format_version != VERSION:
            raise ModelError(
                f"the model is packed in format version {format_version}, and this Prunella reads version {VERSION}:"
                " use the Prunella that packed it to unpack it."
            )
        _check_bits(bits, group)
        modules = {} if modules is None else modules
        try:
            for name, about in modules.items():
                _check_bits(about.get("bits", bits), about.get("group", group))
                rows, columns = about["shape"]
                if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
                    raise ValueError(f"shape {about['shape']} of '{name}'")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"config.json: quantization_config.modules is damaged: {error}.") from None
        self.quant_method = METHOD
        self.format_version = format_version
        self.bits = bits
        self.group = group
        self.modules = {name: dict(about) for name, about in modules.items()}

    def of(self, name: str) -> tuple[int | None, int]:
        """Bits and group of one module."""
        about = self.modules[name]
        return about.get("bits", self.bits), about.get("group", self.group)


@register_quantizer(METHOD)
class PrunellaQuantizer(HfQuantizer):
    """Puts `SparseLinear` in place of the packed modules, and checks what was loaded into them."""

    requires_calibration = True  # weights are pruned and packed by Prunella, not while a model is loaded
    quantization_config: PrunellaConfig

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if not checkpoint_files:
            raise ModelError("a packed model is loaded from its files: give from_pretrained a directory.")
        stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in checkpoint_files:
            tensors, _ = read_header(Path(file))
            stored.update({name: entry[:2] for name, entry in tensors.items()})
        self.replaced: list[str] = []
        for name, about in self.quantization_config.modules.items():
            module_name, module = _find(model, name)
            columns, rows = _shape(module)
            if [rows, columns] != list(about["shape"]):
                raise ModelError(
                    f"packed weight '{name}' has shape {tuple(about['shape'])}, but the model wants {(rows, columns)}."
                )
            count, values = self._sizes(name, stored, rows, columns)
            _, group = self.quantization_config.of(name)
            group = group if group < columns else 0
            if values in FLOATS:
                values = module.weight.dtype  # the dtype that was asked for: values are cast as they are loaded
            model.set_submodule(module_name, SparseLinear.empty(module, columns, rows, count, values, group))
            self.replaced.append(module_name)
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = DenseLinear  # the same parameters, whatever is tied to them
        return model

    def _sizes(
        self, name: str, stored: dict[str, tuple[str, tuple[int, ...]]], rows: int, columns: int
    ) -> tuple[int, torch.dtype]:
        """The number of kept values and their dtype. Raises ModelError, naming the tensor, if the header shows
        that something is missing or has the wrong size: before anything of that size is allocated."""
        bits, group = self.quantization_config.of(name)
        values = stored.get(f"{name}.weight_values")
        if values is None or len(values[1]) != 1:
            raise ModelError(f"packed tensor '{name}.weight_values' is missing or has the wrong shape.")
        code, (length,) = values
        wanted = {None: ("F32", "BF16", "F16"), 8: ("I8",), 4: ("U8",)}[bits]
        count = length - PAD if bits != 4 else 2 * length - PAD
        if code not in wanted or count < 0:
            raise ModelError(f"packed tensor '{name}.weight_values' is damaged: {length} values of type {code}.")
        shapes = expected(rows, columns, count, bits, group if group < columns else 0)
        codes = dict(zip(PARTS, ("U8", "I32", code, "BF16"), strict=True))
        for part, shape in shapes.items():
            found = stored.get(f"{name}.{part}")
            if found != (codes[part], shape):
                raise ModelError(
                    f"packed tensor '{name}.{part}' is {'missing' if found is None else f'{found[0]} {found[1]}'}, but"
                    f" the model wants {codes[part]} {shape}. Pack the model again."
                )
        return count, _DTYPES[code]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in self.replaced:
            module = model.get_submodule(name)
            if not module.weight_mask.is_meta:
                module.packed(name)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """A plain model: `model.dequantize()`."""
        from transformers.pytorch_utils import Conv1D

        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                dense: Any
                with torch.device("meta"):
                    if module.transposed:
                        dense = Conv1D(module.out_features, module.in_features)
                    else:
                        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                dense.weight = nn.Parameter(module.weight.to(dtype or model.dtype).contiguous())
                dense.bias = module.bias
                model.set_submodule(name, dense.eval())
            elif isinstance(module, DenseLinear):
                module.__class__ = nn.Linear  # type: ignore[assignment]
        return model


def _check_bits(bits: Any, group: Any) -> None:
    if bits not in (None, 4, 8) or not isinstance(group, int) or group < 0 or group % SPAN:
        raise ModelError(f"config.json: bits {bits} and group {group} are no packed format.")


def _find(model: Any, name: str) -> tuple[str, Any]:
    """The module of this name. A base model has names without the prefix of its place in a model with a head."""
    prefix = model.base_model_prefix + "."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
            return candidate, module
    raise ModelError(f"config.json names a packed module '{name}' that the model does not have.")


def _shape(module: Any) -> tuple[int, int]:
    """(columns, rows): inputs and outputs, of a linear layer or GPT-2's transposed one."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)
