"""Does a network make the same of a sample each time, whatever it is run with? Tried before anything is made of it."""

from __future__ import annotations

import contextlib
import linecache
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compat import version_of
from ..errors import ModelError
from ..linalg import apart
from ..samples import Batch, Samples, on, size_of
from ..trees import tensors

TRIED = 16  # samples, each alone
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # how far outputs may be apart; 0.03 in other dtypes
_HERE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_NUMBERS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    torch.equal,
    torch.allclose,
}

Run = Callable[[Batch], Any]


def check_steady(network: nn.Module, run: Run, samples: Samples, device: torch.device) -> None:
    """Raises ModelError, with the place, for a network that draws random numbers, keeps state, makes something else of
    a sample where others are beside it, or takes another way for another sample: what is measured of one batch would
    not hold for the next. The weights must be loaded.

    Args:
        run: what the network makes of a batch.
        samples: the first of each group are tried, each alone and two together.
    """
    kind = type(network).__name__
    first = samples.groups[0]
    two = on({key: torch.cat([tensor[:2]] * 2)[:2] for key, tensor in first.items()}, device)
    held = {name: (tensor, version_of(tensor)) for name, tensor in network.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        once = _traced(network, run, two, seed=1)
        for name, (tensor, version) in held.items():
            if version_of(tensor) != version:
                raise ModelError(f"{kind} keeps state: a forward pass changes '{name}', so that the next one differs.")
        for seed in (1, 2, 2):
            again = _traced(network, run, two, seed=seed)
            if place := _difference(once, again):
                why = "keeps state from one pass to the next" if seed == 1 else "draws random numbers, or keeps state"
                raise ModelError(f"{kind} gives something else each time it is run: it {why}; first {place}.")
        alone = [on(one, device) for one in _few(samples)]
        found = [_traced(network, run, one, seed=1) for one in alone]
        for other in found[1:]:
            if place := _another_way(found[0].read, other.read):
                raise ModelError(
                    f"{kind} takes another way for another sample: its forward pass asks for a number that depends on"
                    f" the data {place}. Write it without (torch.where, say)."
                )
        for row in range(min(2, size_of(first))):
            if place := _difference(once, found[row], row):
                asked = next((f" It asks for a number {read}." for read, _ in once.read), "")
                raise ModelError(
                    f"what {kind} makes of a sample depends on the others of its batch; first {place}.{asked}"
                )


def _few(samples: Samples) -> Iterator[Batch]:
    """The first of each group, and of the first group more, each alone."""
    each = max(1, TRIED // len(samples.groups))
    for group in samples.groups[:TRIED]:
        yield from Samples((group,)).first(max(2, each)).batches(1)


class _Pass:
    """A forward pass: what each module put out, in order, and the numbers that it asked for, with their places."""

    def __init__(self) -> None:
        self.made: list[tuple[str, list[Tensor]]] = []
        self.read: list[tuple[str, Any]] = []


def _traced(network: nn.Module, run: Run, batch: Batch, seed: int) -> _Pass:
    seen = _Pass()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not any(True for _ in module.children()):  # the smallest parts say best where
                seen.made.append((f"'{name}' ({type(module).__name__})", tensors(out)))

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        torch.manual_seed(seed)
        for name, module in network.named_modules():
            stack.callback(module.register_forward_hook(note(name)).remove)
        with _Reads(tensors(list(batch.values())), seen):
            out = run(batch)
    seen.made.append(("what it puts out", tensors(out)))
    return seen


def _difference(one: _Pass, other: _Pass, row: int | None = None) -> str | None:
    """Where two passes differ first, or a sample alone and the same one as a row of a batch; None where they do not in
    what they put out."""
    if not _apart(one.made[-1][1], other.made[-1][1], row):
        return None
    if [name for name, _ in one.made] != [name for name, _ in other.made]:
        for (name, _), (another, _) in zip(one.made, other.made, strict=False):
            if name != another:
                return f"other modules are called: {name} in one pass, {another} in the other"
    return next((f"in {n}" for (n, a), (_, b) in zip(one.made, other.made, strict=False) if _apart(a, b, row)), "there")


def _apart(one: Sequence[Tensor], other: Sequence[Tensor], row: int | None) -> bool:
    if len(one) != len(other):
        return True
    for ours, theirs in zip(one, other, strict=True):
        if row is not None:
            if not ours.ndim or not theirs.ndim or len(ours) % 2 or 2 * len(theirs) != len(ours):
                continue  # not a row, or a few, a sample
            ours = ours.chunk(2)[row]
        if ours.shape != theirs.shape:
            return True
        if not ours.is_floating_point():
            if row is None and not torch.equal(ours, theirs):
                return True
        elif ours.isfinite().all() and apart(ours, theirs) > TOLERANCE.get(ours.dtype, 0.03) * _size(ours):
            return True
    return False


def _size(tensor: Tensor) -> float:
    return float(apart(tensor, torch.zeros_like(tensor))) or 1.0


def _another_way(one: Sequence[tuple[str, Any]], other: Sequence[tuple[str, Any]]) -> str | None:
    """The place of the first whole number, or yes or no, that is another one."""
    for (place, answer), (elsewhere, another) in zip(one, other, strict=False):
        if place != elsewhere or (isinstance(answer, bool | int | list) and answer != another):
            return place
    return one[len(other)][0] if len(one) > len(other) else other[len(one)][0] if len(other) > len(one) else None


class _Reads(TorchFunctionMode):
    """Notes the numbers that are asked of tensors made from a batch."""

    def __init__(self, given: Sequence[Tensor], seen: _Pass) -> None:
        super().__init__()
        self.seen = seen
        self.made = {id(tensor): tensor for tensor in given}  # with the tensors, so that no id is used twice

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(id(tensor) in self.made for tensor in tensors((args, kwargs or {}))):
            if function in _NUMBERS:
                self.seen.read.append((_place(), result))
            self.made |= {id(tensor): tensor for tensor in tensors(result)}
        return result


def _place() -> str:
    """The line of the network's own code that is running."""
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(_HERE) and Path(f.filename).is_file()]
    if not frames:
        return "somewhere"
    frame = frames[-1]
    code = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"in {Path(frame.filename).name}, line {frame.lineno} ({code})"
