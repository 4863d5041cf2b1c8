"""What is refused of a network in memory, whatever it is for."""

from __future__ import annotations

from typing import Any

from torch.nn.parameter import is_lazy

from ..compat import quiet_transformers
from ..errors import ModelError


def check_plain(network: Any) -> None:
    """Raises ModelError for a network in memory whose weights are made of others, a PeftModel, or one under
    torch.nn.utils.prune or parametrize; and for one that has none yet."""
    from torch.nn.utils import parametrize
    from torch.nn.utils import prune as reparametrization

    kind = type(network).__name__
    if lazy := [name for name, parameter in network.named_parameters() if is_lazy(parameter)]:
        raise ModelError(f"the {kind} is lazy, '{lazy[0]}' has no shape yet: run it once first.")
    if (
        kind.startswith("Peft")
        or getattr(network, "peft_config", None)
        or any(hasattr(module, "base_layer") for module in network.modules())
    ):
        raise ModelError(f"the {kind} carries an adapter: merge it first (model.merge_and_unload()).")
    if reparametrization.is_pruned(network):
        raise ModelError(
            f"the {kind} is under torch.nn.utils.prune: call prune.remove first, on each module and parameter."
        )
    if any(parametrize.is_parametrized(module) for module in network.modules()):
        raise ModelError(
            f"the {kind} is under torch.nn.utils.parametrize: call parametrize.remove_parametrizations first."
        )


def check_saveable(network: Any) -> None:
    """Raises ModelError for a network in memory that transformers would not save: its generation config is invalid."""
    if hasattr(network, "can_generate") and network.can_generate():
        try:
            with quiet_transformers():
                network.generation_config.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"the generation config of the {type(network).__name__} is invalid, and cannot be saved:"
                f" {' '.join(str(error).split())} Mend model.generation_config first."
            ) from None
