"""How fast a model runs dense and packed, on this machine, in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import quiet_transformers
from ..errors import InputError, unknown
from ..machine import threaded
from ..model.names import find_directory
from .block import settle
from .format import SPAN, check_options, pack, round_weight
from .kernels import instructions, read_bandwidth, resident
from .linear import DenseLinear, SparseLinear
from .rounded import RoundedEmbedding, TiedHead, heads, put

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _llama(*sizes: int, tied: bool) -> dict[str, Any]:
    return {"model_type": "llama", **dict(zip(_SIZES, sizes, strict=True)), "tie_word_embeddings": tied}


# Shapes to measure without weights: speed does not depend on them.
SHAPES = {
    "llama-1b": _llama(2048, 8192, 16, 32, 8, 128256, 131072, tied=True),
    "tiny": _llama(256, 512, 2, 4, 2, 1024, 2048, tied=False),
}


def bench(
    model: str | nn.Module | None = None,
    *,
    random: str | None = None,
    sparsity: float = 0.5,
    bits: int | None = None,
    group: int = SPAN,
    head: bool = False,
    prompt: int = 512,
    tokens: int = 32,
    rounds: int = 3,
    threads: int | None = None,
) -> dict[str, Any]:
    """Prefill and decode speed of a model, dense beside packed.

    Args:
        model: a pruned or packed model: a name, or a network in memory.
        random: in place of a model, random weights of this shape (`llama-1b`, `tiny`, or a directory with a
            config.json), pruned at random to `sparsity`, in bfloat16.
        bits, group, head: as for `pack_model`; a packed model is measured as it is.
        prompt: tokens of the prefill; tokens: how many are generated, one at a time.
        rounds: turns of dense and packed; the median of each counts.
        threads: for torch and the kernels; None: as torch is set.
    Returns:
        Plain data: {"dense": side, "packed": side, "speedup": {...}, "read_bandwidth": bytes a second, …}, with side
        = {"bytes", "prefill", "decode", "bandwidth"}: bytes of its weights, tokens a second, and the share of the
        measured read bandwidth that decoding reaches.
    """
    if (model is None) == (random is None):
        raise InputError("give a model or a shape for random weights (--random), one of the two.")
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity:g} is out of range: 0 up to, not including, 1.")
    if min(prompt, tokens, rounds) < 1:
        raise InputError("prompt, tokens and rounds are at least 1.")
    check_options(bits, group)
    with threaded(threads):
        dense, packed = _pair(model, random, sparsity, bits, group, head)
        result = measure({"dense": dense, "packed": packed}, prompt, tokens, rounds)
        speedup = {key: result["packed"][key] / result["dense"][key] for key in ("prefill", "decode")}
        return {
            **result,
            "speedup": speedup,
            "instructions": (instructions() or ["none"])[0],
            "threads": torch.get_num_threads(),
            "prompt": prompt,
            "tokens": tokens,
            "sparsity": _sparsity(packed),
        }


def _pair(
    model: str | nn.Module | None, random: str | None, sparsity: float, bits: int | None, group: int, head: bool
) -> tuple[nn.Module, nn.Module]:
    """The dense network and the packed one. What is not packed they share."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        if random is not None:
            network = random_network(random)
        elif isinstance(model, nn.Module):
            network = _shallow(model)
        else:
            network = AutoModelForCausalLM.from_pretrained(find_directory(str(model)), dtype="auto")
    if not any(isinstance(module, SparseLinear) for module in network.modules()):
        return network, packed_copy(network, sparsity if random is not None else None, bits, group, head)
    dense = _shallow(network)
    dense.dequantize()
    dense.set_attn_implementation("sdpa")
    return dense, network


def packed_copy(
    network: Any,
    sparsity: float | None = None,
    bits: int | None = None,
    group: int = SPAN,
    round_head: bool = False,
) -> Any:
    """A packed copy of a network, whose zeros say what is pruned, or with `sparsity` a random mask does. What is not
    packed the two share."""
    packed = _shallow(network)
    generator = torch.Generator().manual_seed(0)
    head = packed.get_output_embeddings()
    for name, module in list(packed.named_modules()):
        if type(module) is not nn.Linear:
            continue
        weight_OI = module.weight.data
        mask_OI = weight_OI != 0
        if sparsity is not None:
            mask_OI = torch.rand(weight_OI.shape, generator=generator) >= sparsity
        if module is head or bool(mask_OI.all()):
            module.__class__ = DenseLinear
        else:
            packed.set_submodule(name, SparseLinear(pack(weight_OI * mask_OI, mask_OI, bits, group), module.bias))
    if not any(isinstance(module, SparseLinear) for module in packed.modules()):
        raise InputError("nothing in the model is pruned: there is nothing to compare.")
    for name in heads(packed) if round_head else ():
        put(packed, name.removesuffix(".weight"), round_weight(packed.get_parameter(name).data, group))
    settle(packed)
    return packed


def random_network(shape: str) -> Any:
    """A network of this shape (a name in SHAPES, or a directory with a config.json), random weights, bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if (Path(shape) / "config.json").is_file():
        config = AutoConfig.from_pretrained(shape)
    elif shape in SHAPES:
        config = AutoConfig.for_model(**SHAPES[shape])
    else:
        raise InputError(unknown("shape", shape, SHAPES) + " Or give a directory with a config.json.")
    with no_init_weights():
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    network.tie_weights()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.02, generator=generator).requires_grad_(False)
    return network.eval()


def _shallow(network: Any) -> Any:
    """A copy on the CPU, with modules of its own that share all tensors that are there."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        here = tensor.detach().cpu() if tensor.device.type != "cpu" else tensor
        moved = isinstance(tensor, nn.Parameter) and here is not tensor
        memo[id(tensor)] = nn.Parameter(here, False) if moved else here
    return copy.deepcopy(network, memo)


def measure(
    networks: dict[str, Any],
    prompt: int,
    tokens: int,
    rounds: int,
    beside: dict[str, Callable[[int], None]] | None = None,
) -> dict[str, Any]:
    """Prefill and decode speed of several networks in turns, the median of `rounds` each; `beside` holds other things
    that generate so many tokens when they are called, and of which only the decode speed is known.

    Returns {name: {"bytes", "prefill", "decode", "bandwidth"} or {"decode"}, "read_bandwidth": bytes a second}.
    """
    vocabulary = min(network.config.get_text_config().vocab_size for network in networks.values())
    ids = torch.randint(3, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {}
    (memory,) = resident([torch.ones(1 << 28, dtype=torch.uint8)])  # larger than any cache
    with torch.inference_mode():
        for turn in range(rounds + 1):  # the first warms up
            # memory that lay idle may have to come back first, from wherever the system has put it
            taken = {"read": min(_time(read_bandwidth, memory) for _ in range(3))}
            for name, network in networks.items():
                taken[f"{name} prefill"] = _time(network, ids)
                cache = network(ids[:, :8], use_cache=True).past_key_values
                taken[f"{name} decode"] = _time(_generate, network, cache, ids[:, :1], tokens)
            for name, generate in (beside or {}).items():
                taken[f"{name} decode"] = _time(generate, tokens)
            if turn:
                for key, value in taken.items():
                    times.setdefault(key, []).append(value)
    median = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    bandwidth = memory.numel() / median["read"]
    result: dict[str, Any] = {"read_bandwidth": bandwidth}
    for name, network in networks.items():
        seconds = median[f"{name} decode"] / tokens
        result[name] = {
            "bytes": held_bytes(network),
            "prefill": prompt / median[f"{name} prefill"],
            "decode": 1 / seconds,
            "bandwidth": _read_bytes(network) / seconds / bandwidth,
        }
    for name in beside or {}:
        result[name] = {"decode": tokens / median[f"{name} decode"]}
    return result


def _time(run: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def _generate(network: Any, cache: Any, token: Tensor, tokens: int) -> None:
    for _ in range(tokens):
        out = network(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)


def held_bytes(network: nn.Module, but: Collection[int] = ()) -> int:
    """Bytes of the weights in memory, each once; tensors of these ids do not count."""
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in but)


def _read_bytes(network: Any) -> int:
    """Bytes of the weights that every token reads: all but the rows of an embedding."""
    skip: set[int] = set()
    head = network.get_output_embeddings()
    for module in network.modules():
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight):
            skip.add(id(module.weight))
        if isinstance(module, RoundedEmbedding) and not isinstance(head, TiedHead):
            skip |= {id(module.weight_values), id(module.weight_scales)}
    return held_bytes(network, skip)


def _sparsity(network: Any) -> float:
    kept = total = 0
    for module in network.modules():
        if isinstance(module, SparseLinear):
            kept += int(module.weight_offsets[-1])
            total += module.in_features * module.out_features
    return 1 - kept / total
