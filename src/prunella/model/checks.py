"""What can be pruned, and what is refused."""

from __future__ import annotations

from typing import Any

from ..compat import quiet_transformers
from ..errors import ModelError
from .network import Model

_OWN_MASKS = ("git",)  # hide what comes later, though their attention says that it is not causal
_BOTH_WAYS = ("cpmant", "xlnet")  # see tokens that come later, and nothing in their config says so


def check_causal(model: Model) -> None:
    """Raises ModelError for what would see the answer: encoders, and decoders that attend to an encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.network.config
    if config.is_encoder_decoder:
        raise no_decoder(model.name, f"{config.model_type} is an encoder and a decoder")
    modules = [m for block in model.blocks for m in model.module(block).modules()]
    flags = {bool(m.is_causal) for m in modules if isinstance(getattr(m, "is_causal", None), bool)}
    if len(flags) > 1:
        raise no_decoder(model.name, f"this {config.model_type} is a decoder that attends to an encoder")
    switch = getattr(config, "is_decoder", getattr(config, "causal", None))  # of families that are both
    if flags and config.model_type not in _OWN_MASKS:
        causal = flags == {True}
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        causal = bool(switch)
    else:
        causal = config.model_type not in _BOTH_WAYS
    if not causal:
        raise no_decoder(model.name, f"{config.model_type} is an encoder, whose predictions see the word to predict")


def no_decoder(name: str, why: str) -> ModelError:
    """What is said of a network that is no causal language model."""
    return ModelError(f"'{name}' is no causal language model: {why}. Only decoders can be pruned yet.")


def check_plain(network: Any) -> None:
    """Raises ModelError for a network in memory whose weights are made of others: a PeftModel, or one under
    torch.nn.utils.prune or parametrize."""
    from torch.nn.utils import parametrize
    from torch.nn.utils import prune as reparametrization

    kind = type(network).__name__
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
    if network.can_generate():
        try:
            with quiet_transformers():
                network.generation_config.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"the generation config of the {type(network).__name__} is invalid, and cannot be saved:"
                f" {' '.join(str(error).split())} Mend model.generation_config first."
            ) from None
