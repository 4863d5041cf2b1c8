"""Sharding (FSDP): each process keeps its share of every weight and of what trains, and sees one block whole at a time.

Accelerate's own preparation is for plain modules on accelerators: a tensor that training makes of others, shared by
head and embeddings, is not in its plans. So the blocks are sharded here, by torch's `fully_shard`, as they are loaded;
the loop takes such a network as it is. It works on CPUs as on GPUs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import InputError
from ..model.network import Model
from .parts import Chosen, Group, attach, check_idle, parts_of, pick

ASKED = "ACCELERATE_USE_FSDP"  # `accelerate launch --use_fsdp` sets it
OFFLOAD = "FSDP_OFFLOAD_PARAMS"


@contextlib.contextmanager
def asked() -> Iterator[bool]:
    """Was FSDP asked for? Accelerate does not hear of it meanwhile: it would shard a second time.

    Raises InputError where it was asked for with weights that wait on the CPU.
    """
    said = {key: os.environ.get(key, "") for key in (ASKED, OFFLOAD)}
    wanted, offload = (value.lower() in ("1", "true") for value in said.values())
    if wanted and offload:
        raise InputError(
            f"{OFFLOAD} is set, but healing keeps what it shards on the GPUs: set fsdp_offload_params to false. A model"
            " that does not fit there is healed block by block with --way reconstruct."
        )
    hidden = os.environ.pop(ASKED, None)
    try:
        yield wanted
    finally:
        if hidden is not None:
            os.environ[ASKED] = hidden


def shard(
    model: Model,
    groups: Sequence[Group] = (),
    masks: Mapping[str, Tensor] | None = None,
    new: Iterable[str] = (),
) -> list[Chosen]:
    """Load a model and choose and attach what trains, all of it in shares: one block is whole at a time, and what lies
    outside the blocks. The masks are held as bits, in every process.

    What is drawn at random is what one process would draw. Nothing undoes it: the model is for training and running.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network, masks = model.network, masks or {}
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    names = [name for name, _ in network.named_parameters()]
    chosen: list[Chosen] = []
    outside: list[Chosen] = []
    model.load(lambda name: model.block_of(name) is None)
    for block, run in itertools.groupby(names, model.block_of):
        here = set(run)
        if block is not None:
            model.load(here.__contains__)
        found = list(pick(parts_of(model, masks, new, here) if groups else (), groups))
        if block is not None:
            attach(found)
            fully_shard(model.module(block), mesh=mesh)
        else:
            outside += found
        for item in found:
            item.change.pack_mask()
            bare = replace(item.part, value=item.part.value.to("meta"), mask=None)  # or it would keep all of it alive
            chosen.append(replace(item, part=bare))
    check_idle(chosen, groups)
    attach(outside)  # not before: blocks would ask for the head, which is made each time
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    return chosen


def is_sharded(network: nn.Module) -> bool:
    """Did `shard` load it?"""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process has to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if another of its shape is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors in host memory, in the processes that `keep` them; every process has to ask."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value.to("cpu", copy=True)
    return found


def scatter(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Write whole tensors into tensors that may be sharded."""
    for name, tensor in into.items():
        tensor.copy_(share(values[name], tensor))


def share_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of sharded parameters save whole tensors and load its share of them, so that a run can go on
    with another number of processes; every process has to ask for its `state_dict`, and the first one gets it."""

    def gathered(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        first = dist.get_rank() == 0
        return {**state, "state": {n: gather(values, keep=first) for n, values in state["state"].items()}}

    def shared(self: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        mine = {
            n: {key: share(v, parameters[n]) if v.shape == parameters[n].shape else v for key, v in values.items()}
            for n, values in state["state"].items()
        }
        return {**state, "state": mine}

    optimizer.register_state_dict_post_hook(gathered)
    optimizer.register_load_state_dict_pre_hook(shared)
