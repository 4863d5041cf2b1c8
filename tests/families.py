"""Tiny random networks of many families: pictures, and texts that are read from both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from nets import Sum, shaken
from torch import Tensor, nn

from prunella.samples import Batch
from prunella.trees import tensors

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
_VIT = {"image_size": 32, "patch_size": 8, **_SMALL}
_BERT = {"vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0, **_SMALL}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 32], "depths": [1, 2, 1]}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
}
_MIT = {
    **_STAGES,
    "num_encoder_blocks": 3,
    "num_attention_heads": [1, 2, 4],
    "mlp_ratios": [2, 2, 2],
    "strides": [4, 2, 2],
}
_DETR = {
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "d_model": 16,
    "num_queries": 5,
    "backbone_config": {
        "model_type": "resnet",
        **_STAGES,
        "embedding_size": 8,
        "layer_type": "basic",
        "out_features": ["stage3"],
    },
}


def _of(config: str, kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """A network of transformers by the names of its config and its class."""
    return lambda: getattr(t, kind)(getattr(t, config)(**settings))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        network: nn.Module = timm.create_model(name, num_classes=10, **options)
        return network

    return build


PICTURES: dict[str, Callable[[], nn.Module]] = {
    "vit": _of("ViTConfig", "ViTForImageClassification", **_VIT),
    "deit": _of("DeiTConfig", "DeiTForImageClassificationWithTeacher", **_VIT),
    "beit": _of("BeitConfig", "BeitForImageClassification", **_VIT, use_relative_position_bias=True),
    "dinov2": _of("Dinov2Config", "Dinov2ForImageClassification", **_VIT),
    "swin": _of("SwinConfig", "SwinForImageClassification", **_SWIN),
    "swinv2": _of("Swinv2Config", "Swinv2ForImageClassification", **_SWIN),
    "convnext": _of("ConvNextConfig", "ConvNextForImageClassification", **_STAGES, num_stages=3),
    "convnextv2": _of("ConvNextV2Config", "ConvNextV2ForImageClassification", **_STAGES, num_stages=3),
    "resnet": _of("ResNetConfig", "ResNetForImageClassification", embedding_size=8, **_STAGES),
    "regnet": _of("RegNetConfig", "RegNetForImageClassification", embedding_size=8, groups_width=4, **_STAGES),
    "mobilenet_v1": _of("MobileNetV1Config", "MobileNetV1ForImageClassification", depth_multiplier=0.25),
    "mobilenet_v2": _of("MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.25),
    "segformer": _of("SegformerConfig", "SegformerForImageClassification", **_MIT, sr_ratios=[4, 2, 1]),
    "poolformer": _of("PoolFormerConfig", "PoolFormerForImageClassification", **_MIT, padding=[2, 1, 1]),
    "levit": _of(
        *("LevitConfig", "LevitForImageClassification"),
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 2, 2],
        depths=[1, 2, 1],
        key_dim=[8, 8, 8],
    ),
    "clip": _of("CLIPVisionConfig", "CLIPVisionModelWithProjection", projection_dim=16, **_VIT),
    "siglip": _of("SiglipVisionConfig", "SiglipVisionModel", **_VIT),
    "detr": _of("DetrConfig", "DetrForObjectDetection", **_DETR),
    "pvt": _of(
        *("PvtConfig", "PvtForImageClassification"),
        **{"image_size": 32, **_MIT, "patch_sizes": [4, 2, 2], "sequence_reduction_ratios": [4, 2, 1]},
    ),
    "timm resnet": _timm("test_resnet"),
    "timm mobilenetv3": _timm("mobilenetv3_small_050"),
    "timm efficientnet": _timm("test_efficientnet"),
    "timm vit": _timm("test_vit", img_size=32),
    "timm convnext": _timm("test_convnext"),
    "timm byobnet": _timm("test_byobnet"),
    "timm densenet": _timm("densenet121", growth_rate=4, block_config=(2, 2, 2)),
    "timm mixer": _timm("mixer_s32_224", img_size=32),
    "timm hrnet": _timm("hrnet_w18_small"),
}
TEXTS: dict[str, Callable[[], nn.Module]] = {
    "bert": _of("BertConfig", "BertForSequenceClassification", **_BERT),
    "roberta": _of("RobertaConfig", "RobertaForSequenceClassification", **_BERT),
    "distilbert": _of(
        *("DistilBertConfig", "DistilBertForSequenceClassification"),
        vocab_size=100,
        dim=16,
        n_layers=3,
        n_heads=4,
        hidden_dim=32,
        max_position_embeddings=64,
    ),
    "electra": _of("ElectraConfig", "ElectraForSequenceClassification", embedding_size=8, **_BERT),
    "albert": _of("AlbertConfig", "AlbertForSequenceClassification", embedding_size=8, **_BERT),
    "deberta": _of(
        *("DebertaV2Config", "DebertaV2ForSequenceClassification"),
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, **_BERT},
    ),
    "modernbert": _of(
        *("ModernBertConfig", "ModernBertForSequenceClassification"),
        **{**_BERT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "mpnet": _of("MPNetConfig", "MPNetForMaskedLM", **_BERT),
    "xlm-roberta": _of("XLMRobertaConfig", "XLMRobertaForMaskedLM", **_BERT),
    "camembert": _of("CamembertConfig", "CamembertModel", **_BERT),
    "roformer": _of("RoFormerConfig", "RoFormerForSequenceClassification", **_BERT),
    "squeezebert": _of(
        *("SqueezeBertConfig", "SqueezeBertForSequenceClassification"),
        **{**_BERT, "embedding_size": 16, "q_groups": 2, "k_groups": 2, "v_groups": 2, "output_groups": 2},
        intermediate_groups=2,
    ),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "xlnet": (
        _of(
            *("XLNetConfig", "XLNetForSequenceClassification"),
            vocab_size=100,
            d_model=16,
            n_layer=2,
            n_head=4,
            d_inner=32,
        ),
        "XLNetForSequenceClassification cannot be run one by one: its hidden state has no dimension of its own",
    ),
    "funnel": (
        _of(
            *("FunnelConfig", "FunnelForSequenceClassification"),
            vocab_size=100,
            block_sizes=[2, 2],
            d_model=16,
            n_head=4,
            d_head=4,
            d_inner=32,
        ),
        "FunnelForSequenceClassification cannot be run one by one",
    ),
    # Its weights are standardized before they multiply: a zero of theirs is none then.
    "timm nfnet": (_timm("test_nfnet"), "layer 'stem.conv1' was not seen at work"),
}
KINDS = PICTURES | TEXTS
WHOLE = ("pvt", "albert", "timm hrnet")  # no chains: branches, one block many times
QUICK = ("vit", "beit", "swin", "convnext", "resnet", "mobilenet_v2", "timm efficientnet", "bert", "deberta", "albert")
SIZES = {"levit": 64, "timm hrnet": 64, "detr": 64}


class First(Sum):
    """The loss of a sample is the mean square of the first numbers that are put out for it."""

    def __init__(self) -> None:
        super().__init__({})

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        if type(network).__module__.startswith("timm"):
            return network(*batch.values())
        return super().run(network, batch, **options)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return super().losses(next(one for one in tensors(outputs) if one.is_floating_point()), batch)


def build(kind: str) -> nn.Module:
    """A random network, the same every time."""
    torch.manual_seed(0)
    network = KINDS[kind]() if kind in KINDS else REFUSED[kind][0]()
    if kind == "timm hrnet":  # so deep that it overflows
        return network.eval()
    kept = network.state_dict().keys()
    made = {name: buffer.clone() for name, buffer in network.named_buffers() if name not in kept}
    shaken(network)
    for name, buffer in made.items():  # positions, which are not in its files
        network.get_buffer(name).copy_(buffer)
    return network


def groups_of(kind: str, count: int = 3) -> list[Batch]:
    """What it is run on: pictures of a size, or texts of two lengths."""
    torch.manual_seed(1)
    if kind in PICTURES or kind.startswith("timm"):
        size = SIZES.get(kind, 32)
        return [{"pixel_values": torch.randn(count, 3, size, size)}]
    return [{"input_ids": torch.randint(3, 100, (count, length))} for length in (12, 8)]
