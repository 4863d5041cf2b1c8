"""The packed format in transformers' own registry: `from_pretrained` builds `SparseLinear` modules and fills them,
`save_pretrained` writes the same format. Imported when the first packed model is loaded (prunella_hook)."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compat import can_set_experts, converts, may_be_there, rename, renames, tie_again, weight_mapping, with_patterns
from ..errors import ModelError
from ..model.checkpoint import read_header
from ..plan.network import slow_down as without_plans
from ..plan.network import speed_up
from ..sparse.block import settle, slow_down
from ..sparse.conv import ExpandedConv, SparseConv, check_fits, packed_module
from ..sparse.format import (
    MARK,
    PAD,
    SPAN,
    VERSION,
    Packed,
    Rounded,
    expected,
    module_names,
    parameter_name,
    rounded_shapes,
)
from ..sparse.linear import DenseLinear, SparseExpert, SparseLinear
from ..sparse.rounded import RoundedEmbedding, RoundedLinear, TiedHead, put
from ..tensors import DTYPES, FLOATS

METHOD = "prunella"
Stored = Mapping[str, tuple[str, tuple[int, ...]]]  # what the headers of files say: {tensor: (dtype code, shape)}
_NOT_PACKED = r"(?!.*\.weight_[a-z]{4,7}$)"  # any of format.PARTS; transformers knows no groups within an assertion


class PrunellaConfig(QuantizationConfigMixin):
    """What config.json says of a packed model.

    format_version: of docs/format.md
    bits:           None, 8 or 4
    group:          inputs to a scale; 0: one scale to a row
    modules:        {name: {"shape": [O, I]}} of the modules whose weights are packed; "transposed": true for
                    those that are stored as (I, O) when they are dense; "kernel": [k…] for convolutions, whose I
                    inputs are the channels of each place in the kernel, and "groups" of those that have several;
                    "experts": E for a mixture's 3-D parameter of that name, packed expert by expert; "dense": true for
                    an embedding or output head in 8 bits of which nothing is left out; "bits" and "group" of those
                    that have their own
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
                if about.get("dense") and (about.get("bits", bits) != 8 or "experts" in about):
                    raise ValueError(f"'{name}' is said to be dense, which takes 8 bits and no experts")
                kernel, parts = about.get("kernel", ()), about.get("groups", 1)
                if not all(isinstance(k, int) and k > 0 for k in (*kernel, parts)) or columns % math.prod(kernel):
                    raise ValueError(f"kernel {kernel} and {parts} groups of '{name}'")
                if (kernel and about.keys() & {"experts", "dense", "transposed"}) or rows % parts or len(kernel) > 3:
                    raise ValueError(f"'{name}' is said to be a convolution and something else")
                if not isinstance(about.get("experts", 1), int) or about.get("experts", 1) < 1:
                    raise ValueError(f"{about['experts']} experts of '{name}'")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"config.json: quantization_config.modules is damaged: {error}.") from None
        self.quant_method = METHOD
        self.format_version = format_version
        self.bits = bits
        self.group = group
        self.modules = {name: dict(about) for name, about in modules.items()}

    def of(self, name: str) -> tuple[int | None, int]:
        """Bits and group of a module."""
        about = self.modules[name]
        return about.get("bits", self.bits), about.get("group", self.group)


class PrunellaQuantizer(HfQuantizer):
    """Puts `SparseLinear` in place of the packed modules, and checks what was loaded into them."""

    requires_calibration = True  # weights are pruned and packed by Prunella, not while a model is loaded
    quantization_config: PrunellaConfig

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` writes: with the mark, as `prunella pack` does. A mixture's parameter cannot have it:
        transformers would take it apart into experts."""
        names = (name for name in self.replaced if not isinstance(model.get_submodule(name), SparseExpert))
        mark = {f"{name}.weight": torch.empty(MARK, dtype=model.dtype) for name in itertools.islice(names, 1)}
        state = model.state_dict()
        for name in self.replaced:  # what was expanded is packed as it was
            if (stored := getattr(model.get_submodule(name), "packed_as", None)) is not None:
                parts = stored.pack(name, state.pop(f"{name}.weight")).parts()
                state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return {**state, **mark}, {}

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
        self.renamings: list[Any] | None = None
        self.renamed = False
        for name, about in self.quantization_config.modules.items():
            if "experts" in about:
                self._replace_experts(model, name, about, stored)
                continue
            if about.get("dense"):
                self._replace_rounded(model, name, about, stored)
                continue
            module_name, module = self._find(model, name, "kernel" in about)
            check_fits(name, about, module)
            kind = self.quantization_config.of(name)
            rows, columns = about["shape"]
            empty = _empty(name, stored, (rows, columns), module.weight.dtype, kind)
            model.set_submodule(module_name, packed_module(empty, module))
            self.replaced.append(module_name)
        if any(shape == MARK for _, shape in stored.values()):  # under whichever of these names, or an older one
            names = {parameter_name(*entry) for entry in self.quantization_config.modules.items()}
            if self.renamed:
                names |= {part for name in self.replaced for part in (f"{name}.weight", name.rpartition(".")[0])}
            keys = (re.escape(name.removeprefix(model.base_model_prefix + ".")) for name in names)
            may_be_there(model, {rf"(^|\.){key}$" for key in keys})
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = DenseLinear  # the same parameters, whatever is tied to them
        return model

    def _find(self, model: Any, name: str, convolves: bool = False) -> tuple[str, Any]:
        """The module of this name, a linear layer or a convolution."""
        for candidate in self._candidates(model, name, ".weight"):
            with contextlib.suppress(AttributeError):
                module = model.get_submodule(candidate)
                if getattr(module, "weight", None) is not None and (module.weight.ndim > 2) == convolves:
                    return candidate, module
        raise ModelError(f"config.json names a packed module '{name}' that the model does not have.")

    def _find_parameter(self, model: Any, name: str) -> tuple[str, Any, str]:
        """The module that holds a 3-D parameter, its name, and the name of the parameter in it."""
        for candidate in self._candidates(model, name):
            owner, _, key = candidate.rpartition(".")
            with contextlib.suppress(AttributeError):
                if model.get_parameter(candidate).ndim == 3:
                    return owner, model.get_submodule(owner), key
        raise ModelError(f"config.json names packed experts '{name}' that the model does not have.")

    def _candidates(self, model: Any, name: str, suffix: str = "") -> Iterator[str]:
        """What the network may call it: the same, or what transformers renames tensors of the files to."""
        yield from _names(model, name)
        if self.renamings is None:
            self.renamings = [entry for entry in weight_mapping(model) if renames(entry)]
        own = rename(name + suffix, self.renamings)[0].removesuffix(suffix)
        if own != name:
            self.renamed = True
            yield from _names(model, own)

    def _replace_experts(self, model: Any, name: str, about: Mapping[str, Any], stored: Stored) -> None:
        """Put a list of packed experts in place of a mixture's 3-D parameter."""
        owner_name, owner, key = self._find_parameter(model, name)
        parameter = getattr(owner, key)
        transposed = bool(about.get("transposed"))
        experts, rows, columns = parameter.transpose(1, 2).shape if transposed else parameter.shape
        _check_shape(name, about, (rows, columns), experts)
        kind = self.quantization_config.of(name)
        empty = [_empty(one, stored, (rows, columns), parameter.dtype, kind) for one in module_names(name, about)]
        delattr(owner, key)
        owner.add_module(key, nn.ModuleList(SparseExpert(packed, None, transposed) for packed in empty).eval())
        self.replaced += [f"{owner_name}.{key}.{e}" for e in range(experts)]
        if can_set_experts(model):
            model.set_experts_implementation("eager")

    def _replace_rounded(self, model: Any, name: str, about: Mapping[str, Any], stored: Stored) -> None:
        """Put a rounded embedding or output head in its place."""
        head = model.get_output_embeddings()
        try:
            module_name, module = self._find(model, name)
        except ModelError:
            if head is None:
                return  # a base model needs no head
            raise
        if not RoundedEmbedding.takes(module) and not isinstance(module, nn.Linear):
            raise ModelError(f"config.json: '{name}' is a {type(module).__name__}, which cannot be rounded.")
        rows, columns = module.weight.shape
        _check_shape(name, about, (rows, columns))
        _, group = self.quantization_config.of(name)
        group = group if group < columns else 0
        values, scales = _parts(name, stored, rounded_shapes(rows, columns, group), ("I8", "BF16"))
        put(model, module_name, Rounded(values, scales, group))
        self.replaced.append(module_name)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Packed tensors have the network's own names: what renames tensors, puts a mixture's experts together or, when
        a model is saved, takes them apart, leaves them alone. Where they have those of the files, they are renamed as
        plain tensors are."""

        def but(patterns: list[str]) -> list[str]:
            return [p + (r"(?!\w)" if p[-1].isalnum() else "") + _NOT_PACKED for p in patterns]

        out = []
        for entry in super().update_weight_conversions(weight_conversions, model):
            if converts(entry, exactly=True) or (renames(entry, exactly=True) and not self.renamed):
                out.append(with_patterns(entry, but))
            else:
                out.append(entry)
        return out

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in self.replaced:
            module = model.get_submodule(name)
            if not module.weight_values.is_meta:
                module.packed(name)
            if isinstance(module, ExpandedConv):
                model.set_submodule(name, module.plain())
        settle(model)
        speed_up(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """A plain model: `model.dequantize()`."""
        from transformers.pytorch_utils import Conv1D

        dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype  # transformers may hand over a name
        slow_down(model)
        without_plans(model)
        for name, module in list(model.named_modules()):
            dense: Any
            if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], SparseExpert):
                owner, _, key = name.rpartition(".")
                experts: Any = module
                weight = torch.stack([expert.weight_in(dtype) for expert in experts])
                delattr(model.get_submodule(owner), key)
                model.get_submodule(owner).register_parameter(key, nn.Parameter(weight))
            elif isinstance(module, RoundedEmbedding | SparseConv):
                model.set_submodule(name, module.plain(dtype).eval())
            elif isinstance(module, SparseLinear | RoundedLinear | TiedHead) and not isinstance(module, SparseExpert):
                with torch.device("meta"):
                    if getattr(module, "transposed", False):
                        dense = Conv1D(module.out_features, module.in_features)
                    else:
                        dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                if not isinstance(module, TiedHead):  # which gets the embedding's
                    if isinstance(module, SparseLinear):
                        weight = module.weight_in(dtype)
                    else:
                        weight = module.weight.to(dtype)
                    dense.weight = nn.Parameter(weight.contiguous())
                dense.bias = module.bias
                model.set_submodule(name, dense.eval())
            elif isinstance(module, DenseLinear):
                module.__class__ = nn.Linear  # type: ignore[assignment]
        tie_again(model)  # what `put` tied otherwise
        return model


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PrunellaConfig  # in place of what prunella_hook put there
AUTO_QUANTIZER_MAPPING[METHOD] = PrunellaQuantizer


def _empty(
    name: str, stored: Stored, shape: tuple[int, int], dtype: torch.dtype, kind: tuple[int | None, int]
) -> Packed:
    """A packed weight of this shape (O, I) without memory, its values in the dtype that they will have: `dtype`, or
    integers. Raises ModelError, naming the tensor, if the headers of the files show that something is missing or has
    the wrong size: before anything of that size is allocated."""
    (rows, columns), (bits, group) = shape, kind
    values = stored.get(f"{name}.weight_values")
    if values is None or len(values[1]) != 1:
        raise ModelError(f"packed tensor '{name}.weight_values' is missing or has the wrong shape.")
    code, (length,) = values
    count = length - PAD if bits != 4 else 2 * length - PAD
    if code not in {None: FLOATS, 8: {"I8"}, 4: {"U8"}}[bits] or count < 0:
        raise ModelError(f"packed tensor '{name}.weight_values' is damaged: {length} values of type {code}.")
    group = group if bits and group < columns else 0
    shapes = expected(rows, columns, count, bits, group)
    mask, offsets, kept, *scales = _parts(name, stored, shapes, ("U8", "I32", code, "BF16"))
    return Packed(mask, offsets, kept if bits else kept.to(dtype), scales[0] if bits else None, columns, group)


def _parts(name: str, stored: Stored, shapes: Mapping[str, tuple[int, ...]], codes: Sequence[str]) -> list[Tensor]:
    """The parts of a weight without memory. Raises ModelError, naming the tensor, where the files hold others."""
    parts = []
    for (part, shape), code in zip(shapes.items(), codes, strict=False):
        found = stored.get(f"{name}.{part}")
        if found != (code, shape):
            raise ModelError(
                f"packed tensor '{name}.{part}' is {'missing' if found is None else f'{found[0]} {found[1]}'}, but"
                f" the model wants {code} {shape}. Pack the model again."
            )
        parts.append(torch.empty(shape, dtype=DTYPES[code], device="meta"))
    return parts


def _check_bits(bits: Any, group: Any) -> None:
    if bits not in (None, 4, 8) or not isinstance(group, int) or group < 0 or group % SPAN:
        raise ModelError(f"config.json: bits {bits} and group {group} are no packed format.")


def _names(model: Any, name: str) -> tuple[str, ...]:
    """A base model has names without the prefix of its place in a model with a head."""
    prefix = model.base_model_prefix + "."
    return name, name.removeprefix(prefix), prefix + name


def _check_shape(name: str, about: Mapping[str, Any], wanted: tuple[int, int], experts: int | None = None) -> None:
    if tuple(about["shape"]) != wanted or about.get("experts") != experts:
        found = f"{about['experts']} experts of shape" if "experts" in about else "shape"
        want = wanted if experts is None else f"{experts} of {wanted}"
        raise ModelError(f"packed weight '{name}' has {found} {tuple(about['shape'])}, but the model wants {want}.")
