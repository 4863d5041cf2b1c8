"""What is private in other libraries and needed here: all of it in one place, each with a line that says what for.

Nothing of this is promised to stay, so tests/test_compat.py asks for every name by itself, and says what to do when one
is gone; for the same reason pyproject.toml pins the minor version of transformers. What cannot be collected, methods of
theirs that are overridden and a module's own dictionaries, is named in that test too. Libraries are imported when they
are needed: this module is imported by what needs none of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

# ---------------------------------------------------------------------------------------------------------
# transformers: how the tensors in an architecture's files become parameters of its network, and back


def of_transformers(network: Any) -> bool:
    """Is it a model of transformers, whose files may have other tensors than it has parameters?"""
    from transformers import PreTrainedModel

    return isinstance(network, PreTrainedModel)


def weight_mapping(network: Any) -> list[Any]:
    """What renames and converts the tensors of this architecture's files; nothing where their names are those of the
    network's state dict."""
    if not of_transformers(network):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = get_model_conversion_mapping(network)
    return mapping


def conversions(network: Any) -> tuple[list[Any], list[Any]]:
    """Those of them that rename tensors, and those that convert several into one parameter; fresh ones, since they
    gather what they convert."""
    mapping = copy.deepcopy(weight_mapping(network))
    return [entry for entry in mapping if renames(entry)], [entry for entry in mapping if converts(entry)]


def renames(entry: object, exactly: bool = False) -> bool:
    """Does this entry of a mapping give tensors other names; `exactly` that, and is of no class derived from it?"""
    from transformers.core_model_loading import WeightRenaming

    return type(entry) is WeightRenaming if exactly else isinstance(entry, WeightRenaming)


def converts(entry: object, exactly: bool = False) -> bool:
    """Does this entry of a mapping make parameters of several tensors; `exactly` as in `renames`?"""
    from transformers.core_model_loading import WeightConverter

    return type(entry) is WeightConverter if exactly else isinstance(entry, WeightConverter)


def with_patterns(entry: Any, change: Callable[[list[str]], list[str]]) -> Any:
    """A copy of an entry, whose patterns of names, in the files and in the network, are what `change` makes of them."""
    kept = {"operations": entry.operations} if hasattr(entry, "operations") else {}
    return entry.copy(change(entry._original_source_patterns), change(entry._original_target_patterns), **kept)


def rename(
    key: str,
    renamings: Sequence[Any],
    converters: Sequence[Any] = (),
    prefix: str | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[str, str | None]:
    """The parameter that a tensor in the files belongs to, and the converter's pattern that it fits, if any does."""
    from transformers.core_model_loading import rename_source_key

    found: tuple[str, str | None] = rename_source_key(key, renamings, converters, prefix, parameters)
    return found


def fill(network: Any, slices: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Read these tensors into the network, renamed and converted, in `dtype` or what the network keeps in float32;
    returns what did not fit. The weights of all other parameters stay as they are."""
    if not of_transformers(network):
        return _fill_plain(network, slices, dtype, device)
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    renamings, converters = conversions(network)
    used = getattr(network, "_weight_conversions", None)
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=network._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=[*renamings, *converters],
    )
    info, _ = convert_and_load_state_dict_in_model(network, slices, config)
    if used and len(used) > len(network._weight_conversions):
        network._weight_conversions = used  # of a block, which `revert` reverts: not of what lies outside it
    return info


def _fill_plain(network: Any, slices: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """As `fill`, where the tensors go by the names of the network's state dict."""
    wrong: list[tuple[str, torch.Size, torch.Size]] = []
    for name, stored in slices.items():
        owner, _, last = name.rpartition(".")
        module = network.get_submodule(owner)
        held = module._parameters if last in module._parameters else module._buffers
        tensor: Tensor = stored[...]
        if tensor.shape != held[last].shape:
            wrong.append((name, tensor.shape, held[last].shape))
            continue
        tensor = tensor.to(device, dtype if held[last].is_floating_point() else held[last].dtype)
        held[last] = nn.Parameter(tensor, requires_grad=False) if held is module._parameters else tensor
    return SimpleNamespace(mismatched_keys=wrong, conversion_errors={})


def revert(network: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as the tensors that the architecture's files hold."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors: dict[str, Tensor] = revert_weight_conversion(network, parameters)
    return tensors


def may_be_missing(network: Any) -> Sequence[str]:
    """Patterns of the parameters that files need not have: they are made, or tied to others."""
    if not of_transformers(network):
        return (r"(^|\.)num_batches_tracked$",)  # which torch does without, too
    return network._keys_to_ignore_on_load_missing or ()


def make_missing(network: Any, name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Give a parameter that files need not have the values that its network makes (a table of sines, say). False where
    it is none of those, or makes others each time."""
    if not of_transformers(network) or not any(re.search(pattern, name) for pattern in may_be_missing(network)):
        return False
    owner, _, key = name.rpartition(".")
    module = network.get_submodule(owner)
    others = [p for n, p in module.named_parameters(recurse=False) if n != key]
    for other in others:
        other._is_hf_initialized = True
    made = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parameter = nn.Parameter(torch.zeros(module._parameters[key].shape, dtype=dtype), requires_grad=False)
            module._parameters[key] = parameter
            network._init_weights(module)
            made.append(parameter)
    for other in others:
        del other._is_hf_initialized
    module._parameters[key] = nn.Parameter(made[0].to(device), requires_grad=False)
    return torch.equal(*made)


def may_be_there(network: Any, patterns: set[str]) -> None:
    """Let tensors of these names be in the files without a word of warning."""
    network._keys_to_ignore_on_load_unexpected |= patterns


def set_tied(network: Any, tied: Mapping[str, str]) -> None:
    """These parameters are tied, {one: to which}, and no others, whatever the class says."""
    network._tied_weights_keys = dict(tied)


def tie_again(network: Any) -> None:
    """Those parameters are tied again that the class says, if `set_tied` said otherwise."""
    if "_tied_weights_keys" in network.__dict__:
        del network._tied_weights_keys
        network.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=True)
        network.tie_weights(recompute_mapping=False)


# ---------------------------------------------------------------------------------------------------------
# transformers: what else a network knows of itself


def attention_of(config: Any) -> str | None:
    """The attention that a network runs: "sdpa", "eager", or a registered one; None where it has no choice."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def experts_of(config: Any) -> Any:
    """How a network runs its experts: what `set_experts_implementation` takes."""
    return config._experts_implementation


def can_set_experts(network: Any) -> bool:
    """Has the network experts, and a choice of how they run?"""
    return bool(getattr(network, "_can_set_experts_implementation", lambda: False)())


def name_of(config: Any) -> str:
    """Where a network was loaded from: a directory, or a name of the hub; empty where nothing says so."""
    name: str = getattr(config, "_name_or_path", "")
    return name


def forget_name(config: Any) -> None:
    """What is saved from now on says nothing of where it came from."""
    config._name_or_path = ""


@contextlib.contextmanager
def computing_on(network: Any, device: torch.device) -> Iterator[None]:
    """A network of which no block has its weights says that it is on this device: it asks itself, to bring there what
    it makes. That is a property of its class, which finds the first parameter."""
    kinds = {
        type(module) for module in network.modules() if isinstance(getattr(type(module), "device", None), property)
    }
    own = {kind: vars(kind).get("device") for kind in kinds}
    try:
        for kind in kinds:
            kind.device = property(lambda _: device)
        yield
    finally:
        for kind, before in own.items():
            if before is None:
                del kind.device
            else:
                kind.device = before


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Tables that networks make once and keep (of positions, say) are made anew inside: on the meta device they would
    be kept without numbers, and one block would make what another uses."""
    from transformers import pytorch_utils

    before = pytorch_utils.is_torchdynamo_compiling  # nothing is kept while torch traces
    pytorch_utils.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        pytorch_utils.is_torchdynamo_compiling = before


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """No chatter from a library's logger inside."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """torch.export prints half a graph to stderr where it fails: not what this thread prints inside."""
    before, own = sys.stderr, threading.get_ident()

    class Others(io.TextIOBase):
        def write(self, text: str) -> int:
            return len(text) if threading.get_ident() == own else before.write(text)

    with quiet("torch"), contextlib.redirect_stderr(Others()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def traced_here() -> Iterator[None]:
    """torch.export watches the modules that all threads call and read: inside only those of this one."""
    own = threading.get_ident()

    def call_module(tracer: Any, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != own:
            return forward(*args, **kwargs)
        return call(tracer, module, forward, args, kwargs)

    def attribute(tracer: Any, name: str, value: Any, proxies: Any) -> Any:
        return value if threading.get_ident() != own else read(tracer, name, value, proxies)

    from torch.fx.experimental.proxy_tensor import _ModuleStackTracer

    kind: Any = _ModuleStackTracer
    call, read = kind.call_module, kind.getattr
    kind.call_module, kind.getattr = call_module, attribute
    try:
        yield
    finally:
        kind.call_module, kind.getattr = call, read


def records_outputs(hook: Any) -> bool:
    """Is a module's hook the one with which transformers finds hidden states and attentions, if they are asked for? It
    stays there for good."""
    return str(getattr(hook, "__module__", "")) == "transformers.utils.output_capturing"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no chatter from transformers inside."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------
# accelerate


def forget_accelerator() -> None:
    """The device and the precision of an Accelerator are those of the first one in this process: not any more."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------------------
# torch

CONVOLUTIONS: type[nn.Module] = nn.modules.conv._ConvNd  # what Conv1d, Conv2d, Conv3d and their transposes are
BATCH_NORM: type[nn.Module] = nn.modules.batchnorm._BatchNorm  # what BatchNorm1d, 2d, 3d and the synchronized are
INSTANCE_NORM: type[nn.Module] = nn.modules.instancenorm._InstanceNorm  # which may keep statistics too
GROUPED_PRODUCT = getattr(torch, "_grouped_mm", None)  # the product by all experts at once, before it was public


def storage_of(tensor: Tensor) -> int:
    """The same for all views of a tensor, and for those on the meta device too, which have no address."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """`version_of` each, quickly. Tensors made in inference mode have none."""
    return list(map(attrgetter("_version"), tensors))


def version_of(tensor: Tensor) -> int:
    """Another number after every change in place."""
    version: int = tensor._version
    return version


OPERATOR: Any = torch._ops.OpOverload  # what graphs call: `torch.ops.aten.add.Tensor`
pytree = _pytree  # how outputs of networks are taken apart and put together


def schema_of(operator: Any) -> Any:
    """The arguments of an operator, and which of them it changes or gives back; None for other functions."""
    return getattr(operator, "_schema", None)


def composite(operator: Any) -> bool:
    """Does torch make this operator of others, so that what comes out may be what went in (`reshape`, say)?"""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


def under_transform() -> bool:
    """Is a function traced, or transformed by torch.func? Its tensors then have no memory that a kernel can read."""
    return bool(torch._C._get_tracing_state()) or torch._C._functorch.peek_interpreter_stack() is not None


COMPOSED = frozenset({nn.functional.multi_head_attention_forward})  # of torch's own calls, but seen as one


def composed(mode: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """A function of `COMPOSED`, the calls of which the mode sees, that saw the function: torch's own attention hands
    the weights of its projections to one function. It asks at its beginning whether anybody wants to see it."""
    functional: Any = nn.functional
    before = functional.has_torch_function
    functional.has_torch_function = lambda _: False
    try:
        with mode:
            return function(*args, **kwargs)
    finally:
        functional.has_torch_function = before


def has_bfloat16_products() -> bool:
    """Does this CPU multiply bfloat16 (AVX-512 BF16)?"""
    return bool(torch.cpu._is_avx512_bf16_supported())
