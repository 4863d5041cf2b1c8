"""What a network is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compat import quiet_transformers
from ..errors import InputError, ModelError, first_line
from ..foreign import blamed
from ..samples import on
from .files import SINGLE
from .open import wrap

if TYPE_CHECKING:
    from ..samples import Batch, Samples
    from .checkpoint import Source
    from .network import Model


Answers = Mapping[str, Tensor]  # what a network answers on samples, {what: (N, …)}, a sample a row
NO_ANSWERS: Answers = MappingProxyType({})


class Task(ABC):
    """What a network is for: how it is opened, what it is run on, and how good what it puts out is.

    Everything else (blocks, statistics, steps, stores) is the same for all tasks. `samples` and `losses` are what a
    task has to say; a network that is handed over in memory needs no more.

    name:     what users call it
    source:   where its samples come from if nobody says so
    argument: what the network calls samples that are handed over as one tensor
    figure:   that of `scores` which says how good it is
    higher:   is more of it better?
    unit:     how it is shown: `%` of a share, or nothing
    language: networks are causal language models of transformers, of which more is known than of others
    in_blocks: share of the weights in matrices, no embeddings, that a network's blocks hold at least; where they would
              hold less, and the rest stay dense, the whole network is one block
    """

    name = ""
    source = ""
    argument = "input_ids"
    figure = "loss"
    higher = False
    unit = ""
    language = False
    in_blocks = 0.5

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
        self, model: Model, source: str, count: int, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        """`count` samples of a source, which the task knows how to read. Raises InputError.

        Args:
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
                losses = self.losses(outputs, one)
                if losses.shape != (1,):
                    raise ValueError(f"losses of shape {tuple(losses.shape)} for one sample, expected (1,)")

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
        return network(**batch, **options)

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of each sample (B,), from what `run` returned."""

    def parts(self, run: Callable[..., Any], batch: Batch) -> Iterator[Tensor]:
        """The loss of a batch of one sample, or parts that add up to it, each made when the one before it may go.

        Args:
            run: what the network makes of the batch; its keyword arguments go to the forward pass.
        """
        yield self.losses(run(), batch)[0]

    def divergence(self, outputs: Any, teacher: Any, batch: Batch) -> Tensor:
        """How far outputs are from a teacher's, one number, differentiable in the former."""
        raise NotImplementedError

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
        """By which `prunella eval` knows samples that were calibrated on; empty where it cannot."""
        return ""
