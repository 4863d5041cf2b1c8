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
_INDEXED = ("index", "index_put_", "_index_put_impl_", "_unsafe_index")  # whose indices may be the CPU's
_POINTWISE = ("masked_fill_", "fill_", "index_fill_")  # as others are: a single CPU number may join in
# The host has to wait for the answer.
_WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_dim",
    "_unique2",
    "bincount",
)

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_libraries: list[torch.library.Library] = []  # what is registered lasts as long as these


@dataclass
class Traffic:
    """What happened between the host and the device.

    waits:     how often the host waited for the device, by operator
    places:    the same, by line of Prunella's sources (file:line): of what asks by way of waits.py, not that
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
        while frame.f_back is not None and not _asks_itself(frame.f_code.co_filename):
            frame = frame.f_back
        self.places[f"{frame.f_code.co_filename.rpartition('/prunella/')[2]}:{frame.f_lineno}"] += 1


def _asks_itself(file: str) -> bool:
    return "/prunella/" in file and not file.endswith("/waits.py")


_watching: list[Traffic] = []
_largest: list[int] = []


@contextlib.contextmanager
def count() -> Iterator[Traffic]:
    """Count what happens between the host and the device meanwhile."""
    traffic = Traffic()
    _watching.append(traffic)
    try:
        yield traffic
    finally:
        _watching.remove(traffic)


@contextlib.contextmanager
def largest(nbytes: int) -> Iterator[None]:
    """Memory is short meanwhile: a tensor of more bytes finds no room."""
    _largest.append(nbytes)
    try:
        yield
    finally:
        _largest.pop()


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

    class Event:
        """All work is done by then."""

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

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


def meet() -> None:
    """Let torch know of the device before any backward pass: autograd counts devices at its first one."""
    if hasattr(torch, NAME):
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Hooks(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return module.here

        def has_primary_context(self, dev_id: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    _setup_privateuseone_for_python_backend(NAME, backend_module=module, hook=Hooks())


def _install() -> None:
    aten = torch.library.Library("aten", "IMPL", "PrivateUse1")
    # Whatever the CPU has a kernel for. The rest torch makes of these.
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        space, _, full = name.partition("::")
        packet, _, overload = full.partition(".")
        if space != "aten" or packet == "resize_":
            continue
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in op._schema.returns)
        aten.impl(name, functools.partial(_look, op) if views or packet == "set_" else _Operator(op))
    aten.impl("_copy_from", _copy)
    aten.impl("resize_", _resize)
    aten.impl("convolution_overrideable", _Operator(torch.ops.aten.convolution.default))
    aten.impl("convolution_backward_overrideable", _convolution_backward)
    above = torch.library.Library("aten", "IMPL", "AutogradPrivateUse1")
    above.impl("scaled_dot_product_attention", _attention)
    _libraries.extend((aten, above))
    # Python's storages are made by an allocator in C++, which this device lacks: they are copied as tensors are.
    clone = torch.UntypedStorage.clone
    torch.UntypedStorage.clone = lambda self: _bytes(self).clone().untyped_storage() if _is_ours(self) else clone(self)
    torch.serialization.register_package(
        5,
        lambda storage: NAME if _is_ours(storage) else None,
        lambda storage, place: _bytes(storage).to(NAME).untyped_storage() if place.startswith(NAME) else None,
    )


def _relabel(tensor: Tensor, kind: int) -> Tensor:
    """The same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8).value = kind
    twin: Tensor = torch._C._from_dlpack(capsule)
    if twin.stride() != tensor.stride():  # DLPack's are 1 where there is one element
        twin = _look(torch.ops.aten.as_strided.default, twin, tensor.shape, tensor.stride(), 0)
    return twin


def _is_ours(value: Any) -> bool:
    return isinstance(value, Tensor | torch.UntypedStorage) and value.device.type == NAME


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _look(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that looks at sizes and storages alone: the CPU's kernel does not ask whose memory it is."""
    return op.redispatch(_KERNELS, *args, **kwargs)


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
    return _Operator(torch.ops.aten.convolution_backward.default)(gradient, x, weight, [outputs], *args)


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
        outs = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    else:
        plain = torch.ops.aten._scaled_dot_product_attention_math
        outs = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    out: Tensor = outs[0]
    return out


def _asks(self: Tensor, indices: Any, values: Tensor | None = None, **options: Any) -> bool:
    """How many places a mask has is asked, except to put one number into all of them."""
    masks = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
    return masks and (values is None or values.numel() != 1)


class _Operator:
    """An operator that the CPU runs on twins. (What its schema says is read once: many are small.)"""

    def __init__(self, op: Any):
        schema = op._schema
        self.op, self.name = op, schema.name.removeprefix("aten::")
        self.arguments = [(a.name, a.kwarg_only, isinstance(a.type, torch.TensorType)) for a in schema.arguments]
        self.names = [argument.name for argument in schema.arguments]
        aliases = {a.name: a.alias_info for a in schema.arguments if a.alias_info is not None}
        self.written = {name for name, alias in aliases.items() if alias.is_write}
        self.many = len(schema.returns) > 1
        # For each result the argument that it is, None where it is new.
        self.results = [
            next((n for n, alias in aliases.items() if alias.before_set == out.alias_info.before_set), None)
            if out.alias_info is not None
            else None
            for out in schema.returns
        ]
        self.waits = self.name in _WAITS
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        self.pointwise = torch.Tag.pointwise in op.tags or self.name in _POINTWISE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if self.waits or (self.name in _INDEXED and _asks(**given)):
            for traffic in _watching:
                traffic.wait(self.name)
        twins = {name: self._twin(name, value) for name, value in given.items()}
        op, plain = self.op, []
        for name, by_name, tensor in self.arguments:
            if name not in twins:
                continue
            if tensor and isinstance(twins[name], int | float):
                op = self.op.overloadpacket  # a number in a tensor's place is for another overload
            if not by_name:
                plain.append(twins.pop(name))
        outs = {name: twins[name] for name in self.written if name in twins}
        with _own_generator() if self.random else contextlib.nullcontext():
            result = op(*plain, **twins)
        for name, twin in outs.items():
            if isinstance(twin, Tensor) and twin.shape != given[name].shape:
                _replace(given[name], _relabel(twin, _OTHER))
        if not self.results:
            return None
        if not self.many:
            return self._result(self.results[0], result, given)
        return tuple(self._result(name, value, given) for name, value in zip(self.results, result, strict=True))

    def _twin(self, name: str, value: Any) -> Any:
        """What the CPU gets in place of a value."""
        if isinstance(value, Tensor):
            if value.device.type == NAME:
                if name in self.written and not value.numel():  # may be there to be resized
                    return torch.empty(value.shape, dtype=value.dtype)
                return _relabel(value, _CPU)
            if value.ndim or name in self.written or not self.pointwise:
                self._refuse(name, value)
        elif isinstance(value, list | tuple):
            if name == "indices" and self.name in _INDEXED:
                return [_relabel(item, _CPU) if _is_ours(item) else item for item in value]
            return [self._twin(name, item) for item in value]
        elif name == "device":
            if value.index:
                raise RuntimeError(f"{value}: there is one {NAME} device")
            return torch.device("cpu")
        elif name == "pin_memory":
            return None
        elif name == "generator" and value is not None:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device}'")
        return value

    def _refuse(self, name: str, value: Tensor) -> None:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got {name} is on {value.device}, different from other"
            f" tensors on {NAME}:0 (when checking argument in {self.op})"
        )

    @staticmethod
    def _result(name: str | None, value: Any, given: dict[str, Any]) -> Any:
        if name is not None:
            return given[name]
        if isinstance(value, Tensor):
            if _largest and value.nbytes > _largest[-1]:
                raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {value.nbytes} bytes.")
            return _relabel(value, _OTHER)
        if isinstance(value, list | tuple):
            return [_relabel(item, _OTHER) if isinstance(item, Tensor) else item for item in value]
        return value


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
            if not (non_blocking and dst.is_pinned()):
                traffic.wait("copy to the host")
    return dst


@contextlib.contextmanager
def _own_generator() -> Iterator[None]:
    """Random numbers are drawn from the device's own generator."""
    main = torch.get_rng_state()
    torch.set_rng_state(module.generator.get_state())
    try:
        yield
    finally:
        module.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(main)
