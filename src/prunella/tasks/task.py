"""What a network is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model.network import Model
    from ..samples import Batch, Samples


class Task(ABC):
    """What a network is for: how it is opened, what it is run on, and how good what it puts out is.

    Everything else (blocks, statistics, steps, stores) is the same for all tasks.
    """

    name = ""

    @abstractmethod
    def open(self, name: str, **options: Any) -> Model:
        """The model of this name, a directory or what else the task knows, its weights not read yet where they need
        not be. Raises ModelError where there is none, or none for this task."""

    @abstractmethod
    def samples(self, model: Model, source: str, count: int, **options: Any) -> Samples:
        """`count` samples of a source, which the task knows how to read. Raises InputError."""

    def example(self, network: nn.Module) -> Batch:
        """The smallest batch that the network takes, of one sample: to find its blocks with."""
        raise NotImplementedError

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        """What the network makes of a batch. `options` go to its forward pass."""
        return network(**batch, **options)

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of each sample (B,), from what `run` returned."""

    def divergence(self, outputs: Any, teacher: Any, batch: Batch) -> Tensor:
        """How far outputs are from a teacher's, one number, differentiable in the former."""
        raise NotImplementedError

    def check(self, model: Model, samples: Samples) -> None:  # noqa: B027  (most take any)
        """Raises InputError for samples that the network cannot take."""
