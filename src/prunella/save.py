"""The output directory: written block by block, whole or not there at all.

While a run lasts everything is in `OUT.partial` (`workshop`). The weights go into a store (`store`), and a line in
the journal says that a block is on disk. At the end the model is renamed to `OUT`; what a run that resumes needs lies
beside it and goes after that.

Beside what transformers needs, the directory holds

    prunella.json    the report
    prunella.masks   of all pruned layers (`tensors.read_masks`)
    prunella.grids   of quantized layers (`tensors.read_grids`)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, disk_error
from .foreign import blamed
from .layers import Slot
from .model.checkpoint import Checkpoint, Source
from .model.files import copy_companions
from .model.network import Model
from .outcome import BlockResult, LayerResult
from .phases import phase
from .store import MakeStore, make_store
from .tensors import save_tensors, write_json, write_text
from .workshop import RUN, Workshop

REPORT = "prunella.json"
JOURNAL = "journal.jsonl"  # of a directory in the making: what is done


class Output:
    """A run's output directory in the making, in a workshop that closing or discarding it closes too.

    make:     of the store that takes the weights; None: files like the model's own
    finished: results of blocks that an earlier, interrupted run left on disk (their masks and parameters are
              in the files)
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        slots: Sequence[Slot],
        identity: Mapping[str, Any],
        shop: Workshop,
        make: MakeStore | None = None,
    ):
        self.path = path
        self.shop = shop
        self.partial = shop.directory
        self.folder = shop.model
        self.model = model
        self.finished: list[tuple[LayerResult, ...]] = []
        self.notes: dict[str, Any] = {}
        identity = json.loads(json.dumps(identity))
        make = make or make_store("dense")
        self._kind = make.func
        with self._writing():
            self.weights = make(self.folder, self.partial, model)
            if (before := begun_as(shop)) is None:
                shop.clear()
                shop.model.mkdir()
                self.weights.create(slots)
                write_text(self.partial / RUN, json.dumps(identity, indent=1))
            else:
                compare(identity, before, self.partial)
            self.weights.open()
            self._read_journal()
            self._blocks = len(self.finished)
            # Not buffered: on a full disk what a buffer holds would be written again, in vain, when it is closed.
            self._journal = (self.partial / JOURNAL).open("ab", buffering=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prunella-write")
        self._begun: Future[None] | None = None  # a block that is being written

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What fails inside fails for the disk, and raises InputError, that it is full say; the blocks before are safe.
        Or it fails for a store that is not ours, and raises StepError."""
        with blamed(self._kind, f"store '{self._kind.__name__}'"):
            try:
                yield
            except OSError as error:
                raise disk_error(error, self.partial) from None

    def _read_journal(self) -> None:
        path = self.partial / JOURNAL
        good = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                good += len(line)
                if "note" in entry:
                    self.notes[entry["note"]] = entry["value"]
                else:
                    self.finished.append(tuple(_layer_result(item) for item in entry["layers"]))
                    self.weights.restore(entry["block"], entry["weights"])
            os.truncate(path, good)  # half a line, if the run was killed while it wrote one

    def _log(self, entry: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(entry).encode() + b"\n")
        while line:
            line = line[self._journal.write(line) :]
        os.fsync(self._journal.fileno())

    def note(self, key: str, value: Any) -> None:
        """Keep a result of this run (the dense perplexity, say), so that a resumed run need not repeat it."""
        self.notes[key] = value
        self._settle()
        with self._writing():
            self._log({"note": key, "value": value})

    def put_aside(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors in a file beside the model for as long as the run lasts, for one that resumes it."""
        with self._writing():
            save_tensors(self.partial / file, {key: tensor.contiguous() for key, tensor in tensors.items()})

    @property
    def checkpoint(self) -> Source:
        """The pruned weights written so far."""
        self._settle()
        return self.weights.source

    @property
    def blocks(self) -> int:
        """How many blocks are on disk now."""
        wait([] if self._begun is None else [self._begun])
        return self._blocks

    @phase("write")
    def write(self, result: BlockResult) -> None:
        """Put one finished block on disk, whole: a run that resumes reads it from here. A thread goes on with that
        while the next block is computed; what fails there is raised by whatever comes next here."""
        self._settle()
        with self._writing():
            put = self.weights.begin(result)
        self._begun = self._thread.submit(self._put, result, put)

    def _put(self, result: BlockResult, put: Callable[[], dict[str, Any]]) -> None:
        with self._writing():
            entry = {"block": result.index, "layers": [asdict(layer) for layer in result.layers]}
            self._log({**entry, "weights": put()})
        self._blocks += 1

    def _settle(self) -> None:
        """See to it that the block that is being written is on disk. Raises what went wrong."""
        if self._begun is not None:
            self._begun.result()
            self._begun = None

    def write_outside(self, changed: Mapping[str, Tensor]) -> None:
        """Put parameters that no block holds on disk: embeddings, the head, the last norm."""
        self._settle()
        with self._writing():
            self.weights.write_outside(changed)

    @phase("write")
    def complete(self) -> None:
        """Write what no block holds: after this `checkpoint` is a whole model."""
        self._settle()
        with self._writing():
            self.weights.complete()

    @phase("write")
    def finish(self, report: Mapping[str, Any], card: str) -> None:
        """Add everything that is not weights and let the directory appear."""
        with self._writing():
            self._copy_companions()
            self.weights.finish()
            write_text(self.folder / REPORT, json.dumps(report, indent=1) + "\n")
            write_text(self.folder / "README.md", card)
        self.weights.close()
        self._journal.close()
        self.shop.appear(self.path)

    def _copy_companions(self) -> None:
        checkpoint = self.model.checkpoint
        if checkpoint is None:
            if self.model.tokenizer is not None:
                self.model.tokenizer.save_pretrained(self.folder)
            return
        copy_companions(checkpoint.directory, self.folder, but=(REPORT, RUN))
        if self.model.tokenizer_given:
            self.model.tokenizer.save_pretrained(self.folder)
        if not (self.folder / "config.json").is_file():  # whose network a function builds
            return
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.model.dtype != checkpoint.dtype() or {"quantization_config", "transformers_weights"} & config.keys():
            config.pop("quantization_config", None)
            config.pop("transformers_weights", None)  # the index says it
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.model.dtype).removeprefix("torch.")
            write_json(self.folder / "config.json", config)

    def close(self) -> None:
        """Let go of the files and of the workshop. What is on disk stays, for a run that resumes this one."""
        self._thread.shutdown()
        self.weights.close()
        self._journal.close()
        self.shop.close()

    def discard(self) -> None:
        """Remove all traces of the run."""
        self._thread.shutdown()
        self.shop.remove()


def identity(
    checkpoint: Checkpoint | None,
    recipe: Mapping[str, Any],
    windows: Sequence[Tensor],
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """What must be the same for one run to continue another. Models and texts count by what is in them and not by their
    names, which may be spelled in many ways; what is measured in the end changes nothing before."""
    calibration = {key: value for key, value in recipe["calibration"].items() if key != "source"}
    heal = {key: value for key, value in recipe["heal"].items() if key not in ("text", "dense")}
    tokens = hashlib.sha256()
    for windows_NL in windows:
        tokens.update(windows_NL.cpu().numpy().tobytes())
    said = {key: value for key, value in recipe.items() if key not in ("model", "evaluate")}
    found = {"model files": model_files(checkpoint), "dense model files": model_files(teacher)}
    said |= {"calibration": calibration, "heal": heal, "calibration tokens": tokens.hexdigest()}
    return {**said, **found, "torch": torch.__version__}


def model_files(checkpoint: Checkpoint | None) -> dict[str, list[int]] | None:
    """Sizes and times of a model's files."""
    if checkpoint is None:
        return None
    stats = {name: (checkpoint.directory / name).stat() for name in checkpoint.files}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def begun_as(shop: Workshop) -> dict[str, Any] | None:
    """What the unfinished run in a workshop is, if it has begun."""
    path = shop.directory / RUN
    if not path.is_file():
        return None
    try:
        said: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"'{path}' is damaged ({error}): delete '{shop.directory}' and begin anew.") from None
    return said


def compare(identity: Mapping[str, Any], before: Mapping[str, Any], where: Path) -> None:
    """Raises InputError, saying in what they differ, if a run is not the one that is unfinished there."""
    different = sorted(key for key in identity.keys() | before.keys() if identity.get(key) != before.get(key))
    if different:
        raise InputError(
            f"the unfinished run in '{where}' was another one: {', '.join(different)} differ. Repeat its"
            " command with --resume, or delete that directory."
        )


def _layer_result(item: Mapping[str, Any]) -> LayerResult:
    return LayerResult(**{**item, "shape": tuple(item["shape"]), "notes": tuple(item["notes"])})
