"""The same network, with its zeros, in other engines: exported by torch.onnx, a file for each batch, in float32.

`onnxruntime` and `openvino` multiply by the zeros. `…-int8` is the network in 8 bits: encoders in ONNX Runtime with
weights rounded beforehand and activations as they come, all else with both on grids that random samples were observed
for, as pairs of QuantizeLinear and DequantizeLinear. `torch-bfloat16` is torch itself, all weights in bfloat16.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import of_transformers
from ..errors import InputError, first_line, unknown
from ..model.network import Model
from ..model.task import Task
from ..samples import Batch, in_dtype
from ..trees import tensors

Run = Callable[[], list[Any]]  # one call of a network; the tensors or arrays that it puts out

OPSET = 17
_SEEN = 4  # batches that the ranges of activations are observed on


class _Called(nn.Module):
    """A network called with tensors alone, in the order of the names, and giving its tensors alone."""

    def __init__(self, task: Task, network: nn.Module, names: Sequence[str]):
        super().__init__()
        self.task, self.network, self.names = task, network, names

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(self.task.run(self.network, dict(zip(self.names, given, strict=True)))))


@dataclass(frozen=True)
class Case:
    """A network on one batch, and files that are made of it when they are first asked for.

    model:  all of its weights are in memory
    folder: a new one, which is the caller's
    """

    model: Model
    batch: Batch
    folder: Path

    @functools.cached_property
    def feed(self) -> dict[str, Any]:
        """The batch, as the engines take it."""
        return {key: tensor.numpy() for key, tensor in in_dtype(self.batch, torch.float32).items()}

    def export(self, opset: int = OPSET) -> Path:
        """An ONNX file for this batch, traced, or where that fails, captured by torch.export."""
        path = self.folder / f"plain-{opset}.onnx"
        if path.exists():
            return path
        names: list[str] = [*self.batch]
        network: Any = copy.deepcopy(self.model.network).float()
        if of_transformers(network):
            network.set_attn_implementation("eager")  # in single steps, which every engine knows
        called = _Called(self.model.task, network, names)
        given = tuple(in_dtype(self.batch, torch.float32).values())
        with torch.no_grad(), _quiet():
            try:
                torch.onnx.export(called, given, str(path), input_names=names, opset_version=opset, dynamo=False)
            except Exception:
                path.unlink(missing_ok=True)
                torch.onnx.export(called, given, str(path), input_names=names, dynamo=True)
        return path

    @functools.cached_property
    def exported(self) -> Path:
        return self.export()

    @functools.cached_property
    def observed(self) -> Path:
        """In 8 bits: weights by output, activations on grids whose ranges were observed."""
        from onnxruntime import quantization

        path, prepared = self.folder / "observed.onnx", self.folder / "prepared.onnx"
        with _quiet():
            quantization.quant_pre_process(self.exported, prepared)
            options = {"quant_format": quantization.QuantFormat.QDQ, "per_channel": True}
            quantization.quantize_static(prepared, path, _reader([self.feed] * _SEEN), **options)
        return path

    @functools.cached_property
    def weights_rounded(self) -> Path:
        """In 8 bits: weights by output, activations by the range that each has when it comes."""
        from onnxruntime import quantization

        path, prepared = self.folder / "rounded.onnx", self.folder / "prepared.onnx"
        with _quiet():
            quantization.quant_pre_process(self.exported, prepared)
            quantization.quantize_dynamic(prepared, path, per_channel=True)
        return path

    def call(self, network: nn.Module, dtype: torch.dtype | None = None) -> Run:
        """What runs a network of torch on the batch, its fractions in this dtype, else the model's."""
        batch = in_dtype(self.batch, dtype or self.model.dtype)

        @torch.inference_mode()
        def run() -> list[Any]:
            return tensors(self.model.task.run(network, batch))

        return run

    @property
    def of_tokens(self) -> bool:
        return "input_ids" in self.batch


def _reader(batches: Iterable[Mapping[str, Any]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Any:
            return next(self.left, None)

    return Reader()


def _onnxruntime(path: Path, case: Case, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}  # an input that nothing reads is not among them
    feed = {key: value for key, value in case.feed.items() if key in taken}
    return lambda: list(session.run(None, feed))


def _openvino(path: Path, case: Case, threads: int) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # of what is not quantized
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    taken = {name for one in request.model_inputs for name in one.names}
    feed = {key: value for key, value in case.feed.items() if key in taken}
    return lambda: list(request.infer(feed, share_inputs=True).to_tuple())


def _bfloat16(case: Case, threads: int) -> Run:
    return case.call(copy.deepcopy(case.model.network).bfloat16(), torch.bfloat16)


@dataclass(frozen=True)
class Engine:
    """
    packages: what it needs, by the names that Python imports
    open:     a call of a case's network with so many threads, `open(case, threads)`
    """

    packages: tuple[str, ...]
    open: Callable[[Case, int], Run]


_ORT, _OV = ("onnxruntime", "onnx"), ("openvino", "onnx")
ENGINES: dict[str, Engine] = {
    "torch-bfloat16": Engine((), _bfloat16),
    "onnxruntime": Engine(_ORT, lambda case, threads: _onnxruntime(case.exported, case, threads)),
    "openvino": Engine(_OV, lambda case, threads: _openvino(case.exported, case, threads)),
    "onnxruntime-int8": Engine(
        _ORT,
        lambda case, threads: _onnxruntime(case.weights_rounded if case.of_tokens else case.observed, case, threads),
    ),
    "openvino-int8": Engine((*_OV, "onnxruntime"), lambda case, threads: _openvino(case.observed, case, threads)),
}


def check_engines(names: Sequence[str]) -> None:
    """Raises InputError for an engine that is not known, or not installed."""
    for name in names:
        if name not in ENGINES:
            raise InputError(unknown("engine", name, ENGINES))
        for package in ENGINES[name].packages:
            if find_spec(package) is None:
                raise InputError(
                    f"engine '{name}' needs the package {package}, which is not installed: pip install"
                    " 'prunella[engines]'."
                )


def open_engines(names: Sequence[str], case: Case, threads: int) -> tuple[dict[str, Run], dict[str, str]]:
    """What runs a case in each engine, and why some cannot: {engine: the first line of what it said}."""
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            runs[name] = ENGINES[name].open(case, threads)
            runs[name]()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            runs.pop(name, None)
            refused[name] = first_line(error)
    return runs, refused


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters and quantizers say of things that are meant."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
