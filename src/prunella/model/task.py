"""What a network is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..compat import quiet_transformers
from ..errors import InputError, ModelError, first_line
from ..foreign import blamed
from ..overlap import fingerprint_of
from ..samples import TARGET, given, on
from .divergence import relative_error
from .files import SINGLE
from .open import wrap

if TYPE_CHECKING:
    from ..samples import Batch, Samples
    from .checkpoint import Source
    from .network import Model


Answers = Mapping[str, Tensor]  # what a network answers on samples, {what: (N, …)}, a sample a row
NO_ANSWERS: Answers = MappingProxyType({})


class Counts(NamedTuple):
    """Numbers of samples."""

    calibration: int
    evaluate: int


class Task(ABC):
    """What a network is for: how it is opened, what it is run on, and how good what it puts out is.

    Everything else (blocks, statistics, steps, stores) is the same for all tasks. `samples` and `losses` are what a
    task has to say; a network that is handed over in memory needs no more.

    name:     what users call it
    source:   where its samples come from if nobody says so
    follows:  does it measure, if nobody says on what, on what is left of the source that it calibrates on?
    argument: what the network calls samples that are handed over as one tensor
    counts:   how many samples it calibrates and evaluates on if nobody says how many
    figure:   that of `scores` which says how good it is
    higher:   is more of it better?
    unit:     how it is shown: `%` of a share, or nothing
    many:     samples of a source that `prunella eval` takes if nobody says how many; None: all
    language: networks are causal language models of transformers, of which more is known than of others
    in_blocks: share of the weights in matrices, no embeddings, that a network's blocks hold at least; where they would
              hold less, and the rest stay dense, the whole network is one block
    training: what a recipe's `heal` says of samples if nobody says so: `batch`, `micro`, `held_out`
    labels:   the tensors among samples that say what is right, and not what is looked at
    """

    name = ""
    source = ""
    follows = False
    argument = "input_ids"
    figure = "loss"
    counts = Counts(32, 8)
    higher = False
    unit = ""
    many: int | None = 256
    language = False
    in_blocks = 0.5
    training: ClassVar[Mapping[str, Any]] = {"batch": 32, "micro": 32}
    labels: ClassVar[Collection[str]] = ("labels", "label")

    # --- opening and saving

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        """Is a model of this name, or with this config.json, for this task? It is asked where nobody says which task;
        of the tasks that say so the first one counts.

        Args:
            name: as it was given; of a network in memory, nothing.
            config: of a model that is not a directory, nor on the hub, nothing; of a network in memory, its own, with
                its class under `architectures`.
        """
        return False

    def open(self, name: str, **options: Any) -> Model:
        """The model of this name, a directory or what else the task knows, its weights not read yet where they need
        not be. Raises ModelError where there is none, or none for this task.

        Args:
            options: as the recipe and the caller say: dtype, device, tokenizer, remote_code, pickles.
        """
        raise ModelError(f"task '{self.name}' opens no '{name}': hand the network over in memory.")

    def settings(self) -> dict[str, Any]:
        """Options of the task that the recipe should say, beside those that it has, to open the model's directory."""
        return {}

    def wrap(self, network: nn.Module, tokenizer: Any = None, name: str = "") -> Model:
        """A network in memory as a `Model`; it stays on the device on which it is. Raises ModelError."""
        return wrap(network, self, tokenizer, name)

    def save(self, model: Model, folder: Path) -> None:
        """Write a model that is in memory, and what it takes to open it again."""
        network: Any = model.network
        if hasattr(network, "save_pretrained"):
            with quiet_transformers():
                network.save_pretrained(folder)
        else:
            from safetensors.torch import save_model

            save_model(network, str(folder / SINGLE))  # of tensors that are tied, one

    # --- samples

    @abstractmethod
    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        """`count` samples of a source, which the task knows how to read. Raises InputError.

        Args:
            count: None: all that the source has, to train on or to measure on; EndlessError where it has no end.
            used: so many at the beginning of the source are left out, as `size` counts them.
            seed: of what is drawn at random.
            test: they are to measure on, not to calibrate on.
        """

    def reads(self, model: Model) -> bool:
        """Can it read sources for this model? If not, samples have to be handed over."""
        return True

    def size(self, samples: Samples) -> int:
        """How much of a source these samples took: their number, or what else a source is counted in."""
        return len(samples)

    def about(self, samples: Samples) -> dict[str, Any]:
        """What the recipe's `calibration` should say of samples, beside source and number, to find them again."""
        return {}

    def example(self, network: nn.Module) -> Batch:
        """The smallest batch that the network takes, of one sample: to find its blocks with."""
        raise NotImplementedError

    def check(self, model: Model, samples: Samples) -> None:
        """Raises InputError for samples that the network cannot take, StepError for losses that are not one a sample.
        One of each group is tried where the weights are in memory."""
        if model.checkpoint is not None:
            return
        for group in samples.groups:
            one = on({key: tensor[:1] for key, tensor in group.items()}, model.device)
            try:
                with torch.no_grad():
                    outputs = self.run(model.network, one)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                shapes = {key: tuple(tensor.shape[1:]) for key, tensor in group.items()}
                raise InputError(
                    f"{type(model.network).__name__} does not take the samples of task '{self.name}', of shapes"
                    f" {shapes}: {first_line(error)}"
                ) from error
            with blamed(type(self), f"task '{self.name}'"):
                if self.lacks(one):
                    one[TARGET] = self.target(outputs, one)
                losses = self.losses(outputs, one)
                if losses.shape != (1,):
                    raise ValueError(f"losses of shape {tuple(losses.shape)} for one sample, expected (1,)")

    # --- what they are compared with

    def lacks(self, group: Batch) -> bool:
        """Have these samples no target of their own, labels say, so that `losses` needs what the dense network makes of
        them (`target`)?"""
        return False

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """Of what the dense network puts out for samples that lack a target, what others are compared with, (B, …); it
        stands among them by the name `samples.TARGET` from then on."""
        raise NotImplementedError

    # --- the network's blocks

    def stacks(self, network: nn.Module) -> tuple[tuple[str, ...], ...] | None:
        """Names of the network's blocks in the order in which they run, a tuple a stack; None where the task does not
        know them, and they are to be found. Raises ModelError."""
        return None

    def check_block(  # noqa: B027  (most ask nothing more)
        self, network: nn.Module, index: int, run: Callable[[Batch], tuple[Tensor, Any]], batch: Batch, dimension: int
    ) -> None:
        """Raises ModelError for a block that does what no network of this task does.

        Args:
            run: what enters the block and what it puts out when the network is run on a batch.
            batch: one to try.
            dimension: that of the hidden state along which samples are stacked.
        """

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        """What the network makes of a batch. `options` go to its forward pass."""
        return network(**given(batch), **options)

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of each sample (B,), from what `run` returned."""

    def parts(self, run: Callable[..., Any], batch: Batch) -> Iterator[Tensor]:
        """The loss of a batch of one sample, or parts that add up to it, each made when the one before it may go.

        Args:
            run: what the network makes of the batch; its keyword arguments go to the forward pass.
        """
        yield self.losses(run(), batch)[0]

    def divergence(self, outputs: Any, teacher: Any, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """How far outputs are from a teacher's: the mean over samples, differentiable in the former. By default the
        relative squared error of all that is put out; of logits that are probabilities, `divergence.kl` is better.

        Args:
            temperature: by which logits of both are divided.
        """
        return relative_error(outputs, teacher)

    # --- training

    @property
    def blind(self) -> bool:
        """Is there no loss, so that a network can only be compared with what another one puts out?"""
        return False

    def begun(self, name: str, folder: Path, sources: Sequence[str], *, seed: int = 0, **options: Any) -> str:
        """What the training of a dense network begins with: its name, or the new directory `folder`, where it was
        written with what it lacks for this task: a head for the classes in these sources, say, drawn by the seed.

        Args:
            options: as for `open`: dtype, remote_code, pickles.
        """
        return name

    def objective(
        self, outputs: Any, batch: Batch, teacher: Any = None, *, share: float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        """What training makes small: (1 - share) * loss + share * divergence from a teacher's outputs, the mean over
        samples; without a teacher the loss."""
        if teacher is None:
            return self.losses(outputs, batch).mean()
        far = self.divergence(outputs, teacher, batch, temperature=temperature)
        return far if share == 1 else (1 - share) * self.losses(outputs, batch).mean() + share * far

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Samples to train on as they might have been too: cut or mirrored at random, say. Raises InputError where the
        task knows none."""
        raise InputError(f"task '{self.name}' knows no augmentation: leave heal.augment out.")

    # --- what a report says

    def answers(self, outputs: Any, batch: Batch) -> Answers:
        """What `scores` needs to know of the outputs for a batch beside its losses, {what: (B, …)}: the classes that
        were chosen, say, or embeddings. Of one shape for all samples; nothing where the losses are enough."""
        return NO_ANSWERS

    def scores(
        self,
        model: Model,
        samples: Samples,
        losses: Sequence[float],
        answers: Answers = NO_ANSWERS,
        dense: Answers = NO_ANSWERS,
    ) -> dict[str, Any]:
        """What a report says of how good a network is on samples, plain data: the value of `figure` under its name,
        `samples` (how many), and where it is a mean over samples `each` (the figure of each sample) and `error`, its
        standard error; see `tasks.scores`. It may name another `figure` than the class, with `higher` and `unit`. Of
        no losses, that nothing was measured.

        Args:
            losses: of the samples, in order.
            answers: of the network, if `answers` says any.
            dense: those of the dense network, or of another one beside, on the same samples; nothing where it was not
                asked, and where it is the network itself.
        """
        if not losses:
            return {"loss": None}
        return {"samples": len(losses), "loss": sum(losses) / len(losses), "losses": list(losses)}

    def specimen(self, model: Model, checkpoint: Source | None = None) -> str | None:
        """Something that the model makes, for a reader to look at; of the weights in `checkpoint`, if one is given."""
        return None

    def fingerprint(self, samples: Samples) -> str:
        """By which samples that were calibrated or trained on are known again; empty where they cannot be. By default a
        hash of what is looked at in each of them."""
        return fingerprint_of(samples.hashes(self.labels))
