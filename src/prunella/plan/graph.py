"""The graph of a forward pass, captured by torch.export: torch's own operators (ATen) and ours, without changes in
place, without what does nothing, and with all that does not depend on the inputs computed."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ..compat import OPERATOR, pytree, quiet_export, schema_of, traced_here
from .attention import join_attention
from .nodes import aten, is_view, packet
from .pads import join_pads

FREE = {aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy}  # which change no value
DROPOUTS = {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout}
ASSERTIONS = {aten._assert_tensor_metadata, aten.sym_constrain_range, aten.sym_constrain_range_for_size}


class NoGraphError(Exception):
    """There is no graph of this call, for this reason."""


@dataclass
class Graph:
    """A forward pass.

    nodes:   in order, without placeholders and output
    known:   what is known of nodes and placeholders before a run: parameters, buffers and what is made of them alone
    inputs:  the placeholders of the call's arguments, in order; None for those that are no tensors
    keys:    the names of keyword arguments in that order, behind the positional ones
    outputs: what comes out, flat: nodes and constants
    pack:    how the outputs are put together
    """

    nodes: list[fx.Node]
    known: dict[fx.Node, Any]
    inputs: list[fx.Node | None]
    keys: list[str]
    outputs: list[Any]
    pack: pytree.TreeSpec


def capture(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Graph:
    """The graph of this very call. Raises NoGraphError."""
    try:
        with torch.no_grad(), quiet_export(), traced_here():
            program = torch.export.export(network, tuple(args), dict(kwargs), strict=False)
            if not _without_changes(program.graph):
                program = program.run_decompositions({})
    except Exception as error:
        raise NoGraphError(f"torch.export: {_reason(error)}") from error
    signature, graph = program.graph_signature, program.graph
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise NoGraphError("its forward pass changes its buffers or inputs")
    if any(packet(node) is aten.as_strided for node in graph.nodes):
        raise NoGraphError("its forward pass reads memory as it lies (as_strided)")
    _without_no_ops(graph)
    join_attention(graph)
    join_pads(graph)
    graph.eliminate_dead_code()
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    known: dict[fx.Node, Any] = {}
    inputs: list[fx.Node | None] = []
    for spec, node in zip(signature.input_specs, placeholders.values(), strict=True):
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node if isinstance(node.meta.get("val"), Tensor) else None)
            if inputs[-1] is None:
                known[node] = getattr(spec.arg, "value", None)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            known[node] = _tensor(network, program, str(spec.target))
        else:
            raise NoGraphError(f"it takes a {spec.kind.name.lower()}")
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = operator.attrgetter(node.target)(program.graph_module)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = graph.find_nodes(op="output")
    keys = list(program.call_spec.in_spec.children()[1].context or ())
    done = _compute(nodes, known)
    left = [node for node in nodes if node not in done]
    return Graph(left, known, inputs, keys, list(output.args[0]), program.call_spec.out_spec)


def _reason(error: BaseException) -> str:
    """The first line that says something, of what is often a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _tensor(network: nn.Module, program: torch.export.ExportedProgram, name: str) -> Tensor:
    """A parameter or buffer by its name: the network's own, no copy."""
    owner, _, key = name.rpartition(".")
    try:
        module = network.get_submodule(owner)
        found = module._parameters.get(key, module._buffers.get(key))
    except AttributeError:
        found = None
    if found is None:
        found = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(found, Tensor):
        raise NoGraphError(f"'{name}' is no tensor")
    return found.detach()


def _without_changes(graph: fx.Graph) -> bool:
    """Put `f(x)` in place of `f_(x)`, and of x in all that comes after. False where x may be known by another name."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in order:
        schema = schema_of(node.target)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        name = schema.name.removeprefix("aten::")
        plain = getattr(getattr(aten, name.removesuffix("_"), None), schema.overload_name or "default", None)
        x = node.args[0]
        if plain is None or not name.endswith("_") or not isinstance(x, fx.Node) or x.op != "call_function":
            return False
        others = [user for user in x.users if order[user] < order[node]]
        if any(map(is_view, others)) or not _alone(x):
            return False
        node.target = plain
        for user in [user for user in x.users if order[user] > order[node]]:
            user.replace_input_with(x, node)
    return True


def _alone(x: fx.Node) -> bool:
    """Is nothing else read that lies in the same memory as x?"""
    while is_view(x) or x.target is operator.getitem:
        base = x.args[0]
        if not isinstance(base, fx.Node) or base.op != "call_function" or len(base.users) > 1:
            return False
        x = base
    return True


def _without_no_ops(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        kind = packet(node)
        if kind in ASSERTIONS:
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # values may lie otherwise than they did when the graph was made
        elif kind in FREE or (kind in DROPOUTS and not node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _compute(nodes: list[fx.Node], known: dict[fx.Node, Any]) -> set[fx.Node]:
    """Compute what depends on parameters and buffers alone, and add it to `known`; returns its nodes. What is the same
    all along an axis, as masks often are, is kept once."""
    done = set()
    for node in nodes:
        target: Any = node.target
        is_operator = isinstance(target, OPERATOR)
        if not all(one in known for one in node.all_input_nodes) or not (is_operator or target is operator.getitem):
            continue
        if is_operator and (torch.Tag.nondeterministic_seeded in target.tags or target.namespace == "prunella"):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.inference_mode(False), torch.no_grad():
            made = target(*args, **kwargs)
        known[node] = pytree.tree_map_only(Tensor, _once, made)
        done.add(node)
    return done


def _once(tensor: Tensor) -> Tensor:
    """The tensor; along axes where all its entries are the same it has only one, and stride 0."""
    if tensor.is_floating_point() or tensor.numel() > 1 << 24:
        return tensor
    for axis, size in enumerate(tensor.shape):
        if size > 1 and tensor.stride(axis):
            first = tensor.narrow(axis, 0, 1)
            if bool((tensor == first).all()):
                tensor = first.expand(tensor.shape)
    return tensor
