"""Any network: a torch module in memory, or one that a function in a file makes."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError, PrunellaError, first_line, say, unknown
from ..foreign import blamed
from ..machine import pick_device
from ..model.divergence import each_relative_error
from ..model.files import read_json
from ..model.network import Model
from ..model.open import DTYPES
from ..model.state import load_state
from ..model.task import NO_ANSWERS, Answers, Task
from ..packed.opening import open_network
from ..registry import import_file
from ..samples import TARGET, Batch, Samples, on, size_of
from ..sparse.checkpoint import packed_config
from ..trees import tensors
from .handed import Form, read, same
from .registry import register_task
from .scores import mean_score
from .steady import check_steady

Judge = Callable[[Any, Any], Any]  # of outputs and the batch that they were made of
NOTHING = 1e-8  # a divergence that is rounding
AT_ONCE = 16  # samples that the dense network puts out together
BESIDE = ("calibration", "evaluate", "loss", "score")  # what a factory's file may hold beside it


@register_task("module")
class Module(Task):
    """Any torch module, on batches of its own.

    In memory it is handed its batches, and what judges its outputs: `hold`. By name it is `path/to/file.py:factory`, a
    function without arguments that returns the network with its weights. Beside it the file may have the functions

        calibration()         batches for statistics
        evaluate()            batches to measure on; without it, those of the calibration
        loss(outputs, batch)  of a batch, its mean or one number a sample
        score(outputs, batch) likewise, larger is better

    or variables of these names, for batches. Without a loss, what is measured is the divergence from the dense
    network's outputs, |y - y'|^2 / |y'|^2 of each sample in each tensor that is put out, the mean over both.
    """

    source = "own"
    argument = "x"
    many = None
    figure = "loss"
    in_blocks = 0.8  # detectors have a chain here and there, and most of their weights beside them

    def __init__(self, *, factory: str = "", sha256: str = ""):
        """
        Args:
            factory: `path/to/file.py:function`; of a directory, the one in its report.
            sha256: of that file, when the network was pruned: another one is warned of.
        """
        self.factory, self.sha256 = factory, sha256
        self.form: Form | None = None
        self.held: dict[bool, Samples] = {}  # whether they are to measure on -> samples
        self.loss: Judge | None = None
        self.score: Judge | None = None
        self.dense: Callable[[], nn.Module] | None = None  # makes the dense network, of a directory that was pruned
        self._steady = False

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        return ".py:" in name or (not name and config.keys() == {"architectures"})

    # --- opening

    def open(
        self,
        name: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        tokenizer: Any = None,
        remote_code: bool = False,
        pickles: bool = False,
        packed: bool = False,
        **_: Any,
    ) -> Model:
        """A network by the name of its factory, in memory; or by a directory that was pruned from one, or a file of its
        state dict (.safetensors, .pt, .pth): then the weights are that one's, read block by block where the factory can
        build the network without any."""
        if dtype not in DTYPES and dtype != "auto":
            raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
        if tokenizer is not None:
            raise InputError("networks of task 'module' take no tokenizer.")
        stored = Path(name) if ".py:" not in name else None
        if stored is None:
            self.factory = name
        elif not stored.exists():
            raise ModelError(f"'{name}' is neither a file, nor a directory, nor path/to/file.py:factory.")
        build = self._build(name)
        self.dense = build if _from_factory(stored) else None
        if stored is not None and stored.is_dir() and not _of_own_store(stored):
            try:
                return open_network(build, stored, self, packed=packed, name=name, dtype=dtype, device=device)
            except ModelError as error:
                if packed_config(stored) is not None:
                    raise
                cause = first_line(error.__cause__ or error)
                say(f"'{name}' is read into memory as a whole: its factory does not build it without weights ({cause})")
        with blamed(build, f"factory '{self.factory}'"):
            network = build()
        if stored is not None:
            load_state(network, stored)
        if dtype != "auto":
            network.to(DTYPES[dtype])
        return self.wrap(network.to(pick_device(device)), name=name)

    def _build(self, name: str) -> Callable[[], nn.Module]:
        """What makes the network; what its file has beside the factory is taken once it has made one."""
        said = read_json(Path(name) / "prunella.json").get("recipe", {}).get("task", {}).get("module", {})
        self.factory = self.factory or said.get("factory", "")
        if not self.factory:
            raise ModelError(
                f"who builds '{name}' is not known: name its factory (--set module.factory=path/to/file.py:function)."
            )
        path, _, function = self.factory.rpartition(":")
        if not Path(path).is_file() and (Path(name) / Path(path).name).is_file():
            path = str(Path(name) / Path(path).name)  # it lies beside the weights
        if not Path(path).is_file():
            raise ModelError(
                f"'{path}', which builds '{name}', does not exist: name its factory where it is now (--set"
                " module.factory=path/to/file.py:function)."
            )
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if self.sha256 and digest != self.sha256:
            say(f"'{path}' is not the file any more with which '{name}' was pruned: its SHA-256 is another one")
        self.factory, self.sha256 = f"{Path(path).absolute()}:{function}", digest
        with _beside(Path(path)):
            found = vars(sys.modules[import_file(Path(path), "factory")])
        if not callable(found.get(function)):
            known = [key for key, value in found.items() if callable(value) and not key.startswith("_")]
            raise ModelError(unknown(f"function of '{path}'", function, known))

        def build() -> nn.Module:
            with _beside(Path(path)):
                network = found[function]()
            if not isinstance(network, nn.Module):
                raise ModelError(f"factory '{self.factory}' returned a {type(network).__name__}, no torch module.")
            if self.form is None:
                beside = {key: found[key] for key in BESIDE if key in found}
                for key in ("calibration", "evaluate"):
                    if callable(beside.get(key)):
                        with _beside(Path(path)):
                            beside[key] = beside[key]()
                self.hold(network, **beside)
            return network

        build.__module__ = found[function].__module__  # whose defects they are
        return build

    def settings(self) -> dict[str, Any]:
        return {"factory": self.factory, "sha256": self.sha256} if self.factory else {}

    def hold(
        self,
        network: nn.Module,
        calibration: Any = None,
        loss: Judge | None = None,
        score: Judge | None = None,
        evaluate: Any = None,
    ) -> None:
        """Take batches for this network (`handed.read` says in what form), and what judges its outputs: functions of
        the outputs and of the batch as it was handed over. Raises InputError."""
        self.loss, self.score = loss, score
        for test, given in enumerate((calibration, evaluate)):
            if given is None:
                continue
            self.held[bool(test)], form = read(given, network, ("calibration", "evaluate")[test])
            if self.form is not None and not same(form, self.form):
                raise InputError("the batches to evaluate on call the network in another way than the calibration's.")
            self.form = form

    def wrap(self, network: nn.Module, tokenizer: Any = None, name: str = "") -> Model:
        strange = [key for key, value in network.state_dict().items() if not isinstance(value, Tensor)]
        if strange:
            raise ModelError(f"the state of this {type(network).__name__} is more than tensors: '{strange[0]}'.")
        return super().wrap(network, tokenizer, name)

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        """Those that are held; of the calibration's of a file the first `count`."""
        if source != self.source:
            raise InputError(f"task 'module' has batches of its own, and reads no source '{source}'.")
        own = _of(model)
        if test and True not in own.held:
            say("no batches are given to evaluate on: what is measured is measured on the calibration's")
        found = own.held.get(test) or own._calibration()
        if test:
            return own._compared(model, found)
        return found.first(count) if own.factory and count is not None else found

    def _compared(self, model: Model, samples: Samples) -> Samples:
        """Samples with what the dense network puts out for them, where that is another one than the model and the
        factory makes it."""
        if self.dense is None or self.loss is not None:
            return samples
        network = self.dense().to(model.device, model.dtype).eval()
        groups = []
        with torch.no_grad():
            for group in samples.groups:
                parts = (on(batch, model.device) for batch in Samples((group,)).batches(AT_ONCE))
                wanted = torch.cat([self.target(self.run(network, part), part).cpu() for part in parts])
                groups.append({**group, TARGET: wanted})
        return Samples(tuple(groups))

    def _calibration(self) -> Samples:
        if False not in self.held:
            path = self.factory.rpartition(":")[0]
            how = f"write a function calibration() into '{path}'" if path else "give some (calibration=…)"
            raise InputError(f"there are no batches that the network is called with: {how}.")
        return self.held[False]

    def example(self, network: nn.Module) -> Batch:
        return next(iter(self._calibration()))

    def check(self, model: Model, samples: Samples) -> None:
        own = _of(model)
        if own.form is None:
            raise InputError("how the network is called is not known: give its calibration to prunella.prune as it is.")
        with model.whole() as network:
            for group in samples.groups:
                one = {key: tensor[:1].to(model.device) for key, tensor in group.items()}
                try:
                    with torch.no_grad():
                        outputs = own.run(network, one)
                except (MemoryError, torch.OutOfMemoryError, PrunellaError):
                    raise
                except Exception as error:
                    shapes = {key: tuple(tensor.shape[1:]) for key, tensor in group.items()}
                    raise InputError(
                        f"{type(network).__name__} does not take these batches, of shapes {shapes}: {first_line(error)}"
                    ) from error
                with torch.no_grad():
                    if own.lacks(one):
                        one[TARGET] = own.target(outputs, one)
                    own.losses(outputs, one)
                    own.answers(outputs, one)
            if not own._steady:
                check_steady(network, lambda batch: own.run(network, batch), samples, model.device)
                own._steady = True

    # --- what they are compared with

    def lacks(self, group: Batch) -> bool:
        return self.loss is None and TARGET not in group

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return torch.cat(flat(outputs), 1)

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        assert self.form is not None
        args, kwargs = self.form.call(batch)
        return network(*args, **kwargs, **options)

    @property
    def blind(self) -> bool:
        return self.loss is None

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        if self.loss is not None:
            return self._judged("loss", self.loss, outputs, batch)
        ours = flat(outputs)
        theirs = batch[TARGET].to(ours[0].device).split([one.shape[1] for one in ours], 1)  # type: ignore[no-untyped-call]
        found = torch.stack([each_relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]).mean(0)
        if torch.is_grad_enabled() and found.max() < NOTHING:
            raise InputError(
                "a step that reads gradients needs a loss (loss=…, or a function of this name in the factory's file):"
                " the divergence from the dense network has no gradient there."
            )
        return found

    def _judged(self, what: str, judge: Judge, outputs: Any, batch: Batch) -> Tensor:
        """One number a sample, from a function that gives these, or their mean."""
        assert self.form is not None
        with blamed(judge, f"{what} '{getattr(judge, '__name__', what)}'"):
            found = torch.as_tensor(judge(outputs, self.form.batch(batch)))
        rows = size_of(batch)
        if found.shape == (rows,):
            return found
        if found.numel() != 1:
            raise InputError(f"{what} gives {tuple(found.shape)} for {rows} samples: give their mean, or one a sample.")
        if rows == 1:
            return found.reshape(1)
        parts = [{key: tensor[row : row + 1] for key, tensor in batch.items()} for row in range(rows)]
        each = [self._judged(what, judge, _row(outputs, row, rows), part) for row, part in enumerate(parts)]
        return torch.cat(each)

    # --- what a report says

    def answers(self, outputs: Any, batch: Batch) -> Answers:
        if self.score is not None:
            return {"score": self._judged("score", self.score, outputs, batch)}
        return NO_ANSWERS

    def scores(
        self,
        model: Model,
        samples: Samples,
        losses: Sequence[float],
        answers: Answers = NO_ANSWERS,
        dense: Answers = NO_ANSWERS,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if losses and self.loss is not None:
            found = {"samples": len(losses), "loss": sum(losses) / len(losses), "losses": list(losses)}
        if losses and self.score is not None:
            each = answers["score"].double()
            return {"figure": "score", "higher": True, "samples": len(losses), **found, **mean_score("score", each)}
        if losses and self.loss is None:
            return {"figure": "divergence", "samples": len(losses), **mean_score("divergence", losses)}
        return found or {"loss": None}


def flat(outputs: Any) -> list[Tensor]:
    """The numbers that a network puts out, a sample a row, of each of its tensors: fractions, or where there are none
    whole ones. Raises ModelError where there are neither."""
    found = [tensor for tensor in tensors(outputs) if tensor.ndim]
    floating = [tensor.float() for tensor in found if tensor.is_floating_point()] or [t.float() for t in found]
    if not floating or len({len(tensor) for tensor in floating}) != 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in floating) or f"a {type(outputs).__name__}"
        raise ModelError(f"the network puts out {shapes}, no tensors with a sample a row: give a loss.")
    return [tensor.reshape(len(tensor), -1) for tensor in floating]


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """A file finds what lies beside it, as a script does."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _of(model: Model) -> Module:
    """The task that a model was opened for, which holds its batches."""
    if not isinstance(model.task, Module):
        raise InputError(f"the model is opened for task '{model.task.name}', not for 'module'.")
    return model.task


def _row(outputs: Any, row: int, rows: int) -> Any:
    """One sample of outputs, a tree of tensors with a sample a row."""
    if isinstance(outputs, Tensor):
        if not outputs.ndim or len(outputs) != rows:
            raise InputError(
                f"outputs of shape {tuple(outputs.shape)} for {rows} samples have not a sample a row: let the loss give"
                " one number a sample."
            )
        return outputs[row : row + 1]
    if isinstance(outputs, Mapping):
        return {key: _row(item, row, rows) for key, item in outputs.items()}
    if isinstance(outputs, tuple | list):
        parts = [_row(item, row, rows) for item in outputs]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    return outputs


def _from_factory(directory: Path | None) -> bool:
    """Was a directory pruned from what a factory made, at once or over others?"""
    while directory is not None:
        model = read_json(directory / "prunella.json").get("model", {})
        if ".py:" in str(model.get("name")):
            return True
        directory = Path(model["path"]) if model.get("path") else None
    return False


def _of_own_store(directory: Path) -> bool:
    recipe = read_json(directory / "prunella.json").get("recipe", {})
    return bool(recipe.get("format", "dense") not in ("dense", "packed"))
