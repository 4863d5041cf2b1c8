"""The forward of a packed network: by a plan for inputs of that shape, else module by module as it was written."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every

from ..compat import pytree, records_outputs, under_transform, versions_of
from ..errors import first_line, say
from ..sparse.kernels import library
from ..sparse.linear import PackedModule
from ..sparse.measured import times
from .graph import capture
from .memory import memory
from .pieces import alike, joined, pieces, samples_of, size_of
from .run import Bound, Plan
from .turns import turns
from .weights import Weights, share

MOST = 1 << 12  # shapes that are remembered
KEPT = 16  # plans of one network; the one that was used longest ago goes first
PATIENCE = 4  # plans that are made at once; of the next so many each shape has to come twice, then four times, …
CLOSE = 1e-4  # of the largest output: how far a plan may be from what the modules give
CLOSE_HALF = 5e-2  # where these compute in half precision
MARGIN = 0.03  # by which a plan may be slower than the modules
SHORT = 2e-3  # seconds of a call below which it does not matter
LEAVES = (type(None), bool, int, float, str)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool, torch.uint8)


class Planned:
    """What stands in the place of a network's `forward`.

    Each call of another shape is planned when it is first made, and the plan is compared with the network's modules
    then. The modules do what a plan cannot: a network that cannot be exported, gradients, tracing and compiling, hooks
    on inner modules, other devices than the CPU.
    """

    def __init__(self, network: nn.Module):
        self.network, self.kept = network, KEPT
        self._begin()

    def _begin(self) -> None:
        self.lock = threading.Lock()
        self.seen: _Seen | None = None
        self.said: set[str] = set()
        self._forget()

    def _forget(self) -> None:
        self.plans: OrderedDict[Any, Plan | None] = OrderedDict()
        self.sizes: dict[Any, int] = {}
        self.asked: dict[Any, int] = {}  # how often shapes came for which there is no plan
        self.count = 0  # of plans that were made
        self.bound: list[_Room] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"network": self.network, "kept": self.kept}  # plans hold addresses

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.modules)

    @property
    def __code__(self) -> Any:  # which torch.export looks at
        return type(self.network).forward.__code__

    @property
    def modules(self) -> Any:
        """The forward pass, module by module."""
        return type(self.network).forward.__get__(self.network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or turns.inside:
            # not by a bound method: compiled code would look for that in `forward`
            return type(self.network).forward(self.network, *args, **kwargs)
        key = None if torch.compiler.is_compiling() else self._key(args, kwargs)
        if key is None:
            return self._by_modules(args, kwargs)
        size = self._size(key, args, kwargs)
        if size is None:
            return self._by_modules(args, kwargs)
        if size:
            made = self._in_pieces(args, kwargs, size)
            return self._by_modules(args, kwargs) if made is None else made
        plan = self._plan(key, args, kwargs)
        if plan is None:
            return self._by_modules(args, kwargs)
        return self._run(plan, args, kwargs)

    def _by_modules(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with turns.run():
            return self.modules(*args, **kwargs)

    # --- a few samples at a time

    def _size(self, key: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
        """How many samples go through a plan together; 0: all of them, which see each other or are few; None: there is
        no plan for them yet."""
        values = (*args, *kwargs.values())
        samples = samples_of(values)
        size = size_of(values, samples)
        if samples <= size:
            return 0
        if key not in self.sizes:
            if len(self.sizes) >= MOST:
                self.sizes.clear()
                self.asked.clear()
            if alike(values, samples):
                return 0  # which would come out the same if they saw each other
            made = self._in_pieces(args, kwargs, size)
            if made is None and not self._refused(args, kwargs, samples, size):
                return None
            with torch.no_grad():
                apart = made is None or _apart(made, self._by_modules(args, kwargs))
            good = not apart and self._pays(lambda: self._in_pieces(args, kwargs, size), args, kwargs)
            self.sizes[key] = size if good else 0
        return self.sizes[key]

    def _refused(self, args: Sequence[Any], kwargs: dict[str, Any], samples: int, size: int) -> bool:
        """Is it known that there is no plan for the first piece, or that outputs cannot be joined?"""
        some, named = next(iter(pieces(args, kwargs, samples, size)))
        return _about(some, named) in self.plans

    def _in_pieces(self, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
        """The outputs of all samples; None where they are not to be had in pieces."""
        outputs, samples = [], samples_of((*args, *kwargs.values()))
        for some, named in pieces(args, kwargs, samples, size):
            plan = self._plan(_about(some, named), some, named)
            if plan is None:
                return None
            outputs.append(self._run(plan, some, named))
        return joined(outputs, [min(size, samples - first) for first in range(0, samples, size)])

    # --- may it be a plan

    def _key(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a plan is made for; None where there can be none."""
        about = _about(args, kwargs)
        if about is None:
            return None
        if torch.is_autocast_enabled("cpu") or under_transform():
            return None
        if torch.is_grad_enabled() and self._differentiable((*args, *kwargs.values())):
            self._say(
                "gradients are on, and the packed network runs module by module: torch.inference_mode() runs it fast"
            )
            return None
        if self.seen is None or not self.seen.still():
            with self.lock:
                if self.seen is None or not self.seen.still():
                    self._forget()
                    self.weights = Weights(self.network)
                    self.seen = _Seen(self.network)
        return about if self.seen.plannable else None

    def _differentiable(self, values: Sequence[Any]) -> bool:
        tensors = (*self.network.parameters(), *(value for value in values if isinstance(value, Tensor)))
        return any(tensor.requires_grad for tensor in tensors)

    def _say(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            say(message)

    # --- plans

    def _plan(self, key: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Plan | None:
        try:
            plan = self.plans[key]
            self.plans.move_to_end(key)
            return plan
        except KeyError:
            pass
        with self.lock:
            if key not in self.plans:
                self.asked[key] = self.asked.get(key, 0) + 1
                if self.asked[key] < 1 << (self.count // PATIENCE):
                    return None  # shapes that hardly come again, such as lengths of sentences, are not worth it
                self.count += 1
                self.plans[key] = self._made(args, kwargs)
                while len(self.plans) > self.kept:
                    self.plans.popitem(last=False)
            return self.plans[key]

    def _made(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Plan | None:
        """A plan that gives what the modules give; None, said, where there is none."""
        name = type(self.network).__name__
        try:
            with torch.no_grad():
                self.weights.begin()
                with turns.capture():
                    graph = capture(self.network, args, kwargs)
                plan = Plan(graph, self.weights)
                self.weights.finish()
                if self.weights.flushed:
                    self._say(
                        f"{self.weights.flushed} weights and biases of {name} are too small for normal numbers of"
                        " float32, and count as zero"
                    )
                wanted = self._by_modules(args, kwargs)
                found = self._run(plan, args, kwargs)
        except Exception as error:  # whatever it is, the modules give the answer
            self._say(f"{name} runs module by module, which is slower: {first_line(error)}")
            return None
        if (wrong := _apart(found, wanted)) is not None:
            self._say(f"{name} runs module by module, which is slower: its plan {wrong}")
            return None
        return plan if self._pays(lambda: self._run(plan, args, kwargs), args, kwargs) else None

    def _pays(self, run: Callable[[], Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Is this way of a call as fast as its modules are? Dense products in half precision may be faster, where a
        processor has units for them and there are many positions."""
        ways = {"plan": run, "modules": lambda: self._by_modules(args, kwargs)}
        with torch.no_grad():
            took = times(ways)
        return took["plan"] <= max(took["modules"] * (1 + MARGIN), SHORT)

    def _run(self, plan: Plan, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        room = self._room(plan)
        try:
            with torch.no_grad():
                return room.bound(plan).run([*args, *(kwargs[key] for key in plan.keys)])
        finally:
            self.bound.append(room)

    def _room(self, plan: Plan) -> _Room:
        """Memory for one run, which nobody else uses meanwhile."""
        try:
            room = self.bound.pop()
        except IndexError:
            return _Room(plan.size)
        return room if len(room.memory) >= plan.size else _Room(plan.size)


def _about(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a plan is made for: shapes, dtypes and constants; None where there can be none."""
    about: list[Any] = [len(args), *kwargs]
    for value in (*args, *kwargs.values()):
        if type(value) is Tensor:
            if value.device.type != "cpu" or value.layout is not torch.strided or value.dtype not in DTYPES:
                return None
            if value.numel() == 0:
                return None
            about += [value.shape, value.dtype]
        elif isinstance(value, LEAVES):
            about += [type(value), value]
        else:
            return None
    return tuple(about)


class _Room:
    """Memory, and the plans that ran in it."""

    def __init__(self, size: int):
        self.memory = memory(size)
        self.plans: OrderedDict[Plan, Bound] = OrderedDict()

    def bound(self, plan: Plan) -> Bound:
        if plan not in self.plans:
            self.plans[plan] = plan.bound(self.memory)
            while len(self.plans) > KEPT:
                self.plans.popitem(last=False)
        self.plans.move_to_end(plan)
        return self.plans[plan]


class _Seen:
    """A network as it was when plans were made: its modules with all that they hold, and every tensor.

    plannable: is it all on the CPU, evaluated and not trained, without hooks on inner modules?
    """

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        config = getattr(network, "config", None)
        self.now: list[dict[str, Any]] = [vars(module) for module in modules]
        self.now += [vars(config)] if hasattr(config, "__dict__") else []
        everywhere = [vars(every)[name] for name in ("_global_forward_hooks", "_global_forward_pre_hooks")]
        self.now += everywhere
        self.then = list(map(_copied, self.now))
        tensors = [*network.parameters(), *network.buffers()]
        self.counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self.versions, self.places = versions_of(self.counted), list(map(Tensor.data_ptr, self.counted))
        hooks = [
            hook
            for module in modules[1:]
            for name in ("_forward_hooks", "_forward_pre_hooks")
            for hook in getattr(module, name).values()
        ]
        self.plannable = (
            library() is not None
            and not any(module.training for module in modules)
            and all(map(records_outputs, hooks))
            and not any(everywhere)
            and all(tensor.device.type == "cpu" for tensor in tensors)
            and not any(tensor.dtype in (torch.float64, torch.complex64, torch.complex128) for tensor in tensors)
            and any(isinstance(module, PackedModule) for module in modules)
        )

    def still(self) -> bool:
        try:
            return (
                self.now == self.then
                and versions_of(self.counted) == self.versions
                and list(map(Tensor.data_ptr, self.counted)) == self.places  # which `weight.data = …` moves
            )
        except (RuntimeError, ValueError):  # tensors that are others, compared
            return False


def _copied(about: dict[str, Any]) -> dict[str, Any]:
    """What a module holds. A dictionary of another kind, such as what was made of a weight, may change in itself."""
    return {key: value.copy() if type(value) in (dict, OrderedDict) else value for key, value in about.items()}


def _apart(found: Any, wanted: Any) -> str | None:
    """How what a plan gives differs from what the modules give; None where it does not."""
    leaves = [pytree.tree_flatten(one) for one in (found, wanted)]
    if leaves[0][1] != leaves[1][1]:
        return "puts out something else"
    for a, b in zip(leaves[0][0], leaves[1][0], strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                return f"puts out {a}, and not {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"puts out {tuple(a.shape)} in {a.dtype}, and not {tuple(b.shape)} in {b.dtype}"
        elif not b.is_floating_point():
            if not torch.equal(a, b):
                return "puts out other numbers"
        elif b.numel():
            close = CLOSE if b.dtype is torch.float32 else CLOSE_HALF
            a, b = a.float(), b.float()
            same = torch.isfinite(b)
            apart = (
                float((a - b)[same].abs().max()) / max(float(b[same].abs().max()), 1e-30) if bool(same.any()) else 0.0
            )
            if not apart <= close or not torch.equal(a[~same].isnan(), b[~same].isnan()):
                return f"is {apart:.1e} of the largest output away from its modules"
    return None


def speed_up(network: nn.Module) -> None:
    """Let a packed network run by plans on the CPU. One that writes texts runs token by token, for which it has other
    kernels; of those that read one first the encoder is planned. Raises InputError."""
    part: Any = network
    if hasattr(part, "can_generate") and part.can_generate():
        encodes = getattr(part.config, "is_encoder_decoder", False) and hasattr(part, "get_encoder")
        part = part.get_encoder() if encodes else None
    if part is None or "forward" in part.__dict__ or library() is None:
        return
    if any(isinstance(module, PackedModule) for module in part.modules()):
        share()  # what is wrong with it is said now
        part.forward = Planned(part)


def slow_down(network: nn.Module) -> None:
    """Take back what `speed_up` did."""
    for module in network.modules():
        if isinstance(module.__dict__.get("forward"), Planned):
            del module.forward  # type: ignore[method-assign]
