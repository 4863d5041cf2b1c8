"""Reconstruction: block by block, to what the dense model puts out there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor

from ..errors import InputError, NumericalError
from ..layers import find_layers, within
from ..model.network import Model
from ..registry import Step, register
from ..samples import Numbers, Samples
from ..steps.wanda import wanda
from ..stream import Stream
from ..train.kinds import kinds_of
from ..train.parts import Chosen, Group, Part, check_idle, make_group, pick
from ..trees import tensors
from ..types import Block
from ..waits import demand, fetch


def _known(name: str) -> str:
    make_group(name)
    return name


RATE = 1e-3  # measured with `all`, whose own rate is for the whole model at once
Aim = Literal["model", "block"]
HealingMethod = Annotated[str, AfterValidator(_known)]


@register("reconstruct", needs={"norm", "dense"})
def reconstruct(
    block: Block,
    *,
    train: tuple[HealingMethod, ...] = ("all",),
    part: Literal["block", "sub-block"] = "block",
    aim: Aim = "model",
    epochs: PositiveInt = 1,
    batch: PositiveInt = 1,
    rate: Annotated[float, Field(gt=0, lt=1)] | None = RATE,
    warmup: float = 0.1,
) -> Block:
    """Train what is left of a block until its outputs are near the dense model's, the mask held.

    AdamW on one window a step, or a few, learning rate rising over the first `warmup` of the steps and falling linearly
    to 0,

        L = ||Y - Y_dense||^2 / ||Y_dense||^2

    Y is what the block makes of the inputs that the pruned blocks before it give, Y_dense what the dense model has in
    its place, so that each block undoes some of what those before it did.

    Args:
        train: healing methods (`prunella methods`): what trains.
        part: whole blocks; or their parts one after the other (attention, MLP), each to what its own dense weights
            make of its inputs, which leaves tensors outside them (norms) as they are.
        aim: Y_dense of whole blocks: the dense model's own output (`model`), or what the dense block makes of the
            inputs that the pruned one gets (`block`).
        epochs: passes over the calibration windows.
        batch: windows in a step; of more than one, those of one shape are drawn together. A network with several inputs
            beside its hidden states takes one at a time.
        rate: learning rate of everything that trains; None: each method's own.
        warmup: share of the steps.

    The whole model is never in the optimizer. Layers without a mask get Wanda's first; layers that stay dense, and
    routers, are left as they are.

    Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023; sub-blocks: "A Free Lunch
    in LLM Compression", 2025.
    """
    groups = [make_group(name, {} if rate is None else {"rate": rate}) for name in train]
    layers = (wanda(la) if la.sparsity > 0 and la.mask_OI is None else la for la in block.layers)
    block = replace(block, layers=tuple(layers))
    return fit(block, groups, part=part, aim=aim, epochs=epochs, batch=batch, warmup=warmup)[0]


def fit(
    block: Block,
    groups: Sequence[Group],
    *,
    part: str,
    aim: Aim,
    epochs: int,
    warmup: float,
    batch: int = 1,
    new: frozenset[str] = frozenset(),
    strict: bool = False,
) -> tuple[Block, list[Tensor], int]:
    """The block with what `groups` train fitted, the loss of each step, and how many parameters trained. `strict`:
    raises InputError for a group that finds nothing to train in this block."""
    if block.run is None or block.dense is None:
        raise InputError("step 'reconstruct' runs whole blocks: use --order block.")
    active = [layer for layer in block.layers if layer.sparsity > 0]
    if not active:
        return block, [], 0
    layers = [Part(la.name, frozenset({"linear"}), la.weight_OI.contiguous(), la.mask_OI) for la in active]
    others = [
        Part(name, kinds_of(name, block.others), value, new=name in new)
        for name, value in block.others.items()
        if name not in block.fixed
    ]
    now = {**block.others, **{item.name: item.value for item in layers}}
    chosen = list(pick([*layers, *others], groups))
    if strict:
        check_idle(chosen, groups)
    losses: list[Tensor] = []
    trained = 0
    pieces = range(block.windows) if block.pieces is None else block.pieces(batch)
    if not chosen:
        pass
    elif part == "block":
        trained = _size(chosen)
        goal = block.dense if aim == "model" else _from_same_inputs(block)
        now |= _train(block, now, chosen, goal, pieces, epochs, warmup, None, losses)
    else:
        for at in sub_blocks(block):
            prefix = within(block.name, at)
            inside = [item for item in chosen if _within(item.part.name, prefix)]
            outside = {name: value for name, value in now.items() if not _within(name, prefix)}

            def dense(n: Numbers, at: str = at, outside: Mapping[str, Tensor] = outside) -> Any:
                assert block.run is not None
                with torch.no_grad():
                    return block.run(outside, n, at=at)

            trained += _size(inside)
            if inside:
                now |= _train(block, now, inside, dense, pieces, epochs, warmup, at, losses)
        if not trained and strict:
            check_idle([], groups)  # all of it lies between the sub-blocks: says so
    notes = () if trained else ("reconstruct found nothing to train in its block",)
    done = {}
    for layer in active:
        assert layer.mask_OI is not None
        done[layer.name] = layer.pruned(now[layer.name], layer.mask_OI, *notes)
    return (
        replace(
            block,
            layers=tuple(done.get(la.name, la) for la in block.layers),
            others={name: now[name] for name in block.others},
        ),
        losses,
        trained,
    )


def _from_same_inputs(block: Block) -> Callable[[Numbers], Any]:
    """What the dense block makes of the inputs that the pruned one gets."""
    assert block.run is not None
    run, weights = block.run, {layer.name: layer.dense_OI for layer in block.layers}

    def output(n: Numbers) -> Tensor:
        with torch.no_grad():
            return run(weights, n)

    return output


def _size(chosen: Sequence[Chosen]) -> int:
    return sum(parameter.numel() for item in chosen for parameter in item.change.parameters())


def sub_blocks(block: Block) -> list[str]:
    """The block's modules that hold its layers, in the order in which they are called: `self_attn`, `mlp`."""
    start = len(within(block.name, "x")) - 1
    inner = [layer.name[start:].partition(".") for layer in block.layers]
    return list(dict.fromkeys(head for head, _, _ in inner))


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _train(
    block: Block,
    now: Mapping[str, Tensor],
    chosen: Sequence[Chosen],
    target: Callable[[Numbers], Any],
    pieces: Sequence[Numbers],
    epochs: int,
    warmup: float,
    at: str | None,
    losses: list[Tensor],
) -> dict[str, Tensor]:
    """{name: value} of what trained."""
    for item in chosen:
        if item.change.apart:
            raise InputError(
                f"'{item.group.name}' is kept apart from the model: reconstruct with lora-prune or mask-lora."
            )
    assert block.run is not None
    with torch.enable_grad():
        settings = [{"params": list(item.change.parameters()), "lr": item.group.rate} for item in chosen]
        optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        steps = epochs * len(pieces)
        rise = max(1, round(warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
        )
        for step in range(steps):
            n = pieces[step % len(pieces)]
            goal = target(n)
            changed = {item.part.name: item.change(item.part.value) for item in chosen}
            out = block.run({**block.buffers, **now, **changed}, n, **({} if at is None else {"at": at}))
            loss = _error(out, goal)
            optimizer.zero_grad()
            # A mean over so many outputs sends back gradients that float16 rounds to zero: scaled, then taken back.
            half = [tensor.numel() for tensor in tensors(out) if tensor.dtype == torch.float16]
            scale = max(half) ** 0.5 if half else 1.0
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            if scale != 1.0:
                for item in chosen:
                    for parameter in item.change.parameters():
                        if parameter.grad is not None:
                            parameter.grad /= scale
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            demand(torch.isfinite(losses[-1]), partial(_diverged, chosen[0].part.name, losses[-1]))
    with torch.no_grad():
        return {item.part.name: item.change.eval()(item.part.value) for item in chosen}


def _error(out: Any, goal: Any) -> Tensor:
    """||Y - Y_dense||^2 / ||Y_dense||^2; of a network that is one block, the mean over all tensors that it puts out."""
    pairs = zip(tensors(out), tensors(goal), strict=True)
    found = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)
        for ours, theirs in pairs
        if ours.is_floating_point()
    ]
    return found[0] if len(found) == 1 else torch.stack(found).mean()


def _diverged(name: str, loss: Tensor) -> NumericalError:
    return NumericalError(
        f"reconstruction of '{name}' diverged: its loss is {loss.item()}. Use a lower"
        " learning rate (--set reconstruct.rate=… for the step, --set heal.rate=… for healing)."
    )


# ---------------------------------------------------------------------------------------------------------
# A pruned model beside its dense one


def reconstruct_blocks(
    model: Model,
    dense: Model,
    masks: Mapping[str, Tensor],
    samples: Samples,
    recipe: Any,
    out: Any,
    track: Any,
    new: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Stream the samples through the pruned model, fitting each block to the dense one; blocks that an interrupted
    run left on disk are only passed through. What happened, for the report."""
    if model.checkpoint is None or dense.checkpoint is None:
        raise InputError(
            f"'{model.name}' is opened by its task into memory as a whole: reconstruction reads weights from files,"
            " block by block. Leave --way reconstruct out, or prune it with the step reconstruct."
        )
    strange = sorted(set(model.plan()) - set(dense.checkpoint.where))
    if strange:
        raise InputError(f"'{dense.name}' is not the dense model of this one: it has no tensor '{strange[0]}'.")
    settings = recipe.heal
    groups = settings.make_groups()
    stream = Stream(model, samples, start=model.checkpoint, masks=masks)
    stream.dense = Stream(dense, samples).hidden
    if len(stream.dense) != len(stream.hidden):  # memory ran out for one of them
        raise stream.too_large()
    done = out.checkpoint if out.finished else None
    losses: dict[str, list[float]] = out.notes.get("losses", {})
    trained: dict[str, int] = out.notes.get("trained", {})
    last = len(model.blocks) - 1
    seen: list[Tensor] = []
    count = 0

    def apply(block: Block) -> Block:
        nonlocal seen, count
        options = {key: getattr(settings, key) for key in ("part", "aim", "epochs", "warmup")}
        fitted, seen, count = fit(block, groups, **options, new=new, strict=model.task.language)
        return fitted

    step = Step("reconstruct", frozenset({"dense"}), apply, per_layer=False, prunes=True, options={})
    for index, block in model.walk(dense.checkpoint, track=track, what="healing"):
        if index < len(out.finished):
            assert done is not None
            stream.skip(block, done)
            continue
        torch.manual_seed(recipe.seed + index)
        slots = [
            replace(slot, sparsity=0.0 if mask is None else 1 - mask.count_nonzero().item() / mask.numel())
            for slot in find_layers(block.module, block.name)
            for mask in [masks.get(slot.name)]
        ]
        seen, count = [], 0
        result = stream.prune(block, slots, [step], min_tokens=0, last=index == last)
        losses[block.name], trained[block.name] = [loss.item() for loss in fetch(seen)], count
        out.note("losses", losses)
        out.note("trained", trained)
        out.write(result)  # last: a block that is on disk is not done again
    if not any(trained.values()):
        check_idle([], groups)
    return {
        "trained": sum(trained.values()) / model.parameters,
        "losses": losses,
    }
