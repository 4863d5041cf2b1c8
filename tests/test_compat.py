"""What other libraries do not promise to keep, name by name.

A test that fails here says what is gone, where Prunella uses it and what for. Then: read that library's new code, mend
the function in src/prunella/compat.py (or the place that is named), run `make test`, and raise the versions in
pyproject.toml."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from prunella import compat

ROOT = Path(__file__).parent.parent

# name, the parameters that it is given, where it is used (a function of compat.py, or a file), what for
CALLED = [
    (
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "model",
        "weight_mapping",
        "how the files of an architecture are read",
    ),
    (
        "transformers.core_model_loading.rename_source_key",
        "source_key weight_renamings weight_converters base_model_prefix meta_state_dict",
        "rename",
        "which parameter a tensor in the files belongs to",
    ),
    (
        "transformers.core_model_loading.convert_and_load_state_dict_in_model",
        "model state_dict load_config",
        "fill",
        "to read the weights of one block",
    ),
    (
        "transformers.core_model_loading.revert_weight_conversion",
        "model state_dict",
        "revert",
        "to write weights as the architecture's files hold them",
    ),
    (
        "transformers.modeling_utils.LoadStateDictConfig",
        "dtype dtype_plan device_map weight_mapping",
        "fill",
        "how weights are read",
    ),
    ("transformers.PreTrainedModel._get_dtype_plan", "self dtype", "fill", "what stays in float32"),
    ("transformers.core_model_loading.WeightConverter", "", "converts", "parameters made of several tensors"),
    ("transformers.core_model_loading.WeightRenaming", "", "renames", "tensors of other names"),
    (
        "transformers.core_model_loading.WeightTransform.copy",
        "self source_patterns target_patterns",
        "with_patterns",
        "packed tensors, which are left alone",
    ),
    (
        "transformers.PreTrainedModel.get_expanded_tied_weights_keys",
        "self all_submodels",
        "tie_again",
        "a packed model made plain",
    ),
    (
        "transformers.PreTrainedModel.tie_weights",
        "self recompute_mapping",
        "tie_again",
        "a packed model made plain",
    ),
    (
        "transformers.PreTrainedModel._can_set_experts_implementation",
        "",
        "can_set_experts",
        "one product per expert",
    ),
    (
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        "module query key value attention_mask dropout scaling is_causal",
        "fast.py",
        "torch's attention, where there is no kernel",
    ),
    ("transformers.masking_utils.sdpa_mask", "", "fast.py", "the masks that our attention is given"),
    ("transformers.initialization.no_init_weights", "", "sparse/bench.py", "random networks, fast"),
    ("transformers.cache_utils.DynamicLayer", "", "sparse/cache.py", "keys and values of the tokens before"),
    ("transformers.pytorch_utils.Conv1D", "nf nx", "packed/quantizer.py", "GPT-2's layers, made plain"),
    (
        "accelerate.state.AcceleratorState._reset_state",
        "reset_partial_state",
        "forget_accelerator",
        "a training in another precision, or on another device, than the one before it",
    ),
    ("torch.cpu._is_avx512_bf16_supported", "", "has_bfloat16_products", "whether healing runs in bfloat16"),
    ("torch._C._dispatch_has_kernel_for_dispatch_key", "", "composite", "operators that may give back what they got"),
    ("torch._ops.OpOverload", "", "OPERATOR", "the nodes of an exported graph"),
    ("torch.utils._pytree.tree_flatten", "", "pytree", "outputs taken apart"),
    ("torch.utils._pytree.tree_unflatten", "", "pytree", "outputs put together"),
    (
        "transformers.utils.output_capturing.install_output_capuring_hook",
        "",
        "records_outputs",
        "hooks that stay on modules after hidden states were asked for",
    ),
    (
        "torch.fx.experimental.proxy_tensor._ModuleStackTracer.call_module",
        "self m forward args kwargs",
        "traced_here",
        "threads that call modules while another one exports",
    ),
    (
        "torch.fx.experimental.proxy_tensor._ModuleStackTracer.getattr",
        "",
        "traced_here",
        "the same, of what modules hold",
    ),
    ("torch._C._get_tracing_state", "", "under_transform", "no kernels while torch traces"),
    ("torch._C._functorch.peek_interpreter_stack", "", "under_transform", "no kernels under torch.func"),
]

# class, method, the parameters that ours takes, the file that overrides it, what for
OVERRIDDEN = [
    (
        "transformers.quantizers.base.HfQuantizer",
        "_process_model_before_weight_loading",
        "self model kwargs",
        "packed/quantizer.py",
        "packed modules take the place of plain ones",
    ),
    (
        "transformers.quantizers.base.HfQuantizer",
        "_process_model_after_weight_loading",
        "self model kwargs",
        "packed/quantizer.py",
        "packed modules are checked",
    ),
    (
        "transformers.quantizers.base.HfQuantizer",
        "_dequantize",
        "self model dtype",
        "packed/quantizer.py",
        "a packed model made plain",
    ),
    (
        "transformers.quantizers.base.HfQuantizer",
        "update_weight_conversions",
        "self weight_conversions model",
        "packed/quantizer.py",
        "packed tensors, which are left alone",
    ),
    ("torch.nn.Module", "_apply", "self fn recurse", "sparse/linear.py", "packed values that are no parameters"),
]


def find(name: str) -> Any:
    """What a dotted name stands for; None if there is no such thing."""
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    for at, key in enumerate(rest, 2):
        if hasattr(found, key):
            found = getattr(found, key)
            continue
        try:  # transformers' own package does not know all of its modules
            found = importlib.import_module(".".join(name.split(".")[:at]))
        except ImportError:
            return None
    return found


def parameters_of(thing: Any) -> set[str] | None:
    """The names of its parameters, or None where a function in C does not say."""
    if is_dataclass(thing):
        return {field.name for field in fields(thing)}
    try:
        return set(inspect.signature(thing).parameters)
    except ValueError:
        return None


def check(name: str, wanted: str, where: str, why: str) -> None:
    place = f"src/prunella/{where}" if where.endswith(".py") else f"prunella.compat.{where}"
    mend = f"{place} needs it ({why}): mend that, then raise the versions in pyproject.toml"
    found = find(name)
    assert found is not None, f"{name} is gone. {mend}"
    known = parameters_of(found)
    missing = set(wanted.split()) - (known if known is not None else set())
    assert known is None or not missing, f"{name} does not take {', '.join(sorted(missing))} any more. {mend}"


@pytest.mark.parametrize(("name", "wanted", "where", "why"), CALLED, ids=[entry[0] for entry in CALLED])
def test_what_is_called_is_there_and_takes_what_it_is_given(name: str, wanted: str, where: str, why: str) -> None:
    check(name, wanted, where, why)
    assert where.endswith(".py") or hasattr(compat, where)


@pytest.mark.parametrize(
    ("owner", "method", "wanted", "where", "why"), OVERRIDDEN, ids=[f"{entry[0]}.{entry[1]}" for entry in OVERRIDDEN]
)
def test_what_is_overridden_is_called_as_ours_is(owner: str, method: str, wanted: str, where: str, why: str) -> None:
    check(f"{owner}.{method}", wanted, where, why)
    known = parameters_of(find(f"{owner}.{method}")) or set()
    extra = known - set(wanted.split())
    assert not extra, f"{owner}.{method} takes {', '.join(sorted(extra))} now: so must ours in src/prunella/{where}"
    assert f"def {method}(" in (ROOT / "src/prunella" / where).read_text(encoding="utf-8")


def test_overridden_methods_of_lm_eval_are_there() -> None:
    models = pytest.importorskip("lm_eval.models.huggingface")
    for method in ("_model_call", "_model_generate"):
        assert hasattr(models.HFLM, method), f"HFLM.{method} is gone: src/prunella/harness.py overrides it"


def test_networks_and_configs_have_what_is_read() -> None:
    network = tiny.build()
    assert compat.attention_of(network.config) == "sdpa"
    assert isinstance(compat.name_of(network.config), str)
    compat.forget_name(network.config)
    assert compat.name_of(network.config) == ""
    for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected", "_tied_weights_keys"):
        assert hasattr(network, name), f"PreTrainedModel.{name} is gone: mend src/prunella/compat.py"
    assert isinstance(network.all_tied_weights_keys, dict), "PreTrainedModel.all_tied_weights_keys is another thing"
    assert compat.can_set_experts(network) is False
    assert isinstance(compat.may_be_missing(network), list | tuple | set)


def test_experts_have_a_way_to_run() -> None:
    network = tiny.build("mixtral")
    assert compat.can_set_experts(network)
    assert compat.experts_of(network.config) is not None
    renamings, converters = compat.conversions(network)
    assert converters, "a mixture's parameters are no longer put together of its experts' tensors"
    assert all(map(compat.renames, renamings))
    changed = compat.with_patterns(converters[0], lambda patterns: [f"{pattern}$" for pattern in patterns])
    assert compat.converts(changed, exactly=True)
    assert all(pattern.endswith("$") for pattern in changed._original_source_patterns)


def test_parameters_are_read_from_slices_and_written_back() -> None:
    network = tiny.build("mixtral")
    stored = compat.revert(network, network.state_dict())
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.nn.init.zeros_(network.get_input_embeddings().weight)
    info = compat.fill(network, stored, torch.float32, torch.device("cpu"))
    assert not info.mismatched_keys
    assert not info.conversion_errors
    assert all(torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items())
    assert network._weight_conversions, "what `fill` converted is no longer kept: `revert` needs it"


def test_a_table_that_files_do_not_hold_is_made_as_the_network_makes_it() -> None:
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 8))}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = transformers.MarianConfig(
        vocab_size=9, d_model=8, max_position_embeddings=6, pad_token_id=0, **sides, **heads
    )
    network = transformers.MarianMTModel(config)
    name = "model.encoder.embed_positions.weight"
    assert any(re.search(pattern, name) for pattern in compat.may_be_missing(network))
    expected, owner = network.get_parameter(name).clone(), network.model.encoder.embed_positions
    owner.weight = torch.nn.Parameter(expected.to("meta"), requires_grad=False)
    assert compat.make_missing(network, name, torch.float32, torch.device("cpu"))
    assert torch.equal(owner.weight, expected), "PreTrainedModel._init_weights makes another table than the class does"
    assert not compat.make_missing(network, "model.shared.weight", torch.float32, torch.device("cpu"))
    drawn = "model.encoder.layers.0.fc1.weight"
    network._keys_to_ignore_on_load_missing = {*compat.may_be_missing(network), drawn}
    assert not compat.make_missing(network, drawn, torch.float32, torch.device("cpu"))  # other numbers each time


def test_a_network_without_weights_says_where_it_is_computed() -> None:
    network = tiny.build().to("meta")
    assert network.device.type == "meta"
    with compat.computing_on(network, torch.device("cpu")):
        assert network.device.type == network.model.device.type == "cpu", (
            "PreTrainedModel.device is no property any more"
        )
    assert network.device.type == "meta"


def test_tables_that_networks_keep_are_made_anew_when_asked() -> None:
    config = transformers.BeitConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.use_relative_position_bias = True
    (bias,) = (m for m in transformers.BeitModel(config).modules() if type(m).__name__ == "BeitRelativePositionBias")
    table = bias.generate_relative_position_index((4, 4))
    with compat.uncached():
        again = bias.generate_relative_position_index((4, 4))
    assert again is not table, "transformers.pytorch_utils.is_torchdynamo_compiling no longer turns its caches off"
    assert torch.equal(again, table)
    assert bias.generate_relative_position_index((4, 4)) is table


def test_torchs_attention_is_seen_as_the_products_that_it_makes() -> None:
    seen = []

    class Seeing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in compat.COMPOSED:
                return compat.composed(self, function, args, kwargs or {})
            seen.append(function)
            return function(*args, **(kwargs or {}))

    attention, x = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    expected = attention(x, x, x, need_weights=False)[0]
    with torch.no_grad(), Seeing():
        found = attention(x, x, x, need_weights=False)[0]
    assert seen.count(torch.nn.functional.linear) == 2, "multi_head_attention_forward no longer asks has_torch_function"
    torch.testing.assert_close(found, expected)


def test_tensors_of_torch_say_where_they_lie_and_when_they_changed() -> None:
    tensor = torch.zeros(2, 2, device="meta")
    assert compat.storage_of(tensor) == compat.storage_of(tensor[0]) != compat.storage_of(torch.zeros(1, device="meta"))
    real, before = torch.zeros(1), compat.version_of(torch.zeros(1))
    assert compat.version_of(real.add_(1)) > before
    assert issubclass(torch.nn.Conv2d, compat.CONVOLUTIONS)
    assert issubclass(torch.nn.SyncBatchNorm, compat.BATCH_NORM)
    assert issubclass(torch.nn.InstanceNorm1d, compat.INSTANCE_NORM)
    assert not issubclass(torch.nn.InstanceNorm1d, compat.BATCH_NORM)
    seen = []
    torch.func.vmap(lambda x: seen.append(compat.under_transform()) or x)(torch.zeros(2))
    assert seen == [True]
    assert not compat.under_transform()


def test_modules_of_torch_keep_their_tensors_and_hooks_in_dictionaries() -> None:
    """model/network.py, sparse/placed.py and train/parts.py exchange parameters there."""
    module = torch.nn.Linear(1, 1)
    for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        assert isinstance(vars(module)[name], dict), name
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        assert isinstance(vars(torch.nn.modules.module)[name], dict), name
    before = torch.utils.hooks.RemovableHandle.next_id
    module.register_forward_hook(lambda *_: None).remove()
    assert torch.utils.hooks.RemovableHandle.next_id == before + 1


def private_imports(path: Path) -> Iterator[str]:
    """What a file takes from the private modules of transformers, or names of torch that begin with an underscore."""
    text = path.read_text(encoding="utf-8")
    yield from re.findall(r"from transformers\.(?:core_model_loading|conversion_mapping) import .*", text)
    yield from re.findall(r"\btorch(?:\.\w+)*\._[a-z]\w*", text)
    yield from re.findall(r"\b(?:network|model|config|arguments)\._(?!_)[a-z]\w*", text)


def test_only_one_file_knows_what_is_private() -> None:
    files = [path for path in (ROOT / "src/prunella").rglob("*.py") if path.name != "compat.py"]
    found = {str(path.relative_to(ROOT)): names for path in files if (names := list(private_imports(path)))}
    assert not found, f"put these into src/prunella/compat.py, each with a line that says what for: {found}"


def test_the_minor_version_of_transformers_is_pinned() -> None:
    """None of the names above is promised to be there in the next."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    low, high = re.findall(r'"transformers>=(\d+\.\d+),<(\d+\.\d+)"', text)[0]
    major, minor = map(int, low.split("."))
    assert high == f"{major}.{minor + 1}"
    assert transformers.__version__.startswith(f"{low}."), f"these tests ran with {transformers.__version__}"
