"""An accelerator that is simulated: `sim`, a second device for torch, in plain Python.

It computes on the CPU, in memory that the CPU sees, and so its numbers are the CPU's. But torch knows it as another
device (PrivateUse1): it refuses to mix its tensors with the CPU's as a GPU does, draws from a generator of its own, has
no numpy and none of Prunella's kernels. What runs on it does not confuse devices; `count` says how often it waits for
the device and how much crosses over.

How: an operator that arrives here is run by the CPU on twins of its tensors, which are the same memory under the name
of the other device (DLPack carries the name, and it can be changed).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAME = "sim"
MEMORY = 1 << 33  # bytes that are free on it, as it says

_CPU, _OTHER = 1, 12  # DLPack's numbers for devices
_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_INDEXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")  # indices may be the CPU's
_SCALARS = ("aten::masked_fill_", "aten::fill_", "aten::index_fill_", "aten::where")  # beside all pointwise operators
# The host has to wait for the answer.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_libraries: list[torch.library.Library] = []  # what is registered lasts as long as these


@dataclass
class Traffic:
    """What happened between the host and the device.

    waits:     how often the host waited for the device, by operator
    places:    the same, by line of Prunella's sources (file:line)
    to_device: bytes copied there
    to_host:   bytes copied back
    """

    waits: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    to_device: int = 0
    to_host: int = 0

    def wait(self, name: str) -> None:
        self.waits[name] += 1
        frame = sys._getframe(1)
        while frame.f_back is not None and "/prunella/" not in frame.f_code.co_filename:
            frame = frame.f_back
        self.places[f"{frame.f_code.co_filename.rpartition('/prunella/')[2]}:{frame.f_lineno}"] += 1


_watching: list[Traffic] = []


@contextlib.contextmanager
def count() -> Iterator[Traffic]:
    """Count what happens between the host and the device meanwhile."""
    traffic = Traffic()
    _watching.append(traffic)
    try:
        yield traffic
    finally:
        _watching.remove(traffic)


class _Module:
    """`torch.sim`, what torch asks of a device's module."""

    def __init__(self) -> None:
        self.here = False
        self.generator = torch.Generator()

    def is_available(self) -> bool:
        return self.here

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(self.here)

    def current_device(self) -> int:
        return 0

    def device(self, index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None:
        for traffic in _watching:
            traffic.wait("synchronize")

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY, MEMORY

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


module = _Module()


@contextlib.contextmanager
def plugged_in() -> Iterator[torch.device]:
    """The device, there for as long as the context lasts. (Torch never forgets one that it has met, but code that
    looks for an accelerator finds none afterwards.)"""
    if not _libraries:
        _install()
    module.here = True
    try:
        yield torch.device(NAME, 0)
    finally:
        module.here = False


def _install() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return module.here

        def has_primary_context(self, dev_id: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    _setup_privateuseone_for_python_backend(NAME, backend_module=module, hook=Hooks())
    aten = torch.library.Library("aten", "IMPL", "PrivateUse1")
    # Whatever the CPU has a kernel for. The rest torch makes of these.
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        space, _, full = name.partition("::")
        packet, _, overload = full.partition(".")
        if space != "aten" or packet == "resize_":
            continue
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in op._schema.returns)
        aten.impl(name, functools.partial(_look if views or packet == "set_" else _run, op))
    aten.impl("_copy_from", _copy)
    aten.impl("resize_", _resize)
    aten.impl("convolution_overrideable", functools.partial(_run, torch.ops.aten.convolution.default))
    aten.impl("convolution_backward_overrideable", _convolution_backward)
    above = torch.library.Library("aten", "IMPL", "AutogradPrivateUse1")
    above.impl("scaled_dot_product_attention", _attention)
    _libraries.extend((aten, above))


def _relabel(tensor: Tensor, kind: int) -> Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8).value = kind
    twin: Tensor = torch._C._from_dlpack(capsule)
    if twin.stride() != tensor.stride():  # DLPack's are 1 where there is one element
        twin = _look(torch.ops.aten.as_strided.default, twin, tensor.shape, tensor.stride(), 0)
    return twin


def _is_ours(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _resize(self: Tensor, size: list[int], *, memory_format: Any = None) -> Tensor:
    fresh = torch.empty(size, dtype=self.dtype, device=NAME, memory_format=memory_format or torch.contiguous_format)
    flat = min(self.numel(), fresh.numel())
    if flat:
        fresh.flatten()[:flat] = self.flatten()[:flat]
    _replace(self, fresh)
    return self


def _replace(tensor: Tensor, other: Tensor) -> None:
    """Let a tensor be what another is."""
    _look(torch.ops.aten.set_.source_Tensor, tensor, other)


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    transposed, groups = args[3], args[5]
    outputs = weight.shape[1] * groups if transposed else len(weight)
    return _run(torch.ops.aten.convolution_backward.default, gradient, x, weight, [outputs], *args)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's choice between its ways of attention is closed to devices in Python: choose what the CPU would."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype, device=NAME), -torch.inf)
    given: tuple[Any, ...] = (query, key, value, attn_mask)
    with torch.no_grad():
        twins = [None if t is None else _relabel(t.detach(), _CPU) for t in given]
        for twin, tensor in zip(twins, given, strict=True):
            if tensor is not None and tensor.requires_grad:
                twin.requires_grad_()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        choice = torch._fused_sdp_choice(*twins, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out
    plain = torch.ops.aten._scaled_dot_product_attention_math
    out = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return out


def _look(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that looks at sizes and storages alone: the CPU's kernel does not ask whose memory it is."""
    return op.redispatch(_KERNELS, *args, **kwargs)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator with a tensor of ours, or that is to make one."""
    schema = op._schema
    name, given = schema.name, dict(kwargs)
    for argument, value in zip(schema.arguments, args, strict=False):
        given[argument.name] = value
    _check(op, given)
    short = name.removeprefix("aten::")
    if short in _WAITS:
        for traffic in _watching:
            traffic.wait(short)
    written: dict[str, Tensor] = {}
    twins = {}
    for argument in schema.arguments:
        if argument.name not in given:
            continue
        value = given[argument.name]
        if argument.name == "device":
            value = torch.device("cpu")
        elif argument.name == "pin_memory":
            value = None
        elif isinstance(value, list | tuple):
            value = [_relabel(item, _CPU) if _is_ours(item) else item for item in value]
        elif _is_ours(value):
            value = _relabel(value, _CPU)
            if argument.alias_info is not None and argument.alias_info.is_write:
                if not given[argument.name].numel():  # may be there to be resized
                    value = torch.empty(value.shape, dtype=value.dtype)
                written[argument.name] = value
        twins[argument.name] = value
    # A number in a tensor's place is a Python number by now, which few operators take there: their other overloads do.
    number = any(isinstance(a.type, torch.TensorType) and isinstance(twins.get(a.name), int | float) for a in schema.arguments)
    plain = [twins.pop(a.name) for a in schema.arguments if not a.kwarg_only and a.name in twins]
    with _generator(op):
        result = (op.overloadpacket if number else op)(*plain, **twins)
    for key, twin in written.items():
        if twin.shape != given[key].shape:
            _replace(given[key], _relabel(twin, _OTHER))
    results = result if len(schema.returns) > 1 else (result,)
    out = tuple(
        _returned(op, declared, value, given) for declared, value in zip(schema.returns, results, strict=False)
    )
    return out if len(schema.returns) > 1 else out[0] if out else None


def _returned(op: Any, declared: Any, value: Any, given: dict[str, Any]) -> Any:
    alias = declared.alias_info
    if alias is None:
        if isinstance(value, Tensor):
            return _relabel(value, _OTHER)
        if isinstance(value, list | tuple):
            return [_relabel(item, _OTHER) if isinstance(item, Tensor) else item for item in value]
        return value
    for argument in op._schema.arguments:
        same = argument.alias_info is not None and argument.alias_info.before_set == alias.before_set
        if same and alias.is_write:
            return given[argument.name]
    raise AssertionError(f"{op} returns what it was not given")


def _copy(self: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    """From `self`: here, there or across."""
    across = self.device != dst.device
    source = _relabel(self, _CPU) if _is_ours(self) else self
    target = _relabel(dst, _CPU) if _is_ours(dst) else dst
    target.copy_(source)
    for traffic in _watching if across else ():
        if _is_ours(dst):
            traffic.to_device += source.nbytes
        else:
            traffic.to_host += source.nbytes
            traffic.wait("copy to the host")
    return dst


def _check(op: Any, given: dict[str, Any]) -> None:
    """What a GPU refuses. Raises RuntimeError."""
    name = op._schema.name
    lone = name in _SCALARS or torch.Tag.pointwise in op.tags
    for argument in op._schema.arguments:
        value = given.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for item in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(item, Tensor) or _is_ours(item):
                continue
            if argument.name == "indices" and name in _INDEXED:
                continue
            if item.ndim or written or not lone:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but got {argument.name} is on {item.device},"
                    f" different from other tensors on {NAME}:0 (when checking argument in {op})"
                )
    generator = given.get("generator")
    if generator is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device}'")


@contextlib.contextmanager
def _generator(op: Any) -> Iterator[None]:
    """Random numbers are drawn from the device's own generator."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    main = torch.get_rng_state()
    torch.set_rng_state(module.generator.get_state())
    try:
        yield
    finally:
        module.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(main)
